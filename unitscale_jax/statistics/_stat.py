"""Statistics of the operand that meets a parameter, as numbers that add up.

    stats(A and B) = merge(stats(A), stats(B))        for batches A and B

A `Stat` is a monoid: how batches are split, and in which order they come, changes nothing (but for
a measure that minds their order, such as a moving average). One `Stats` serves every technique.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.errors import check_type
from unitscale_jax.statistics._measure import (
    CHANNELS,
    Measure,
    Numbers,
    Operand,
    each_layer,
    host,
    is_traced,
    on_host,
)
from unitscale_jax.trace.params import MatrixForm
from unitscale_jax.trace.program import is_array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "numbers"],
    meta_fields=["spec", "layout"],
)
@dataclass(frozen=True, eq=False)
class Stat:
    """Statistics of the operand that meets a parameter.

    Leading axes of all numbers are those of stacked layers; those of input channels then have the
    batch axes of the product (experts), and K in the order of the parameter's contracted axes.

    Attributes:
        rows: (layers..): how many rows were seen, of a convolution how many positions.
        numbers: By kind what was measured: `"range"` as the calibrator has it, and `"refined"` by
            its second pass; of input channels `"channels"`, `"squares"` and `"hessian"`.
        spec: How the operand is quantized; None: it stays in floating point.
        layout: Which axes of the parameter these are.
    """

    rows: Any
    numbers: Mapping[str, Numbers]
    spec: Operand | None = None
    layout: MatrixForm = field(default_factory=MatrixForm)

    @property
    def range(self) -> Any:
        """float32 (layers.., 2): the ends of the range, (-m, m) if it is symmetric; None without.

        A range that takes two passes is before the second what the first has found.
        """
        if "range" not in self.numbers:
            return None
        numbers = {
            kind: self.numbers[kind] for kind in ("range", "refined") if kind in self.numbers
        }
        if is_traced(numbers):
            return each_layer(self._ends, self.layout.layers, numbers)
        # What is known stays a number inside of a trace, too.
        with jax.ensure_compile_time_eval():
            return jnp.asarray(each_layer(self._ends, self.layout.layers, host(numbers)))

    def _ends(self, numbers: Mapping[str, Numbers]) -> Any:
        """float32 (2,): the ends of one layer's range."""
        assert self.spec is not None
        kind = "refined" if "refined" in numbers else "range"
        measure = self._measure(kind, numbers)
        read = measure.range if self.spec.symmetric else measure.ends or measure.range
        assert read is not None, "`observed` refuses a measure without a range"
        found = read(numbers[kind])
        low, high = found if isinstance(found, tuple | list) else (-found, found)
        xp = np if on_host((low, high)) else jnp
        low, high = (xp.reshape(xp.asarray(end, np.float32), ()) for end in (low, high))
        if self.spec.symmetric:
            high = xp.maximum(-low, high)
            low = -high
        return xp.stack([low, high])

    def _measure(self, kind: str, numbers: Mapping[str, Numbers]) -> Measure:
        """The measure of a kind, by the numbers of one layer."""
        if kind in CHANNELS:
            return CHANNELS[kind]
        assert self.spec is not None
        measure = self.spec.measure((0,))
        if kind == "refined":
            measure = self.spec.refine((0,), numbers["range"]) or measure
        return measure

    @property
    def takes_two_passes(self) -> bool:
        """True if the range needs a second pass over the batches, which it has not had."""
        if self.spec is None or "range" not in self.numbers or "refined" in self.numbers:
            return False
        first = (0,) * self.layout.layers
        one = jax.tree.map(lambda x: x[first], self.numbers["range"])
        return self.spec.refine((0,), one) is not None

    @property
    def hessian(self) -> Any:
        """(batch.., K, K): sums of x x^T, or None."""
        return self.numbers.get("hessian")

    @property
    def matrices(self) -> jax.Array:
        """float32 (matrices, K, K): the second moments of each layer and expert."""
        h = jnp.asarray(self.hessian, jnp.float32)
        return h.reshape(-1, *h.shape[-2:])

    @property
    def squares(self) -> Any:
        """(batch.., K): sums of x_j^2, which second moments have on their diagonal; or None."""
        if self.hessian is None:
            return self.numbers.get("squares")
        xp = np if on_host(self.hessian) else jnp
        return xp.diagonal(self.hessian, axis1=-2, axis2=-1)

    @property
    def peak(self) -> Any:
        """(batch.., channels): max |x_j|, or None."""
        return self.numbers["channels"]["peak"] if "channels" in self.numbers else None

    @property
    def mean(self) -> Any:
        """(batch.., channels): mean |x_j|, or None."""
        if "channels" not in self.numbers:
            return None
        total = np.asarray(self.numbers["channels"]["total"])
        inner = math.prod(total.shape[self.layout.layers : len(self.layout.batch)])
        rows = np.asarray(self.rows, np.float64) / inner
        return total / np.maximum(rows.reshape(*rows.shape, *[1] * (total.ndim - rows.ndim)), 1)

    @property
    def unseen(self) -> np.ndarray:
        """(matrices, K) bool: inputs zero in every row, of which the data says nothing."""
        squares = np.asarray(self.squares)
        return squares.reshape(-1, squares.shape[-1]) == 0

    def merge(self, other: "Stat") -> "Stat":
        """Both together; `other` is the later one, which only a moving average minds.

        Raises:
            ValueError: They are statistics of different things, or second passes of different
                first ones.
        """
        mine, theirs = (
            (stat.spec, stat.layout, sorted(stat.numbers), np.shape(stat.rows))
            for stat in (self, other)
        )
        if mine != theirs:
            raise ValueError(
                f"statistics of {self.layout} for {self.spec} ({', '.join(self.numbers)}) do not "
                f"merge with those of {other.layout} for {other.spec} "
                f"({', '.join(other.numbers)}); collect both by the same rules and kinds."
            )
        if "refined" in self.numbers and not _same(self.numbers["range"], other.numbers["range"]):
            raise ValueError(
                f"the range for {self.spec} takes two passes, and the second of one of the two was "
                "made without the batches of the other; calibrate all batches together."
            )
        return self._with(other, later=True)

    def joined(self, other: "Stat") -> "Stat":
        """Both together as parts of one batch."""
        return self._with(other, later=False)

    def _with(self, other: "Stat", later: bool) -> "Stat":
        by = functools.partial(self._pair, later=later)
        sides = [(stat.rows, dict(stat.numbers)) for stat in (self, other)]
        numbers = each_layer(by, self.layout.layers, *sides)
        both = replace(self, rows=self.rows + other.rows, numbers=numbers)
        return host(both) if on_host((self, other)) else both

    def _pair(self, mine: tuple[Any, Any], theirs: tuple[Any, Any], later: bool) -> Any:
        """Merges two measurements of one layer, kind by kind."""
        out = {}
        for kind, a in mine[1].items():
            measure, b = self._measure(kind, mine[1]), theirs[1][kind]
            join = measure.merge if later and measure.merge is not None else measure.join
            if kind in CHANNELS:
                out[kind] = join(a, b)
            elif kind == "range" and "refined" in mine[1]:
                out[kind] = a  # both have that of the first pass
            else:
                out[kind] = _unless_empty(mine[0], theirs[0], a, b, join(a, b))
        return out


def _unless_empty(rows: Any, more: Any, a: Numbers, b: Numbers, both: Numbers) -> Numbers:
    """Numbers of both; those of the other, where one of them has seen nothing.

    So no measure needs numbers that stand for nothing, such as a branch that was not taken.
    """
    xp = np if on_host((rows, more, a, b, both)) else jnp

    def pick(x: Any, y: Any, z: Any) -> Any:
        return xp.where(rows == 0, y, xp.where(more == 0, x, z))

    return jax.tree.map(pick, a, b, both)


def _same(a: Any, b: Any) -> bool:
    return is_traced((a, b)) or jax.tree.all(jax.tree.map(np.array_equal, a, b))


class Outline:
    """The arguments of a call after the parameters: arrays as shapes and dtypes.

    As static data of a pytree all are equal: statistics of batches of 8 rows and of 32 are one kind
    of tree, and of no trace or checkpoint that has seen one may the other be refused.

    Attributes:
        args: Those by position.
        kwargs: Those by keyword.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Outlines the arguments of a call."""

        def form(x: Any) -> Any:
            return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_array(x) else x

        self.args, self.kwargs = jax.tree.map(form, (args, dict(kwargs)))

    def __eq__(self, other: object) -> bool:
        """True for any two outlines, so that merged statistics have one structure."""
        return isinstance(other, Outline)

    def __hash__(self) -> int:
        """One hash for all outlines, since all are equal: inputs do not tell statistics apart."""
        return hash(Outline)

    def __repr__(self) -> str:
        """Nothing of the inputs, for what compares trees by their text."""
        return "Outline()"


@jax.tree_util.register_pytree_with_keys_class
class Stats(dict[str, Stat]):
    """Parameter -> `Stat`, as `calibrate` and `observed` return them; a pytree.

    It can be jitted, donated, moved and saved; a checkpoint restores it into what one batch gives.

    Attributes:
        inputs: Arguments that it was measured on, without the parameters: arrays as their shapes
            and dtypes.

    Example:
        >>> import tempfile
        >>> fn = lambda params, x: x @ params["w"]
        >>> see = lambda x: us.calibrate(fn, {"w": jnp.eye(2)}, [(x,)], ["w"], collect=["hessian"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     us.Checkpoints(folder).save(0, see(jnp.array([[1.0, 3.0]])))
        ...     restored = us.Checkpoints(folder).restore(see(jnp.zeros((5, 2))))[1]
        >>> restored["w"].hessian.tolist(), int(restored["w"].rows)
        ([[1.0, 3.0], [3.0, 9.0]], 1)
    """

    def __init__(self, stats: Mapping[str, Stat], inputs: Outline) -> None:
        """Statistics, and the outline of a batch."""
        super().__init__(stats)
        self.inputs = inputs

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        """Statistics in the order of their names; names and provenance are static."""
        names = sorted(self)
        pairs = [(jax.tree_util.DictKey(name), self[name]) for name in names]
        return pairs, (tuple(names), self.inputs)

    @classmethod
    def tree_unflatten(cls, static: Any, stats: Iterable[Stat]) -> "Stats":
        """Rebuilds the statistics from their leaves, for JAX."""
        names, inputs = static
        return cls(dict(zip(names, stats, strict=True)), inputs)


def merge_stats(stats: Mapping[str, Stat], more: Mapping[str, Stat]) -> Stats:
    """Statistics of two batches as those of both, `more` the later one.

    Args:
        stats: Of the batches so far.
        more: Of the next, by the same rules and kinds.

    Raises:
        ValueError: One of them has a parameter that the other lacks, or other kinds.

    Law: associative; commutative but for measures that mind the order of batches (`EMA`).

    Example:
        >>> import unitscale_jax as us
        >>> rules = {"w": us.DotSpec(w=us.QSpec(), x=us.QSpec(calibrator=us.quant.EMA(0.5)))}
        >>> fn = lambda p, x: x @ p["w"]
        >>> see = lambda x: us.statistics.observed(fn, rules)({"w": jnp.eye(1)}, x)[1]
        >>> merge_stats(see(jnp.array([[2.0]])), see(jnp.array([[4.0]])))["w"].range.tolist()
        [-3.0, 3.0]
    """
    check_type("stats", stats, Mapping, "what us.calibrate or us.statistics.observed returns")
    if stats.keys() != more.keys():
        odd = sorted(stats.keys() ^ more.keys())
        raise ValueError(f"only one of the two has statistics of {', '.join(odd)}.")
    merged = {name: stat.merge(more[name]) for name, stat in stats.items()}
    return Stats(merged, getattr(more, "inputs", Outline((), {})))
