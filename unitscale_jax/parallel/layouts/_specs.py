"""Partition specs, dimension by dimension: which mesh axes hold each dimension of an array.

    P(None, "tp") beside P("dp") is P("dp", "tp")

A spec here ends with a dimension that is divided, so that equal ones look equal.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from jax.sharding import PartitionSpec as P

Held: TypeAlias = tuple[str, ...]
"""The mesh axes that hold a dimension, the outermost first; none for a dimension that is whole."""

WHOLE = P()
"""The spec of an array that is whole on every device."""


def held(spec: P, rank: int) -> list[Held]:
    """Lists the mesh axes that hold each of `rank` dimensions."""
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec]
    named = [tuple(axis for axis in entry if axis is not None) for entry in entries]
    return named + [()] * (rank - len(named))


def spec_of(axes: Sequence[Held]) -> P:
    """Makes the spec under which mesh axes hold dimensions; the inverse of `held`."""
    entries = [entry[0] if len(entry) == 1 else entry or None for entry in axes]
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def merge_specs(a: P, b: P) -> P:
    """Merges two specs of one array, each over mesh axes of its own.

    Raises:
        ValueError: Both hold the same dimension, or both have the same mesh axis.

    Example:
        >>> from jax.sharding import PartitionSpec as P
        >>> us.parallel.merge_specs(P(None, "tp"), P("dp"))
        P('dp', 'tp')
    """
    rank = max(len(a), len(b))
    pairs = list(zip(held(a, rank), held(b, rank), strict=True))
    both = [dim for dim, (x, y) in enumerate(pairs) if x and y]
    if both:
        raise ValueError(
            f"{a} and {b} both hold dimension {both[0]}. Choose another dimension for one of them; "
            f"`zero_spec(shape, axis, n, taken)` finds a free one."
        )
    merged = spec_of([x or y for x, y in pairs])
    if twice := repeated(merged):
        raise ValueError(f"{a} and {b} both have the mesh axis {twice!r}. It can hold one.")
    return merged


def zero_spec(shape: Sequence[int], mesh_axis: str, n: int, taken: P = WHOLE) -> P:
    """Finds where ZeRO divides an array over the data axis: the first free dimension that fits.

    Args:
        shape: Shape of the array.
        mesh_axis: The mesh axis.
        n: Its size.
        taken: A spec whose dimensions are not free.

    Returns:
        A spec with `mesh_axis` alone, to be merged with `taken`; `P()`, the whole array on every
        device, if no dimension will do.

    Example:
        >>> [us.parallel.zero_spec(shape, "dp", 4) for shape in [(8, 6), (6, 8), (6,), ()]]
        [P('dp',), P(None, 'dp'), P(), P()]
    """
    free = zip(shape, held(taken, len(shape)), strict=True)
    good = [dim for dim, (size, by) in enumerate(free) if not by and size and size % n == 0]
    if not good or mesh_axis in axes_of(taken):
        return WHOLE
    return P(*[None] * good[0], mesh_axis)


def axes_of(spec: P) -> list[str]:
    """Lists all mesh axes of a spec, dimension by dimension."""
    return [axis for entry in held(spec, 0) for axis in entry]


def repeated(spec: P) -> str | None:
    """Finds a mesh axis that a spec has twice, if any."""
    axes = axes_of(spec)
    return next((axis for axis in axes if axes.count(axis) > 1), None)


def without(spec: P, dim: int, rank: int) -> P:
    """Makes the spec of an array that lacks one dimension."""
    return spec_of([by for k, by in enumerate(held(spec, rank)) if k != dim])


def fitted(spec: P, shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    """Leaves out of a spec what does not divide a shape, such as that of an array's scales.

    Scales have a dimension of 1, or of fewer groups, where the array has numbers of a group.
    """
    fitting = []
    for by, size in zip(held(spec, len(shape)), shape, strict=True):
        devices = math.prod(sizes[axis] for axis in by)
        fitting.append(() if size % devices else by)
    return spec_of(fitting)


def local_shape(spec: P, shape: Sequence[int], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Shape of the part of an array that one device holds."""
    pairs = zip(held(spec, len(shape)), shape, strict=True)
    return tuple(size // math.prod(sizes[axis] for axis in by) for by, size in pairs)
