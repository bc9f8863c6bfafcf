"""Views of a quantized array: transposed, sliced, scaled, frozen, stacked, without a product.

Codes and what belongs to the scales move alike, as long as the axes that share a scale stay whole;
where they would not, there is no view and the array is dequantized.
"""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from unitscale_jax import tree as trees
from unitscale_jax.mesh_axes import varying_axes, zeros
from unitscale_jax.quant._lsq import is_learned
from unitscale_jax.quant._ops import no_fma
from unitscale_jax.quant._qtensor import LIKE_SCALE, QTensor, has_codes, is_quantized
from unitscale_jax.trace.program import (
    CUTS,
    JOINS,
    MOVES,
    PLACED,
    SHAPED,
    Site,
    cut_axes,
    moved_axes,
    segments,
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
    return _row(name)[0](site, operands)


def refusal(site: Site) -> str:
    """Why an equation on quantized arrays has no `view`."""
    return _row(site.name)[1]


# --------------------------------------------------------------- numbers that stay where they are


def _in_place(site: Site, operands: list[Any]) -> list[Any]:
    """The move itself of codes, of what is like the scale, and of the master array.

    Bound rather than passed over: the derivative of a `stop_gradient` is that of the master array.
    The range of the other operand is not of the value, and has its derivative.
    """
    return [operands[0].over(lambda name, x: x if name == "input_range" else site.bind([x])[0])]


def _barred(site: Site, operands: list[Any]) -> list[Any]:
    arrays, structure = jax.tree.flatten(operands)
    return jax.tree.unflatten(structure, site.bind(arrays))


def _cast(site: Site, operands: list[Any]) -> list[Any] | None:
    dtype = site.results[0]
    return [operands[0].astype(dtype)] if has_codes(dtype) else None


def _placed(site: Site, operands: list[Any]) -> list[Any]:
    """A sharding is that of the array; what is like the scale has it where it has positions."""
    t = operands[0]

    def place(name: str, x: Any) -> Any:
        if name == "input_range" or (name in LIKE_SCALE and site.name == "sharding_constraint"):
            return x  # it follows by propagation
        return site.bind([x], **{k: _fitted(v, x.shape) for k, v in site.eqn.params.items()})[0]

    return [t.over(place)]


def _fitted(value: Any, shape: Sequence[int]) -> Any:
    """A parameter of an equation that may hold the sharding of an array, for a smaller one."""
    if isinstance(value, tuple):
        return tuple(_fitted(one, shape) for one in value)
    if not isinstance(value, NamedSharding):
        return value
    return value.update(spec=_spec_of_shape(value.spec, shape))


def partitioned(t: QTensor, spec: PartitionSpec) -> QTensor:
    """The partitioning of each array of a `QTensor`, given that of the array it stands for."""

    def of(name: str, x: Any) -> PartitionSpec:
        if name == "input_range":
            return PartitionSpec(*[*spec, *[None] * t.ndim][: x.ndim - 1])
        return _spec_of_shape(spec, x.shape)

    return t.over(of)


def _spec_of_shape(spec: PartitionSpec, shape: Sequence[int]) -> PartitionSpec:
    """The spec without the axes along which an array has size 1."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    return PartitionSpec(*(e if n > 1 else None for e, n in zip(entries, shape, strict=True)))


# ------------------------------------------------------------------------- factors and digits


def _scaled(site: Site, operands: list[Any]) -> list[Any] | None:
    """The factor of the value belongs to the scale, the factor of the cotangent to the master."""
    t, *factors = operands
    if any(map(is_quantized, factors)):
        return None
    sizes = [1] * t.ndim
    for factor in factors:
        sizes = [max(pair) for pair in zip(sizes, np.shape(factor) or sizes, strict=True)]
    if any(sizes[axis] > 1 for axis in t.axes):
        return None  # another factor for each position that shares a scale
    wide = [jnp.asarray(factor).astype(jnp.float32) for factor in factors]
    shape = [max(pair) for pair in zip(t.scale.shape, sizes, strict=True)]
    scale = jnp.broadcast_to(t.scale, shape)
    if site.eqn.params.get("fwd") != 1:  # fenced, or training would multiply in another order
        scale = no_fma(site.bind([no_fma(scale), *wide])[0])
    master = None if t.master is None else site.bind([t.master, *factors])[0]
    return [replace(t, scale=scale, master=master)]


def _rounded(site: Site, operands: list[Any]) -> list[Any]:
    """Numbers of fewer digits: those of the scale, since codes have few already.

    Exponents stay those of float32, because the scale is smaller than any number that it stands for
    and would vanish first.
    """
    t = operands[0]
    master = None if t.master is None else site.bind([t.master])[0]
    return [replace(t, scale=site.bind([t.scale], exponent_bits=8)[0], master=master)]


def _carried(site: Site, operands: list[Any]) -> list[Any] | None:
    """The codes of the value; the cotangent is the carrier's."""
    del site
    value, carrier = operands
    if not is_quantized(value):
        return None
    return [replace(value, master=carrier.master if is_quantized(carrier) else carrier)]


# ------------------------------------------------------------------- numbers along other axes


def _shaped(site: Site, operands: list[Any]) -> list[Any] | None:
    """Codes move as the array does, and what is like the scale along the axes that it has."""
    t, *starts = operands
    cut = {axis % t.ndim for axis in t.axes}.intersection(cut_axes(site))
    axes = _shared_axes(site, t)
    if axes is None or not _keeps_groups(site, t, axes, cut):
        return None
    if cut and site.name != "rev":  # what is cut or repeated has another sum, which products find
        t = replace(t, code_sums=None)
    moves = dict.fromkeys(LIKE_SCALE, _moved) | {"input_range": _range_moved}
    new: dict[str, list[Any]] = {}
    for name, x in t.arrays().items():
        make = moves.get(name)
        results = make(site, x, t, starts) if make else site.bind([x, *starts])
        if results is None:
            return None
        new[name] = results
    every = range(len(site.eqn.outvars))
    return [replace(t, axes=axes, **{name: new[name][k] for name in new}) for k in every]


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


def _keeps_groups(site: Site, t: QTensor, axes: tuple[int, ...], cut: set[int]) -> bool:
    """True if groups stay along the last of the axes; `cut` are those that are cut or repeated."""
    if t.groups == 1:
        return True
    sources, last = moved_axes(site), max(t.axes) % t.ndim
    along = [k for k, of in enumerate(sources) if last in of]
    whole = last not in cut or site.name in ("tile", "rev")  # of whole groups
    return whole and bool(axes) and along == [max(axes) % len(sources)]


def _moved(site: Site, x: Any, t: QTensor, starts: Sequence[Any]) -> list[Any] | None:
    """The move of an array that is like the scale of `t`; None if it would not stay so.

    Like the scale: its axes are those of `t`, of full size, of size 1 where they share a scale, or
    of the number of groups. The equation moves an array of the shape of `t`, so its sizes and
    bounds have to be written anew for the smaller one, which `_small` does.
    """
    # An axis of size 1 cannot be split in parts; each part has that one scale.
    if site.name in ("split", "unstack") and x.shape[site.eqn.params["axis"]] == 1:
        gone = [site.eqn.params["axis"]] if site.name == "unstack" else []
        return [x.squeeze(gone)] * len(site.eqn.outvars)
    if site.name == "reshape":
        x = _spread(site, x, t)
    params = _small(site, x, t)
    return None if params is None else site.bind([x, *starts], **params)


def _small(site: Site, x: Any, t: QTensor) -> dict[str, Any] | None:
    """Parameters of the move for an array that has size 1, or that of groups, on some axes."""
    params, shape = site.eqn.params, site.result_shapes[0]
    pairs = list(zip(x.shape, t.shape, strict=True))

    def pick(theirs: Sequence[int], own: Sequence[int]) -> tuple[int, ...]:
        """By axis the numbers of the equation where the array is whole, its own where it is not."""
        return tuple(
            a if n == full else b for a, b, (n, full) in zip(theirs, own, pairs, strict=True)
        )

    if site.name == "slice":
        ones = (1,) * x.ndim
        return {
            "start_indices": pick(params["start_indices"], (0,) * x.ndim),
            "limit_indices": pick(params["limit_indices"], x.shape),
            "strides": pick(params["strides"] or ones, ones),
        }
    if site.name == "dynamic_slice":
        return {"slice_sizes": pick(params["slice_sizes"], x.shape)}
    if site.name == "tile":
        reps = zip(params["reps"], x.shape, strict=True)
        return {"reps": tuple(times if n > 1 else 1 for times, n in reps)}
    if site.name == "broadcast_in_dim":  # an axis that is new has scales of size 1
        sizes = [x.shape[of[0]] if of else 1 for of in moved_axes(site)]
        return {"shape": tuple(sizes), "sharding": None}
    if site.name != "reshape":
        return {}
    runs = segments(t.shape, shape)
    parts = [_segment(t, x, before, [shape[d] for d in after]) for before, after in runs]
    known = [part for part in parts if part is not None]
    sizes = tuple(itertools.chain(*known))
    return {"new_sizes": sizes, "sharding": None} if len(known) == len(parts) else None


def _spread(site: Site, x: Any, t: QTensor) -> Any:
    """Repeats an array like the scale over each axis that a reshape joins with axes of scales.

    An axis that a broadcast added has scales of size 1. `jnp.repeat` of columns (4, 3) adds such an
    axis, with scales (1, 3, 1), and joins it with the columns, whose six scales are (1, 3, 2).
    """
    shared, sizes = {axis % t.ndim for axis in t.axes}, list(x.shape)
    for before, _ in segments(t.shape, site.result_shapes[0]):
        if any(x.shape[axis] > 1 for axis in before):
            for axis in set(before) - shared:
                sizes[axis] = t.shape[axis]
    return x if tuple(sizes) == x.shape else jnp.broadcast_to(x, sizes)


def _segment(t: QTensor, x: Any, before: Sequence[int], new: Sequence[int]) -> list[int] | None:
    """The sizes of an array like the scale where the axes `before` of `t` take sizes `new`.

    A reshape (6, 8) -> (2, 3, 8) has the runs (6,) -> (2, 3) and (8,) -> (8,). Along a run the
    array has one scale for all, one for each position, or one for each group; groups of a run stay
    in order if a single axis of it has more than one position, before and after. None: they do not.
    """
    count = math.prod(x.shape[d] for d in before)
    if count == 1:
        return [1] * len(new)
    if count == math.prod(t.shape[d] for d in before):
        return list(new)
    alone = sum(t.shape[d] > 1 for d in before) == sum(n > 1 for n in new) == 1
    if not alone:  # groups lie along one axis, and several would share them
        return None
    return [count if n > 1 else 1 for n in new]


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
    # Each end moves as an array like the scale: the leading axes, then axes of size 1.
    shape = r.shape[:-1] + (1,) * (t.ndim - lead)
    low, high = (_moved(site, r[..., k].reshape(shape), t, starts) for k in (0, 1))
    if low is None or high is None:
        return None
    pairs = zip(low, high, strict=True)
    return [jnp.stack([end.reshape(end.shape[: len(kept)]) for end in ends], -1) for ends in pairs]


# ------------------------------------------------------------------------- several into one


def _joined(site: Site, operands: list[Any]) -> list[Any] | None:
    """Codes beside one another, and scales likewise.

    Along an axis with a scale for each position scales are put beside one another, and along one
    that shares a scale each array becomes a group: (4, 3) and (4, 3) with scales (1, 3), joined to
    (8, 3), have scales (2, 3).
    """
    first = operands[0]
    axes = _shared_axes(site, first) if is_quantized(first) else None
    if axes is None or not _alike(operands):
        return None
    along = site.eqn.params["dimension"] if site.name == "concatenate" else None
    if along is not None and along - first.ndim in axes and not _as_groups(operands, along):
        return None

    def full(x: Any, t: QTensor) -> Any:  # an axis that was added has scales of size 1
        shared = along is None or along - t.ndim in axes
        shape = [t.shape[d] if d == along and not shared else n for d, n in enumerate(x.shape)]
        return jnp.broadcast_to(x, shape)

    def change(name: str, x: Any) -> Any:
        del x
        arrays = [getattr(t, name) for t in operands]
        if name == "input_range":  # of the one operand that meets them all
            low, high = (functools.reduce(f, arrays) for f in (jnp.minimum, jnp.maximum))
            return jnp.stack([low[..., 0], high[..., 1]], -1)
        return site.bind(list(map(full, arrays, operands)))[0]

    return [first.over(change, axes=axes)]


def _alike(operands: list[Any]) -> bool:
    """True if all are quantized in one way, and can be put beside one another."""
    first = operands[0]
    if not all(map(is_quantized, operands)):
        return False
    if first.input_range is not None and first.input_range.ndim > 1:
        return False  # a range for each layer, whose axis a join may move

    def kind(t: QTensor) -> Any:
        bounds = None if t.input_range is None else t.input_range.shape
        return t.spec, t.axes, t.master is None, bounds

    return all(kind(t) == kind(first) for t in operands)


def _as_groups(operands: list[QTensor], along: int) -> bool:
    """True if each array becomes a group, or several, of the joined one's last shared axis."""
    sizes = {(t.shape[along], t.groups) for t in operands}
    return len(sizes) == 1 and along - operands[0].ndim == max(operands[0].axes)


_OF_SEVERAL = JOINS | {"optimization_barrier"}

_OF_NUMBERS = "no rule for it"
_OF_AXES = "axes that share a scale, or a group of them, would be cut or mixed"
_OF_KINDS = "kernels are joined if quantized in one way, along what is summed over in equal parts"

_VIEWS: list[tuple[Collection[str], Callable[[Site, list[Any]], list[Any] | None], str]] = [
    (JOINS, _joined, _OF_KINDS),
    (SHAPED | CUTS, _shaped, _OF_AXES),
    (PLACED, _placed, _OF_NUMBERS),
    (["optimization_barrier"], _barred, _OF_NUMBERS),
    (["convert_element_type"], _cast, "arrays of that dtype have no codes"),
    (["unit_scale", "unit_scale_by"], _scaled, "the factor differs between what shares a scale"),
    (["reduce_precision"], _rounded, _OF_NUMBERS),
    (["straight_through"], _carried, "it is the carrier of another value"),
]
"""How codes move, and why they would not, by primitive; other moves are made `_in_place`."""


def _row(name: str) -> tuple[Callable[[Site, list[Any]], list[Any] | None], str]:
    found = [(make, why) for names, make, why in _VIEWS if name in names]
    return found[0] if found else (_in_place, _OF_NUMBERS)
