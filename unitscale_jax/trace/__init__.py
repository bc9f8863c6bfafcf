"""A function seen as dataflow: what every op-level technique of the library is built on."""

from unitscale_jax.trace._axes import agree, varying, zeros
from unitscale_jax.trace._compat import varying_axes
from unitscale_jax.trace._function import Traced, trace
from unitscale_jax.trace._reach import reach, sliced

__all__ = ["Traced", "agree", "reach", "sliced", "trace", "varying", "varying_axes", "zeros"]
