"""Law U23: products on 8-bit floats with scales of 1 are the simulated ones, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unitscale_jax as us

X = jax.random.normal(jax.random.key(1), (6, 4))


def dense(p, x):
    return x @ p["w"]


def mlp(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def convolved(p, x):
    return jax.lax.conv_general_dilated(x.reshape(2, 1, 3, 4), p["k"], (1, 1), "SAME")


PARAMS = {
    dense: {"w": jax.random.normal(jax.random.key(0), (4, 3))},
    mlp: {
        "w": jax.random.normal(jax.random.key(2), (4, 5)),
        "v": jax.random.normal(jax.random.key(3), (5, 3)),
    },
    convolved: {"k": jax.random.normal(jax.random.key(4), (2, 1, 3, 3))},
}


@pytest.mark.parametrize("size", [1.0, 1e-3, 100.0])
@pytest.mark.parametrize("fn", PARAMS)
def test_codes_with_scales_of_one_are_the_simulation(fn, size):
    params, x = PARAMS[fn], size * X
    y, pull = jax.vjp(us.simulated(fn), params, x)
    coded, coded_pull = jax.vjp(us.quantized(fn, {"**": us.quant.fp8}), params, x)
    ct = jnp.cos(jnp.arange(float(y.size))).reshape(y.shape)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    same((y, pull(ct)), (coded, coded_pull(ct)))
