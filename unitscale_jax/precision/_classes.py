"""Which arithmetic an operation is safe in: a table of primitives, readable on one screen.

low      products: operands and result in the compute dtype, sums inside the unit wider
float32  what 16 bits lose: exponentials, logs, roots, long sums, decompositions
prefix   follows its operands, unless a float32 operation reads its result: then it is float32 too.
         A softmax is `reduce_max, sub, exp, reduce_sum, div`: with `exp` alone in float32, the
         difference is rounded before it, and probabilities are off by 6 %. Selecting is exact in
         16 bits but for its constant: a mask of the lowest float32 would be -inf, and a row that is
         masked whole NaN; it costs 0.2 % of the bytes of a transformer's gradient
follow   the widest dtype of its activations; constants, biases and gains adapt to them
each     every result as its own operand: barriers, collectives
keep     operands and results as they were traced; also every primitive that is not listed

The intent is that of `torch.amp`; the names are JAX's.
"""

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias, get_args

from unitscale_jax.trace.program import COLLECTIVES, MOVES, PRODUCTS, SCATTERS

OpClass: TypeAlias = Literal["low", "float32", "prefix", "follow", "each", "keep"]
CLASSES = get_args(OpClass)

_FLOAT32 = """
exp exp2 expm1 log log1p pow sqrt rsqrt cbrt erf_inv erfc lgamma digamma tan sinh cosh asin acos
asinh acosh atanh reduce_sum reduce_prod cumsum cumprod cumlogsumexp reduce_window_sum
cholesky qr eigh svd lu triangular_solve fft
"""
_PREFIX = """
sub neg abs max min reduce_max reduce_min clamp select_n integer_pow square pad
"""
_FOLLOW = """
add add_any mul div rem sign floor ceil round tanh logistic sin cos atan atan2 erf nextafter
eq ne lt le gt ge is_finite dynamic_update_slice gather sort top_k argmax argmin reduce_window_max
reduce_window_min select_and_scatter_add select_and_gather_add cummax cummin reduce_and reduce_or
real imag unit_scale unit_scale_by round_bwd straight_through convert_element_type
"""
_EACH = """
optimization_barrier pcast pvary reshard mesh_cast device_put with_memory_space_constraint
"""
_TABLE: list[tuple[OpClass, Iterable[str]]] = [
    ("low", PRODUCTS),
    ("float32", _FLOAT32.split()),
    ("prefix", MOVES),
    ("prefix", _PREFIX.split()),
    ("follow", SCATTERS),
    ("follow", _FOLLOW.split()),
    ("each", COLLECTIVES),
    ("each", _EACH.split()),
]
OPS: Mapping[str, OpClass] = {name: chosen for chosen, names in _TABLE for name in names}
"""The class of each primitive; one that is not here is kept as it was traced."""
