"""Pure-functional transforms that make Flax models cheaper to train and to serve.

    params --> apply(params, *inputs) --> loss(params, batch) --> grad(params, batch) --> update

Every technique maps one of these stations to the same station, so composing is calling.
"""

from unitscale_jax import formats, fwd_bwd, rules, testing, tree
from unitscale_jax.accumulate import MultiStepsState, accumulated, multi_steps
from unitscale_jax.bridge import Bridged, from_linen, from_nnx
from unitscale_jax.checkpoint import Checkpoints, export_compressed_tensors, load, save
from unitscale_jax.compose import chain
from unitscale_jax.loss import Grad, Mean, loss_value, row_keys, value_and_grad
from unitscale_jax.precision import (
    DynamicScale,
    Float16Report,
    LossScaleState,
    LowPrecisionState,
    Policy,
    StaticScale,
    autocast,
    cast,
    current_scale,
    loss_scaled,
    low_precision_weights,
    overflowing,
    to_float16,
)
from unitscale_jax.quantize import (
    EMA,
    MSE,
    Absmax,
    Calibrator,
    DotSpec,
    Fixed,
    Group,
    Percentile,
    QSpec,
    QTensor,
    append,
    dequantize,
    is_quantized,
    quantize,
    quantized,
    resolve,
)
from unitscale_jax.report import Operation, Report, explain

__version__ = "0.1.0"

__all__ = [
    "Absmax",
    "Bridged",
    "Calibrator",
    "Checkpoints",
    "DotSpec",
    "DynamicScale",
    "EMA",
    "Fixed",
    "Float16Report",
    "Grad",
    "Group",
    "LossScaleState",
    "LowPrecisionState",
    "MSE",
    "Mean",
    "MultiStepsState",
    "Operation",
    "Percentile",
    "Policy",
    "QSpec",
    "QTensor",
    "Report",
    "StaticScale",
    "accumulated",
    "append",
    "autocast",
    "cast",
    "chain",
    "current_scale",
    "dequantize",
    "explain",
    "export_compressed_tensors",
    "formats",
    "from_linen",
    "from_nnx",
    "fwd_bwd",
    "is_quantized",
    "load",
    "loss_scaled",
    "loss_value",
    "low_precision_weights",
    "multi_steps",
    "overflowing",
    "quantize",
    "quantized",
    "resolve",
    "row_keys",
    "rules",
    "testing",
    "save",
    "to_float16",
    "tree",
    "value_and_grad",
]
