"""Where a range comes from.

    Absmax           max |x|, nothing is clipped
    Percentile(p)    the k-th smallest |x|, k = ceil(p n / 100)
    MSE()            r max |x| with the least squared error, r among 33 from 1 to 0.2
    EMA(b)           b m + (1 - b) max |x| over batches; of one array its max
    Fixed(..)        given

A calibrator finds the range of an array here (a weight, or an activation at the moment of use), and
that of a stream of batches in `_stats`.
"""

import abc
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Axes = tuple[int, ...]


class Calibrator(abc.ABC):
    """Finds the bound m of |x|; see the subclasses."""

    clips: bool = True
    two_sided: bool = False

    @abc.abstractmethod
    def bound(self, x: jax.Array, axes: Axes, error: Any) -> jax.Array:
        """The bound of |x| over `axes`, kept with size 1.

        Args:
            x: float32, on the grid of its first dtype.
            axes: Positive axes that share a bound.
            error: Maps a bound to the squared quantization error summed over `axes`.
        """

    def bounds(self, x: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
        """The least and the largest value over `axes`, zero included."""
        low = jnp.minimum(jnp.min(x, axis=axes, keepdims=True, initial=0.0), 0.0)
        high = jnp.maximum(jnp.max(x, axis=axes, keepdims=True, initial=0.0), 0.0)
        return low, high


@dataclass(frozen=True)
class Absmax(Calibrator):
    """The largest magnitude: nothing is clipped."""

    clips = False
    two_sided = True

    def bound(self, x: jax.Array, axes: Axes, error: Any) -> jax.Array:
        """Max |x|; of no elements 0."""
        del error
        return jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)


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
        """Checks the decay."""
        if not 0 <= self.decay < 1:
            raise ValueError(f"{self!r}: decay is in [0, 1).")

    def bound(self, x: jax.Array, axes: Axes, error: Any) -> jax.Array:
        """Of one array its max."""
        return Absmax().bound(x, axes, error)


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
        """Checks the percentage."""
        if not 0 < self.p <= 100:
            raise ValueError(f"{self!r}: p is a percentage in (0, 100].")

    def rank(self, n: int) -> int:
        """K for n elements; the ceiling is of p n / 100 to nine digits, since 99.9 is not exact."""
        return max(1, math.ceil(round(self.p * n / 100, 9)))

    def bound(self, x: jax.Array, axes: Axes, error: Any) -> jax.Array:
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
        """Checks the fractions."""
        if not 0 < self.least <= 1 or self.steps < 1:
            raise ValueError(f"{self!r}: least is in (0, 1], and there is at least one step.")

    @property
    def ratios(self) -> np.ndarray:
        """The fractions, from 1 down."""
        return np.linspace(1.0, self.least, self.steps, dtype=np.float32)

    def bound(self, x: jax.Array, axes: Axes, error: Any) -> jax.Array:
        """R max |x|, for each group its own r."""
        whole = Absmax().bound(x, axes, error)

        def better(best: tuple[jax.Array, jax.Array], ratio: jax.Array) -> tuple[Any, None]:
            tried = ratio * whole
            cost = error(tried)
            wins = cost < best[1]
            return (jnp.where(wins, tried, best[0]), jnp.where(wins, cost, best[1])), None

        ratios = jnp.asarray(self.ratios[1:])
        return jax.lax.scan(better, (whole, error(whole)), ratios)[0][0]


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
        """Checks the range."""
        if not (
            math.isfinite(self.low) and math.isfinite(self.high) and self.low <= 0 <= self.high
        ):
            raise ValueError(f"{self!r}: the range is finite and contains zero.")

    @property
    def low(self) -> float:
        """The lower end."""
        return -self.first if self.second is None else self.first

    @property
    def high(self) -> float:
        """The upper end."""
        return self.first if self.second is None else self.second

    def bound(self, x: jax.Array, axes: Axes, error: Any) -> jax.Array:
        """The larger end, for every group."""
        del error
        m = np.float32(max(-self.low, self.high))
        return jnp.full([1 if axis in axes else n for axis, n in enumerate(x.shape)], m)

    def bounds(self, x: jax.Array, axes: Axes) -> tuple[jax.Array, jax.Array]:
        """The given ends."""
        shape = [1 if axis in axes else n for axis, n in enumerate(x.shape)]
        return jnp.full(shape, np.float32(self.low)), jnp.full(shape, np.float32(self.high))
