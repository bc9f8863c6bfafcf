"""Quantization: one spec for training, post-training and integer serving."""

from unitscale_jax.quantize._cache import append as append
from unitscale_jax.quantize._calibrators import (
    EMA as EMA,
    MSE as MSE,
    Absmax as Absmax,
    Calibrator as Calibrator,
    Fixed as Fixed,
    Percentile as Percentile,
)
from unitscale_jax.quantize._gptq import GPTQReport as GPTQReport, gptq as gptq
from unitscale_jax.quantize._params import quantize as quantize
from unitscale_jax.quantize._qtensor import (
    QTensor as QTensor,
    dequantize as dequantize,
    is_quantized as is_quantized,
)
from unitscale_jax.quantize._quantized import quantized as quantized
from unitscale_jax.quantize._roles import resolve as resolve
from unitscale_jax.quantize._smooth import awq as awq, smoothquant as smoothquant
from unitscale_jax.quantize._spec import DotSpec as DotSpec, Group as Group, QSpec as QSpec
from unitscale_jax.quantize._stats import (
    Stat as Stat,
    Stats as Stats,
    calibrate as calibrate,
    merge_stats as merge_stats,
    observed as observed,
)
