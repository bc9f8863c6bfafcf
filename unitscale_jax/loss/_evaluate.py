"""A loss as users write it, brought to one form; and the slice of it that computes its weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax import tree as trees
from unitscale_jax.loss._given import NOTHING, Given
from unitscale_jax.loss._mean import Denominators, Mean, Terms, weight_sum
from unitscale_jax.loss._rows import row_count
from unitscale_jax.trace.program import (
    Traced,
    as_arrays,
    reach,
    sliced,
    trace,
)
from unitscale_jax.typing import Batch, Loss, Params

RESERVED = frozenset({"dropped"})
"""Names of terms that stations add to those of the loss, which may not have them itself."""


def evaluate(loss: Loss, params: Params, batch: Batch, given: Given = NOTHING) -> tuple[Terms, Any]:
    """Evaluates a loss as `(terms, aux)`, the terms in scalar form; see `value_and_grad`."""
    named, aux = _call(loss, params, batch, given)
    rows = row_count(batch)
    return {name: _scalar_form(name, term, rows, given.valid) for name, term in named.items()}, aux


def _call(loss: Loss, params: Params, batch: Batch, given: Given) -> tuple[dict[str, Any], Any]:
    known = {"state": given.state, "key": given.key}
    out = loss(params, batch, **{name: arg for name, arg in known.items() if arg is not None})
    terms, aux = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
    named = terms if isinstance(terms, Mapping) else {"loss": terms}
    named = {str(name): term for name, term in named.items()}
    if not named:
        raise ValueError("the loss returned no terms; expected a us.Mean, or a dict with one.")
    check_names(named, RESERVED, "the stations around it, as us.accumulated,")
    return named, aux


def check_names(terms: Iterable[str], added: Iterable[str], by: str) -> None:
    """Raises `ValueError` for a term of a loss whose name is that of a term that is added to it."""
    taken = sorted(set(terms) & set(added))
    if taken:
        raise ValueError(
            f"both the loss and {by} have a term {taken[0]!r}, and one would hide the other; "
            "rename that of the loss."
        )


def _scalar_form(name: str, term: Any, rows: int, valid: jax.Array | None) -> Mean:
    if not isinstance(term, Mean):
        term = _mean_of_rows(name, term, rows, valid)
    total, coef = jnp.asarray(term.total), jnp.asarray(term.coef)
    weight = jnp.asarray(term.weight)
    if coef.shape:
        raise ValueError(f"term {name!r} has a coef of shape {coef.shape}; expected a scalar.")
    if total.shape != weight.shape or total.shape not in ((), (rows,)):
        raise ValueError(
            f"term {name!r} has a total of shape {total.shape} and a weight of shape "
            f"{weight.shape}; expected both to be scalars, or both one number per row, ({rows},)."
        )
    if not jnp.issubdtype(total.dtype, jnp.floating) or jnp.finfo(total.dtype).bits < 32:
        raise ValueError(
            f"term {name!r} has a {total.dtype} total; sum in float32: "
            "`jnp.sum(x.astype(jnp.float32))`, or jnp.sum(x, dtype=jnp.float32)."
        )
    keep = lambda x: x if valid is None else jnp.where(valid, x, jnp.zeros((), x.dtype))
    total, weight = (jnp.sum(keep(total)), keep(weight)) if total.shape else (total, weight)
    return Mean(total, weight_sum(weight, total.dtype), coef.astype(total.dtype))


def _mean_of_rows(name: str, value: Any, rows: int, valid: jax.Array | None) -> Mean:
    shaped = isinstance(value, int | float) or hasattr(value, "shape")
    if not shaped or jnp.shape(value) != ():
        what = f"an array of shape {jnp.shape(value)}" if shaped else f"a {type(value).__name__}"
        raise ValueError(
            f"the loss returned {what} for term {name!r}; expected a us.Mean or a scalar. For one "
            "loss per row, return us.Mean(total=losses, weight=jnp.ones_like(losses))."
        )
    if valid is not None:
        raise ValueError(
            f"term {name!r} is a plain scalar, a mean over all {rows} rows, and some rows here do "
            "not count. Return us.Mean(total=losses, weight=counts) with one number per row, or "
            "give every part the same number of rows."
        )
    value = jnp.asarray(value)
    return Mean(value * jnp.asarray(rows, value.dtype), jnp.asarray(rows, value.dtype))


def scalar_terms(loss: Loss, params: Params, batch: Batch, given: Given) -> list[str]:
    """Names of the terms whose sums the loss has taken itself, so that no row can be cut out."""

    def raw(params: Params, batch: Batch, given: Given) -> Any:
        out = _call(loss, params, batch, given)[0]
        return {name: m for name, m in out.items() if isinstance(m, Mean)}

    shapes = jax.eval_shape(raw, params, batch, given)
    return [name for name, mean in shapes.items() if mean.total.shape == ()]


def weights_of(loss: Loss, params: Params, batch: Batch, given: Given = NOTHING) -> Denominators:
    """What each term of the loss weighs on a batch; only the weights are computed.

    Raises:
        ValueError: A weight or a coefficient depends on a parameter; the message names both.
    """
    return weight_slice(loss, params, batch, given)(batch, given)


def weight_slice(
    loss: Loss, params: Params, batch: Batch, given: Given
) -> Callable[[Batch, Given], Denominators]:
    """The slice of a loss that computes its weights: `(batch, given) -> weights`.

    Traced at the shapes of the arguments, evaluated on others of those shapes. Raises as
    `weights_of` does.
    """
    only_terms = lambda params, batch, given: evaluate(loss, params, batch, given)[0]
    traced = trace(only_terms, *as_arrays((params, batch, given)))
    _check_independent(traced, params, batch)
    is_weight = [name.endswith("/weight") for name in trees.names(_unflattened(traced))]
    slice_fn = sliced(traced, is_weight)
    order = list(_unflattened(traced))  # a dict flattens in sorted order, as `sliced` returns

    def weights(batch: Batch, given: Given) -> Denominators:
        return dict(zip(sorted(order), slice_fn(params, batch, given), strict=True))

    return weights


def _unflattened(traced: Traced) -> Terms:
    return jax.tree.unflatten(traced.outputs, range(traced.outputs.num_leaves))


def _check_independent(traced: Traced, params: Params, batch: Batch) -> None:
    names = trees.names(params)
    n_params, n_batch = len(names), len(jax.tree.leaves(batch))
    for term, reached in reach(traced).items():
        for field_name, way_out in _WAYS_OUT.items():
            first = min(getattr(reached, field_name), default=n_params + n_batch)
            if first < n_params:
                raise ValueError(
                    f"the {field_name} of term {term!r} depends on the parameter {names[first]!r}. "
                    + way_out
                )
        if min(reached.coef, default=n_params + n_batch) < n_params + n_batch:
            raise ValueError(
                f"the coef of term {term!r} depends on the batch, so parts would disagree on it. "
                "Move the factor into the total."
            )


_WAYS_OUT = {
    "weight": "Count from the batch, or move the factor into the total.",
    "coef": "Move the factor into the total, where it is differentiated.",
}
