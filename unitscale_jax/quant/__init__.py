"""Quantization: one spec for training, post-training and integer serving."""

from unitscale_jax.quant._cache import append
from unitscale_jax.quant._calibrator import Calibrator
from unitscale_jax.quant._calibrators import EMA, MSE, Absmax, Fixed, Percentile
from unitscale_jax.quant._delayed import AmaxHistory, amax_history
from unitscale_jax.quant._fp8 import fp8
from unitscale_jax.quant._gptq import GPTQReport, gptq
from unitscale_jax.quant._learned import learned
from unitscale_jax.quant._lsq import Learned
from unitscale_jax.quant._params import quantize
from unitscale_jax.quant._qtensor import QTensor, dequantize, is_quantized
from unitscale_jax.quant._quantized import quantized
from unitscale_jax.quant._roles import resolve
from unitscale_jax.quant._smooth import awq, smoothquant
from unitscale_jax.quant._spec import DotSpec, Group, QSpec

__all__ = [
    "Absmax",
    "AmaxHistory",
    "Calibrator",
    "DotSpec",
    "EMA",
    "Fixed",
    "GPTQReport",
    "Group",
    "Learned",
    "MSE",
    "Percentile",
    "QSpec",
    "QTensor",
    "amax_history",
    "append",
    "awq",
    "dequantize",
    "fp8",
    "gptq",
    "is_quantized",
    "learned",
    "quantize",
    "quantized",
    "resolve",
    "smoothquant",
]


def __dir__() -> list[str]:
    """What tab completion offers: the public names, and nothing that is imported here."""
    return [*__all__, "__all__", "__doc__", "__name__"]
