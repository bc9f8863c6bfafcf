"""A loss that also compares a student with its teacher, and is a loss as before.

    (1 - alpha) loss + alpha sum_k weight_k mean over what counts of term_k(teacher, student)

The mean of each term is over the tokens that count in the whole batch: terms keep the loss contract
(a total and a weight per row), so any number of parts and devices gives the same gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from unitscale_jax import tree as trees
from unitscale_jax.distill._losses import sum_dtype
from unitscale_jax.errors import check_callable
from unitscale_jax.loss import Mean, around, check_names
from unitscale_jax.trace.program import is_concrete
from unitscale_jax.typing import Apply, Batch, DType, Loss, Params

Compare: TypeAlias = Callable[[Any, Any], Any]


def distilled(
    loss: Loss,
    teacher: Callable[[Batch], Any],
    terms: "Mapping[str, Term] | Term | Compare",
    *,
    alpha: Any = 0.5,
    aux: Callable[[Any], Any] | None = None,
) -> Loss:
    """Adds terms that compare the student with its teacher to a loss.

    Args:
        loss: `loss(params, batch, ..) -> (terms, outputs)`. What a loss returns beside its terms
            are the student's outputs here, any pytree.
        teacher: `teacher(batch) -> outputs`: a function made by `teacher`, given its inputs, or
            what was computed before, `lambda batch: batch["cache"]`. No gradient reaches it.
        terms: Name -> `Term`; a single one, or only its function, is named "distill".
        alpha: Share of the teacher, a scalar from 0 to 1; may be traced, as of a schedule.
        aux: What of the student's outputs the new loss returns beside its terms, such as new batch
            statistics, `lambda outputs: outputs["state"]`; None: nothing.

    Returns:
        A loss of the same signature. It returns a dict of `Mean`: the terms of `loss`, their coef
        times `1 - alpha`, and the new ones, with coef `alpha * weight`. A plain scalar stays one,
        times `1 - alpha`.

    Raises:
        ValueError: alpha is known to be outside [0, 1]; on a call, a loss without outputs, a name
            that is taken, a term that is not one number per row.

    Where alpha is the Python number 0, the loss is the old one to the bit, and the teacher is not
    run. Accumulating over parts gives the gradient of the whole batch.

    Example:
        >>> def hard(w, batch):
        ...     logits = batch["x"] * w
        ...     return us.Mean(-jnp.sum(jax.nn.log_softmax(logits)[:, 0]), len(logits)), logits
        >>> batch = {"x": jnp.array([[1.0, 2.0], [0.0, 3.0]])}
        >>> loss = distilled(hard, lambda batch: 2.0 * batch["x"], us.distill.kl, alpha=0.25)
        >>> terms = loss(2.0, batch)
        >>> float(terms["loss"].coef), terms["distill"].total.tolist()
        (0.75, [0.0, 0.0])
    """
    if is_concrete(alpha) and not 0 <= float(alpha) <= 1:
        raise ValueError(f"alpha is {alpha}; expected a share from 0 to 1, that of the teacher.")
    named = _named(terms)
    used = {name: term for name, term in named.items() if not _off(term.weight)}
    used = {} if _off(alpha) else used

    @around(loss, "distilled")
    def distilled_loss(params: Params, batch: Batch, /, **state_and_key: Any) -> Any:
        hard, outputs = _called(loss, params, batch, state_and_key)
        check_names(hard, used, "`terms`")
        out = hard if _off(alpha) else {k: _scaled(term, alpha) for k, term in hard.items()}
        answers = jax.lax.stop_gradient(teacher(batch)) if used else None
        out |= {
            name: term.mean(name, answers, outputs, batch, alpha) for name, term in used.items()
        }
        return out if aux is None else (out, aux(outputs))

    return distilled_loss


@dataclass(frozen=True)
class Term:
    """A comparison of the student's outputs with the teacher's.

    Attributes:
        compare: `compare(teacher's outputs, student's outputs)`, in the order of `kl`: one loss per
            row or token, `(rows, ...)`, or a `Mean` whose weight is known without parameters, such
            as one with the total of `chunked_kl`.
        counts: `counts(batch)`: how much each of these counts, booleans or numbers whose axes are
            the first of the losses'; None: one each. What does not count may be NaN.
        weight: Factor of the term beside the others, a scalar; may be traced. A Python 0 leaves the
            term out.

    Example:
        >>> term = Term(us.distill.kl, counts=lambda batch: batch["mask"], weight=2.0)
        >>> t, s = jnp.zeros((2, 3, 5)), jnp.ones((2, 3, 5))
        >>> batch = {"mask": jnp.array([[True, True, False], [True, False, False]])}
        >>> term.mean("kl", t, s, batch).weight.tolist()
        [2.0, 1.0]
    """

    compare: Compare
    counts: Callable[[Batch], jax.Array] | None = None
    weight: Any = 1.0

    def mean(self, name: str, t: Any, s: Any, batch: Batch, alpha: Any = 1.0) -> Mean:
        """The term of a loss: totals and weights per row.

        Raises:
            ValueError: Losses have no rows, or `counts` does not fit them.
        """
        losses = self.compare(t, s)
        coef = jnp.asarray(alpha, jnp.float32) * jnp.asarray(self.weight, jnp.float32)
        if isinstance(losses, Mean):
            return Mean(losses.total, losses.weight, coef * jnp.asarray(losses.coef, jnp.float32))
        if not jnp.ndim(losses):
            raise ValueError(
                f"term {name!r} compares teacher and student by one number; expected one per row, "
                "(rows, ...), or a us.Mean with what the number sums over."
            )
        counts = None if self.counts is None else self.counts(batch)
        return _per_row(name, losses, counts, coef)


def teacher(apply: Apply, params: Params, *, dtype: DType | None = None) -> jax.tree_util.Partial:
    """Makes a teacher: a model in evaluation, with its parameters, without a gradient.

    Args:
        apply: `apply(params, *inputs)`, in evaluation mode; also a quantized or a sharded one.
        params: Its parameters, of any dtype and layout.
        dtype: To which their floating leaves are cast, once and here; None: they stay.

    Returns:
        A function of the inputs, whose floating outputs have no gradient. It is a pytree with the
        parameters for leaves: give it to a jitted step as an argument, so that they are not made
        constants of the compiled program.

    Example:
        >>> double = teacher(lambda params, x: params["w"] * x, {"w": jnp.array(2.0)})
        >>> double(3.0).item(), jax.grad(double)(3.0).item(), jax.tree.leaves(double)[0].item()
        (6.0, 0.0, 2.0)
    """
    check_callable("apply", apply)
    params = params if dtype is None else trees.astype(params, dtype)
    return jax.tree_util.Partial(_Frozen(apply), params)


@dataclass(frozen=True)
class _Frozen:
    """A model without gradients; equal for the same model, so that a step is compiled once."""

    apply: Apply

    def __call__(self, params: Params, *inputs: Any, **named: Any) -> Any:
        return jax.lax.stop_gradient(self.apply(params, *inputs, **named))


def _named(terms: Any) -> dict[str, Term]:
    if isinstance(terms, Mapping):
        return {name: _as_term(term) for name, term in terms.items()}
    return {"distill": _as_term(terms)}


def _as_term(term: Any) -> Term:
    if isinstance(term, Term):
        return term
    if not callable(term):
        raise TypeError(
            f"a term is {term!r}; expected a Term, or a function of the teacher's outputs and the "
            "student's."
        )
    return Term(term)


def _off(factor: Any) -> bool:
    """True if a factor is zero whatever comes; an array may be another one in the next step."""
    return isinstance(factor, int | float) and factor == 0


def _called(loss: Loss, params: Params, batch: Batch, given: Any) -> tuple[dict[str, Any], Any]:
    out = loss(params, batch, **given)
    if not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(
            "the loss returns terms alone, and a distilled one needs the student's outputs: return "
            "(terms, outputs)."
        )
    terms, outputs = out
    return (dict(terms) if isinstance(terms, Mapping) else {"loss": terms}), outputs


def _scaled(term: Any, alpha: Any) -> Any:
    if isinstance(term, Mean):
        coef = jnp.asarray(term.coef)
        return Mean(term.total, term.weight, coef * (1 - jnp.asarray(alpha)).astype(coef.dtype))
    term = jnp.asarray(term)
    return term * (1 - jnp.asarray(alpha)).astype(term.dtype)


def _per_row(name: str, losses: jax.Array, counts: Any, coef: jax.Array) -> Mean:
    """Sums over all axes but that of the rows, of what counts."""
    dtype = sum_dtype(losses)
    weight = jnp.ones(losses.shape, dtype) if counts is None else jnp.asarray(counts).astype(dtype)
    if weight.shape != losses.shape[: weight.ndim]:
        raise ValueError(
            f"term {name!r} has losses of shape {losses.shape}, and `counts` gives one of "
            f"{weight.shape}; expected their first axes, one number per row or per token."
        )
    weight = weight.reshape(weight.shape + (1,) * (losses.ndim - weight.ndim))
    weight = jnp.broadcast_to(weight, losses.shape)
    kept = jnp.where(weight != 0, losses.astype(dtype), 0)
    axes = tuple(range(1, losses.ndim))
    return Mean(jnp.sum(kept * weight, axis=axes), jnp.sum(weight, axis=axes), coef)
