"""The calibrators of the library: what the range of an array, or of a stream, is taken from.

    Absmax           max |x|, nothing is clipped
    Percentile(p)    the k-th smallest |x|, k = ceil(p n / 100)
    MSE()            r max |x| with the least squared error, r among 33 from 1 to 0.2
    EMA(b)           b m + (1 - b) max |x| over batches; of one array its max
    Fixed(..)        given

A calibrator owns all that is known of a range: of an array that is there (a weight, an activation
at the moment of use) by `bound`, and of a stream of batches by `measure`, as numbers that add up.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.errors import check_number, check_whole
from unitscale_jax.quant._calibrator import (
    AxisNumbers,
    Calibrator,
    Error,
    extremes,
    larger_of,
    largest_of,
)
from unitscale_jax.statistics import Measure
from unitscale_jax.trace.program import is_concrete

BINS = 8192
SHIFT = 18  # sign, exponent and five bits of the fraction of a float32 remain: bins of 2^-5


@dataclass(frozen=True)
class Absmax(Calibrator):
    """The largest magnitude: nothing is clipped."""

    clips = False
    two_sided = True

    def bound(self, x: jax.Array, axes: AxisNumbers, error: Any) -> jax.Array:
        """The largest magnitude over `axes`; 0 if there are no elements."""
        del error
        return jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)

    def measure(self, axes: AxisNumbers) -> Measure:
        """Measures the smallest and largest number themselves."""
        return extremes(axes)


@dataclass(frozen=True)
class EMA(Calibrator):
    """An exponential moving average of the largest magnitude over batches.

    Attributes:
        decay: b in b m + (1 - b) max; the first batch is taken whole.

    Raises:
        ValueError: `decay` is outside [0, 1).
    """

    decay: float = 0.9
    two_sided = True

    def __post_init__(self) -> None:
        """Checks that the decay is a number in [0, 1)."""
        check_number("EMA.decay", self.decay)
        if not 0 <= self.decay < 1:
            raise ValueError(f"{self!r}: decay is in [0, 1).")

    def bound(self, x: jax.Array, axes: AxisNumbers, error: Any) -> jax.Array:
        """The largest magnitude: one array has no past to be averaged with."""
        return Absmax().bound(x, axes, error)

    def measure(self, axes: AxisNumbers) -> Measure:
        """The ends and the largest magnitude; between batches the average of each."""
        whole = extremes(axes)

        def measure(x: jax.Array, where: jax.Array | None = None) -> dict[str, Any]:
            numbers = whole.measure(x) if where is None else whole.measure(x, where)
            return numbers | {"largest": largest_of(numbers)}

        def join(a: Any, b: Any) -> dict[str, Any]:
            return whole.join(a, b) | {"largest": larger_of(a["largest"], b["largest"])}

        def merge(a: Any, b: Any) -> dict[str, Any]:
            new, f32 = np.float32(1 - self.decay), np.float32
            # a + new (b - a), so that the average of a constant is that constant to the bit.
            return {k: a[k].astype(f32) + new * (b[k].astype(f32) - a[k].astype(f32)) for k in a}

        return Measure(measure, join, lambda numbers: numbers["largest"], whole.range, merge)


@dataclass(frozen=True)
class Percentile(Calibrator):
    """The k-th smallest magnitude, k = ceil(p n / 100), without interpolation.

    Attributes:
        p: In (0, 100]; 100 is `Absmax`.

    Raises:
        ValueError: `p` is outside its range.
    """

    p: float

    def __post_init__(self) -> None:
        """Checks that p is a percentage in (0, 100]."""
        check_number("Percentile.p", self.p)
        if not 0 < self.p <= 100:
            raise ValueError(f"{self!r}: p is a percentage in (0, 100].")

    def rank(self, n: int) -> int:
        """The k of n elements: the ceiling of p n / 100 to nine digits, at least 1.

        99.9 is no binary number: 99.9 * 41000 / 100 is 40959.00000000001, whose ceiling is too
        large.
        """
        return max(1, math.ceil(round(self.p * n / 100, 9)))

    def measure(self, axes: AxisNumbers) -> Measure:
        """The ends, and how many magnitudes lie in each logarithmic bin."""
        whole = extremes(axes)

        def measure(x: jax.Array, where: jax.Array | None = None) -> dict[str, Any]:
            numbers = whole.measure(x) if where is None else whole.measure(x, where)
            ones = jnp.ones(x.shape, jnp.int32) if where is None else where.astype(jnp.int32)
            return numbers | {"counts": _histogram(x, ones, axes)}

        def join(a: Any, b: Any) -> dict[str, Any]:
            return whole.join(a, b) | {"counts": a["counts"] + b["counts"]}

        def range_of(numbers: Any) -> Any:
            m = self._of_bins(numbers["counts"])
            return -larger_of(-m, -largest_of(numbers).astype(np.float32))

        return Measure(measure, join, range_of)

    def _of_bins(self, counts: Any) -> Any:
        """The largest number of the bin that holds the k-th smallest magnitude."""
        # A bin is the upper 14 bits of a float32, whose order is that of the magnitudes. The
        # largest number of bin b ends in ones: the bits (b + 1) << SHIFT, less one.
        if not is_concrete(counts):
            sums = jnp.cumsum(counts)
            at = jnp.searchsorted(sums, self._traced_rank(sums[-1])).astype(jnp.uint32)
            edge = ((jnp.where(sums[-1] > 0, at, 0).astype(jnp.uint32) + 1) << SHIFT) - 1
            return jax.lax.bitcast_convert_type(edge, jnp.float32)
        sums = np.cumsum(np.asarray(counts))
        at = np.searchsorted(sums, self.rank(int(sums[-1]))) if sums[-1] else 0
        return (((np.uint32(at) + np.uint32(1)) << np.uint32(SHIFT)) - np.uint32(1)).view(
            np.float32
        )

    def _traced_rank(self, n: jax.Array) -> jax.Array:
        """`rank` in int32 where p has few digits, p / 100 = a / b, and to seven digits else.

        Traced integers have 32 bits, which n a may leave for n of a few millions. With
        n = c b + r the ceiling of n a / b is c a + ceil(r a / b), and r a < a b stays below 2^31.
        """
        part = Fraction(str(self.p)) / 100
        a, b = part.numerator, part.denominator
        if a * b >= 2**31:
            share = jnp.ceil(n.astype(jnp.float32) * np.float32(self.p / 100))
            return jnp.maximum(share.astype(jnp.int32), 1)
        return jnp.maximum((n // b) * a + (n % b * a + (b - 1)) // b, 1)

    def bound(self, x: jax.Array, axes: AxisNumbers, error: Any) -> jax.Array:
        """The k-th smallest of each group; NaN sorts last, and a group that has one is NaN."""
        del error
        kept = [axis for axis in range(x.ndim) if axis not in axes]
        flat = jnp.abs(x).transpose(*kept, *axes).reshape(*(x.shape[axis] for axis in kept), -1)
        order = jnp.sort(flat, axis=-1)
        found = order[..., self.rank(flat.shape[-1]) - 1]
        found = jnp.where(jnp.isnan(order[..., -1]), jnp.nan, found)
        return found.reshape([1 if axis in axes else n for axis, n in enumerate(x.shape)])


@dataclass(frozen=True)
class MSE(Calibrator):
    """The fraction of the largest magnitude with the least squared error; never worse than Absmax.

    Attributes:
        least: The smallest fraction tried.
        steps: How many, from 1 down; of equal errors the larger fraction wins.

    Raises:
        ValueError: `least` is outside (0, 1], or there are no steps.
    """

    least: float = 0.2
    steps: int = 33

    def __post_init__(self) -> None:
        """Checks that the fractions and their number make sense."""
        check_number("MSE.least", self.least)
        check_whole("MSE.steps", self.steps)
        if not 0 < self.least <= 1 or self.steps < 1:
            raise ValueError(f"{self!r}: least is in (0, 1], and there is at least one step.")

    @property
    def ratios(self) -> np.ndarray:
        """Fractions of the largest magnitude that are tried, from 1 down."""
        return np.linspace(1.0, self.least, self.steps, dtype=np.float32)

    def bound(self, x: jax.Array, axes: AxisNumbers, error: Any) -> jax.Array:
        """The bound r max |x|, where each group has the r of its least error."""
        whole = Absmax().bound(x, axes, error)

        def better(best: tuple[jax.Array, jax.Array], ratio: jax.Array) -> tuple[Any, None]:
            tried = ratio * whole
            cost = error(tried)
            wins = cost < best[1]
            return (jnp.where(wins, tried, best[0]), jnp.where(wins, cost, best[1])), None

        ratios = jnp.asarray(self.ratios[1:])
        return jax.lax.scan(better, (whole, error(whole)), ratios)[0][0]

    def measure(self, axes: AxisNumbers) -> Measure:
        """The ends, of which the second pass tries fractions."""
        return extremes(axes)

    def refine(self, axes: AxisNumbers, found: Any, error: Error) -> Measure:
        """The error of each fraction of the largest magnitude."""
        del axes
        whole = largest_of(found)

        def measure(x: jax.Array, where: jax.Array | None = None) -> jax.Array:
            seen = x if where is None else jnp.where(where, x, np.float32(0))
            return jax.lax.map(lambda m: error(seen, m), whole * jnp.asarray(self.ratios))

        def best(errors: Any) -> Any:
            # Of equal errors argmin takes the first, which is the largest fraction.
            ratios = self.ratios if isinstance(errors, np.ndarray) else jnp.asarray(self.ratios)
            return ratios[errors.argmin()] * whole.astype(np.float32)

        return Measure(measure, lambda a, b: a + b, best)


@dataclass(frozen=True)
class Fixed(Calibrator):
    """A given range: `Fixed(m)` is [-m, m], `Fixed(low, high)` any that contains zero.

    Raises:
        ValueError: The range does not contain zero, or is not finite.

    Example:
        >>> Fixed(2.0).low, Fixed(-1.0, 3.0).high
        (-2.0, 3.0)
    """

    first: float
    second: float | None = None
    two_sided = True

    def __post_init__(self) -> None:
        """Checks that the range is finite and contains zero."""
        for end in (self.first, 0 if self.second is None else self.second):
            check_number("an end of a Fixed range", end)
        if not (
            math.isfinite(self.low) and math.isfinite(self.high) and self.low <= 0 <= self.high
        ):
            raise ValueError(f"{self!r}: the range is finite and contains zero.")

    @property
    def low(self) -> float:
        """The lower end of the range, as given."""
        return -self.first if self.second is None else self.first

    @property
    def high(self) -> float:
        """The upper end of the range, as given."""
        return self.first if self.second is None else self.second

    def bound(self, x: jax.Array, axes: AxisNumbers, error: Any) -> jax.Array:
        """The end of larger magnitude, the same for every group."""
        del error
        m = np.float32(max(-self.low, self.high))
        return jnp.full([1 if axis in axes else n for axis, n in enumerate(x.shape)], m)

    def bounds(self, x: jax.Array, axes: AxisNumbers) -> tuple[jax.Array, jax.Array]:
        """The given ends, whatever the numbers are."""
        shape = [1 if axis in axes else n for axis, n in enumerate(x.shape)]
        return jnp.full(shape, np.float32(self.low)), jnp.full(shape, np.float32(self.high))

    def measure(self, axes: AxisNumbers) -> Measure:
        """The ends that were met, which the range does not look at."""
        given = np.float32(self.low), np.float32(self.high)
        return extremes(axes)._replace(range=lambda _: given)


def _histogram(x: jax.Array, ones: jax.Array, axes: AxisNumbers) -> jax.Array:
    """int32 (.., BINS): how many magnitudes lie in each bin, over some axes."""
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.uint32) >> np.uint32(SHIFT)

    def counted(bits: jax.Array, ones: jax.Array) -> jax.Array:
        return jnp.zeros(BINS, jnp.int32).at[bits.reshape(-1)].add(ones.reshape(-1))

    count = counted
    for _ in kept:  # a histogram for each position of the axes that do not share a range
        count = jax.vmap(count)
    order = [*kept, *axes]
    return count(bits.astype(jnp.int32).transpose(order), ones.transpose(order))
