"""What a parameter meets, and which of its own axes: the one account that every technique asks.

A walk forward follows each parameter through moves, calls and loops to the products, lookups, sums
and multiplications it meets. Quantization takes from it which axes share a scale, N:M pruning along
which axis its groups run, calibration what to observe, distillation where a feature is.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.trace._function import Staged
from unitscale_jax.trace._primitives import (
    IN_PLACE,
    MULTIPLICATIONS,
    QUOTIENTS,
    SUMS,
    cut_axes,
    moved,
    moved_axes,
)
from unitscale_jax.trace._product import Conv, Dot, Product, product_of
from unitscale_jax.trace._provenance import origins
from unitscale_jax.trace._walk import Flow, Place, Site, walk

Own: TypeAlias = frozenset[int]
"""Some of a parameter's own axes, counted from the end."""

Axes: TypeAlias = tuple[int, ...]
Kind: TypeAlias = Literal["product", "lookup", "sum", "multiplication"]


@dataclass(frozen=True)
class Held:
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
    held: Held
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


def meetings(staged: Staged, params: Any) -> dict[str, list[Meeting]]:
    """What each parameter meets in a call of `(params, ..)`, in order of evaluation.

    A parameter on both sides of a product meets it twice. Parameters that meet nothing have no
    entry.

    Example:
        >>> from unitscale_jax.trace import stage
        >>> fn = lambda p, x: x @ p["w"].T + p["b"]
        >>> params = {"w": jnp.ones((3, 4)), "b": jnp.ones(3)}
        >>> met = meetings(stage(fn, params, jnp.ones((2, 4))), params)
        >>> [(name, m.kind, sorted(m.contracted)) for name, (m,) in met.items()]
        [('w', 'product', [-1]), ('b', 'sum', [])]
    """
    flow = _Holding()
    sources = origins(staged, params)
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

    helds: tuple[Held, ...] = ()
    active: bool = False


def _entering(x: Any, name: str | None) -> _Known:
    rank = len(np.shape(x))
    own = tuple(frozenset({k - rank}) for k in range(rank))
    return _Known(active=True) if name is None else _Known((Held(name, own),))


@dataclass
class _Holding(Flow[_Known]):
    """The flow of parameters; `found` collects what they meet."""

    found: dict[tuple[Place, int, str], Meeting] = field(default_factory=dict)
    stacks: dict[tuple[Place, str], int | None] = field(default_factory=dict)

    def constant(self, value: Any) -> _Known:
        """A constant holds none."""
        del value
        return _Known()

    def join(self, a: _Known, b: _Known) -> _Known:
        """Either of two values."""
        return _Known(tuple(dict.fromkeys((*a.helds, *b.helds))), a.active or b.active)

    def unstacked(self, site: Site, x: _Known) -> _Known:
        """One row of a stack, whose axis is remembered."""
        for held in x.helds:
            in_order = held.whole and held.axes[0].isdisjoint(held.cut)
            self.stacks[site.place, held.name] = _single(held.axes[0]) if in_order else None
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
    if site.name in SUMS:
        return "sum"
    if site.name in MULTIPLICATIONS | QUOTIENTS:
        return "multiplication"
    return "lookup" if site.name == "gather" else None


def _moved(site: Site, inputs: Sequence[_Known]) -> list[_Known] | None:
    """What the results of a move hold; None for any other equation."""
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
        beside = len(values) > 1 and active  # a class token among activations is no kernel
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


def _single(axes: Own) -> int | None:
    return next(iter(axes)) if len(axes) == 1 else None


# ------------------------------------------------------------------------------------- layouts


@dataclass(frozen=True)
class Layout:
    """Which axes of a parameter the statistics of what it meets are about, counted from the end.

    Attributes:
        batch: One statistic for each index: stacked layers first, then batch axes of the product.
        contracted: K, flattened in the order of the parameter's axes.
        channels: The input channels among them: all but the window of a convolution.
        layers: How many of `batch` are stacked layers; those a range has, too.
        clear: Whether `contracted` is known element by element, so that channels have statistics.
    """

    batch: Axes = ()
    contracted: Axes = ()
    channels: Axes = ()
    layers: int = 0
    clear: bool = False


def layout_of(name: str, shape: Sequence[int], met: Sequence[Meeting]) -> Layout:
    """What all products of a parameter agree on; at least the layers that all of them run along."""
    each = [_layout_at(name, shape, meeting) for meeting in met]
    layers = min(layout.layers for layout in each)
    cut = [
        replace(it, batch=it.batch[:layers] + it.batch[it.layers :], layers=layers) for it in each
    ]
    same = all(it == cut[0] for it in cut)
    return cut[0] if same else Layout(batch=cut[0].batch[:layers], layers=layers)


def _layout_at(name: str, shape: Sequence[int], meeting: Meeting) -> Layout:
    product, held, rank = product_of(meeting.site), meeting.held, len(shape)
    assert product is not None, name
    layers = 0
    for scan, axis in meeting.stacks:
        length = scan.eqn.params["length"]
        if axis is not None and axis + rank == layers and shape[axis] == length:
            layers += 1
        else:
            break
    stacked = tuple(k - rank for k in range(layers))
    unclear = Layout(stacked, layers=layers)
    pairs = contraction(product, meeting)
    if pairs is None or not held.whole:
        return unclear
    contracted = sorted({axis for axis, _ in pairs if axis is not None})
    batch = sorted({axis for axis, _ in batch_pairs(product, meeting) if axis is not None})
    inputs = [axis for dim in product.channels(meeting.side) for axis in held.axes[dim]]
    full = product.shape(meeting.side)
    at = {axis: full[dim] for dim, axes in enumerate(held.axes) for axis in axes}
    every = {*contracted, *batch}
    if any(at[axis] != shape[axis] for axis in every) or every & held.cut or {*stacked} & {*batch}:
        return unclear
    channels = tuple(axis for axis in contracted if axis in inputs)
    return Layout(stacked + tuple(batch), tuple(contracted), channels, layers, clear=True)


Pairs: TypeAlias = list[tuple[int | None, int]]


def contraction(product: Product, meeting: Meeting) -> Pairs | None:
    """(The parameter's own axis, the other operand's dimension) of what is summed over, in order.

    None where a dimension is none or several of its axes, or where this is not implemented.
    """
    side, held = meeting.side, meeting.held
    if isinstance(product, Dot):
        pairs = [(held.axes[dim], product.pair(side, dim)) for dim in product.contracted(side)]
    elif isinstance(product, Conv) and side == 1:
        numbers, groups = product.numbers, product.site.eqn.params["feature_group_count"]
        if groups != 1:
            return None
        _, channel, *window = numbers.rhs_spec
        dims = zip((channel, *window), numbers.lhs_spec[1:], strict=True)
        pairs = [(held.axes[dim], other) for dim, other in dims]
    else:
        return None
    own = [_single(axes) for axes, _ in pairs]
    elsewhere = [axis for dim, axes in enumerate(held.axes) for axis in axes]
    unclear = any(
        (axis is None and len(axes) > 0) or (axis is not None and elsewhere.count(axis) > 1)
        for axis, (axes, _) in zip(own, pairs, strict=True)
    )
    sized = [
        (a, d)
        for a, (axes, d) in zip(own, pairs, strict=True)
        if axes or product.shape(1 - side)[d] > 1
    ]
    if unclear or any(axis is None for axis, _ in sized):
        return None
    flat = [(a, d) for a, (_, d) in zip(own, pairs, strict=True)]
    return sorted(flat, key=lambda pair: -math.inf if pair[0] is None else pair[0])


def batch_pairs(product: Product, meeting: Meeting) -> Pairs:
    """The same for batch dimensions that the parameter has itself."""
    if not isinstance(product, Dot):
        return []
    numbers = product.numbers[1]
    dims = zip(numbers[meeting.side], numbers[1 - meeting.side], strict=True)
    pairs = [(_single(meeting.held.axes[dim]), other) for dim, other in dims]
    return sorted([(axis, d) for axis, d in pairs if axis is not None])


def canonical(w: Any, layout: Layout) -> jax.Array:
    """A parameter as matrices (batch, K, outputs), in the order of its own axes."""
    first, k, last = _orders(w.ndim, layout)
    sizes = [math.prod(w.shape[axis] for axis in axes) for axes in (first, k, last)]
    return jnp.asarray(w).transpose(*first, *k, *last).reshape(sizes)


def uncanonical(m: jax.Array, layout: Layout, shape: Sequence[int]) -> jax.Array:
    """The inverse of `canonical`; `shape` is that of the array to make."""
    first, k, last = _orders(len(shape), layout)
    order = [axis % len(shape) for axis in (*first, *k, *last)]
    return m.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def _orders(rank: int, layout: Layout) -> tuple[Axes, Axes, Axes]:
    known = (*layout.batch, *layout.contracted)
    return layout.batch, layout.contracted, tuple(k for k in range(-rank, 0) if k not in known)
