"""Laws of soft targets: zero only at equality, gradients as in the formula, any temperature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from unitscale_jax.distill import jsd, kl, reverse_kl

ROWS, SIZE = 3, 7
TOLERANCE = 200 * np.finfo(np.float32).eps
INF = jnp.inf

LOSSES = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "jsd .1": functools.partial(jsd, beta=0.1),
}
losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
logits = hnp.arrays(np.float32, (ROWS, SIZE), elements=st.floats(-20, 20, width=32))
temperatures = st.sampled_from([0.5, 1.0, 4.0, 100.0])


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(loss, t, s, temperature):
    total, grad = jax.value_and_grad(lambda s: jnp.sum(loss(t, s, temperature)))(s)
    return total, grad, loss(t, s, temperature)


def oracle(t, s, temperature):
    """In float64, as the formula stands."""
    t, s = (np.asarray(x, np.float64) / temperature for x in (t, s))
    log = lambda x: (
        x
        - x.max(-1, keepdims=True)
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
    )
    log_p, log_q = log(t), log(s)
    p, q = np.exp(log_p), np.exp(log_q)
    return log_p, log_q, p, q


@given(t=logits, s=logits, temperature=temperatures)
def test_kl_and_its_gradient_are_those_of_the_formula(t, s, temperature):
    log_p, log_q, p, q = oracle(t, s, temperature)
    _, grad, rows = value_and_gradient(kl, t, s, temperature)
    expected = temperature**2 * np.sum(p * (log_p - log_q), -1)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad, temperature * (q - p), rtol=1e-4, atol=1e-5 * temperature)


@given(t=logits, s=logits)
def test_the_others_are_those_of_the_formula(t, s):
    log_p, log_q, p, q = oracle(t, s, 2.0)
    reverse = 4 * np.sum(q * (log_q - log_p), -1)
    np.testing.assert_allclose(
        value_and_gradient(reverse_kl, t, s, 2.0)[2], reverse, rtol=1e-4, atol=1e-5
    )
    m = 0.1 * p + 0.9 * q
    divergence = lambda a: np.sum(a * (np.log(a) - np.log(m)), -1)
    expected = 4 * (0.1 * divergence(p) + 0.9 * divergence(q))
    got = value_and_gradient(LOSSES["jsd .1"], t, s, 2.0)[2]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@losses
@given(t=logits, s=logits, temperature=temperatures)
def test_is_not_negative(loss, t, s, temperature):
    _, grad, rows = value_and_gradient(loss, t, s, temperature)
    assert np.all(np.asarray(rows) >= -1e-6 * temperature**2)
    assert np.all(np.isfinite(grad))


@losses
@given(t=logits, shift=st.integers(-64, 64), temperature=temperatures)
def test_is_zero_with_zero_gradient_at_equality_up_to_a_constant(loss, t, shift, temperature):
    t = np.round(t * 8) / 8  # so that adding the constant is exact
    total, grad, _ = value_and_gradient(loss, t, t + np.float32(shift), temperature)
    np.testing.assert_allclose(total, 0, atol=1e-6 * temperature**2)
    np.testing.assert_allclose(grad, 0, atol=1e-6 * temperature)


@losses
@given(t=logits, s=logits, shift=st.integers(-64, 64))
def test_ignores_a_constant_added_to_a_row(loss, t, s, shift):
    t, s = (np.round(x * 8) / 8 for x in (t, s))
    _, grad, rows = value_and_gradient(loss, t, s, 2.0)
    for moved in ((t + np.float32(shift), s), (t, s + np.float32(shift))):
        _, other_grad, other = value_and_gradient(loss, *moved, 2.0)
        np.testing.assert_allclose(other, rows, rtol=TOLERANCE, atol=TOLERANCE)
        np.testing.assert_allclose(other_grad, grad, rtol=TOLERANCE, atol=TOLERANCE)


@losses
def test_no_gradient_reaches_the_teacher(loss):
    t, s = jax.random.normal(jax.random.key(0), (2, ROWS, SIZE))
    grad = jax.jit(jax.grad(lambda t: jnp.sum(loss(t, s, 2.0))))(t)
    assert not np.any(grad)


def test_tends_to_a_square_of_differences_as_the_temperature_grows():
    t, s = 3 * jax.random.normal(jax.random.key(1), (2, ROWS, SIZE))
    center = lambda x: x - jnp.mean(x, axis=-1, keepdims=True)
    _, grad, rows = value_and_gradient(kl, t, s, 1e4)
    np.testing.assert_allclose(grad, (center(s) - center(t)) / SIZE, rtol=1e-2, atol=1e-3)
    square = jnp.sum((center(s) - center(t)) ** 2, axis=-1) / (2 * SIZE)
    np.testing.assert_allclose(rows, square, rtol=1e-2)


def test_has_the_whole_gradient_where_a_ratio_is_exactly_e():
    t, s = jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0])  # the two ways to sum a term meet there
    p, q = jax.nn.softmax(t / 2), jax.nn.softmax(s / 2)
    for shift in (-1e-3, 0.0, 1e-3):
        _, grad, _ = value_and_gradient(kl, t, s + jnp.array([0.0, shift]), 2.0)
        np.testing.assert_allclose(grad, 2 * (q - p), atol=2e-3)


def test_jsd_tends_to_both_divergences():
    t, s = jax.random.normal(jax.random.key(2), (2, ROWS, SIZE))
    small = 1e-4
    np.testing.assert_allclose(jsd(t, s, beta=small) / small, kl(t, s), rtol=1e-2)
    np.testing.assert_allclose(jsd(t, s, beta=1 - small) / small, reverse_kl(t, s), rtol=1e-2)


@losses
def test_entries_that_do_not_exist_change_nothing(loss):
    t, s = jax.random.normal(jax.random.key(3), (2, ROWS, SIZE))
    wider = lambda x, fill: jnp.concatenate([x[:, :3], jnp.full((ROWS, 2), fill), x[:, 3:]], axis=1)
    there = jnp.array([True] * 3 + [False] * 2 + [True] * 4)
    value = lambda fill, **where: jax.jit(
        jax.value_and_grad(lambda s: jnp.sum(loss(wider(t, fill), wider(s, fill), 2.0, **where)))
    )(s)
    expected = value_and_gradient(loss, t, s, 2.0)[:2]
    for got in (value(-INF), value(jnp.nan, where=there)):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@losses
def test_a_row_without_entries_is_zero(loss):
    t, s = jax.random.normal(jax.random.key(4), (2, ROWS, SIZE))
    there = jnp.arange(ROWS)[:, None] != 1
    masked = functools.partial(loss, where=there)
    _, grad, rows = value_and_gradient(masked, t, s, 1.0)
    assert rows[1] == 0 and not np.any(grad[1]) and np.all(np.isfinite(grad))


def test_the_student_may_have_what_the_teacher_lacks():
    t, s = jnp.array([1.0, -INF, 2.0]), jnp.array([0.0, 1.0, 0.5])
    p, q = jax.nn.softmax(t), jax.nn.softmax(s)
    np.testing.assert_allclose(value_and_gradient(kl, t, s, 1.0)[1], q - p, rtol=1e-5)
    assert np.all(np.isfinite(value_and_gradient(jsd, t, s, 1.0)[1]))
    assert value_and_gradient(kl, s, t, 1.0)[2] == INF


@losses
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_in_float32(loss, dtype):
    t, s = jax.random.normal(jax.random.key(5), (2, ROWS, SIZE)).astype(dtype)
    assert loss(t, s).dtype == jnp.float32
    wide = loss(t.astype(jnp.float32), s.astype(jnp.float32))
    np.testing.assert_array_equal(loss(t, s), wide)


def test_the_worked_example():
    t, s = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
    values = [kl(t, s, temperature).item() for temperature in (1.0, 2.0, 4.0)]
    np.testing.assert_allclose(values, [1.150421, 1.280627, 1.319630], atol=1e-6)
    np.testing.assert_allclose(kl(t, s, 1e3).item(), 4 / 3, rtol=1e-4)
    grad = jax.grad(kl, argnums=1)(t, s, 2.0)
    np.testing.assert_allclose(grad, [-0.640313, 0, 0.640313], atol=1e-6)
    p, q = jnp.log(jnp.array([0.7, 0.2, 0.1])), jnp.log(jnp.array([0.2, 0.3, 0.5]))
    values = [kl(p, q), reverse_kl(p, q), jsd(p, q), jsd(p, q, beta=0.1)]
    np.testing.assert_allclose(values, [0.634897, 0.675806, 0.151358, 0.055891], atol=1e-6)


@losses
@pytest.mark.parametrize("temperature", [0, -1.0, np.nan])
def test_a_temperature_that_is_not_positive_is_refused(loss, temperature):
    with pytest.raises(ValueError, match="temperature is .*expected a number above 0"):
        loss(jnp.zeros(3), jnp.zeros(3), temperature)


@losses
def test_vocabularies_that_differ_are_refused_with_both_sizes(loss):
    with pytest.raises(ValueError, match="has 11 entries, the student's 13"):
        loss(jnp.zeros((2, 11)), jnp.zeros((2, 13)))
    with pytest.raises(ValueError, match="same rows"):
        loss(jnp.zeros((2, 11)), jnp.zeros((11,)))


@pytest.mark.parametrize("beta", [0, 1, -0.5, 2.0])
def test_a_beta_outside_is_refused(beta):
    with pytest.raises(ValueError, match="between 0 and 1"):
        jsd(jnp.zeros(3), jnp.zeros(3), beta=beta)


@losses
def test_the_temperature_may_be_data(loss):
    t, s = jax.random.normal(jax.random.key(7), (2, ROWS, SIZE))
    traced = jax.jit(loss)(t, s, jnp.float32(3))
    np.testing.assert_allclose(traced, loss(t, s, 3.0), rtol=TOLERANCE)
