"""A teacher's answers kept on disk: its k largest logits, and a bucket for all the others.

    KL over k + 1 events,    p_i = e^(t_i / T) / Z,    p_tail = 1 - sum p_i,    i the k largest

The student's tail is a log-sum-exp over the entries that are not among the k. The bound is below
`kl` of all entries, grows with k, is `kl` itself at k = V - 1, and has no gradient where student
and teacher agree. The bucket keeps log Z at one temperature, so the temperature is part of the
cache. To renormalize the k probabilities instead, as is often done, teaches the student too much
of them: it is biased (arXiv 2503.16870), and here it has to be asked for.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax.distill._losses import (
    check_temperature,
    divergence,
    fixed,
    log_softmax,
    normalizer,
    sum_dtype,
)
from unitscale_jax.errors import check_array, check_callable, check_type
from unitscale_jax.trace.program import is_concrete


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["indices", "logits", "log_z"],
    meta_fields=["temperature"],
)
@dataclass(frozen=True)
class TopK:
    """The k largest logits of rows, and what all of them sum up to.

    A pytree whose leaves have the rows in front, so it may be part of a batch.

    Attributes:
        indices: `(..., k)`, int32, of the largest logits, the largest first.
        logits: `(..., k)`, float32, not divided by the temperature.
        log_z: `(...,)`, float32, `log sum e^(t / T)` over all entries.
        temperature: T, a Python number.
    """

    indices: jax.Array
    logits: jax.Array
    log_z: jax.Array
    temperature: float = 1.0


def top_k(logits: jax.Array, k: int, temperature: float = 1.0) -> TopK:
    """Keeps the k largest logits of each row, ties to the lower index.

    Args:
        logits: Teacher's, `(..., vocabulary)`; no gradient reaches them.
        k: How many, from 1 to the size of the vocabulary.
        temperature: T > 0, a Python number: the tail cannot be brought to another one later.

    Raises:
        ValueError: k is out of range, or the temperature is not positive or traced.

    Example:
        >>> cache = top_k(jnp.log(jnp.array([0.125, 0.5, 0.125, 0.25])), k=2)
        >>> cache.indices.tolist(), round(abs(cache.log_z.item()), 6)
        ([1, 3], 0.0)
    """
    check_array("logits", logits, 1)
    check_temperature(temperature)
    if not is_concrete(temperature):
        raise ValueError(
            "the temperature of a cache is traced; expected a Python number, since what is kept "
            "holds for one temperature. Make one cache for each."
        )
    size = logits.shape[-1]
    if not 1 <= k <= size:
        raise ValueError(f"k is {k}; expected 1 to {size}, the size of the vocabulary.")
    logits = fixed(logits, jnp.float32)
    values, indices = jax.lax.top_k(logits, k)
    top, total = normalizer(logits / temperature)
    log_z = jnp.squeeze(top + jnp.log(total), axis=-1)
    return TopK(indices, values, log_z, float(temperature))


def kl_top_k(cache: TopK, s: jax.Array, *, renormalized: bool = False) -> jax.Array:
    """Divergence of the student from what is kept of the teacher, times `T^2`.

    Args:
        cache: See `top_k`; its temperature is used.
        s: Student's logits, `(..., vocabulary)`.
        renormalized: Whether the k probabilities are scaled to sum to 1, in place of a bucket for
            the tail. Biased: at equality with the teacher its gradient is not zero.

    Returns:
        `(...,)`, float32 (float64 for float64).

    Raises:
        ValueError: The rows differ, or the student's vocabulary has fewer than k entries.

    Example:
        >>> t = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))
        >>> [round(kl_top_k(top_k(t, k), jnp.zeros(4)).item(), 4) for k in (1, 2, 3)]
        [0.1438, 0.1733, 0.1733]
        >>> round(kl_top_k(top_k(t, 2), t, renormalized=True).item(), 4)
        0.2877
    """
    check_type("cache", cache, TopK, "what us.distill.top_k returns")
    s = jnp.asarray(s)
    size, k = s.shape[-1], cache.indices.shape[-1]
    if cache.indices.shape[:-1] != s.shape[:-1] or k > size:
        raise ValueError(
            f"the cache has the {k} largest logits of rows {cache.indices.shape[:-1]}, the student "
            f"logits of shape {s.shape}; expected the same rows, and a vocabulary of {k} entries "
            "or more. Take the rows of the cache that belong to the batch."
        )
    dtype = sum_dtype(s)
    log_q = log_softmax(s.astype(dtype) / cache.temperature)
    log_p = _kept(cache, size, renormalized, dtype)
    rest = jnp.put_along_axis(log_q, cache.indices, -jnp.inf, axis=-1, inplace=False)
    top, total = normalizer(rest)
    log_tail = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)
    kept = jnp.take_along_axis(log_q, cache.indices, axis=-1)
    log_q = jnp.concatenate([kept, log_tail], axis=-1)
    return cache.temperature**2 * jnp.sum(divergence(log_p, log_q), axis=-1)


def cache_top_k(
    teacher: Callable[..., jax.Array], batches: Iterable[Any], k: int, temperature: float = 1.0
) -> Iterator[TopK]:
    """Runs a teacher over batches, and yields what is kept of its logits, on the host.

    Args:
        teacher: `teacher(*inputs) -> logits`; see `teacher`.
        batches: Each a tuple of the inputs, or the only input.
        k: See `top_k`.
        temperature: See `top_k`.

    Yields:
        For each batch its `TopK`, of NumPy arrays.

    The same numbers as `top_k` of the live teacher's logits.

    Example:
        >>> squares = lambda x: x[:, None] * jnp.arange(4.0)
        >>> [cache.indices.tolist() for cache in cache_top_k(squares, [jnp.array([1.0, -1.0])], 1)]
        [[[3], [0]]]
    """
    check_callable("teacher", teacher)
    check_temperature(temperature)
    step = jax.jit(lambda *inputs: top_k(teacher(*inputs), k, temperature))
    inputs = (batch if isinstance(batch, tuple) else (batch,) for batch in batches)
    return (jax.device_get(step(*x)) for x in inputs)


def _kept(cache: TopK, size: int, renormalized: bool, dtype: Any) -> jax.Array:
    """Logarithms of the teacher's k probabilities and of its tail, `(..., k + 1)`."""
    logits = fixed(cache.logits, dtype) / cache.temperature
    log_p = log_softmax(logits) if renormalized else logits - fixed(cache.log_z, dtype)[..., None]
    tail = 1 - jnp.sum(jnp.exp(log_p), axis=-1, keepdims=True)
    # The difference is known to a few roundings; where the student has no tail, less is none.
    noise = 16 * jnp.finfo(jnp.float32).eps
    none = (tail <= noise) | (renormalized or cache.logits.shape[-1] == size)
    log_tail = jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1, tail)))
    return jnp.concatenate([log_p, log_tail], axis=-1)
