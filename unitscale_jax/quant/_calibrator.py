"""The interface of calibrators, each of which owns all that is known of a range.

Of an array that is there (a weight, an activation at the moment of use) it gives a `bound`; of a
stream of batches it says what to `measure`, as numbers that add up. A user's own calibrator is a
subclass with `bound` alone, and what else it can do is found by trying.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.statistics import Measure

AxisNumbers = tuple[int, ...]
Error = Callable[[jax.Array, jax.Array], jax.Array]
"""Maps an array and a bound to the squared quantization error, summed."""
GroupError = Callable[[jax.Array], jax.Array]
"""Maps a bound of each group to the squared quantization error of the group."""


class Calibrator(abc.ABC):
    """Finds the bound m of |x|; a subclass has `bound`, and everything else follows or is refused.

    Attributes:
        clips: Whether a value may lie beyond the bound.
        two_sided: Whether `bounds` finds two ends, for asymmetric codes.

    Example:
        Half of the largest magnitude, of weights, activations and statistics alike:

        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Half(Calibrator):
        ...     def bound(self, x, axes, error):
        ...         return 0.5 * jnp.max(jnp.abs(x), axis=axes, keepdims=True)
        >>> rules = {"w": us.DotSpec(w=us.QSpec(), x=us.QSpec(calibrator=Half()))}
        >>> fn = lambda params, x: x @ params["w"]
        >>> stats = us.calibrate(fn, {"w": jnp.eye(2)}, [(jnp.array([[1.0, -4.0]]),)], rules)
        >>> stats["w"].range.tolist()
        [-2.0, 2.0]
    """

    clips: bool = True
    two_sided: bool = False

    @abc.abstractmethod
    def bound(self, x: jax.Array, axes: AxisNumbers, error: GroupError) -> jax.Array:
        """The bound of |x| over `axes`, kept with size 1.

        Args:
            x: float32, on the grid of its first dtype.
            axes: Positive axes that share a bound.
            error: Maps a bound to the squared quantization error summed over `axes`.
        """

    def bounds(self, x: jax.Array, axes: AxisNumbers) -> tuple[jax.Array, jax.Array]:
        """The least and the largest value over `axes`, zero included."""
        low = jnp.minimum(jnp.min(x, axis=axes, keepdims=True, initial=0.0), 0.0)
        high = jnp.maximum(jnp.max(x, axis=axes, keepdims=True, initial=0.0), 0.0)
        return low, high

    @property
    def takes_the_maximum(self) -> bool:
        """True if the bound of an array is its largest magnitude, as that of `Absmax` is."""
        return _tried(self)[1]

    def measure(self, axes: AxisNumbers) -> Measure:
        """Returns the measure that the range of a stream of arrays is read from.

        Unless a subclass says otherwise, the ends over all of the stream passed through `bound`, or
        for asymmetric codes through `bounds`: right for a bound that reads the largest magnitude
        alone. Whether this one does is tried on a few arrays.

        Args:
            axes: Positive axes that share a range.

        Raises:
            ValueError: The bound reads more, so that another `measure` is needed.
        """
        if not _tried(self)[0]:
            raise ValueError(
                f"{self!r} finds its bound from more than the largest magnitude (an order, a mean, "
                "an error), which does not add up over batches. Give the class a method "
                "`measure(axes)` that returns the `Measure` its range is read from."
            )
        own = (0,)

        # `bound` and `bounds` take an array and its axes: the ends of a stream stand as an array of
        # one or two numbers, whose largest magnitude is that of the whole stream.
        def alone(*ends: Any) -> jax.Array:
            return jnp.stack([jnp.asarray(end, jnp.float32) for end in ends])

        def bound(numbers: Any) -> jax.Array:
            m = alone(largest_of(numbers))
            return self.bound(m, own, _no_error).reshape(())

        def ends(numbers: Any) -> tuple[jax.Array, jax.Array]:
            low, high = self.bounds(alone(numbers["low"], numbers["high"]), own)
            return low.reshape(()), high.reshape(())

        return extremes(axes)._replace(range=bound, ends=ends)

    def refine(self, axes: AxisNumbers, found: Any, error: Error) -> Measure | None:
        """The measure of a second pass over the batches; None: one is enough.

        Args:
            axes: As of `measure`.
            found: The numbers of the first pass.
            error: Maps an array and a bound to the squared quantization error of all of it.
        """
        del axes, found, error
        return None


def extremes(axes: AxisNumbers) -> Measure:
    """The least and the largest value of a stream, zero included."""

    def measure(x: jax.Array, where: jax.Array | None = None) -> dict[str, jax.Array]:
        seen = x if where is None else jnp.where(where, x, np.float32(0))
        low, high = jnp.min(seen, axes, initial=0.0), jnp.max(seen, axes, initial=0.0)
        return {"low": low, "high": high}

    def join(a: Any, b: Any) -> dict[str, Any]:
        low = -larger_of(-a["low"], -b["low"])
        return {"low": low, "high": larger_of(a["high"], b["high"])}

    return Measure(measure, join, lambda numbers: (numbers["low"], numbers["high"]))


@functools.lru_cache(maxsize=256)
def _tried(calibrator: Calibrator) -> tuple[bool, bool]:
    """Tells by trial whether a bound reads the largest magnitude alone, and whether it is that.

    `Absmax` gives (True, True), half of it (True, False), a mean (False, False). A class cannot be
    asked for this: a user's own subclass has `bound` alone. So the bound of each trial array is
    compared with the bound of the one number max |x|.
    """
    same = functools.partial(np.allclose, rtol=1e-6, atol=0, equal_nan=True)
    largest = True

    def bound(x: Any) -> np.ndarray:
        return np.ravel(calibrator.bound(jnp.asarray(x, jnp.float32), (0,), _no_error))

    def ends(x: Any) -> np.ndarray:
        return np.ravel(calibrator.bounds(jnp.asarray(x, jnp.float32), (0,)))

    with jax.ensure_compile_time_eval():
        try:
            for x in _trials():
                m = np.abs(x).max()
                one, two = same(bound(x), bound([m])), True
                if calibrator.two_sided:
                    two = same(ends(x), ends([x.min(), x.max()]))
                if not one or not two:
                    return False, False
                largest = largest and same(bound(x), m)
        except _ReadsError:
            return False, False
    return True, largest


def _trials() -> list[np.ndarray]:
    """Arrays of one sign and of both, of few elements and of many.

    Their tails are heavy and long enough that a mean, a count or an order statistic, up to the
    99.999th percentile, is told apart from the maximum.
    """
    draw = np.random.default_rng(0)
    tails = draw.standard_t(1, size=1 << 17)
    return [x.astype(np.float32) for x in (tails, draw.random(65), -draw.random(7), tails[:3])]


class _ReadsError(Exception):
    """Raised by a bound that asks for the quantization error."""


def _no_error(*_: Any) -> Any:
    raise _ReadsError


def larger_of(a: Any, b: Any) -> Any:
    """The larger of two numbers, in NumPy if both are there: numbers of a stream stay on host."""
    traced = isinstance(a, jax.Array) or isinstance(b, jax.Array)
    return (jnp if traced else np).maximum(a, b)


def largest_of(numbers: Any) -> Any:
    """The largest magnitude of a stream, from the ends that `extremes` measured."""
    return larger_of(-numbers["low"], numbers["high"])
