"""Laws of accumulation across loop steps."""

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

STEPS = 6
gradients = hnp.arrays(np.float32, (STEPS, 2), elements=st.floats(-4, 4, width=32))
PARAMS = {"w": jnp.zeros(2)}


@functools.partial(jax.jit, static_argnums=0)
def run(parts, grads, weights, values=None, flush=None):
    """Updates, inner counts and final state of `multi_steps` around momentum, over a scan."""
    tx = us.multi_steps(optax.sgd(0.1, momentum=0.9), parts)
    flush = jnp.zeros(len(grads), bool) if flush is None else flush
    values = jnp.zeros(len(grads)) if values is None else values

    def step(state, xs):
        grad, weight, value, last = xs
        options = {"weight": weight, "value": value, "flush": last}
        updates, state = tx.update({"w": grad}, state, PARAMS, **options)
        return state, (updates["w"], state)

    return jax.lax.scan(step, tx.init(PARAMS), (grads, weights, values, flush))


@functools.partial(jax.jit, static_argnums=0)
def run_inner(parts, grads, weights):
    """The same optimiser, fed the weighted mean of each window."""
    tx = optax.sgd(0.1, momentum=0.9)
    windows = grads.reshape(-1, parts, 2), weights.reshape(-1, parts, 1)

    def step(state, window):
        grads, weights = window
        mean = (grads * weights).sum(0) / weights.sum()
        updates, state = tx.update({"w": mean}, state, PARAMS)
        return state, updates["w"]

    return jax.lax.scan(step, tx.init(PARAMS), windows)


@pytest.mark.parametrize("parts", [1, 2, 3])
@given(grads=gradients, weights=hnp.arrays(np.float32, STEPS, elements=st.integers(1, 9)))
def test_a_window_is_one_step_on_the_weighted_mean(parts, grads, weights):
    _, (updates, states) = run(parts, grads, weights)
    _, expected = run_inner(parts, grads, weights)
    np.testing.assert_allclose(updates[parts - 1 :: parts], expected, rtol=1e-5, atol=1e-5)
    assert np.array_equal(states.step[parts - 1 :: parts], 1 + np.arange(STEPS // parts))


@given(grads=gradients)
def test_steps_in_between_change_nothing(grads):
    _, (updates, states) = run(3, grads, jnp.ones(STEPS))
    quiet = np.arange(STEPS) % 3 != 2
    assert not np.any(np.asarray(updates)[quiet])
    trace = np.asarray(states.inner[0].trace["w"])
    for i in np.flatnonzero(quiet):
        before = trace[i - 1] if i else np.zeros(2, np.float32)
        assert trace[i].tobytes() == before.tobytes()


@given(grads=gradients, bad=st.integers(0, STEPS - 1), poison=st.sampled_from([np.nan, np.inf]))
def test_after_a_bad_part_all_is_as_if_it_weighed_nothing(grads, bad, poison):
    weights = np.ones(STEPS, np.float32)
    poisoned = np.where(np.arange(STEPS)[:, None] == bad, np.float32(poison), grads)
    state, (updates, _) = run(3, poisoned, weights)
    assert np.isfinite(updates).all() and state.dropped == 1
    weights[bad] = 0
    _, (expected, _) = run(3, grads, weights)
    np.testing.assert_array_equal(updates, expected)


def test_a_bad_part_uses_its_place_in_the_window():
    tx = us.multi_steps(optax.sgd(0.1), 2)
    state, got = tx.init(PARAMS), []
    for grad in [jnp.ones(2), jnp.array([jnp.nan, 1.0]), jnp.ones(2), jnp.ones(2)]:
        updates, state = tx.update({"w": grad}, state, PARAMS)
        got.append(float(updates["w"][1]))
    assert got == pytest.approx([0, -0.1, 0, -0.1]) and state.dropped == 1


def test_flush_ends_the_window_with_the_parts_it_has():
    tx = us.multi_steps(optax.sgd(1.0), 3)
    state = tx.init(jnp.float32(0))
    first, state = tx.update(jnp.float32(44), state, weight=5)
    last, state = tx.update(jnp.float32(8), state, weight=3, flush=True)
    assert (float(first), float(last)) == (0, -30.5)
    assert (state.part, state.weight, state.total) == (0, 0, 0)


def test_flush_of_an_empty_window_is_no_step(relaxed_promotion):
    tx = us.multi_steps(optax.adam(0.1), 3)
    state = tx.init(PARAMS)
    updates, after = tx.update({"w": jnp.ones(2)}, state, PARAMS, weight=0.0, flush=True)
    assert not np.any(updates["w"]) and after.step == 0 and after.inner[0].count == 0


def test_inner_optimiser_counts_windows(relaxed_promotion):
    tx = us.multi_steps(optax.adam(0.1), 3)
    state = tx.init(PARAMS)
    for _ in range(7):
        _, state = tx.update({"w": jnp.ones(2)}, state, PARAMS)
    assert state.inner[0].count == 2 and state.part == 1


def test_parts_may_follow_a_schedule():
    tx = us.multi_steps(optax.sgd(1.0), lambda step: jnp.where(step < 2, 1, 3))
    state, emitted = tx.init(PARAMS), []
    for _ in range(8):
        updates, state = tx.update({"w": jnp.ones(2)}, state, PARAMS)
        emitted.append(bool(updates["w"][0]))
    assert emitted == [True, True, False, False, True, False, False, True]


def test_mean_of_bfloat16_gradients_keeps_float32():
    tx = us.multi_steps(optax.identity(), 2)
    params = jnp.zeros((), jnp.bfloat16)
    state = tx.init(params)
    for grad in (1.0, 1 + 2**-7):
        updates, state = tx.update(jnp.bfloat16(grad), state, params)
    assert updates.dtype == jnp.float32 and float(updates) == 1 + 2**-8


def test_the_loss_that_a_plateau_sees_is_the_mean_of_the_window(relaxed_promotion):
    plateau = optax.contrib.reduce_on_plateau(patience=1)
    tx = us.multi_steps(optax.chain(optax.sgd(1.0), plateau), 2)
    state = tx.init(PARAMS)
    for value in (1.0, 5.0):
        _, state = tx.update({"w": jnp.ones(2)}, state, PARAMS, value=value)
    assert state.inner[1].best_value == 3


def test_state_is_no_larger_than_that_of_optax_but_for_scalars():
    """Five numbers more, and a flag for each array and for the part."""
    params = {"w": jnp.zeros((64, 64)), "b": jnp.zeros(64)}
    ours = us.multi_steps(optax.adam(1e-3), 4).init(params)
    theirs = optax.MultiSteps(optax.adam(1e-3), 4).init(params)
    assert us.tree.nbytes(ours) <= us.tree.nbytes(theirs) + 5 * 4 + len(params) + 1


def test_an_update_needs_less_memory_and_work_than_that_of_optax(relaxed_promotion):
    params = {str(i): jnp.zeros((256, 256)) for i in range(4)}

    def compiled(tx):
        update = lambda grads, state: tx.update(grads, state, params)
        state = jax.eval_shape(tx.init, params)
        return jax.jit(update, donate_argnums=1).lower(params, state).compile()

    ours = compiled(us.multi_steps(optax.adamw(1e-3), 4))
    theirs = compiled(optax.MultiSteps(optax.adamw(1e-3), 4))
    temp = lambda c: c.memory_analysis().temp_size_in_bytes
    assert temp(ours) <= 0.6 * temp(theirs)
    assert ours.cost_analysis()["flops"] <= 0.6 * theirs.cost_analysis()["flops"]


def test_agrees_under_vmap_over_seeds():
    tx = us.multi_steps(optax.sgd(0.1), 2)

    def two_steps(grads):
        updates, state = tx.update({"w": grads}, tx.init(PARAMS), PARAMS)
        return tx.update({"w": 3 * grads}, state, PARAMS)[0]["w"]

    grads = jnp.arange(6.0).reshape(3, 2)
    chex.assert_trees_all_close(jax.vmap(two_steps)(grads), jnp.stack([*map(two_steps, grads)]))


BAD_PARTS = [0, -1, True, 2.5, "2", None, lambda: 3, lambda step, more: 3]


@pytest.mark.parametrize("parts", BAD_PARTS)
def test_a_number_of_parts_that_is_none_is_an_error(parts):
    with pytest.raises(ValueError, match="`parts` is .*expected a positive int, or a schedule"):
        us.multi_steps(optax.sgd(0.1), parts)


def test_numbers_of_parts_of_any_integer_type_are_fine():
    for parts in (2, np.int64(2), lambda step: 2, lambda step, most=2: jnp.int32(most)):
        tx = us.multi_steps(optax.sgd(1.0), parts)
        state = tx.init(PARAMS)
        for want in (0, -1):
            updates, state = tx.update({"w": jnp.ones(2)}, state, PARAMS)
            assert updates["w"].tolist() == [want, want]


@pytest.mark.parametrize("returned", [2.0, jnp.ones(2, jnp.int32)])
def test_a_schedule_that_returns_no_integer_is_an_error(returned):
    tx = us.multi_steps(optax.sgd(1.0), lambda step: returned)
    with pytest.raises(ValueError, match="the schedule `parts` returned.*expected an integer scal"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("grads", "words"),
    [
        ({"w": jnp.ones(3)}, r"gradient of 'w' is \(3,\), and the parameter is \(2,\)"),
        ({"w": jnp.ones(())}, r"gradient of 'w' is \(\), and the parameter is \(2,\)"),
        ({"v": jnp.ones(2)}, "gradient of 'w' is nothing, and the parameter is"),
        ({"w": None}, "gradient of 'w' is nothing, and the parameter is"),
        (
            {"w": jnp.ones(2), "v": jnp.ones(2)},
            "gradient of 'v' is .*, and the parameter is no",
        ),
        ({"w": [jnp.ones(2)]}, "gradient of 'w' is nothing, and the parameter is"),
    ],
)
def test_gradients_of_other_parameters_name_the_leaf(grads, words):
    tx = us.multi_steps(optax.sgd(1.0), 2)
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match=words):
            update(grads, tx.init(PARAMS), PARAMS)


def test_a_weight_is_a_scalar_of_at_least_zero():
    tx = us.multi_steps(optax.sgd(1.0), 2)
    for weight in (-1.0, -2, np.float32(-0.5), jnp.float32(-3)):
        with pytest.raises(ValueError, match="`weight` is .*at least 0"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, weight=weight)
    with pytest.raises(ValueError, match=r"`weight` has shape \(2,\); expected \(\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, weight=jnp.ones(2))


def test_a_part_whose_traced_weight_is_negative_is_left_out():
    tx = us.multi_steps(optax.sgd(1.0), 2)
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for grad, weight in ((5.0, -1.0), (3.0, 2.0)):
        updates, state = update({"w": jnp.full(2, grad)}, state, PARAMS, weight=weight)
    assert updates["w"].tolist() == [-3, -3] and state.dropped == 1


def test_a_value_is_the_mean_of_the_parts_that_had_one():
    seen = lambda u, s, p=None, *, value=0.0, **_: (jax.tree.map(lambda g: 0 * g + value, u), s)
    tx = us.multi_steps(optax.GradientTransformationExtraArgs(lambda p: (), seen), 3)
    state = tx.init(PARAMS)
    for extra in ({}, {"value": 2.0, "weight": 3.0}, {"value": 4.0}):
        updates, state = tx.update({"w": jnp.ones(2)}, state, PARAMS, **extra)
    assert updates["w"].tolist() == [2.5, 2.5]


def test_integer_parameters_are_refused_by_name():
    with pytest.raises(ValueError, match="parameter 'n' is int32"):
        us.multi_steps(optax.sgd(0.1), 2).init({"n": jnp.arange(3)})
