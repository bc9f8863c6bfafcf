"""Laws of the scalar that the result of a loss stands for."""

import jax.numpy as jnp
import numpy as np
import pytest

import unitscale_jax as us
from unitscale_jax.loss import objective

TERMS = {
    "a scalar": (jnp.float32(3.0), 3.0),
    "a bfloat16 scalar": (jnp.bfloat16(3.0), 3.0),
    "a number": (3.0, 3.0),
    "a mean": (us.Mean(6.0, 3), 2.0),
    "a mean with a factor": (us.Mean(6.0, 3, coef=0.5), 1.0),
    "a mean of rows": (us.Mean(jnp.array([1.0, 5.0]), jnp.array([1, 2])), 2.0),
    "terms": ({"a": us.Mean(6.0, 3), "b": jnp.float32(1.0)}, 3.0),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("pair", [False, True])
def test_is_the_sum_of_totals_over_weights(name, pair):
    terms, expected = TERMS[name]
    got = objective((terms, {"anything": None}) if pair else terms)
    assert got == expected and got.shape == () and jnp.finfo(got.dtype).bits >= 32


@pytest.mark.parametrize(
    ("result", "what"),
    [
        (jnp.ones(2), r"the result of the function is an array float32\[2\].*take the loss"),
        (np.int32(1), r"the result of the function is an array int32"),
        ("text", "the result of the function is 'text'"),
        ({"ce": jnp.ones((2, 3))}, r"term 'ce' of the loss is an array float32\[2,3\]"),
        ({}, "no terms"),
    ],
)
def test_anything_else_is_an_error_that_names_it(result, what):
    with pytest.raises(ValueError, match=what):
        objective(result)
