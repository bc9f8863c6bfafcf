"""Which axes an operation makes the same dimension: one rule per primitive.

    dot_general   contracted pairs and batch pairs are unified; batch and free axes go on

A rule takes an equation and the axes of its operands, unifies and marks, and returns the axes of
the results. A primitive without a rule marks everything it touches, which is always safe.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from unitscale_jax.trace.dimensions._factors import (
    UNIT,
    Axes,
    Axis,
    expanded,
    new_axes,
    new_axis,
    pieces,
    pin,
    reshaped,
    size,
    unify,
)
from unitscale_jax.trace.program._compat import Equation, shape_of
from unitscale_jax.trace.program._primitives import (
    CUMULATIVE,
    DEVICE_REDUCTIONS,
    ELEMENTWISE,
    REDUCTIONS,
    SCATTERS,
    WINDOWS,
    moved_axes,
)
from unitscale_jax.trace.program._walk import Site

Rule: TypeAlias = Callable[[Equation, list[Axes]], Sequence[Axes]]

# ----------------------------------------------------------------------- what most rules share


def shapes(eqn: Equation) -> list[Sequence[int]]:
    """Shapes of the results, one per output."""
    return [shape_of(v) for v in eqn.outvars]


def others(rank: int, *taken: Sequence[int]) -> list[int]:
    """The axes of a value of that rank that are not taken."""
    return [k for k in range(rank) if not any(k in axes for axes in taken)]


def opaque(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    """Couples nothing and pins every axis: safe for any primitive."""
    why = eqn.primitive.name
    for axes in ins:
        pin(axes, why)
    return [new_axes(sizes, why) for sizes in shapes(eqn)]


def _same(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    """Every result has the axes of the operand at its place."""
    return ins[: len(eqn.outvars)]


def _lined_up(values: Sequence[Axes], but: Sequence[int] = ()) -> Axes:
    """Axes of several values of one rank, which are the same but for some, and but for size 1."""
    out = list(values[0])
    for axes in values[1:]:
        for k in others(len(out), but):
            if size(out[k]) == size(axes[k]):
                unify(out[k], axes[k])
            elif size(out[k]) == 1:
                out[k] = axes[k]
    return tuple(out)


def _kept_sizes(eqn: Equation, axes: Axes, sizes: Sequence[int], but: Iterable[int] = ()) -> Axes:
    """The axes that an operation leaves alone; those of another size, and some, it touches."""
    why, but = eqn.primitive.name, set(but)
    pin([axes[k] for k in but], why)
    return tuple(
        new_axis(n, why) if k in but else cut_to(axis, n, why)
        for k, (axis, n) in enumerate(zip(axes, sizes, strict=True))
    )


def cut_to(axis: Axis, n: int, why: str) -> Axis:
    """The axis itself if it has `n` positions; else one that says nothing of it."""
    if size(axis) == n:
        return axis
    pin([axis], why)
    return new_axis(n, why)


# ----------------------------------------------------------------------------------- the rules


def _elementwise(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    rank = len(shapes(eqn)[0])
    return [_lined_up([axes for axes in ins if len(axes) == rank])]  # others are scalars


def _tile(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    """Copies of an axis are an axis of their own and the old one, joined as by a reshape."""

    def repeated(axis: Axis, times: int) -> Axis:
        if len(expanded(axis)) > 1:
            return axis * times  # a sum does not distribute over what precedes it
        (copies,), (term,) = new_axis(times, "tile"), axis
        return ((*copies, *term),)

    return [tuple(map(repeated, ins[0], eqn.params["reps"]))]


def _bitcast(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    """Numbers of another width are in other positions, and tied to no axis."""
    return _same(eqn, ins) if shape_of(eqn.invars[0]) == shapes(eqn)[0] else opaque(eqn, ins)


def _moved(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    """Axes in another order; one that is new, or that repeats a single position, is another."""
    out = list(new_axes(shapes(eqn)[0]))
    for k, source in enumerate(moved_axes(Site(eqn, 0))):
        if source and size(ins[0][source[0]]) == size(out[k]):
            out[k] = ins[0][source[0]]
    return [tuple(out)]


def _reshape(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    return [reshaped(ins[0], shapes(eqn)[0])]


def _dot_general(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    x, y = ins[:2]
    for a, b in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        unify(x[a], y[b])
    free, free_too = others(len(x), left, left_batch), others(len(y), right, right_batch)
    return [tuple([x[k] for k in (*left_batch, *free)] + [y[k] for k in free_too])]


def _ragged_dot(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    """Rows (m, k) by the kernels (g, k, n) of their groups, whose number is that of the sizes."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (left, right), batch = numbers.dot_dimension_numbers
    rows, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    if any(batch) or len(rows) != 1 or len(groups) != 1 or len(ins[2]) != 1 or rows[0] in left:
        return opaque(eqn, ins)
    x, y, sizes = ins
    for a, b in zip(left, right, strict=True):
        unify(x[a], y[b])
    unify(y[groups[0]], sizes[0])
    pin([x[rows[0]], sizes[0]], "groups of rows")
    free, free_too = others(len(x), left), others(len(y), right, groups)
    return [tuple([x[k] for k in free] + [y[k] for k in free_too])]


def _conv(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    """Channels in and out are (groups, in a group); a depthwise one has one channel in a group."""
    dims, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    (n, c, *space), (o, i, *window), (on, oc, *_) = dims.lhs_spec, dims.rhs_spec, dims.out_spec
    x, kernel = ins
    pin([x[k] for k in space] + [kernel[k] for k in window], "window")
    if eqn.params["batch_group_count"] != 1:
        pin([x[n], kernel[o]], "batch groups")
    # Group g computes its output channels from its own input channels: the groups of both are one
    # dimension, and the kernel's input axis has the channels of one group.
    of_in, in_group = reshaped((x[c],), (groups, size(x[c]) // groups))
    of_out, _ = reshaped((kernel[o],), (groups, size(kernel[o]) // groups))
    unify(in_group, kernel[i])
    unify(of_in, of_out)
    out = list(new_axes(shapes(eqn)[0], "window"))
    out[on], out[oc] = cut_to(x[n], size(out[on]), "batch groups"), kernel[o]
    return [tuple(out)]


def _reduce(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    out = tuple(ins[0][k] for k in others(len(ins[0]), eqn.params["axes"]))
    return [out for _ in eqn.outvars]


def _concatenate(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    at = eqn.params["dimension"]
    out = list(_lined_up(ins, [at]))
    out[at] = tuple(term for axes in ins for term in expanded(axes[at]) if size(axes[at]))
    return [tuple(out)]


def _split(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    at = eqn.params["axis"]
    parts = pieces(ins[0][at], eqn.params["sizes"])
    return [(*ins[0][:at], part, *ins[0][at + 1 :]) for part in parts]


def _slice(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    starts, ends, strides = (
        eqn.params[key] for key in ("start_indices", "limit_indices", "strides")
    )

    def sliced(axis: Axis, start: int, end: int, stride: int) -> Axis:
        if stride != 1 or start == end:
            return cut_to(axis, -(-(end - start) // stride), "stride")
        sizes = [n for n in (start, end - start, size(axis) - end) if n]
        if len(sizes) == 1:
            return axis
        return pieces(axis, sizes)[1 if start else 0]

    strides = strides or [1] * len(starts)
    return [tuple(map(sliced, ins[0], starts, ends, strides))]


def _stack(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    at, out = eqn.params["axis"], _lined_up(ins)
    return [(*out[:at], UNIT * len(ins), *out[at:])]


def _unstack(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    at = eqn.params["axis"]
    pieces(ins[0][at], [1] * len(eqn.outvars))
    return [(*ins[0][:at], *ins[0][at + 1 :]) for _ in eqn.outvars]


def _gather(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    """Whole slices go on, and so does what the indices are laid out along."""
    dims, (x, indices) = eqn.params["dimension_numbers"], ins
    batch, along = dims.operand_batching_dims, dims.start_indices_batching_dims
    for k, j in zip(batch, along, strict=True):
        unify(x[k], indices[j])
    pin([x[k] for k in dims.collapsed_slice_dims] + [indices[-1]], "gather")
    mine = others(len(x), dims.collapsed_slice_dims, batch)
    sizes = eqn.params["slice_sizes"]
    window = [cut_to(x[k], sizes[k], "gather") for k in mine]
    return [_interleaved(dims.offset_dims, window, indices[:-1])]


def _interleaved(at: Sequence[int], those: Sequence[Axis], rest: Sequence[Axis]) -> Axes:
    """Axes `those` at positions `at`, and the rest in order where there is room."""
    placed, remaining = dict(zip(at, those, strict=True)), iter(rest)
    return tuple(
        placed[k] if k in placed else next(remaining) for k in range(len(those) + len(rest))
    )


def _scatter(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    dims, (x, indices, updates) = eqn.params["dimension_numbers"], ins
    inserted, batch = dims.inserted_window_dims, dims.operand_batching_dims
    for k, j in zip(batch, dims.scatter_indices_batching_dims, strict=True):
        unify(x[k], indices[j])
    pin([x[k] for k in inserted] + [indices[-1]], "scatter")
    for k, j in zip(others(len(x), inserted, batch), dims.update_window_dims, strict=True):
        _both(x[k], updates[j], "scatter")
    scattered = others(len(updates), dims.update_window_dims)
    for j, axis in zip(scattered, indices[:-1], strict=True):
        unify(updates[j], axis)
    return [x]


def _both(x: Axis, part: Axis, why: str) -> None:
    """Unifies two axes of one size; of two sizes one is a part of the other, at some place."""
    if size(x) == size(part):
        unify(x, part)
    else:
        pin([x, part], why)


def _dynamic_slice(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    return [_kept_sizes(eqn, ins[0], shapes(eqn)[0])]


def _dynamic_update_slice(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    del eqn
    for x, part in zip(*ins[:2], strict=True):
        _both(x, part, "dynamic_update_slice")
    return ins[:1]


def _sort(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    at, axes = eqn.params["dimension"], _lined_up(ins)
    return [_kept_sizes(eqn, axes, sizes, [at]) for sizes in shapes(eqn)]


def _top_k(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    at = eqn.params.get("axis", -1) % len(ins[0])
    return [_kept_sizes(eqn, ins[0], sizes, [at]) for sizes in shapes(eqn)]


def _along(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    return [_kept_sizes(eqn, ins[0], shapes(eqn)[0], [eqn.params["axis"]])]


def _rev(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    return [_kept_sizes(eqn, ins[0], shapes(eqn)[0], eqn.params["dimensions"])]


def _pad(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    padded = [k for k, how in enumerate(eqn.params["padding_config"]) if any(how)]
    return [_kept_sizes(eqn, ins[0], shapes(eqn)[0], padded)]


def _window(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    names = ("window_dimensions", "window_strides", "base_dilation", "padding")
    alone = (1, 1, 1, (0, 0))  # a position that is a window of its own
    hows = zip(*(eqn.params[name] for name in names), strict=True)
    wide = [k for k, how in enumerate(hows) if how != alone]
    return [_kept_sizes(eqn, ins[0], shapes(eqn)[0], wide)]


def _iota(eqn: Equation, ins: list[Axes]) -> list[Axes]:
    (sizes,), at = shapes(eqn), eqn.params["dimension"]
    del ins
    return [tuple(new_axis(n, *["iota"] * (k == at)) for k, n in enumerate(sizes))]


ALIKE = DEVICE_REDUCTIONS | {"optimization_barrier", "ppermute", "pbroadcast"}
"""Every result has the shape of the operand at its place, and zeros where that has them."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(ALIKE, _same),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(CUMULATIVE, _along),
    **dict.fromkeys(WINDOWS, _window),
    **dict.fromkeys(SCATTERS, _scatter),
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _moved,
    "concatenate": _concatenate,
    "conv_general_dilated": _conv,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "ragged_dot_general": _ragged_dot,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _moved,
    "stack": _stack,
    "tile": _tile,
    "top_k": _top_k,
    "transpose": _moved,
    "unstack": _unstack,
}
