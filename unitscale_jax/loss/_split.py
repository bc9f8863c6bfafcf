"""Rows dealt out to parts: part k holds rows k, k + K, k + 2K, ...

Strided, since a contiguous split of contiguously sharded rows would move every row to another
device. Where K does not divide the rows, the last places repeat the last row and are marked as not
valid; a row of zeros would do as a filler only until someone takes its logarithm.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unitscale_jax import rules
from unitscale_jax.typing import Batch, Key


class Part(NamedTuple):
    """Some rows of a batch; stacked, every leaf has a leading axis of parts.

    Attributes:
        batch: The rows, leaves `(rows, ...)`.
        key: A key per row, or `None`.
        valid: Which rows count, or `None` when all do.
    """

    batch: Batch
    key: Key | None
    valid: jax.Array | None


def split(
    batch: Batch, key: Key | None, valid: jax.Array | None, rows: int, parts: int, mask: Any
) -> Part:
    """Deals rows out to `parts` parts of `ceil(rows / parts)` rows.

    Args:
        batch: Leaves `(rows, ...)`.
        key: Keys `(rows,)` or `None`.
        valid: Boolean `(rows,)` or `None`, rows that count.
        rows: Length of the leading axis.
        parts: Number of parts, at most `rows`.
        mask: Patterns of batch leaves to set to zero in rows that do not count, or `None`.

    Returns:
        A stacked `Part`; its `valid` is `None` if every row counts.
    """
    if not 1 <= parts <= rows:
        raise ValueError(
            f"a batch of {rows} rows cannot make {parts} parts. Choose `parts` from 1 to {rows}."
        )
    per_part = -(-rows // parts)
    deal = lambda x: _deal(x, per_part, parts)
    real = None if per_part * parts == rows else jnp.arange(per_part * parts) < rows
    if valid is not None:
        counted = deal(valid)
        counted = counted if real is None else counted & deal(real)
    else:
        counted = None if real is None else deal(real)
    dealt = jax.tree.map(deal, batch)
    return Part(
        batch=_masked(dealt, counted, mask),
        key=None if key is None else deal(key),
        valid=counted,
    )


def _deal(x: jax.Array, per_part: int, parts: int) -> jax.Array:
    missing = per_part * parts - x.shape[0]
    if missing:
        x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing, *x.shape[1:]))])
    return x.reshape(per_part, parts, *x.shape[1:]).swapaxes(0, 1)


def _masked(batch: Batch, valid: jax.Array | None, mask: Any) -> Batch:
    if mask is None:
        return batch
    patterns = [mask] if isinstance(mask, str | re.Pattern) else list(mask)
    chosen = rules.assign([(p, True) for p in patterns], batch, False, noun="batch array")
    if valid is None:
        return batch

    def zeroed(x: jax.Array, choose: bool) -> jax.Array:
        keep = valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim))
        return jnp.where(keep, x, jnp.zeros((), x.dtype)) if choose else x

    return jax.tree.map(zeroed, batch, chosen)


def gather_rows(stacked: Any, rows: int) -> Any:
    """Inverse of the deal: leaves `(parts, rows per part, ...)` in the order of the whole batch."""
    merge = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:rows]
    return jax.tree.map(merge, stacked)


def first(stacked: Part) -> Part:
    """Takes the first part of a stacked batch."""
    return jax.tree.map(lambda x: x[0], stacked)
