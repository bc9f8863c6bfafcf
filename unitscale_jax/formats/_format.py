"""A number format as data: its fields, the formats with a name, and what a name or dtype means."""

import dataclasses
import math
from collections.abc import Iterator
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np

from unitscale_jax.errors import check_number, check_type, check_whole
from unitscale_jax.typing import DType


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A grid of numbers: a binary floating-point format, or integers.

    Attributes:
        exponent_bits: Width of the exponent; 0 for integers.
        mantissa_bits: Width of the mantissa without its leading one; for integers the bits without
            the sign.
        bias: What is subtracted from a stored exponent.
        max: The largest number. Larger ones saturate.
        infinities: Whether the largest exponent is kept for infinities and NaN, as IEEE 754 does.
        signed: Whether there are negative numbers.
        dtype: Name of the `numpy` or `ml_dtypes` type with this grid, where there is one.

    Raises:
        ValueError: `max` is not on the grid, or float32 cannot compute on the grid.

    Example:
        >>> e2m1fn = Format(exponent_bits=2, mantissa_bits=1, bias=1, max=6.0)
        >>> us.formats.round_to(jnp.array([0.2, 0.3, 2.4, 99.0]), e2m1fn).tolist()
        [0.0, 0.5, 2.0, 6.0]
        >>> e2m1fn.bits, e2m1fn.min_normal, e2m1fn.min_subnormal
        (4, 1.0, 0.5)
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float
    infinities: bool = False
    signed: bool = True
    dtype: str | None = None

    def __post_init__(self) -> None:
        """Checks that the fields describe one grid, and that float32 holds it."""
        for name in ("exponent_bits", "mantissa_bits", "bias"):
            check_whole(f"Format.{name}", getattr(self, name))
        check_number("Format.max", self.max)
        for wrong in _contradictions(self):
            raise ValueError(f"{self!r}: {wrong}")

    @property
    def is_integer(self) -> bool:
        """Whether the grid is the integers from `min` to `max`."""
        return self.exponent_bits == 0

    @property
    def bits(self) -> int:
        """Number of bits that one stored number takes."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def min(self) -> float:
        """The least number: -max, or of integers one less (two's complement), or 0 if unsigned."""
        return -(self.max + self.is_integer) if self.signed else 0.0

    @property
    def min_normal(self) -> float:
        """The smallest positive number with a full mantissa; 1 for integers."""
        return 1.0 if self.is_integer else 2.0 ** (1 - self.bias)

    @property
    def min_subnormal(self) -> float:
        """The smallest positive number; 1 for integers."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)


def _contradictions(spec: Format) -> Iterator[str]:
    m, top = spec.mantissa_bits, spec.max
    if not (0 <= spec.exponent_bits <= 8 and 0 <= m <= 23 and math.isfinite(top) and top > 0):
        yield "float32 computes with up to 8 bits of exponent and 23 of mantissa, and a finite max."
    elif not (has_float32_exponent(spec) or 2.0**-126 <= spec.min_subnormal <= top < 2.0**127):
        yield "its numbers leave those that float32 holds as normal ones; choose a smaller bias."
    elif spec.is_integer and spec.min_subnormal != 1:
        yield "integers have steps of 1, hence a bias of 1 - mantissa_bits; see `integers`."
    else:
        largest = _largest(spec)
        unit = max(2.0 ** (math.frexp(top)[1] - 1 - m), spec.min_subnormal)
        if top > largest or top % unit:
            yield f"max must be on the grid and at most {largest}."


def _largest(spec: Format) -> float:
    """The number with all bits set, or with the largest exponent that is not for infinities."""
    if spec.is_integer:
        return 2.0**spec.mantissa_bits - 1
    exponent = (1 << spec.exponent_bits) - 1 - spec.infinities - spec.bias
    return 2.0**exponent * (2 - 2.0**-spec.mantissa_bits)


def has_float32_exponent(spec: Format) -> bool:
    """Whether the exponent is that of float32, as in bfloat16."""
    return (spec.exponent_bits, spec.bias) == (8, 127)


FormatLike: TypeAlias = Format | DType
"""A `Format`, the name of one, or the dtype of its stored numbers."""


def integers(bits: int, *, signed: bool = True) -> Format:
    """The format of two's complement (or unsigned) integers of a width.

    Example:
        >>> integers(8).min, integers(8).max, integers(4, signed=False).max
        (-128.0, 127.0, 15.0)
    """
    check_type("bits", bits, int, "a number of bits")
    magnitude = bits - signed
    return Format(
        exponent_bits=0,
        mantissa_bits=magnitude,
        bias=1 - magnitude,  # so that the smallest subnormal, the step, is 1
        max=2.0**magnitude - 1,
        signed=signed,
        dtype=f"{'' if signed else 'u'}int{bits}",
    )


def _floats(exponent: int, mantissa: int, bias: int, top: float, dtype: str) -> Format:
    infinities = not dtype.endswith(("fn", "fnuz"))
    fields = {"exponent_bits": exponent, "mantissa_bits": mantissa, "bias": bias, "max": top}
    return Format(**fields, infinities=infinities, dtype=dtype)


FORMATS: dict[str, Format] = {
    "int8": integers(8),
    "int4": integers(4),
    "int2": integers(2),
    "uint8": integers(8, signed=False),
    "uint4": integers(4, signed=False),
    "uint2": integers(2, signed=False),
    "e4m3fn": _floats(4, 3, 7, 448.0, "float8_e4m3fn"),
    "e5m2": _floats(5, 2, 15, 57344.0, "float8_e5m2"),
    "e4m3fnuz": _floats(4, 3, 8, 240.0, "float8_e4m3fnuz"),
    "e5m2fnuz": _floats(5, 2, 16, 57344.0, "float8_e5m2fnuz"),
    "e4m3": _floats(4, 3, 7, 240.0, "float8_e4m3"),
    "e3m4": _floats(3, 4, 3, 15.5, "float8_e3m4"),
    "e2m3fn": _floats(2, 3, 1, 7.5, "float6_e2m3fn"),
    "e3m2fn": _floats(3, 2, 3, 28.0, "float6_e3m2fn"),
    "e2m1fn": _floats(2, 1, 1, 6.0, "float4_e2m1fn"),
    "f16": _floats(5, 10, 15, 65504.0, "float16"),
    "bf16": _floats(8, 7, 127, float(jnp.finfo(jnp.bfloat16).max), "bfloat16"),
    "f32": _floats(8, 23, 127, float(np.finfo(np.float32).max), "float32"),
}
"""The known formats by name."""


def format_of(format: FormatLike) -> Format:
    """The format meant by a name, by a dtype, or by itself.

    Raises:
        ValueError: The name or the dtype is not known; the message lists the known names.

    Example:
        >>> format_of("bf16") == format_of("bfloat16") == format_of(jnp.bfloat16)
        True
        >>> format_of("int3")
        Traceback (most recent call last):
            ...
        ValueError: unknown number format 'int3'. The known ones are int8, int4, int2, uint8, \
uint4, uint2, e4m3fn, e5m2, e4m3fnuz, e5m2fnuz, e4m3, e3m4, e2m3fn, e3m2fn, e2m1fn, f16, bf16, \
f32 and the dtypes they are stored in ('float8_e4m3fn'); describe another grid by a `Format`.
    """
    if isinstance(format, Format):
        return format
    name = format if isinstance(format, str) else _dtype_name(format)
    by_dtype = {known.dtype: known for known in FORMATS.values()}
    found = FORMATS.get(name) or by_dtype.get(name)
    if found is None:
        raise ValueError(
            f"unknown number format {format!r}. The known ones are {', '.join(FORMATS)} and the "
            "dtypes they are stored in ('float8_e4m3fn'); describe another grid by a `Format`."
        )
    return found


def _dtype_name(dtype: DType) -> str:
    try:
        return np.dtype(dtype).name
    except TypeError:
        return repr(dtype)
