"""The walk that finds which axes are the same dimension.

What is known of a value is its axes; what an equation says of them is said once and for all, by
unifying factors, so a loop's body is walked once.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from unitscale_jax.trace.dimensions._axis_rules import RULES, cut_to, opaque, shapes
from unitscale_jax.trace.dimensions._factors import Axes, Axis, expanded, new_axes, new_axis, unify
from unitscale_jax.trace.program._compat import Jaxpr, shape_of
from unitscale_jax.trace.program._walk import Flow, Place, Site, bodies, walk

Record: TypeAlias = Mapping[Place, tuple[list[Axes], list[Axes]]]
"""Axes of the operands and the results of equations, by place."""


@dataclass(frozen=True)
class Coupled:
    """Axes of all values of a function, in terms of factors as they are known in the end.

    Attributes:
        results: Of the results.
        record: For each equation without a body.
        calls: For each call whose derivative is the user's.
        unknown: Primitives without a rule, and how often they occur.
    """

    results: list[Axes]
    record: Record
    calls: Record
    unknown: Mapping[str, int]


def coupled(
    jaxpr: Jaxpr,
    operands: Sequence[Axes],
    consts: Sequence[Any] = (),
    parent: Site | None = None,
    body: int = 0,
) -> Coupled:
    """Unifies the axes of everything in `jaxpr`, whose operands have the axes given."""
    flow = Couplings()
    results = walk(flow, jaxpr, operands, consts, parent, body)

    def both(record: Record) -> Record:
        return {at: (settled(i), settled(o)) for at, (i, o) in record.items()}

    return Coupled(settled(results), both(flow.record), both(flow.calls), dict(flow.unknown))


def settled(values: Iterable[Axes]) -> list[Axes]:
    """Axes in terms of factors as they are known by now; what they cannot express, marked."""
    return [tuple(map(expanded, axes)) for axes in values]


class Couplings(Flow[Axes]):
    """The walk that unifies the axes of a program.

    Attributes:
        record: For each equation without a body, by place: axes of its operands, of its results.
        calls: Likewise for each call with a derivative of its own.
        unknown: How often a primitive without a rule was met.
    """

    def __init__(self) -> None:
        """Starts a walk that has met no equation yet."""
        self.record: dict[Place, tuple[list[Axes], list[Axes]]] = {}
        self.calls: dict[Place, tuple[list[Axes], list[Axes]]] = {}
        self.unknown: Counter[str] = Counter()
        self._stacks: dict[Place, Axis] = {}  # the axis that a scan runs along

    def constant(self, value: Any) -> Axes:
        """An array's values say which position is which."""
        return new_axes(np.shape(value), "constant")

    def join(self, a: Axes, b: Axes) -> Axes:
        """Unifies the axes of two values, since either may be the result."""
        for x, y in zip(a, b, strict=True):
            unify(x, y)
        return a

    def visit(self, site: Site, inputs: list[Axes]) -> list[Axes]:
        """Applies the rule of the primitive; one without a rule pins every axis it meets."""
        rule = RULES.get(site.name, opaque)
        if rule is opaque:
            self.unknown[site.name] += 1
        outs = list(rule(site.eqn, inputs))
        self.record[site.place] = inputs, outs
        return outs

    def on_inputs(self, site: Site, inputs: list[Axes]) -> None:
        """Remembers what a call with a derivative of its own takes."""
        if site.name.startswith("custom_"):
            self.calls[site.place] = inputs, []

    def on_outputs(self, site: Site, outputs: list[Axes]) -> None:
        """Remembers what a call with a derivative of its own returns."""
        if site.place in self.calls:
            self.calls[site.place][1][:] = outputs

    def unstacked(self, site: Site, x: Axes) -> Axes:
        """A row, without the axis that the scan runs along."""
        unify(x[0], self._stack(site))
        return x[1:]

    def stacked(self, site: Site, y: Axes) -> Axes:
        """Rows, along the axis that the scan runs along."""
        return self._stack(site), *y

    def _stack(self, site: Site) -> Axis:
        length = site.eqn.params["length"]
        return self._stacks.setdefault(site.place, new_axis(length, "layer"))

    def enter(self, site: Site, inputs: list[Axes]) -> list[Axes]:
        """The operands' axes; inside of a `shard_map` an axis that it cuts is another one."""
        if site.name != "shard_map":
            return inputs
        return _sharded(inputs, [shape_of(v) for v in bodies(site.eqn)[0][0].invars])

    def exit(self, site: Site, outputs: list[Axes]) -> list[Axes]:
        """The results' axes; outside of a `shard_map` an axis that it cuts is another one."""
        return _sharded(outputs, shapes(site.eqn)) if site.name == "shard_map" else outputs


def _sharded(values: Iterable[Axes], sizes: Iterable[Sequence[int]]) -> list[Axes]:
    return [
        tuple(cut_to(axis, n, "sharded") for axis, n in zip(axes, those, strict=True))
        for axes, those in zip(values, sizes, strict=True)
    ]
