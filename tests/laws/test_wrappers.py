"""One contract for every wrapper of an optimizer, and for the step that carries its parts.

Each wrapper gives in a scan, under vmap, in a shard_map, from donated buffers and after a
checkpoint what it gives outside; a step that does not emit leaves every bit; two wrappers in either
order are equal, or the wrong order is refused with the right one in the message.
"""

import functools
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import unitscale_jax as us
from unitscale_jax import prune
from unitscale_jax.optimizer import ORDER, LossScaleState, PrunedState, find_state

STEPS = 5
DYNAMIC = us.DynamicScale(init=8.0, interval=2)
SPEC = prune.SparsitySpec(patterns={"w": prune.Unstructured()}, sparsity=0.5)
MAGNITUDE, MOVEMENT = prune.magnitude(), prune.movement()
INNER = optax.sgd(0.125, momentum=0.5)
SHAPES = {"w": (4, 2), "b": (4,)}


def two_devices():
    return us.parallel.mesh(dp=2, devices=jax.devices()[:2])


def layout():
    return us.parallel.layout(params_of("float32"), {"w": {0: "dp"}}, two_devices())


WRAPPERS = {
    "low_precision_weights": lambda tx, **_: us.low_precision_weights(tx, "kahan"),
    "stochastic": lambda tx, **_: us.low_precision_weights(tx, key=jax.random.key(0)),
    "pruned": lambda tx, **_: prune.pruned(tx, SPEC, prune.OneShot(2), MAGNITUDE),
    "pruned by movement": lambda tx, **_: prune.pruned(tx, SPEC, prune.OneShot(2), MOVEMENT),
    "rigl": lambda tx, **_: prune.rigl(tx, SPEC, prune.OneShot(2), score=MAGNITUDE),
    "SET": lambda tx, **_: prune.SET(tx, SPEC, prune.OneShot(2)),
    "sr_ste": lambda tx, **_: prune.sr_ste(tx, SPEC, decay=0.25),
    "multi_steps": lambda tx, **_: us.multi_steps(tx, 2),
    "loss_scaled": lambda tx, mesh_axis=(): us.loss_scaled(tx, DYNAMIC, mesh_axis=mesh_axis),
    "multi_steps(loss_scaled)": lambda tx, mesh_axis=(): us.multi_steps(
        us.loss_scaled(tx, DYNAMIC, mesh_axis=mesh_axis), 2
    ),
}
EVERY = pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "pruned"])
SKIPS = [name for name in WRAPPERS if "multi_steps" in name or "loss_scaled" in name]
MASKS = {"pruned", "pruned by movement", "rigl", "SET", "sr_ste"}
BFLOAT16 = {"low_precision_weights", "stochastic"}


def params_of(dtype, seed=0):
    rng = np.random.default_rng(seed)
    drawn = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    drawn["w"][1, 0], drawn["b"][2] = -0.0, -0.0
    return {name: jnp.asarray(x, dtype) for name, x in drawn.items()}


def case(name, seed=0):
    """`(parameters, gradients of all steps)`, one of which is not finite where that is survived."""
    rng = np.random.default_rng(seed + 100)
    grads = {n: rng.normal(size=(STEPS, *s)).astype(np.float32) for n, s in SHAPES.items()}
    if name in SKIPS:
        grads["w"][2, 3, 1] = np.nan  # in the last row: of one device of two
    return params_of("bfloat16" if name in BFLOAT16 else "float32", seed), grads


def moved(p, u):
    """`optax.apply_updates` for one array, also where both have different widths."""
    return (p.astype(jnp.float32) + u.astype(jnp.float32)).astype(p.dtype)


def step_of(tx):
    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (jax.tree.map(moved, params, updates), state), None

    return step


def scanned(tx, params, grads):
    return jax.lax.scan(step_of(tx), (params, tx.init(params)), grads)[0]


def at(grads, t):
    return jax.tree.map(lambda g: g[t], grads)


def looped(step, carry, grads, steps=range(STEPS)):
    for t in steps:
        carry, _ = step(carry, at(grads, t))
    return carry


@functools.cache
def outside(name, seed=0):
    """What a plain loop gives, the reference of all laws."""
    tx, (params, grads) = WRAPPERS[name](INNER), case(name, seed)
    return looped(jax.jit(step_of(tx)), (params, tx.init(params)), grads)


def assert_same_bits(ours, theirs):
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# --------------------------------------------------------------------- as it is outside


@EVERY
def test_a_scan_gives_what_a_loop_gives(name):
    whole = jax.jit(functools.partial(scanned, WRAPPERS[name](INNER)))(*case(name))
    assert_same_bits(whole, outside(name))


@EVERY
def test_vmap_gives_what_each_alone_gives(name):
    cases = [case(name, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *cases)
    both = jax.jit(jax.vmap(functools.partial(scanned, WRAPPERS[name](INNER))))(*stacked)
    for k in (0, 1):
        chex.assert_trees_all_close(at(both, k), outside(name, k), rtol=1e-6)


@EVERY
@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("spec", [P("dp"), P()], ids=["divided", "replicated"])
def test_a_shard_map_gives_what_is_outside(name, spec, check_vma):
    """Also where the number that is not finite is on one device of two."""
    if name in MASKS | {"stochastic"} and spec == P("dp"):
        pytest.skip("ranks whole arrays and draws bits of whole arrays: see the next test")
    tx, (params, grads) = WRAPPERS[name](INNER, mesh_axis=("dp",)), case(name)
    whole = outside(name)
    of = lambda tree: jax.tree.map(lambda x: spec if np.shape(x) in SHAPES.values() else P(), tree)
    along = {n: P(None, *spec) for n in SHAPES}
    mapped = jax.shard_map(
        functools.partial(scanned, tx),
        mesh=two_devices(),
        in_specs=({n: spec for n in SHAPES}, along),
        out_specs=of(whole),
        check_vma=check_vma,
    )
    assert_same_bits(jax.jit(mapped)(params, grads), whole)


@pytest.mark.parametrize("name", SKIPS)
def test_without_the_checks_of_shard_map_devices_agree_also_if_no_axis_is_named(name):
    """No type says that gradients differ between devices there."""
    tx, (params, grads) = WRAPPERS[name](INNER), case(name)
    mapped = jax.shard_map(
        lambda p, g: scanned(tx, p, g)[0],
        mesh=two_devices(),
        in_specs=(P("dp"), P(None, "dp")),
        out_specs=P("dp"),
        check_vma=False,
    )
    assert_same_bits(jax.jit(mapped)(params, grads), outside(name)[0])


@pytest.mark.parametrize("name", sorted(MASKS - {"sr_ste"}))
def test_masks_of_shards_are_refused(name):
    tx, (params, grads) = WRAPPERS[name](INNER), case(name)
    update = lambda p, g: tx.update(g, tx.init(p), p)[0]
    mapped = jax.shard_map(update, mesh=two_devices(), in_specs=P("dp"), out_specs=P("dp"))
    with pytest.raises(ValueError, match=r"manual axes \['dp'\].*outside of the shard_map"):
        mapped(params, at(grads, 0))


@EVERY
def test_donated_buffers_change_nothing(name):
    tx, (params, grads) = WRAPPERS[name](INNER), case(name)
    step = jax.jit(step_of(tx), donate_argnums=0)
    fresh = jax.tree.map(jnp.copy, params)
    assert_same_bits(looped(step, (fresh, tx.init(params)), grads), outside(name))


@EVERY
def test_a_checkpoint_in_between_changes_nothing(name, tmp_path):
    tx, (params, grads) = WRAPPERS[name](INNER), case(name)
    step, blank = jax.jit(step_of(tx)), (params, tx.init(params))
    checkpoints = us.Checkpoints(tmp_path)
    checkpoints.save(3, looped(step, blank, grads, range(3)))  # in the middle of a window
    _, carry = checkpoints.restore(blank)
    assert_same_bits(looped(step, carry, grads, range(3, STEPS)), outside(name))


@pytest.mark.parametrize("inner", SKIPS[:2])
def test_sharded_gives_what_the_inner_one_gives(inner):
    tx, (params, grads) = WRAPPERS[inner](INNER), case(inner)
    place = layout()
    outer = us.parallel.sharded(tx, place, place.over("dp"))
    within = WRAPPERS[inner](us.parallel.sharded(INNER, place, place.over("dp")))
    with jax.set_mesh(place.mesh):
        for each in (outer, within):
            start = us.parallel.shard(params, place)
            end = looped(jax.jit(step_of(each)), (start, each.init(start)), grads)
            assert_same_bits(end, outside(inner))


# --------------------------------------------------------------------- steps that do not emit


@pytest.mark.parametrize("inside", ["sgd", "low_precision_weights", "pruned", "rigl"])
@pytest.mark.parametrize("name", SKIPS)
def test_a_quiet_step_leaves_every_bit(name, inside):
    """The first of a window, or one that overflows; -0.0 included."""
    tx = WRAPPERS[name](WRAPPERS[inside](INNER) if inside in WRAPPERS else INNER)
    params, grads = params_of("bfloat16" if inside in BFLOAT16 else "float32"), at(case(name)[1], 2)
    (after, state), _ = step_of(tx)((params, tx.init(params)), grads)
    assert_same_bits(after, params)
    if name != "multi_steps(loss_scaled)":
        assert_same_bits(state.inner, tx.init(params).inner)


def test_negative_zero_outlives_a_quiet_step_under_apply_updates():
    tx, p = us.multi_steps(optax.sgd(1.0), 2), jnp.float32(-0.0)
    update, _ = tx.update(jnp.float32(3), tx.init(p), p)
    assert np.signbit(optax.apply_updates(p, update))


# --------------------------------------------------------------------- two wrappers, both orders

ALL = [*WRAPPERS][:-1]
RIGHT = ["stochastic", "low_precision_weights", "pruned", "pruned by movement", "rigl", "SET"]
RANK = {name: 0 for name in RIGHT[:2]} | {name: 1 for name in RIGHT[2:]}
RANK |= {"multi_steps": 2, "loss_scaled": 3}
EQUAL = {("pruned", "loss_scaled")}  # by cooperation, where nothing or something overflows
TELL = {"pruned by movement": "pruned", "stochastic": "low_precision_weights"}


def both(inner, outer):
    dtype = "bfloat16" if RANK[inner] == 0 or RANK[outer] == 0 else "float32"
    return WRAPPERS[outer](WRAPPERS[inner](INNER)), WRAPPERS[inner](WRAPPERS[outer](INNER)), dtype


PAIRS = [
    (a, b) for a, b in itertools.product(RANK, RANK) if RANK[a] < RANK[b] and a != "stochastic"
]


@pytest.mark.parametrize(("inner", "outer"), PAIRS)
def test_both_orders_are_equal_or_the_wrong_one_says_which_is_right(inner, outer):
    right, wrong, dtype = both(inner, outer)
    params = params_of(dtype)
    right.init(params)
    if (inner, outer) == ("multi_steps", "loss_scaled"):
        return  # equal until something overflows, see below
    if (inner, outer) not in EQUAL:
        a, b = TELL.get(inner, inner), TELL.get(outer, outer)
        b = "pruned" if b in ("rigl", "SET") else b
        with pytest.raises(ValueError, match=rf"{b}\({a}\(\.\.\)\).*order of wrappers.*{ORDER}"):
            wrong.init(params)
        return
    _, grads = case("loss_scaled")
    results = [
        looped(jax.jit(step_of(tx)), (params, tx.init(params)), grads) for tx in (right, wrong)
    ]
    assert_same_bits(results[0][0], results[1][0])
    states = [find_state(state, LossScaleState)[0][1].scale for _, state in results]
    assert states[0] == states[1] and np.isfinite(results[0][0]["w"]).all()
    counts = [find_state(state, PrunedState)[0][1].count for _, state in results]
    assert counts[0] == counts[1] == STEPS - 1


@pytest.mark.parametrize("score", [prune.movement(), prune.fisher()], ids=["movement", "fisher"])
def test_scores_that_add_up_gradients_refuse_a_loss_scale_inside(score):
    scaled = optax.chain(us.loss_scaled(INNER, DYNAMIC))
    tx = prune.pruned(scaled, SPEC, prune.OneShot(2), score)
    with pytest.raises(ValueError, match=r"loss_scaled\(pruned\(\.\.\)\)"):
        tx.init(params_of("float32"))


def test_a_score_of_a_user_that_adds_up_gradients_is_found_by_tracing():
    add = lambda state, grads, params: jax.tree.map(lambda s, g: s + jnp.abs(g), state, grads)
    zeros = lambda params: jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    score = prune.Score(zeros, add, lambda state, *_: state)
    tx = prune.pruned(us.loss_scaled(INNER, DYNAMIC), SPEC, prune.OneShot(2), score)
    with pytest.raises(ValueError, match=r"loss_scaled\(pruned\(\.\.\)\)"):
        tx.init(params_of("float32"))


def mixed(state, grads, params, count):
    """A score that a factor of the gradients would change."""
    return jax.tree.map(lambda w, g: jnp.abs(w) + 9 * jnp.abs(g), params, grads)


MIXED = prune.Score(lambda _: (), lambda state, *_: state, mixed)


@pytest.mark.parametrize("score", [prune.saliency(), prune.random(0), MIXED])
def test_other_scores_see_true_gradients_in_either_order(score):
    masked = lambda tx: prune.pruned(tx, SPEC, prune.OneShot(2), score)
    params, grads = case("loss_scaled")
    scale = lambda tx: us.loss_scaled(tx, DYNAMIC)
    a, b = (
        looped(jax.jit(step_of(tx)), (params, tx.init(params)), grads)
        for tx in (scale(masked(INNER)), masked(scale(INNER)))
    )
    assert_same_bits(a[0], b[0])


def test_a_decay_of_dense_weights_refuses_a_loss_scale_and_masks_inside():
    for other in ("loss_scaled", "pruned"):
        with pytest.raises(ValueError, match=rf"sr_ste\({other}\(\.\.\)\) is not possible"):
            prune.sr_ste(WRAPPERS[other](INNER), SPEC).init(params_of("float32"))


@pytest.mark.parametrize(
    "wrapper",
    [
        us.low_precision_weights,
        prune.pruned,
        prune.rigl,
        prune.SET,
        us.multi_steps,
        us.loss_scaled,
        us.parallel.sharded,
    ],
)
def test_every_wrapper_states_the_one_order(wrapper):
    text = " ".join(inspect.getdoc(wrapper).split())
    name = wrapper.__name__
    assert (ORDER.replace("pruned", name) if name in ("rigl", "SET") else ORDER) in text
    assert text.count("Order of wrappers, innermost first:") == 1


# --------------------------------------------------------------------- windows and loss scales


@functools.partial(jax.jit, static_argnums=0)
def trained(tx, steps=200):
    def step(carry, _):
        p, state, last, t = carry
        scale = us.current_scale(state).astype(jnp.float16)
        grad = (2 * (p - 1)).astype(jnp.float16) * scale
        update, state = tx.update(grad.astype(jnp.float32), state, p)
        return (p + update, state, jnp.where(update != 0, t, last), t + 1), None

    start = (jnp.float32(0), tx.init(jnp.float32(0)), 0, 0)
    return jax.lax.scan(step, start, length=200)[0]


GROWING = us.DynamicScale(init=2.0**10, interval=4)
ORDERS = {
    "outside": us.loss_scaled(us.multi_steps(optax.sgd(0.02), 2), GROWING),
    "inside": us.multi_steps(us.loss_scaled(optax.sgd(0.02), GROWING), 2),
    "deep inside": us.multi_steps(optax.chain(us.loss_scaled(optax.sgd(0.02), GROWING)), 3),
}


@pytest.mark.parametrize("tx", ORDERS.values(), ids=ORDERS)
def test_a_scale_that_grows_too_far_falls_again_and_training_goes_on(tx):
    p, state, last, _ = trained(tx)
    assert last > 190 and p > 0.9
    (_, scale), *_ = find_state(state, LossScaleState)
    assert scale.skipped > 0 and scale.scale <= 2.0**17


def windows(*parts, params=None):
    """`multi_steps(loss_scaled(sgd))` of two parts to a window, after these gradients."""
    tx = us.multi_steps(us.loss_scaled(optax.sgd(1.0), us.DynamicScale(init=4.0)), 2)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(1)} if params is None else params
    state = tx.init(params)
    for grads in parts:
        updates, state = tx.update(grads, state, params)
    return updates, state, params


GOOD = {"a": jnp.full(2, 8.0), "b": jnp.full(1, 4.0)}
BAD = {"a": jnp.array([1.0, jnp.inf]), "b": jnp.full(1, 4.0)}


def test_a_window_of_which_a_part_is_lost_steps_and_lowers_the_scale():
    updates, state, params = windows(BAD, GOOD)
    assert updates["a"].tolist() == [-2, -2] and us.current_scale(state) == 2
    assert state.dropped == 1 and state.inner.skipped == 0
    assert us.overflowing(state, params) == ["a"]


def test_a_window_of_which_nothing_is_left_is_skipped_and_lowers_the_scale():
    updates, state, params = windows(BAD, BAD)
    assert_same_bits(updates, jax.tree.map(lambda x: jnp.full_like(x, -0.0), params))
    assert us.current_scale(state) == 2 and state.inner.skipped == 1 and state.step == 0
    assert us.overflowing(state, params) == ["a"]
    assert us.overflowing(windows(BAD, BAD, GOOD)[1], params) == []


def test_a_window_without_loss_leaves_the_scale():
    updates, state, params = windows(GOOD, GOOD)
    assert us.current_scale(state) == 4 and us.overflowing(state, params) == []
    assert updates["b"].tolist() == [-1]


def test_parts_that_an_accumulation_dropped_count_as_lost():
    tx = us.multi_steps(us.loss_scaled(optax.sgd(1.0), us.DynamicScale(init=4.0)), 2)
    state, zero = tx.init(jnp.float32(0)), jnp.float32(0)
    for dropped in (us.Mean(1.0, 4.0), us.Mean(0.0, 4.0)):
        update, state = tx.update(jnp.float32(8), state, dropped=dropped)
    assert update == -2 and us.current_scale(state) == 2 and state.dropped == 0
    for dropped in (us.Mean(4.0, 4.0), us.Mean(0.0, 4.0)):  # of the first part nothing is left
        update, state = tx.update(jnp.where(dropped.total > 0, zero, 8), state, dropped=dropped)
    assert update == -4 and us.current_scale(state) == 1 and state.dropped == 1


def test_both_orders_of_windows_and_scale_are_equal_where_nothing_overflows():
    params, grads = params_of("float32"), at(case("pruned")[1], slice(0, 4))
    scaled = jax.tree.map(lambda g: 8 * g, grads)
    fixed = us.StaticScale(8.0)
    txs = (
        us.loss_scaled(us.multi_steps(INNER, 2), fixed),
        us.multi_steps(us.loss_scaled(INNER, fixed), 2),
    )
    a, b = (looped(jax.jit(step_of(tx)), (params, tx.init(params)), scaled, range(4)) for tx in txs)
    plain = us.multi_steps(INNER, 2)
    c = looped(jax.jit(step_of(plain)), (params, plain.init(params)), grads, range(4))
    assert_same_bits(a[0], c[0])
    assert_same_bits(b[0], c[0])
