"""Laws of features: zero at equality, and blind to what they promise not to see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from unitscale_jax.distill import (
    cosine,
    features,
    hidden_mse,
    layer_map,
)

SHAPE = (2, 5, 6)  # (batch, positions, channels)
states = hnp.arrays(np.float32, SHAPE, elements=st.floats(-4, 4, width=32))
LOSSES = {
    "hidden_mse": hidden_mse,
    "cosine": cosine,
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def with_gradient(loss, t, s):
    return loss(t, s), jax.grad(lambda s: jnp.sum(loss(t, s)))(s)


@losses
@given(t=states, s=states)
def test_is_not_negative_and_finite_with_its_gradient(loss, t, s):
    rows, grad = with_gradient(loss, t, s)
    assert rows.dtype == jnp.float32
    assert np.all(np.asarray(rows) >= 0) and np.all(np.isfinite(grad))


@losses
@given(t=states)
def test_is_zero_with_zero_gradient_at_equality(loss, t):
    t = np.round(t * 8) / 8
    t[..., 0] += 0.5 * np.all(t == 0, axis=-1)  # zero has no direction
    rows, grad = with_gradient(loss, t, t)
    np.testing.assert_allclose(rows, 0, atol=1e-6)
    np.testing.assert_allclose(grad, 0, atol=1e-5)


@losses
def test_no_gradient_reaches_the_teacher(loss):
    t, s = normal(0, 2, *SHAPE)
    assert not np.any(jax.jit(jax.grad(lambda t: jnp.sum(loss(t, s))))(t))


@losses
def test_sums_in_float32(loss):
    t, s = jnp.asarray(normal(1, 2, *SHAPE)).astype(jnp.bfloat16)
    wide = loss(t.astype(jnp.float32), s.astype(jnp.float32))
    np.testing.assert_array_equal(loss(t, s), wide)
    assert wide.dtype == jnp.float32


def test_a_projection_brings_the_student_to_the_teachers_width():
    t, s, p = normal(11, 2, 5, 8), normal(12, *SHAPE), normal(13, 6, 8)
    np.testing.assert_allclose(
        hidden_mse(t, s, projection=p), np.mean((s @ p - t) ** 2, axis=-1), rtol=1e-5
    )
    grad = jax.jit(jax.grad(lambda p: jnp.sum(cosine(t, s, projection=p))))(p)
    assert np.all(np.isfinite(grad)) and np.any(grad)


def test_zero_states_have_cosine_zero():
    zero = jnp.zeros((1, 4))
    assert cosine(zero, jnp.ones((1, 4))).item() == 1
    assert not np.any(jax.grad(lambda s: cosine(jnp.ones((1, 4)), s).sum())(zero))


def test_a_student_just_compacted_has_no_distance_from_the_masked_teacher_by_index():
    kept = np.array([0, 2, 3, 6])
    dense = {"up": normal(14, 5, 8), "down": normal(15, 8, 3)}
    mask = np.isin(np.arange(8), kept)
    masked = {"up": np.where(mask, dense["up"], 0), "down": dense["down"]}
    compact = {"up": dense["up"][:, kept], "down": dense["down"][kept]}
    mlp = lambda params, x: jax.nn.relu(x @ params["up"]) @ params["down"]
    inside = features(mlp, {"hidden": "down:input"})
    x = normal(16, 9, 5)
    t, s = (inside(params, x)[1]["hidden"] for params in (masked, compact))
    # Products of different shapes may add up in different orders: each is off by its rounding.
    sums = np.abs(x) @ np.abs(compact["up"])
    rounding = 2 * len(dense["up"]) * np.finfo(np.float32).eps * sums.max()
    assert np.all(hidden_mse(t, s, index=kept) <= rounding**2)
    np.testing.assert_allclose(cosine(t, s, index=kept)[np.any(s, -1)], 0, atol=1e-6)


def test_each_layer_of_a_student_has_the_last_of_its_share_of_the_teachers():
    assert layer_map(12, 4) == (2, 5, 8, 11)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: hidden_mse(jnp.zeros((2, 8)), jnp.zeros((2, 6))),
            r"\(2, 8\).*\(2, 6\).*projection",
        ),
        (lambda: cosine(jnp.zeros(8), jnp.zeros(6), projection=jnp.zeros((8, 6))), "projected"),
        (lambda: hidden_mse(jnp.zeros(3), jnp.zeros(1), index=[3]), "names channel 3.* has 3"),
        (lambda: hidden_mse(jnp.zeros(3), jnp.zeros(1), index=[-1]), "names channel -1"),
        (lambda: layer_map(12, 5), "5 layers of the student do not divide the teacher's 12"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_index_may_be_an_array_made_outside_of_the_traced_function():
    t, s, index = jnp.arange(8.0).reshape(2, 4), jnp.ones((2, 2)), jnp.array([3, 1])
    loss = lambda t, s: hidden_mse(t, s, index=index)
    assert (jax.jit(loss)(t, s) == loss(t, s)).all()
