"""Parameters as matrices: the axes that the statistics of what meets them are about."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.trace.params._meeting import Meeting, single
from unitscale_jax.trace.params._product import Conv, Dot, Product, product_of

AxisNumbers: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class MatrixForm:
    """The axes of a parameter that statistics of what meets it are about, counted from the end.

    Attributes:
        batch: One statistic for each index: stacked layers first, then batch axes of the product.
        contracted: K, flattened in the order of the parameter's axes.
        channels: The input channels among them: all but the window of a convolution.
        layers: How many of `batch` are stacked layers; those a range has, too.
        clear: Whether `contracted` is known element by element, so that channels have statistics.
    """

    batch: AxisNumbers = ()
    contracted: AxisNumbers = ()
    channels: AxisNumbers = ()
    layers: int = 0
    clear: bool = False


def matrix_form(name: str, shape: Sequence[int], met: Sequence[Meeting]) -> MatrixForm:
    """The form that all products of a parameter agree on; at least the layers of all of them."""
    each = [_layout_at(name, shape, meeting) for meeting in met]
    layers = min(layout.layers for layout in each)
    cut = [
        replace(it, batch=it.batch[:layers] + it.batch[it.layers :], layers=layers) for it in each
    ]
    same = all(it == cut[0] for it in cut)
    return cut[0] if same else MatrixForm(batch=cut[0].batch[:layers], layers=layers)


def _layout_at(name: str, shape: Sequence[int], meeting: Meeting) -> MatrixForm:
    """The form at one product; of layers alone where K is not known element by element."""
    product, held, rank = product_of(meeting.site), meeting.held, len(shape)
    assert product is not None, name
    # Scans that run along the leading axes, the outer first: those are stacked layers.
    layers = 0
    for scan, axis in meeting.stacks:
        length = scan.eqn.params["length"]
        if axis is not None and axis + rank == layers and shape[axis] == length:
            layers += 1
        else:
            break
    stacked = tuple(k - rank for k in range(layers))
    unclear = MatrixForm(stacked, layers=layers)
    pairs = contraction(product, meeting)
    if pairs is None or not held.whole:
        return unclear
    contracted = sorted({axis for axis, _ in pairs if axis is not None})
    batch = sorted({axis for axis, _ in batch_pairs(product, meeting) if axis is not None})
    inputs = [axis for dim in product.channels(meeting.side) for axis in held.axes[dim]]
    # An axis that is cut, or that the product sees in part, has statistics of some positions only;
    # one that is both layers and batch would have two.
    full = product.shape(meeting.side)
    at = {axis: full[dim] for dim, axes in enumerate(held.axes) for axis in axes}
    every = {*contracted, *batch}
    if any(at[axis] != shape[axis] for axis in every) or every & held.cut or {*stacked} & {*batch}:
        return unclear
    channels = tuple(axis for axis in contracted if axis in inputs)
    return MatrixForm(stacked + tuple(batch), tuple(contracted), channels, layers, clear=True)


AxisPairs: TypeAlias = list[tuple[int | None, int]]


def contraction(product: Product, meeting: Meeting) -> AxisPairs | None:
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
    # K is known element by element if each summed dimension is one axis of the parameter, which is
    # nowhere else in the operand. A dimension of size 1 that is no axis of it does no harm.
    own = [single(axes) for axes, _ in pairs]
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


def batch_pairs(product: Product, meeting: Meeting) -> AxisPairs:
    """(The parameter's own axis, the other operand's dimension) of batch dimensions, in order."""
    if not isinstance(product, Dot):
        return []
    numbers = product.numbers[1]
    dims = zip(numbers[meeting.side], numbers[1 - meeting.side], strict=True)
    pairs = [(single(meeting.held.axes[dim]), other) for dim, other in dims]
    return sorted([(axis, d) for axis, d in pairs if axis is not None])


def to_matrices(w: Any, layout: MatrixForm) -> jax.Array:
    """A parameter as matrices (batch, K, outputs), in the order of its own axes."""
    first, k, last = _orders(w.ndim, layout)
    sizes = [math.prod(w.shape[axis] for axis in axes) for axes in (first, k, last)]
    return jnp.asarray(w).transpose(*first, *k, *last).reshape(sizes)


def from_matrices(m: jax.Array, layout: MatrixForm, shape: Sequence[int]) -> jax.Array:
    """The inverse of `to_matrices`; `shape` is that of the array to make."""
    first, k, last = _orders(len(shape), layout)
    order = [axis % len(shape) for axis in (*first, *k, *last)]
    return m.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def _orders(rank: int, layout: MatrixForm) -> tuple[AxisNumbers, AxisNumbers, AxisNumbers]:
    """Axes of the matrices' number, of K, and of the outputs, counted from the end."""
    known = (*layout.batch, *layout.contracted)
    return layout.batch, layout.contracted, tuple(k for k in range(-rank, 0) if k not in known)
