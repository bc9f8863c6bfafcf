"""Axes of values in names: where groups stand in them, and what is known along one of them.

    qkv kernel, axis 1:    kv . group . dim  +  kv . dim  +  kv . dim

An axis is a sum of products of dimensions; a dimension that is a group goes by its name.
"""

import math
from collections.abc import Callable
from typing import Any

from unitscale_jax.compaction._groups import Axis, Graph
from unitscale_jax.trace.dimensions import Axes


def named_axes(graph: Graph, axes: Axes) -> tuple[Axis, ...]:
    """Axes of a value anywhere in the function, in names of groups and sizes of what is none."""
    names = {group.factor: group.name for group in graph.groups}
    term = lambda factors: tuple(names.get(f, f.size) for f in factors)
    return tuple(tuple(map(term, axis)) for axis in axes)


def places(axis: Axis) -> list[tuple[int, int, str]]:
    """Where groups stand in an axis: term, position, name."""
    return [
        (t, i, entry)
        for t, term in enumerate(axis)
        for i, entry in enumerate(term)
        if isinstance(entry, str)
    ]


def along(x: Any, axis: Axis, term: int, position: int, sizes: Any, reduce: Callable) -> Any:
    """What is known along a dense axis (.., n), reduced to the channels of one of its dimensions.

    Args:
        x: (.., n).
        axis: The axis as a sum of products of names and sizes.
        term: Which term the dimension stands in.
        position: Where in the term.
        sizes: Name -> size.
        reduce: `reduce(x, axis=..)`, over the other dimensions of the term.
    """
    of = lambda entry: entry if isinstance(entry, int) else sizes[entry]
    before = sum(math.prod(map(of, other)) for other in axis[:term])
    shape = [of(entry) for entry in axis[term]]
    piece = x[..., before : before + math.prod(shape)].reshape(*x.shape[:-1], *shape)
    lead = x.ndim - 1
    return reduce(piece, axis=tuple(lead + k for k in range(len(shape)) if k != position))
