"""A plan laid over the equations of a function: which axes of which values lose channels.

Axes of equations are sums of products of factors (`trace`). Here the axes of parameters begin as
the plan has them, one factor for each group, and the walk over the equations carries them
everywhere. In the end a group must still be one dimension, without a mark: otherwise the plan is of
another function.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from unitscale_jax.compaction._groups import CompactionPlan, positions
from unitscale_jax.trace.dimensions import Axes, Coupled, SymbolicDim, expanded
from unitscale_jax.trace.program import Place

AxesPair = tuple[list[Axes], list[Axes]]


class Cuts:
    """The channels that a plan keeps, by factor.

    Attributes:
        record: Axes of the operands and results of equations, by place, as far as `include`d.
        calls: Likewise of calls with a derivative of their own.
        changed: The places of equations of which some axis loses channels, or of one inside.
    """

    def __init__(self, plan: CompactionPlan, *, heed_marks: bool = True) -> None:
        """The channels of `plan`, on axes that have met nothing yet.

        Args:
            plan: What is kept.
            heed_marks: Whether a mark on a dimension bars cutting it. It says that an equation
                tells channels apart, by their number for one, and so could not be evaluated on
                fewer of them; which arrays lie along the dimension it does not touch.
        """
        self._plan, self._heed_marks = plan, heed_marks
        self._groups = {name: SymbolicDim(n) for name, n in plan.sizes.items()}
        self._others: list[SymbolicDim] = []
        self._kept: dict[SymbolicDim, np.ndarray] = {}
        self._broken: dict[str, str] = {}
        self._known: set[SymbolicDim] = set()
        self.record: dict[Place, AxesPair] = {}
        self.calls: dict[Place, AxesPair] = {}
        self.changed: set[Place] = set()

    def axes(self, path: str) -> Axes:
        """The axes of a dense parameter, which may be asked for only once."""
        return tuple(
            tuple(tuple(map(self._factor, term)) for term in axis) for axis in self._plan.axes[path]
        )

    def _factor(self, entry: str | int) -> SymbolicDim:
        if isinstance(entry, str):
            return self._groups[entry]
        self._others.append(SymbolicDim(entry))
        return self._others[-1]

    def include(self, found: Coupled) -> dict[str, str]:
        """Adds equations; returns the groups that are no dimension of theirs, and why."""
        broken = self.settle()
        self.record |= found.record
        self.calls |= found.calls
        for place, (ins, outs) in found.record.items():
            if any(self.loses(axis) for axes in (*ins, *outs) for axis in axes):
                self.changed |= {place[:n] for n in range(1, len(place) + 1, 2)}
        return broken

    def settle(self) -> dict[str, str]:
        """Finds the dimensions that stand for groups by now; returns groups without, and why.

        Unification may have made one dimension of several, or several of one, since the plan was
        laid on. A group is cut only if one dimension stands for it, no mark bars that, and it is
        no dimension that the plan leaves whole. What was cut before may be barred by equations
        added later (a derivative's), so everything is found anew.
        """
        whole = set(itertools.chain.from_iterable(map(_standing, self._others)))
        owners: dict[SymbolicDim, str] = {}
        self._kept, self._broken = {}, {}
        for name, channels in self._plan.kept.items():
            those = _standing(self._groups[name])
            factor = those[0] if len(those) == 1 else None
            marks = sorted(set().union(*(f.marks for f in those)) - {"layer"})
            marks = marks if self._heed_marks else []
            if factor is None or marks:
                self._broken[name] = ", ".join(marks) or "it is taken apart"
            elif factor in whole:
                self._broken[name] = "it is also a dimension that is not cut"
            else:
                self._kept[factor] = np.asarray(channels, int)
                owners[factor] = name
        # Two groups that became one dimension must agree on every channel, whichever is met first:
        # with the kept channels [0, 2] of one and all of the other, positions would not line up.
        for name in self._plan.sizes:
            for factor in _standing(self._groups[name]):
                owner = owners.get(factor, name)
                mine, theirs = self._plan.channels(name), self._plan.channels(owner)
                if not np.array_equal(mine, theirs):
                    self._broken[owners[factor]] = f"it is the same dimension as {name}"
        self._kept = {f: kept for f, kept in self._kept.items() if owners[f] not in self._broken}
        # Dimensions of which the plan knows what is kept: groups that hold, and sizes left whole.
        named = [self._groups[name] for name in self._plan.sizes if name not in self._broken]
        self._known = whole | set(itertools.chain.from_iterable(map(_standing, named)))
        for name in self._broken:
            self._known -= set(_standing(self._groups[name]))
        return self._broken

    def loses(self, axis: Sequence[Sequence[SymbolicDim]]) -> bool:
        """True if an axis has channels that are not kept."""
        return any(f in self._kept for term in expanded(tuple(map(tuple, axis))) for f in term)

    def follows(self, axis: Sequence[Sequence[SymbolicDim]]) -> bool:
        """True if all of an axis is made of dimensions of parameters."""
        return all(f in self._known for term in expanded(tuple(map(tuple, axis))) for f in term)

    def positions(self, axis: Sequence[Sequence[SymbolicDim]]) -> np.ndarray:
        """Positions of the kept channels in a dense axis, ascending."""
        return positions(expanded(tuple(map(tuple, axis))), self._channels)

    def size(self, axis: Sequence[Sequence[SymbolicDim]]) -> int:
        """Number of channels of an axis that are kept."""
        return len(self.positions(axis))

    def shape(self, axes: Axes) -> tuple[int, ...]:
        """The shape of a value after the cuts."""
        return tuple(map(self.size, axes))

    def _channels(self, factor: SymbolicDim) -> tuple[np.ndarray, int]:
        kept = self._kept.get(factor)
        return np.arange(factor.size) if kept is None else kept, factor.size


def _standing(factor: SymbolicDim) -> list[SymbolicDim]:
    """The dimensions of a factor by now: itself, the one it was merged into, or its parts."""
    return [f for term in expanded(((factor,),)) for f in term]
