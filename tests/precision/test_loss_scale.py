"""Laws of loss scaling."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, PartitionSpec as P

from unitscale_jax import tree as trees
from unitscale_jax.precision import (
    DynamicScale,
    LossScaleState,
    Policy,
    StaticScale,
    cast,
    current_scale,
    loss_scaled,
    overflowing,
)

relaxed = pytest.mark.usefixtures("relaxed_promotion")  # for optax's Adam family
STEPS = 24
PARAMS = {"a": jnp.array([-0.0, 1.5, 3.0]), "b": {"c": jnp.ones((2, 2)), "d": jnp.zeros(2)}}
INNERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.linear_schedule(0.1, 0.0, 10), weight_decay=0.1),
    ),
    "lion": optax.lion(0.1),
    "adafactor": optax.adafactor(0.1),
    "injected": optax.inject_hyperparams(optax.adam)(0.1),
}


def run(spec, flags):
    """States after each step, whose gradient is finite where its flag says so."""
    optimizer = loss_scaled(optax.sgd(1.0), spec)

    def step(state, flag):
        _, state = optimizer.update(jnp.where(flag, 1.0, jnp.inf), state)
        return state, state

    return jax.lax.scan(step, optimizer.init(jnp.float32(0)), jnp.asarray(flags))[1]


def flags_of(text):
    return np.array([c == "1" for c in text])


@pytest.mark.parametrize(
    ("spec", "flags", "scales", "stuck"),
    [
        (DynamicScale(init=8, interval=3), "1111111", "8 8 16 16 16 32 32", []),
        (
            DynamicScale(init=8, interval=3, min=2),
            "1101110000111",
            "8 8 4 4 4 8 4 2 2 2 2 2 4",
            [9, 10],
        ),
        (DynamicScale(init=8, interval=3, hysteresis=2), "0011100", "8 4 4 4 8 8 4", []),
        (DynamicScale(init=16, interval=1, max=32), "11", "32 32", []),
        (StaticScale(64), "1011", "64 64 64 64", [2]),
    ],
)
def test_worked_examples(spec, flags, scales, stuck):
    states = run(spec, flags_of(flags))
    assert states.scale.tolist() == [float(word) for word in scales.split()]
    assert (np.flatnonzero(states.stuck) + 1).tolist() == stuck
    assert states.skipped[-1] == flags.count("0")


def oracle(spec, flags):
    scale, good, credits = spec.init, 0, spec.hysteresis - 1
    for finite in flags:
        stuck = False
        good = good + 1 if finite else 0
        if finite and good == spec.interval:
            scale, good, credits = min(spec.growth * scale, spec.max), 0, spec.hysteresis - 1
        elif not finite and credits:
            credits -= 1
        elif not finite:
            stuck, scale = scale <= spec.min, max(spec.backoff * scale, spec.min)
        yield scale, good, credits, stuck


SPECS = [
    DynamicScale(init=8, interval=1, max=64),
    DynamicScale(init=16, interval=3, hysteresis=2, min=4, growth=4),
    DynamicScale(init=0.5, interval=2, hysteresis=3, min=2**-4, max=2, backoff=0.25),
]
compiled_run = jax.jit(run, static_argnums=0)


@pytest.mark.parametrize("spec", SPECS)
@given(flags=st.lists(st.booleans(), min_size=STEPS, max_size=STEPS))
def test_the_automaton_equals_its_oracle(spec, flags):
    states = compiled_run(spec, np.array(flags))
    ours = zip(states.scale, states.good, states.credits, states.stuck, strict=True)
    assert [tuple(map(float, row)) for row in ours] == list(oracle(spec, flags))
    mantissas, _ = np.frexp(np.asarray(states.scale))
    assert (mantissas == 0.5).all()
    assert (states.scale >= spec.min).all() and (states.scale <= spec.max).all()


def wide_floats(shape):
    exact = st.floats(2.0**-60, 2.0**60, width=32)
    return hnp.arrays(np.float32, shape, elements=st.one_of(st.just(0.0), exact, exact.map(float)))


@functools.partial(jax.jit, static_argnums=0)
def update_at(name, grads, scale):
    optimizer = loss_scaled(INNERS[name], StaticScale())
    state = optimizer.init(PARAMS)
    state = dataclasses.replace(state, scale=scale, inner=state.inner)
    scaled = jax.tree.map(lambda g: g * scale, grads)
    updates, state = optimizer.update(scaled, state, PARAMS)
    return updates, state.inner


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@given(
    a=wide_floats((3,)),
    c=wide_floats((2, 2)),
    signs=hnp.arrays(np.bool_, 3),
    power=st.integers(-20, 24),
)
def test_a_scale_is_bit_equal_to_scale_one(name, a, c, signs, power):
    grads = {"a": np.where(signs, a, -a), "b": {"c": c, "d": -c[0]}}
    with jax.numpy_dtype_promotion("standard"):
        ours, plain = (update_at(name, grads, np.float32(2.0**k)) for k in (power, 0))
    assert_same_bits(ours, plain)


def assert_same_bits(ours, theirs):
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def half_loss(w, x, y):
    """A mean of squares in float16, reported in float32."""
    error = (x.astype(jnp.float16) @ w.astype(jnp.float16)).astype(jnp.float32) - y
    return jnp.mean(error**2)


@jax.jit
def half_grads(w, x, y, scale):
    optimizer = loss_scaled(optax.identity(), StaticScale())
    state = dataclasses.replace(optimizer.init(w), scale=scale)
    loss = lambda w: current_scale(state) * half_loss(w, x, y)
    return optimizer.update(jax.grad(loss)(w), state)[0]


quarters = functools.partial(
    hnp.arrays, np.float32, elements=st.integers(-8, 8).map(lambda n: n / 4)
)


@given(w=quarters(3), x=quarters((4, 3)), y=quarters(4), power=st.integers(-4, 4))
def test_float16_gradients_scale_exactly_while_in_range(w, x, y, power):
    scale = np.float32(2.0**power)
    assert_same_bits(half_grads(w, x, y, scale), half_grads(w, x, y, np.float32(1)))


def test_gradients_that_vanish_in_float16_survive_scaled():
    def loss(w, scale):
        parts = jnp.array([[3, 5], [1, 7]], jnp.float32)
        total = (parts.astype(jnp.float16) * w.astype(jnp.float16)).astype(jnp.float32).sum()
        return scale * 2.0**-26 * total

    w, true = jnp.array([1.0, 2.0]), np.array([4, 12]) * 2.0**-26
    optimizer = loss_scaled(optax.sgd(1.0), StaticScale(2**12))
    state = optimizer.init(w)
    updates, _ = optimizer.update(jax.grad(loss)(w, current_scale(state)), state)
    assert (jax.grad(loss)(w, 1.0) == 0).all()
    assert (-updates == true).all()


@pytest.mark.parametrize("name", INNERS)
@relaxed
def test_a_skipped_step_changes_no_bit_of_params_and_inner_state(name):
    optimizer = loss_scaled(INNERS[name], DynamicScale(init=8))
    update = jax.jit(optimizer.update)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    _, state = update(grads, optimizer.init(PARAMS), PARAMS)
    grads["b"]["c"] = grads["b"]["c"].at[1, 0].set(jnp.nan)
    updates, after = update(grads, state, PARAMS)
    assert_same_bits(optax.apply_updates(PARAMS, updates), PARAMS)
    assert_same_bits(after.inner, state.inner)
    assert (after.skipped, after.scale, overflowing(after, PARAMS)) == (1, 4, ["b/c"])


@pytest.mark.parametrize("name", INNERS)
@relaxed
def test_a_step_is_the_inner_step_on_unscaled_gradients(name):
    optimizer = loss_scaled(INNERS[name], DynamicScale(init=8))
    grads = jax.tree.map(lambda p: p + 0.5, PARAMS)
    state = optimizer.init(PARAMS)
    scaled = jax.tree.map(lambda g: 8 * g, grads)
    updates, after = jax.jit(optimizer.update)(scaled, state, PARAMS)
    theirs, inner = jax.jit(INNERS[name].update)(grads, state.inner, PARAMS)
    chex.assert_trees_all_close((updates, after.inner), (theirs, inner), rtol=1e-6)


def test_overflowing_names_exactly_the_bad_leaves():
    optimizer = loss_scaled(optax.sgd(1.0), DynamicScale())
    parts = [
        {"a": jnp.ones(3), "b": {"c": jnp.full((2, 2), jnp.inf), "d": jnp.ones(2)}},
        {"a": jnp.ones(3), "b": {"c": jnp.full((2, 2), -jnp.inf), "d": jnp.array([1, jnp.inf])}},
    ]
    grads = jax.tree.map(jnp.add, *parts)  # inf - inf is NaN, which stays
    state = optimizer.init(PARAMS)
    assert overflowing(state, PARAMS) == []
    _, state = optimizer.update(grads, state)
    assert overflowing((optax.EmptyState(), state), PARAMS) == ["b/c", "b/d"]
    _, state = optimizer.update(parts[0], state)
    assert overflowing(state, PARAMS) == ["b/c"]
    _, state = optimizer.update(PARAMS, state)
    assert overflowing(state, PARAMS) == []


def test_a_dropped_part_lowers_the_scale_but_the_step_is_applied():
    optimizer = loss_scaled(optax.sgd(1.0), DynamicScale(init=8))
    updates, state = optimizer.update(jnp.float32(8), optimizer.init(jnp.float32(0)), dropped=2)
    assert (updates, state.scale, state.good, state.skipped) == (-1, 4, 0, 0)
    assert not state.stuck and not state.bad


def test_extra_arguments_reach_the_inner_transform():
    inner = optax.GradientTransformationExtraArgs(
        lambda _: jnp.zeros(()),
        lambda updates, state, _=None, *, value: (updates, state + value),
    )
    optimizer = loss_scaled(optax.chain(optax.clip(1.0), inner), DynamicScale())
    state = optimizer.init(PARAMS)
    _, state = optimizer.update(PARAMS, state, PARAMS, value=3.0, dropped=0)
    assert state.inner[1] == 3


# --- devices ---------------------------------------------------------------------------------


def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("place", [(0, 0), (3, 0), (0, 1), (2, 1)])
@pytest.mark.parametrize("fault", ["nan", "dropped"])
def test_one_bad_device_and_all_hold_the_same_scale(place, check_vma, fault):
    optimizer = loss_scaled(optax.sgd(1.0), DynamicScale(init=8), mesh_axis=("data", "model"))

    def body(params, grads, dropped):
        # The state differs along the mesh as in real life: the weights along "model" only.
        state = optimizer.init(params)
        grads = jax.tree.map(lambda g: g[0, 0], grads)
        updates, state = optimizer.update(grads, state, params, dropped=dropped[0, 0])
        return jax.tree.map(lambda x: x[None, None], (updates, state.scale, state.bad))

    everywhere = P("data", "model")
    step = jax.shard_map(
        body,
        mesh=mesh(),
        in_specs=({"w": P("model"), "v": P()}, everywhere, everywhere),
        out_specs=everywhere,
        check_vma=check_vma,
    )
    bad = np.zeros((4, 2), bool)
    bad[place] = True
    grads = {"w": np.ones((4, 2, 3), np.float32), "v": np.ones((4, 2, 2), np.float32)}
    if fault == "nan":
        grads["v"][place] = np.nan
    params = {"w": jnp.ones(6), "v": jnp.ones(2)}
    dropped = np.where(bad & (fault == "dropped"), 1, 0)
    updates, scale, flags = jax.jit(step)(params, grads, dropped)
    assert (np.asarray(scale) == 4).all()
    assert (np.asarray(flags["v"]) == (fault == "nan")).all() and not np.any(flags["w"])
    assert (np.asarray(updates["w"]) == (0 if fault == "nan" else -1 / 8)).all()


def test_state_leaves_a_shard_map_as_replicated():
    """Scale and flags are the same on all devices, and the types of JAX know it."""
    optimizer = loss_scaled(
        optax.sgd(1.0, momentum=0.9), DynamicScale(), mesh_axis=("data", "model")
    )

    def body(w, x):
        state = optimizer.init(w)
        grads = jax.lax.psum(jax.lax.pcast(w, "data", to="varying") * x.sum(), "data")
        updates, state = optimizer.update(grads, state, w)
        return updates, state.scale, state.bad, state.skipped, state.inner

    outs = (P("model"), P(), P(), P(), (optax.TraceState(P("model")), optax.EmptyState()))
    step = jax.shard_map(body, mesh=mesh(), in_specs=(P("model"), P("data")), out_specs=outs)
    updates, scale, *_ = jax.jit(step)(jnp.ones(4), jnp.ones(8))
    assert updates.shape == (4,) and scale == 2**15


def test_a_forgotten_axis_is_named():
    optimizer = loss_scaled(optax.sgd(1.0), DynamicScale(), mesh_axis=("data",))
    body = lambda w: optimizer.update(w, optimizer.init(w))[0]
    step = jax.shard_map(body, mesh=mesh(), in_specs=P("model"), out_specs=P("model"))
    with pytest.raises(ValueError, match=r"\['model'\].*Pass mesh_axis=\('data', 'model'\)"):
        jax.jit(step)(jnp.ones(4))


def test_costs_one_check_per_leaf_and_one_reduction():
    optimizer = loss_scaled(optax.sgd(1.0), DynamicScale(), mesh_axis=("data",))
    body = lambda params: optimizer.update(params, optimizer.init(params))[0]
    step = jax.shard_map(body, mesh=mesh(), in_specs=P("data"), out_specs=P("data"))
    text = str(jax.make_jaxpr(step)({"a": jnp.ones(4), "b": jnp.ones(8)}))
    assert (text.count("is_finite"), text.count("psum")) == (2, 1)


@relaxed
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_temporary_memory_is_at_most_one_copy_of_the_parameters():
    params = {f"w{i}": jnp.zeros((128, 128)) for i in range(4)}

    def temp(optimizer, donated):
        def step(grads, state, params):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        args = params, optimizer.init(params), params
        compiled = jax.jit(step, donate_argnums=donated).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = loss_scaled(optax.adam(1e-3), DynamicScale())
    theirs = optax.apply_if_finite(optax.adam(1e-3), 10**9)
    assert temp(ours, (0, 1, 2)) <= 1.0 * trees.nbytes(params) + 1024
    for donated in [(), (1,), (0, 1), (1, 2)]:
        assert temp(ours, donated) <= temp(theirs, donated) + 1024


# --- transformations and state ---------------------------------------------------------------


def test_commutes_with_jit_vmap_and_scan():
    optimizer = loss_scaled(optax.sgd(0.5, momentum=0.9), DynamicScale(init=8, interval=2))
    grads = jnp.array([[1.0, jnp.inf, 2, 3], [1, 2, 3, 4], [jnp.nan, jnp.nan, 1, 1]])

    def train(grads):
        def step(state, g):
            updates, state = optimizer.update(g * current_scale(state), state)
            return state, (updates, state)

        return jax.lax.scan(step, optimizer.init(grads[0]), grads)[1]

    def by_hand(grads):
        state, rows = optimizer.init(grads[0]), []
        for g in grads:
            updates, state = optimizer.update(g * current_scale(state), state)
            rows.append((updates, state))
        return jax.tree.map(lambda *xs: jnp.stack(xs), *rows)

    seeds = jax.tree.map(lambda *xs: jnp.stack(xs), *map(by_hand, grads))
    chex.assert_trees_all_equal(jax.jit(jax.vmap(train))(grads), seeds)


def test_the_scale_is_data():
    """A static scale changes without a new compilation; jmp's is part of the program."""
    optimizer = loss_scaled(optax.identity(), StaticScale(4))
    state = optimizer.init(jnp.float32(0))
    update = jax.jit(optimizer.update)
    for scale in (4, 8, 16):
        state = dataclasses.replace(state, scale=jnp.float32(scale))
        updates, state = update(jnp.float32(16), state)
        assert (updates, state.scale) == (16 / scale, scale)
    assert update._cache_size() == 1


def test_the_spec_is_the_only_difference_between_static_and_dynamic_states():
    states = [loss_scaled(optax.sgd(1.0), spec).init(PARAMS) for spec in (StaticScale(), SPECS[0])]
    chex.assert_trees_all_equal_shapes_and_dtypes(*states)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


def test_state_survives_a_map_of_the_identity():
    """A hand-written flatten in jmp forgets the floor, and any jit resets it to 1."""
    spec = DynamicScale(init=64, min=64)
    optimizer = loss_scaled(optax.sgd(1.0), spec)
    state = jax.jit(lambda s: jax.tree.map(lambda x: x, s))(optimizer.init(jnp.float32(0)))
    assert_same_bits(state, optimizer.init(jnp.float32(0)))
    for _ in range(3):
        _, state = jax.jit(optimizer.update)(jnp.float32(jnp.inf), state)
    assert (state.scale, state.stuck) == (64, True)


def test_the_scale_is_found_inside_other_transforms():
    scaled = loss_scaled(optax.sgd(1.0), StaticScale(32))
    wrapped = optax.chain(optax.apply_if_finite(scaled, 3), optax.identity())
    assert jax.jit(lambda: current_scale(wrapped.init(PARAMS)))() == 32
    assert current_scale({"opt": wrapped.init(PARAMS), "step": 3}).dtype == jnp.float32


SCALED = loss_scaled(optax.sgd(1.0), StaticScale(32))


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip_by_global_norm(1.0), SCALED),
        optax.chain(optax.identity(), optax.apply_if_finite(SCALED, 3)),
        optax.apply_if_finite(optax.chain(optax.clip(1.0), optax.chain(SCALED)), 3),
        optax.named_chain(("clip", optax.clip(1.0)), ("opt", SCALED)),
        optax.partition({"x": SCALED, "y": optax.sgd(1.0)}, {"a": "x", "b": "y"}),
    ],
    ids=["chain", "wrapped", "nested", "named", "partition"],
)
def test_what_sees_scaled_gradients_beside_a_scale_is_refused(tx):
    with pytest.raises(ValueError, match=r"norm clipped there.*loss_scaled\(optax.chain\(clip"):
        current_scale(tx.init(PARAMS))


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(SCALED),
        optax.chain(SCALED, optax.scale(0.5)),
        optax.named_chain(("opt", SCALED)),
        optax.chain(optax.chain(optax.apply_if_finite(SCALED, 3)), optax.clip(1.0)),
    ],
    ids=["alone", "ahead", "named", "nested"],
)
def test_a_scale_that_sees_the_gradients_first_is_found(tx):
    assert current_scale(tx.init(PARAMS)) == 32


@relaxed
def test_no_scale_or_two_are_errors_that_say_what_is_there():
    with pytest.raises(ValueError, match="no LossScaleState, only .*ScaleByAdamState.*StaticScale"):
        current_scale(optax.adam(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="no LossScaleState, only leaves"):
        current_scale(jnp.ones(3))
    twice = loss_scaled(loss_scaled(optax.sgd(1.0), StaticScale()), StaticScale())
    pair = (twice.init(PARAMS).inner,) * 2
    for state in (twice.init(PARAMS), pair):
        with pytest.raises(ValueError, match="holds 2 loss scales.*outermost"):
            current_scale(state)


def test_overflowing_refuses_other_parameters():
    state = loss_scaled(optax.sgd(1.0), StaticScale()).init(PARAMS)
    with pytest.raises(ValueError, match="params has 1 leaves, but .* watches 3 others"):
        overflowing(state, {"w": 1.0})


@relaxed
def test_parameter_like_state_is_still_recognized_by_optax():
    optimizer = loss_scaled(optax.adam(0.1), DynamicScale(init=8))
    state = optax.tree.map_params(optimizer, lambda x: x + 1, optimizer.init(PARAMS))
    assert (state.inner[0].mu["b"]["d"] == 1).all()
    assert (state.scale, state.good, state.inner[0].count) == (8, 0, 0)


@relaxed
def test_a_state_that_changes_dtype_is_named():
    optimizer = loss_scaled(optax.sgd(1.0, momentum=0.9), StaticScale())
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(TypeError, match=r"'0/trace/w' from bfloat16\(3,\) to float32\(3,\).*low_p"):
        optimizer.update({"w": jnp.ones(3)}, optimizer.init(params), params)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_low_precision_gradients_keep_their_dtype(dtype):
    """The inverse of a large scale is below float16's range, the product need not be."""
    optimizer = loss_scaled(optax.sgd(1.0), StaticScale(2**26))
    params = jnp.ones(2, dtype)
    updates, _ = optimizer.update(jnp.full(2, 2.0**14, dtype), optimizer.init(params), params)
    assert updates.dtype == dtype and (updates == -(2.0**-12)).all()
    assert optax.apply_updates(params, updates).dtype == dtype


def test_integer_leaves_are_not_scaled():
    """In jmp they are."""
    optimizer = loss_scaled(optax.identity(), StaticScale(4))
    grads = {"n": jnp.array([3, 5]), "w": jnp.array([4.0])}
    updates, _ = optimizer.update(grads, optimizer.init(grads))
    chex.assert_trees_all_equal(updates, {"n": jnp.array([3, 5]), "w": jnp.array([1.0])})


def test_complex_gradients_are_checked_and_unscaled():
    optimizer = loss_scaled(optax.identity(), StaticScale(4))
    grads = jnp.array([4 + 8j])
    state = optimizer.init(grads)
    assert optimizer.update(grads, state)[0] == 1 + 2j
    assert optimizer.update(grads * jnp.inf, state)[1].skipped == 1


def test_an_empty_tree_is_finite():
    optimizer = loss_scaled(optax.identity(), DynamicScale(init=8, interval=1))
    assert optimizer.update({}, optimizer.init({}))[1].scale == 16


# --- what goes wrong elsewhere ---------------------------------------------------------------


def test_a_growing_step_unscales_by_the_scale_that_its_gradients_carry():
    """In mpx the scale moves first, and 6 comes back as 3."""
    optimizer = loss_scaled(optax.identity(), DynamicScale(init=8, interval=1))
    updates, state = optimizer.update(jnp.float32(48), optimizer.init(jnp.float32(0)))
    assert (updates, state.scale) == (6, 16)


def test_two_hundred_bad_steps_end_at_the_floor_and_ring():
    """Flax's scale falls to 1.2e-38 without a word."""
    states = run(DynamicScale(), np.zeros(200, bool))
    assert (states.scale[-1], states.stuck[-1], states.skipped[-1]) == (1, True, 200)


# --- float16 training ------------------------------------------------------------------------


@relaxed
def test_float16_training_overflows_recovers_and_learns():
    key = jax.random.key(0)
    x = jax.random.normal(key, (64, 8))
    y = jnp.sin(x @ jnp.linspace(-1, 1, 8))
    shapes = {"in": (8, 32), "out": (32,)}
    params = {
        name: jax.random.normal(jax.random.fold_in(key, i), shape) / shape[0] ** 0.5
        for i, (name, shape) in enumerate(shapes.items())
    }
    model = lambda params, x: jnp.tanh(x @ params["in"]) @ params["out"]
    low = cast(model, Policy(compute="float16"))
    spec = DynamicScale(init=2**24, interval=5)
    optimizer = loss_scaled(optax.adam(1e-2), spec)

    def loss(params, scale):
        value = jnp.mean((low(params, x) - y) ** 2)
        return scale * value, value

    def step(carry, _):
        params, state = carry
        grads, value = jax.grad(loss, has_aux=True)(params, current_scale(state))
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), (value, state)

    train = jax.jit(lambda carry: jax.lax.scan(step, carry, length=200))
    (params, state), (values, states) = train((params, optimizer.init(params)))
    scales, skips = np.asarray(states.scale), np.asarray(states.skipped)
    first = int(np.flatnonzero(np.diff(skips, prepend=0) == 0)[0])
    assert first >= 3, "the first scale overflows"
    assert (scales[:first] == 2.0 ** (23 - np.arange(first))).all(), "halved until finite"
    assert np.isfinite(values).all(), "the reported loss is never scaled"
    assert (np.diff(scales) > 0).any() and skips[-1] > first, "grows, and overflows again"
    assert state.inner[0].count == 200 - skips[-1]
    assert all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(params))
    assert values[-1] < 0.1 * values[0]
    named = overflowing(jax.tree.map(lambda x: x[0], states), params)
    assert named and set(named) <= {"in", "out"}


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StaticScale(1000), "StaticScale.scale is 1000, not a power of two.*512 or 1024"),
        (lambda: StaticScale(0), "is 0, not a power"),
        (lambda: StaticScale(-2), "is -2, not a power"),
        (lambda: StaticScale(float("inf")), "is inf, not a power"),
        (lambda: StaticScale(float("nan")), "is nan, not a power"),
        (lambda: StaticScale(2.0**127), r"in \[2\^-126, 2\^126\]"),
        (lambda: DynamicScale(init=3), "DynamicScale.init is 3.*Use 2 or 4"),
        (lambda: DynamicScale(growth=1.5), "DynamicScale.growth is 1.5"),
        (lambda: DynamicScale(backoff=0.3), "DynamicScale.backoff is 0.3.*0.25 or 0.5"),
        (lambda: DynamicScale(min=48), "DynamicScale.min is 48"),
        (lambda: DynamicScale(max=100), "DynamicScale.max is 100"),
        (lambda: DynamicScale(min=4, max=2), "min=4, init=32768.0 and max=2.*min <= init <= max"),
        (lambda: DynamicScale(init=2, min=4), "min=4, init=2"),
        (lambda: DynamicScale(growth=0.5), "growth=0.5; expected backoff < 1 < growth"),
        (lambda: DynamicScale(backoff=1), "backoff=1 and"),
        (lambda: DynamicScale(interval=0), "interval=0"),
        (lambda: DynamicScale(hysteresis=0), "hysteresis=0"),
    ],
)
def test_a_bad_spec_gets_a_clear_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_state_has_the_documented_fields():
    state = loss_scaled(optax.sgd(1.0), DynamicScale(hysteresis=3)).init(PARAMS)
    assert isinstance(state, LossScaleState)
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    del fields["inner"]
    flags = jax.tree.map(lambda x: (x.dtype.name, x.shape), fields.pop("bad"))
    assert flags == {"a": ("bool", ()), "b": {"c": ("bool", ()), "d": ("bool", ())}}
    assert {name: (x.dtype.name, x.shape) for name, x in fields.items()} == {
        "scale": ("float32", ()),
        "good": ("int32", ()),
        "credits": ("int32", ()),
        "stuck": ("bool", ()),
        "skipped": ("int32", ()),
        "applied": ("bool", ()),
    }
    assert state.credits == 2
