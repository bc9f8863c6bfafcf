"""Where parameters meet what: the products of each, and which of its axes they sum over."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.trace._function import Staged
from unitscale_jax.trace._held import Held, Roles, entering
from unitscale_jax.trace._product import Conv, Dot, Product, product_of
from unitscale_jax.trace._provenance import origins
from unitscale_jax.trace._walk import Place, Site, walk

Axes: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Meeting:
    """A product that a parameter meets.

    Attributes:
        site: Where.
        side: Of the parameter.
        held: As what it is there.
        stacks: For each scan around, the outer first, the parameter's axis that it runs along.
    """

    site: Site
    side: int
    held: Held
    stacks: tuple[int | None, ...]


@dataclass
class Meetings(Roles):
    """The flow of parameters; `products` collects theirs."""

    products: dict[str, dict[tuple[Place, int], Meeting]] = field(default_factory=dict)
    stacks: dict[tuple[Place, str], int | None] = field(default_factory=dict)

    def unstacked(self, site: Site, x: tuple[Held, ...]) -> tuple[Held, ...]:
        """One row of a stack, whose axis is remembered."""
        for held in x:
            in_order = held.whole and held.axes[0].isdisjoint(held.cut)
            self.stacks[site.place, held.name] = _single(held.axes[0]) if in_order else None
        return super().unstacked(site, x)

    def visit(self, site: Site, inputs: list[tuple[Held, ...]]) -> list[tuple[Held, ...]]:
        """Records a product; everything else as `Roles`."""
        if product_of(site) is not None:
            for side in (0, 1):
                for held in inputs[side]:
                    self._add(site, side, held)
        return super().visit(site, inputs)

    def _add(self, site: Site, side: int, held: Held) -> None:
        parents = list(above(site))
        if any(parent.name.startswith("custom_") for parent in parents):
            return  # where nothing is quantized, a derivative being one of arrays
        scans = [parent for parent in reversed(parents) if parent.name == "scan"]
        stacks = tuple(self.stacks.get((scan.place, held.name)) for scan in scans)
        found = self.products.setdefault(held.name, {})
        found[site.place, side] = Meeting(site, side, held, stacks)


def _single(axes: frozenset[int]) -> int | None:
    return next(iter(axes)) if len(axes) == 1 else None


def above(site: Site) -> Iterator[Site]:
    """The equations whose bodies a site is inside of, the innermost first."""
    while site.parent is not None:
        site = site.parent
        yield site


def meetings(staged: Staged, params: Any) -> Meetings:
    """Every product that each parameter meets, and the scans that run along its axes."""
    flow, known = Meetings(), entering(staged, origins(staged, params))
    walk(flow, staged.closed.jaxpr, known, staged.closed.consts)
    return flow


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
    for axis, length in zip(meeting.stacks, _lengths(meeting.site), strict=True):
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


def _lengths(site: Site) -> list[int]:
    scans = [parent for parent in above(site) if parent.name == "scan"]
    return [scan.eqn.params["length"] for scan in reversed(scans)]


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
