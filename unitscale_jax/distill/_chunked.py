"""Divergence of two heads from hidden states, without logits of all tokens and all entries.

    sum over rows of weight T^2 KL(softmax(h_t w_t / T) || softmax(h_s w_s / T))

Logits of n tokens and V entries take 4 n V bytes three times over (teacher, student, gradient),
far more than what they are made of. Two ways to go by pieces, each with its own derivative:

*Tokens*: a piece of the rows has its logits, its loss and, where a derivative is taken, its
gradient of h and w at once, so that nothing is computed twice: the four products of a plain head.

*Vocabulary*: a piece of the entries at a time, with running maxima and sums; the logits are made
again in the backward pass, six products. For rows too long by themselves.

Either works on heads that are sharded over the vocabulary, inside `shard_map`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from unitscale_jax.distill._heads import (
    Head,
    alike,
    counted,
    like,
    pieces,
    rows_times,
    summed,
    times,
)
from unitscale_jax.distill._losses import check_temperature, divergence
from unitscale_jax.errors import check_array, expected, wrong_shape
from unitscale_jax.mesh_axes import varying, varying_axes


def chunked_kl(
    h_t: jax.Array,
    w_t: jax.Array,
    h_s: jax.Array,
    w_s: jax.Array,
    *,
    temperature: Any = 1.0,
    chunk: int,
    over: Literal["tokens", "vocabulary"] = "tokens",
    weight: jax.Array | None = None,
    mesh_axis: str | None = None,
) -> jax.Array:
    """Sums `kl` over rows, from hidden states and heads.

    Args:
        h_t: Teacher's hidden states, `(..., width)`; no gradient reaches them, nor `w_t`.
        w_t: Teacher's head, `(width, vocabulary)`.
        h_s: Student's hidden states, with the leading axes of the teacher's and any width.
        w_s: Student's head, `(width, vocabulary)`.
        temperature: T > 0, a scalar; may be traced.
        chunk: Rows or entries of one piece, any number; it need not divide theirs.
        over: What is cut in pieces.
        weight: How much each row counts, booleans or numbers of the leading axes `(...)`; None:
            one each.
        mesh_axis: Inside `shard_map`, the manual axis over which both heads are cut by vocabulary.

    Returns:
        A float32 scalar, `sum weight * kl`: the total of a `Mean` whose weight is the sum of
        `weight`. Inside `shard_map` it is of these rows and of the whole vocabulary.

    Raises:
        ValueError: Vocabularies, rows or widths differ, a chunk below 1, a temperature that is not
            positive, heads that do not vary over `mesh_axis`.

    Value and gradients are those of `kl`, for every chunk. Products sum in float32.

    Example:
        >>> h, w = jnp.arange(6.0).reshape(3, 2) / 6, jnp.arange(8.0).reshape(2, 4) / 8
        >>> pieces = chunked_kl(h, w, h, 2 * w, chunk=2, over="vocabulary")
        >>> bool(jnp.allclose(pieces, us.distill.kl(h @ w, h @ (2 * w)).sum()))
        True
    """
    check_array("h_t", h_t, 1)
    _check(h_t, w_t, h_s, w_s, chunk, over, mesh_axis)
    check_temperature(temperature)
    rows = h_s.shape[:-1]
    weight = jnp.ones(rows, jnp.float32) if weight is None else weight
    if weight.shape != rows:
        raise ValueError(wrong_shape("the weight", weight.shape, f"one per row, {rows}"))
    t, s = (Head(h.reshape(-1, h.shape[-1]), w) for h, w in ((h_t, w_t), (h_s, w_s)))
    scale = jnp.asarray(temperature).astype(jnp.float32)
    weight = weight.reshape(-1).astype(jnp.float32)
    t, scale, weight = lax.stop_gradient((t, scale, weight))
    return _TOTALS[over](chunk, mesh_axis, t, s, scale, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_tokens(
    chunk: int,
    mesh_axis: str | None,
    t: Head,
    s: Head,
    temperature: jax.Array,
    weight: jax.Array,
) -> jax.Array:
    (t, s, temperature, weight), axes = alike((t, s, temperature, weight))

    def step(total: jax.Array, start: Any, size: int) -> jax.Array:
        log_p, log_q, rows = _piece(t, s, temperature, weight, start, size, mesh_axis, axes)
        return total + counted(rows, divergence(log_p, log_q))

    total = pieces(step, varying(jnp.float32(0), axes), len(weight), chunk)
    return summed(total * temperature**2, mesh_axis)


def _by_tokens_fwd(
    chunk: int,
    mesh_axis: str | None,
    t: Head,
    s: Head,
    temperature: jax.Array,
    weight: jax.Array,
) -> tuple[jax.Array, Any]:
    given = s
    (t, s, temperature, weight), axes = alike((t, s, temperature, weight))

    def step(carry: Any, start: Any, size: int) -> Any:
        total, dh, dw = carry
        log_p, log_q, rows = _piece(t, s, temperature, weight, start, size, mesh_axis, axes)
        total += counted(rows, divergence(log_p, log_q))
        d = rows_times(rows * temperature, jnp.exp(log_q) - jnp.exp(log_p))
        dh = lax.dynamic_update_slice_in_dim(dh, times(d, s.w.T), start, 0)
        return total, dh, dw + times(s.rows(start, size).h.T, d)

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (temperature, *s)]
    total, dh, dw = pieces(step, tuple(varying(zeros, axes)), len(weight), chunk)
    # Not yet summed over devices, since what comes back may differ between them.
    return summed(total * temperature**2, mesh_axis), (dh, dw, given)


def _by_tokens_bwd(chunk: int, mesh_axis: str | None, saved: Any, g: jax.Array) -> Any:
    del chunk, mesh_axis
    dh, dw, s = saved
    return None, Head(like(dh * g, s.h), like(dw * g, s.w)), None, None


_by_tokens.defvjp(_by_tokens_fwd, _by_tokens_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_vocabulary(
    chunk: int,
    mesh_axis: str | None,
    t: Head,
    s: Head,
    temperature: jax.Array,
    weight: jax.Array,
) -> jax.Array:
    return _by_vocabulary_fwd(chunk, mesh_axis, t, s, temperature, weight)[0]


def _by_vocabulary_fwd(
    chunk: int,
    mesh_axis: str | None,
    t: Head,
    s: Head,
    temperature: jax.Array,
    weight: jax.Array,
) -> tuple[jax.Array, Any]:
    given = t, s, temperature, weight
    (t, s, temperature, _), axes = alike(given)

    def step(seen: Any, start: Any, size: int) -> Any:
        (m_t, z_t, cross), (m_s, z_s) = seen
        x_t, x_s = (head.columns(start, size).logits(temperature) for head in (t, s))
        # Sums of e^(x - m) for the largest logit m so far, as in online softmax: a larger one
        # scales what was summed by e^(m - n). `cross` is the sum of p (x_t - x_s), likewise.
        n_t, n_s = (jnp.maximum(m, jnp.max(x, axis=-1)) for m, x in ((m_t, x_t), (m_s, x_s)))
        p, q = jnp.exp(x_t - n_t[:, None]), jnp.exp(x_s - n_s[:, None])
        decay = jnp.exp(m_t - n_t)
        z_t, cross = z_t * decay + jnp.sum(p, -1), cross * decay + jnp.sum(p * (x_t - x_s), -1)
        return (n_t, z_t, cross), (n_s, z_s * jnp.exp(m_s - n_s) + jnp.sum(q, -1))

    low, zero = (jnp.full(weight.shape, x) for x in (jnp.finfo(jnp.float32).min, jnp.float32(0)))
    seen = pieces(step, varying(((low, zero, zero), (low, zero)), axes), s.w.shape[1], chunk)
    (m_t, z_t, cross), (m_s, z_s) = _over_shards(seen, mesh_axis)
    # KL = sum p (x_t - x_s) - (lse_t - lse_s), with lse = m + log z. The logarithms of z are
    # joined, log(z_t / z_s), since T^2 would magnify the rounding of a difference of two large
    # numbers.
    rows = jnp.maximum(cross / z_t - (m_t - m_s) - jnp.log(z_t / z_s), 0)
    # As given, these do not vary over shards of the vocabulary, nor then does the total.
    *_, temperature, weight = given
    total = jnp.sum(jnp.where(weight != 0, weight * rows, 0)) * temperature**2
    return total, (*given, (m_t + jnp.log(z_t), m_s + jnp.log(z_s)))


def _by_vocabulary_bwd(chunk: int, mesh_axis: str | None, saved: Any, g: jax.Array) -> Any:
    del mesh_axis
    *given, normalizers = saved
    (t, s, temperature, weight), axes = alike(given)
    lse_t, lse_s = varying(normalizers, axes)
    rows = weight * temperature * varying(g, axes)

    def step(carry: Any, start: Any, size: int) -> Any:
        dh, dw = carry
        x_t, x_s = (head.columns(start, size).logits(temperature) for head in (t, s))
        d = rows_times(rows, jnp.exp(x_s - lse_s[:, None]) - jnp.exp(x_t - lse_t[:, None]))
        dh += times(d, s.columns(start, size).w.T)
        return dh, lax.dynamic_update_slice_in_dim(dw, times(s.h.T, d), start, 1)

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in s]
    dh, dw = pieces(step, tuple(varying(zeros, axes)), s.w.shape[1], chunk)
    return None, Head(like(dh, given[1].h), like(dw, given[1].w)), None, None


_by_vocabulary.defvjp(_by_vocabulary_fwd, _by_vocabulary_bwd)

_TOTALS: dict[str, Callable[..., jax.Array]] = {
    "tokens": _by_tokens,
    "vocabulary": _by_vocabulary,
}


def _piece(
    t: Head,
    s: Head,
    temperature: jax.Array,
    weight: jax.Array,
    start: Any,
    size: int,
    mesh_axis: str | None,
    axes: list[str],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logarithms of both distributions of some rows, and how much these count."""
    logits = [head.rows(start, size).logits(temperature) for head in (t, s)]
    tops = jnp.stack([jnp.max(x, axis=-1) for x in logits])
    tops = varying(tops if mesh_axis is None else lax.pmax(tops, mesh_axis), axes)
    shifted = [x - top[:, None] for x, top in zip(logits, tops, strict=True)]
    totals = summed(jnp.stack([jnp.sum(jnp.exp(x), axis=-1) for x in shifted]), mesh_axis)
    logs = jnp.log(varying(totals, axes))
    log_p, log_q = (x - z[:, None] for x, z in zip(shifted, logs, strict=True))
    return log_p, log_q, lax.dynamic_slice_in_dim(weight, start, size)


def _over_shards(seen: Any, mesh_axis: str | None) -> Any:
    """Running maxima and sums of all shards as one."""
    if mesh_axis is None:
        return seen
    (m_t, z_t, cross), (m_s, z_s) = seen
    n_t, n_s = lax.pmax((m_t, m_s), mesh_axis)
    decay_t, decay_s = jnp.exp(m_t - n_t), jnp.exp(m_s - n_s)
    z_t, cross, z_s = lax.psum((z_t * decay_t, cross * decay_t, z_s * decay_s), mesh_axis)
    return (n_t, z_t, cross), (n_s, z_s)


def _check(
    h_t: jax.Array,
    w_t: jax.Array,
    h_s: jax.Array,
    w_s: jax.Array,
    chunk: int,
    over: str,
    mesh_axis: str | None,
) -> None:
    for who, h, w in (("teacher", h_t, w_t), ("student", h_s, w_s)):
        if w.ndim != 2 or h.shape[-1:] != w.shape[:1]:
            raise ValueError(
                f"the {who}'s hidden states have shape {h.shape}, its head {w.shape}; expected "
                "(..., width) and (width, vocabulary). Of an embedding table give the transpose."
            )
        if mesh_axis is not None and mesh_axis not in varying_axes(w):
            raise ValueError(
                f"the {who}'s head does not vary over the manual axis {mesh_axis!r}. Cut it along "
                "the vocabulary in `in_specs`, and leave `check_vma` of shard_map on."
            )
    if w_t.shape[1] != w_s.shape[1]:
        raise ValueError(
            f"the teacher's vocabulary has {w_t.shape[1]} entries, the student's {w_s.shape[1]}. "
            "Cut or permute both to the entries they share, in one order."
        )
    if h_t.shape[:-1] != h_s.shape[:-1]:
        raise ValueError(
            f"the teacher has rows {h_t.shape[:-1]}, the student {h_s.shape[:-1]}; expected the "
            "same in both."
        )
    if chunk < 1:
        raise ValueError(expected("`chunk`", chunk, "a number of rows or entries above 0"))
    if over not in _TOTALS:
        raise ValueError(expected("`over`", over, ("tokens", "vocabulary")))
