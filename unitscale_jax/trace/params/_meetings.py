"""What a parameter meets, and which of its own axes: the one account that every technique asks.

A walk forward follows each parameter through moves, calls and loops to the products, lookups, sums
and multiplications it meets. Quantization takes from it which axes share a scale, N:M pruning along
which axis its groups run, calibration what to observe, distillation where a feature is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from unitscale_jax.errors import check_type
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

Own: TypeAlias = frozenset[int]
"""Some of a parameter's own axes, counted from the end."""

Kind: TypeAlias = Literal["product", "lookup", "sum", "multiplication"]


@dataclass(frozen=True)
class HeldParam:
    """A parameter as an operand holds it.

    Attributes:
        name: Which parameter.
        axes: For each axis of the operand the parameter's own axes in it, counted from the end.
        whole: Whether it was only moved; else it was computed with, element by element.
        cut: Its own axes along which the operand has not each position once, in their order.
    """

    name: str
    axes: tuple[Own, ...]
    whole: bool = True
    cut: Own = frozenset()

    def own(self, dims: Sequence[int]) -> Own:
        """The parameter's own axes in some dimensions of the operand."""
        return frozenset().union(*(self.axes[d] for d in dims))


@dataclass(frozen=True, eq=False)
class Meeting:
    """An equation that a parameter meets, on one side of it.

    Attributes:
        site: Where.
        side: Which operand the parameter is.
        kind: What happens to it: "product" and "lookup"; "sum" and "multiplication" of a bias or a
            gain with something that is no parameter.
        held: As what it is there.
        active: Whether an input reaches the other operands, which else are parameters, too.
        stacks: For each scan around, the outer first, the scan and the parameter's axis that it
            runs along, or None.
    """

    site: Site
    side: int
    kind: Kind
    held: HeldParam
    active: bool = True
    stacks: tuple[tuple[Site, int | None], ...] = ()

    @property
    def contracted(self) -> Own:
        """The parameter's own axes that are summed over; of a table those a lookup reads whole."""
        return self.held.own(_contracted(self))

    @property
    def channels(self) -> Own:
        """The input channels among `contracted`: all but the window of a convolution."""
        product = product_of(self.site) if self.kind == "product" else None
        return self.contracted if product is None else self.held.own(product.channels(self.side))

    @property
    def whole(self) -> bool:
        """Whether the parameter was only moved on its way there."""
        return self.held.whole

    @property
    def clear(self) -> bool:
        """Whether no axis is in part summed over, in part not."""
        summed = _contracted(self)
        kept = [d for d in range(len(self.held.axes)) if d not in summed]
        return self.contracted.isdisjoint(self.held.own(kept))

    @property
    def derived(self) -> bool:
        """Whether it is inside of a function with a custom derivative, which is one of arrays."""
        return any(site.name.startswith("custom_") for site in above(self.site))


def meetings(staged: TracedCall, params: Any) -> dict[str, list[Meeting]]:
    """What each parameter meets in a call of `(params, ..)`, in order of evaluation.

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
        found.setdefault(meeting.held.name, []).append(meeting)
    return found


def observable(found: Sequence[Meeting]) -> list[Meeting]:
    """The products that a parameter meets, but for those inside of a custom derivative."""
    return [meeting for meeting in found if meeting.kind == "product" and not meeting.derived]


def stacks_of(found: Sequence[Meeting]) -> dict[Place, int]:
    """Place of each scan that runs along an axis of a parameter -> that axis."""
    each = [(scan.place, axis) for meeting in found for scan, axis in meeting.stacks]
    return {place: axis for place, axis in each if axis is not None}


def above(site: Site) -> Iterator[Site]:
    """The equations whose bodies a site is inside of, the innermost first."""
    while site.parent is not None:
        site = site.parent
        yield site


# ------------------------------------------------------------------------------------ the walk


@dataclass(frozen=True)
class _Known:
    """The parameters that a value holds, and whether an input that is none reaches it."""

    helds: tuple[HeldParam, ...] = ()
    active: bool = False


def _entering(x: Any, name: str | None) -> _Known:
    rank = len(np.shape(x))
    own = tuple(frozenset({k - rank}) for k in range(rank))
    return _Known(active=True) if name is None else _Known((HeldParam(name, own),))


@dataclass
class _Holding(Flow[_Known]):
    """The flow of parameters; `found` collects what they meet."""

    found: dict[tuple[Place, int, str], Meeting] = field(default_factory=dict)
    stacks: dict[tuple[Place, str], int | None] = field(default_factory=dict)

    def constant(self, value: Any) -> _Known:
        """A constant holds no parameter."""
        del value
        return _Known()

    def join(self, a: _Known, b: _Known) -> _Known:
        """Keeps what both values hold."""
        return _Known(tuple(dict.fromkeys((*a.helds, *b.helds))), a.active or b.active)

    def unstacked(self, site: Site, x: _Known) -> _Known:
        """One row of a stack, whose axis is remembered."""
        for held in x.helds:
            in_order = held.whole and held.axes[0].isdisjoint(held.cut)
            self.stacks[site.place, held.name] = single(held.axes[0]) if in_order else None
        return replace(x, helds=tuple(replace(held, axes=held.axes[1:]) for held in x.helds))

    def stacked(self, site: Site, y: _Known) -> _Known:
        """Rows that were stacked again are followed no further."""
        del site
        return replace(y, helds=())

    def visit(self, site: Site, inputs: list[_Known]) -> list[_Known]:
        """Records what a parameter meets, and follows it through moves and arithmetic."""
        kind = _kind(site)
        active = any(x.active for x in inputs)
        if kind in ("product", "lookup"):
            self._meet(site, kind, inputs, [0, 1] if kind == "product" else [0])
            return [_Known(active=active)]
        if kind is not None and active:  # of parameters alone, it is one more way to make a kernel
            self._meet(site, kind, inputs, range(len(inputs)))
        return _moved(site, inputs) or _computed(site, inputs, active)

    def _meet(self, site: Site, kind: Kind, inputs: Sequence[_Known], sides: Sequence[int]) -> None:
        scans = [parent for parent in above(site) if parent.name == "scan"]
        for side in sides:
            active = any(x.active for k, x in enumerate(inputs) if k != side)
            for held in inputs[side].helds:
                axes = [(s, self.stacks.get((s.place, held.name))) for s in reversed(scans)]
                meeting = Meeting(site, side, kind, held, active, tuple(axes))
                self.found[site.place, side, held.name] = meeting


def _kind(site: Site) -> Kind | None:
    if product_of(site) is not None:
        return "product"
    if site.name in ADDITIONS:
        return "sum"
    if site.name in MULTIPLICATIONS | QUOTIENTS:
        return "multiplication"
    return "lookup" if site.name == "gather" else None


def _moved(site: Site, inputs: Sequence[_Known]) -> list[_Known] | None:
    """What the results of a move hold; None for any other equation.

    Each axis of a result comes from some axes of the operand (`moved_axes`), and with them from the
    parameter's own. A cut, which leaves positions out or repeats them, is remembered by its axes:
    along these the operand is no longer the parameter, position by position.
    """
    sources = moved(site, inputs)
    if sources is None:
        return None
    if site.name in IN_PLACE:
        return [values[0] for values in sources]
    axes, cut = moved_axes(site), cut_axes(site)
    laid_out = lambda held: replace(
        held, axes=tuple(map(held.own, axes)), cut=held.cut | held.own(cut)
    )
    out = []
    for values in sources:
        active = any(x.active for x in values)
        # A parameter that is joined with activations (a class token before the patches) becomes
        # rows of an activation; joined with parameters it is still a kernel.
        beside = len(values) > 1 and active
        helds = dict.fromkeys(held for x in values for held in x.helds)
        out.append(_Known(() if beside else tuple(map(laid_out, helds)), active))
    return out


def _computed(site: Site, inputs: Sequence[_Known], active: bool) -> list[_Known]:
    """Element by element, as far as shapes tell: a kernel with a mask or a low-rank update.

    What a gain or a bias is broadcast to meet is an activation, and holds neither afterwards.
    """
    if len(site.eqn.outvars) != 1:
        return [_Known(active=active)] * len(site.eqn.outvars)
    pairs = zip(site.shapes, inputs, strict=True)
    same = [held for own, x in pairs for held in x.helds if own == site.result_shapes[0]]
    kept = [replace(held, whole=False) for held in same if all(held.axes) or not active]
    return [_Known(tuple(dict.fromkeys(kept)), active)]


def _contracted(meeting: Meeting) -> Sequence[int]:
    """Dimensions of the operand that a meeting sums over; of a table those it reads whole."""
    site = meeting.site
    if meeting.kind == "product":
        product = product_of(site)
        assert product is not None
        return product.contracted(meeting.side)
    if meeting.kind != "lookup":
        return ()
    sizes, shape = site.eqn.params["slice_sizes"], site.shapes[0]
    indexed = site.eqn.params["dimension_numbers"].start_index_map
    pairs = enumerate(zip(sizes, shape, strict=True))
    return [dim for dim, (size, full) in pairs if size == full and dim not in indexed]


def single(axes: Own) -> int | None:
    """The only member of a set of axes; None if there are several."""
    return next(iter(axes)) if len(axes) == 1 else None
