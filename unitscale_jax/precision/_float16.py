"""Float16 parameters for serving, and what the narrower range took from them.

|w| >= 65520 becomes infinite,  |w| < 2^-14 loses digits,  |w| <= 2^-25 becomes 0
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax import rules as rule, tree as trees
from unitscale_jax.precision._policy import dtype_of
from unitscale_jax.typing import DType, Params

SMALLEST_NORMAL = 2.0**-14
LARGEST = 65504.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float16Row:
    """What happened to one leaf.

    Attributes:
        name: Name of the parameter.
        dtype: Dtype it has now.
        size: How many numbers it holds.
        flushed: How many nonzero numbers became 0.
        subnormal: How many numbers are below the smallest normal one, and lost digits.
    """

    name: str
    dtype: str
    size: int
    flushed: int = 0
    subnormal: int = 0


@dataclasses.dataclass(frozen=True)
class Float16Report:
    """A row for every floating leaf; `str(report)` is a table of those that lost something.

    Attributes:
        rows: A `Float16Row` each, in the order of the leaves.
    """

    rows: tuple[Float16Row, ...]

    @property
    def flushed(self) -> int:
        """How many nonzero numbers became 0."""
        return sum(row.flushed for row in self.rows)

    @property
    def subnormal(self) -> int:
        """How many numbers lost digits."""
        return sum(row.subnormal for row in self.rows)

    def __str__(self) -> str:
        """The total, and a line for every leaf that lost something."""
        total = f"{self.flushed} flushed to 0 and {self.subnormal} subnormal"
        lossy = [row for row in self.rows if row.flushed or row.subnormal]
        width = max((len(row.name) for row in lossy), default=0)
        lines = [
            f"  {row.name:{width}}  {row.flushed} flushed, {row.subnormal} subnormal of {row.size}"
            for row in lossy
        ]
        return "\n".join([f"{total}, of {sum(row.size for row in self.rows)} numbers", *lines])


def to_float16(params: Params, rules: rule.Rules[DType] = ()) -> tuple[Params, Float16Report]:
    """Casts parameters to float16 for serving, and reports what was lost.

    Args:
        params: Parameters, as concrete arrays; leaves that are not floating stay as they are.
        rules: Pairs `(pattern, dtype)` for parameters that become another dtype than float16,
            first match wins; norms mostly stay in float32.

    Returns:
        `(params, report)`; a `Float16Report` has a row for every floating leaf.

    Raises:
        ValueError: A finite number would become infinite, a rule matches no parameter, or a dtype
            is unknown.

    The law: what was finite stays finite, and the report counts exactly the numbers that float16
    holds with fewer digits or not at all.

    Example:
        >>> params, report = to_float16({"w": jnp.array([1.0, 1e-6, 1e-9])})
        >>> params["w"].dtype, report.flushed, report.subnormal
        (dtype('float16'), 1, 1)
        >>> print(report)
        1 flushed to 0 and 1 subnormal, of 3 numbers
          w  1 flushed, 1 subnormal of 3
    """
    pairs = [(p, dtype_of(dtype, f"rule {p!r}")) for p, dtype in rule.pairs_of(rules)]
    dtypes = rule.assign(pairs, params, dtype_of("float16", "default"))
    done = jax.tree.map(lambda leaf, dtype: trees.astype(leaf, dtype), params, dtypes)
    triples = zip(trees.names(params), jax.tree.leaves(params), jax.tree.leaves(done), strict=True)
    rows = [_row(name, old, new) for name, old, new in triples if trees.is_floating(old)]
    return done, Float16Report(tuple(rows))


def _row(name: str, old: Any, new: jax.Array) -> Float16Row:
    if new.dtype != jnp.float16:
        return Float16Row(name=name, dtype=new.dtype.name, size=new.size)
    lost, flushed, subnormal = map(int, _losses(jnp.asarray(old), new))
    if lost:
        raise ValueError(
            f"parameter {name!r} has {lost} of {new.size} numbers that would be infinite in "
            f"float16, whose largest is {LARGEST:g}. Keep it in float32 by a rule, "
            f"to_float16(params, [({name!r}, 'float32')]), or in bfloat16."
        )
    return Float16Row(
        name=name, dtype="float16", size=new.size, flushed=flushed, subnormal=subnormal
    )


@jax.jit
def _losses(old: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    size = jnp.abs(new.astype(jnp.float32))
    lost = jnp.isfinite(old) & ~jnp.isfinite(new)
    flushed = (old != 0) & (size == 0)
    subnormal = (size > 0) & (size < SMALLEST_NORMAL)
    return jnp.sum(lost), jnp.sum(flushed), jnp.sum(subnormal)
