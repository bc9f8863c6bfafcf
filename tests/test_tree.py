"""Laws of named trees: one name per parameter, whoever made the tree."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, strategies as st

from unitscale_jax import tree as trees

NAMES = ["layers_0/bias", "layers_0/kernel", "norm/bias", "norm/scale", "out/bias", "out/kernel"]
words = st.text("abc_01", min_size=1, max_size=3)
plain_trees = st.recursive(
    st.integers(-9, 9) | st.floats(allow_nan=False),
    lambda t: st.dictionaries(words, t, max_size=3) | st.lists(t, max_size=3) | st.tuples(t),
    max_leaves=8,
)


class Linen(nn.Module):
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        init = nn.with_partitioning(init, (None, "model")) if self.boxed else init
        x = nn.LayerNorm(name="norm")(nn.Dense(3, kernel_init=init, name="layers_0")(x))
        return nn.Dense(2, name="out")(x)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.layers_0 = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs)
        self.out = nnx.Linear(3, 2, rngs=rngs)


@functools.cache
def model(kind):
    """The same parameters as each framework hands them out."""
    if kind == "nnx":
        return nnx.state(NNX(nnx.Rngs(0)), nnx.Param)
    init = Linen(boxed=kind == "boxed linen").init
    params = jax.jit(init)(jax.random.key(0), jnp.ones((1, 4)))["params"]
    return jax.tree.map(jnp.asarray, dict(params)) if kind == "plain" else params


models = pytest.mark.parametrize("kind", ["linen", "boxed linen", "nnx", "plain"])


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ------------------------------------------------------------------------------ names


@models
def test_names_are_those_of_the_parameters_and_not_of_the_framework(kind):
    assert trees.names(model(kind)) == NAMES


@models
def test_leaves_are_found_under_their_names(kind):
    leaves = trees.named_leaves(model(kind))
    assert [leaf.shape for leaf in leaves.values()] == [(3,), (4, 3), (3,), (3,), (2,), (3, 2)]
    assert leaves["norm/scale"] is jax.tree.leaves(model(kind))[3]


def slow_names(tree, prefix=()):
    """The obvious oracle: a walk over dicts (in order of keys), lists and tuples."""
    if isinstance(tree, dict):
        return [n for key in sorted(tree) for n in slow_names(tree[key], (*prefix, key))]
    if isinstance(tree, list | tuple):
        return [n for i, child in enumerate(tree) for n in slow_names(child, (*prefix, str(i)))]
    return ["/".join(prefix)]


@given(plain_trees)
def test_a_name_is_the_way_through_the_tree(tree):
    assert trees.names(tree) == slow_names(tree)


def test_a_value_beside_others_keeps_its_name():
    """`value` is left out only where it is all there is, as in the box that Flax puts on a leaf."""

    @functools.partial(
        jax.tree_util.register_dataclass, data_fields=["value", "scale"], meta_fields=[]
    )
    @dataclasses.dataclass
    class Pair:
        value: float
        scale: float

    assert trees.names({"w": Pair(1.0, 2.0)}) == ["w/value", "w/scale"]
    assert trees.names({"value": 1.0}) == ["value"]


def test_is_leaf_stops_the_names():
    assert trees.names({"a": [1, 2], "b": 3}, is_leaf=lambda x: isinstance(x, list)) == ["a", "b"]
    stopped = trees.named_leaves({"a": [1, 2]}, is_leaf=lambda x: isinstance(x, list))
    assert stopped == {"a": [1, 2]}


def test_a_name_for_two_leaves_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match=r"two leaves are named 'a/b'.*rename one"):
        trees.named_leaves({"a/b": 1, "a": {"b": 2}})


@models
def test_map_named_sees_each_name_with_its_leaves(kind):
    params = model(kind)
    seen = trees.map_named(lambda name, *leaves: (name, *leaves), params, params)
    found = jax.tree.leaves(seen, is_leaf=lambda x: isinstance(x, tuple))
    assert [name for name, *_ in found] == NAMES
    assert all(a is b for _, a, b in found)
    assert_equal_trees(trees.map_named(lambda _, leaf: leaf, params), params)


# ------------------------------------------------------------------------------ partition, combine


@models
@given(chosen=st.sets(st.sampled_from(NAMES)))
def test_combine_undoes_partition(kind, chosen):
    params = model(kind)
    selected, rest = trees.partition(params, lambda name, _: name in chosen)
    assert set(trees.names(selected)) == chosen
    assert set(trees.names(rest)) == set(NAMES) - chosen
    assert_equal_trees(trees.combine(selected, rest), params)
    assert_equal_trees(trees.combine(rest, selected), params)


@given(plain_trees, st.data())
def test_combine_undoes_partition_of_any_tree(tree, data):
    sides = iter(data.draw(st.lists(st.booleans(), min_size=9, max_size=9)))
    assigned = {id(leaf): next(sides, True) for leaf in jax.tree.leaves(tree)}
    selected, rest = trees.partition(tree, lambda _, leaf: assigned[id(leaf)])
    assert trees.combine(selected, rest) == tree
    assert len(jax.tree.leaves(selected)) + len(jax.tree.leaves(rest)) == len(jax.tree.leaves(tree))


def test_trees_that_overlap_are_an_error_that_names_the_leaf():
    with pytest.raises(ValueError, match="2 trees have a leaf 'a'; expected one"):
        trees.combine({"a": 1, "b": None}, {"a": 2, "b": 3})
    zeros = {"a": jnp.zeros(2), "b": None}  # a leaf that is false is a leaf
    with pytest.raises(ValueError, match="2 trees have a leaf 'a'"):
        trees.combine(zeros, {"a": jnp.ones(2), "b": None})
    assert_equal_trees(trees.combine(zeros, {"a": None, "b": None}), zeros)
    with pytest.raises(ValueError, match="no trees to combine"):
        trees.combine()


# ------------------------------------------------------------------------------ numbers


MIXED = {
    "w": jnp.ones((2, 3)),
    "half": jnp.ones(4, jnp.bfloat16),
    "count": jnp.arange(3),
    "flag": jnp.array(True),
    "key": jax.random.key(0),
    "scalar": 1.5,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cast_changes_floating_leaves_and_no_others(dtype):
    cast = trees.astype(MIXED, dtype)
    for name in ("w", "half", "scalar"):
        assert cast[name].dtype == dtype
    for name in ("count", "flag", "key"):
        assert cast[name] is MIXED[name]
    again = trees.astype(cast, dtype)
    assert jax.tree.map(lambda x: x.dtype, again) == jax.tree.map(lambda x: x.dtype, cast)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["w", "half"])
def test_one_number_that_is_not_finite_is_seen(name, bad):
    assert trees.is_finite(MIXED)
    poisoned = MIXED | {name: MIXED[name].at[-1].set(bad)}
    assert not jax.jit(trees.is_finite)(poisoned)


def test_an_empty_tree_is_finite():
    assert trees.is_finite({})
    assert trees.is_finite({"count": jnp.arange(3)})


@pytest.mark.parametrize("condition", [True, False])
def test_select_drops_the_nan_that_is_not_chosen(condition):
    good, bad = {"w": jnp.ones(3)}, {"w": jnp.full(3, jnp.nan)}
    pair = (good, bad) if condition else (bad, good)
    chosen = lambda w: jnp.sum(trees.select(jnp.array(condition), *pair)["w"] * w)
    assert jax.value_and_grad(chosen)(2.0) == (6, 3)


SIZES = [("float32", 24), ("bfloat16", 12), ("int8", 6), ("bool", 6), ("complex64", 48)]
SUB_BYTE = [("int4", 3), ("uint4", 3), ("int2", 2), ("float4_e2m1fn", 3)]


@pytest.mark.parametrize(("dtype", "expected"), [*SIZES, *SUB_BYTE, ("float8_e5m2", 6)])
def test_bytes_are_those_of_the_packed_numbers(dtype, expected):
    leaf = jnp.zeros((2, 3), getattr(ml_dtypes, dtype, dtype))
    assert trees.nbytes({"w": leaf}) == expected
    assert trees.nbytes(jax.eval_shape(lambda: {"w": leaf, "v": leaf})) == 2 * expected


@models
def test_size_counts_the_numbers(kind):
    assert trees.size(model(kind)) == 3 + 12 + 3 + 3 + 2 + 6
    assert trees.nbytes(model(kind)) == 4 * trees.size(model(kind))
    assert trees.size(MIXED) == 6 + 4 + 3 + 1 + 1 + 1
    assert trees.nbytes({"key": MIXED["key"]}) == 8
