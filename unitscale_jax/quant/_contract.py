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
from unitscale_jax.trace.params import Conv, DeviceSum, Dot, Product
from unitscale_jax.trace.rewrite import noted, operand_enters
from unitscale_jax.typing import Key

INT32 = 2**31


@dataclass(frozen=True)
class ProductReport:
    """The form that a product is computed in, for `explain`.

    Attributes:
        compute: The form: "int", "float_exact", "dequant", "float x codes" or "float".
        across: Whether the integers of several devices are summed.
        terms: K, how many products are summed.
        bound: K Qx Qw, the largest magnitude that the sum of integers can have.
        kept: Why it is in floating point, empty if it is not.
        backward: Why a derivative that was to be quantized is not, operand by operand.
    """

    compute: str
    across: bool = False
    terms: int = 0
    bound: int = 0
    kept: str = ""
    backward: tuple[str, ...] = ()


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
    sides = _outside_the_sum(product, [left, right])
    if not any(map(is_quantized, sides)):
        values = [value.astype(t) for value, t in zip(sides, product.site.operands, strict=False)]
        kept = "kept: scales cross the sum"
        with noted(quantize=kept):
            return product.as_traced(*values), ProductReport("float", kept=kept)
    if spec.x is not None and not all(map(is_quantized, sides)):
        side = 1 if is_quantized(sides[0]) else 0
        x, t = sides[side], sides[1 - side]
        how = spec.x if draws is None else replace(spec.x, rounding="stochastic")
        learned, over = isinstance(t, Trained), axes_of(across)
        sides[side] = activation(
            product, side, x, how, t.input_range, draws, learned=learned, over=over
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
    """A float operand as codes: a scale for each row, or the scale that was calibrated or learned.

    The result's master array is what takes the gradient of the codes: x itself, barred where x lies
    beyond a range that clips.

    Args:
        product: The product that the operand enters; scales are shared over its contracted axes.
        side: 0 for the left operand, 1 for the right one.
        x: The operand, floating.
        spec: How it is quantized.
        input_range: float32 (.., 2), what was calibrated or learned; None takes the range of x.
        key: Draws of stochastic rounding.
        learned: Whether the range is trained, so that gradients reach it.
        over: Manual mesh axes that the rows are split over.
    """
    axes = product.contracted(side)
    with operand_enters():
        v = jax.lax.stop_gradient(x)
    v, master = round_to_dtype(v), x
    if input_range is not None:
        flat = [1] * x.ndim
        finite = jnp.all(jnp.isfinite(v), axis=axes, keepdims=True)

        def given(b: jax.Array) -> jax.Array:
            # A given range does not look at x, and would clip an infinity to a plain number.
            return shared(jnp.where(finite, b.reshape(flat), np.float32(np.nan)), over)

        # `shared` takes the largest of all devices: of a lower end that is the least of -low.
        bounds, clips = (-given(-input_range[..., 0]), given(input_range[..., 1])), True
    elif spec.symmetric:
        m = bounds_of(v, axes, spec, over=over)
        bounds, clips = (None, m), spec.clips
    else:
        bounds, clips = ends_of(v, axes, spec, over), spec.clips
    low, high = bounds
    if learned and low is not None and high is not None:
        # The carrier is the one way by which gradients reach a learned scale: s = m / Q here, and
        # the codes below are of a range that has no derivative.
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


def _outside_the_sum(product: Product, operands: list[Any]) -> list[Any]:
    """Both operands without a scale that varies along the sum, groups aside.

    Such a scale goes into the other operand, if that is a float array with these dimensions; else
    its codes become an array again. A kernel (4, 3) whose scales (4, 1) are of its inputs, as a
    table that is also the output layer, takes the first way: x s, then codes with scales (1, 1).
    """
    sides = operands
    for side in (0, 1):
        sides = _folded(product, sides, side) or sides
    return [
        value_of(t) if is_quantized(t) and _crosses(product, side, t) else t
        for side, t in enumerate(sides)
    ]


def _crosses(product: Product, side: int, t: QTensor) -> bool:
    """True if a scale varies along the sum and is no scale of groups, which are summed by tiles."""
    return bool(varying(product, side, t)) and not grouped(product, side, t)


def _folded(product: Product, sides: list[Any], side: int) -> list[Any] | None:
    """Both operands, the scale of one that varies along the sum multiplied into the other.

    sum_k (x_k s_k) q_k: the same algebra, with one rounding of x s.
    """
    t, other = sides[side], sides[1 - side]
    if not is_quantized(t) or is_quantized(other) or t.zero_point is not None:
        return None
    if not _crosses(product, side, t):
        return None
    by = _across(product, side, t, other)
    if by is None:
        return None
    moved = round_and_cast(round_to_dtype(other) * by, other.dtype)
    ones = jnp.ones([1] * t.ndim, jnp.float32)
    rest = replace(t, scale=ones, spec=replace(t.spec, w=replace(t.spec.w, group=None)))
    if t.master is not None:  # it is what the codes stand for, and their scale is elsewhere now
        unscaled = round_to_dtype(t.master) / repeat_groups(t.scale, t.shape)
        rest = replace(rest, master=unscaled.astype(t.master.dtype))
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
    numbers = product.site.eqn.params["dimension_numbers"]
    mine = [*numbers[1][side], *numbers[0][side]]
    theirs = [*numbers[1][1 - side], *numbers[0][1 - side]]
    whole = [1 if one == 1 else n for one, n in zip(t.scale.shape, t.shape, strict=True)]
    by = repeat_groups(t.scale, whole)
    # A dimension for each pair of the two sides, in the order of `mine`; the free dimensions of
    # this side have size 1 and are dropped.
    by = by.transpose(*mine, *product.free(side))
    by = by.reshape(by.shape[: len(mine)])
    # `mine[k]` meets `theirs[k]`, so sorting by `theirs` lays the scale along the other operand;
    # `broadcast_in_dim` takes dimensions in ascending order only.
    order = sorted(range(len(theirs)), key=lambda k: theirs[k])
    by = by.transpose(order)
    sizes = dict(zip(sorted(theirs), by.shape, strict=True))
    full = [sizes.get(d, 1) for d in range(other.ndim)]
    return jax.lax.broadcast_in_dim(by, full, sorted(theirs))


def axes_of(across: DeviceSum | None) -> tuple[str, ...]:
    """The mesh axes of a sum over devices; of none there are none."""
    return () if across is None else across.axes


def _sums_codes(product: Product, sides: list[Any], spec: DotSpec, across: DeviceSum) -> bool:
    """True if devices can sum integers, which needs one scale for all that are summed."""
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
    # |acc| <= K Qx Qw for symmetric codes. With a zero point the products of codes are corrected by
    # sums that are as large again, and the difference must fit too: so a factor counts as large as
    # a code less its zero point can be, 2^b - 1.
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
    """Notes for `explain`: the codes of a product, the length of its sums, how near the bounds are.

    An example is {"codes": "±127 x ±127", "K": 512, "bound": "0.38% of int32, exact in float32"}.
    """

    def ends(s: QSpec) -> str:
        return f"±{s.max_code:g}" if s.symmetric else f"[{-s.max_code - 1}, {s.max_code}]"

    note = {"codes": f"{'float' if spec.x is None else ends(spec.x)} x {ends(spec.w)}"}
    note |= {"K": verdict.terms} | ({"sum": "int32 over devices"} if verdict.across else {})
    if verdict.bound:
        exact = ", exact in float32" if verdict.bound <= EXACT else ""
        note |= {"bound": f"{verdict.bound / INT32:.2%} of int32{exact}"}
    return note
