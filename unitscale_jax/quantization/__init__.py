"""Quantization: one spec for training, post-training and integer serving."""

from unitscale_jax.quantization._cache import append as append
from unitscale_jax.quantization._calibrators import (
    EMA as EMA,
    MSE as MSE,
    Absmax as Absmax,
    Calibrator as Calibrator,
    Fixed as Fixed,
    Percentile as Percentile,
)
from unitscale_jax.quantization._delayed import (
    AmaxHistory as AmaxHistory,
    amax_history as amax_history,
)
from unitscale_jax.quantization._gptq import GPTQReport as GPTQReport, gptq as gptq
from unitscale_jax.quantization._learned import learned as learned
from unitscale_jax.quantization._lsq import Learned as Learned
from unitscale_jax.quantization._params import quantize as quantize
from unitscale_jax.quantization._qtensor import (
    QTensor as QTensor,
    dequantize as dequantize,
    is_quantized as is_quantized,
)
from unitscale_jax.quantization._quantized import quantized as quantized
from unitscale_jax.quantization._roles import resolve as resolve
from unitscale_jax.quantization._smooth import awq as awq, smoothquant as smoothquant
from unitscale_jax.quantization._spec import DotSpec as DotSpec, Group as Group, QSpec as QSpec
