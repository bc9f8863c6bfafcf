"""A sum and how many items it sums over, the form in which every loss and metric travels."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_type
from unitscale_jax.typing import DType


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean:
    """A sum and how many items it sums over; its value is `total / weight`.

    Attributes:
        total: Sum over the items, float32 or wider: a scalar, or one sum per row, `(rows,)`.
        weight: How many items, of the shape of `total`; any dtype. Not a function of parameters.
        coef: Factor of this term in the loss, a scalar of any source but parameters and batch.

    Example:
        >>> losses, real = jnp.array([2.0, 4.0, 6.0]), jnp.array([True, True, False])
        >>> float(us.Mean(total=jnp.where(real, losses, 0).sum(), weight=real.sum()).value)
        3.0
    """

    total: Any
    weight: Any
    coef: Any = 1.0

    @property
    def value(self) -> jax.Array:
        """`total / weight`, a scalar of the dtype of the total; 0 where the weight is 0."""
        total = jnp.asarray(self.total)
        floating = jnp.issubdtype(total.dtype, jnp.floating)
        dtype = trees.wide(total.dtype) if floating else jnp.result_type(float)
        return jnp.sum(total.astype(dtype)) * inverse(weight_sum(self.weight, dtype))


Terms: TypeAlias = dict[str, Mean]
"""The terms of a loss by name, in scalar form."""

Denominators: TypeAlias = dict[str, jax.Array]
"""For each term the weight of the whole batch."""


def weight_sum(weight: Any, dtype: DType) -> jax.Array:
    """The sum of weights in `dtype`; integers add up as such, since float32 counts end at 2^24."""
    weight = jnp.asarray(weight)
    floating = jnp.issubdtype(weight.dtype, jnp.floating)
    return jnp.sum(weight.astype(dtype) if floating else weight).astype(dtype)


def inverse(weight: jax.Array) -> jax.Array:
    """`1 / weight`, and 0 where the weight is 0, so that a term without items has no gradient."""
    weight = jnp.asarray(weight)
    return jnp.where(weight != 0, 1 / jnp.where(weight != 0, weight, 1), 0)


def loss_value(terms: Terms) -> jax.Array:
    """The loss that terms add up to, `sum_t coef_t * total_t / weight_t`, a scalar.

    Example:
        >>> float(loss_value({"ce": us.Mean(6.0, 3), "z": us.Mean(8.0, 4, coef=0.5)}))
        3.0
    """
    check_type("terms", terms, Mapping, "the terms of a us.Grad, by name")
    values = [m.value * jnp.asarray(m.coef, m.value.dtype) for m in terms.values()]
    return functools.reduce(jnp.add, values) if values else jnp.float32(0)
