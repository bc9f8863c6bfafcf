"""Pure-functional transforms that make Flax models cheaper to train and to serve.

    params --> apply(params, *inputs) --> loss(params, batch) --> grad(params, batch) --> update

Every technique maps one of these stations to the same station, so composing is calling.
"""

from unitscale_jax import rules, tree
from unitscale_jax.accumulate import MultiStepsState, accumulated, multi_steps
from unitscale_jax.loss import Grad, Mean, loss_value, row_keys, value_and_grad

__version__ = "0.1.0"

__all__ = [
    "Grad",
    "Mean",
    "MultiStepsState",
    "accumulated",
    "loss_value",
    "multi_steps",
    "row_keys",
    "rules",
    "tree",
    "value_and_grad",
]
