"""What a function does to the dimensions of its parameters, as a layout has to know it.

    x + f(norm(x) w1) w2 :    w1 sums over the width of x, w2 comes back to it: a residual stream

Three things are read from the equations besides the groups of `trace.dims`: the products, with the
side of each on which a parameter is; the tables that tokens are looked up in; and the *streams*,
dimensions on which a value is added to something that was computed by summing over it. A stream is
on every kernel of a model, as the input of one and the output of another, so it has to stay whole
for anything else to be divided.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import jax

from unitscale_jax import tree as trees
from unitscale_jax.trace.dimensions import Axes, Dims, SymbolicDim
from unitscale_jax.trace.program import (
    ADDITIONS,
    PRODUCTS,
    Flow,
    Place,
    Site,
    Traced,
    walk,
)

DimSet: TypeAlias = frozenset[SymbolicDim]
DimPlaces: TypeAlias = frozenset[tuple[SymbolicDim, str]]
"""Dimensions, each with where a value has been on it: a parameter or a loop's carry."""

NONE: frozenset[Any] = frozenset()


@dataclass(frozen=True, eq=False)
class Side:
    """One operand of a product, as a layout has to know it.

    Attributes:
        shape: Its shape.
        params: The parameters that reach it.
        free: Its dimensions that the product neither sums over nor finds on both sides.
    """

    shape: tuple[int, ...]
    params: frozenset[str]
    free: DimSet


@dataclass(frozen=True, eq=False)
class LayoutProduct:
    """A product, with the parameters that reach either side.

    Attributes:
        site: The equation.
        sides: Its two operands.
        kernels: The operands made of parameters; none where two activations are multiplied.
        contracted: The dimensions that it sums over.
        shared: The dimensions of both sides and of the result.
        active: Whether an input reaches it.
    """

    site: Site
    sides: tuple[Side, Side]
    kernels: tuple[Side, ...]
    contracted: DimSet
    shared: DimSet
    active: bool


@dataclass(frozen=True, eq=False)
class Lookup:
    """Rows of tables, taken by tokens: by indices that are made from inputs alone.

    Attributes:
        site: The equation.
        tables: The parameters that rows are taken from.
        rows: The dimension that indices count.
        whole: The other dimensions of the tables.
    """

    site: Site
    tables: frozenset[str]
    rows: DimSet
    whole: DimSet


@dataclass(frozen=True, eq=False)
class Meets:
    """Products, lookups by tokens, sums of activations over dimensions, and streams."""

    products: list[LayoutProduct]
    lookups: list[Lookup]
    sums: list[tuple[Site, DimSet]]
    streams: set[SymbolicDim]


def meets(traced: Traced, dims: Dims, open_to: Iterable[SymbolicDim]) -> Meets:
    """Walks over a function of `(params, *inputs)`.

    Args:
        traced: The function.
        dims: Its dimensions.
        open_to: The dimensions of which it matters whether they are streams.
    """
    params, *inputs = traced.arguments
    flow = _Walk(dims, frozenset(open_to))
    start = [Seen(frozenset({name}), fresh=frozenset({name})) for name in trees.names(params)]
    start += [Seen(active=True) for _ in jax.tree.leaves(inputs)]
    walk(flow, traced.closed.jaxpr, start, traced.closed.consts)
    return Meets(flow.products, flow.lookups, flow.sums, flow.streams)


@dataclass(frozen=True)
class Seen:
    """Knowledge of a value: its parameters, and the streams it is on.

    Attributes:
        params: The parameters it is computed from.
        active: Whether an input reaches it.
        rows: Whether inputs reach it only as indices into parameters.
        fresh: Where it has been on all of its dimensions: a parameter, the carry of a loop.
        direct: Where it has been on one dimension, without leaving it.
        through: Where it has been on a dimension, and was summed up over it.
        carried: Whether it is a carry as it is at the start of a turn.
    """

    params: frozenset[str] = NONE
    active: bool = False
    rows: bool = False
    fresh: frozenset[str] = NONE
    direct: DimPlaces = NONE
    through: DimPlaces = NONE
    carried: bool = False

    @property
    def level(self) -> int:
        """How far from parameters: 0 made of nothing else, 1 rows of one, 2 an activation."""
        if not self.active:
            return 0
        return 1 if self.rows else 2


@dataclass
class _Walk(Flow[Seen]):
    dims: Dims
    open_to: DimSet
    products: list[LayoutProduct] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    sums: list[tuple[Site, DimSet]] = field(default_factory=list)
    streams: set[SymbolicDim] = field(default_factory=set)
    reaching: dict[Place, frozenset[str]] = field(default_factory=dict)

    def constant(self, value: Any) -> Seen:
        """A constant has no parameters and is on no stream."""
        del value
        return Seen()

    def join(self, a: Seen, b: Seen) -> Seen:
        """Joins what is known of two values; a carry stays what it was when the turn began.

        If a carry knew what the turn before has done, every dimension inside of a block would have
        been left and come back to, and not the stream alone.
        """
        return a if a.carried else replace(_union([a, b]), fresh=a.fresh | b.fresh)

    def on_inputs(self, site: Site, inputs: list[Seen]) -> None:
        """Remembers which parameters reach a loop."""
        if site.name in ("scan", "while"):
            self.reaching[site.place] = _union(inputs).params

    def restart(self, site: Site, carry: list[Seen]) -> list[Seen]:
        """Makes each carry a place to have been, as a parameter is, even one that starts at 0."""
        params, carries = self.reaching[site.place], []
        for k, x in enumerate(carry):
            fresh = x.fresh | {f"carry {k} of {site.place}"}
            carries.append(Seen(params, active=True, fresh=fresh, direct=x.direct, carried=True))
        return carries

    def visit(self, site: Site, inputs: list[Seen]) -> list[Seen]:
        """Products sum over dimensions, lookups take rows, sums may close a stream."""
        ins, outs = self.dims.at(site.place)
        on = [self._on(x, axes) for x, axes in zip(inputs, ins, strict=True)]
        seen = _union(inputs)
        if site.name in PRODUCTS:
            seen, on = self._product(site, inputs[:2], ins[:2], on[:2])
        elif site.name == "gather":
            seen = self._lookup(site, inputs, ins)
        elif site.name in ADDITIONS | {"select_n"}:
            self._added(inputs[-2:], on[-2:])
        elif site.name.startswith("reduce_") and seen.active:
            self.sums.append((site, factors_of(ins[0]) - factors_of(outs[0])))
        # A result has been where its operands have, on the dimensions that it still has.
        all_on = frozenset().union(*on)
        return [replace(seen, direct=_restricted(all_on, factors_of(axes))) for axes in outs]

    def _on(self, x: Seen, axes: Axes) -> DimPlaces:
        """Where an operand has been on each of its dimensions that may be a stream."""
        here = factors_of(axes) & self.open_to
        return x.direct | {(factor, where) for where in x.fresh for factor in here}

    def _product(
        self, site: Site, inputs: list[Seen], ins: list[Axes], on: list[DimPlaces]
    ) -> tuple[Seen, list[DimPlaces]]:
        """Notes a product: `(what is known of its result, where each side has been and stays)`.

        A product of a parameter and an activation leaves the dimensions that it sums over, on the
        activation's side: coming back to one of them makes it a stream (`_added`). The kernel's
        side was never on them, only made of them.
        """
        contracted, shared, kept = _sides(site, ins)
        levels, active = [x.level for x in inputs], any(x.active for x in inputs)
        left, right = (
            Side(shape, x.params, stay - shared)
            for shape, x, stay in zip(site.shapes[:2], inputs, kept, strict=True)
        )
        # The side nearer to parameters is the kernel. Two activations have no kernel, and in a
        # product of two parameters, as in a factored kernel, both sides are one.
        nearest = [s for s, n in zip((left, right), levels, strict=True) if n == min(levels)]
        kernels = () if active and len(nearest) == 2 else tuple(nearest)
        self.products.append(
            LayoutProduct(site, (left, right), kernels, contracted, shared, active)
        )
        gone = {
            pair
            for x, pairs in zip(inputs, on, strict=True)
            for pair in pairs
            if (x.active or not active) and pair[0] in contracted
        }
        stays = [_restricted(pairs, stay) for pairs, stay in zip(on, kept, strict=True)]
        seen = _union(inputs)
        return replace(seen, rows=False, through=seen.through | gone), stays

    def _lookup(self, site: Site, inputs: list[Seen], ins: list[Axes]) -> Seen:
        """Notes rows taken from a table; they are parameters too, whatever has chosen them."""
        table, indices = inputs
        if table.active:
            return _union(inputs)
        picked = site.eqn.params["dimension_numbers"].collapsed_slice_dims
        rows = frozenset().union(*(factors_of([ins[0][k]]) for k in picked))
        if indices.active and not indices.params and len(picked) == 1:
            whole = factors_of(ins[0]) - rows
            self.lookups.append(Lookup(site, table.params, rows, whole))
        return Seen(table.params, indices.active, rows=indices.active)

    def _added(self, values: list[Seen], on: list[DimPlaces]) -> None:
        """Finds streams: one side was on a dimension and stayed, the other left it and came back.

        In x + f(x) the side x was on its width, at the parameter or carry that made it, and never
        summed over it. The side f(x) has summed over that width, at the same place, and is on it
        again. A dimension that is found is asked about no more.
        """
        (a, b), (on_a, on_b) = values, on
        for x, on_x, y, on_y in ((a, on_a, b, on_b), (b, on_b, a, on_a)):
            stayed_and_left = (on_x - x.through) & (y.through - on_y)
            self.streams |= {f for f, _ in stayed_and_left} & {f for f, _ in on_y}
        self.open_to -= self.streams


def _restricted(places: Iterable[tuple[SymbolicDim, str]], dims: DimSet) -> DimPlaces:
    """Keeps the places on some dimensions."""
    return frozenset(pair for pair in places if pair[0] in dims)


def factors_of(axes: Iterable[tuple[tuple[SymbolicDim, ...], ...]]) -> DimSet:
    """Collects the dimensions of all axes of a value."""
    return frozenset(factor for axis in axes for term in axis for factor in term)


def _union(values: Sequence[Seen]) -> Seen:
    """Joins what is known of the operands of a value, but for where it is fresh."""
    active = [x for x in values if x.active]
    return Seen(
        frozenset().union(*(x.params for x in values)),
        bool(active),
        rows=bool(active) and all(x.rows for x in active),
        direct=frozenset().union(*(x.direct for x in values)),
        through=frozenset().union(*(x.through for x in values)),
    )


def _sides(site: Site, ins: list[Axes]) -> tuple[DimSet, DimSet, list[DimSet]]:
    """Finds the dimensions of a product: `(contracted, shared, those that stay of each side)`.

    In groups of a convolution an input channel is beside output channels of its group alone, so a
    dimension of groups is shared, like the batch dimension of a dot.
    """
    params = site.eqn.params
    if site.name == "ragged_dot_general":
        (left, right), (batch, _) = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        shared = factors_of(ins[0][k] for k in batch)
    elif site.name == "dot_general":
        (left, right), (batch, _) = params["dimension_numbers"]
        shared = factors_of(ins[0][k] for k in batch)
    else:
        numbers = params["dimension_numbers"]
        left, right, outputs = numbers.lhs_spec[1:2], numbers.rhs_spec[1:], numbers.rhs_spec[0]
        in_groups = factors_of([ins[0][left[0]]]) & factors_of([ins[1][outputs]])
        shared = in_groups - factors_of([ins[1][right[0]]])
    kept = [
        factors_of(axis for k, axis in enumerate(axes) if k not in dims) | shared
        for axes, dims in zip(ins, (left, right), strict=True)
    ]
    contracted = factors_of(ins[1][k] for k in right)
    return contracted, shared, kept
