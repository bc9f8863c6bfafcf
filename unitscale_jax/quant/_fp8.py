"""Products of 8-bit floats whose scales are 1: for values that are unit already.

    forward   (e4m3fn, e4m3fn)        backward   (e5m2, e4m3fn)

Unit scaling makes values and gradients start near 1, where these formats have their normal numbers.
So there is no range to measure: not of the values (no amax), and not of the loss (no loss scale).
"""

from unitscale_jax.quant._calibrators import Fixed
from unitscale_jax.quant._spec import DotSpec, QSpec

_E4M3 = QSpec(format="e4m3fn", calibrator=Fixed(448.0))
_E5M2 = QSpec(format="e5m2", calibrator=Fixed(57344.0))

fp8 = DotSpec(w=_E4M3, x=_E4M3, g=_E5M2)
"""The `DotSpec` of fp8 products with scale 1, for `us.quantized(us.unit_scaled(loss), rules)`.

Operands are rounded to e4m3fn and the gradient of the result to e5m2, each beyond its largest
number clipped to it.
"""
