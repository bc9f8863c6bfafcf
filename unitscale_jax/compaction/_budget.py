"""The cost of a model, as a polynomial in the sizes of its groups.

    w (d, f), v (f, d), bias (f):    2 d f + f parameters

Parameters and bytes follow from the axes of the parameters, operations from those of each traced
equation: a product costs two for every index of its operands taken together, a reduction what it
takes away, everything else its results. So any plan has its price before anything is compiled.
"""

import abc
import functools
import itertools
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import jax

from unitscale_jax import tree as trees
from unitscale_jax.compaction._groups import Axis, Graph
from unitscale_jax.errors import check_number
from unitscale_jax.trace.costs import OpRow, cost
from unitscale_jax.trace.params import above, meetings, stacks_of
from unitscale_jax.trace.program import Place, Site, TracedCall, bodies, producers, sites

Monomial: TypeAlias = tuple[str, ...]
"""A product of sizes of groups, ascending by name; one that occurs twice is squared."""


@dataclass(frozen=True)
class Polynomial:
    """A polynomial in the sizes of groups, with exact coefficients.

    Example:
        >>> d, f = Polynomial.of("d"), Polynomial.of("f")
        >>> (d * f * 2 + f).at({"d": 3, "f": 10})
        70
    """

    terms: Mapping[Monomial, int | Fraction]

    @classmethod
    def of(cls, entry: str | int | Fraction) -> "Polynomial":
        """The size of a group, by name, or a constant."""
        return cls({(entry,): 1} if isinstance(entry, str) else {(): entry})

    def __add__(self, other: "Polynomial") -> "Polynomial":
        """The sum of two polynomials."""
        return added((self, other))

    def __mul__(self, other: "Polynomial | int | Fraction") -> "Polynomial":
        """The product of two polynomials."""
        if not isinstance(other, Polynomial):
            return Polynomial({monomial: c * other for monomial, c in self.terms.items()})
        pairs = itertools.product(self.terms.items(), other.terms.items())
        return added(Polynomial({tuple(sorted(a + b)): c * d}) for (a, c), (b, d) in pairs)

    def __sub__(self, other: "Polynomial") -> "Polynomial":
        """The difference of two polynomials."""
        return self + other * -1

    def at(self, sizes: Mapping[str, int]) -> int | Fraction:
        """Evaluates the polynomial at given sizes of the groups."""
        each = (c * math.prod(sizes[name] for name in m) for m, c in self.terms.items())
        return sum(each, 0)


def added(polynomials: Iterable[Polynomial]) -> Polynomial:
    """Adds up many polynomials."""
    terms: dict[Monomial, int | Fraction] = {}
    for polynomial in polynomials:
        for monomial, c in polynomial.terms.items():
            terms[monomial] = terms.get(monomial, 0) + c
    return Polynomial(terms)


def multiplied(polynomials: Iterable[Polynomial]) -> Polynomial:
    """Multiplies many polynomials."""
    return functools.reduce(operator.mul, polynomials, Polynomial.of(1))


# ------------------------------------------------------------------------------------- budgets


@dataclass(frozen=True)
class Budget(abc.ABC):
    """An upper limit on what a model costs.

    Attributes:
        limit: In units of `noun`; finite and above 0.
    """

    limit: float

    def __post_init__(self) -> None:
        """Checks that the limit is a finite number above 0."""
        check_number(f"{type(self).__name__}.limit", self.limit)
        if not self.limit > 0:
            raise ValueError(f"{self!r} allows nothing: a limit is above 0, a number of {self}.")
        if math.isinf(self.limit):
            raise ValueError(f"{self!r} allows everything: a limit is a finite number of {self}.")

    @abc.abstractmethod
    def price(self, graph: Graph) -> Polynomial:
        """The cost of the function of a graph, by the sizes of its groups."""


@dataclass(frozen=True)
class Params(Budget):
    """At most so many parameters: numbers in all leaves, batch statistics among them."""

    def price(self, graph: Graph) -> Polynomial:
        """Sums the sizes of all parameters."""
        return added(_elements(axes) for axes in graph.axes.values())

    def __str__(self) -> str:
        """The unit of the limit, for messages."""
        return "parameters"


@dataclass(frozen=True)
class Bytes(Budget):
    """At most so many bytes of parameters, in their own dtypes, 4-bit ones packed."""

    def price(self, graph: Graph) -> Polynomial:
        """Sizes of all parameters, by the bytes of an element."""
        params, *_ = graph.traced.arguments
        dtypes = {path: leaf.dtype for path, leaf in trees.named_leaves(params).items()}
        # Eight elements have a whole number of bytes in any dtype, packed ones too.
        eight = {d: trees.nbytes(jax.ShapeDtypeStruct((8,), d)) for d in set(dtypes.values())}
        each = {d: _exact(n, 8) for d, n in eight.items()}
        return added(_elements(axes) * each[dtypes[path]] for path, axes in graph.axes.items())

    def __str__(self) -> str:
        """The unit of the limit, for messages."""
        return "bytes"


@dataclass(frozen=True)
class Flops(Budget):
    """At most so many operations, as `trace.cost` counts them, for inputs of the traced shapes.

    Where the compact function takes another branch of a `cond` for the costliest, or sorts along an
    axis that gets shorter, the estimate is of the dense function's branch and of its logarithm.
    """

    def price(self, graph: Graph) -> Polynomial:
        """The operations of every equation that runs."""
        turns = {site.place: name for site, name in scans_of(graph)}
        runs = [row for row in cost(graph.traced).rows if row.total.flops]
        return added(_operations(graph, turns, row) for row in runs)

    def __str__(self) -> str:
        """The unit of the limit, for messages."""
        return "FLOPs"


def _exact(a: int, b: int) -> int | Fraction:
    """The quotient a / b; an int where it is one, which is faster."""
    return a // b if a % b == 0 else Fraction(a, b)


def _elements(axes: Iterable[Axis]) -> Polynomial:
    """Elements of a value whose axes are sums of products of names and sizes."""

    def length(axis: Axis) -> Polynomial:
        return added(multiplied(map(Polynomial.of, term)) for term in axis)

    return multiplied(map(length, axes))


def scans_of(graph: Graph) -> list[tuple[Site, str]]:
    """Every scan that runs along a group of layers, and which."""
    closed = graph.traced.closed
    layers = {group.factor: group.name for group in graph.groups if "layer" in group.flags}
    around = {up.place: up for site in sites(closed.jaxpr) for up in above(site)}
    scans = [site for site in around.values() if site.name == "scan"]
    held, made = _held_stacks(graph), producers(closed.jaxpr)
    out = []
    for scan in scans:
        names = {held.get(scan.place)}
        for k, maker in enumerate(made[scan.place]):
            if maker is not None and not bodies(maker.eqn) and not maker.is_opaque:
                which = [v is scan.eqn.invars[k] for v in maker.eqn.outvars].index(True)
                axes = graph.dims.at(maker.place)[1][which]
                names |= {layers.get(f) for axis in axes[:1] for term in axis for f in term}
        out += [(scan, name) for name in names.intersection(layers.values()) if name]
    return out


def _held_stacks(graph: Graph) -> dict[Place, str]:
    """The first dimension of the axis of a parameter that a scan runs along."""
    closed = graph.traced.closed
    params, *_ = graph.traced.arguments
    call = TracedCall(closed, list(closed.in_avals), range(len(closed.in_avals)), list)
    return {
        place: str(graph.axes[path][axis][0][0])
        for path, met in meetings(call, params).items()
        for place, axis in stacks_of(met).items()
        if graph.axes[path][axis][0]
    }


def _operations(graph: Graph, turns: Mapping[Place, str], row: OpRow) -> Polynomial:
    """An equation's operations: those of the dense function, in proportion to its indices."""
    indices, dense = Polynomial.of(1), {group.name: group.size for group in graph.groups}
    if not row.site.is_opaque:
        ins, outs = graph.dims.at(row.site.place)
        named = [[graph.named(axes) for axes in values] for values in (ins, outs)]
        indices = _indices(row.site, *named)
    loops = [turns[site.place] for site in above(row.site) if site.place in turns]
    whole = indices * multiplied(map(Polynomial.of, loops))
    return whole * _exact(row.total.flops, int(whole.at(dense)))


def _indices(site: Site, ins: list[tuple[Axis, ...]], outs: list[tuple[Axis, ...]]) -> Polynomial:
    """The number of indices that an equation runs through, to which its work is proportional.

    Of a product those of all three dimensions (m, k, n), of a reduction the elements that vanish,
    of most others those of the result.
    """
    params = site.eqn.params
    if site.name == "dot_general":
        (_, contracted), (_, batch) = params["dimension_numbers"]
        shared = {*contracted, *batch}
        return _elements([*ins[0], *(a for k, a in enumerate(ins[1]) if k not in shared)])
    if site.name == "conv_general_dilated":
        lhs, rhs, _ = params["dimension_numbers"]
        return _elements([ins[0][lhs[0]], ins[1][rhs[0]], ins[1][rhs[1]]])
    if site.name.startswith(("reduce_", "arg")) and "axes" in params:
        return _elements(ins[0]) - _elements(outs[0])
    if site.name.startswith("scatter"):
        return _elements(ins[2])
    return _elements(outs[0])
