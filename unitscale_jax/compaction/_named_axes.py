"""Axes of values in names: where groups stand in them, and what is known along one of them.

    qkv kernel, axis 1:    kv . group . dim  +  kv . dim  +  kv . dim

An axis is a sum of products of dimensions; a dimension that is a group goes by its name.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax import rules as named_rules
from unitscale_jax.compaction._groups import Axis, Graph, size_of
from unitscale_jax.rules import Pattern


def named_groups(graph: Graph, patterns: Sequence[Pattern]) -> list[str]:
    """Names of the groups that patterns name.

    Raises:
        ValueError: A pattern names none.
    """
    found = named_rules.match([(p, True) for p in patterns], graph.by_name, False, noun="group")
    return [name for name, named in found.items() if named]


def places(axis: Axis) -> list[tuple[int, int, str]]:
    """Places of groups in an axis: term, position, name."""
    return [
        (t, i, entry)
        for t, term in enumerate(axis)
        for i, entry in enumerate(term)
        if isinstance(entry, str)
    ]


def along(x: Any, axis: Axis, term: int, position: int, sizes: Any, reduce: Callable) -> Any:
    """Reduces numbers along a dense axis (.., n) to the channels of one of its dimensions.

    Args:
        x: (.., n).
        axis: The axis as a sum of products of names and sizes.
        term: Which term the dimension stands in.
        position: Where in the term.
        sizes: Name -> size.
        reduce: `reduce(x, axis=..)`, over the other dimensions of the term.
    """
    *earlier, shape = [[size_of(entry, sizes) for entry in each] for each in axis[: term + 1]]
    before = sum(map(math.prod, earlier))
    piece = x[..., before : before + math.prod(shape)].reshape(*x.shape[:-1], *shape)
    lead = x.ndim - 1
    return reduce(piece, axis=tuple(lead + k for k in range(len(shape)) if k != position))


def totals(found: Iterable[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Sums by group, over equations, and over the turns of loops, which are leading axes."""
    out: dict[str, Any] = {}
    for values in found:
        for name, each in (values or {}).items():
            new = jax.tree.map(lambda x: jnp.sum(x, axis=tuple(range(x.ndim - 1))), each)
            out[name] = jax.tree.map(jnp.add, out[name], new) if name in out else new
    return out
