"""The loss contract: a loss is a sum and a count, so that sums over any split of the rows agree.

    value_t = total_t / W_t,    W_t = sum of weight_t over the rows
    loss    = sum_t coef_t * value_t
    grads   = scale * sum_t (coef_t / W_t) * d total_t / d params

A mean of means is not the mean when parts hold different numbers of tokens; a sum of totals over a
sum of weights is, for any parts and devices. Totals and weights add over rows, and weights do not
depend on parameters, so the denominators can be known before any gradient is taken.
"""

from unitscale_jax.loss._evaluate import (
    check_names,
    evaluate,
    scalar_terms,
    weight_slice,
    weights_of,
)
from unitscale_jax.loss._given import Given
from unitscale_jax.loss._grad import (
    Grad,
    around,
    check_grad,
    check_params,
    scaled_objective,
    to_accumulator,
    value_and_grad,
)
from unitscale_jax.loss._mean import Denominators, Mean, Terms, inverse, loss_value
from unitscale_jax.loss._objective import objective
from unitscale_jax.loss._outputs import Reduction, reduction_of
from unitscale_jax.loss._rows import keys_of_rows, row_count, row_keys
from unitscale_jax.loss._split import Part, first, gather_rows, split

__all__ = [
    "Denominators",
    "Given",
    "Grad",
    "Mean",
    "Part",
    "Reduction",
    "Terms",
    "around",
    "check_grad",
    "check_names",
    "check_params",
    "evaluate",
    "first",
    "gather_rows",
    "inverse",
    "keys_of_rows",
    "loss_value",
    "objective",
    "reduction_of",
    "row_count",
    "row_keys",
    "scalar_terms",
    "scaled_objective",
    "split",
    "to_accumulator",
    "value_and_grad",
    "weight_slice",
    "weights_of",
]
