"""Laws of a cache of k logits: below the divergence of all, and nothing lost by waiting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from unitscale_jax.distill import TopK, cache_top_k, kl, kl_top_k, top_k

ROWS, SIZE = 3, 7
logits = hnp.arrays(np.float32, (ROWS, SIZE), elements=st.floats(-8, 8, width=32))


@jax.jit
def divergences(t, s):
    """Of caches for every k, and of all entries."""
    return [kl_top_k(top_k(t, k, 2.0), s) for k in range(1, SIZE + 1)], kl(t, s, 2.0)


@given(t=logits, s=logits)
def test_is_below_the_divergence_of_all_and_grows_with_k(t, s):
    cached, full = divergences(t, s)
    for less, more in zip([np.zeros(ROWS), *cached], [*cached, full], strict=True):
        assert np.all(np.asarray(less) <= np.asarray(more) + 1e-4)
    for cache in cached[-2:]:  # one entry in the bucket, and none
        np.testing.assert_allclose(cache, full, rtol=1e-4, atol=1e-4)


@functools.partial(jax.jit, static_argnums=2)
def gradient(t, s, k):
    return jax.grad(lambda s: jnp.sum(kl_top_k(top_k(t, k, 2.0), s)))(s)


@pytest.mark.parametrize("k", [1, 3, SIZE - 1, SIZE])
@given(t=logits)
def test_the_gradient_is_zero_where_student_and_teacher_agree(k, t):
    np.testing.assert_allclose(gradient(t, t, k), 0, atol=2e-5)


@given(t=logits, s=logits)
def test_the_gradient_is_that_of_k_and_one_events(t, s):
    t = t + np.float32(0)  # no -0, which `argsort` takes for 0
    p, q = (np.exp(x / 2) / np.sum(np.exp(x / 2), axis=-1, keepdims=True) for x in (t, s))
    top = np.argsort(-t, axis=-1, kind="stable")[:, :3]
    inside = np.zeros((ROWS, SIZE), bool)
    np.put_along_axis(inside, top, True, axis=-1)
    tail = lambda x: np.sum(np.where(inside, 0, x), axis=-1, keepdims=True)
    target = np.where(inside, p, tail(p) * q / tail(q))
    np.testing.assert_allclose(gradient(t, s, 3), 2 * (q - target), atol=2e-5)


def test_a_cache_of_a_teacher_is_that_of_the_live_one():
    w = jax.random.normal(jax.random.key(0), (5, SIZE))
    batches = list(jax.random.normal(jax.random.key(1), (3, ROWS, 5)))
    live = jax.jit(lambda x: top_k(x @ w, 3, 2.0))
    for cache, batch in zip(cache_top_k(lambda x: x @ w, batches, 3, 2.0), batches, strict=True):
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(cache))
        jax.tree.map(np.testing.assert_array_equal, cache, live(batch))


def test_keeps_the_lower_index_of_equals():
    assert top_k(jnp.zeros((1, 5)), 2).indices.tolist() == [[0, 1]]


def test_its_leaves_have_the_rows_in_front():
    cache = top_k(jnp.zeros((ROWS, SIZE)), 2)
    assert all(x.shape[0] == ROWS for x in jax.tree.leaves(cache))
    parts = jax.tree.map(lambda x: x[:2], cache)
    assert isinstance(parts, TopK) and parts.temperature == 1.0


def test_entries_that_do_not_exist_have_no_tail():
    t = jnp.array([[1.0, 2.0, -jnp.inf, -jnp.inf]])
    s = jnp.array([[0.5, 1.0, -jnp.inf, -jnp.inf]])
    value = jax.jit(jax.value_and_grad(lambda s: kl_top_k(top_k(t, 2), s).sum()))
    total, grad = value(s)
    np.testing.assert_allclose(total, kl(t, s).sum(), rtol=1e-5)
    assert np.all(np.isfinite(grad))


def test_no_gradient_reaches_the_teacher():
    t = jax.random.normal(jax.random.key(2), (ROWS, SIZE))
    grad = jax.jit(jax.grad(lambda t: jnp.sum(kl_top_k(top_k(t, 2), jnp.zeros_like(t)))))(t)
    assert not np.any(grad)


def test_the_worked_example():
    t = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))
    derived = lambda **how: jax.jit(jax.value_and_grad(lambda s: kl_top_k(top_k(t, 2), s, **how)))(
        t
    )
    value, grad = derived()
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(grad, 0, atol=1e-6)
    value, grad = derived(renormalized=True)
    np.testing.assert_allclose(value, np.log(4 / 3), rtol=1e-5)
    np.testing.assert_allclose(grad, [-1 / 6, -1 / 12, 1 / 8, 1 / 8], atol=1e-6)
    uniform = jnp.zeros(4)
    np.testing.assert_allclose(kl(t, uniform), 0.173287, atol=1e-6)
    tail = jax.jit(lambda t: [kl_top_k(top_k(t, k), uniform) for k in (1, 2, 3)])(t)
    np.testing.assert_allclose(tail, [0.143841, 0.173287, 0.173287], atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k(jnp.zeros(5), 6), "k is 6; expected 1 to 5"),
        (lambda: top_k(jnp.zeros(5), 0), "k is 0; expected 1 to 5"),
        (lambda: top_k(jnp.zeros(5), 1, 0.0), "temperature is 0.0"),
        (lambda: cache_top_k(lambda x: x, [], 1, -1.0), "temperature is -1.0"),
        (lambda: jax.jit(functools.partial(top_k, jnp.zeros(5), 1))(1.0), "one cache for each"),
        (lambda: kl_top_k(top_k(jnp.zeros((2, 5)), 1), jnp.zeros((3, 5))), "same rows"),
        (lambda: kl_top_k(top_k(jnp.zeros((2, 5)), 4), jnp.zeros((2, 3))), "4 entries or more"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
