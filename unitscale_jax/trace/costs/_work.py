"""FLOPs and transcendentals of one equation, by primitive.

    dot            (b, m, k) x (b, k, n) takes 2 b m n k
    convolution    2 · batch · out_channels · in_channels / groups · taps that meet a pixel
    elementwise    1 per element of the result
    reduction      elements of the operand - elements of the result

They are those of XLA's `HloCostAnalysis` for the instruction that a primitive is lowered to, so
`jax.jit(f).lower(x).cost_analysis()` says the same. Integer, boolean and comparison instructions
count like floating ones, a transcendental is not a FLOP, and a tap of a convolution counts where it
meets a pixel, neither padding nor a hole of dilation. Deliberately different are

    cumsum, ..       n - 1 steps a row, not windows of n that the lowering writes down and XLA
                     takes apart again
    top_k            n ⌈log₂(k + 1)⌉ comparisons of a heap; XLA calls a library
    fft              5 n log₂ n, half of it for a real one; XLA multiplies the logarithms of axes
    ragged_dot       2 m k n: every row meets one group; XLA counts one dense product for each
    linear algebra   the leading terms of Golub and Van Loan, *Matrix Computations*; XLA cannot
                     look into the libraries it calls
    special          one transcendental for what is lowered to a polynomial that depends on the
                     version: asin, lgamma, digamma, erf_inv, erfc, ..
    threefry         112 integer operations for a number: 20 rounds of 5, 6 keys of 2; XLA counts
                     the loop over rounds once
    complex numbers  one per element, also where it is lowered to several real instructions
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.trace.program._compat import Atom, Equation, Jaxpr, dtype_of, opened, shape_of
from unitscale_jax.trace.program._primitives import (
    COLLECTIVES,
    CUMULATIVE,
    DEVICE_REDUCTIONS,
    IN_PLACE,
    MOVES,
    REDUCTIONS,
    WINDOWS,
    named,
)
from unitscale_jax.trace.program._walk import sites

Work: TypeAlias = tuple[int, int]
"""FLOPs and transcendentals."""


def work(eqn: Equation) -> Work | None:
    """FLOPs and transcendentals of an equation without a body that can be entered.

    None: the primitive is not in the table.
    """
    name = eqn.primitive.name
    return _WORK[name](eqn) if name in _WORK else None


def size(v: Atom) -> int:
    """Number of elements of a variable or a literal; 1 of a token."""
    return math.prod(shape_of(v))


def update(eqn: Equation) -> Atom:
    """The operand that a scatter, or an update of a slice or a reference, puts there."""
    return eqn.invars[2 if eqn.primitive.name.startswith("scatter") else 1]


def _nothing(eqn: Equation) -> Work:
    del eqn
    return 0, 0


def _each(flops: int, transcendentals: int = 0) -> Callable[[Equation], Work]:
    """So many operations for every element of the result."""
    return lambda eqn: (flops * size(eqn.outvars[0]), transcendentals * size(eqn.outvars[0]))


def _convert(eqn: Equation) -> Work:
    same = dtype_of(eqn.invars[0]) == dtype_of(eqn.outvars[0])  # only the weak type differs
    return (0 if same else size(eqn.outvars[0])), 0


def _scaled(eqn: Equation) -> Work:
    return (0 if eqn.params["fwd"] == 1 else size(eqn.outvars[0])), 0


def _select(eqn: Equation) -> Work:
    choices = len(eqn.invars) - 2  # of more than two values, each asks for a number first
    return (choices if choices == 1 else 2 * choices) * size(eqn.outvars[0]), 0


def _pow(eqn: Equation) -> Work:
    integer = not jnp.issubdtype(dtype_of(eqn.invars[1]), jnp.inexact)  # is converted
    return integer * size(eqn.invars[1]), size(eqn.outvars[0])


def _integer_pow(eqn: Equation) -> Work:
    """Squarings and multiplications of the binary method, and a division for 1 / x^y."""
    y = abs(eqn.params["y"])
    products = max(0, y.bit_length() + y.bit_count() - 2)
    return (products + (eqn.params["y"] < 0)) * size(eqn.outvars[0]), 0


def _dot(eqn: Equation) -> Work:
    (_, contracted), (_, batch) = eqn.params["dimension_numbers"]
    return _products(eqn, {*contracted, *batch}), 0


def _ragged_dot(eqn: Equation) -> Work:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    return _products(eqn, {*contracted, *batch, *numbers.rhs_group_dimensions}), 0


def _products(eqn: Equation, shared: set[int]) -> int:
    """Each element of lhs meets every index of rhs along the axes that they do not share."""
    free = [n for axis, n in enumerate(shape_of(eqn.invars[1])) if axis not in shared]
    return 2 * size(eqn.invars[0]) * math.prod(free)


def _convolution(eqn: Equation) -> Work:
    p = eqn.params
    lhs_spec, rhs_spec, out_spec = p["dimension_numbers"]
    lhs, rhs, out = (shape_of(v) for v in (*eqn.invars, *eqn.outvars))
    axes = zip(lhs_spec[2:], rhs_spec[2:], out_spec[2:], strict=True)
    windows = zip(
        p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"], strict=True
    )
    taps = math.prod(
        _taps(lhs[i], rhs[k], out[o], *window)
        for (i, k, o), window in zip(axes, windows, strict=True)
    )
    batch = lhs[lhs_spec[0]] // p["batch_group_count"]
    return 2 * batch * rhs[rhs_spec[0]] * rhs[rhs_spec[1]] * taps, 0


def _taps(
    size: int, window: int, out: int, stride: int, padding: Any, holes: int, spread: int
) -> int:
    """Pairs of a result's position and a tap, along one axis, that meet an element.

    A tap at `spread` times its number meets position `at` of the padded, dilated operand; it meets
    an element unless that lies in the padding, or between two elements, `holes` apart.
    """
    at = np.arange(out)[:, None] * stride - padding[0] + np.arange(window) * spread
    return int(np.sum((at >= 0) & (at <= (size - 1) * holes) & (at % holes == 0)))


def _removed(eqn: Equation) -> int:
    """Number of elements that a reduction makes disappear, each by combining two."""
    return size(eqn.invars[0]) - size(eqn.outvars[0])


def _reduction(eqn: Equation) -> Work:
    return _removed(eqn), 0


def _arg_reduction(eqn: Equation) -> Work:
    """XLA combines two pairs of value and index in 7 instructions, and in 2 more finds NaN."""
    inexact = jnp.issubdtype(dtype_of(eqn.invars[0]), jnp.inexact)
    return (9 if inexact else 7) * _removed(eqn), 0


def _body(jaxpr: Jaxpr, times: int) -> Work:
    """A scalar body, evaluated a number of times."""
    found = [work(site.eqn) or (0, 0) for site in sites(jaxpr)]
    return times * sum(flops for flops, _ in found), times * sum(n for _, n in found)


def _reduce(eqn: Equation) -> Work:
    return _body(opened(eqn.params["jaxpr"])[0], _removed(eqn))


def _cumulative(flops: int, transcendentals: int = 0) -> Callable[[Equation], Work]:
    def work(eqn: Equation) -> Work:
        n, axis = size(eqn.invars[0]), eqn.params["axis"]
        steps = n - n // max(1, shape_of(eqn.invars[0])[axis])
        return flops * steps, transcendentals * steps

    return work


def _windows(eqn: Equation) -> int:
    """Number of combinations of two values, where every window is reduced by itself."""
    return size(eqn.outvars[0]) * (math.prod(eqn.params["window_dimensions"]) - 1)


def _reduce_windows(eqn: Equation) -> Work:
    return _windows(eqn), 0


def _select_and_gather(eqn: Equation) -> Work:
    return 3 * _windows(eqn), 0  # compares, and selects the value and its tangent


def _reduce_window(eqn: Equation) -> Work:
    return _body(opened(eqn.params["jaxpr"])[0], _windows(eqn))


def _select_and_scatter(eqn: Equation) -> Work:
    """Finds the place of every source element in its window, and adds it there."""
    return size(eqn.invars[0]) * math.prod(eqn.params["window_dimensions"]), 0


def _gather(eqn: Equation) -> Work:
    """Nothing, or for `mode="fill"` the test of every index against two bounds, and a select."""
    if eqn.params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP:
        return 0, 0
    n, parts = size(eqn.invars[1]), max(1, shape_of(eqn.invars[1])[-1])
    return size(eqn.outvars[0]) + 4 * n - n // parts, 0


def _scatter(eqn: Equation) -> Work:
    return _clipped(eqn), 0


def _combine(eqn: Equation) -> Work:
    return _clipped(eqn) + size(update(eqn)), 0


def _clipped(eqn: Equation) -> int:
    """Operations of `mode="clip"` on the indices of a scatter; a gather clips by itself."""
    clips = eqn.params.get("mode") == jax.lax.GatherScatterMode.CLIP
    return clips * size(eqn.invars[1])


def _sort(eqn: Equation) -> Work:
    n = size(eqn.invars[0])
    return n * math.ceil(math.log2(max(1, n))), 0


def _top_k(eqn: Equation) -> Work:
    """Counts the comparisons of a heap of k entries."""
    k = max(1, shape_of(eqn.outvars[0])[-1])
    return size(eqn.invars[0]) * math.ceil(math.log2(k + 1)), 0


def _fft(eqn: Equation) -> Work:
    complex_to_complex = dtype_of(eqn.invars[0]) == dtype_of(eqn.outvars[0])
    n = max(size(eqn.invars[0]), size(eqn.outvars[0]))
    logs = math.log2(math.prod(eqn.params["fft_lengths"]))
    return round((5 if complex_to_complex else 2.5) * n * logs), 0


def _random(eqn: Equation) -> Work:
    """Threefry has 112 integer operations for a number; of others there is one for each number."""
    n, operand = size(eqn.outvars[0]), dtype_of(eqn.invars[0])
    return (112 * n, 0) if "fry" in str(operand) or operand == jnp.uint32 else (0, n)


def _matrix(formula: Callable[[int, int], float]) -> Callable[[Equation], Work]:
    """A formula in the rows m and columns n, m >= n, of the first operand's matrices."""

    def work(eqn: Equation) -> Work:
        *batch, m, n = shape_of(eqn.invars[0])
        return round(math.prod(batch) * formula(max(m, n), min(m, n))), 0

    return work


def _triangular_solve(eqn: Equation) -> Work:
    return size(eqn.invars[1]) * shape_of(eqn.invars[0])[-1], 0


def _tridiagonal_solve(eqn: Equation) -> Work:
    return 8 * size(eqn.invars[-1]), 0  # Thomas


def _reduced_over_devices(eqn: Equation) -> Work:
    return sum(map(size, eqn.invars)), 0  # on every device, as in a ring


def _table(*rows: tuple[str, Callable[[Equation], Work]]) -> dict[str, Callable[[Equation], Work]]:
    return {name: work for names, work in rows for name in names.split()}


_OF_DTYPE = named("convert_element_type reduce_precision unit_scale unit_scale_by")
"""Moves that compute a value from each, or copy it."""

VIEWS = (
    (IN_PLACE - _OF_DTYPE - named("copy copy_p device_put straight_through"))
    | named("reshape squeeze pbroadcast preduced random_wrap random_unwrap random_clone")
    | named("empty empty2 create_token axis_index debug_callback debug_print")
)
"""Primitives that read and write nothing."""

COMBINING = "scatter-add scatter-sub scatter-mul scatter-min scatter-max addupdate"
_ARITHMETIC = """
add sub mul div rem max min neg abs sign floor ceil round square add_any and or xor not
shift_left shift_right_logical shift_right_arithmetic population_count clz
eq ne lt le gt ge eq_to le_to lt_to is_finite clamp reduce_precision bitcast_convert_type
real imag complex mulhi
"""
_FUNCTIONS = """
exp expm1 log log1p tanh sin cos tan atan sqrt rsqrt cbrt atan2 erf
"""
_SPECIAL = """
asin acos sinh cosh asinh acosh atanh erfc erf_inv lgamma digamma rng_uniform
"""
_COPIES = named("""
    dynamic_update_slice pad iota to_edtype from_edtype get swap ref_new new_ref freeze ref_get
    ref_set psend precv pgather lu_pivots_to_permutation random_seed
""")

_WORK = dict.fromkeys(
    VIEWS | _COPIES | (MOVES - _OF_DTYPE) | (COLLECTIVES - DEVICE_REDUCTIONS), _nothing
) | _table(
    (_ARITHMETIC, _each(1)),
    (_FUNCTIONS + _SPECIAL, _each(0, 1)),
    ("exp2", _each(1, 1)),
    ("logistic", _each(3, 1)),
    ("one_minus_square", _each(3)),
    ("conj", _each(4)),
    ("pow", _pow),
    ("convert_element_type", _convert),
    ("unit_scale", _scaled),
    ("unit_scale_by", _each(1)),
    ("select_n", _select),
    ("integer_pow", _integer_pow),
    ("dot_general", _dot),
    ("ragged_dot_general ragged_dot", _ragged_dot),
    ("conv_general_dilated", _convolution),
    (" ".join(REDUCTIONS), _reduction),
    ("argmax argmin", _arg_reduction),
    ("reduce", _reduce),
    (" ".join(CUMULATIVE), _cumulative(1)),
    ("cumlogsumexp", _cumulative(8, 2)),
    (" ".join(WINDOWS), _reduce_windows),
    ("reduce_window", _reduce_window),
    ("select_and_scatter_add", _select_and_scatter),
    ("select_and_gather_add", _select_and_gather),
    ("gather", _gather),
    ("scatter", _scatter),
    (COMBINING, _combine),
    ("sort", _sort),
    ("top_k approx_top_k", _top_k),
    ("fft", _fft),
    ("random_bits random_split random_fold_in threefry2x32 rng_bit_generator", _random),
    ("cholesky cholesky_update", _matrix(lambda _, n: n**3 / 3)),
    ("lu", _matrix(lambda m, n: m * n**2 - n**3 / 3)),
    ("qr geqrf geqp3 householder_product", _matrix(lambda m, n: 2 * m * n**2 - 2 * n**3 / 3)),
    ("eigh", _matrix(lambda _, n: 9 * n**3)),
    ("svd", _matrix(lambda m, n: 4 * m**2 * n + 22 * n**3)),
    ("triangular_solve", _triangular_solve),
    ("tridiagonal_solve", _tridiagonal_solve),
    (" ".join(DEVICE_REDUCTIONS | {"reduce_scatter"}), _reduced_over_devices),
)
"""Primitive -> FLOPs and transcendentals of one equation."""
