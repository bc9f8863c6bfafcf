"""Compaction of arrays: the kept channels of a plan, and nothing else.

    compact(mask(params, plan), plan) == compact(params, plan)

Slices of whole channels, along every axis of every member of a group: the smaller arrays are those
of a smaller model. Whatever has the paths of the parameters is sliced alike: an average of
them, batch statistics, gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.compaction._groups import CompactionPlan
from unitscale_jax.errors import check_type
from unitscale_jax.trace.program import is_concrete


def compact(params: Any, plan: CompactionPlan) -> Any:
    """Takes the kept channels out of dense arrays.

    Args:
        params: The parameters that the plan was made for, or a tree of some of their paths.
        plan: What is kept.

    Returns:
        The tree with smaller arrays, of the same dtypes. An array that is placed by a
        `NamedSharding` keeps it where the new shape divides.

    Raises:
        ValueError: A leaf is not in the plan, or does not have its dense shape.

    Example:
        >>> params = {"up": jnp.ones((8, 16)), "down": jnp.ones((16, 4))}
        >>> mlp = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
        >>> graph = us.compaction.groups(mlp, params, jnp.ones((2, 8)))
        >>> plan = us.compaction.plan_of(graph, {"down:0": [0, 3, 5]})
        >>> us.tree.named_leaves(jax.tree.map(jnp.shape, compact(params, plan)))
        {'down/0': 3, 'down/1': 4, 'up/0': 8, 'up/1': 3}
    """
    check_type("plan", plan, CompactionPlan, "what us.compaction.plan or plan_of returns")
    return _over_axes(_taken, params, plan, plan.shapes, "dense")


def expand(params: Any, plan: CompactionPlan) -> Any:
    """Puts compact arrays back to where they were, with zeros in the channels that were removed.

    Law: `compact(expand(small, plan), plan) == small`, and
    `expand(compact(params, plan), plan) == mask(params, plan)`.
    """
    check_type("plan", plan, CompactionPlan, "what us.compaction.plan or plan_of returns")
    return _over_axes(_put, params, plan, plan.new_shapes, "compact")


def zero_channels(params: Any, plan: CompactionPlan) -> Any:
    """Sets the channels that are not kept to zero; shapes stay.

    A NaN in a channel that is not kept is gone.
    """
    check_type("plan", plan, CompactionPlan, "what us.compaction.plan or plan_of returns")
    return expand(compact(params, plan), plan)


def channel_masks(params: Any, plan: CompactionPlan) -> Any:
    """Makes masks of the values that `zero_channels(params, plan)` keeps: bool, of leaves' shapes.

    A leaf that keeps all of its channels has the scalar True, which broadcasts.

    Raises:
        ValueError: A leaf is not in the plan, or does not have its dense shape.
    """
    check_type("plan", plan, CompactionPlan, "what us.compaction.plan or plan_of returns")

    def leaf_mask(path: str, x: Any) -> jax.Array:
        _check(path, np.shape(x), plan, plan.shapes, "dense")
        kept = np.array(True)
        for k, at, n in _cut_axes(path, plan):
            along = np.isin(np.arange(n), at)
            kept = kept & along.reshape([-1 if j == k else 1 for j in range(np.ndim(x))])
        return jnp.asarray(np.broadcast_to(kept, np.shape(x)) if kept.ndim else kept)

    return trees.map_named(leaf_mask, params, is_leaf=trees.is_compound)


Change = Callable[[str, Any, int, np.ndarray, int], Any]


def _over_axes(
    change: Change,
    params: Any,
    plan: CompactionPlan,
    shapes: dict[str, tuple[int, ...]],
    which: str,
) -> Any:
    """Maps `change(path, leaf, axis, positions, dense size)` over the axes that lose channels."""

    def changed(path: str, x: Any) -> Any:
        _check(path, np.shape(x), plan, shapes, which)
        out = x
        for k, at, n in _cut_axes(path, plan):
            out = change(path, out, k, at, n)
        return out if out is x else _placed(out, x)

    return trees.map_named(changed, params, is_leaf=trees.is_compound)


def _cut_axes(path: str, plan: CompactionPlan) -> list[tuple[int, np.ndarray, int]]:
    """`(axis, kept positions, dense size)` of each axis of a parameter that loses channels."""
    found = ((k, plan.positions(path, k), n) for k, n in enumerate(plan.shapes[path]))
    return [(k, at, n) for k, at, n in found if len(at) < n]


def _taken(path: str, x: Any, axis: int, at: np.ndarray, size: int) -> Any:
    del size
    if trees.is_compound(x):
        return _of_compound(path, lambda: x.take(axis, at))
    return jnp.take(x, at, axis=axis, mode="clip", unique_indices=True, indices_are_sorted=True)


def _put(path: str, x: Any, axis: int, at: np.ndarray, size: int) -> Any:
    if trees.is_compound(x):
        return _of_compound(path, lambda: x.put(axis, at, size))
    x = jnp.asarray(x)
    dense = jnp.zeros((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)
    return dense.at[(slice(None),) * axis + (at,)].set(
        x, unique_indices=True, indices_are_sorted=True
    )


def _of_compound(path: str, change: Callable[[], Any]) -> Any:
    try:
        return change()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _placed(new: Any, old: Any) -> Any:
    """A concrete array where the one it was made of lies, if its shape divides."""
    sharding = getattr(old, "sharding", None)
    concrete = isinstance(new, jax.Array) and is_concrete(new)
    if not (concrete and isinstance(sharding, jax.sharding.NamedSharding)):
        return new
    try:
        sharding.shard_shape(new.shape)
    except ValueError:
        return new
    return jax.device_put(new, sharding)


def _check(
    path: str,
    shape: tuple[int, ...],
    plan: CompactionPlan,
    shapes: dict[str, tuple[int, ...]],
    which: str,
) -> None:
    if path not in shapes:
        raise ValueError(
            f"{path} is no parameter of the plan, which knows {', '.join(shapes)}. Find the groups "
            "of a tree that has all collections, or pass the part that the plan is of."
        )
    if tuple(shape) != shapes[path]:
        other = {"dense": plan.new_shapes, "compact": plan.shapes}[which][path]
        hint = "That is what the plan makes of it" if tuple(shape) == other else "Another model's"
        raise ValueError(
            f"{path} has shape {tuple(shape)}, and in the {which} model of the plan it has "
            f"{shapes[path]}. {hint}: pass the tree that the plan was made for."
        )
