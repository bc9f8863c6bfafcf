"""Accumulation as an assertion: the number of parts does not change the gradient."""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from unitscale_jax import rules
from unitscale_jax.accumulate import accumulated
from unitscale_jax.errors import check_callable
from unitscale_jax.loss import Grad, loss_value
from unitscale_jax.testing._close import assert_close
from unitscale_jax.typing import Batch, Params


def check_parts(
    grad_fn: Grad,
    params: Params,
    batch: Batch,
    *,
    parts: Sequence[int] = (1, 2, 4),
    rtol: float = 1e-4,
    reduce: rules.Rules[str] = (),
    mask: rules.Pattern | Sequence[rules.Pattern] | None = None,
    **inputs: Any,
) -> None:
    """Asserts that a gradient in parts equals the gradient of the whole batch.

    It does not where a loss is not a sum over rows (in-batch negatives, batch normalization), where
    a dtype saturates, and where a compiler errs. Run it once when a job starts.

    Args:
        grad_fn: The gradient station, unaccumulated.
        params: Parameters.
        batch: A batch; four rows or more say something.
        parts: Numbers of parts to compare with the whole.
        rtol: Allowed difference, as a fraction of a leaf's largest entry. Matmuls in bfloat16 round
            the gradient of each part: allow 2e-2.
        reduce: Rules `(pattern, kind)` for auxiliary outputs, as in `us.accumulated`.
        mask: Patterns of the batch leaves to set to zero in rows that do not count, likewise.
        **inputs: Further arguments of `grad_fn`: `state`, `key`, `scale`, `valid`.

    Raises:
        AssertionError: They differ; the message has a line for each leaf, with the ratio of norms.

    Example:
        >>> centered = lambda w, x: us.Mean(jnp.sum((w * (x - x.mean())) ** 2), len(x))
        >>> check_parts(us.value_and_grad(centered), 2.0, jnp.arange(8.0))
        Traceback (most recent call last):
            ...
        AssertionError: 2 parts give another gradient than the whole batch; is every total a sum \
over rows?
          params: largest difference 4.76e-02 of the leaf's largest entry, ratio of norms 0.9524
    """
    check_callable("grad_fn", grad_fn)
    terms, _, whole = jax.jit(grad_fn)(params, batch, **inputs)
    for number in parts:
        in_parts = accumulated(grad_fn, number, reduce=reduce, mask=mask)
        other, _, grads = jax.jit(in_parts)(params, batch, **inputs)
        values = {"loss": loss_value(other)}, {"loss": loss_value(terms)}
        for noun, pair in {"gradient": (grads, whole), "loss": values}.items():
            title = f"{number} parts give another {noun} than the whole batch"
            assert_close(*pair, rtol, f"{title}; is every total a sum over rows?")


def check_inplace(
    grad_fn: Grad,
    params: Params,
    batch: Batch,
    *,
    parts: int = 2,
    rtol: float = 1e-6,
    reduce: rules.Rules[str] = (),
    mask: rules.Pattern | Sequence[rules.Pattern] | None = None,
    **inputs: Any,
) -> None:
    """Asserts that accumulating in place gives the gradient of the plain form, on this backend.

    Args:
        grad_fn: The result of `us.value_and_grad`.
        params: Parameters.
        batch: A batch.
        parts: Number of parts.
        rtol: Allowed difference, as a fraction of a leaf's largest entry.
        reduce: Rules `(pattern, kind)` for auxiliary outputs, as in `us.accumulated`.
        mask: Patterns of the batch leaves to set to zero in rows that do not count, likewise.
        **inputs: Further arguments of `grad_fn`: `state`, `key`, `scale`, `valid`.

    Raises:
        AssertionError: They differ; the message has a line for each leaf.

    Example:
        >>> loss = lambda w, x: us.Mean((w * x) ** 2, jnp.ones_like(x))
        >>> check_inplace(us.value_and_grad(loss), jnp.float32(2.0), jnp.arange(8.0))
    """
    form = functools.partial(accumulated, grad_fn, parts, reduce=reduce, mask=mask)
    forms = [form(inplace=True), form(inplace=False)]
    in_place, carried = [jax.jit(form)(params, batch, **inputs)[2] for form in forms]
    assert_close(in_place, carried, rtol, "accumulating in place gives another gradient")
