"""The scalar that is differentiated, of whatever a loss returns."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax.errors import expected
from unitscale_jax.loss._mean import Mean, loss_value


def objective(result: Any) -> jax.Array:
    """The scalar that the result of a loss stands for, `sum_t coef_t * total_t / weight_t`.

    Args:
        result: Terms, or a pair of terms and anything else. Terms are a `Mean`, a scalar, or a dict
            of those.

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: A term is neither a `Mean` nor a scalar floating-point number, or there is none.

    Example:
        >>> terms = {"ce": us.Mean(6.0, 3), "z": us.Mean(8.0, 4, coef=0.5)}
        >>> float(objective(terms)), float(objective((us.Mean(6.0, 3), "auxiliary")))
        (3.0, 2.0)
    """
    terms = result[0] if isinstance(result, tuple) and len(result) == 2 else result
    named = terms if isinstance(terms, Mapping) else {"": terms}
    if not named:
        raise ValueError("the function returned no terms; expected a us.Mean or a scalar.")
    return loss_value({str(name): _mean(str(name), term) for name, term in named.items()})


def _mean(name: str, term: Any) -> Mean:
    if isinstance(term, Mean):
        return term
    number = isinstance(term, float) or hasattr(term, "dtype")
    if not number or jnp.shape(term) or not jnp.issubdtype(jnp.result_type(term), jnp.floating):
        what = f"term {name!r} of the loss" if name else "the result of the function"
        wanted = "a us.Mean or a scalar, since it is differentiated: take the loss, not the model"
        raise ValueError(expected(what, term, wanted))
    return Mean(term, 1.0)
