"""Number formats as data, and rounding to them inside a JAX program.

    value = ± 1.m · 2^(e - bias)    normal numbers
    value = ± 0.m · 2^(1 - bias)    subnormal numbers, multiples of 2^(1 - bias - mantissa_bits)

A format is a grid of numbers, and `round_to` moves a value to the grid without changing its dtype,
so a program in float32 computes what hardware with the format would. An integer is the case without
an exponent: every number is subnormal and the step is 1. Grids: OCP 8-bit floating point (e4m3fn,
e5m2; https://arxiv.org/abs/2209.05433), the variants without negative zero (fnuz;
https://arxiv.org/abs/2206.02915), OCP microscaling (e2m3fn, e3m2fn, e2m1fn), IEEE 754 and bfloat16.
"""

from unitscale_jax.formats._format import FORMATS, Format, FormatLike, format_of, integers
from unitscale_jax.formats._rounding import (
    round_to,
    round_to_dtype as round_to_dtype,
    stochastic_bf16,
)

__all__ = [
    "FORMATS",
    "Format",
    "FormatLike",
    "format_of",
    "integers",
    "round_to",
    "stochastic_bf16",
]


def __dir__() -> list[str]:
    """What tab completion offers: the public names, and nothing that this file imports."""
    return [*__all__, "__all__", "__doc__", "__name__"]
