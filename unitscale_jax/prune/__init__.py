"""Pruning by masks: patterns, scores, schedules, and optimizers that keep zeros zero."""

from unitscale_jax.optimizer import (
    MaskedState,
)
from unitscale_jax.prune._allocate import (
    erk,
    global_,
    owl,
    uniform,
)
from unitscale_jax.prune._masked import (
    masked,
    masks_of,
)
from unitscale_jax.prune._masks import (
    prune,
    with_masks,
)
from unitscale_jax.prune._movement import (
    Scored,
    add_scores,
    movement_masked,
    movement_masks,
    movement_penalty,
)
from unitscale_jax.prune._packed import (
    Bits,
    Packed,
    pack,
    packed,
    unpack,
)
from unitscale_jax.prune._patterns import (
    Balanced,
    Block,
    Channel,
    NofM,
    Unstructured,
)
from unitscale_jax.prune._refit import (
    refit,
)
from unitscale_jax.prune._report import (
    SparsityReport,
    report,
)
from unitscale_jax.prune._resolve import (
    resolve,
)
from unitscale_jax.prune._rigl import (
    rigl,
    set_,
)
from unitscale_jax.prune._schedules import (
    Cubic,
    Linear,
    OneShot,
    Steps,
)
from unitscale_jax.prune._scores import (
    FisherState,
    Score,
    fisher,
    magnitude,
    movement,
    random,
    saliency,
)
from unitscale_jax.prune._select import (
    exact_k,
    exact_k_of,
    n_of_m,
)
from unitscale_jax.prune._sparsegpt import (
    SparseGPTReport,
    sparsegpt,
)
from unitscale_jax.prune._spec import (
    SparsitySpec,
    make_masks,
)
from unitscale_jax.prune._straight import (
    magnitude_masks,
    sr_ste,
    straight_through,
)
from unitscale_jax.prune._wanda import (
    owl_ratios,
    wanda,
    wanda_masks,
)
from unitscale_jax.statistics import (
    calibrate,
)

__all__ = [
    "Balanced",
    "Bits",
    "Block",
    "Channel",
    "Cubic",
    "FisherState",
    "Linear",
    "MaskedState",
    "NofM",
    "OneShot",
    "Packed",
    "Score",
    "Scored",
    "SparseGPTReport",
    "SparsityReport",
    "SparsitySpec",
    "Steps",
    "Unstructured",
    "add_scores",
    "calibrate",
    "erk",
    "exact_k",
    "exact_k_of",
    "fisher",
    "global_",
    "magnitude",
    "magnitude_masks",
    "make_masks",
    "masked",
    "masks_of",
    "movement",
    "movement_masked",
    "movement_masks",
    "movement_penalty",
    "n_of_m",
    "owl",
    "owl_ratios",
    "pack",
    "packed",
    "prune",
    "random",
    "refit",
    "report",
    "resolve",
    "rigl",
    "saliency",
    "set_",
    "sparsegpt",
    "sr_ste",
    "straight_through",
    "uniform",
    "unpack",
    "wanda",
    "wanda_masks",
    "with_masks",
]
