"""What is known of the operand that meets a parameter, as numbers that add up.

    stats(A and B) = merge(stats(A), stats(B))        for batches A and B

A `Stat` is a monoid: how batches are split, and in which order they come, changes no range (that of
`EMA` follows the order, as its name says).
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.quantization._calibrators import EMA, MSE, Fixed, Percentile
from unitscale_jax.quantization._spec import QSpec
from unitscale_jax.trace import Layout

BINS = 8192
SHIFT = 18  # sign, exponent and five bits of the fraction of a float32 remain: bins of 2^-5

_FIELDS = ["low", "high", "rows", "counts", "errors", "peak", "total", "hessian"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=_FIELDS, meta_fields=["spec", "layout"]
)
@dataclass(frozen=True, eq=False)
class Stat:
    """What is known of the operand that meets a parameter.

    Leading axes are those of stacked layers; `peak`, `total` and `hessian` then have the batch axes
    of the product.

    Attributes:
        low: float32: the least value, at most zero.
        high: float32: the largest value, at least zero.
        rows: How many rows were seen, of a convolution how many positions.
        counts: (.., 8192), of `Percentile`: how many magnitudes lie in each logarithmic bin.
        errors: (.., ratios), of `MSE`: squared quantization errors; see `observed`.
        peak: (.., channels): max |x_j|.
        total: (.., channels): sum |x_j|.
        hessian: (.., K, K): sum x x^T.
        spec: How the operand is quantized; None: it stays in floating point.
        layout: Which axes of the parameter these are.
    """

    low: Any
    high: Any
    rows: Any
    counts: Any = None
    errors: Any = None
    peak: Any = None
    total: Any = None
    hessian: Any = None
    _: KW_ONLY
    spec: QSpec | None
    layout: Layout = field(default_factory=Layout)

    @property
    def range(self) -> Any:
        """float32 (.., 2): the ends of the range, (-m, m) if it is symmetric; None without a spec.

        A range of `MSE` before its second pass is that of `Absmax`.
        """
        if self.spec is None:
            return None
        low, high = self._ends()
        if self.spec.symmetric:
            high = _module(high).maximum(-low, high)
            low = -high
        # What is on the host stays there, so that it is a number inside of a trace, too.
        return jnp.asarray(_module(low).stack([low, high], axis=-1), jnp.float32)

    def _ends(self) -> tuple[Any, Any]:
        calibrator = None if self.spec is None else self.spec.calibrator
        xp = _module(self.low)
        whole = xp.maximum(-self.low, self.high)
        if isinstance(calibrator, Fixed):
            full = lambda end: np.full(np.shape(self.low), end, np.float32)
            return full(calibrator.low), full(calibrator.high)
        if isinstance(calibrator, Percentile):
            m = np.minimum(_percentile(np.asarray(self.counts), calibrator), np.asarray(whole))
            return -m, m
        if isinstance(calibrator, MSE) and self.errors is not None:
            # Of equal errors argmin takes the first, which is the largest fraction.
            best = xp.asarray(calibrator.ratios)[xp.argmin(self.errors, axis=-1)]
            return -best * whole, best * whole
        return self.low, self.high

    @property
    def mean(self) -> Any:
        """(.., channels): mean |x_j|."""
        inner = math.prod(np.shape(self.total)[self.layout.layers : len(self.layout.batch)])
        rows = np.asarray(self.rows, np.float64) / inner
        rows = rows.reshape(*rows.shape, *[1] * (np.ndim(self.total) - rows.ndim))
        return np.asarray(self.total) / np.maximum(rows, 1)

    def merge(self, other: "Stat") -> "Stat":
        """Both together; `other` is the later one, which only `EMA` minds.

        Raises:
            ValueError: They are statistics of different things.
        """
        held = lambda stat: [getattr(stat, name) is not None for name in _FIELDS]
        same = (self.spec, self.layout, held(self)) == (other.spec, other.layout, held(other))
        if not same or np.shape(self.low) != np.shape(other.low):
            raise ValueError(
                f"statistics of {self.layout} for {self.spec} do not merge with those of "
                f"{other.layout} for {other.spec}; collect both by the same rules and kinds."
            )
        whole = self.joined(other)
        if self.spec is None or not isinstance(self.spec.calibrator, EMA):
            return whole
        new = np.float32(1 - self.spec.calibrator.decay)
        # a + new (b - a), so that the average of a constant is that constant to the bit.
        pairs = zip(self._bounds(), other._bounds(), strict=True)
        low, high = (self._unless_empty(other, a, a + new * (b - a), b) for a, b in pairs)
        return replace(whole, low=low, high=high)

    def _bounds(self) -> tuple[Any, Any]:
        """The ends of the range; both the largest magnitude, if it is symmetric."""
        assert self.spec is not None
        m = _module(self.low).maximum(-self.low, self.high)
        return (-m, m) if self.spec.symmetric else (self.low, self.high)

    def _unless_empty(self, other: "Stat", mine: Any, both: Any, theirs: Any) -> Any:
        xp = _module(both)
        return xp.where(self.rows == 0, theirs, xp.where(other.rows == 0, mine, both))

    def joined(self, other: "Stat") -> "Stat":
        """Both together as parts of one batch."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in _FIELDS}
        return replace(
            self,
            **{name: None if a is None else _join(name, a, b) for name, (a, b) in pairs.items()},
        )


class Stats(dict[str, Stat]):
    """Parameter -> `Stat`, as `calibrate` returns them.

    Attributes:
        inputs: Shapes and dtypes of the inputs it was calibrated on, without the parameters.
    """

    def __init__(self, stats: Mapping[str, Stat], inputs: tuple[Any, ...]) -> None:
        """Statistics, and the outline of a batch."""
        super().__init__(stats)
        self.inputs = inputs


def merge_stats(stats: Mapping[str, Stat], more: Mapping[str, Stat]) -> dict[str, Stat]:
    """Statistics of two batches as those of both, `more` the later one.

    Example:
        >>> import unitscale_jax as us
        >>> rules = {"w": us.DotSpec(w=us.QSpec(), x=us.QSpec(calibrator=us.EMA(0.5)))}
        >>> from unitscale_jax.quantization import observed
        >>> see = lambda x: observed(lambda p, x: x @ p["w"], rules)({"w": jnp.eye(1)}, x)[1]
        >>> merge_stats(see(jnp.array([[2.0]])), see(jnp.array([[4.0]])))["w"].range.tolist()
        [-3.0, 3.0]
    """
    if stats.keys() != more.keys():
        odd = sorted(stats.keys() ^ more.keys())
        raise ValueError(f"only one of the two has statistics of {', '.join(odd)}.")
    return {name: stat.merge(more[name]) for name, stat in stats.items()}


_ON_HOST = {
    "low": np.float32,
    "high": np.float32,
    "peak": np.float32,
    "rows": np.int64,
    "counts": np.int64,
    "errors": np.float64,
    "total": np.float64,
    "hessian": np.float64,
}


def on_host(stat: Stat) -> Stat:
    held: dict[str, Any] = {name: getattr(stat, name) for name in _FIELDS}
    wide: dict[str, Any] = {
        name: None if x is None else np.asarray(x).astype(_ON_HOST[name])
        for name, x in held.items()
    }
    return replace(stat, **wide)


def _module(x: Any) -> Any:
    return np if isinstance(x, np.ndarray | np.generic) else jnp


def _join(name: str, a: Any, b: Any) -> Any:
    if name == "low":
        return _module(a).minimum(a, b)
    return _module(a).maximum(a, b) if name in ("high", "peak") else a + b


def _percentile(counts: np.ndarray, calibrator: Percentile) -> np.ndarray:
    """The largest number of the bin that holds the k-th smallest magnitude."""
    flat = counts.reshape(-1, BINS)
    bins = [_bin(row, calibrator.rank(int(row.sum()))) for row in flat]
    edges = ((np.array(bins, np.uint32) + 1) << SHIFT) - 1
    return edges.view(np.float32).reshape(counts.shape[:-1])


def _bin(row: np.ndarray, rank: int) -> int:
    total = np.cumsum(row)
    return int(np.searchsorted(total, rank)) if rank <= total[-1] else 0  # of no elements 0


def is_tried(stat: Stat) -> bool:
    return stat.spec is not None and isinstance(stat.spec.calibrator, MSE)
