"""Laws across accumulation, casts and loss scaling: what composes must not change the result."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import unitscale_jax as us

ROWS = 12
values = functools.partial(hnp.arrays, np.float32, elements=st.floats(-4, 4, width=32))


def apply(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def loss_of(apply):
    def loss(params, batch):
        errors = (apply(params, batch["x"]) - batch["y"]) ** 2
        return us.Mean(batch["m"] * errors, batch["m"])

    return loss


def example(seed=0):
    rng = np.random.default_rng(seed)
    params = {"up": rng.normal(size=(3, 8)), "down": rng.normal(size=8)}
    batch = {"x": rng.normal(size=(ROWS, 3)), "y": rng.normal(size=ROWS), "m": np.arange(ROWS) % 3}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, batch))


@functools.cache
def scaled_and_plain(parts):
    grad_fn = us.accumulated(us.value_and_grad(loss_of(apply)), parts)
    return jax.jit(lambda params, batch, scale: grad_fn(params, batch, scale=scale)[2])


@pytest.mark.parametrize("parts", [1, 5])
@given(x=values((ROWS, 3)), power=st.integers(-10, 10))
def test_unscaled_gradients_are_bit_equal_at_any_scale(parts, x, power):
    params, batch = example()
    batch = batch | {"x": x}
    run = scaled_and_plain(parts)
    scaled = run(params, batch, jnp.float32(2.0**power))
    plain = run(params, batch, jnp.float32(1))
    chex.assert_trees_all_equal(jax.tree.map(lambda g: g / 2.0**power, scaled), plain)


@pytest.mark.parametrize("parts", [2, 5])
def test_float16_in_parts_equals_float16_in_one(parts):
    """Per-row arithmetic is the same; only the float32 sum over parts has another order."""
    params, batch = example()
    grad_fn = us.value_and_grad(loss_of(us.cast(apply, us.Policy(compute="float16"))))
    in_parts = us.accumulated(grad_fn, parts)
    for scale in (1.0, 2.0**8):
        whole, split = (g(params, batch, scale=scale)[2] for g in (grad_fn, in_parts))
        chex.assert_trees_all_close(split, whole, rtol=4e-3, atol=4e-3 * scale)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_scale_rescues_gradients_that_float16_has_no_number_for(parts):
    """Two parts, x = [3, 5] and [1, 7], of weight 2^26: the true gradient is [4, 12] / 2^26."""
    batch = {"x": jnp.array([[3.0, 5.0], [1.0, 7.0]])}

    def loss(w, batch):
        products = w.astype(jnp.float16) * batch["x"].astype(jnp.float16)
        row = jnp.sum(products.astype(jnp.float32), axis=1)
        return us.Mean(row, jnp.full(row.shape, 2.0**25))

    grad_fn = us.accumulated(us.value_and_grad(loss), parts)
    plain, scaled = (grad_fn(jnp.array([1.0, 2.0]), batch, scale=s)[2] for s in (1.0, 2.0**12))
    assert np.array_equal(plain, [0, 0])
    assert np.array_equal(scaled / 2.0**12, np.array([4, 12]) / 2.0**26)


@pytest.mark.parametrize("form", [{}, {"inplace": True}, {"nonfinite": "drop"}])
def test_an_overflow_in_one_part_skips_the_step_or_drops_the_part(form):
    params, batch = example()
    poisoned = batch | {"x": batch["x"].at[1].set(jnp.inf)}
    tx = us.loss_scaled(optax.sgd(0.1, momentum=0.9), us.DynamicScale(init=2**10))
    grad_fn = us.accumulated(us.value_and_grad(loss_of(apply)), 4, **form)
    state = tx.init(params)
    terms, _, grads = grad_fn(params, poisoned, scale=us.current_scale(state))
    dropped = {"dropped": terms["dropped"]} if "dropped" in terms else {}
    updates, after = tx.update(grads, state, params, **dropped)
    moved = any(np.any(np.asarray(u)) for u in jax.tree.leaves(updates))
    assert us.current_scale(after) == 2**9  # either way the scale takes it for an overflow
    assert moved == ("nonfinite" in form)
    if not moved:
        chex.assert_trees_all_equal(after.inner, state.inner)
        chex.assert_trees_all_equal(optax.apply_updates(params, updates), params)


def test_a_step_of_which_no_part_is_left_is_skipped():
    params, batch = example()
    tx = us.loss_scaled(optax.sgd(0.1, momentum=0.9), us.DynamicScale(init=2**10))
    momentum = jax.tree.map(jnp.ones_like, params)
    state = tx.update(momentum, tx.init(params), params)[1]
    grad_fn = us.accumulated(us.value_and_grad(loss_of(apply)), 4, nonfinite="drop")
    terms, _, grads = grad_fn(params, batch | {"x": batch["x"] * jnp.inf})
    updates, after = tx.update(grads, state, params, dropped=terms["dropped"])
    chex.assert_trees_all_equal(optax.apply_updates(params, updates), params)
    chex.assert_trees_all_equal(after.inner, state.inner)
    assert after.skipped == 1 and us.current_scale(after) == 2**9
    assert us.overflowing(after, params) == []


def test_float16_training_overflows_recovers_and_learns():
    params, batch = example()
    policy = us.Policy(compute="float16")
    grad_fn = us.accumulated(us.value_and_grad(loss_of(us.cast(apply, policy))), 5)
    tx = us.loss_scaled(optax.sgd(0.05), us.DynamicScale(init=2**24, interval=8))

    @jax.jit
    def step(carry, _):
        params, state = carry
        terms, _, grads = grad_fn(params, batch, scale=us.current_scale(state))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (us.loss_value(terms), us.current_scale(state), state.skipped)

    (params, _), (losses, scales, skipped) = jax.lax.scan(
        step, (params, tx.init(params)), None, length=60
    )
    assert skipped[-1] >= 3 and scales.min() < 2**22, "the initial scale must overflow"
    assert np.any(np.diff(scales) > 0), "the scale must grow again"
    assert losses[-1] < losses[0] / 4 and np.isfinite(losses).all()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_a_float32_master_moves_where_bfloat16_stands_still():
    """1 + 1000 * 0.001: bfloat16 rounds every update away, a master and stochastic bits do not."""
    update = jnp.float32(0.001)
    plain, master = jnp.bfloat16(1), jnp.float32(1)
    tx = us.low_precision_weights(optax.sgd(1.0), key=jax.random.key(0))

    def step(carry, _):
        plain, master, weight, state = carry
        plain = (plain.astype(jnp.float32) + update).astype(jnp.bfloat16)
        change, state = tx.update(-update, state, weight)
        weight = (weight.astype(jnp.float32) + change).astype(jnp.bfloat16)
        return (plain, master + update, weight, state), None

    start = (plain, master, jnp.bfloat16(1), tx.init(jnp.bfloat16(1)))
    (plain, master, weight, _), _ = jax.jit(
        lambda start: jax.lax.scan(step, start, None, length=1000)
    )(start)
    assert plain == 1
    assert float(master) == pytest.approx(2, abs=1e-4)
    assert float(weight) == pytest.approx(2, abs=0.5)


def test_stations_chain_in_reading_order():
    params, batch = example()
    policy = us.Policy(compute="bfloat16")
    station = us.chain(
        functools.partial(us.cast, policy=policy),
        loss_of,
        us.value_and_grad,
        functools.partial(us.accumulated, parts=5),
    )(apply)
    by_hand = us.accumulated(us.value_and_grad(loss_of(us.cast(apply, policy))), 5)
    chex.assert_trees_all_equal(station(params, batch), by_hand(params, batch))
