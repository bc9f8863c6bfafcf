"""Pure-functional transforms that make Flax models cheaper to train and to serve.

    params --> apply(params, *inputs) --> loss(params, batch) --> grad(params, batch) --> update

Every technique maps one of these stations to the same station, so composing is calling. The verbs
of the stations are here, with the specs they take; everything else is in the namespace of its
technique: `us.quant`, `us.prune`, `us.compaction`, `us.distill`, `us.parallel`, `us.unit`.
"""

from unitscale_jax import (
    compaction,
    distill,
    formats,
    fwd_bwd,
    parallel,
    prune,
    quant,
    rules,
    statistics,
    testing,
    trace,
    tree,
    unit,
)
from unitscale_jax.accumulate import accumulated, multi_steps
from unitscale_jax.bridge import from_linen, from_nnx
from unitscale_jax.checkpoint import Checkpoints, export_compressed_tensors, load, save
from unitscale_jax.compaction import compact, compacted
from unitscale_jax.compose import chain
from unitscale_jax.distill import distilled
from unitscale_jax.loss import Grad, Mean, loss_value, row_keys, value_and_grad
from unitscale_jax.precision import (
    DynamicScale,
    Policy,
    StaticScale,
    autocast,
    cast,
    current_scale,
    loss_scaled,
    low_precision_weights,
    overflowing,
    simulated,
    unless_skipped,
    unscaled,
    updated,
)
from unitscale_jax.prune import pruned
from unitscale_jax.quant import DotSpec, QSpec, quantize, quantized
from unitscale_jax.report import Report, explain
from unitscale_jax.statistics import calibrate
from unitscale_jax.unit import unit_scaled

__version__ = "0.1.0"

__all__ = [
    "Checkpoints",
    "DotSpec",
    "DynamicScale",
    "Grad",
    "Mean",
    "Policy",
    "QSpec",
    "Report",
    "StaticScale",
    "accumulated",
    "autocast",
    "calibrate",
    "cast",
    "chain",
    "compact",
    "compacted",
    "compaction",
    "current_scale",
    "distill",
    "distilled",
    "explain",
    "export_compressed_tensors",
    "formats",
    "from_linen",
    "from_nnx",
    "fwd_bwd",
    "load",
    "loss_scaled",
    "loss_value",
    "low_precision_weights",
    "multi_steps",
    "overflowing",
    "parallel",
    "prune",
    "pruned",
    "quant",
    "quantize",
    "quantized",
    "row_keys",
    "rules",
    "save",
    "simulated",
    "statistics",
    "testing",
    "trace",
    "tree",
    "unit",
    "unit_scaled",
    "unless_skipped",
    "unscaled",
    "updated",
    "value_and_grad",
]


def __dir__() -> list[str]:
    """What tab completion offers: the public names, and no module that is not for users."""
    return [*__all__, "__all__", "__doc__", "__version__"]
