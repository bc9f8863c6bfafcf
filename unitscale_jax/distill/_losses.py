"""Soft targets: how far a student's distribution is from its teacher's, one number per row.

    kl = T^2 KL(p || q),    p = softmax(t / T),  q = softmax(s / T),    d kl / d s = T (q - p)

The factor T^2 is always there, so that the gradient tends to ((s - mean s) - (t - mean t)) / V for
a large temperature, and not to zero, and a schedule of T leaves the learning rate alone (Hinton et
al., arXiv 1503.02531). Sums are of terms that are none below zero,

    KL(p || q) = sum p (e^d - 1 - d),    d = log q - log p,

in which an error of either normalizer cancels to first order: a difference of two cross entropies,
times T^2, would be noise at T = 100.

Each divergence is a function of two arrays of scaled logits, `u = t/T` and `v = s/T`, and says its
own derivative: differentiated term by term it would keep both distributions, their logarithms and
the masks of infinities for the backward pass, where one array of slopes is enough. With a and b the
logarithms of two distributions, the derivative of KL(a || b) by the logits of b and of a is

    e^b - e^a        and        S(a, b) = e^a ((a - b) - sum e^a (a - b)).

Since sum m = 1, what jsd changes by way of m cancels, so it is made of S(log p, log m) and
S(log q, log m). Slopes are differentiable functions, so second derivatives and forward mode work.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.trace.program import is_concrete, not_before


def kl(
    t: jax.Array,
    s: jax.Array,
    temperature: Any = 1.0,
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """Divergence of the student from the teacher, `T^2 KL(softmax(t/T) || softmax(s/T))`.

    Args:
        t: Teacher's logits, `(..., vocabulary)`, of any float dtype; no gradient reaches them.
        s: Student's logits, of the same shape.
        temperature: T > 0, a scalar; may be traced.
        where: Boolean, broadcast against the logits: which entries exist. Logits of `-inf` say the
            same; where the teacher has one, the student may have any. A row without entries is 0.

    Returns:
        `(...,)`, float32 (float64 for float64).

    Raises:
        ValueError: The shapes differ, or the temperature is not a positive scalar.

    It is at least 0, and 0 with zero gradient where the logits are equal up to a constant.

    Example:
        >>> t, s = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
        >>> [round(kl(t, s, temperature).item(), 4) for temperature in (1, 4, 1000)]
        [1.1504, 1.3196, 1.3333]
        >>> jax.grad(kl, argnums=1)(t, t + 5.0).tolist()
        [0.0, 0.0, 0.0]
    """
    u, v, factor = _prepared(t, s, temperature, where)
    return factor * divergence_of_logits(u, v)


def reverse_kl(
    t: jax.Array,
    s: jax.Array,
    temperature: Any = 1.0,
    *,
    where: jax.Array | None = None,
) -> jax.Array:
    """Divergence of the teacher from the student, `T^2 KL(softmax(s/T) || softmax(t/T))`.

    It seeks a mode of the teacher where `kl` covers all. Arguments, result and errors are those of
    `kl`. Infinite where the student has an entry that the teacher lacks: give `where` to both.

    Example:
        >>> t, s = jnp.log(jnp.array([0.7, 0.2, 0.1])), jnp.log(jnp.array([0.2, 0.3, 0.5]))
        >>> bool(jnp.isclose(reverse_kl(t, s), kl(s, t)))
        True
    """
    u, v, factor = _prepared(t, s, temperature, where)
    return factor * divergence_of_logits(v, u)


def jsd(
    t: jax.Array,
    s: jax.Array,
    temperature: Any = 1.0,
    *,
    beta: Any = 0.5,
    where: jax.Array | None = None,
) -> jax.Array:
    """Generalized Jensen-Shannon divergence, `T^2 (beta KL(p || m) + (1 - beta) KL(q || m))`.

    Here `m = beta p + (1 - beta) q`, p the teacher and q the student; bounded, whatever either
    lacks. `jsd / beta` tends to `kl` as beta tends to 0, and `jsd / (1 - beta)` to `reverse_kl` as
    it tends to 1 (Agarwal et al., arXiv 2306.13649).

    Args:
        t: Teacher's logits.
        s: Student's logits.
        temperature: T.
        beta: Between 0 and 1, both excluded; a scalar, may be traced.
        where: As of `kl`.

    Returns:
        `(...,)`, float32 (float64 for float64).

    Raises:
        ValueError: As `kl`, and for a beta outside.

    Example:
        >>> t, s = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
        >>> bool(jnp.isclose(jsd(t, s), jsd(s, t)))
        True
    """
    if is_concrete(beta) and not 0 < float(beta) < 1:
        raise ValueError(
            f"beta is {beta}; expected a number between 0 and 1. The ends are `kl` and "
            "`reverse_kl`, by limit."
        )
    u, v, factor = _prepared(t, s, temperature, where)
    return factor * _mixed_divergence(jnp.asarray(beta, u.dtype), u, v)


# --------------------------------------------------------- rows of numbers that know their slopes


def with_slopes(
    value: Callable[..., jax.Array], *slopes: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """A function that gives a number per row, with the derivative that `slopes` state.

    Args:
        value: `value(*operands) -> rows`.
        slopes: For each operand `slope(rows, *operands)`: the derivative of a row by each entry of
            the operand's row, or by an operand that all rows share.

    Of an operand that nothing differentiates by, no slope is computed.
    """
    fn = jax.custom_jvp(value)

    def jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        rows = fn(*primals)
        moved = jnp.zeros_like(rows)
        for slope, tangent in zip(slopes, tangents, strict=True):
            if isinstance(tangent, jax.custom_derivatives.SymbolicZero):
                continue
            by = slope(rows, *primals)
            moved += by * tangent if by.ndim == rows.ndim else jnp.sum(by * tangent, axis=-1)
        return rows, moved

    fn.defjvp(jvp, symbolic_zeros=True)
    return fn


def _of_logits(u: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.sum(divergence(log_softmax(u), log_softmax(v)), axis=-1)


def _slope(u: jax.Array, log_q: jax.Array, mean: jax.Array) -> jax.Array:
    """The derivative of `KL(p || q)` by the logits u of p; `mean` is that divergence.

        d/du_j sum_i p_i (log p_i - log q_i) = p_j (log p_j - log q_j - KL)

    with dp_i / du_j = p_i (1[i = j] - p_j); the derivatives of log p_i sum to zero.
    """
    top, total = normalizer(u)
    # What is computed anew once the divergence is known is not held until then.
    log_p = u - not_before(top, mean) - jnp.log(jnp.where(total > 0, total, 1))
    absent = log_p == -jnp.inf
    ratio = jnp.where(absent, 0, log_p) - jnp.where(absent, 0, log_q)
    return jnp.exp(log_p) * (ratio - mean[..., None])


divergence_of_logits = with_slopes(
    _of_logits,
    lambda rows, u, v: _slope(u, log_softmax(v), rows),
    lambda _, u, v: softmax(v) - softmax(u),
)
"""`KL(softmax(u) || softmax(v))` along the last axis."""


def _mixture(beta: jax.Array, u: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """Logarithms of p, of q, and of `m = beta p + (1 - beta) q`."""
    log_p, log_q = log_softmax(u), log_softmax(v)
    # Not `logaddexp`, whose gradient is NaN where both are -inf.
    top, total = normalizer(jnp.stack([jnp.log(beta) + log_p, jnp.log1p(-beta) + log_q], axis=-1))
    log_m = jnp.squeeze(top + jnp.log(jnp.where(total > 0, total, 1)), axis=-1)
    return log_p, log_q, log_m


def _of_mixture(beta: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    log_p, log_q, log_m = _mixture(beta, u, v)
    terms = beta * divergence(log_p, log_m) + (1 - beta) * divergence(log_q, log_m)
    return jnp.sum(terms, axis=-1)


def _slope_of_beta(_: jax.Array, beta: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    log_p, log_q, log_m = _mixture(beta, u, v)
    return jnp.sum(divergence(log_p, log_m) - divergence(log_q, log_m), axis=-1)


def _slope_of_teacher(_: jax.Array, beta: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    log_p, _, log_m = _mixture(beta, u, v)
    return beta * _slope(u, log_m, jnp.sum(divergence(log_p, log_m), axis=-1))


def _slope_of_student(_: jax.Array, beta: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    _, log_q, log_m = _mixture(beta, u, v)
    return (1 - beta) * _slope(v, log_m, jnp.sum(divergence(log_q, log_m), axis=-1))


_mixed_divergence = with_slopes(_of_mixture, _slope_of_beta, _slope_of_teacher, _slope_of_student)


def divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Terms of `KL(p || q)`, each at least 0; their sum is it where p and q each sum to 1.

    A term is `p (e^d - 1 - d)` with `d = log q - log p`, which is q where p is 0.
    """
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    absent = p == 0
    # What is not selected is kept finite, since a gradient passes there too.
    d = jnp.where(absent, 0, log_q) - jnp.where(absent, 0, log_p)
    near = jnp.where(d > 1, 1, d)  # not `minimum`, which halves the gradient at a tie
    # e^d overflows where p is tiny; there q - p - p d cancels nothing.
    terms = jnp.where(d > 1, q - p - p * d, p * (jnp.expm1(near) - near))
    return jnp.where(absent, q, terms)


def log_softmax(x: jax.Array, axis: int = -1) -> jax.Array:
    """Logarithms of a softmax; entries of `-inf` stay, and so does a row of nothing else."""
    top, total = normalizer(x, axis)
    return x - top - jnp.log(jnp.where(total > 0, total, 1))


def softmax(x: jax.Array, axis: int = -1) -> jax.Array:
    """A softmax; 0 for entries of `-inf`, also in a row of nothing else."""
    top, total = normalizer(x, axis)
    return jnp.exp(x - top) / jnp.where(total > 0, total, 1)


def normalizer(x: jax.Array, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """The largest entry m and `sum e^(x - m)`, their axis kept with size 1."""
    # At least the smallest finite number, since -inf - -inf is NaN.
    top = jnp.max(x, axis=axis, keepdims=True, initial=jnp.finfo(x.dtype).min)
    top = jax.lax.stop_gradient(top)
    return top, jnp.sum(jnp.exp(x - top), axis=axis, keepdims=True)


def check_temperature(temperature: Any) -> None:
    """Raises `ValueError` for what is known not to be a positive scalar."""
    shape = jnp.shape(temperature)
    if shape:
        raise ValueError(f"the temperature has shape {shape}; expected one number for all rows.")
    if is_concrete(temperature) and not float(temperature) > 0:
        raise ValueError(
            f"the temperature is {temperature}; expected a number above 0. 1 leaves the logits as "
            "they are, larger ones make both distributions smoother."
        )


def check_vocabularies(t: jax.Array, s: jax.Array) -> None:
    """Raises `ValueError` where two arrays of logits are not alike, naming both sizes."""
    if t.shape[-1:] != s.shape[-1:] or not t.shape:
        raise ValueError(
            f"the teacher's vocabulary has {t.shape[-1] if t.shape else 'no'} entries, the "
            f"student's {s.shape[-1] if s.shape else 'none'} (logits of shape {t.shape} and "
            f"{s.shape}). Cut or permute both to the entries they share, in one order."
        )
    if t.shape != s.shape:
        raise ValueError(
            f"the teacher's logits have shape {t.shape}, the student's {s.shape}; expected the "
            "same rows in both."
        )


def fixed(t: Any, dtype: Any) -> jax.Array:
    """The outputs of a teacher in a dtype; no gradient reaches them."""
    return jax.lax.stop_gradient(jnp.asarray(t).astype(dtype))


def sum_dtype(*arrays: Any) -> np.dtype:
    """The dtype in which arrays are compared: float32, or float64 if one of them is."""
    wide = [trees.wide(jnp.result_type(x)) for x in arrays]
    return np.dtype(np.float64) if np.dtype(np.float64) in wide else np.dtype(np.float32)


def _prepared(
    t: jax.Array, s: jax.Array, temperature: Any, where: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    t, s = jnp.asarray(t), jnp.asarray(s)
    check_vocabularies(t, s)
    check_temperature(temperature)
    dtype = sum_dtype(t, s)
    logits = [fixed(t, dtype), s.astype(dtype)]
    if where is not None:
        logits = [jnp.where(where, x, -jnp.inf) for x in logits]
    temperature = jnp.asarray(temperature).astype(dtype)
    u, v = (x / temperature for x in logits)
    return u, v, temperature**2
