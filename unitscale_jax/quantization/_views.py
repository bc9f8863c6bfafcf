"""Views of a quantized array: transposed, sliced, scaled, frozen, stacked, without a product.

Codes and what belongs to the scales move alike, as long as the axes that share a scale stay whole;
where they would not, there is no view and the array is dequantized.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from unitscale_jax import tree as trees
from unitscale_jax.quantization._lsq import is_learned
from unitscale_jax.quantization._ops import fence
from unitscale_jax.quantization._qtensor import (
    ARRAYS,
    LIKE_SCALE,
    QTensor,
    has_codes,
    is_quantized,
)
from unitscale_jax.trace import (
    CUTS,
    JOINS,
    MOVES,
    PLACED,
    SHAPED,
    Site,
    cut_axes,
    moved_axes,
    segments,
    varying_axes,
    zeros,
)


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
    """The results of a move of quantized arrays; None if they are no views."""
    t, name = operands[0], site.name
    if name not in MOVES or (name not in _OF_SEVERAL and not is_quantized(t)):
        return None
    make = next((make for names, make in _VIEWS if name in names), _in_place)
    return make(site, operands)


# --------------------------------------------------------------- numbers that stay where they are


def _fields(t: QTensor, change: Callable[[Any, bool], Any], **statics: Any) -> QTensor:
    """Maps `change(array, is like the scale)` over all but the range of the other operand."""
    return t.over(
        lambda name, x: x if name == "x_range" else change(x, name in LIKE_SCALE), **statics
    )


def _in_place(site: Site, operands: list[Any]) -> list[Any]:
    """The move itself of codes, of what is like the scale, and of the latent array.

    Bound rather than passed over: the derivative of a `stop_gradient` is that of the latent array.
    """
    return [_fields(operands[0], lambda x, _: site.bind([x])[0])]


def _barred(site: Site, operands: list[Any]) -> list[Any]:
    arrays, structure = jax.tree.flatten(operands)
    return jax.tree.unflatten(structure, site.bind(arrays))


def _cast(site: Site, operands: list[Any]) -> list[Any] | None:
    dtype = site.results[0]
    return [operands[0].astype(dtype)] if has_codes(dtype) else None


def _placed(site: Site, operands: list[Any]) -> list[Any]:
    """A sharding is that of the array; what is like the scale has it where it has positions."""
    t = operands[0]

    def place(x: Any, small: bool) -> Any:
        if not small or x.shape == t.shape:
            return site.bind([x])[0]
        if site.name == "sharding_constraint":
            return x  # it follows by propagation
        return site.bind([x], **{k: _fitted(v, x.shape) for k, v in site.eqn.params.items()})[0]

    return [_fields(t, place)]


def _fitted(value: Any, shape: Sequence[int]) -> Any:
    """A parameter of an equation that may hold the sharding of an array, for a smaller one."""
    if isinstance(value, tuple):
        return tuple(_fitted(one, shape) for one in value)
    return value.update(spec=spec_of_shape(value.spec, shape)) if _is_named(value) else value


def _is_named(value: Any) -> TypeGuard[NamedSharding]:
    return isinstance(value, NamedSharding)


def partitioned(t: QTensor, spec: PartitionSpec) -> QTensor:
    """How the arrays of a quantized one are partitioned, which is partitioned by a spec."""

    def of(name: str, x: Any) -> PartitionSpec:
        if name == "x_range":
            return PartitionSpec(*[*spec, *[None] * t.ndim][: x.ndim - 1])
        return spec_of_shape(spec, x.shape)

    return t.over(of)


def spec_of_shape(spec: PartitionSpec, shape: Sequence[int]) -> PartitionSpec:
    """The same for an array that has size 1 on some axes."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    return PartitionSpec(*(e if n > 1 else None for e, n in zip(entries, shape, strict=True)))


# ------------------------------------------------------------------------- factors and digits


def _scaled(site: Site, operands: list[Any]) -> list[Any] | None:
    """The factor of the value belongs to the scale, the factor of the cotangent to the latent."""
    t, *factors = operands
    if any(map(is_quantized, factors)):
        return None
    sizes = [1] * t.ndim
    for factor in factors:
        sizes = [max(pair) for pair in zip(sizes, factor.shape or sizes, strict=True)]
    if any(sizes[axis] > 1 for axis in t.axes):
        return None  # another factor for each position that shares a scale
    wide = [factor.astype(jnp.float32) for factor in factors]
    shape = [max(pair) for pair in zip(t.scale.shape, sizes, strict=True)]
    scale = jnp.broadcast_to(t.scale, shape)
    if site.eqn.params.get("fwd") != 1:  # fenced, or training would multiply in another order
        scale = fence(site.bind([fence(scale), *wide])[0])
    latent = None if t.latent is None else site.bind([t.latent, *factors])[0]
    return [replace(t, scale=scale, latent=latent)]


def _rounded(site: Site, operands: list[Any]) -> list[Any]:
    """Numbers of fewer digits: those of the scale, since codes have few already.

    Exponents stay those of float32, because the scale is smaller than any number that it stands for
    and would vanish first.
    """
    t = operands[0]
    latent = None if t.latent is None else site.bind([t.latent])[0]
    return [replace(t, scale=site.bind([t.scale], exponent_bits=8)[0], latent=latent)]


def _carried(site: Site, operands: list[Any]) -> list[Any] | None:
    """The codes of the value; the cotangent is the carrier's."""
    del site
    value, carrier = operands
    if not is_quantized(value):
        return None
    return [replace(value, latent=carrier.latent if is_quantized(carrier) else carrier)]


# ------------------------------------------------------------------- numbers along other axes


def _shaped(site: Site, operands: list[Any]) -> list[Any] | None:
    """Codes move as the array does, and what is like the scale along the axes that it has."""
    t, *starts = operands
    axes = _shared_axes(site, t)
    if axes is None or not _keeps_groups(site, t, axes):
        return None
    results = range(len(site.eqn.outvars))
    new: dict[str, list[Any]] = {}
    for name in ARRAYS:
        x = getattr(t, name)
        if x is None:
            continue
        move = _range_moved if name == "x_range" else _moved
        moved = move(site, x, t, starts)
        if moved is None:
            return None
        new[name] = moved
    return [replace(t, axes=axes, **{k: v[n] for k, v in new.items()}) for n in results]


def _shared_axes(site: Site, t: QTensor) -> tuple[int, ...] | None:
    """The axes of the result that share a scale; None where an axis would in part."""
    shared = {axis % t.ndim for axis in t.axes}
    sources, found = moved_axes(site), []
    for k, axes in enumerate(sources):
        flags = {axis in shared for axis in axes if t.shape[axis] > 1 or len(axes) == 1}
        if len(flags) == 2:
            return None
        found += [k - len(sources)] if True in flags else []
    return tuple(found)


def _keeps_groups(site: Site, t: QTensor, axes: tuple[int, ...]) -> bool:
    """Whether groups stay along the last of the axes, and sums over these axes stay what they are.

    A cut, or a position that is repeated, makes another sum of codes.
    """
    cut = {axis % t.ndim for axis in t.axes}.intersection(cut_axes(site))
    if t.colsum is not None and cut and site.name != "rev":
        return False
    if t.groups == 1:
        return True
    sources, last = moved_axes(site), max(t.axes) % t.ndim
    along = [k for k, of in enumerate(sources) if last in of]
    whole = last not in cut or site.name == "tile"
    return whole and bool(axes) and along == [max(axes) % len(sources)]


def _moved(site: Site, x: Any, t: QTensor, starts: Sequence[Any]) -> list[Any] | None:
    """The move of an array that has the shape of `t`, or fewer positions along some axes."""
    if x.shape == t.shape:
        return site.bind([x, *starts])
    change = _SMALL.get(site.name)
    params = {} if change is None else change(site, x, t)
    if params is None:
        return None
    if site.name in ("split", "unstack") and x.shape[site.eqn.params["axis"]] == 1:
        gone = [site.eqn.params["axis"]] if site.name == "unstack" else []
        return [x.squeeze(gone)] * len(site.eqn.outvars)
    return site.bind([x, *starts], **params)


def _small_slice(site: Site, x: Any, t: QTensor) -> dict[str, Any]:
    params = site.eqn.params
    pick = lambda ours, theirs: tuple(
        a if n == full else b for a, b, n, full in zip(ours, theirs, x.shape, t.shape, strict=True)
    )
    ones = (1,) * x.ndim
    return {
        "start_indices": pick(params["start_indices"], (0,) * x.ndim),
        "limit_indices": pick(params["limit_indices"], x.shape),
        "strides": pick(params["strides"] or ones, ones),
    }


def _small_dynamic_slice(site: Site, x: Any, t: QTensor) -> dict[str, Any]:
    sizes = zip(site.eqn.params["slice_sizes"], x.shape, t.shape, strict=True)
    return {"slice_sizes": tuple(size if n == full else n for size, n, full in sizes)}


def _small_tile(site: Site, x: Any, t: QTensor) -> dict[str, Any]:
    del t
    reps = zip(site.eqn.params["reps"], x.shape, strict=True)
    return {"reps": tuple(times if n > 1 else 1 for times, n in reps)}


def _small_broadcast(site: Site, x: Any, t: QTensor) -> dict[str, Any]:
    """An axis that is new has scales of size 1."""
    del t
    sizes = tuple(x.shape[of[0]] if of else 1 for of in moved_axes(site))
    return {"shape": sizes, "sharding": None}


def _small_reshape(site: Site, x: Any, t: QTensor) -> dict[str, Any] | None:
    sizes: list[int] = []
    for before, after in segments(t.shape, site.result_shapes[0]):
        own = _segment(t, x, before, [site.result_shapes[0][d] for d in after])
        if own is None:
            return None
        sizes += own
    return {"new_sizes": tuple(sizes), "sharding": None}


def _segment(t: QTensor, x: Any, before: Sequence[int], new: Sequence[int]) -> list[int] | None:
    """The sizes of what is like the scale where a run of axes takes new sizes."""
    count = math.prod(x.shape[d] for d in before)
    if count == 1:
        return [1] * len(new)
    if count == math.prod(t.shape[d] for d in before):
        return list(new)
    alone = sum(t.shape[d] > 1 for d in before) == sum(n > 1 for n in new) == 1
    return [count if n > 1 else 1 for n in new] if alone else None  # groups along one axis


_SMALL: dict[str, Callable[[Site, Any, QTensor], dict[str, Any] | None]] = {
    "slice": _small_slice,
    "dynamic_slice": _small_dynamic_slice,
    "tile": _small_tile,
    "broadcast_in_dim": _small_broadcast,
    "reshape": _small_reshape,
}


def _range_moved(site: Site, r: Any, t: QTensor, starts: Sequence[Any]) -> list[Any] | None:
    """The range of the other operand, whose leading axes are the first of the array.

    None where these are not the first of the result too, each by itself.
    """
    lead, results = r.ndim - 1, len(site.eqn.outvars)
    if lead == 0:
        return [r] * results
    sources = moved_axes(site)
    kept = [of for of in sources if any(axis < lead for axis in of)]
    in_order = all(len(of) == 1 for of in kept) and kept == sorted(kept)
    if not in_order or kept != sources[: len(kept)]:
        return None
    whole = lambda x: x.reshape(x.shape + (1,) * (t.ndim - lead))
    low, high = (_moved(site, whole(r[..., k]), t, starts) for k in (0, 1))
    if low is None or high is None:
        return None
    cut = lambda x: x.reshape(x.shape[: len(kept)])
    return [jnp.stack([cut(a), cut(b)], -1) for a, b in zip(low, high, strict=True)]


# ------------------------------------------------------------------------- several into one


def _joined(site: Site, operands: list[Any]) -> list[Any] | None:
    first = operands[0]
    if not _alike(operands):
        return None
    axes = _shared_axes(site, first)
    at = site.eqn.params["dimension" if site.name == "concatenate" else "axis"]
    if axes is None or (site.name == "concatenate" and at - first.ndim in first.axes):
        return None

    def full(x: Any, t: QTensor) -> Any:  # an axis that was added has scales of size 1
        shape = [t.shape[d] if d == at else n for d, n in enumerate(x.shape)]
        return jnp.broadcast_to(x, shape) if site.name == "concatenate" else x

    def change(name: str, x: Any) -> Any:
        del x
        return site.bind([full(getattr(t, name), t) for t in operands])[0]

    return [first.over(change, axes=axes)]


def _alike(operands: list[Any]) -> bool:
    """Whether all are quantized in one way, and can be put beside one another."""
    first = operands[0]
    if not all(is_quantized(t) and t.x_range is None for t in operands):
        return False
    kind = lambda t: (t.spec, t.axes, t.latent is None)
    return all(kind(t) == kind(first) for t in operands)


_OF_SEVERAL = JOINS | {"optimization_barrier"}

_VIEWS: list[tuple[Collection[str], Callable[[Site, list[Any]], list[Any] | None]]] = [
    (JOINS, _joined),
    (SHAPED | CUTS, _shaped),
    (PLACED, _placed),
    (["optimization_barrier"], _barred),
    (["convert_element_type"], _cast),
    (["unit_scale", "unit_scale_by"], _scaled),
    (["reduce_precision"], _rounded),
    (["straight_through"], _carried),
]
"""How codes move, by primitive; any other move is made `_in_place`."""
