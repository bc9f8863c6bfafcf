"""Features: distances of what a student computes inside from what its teacher does.

    hidden     mean over channels (P h_S - h_T)^2
    attention  || Q_S / ||Q_S|| - Q_T / ||Q_T|| ||^2,    Q = sum over channels A^2
    relations  KL(softmax(R_T R_T^T / sqrt d) || softmax(R_S R_S^T / sqrt d)), per head of width d

Each gives one number per row (a token, an example), so that padding is left out by the weights of a
`Mean`. No gradient reaches the teacher's side. A student that was compacted from its teacher needs
no projection P: `index` says which of the teacher's channels it kept.

DistilBERT's loss (arXiv 1910.01108), with `pruned` the hard loss of masked language modeling:

    terms = {
        "ce": Term(lambda t, s: kl(t["logits"], s["logits"], 2.0), weight=5.0),
        "cos": Term(lambda t, s: cosine(t["hidden"], s["hidden"]), weight=1.0),
    }
    loss = distilled(masked, teacher_fn, terms, alpha=0.75)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.distill._losses import divergence_of_logits, fixed, sum_dtype
from unitscale_jax.errors import check_type


def hidden_mse(
    t: jax.Array,
    s: jax.Array,
    *,
    projection: jax.Array | None = None,
    index: Any = None,
) -> jax.Array:
    """Mean square of the difference of hidden states.

    Args:
        t: Teacher's states, `(..., channels)`.
        s: Student's states, `(..., channels)`.
        projection: `(student's channels, teacher's)`, learned with the student.
        index: `(student's channels,)` integers: which of the teacher's channels the student has,
            the kept ones of its group after compaction.

    Returns:
        `(...,)`, float32 (float64 for float64).

    Raises:
        ValueError: The channels do not fit, with both sizes.

    Where the student computes what the teacher does in its kept channels, it is 0.

    Example:
        >>> t = jnp.arange(8.0).reshape(2, 4)
        >>> hidden_mse(t, t[:, jnp.array([0, 3])], index=jnp.array([0, 3])).tolist()
        [0.0, 0.0]
    """
    t, s = _aligned(t, s, projection, index)
    return jnp.mean((s - t) ** 2, axis=-1)


def cosine(
    t: jax.Array,
    s: jax.Array,
    *,
    projection: jax.Array | None = None,
    index: Any = None,
) -> jax.Array:
    """One minus the cosine of hidden states, between 0 and 2; 1 where one of them is zero.

    Arguments, result and errors are those of `hidden_mse`.

    Example:
        >>> t = jnp.array([[3.0, 4.0], [1.0, 0.0]])
        >>> cosine(t, 2 * t).tolist(), cosine(t, -t).tolist()
        ([0.0, 0.0], [2.0, 2.0])
    """
    t, s = _aligned(t, s, projection, index)
    t, s = _unit(t), _unit(s)
    zero = ~(jnp.any(t != 0, axis=-1) & jnp.any(s != 0, axis=-1))
    # Half the square of the difference: not below 0, and exact where they are equal.
    return jnp.where(zero, 1, jnp.sum((s - t) ** 2, axis=-1) / 2)


def attention_transfer(t: jax.Array, s: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Square of the distance of maps of where activations are large (arXiv 1612.03928).

    Args:
        t: Teacher's activations, `(..., positions, channels)`.
        s: Student's, with as many positions and any number of channels.
        where: Boolean `(..., positions)`: which positions exist.

    Returns:
        `(...,)`, float32 (float64 for float64), between 0 and 2.

    Raises:
        ValueError: Positions differ.

    Neither the scale of activations nor the order of channels matters. The square of the paper's
    norm, which has no gradient at equality.

    Example:
        >>> t = jnp.array([[1.0, 2.0], [2.0, 0.0]])
        >>> attention_transfer(t, 3 * t[:, ::-1]).item()
        0.0
    """
    t, s = jnp.asarray(t), jnp.asarray(s)
    _same("positions", t.shape[:-1], s.shape[:-1])
    dtype = sum_dtype(t, s)
    maps = []
    for x in (fixed(t, dtype), s.astype(dtype)):
        largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
        x = x / jax.lax.stop_gradient(jnp.where(largest > 0, largest, 1))  # no square overflows
        energy = jnp.sum(x**2, axis=-1)
        maps.append(_unit(energy if where is None else jnp.where(where, energy, 0)))
    return jnp.sum((maps[1] - maps[0]) ** 2, axis=-1)


def attention_scores(t: jax.Array, s: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Mean square of the difference of attention scores before the softmax (arXiv 1909.10351).

    Args:
        t: Teacher's scores, `(..., queries, keys)`.
        s: Student's, of the same shape.
        where: Boolean, broadcast against them: which entries exist. Where one of both is `-inf`
            there is none.

    Returns:
        `(..., queries)`, float32 (float64 for float64): means over the entries that exist, 0 where
        there are none.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> t = jnp.array([[1.0, -jnp.inf], [2.0, 3.0]])
        >>> attention_scores(t, jnp.array([[2.0, 7.0], [2.0, 5.0]])).tolist()
        [1.0, 2.0]
    """
    t, s = jnp.asarray(t), jnp.asarray(s)
    _same("queries and keys", t.shape, s.shape)
    dtype = sum_dtype(t, s)
    t, s = fixed(t, dtype), s.astype(dtype)
    there = ~(jnp.isneginf(t) | jnp.isneginf(s))
    there = there if where is None else there & where
    difference = jnp.where(there, s, 0) - jnp.where(there, t, 0)
    count = jnp.maximum(jnp.sum(there, axis=-1), 1).astype(dtype)
    return jnp.sum(difference**2, axis=-1) / count


def minilm(t: jax.Array, s: jax.Array, heads: int, *, where: jax.Array | None = None) -> jax.Array:
    """Divergence of relations between positions, of queries, keys or values (arXiv 2012.15828).

    MiniLMv2 sums it over the queries, keys and values of one layer of the teacher and the last
    layer of the student.

    Args:
        t: Teacher's vectors, heads side by side, `(..., positions, width)`.
        s: Student's, with as many positions; the width may be another.
        heads: Into how many relation heads both are cut; may be any divisor of both widths.
        where: Boolean `(..., positions)`: which positions exist.

    Returns:
        `(..., positions)`, float32 (float64 for float64): means over heads, 0 for a position that
        does not exist.

    Raises:
        ValueError: Positions differ, or the heads do not divide a width.

    Rotating the vectors of a head changes nothing.

    Example:
        >>> t = jnp.eye(2)
        >>> minilm(t, t[:, ::-1], heads=1).tolist()
        [0.0, 0.0]
    """
    t, s = jnp.asarray(t), jnp.asarray(s)
    _same("positions", t.shape[:-1], s.shape[:-1])
    dtype = sum_dtype(t, s)
    u = _relations("teacher", fixed(t, dtype), heads, where)
    v = _relations("student", s.astype(dtype), heads, where)
    rows = jnp.mean(divergence_of_logits(u, v), axis=-2)
    return rows if where is None else jnp.where(where, rows, 0)


def layer_map(teacher: int, student: int) -> tuple[int, ...]:
    """Which layer of the teacher each of the student is compared with, counted from 0.

    Raises:
        ValueError: The student's layers do not divide the teacher's.

    Example:
        >>> layer_map(12, 4)  # the last of each three
        (2, 5, 8, 11)
    """
    check_type("teacher", teacher, int, "how many layers the teacher has")
    if student < 1 or teacher % student:
        raise ValueError(
            f"{student} layers of the student do not divide the teacher's {teacher}. Choose pairs "
            "of layers by hand, or a student whose depth divides it."
        )
    return tuple((m + 1) * (teacher // student) - 1 for m in range(student))


def _relations(who: str, x: jax.Array, heads: int, where: jax.Array | None) -> jax.Array:
    """Logits of relations, `(..., heads, positions, positions)`."""
    width = x.shape[-1]
    if heads < 1 or width % heads:
        raise ValueError(
            f"{heads} relation heads do not divide the {who}'s width {width}. Choose a common "
            "divisor of both widths; it need not be the number of attention heads."
        )
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], heads, width // heads), -2, -3)
    scores = jnp.einsum("...qd,...kd->...qk", x, x) / jnp.sqrt(jnp.asarray(width // heads, x.dtype))
    if where is not None:
        scores = jnp.where(where[..., None, None, :], scores, -jnp.inf)
    return scores


def _aligned(t: Any, s: Any, projection: Any, index: Any) -> tuple[jax.Array, jax.Array]:
    """Both sides with the same channels, in the dtype they are compared in."""
    t, s = jnp.asarray(t), jnp.asarray(s)
    dtype = sum_dtype(t, s)
    t, s = fixed(t, dtype), s.astype(dtype)
    if index is not None:
        _check_index(index, t.shape[-1])
        t = jnp.take(t, jnp.asarray(index), axis=-1)
    if projection is not None:
        _same("projected channels", (s.shape[-1], t.shape[-1]), jnp.shape(projection))
        s = s @ projection.astype(dtype)
    if t.shape != s.shape:
        raise ValueError(
            f"the teacher's states have shape {t.shape}, the student's {s.shape}. Give a "
            "`projection` (student's channels, teacher's), or the `index` of the kept channels."
        )
    return t, s


def _check_index(index: Any, channels: int) -> None:
    if isinstance(index, jax.core.Tracer):
        return
    beyond = [int(i) for i in np.ravel(np.asarray(index)) if not 0 <= i < channels]
    if beyond:
        raise ValueError(
            f"`index` names channel {beyond[0]}, and the teacher has {channels}, counted from 0. "
            "Take the kept channels of the group that the feature belongs to."
        )


def _same(what: str, expected: tuple[int, ...], came: tuple[int, ...]) -> None:
    if expected != came:
        raise ValueError(f"{what} differ: expected {expected}, as of the teacher, and got {came}.")


def _unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1 along the last axis; what is shorter than 1e-19 becomes zero.

    A direction does not depend on the scale, so the scale is a constant to the gradient, and
    squares neither overflow nor vanish.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    there = largest > jnp.sqrt(jnp.finfo(x.dtype).tiny)
    x = jnp.where(there, x, 1) / jnp.where(there, largest, 1)
    return jnp.where(there, x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True)), 0)
