"""Laws of pruning in training."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec as P

import unitscale_jax as us
from unitscale_jax.prune import (
    ERK,
    Block,
    Channel,
    Cubic,
    Global,
    Linear,
    NofM,
    OneShot,
    SparsitySpec,
    Steps,
    Unstructured,
    fisher,
    magnitude,
    masks_of,
    movement,
    pruned,
    random,
    saliency,
)
from unitscale_jax.sparsity import kept

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

INNER = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.chain(
        optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True)
    ),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "lion": optax.lion(0.1, weight_decay=0.1),
    "lamb": optax.lamb(0.1, weight_decay=0.1),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9, centered=True),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2, momentum=0.9),
    "muon": optax.contrib.muon(0.1),
    "schedule free": optax.contrib.schedule_free_adamw(0.1),
    "clip": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    "inject": optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0.1),
    "optax.MultiSteps": optax.MultiSteps(optax.adam(0.1), 2),
    "apply if finite": optax.apply_if_finite(optax.adam(0.1), 5),
    "partition": optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)},
        {"layer": {"kernel": "a", "bias": "b"}},
    ),
    "us.loss_scaled": us.loss_scaled(optax.adam(0.1), us.StaticScale(1.0)),
}
EVERY_INNER = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)

# No two shapes are equal, so that a test knows by its shape what an array of the state is of.
SHAPES = {"layer": {"kernel": (8, 6), "bias": (6,)}, "stack": (3, 4, 5)}
SPEC = SparsitySpec(patterns=Unstructured(), sparsity=0.75, stacked={"stack": 1})
GRADUAL = Cubic(1, 6, every=2, initial=0.3)  # at 1, 3, 5, 6
STEPS = 9


def draw(seed, dtype=np.float32, lead=()):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)
    leaf = lambda shape: jnp.asarray(rng.normal(size=lead + shape), dtype)
    return jax.tree.map(leaf, SHAPES, is_leaf=is_shape)


def part(tree):
    """The layer alone."""
    return {"layer": tree["layer"]}


def stepper(tx, traces=None):
    """One step of an optimizer, compiled: `(params, state, grads) -> (params, state)`."""

    @jax.jit
    def step(params, state, grads, **extra):
        if traces is not None:
            traces.append(0)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def run(tx, params, grads, steps=STEPS):
    """Parameters and states after each of several steps."""
    step, state, out = stepper(tx), tx.init(params), []
    for t in range(steps):
        params, state = step(params, state, jax.tree.map(lambda g, t=t: g[t], grads))
        out.append((params, state))
    return out


def density(mask):
    return np.asarray(mask).mean(axis=tuple(range(np.ndim(mask) - 2, np.ndim(mask))))


def scheduled(schedule, t, n, sparsity):
    """How many of n stay after step t."""
    levels = dict(zip(schedule.steps, schedule.sparsities(sparsity), strict=True))
    return kept(n, max((s for step, s in levels.items() if step <= t), default=0.0))


# ------------------------------------------------------------------- zeros, counts, moments


@EVERY_INNER
def test_what_is_pruned_is_zero_and_has_no_moments(inner):
    traces, params, grads = [], part(draw(0)), part(draw(1, lead=(STEPS,)))
    tx = pruned(inner, SparsitySpec(patterns=Unstructured(), sparsity=0.75), GRADUAL)
    step, state, before = stepper(tx, traces), tx.init(params), True
    for t in range(STEPS):
        params, state = step(params, state, jax.tree.map(lambda g, t=t: g[t], grads))
        w, mask = (np.asarray(x["layer"]["kernel"]) for x in (params, masks_of(state)))
        assert mask.sum() == scheduled(GRADUAL, t, 48, 0.75)
        assert not np.any(w[~mask]) and np.all(mask <= before)
        assert masks_of(state)["layer"]["bias"].shape == ()
        for leaf in jax.tree.leaves(state.inner):
            if leaf.shape == mask.shape:
                assert np.all(np.abs(leaf[~mask]) <= 1e-29)  # Adafactor's holds its epsilon
        before = mask
    assert len(traces) == 1 and int(state.done) == 4 and int(state.count) == STEPS


@EVERY_INNER
def test_with_nothing_pruned_it_is_the_inner_transform(inner):
    params, grads = part(draw(0)), part(draw(1))
    tx = pruned(inner, SparsitySpec(patterns=Unstructured(), sparsity=0.75), GRADUAL)
    updates, state = tx.update(grads, tx.init(params), params)
    expected = inner.update(grads, inner.init(params), params)
    chex.assert_trees_all_equal((updates, state.inner), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("grads_dtype", [jnp.bfloat16, jnp.float32])
def test_zeros_are_exact_in_any_dtype(dtype, grads_dtype):
    params, grads = draw(0, dtype), draw(1, grads_dtype, (3,))
    for after, state in run(pruned(optax.sgd(0.1), SPEC), params, grads, 3):
        mask = masks_of(state)["stack"]
        assert mask.sum() == 3 * 5 and after["stack"].dtype == dtype
        assert not np.any(after["stack"][~mask])


@pytest.mark.parametrize("inner", ["momentum", "adam", "adamw", "lion", "rmsprop", "clip"])
def test_kept_weights_take_the_path_of_a_model_without_the_others(inner):
    """The masked dense model, and one whose parameters are the kept values only."""
    x, y = (jnp.asarray(np.random.default_rng(s).normal(size=(16, 6))) for s in (2, 3))
    loss = lambda w: jnp.mean((jnp.tanh(x @ w) - y) ** 2)
    spec = SparsitySpec(patterns=Unstructured(), sparsity=0.5)
    w = jnp.asarray(np.random.default_rng(4).normal(size=(6, 6)))
    at = np.nonzero(np.asarray(us.prune.make_masks(jnp.abs(w), spec)))
    rebuilt = lambda values: jnp.zeros((6, 6)).at[at].set(values)

    def train(tx, loss, w):
        step, state = stepper(tx), tx.init(w)
        for _ in range(20):
            w, state = step(w, state, jax.grad(loss)(w))
        return w

    tx = INNER[inner]
    dense = train(pruned(tx, spec), loss, rebuilt(w[at]))
    values = train(tx, lambda values: loss(rebuilt(values)), w[at])
    np.testing.assert_allclose(dense, rebuilt(values), rtol=1e-4, atol=1e-5)


@given(
    w=hnp.arrays(np.float32, (4, 6), elements=st.sampled_from([0, -0.0, 1, -1, 2, 1e-42, np.inf])),
    g=hnp.arrays(np.float32, (4, 6), elements=st.sampled_from([0, 1, -1])),
)
def test_keeps_exactly_k_of_any_weights(w, g):
    """All equal, all zero, infinite: the number that stays is the scheduled one."""
    params, state = one_shot_step({"w": jnp.asarray(w)}, {"w": jnp.asarray(g)})
    assert state.masks["w"].sum() == 12
    assert not np.any(np.asarray(params["w"])[~state.masks["w"] & np.isfinite(w)])


@jax.jit
def one_shot_step(params, grads):
    tx = pruned(optax.sgd(0.1), SparsitySpec(patterns=Unstructured(), sparsity=0.5))
    updates, state = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates), state


# ------------------------------------------------------------------- worked examples


@pytest.mark.parametrize(
    ("inner", "grads", "updates", "after"),
    [
        (optax.sgd(0.1), [1, 1, -2], [-0.1, 2, 0.2], [0.9, 0, 0.7]),
        (
            optax.adamw(0.1, weight_decay=0.1),
            [1, 1, -2],
            [-0.109999, 2, 0.094999],
            [0.890001, 0, 0.594999],
        ),
        (
            optax.chain(optax.clip_by_global_norm(1), optax.sgd(1)),
            [3, 100, 4],
            [-0.6, 2, -0.8],
            None,
        ),
    ],
)
def test_worked_example_4(inner, grads, updates, after):
    """The norm of [3, 100, 4] is 5 where the second weight is pruned."""
    params = {"w": jnp.array([1.0, -2.0, 0.5])}
    spec = SparsitySpec(patterns={"w": Unstructured()}, sparsity=1 / 3)
    smallest = us.prune.Score(
        lambda p: (), lambda s, g, p: s, lambda s, g, p, n: {"w": jnp.array([1.0, 0.0, 1.0])}
    )
    tx = pruned(inner, spec, score=smallest)
    got, _ = tx.update({"w": jnp.array(grads, jnp.float32)}, tx.init(params), params)
    np.testing.assert_allclose(got["w"], updates, atol=1e-6)
    if after:
        np.testing.assert_allclose(optax.apply_updates(params, got)["w"], after, atol=1e-6)


# ------------------------------------------------------------------- masks that change


@pytest.mark.parametrize(
    ("score", "allocate"),
    [
        (magnitude(), us.prune.uniform),
        (saliency(), ERK),
        (fisher(), Global),
        (movement(), us.prune.uniform),
    ],
    ids=["magnitude", "saliency", "fisher", "movement"],
)
def test_sticky_masks_are_nested_and_reach_the_target(score, allocate):
    spec = SparsitySpec(patterns=Unstructured(), sparsity=0.8, allocate=allocate)
    schedule = Linear(0, 8, every=1)
    states = run(pruned(optax.sgd(0.1), spec, schedule, score), draw(0), draw(1, lead=(STEPS,)))
    masks = [masks_of(state) for _, state in states]
    for old, new in zip(masks, masks[1:], strict=False):
        assert all(np.all(n <= o) for n, o in zip(*map(jax.tree.leaves, (new, old)), strict=True))
    sizes = [48, 60]
    total = sum(kept(n, 0.8) for n in sizes) if allocate is us.prune.uniform else kept(108, 0.8)
    assert sum(int(m.sum()) for m in jax.tree.leaves(masks[-1]) if m.ndim) == total


def test_sticky_masks_are_nested_where_shares_are_rounded():
    """At a higher sparsity largest remainders give a parameter one more: it had that one before."""
    params = {name: jnp.ones((rows, 1)) for name, rows in zip("abc", (5, 5, 1), strict=True)}
    levels = np.linspace(0.05, 0.95, 40)
    spec = SparsitySpec(
        patterns=Unstructured(),
        sparsity=0.95,
        allocate=us.prune.OWL({"a": 0.3, "b": 0.3, "c": 0.1}),
    )
    table = us.prune._spec.counts(spec, params, levels)
    assert any(np.any(np.diff(rows) > 0) for rows in table.values()), "no such sparsities here"
    tx = pruned(optax.sgd(0.1), spec, Steps(tuple(range(40)), tuple(levels)))
    step, state = stepper(tx), tx.init(params)
    for _ in range(40):
        old = masks_of(state)
        params, state = step(params, state, jax.tree.map(jnp.zeros_like, params))
        assert jax.tree.all(jax.tree.map(lambda n, o: np.all(n <= o), masks_of(state), old))
    assert sum(int(m.sum()) for m in jax.tree.leaves(masks_of(state))) == kept(11, 0.95)


def test_weights_return_where_masks_are_not_sticky():
    spec = SparsitySpec(patterns=Unstructured(), sparsity=0.5)
    tx = pruned(optax.adam(0.1), spec, Linear(0, 8, 1, initial=0.5), random(0), sticky=False)
    states = run(tx, draw(0), draw(1, lead=(STEPS,)))
    masks = [masks_of(state)["stack"] for _, state in states]
    assert all(m.sum() == 30 for m in masks)
    assert any(np.any(new & ~old) for old, new in zip(masks, masks[1:], strict=False))


def test_sticky_masks_refuse_sparsities_that_fall():
    schedule = Steps((0, 5), (0.8, 0.5))
    with pytest.raises(ValueError, match=r"from sparsity 0.8 to 0.5.*sticky=False"):
        pruned(optax.sgd(0.1), SPEC, schedule).init(draw(0))
    tx = pruned(optax.sgd(0.1), SPEC, schedule, random(0), sticky=False)
    masks = [masks_of(state)["stack"].sum() for _, state in run(tx, draw(0), draw(1, lead=(6,)), 6)]
    assert masks == [12] * 5 + [30]


@pytest.mark.parametrize("pattern", [Block((2, 3)), Channel(-1), NofM(2, 4, axis=0)])
def test_patterns_are_kept_through_training(pattern):
    spec = SparsitySpec(patterns={"layer/kernel": pattern}, sparsity=0.5)
    for _, state in run(
        pruned(optax.adam(0.1), spec, Linear(1, 3)), draw(0), draw(1, lead=(5,)), 5
    ):
        mask = np.asarray(masks_of(state)["layer"]["kernel"])
    assert mask.sum() == 24
    if isinstance(pattern, Block):
        blocks = mask.reshape(4, 2, 2, 3).swapaxes(1, 2).reshape(8, 6)
        assert set(blocks.sum(1)) == {0, 6}
    elif isinstance(pattern, Channel):
        assert set(mask.sum(0)) == {0, 8}
    else:
        assert np.all(mask.reshape(2, 4, 6).sum(1) == 2)


def test_a_stacked_kernel_is_ranked_layer_by_layer():
    params = {"stack": jnp.stack([jnp.full((4, 5), 0.01), jnp.ones((4, 5)), jnp.ones((4, 5))])}
    spec = SparsitySpec(patterns=Unstructured(), sparsity=0.5, stacked={"stack": 1})
    tx = pruned(optax.sgd(0.1), spec)
    _, state = tx.update(params, tx.init(params), params)
    assert masks_of(state)["stack"].sum((1, 2)).tolist() == [10, 10, 10]


# ------------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_of_masks_whose_gradient_is_not_finite_is_made_up_for(bad):
    """Also the last one: the target is reached a step later."""
    grads = draw(1, lead=(STEPS,))
    kernel = grads["layer"]["kernel"].at[jnp.array([3, 6])].set(bad)
    grads["layer"]["kernel"] = kernel
    tx = pruned(optax.apply_if_finite(optax.adam(0.1), 5), SPEC, GRADUAL, fisher())
    states = run(tx, draw(0), grads)
    per_step = [int(masks_of(state)["layer"]["kernel"].sum()) for _, state in states]
    k = [scheduled(GRADUAL, t, 48, 0.75) for t in (1, 3, 5, 6)]
    assert per_step == [48, k[0], k[0], k[0], k[1], k[2], k[2], k[3], k[3]]
    assert us.tree.is_finite(states[-1])


def test_updates_that_were_missed_are_made_at_once():
    """Steps 1, 3 and 5 pass without a finite gradient: one update takes their place."""
    grads = draw(1, lead=(STEPS,))
    grads["stack"] = grads["stack"].at[1:6].set(np.nan)
    tx = pruned(optax.apply_if_finite(optax.sgd(0.1), 9), SPEC, GRADUAL)
    counts = [int(masks_of(s)["stack"].sum()) for _, s in run(tx, draw(0), grads)]
    assert counts == [60] * 6 + [15] * 3


def test_a_nan_among_pruned_gradients_reaches_nothing():
    params, tx = draw(0), pruned(optax.adam(0.1), SPEC)
    step, state = stepper(tx), tx.init(params)
    params, state = step(params, state, draw(1))
    grads = jax.tree.map(lambda m, g: jnp.where(m, g, np.nan), masks_of(state), draw(2))
    params, state = step(params, state, grads)
    assert us.tree.is_finite((params, state))


# ------------------------------------------------------------------- state


def test_a_run_resumed_in_the_middle_is_the_run():
    grads, tx = draw(1, lead=(STEPS,)), pruned(optax.adamw(0.1), SPEC, GRADUAL, movement())
    states = run(tx, draw(0), grads)
    step, (params, state) = stepper(tx), states[3]
    stored = [np.asarray(x) for x in jax.tree.leaves((params, state))]
    params, state = jax.tree.unflatten(jax.tree.structure((params, state)), stored)
    for t in range(4, STEPS):
        params, state = step(params, state, jax.tree.map(lambda g, t=t: g[t], grads))
    chex.assert_trees_all_equal((params, state), states[-1])


def test_a_state_survives_a_checkpoint(tmp_path):
    tx, params = pruned(optax.adam(0.1), SPEC), draw(0)
    _, state = tx.update(draw(1), tx.init(params), params)
    us.save(tmp_path / "state.safetensors", state)
    chex.assert_trees_all_equal(us.load(tmp_path / "state.safetensors", like=state), state)


@pytest.mark.parametrize("spec", [P("x"), P(None, "y"), P("y", "x")])
def test_sharded_is_unsharded(spec):
    mesh = jax.make_mesh((2, 2), ("x", "y"))
    params, grads = ({"w": draw(seed)["layer"]["kernel"]} for seed in (0, 1))
    sparse = SparsitySpec(patterns=Unstructured(), sparsity=0.6)
    tx = pruned(optax.adam(0.1), sparse, Linear(0, 2, initial=0.2))
    split = lambda tree: jax.device_put(tree, NamedSharding(mesh, spec))
    init = tx.init(split(params))
    assert masks_of(init)["w"].sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    outs = []
    for w, g in [(params, grads), (split(params), split(grads))]:
        step, state = stepper(tx), tx.init(w)
        for _ in range(4):
            w, state = step(w, state, g)
        outs.append((w, state))
    chex.assert_trees_all_equal(outs[0][1].masks, outs[1][1].masks)
    chex.assert_trees_all_close(outs[0], outs[1], rtol=1e-6)


def test_parameters_and_state_can_be_donated():
    tx, params = pruned(optax.adam(0.1), SPEC, GRADUAL), draw(0)
    update = lambda p, s, g: (lambda u: (optax.apply_updates(p, u[0]), u[1]))(tx.update(g, s, p))
    step, state = jax.jit(update, donate_argnums=(0, 1)), tx.init(params)
    for seed in range(4):
        params, state = step(params, state, draw(seed))
    assert int(state.done) == 2


def test_runs_inside_scan_and_vmap():
    tx, grads = pruned(optax.adam(0.1), SPEC, GRADUAL), draw(1, lead=(STEPS,))

    def body(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    whole = jax.jit(lambda p, g: jax.lax.scan(body, (p, tx.init(p)), g)[0])
    alone = whole(draw(0), grads)
    chex.assert_trees_all_close(alone, run(tx, draw(0), grads)[-1], rtol=1e-5, atol=1e-6)
    twice = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)
    both = jax.vmap(whole)(twice(draw(0)), twice(grads))
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[1], masks_of(both[1])), masks_of(alone[1]))


# ------------------------------------------------------------------- around and inside

AROUND = {
    "us.multi_steps": lambda tx: us.multi_steps(tx, 2),
    "optax.MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "us.loss_scaled": lambda tx: us.loss_scaled(tx, us.StaticScale(1.0)),
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "apply if finite": lambda tx: optax.apply_if_finite(tx, 5),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_what_passes_updates_on_may_be_around(around):
    """Zeros hold, masks are found, and steps are steps of the optimizer, not parts."""
    tx, params = around(pruned(optax.adamw(0.1), SPEC, OneShot(1))), draw(0)
    step, state = stepper(tx), tx.init(params)
    for seed in range(1, 5):
        params, state = step(params, state, draw(seed))
    mask = masks_of(state)["stack"]
    assert mask.sum() == 15 and not np.any(params["stack"][~mask])


def test_masks_are_found_once_or_not_at_all():
    params, tx = draw(0), pruned(optax.sgd(0.1), SPEC)
    with pytest.raises(ValueError, match="holds 0 PrunedStates.*us.prune.pruned"):
        masks_of(optax.adam(0.1).init(params))
    with pytest.raises(ValueError, match="holds 2 PrunedStates"):
        masks_of((tx.init(params), tx.init(params)))


def test_extra_arguments_reach_the_inner_transform():
    scale = optax.GradientTransformationExtraArgs(
        lambda p: (), lambda u, s, p, *, value, **_: (jax.tree.map(lambda x: value * x, u), s)
    )
    params, tx = {"w": jnp.ones((1, 2))}, pruned(scale, SparsitySpec(patterns=Unstructured()))
    updates, _ = tx.update(params, tx.init(params), params, value=3.0)
    assert sorted(updates["w"].ravel().tolist()) == [-1.0, -1.0]  # kept(2, .8) is 0
    tx = pruned(scale, SparsitySpec(patterns=Unstructured(), sparsity=0.5))
    updates, _ = tx.update(params, tx.init(params), params, value=3.0)
    assert updates["w"].tolist() == [[3.0, -1.0]]


def test_integers_and_codes_are_left_alone():
    quantized = us.quantize({"q": jnp.ones((4, 4))}, [("q", us.DotSpec(w=us.QSpec(axes=(-2,))))])
    params = {"w": jnp.arange(1.0, 5).reshape(2, 2), "n": jnp.ones((2, 2), jnp.int32), **quantized}
    grads = {"w": jnp.ones((2, 2)), "n": None, "q": None}
    spec = SparsitySpec(patterns={"w": Unstructured()}, sparsity=0.5)
    tx = pruned(optax.sgd(1.0), spec, score=movement())
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert updates["n"] is None and updates["q"] is None
    assert updates["w"].tolist() == [[-1.0, -1.0], [-3.0, -4.0]]
    assert masks_of(state)["n"].shape == masks_of(state)["q"].shape == ()
    frozen = {**grads, "n": jnp.zeros((2, 2), jnp.int32)}
    tx = pruned(
        optax.partition({0: optax.sgd(1.0), 1: optax.set_to_zero()}, {"w": 0, "n": 1}), spec
    )
    pair = lambda tree: {"w": tree["w"], "n": tree["n"]}
    updates, _ = tx.update(pair(frozen), tx.init(pair(params)), pair(params))
    assert updates["n"].dtype == jnp.int32 and not np.any(updates["n"])


def test_flax_states_are_trees_like_others():
    nnx = pytest.importorskip("flax.nnx")
    apply, params, _ = us.from_nnx(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))[:3]
    del apply
    spec = SparsitySpec(patterns={"kernel": Unstructured()}, sparsity=0.5)
    tx = pruned(optax.adam(0.1), spec)
    updates, state = tx.update(params, tx.init(params), params)
    masks = us.tree.named_leaves(masks_of(state))
    assert masks["kernel"].sum() == 8 and masks["bias"].shape == ()
    after = us.tree.named_leaves(optax.apply_updates(params, updates))
    assert not np.any(after["kernel"][~masks["kernel"]])


def test_only_what_is_pruned_costs_memory_of_scores():
    state = pruned(optax.sgd(0.1), SPEC, score=movement()).init(draw(0))
    assert us.tree.size(state.score) == 48 + 60 + 1


def test_parameters_are_needed():
    tx = pruned(optax.sgd(0.1), SPEC)
    with pytest.raises(ValueError, match=r"needs the parameters.*update\(grads, state, params\)"):
        tx.update(draw(1), tx.init(draw(0)))


def test_shards_of_a_manual_axis_are_refused():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    tx = pruned(optax.sgd(0.1), SparsitySpec(patterns=Unstructured(), sparsity=0.5))
    params = {"w": jnp.ones((4, 4))}

    def update(grads, params):
        return tx.update(grads, tx.init(params), params)[0]

    whole = jax.shard_map(update, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    chex.assert_trees_all_equal(whole(params, params), update(params, params))
    sharded = jax.shard_map(update, mesh=mesh, in_specs=(P("x"), P("x")), out_specs=P("x"))
    with pytest.raises(ValueError, match=r"vary over the manual axes \['x'\].*outside"):
        sharded(params, params)


def test_errors_of_the_spec_come_at_init():
    with pytest.raises(ValueError, match="layer/kernle"):
        pruned(optax.sgd(0.1), SparsitySpec(patterns={"layer/kernle": Unstructured()})).init(
            draw(0)
        )
    with pytest.raises(ValueError, match="us.prune.resolve_axes"):
        pruned(optax.sgd(0.1), SparsitySpec(patterns={"layer/kernel": NofM()})).init(draw(0))
