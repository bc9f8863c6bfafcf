"""A product with a quantized operand: what is folded, what is quantized, and what is refused."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.formats import round_to_dtype
from unitscale_jax.mesh_axes import varying_axes
from unitscale_jax.quant._gradient import refusals, straight_through
from unitscale_jax.quant._lsq import Trained, carrier
from unitscale_jax.quant._ops import (
    asymmetric,
    bounds_of,
    ends_of,
    repeat_groups,
    round_and_cast,
    shared,
    symmetric,
)
from unitscale_jax.quant._qtensor import QTensor, is_quantized, value_of
from unitscale_jax.quant._served import EXACT, Unquantizable, grouped, reach, varying
from unitscale_jax.quant._spec import DotSpec, QSpec
from unitscale_jax.trace.params import (
    Conv,
    DeviceSum,
    Dot,
    Product,
)
from unitscale_jax.trace.rewrite import noted, operand_enters
from unitscale_jax.typing import Key

INT32 = 2**31


@dataclass(frozen=True)
class ProductReport:
    """How a product is computed, for `explain`; `kept` says why it is in floating point."""

    compute: str
    across: bool = False  # the devices' integers are summed
    terms: int = 0
    bound: int = 0  # K Qx Qw
    kept: str = ""
    backward: tuple[str, ...] = ()  # why a derivative that was to be quantized is not


def multiply(
    product: Product,
    left: Any,
    right: Any,
    spec: DotSpec,
    key: Key | None = None,
    draws: Key | None = None,
    across: DeviceSum | None = None,
) -> tuple[jax.Array, ProductReport]:
    """The product of two operands, at least one of them quantized, by a spec.

    Args:
        product: Which dimensions meet.
        left: A float array or a `QTensor`.
        right: Likewise.
        spec: How the other operand is quantized, and the form of the computation.
        key: Draws for a stochastic backward pass.
        draws: Draws for a float operand that is quantized stochastically.
        across: The sum over devices that ends the product; they share scales then, and integers are
            summed as integers, which the verdict says.

    Raises:
        Unquantizable: int32 cannot hold the sum.
    """
    sides = [left, right]
    for side in (0, 1):
        sides = _folded(product, sides, side) or sides
    sides = [_settled(product, side, operand) for side, operand in enumerate(sides)]
    if not any(map(is_quantized, sides)):
        values = [value.astype(t) for value, t in zip(sides, product.site.operands, strict=False)]
        kept = "kept: scales cross the sum"
        with noted(quantize=kept):
            return product.as_traced(*values), ProductReport("float", kept=kept)
    if spec.x is not None and not all(map(is_quantized, sides)):
        open_side = 1 if is_quantized(sides[0]) else 0
        held = sides[1 - open_side]
        x = sides[open_side]
        how = spec.x if draws is None else replace(spec.x, rounding="stochastic")
        learned = isinstance(held, Trained)
        sides[open_side] = activation(
            product,
            open_side,
            x,
            how,
            held.input_range,
            draws,
            learned=learned,
            over=axes_of(across),
        )
    if across is not None and _sums_codes(product, sides, spec, across):
        # Sums of codes that are kept with a parameter are of all devices.
        sides = [replace(t, code_sums=None) for t in sides]
        product = replace(product, across=across)
    verdict = _verdict(product, sides, spec)
    product = replace(product, note=_note(verdict, spec))
    if spec.g is not None:
        verdict = replace(verdict, backward=refusals(product, sides, spec, multiply))
    return straight_through(product, sides, spec, key, multiply), verdict


def activation(
    product: Product,
    side: int,
    x: jax.Array,
    spec: QSpec,
    input_range: jax.Array | None = None,
    key: Key | None = None,
    *,
    learned: bool = False,
    over: Sequence[str] = (),
) -> QTensor:
    """A float operand as codes; a scale for each row, or for what was calibrated or learned.

    `over` are manual mesh axes that the rows are split over.
    """
    axes = product.contracted(side)
    with operand_enters():
        v = jax.lax.stop_gradient(x)
    v, master = round_to_dtype(v), x
    if input_range is not None:
        flat = [1] * x.ndim
        finite = jnp.all(jnp.isfinite(v), axis=axes, keepdims=True)
        given = lambda b: shared(jnp.where(finite, b.reshape(flat), np.float32(np.nan)), over)
        bounds, clips = (-given(-input_range[..., 0]), given(input_range[..., 1])), True
    elif spec.symmetric:
        m = bounds_of(v, axes, spec, over=over)
        bounds, clips = (None, m), spec.clips
    else:
        bounds, clips = ends_of(v, axes, spec, over), spec.clips
    low, high = bounds
    if learned and low is not None and high is not None:
        step = jnp.maximum(-low, high) * np.float32(1 / spec.max_code)
        master = carrier(x, step, spec.max_code, math.prod(x.shape[a] for a in axes))
        low, high = jax.lax.stop_gradient((low, high))
    elif clips:
        inside = (jnp.abs(v) <= high) if low is None else (low <= v) & (v <= high)
        master = jnp.where(inside, x, jax.lax.stop_gradient(x))
    quiet = DotSpec(w=replace(spec, rounding="nearest", axes=None))
    statics = dict(spec=quiet, axes=tuple(a - x.ndim for a in axes), dtype=np.dtype(x.dtype))
    if not spec.symmetric:
        codes, scale, point = asymmetric(v, -high if low is None else low, high, spec)
        return QTensor(codes, scale, point, master=master, **statics)
    m = high if low is None else jnp.maximum(-low, high)
    codes, scale = symmetric(v, m, spec, key)
    return QTensor(codes, scale, master=master, **statics)


def _folded(product: Product, sides: list[Any], side: int) -> list[Any] | None:
    """Both operands, the scale of one that varies along the sum multiplied into the other.

    sum_k (x_k s_k) q_k: the same algebra, with one rounding of x s.
    """
    t, other = sides[side], sides[1 - side]
    if not is_quantized(t) or is_quantized(other) or t.zero_point is not None:
        return None
    if not varying(product, side, t) or grouped(product, side, t):
        return None
    by = _across(product, side, t, other)
    if by is None:
        return None
    moved = round_and_cast(round_to_dtype(other) * by, other.dtype)
    ones = jnp.ones([1] * t.ndim, jnp.float32)
    rest = replace(t, scale=ones, spec=replace(t.spec, w=replace(t.spec.w, group=None)))
    if t.master is not None:
        rest = replace(rest, master=_unscaled(t))
    out = [moved, rest]
    return out if side == 1 else out[::-1]


def _across(product: Product, side: int, t: QTensor, other: jax.Array) -> jax.Array | None:
    """The scale laid out like the other operand; None if that does not have its dimensions."""
    if isinstance(product, Dot):
        return _across_dot(product, side, t, other)
    if not isinstance(product, Conv) or product.site.eqn.params["feature_group_count"] != 1:
        return None
    specs = product.numbers.lhs_spec, product.numbers.rhs_spec
    (kept, mine, *_), theirs = specs[side], specs[1 - side][1]
    if t.scale.shape[kept] != 1 or varying(product, side, t) != [mine]:
        return None
    full = repeat_groups(t.scale, [n if d == mine else 1 for d, n in enumerate(t.shape)])
    return full.reshape([full.size if d == theirs else 1 for d in range(other.ndim)])


def _across_dot(product: Dot, side: int, t: QTensor, other: jax.Array) -> jax.Array | None:
    """A scale along summed dimensions, as a factor of the operand that it is summed with.

    sum_k (s_k q_k) x_k = sum_k q_k (s_k x_k): a scale that differs along k cannot leave the sum,
    and may go to the other side instead, which has a dimension for each k and each batch. One that
    differs along a dimension of this side alone has no place there.
    """
    if any(t.scale.shape[d] != 1 for d in product.free(side)):
        return None
    # Batch and contracted dimensions, none of the other's free ones.
    numbers = product.site.eqn.params["dimension_numbers"]
    mine = [*numbers[1][side], *numbers[0][side]]
    theirs = [*numbers[1][1 - side], *numbers[0][1 - side]]
    whole = [1 if one == 1 else n for one, n in zip(t.scale.shape, t.shape, strict=True)]
    by = repeat_groups(t.scale, whole)
    by = by.transpose(*mine, *product.free(side))
    by = by.reshape(by.shape[: len(mine)])
    # `broadcast_in_dim` takes dimensions in ascending order only.
    order = sorted(range(len(theirs)), key=lambda k: theirs[k])
    by = by.transpose(order)
    return jax.lax.broadcast_in_dim(by, _embedded(by, other, sorted(theirs)), sorted(theirs))


def _embedded(by: jax.Array, other: jax.Array, dims: list[int]) -> list[int]:
    sizes = dict(zip(dims, by.shape, strict=True))
    return [sizes.get(d, 1) for d in range(other.ndim)]


def _unscaled(t: QTensor) -> jax.Array:
    """The master of codes whose scale is elsewhere."""
    return (round_to_dtype(t.master) / repeat_groups(t.scale, t.shape)).astype(t.master.dtype)


def _settled(product: Product, side: int, t: Any) -> Any:
    """An operand whose scale still crosses the sum, dequantized."""
    if not is_quantized(t) or not varying(product, side, t) or grouped(product, side, t):
        return t
    return value_of(t)


def axes_of(across: DeviceSum | None) -> tuple[str, ...]:
    """The mesh axes of a sum over devices; of none there are none."""
    return () if across is None else across.axes


def _sums_codes(product: Product, sides: list[Any], spec: DotSpec, across: DeviceSum) -> bool:
    """Whether devices can sum integers: one scale belongs to all that are summed."""
    if spec.compute == "dequant" or not all(map(is_quantized, sides)):
        return False
    if not all(t.spec.w.is_integer for t in sides):
        return False
    own = any(varying_axes(t.scale) & set(across.axes) for t in sides)
    return not own and not any(grouped(product, side, t) for side, t in enumerate(sides))


def _verdict(product: Product, sides: list[Any], spec: DotSpec) -> ProductReport:
    if not all(map(is_quantized, sides)):
        return ProductReport("float x codes", terms=product.terms)
    if not sides[0].spec.w.is_integer:
        return ProductReport(spec.compute, terms=product.terms)
    tiles = [t.groups for side, t in enumerate(sides) if grouped(product, side, t)]
    devices = 1 if product.across is None else product.across.terms
    terms = product.terms * devices // max(tiles, default=1)
    # With a zero point the correction is as large again, and their difference must fit too.
    largest = [reach(t) if t.spec.w.symmetric else t.spec.w.reach for t in sides]
    bound = terms * largest[0] * largest[1]
    if bound >= INT32 and spec.compute != "dequant":
        most = (INT32 - 1) // (largest[0] * largest[1])
        raise Unquantizable(
            f"sums {terms} products of codes up to {largest[0]} and {largest[1]}, which int32 may "
            f"not hold (the most is {most}). Use fewer bits, groups with free scales, or "
            'compute="dequant".'
        )
    return ProductReport(spec.compute, product.across is not None, terms, bound)


def _note(verdict: ProductReport, spec: DotSpec) -> dict[str, Any]:
    """What `explain` shows of a product: how long its sums are, and how near to the bounds."""
    ends = lambda s: f"±{s.max_code:g}" if s.symmetric else f"[{-s.max_code - 1}, {s.max_code}]"
    note = {"codes": f"{'float' if spec.x is None else ends(spec.x)} x {ends(spec.w)}"}
    note |= {"K": verdict.terms} | ({"sum": "int32 over devices"} if verdict.across else {})
    if verdict.bound:
        exact = ", exact in float32" if verdict.bound <= EXACT else ""
        note |= {"bound": f"{verdict.bound / INT32:.2%} of int32{exact}"}
    return note
