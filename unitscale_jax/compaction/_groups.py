"""Groups of coupled channels, and plans that say which of them stay.

    w (8, 16), v (16, 4) in (x w) v :    w:1 and v:0 are one group of 16 channels

Channels of a group leave all its members together, or the function is not defined any more; which
these are is read from the function's equations (`trace.dims`). A plan is what is kept of each
group, as numbers and names only: it needs neither the function nor its graph, so it slices
whatever has the same paths, and it can be written to a file. The coupling of channels: Fang et al.
2023, https://arxiv.org/abs/2301.12900.
"""

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_callable, check_type
from unitscale_jax.tables import Tabular
from unitscale_jax.trace.dimensions import Axes, DimGroup, Dims, Member, Refused, SymbolicDim, dims
from unitscale_jax.trace.program import Traced, trace

DimTerm: TypeAlias = tuple[str | int, ...]
"""A product of dimensions: the name of a group, or the size of what is no group."""

Axis: TypeAlias = tuple[DimTerm, ...]
"""A sum of products, one term after the other; an axis of size 1 is one empty product."""


def groups(fn: Callable[..., Any], params: Any, /, *args: Any, **kwargs: Any) -> "Graph":
    """Finds which channels of which parameters go together.

    Args:
        fn: A function of `(params, *args, **kwargs)`; nothing is run.
        params: Its parameters: arrays or abstract ones, all collections that are to be sliced
            together (batch statistics among them) in one tree.
        args: Inputs like those it will get, with sizes above 1, for an axis of size 1 says nothing;
            what is no array is static.
        kwargs: Keywords it will get, likewise.

    Returns:
        The groups, and what cannot be removed and why. It prints as a table.

    Example:
        >>> params = {"up": jnp.ones((8, 16)), "down": jnp.ones((16, 4))}
        >>> mlp = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
        >>> [(group.name, group.size) for group in groups(mlp, params, jnp.ones((2, 8))).groups]
        [('down:0', 16)]
    """
    check_callable("fn", fn)
    traced = trace(fn, params, *args, **kwargs)
    shapes = {path: np.shape(leaf) for path, leaf in trees.named_leaves(params).items()}
    return Graph(dims(traced), traced, shapes)


@dataclass(frozen=True)
class Graph(Tabular):
    """The groups of channels of a function, and what cannot be removed.

    Attributes:
        dims: What is known of its dimensions; `dims.at(place)` has the axes of every equation.
        traced: Its equations.
        shapes: Parameter -> its shape.
    """

    dims: Dims = field(repr=False)
    traced: Traced = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def groups(self) -> tuple[DimGroup, ...]:
        """The groups whose channels can be removed, in the order of the parameters."""
        return self.dims.groups

    @property
    def refused(self) -> tuple[Refused, ...]:
        """Axes that cannot be removed, each with its reason."""
        return self.dims.refused

    @functools.cached_property
    def by_name(self) -> dict[str, DimGroup]:
        """The groups, keyed by name."""
        return {group.name: group for group in self.groups}

    @property
    def rows(self) -> Sequence[Any]:
        """The groups, and then the dimensions that are refused."""
        return self.dims.rows

    def data(self) -> list[dict[str, Any]]:
        """Size, flags or reasons, and members of each dimension."""
        return self.dims.data()

    def cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """One line for each group and for each dimension that is refused."""
        return self.dims.cells()

    def below(self) -> Sequence[str]:
        """Primitives without a rule, and arrays that are closed over."""
        return self.dims.below()

    @functools.cached_property
    def axes(self) -> dict[str, tuple[Axis, ...]]:
        """The axes of each parameter, in names of groups and sizes of what is none."""
        return {path: self.named(self.dims.axes(path)) for path in self.shapes}

    def named(self, axes: Axes) -> tuple[Axis, ...]:
        """Axes of a value anywhere in the function, in names of groups and sizes of other ones."""
        return tuple(
            tuple(tuple(self._names.get(f, f.size) for f in term) for term in axis) for axis in axes
        )

    @functools.cached_property
    def _names(self) -> dict[SymbolicDim, str]:
        return {group.factor: group.name for group in self.groups}


@dataclass(frozen=True)
class CompactionPlan:
    """Which channels of which groups stay; made by `plan_of` and `plan`.

    Attributes:
        kept: Group -> the channels that stay, ascending. Groups that are not here stay whole.
        sizes: Group -> its dense size, of all groups.
        axes: Parameter -> its axes, in names of groups and sizes of what is none.
        flags: Group -> what is known of removing its channels; see `trace.Group`.

    Example:
        >>> params = {"up": jnp.ones((8, 16)), "down": jnp.ones((16, 4))}
        >>> mlp = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
        >>> plan = plan_of(groups(mlp, params, jnp.ones((2, 8))), {"down:0": [0, 3, 5]})
        >>> plan.new_sizes, plan.new_shapes
        ({'down:0': 3}, {'down': (3, 4), 'up': (8, 3)})
    """

    kept: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    axes: Mapping[str, tuple[Axis, ...]] = field(repr=False)
    flags: Mapping[str, frozenset[str]] = field(repr=False)

    def __post_init__(self) -> None:
        """Checks that channels exist, and that axes speak of known groups."""
        for name, channels in self.kept.items():
            _check_channels(name, channels, self.sizes)
        entries = [entry for axes in self.axes.values() for *_, entry in _entries(axes)]
        used = {e for e in entries if isinstance(e, str) and e not in self.sizes}
        if used:
            raise ValueError(
                f"axes of the plan name {', '.join(sorted(used))}, whose sizes it does not have."
            )

    def channels(self, group: str) -> np.ndarray:
        """The kept channels of any group, ascending."""
        return np.asarray(self.kept.get(group, range(self.sizes[group])), int)

    @functools.cached_property
    def new_sizes(self) -> dict[str, int]:
        """The size of every group once the plan is carried out, to rebuild a model with."""
        return {name: len(self.kept.get(name, range(n))) for name, n in self.sizes.items()}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The dense shape of every parameter."""
        return self._shapes(self.sizes)

    @functools.cached_property
    def new_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter once the plan is carried out."""
        return self._shapes(self.new_sizes)

    def _shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:

        def length(axis: Axis) -> int:
            return sum(math.prod(size_of(entry, sizes) for entry in term) for term in axis)

        return {path: tuple(map(length, axes)) for path, axes in self.axes.items()}

    @functools.cached_property
    def members(self) -> dict[str, tuple[Member, ...]]:
        """The places of each group in the axes of parameters."""
        found: dict[str, list[Member]] = {name: [] for name in self.sizes}
        for path, axes in self.axes.items():
            for k, t, i, entry in _entries(axes):
                if isinstance(entry, str):
                    found[entry].append(Member(path, k, t, i))
        return {name: tuple(members) for name, members in found.items()}

    def positions(self, path: str, axis: int) -> np.ndarray:
        """Positions of the kept channels in an axis of a dense parameter, ascending."""
        return positions(self.axes[path][axis], self._channels_of)

    def _channels_of(self, entry: str | int) -> tuple[np.ndarray, int]:
        if isinstance(entry, int):
            return np.arange(entry), entry
        return self.channels(entry), self.sizes[entry]

    def then(self, second: "CompactionPlan") -> "CompactionPlan":
        """The plan that does what this one and then `second`, of the compact model, do.

        Raises:
            ValueError: `second` is of another model.

        Law: `compact(compact(p, first), second) == compact(p, first.then(second))`.
        """
        for path in (*second.shapes, *self.new_shapes):
            shape, mine = second.shapes.get(path), self.new_shapes.get(path)
            if shape != mine:
                raise ValueError(
                    f"{path} has shape {shape} in the second plan, and the first one leaves "
                    f"{mine}. Find groups of the compacted function."
                )
        # Groups of `second` have names of their own, so what it leaves of a group is read from one
        # of the group's members, and then has to hold of all parameters.
        kept = {
            name: tuple(sorted(found))
            for name, members in self.members.items()
            if len(found := self._left(members[0], second)) < self.sizes[name]
        }
        both = CompactionPlan(kept, self.sizes, self.axes, self.flags)
        for path, axes in self.axes.items():
            for k in range(len(axes)):
                at = self.positions(path, k)[second.positions(path, k)]
                if not np.array_equal(at, both.positions(path, k)):
                    raise ValueError(
                        f"axis {k} of {path} loses channels that the groups of the first plan do "
                        "not have as such. Find groups of the dense function that are as fine."
                    )
        return both

    def _left(self, member: Member, second: "CompactionPlan") -> set[int]:
        """The channels of a group that are still in one of its members in the end."""
        axis = self.axes[member.path][member.axis]
        of = channel_at(axis, member.term, member.position, self.sizes)
        at = self.positions(member.path, member.axis)
        return {int(c) for c in of[at[second.positions(member.path, member.axis)]] if c >= 0}


def plan_of(
    graph: Graph,
    kept: Mapping[str, Sequence[int]],
    *,
    exact_only: bool = True,
    empty: Collection[str] = (),
) -> CompactionPlan:
    """Makes a plan that keeps the given channels.

    Args:
        graph: The groups of a function.
        kept: Group -> the channels that stay, in any order; groups not named stay whole.
        exact_only: False consents to groups that are not `exact`: those whose channels are mixed
            when they are not zero, and layers of a scan, which are no zeros to begin with.
        empty: Groups that may lose all their channels, such as a branch's, which then adds nothing
            but its last bias.

    Raises:
        ValueError: A group does not exist, has no such channel, would lose its last one, or is
            not exact.
    """
    check_type("graph", graph, Graph, "what us.compaction.groups returns")
    for name, channels in kept.items():
        _check_group(graph, name, channels, exact_only, name in empty)
    return CompactionPlan(
        {
            name: tuple(sorted(map(int, channels)))
            for name, channels in kept.items()
            if len(channels) < graph.by_name[name].size
        },
        {group.name: group.size for group in graph.groups},
        graph.axes,
        {group.name: group.flags for group in graph.groups},
    )


def positions(
    axis: Sequence[Sequence[Any]], channels: Callable[[Any], tuple[np.ndarray, int]]
) -> np.ndarray:
    """Positions of kept channels in a dense axis: a sum of products of dimensions, row-major.

    Of the axis 2 · 3 whose second dimension keeps [0, 2] they are [0, 2, 3, 5].

    Args:
        axis: Terms of dimensions.
        channels: Maps a dimension to its kept channels and its dense size.
    """
    out, offset = [np.zeros(0, int)], 0
    for term in axis:
        at, size = np.zeros(1, int), 1
        for entry in term:
            kept, n = channels(entry)
            at, size = (at[:, None] * n + kept).reshape(-1), size * n
        out.append(at + offset)
        offset += size
    return np.concatenate(out)


def channel_at(axis: Axis, term: int, position: int, sizes: Mapping[str, int]) -> np.ndarray:
    """For each place of a dense axis the channel of one of its dimensions; -1 in other terms."""
    shapes = [[size_of(entry, sizes) for entry in each] for each in axis]
    pieces = [np.full(math.prod(shape), -1) for shape in shapes]
    pieces[term] = np.indices(shapes[term])[position].reshape(-1)
    return np.concatenate(pieces)


def size_of(entry: str | int, sizes: Mapping[str, int]) -> int:
    """The size of a dimension that is a group, or that is named by its size."""
    return entry if isinstance(entry, int) else sizes[entry]


def _entries(axes: Sequence[Axis]) -> list[tuple[int, int, int, str | int]]:
    return [
        (k, t, i, entry)
        for k, axis in enumerate(axes)
        for t, term in enumerate(axis)
        for i, entry in enumerate(term)
    ]


def _check_channels(name: str, channels: Sequence[int], sizes: Mapping[str, int]) -> None:
    if name not in sizes:
        raise ValueError(
            f"no group is named {name!r}. There are {', '.join(sizes) or 'none'}; the table of "
            "`groups` says what else was refused, and why."
        )
    ascending = all(a < b for a, b in zip(channels, channels[1:], strict=False))
    if not ascending or (channels and not 0 <= channels[0] <= channels[-1] < sizes[name]):
        raise ValueError(
            f"the kept channels of {name} are {list(channels)}; they must be different, ascending "
            f"and among 0 to {sizes[name] - 1}."
        )


def _check_group(
    graph: Graph, name: str, channels: Sequence[int], exact_only: bool, may_be_empty: bool
) -> None:
    sizes = {group.name: group.size for group in graph.groups}
    if name not in sizes and (why := graph.dims.why_refused(name)):
        raise ValueError(
            f"no group is named {name!r}. There are {', '.join(sizes) or 'none'}. {why}"
        )
    _check_channels(name, sorted(channels), sizes)
    group = graph.by_name[name]
    if not len(channels) and not may_be_empty:
        raise ValueError(
            f"{name} would lose its last channel of {group.size}. Keep one, or say "
            f"empty=({name!r},) where what it computes may be zero."
        )
    if exact_only and "exact" not in group.flags and len(channels) < group.size:
        why = f"mixed by {', '.join(group.mixed)}" if group.mixed else "a scan runs along it"
        raise ValueError(
            f"{name} is {', '.join(sorted(group.flags))} ({why}): without its channels the "
            "function is not the one with zeros in them. Leave it whole, or consent with "
            "exact_only=False."
        )
