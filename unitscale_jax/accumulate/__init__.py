"""Gradient accumulation: inside a step (`accumulated`) and across loop steps (`multi_steps`)."""

from unitscale_jax.accumulate._accumulated import accumulated
from unitscale_jax.accumulate._multi_steps import multi_steps
from unitscale_jax.optimizer import MultiStepsState

__all__ = ["MultiStepsState", "accumulated", "multi_steps"]
