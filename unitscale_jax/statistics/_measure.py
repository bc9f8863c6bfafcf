"""Measures: numbers of an array that add up, and what is read from their sum.

    numbers(A and B) = join(numbers(A), numbers(B))        for parts A and B of the data

A `Measure` is three pure functions. Calibrators own those of ranges; those of input channels, which
rounding and pruning weigh errors by, are here:

    channels    peak_j = max |x_j|,  total_j = sum |x_j|
    squares     sum x_j^2
    hessian     sum x x^T
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.trace.params import second_moments
from unitscale_jax.trace.program import is_concrete

Numbers = Any
"""A pytree of arrays."""
Ends = tuple[Any, Any]


class Measure(NamedTuple):
    """The functions that measure a stream of arrays.

    Attributes:
        measure: `measure(x)` gives the numbers of one array; with padding it is called as
            `measure(x, where)`, where the boolean `where`, of the shape of `x`, says what counts.
        join: `join(a, b)` gives the numbers of two parts of the data as those of both: associative
            and commutative, so that data may be split and ordered at will.
        range: `range(numbers)` gives the ends `(low, high)` of the range, or the bound m of the
            symmetric range [-m, m]; None for numbers that no range is read from.
        ends: The same for asymmetric codes; None: `range`.
        merge: `merge(a, b)` takes the place of `join` between batches, of which `b` is the later
            one, and may mind their order; None: `join`.

    `join`, `range`, `ends` and `merge` see the numbers of one layer: with stacked layers they are
    mapped. Over batches those are NumPy arrays of 64 bits, in a trace JAX arrays of 32.

    Example:
        The root of the mean square, times three:

        >>> square = lambda x: jnp.square(x).sum()
        >>> rms = Measure(
        ...     measure=lambda x: {"sum": square(x), "count": jnp.float32(x.size)},
        ...     join=lambda a, b: {k: a[k] + b[k] for k in a},
        ...     range=lambda numbers: 3 * (numbers["sum"] / numbers["count"]) ** 0.5,
        ... )
        >>> a, b = rms.measure(jnp.ones(3)), rms.measure(jnp.zeros(9))
        >>> float(rms.range(rms.join(a, b)))
        1.5
    """

    measure: Callable[..., Numbers]
    join: Callable[[Numbers, Numbers], Numbers]
    range: Callable[[Numbers], Any] | None = None
    ends: Callable[[Numbers], Ends] | None = None
    merge: Callable[[Numbers, Numbers], Numbers] | None = None


class Operand(Protocol):
    """The interface of an operand's spec, as far as it decides on what is measured."""

    @property
    def symmetric(self) -> bool:
        """True if the range is [-m, m]."""
        ...

    def measure(self, axes: tuple[int, ...]) -> Measure:
        """The measure that its range is read from, over some axes of an array.

        Raises:
            ValueError: It can be read from no numbers that add up.
        """
        ...

    def refine(self, axes: tuple[int, ...], found: Numbers) -> Measure | None:
        """The measure of a second pass, which needs what the first found; None: one is enough."""
        ...


def _channels(rows: jax.Array) -> Numbers:
    size = jnp.abs(rows)
    return {"peak": jnp.max(size, axis=-2, initial=0.0), "total": jnp.sum(size, axis=-2)}


def _join_channels(a: Numbers, b: Numbers) -> Numbers:
    return {"peak": maximum(a["peak"], b["peak"]), "total": a["total"] + b["total"]}


def _add(a: Any, b: Any) -> Any:
    return a + b


CHANNELS: Mapping[str, Measure] = {
    "channels": Measure(_channels, _join_channels),
    "squares": Measure(lambda rows: jnp.sum(rows * rows, axis=-2), _add),
    "hessian": Measure(second_moments, _add),
}
"""By kind what is measured of rows (batch.., rows, K), float32."""


def joined_turns(kind: str, numbers: Numbers, axes: tuple[int, ...]) -> Numbers:
    """Numbers of `CHANNELS` of all turns of loops, which are axes, as one."""
    if kind == "channels":
        return {
            "peak": jnp.max(numbers["peak"], axis=axes),
            "total": jnp.sum(numbers["total"], axis=axes),
        }
    return jnp.sum(numbers, axis=axes)


def each_layer(fn: Callable[..., Any], layers: int, *trees: Any) -> Any:
    """Maps a function over the first `layers` axes of all arrays of its arguments."""
    if layers == 0:
        return fn(*trees)
    inner = functools.partial(each_layer, fn, layers - 1)
    if not on_host(trees):
        return jax.vmap(inner)(*trees)
    count = len(jax.tree.leaves(trees)[0])
    rows = [inner(*jax.tree.map(lambda x, k=k: x[k], trees)) for k in range(count)]
    return jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *rows)


def host(tree: Any) -> Any:
    """Arrays in NumPy, counts as int64 and floats as float64: sums there neither wrap nor stop."""

    def wide(x: Any) -> np.ndarray:
        x = np.asarray(x)
        counts = x.dtype == bool or jnp.issubdtype(x.dtype, jnp.integer)
        return x.astype(np.int64 if counts else np.float64, copy=False)

    return jax.tree.map(wide, tree)


def on_host(tree: Any) -> bool:
    """True if all arrays of a tree are NumPy arrays."""
    return all(isinstance(x, np.ndarray | np.generic) for x in jax.tree.leaves(tree))


def is_traced(tree: Any) -> bool:
    """True if some array of a tree is traced, so that its numbers are not known."""
    return not all(map(is_concrete, jax.tree.leaves(tree)))


def maximum(a: Any, b: Any) -> Any:
    """The larger one of each two numbers, on the host if both are there."""
    return (np if on_host((a, b)) else jnp).maximum(a, b)
