"""Laws of specs: masks with exactly the counts asked for, for every tree that names its leaves."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import unitscale_jax as us
from unitscale_jax import tree as trees
from unitscale_jax.prune import (
    ERK,
    OWL,
    Balanced,
    Block,
    Channel,
    Cubic,
    Global,
    NofM,
    SparsitySpec,
    Unstructured,
    exact_k,
    make_masks,
)
from unitscale_jax.prune._spec import counts, masks_from, selected, stacked_axes
from unitscale_jax.sparsity import kept

SHAPES = {"bias": (4,), "in": (8, 4), "out": (4, 12), "step": ()}
PATTERNS = [Unstructured(), Block((2, 2)), Channel(), Channel(axis=0)]
floats = st.floats(-4, 4, width=32) | st.sampled_from([np.nan, 0.0, 1.0, -np.inf])


def drawn(data, shapes=SHAPES):
    return {n: data.draw(hnp.arrays(np.float32, s, elements=floats)) for n, s in shapes.items()}


@functools.partial(jax.jit, static_argnums=0)
def jitted(key, scores, found):
    return masks_from(SPECS[key], scores, found)


SPECS = {
    (allocate, i): SparsitySpec(patterns=pattern, allocate=allocate)
    for allocate in (us.prune.uniform, ERK, Global)
    for i, pattern in enumerate(PATTERNS)
    if i in (0, 1) or allocate is us.prune.uniform  # units of different sizes share no total
}


@pytest.mark.parametrize("key", SPECS, ids=lambda key: f"{key[0].__name__}-{PATTERNS[key[1]]}")
@given(data=st.data(), s=st.floats(0, 0.99))
def test_masks_have_exactly_the_units_counted(key, data, s):
    spec, scores = SPECS[key], drawn(data)
    table = {name: k[0] for name, k in counts(spec, scores, [s]).items()}
    masks = jitted(key, scores, table)
    pattern, found = spec.patterns, {}
    for name in ("in", "out"):
        size = scores[name].size // int(np.prod(pattern.units(name, SHAPES[name])))
        found[name], rest = divmod(int(masks[name].sum()), size)
        assert rest == 0
    totals = {"": sum(found.values())} if spec.allocate is Global else found
    assert totals == {name: int(k) for name, k in table.items()}
    for name in ("bias", "step"):
        assert masks[name].shape == () and masks[name].dtype == bool and masks[name]


@given(data=st.data(), s=st.floats(0, 0.99))
def test_global_is_one_ranking(data, s):
    scores = drawn(data, {"a": (3, 4), "b": (2, 5)})
    spec = SparsitySpec(patterns=Unstructured(), allocate=Global)
    masks = make_masks(scores, spec, at=s)
    one = np.concatenate([scores["a"].ravel(), scores["b"].ravel()])
    both = np.concatenate([np.ravel(masks["a"]), np.ravel(masks["b"])])
    np.testing.assert_array_equal(both, exact_k(one, kept(22, s)))


STACKED = {"layers": {"kernel": (3, 2, 4, 6), "bias": (3, 2, 6)}, "head": (6, 4)}


@pytest.mark.parametrize("pattern", [*PATTERNS, NofM(2, 4, axis=0)], ids=str)
@given(data=st.data())
def test_stacked_layers_have_the_masks_they_would_have_alone(pattern, data):
    kernel = data.draw(hnp.arrays(np.float32, (3, 2, 4, 6), elements=floats))
    masks = stacked_masks(pattern, kernel)["layers"]
    for i, j in np.ndindex(3, 2):
        alone = one_mask(pattern, kernel[i, j])["layers"]["kernel"]
        np.testing.assert_array_equal(masks["kernel"][i, j], alone)
    assert masks["bias"].shape == ()


@functools.partial(jax.jit, static_argnums=0)
def stacked_masks(pattern, kernel):
    spec = SparsitySpec(patterns={"**/kernel": pattern}, sparsity=0.6, stacked={"layers/**": 2})
    return make_masks({"layers": {"kernel": kernel, "bias": kernel[:, :, 0]}}, spec)


@functools.partial(jax.jit, static_argnums=0)
def one_mask(pattern, kernel):
    spec = SparsitySpec(patterns={"**/kernel": pattern}, sparsity=0.6)
    return make_masks({"layers": {"kernel": kernel}}, spec)


def test_a_stack_ranked_as_one_array_would_empty_a_layer():
    scores = {"layers": jnp.stack([jnp.full((4, 4), 0.01), jnp.ones((4, 4))])}
    spec = SparsitySpec(patterns=Unstructured(), sparsity=0.5)
    per_layer = lambda spec: make_masks(scores, spec)["layers"].sum((1, 2)).tolist()
    assert per_layer(spec) == [0, 16]
    stacked = SparsitySpec(patterns=Unstructured(), sparsity=0.5, stacked={"layers": 1})
    assert per_layer(stacked) == [8, 8]


def test_stacked_layers_may_have_counts_of_their_own():
    scores = {"layers": jnp.ones((3, 10, 10))}
    allocate = OWL({"layers": [0.0, 0.5, 1.0]})
    spec = SparsitySpec(
        patterns=Unstructured(), sparsity=0.5, allocate=allocate, stacked={"layers": 1}
    )
    assert counts(spec, scores, [0.0, 0.5])["layers"].tolist() == [[100] * 3, [42, 50, 58]]
    assert make_masks(scores, spec)["layers"].sum((1, 2)).tolist() == [42, 50, 58]


@functools.cache
def in_parts(pattern, axis):
    """The mask of a stack of two layers, and those of their parts alone."""
    spec = SparsitySpec(
        patterns=Balanced(pattern, parts=4, axis=axis), sparsity=0.6, stacked={"w": 1}
    )
    total = int(counts(spec, {"w": np.ones((2, 8, 8), np.float32)}, [0.6])["w"][0])

    def alone(part, i):
        share = total // 4 + (i < total % 4)
        return pattern.spread(exact_k(pattern.pooled(part), share), part.shape)

    def layer(w):
        parts = enumerate(jnp.split(w, 4, axis))
        return jnp.concatenate([alone(part, i) for i, part in parts], axis)

    return jax.jit(lambda w: (make_masks({"w": w}, spec)["w"], jnp.stack([layer(x) for x in w])))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("pattern", [Unstructured(), Channel()], ids=str)
@given(data=st.data())
def test_balanced_parts_have_the_masks_they_would_have_alone(pattern, axis, data):
    """Their shares of one count differ by one at most; layers of a stack are cut one by one."""
    got, alone = in_parts(pattern, axis)(
        data.draw(hnp.arrays(np.float32, (2, 8, 8), elements=floats))
    )
    np.testing.assert_array_equal(got, alone)


def test_a_balanced_mask_is_the_same_for_any_number_of_devices():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
    spec = SparsitySpec(patterns=Balanced(parts=4, axis=0), sparsity=0.7)
    make = jax.jit(lambda w: make_masks(w, spec))
    for sizes in (dict(dp=8, tp=1), dict(dp=4, tp=2), dict(dp=2, tp=4)):
        placed = jax.device_put(w, NamedSharding(us.parallel.mesh(**sizes), P("tp")))
        mask = make(placed)
        np.testing.assert_array_equal(mask, make(w))
        each = [int(np.sum(shard.data)) for shard in mask.addressable_shards]
        assert max(each) - min(each) <= 4 // sizes["tp"]


def test_a_pattern_alone_is_for_matrices_of_a_layer():
    spec = SparsitySpec(patterns=Unstructured(), stacked={"layers/**": 2})
    tree = jax.tree.map(jnp.ones, STACKED, is_leaf=lambda x: isinstance(x, tuple))
    tree["ids"] = jnp.ones((4, 4), jnp.int32)
    assert list(selected(spec, tree)) == ["head", "layers/kernel"]
    assert stacked_axes(spec, tree) == {"head": 0, "layers/kernel": 2}
    shapes = jax.eval_shape(lambda: tree)
    assert selected(spec, shapes) == selected(spec, tree)
    assert counts(spec, shapes, [0.5]) == {"head": [12], "layers/kernel": [12]}


def test_the_last_step_of_a_schedule_has_the_target():
    spec = SparsitySpec(patterns=Unstructured(), sparsity=0.9)
    params = {"w": jnp.ones((40, 50))}
    table = counts(spec, params, Cubic(200, 1000, every=300).sparsities(spec.sparsity))
    assert table["w"].tolist() == [2000, 639, 228, 200] and table["w"].dtype == np.int32


def test_rules_allocate():
    scores = {"a": jnp.ones((10, 10)), "b": jnp.ones((10, 10))}
    spec = SparsitySpec(patterns=Unstructured(), allocate={"a": 0.5, "**": 0.9})
    assert jax.tree.map(lambda m: int(m.sum()), make_masks(scores, spec)) == {"a": 50, "b": 10}
    half_way = make_masks(scores, spec, at=0.4)
    assert jax.tree.map(lambda m: int(m.sum()), half_way) == {"a": 75, "b": 55}


def test_n_of_m_has_a_ratio_of_its_own():
    scores = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    for allocate in (us.prune.uniform, ERK, Global):
        patterns = {"a": NofM(1, 4, axis=0), "b": Unstructured()}
        spec = SparsitySpec(patterns=patterns, sparsity=0.25, allocate=allocate)
        for at, b in ((None, 48), (0.0, 64)):
            masks = make_masks(scores, spec, at)
            assert (masks["a"].sum(), masks["b"].sum()) == (16, b)
    only = SparsitySpec(patterns=NofM(1, 4, axis=0), allocate=Global)
    assert counts(only, scores, [0.5]) == {} and make_masks(scores, only)["a"].sum() == 16


@given(data=st.data())
def test_names_and_order_of_what_is_not_pruned_change_nothing(data):
    scores = drawn(data)
    spec = SparsitySpec(patterns={"in": Unstructured(), "out": Unstructured()}, allocate=ERK)
    masks = make_masks(scores, spec)
    renamed = {"a_step": object(), "zz": scores["bias"], "in": scores["in"], "out": scores["out"]}
    again = make_masks(renamed, spec)
    for name in ("in", "out"):
        np.testing.assert_array_equal(masks[name], again[name])


@given(data=st.data())
def test_renaming_permutes_masks_ranked_alone(data):
    scores = drawn(data, {"a": (4, 4), "b": (6, 4)})
    spec = SparsitySpec(patterns=Unstructured(), sparsity=0.3)
    masks = make_masks(scores, spec)
    swapped = make_masks({"a": scores["b"], "b": scores["a"]}, spec)
    for one, other in ("ab", "ba"):
        np.testing.assert_array_equal(masks[one], swapped[other])


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="out")(nn.Dense(3, name="in_")(x))


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.in_ = nnx.Linear(4, 3, rngs=rngs)
        self.out = nnx.Linear(3, 2, rngs=rngs)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_trees_of_every_framework(kind):
    if kind == "linen":
        params = jax.jit(Linen().init)(jax.random.key(0), jnp.ones((1, 4)))["params"]
    else:
        params = nnx.state(NNX(nnx.Rngs(0)), nnx.Param)
    spec = SparsitySpec(patterns={"**/kernel": Unstructured()}, sparsity=0.5)
    masks = make_masks(jax.tree.map(jnp.abs, params), spec)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    pruned = us.prune.apply_masks(params, masks)
    assert jax.tree.structure(pruned) == jax.tree.structure(params)
    zeros = {n: int((x == 0).sum()) for n, x in trees.named_leaves(pruned).items() if "kern" in n}
    assert zeros == {"in_/kernel": 6, "out/kernel": 3}


@pytest.mark.parametrize("allocate", [us.prune.uniform, Global])
def test_sharded_scores_have_the_same_masks_and_only_counts_travel(allocate):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    scores = {n: np.round(rng.normal(size=(16, 8))).astype(np.float32) for n in "ab"}
    layout = {"a": NamedSharding(mesh, P("x", "y")), "b": NamedSharding(mesh, P(None, "y"))}
    spec = SparsitySpec(patterns=Unstructured(), sparsity=0.7, allocate=allocate)
    fn = jax.jit(lambda s: make_masks(s, spec), in_shardings=(layout,), out_shardings=layout)
    masks = fn(jax.device_put(scores, layout))
    assert all(masks[n].sharding.is_equivalent_to(layout[n], 2) for n in masks)
    jax.tree.map(np.testing.assert_array_equal, masks, make_masks(scores, spec))
    text = fn.lower(scores).compile().as_text()
    sent = re.findall(r"= (\S+) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
    assert {(shape.split("{")[0], kind) for shape, kind in sent} == {("s32[]", "all-reduce")}


PARAMS = {"ids": jnp.ones((4, 4), jnp.int32), "mlp": {"kernel": jnp.ones((6, 4)), "b": jnp.ones(4)}}
QUANTIZED = us.quantize({"w": jnp.ones((4, 4))}, {"w": us.DotSpec(w=us.QSpec(axes=(-2,)))})
ANY = SparsitySpec(patterns=Unstructured())


def with_patterns(patterns, **fields):
    return make_masks(PARAMS, SparsitySpec(patterns=patterns, **fields))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        *(
            (lambda s=s: SparsitySpec(patterns=NofM(), sparsity=s), ValueError, "in \\[0, 1\\)")
            for s in (1.0, -0.1, 80, float("nan"))
        ),
        (lambda: with_patterns({"**": "2:4"}), TypeError, "rule '\\*\\*' has the value '2:4'"),
        (lambda: with_patterns([("x",)]), TypeError, "rule 0 is"),
        (lambda: with_patterns(ANY.patterns, stacked={"mlp/*": -1}), ValueError, "number of axes"),
        (lambda: with_patterns(ANY.patterns, allocate={"**": 1.5}), ValueError, "has 1.5"),
        (lambda: with_patterns({"mlp/kernle": NofM()}), ValueError, "closest: 'mlp/kernel'"),
        (
            lambda: with_patterns(ANY.patterns, stacked={"lay/*": 1}),
            ValueError,
            "matched none of 3",
        ),
        (lambda: with_patterns({"**": None}), ValueError, "prunes none of 3 parameters"),
        (lambda: with_patterns({"ids": Unstructured()}), ValueError, "ids is int32; only floating"),
        (
            lambda: with_patterns({"mlp/b": Unstructured()}, stacked={"mlp/b": 1}),
            ValueError,
            "mlp/b has the shape \\(4,\\), of which 1 axes are stacked",
        ),
        (lambda: with_patterns(NofM()), ValueError, "mlp/kernel: NofM.*us.prune.resolve_axes"),
        (
            lambda: with_patterns(NofM(axis=0)),
            ValueError,
            "mlp/kernel along axis 0 has 6, .*1, 2, 3, 6",
        ),
        (
            lambda: with_patterns(Balanced(parts=2, axis=0), allocate=Global),
            ValueError,
            "mlp/kernel is balanced over 2 parts, and `Global` ranks all",
        ),
        (lambda: make_masks(QUANTIZED, ANY), ValueError, "w is quantized.*Mask before quantizing"),
        (lambda: make_masks(PARAMS, ANY, at=1.0), ValueError, "each is a share in"),
        (lambda: masks_from(ANY, PARAMS, {}), ValueError, r"counts are of \[\].*mlp/kernel"),
        (
            lambda: masks_from(ANY, PARAMS, {"mlp/kernel": 1, "w": 1}),
            ValueError,
            "score what the spec prunes",
        ),
        (lambda: masks_from(ANY, PARAMS, {"mlp/kernel": 99}), ValueError, "k is 99, of 24 scores"),
        (
            lambda: masks_from(ANY, PARAMS, {"mlp/kernel": jnp.ones(3, jnp.int32)}),
            ValueError,
            r"a count has the shape \(3,\)",
        ),
    ],
)
def test_errors_say_the_way_out(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_quantized_leaf_that_no_rule_names_stays():
    tree = {"q": QUANTIZED["w"], "w": jnp.ones((4, 4))}
    masks = make_masks(tree, SparsitySpec(patterns={"w": Unstructured()}, sparsity=0.5))
    assert masks["q"].shape == () and masks["w"].sum() == 8
