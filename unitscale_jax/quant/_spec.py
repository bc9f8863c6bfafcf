"""Specs, as data, of what is quantized and how.

    QSpec    how one operand becomes codes and scales
    DotSpec  how a product is computed from two of them

A rule is a pair of a parameter's name and a `DotSpec`; the activation `x` and the cotangent `g`
belong to whatever meets that parameter.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from unitscale_jax import formats
from unitscale_jax.formats import Format, FormatLike, format_of
from unitscale_jax.quant._calibrators import Absmax, AxisNumbers, Calibrator
from unitscale_jax.statistics import Measure

Compute: TypeAlias = Literal["int", "float_exact", "dequant"]
_FLOATS = ("e4m3fn", "e5m2")


@dataclass(frozen=True)
class Group:
    """Scales for every `size` elements along the innermost contraction axis.

    Attributes:
        size: Elements of a group; it must divide the axis.
        scale: `"free"`: each group has a float32 scale. `"integer"`: each has a small integer, and
            a channel one float32 scale; multiplied into the codes they still fit eight bits, so a
            product stays one integer product over the whole axis, exact however it is sharded
            (after QServe, https://arxiv.org/abs/2405.04532).

    Raises:
        ValueError: The size is not a positive integer, or the kind of scale is unknown.
    """

    size: int
    scale: Literal["free", "integer"] = "free"

    def __post_init__(self) -> None:
        """Checks the size and the kind of scale."""
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"{self!r}: size is a positive whole number of elements.")
        if self.scale not in ("free", "integer"):
            raise ValueError(f"{self!r}: scale is 'free' or 'integer'.")


@dataclass(frozen=True, kw_only=True)
class QSpec:
    """The spec by which an array becomes codes and scales.

    Attributes:
        format: Of the codes: "int2" to "int8", or "e4m3fn", "e5m2".
        symmetric: Codes in [-Q, Q] and no zero point. Asymmetric codes use all of the integers; the
            range always contains zero, which is a code.
        scale: `"free"`, or `"po2"`: powers of two, rounded up.
        group: A scale for each `Group` along the innermost contraction axis; weights only.
        axes: The axes of a parameter that share a scale, counted from the end: those it is
            contracted over. None: found by how the function uses it, see `resolve`.
        calibrator: What the range is taken from.
        rounding: `"nearest"`, ties to even, or `"stochastic"`, for cotangents.

    Raises:
        ValueError: A field is unknown, or two exclude each other; the message says which.

    Example:
        >>> QSpec(format="int4", group=Group(32)).max_code
        7
    """

    format: FormatLike = "int8"
    symmetric: bool = True
    scale: Literal["free", "po2"] = "free"
    group: Group | None = None
    axes: tuple[int, ...] | None = None
    calibrator: Calibrator = field(default_factory=Absmax)
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        """Checks the fields, and that they agree."""
        for wrong in _contradictions(self):
            raise ValueError(f"{self!r}: {wrong}")
        object.__setattr__(self, "format", _name(self.grid))
        if self.axes is not None:
            object.__setattr__(self, "axes", tuple(sorted(self.axes)))

    @functools.cached_property
    def grid(self) -> Format:
        """The number format of the codes, as a `Format`."""
        return _grid(self.format)

    @property
    def is_integer(self) -> bool:
        """True for integer codes, False for 8-bit floats."""
        return self.grid.is_integer

    @property
    def max_code(self) -> Any:
        """Q, the largest code of a symmetric grid: 2^(b-1) - 1 or the largest float."""
        return int(self.grid.max) if self.is_integer else self.grid.max

    @property
    def reach(self) -> int:
        """The largest magnitude of a code, less its zero point where there is one."""
        return self.max_code if self.symmetric else 2**self.grid.bits - 1

    @property
    def code_dtype(self) -> Any:
        """The dtype codes are kept in: int4 up to four bits, int8 above, or an 8-bit float."""
        if not self.is_integer:
            return formats_dtype(str(self.grid.dtype))
        return formats_dtype("int4" if self.grid.bits <= 4 else "int8")

    @property
    def most_multiplier(self) -> int:
        """The largest integer of a group, I: I times Q still fits eight bits."""
        return 127 // int(self.max_code)

    @property
    def clips(self) -> bool:
        """True if values may lie beyond the range, and so receive no gradient."""
        return self.calibrator.clips

    def measure(self, axes: AxisNumbers) -> Measure:
        """The measure of a first pass, by the calibrator; see `Calibrator.measure`."""
        return self.calibrator.measure(axes)

    def refine(self, axes: AxisNumbers, found: Any) -> Measure | None:
        """The measure of a second pass; see `Calibrator.refine`."""
        from unitscale_jax.quant._ops import whole_error  # the equations are of a spec

        return self.calibrator.refine(axes, found, functools.partial(whole_error, self))

    def __str__(self) -> str:
        """The format, and what is not the default, as "int4 asymmetric"."""
        tags = ["" if self.symmetric else "asymmetric", "po2" if self.scale == "po2" else ""]
        group = self.group
        tags.append("" if group is None else f"g{group.size}{'i' * (group.scale == 'integer')}")
        tags.append("" if self.calibrator == Absmax() else repr(self.calibrator))
        tags.append("stochastic" if self.rounding == "stochastic" else "")
        return " ".join([str(self.format), *filter(None, tags)])


@dataclass(frozen=True, kw_only=True)
class DotSpec:
    """The spec by which a product (dot, convolution, lookup) is computed from quantized operands.

    Attributes:
        w: The parameter that a rule names; of two activations the right one.
        x: What meets it; None keeps it in floating point (weight-only).
        g: The cotangent, for a backward pass in integers too; None leaves that in floating point.
        compute: `"int"` multiplies the codes: integers into int32, 8-bit floats into float32.
            `"float_exact"` multiplies integer codes as float32, which gives the same bits while
            K Qx Qw <= 2^24, and is split where it does not; with JAX 0.12 on a CPU it is 4.6 times
            as fast for depthwise convolutions. `"dequant"` multiplies the dequantized values.

    Raises:
        ValueError: The specs exclude each other; the message says which.

    Example:
        >>> print(DotSpec(w=QSpec(), x=QSpec()), "|", DotSpec(w=QSpec(format="int4")))
        int8 x int8 | float x int4
    """

    w: QSpec = field(default_factory=QSpec)
    x: QSpec | None = None
    g: QSpec | None = None
    compute: Compute = "int"

    def __post_init__(self) -> None:
        """Checks that the specs of the operands agree."""
        for wrong in _disagreements(self):
            raise ValueError(f"{self!r}: {wrong}")

    @staticmethod
    def operands(rules: Any, staged: Any, params: Any) -> "Mapping[str, QSpec | None]":
        """Parameter -> the spec of what it meets, which `calibrate` asks of rules."""
        from unitscale_jax.quant._roles import operands  # rules are resolved by them

        return operands(rules, staged, params)

    def with_axes(self, axes: tuple[int, ...] | None) -> "DotSpec":
        """The same spec with the axes of the parameter given."""
        return replace(self, w=replace(self.w, axes=axes))

    def __str__(self) -> str:
        """The formats of the operands, activation first, as "int8 x int4"."""
        parts = [f"{self.x or 'float'} x {self.w}"]
        parts += [f"g {self.g}"] if self.g else []
        return ", ".join(parts + ([self.compute] if self.compute != "int" else []))


@functools.cache
def formats_dtype(name: str) -> Any:
    """Looks up the dtype of codes by name."""
    import jax.numpy as jnp

    return np.dtype(getattr(jnp, name))


def _grid(format: FormatLike) -> Format:
    name = format if isinstance(format, str) else None
    if name and name.startswith("int") and name[3:].isdigit() and 2 <= int(name[3:]) <= 8:
        return formats.integers(int(name[3:]))
    return format_of(format)


def _name(grid: Format) -> str:
    """One name for a format, however it was given, so that equal specs are equal."""
    if grid.is_integer:
        return f"int{grid.bits}"
    return next(name for name in _FLOATS if format_of(name) == grid)


def _contradictions(spec: QSpec) -> Iterator[str]:
    """Sentences about fields that are unknown, or that exclude each other."""
    try:
        grid = _grid(spec.format)
    except ValueError:
        grid = None
    integer = grid is not None and grid.is_integer and grid.signed and 2 <= grid.bits <= 8
    if grid is None or not (integer or grid in [format_of(name) for name in _FLOATS]):
        yield f"format {spec.format!r} has no codes; choose int2 to int8, {' or '.join(_FLOATS)}."
        return
    if spec.scale not in ("free", "po2"):
        yield "scale is 'free' or 'po2'."
    if spec.rounding not in ("nearest", "stochastic"):
        yield "rounding is 'nearest' or 'stochastic'."
    if not isinstance(spec.calibrator, Calibrator):
        yield "calibrator is an object such as Absmax() or Percentile(99.9)."
    if not _are_axes(spec.axes):
        yield "axes are different and count from the end, as (-2,), which holds for stacks too."
    if spec.group is not None and not isinstance(spec.group, Group):
        yield "group is a Group, as Group(32)."
        return
    if spec.rounding == "stochastic" and not integer:
        yield "stochastic rounding is for integers."
    if not spec.symmetric:
        if not integer or spec.scale != "free" or spec.group:
            yield "an asymmetric range is for integers with free scales and no groups."
        if not spec.calibrator.two_sided:
            yield "this calibrator finds one bound, and this range has two: Absmax, EMA or Fixed."
    if spec.group is not None and spec.group.scale == "integer":
        if not integer or int(grid.max) * 2 > 127:
            yield "integer groups need room for an integer above 1 in 8 bits: int2 to int7."
        if spec.scale == "po2":
            yield "integer groups have a free scale for each channel."


def _are_axes(axes: Any) -> bool:
    if axes is None:
        return True
    whole = isinstance(axes, tuple) and all(isinstance(axis, int) for axis in axes)
    return whole and all(axis < 0 for axis in axes) and len(set(axes)) == len(axes)


def _disagreements(spec: DotSpec) -> Iterator[str]:
    """Sentences about specs of operands that exclude each other."""
    for name, given in (("w", spec.w), ("x", spec.x), ("g", spec.g)):
        if not (isinstance(given, QSpec) or (given is None and name != "w")):
            yield f"{name} is a QSpec, as QSpec()."
            return
    if spec.compute not in ("int", "float_exact", "dequant"):
        yield "compute is 'int', 'float_exact' or 'dequant'."
    for name, other in (("x", spec.x), ("g", spec.g)):
        if other is None:
            continue
        if other.group or other.axes is not None:
            yield f"{name} has neither groups nor axes of its own; the product decides on them."
        if other.is_integer != spec.w.is_integer:
            yield f"w and {name} are both integers, or both 8-bit floats."
    if not spec.w.symmetric and spec.g is not None:
        yield "a quantized backward pass needs symmetric weights."
    for name, other in (("w", spec.w), ("x", spec.x)):
        if other is not None and other.rounding == "stochastic":
            yield f"stochastic rounding is for cotangents, not {name}: serving is reproducible."
    if spec.g is not None and (spec.x is None or not spec.g.symmetric):
        yield "a quantized backward pass needs quantized activations, and a symmetric g."
    if spec.compute == "float_exact" and not (spec.w.is_integer and spec.x):
        yield "float_exact is for integer codes of both operands."
    e5m2 = format_of("e5m2")
    if spec.x is not None and spec.x.grid == spec.w.grid == e5m2:
        yield "e5m2 x e5m2 is no product of any hardware; take e4m3fn for one of them."
