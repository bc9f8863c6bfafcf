"""Rounding to a format inside a JAX program, without changing the dtype of the array."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.formats._format import (
    FORMATS,
    Format,
    FormatLike,
    format_of,
    has_float32_exponent,
)
from unitscale_jax.typing import Array, DType, Key


def round_to(
    x: Array,
    format: FormatLike,
    *,
    key: Key | None = None,
    ties: Literal["even", "zero"] = "even",
) -> jax.Array:
    """Rounds to the nearest number of a format, or stochastically to one of the two neighbours.

    Values beyond the grid, infinities included, saturate; NaN stays NaN and the sign of a zero is
    kept. For values within it the result is that of a cast to `format.dtype` and back, to the bit,
    whatever the device does with subnormal float32 numbers. The exception is "f32", the grid of
    computation itself: it leaves x as it is and adds nothing to the program, unless x is float64.

    The gradient is zero, as a staircase's is; `unitscale_jax.fwd_bwd.straight_through` gives it
    that of the identity.

    Args:
        x: Floating-point numbers of any shape.
        format: A `Format`, its name or its dtype. Static.
        key: Rounds stochastically, up with the probability of the distance from below (to 2^-32 of
            a step), so that the mean of many draws is x. The same key draws the same bits.
        ties: Where a midpoint goes when there is no key: to the even neighbour, as hardware casts
            do, or toward zero.

    Returns:
        An array of the shape and dtype of x. Where its dtype does not hold the largest number of
        the format (float16 and "bf16"), values saturate at the largest that both hold.

    Raises:
        TypeError: x is not floating point.
        ValueError: The format or the tie rule is unknown.

    Example:
        >>> x = jnp.array([0.3, -17.5, 500.0, jnp.inf])
        >>> y = round_to(x, "e4m3fn")
        >>> y.tolist(), bool((round_to(y, "e4m3fn") == y).all())
        ([0.3125, -18.0, 448.0, 448.0], True)
        >>> draws = round_to(jnp.full(10_000, 0.25), "int8", key=jax.random.key(0))
        >>> sorted(set(draws.tolist())), bool(abs(draws.mean() - 0.25) < 0.02)
        ([0.0, 1.0], True)
    """
    target, x = format_of(format), jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"round_to rounds floating-point numbers; cast x, {_label(x)}, to float32.")
    if ties not in ("even", "zero"):
        raise ValueError(f"ties={ties!r}: a midpoint goes to 'even' or toward 'zero'.")
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    if target == FORMATS["f32"] and wide == jnp.float32:
        return x
    on_bits = has_float32_exponent(target) and wide == jnp.float32
    low, high = (_inside(bound, target, x.dtype) for bound in (target.min, target.max))
    v = jax.lax.stop_gradient(x).astype(wide)
    y = (_round_bits if on_bits else _round_steps)(v, target, low, high, key, ties)
    return _exact_cast(y, x.dtype)


def stochastic_bf16(x: Array, bits: Array) -> jax.Array:
    """Rounds float32 to bfloat16 by adding given random bits below the kept ones.

        bf16((u32(x) + bits) & 0xFFFF0000)

    Of the 65536 values of `bits`, exactly the low half of x as an integer round away from zero, so
    the mean over uniform bits is x, a bfloat16 number stays, and rounding is odd. Infinities and
    NaN pass: with bits added, 0x7F800001 would become an infinity and 0x7FFFFFFF a negative zero.
    A number beyond the largest bfloat16 may become an infinity; `round_to` saturates instead.

    Args:
        x: float32, of any shape.
        bits: uint16, of the shape of x.

    Returns:
        bfloat16, of the shape of x.

    Raises:
        TypeError: x is not float32, `bits` is not uint16, or their shapes differ.

    Example:
        >>> x, below = jnp.full(65536, 1.001), jnp.arange(65536, dtype=jnp.uint16)
        >>> y = stochastic_bf16(x, below).astype(jnp.float32)
        >>> sorted(set(y.tolist())), int((y > 1).sum())
        ([1.0, 1.0078125], 8389)
    """
    x, bits = jnp.asarray(x), jnp.asarray(bits)
    if (x.dtype, bits.dtype, x.shape) != (jnp.float32, jnp.uint16, bits.shape):
        raise TypeError(
            f"stochastic_bf16 takes float32 numbers and uint16 bits of one shape, and got "
            f"{_label(x)} and {_label(bits)}. Draw `jax.random.bits(key, x.shape, 'uint16')`."
        )
    x = jax.lax.stop_gradient(x)
    rounded = jax.lax.bitcast_convert_type(_as_bits(x) + bits.astype(jnp.uint32), jnp.float32)
    return jnp.where(jnp.isfinite(x), _exact_cast(rounded, jnp.bfloat16), x.astype(jnp.bfloat16))


def _round_steps(
    v: jax.Array, target: Format, low: float, high: float, key: Key | None, ties: str
) -> jax.Array:
    """Rounds in units of the last place; every product is one by a power of two, hence exact.

    Only normal numbers meet arithmetic: those the device may flush are below half the smallest
    step anyway. `lax.reduce_precision` would flush the format's subnormals and overflow.
    """
    magnitude = jnp.minimum(jnp.abs(v), 2 * target.max)  # beyond it saturates: no infinities below
    exponent = jnp.maximum(_exponent(magnitude), 1 - target.bias)
    steps = magnitude * _power_of_two(target.mantissa_bits - exponent, v.dtype)
    whole = _round_up_or_down(steps, key, ties)
    y = _signed(whole * _power_of_two(exponent - target.mantissa_bits, v.dtype), v)
    y = jnp.where(v > high, high, jnp.where(v < low, low, y))
    return jnp.where(jnp.isnan(v), v, y)


def _signed(magnitude: jax.Array, v: jax.Array) -> jax.Array:
    """A magnitude with the sign of v, that of a zero included, by bits.

    `jnp.copysign` takes the sign by a shift to a bool, which XLA (JAX 0.12, CPU) compiles to wrong
    signs where v is the transposed result of a dot.
    """
    sign = 1 << (jnp.finfo(v.dtype).bits - 1)
    bits = _as_bits(magnitude)
    return jax.lax.bitcast_convert_type(
        bits | (_as_bits(v) & np.asarray(sign, bits.dtype)), v.dtype
    )


def _round_up_or_down(steps: jax.Array, key: Key | None, ties: str) -> jax.Array:
    if key is None:
        return jnp.round(steps) if ties == "even" else jnp.ceil(steps - 0.5)
    whole = jnp.floor(steps)
    # 32 bits, since `uniform` has 23 and would round a fraction of 2^-30 up too often.
    chance = ((steps - whole) * 2.0**32).astype(jnp.uint32)
    return jnp.where(jax.random.bits(key, steps.shape, jnp.uint32) < chance, whole + 1, whole)


def _round_bits(
    v: jax.Array, target: Format, low: float, high: float, key: Key | None, ties: str
) -> jax.Array:
    """Rounds a format with float32's exponent: integer arithmetic, and a carry does the rest.

    Saturation too is on integers: a compiler makes a float maximum of `where(v < low, low, y)`, and
    that flushes subnormal numbers.
    """
    del low  # -high
    bits, dropped = _as_bits(v), 23 - target.mantissa_bits
    size = bits & 0x7FFFFFFF
    if key is None:
        to_even = (bits >> dropped) & 1 if ties == "even" and dropped else 0
        offset = max((1 << dropped >> 1) - 1, 0) + to_even
    else:
        width = 16 if dropped <= 16 else 32
        drawn = jax.random.bits(key, v.shape, f"uint{width}").astype(jnp.uint32)
        offset = drawn >> (width - dropped)
    rounded = (size + offset) >> dropped << dropped
    rounded = jnp.minimum(rounded, int(np.float32(high).view(np.uint32)))
    is_nan = size > 0x7F800000
    return jax.lax.bitcast_convert_type(
        (bits ^ size) | jnp.where(is_nan, size, rounded), jnp.float32
    )


def _as_bits(v: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(v, jnp.uint32 if v.dtype == jnp.float32 else jnp.uint64)


def _exponent(v: jax.Array) -> jax.Array:
    """floor(log2 |v|) as int32; of zeros and subnormals a number below every normal exponent."""
    info = jnp.finfo(v.dtype)
    stored = (_as_bits(v) >> info.nmant) & (1 << info.nexp) - 1
    return stored.astype(jnp.int32) + (info.minexp - 1)


def _power_of_two(k: jax.Array, dtype: DType) -> jax.Array:
    """2^k by writing the exponent, for `exp2` is not exact everywhere; k of a normal number."""
    info = jnp.finfo(dtype)
    integer = jnp.int32 if info.bits == 32 else jnp.int64
    return jax.lax.bitcast_convert_type(
        (k - (info.minexp - 1)).astype(integer) << info.nmant, dtype
    )


def _exact_cast(y: jax.Array, dtype: DType) -> jax.Array:
    """Casts numbers that `dtype` holds; to bfloat16 by bits, for the cast flushes subnormals."""
    if (y.dtype, dtype) != (jnp.float32, jnp.bfloat16):
        return y.astype(dtype)
    upper = (_as_bits(y) >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)


def _inside(bound: float, target: Format, dtype: DType) -> float:
    """The number nearest to `bound`, and not beyond it, that the grid and the dtype both hold."""
    info = jnp.finfo(dtype)
    size = min(abs(bound), float(info.max))
    if size == 0:
        return 0.0
    unit = 2.0 ** (math.frexp(size)[1] - 1 - min(target.mantissa_bits, info.nmant))
    return math.copysign(math.floor(size / unit) * unit, bound)


def _label(x: jax.Array) -> str:
    return f"{x.dtype}{list(x.shape)}"


@functools.partial(jax.jit, inline=True)  # traced once for a shape, however often it is used
def round_to_dtype(x: Any) -> jax.Array:
    """The values of a 16 or 32-bit float array as float32, on the grid of their dtype."""
    info = jnp.finfo(jnp.result_type(x))
    wide = jnp.asarray(x).astype(jnp.float32)
    return jax.lax.reduce_precision(wide, info.nexp, info.nmant) if info.bits < 32 else wide
