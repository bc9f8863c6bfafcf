"""Meetings of parameters with equations, by their own axes: the one account for all techniques.

A walk forward follows each parameter through moves, calls and loops to the products, lookups, sums
and multiplications it meets. Quantization takes from it which axes share a scale, N:M pruning along
which axis its groups run, calibration what to observe, distillation where a feature is, and unit
scaling how many numbers a product sums up.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from unitscale_jax.errors import check_type
from unitscale_jax.trace.params._meeting import HeldParam, Kind, Meeting, above, read_whole, single
from unitscale_jax.trace.params._product import product_of
from unitscale_jax.trace.params._provenance import input_origins
from unitscale_jax.trace.program._function import TracedCall
from unitscale_jax.trace.program._primitives import (
    ADDITIONS,
    IN_PLACE,
    MULTIPLICATIONS,
    QUOTIENTS,
    cut_axes,
    moved,
    moved_axes,
)
from unitscale_jax.trace.program._walk import Flow, Place, Site, walk


def meetings(staged: TracedCall, params: Any) -> dict[str, list[Meeting]]:
    """Finds the equations that each parameter meets in a call of `(params, ..)`, in order.

    A parameter on both sides of a product meets it twice. Parameters that meet nothing have no
    entry.

    Example:
        >>> from unitscale_jax.trace.program import trace_call
        >>> fn = lambda p, x: x @ p["w"].T + p["b"]
        >>> params = {"w": jnp.ones((3, 4)), "b": jnp.ones(3)}
        >>> met = meetings(trace_call(fn, params, jnp.ones((2, 4))), params)
        >>> [(name, m.kind, sorted(m.contracted)) for name, (m,) in met.items()]
        [('w', 'product', [-1]), ('b', 'sum', [])]
    """
    check_type("the call", staged, TracedCall, "a traced call")
    flow = _Holding()
    sources = input_origins(staged, params)
    known = [_entering(x, o.parameter) for x, o in zip(staged.operands, sources, strict=True)]
    walk(flow, staged.closed.jaxpr, known, staged.closed.consts)
    found: dict[str, list[Meeting]] = {}
    for meeting in flow.found.values():
        last = meeting.site.place not in flow.followed
        found.setdefault(meeting.held.name, []).append(replace(meeting, last=last))
    return found


def observable(found: Sequence[Meeting]) -> list[Meeting]:
    """The products that a parameter meets, but for those inside of a custom derivative."""
    return [meeting for meeting in found if meeting.kind == "product" and not meeting.derived]


def stacks_of(found: Sequence[Meeting]) -> dict[Place, int]:
    """Place of each scan that runs along an axis of a parameter -> that axis."""
    each = [(scan.place, axis) for meeting in found for scan, axis in meeting.stacks]
    return {place: axis for place, axis in each if axis is not None}


# ------------------------------------------------------------------------------------ the walk


NO_PLACES: frozenset[Place] = frozenset()


@dataclass(frozen=True)
class _Known:
    """Knowledge of a value, as far as parameters are concerned.

    Attributes:
        helds: The parameters that it holds.
        rows: The parameters of which it holds rows that a lookup took.
        active: Whether an input that is no parameter reaches it.
        given: Whether a parameter reaches it.
        products: The products with parameters that it is computed from, without another one in
            between.
    """

    helds: tuple[HeldParam, ...] = ()
    rows: tuple[HeldParam, ...] = ()
    active: bool = False
    given: bool = False
    products: frozenset[Place] = NO_PLACES


def _entering(x: Any, name: str | None) -> _Known:
    rank = len(np.shape(x))
    own = tuple(frozenset({k - rank}) for k in range(rank))
    if name is None:
        return _Known(active=True)
    return _Known((HeldParam(name, own),), given=True)


@dataclass
class _Holding(Flow[_Known]):
    """The flow of parameters; `found` collects what they meet, `followed` the inner products."""

    found: dict[tuple[Place, int, str], Meeting] = field(default_factory=dict)
    followed: set[Place] = field(default_factory=set)
    stacks: dict[tuple[Place, str], int | None] = field(default_factory=dict)

    def constant(self, value: Any) -> _Known:
        """Nothing: no parameter is in a constant."""
        del value
        return _Known()

    def join(self, a: _Known, b: _Known) -> _Known:
        """Holds what either value holds, since a parameter meets what follows either way."""
        return _Known(
            tuple(dict.fromkeys((*a.helds, *b.helds))),
            tuple(dict.fromkeys((*a.rows, *b.rows))),
            a.active or b.active,
            a.given or b.given,
            a.products | b.products,
        )

    def unstacked(self, site: Site, x: _Known) -> _Known:
        """One row of a stack; the parameter's own axis that the scan runs along is remembered.

        It is known if the axis has each position of that own axis once and in order, as layers
        (12, 8, 8) have; rows of a flipped, repeated or computed stack are of no known layer.
        """
        for held in x.helds:
            in_order = held.whole and held.axes[0].isdisjoint(held.cut)
            self.stacks[site.place, held.name] = single(held.axes[0]) if in_order else None
        helds, rows = (
            tuple(replace(held, axes=held.axes[1:]) for held in each) for each in (x.helds, x.rows)
        )
        return replace(x, helds=helds, rows=rows)

    def stacked(self, site: Site, y: _Known) -> _Known:
        """Rows that were stacked again are followed no further."""
        del site
        return replace(y, helds=(), rows=())

    def visit(self, site: Site, inputs: list[_Known]) -> list[_Known]:
        """Records what a parameter meets, and follows it through moves and arithmetic."""
        kind, mixed = _kind(site), _mixed(inputs)
        if kind == "product":
            self._meet(site, kind, inputs, [0, 1])
            self._meet_rows(site, inputs)
            return [replace(mixed, products=self._passed(site, inputs))]
        if kind == "lookup":
            self._meet(site, kind, inputs, [0])
            return [replace(mixed, rows=_rows(site, inputs[0]))]
        if kind is not None and mixed.active:  # of parameters alone, it makes one more kernel
            self._meet(site, kind, inputs, range(len(inputs)))
        out = _moved(site, inputs) or _computed(site, inputs, mixed)
        return [self._on_the_way(*each) for each in zip(out, site.results, strict=True)]

    def _on_the_way(self, out: _Known, dtype: Any) -> _Known:
        """Forgets the products that another one followed, and those before a choice of integers.

        Integers have no gradient, so no product is on the way to the loss through them.
        """
        if not out.products:
            return out
        floating = jnp.issubdtype(dtype, jnp.inexact)
        left = out.products - self.followed if floating else NO_PLACES
        return out if left == out.products else replace(out, products=left)

    def _passed(self, site: Site, inputs: Sequence[_Known]) -> frozenset[Place]:
        """The products that a product's result comes from; of two such it is the next one.

        A sum over labels, or one number of all activations (`jnp.vdot(e, e)`), is a way to write a
        loss and no layer.
        """
        left, right = inputs[:2]
        before = (left.products | right.products) - self.followed
        layer = site.result_shapes[0] or left.helds or right.helds
        if left.given and right.given and layer:
            self.followed |= before
            return frozenset({site.place})
        return before | {site.place} if left.given or right.given else NO_PLACES

    def _meet(self, site: Site, kind: Kind, inputs: Sequence[_Known], sides: Sequence[int]) -> None:
        for side in sides:
            for held in inputs[side].helds:
                self._record(site, kind, inputs, side, held)

    def _meet_rows(self, site: Site, inputs: Sequence[_Known]) -> None:
        """Rows of a table are a kernel where they are multiplied with what was computed.

        Beside a parameter, or beside rows of one, they are the activation: the first layer after an
        embedding, or two embeddings that are compared.
        """
        product = product_of(site)
        assert product is not None
        for side, other in enumerate(reversed(inputs[:2])):
            for held in inputs[side].rows:
                if held.own(product.contracted(side)) and not (other.helds or other.rows):
                    self._record(site, "rows", inputs, side, held)

    def _record(
        self, site: Site, kind: Kind, inputs: Sequence[_Known], side: int, held: HeldParam
    ) -> None:
        scans = [parent for parent in above(site) if parent.name == "scan"]
        others = _mixed([x for k, x in enumerate(inputs) if k != side])
        self.found[site.place, side, held.name] = Meeting(
            site,
            side,
            kind,
            held,
            others.active,
            tuple((s, self.stacks.get((s.place, held.name))) for s in reversed(scans)),
            fixed=not inputs[side].active,
            first=not others.given,
        )


def _mixed(values: Sequence[_Known]) -> _Known:
    """Knowledge of a value that is computed from some others: it holds no parameter itself."""
    products = NO_PLACES.union(*[x.products for x in values])
    return _Known((), (), any([x.active for x in values]), any([x.given for x in values]), products)


def _kind(site: Site) -> Kind | None:
    if product_of(site) is not None:
        return "product"
    if site.name in ADDITIONS:
        return "sum"
    if site.name in MULTIPLICATIONS | QUOTIENTS:
        return "multiplication"
    return "lookup" if site.name == "gather" else None


def _moved(site: Site, inputs: Sequence[_Known]) -> list[_Known] | None:
    """Knowledge of the results of a move; None for any other equation.

    Each axis of a result comes from some axes of the operand (`moved_axes`), and with them from the
    parameter's own: w (2, 3, 4) reshaped to (6, 4) holds the own axes ({-3, -2}, {-1}). A cut,
    which leaves positions out or repeats them, is remembered by its axes: along these the operand
    is no longer the parameter, position by position.
    """
    sources = moved(site, inputs)
    if sources is None:
        return None
    if site.name in IN_PLACE:
        return [values[0] for values in sources]
    axes, cut = moved_axes(site), cut_axes(site)

    def laid_out(helds: Iterable[HeldParam]) -> tuple[HeldParam, ...]:
        """Parameters as the result holds them; one that several parts hold alike stands once."""
        return tuple(
            replace(held, axes=tuple(map(held.own, axes)), cut=held.cut | held.own(cut))
            for held in dict.fromkeys(helds)
        )

    out = []
    for values in sources:
        mixed = _mixed(values)
        # A parameter that is joined with activations (a class token before the patches) becomes
        # rows of an activation; joined with parameters it is still a kernel.
        if len(values) == 1 or not mixed.active:
            helds = laid_out(held for x in values for held in x.helds)
            rows = laid_out(held for x in values for held in x.rows)
            mixed = replace(mixed, helds=helds, rows=rows)
        out.append(mixed)
    return out


def _computed(site: Site, inputs: Sequence[_Known], mixed: _Known) -> list[_Known]:
    """Knowledge of the results of arithmetic: a kernel with a mask, or plus a low-rank update.

    An operand of the shape of the result is taken to be computed with element by element, so the
    result holds its parameters, no longer whole. What a gain or a bias is broadcast to meet is an
    activation, and holds neither afterwards.
    """
    holding = any([x.helds or x.rows for x in inputs])
    if not holding or len(site.eqn.outvars) != 1:
        return [mixed] * len(site.eqn.outvars)
    pairs = zip(site.shapes, inputs, strict=True)
    alike = [x for shape, x in pairs if shape == site.result_shapes[0]]
    same = [held for x in alike for held in x.helds]
    kept = [replace(held, whole=False) for held in same if all(held.axes) or not mixed.active]
    # Rows are active by their indices; by anything else they become an activation.
    alone = sum(x.active or x.given for x in inputs) == 1
    rows = [replace(held, whole=False) for x in alike for held in x.rows if alone]
    return [replace(mixed, helds=tuple(dict.fromkeys(kept)), rows=tuple(dict.fromkeys(rows)))]


def _rows(site: Site, table: _Known) -> tuple[HeldParam, ...]:
    """The parameters that a lookup's result holds: the table's own axes in those of a row."""
    numbers, read = site.eqn.params["dimension_numbers"], read_whole(site)
    left_out = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [dim for dim in range(len(site.shapes[0])) if dim not in left_out]
    at = dict(zip(numbers.offset_dims, kept, strict=True))
    rank = len(site.result_shapes[0])

    def taken(held: HeldParam) -> HeldParam:
        own = [held.axes[at[k]] if at.get(k) in read else frozenset() for k in range(rank)]
        cut = held.own([d for d in range(len(held.axes)) if d not in read])
        return replace(held, axes=tuple(own), cut=held.cut | cut)

    return tuple(map(taken, table.helds))
