"""A vocabulary split over a mesh axis: tables are looked up and losses taken without whole logits.

    loss(y) = log sum_v exp l_v - l_y,      l = [l_1 .. l_n], each device its part

Three small sums over the axis, of one number a row each, stand for gathering `(rows, vocabulary)`
logits (Shoeybi et al. 2019, arXiv:1909.08053). Bodies for a user's own `jax.shard_map`, as in
`_tensor`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_array
from unitscale_jax.mesh_axes import devices_over
from unitscale_jax.parallel.collectives._tensor import exit_sequence
from unitscale_jax.typing import Array


def vocab_loss(
    logits: Array, labels: Array, mesh_axis: str, *, vocab: int | None = None
) -> jax.Array:
    """Cross-entropy of integer labels, row by row, from logits split over the vocabulary.

    Args:
        logits: `(.., vocabulary / n)`, the device's part, of consecutive words; any float dtype.
        labels: `(..)` integers over the whole vocabulary. One that it does not have, such as the
            -1 of padding, has the loss `log sum exp`: leave its row out by the weight of a `Mean`.
        mesh_axis: The manual mesh axis.
        vocab: How many words there are, if the last ones only pad the table: they have no part.

    Returns:
        `(..)`, float32 or wider, the same on all devices.

    Law: the loss and the gradient of one device's whole logits. -inf, words masked out, is allowed,
    for all of a device's words too.

    Example:
        >>> from jax.sharding import PartitionSpec as P
        >>> logits, labels = jnp.log(jnp.array([[1.0, 2, 3, 4]])), jnp.array([2])
        >>> split = jax.shard_map(lambda x, y: us.parallel.vocab_loss(x, y, "tp"),
        ...                       in_specs=(P(None, "tp"), P()), out_specs=P())
        >>> with jax.set_mesh(us.parallel.mesh(dp=2, tp=4)):
        ...     grads = jax.grad(lambda x: split(x, labels).sum())(logits)
        >>> [round(g, 3) for g in grads[0].tolist()]  # softmax, less one at the label
        [0.1, 0.2, -0.7, 0.4]
    """
    check_array("logits", logits, 1)
    devices_over(mesh_axis)
    logits = _real(logits, mesh_axis, vocab)
    at_label = _words(logits, mesh_axis) == jnp.asarray(labels).astype(jnp.int32)[..., None]
    target = lax.psum(jnp.sum(jnp.where(at_label, logits, 0), axis=-1), mesh_axis)
    return vocab_logsumexp(logits, mesh_axis) - target


def vocab_logsumexp(logits: Array, mesh_axis: str, *, vocab: int | None = None) -> jax.Array:
    """`log sum exp` over a split vocabulary: what normalizes logits, and what a z-loss squares.

    Args:
        logits: `(.., vocabulary / n)`, the device's part.
        mesh_axis: The manual mesh axis.
        vocab: As of `vocab_loss`.

    Returns:
        `(..)`, float32 or wider, the same on all devices; -inf where all logits are.
    """
    check_array("logits", logits, 1)
    devices_over(mesh_axis)
    logits = _real(logits, mesh_axis, vocab)
    # The largest is a constant of the equation, and pmax has no derivative.
    largest = lax.pmax(lax.stop_gradient(jnp.max(logits, axis=-1)), mesh_axis)
    shift = jnp.where(jnp.isfinite(largest), largest, 0)  # of -inf everywhere: -inf - -inf is NaN
    total = lax.psum(jnp.sum(jnp.exp(logits - shift[..., None]), axis=-1), mesh_axis)
    return jnp.log(total) + shift


def vocab_argmax(logits: Array, mesh_axis: str, *, vocab: int | None = None) -> jax.Array:
    """The word of the largest logit, of equals the first: greedy decoding over a split vocabulary.

    Args:
        logits: `(.., vocabulary / n)`, the device's part.
        mesh_axis: The manual mesh axis.
        vocab: As of `vocab_loss`.

    Returns:
        `(..)`, int32 over the whole vocabulary, the same on all devices.
    """
    check_array("logits", logits, 1)
    devices_over(mesh_axis)
    logits = _real(logits, mesh_axis, vocab)
    logits = jnp.where(jnp.isnan(logits), jnp.inf, logits)  # first, as for jnp.argmax
    best = jnp.max(logits, axis=-1)
    first = _words(logits, mesh_axis)[jnp.argmax(logits, axis=-1)]
    wins = best == lax.pmax(best, mesh_axis)
    return lax.pmin(jnp.where(wins, first, np.iinfo(np.int32).max), mesh_axis)


def vocab_embed(
    table: Array, ids: Array, mesh_axis: str, *, sequence: int | None = None
) -> jax.Array:
    """Looks rows up in a table that is split by its rows.

    Args:
        table: `(vocabulary / n, width)`, the device's rows: the in_spec is `P("tp", None)`.
        ids: `(..)` integers over the whole vocabulary; outside of it the row is zero.
        mesh_axis: The manual mesh axis.
        sequence: A dim of the result that is to stay split over the axis, as `exit_sequence` leaves
            it; None keeps all.

    Returns:
        `(.., width)`, the same on all devices, or each device's part of `sequence`.

    Law: `table[ids]` of one device, and its gradient, exactly: a single device has the row.

    Example:
        >>> from jax.sharding import PartitionSpec as P
        >>> table, ids = jnp.arange(16.0).reshape(8, 2), jnp.array([0, 5, 7])
        >>> split = jax.shard_map(lambda t, i: us.parallel.vocab_embed(t, i, "tp"),
        ...                       in_specs=(P("tp"), P()), out_specs=P())
        >>> with jax.set_mesh(us.parallel.mesh(dp=2, tp=4)):
        ...     split(table, ids).tolist()
        [[0.0, 1.0], [10.0, 11.0], [14.0, 15.0]]
    """
    check_array("table", table, 2)
    devices_over(mesh_axis)
    rows = table.shape[0]
    here = jnp.asarray(ids).astype(jnp.int32) - lax.axis_index(mesh_axis) * rows
    mine = (here >= 0) & (here < rows)
    found = jnp.where(mine[..., None], table[jnp.clip(here, 0, rows - 1)], 0)
    if sequence is None:
        return lax.psum(found, mesh_axis)
    return exit_sequence(found, mesh_axis, dim=sequence)


def _words(logits: jax.Array, mesh_axis: str) -> jax.Array:
    """Numbers the words that a device has, in the whole vocabulary."""
    count = logits.shape[-1]
    return lax.axis_index(mesh_axis) * count + jnp.arange(count, dtype=jnp.int32)


def _real(logits: Array, mesh_axis: str, vocab: int | None) -> jax.Array:
    """Widens logits to float32 at least, and makes those of words that only pad the table -inf."""
    logits = jnp.asarray(logits)
    logits = logits.astype(trees.wide(logits.dtype))
    if vocab is None:
        return logits
    return jnp.where(_words(logits, mesh_axis) < vocab, logits, -jnp.inf)
