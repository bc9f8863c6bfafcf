"""Pytrees by name: every leaf has a path, "encoder/layer_0/kernel", whoever made the tree.

Linen's dicts, `nnx.State` and plain pytrees give the same names, so rules, reports and errors of
the whole library speak of parameters and never of frameworks.
"""

import abc
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.errors import check_callable, closest
from unitscale_jax.typing import DType

__all__ = [
    "Compound",
    "by_names",
    "astype",
    "combine",
    "is_compound",
    "is_finite",
    "is_floating",
    "map_named",
    "named_leaves",
    "names",
    "nbytes",
    "over_values",
    "owners",
    "partition",
    "select",
    "size",
    "values_of",
]


def __dir__() -> list[str]:
    """What tab completion offers: the public names, and nothing that this file imports."""
    return [*__all__, "__all__", "__doc__", "__name__"]


class Compound(abc.ABC):
    """A node of a tree that stands for one array, such as a quantized one.

    What treats a tree by its arrays (casts, rules, layouts) treats a compound as a whole, and what
    treats it by its leaves (jit, loops, checkpoints) never notices.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the array it stands for."""

    @abc.abstractmethod
    def astype(self, dtype: DType) -> "Compound":
        """The same, standing for an array of another dtype."""

    @property
    def values(self) -> Any:
        """The one of its arrays that is the parameter, which is trained; None of codes."""
        return None

    def with_values(self, values: Any) -> "Compound":
        """The same with another array there, or with what belongs to it, such as a mask."""
        del values
        raise ValueError(f"a {type(self).__name__} holds no array that is the parameter.")

    def take(self, axis: int, at: np.ndarray) -> "Compound":
        """Some positions of an axis, ascending; ValueError if it cannot be cut there."""
        del at
        raise ValueError(f"a {type(self).__name__} cannot be cut along axis {axis}.")

    def put(self, axis: int, at: np.ndarray, size: int) -> "Compound":
        """Positions of an axis back to where they were `take`n from, with zeros elsewhere."""
        del at, size
        raise ValueError(f"a {type(self).__name__} cannot be filled up along axis {axis}.")


def is_compound(node: Any) -> bool:
    """Whether a node of a tree stands for one array."""
    return isinstance(node, Compound)


def values_of(leaf: Any) -> Any:
    """The array that is the parameter: of a leaf itself; of a compound its own, None of codes."""
    return leaf.values if is_compound(leaf) else leaf


def over_values(change: Callable[..., Any], leaf: Any, *others: Any) -> Any:
    """`change` of the arrays that are the parameter, put where that of the first leaf was."""
    check_callable("change", change)
    new = change(*map(values_of, (leaf, *others)))
    return leaf.with_values(new) if is_compound(leaf) else new


def names(tree: Any, *, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """Names of the leaves, in the order of `jax.tree.leaves`; a tree that is a leaf is named "".

    The wrapper that Flax puts around a parameter (an `nnx.Variable`, a boxed Linen parameter) is
    not part of its name.

    Example:
        >>> names({"layers": [{"kernel": 1.0, "bias": 2.0}]})
        ['layers/0/bias', 'layers/0/kernel']
    """
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]]
    siblings = Counter(path[:-1] for path in paths)
    return ["/".join(map(_word, _unboxed(path, siblings))) for path in paths]


def owners(tree: Any) -> list[str]:
    """For each array, in the order of `jax.tree.leaves`, the name of the parameter it belongs to.

    Codes and their scales belong to one parameter, whose name has no words for them.
    """
    leaves = jax.tree.leaves(tree, is_leaf=is_compound)
    named = zip(names(tree, is_leaf=is_compound), leaves, strict=True)
    return [name for name, leaf in named for _ in jax.tree.leaves(leaf)]


def _unboxed(path: tuple, siblings: Counter) -> tuple:
    boxed = path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    return path[:-1] if boxed and siblings[path[:-1]] == 1 else path


def _word(entry: Any) -> str:
    for attribute in (
        "key",
        "idx",
        "name",
    ):  # DictKey and FlattenedIndexKey, SequenceKey, GetAttrKey
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def named_leaves(tree: Any, *, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns the leaves by name.

    Raises:
        ValueError: Two leaves have the same name.

    Example:
        >>> named_leaves({"mlp": {"kernel": 1.0}})
        {'mlp/kernel': 1.0}
    """
    keys = names(tree, is_leaf=is_leaf)
    twice = [name for name, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(
            f"two leaves are named {twice[0]!r}. A name joins the keys of a pytree by '/': "
            "rename one of the keys."
        )
    return dict(zip(keys, jax.tree.leaves(tree, is_leaf=is_leaf), strict=True))


def map_named(
    fn: Callable[..., Any], tree: Any, *rest: Any, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """Maps `fn(name, leaf, *leaves of rest)` over `tree`; the trees of `rest` have its structure.

    Args:
        fn: Maps a name and the leaves that have it to a leaf of the result.
        tree: A pytree.
        *rest: Trees that have a leaf, or a subtree, where `tree` has a leaf.
        is_leaf: Says which nodes count as leaves, such as `is_compound`.

    Example:
        >>> map_named(lambda name, x: f"{name}={x}", {"a": 1, "b": 2})
        {'a': 'a=1', 'b': 'b=2'}
    """
    check_callable("fn", fn)
    structure = jax.tree.structure(tree, is_leaf=is_leaf)
    keys = structure.unflatten(names(tree, is_leaf=is_leaf))
    return jax.tree.map(
        lambda leaf, name, *others: fn(name, leaf, *others), tree, keys, *rest, is_leaf=is_leaf
    )


def by_names(tree: Any, like: Any, what: str = "the tree") -> Any:
    """The leaves of one tree in the structure of another, where their names say.

    Args:
        tree: A pytree; what stands for one array, as a quantized one does, is a leaf.
        like: A pytree with the same names of leaves, whatever holds them: a list or a dict of
            "0", "1", .., an `nnx.State` or a plain dict.
        what: Names the tree in errors.

    Raises:
        ValueError: A name is missing, or there is one more.

    Example:
        >>> by_names({"layers": {"0": 1.0, "1": 2.0}}, {"layers": [0, 0]})
        {'layers': [1.0, 2.0]}
    """
    found, wanted = named_leaves(tree, is_leaf=is_compound), names(like, is_leaf=is_compound)
    for name in wanted:
        if name not in found:
            raise ValueError(f"{what} has no leaf {name!r}{closest(name, found)}.")
    for name in (name for name in found if name not in set(wanted)):
        raise ValueError(f"{what} has a leaf {name!r} that is not expected{closest(name, wanted)}.")
    structure = jax.tree.structure(like, is_leaf=is_compound)
    return jax.tree.unflatten(structure, [found[name] for name in wanted])


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is an array (or a scalar) of floating point numbers."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def wide(dtype: DType) -> np.dtype:
    """The dtype to sum in: at least float32 for floats, at least int32 for what is counted.

    Example:
        >>> [wide(d).name for d in (jnp.bfloat16, jnp.float32, jnp.float64, jnp.bool_)]
        ['float32', 'float32', 'float64', 'int32']
    """
    dtype = np.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.inexact):
        return dtype if jnp.finfo(dtype).bits >= 32 else np.dtype(np.float32)
    narrow = dtype == np.bool_ or jnp.iinfo(dtype).bits < 32
    return np.dtype(np.int32) if narrow else dtype


def astype(tree: Any, dtype: DType) -> Any:
    """Casts the floating leaves; integers, booleans and random keys stay as they are.

    A `Compound` stands for an array of another dtype from then on; its own arrays stay.

    Example:
        >>> astype({"w": jnp.ones(2), "n": jnp.arange(2)}, "bfloat16")["w"].dtype
        dtype(bfloat16)
    """
    return jax.tree.map(functools.partial(_cast_leaf, dtype), tree, is_leaf=is_compound)


def _cast_leaf(dtype: DType, leaf: Any) -> Any:
    if is_compound(leaf):
        return leaf.astype(dtype)
    return jnp.asarray(leaf).astype(dtype) if is_floating(leaf) else leaf


def partition(tree: Any, predicate: Callable[[str, Any], bool]) -> tuple[Any, Any]:
    """Splits a tree in two of the same outline, with `None` where a leaf went to the other one.

    Args:
        tree: A pytree; a `Compound` goes to either as a whole.
        predicate: Maps `(name, leaf)` to whether the leaf goes to the first tree.

    Returns:
        `(selected, rest)`; `combine(selected, rest)` is `tree`.

    Example:
        >>> selected, rest = partition({"w": 1.5, "step": 2}, lambda name, leaf: name == "w")
        >>> selected, rest, combine(selected, rest)
        ({'step': None, 'w': 1.5}, {'step': 2, 'w': None}, {'step': 2, 'w': 1.5})
    """
    check_callable("predicate", predicate)
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_compound)
    named = list(zip(names(tree, is_leaf=is_compound), leaves, strict=True))
    chosen = [predicate(name, leaf) for name, leaf in named]
    selected = [leaf if c else None for c, leaf in zip(chosen, leaves, strict=True)]
    rest = [None if c else leaf for c, leaf in zip(chosen, leaves, strict=True)]
    return structure.unflatten(selected), structure.unflatten(rest)


def combine(*trees: Any) -> Any:
    """Merges trees of one outline: at each place the one leaf that is not `None`.

    Raises:
        ValueError: Two trees have a leaf at one place.

    Example:
        >>> combine({"a": 1, "b": None}, {"a": None, "b": 3})
        {'a': 1, 'b': 3}
    """
    if not trees:
        raise ValueError("there are no trees to combine; give at least one.")

    def only(path: Any, *leaves: Any) -> Any:
        held = [leaf for leaf in leaves if leaf is not None]
        if len(held) > 1:
            raise ValueError(
                f"{len(held)} trees have a leaf {'/'.join(map(_word, path))!r}; expected one, and "
                "None in the others, as `partition` makes them."
            )
        return held[0] if held else None

    is_leaf = lambda leaf: leaf is None or is_compound(leaf)
    return jax.tree_util.tree_map_with_path(only, *trees, is_leaf=is_leaf)


def is_finite(tree: Any) -> jax.Array:
    """Whether every floating number in the tree is finite, as a boolean scalar; an empty tree is.

    Example:
        >>> bool(is_finite({"w": jnp.array([1.0, jnp.inf])}))
        False
    """
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if is_floating(leaf)]
    return functools.reduce(jnp.logical_and, checks, jnp.array(True))


def select(condition: jax.Array, on_true: Any, on_false: Any) -> Any:
    """`on_true` where `condition` holds, else `on_false`; a NaN that is not chosen is gone."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def difference(old: Any, new: Any, *, dtypes: bool = True) -> tuple[str, str, str] | None:
    """Where one tree first differs from another, in leaves, shapes, dtypes or containers.

    Returns:
        `(name, what it is in old, what it is in new)`; None if the trees are alike.

    Example:
        >>> difference({"w": jnp.ones(3)}, {"w": jnp.ones(2)}), difference({"w": 1}, {"w": 2})
        (('w', 'float32(3,)', 'float32(2,)'), None)
    """
    kind = lambda x: f"{jnp.result_type(x) if dtypes else ''}{jnp.shape(x)}"
    kinds = lambda tree: {name: kind(leaf) for name, leaf in named_leaves(tree).items()}
    was, now = kinds(old), kinds(new)
    for name in (*was, *now):
        if was.get(name) != now.get(name):
            return name, was.get(name, "nothing"), now.get(name, "nothing")
    before, after = jax.tree.structure(old), jax.tree.structure(new)
    return None if before == after else ("", str(before), str(after))


def size(tree: Any) -> int:
    """Counts the numbers that the leaves hold."""
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """How many bytes the leaves take, sub-byte types packed.

    Example:
        >>> nbytes({"w": jnp.zeros((3, 4)), "codes": jnp.zeros(6, jnp.int4)})
        51
    """
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(leaf: Any) -> int:
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf).nbytes
    bits = int(np.prod(np.shape(leaf))) * _bits(dtype)
    return -(-bits // 8)


def _bits(dtype: np.dtype) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else 8 * dtype.itemsize
