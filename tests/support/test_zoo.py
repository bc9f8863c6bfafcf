"""The zoo holds what it says."""

import jax
import jax.numpy as jnp
import pytest

import unitscale_jax as us
from tests.support import zoo

EVERY = pytest.mark.parametrize("name", zoo.NAMES)


@EVERY
def test_outputs_and_gradients_are_finite_and_no_parameter_is_idle(name):
    model = zoo.model(name)
    run = jax.value_and_grad(model.loss) if model.differentiable else model.loss
    got = jax.jit(lambda *args: (run(*args), model.apply(*args)))(model.params, *model.inputs)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(got))
    if model.differentiable:
        gradients = us.tree.named_leaves(got[0][1])
        idle = [leaf for leaf, g in gradients.items() if float(jnp.abs(g).max()) < 1e-6]
        assert not idle
