"""Views of a quantized array: transposed, sliced, stacked, without a product.

Codes and what belongs to the scales move alike, as long as the axes that share a scale stay whole;
where they would not, there is no view and the array is dequantized.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.quantization._lsq import is_learned
from unitscale_jax.quantization._qtensor import LIKE_SCALE, QTensor, is_quantized
from unitscale_jax.trace import Site, segments, varying_axes, zeros


def logical(tree: Any) -> Any:
    """A tree with an abstract array for every `QTensor` and `Learned`, as the function sees it."""
    return jax.tree.map(_abstract, tree, is_leaf=trees.is_compound)


def _abstract(leaf: Any) -> Any:
    if is_learned(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if not is_quantized(leaf):
        return leaf
    if varying_axes(leaf.codes):  # an abstract array cannot say so; these zeros are not computed
        return zeros(leaf.shape, leaf.dtype, like=leaf.codes)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def view(site: Site, operands: list[Any]) -> list[Any] | None:
    """The results of a movement of quantized arrays; None if they are no views."""
    make = _VIEWS.get(site.name)
    return None if make is None else make(site, operands)


def _fields(t: QTensor, change: Callable[[Any, bool], Any], **statics: Any) -> QTensor:
    """Maps `change(array, is like the scale)` over all but the range of the other operand."""
    return t.over(
        lambda name, x: x if name == "x_range" else change(x, name in LIKE_SCALE), **statics
    )


def _each(site: Site, operands: list[Any]) -> list[Any]:
    return [operands[0].over(lambda _, x: site.bind([x])[0])]


def _as_is(site: Site, operands: list[Any]) -> list[Any]:
    del site
    return operands


def _cast(site: Site, operands: list[Any]) -> list[Any] | None:
    dtype = site.results[0]
    floating = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits in (16, 32)
    return [operands[0].astype(dtype)] if floating else None


def _constrained(site: Site, operands: list[Any]) -> list[Any]:
    """A sharding is that of the array; scales follow by propagation where theirs would differ."""
    t = operands[0]
    same = lambda x: site.bind([x])[0] if x.shape == t.shape else x
    return [_fields(t, lambda x, small: x if small and x.shape != t.shape else same(x))]


def _transposed(site: Site, operands: list[Any]) -> list[Any] | None:
    t, order = operands[0], site.eqn.params["permutation"]
    if t.x_range is not None and t.x_range.ndim > 1 and order[0] != 0:
        return None
    axes = _at(t, lambda axis: order.index(axis), len(order))
    if t.groups > 1 and axes[-1] != _place(t, order.index(max(t.axes) % t.ndim)):
        return None  # groups are along the last of the axes
    return [_fields(t, lambda x, _: x.transpose(order), axes=axes)]


def _place(t: QTensor, axis: int) -> int:
    return axis - t.ndim


def _at(t: QTensor, where: Callable[[int], int | None], rank: int) -> tuple[int, ...]:
    """The axes that share a scale, each moved."""
    moved = [where(axis % t.ndim) for axis in t.axes]
    return tuple(sorted(axis - rank for axis in moved if axis is not None))


def _squeezed(site: Site, operands: list[Any]) -> list[Any]:
    t, gone = operands[0], site.eqn.params["dimensions"]
    rank = t.ndim - len(gone)
    where = lambda axis: None if axis in gone else axis - sum(d < axis for d in gone)
    out = _fields(t, lambda x, _: x.squeeze(gone), axes=_at(t, where, rank))
    return [_with_range(out, t, lambda r, lead: r.squeeze(tuple(d for d in gone if d < lead)))]


def _with_range(out: QTensor, t: QTensor, change: Callable[[Any, int], Any]) -> QTensor:
    """The range of the other operand, whose leading axes are the first of the array."""
    if t.x_range is None or t.x_range.ndim == 1:
        return out
    return replace(out, x_range=change(t.x_range, t.x_range.ndim - 1))


def _broadcast(site: Site, operands: list[Any]) -> list[Any] | None:
    t, shape = operands[0], site.eqn.params["shape"]
    where = site.eqn.params["broadcast_dimensions"]
    grown = any(shape[where[d]] != n for d, n in enumerate(t.shape))
    if grown or (t.x_range is not None and t.x_range.ndim > 1):
        return None
    new = set(range(len(shape))) - set(where)

    def change(x: Any, small: bool) -> Any:
        own = [1 if d in new else x.shape[where.index(d)] for d in range(len(shape))]
        return jax.lax.broadcast_in_dim(x, own if small else shape, where)

    return [_fields(t, change, axes=_at(t, lambda axis: where[axis], len(shape)))]


def _reshaped(site: Site, operands: list[Any]) -> list[Any] | None:
    t, new = operands[0], site.eqn.params["new_sizes"]
    if t.x_range is not None and t.x_range.ndim > 1:
        return None
    shared = {axis % t.ndim for axis in t.axes}
    sizes: dict[str, list[int]] = {name: [] for name in LIKE_SCALE}
    axes: list[int] = []
    for before, after in segments(t.shape, new):
        real = [d for d in before if t.shape[d] > 1] or before
        summed = [d in shared for d in real]
        if any(summed) != all(summed):
            return None
        axes += [d - len(new) for d in after if summed and all(summed)]
        for name in LIKE_SCALE:
            own = _segment(t, getattr(t, name), before, [new[d] for d in after])
            if own is None:
                return None
            sizes[name] += own
    reshape = lambda name, x: x.reshape(sizes[name] if name in LIKE_SCALE else new)
    return [t.over(lambda name, x: x if name == "x_range" else reshape(name, x), axes=tuple(axes))]


def _segment(t: QTensor, x: Any, before: Sequence[int], new: Sequence[int]) -> list[int] | None:
    """The sizes of what is like the scale where a run of axes takes new sizes."""
    count = 1 if x is None else math.prod(x.shape[d] for d in before)
    if count == 1:
        return [1] * len(new)
    if count == math.prod(t.shape[d] for d in before):
        return list(new)
    alone = sum(t.shape[d] > 1 for d in before) == sum(n > 1 for n in new) == 1
    return [count if n > 1 else 1 for n in new] if alone else None  # groups along one axis


def _cut(t: QTensor, dims: Sequence[int]) -> bool:
    """Whether a cut along some dimensions leaves no view: sums or groups along them."""
    grouped = max(t.axes, default=-1) % t.ndim if t.groups > 1 else None
    shared = {axis % t.ndim for axis in t.axes}
    return grouped in dims or (t.colsum is not None and bool(shared & set(dims)))


def _sliced(site: Site, operands: list[Any]) -> list[Any] | None:
    t, params = operands[0], site.eqn.params
    start, limit = params["start_indices"], params["limit_indices"]
    stride = params["strides"] or (1,) * t.ndim
    cut = [d for d in range(t.ndim) if (start[d], limit[d], stride[d]) != (0, t.shape[d], 1)]
    if _cut(t, cut):
        return None

    def change(x: Any, small: bool) -> Any:
        for d in cut:
            if not small or x.shape[d] == t.shape[d]:
                x = jax.lax.slice_in_dim(x, start[d], limit[d], stride[d], axis=d)
        return x

    def rows(r: Any, lead: int) -> Any:
        for d in [d for d in cut if d < lead]:
            r = jax.lax.slice_in_dim(r, start[d], limit[d], stride[d], axis=d)
        return r

    return [_with_range(_fields(t, change), t, rows)]


def _dynamically_sliced(site: Site, operands: list[Any]) -> list[Any] | None:
    t, *starts = operands
    sizes = site.eqn.params["slice_sizes"]
    cut = [d for d in range(t.ndim) if sizes[d] != t.shape[d]]
    if not is_quantized(t) or _cut(t, cut):
        return None

    def change(x: Any, small: bool) -> Any:
        for d in cut:
            if not small or x.shape[d] == t.shape[d]:
                x = jax.lax.dynamic_slice_in_dim(x, starts[d], sizes[d], axis=d)
        return x

    def rows(r: Any, lead: int) -> Any:
        for d in [d for d in cut if d < lead]:
            r = jax.lax.dynamic_slice_in_dim(r, starts[d], sizes[d], axis=d)
        return r

    return [_with_range(_fields(t, change), t, rows)]


def _split(site: Site, operands: list[Any]) -> list[Any] | None:
    t, axis = operands[0], site.eqn.params["axis"]
    if _cut(t, [axis]) or (t.x_range is not None and axis < t.x_range.ndim - 1):
        return None
    ends = np.cumsum(site.eqn.params["sizes"])
    starts = [0, *ends[:-1]]

    def part(a: int, b: int) -> QTensor:
        whole = lambda x: x.shape[axis] == t.shape[axis]
        cut = lambda x: jax.lax.slice_in_dim(x, a, b, axis=axis)
        return _fields(t, lambda x, small: cut(x) if not small or whole(x) else x)

    return [part(int(a), int(b)) for a, b in zip(starts, ends, strict=True)]


def _joined(site: Site, operands: list[Any]) -> list[Any] | None:
    first, axis = operands[0], site.eqn.params["dimension"]
    if not _alike(operands) or axis - first.ndim in first.axes:
        return None

    def full(x: Any, t: QTensor) -> Any:  # an axis that was added has scales of size 1
        shape = [t.shape[d] if d == axis else n for d, n in enumerate(x.shape)]
        return jnp.broadcast_to(x, shape)

    def change(name: str, x: Any) -> Any:
        del x
        return jnp.concatenate([full(getattr(t, name), t) for t in operands], axis)

    return [first.over(change)]


def _stacked(site: Site, operands: list[Any]) -> list[Any] | None:
    first, axis = operands[0], site.eqn.params["axis"]
    if not _alike(operands):
        return None
    rank = first.ndim + 1
    axes = _at(first, lambda d: d + (d >= axis), rank)

    def change(name: str, x: Any) -> Any:
        del x
        return jnp.stack([getattr(t, name) for t in operands], axis)

    return [first.over(change, axes=axes)]


def _alike(operands: list[Any]) -> bool:
    """Whether all are quantized in one way, and can be put beside one another."""
    first = operands[0]
    if not all(is_quantized(t) and t.x_range is None for t in operands):
        return False
    kind = lambda t: (t.spec, t.axes, t.latent is None)
    return all(kind(t) == kind(first) for t in operands)


def _reversed(site: Site, operands: list[Any]) -> list[Any] | None:
    t, dims = operands[0], site.eqn.params["dimensions"]
    if t.groups > 1 and max(t.axes) % t.ndim in dims:
        return None
    if t.x_range is not None and t.x_range.ndim > 1:
        return None
    return [_fields(t, lambda x, _: jnp.flip(x, dims))]


_VIEWS: dict[str, Callable[[Site, list[Any]], list[Any] | None]] = {
    "copy": _each,
    "copy_p": _each,
    "name": _each,
    "pcast": _each,
    "pvary": _each,
    "optimization_barrier": _as_is,
    "convert_element_type": _cast,
    "sharding_constraint": _constrained,
    "transpose": _transposed,
    "squeeze": _squeezed,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshaped,
    "slice": _sliced,
    "dynamic_slice": _dynamically_sliced,
    "split": _split,
    "concatenate": _joined,
    "rev": _reversed,
    "stack": _stacked,
}
