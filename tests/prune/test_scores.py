"""Laws of scores."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import unitscale_jax as us
from unitscale_jax.prune import fisher, magnitude, movement, random, saliency

STEPS, SHAPE = 4, (3, 2)
arrays = hnp.arrays(np.float32, (STEPS, *SHAPE), elements=st.floats(-4, 4, width=32))
SCORES = {
    "magnitude": magnitude(),
    "saliency": saliency(),
    "random": random(3),
    "fisher": fisher(0.9),
    "movement": movement(),
}
ALL = pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)


@functools.partial(jax.jit, static_argnums=0)
def after(score, grads, weights, count=1):
    """The scores after as many steps as there are gradients."""
    state = score.init(weights[0])
    for g, w in zip(grads, weights, strict=True):
        state = score.update(state, g, w)
    return score.value(state, grads[-1], weights[-1], count)


ORACLES = {
    "magnitude": lambda w, g: np.abs(w[-1]),
    "saliency": lambda w, g: np.abs(w[-1] * g[-1]),
    "movement": lambda w, g: -np.sum(w * g, axis=0),
    "fisher": lambda w, g: (
        w[-1] ** 2 / 2 * np.average(g**2, axis=0, weights=0.9 ** np.arange(4)[::-1])
    ),
}


@pytest.mark.parametrize("name", ORACLES)
@given(grads=arrays, weights=arrays)
def test_is_its_formula(name, grads, weights):
    wide = ORACLES[name](weights.astype(np.float64), grads.astype(np.float64))
    got = after(SCORES[name], jnp.asarray(grads), jnp.asarray(weights))
    np.testing.assert_allclose(got, wide, rtol=1e-5, atol=1e-5)


@ALL
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_is_float32_of_any_dtype(score, dtype):
    # Of 1 + 2^-7 the square is no number of bfloat16.
    w = jnp.full((STEPS, *SHAPE), 1 + 2**-7, dtype)
    got, wide = after(score, w, w), after(score, *2 * [w.astype(jnp.float32)])
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, wide)


@ALL
def test_what_is_not_floating_is_nan_and_stays_out_of_the_state(score):
    quantized = us.quantize({"q": jnp.ones((4, 4))}, [("q", us.DotSpec(w=us.QSpec(axes=(-2,))))])
    params = {"w": jnp.ones(SHAPE), "n": jnp.arange(3), **quantized}
    grads = {"w": jnp.ones(SHAPE), "n": None, "q": None}
    value = score.value(score.update(score.init(params), grads, params), grads, params, 1)
    assert value["w"].shape == SHAPE and np.isnan(value["n"]) and np.isnan(value["q"])


@ALL
def test_commutes_with_jit(score):
    w, g = (jnp.asarray(np.random.default_rng(s).normal(size=(2, *SHAPE))) for s in (0, 1))
    chex.assert_trees_all_close(after(score, g, w), after.__wrapped__(score, g, w), rtol=1e-6)


def test_a_draw_depends_on_path_and_update_and_on_nothing_else():
    draw = lambda seed, params, count: random(seed).value((), None, params, count)
    a, b = jnp.ones(50), jnp.ones(50)
    both, alone = draw(0, {"a": a, "b": b}, 1), draw(0, {"a": -a}, jnp.int32(1))
    np.testing.assert_array_equal(both["a"], alone["a"])
    for other in (both["b"], draw(1, {"a": a}, 1)["a"], draw(0, {"a": a}, 2)["a"]):
        assert np.mean(np.equal(other, both["a"])) < 0.1


def test_draws_are_uniform():
    x = np.asarray(random(0).value((), None, {"w": jnp.ones(10_000)}, 1)["w"])
    assert x.min() >= 0 and x.max() < 1 and abs(x.mean() - 0.5) < 0.01


def test_movement_is_signed():
    """Of two weights equally large, the one that grows stays."""
    w, g = jnp.array([1.0, 1.0]), jnp.array([1.0, -1.0])  # the first shrinks: w -= rate g
    assert np.argmax(after(movement(), [g], [w])) == 1


@pytest.mark.parametrize("decay", [-0.1, 1.0, np.nan])
def test_a_decay_out_of_range_is_an_error(decay):
    with pytest.raises(ValueError, match=r"decay is .* \[0, 1\)"):
        fisher(decay)
