"""Laws of plans: what is kept fits what was asked for, and nothing more would."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import unitscale_jax as us
from tests.support import zoo
from tests.trace.test_dims import language_model
from unitscale_jax.compaction import (
    Bytes,
    Flops,
    Params,
    compacted,
    groups,
    plan,
    plan_of,
)
from unitscale_jax.compaction._budget import Polynomial, scans_of
from unitscale_jax.compaction._search import removal_of, within
from unitscale_jax.sparsity import kept
from unitscale_jax.trace.costs import cost

f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)


def deep(p, x):
    """Three widths, and a residual stream whose kernels have it twice."""
    h = x @ p["in"]
    h = h + jax.nn.relu(h @ p["a"]) @ p["b"]
    h = h + jax.nn.relu(h @ p["c"]) @ p["d"]
    return (h @ p["square"]) @ p["out"]


DEEP = {"in": f32(5, 8), "a": f32(8, 12), "b": f32(12, 8), "c": f32(8, 16), "d": f32(16, 8)}
DEEP |= {"square": f32(8, 8), "out": f32(8, 3)}
GRAPH = groups(deep, DEEP, f32(4, 5))
SIZES = {group.name: group.size for group in GRAPH.groups}
PRICES = {kind: kind(1).price(GRAPH) for kind in (Params, Bytes, Flops)}


def random_scores(seed, graph=GRAPH):
    rng = np.random.default_rng(seed)
    return {group.name: rng.exponential(size=group.size) for group in graph.groups}


def test_the_graph_of_these_tests_has_four_groups():
    assert sorted(SIZES.values()) == [8, 8, 12, 16]


# ---------------------------------------------------------------------------------- prices


def shaped(params, plan):
    """Compact parameters as abstract ones."""
    leaf = lambda path, x: jax.ShapeDtypeStruct(plan.new_shapes[path], x.dtype)
    return us.tree.map_named(leaf, params)


@pytest.mark.parametrize("name", zoo.EACH)
def test_prices_are_those_of_the_compact_model(name):
    """Parameters and bytes exactly; operations within 1 %, as the equations are counted."""
    model = zoo.model(name)
    graph = groups(model.apply, model.params, *model.inputs)
    sizes = {group.name: group.size for group in graph.groups}
    assert Params(1).price(graph).at(sizes) == us.tree.size(model.params)
    assert Bytes(1).price(graph).at(sizes) == us.tree.nbytes(model.params)
    flops = Flops(1).price(graph)
    assert flops.at(sizes) == cost(graph.traced).flops
    if not graph.groups:
        return
    half = plan(graph, random_scores(0, graph), keep=0.5, exact_only=False)
    small = shaped(model.params, half)
    assert Params(1).price(graph).at(half.new_sizes) == us.tree.size(small)
    real = cost(compacted(model.apply, half), small, *model.inputs).flops
    assert abs(flops.at(half.new_sizes) - real) <= 0.01 * real


def test_four_bits_are_half_a_byte():
    params = {"a": jnp.zeros((4, 6), jnp.int4), "b": jnp.zeros((6, 2), jnp.bfloat16)}
    fn = lambda p, x: (x @ p["a"].astype(jnp.float32)) @ p["b"].astype(jnp.float32)
    graph = groups(fn, params, f32(3, 4))
    assert Bytes(1).price(graph).at({"a:1": 6}) == 4 * 6 / 2 + 6 * 2 * 2
    assert Bytes(1).price(graph).at({"a:1": 3}) == 4 * 3 / 2 + 3 * 2 * 2


def test_a_reduction_costs_what_it_takes_away():
    """Of two channels one addition, of eight seven."""
    fn, params = lambda p, x: jnp.square(x @ p["a"]).sum(-1), {"a": f32(5, 8)}
    graph = groups(fn, params, f32(4, 5))
    made = plan_of(graph, {"a:1": [2, 3]})
    real = cost(compacted(fn, made), shaped(params, made), f32(4, 5)).flops
    assert Flops(1).price(graph).at(made.new_sizes) == real


@pytest.mark.parametrize("twice", [False, True])
def test_operations_of_a_scan_fall_with_its_layers(twice):
    """Also where it runs along what was computed from the stack."""
    stacked = lambda p: jax.tree.map(lambda w: w * 2.0 if twice else w, p["layers"])
    body = lambda h, w: (h + jnp.tanh(h @ w["a"]) @ w["b"], None)
    fn = lambda p, x: jax.lax.scan(body, x, stacked(p))[0]
    params = {"layers": {"a": f32(6, 5, 7), "b": f32(6, 7, 5)}}
    graph = groups(fn, params, f32(3, 5))
    (layer,) = (g.name for g in graph.groups if "layer" in g.flags)
    assert [name for _, name in scans_of(graph)] == [layer]
    half = plan_of(graph, {layer: [0, 2, 5]}, exact_only=False)
    real = cost(compacted(fn, half), shaped(params, half), f32(3, 5)).flops
    assert Flops(1).price(graph).at(half.new_sizes) == real == cost(graph.traced).flops / 2


@given(st.lists(st.sampled_from("abc"), max_size=3), st.lists(st.sampled_from("abc"), max_size=3))
@settings(max_examples=20)
def test_polynomials_add_and_multiply_like_their_values(first, second):
    sizes = {"a": 3, "b": 5, "c": 7}
    x, y = _linear(first), _linear(second)
    assert (x + y).at(sizes) == x.at(sizes) + y.at(sizes)
    assert (x - y).at(sizes) == x.at(sizes) - y.at(sizes)
    assert (x * y).at(sizes) == x.at(sizes) * y.at(sizes)


def _linear(names):
    out = Polynomial.of(1)
    for k, name in enumerate(names, 2):
        out = out + Polynomial.of(name) * k
    return out


# --------------------------------------------------------------------------- by budget (C6)


def values(of):
    """(kept, new sizes) of a plan's groups, whole ones included."""
    return {name: of.channels(name) for name in SIZES}


@pytest.mark.parametrize("kind", [Params, Bytes, Flops])
@pytest.mark.parametrize(("round_to", "tp"), [(1, 1), (2, 1), (1, 4), (4, 2), (3, 1)])
@given(seed=st.integers(0, 10**6), share=st.floats(0.2, 1.0))
@settings(max_examples=10)
def test_the_budget_holds_and_breaks_with_one_more_unit_anywhere(kind, round_to, tp, seed, share):
    price, scores = PRICES[kind], random_scores(seed)
    unit = math.lcm(round_to, tp)
    limit = max(share * price.at(SIZES), price.at({n: min(2 * unit, s) for n, s in SIZES.items()}))
    made = plan(GRAPH, scores, budget=kind(limit), round_to=round_to, tp=tp)
    assert price.at(made.new_sizes) <= limit
    for name, size in made.new_sizes.items():
        assert size == SIZES[name] or (size % unit == 0 and size > 0)
        if size < SIZES[name]:
            more = made.new_sizes | {name: min(size + unit, SIZES[name])}
            assert price.at(more) > limit
        by_shard = np.bincount(made.channels(name) * tp // SIZES[name], minlength=tp)
        assert len(set(by_shard)) == 1 or size == SIZES[name]


@given(seed=st.integers(0, 10**6), share=st.floats(0.15, 0.95))
@settings(max_examples=30)
def test_equals_the_greedy_search_that_computes_everything_again(seed, share):
    price, scores = PRICES[Params], random_scores(seed)
    limit = share * price.at(SIZES)
    sizes, left = dict(SIZES), {name: sorted(s) for name, s in scores.items()}
    while price.at(sizes) > limit:
        loss = {
            name: left[name][0] / (price.at(sizes) - price.at(sizes | {name: n - 1}))
            for name, n in sizes.items()
            if n > 1
        }
        name = min(loss, key=lambda name: loss[name])
        sizes[name] -= 1
        left[name].pop(0)
    found = plan(GRAPH, scores, budget=Params(limit)).new_sizes
    assert all(found[name] >= n for name, n in sizes.items())  # some came back
    back = {name for name in sizes if found[name] > sizes[name]}
    assert all(price.at(sizes | {name: sizes[name] + 1}) <= limit for name in back)


def test_the_cheapest_channels_go_first():
    """Two groups of one price: the budget of half of both keeps the best half of all channels."""
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"] + jnp.tanh(x @ p["c"]) @ p["d"]
    params = {"a": f32(4, 6), "b": f32(6, 3), "c": f32(4, 6), "d": f32(6, 3)}
    graph = groups(fn, params, f32(2, 4))
    scores = {"a:1": np.arange(6.0) + 0.5, "c:1": np.array([9.0, 9, 9, 9, 0.1, 2.2])}
    made = plan(graph, scores, budget=Params(6 * 7))
    assert made.channels("a:1").tolist() == [4, 5]
    assert made.channels("c:1").tolist() == [0, 1, 2, 3]


def test_what_costs_more_goes_first_at_equal_scores():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"] + jnp.tanh(x[:, :2] @ p["c"]) @ p["d"]
    params = {"a": f32(9, 6), "b": f32(6, 3), "c": f32(2, 6), "d": f32(6, 3)}
    graph = groups(fn, params, f32(2, 9))
    flat = {"a:1": np.ones(6), "c:1": np.ones(6)}
    made = plan(graph, flat, budget=Params(12 * 6))
    assert made.new_sizes == {"a:1": 3, "c:1": 6}
    assert made.kept == {"a:1": (0, 1, 2)}  # of equal channels the earlier one stays


def test_a_budget_above_the_dense_cost_removes_nothing():
    dense = PRICES[Params].at(SIZES)
    assert plan(GRAPH, random_scores(0), budget=Params(dense)).kept == {}
    assert sum(map(len, plan(GRAPH, random_scores(0), budget=Params(dense - 1)).kept.values())) > 0


def test_a_budget_that_cannot_be_met_says_what_can():
    least = PRICES[Params].at(dict.fromkeys(SIZES, 1))
    plan(GRAPH, random_scores(0), budget=Params(least))
    with pytest.raises(ValueError, match=rf"Params\(limit=.* cannot be met.* {least} parameters"):
        plan(GRAPH, random_scores(0), budget=Params(least - 1))


def test_groups_without_scores_stay_whole():
    scores = random_scores(1)
    name = max(scores, key=lambda name: SIZES[name])
    del scores[name]
    made = plan(GRAPH, scores, budget=Params(PRICES[Params].at(SIZES) // 2))
    assert made.new_sizes[name] == SIZES[name]


@pytest.mark.parametrize("layers", [24])
def test_a_search_over_many_layers_takes_what_is_least_worth(layers):
    shapes = {f"{k:02}": {"up": f32(16, 64), "down": f32(64, 16)} for k in range(layers)}

    def fn(p, x):
        for k in p:
            x = x + jax.nn.relu(x @ p[k]["up"]) @ p[k]["down"]
        return x

    graph = groups(fn, shapes, f32(2, 16))
    scores = random_scores(3, graph)
    every = np.sort(np.concatenate(list(scores.values())))
    made = plan(graph, scores, budget=Params(32 * 64 * layers // 2))
    left = np.concatenate([scores[name][made.channels(name)] for name in scores])
    np.testing.assert_array_equal(np.sort(left), every[len(every) // 2 :])


# -------------------------------------------------------------------------- by share (C5)


@given(seed=st.integers(0, 10**6), share=st.floats(0.07, 1.0))
@settings(max_examples=40)
def test_a_fraction_keeps_the_best_of_every_group(seed, share):
    scores = random_scores(seed)
    made = plan(GRAPH, scores, keep=share)
    for name, size in SIZES.items():
        k = kept(size, 1 - share)
        best = np.sort(np.argsort(-scores[name])[:k])
        np.testing.assert_array_equal(made.channels(name), best)


@pytest.mark.parametrize(("round_to", "tp"), [(4, 1), (1, 4), (2, 4), (3, 2), (16, 1)])
@given(seed=st.integers(0, 10**6), share=st.floats(0.07, 1.0))
@settings(max_examples=10)
def test_counts_are_the_nearest_multiples(round_to, tp, seed, share):
    made, unit = plan(GRAPH, random_scores(seed), keep=share, round_to=round_to, tp=tp), 0
    unit = math.lcm(round_to, tp)
    for name, size in SIZES.items():
        k, target = made.new_sizes[name], kept(size, 1 - share)
        ends = {*range(unit, size + 1, unit), size} if size > unit and size % tp == 0 else {size}
        assert k in ends and abs(k - target) == min(abs(e - target) for e in ends)
        channels = made.channels(name)
        assert (np.diff(channels) > 0).all() and channels[0] >= 0 and channels[-1] < size
        if k < size:
            assert set(np.bincount(channels * tp // size, minlength=tp)) == {k // tp}


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20)
def test_each_shard_keeps_its_own_best(seed):
    scores = random_scores(seed)
    made = plan(GRAPH, scores, keep=0.5, tp=2)
    for name, size in SIZES.items():
        if size % 4:
            continue
        for shard in np.arange(size).reshape(2, -1):
            best = shard[np.argsort(-scores[name][shard])[: size // 4]]
            assert set(best) == set(made.channels(name)) & set(shard)


def test_rules_say_how_much_of_which_group():
    names = sorted(SIZES, key=lambda name: SIZES[name])
    rules = {names[-1]: 5, names[-2]: 0.25}
    made = plan(GRAPH, random_scores(0), keep=rules)
    assert made.new_sizes == SIZES | {names[-1]: 5, names[-2]: SIZES[names[-2]] // 4}


def test_permuting_channels_permutes_the_plan():
    scores = random_scores(5)
    order = {name: np.random.default_rng(9).permutation(n) for name, n in SIZES.items()}
    made = plan(GRAPH, scores, budget=Params(200))
    moved = plan(GRAPH, {n: s[order[n]] for n, s in scores.items()}, budget=Params(200))
    for name in SIZES:
        assert set(order[name][moved.channels(name)]) == set(made.channels(name))


@pytest.mark.parametrize("fused", [False, True])
def test_the_language_model_of_the_page_by_halves(fused):
    """E8: half of everything, of the width, of the feed-forward layers."""
    fn, params, ids = language_model(fused=fused)
    graph = groups(fn, params, ids)
    price, scores = Params(1).price(graph), random_scores(0, graph)
    size = lambda **options: price.at(plan(graph, scores, **options).new_sizes)
    assert price.at({g.name: g.size for g in graph.groups}) == 3360
    assert size(keep=0.5) == 672
    assert size(keep={"embed:1": 0.5}) == 1680
    assert size(keep={"layers/*/down:0": 0.5}) == 2640


# --------------------------------------------------------------------------------- bad input


def no(match, scores=None, **options):
    with pytest.raises(ValueError, match=match):
        plan(GRAPH, random_scores(0) if scores is None else scores, **options)


NAME = next(iter(SIZES))
SIZE = SIZES[NAME]


def test_what_to_keep_is_said_once():
    no("either keep=.. or budget=")
    no("either keep=.. or budget=", keep=0.5, budget=Params(10))


@pytest.mark.parametrize("share", [0.0, 0.001, 0])
def test_a_group_never_loses_its_last_channel(share):
    no(f"{NAME} would lose its last channel of {SIZE}.*without", keep={NAME: share})


def test_fractions_and_counts_are_checked():
    no(r"cannot keep 1.5 of its channels; a fraction is in \(0, 1\]", keep=1.5)
    no(r"cannot keep nan of its channels", keep=float("nan"))
    no(r"cannot keep -0.5 of its channels", keep=-0.5)
    no(f"{NAME} cannot keep {SIZE + 1} of {SIZE}", keep={NAME: SIZE + 1})
    no(f"{NAME} cannot keep 3 of {SIZE}: in units of 4", keep={NAME: 3}, round_to=4)
    no("counts are given by rules", keep=1)
    no("a fraction .float. or a count .int.", keep={NAME: True})
    no("a fraction .float. or a count .int.", keep={NAME: "half"})
    no("rule 0, 'nothing', matched none of 4 groups", keep={"nothing": 0.5})
    no("both are 1 .no matter. or more", keep=0.5, tp=0)


@pytest.mark.parametrize("kind", [Params, Flops, Bytes])
@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_budget_is_above_zero(kind, limit):
    with pytest.raises(ValueError, match="allows nothing: a limit is above 0"):
        kind(limit)


def test_scores_are_checked():
    no("scores are given for 'x:0', which is no group", {"x:0": np.ones(3)}, keep=0.5)
    no(rf"scores of {NAME} have shape \(2,\); it has {SIZE}", {NAME: np.ones(2)}, keep=0.5)
    bad = np.ones(SIZE)
    bad[1] = np.nan
    no(f"the score of channel 1 of {NAME} is nan", {NAME: bad}, keep=0.5)
    no("there are no scores", {}, keep=0.5)


def test_groups_that_are_not_exact_need_consent():
    fn = lambda p, x: jax.nn.softmax(x @ p["a"]) @ p["b"]
    graph = groups(fn, {"a": f32(4, 6), "b": f32(6, 3)}, f32(2, 4))
    scores = {"a:1": np.arange(6.0)}
    with pytest.raises(ValueError, match="a:1 .reduce:nonlin.*exact_only=False"):
        plan(graph, scores, keep=0.5)
    with pytest.raises(ValueError, match="no group with scores is exact"):
        plan(graph, scores, budget=Params(30))
    made = plan(graph, scores, keep=0.5, exact_only=False)
    assert made.kept == {"a:1": (3, 4, 5)}


def test_a_rule_for_a_group_without_consent_says_so():
    fn = lambda p, x: jnp.tanh(x @ p["c"]) @ p["d"] + jax.nn.softmax(x @ p["a"]) @ p["b"]
    shapes = {"a": f32(4, 6), "b": f32(6, 3), "c": f32(4, 5), "d": f32(5, 3)}
    graph = groups(fn, shapes, f32(2, 4))
    scores = {"a:1": np.ones(6), "c:1": np.ones(5)}
    with pytest.raises(ValueError, match="a:1 is reduce:nonlin.*exact_only=False"):
        plan(graph, scores, keep={"a:1": 0.5})
    assert plan(graph, scores, keep=0.6).kept == {"c:1": (0, 1, 2)}  # by default it stays whole


# --------------------------------------------------------------------------------- the search


@pytest.mark.parametrize(("size", "unit", "tp"), [*itertools.product([8, 12, 13], [1, 4], [1, 4])])
def test_cuts_end_in_multiples(size, unit, tp):
    unit = math.lcm(unit, tp)
    removal = removal_of(np.arange(float(size)), unit, tp)
    left = [size - end for end in removal.ends]
    assert left[0] == size and all(n % unit == 0 and n > 0 for n in left[1:])
    cut = size % tp == 0 and size > unit
    assert left[-1] == (unit if cut else size)
    assert len(removal.losses) == len(left) - 1


def test_a_group_that_saves_nothing_is_never_cut():
    price = Polynomial.of("a") * 3 + Polynomial.of(1)
    removals = {n: removal_of(np.ones(4), 1, 1) for n in ("a", "b")}
    assert within(7, price, removals) == {"a": 2, "b": 0}
