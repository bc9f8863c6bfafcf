"""Rows: what a batch has so many of, what each gets a key of its own for."""

from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_key
from unitscale_jax.typing import Batch, Key


def row_keys(key: Key, rows: int, *, start: Any = 0) -> Key:
    """One key per row, `fold_in(key, i)` for row `i` of the whole batch: what a loss receives.

    Row i's randomness depends on the key and on i, so neither the number of parts nor the number of
    devices changes a dropout mask.

    Args:
        key: A typed key.
        rows: How many rows.
        start: Index of the first of them in the whole batch.

    Returns:
        Keys `(rows,)`.

    Example:
        >>> keys = row_keys(jax.random.key(7), 4)
        >>> [hex(int(jax.random.bits(k))) for k in keys[:2]]
        ['0xde0bff25', '0xacd58f1f']
    """
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(start + jnp.arange(rows))


def keys_of_rows(key: Key | None, rows: int, *, start: Any = 0) -> Key | None:
    """`key` if it holds one key per row, or its `row_keys` if it is a single one, or `None`."""
    check_row_keys(key, rows)
    return row_keys(key, rows, start=start) if key is not None and not key.shape else key


def check_row_keys(key: Key | None, rows: int) -> None:
    """Raises `TypeError` for what is no typed key, `ValueError` unless it is one or one per row."""
    if key is None:
        return
    check_key(key)
    if key.shape not in ((), (rows,)):
        raise ValueError(
            f"`key` has shape {key.shape}; expected one key, or one per row, ({rows},)."
        )


def row_count(batch: Batch) -> int:
    """Length of the leading axis that all leaves of a batch share.

    Raises:
        ValueError: The batch is empty, a leaf has no axis, or two leaves disagree; it names them.
    """
    rows: dict[str, int] = {}
    for name, leaf in trees.named_leaves(batch).items():
        if not jnp.shape(leaf):
            raise ValueError(
                f"batch leaf {name!r} is a scalar; every leaf of a batch has a leading axis of "
                "rows. Pass per-step scalars in `state`."
            )
        rows[name] = jnp.shape(leaf)[0]
    if not rows:
        raise ValueError(
            "the batch has no leaves; expected arrays that share a leading axis of rows."
        )
    first, count = next(iter(rows.items()))
    for name, other in rows.items():
        if other != count:
            raise ValueError(
                f"batch leaf {name!r} has {other} rows and {first!r} has {count}; the leading axis "
                "of every leaf is the rows. Pass what is not per row in `state`."
            )
    return count
