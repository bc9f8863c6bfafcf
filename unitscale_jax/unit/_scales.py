"""Scales: how large the values and the gradients of a function are, as a report.

    rms = sqrt(mean x^2),   underflow = share of 0 < |x| <= s / 2,   saturated = share of |x| > max

for a format whose largest number is `max` and whose smallest is `s`: rounded to nearest even, half
of s goes to zero.
"""

import functools
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.formats import FORMATS, Format, round_to_dtype
from unitscale_jax.tables import Tabular
from unitscale_jax.trace.program import is_concrete

__all__ = ["Mark", "ScaleRow", "Scales", "Value", "measured", "title"]


@dataclass(frozen=True)
class Value:
    """A float value of a function, where it is made.

    Attributes:
        order: Its number in program order.
        scope: Named scopes around it; "" without any.
        primitive: What makes it: a primitive, of a call that is not entered with the name of the
            function ("custom_jvp_call[relu]"); "parameter" or "input" of an argument.
        parameter: Names of the parameters that the operands are, joined by commas; "" without any.
        shape: Of the value.
        dtype: Of the value.
    """

    order: int
    scope: str
    primitive: str
    parameter: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Mark:
    """One pass of a value: what the numbers of a report are about.

    Attributes:
        value: Which value.
        backward: Whether the numbers are those of its gradient.
        loops: Lengths of the scans around it, the outer one first.
    """

    value: Value
    backward: bool
    loops: tuple[int, ...]


@dataclass(frozen=True)
class ScaleRow:
    """A value or its gradient, over all the times that it was computed.

    Attributes:
        direction: "forward" of a value, "backward" of the gradient with respect to it.
        order: Number of the value in program order, the same for its gradient.
        scope: See `Value`.
        primitive: See `Value`.
        parameter: See `Value`.
        shape: Of one evaluation.
        dtype: Of the value.
        times: How often it was computed: the turns of the scans around it.
        count: How many numbers that is, `times` times the size.
        rms: Root of the mean square.
        mean: Mean.
        std: Standard deviation.
        absmax: Largest magnitude.
        smallest: Smallest magnitude that is not zero; 0.0 if all are zero.
        zeros: Share of zeros.
        underflow: Share that is not zero and would be, rounded to the nearest of the format.
        saturated: Share beyond the largest number of the format.
        turns: RMS of each turn, in the order of the scan's rows; () outside of scans.
    """

    direction: Literal["forward", "backward"]
    order: int
    scope: str
    primitive: str
    parameter: str
    shape: tuple[int, ...]
    dtype: str
    times: int
    count: int
    rms: float
    mean: float
    std: float
    absmax: float
    smallest: float
    zeros: float
    underflow: float
    saturated: float
    turns: tuple[float, ...]

    @property
    def where(self) -> str:
        """The scope, or else the parameters, or else nothing."""
        return self.scope or self.parameter


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["numbers"],
    meta_fields=["marks", "format", "closed"],
)
@dataclass(frozen=True)
class Scales(Tabular):
    """Statistics of every float value of a function and of its gradient; printed, a table.

    A pytree whose leaves are the numbers, so a function that returns it may be jitted. The rows are
    read outside of `jit`.

    Attributes:
        numbers: For each mark (turns.., 9), as `measured` orders them and whether the turn ran.
        marks: What the numbers are about.
        format: The format that underflow and saturation are counted for.
        closed: Primitives that were not entered, each with how many equations: what is inside has
            no rows, and only the results have.
    """

    numbers: tuple[jax.Array, ...]
    marks: tuple[Mark, ...]
    format: Format
    closed: tuple[tuple[str, int], ...] = ()

    @functools.cached_property
    def rows(self) -> tuple[ScaleRow, ...]:
        """Values in program order, then their gradients in the order in which they are computed.

        A value in a branch that was not taken has no row.

        Raises:
            ValueError: They are read while `jit` traces, or are those of several calls at once.
        """
        pairs = zip(self.marks, self.numbers, strict=True)
        rows = [row for mark, x in pairs if (row := _row(mark, _known(mark, x))) is not None]
        by_pass = lambda row: -row.order if row.direction == "backward" else row.order
        return tuple(sorted(rows, key=lambda row: (row.direction == "backward", by_pass(row))))

    def cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """One line for each row."""
        titles = ["pass", ">order", "scope", "operation", "parameter", "shape", ">times"]
        titles += [f">{name}" for name in ("rms", "mean", "std", "max", "smallest")]
        titles += [f">{name}" for name in ("zeros", "underflow", "saturated")]
        return titles, list(map(_line, self.rows))

    def below(self) -> Sequence[str]:
        """What was counted, for which format, and what was not entered."""
        names = ", ".join(f"{n} {name}" for name, n in self.closed)
        inside = f"Not entered, so that only their results have rows: {names}."
        passes = [row.direction for row in self.rows]
        counts = [f"{passes.count('forward')} values, {passes.count('backward')} gradients"]
        counts[0] += f"; underflow and saturation of {title(self.format)}."
        return [*counts, inside] if self.closed else counts

    def plot(self, path: str | pathlib.Path) -> None:
        """Draws both passes in one picture: log2 of the RMS against program order.

        A point is a value or a gradient, and a bar beside a point spans the turns of a scan. The
        band is where numbers are normal ones of the format; the ticks are layers, and the rows that
        lose most to the format or are farthest from an RMS of 1 have names.

        Args:
            path: File to write, of a type that matplotlib knows by its ending.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from unitscale_jax.unit._scales_plot import figure

        figure(self).savefig(path)


NUMBERS = ("rms", "mean", "std", "absmax", "smallest", "zeros", "underflow", "saturated")


@functools.partial(jax.jit, static_argnums=1)
def measured(x: jax.Array, spec: Format) -> jax.Array:
    """The numbers of one array, (8,), in the order of `NUMBERS`; float32, of float64 that.

    Everything is divided by the largest magnitude first: squares of gradients near 1e-25 are zero
    in float32, and those of activations near 1e20 infinite. The deviation has a pass of its own,
    since the difference of mean square and squared mean cancels where the mean is large.
    """
    x = jax.lax.stop_gradient(x)  # whoever differentiates further, means the result
    v = _wide(x)
    if not v.size:
        return jnp.zeros(len(NUMBERS), v.dtype)
    absmax, smallest, *counts = _extremes_and_counts(v, spec)
    unit = jnp.where(jnp.isfinite(absmax) & (absmax > 0), absmax, jnp.ones((), v.dtype))
    scaled = v / unit
    mean, rms = jnp.mean(scaled), jnp.sqrt(jnp.mean(jnp.square(scaled)))
    std = jnp.sqrt(jnp.mean(jnp.square(scaled - mean)))
    moments = [unit * rms, unit * mean, unit * std]
    return jnp.stack([*moments, absmax, smallest, *(n.astype(v.dtype) / v.size for n in counts)])


def _wide(x: jax.Array) -> jax.Array:
    """The numbers of an array in float32, of float64 in that."""
    if x.dtype == jnp.float64:
        return x
    rounded = round_to_dtype(x)
    # Rounding by exponent and mantissa takes the subnormal numbers of narrow exponents for zero.
    narrow = jnp.finfo(x.dtype).nexp < jnp.finfo(jnp.float32).nexp
    return jnp.where(rounded == 0, x.astype(jnp.float32), rounded) if narrow else rounded


def _extremes_and_counts(v: jax.Array, spec: Format) -> Sequence[jax.Array]:
    """Largest magnitude, smallest that is not zero (or infinity), and three counts, in one pass.

    One reduction of five operands, because programs have hundreds of values, and XLA takes as long
    to compile each reduction. Counts are integers: a float32 that counts one by one ends at 2^24.
    """
    size, infinity = jnp.abs(v), jnp.full((), jnp.inf, v.dtype)
    lost = (size > 0) & (size <= jnp.asarray(spec.min_subnormal / 2, v.dtype))
    beyond = (v > jnp.asarray(spec.max, v.dtype)) | (v < jnp.asarray(spec.min, v.dtype))
    counted = [mask.astype(jnp.uint32) for mask in (size == 0, lost, beyond)]
    operands = [size, jnp.where(size > 0, size, infinity), *counted]
    starts = [jnp.zeros((), v.dtype), infinity, *[jnp.zeros((), jnp.uint32)] * 3]

    def combined(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
        sums = [jax.lax.add(x, y) for x, y in zip(a[2:], b[2:], strict=True)]
        return [jax.lax.max(a[0], b[0]), jax.lax.min(a[1], b[1]), *sums]

    return jax.lax.reduce(operands, starts, combined, tuple(range(v.ndim)))


def _known(mark: Mark, numbers: jax.Array) -> np.ndarray:
    """(turns, 9) in float64."""
    if not is_concrete(numbers):
        raise ValueError(
            "the rows of Scales were read while jax.jit traces, before there are numbers. Return "
            "the Scales from the jitted function, and read the rows outside."
        )
    if numbers.shape[:-1] != mark.loops:
        raise ValueError(
            f"these Scales hold several calls, stacked along axes {numbers.shape[:-1]} of which "
            f"{mark.loops} are loops. Take one: jax.tree.map(lambda x: x[0], scales)."
        )
    return np.asarray(numbers, np.float64).reshape(-1, len(NUMBERS) + 1)


def _row(mark: Mark, turns: np.ndarray) -> ScaleRow | None:
    """A mark's numbers of all turns as one row; None if no turn ran."""
    ran = turns[turns[:, -1] > 0]
    if not len(ran):
        return None
    rms, mean, std, absmax, smallest, *shares = ran[:, :-1].T
    value, center = mark.value, float(np.mean(mean))
    least = float(np.min(smallest))
    zeros, underflow, saturated = (float(np.mean(share)) for share in shares)
    with np.errstate(invalid="ignore"):  # infinities, as of masks, have no deviation: NaN
        spread = np.hypot(std, mean - center)  # within turns and between them
    return ScaleRow(
        direction="backward" if mark.backward else "forward",
        **vars(value),
        times=len(ran),
        count=len(ran) * int(np.prod(value.shape, dtype=int)),
        rms=_root_mean_square(rms),
        mean=center,
        std=_root_mean_square(spread),
        absmax=float(np.max(absmax)),
        smallest=0.0 if least == np.inf else least,
        zeros=zeros,
        underflow=underflow,
        saturated=saturated,
        turns=tuple(map(float, rms)) if mark.loops else (),
    )


def _root_mean_square(x: np.ndarray) -> float:
    top = np.max(x)
    if not (np.isfinite(top) and top > 0):
        return float(top)
    return float(top * np.sqrt(np.mean((x / top) ** 2)))


def _line(row: ScaleRow) -> list[str]:
    number = lambda x: f"{x:.3g}"
    share = lambda x: f"{100 * x:.3g} %" if x else ""
    shape = f"{row.dtype}[{','.join(map(str, row.shape))}]"
    moments = [row.rms, row.mean, row.std, row.absmax, row.smallest]
    return [
        row.direction,
        str(row.order),
        row.scope,
        row.primitive,
        row.parameter,
        shape,
        str(row.times),
        *map(number, moments),
        *map(share, [row.zeros, row.underflow, row.saturated]),
    ]


def title(spec: Format) -> str:
    """The name of a format, or what describes one without."""
    named = (name for name, known in FORMATS.items() if known == spec)
    return next(named, repr(spec))
