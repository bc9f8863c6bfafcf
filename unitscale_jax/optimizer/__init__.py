"""What every wrapper of an optimizer is made of: states that know each other, and a step or none.

    chain -> low_precision_weights -> pruned, rigl, SET -> multi_steps -> loss_scaled -> sharded

is the order of wrappers, the innermost first. Each wrapper answers the same questions at each call:
whether its gradients are good, on all devices alike (`flaws`), what happens if they are not
(`step_or_skip`), and which other wrappers are inside of it (`find_state`, `refuse_inside`).
"""

from unitscale_jax.optimizer._order import (
    ORDER,
    check_optimizer,
    check_scalar,
    check_state,
    refuse_inside,
)
from unitscale_jax.optimizer._states import (
    LossScaleState,
    LowPrecisionState,
    MultiStepsState,
    PrunedState,
    applied,
    find_state,
    verdicts,
)
from unitscale_jax.optimizer._step import (
    Flaws,
    check_gradients,
    common_dtype,
    flaws,
    no_update,
    none_left,
    step_or_skip,
    without_scale,
)

__all__ = [
    "Flaws",
    "LossScaleState",
    "LowPrecisionState",
    "MultiStepsState",
    "ORDER",
    "PrunedState",
    "applied",
    "check_gradients",
    "check_optimizer",
    "check_scalar",
    "check_state",
    "common_dtype",
    "find_state",
    "flaws",
    "no_update",
    "none_left",
    "refuse_inside",
    "step_or_skip",
    "verdicts",
    "without_scale",
]
