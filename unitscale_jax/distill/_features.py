"""Features: distances of what a student computes inside from what its teacher does.

    hidden     mean over channels (P h_S - h_T)^2
    cosine     1 - h_S h_T / (|h_S| |h_T|)

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

from unitscale_jax.distill._losses import fixed, sum_dtype
from unitscale_jax.errors import check_type
from unitscale_jax.trace.program import is_concrete


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
    if not is_concrete(index):
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
