"""Mixed precision: dtypes by policy, loss scaling, and weights of 16 bits."""

from unitscale_jax.optimizer import LossScaleState, LowPrecisionState
from unitscale_jax.precision._autocast import autocast
from unitscale_jax.precision._cast import cast
from unitscale_jax.precision._loss_scale import (
    current_scale,
    loss_scaled,
    overflowing,
    unless_skipped,
    unscaled,
)
from unitscale_jax.precision._low_precision import low_precision_weights
from unitscale_jax.precision._policy import Policy
from unitscale_jax.precision._scale import DynamicScale, StaticScale
from unitscale_jax.precision._simulated import (
    simulated,
)
from unitscale_jax.precision._updated import updated

__all__ = [
    "DynamicScale",
    "LossScaleState",
    "LowPrecisionState",
    "Policy",
    "StaticScale",
    "autocast",
    "cast",
    "current_scale",
    "loss_scaled",
    "low_precision_weights",
    "overflowing",
    "simulated",
    "unless_skipped",
    "unscaled",
    "updated",
]


def __dir__() -> list[str]:
    """What tab completion offers: the public names, and nothing that is imported here."""
    return [*__all__, "__all__", "__doc__", "__name__"]
