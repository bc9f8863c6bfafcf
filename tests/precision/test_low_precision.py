"""Laws of bfloat16 weights without a float32 copy."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import assume, given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from unitscale_jax import formats, tree as trees
from unitscale_jax.precision import (
    DynamicScale,
    Policy,
    current_scale,
    loss_scaled,
    low_precision_weights,
)

# optax adds float32 updates to bfloat16 parameters, and its Adam family floats to integers.
pytestmark = pytest.mark.usefixtures("relaxed_promotion")

BF16, F32 = ml_dtypes.bfloat16, np.float32
KEY = jax.random.key(3)
ADD = optax.sgd(-1.0)  # the gradient is the update
ROUNDINGS = ["stochastic", "kahan"]
SIZE = 8


def finite(bits):
    """Any number of so many random upper bits, far from both ends of the range."""
    numbers = st.floats(2.0**-60, 2.0**60, width=32)
    signed = st.one_of(st.just(0.0), numbers, numbers.map(lambda x: -x))
    return hnp.arrays(F32, SIZE, elements=signed).map(lambda x: x.astype(bits))


@functools.partial(jax.jit, static_argnums=0)
def applied(rounding, p, u, owed):
    """The weights that `apply_updates` lands on, those it should, and what is owed now and then."""
    optimizer = low_precision_weights(ADD, rounding, key=KEY)
    state = optimizer.init(p)
    if rounding == "kahan":
        state = type(state)(step=state.step, owed=owed, inner=state.inner)
    updates, state = optimizer.update(u, state, p)
    return optax.apply_updates(p, updates), state.owed


@given(p=finite(BF16), u=finite(F32))
def test_stochastic_updates_land_on_the_rounded_weight(p, u):
    bits = jax.random.bits(jax.random.fold_in(jax.random.fold_in(KEY, 0), 0), SIZE, jnp.uint16)
    right = np.asarray(formats.stochastic_bf16(p.astype(F32) + u, bits))
    assume(reachable(p, right))
    assert_equal(applied("stochastic", p, u, None)[0], right)


@given(p=finite(BF16), u=finite(F32), owed=finite(BF16))
def test_kahan_updates_land_on_the_rounded_weight(p, u, owed):
    due = u + owed.astype(F32)
    right = (p.astype(F32) + due).astype(BF16)
    assume(reachable(p, right))
    new, left = applied("kahan", p, u, owed)
    assert_equal(new, right)
    assert_equal(left, (due - (right.astype(F32) - p.astype(F32))).astype(BF16))


def reachable(p, new):
    """Whether float32 holds the way from p to its successor well enough to land on it."""
    old, new = np.abs(p.astype(F32)), np.abs(new.astype(F32))
    return ((new >= 2.0**-16 * old) | (new == 0)).all()


def assert_equal(ours, theirs):
    np.testing.assert_array_equal(np.asarray(ours, F32), np.asarray(theirs, F32))


@pytest.mark.parametrize("compile", [jax.jit, lambda fn: fn], ids=["jit", "eager"])
def test_kahan_keeps_what_it_owes(compile):
    optimizer = low_precision_weights(ADD, "kahan")
    update = compile(optimizer.update)
    p, seen = jnp.bfloat16(1), {}
    state = optimizer.init(p)
    for step in range(1, 9):
        updates, state = update(jnp.float32(2.0**-10), state, p)
        p = optax.apply_updates(p, updates)
        seen[step] = float(p), float(state.owed)
    assert (seen[4], seen[5], seen[8]) == (
        (1, 2.0**-8),
        (1.0078125, -3 * 2.0**-10),
        (1.0078125, 0),
    )


def thousand_steps(rounding, key, add=0.001, start=1.0):
    """p, and p with what is owed, after 1000 updates."""
    optimizer = low_precision_weights(ADD, rounding, key=key)

    def step(carry, _):
        p, state = carry
        updates, state = optimizer.update(jnp.float32(add), state, p)
        return (optax.apply_updates(p, updates), state), None

    p = jnp.bfloat16(start)
    (p, state), _ = jax.lax.scan(step, (p, optimizer.init(p)), length=1000)
    owed = 0.0 if state.owed is None else state.owed.astype(jnp.float32)
    return p.astype(jnp.float32), p.astype(jnp.float32) + owed


def test_weights_move_where_nearest_rounding_stands_still():
    """`optax.apply_updates` alone leaves 1.0 after a thousand updates of 0.001."""
    add = lambda p, _: (optax.apply_updates(p, jnp.float32(0.001)), None)
    assert jax.lax.scan(add, jnp.bfloat16(1), length=1000)[0] == 1
    p, with_owed = thousand_steps("kahan", None)
    assert p == 2 and abs(with_owed - 2) < 0.004
    keys = jax.random.split(KEY, 64)
    ends, _ = jax.vmap(functools.partial(thousand_steps, "stochastic"))(keys)
    assert abs(ends.mean() - 2) < 5 * 0.094 / 8 and 0.05 < ends.std() < 0.15


@pytest.mark.parametrize("add", [0.001, -0.0007])
@pytest.mark.parametrize("start", [1.0, 0.3, -5.0])
def test_kahan_stays_within_its_bound(add, start):
    _, with_owed = thousand_steps("kahan", None, add=add, start=start)
    first = float(np.asarray(start, BF16))
    exact = first + 1000 * float(F32(add))
    largest = max(abs(first), abs(exact))
    assert abs(float(with_owed) - exact) <= 1000 * 2.0**-17 * 2.0 ** np.ceil(np.log2(largest))


def layouts():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    return [NamedSharding(mesh, s) for s in [P(), P("x"), P("y", "x"), P(None, ("x", "y"))]]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bits_do_not_depend_on_the_sharding(rounding):
    optimizer = low_precision_weights(ADD, rounding, key=KEY)
    p = {"a": jnp.ones((16, 16), jnp.bfloat16), "b": jnp.ones((8, 8), jnp.bfloat16)}
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 0.001), p)

    @jax.jit
    def train(p, grads):
        state = optimizer.init(p)
        for _ in range(3):
            updates, state = optimizer.update(grads, state, p)
            p = optax.apply_updates(p, updates)
        return p, state

    whole = train(p, grads)
    assert (rounding == "kahan") == (len(set(np.asarray(whole[0]["a"], F32).ravel())) == 1)
    for layout in layouts():
        sharded = train(*jax.device_put((p, grads), layout))
        chex.assert_trees_all_equal(sharded, whole)


def test_replicas_in_a_shard_map_agree():
    optimizer = low_precision_weights(ADD, key=KEY)

    def body(p, x):
        grads = jax.lax.psum(jax.lax.pcast(p.astype(jnp.float32), "x", to="varying") * x, "x")
        return optimizer.update(grads, optimizer.init(p), p)[0]

    mesh = layouts()[0].mesh
    step = jax.shard_map(body, mesh=mesh, in_specs=(P(), P("x")), out_specs=P())
    p, x = jnp.ones(64, jnp.bfloat16), jnp.full(4, 0.001 / 4)
    out = jax.jit(step)(p, x)
    copies = [np.asarray(s.data) for s in out.addressable_shards]
    assert len(copies) == 8 and all((c == copies[0]).all() for c in copies)
    grads = jnp.full(64, 0.001)
    plain, _ = jax.jit(optimizer.update)(grads, optimizer.init(p), p)
    chex.assert_trees_all_equal(out, plain)


def test_each_step_and_leaf_draws_its_own_bits():
    optimizer = low_precision_weights(ADD, key=KEY)
    p = {"a": jnp.ones(256, jnp.bfloat16), "b": jnp.ones(256, jnp.bfloat16)}
    half = jax.tree.map(lambda x: jnp.full(x.shape, 2.0**-8), p)
    first, state = optimizer.update(half, optimizer.init(p), p)
    second, _ = optimizer.update(half, state, p)
    draws = [first["a"], first["b"], second["a"], second["b"]]
    assert all(0.35 < float((d > 0).mean()) < 0.65 for d in draws)
    assert all((x != y).any() for i, x in enumerate(draws) for y in draws[:i])


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_inner_sees_float32_and_extra_arguments(rounding):
    seen = []

    def update(updates, state, params, *, value):
        seen.append((updates["w"].dtype, params["w"].dtype, value))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda p: p, update)
    optimizer = low_precision_weights(inner, rounding, key=KEY)
    p = {"w": jnp.ones(2, jnp.bfloat16)}
    state = optimizer.init(p)
    assert state.inner["w"].dtype == jnp.float32
    updates, _ = optimizer.update(p, state, p, value=7)
    assert seen == [(jnp.float32, jnp.float32, 7)] and updates["w"].dtype == jnp.float32


@pytest.mark.parametrize(("rounding", "per_parameter"), [("stochastic", 10), ("kahan", 12)])
def test_bytes_per_parameter_with_adam(rounding, per_parameter):
    p = {"w": jnp.ones((32, 32), jnp.bfloat16)}
    state = low_precision_weights(optax.adam(1e-3), rounding, key=KEY).init(p)
    counters = 2 * 4  # ours and Adam's
    assert trees.nbytes((p, state)) == per_parameter * 1024 + counters


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_step_skipped_by_the_loss_scale_changes_nothing(rounding):
    inner = low_precision_weights(optax.adam(0.1), rounding, key=KEY)
    optimizer = loss_scaled(inner, DynamicScale(init=8))
    p = {"w": jnp.array([1.0, -0.0, 3.0], jnp.bfloat16)}
    scaled = lambda state: {"w": current_scale(state) * jnp.array([1.0, 2.0, 3.0])}
    update = jax.jit(optimizer.update)
    _, state = update(scaled(optimizer.init(p)), optimizer.init(p), p)
    updates, after = update({"w": jnp.array([1.0, jnp.nan, 1.0])}, state, p)
    chex.assert_trees_all_equal(after.inner, state.inner)
    new = optax.apply_updates(p, updates)
    assert np.asarray(new["w"]).tobytes() == np.asarray(p["w"]).tobytes()
    unscaled = {"w": jnp.array([1.0, 2.0, 3.0])}
    ours, _ = update(scaled(after), after, p)
    theirs, _ = jax.jit(inner.update)(unscaled, state.inner, p)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5)


def test_float32_leaves_can_have_an_optimizer_of_their_own():
    p = {"norm": jnp.ones(2), "w": jnp.ones(2, jnp.bfloat16)}
    low = low_precision_weights(ADD, "kahan")
    optimizer = optax.partition({"low": low, "full": ADD}, {"norm": "full", "w": "low"})
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, p), optimizer.init(p), p)
    new = optax.apply_updates(p, updates)
    chex.assert_trees_all_equal(new, jax.tree.map(lambda x: x + x, p))


def test_parameter_like_state_is_still_recognized_by_optax():
    p = {"w": jnp.ones(2, jnp.bfloat16)}
    optimizer = low_precision_weights(optax.adam(0.1), "kahan")
    state = optax.tree.map_params(optimizer, lambda x: x + 1, optimizer.init(p))
    assert (state.inner[0].mu["w"] == 1).all() and (state.owed["w"] == 1).all()
    assert state.step == state.inner[0].count == 0


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_is_not_finite_stays_so(rounding):
    p = jnp.ones(3, jnp.bfloat16)
    optimizer = low_precision_weights(ADD, rounding, key=KEY)
    grads = jnp.array([jnp.inf, -jnp.inf, jnp.nan])
    updates, _ = optimizer.update(grads, optimizer.init(p), p)
    chex.assert_trees_all_equal(optax.apply_updates(p, updates), grads.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jnp.ones(2), r"'head/w' is float32, expected bfloat16.*Policy\(param='bfloat16'\)"),
        (jnp.ones(2, jnp.float16), "'head/w' is float16, expected bfloat16"),
        (jnp.arange(2), "'head/w' is int32, expected bfloat16.*tree.partition"),
    ],
)
def test_a_parameter_of_another_dtype_is_named(leaf, message):
    good = jnp.ones(2, jnp.bfloat16)
    params = {"body": good, "head": {"w": leaf}}
    optimizer = low_precision_weights(ADD, key=KEY)
    with pytest.raises(ValueError, match=message):
        optimizer.init(params)
    state = optimizer.init({"body": good, "head": {"w": good}})
    with pytest.raises(ValueError, match=message):
        optimizer.update(params, state, params)


def test_the_way_out_works():
    params = Policy(param="bfloat16").cast_to_param({"w": jnp.ones(2)})
    low_precision_weights(ADD, key=KEY).init(params)


def test_bad_arguments_get_clear_errors():
    with pytest.raises(ValueError, match=r"got no key. Pass key=jax.random.key\(seed\)"):
        low_precision_weights(ADD)
    with pytest.raises(ValueError, match="rounding is 'nearest'. Choose 'stochastic'.*'kahan'"):
        low_precision_weights(ADD, "nearest")
    with pytest.raises(TypeError, match="expected a typed key. Make it with jax.random.key"):
        low_precision_weights(ADD, key=jnp.zeros(2, jnp.uint32))
    optimizer = low_precision_weights(ADD, "kahan")
    state = optimizer.init(jnp.bfloat16(1))
    with pytest.raises(ValueError, match=r"Call update\(grads, state, params\)"):
        optimizer.update(jnp.float32(1), state)
