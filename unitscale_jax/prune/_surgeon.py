"""Pruning one matrix against the moments of its inputs: equations on arrays.

    min ||X (W' - W)||^2 = tr (W' - W)^T H (W' - W),    W' zero outside of a mask

`sweep` finds a mask and weights together, greedily, input by input; `least_squares` solves for the
weights when the mask is given. Matrices are (K, outputs), H is (K, K).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.prune._select import exact_k, n_of_m
from unitscale_jax.trace.params import damped_moments

EXACT = jax.lax.Precision.HIGHEST


def obs_sweep(
    w: jax.Array,
    u: jax.Array,
    dead: jax.Array,
    counts: jax.Array,
    *,
    block: int,
    ratio: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Prunes a matrix input by input, the error of each spread over those to come.

    Args:
        w: float32 (K, outputs).
        u: float32 (K, K), upper triangular, U^T U = H^-1; see `inverse_factor`.
        dead: bool (K,): inputs that no row used. H says nothing of them, and its factor as much
            as U_jj = 1: they are ranked among themselves, by magnitude, and keep their share.
        counts: int32 (blocks,): how many weights of each block of inputs stay.
        block: How many inputs are decided on together; the last block may have fewer.
        ratio: (n, m): n of every m inputs stay for each output, and `counts` is not looked at;
            m divides K and `block`.

    Returns:
        The weights, exactly zero where pruned, and the mask.

    Law: blocks only put off work for N:M, so there `block` changes rounding alone.
    """
    # The last block is filled up with inputs that depend on no other (U_jj = 1) and that are ranked
    # below all, so that one loop serves blocks of one size. Within a block the error of an input is
    # spread over the block at once; later blocks take the errors of a whole block in one product.
    k, outputs = w.shape
    blocks = -(-k // block)
    short = blocks * block - k
    w = jnp.pad(w, ((0, short), (0, 0)))
    dead = jnp.pad(dead, (0, short))
    padding = jnp.where(jnp.arange(blocks * block) < k, np.float32(0), np.float32(1))
    u = jnp.pad(u, ((0, short), (0, short))) + jnp.diag(padding)
    size = block if ratio is None else ratio[1]

    def one_block(w: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = b * block
        corner = jax.lax.dynamic_slice(u, (start, start), (block, block))
        absent = jax.lax.dynamic_slice_in_dim(padding, start, block) == 1
        unseen = jax.lax.dynamic_slice_in_dim(dead, start, block)
        rows = jax.lax.dynamic_slice_in_dim(w, start, block)

        def one_group(g: jax.Array, state: _State) -> _State:
            rows, mask, errors = state
            scores = jnp.abs(rows) / jnp.diagonal(corner)[:, None]
            scores = jnp.where(absent[:, None], np.float32(np.nan), scores)  # NaN ranks lowest
            if ratio is None:
                keep = _shared(scores, unseen, k - start, counts[b])
            else:
                part = jax.lax.dynamic_slice_in_dim(scores, g * size, size)
                keep = n_of_m(part, *ratio, axis=0)
            mask = jax.lax.dynamic_update_slice_in_dim(mask, keep, g * size, axis=0)
            first, step = g * size, functools.partial(_one_row, corner=corner, mask=mask)
            rows, errors = jax.lax.fori_loop(first, first + size, step, (rows, errors))
            return rows, mask, errors

        begin = rows, jnp.zeros((block, outputs), bool), jnp.zeros((block, outputs), jnp.float32)
        rows, mask, errors = jax.lax.fori_loop(0, block // size, one_group, begin)
        strip = jax.lax.dynamic_slice_in_dim(u, start, block)
        later = (jnp.arange(blocks * block) >= start + block)[:, None]
        w = w - jnp.where(later, jnp.matmul(strip.T, errors, precision=EXACT), np.float32(0))
        return jax.lax.dynamic_update_slice_in_dim(w, rows, start, axis=0), mask

    w, masks = jax.lax.scan(one_block, w, jnp.arange(blocks))
    return w[:k], masks.reshape(blocks * block, outputs)[:k]


_State = tuple[jax.Array, jax.Array, jax.Array]


def _shared(scores: jax.Array, unseen: jax.Array, left: jax.Array, count: jax.Array) -> jax.Array:
    """Marks the weights of a block that stay, by |w| / U_jj: the order of its square.

    Inputs that were seen and those that were not are two rankings, since |w| / U_jj of the ones has
    a scale that |w| of the others has not; each keeps its share of the count, rounded down for the
    unseen.
    """
    block = scores.shape[0]
    size = jnp.minimum(left, block)  # rows that are no padding
    many = jnp.sum(unseen, dtype=jnp.int32)
    # count * many / size, in two parts that stay within int32.
    share = count // size * many + count % size * many // size

    def rank(those: jax.Array, k: jax.Array) -> jax.Array:
        return exact_k(jnp.where(those[:, None], scores, np.float32(np.nan)), k)

    return rank(~unseen, count - share) | rank(unseen, share)


def _one_row(
    j: jax.Array, pair: tuple[jax.Array, jax.Array], corner: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Prunes input j of a block, and spreads its error over the block's later inputs.

    e = (w_j - w'_j) / U_jj,    w_i -= U_ji e    for i > j
    """
    rows, errors = pair
    row = rows[j]
    left = jnp.where(mask[j], row, np.float32(0))
    error = (row - left) / corner[j, j]
    spread = jnp.where(jnp.arange(rows.shape[0]) > j, corner[j], np.float32(0))
    rows = (rows - spread[:, None] * error[None]).at[j].set(left)
    return rows, errors.at[j].set(error)


def least_squares(w: jax.Array, h: jax.Array, mask: jax.Array, damp: float) -> jax.Array:
    """The weights on a mask whose products are closest to those of `w`: (K, outputs).

    NaN where the damped moments of the kept inputs are singular in float32.
    """
    damped, _ = damped_moments(h, damp)
    target = jnp.matmul(damped, w, precision=EXACT)
    eye = jnp.eye(w.shape[0], dtype=jnp.float32)

    def column(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        kept, goal = pair
        system = jnp.where(kept[:, None] & kept[None], damped, eye)
        goal = jnp.where(kept, goal, np.float32(0))
        lower = jnp.linalg.cholesky(system)
        found = jax.scipy.linalg.cho_solve((lower, True), goal)
        return jnp.where(kept, found, np.float32(0))

    return jax.lax.map(column, (mask.T, target.T), batch_size=16).T


def squared_error(off: jax.Array, h: jax.Array) -> jax.Array:
    """||X off||^2, summed over matrices: `off` (batch, K, outputs), `h` (batch, K, K)."""
    sums = jnp.einsum("bkn,bkl,bln->", off, h, off, precision=EXACT)
    return jnp.maximum(sums, np.float32(0))
