"""Named layers <-> stages: the layers of a model as arrays that a pipeline's axis can hold.

    layer_0, ..., layer_(n-1) of (...)  <->  layer_* of (repeats, stages, n / (repeats stages), ...)

Layers go in order of repeats first: chunk `r * stages + s` is the r-th of stage s. It is a
permutation of numbers, no arithmetic, so a checkpoint holds named layers and serves any mesh.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax import rules, tree as trees
from unitscale_jax.errors import expected
from unitscale_jax.parallel.pipeline._stages import Entry, Stages, children_of
from unitscale_jax.rules import Pattern, text_of


def stack(
    tree: Any, pattern: Pattern, stages: int, repeats: int = 1, *, axis: int | None = None
) -> Any:
    """Stacks named layers into the stages of a pipeline.

    Args:
        tree: Parameters: Linen's dicts, an `nnx.State`, or any pytree of dicts, lists and tuples.
            Or what goes with them, such as the state of an optimizer.
        pattern: Matches the name of each layer, "decoder/layer_*"; "**/layer_*" finds them in an
            optimizer's state as well. They go in order of the numbers in their names.
        stages: Number of stages, the size of the pipeline's mesh axis.
        repeats: Chunks of layers that each stage holds, for the circular schedule.
        axis: Where layers are stacked already, by `nn.scan` for instance: the axis that counts
            them. The pattern then matches the stack, "decoder/layers".

    Returns:
        The same tree, a `Stages` in place of each container of layers. The axis of stages is axis 1
        of its leaves, so `{"layer_*/**": {1: "pp"}}` lays them out.

    Raises:
        ValueError: Nothing matches; the layers differ in structure, shape or dtype; their number is
            not a multiple of `stages * repeats`; a list holds something else beside them.

    Law: `unstack(stack(tree, ...))` is `tree`, bit for bit.

    Example:
        >>> params = {"head": jnp.ones(3)} | {f"layer_{i}": jnp.full(2, 1.0 * i) for i in range(8)}
        >>> stacked = us.parallel.stack(params, "layer_*", stages=4, repeats=2)
        >>> jax.tree.map(jnp.shape, stacked)
        Stages('layer_*': (2, 4, 1, 2), others={'head': (3,)})
        >>> stacked.layers[:, 1, 0, 0].tolist()  # stage 1 owns layers 1 and 5
        [1.0, 5.0]
    """
    for noun, number in {"stages": stages, "repeats": repeats}.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(expected(f"`{noun}`", number, "a positive int"))
    seen: list[str] = []
    to_stages = functools.partial(
        _stages, pattern=pattern, stages=stages, repeats=repeats, axis=axis
    )
    stacked = _walk(tree, "", to_stages, seen)
    if not any(isinstance(node, Stages) for node in _nodes(stacked)):
        rules.match([(pattern, True)], seen, noun="layer")  # says which names are closest
        raise ValueError(
            f"{text_of(pattern)!r} matches the tree as a whole, or arrays in a container that is "
            "no dict, list or tuple. Match entries of a dict or a list, such as 'layers/*'."
        )
    return stacked


def unstack(tree: Any) -> Any:
    """Restores named layers: the inverse of `stack`, for all `Stages` anywhere in a tree.

    Args:
        tree: Parameters, gradients, the state of an optimizer: anything stacked.

    Example:
        >>> params = {"a": jnp.ones(2), "layers": [jnp.zeros(3), jnp.ones(3)]}
        >>> stacked = us.parallel.stack(params, "layers/*", stages=2)
        >>> jax.tree.map(jnp.shape, unstack(stacked))
        {'a': (2,), 'layers': [(3,), (3,)]}
    """

    def undo(node: Any) -> Any:
        return node.unstacked() if isinstance(node, Stages) else node

    return jax.tree.map(undo, tree, is_leaf=lambda node: isinstance(node, Stages))


# -------------------------------------------------------------------------------------- the walk

_ToStages = Callable[[Any, list[tuple[Entry, str, Any]]], Any]


def _walk(node: Any, name: str, to_stages: _ToStages, seen: list[str]) -> Any:
    """Replaces each container of layers by its `Stages`, and notes all names that it has seen."""
    children, structure = children_of(node)
    if children is None:
        return node
    named = [(key, "/".join(filter(None, (name, word))), child) for key, word, child in children]
    seen += [full for _, full, _ in named]
    stacked = to_stages(node, named)
    if stacked is not None:
        return stacked
    return structure.unflatten([_walk(child, full, to_stages, seen) for _, full, child in named])


def _nodes(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, Stages))


def _stages(
    node: Any,
    named: list[tuple[Entry, str, Any]],
    pattern: Pattern,
    stages: int,
    repeats: int,
    axis: int | None,
) -> Stages | None:
    """Makes the `Stages` of a container some of whose entries match; None if none does."""
    hit = [entry for entry in named if rules.matches(pattern, entry[1])]
    kind = _kind(node)
    if not hit or kind is None:
        return None
    hit.sort(key=lambda entry: _natural(entry[1]))
    others = {key: child for key, name, child in named if not rules.matches(pattern, name)}
    if isinstance(node, list | tuple) and others and axis is None:
        raise ValueError(
            f"{text_of(pattern)!r} matches {len(hit)} of {len(named)} entries of a list; the "
            "others would move. Match all of them, or keep the layers in a list or a dict of their "
            "own."
        )
    names = [name for _, name, _ in hit]
    if axis is None:
        layers, keys = _stacked(names, [x for *_, x in hit]), tuple(h[0] for h in hit)
        word = text_of(pattern).rpartition("/")[2]
    else:
        (word, name, child), keys = _single(hit, pattern), axis
        layers = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), child)
        names = [name]
    count = _count(layers, names[0])
    if count % (stages * repeats):
        raise ValueError(
            f"{count} layers match {text_of(pattern)!r}, and {stages} stages with {repeats} chunks "
            f"each need a multiple of {stages * repeats}. Choose `stages * repeats` among the "
            f"divisors of {count}, or move layers into `first` or `head` by a narrower pattern."
        )
    chunks = (repeats, stages, count // (stages * repeats))
    cut = jax.tree.map(lambda x: jnp.reshape(x, (*chunks, *x.shape[1:])), layers)
    return Stages(cut, others, word, keys, kind)


def _kind(node: Any) -> Callable | None:
    """Finds the function that makes a container like this one of a dict of its entries."""
    if isinstance(node, Mapping):
        return type(node)
    return {list: _as_list, tuple: _as_tuple}.get(type(node))


def _as_list(entries: Mapping[int, Any]) -> list:
    return [entries[i] for i in sorted(entries)]


def _as_tuple(entries: Mapping[int, Any]) -> tuple:
    return tuple(_as_list(entries))


def _single(hit: list, pattern: Pattern) -> Any:
    """The one entry that matches, a stack of layers already."""
    if len(hit) != 1:
        raise ValueError(
            f"{text_of(pattern)!r} matches {len(hit)} entries of one container, {hit[0][1]!r} and "
            f"{hit[1][1]!r} among them, where `axis` says that one holds all layers."
        )
    return hit[0]


def _stacked(names: list[str], layers: list[Any]) -> Any:
    """Stacks layers of one structure on a new leading axis."""
    outline = jax.tree.structure(layers[0])
    first = trees.named_leaves(layers[0])
    for name, layer in zip(names, layers, strict=True):
        leaves = trees.named_leaves(layer)
        if jax.tree.structure(layer) != outline:
            odd = sorted(set(leaves) ^ set(first)) or ["its structure"]
            raise ValueError(
                f"{name!r} and {names[0]!r} differ in {odd[0]!r}. Layers of one stack have one "
                "structure; stack groups of layers, or move what differs into `first` or `head`."
            )
        for leaf, x in leaves.items():
            want, got = _aval(first[leaf]), _aval(x)
            if want != got:
                raise ValueError(
                    f"'{name}/{leaf}' is {got}, and '{names[0]}/{leaf}' is {want}. Layers of one "
                    "stack have the same shapes and dtypes."
                )
    return jax.tree.map(lambda *xs: jnp.stack(xs), *layers)


def _count(layers: Any, name: str) -> int:
    """Counts layers, the same number in every leaf of a stack."""
    found = {leaf: jnp.shape(x)[:1] for leaf, x in trees.named_leaves(layers).items()}
    if len(set(found.values())) != 1:
        raise ValueError(
            f"{name!r} has leaves with {sorted(found.values())} layers; expected one number. Is "
            "`axis` the one that counts layers in every leaf?"
        )
    return next(iter(found.values()))[0]


def _aval(x: Any) -> str:
    return f"{jnp.result_type(x)}{list(jnp.shape(x))}"


def _natural(name: str) -> list[Any]:
    """A key for sorting names by their numbers: "layer_10" after "layer_9"."""
    pieces = re.split(r"(\d+)", name)
    return [int(piece) if k % 2 else piece for k, piece in enumerate(pieces)]
