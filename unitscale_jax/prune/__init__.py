"""Pruning by masks: patterns, scores, schedules, and optimizers that keep zeros zero."""

from unitscale_jax.optimizer import PrunedState
from unitscale_jax.prune._allocate import ERK, OWL, Global, uniform
from unitscale_jax.prune._masks import apply_masks, masked
from unitscale_jax.prune._patterns import Balanced, Block, Channel, NofM, Unstructured
from unitscale_jax.prune._pruned import masks_of, pruned
from unitscale_jax.prune._refit import refit
from unitscale_jax.prune._report import SparsityReport, report
from unitscale_jax.prune._resolve import resolve_axes
from unitscale_jax.prune._rigl import SET, rigl
from unitscale_jax.prune._schedules import Cubic, Linear, OneShot, Steps
from unitscale_jax.prune._scores import (
    FisherState,
    Score,
    fisher,
    magnitude,
    movement,
    random,
    saliency,
)
from unitscale_jax.prune._select import exact_k, exact_k_of, n_of_m
from unitscale_jax.prune._sparsegpt import SparseGPTReport, sparsegpt
from unitscale_jax.prune._spec import SparsitySpec, make_masks
from unitscale_jax.prune._straight import magnitude_masks, masked_straight_through, sr_ste
from unitscale_jax.prune._wanda import owl_ratios, wanda, wanda_masks
from unitscale_jax.statistics import calibrate

__all__ = [
    "Balanced",
    "Block",
    "Channel",
    "Cubic",
    "FisherState",
    "Linear",
    "PrunedState",
    "NofM",
    "OneShot",
    "Score",
    "SparseGPTReport",
    "SparsityReport",
    "SparsitySpec",
    "Steps",
    "Unstructured",
    "calibrate",
    "ERK",
    "exact_k",
    "exact_k_of",
    "fisher",
    "Global",
    "magnitude",
    "magnitude_masks",
    "make_masks",
    "pruned",
    "masks_of",
    "movement",
    "n_of_m",
    "OWL",
    "owl_ratios",
    "apply_masks",
    "random",
    "refit",
    "report",
    "resolve_axes",
    "rigl",
    "saliency",
    "SET",
    "sparsegpt",
    "sr_ste",
    "masked_straight_through",
    "uniform",
    "wanda",
    "wanda_masks",
    "masked",
]


def __dir__() -> list[str]:
    """What tab completion offers: the public names, and nothing that is imported here."""
    return [*__all__, "__all__", "__doc__", "__name__"]
