"""Identities whose two passes differ.

    y = fwd · x,    x̄ = bwd · ȳ          `scale`
    y = value,      carrier̄ = ȳ          `straight_through`
    y = x,          x̄ = ȳ                `mark`, which an analysis finds again in both passes
    y = x,          x̄ = round(ȳ)         `round_bwd`

They are JAX primitives, for three reasons: `custom_vjp` has no forward mode and no hessian, a
`stop_gradient` composition rounds (c + (v - c) is not v, and NaN at infinity), and a primitive
stays visible in the jaxpr (`unit_scale[bwd=3.0 fwd=2.0]`), to be proved about, folded, counted.
Backward factors of their own: unit scaling, https://arxiv.org/abs/2303.11257; straight-through
estimators: https://arxiv.org/abs/1308.3432.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from unitscale_jax.errors import check_key
from unitscale_jax.formats import Format, FormatLike, format_of, round_to
from unitscale_jax.mesh_axes import axes_of, varying
from unitscale_jax.typing import Array, Key

__all__ = [
    "mark",
    "round_bwd",
    "scale",
    "scale_bwd",
    "scale_fwd",
    "straight_through",
]


def __dir__() -> list[str]:
    """What tab completion offers: the public names, and nothing that this file imports."""
    return [*__all__, "__all__", "__doc__", "__name__"]


Factor: TypeAlias = float | Array
"""A number known when the function is traced, or data: an array of rank 0."""


def scale(x: Array, *, fwd: Factor = 1.0, bwd: Factor = 1.0) -> jax.Array:
    """Multiplies values by `fwd` on the way forward and cotangents by `bwd` on the way back.

    Tangents of forward mode are multiplied by `fwd`, as the values are. Two scales in a row are the
    scale by the products; factors of 1 add nothing to the program. Works under every transform of
    JAX, second derivatives included; a hessian multiplies by `bwd` once per reverse pass.

    Args:
        x: Floating-point numbers of any shape.
        fwd: Factor of the values, in the dtype of x; a Python number is static, an array is data.
        bwd: Factor of the cotangents, likewise. Factors that are data have no gradient.

    Returns:
        An array of the shape and dtype of x.

    Raises:
        TypeError: x is not floating point.
        ValueError: A static factor is not finite, or one that is data is not of rank 0.

    Example:
        >>> y, pull = jax.vjp(lambda x: scale(x, fwd=2.0, bwd=3.0), jnp.float32(5.0))
        >>> y.item(), pull(jnp.float32(1.0))[0].item()
        (10.0, 3.0)
        >>> jax.make_jaxpr(lambda x: scale(x, bwd=3.0))(1.0)
        { lambda ; a:f32[]. let b:f32[] = unit_scale[bwd=3.0 fwd=1.0] a in (b,) }
    """
    x = _floating(x, "scale")
    if _is_static(fwd) and _is_static(bwd):
        return _scale_static(x, fwd=_finite("fwd", fwd), bwd=_finite("bwd", bwd))
    return _scale_data(*_same_axes(x, _scalar("fwd", fwd, x), _scalar("bwd", bwd, x)))


def scale_fwd(x: Array, factor: Factor) -> jax.Array:
    """Multiplies values, and leaves cotangents as they are.

    Example:
        >>> jax.value_and_grad(lambda x: scale_fwd(x, 2.0))(5.0)[1].item()
        1.0
    """
    return scale(x, fwd=factor)


def scale_bwd(x: Array, factor: Factor) -> jax.Array:
    """Multiplies cotangents, and leaves values as they are.

    Example:
        >>> value, grad = jax.value_and_grad(lambda x: scale_bwd(x, -2.0))(5.0)
        >>> value.item(), grad.item()
        (5.0, -2.0)
    """
    return scale(x, bwd=factor)


def straight_through(value: Array, carrier: Array) -> jax.Array:
    """The value forward, to the bit; its derivative is that of `carrier`.

    Args:
        value: What the forward pass sees, such as a rounded number; it receives no gradient.
        carrier: What takes the whole gradient, such as that number before it was rounded.

    Returns:
        `value`.

    Raises:
        TypeError: The two differ in shape or dtype, or are not floating point.

    Example:
        >>> step = lambda x: straight_through(jnp.sign(x), x)
        >>> value, grad = jax.value_and_grad(lambda x: 3 * step(x) ** 2)(0.5)
        >>> value.item(), grad.item()
        (3.0, 6.0)
    """
    value, carrier = (_floating(x, "straight_through") for x in (value, carrier))
    if (value.shape, value.dtype) != (carrier.shape, carrier.dtype):
        raise TypeError(
            f"straight_through got a value {_label(value)} and a carrier {_label(carrier)}, and a "
            "cotangent of the one is to be one of the other. Cast or broadcast the carrier."
        )
    return straight_through_p.bind(*_same_axes(value, carrier))


def mark(x: Array, at: int, *, back: bool = False) -> jax.Array:
    """Leaves values and cotangents as they are, and both visible in the program by a number.

    The transpose of a mark is the mark with `back` turned. So in the equations of a gradient the
    value of x stands at `mark[at=at back=False]`, and its whole cotangent, the sum over all uses of
    the result, at `mark[at=at back=True]`: the gradient with respect to a zero added to x. A mark
    compiles to nothing. Whatever recomputes x (`jax.checkpoint`) shows its mark again.

    Args:
        x: Floating-point numbers of any shape.
        at: Number by which the mark is found; of marks with one number the program says no more.
        back: Whether x is a cotangent.

    Returns:
        x.

    Raises:
        TypeError: x is not floating point.

    Example:
        >>> jax.make_jaxpr(jax.grad(lambda x: mark(x, at=7)))(1.0)
        { lambda ; a:f32[]. let
            _:f32[] = mark[at=7 back=False] a
            b:f32[] = mark[at=7 back=True] 1.0:f32[]
          in (b,) }
    """
    return mark_p.bind(_floating(x, "mark"), at=at, back=back)


def round_bwd(x: Array, format: FormatLike, *, key: Key | None = None) -> jax.Array:
    """Rounds cotangents to a number format on the way back, and leaves values as they are.

    Tangents of forward mode pass as the values do. A derivative of the backward pass takes the
    rounding straight through. The format "f32" adds nothing to the program of a float32 array.

    Args:
        x: Floating-point numbers of any shape.
        format: As of `unitscale_jax.formats.round_to`, which rounds the cotangent.
        key: Rounds stochastically; data, without a gradient.

    Returns:
        `x`.

    Raises:
        TypeError: x is not floating point, or the key is not a typed one.
        ValueError: The format is unknown.

    Example:
        >>> y, pull = jax.vjp(lambda x: round_bwd(x, "e5m2"), jnp.float32(1.1))
        >>> round(y.item(), 4), pull(jnp.float32(1.1))[0].item()
        (1.1, 1.0)
    """
    x, target = _floating(x, "round_bwd"), format_of(format)
    if target == format_of("f32") and x.dtype != jnp.float64:
        return x
    if key is None:
        return round_bwd_p.bind(x, format=target, impl=None)
    check_key(key)
    bits = jax.random.key_data(key)  # as numbers, which every transform takes
    operands = _same_axes(x, bits)
    return round_bwd_p.bind(*operands, format=target, impl=str(jax.random.key_impl(key)))


# ------------------------------------------------------------------- factors that are static

unit_scale_p = Primitive("unit_scale")


def _scale_static(x: jax.Array, *, fwd: float, bwd: float) -> jax.Array:
    return x if fwd == bwd == 1.0 else unit_scale_p.bind(x, fwd=fwd, bwd=bwd)


def _multiply(x: jax.Array, *, fwd: float, bwd: float) -> jax.Array:
    del bwd
    return x if fwd == 1.0 else x * jnp.asarray(fwd, x.dtype)


def _transpose_static(cotangent: jax.Array, x: Any, *, fwd: float, bwd: float) -> list:
    del x
    return [_scale_static(cotangent, fwd=bwd, bwd=fwd)]  # back through the backward pass: swapped


def _batch_static(args: Sequence, dims: Sequence, **factors: float) -> tuple:
    return unit_scale_p.bind(args[0], **factors), dims[0]


unit_scale_p.def_impl(_multiply)
unit_scale_p.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(unit_scale_p, mlir.lower_fun(_multiply, multiple_results=False))
ad.deflinear2(unit_scale_p, _transpose_static)
batching.primitive_batchers[unit_scale_p] = _batch_static

# ------------------------------------------------------------------- factors that are data

unit_scale_by_p = Primitive("unit_scale_by")


def _scale_data(x: jax.Array, fwd: jax.Array, bwd: jax.Array) -> jax.Array:
    return unit_scale_by_p.bind(x, fwd, bwd)


def _multiply_data(x: jax.Array, fwd: jax.Array, bwd: jax.Array) -> jax.Array:
    del bwd
    return x * fwd


def _jvp_data(primals: Sequence, tangents: Sequence) -> tuple:
    (x, fwd, bwd), tangent = primals, tangents[0]
    out = _scale_data(x, fwd, bwd)
    # A zero of x is a zero of the result, which has its shape and dtype.
    return out, tangent if isinstance(tangent, ad.Zero) else _scale_data(tangent, fwd, bwd)


def _transpose_data(cotangent: Any, x: Any, fwd: jax.Array, bwd: jax.Array) -> list:
    del x
    if isinstance(cotangent, ad.Zero):
        return [None, None, None]
    return [_scale_data(cotangent, bwd, fwd), None, None]


def _batch_data(args: Sequence, dims: Sequence) -> tuple:
    x, *factors = _batched_first(args, dims, range(1))

    # A factor has rank 0, or the rank of x and axes of size 1: it broadcasts without a new rank.
    def aligned(f: Any, dim: int | None) -> Any:
        if dim is None and f.ndim == 0:
            return f
        rows = f[None] if dim is None else f
        return rows.reshape(rows.shape + (1,) * (x.ndim - rows.ndim))

    return _scale_data(x, *map(aligned, factors, dims[1:])), 0


unit_scale_by_p.def_impl(_multiply_data)
unit_scale_by_p.def_abstract_eval(lambda x, *_: x)
mlir.register_lowering(unit_scale_by_p, mlir.lower_fun(_multiply_data, multiple_results=False))
ad.primitive_jvps[unit_scale_by_p] = _jvp_data
ad.primitive_transposes[unit_scale_by_p] = _transpose_data
batching.primitive_batchers[unit_scale_by_p] = _batch_data

# ------------------------------------------------------------------- straight through

straight_through_p = Primitive("straight_through")


def _first(value: jax.Array, carrier: jax.Array) -> jax.Array:
    del carrier
    return value


def _jvp_through(primals: Sequence, tangents: Sequence) -> tuple:
    return straight_through_p.bind(*primals), tangents[1]


def _batch_through(args: Sequence, dims: Sequence) -> tuple:
    return straight_through_p.bind(*_batched_first(args, dims, range(2))), 0


straight_through_p.def_impl(_first)
straight_through_p.def_abstract_eval(_first)
mlir.register_lowering(straight_through_p, mlir.lower_fun(_first, multiple_results=False))
ad.primitive_jvps[straight_through_p] = _jvp_through
batching.primitive_batchers[straight_through_p] = _batch_through

# ------------------------------------------------------------------- marks

mark_p = Primitive("mark")


def _itself(x: jax.Array, *, at: int, back: bool) -> jax.Array:
    del at, back
    return x


def _transpose_mark(cotangent: jax.Array, x: Any, *, at: int, back: bool) -> list:
    del x
    return [mark_p.bind(cotangent, at=at, back=not back)]


def _batch_mark(args: Sequence, dims: Sequence, **number: Any) -> tuple:
    return mark_p.bind(args[0], **number), dims[0]


mark_p.def_impl(_itself)
mark_p.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(mark_p, mlir.lower_fun(_itself, multiple_results=False))
ad.deflinear2(mark_p, _transpose_mark)
batching.primitive_batchers[mark_p] = _batch_mark


# ------------------------------------------------------------------- rounded cotangents

round_bwd_p = Primitive("round_bwd")


def _value(x: jax.Array, *bits: jax.Array, format: Format, impl: str | None) -> jax.Array:
    del bits, format, impl
    return x


def _rounded(x: jax.Array, *bits: jax.Array, format: Format, impl: str | None) -> jax.Array:
    """What the cotangent becomes; leading axes of the bits but the last pair with those of x."""
    if not bits:
        return round_to(x, format)
    one = lambda x, bits: round_to(x, format, key=jax.random.wrap_key_data(bits, impl=impl))
    for _ in range(bits[0].ndim - 1):
        one = jax.vmap(one)
    return one(x, *bits)


def _jvp_rounded(primals: Sequence, tangents: Sequence, **how: Any) -> tuple:
    out, tangent = round_bwd_p.bind(*primals, **how), tangents[0]
    if isinstance(tangent, ad.Zero):
        return out, tangent
    return out, round_bwd_p.bind(tangent, *primals[1:], **how)


def _transpose_rounded(cotangent: Any, x: Any, *bits: jax.Array, **how: Any) -> list:
    del x
    none = [None] * len(bits)
    if isinstance(cotangent, ad.Zero):
        return [None, *none]
    # Forward mode through the backward pass: the rounded numbers, and tangents as they come.
    return [straight_through(_rounded(cotangent, *bits, **how), cotangent), *none]


def _batch_rounded(args: Sequence, dims: Sequence, **how: Any) -> tuple:
    # A key that the rows share is one for each row, as it is in a loop over the rows.
    return round_bwd_p.bind(*_batched_first(args, dims, range(len(args))), **how), 0


round_bwd_p.def_impl(_value)
round_bwd_p.def_abstract_eval(_value)
mlir.register_lowering(round_bwd_p, mlir.lower_fun(_value, multiple_results=False))
ad.primitive_jvps[round_bwd_p] = _jvp_rounded
ad.primitive_transposes[round_bwd_p] = _transpose_rounded
batching.primitive_batchers[round_bwd_p] = _batch_rounded

# ------------------------------------------------------------------- operands


def _batched_first(args: Sequence, dims: Sequence, required: Sequence[int]) -> list:
    """Moves batch axes to the front; the operands in `required` get one if they have none."""
    rows = next(x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None)
    moved = [
        x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(args, dims, strict=True)
    ]
    for i in required:
        if dims[i] is None:
            moved[i] = jnp.broadcast_to(args[i], (rows, *args[i].shape))
    return moved


def _floating(x: Array, name: str) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name} takes floating-point numbers, for others have no gradient, and got "
            f"{_label(x)}. Cast it to float32 first, or leave it out."
        )
    return x


def _is_static(factor: Factor) -> bool:
    return isinstance(factor, numbers.Real | np.generic)


def _finite(name: str, factor: Any) -> float:
    if not math.isfinite(factor):
        raise ValueError(f"{name}={factor} is not finite, and so would be no number of the result.")
    return float(factor)


def _scalar(name: str, factor: Factor, x: jax.Array) -> jax.Array:
    factor = jnp.asarray(factor)
    if factor.ndim:
        raise ValueError(
            f"{name} is {_label(factor)}; a factor that is data has rank 0. Use `jax.vmap` over "
            "the axis along which it changes."
        )
    return factor.astype(x.dtype)


def _label(x: jax.Array) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _same_axes(*xs: jax.Array) -> list[jax.Array]:
    """Operands of one primitive vary along the same axes; JAX sees to this only for its own."""
    return varying(list(xs), axes_of(xs))
