"""Forms of integer products that XLA's CPU backend has fast kernels for.

The equations are those of any backend, and the sums of integers the same in any order: on a TPU or
a GPU these forms compute the same and are neither needed nor harmful. Each stands here with the
measurement that justifies it (JAX 0.10 and 0.12, one core of an x86 CPU):

    a second row of zeros         one row by 2048 x 2048: 0.4 ms in place of 2.5 (float32 1.1)
    free columns as two axes      1024 x 1024 x 1024, the left summed over its rows, as in every
                                  gradient of weights: 6.3 ms in place of 31 (float32 25)
    the derivative written out    JAX's rule gives dw = x' g as the transpose of g' x, and no
                                  transpose is fused into a product of integers: it saves two
                                  passes over every gradient of weights

    y = x w:    dx = g w',    dw = x' g
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax.mesh_axes import zeros
from unitscale_jax.trace.params import Dot, Product


def product_of_codes(product: Product, left: jax.Array, right: jax.Array) -> jax.Array:
    """An integer product into int32, in the form with the fastest kernel; the sums are the same."""
    free = product.free(0) if isinstance(product, Dot) else []
    rows = math.prod(left.shape[d] for d in free)
    if isinstance(product, Dot) and free and rows == 1:
        return _with_zeros(product, left, right, free)
    if isinstance(product, Dot) and len(free) == 1 and rows % 2 == 0 and rows > 2:
        summed_first = min(product.contracted(0), default=free[0]) < free[0]
        if summed_first and product.site.eqn.params["out_sharding"] is None:
            return _halved(product, left, right, free[0])
    return product.bind(left, right, jnp.int32)


def _with_zeros(product: Dot, left: jax.Array, right: jax.Array, free: list[int]) -> jax.Array:
    """One row and a second one of zeros; of two that are alike XLA would make one again."""
    at = len(product.numbers[1][0]) + len(free) - 1
    second = zeros(left.shape, left.dtype, like=left)
    both = product.bind(jnp.concatenate([left, second], axis=free[-1]), right, jnp.int32)
    return jax.lax.slice_in_dim(both, 0, 1, axis=at)


def _halved(product: Dot, left: jax.Array, right: jax.Array, free: int) -> jax.Array:
    """The product with the free dimension of the left cut in two: (k, m) -> (k, m / 2, 2).

    A left operand whose sum comes first has to be transposed for the fast kernel. XLA does so for a
    product with two free dimensions, which it brings to the form (rows, sum) first; one with a
    single free dimension has a form already, and is multiplied as it lies. Any even size can be cut
    in halves.
    """
    (summed, others), (batch, batches) = product.numbers

    def moved(dims: Sequence[int]) -> tuple[int, ...]:
        """Dimensions after the free one are one further back."""
        return tuple(d + (d > free) for d in dims)

    numbers = ((moved(summed), others), (moved(batch), batches))
    split = left.reshape(*left.shape[:free], -1, 2, *left.shape[free + 1 :])
    out = product.bind(split, right, jnp.int32, dimension_numbers=numbers)
    at = len(batch)  # results have batch dimensions first, then the free ones of the left
    return out.reshape(*out.shape[:at], -1, *out.shape[at + 2 :])


def transposed(product: Product, side: int, g: Any, other: Any) -> Any:
    """The closed jaxpr of (g, other) -> the cotangent of operand `side`; only shapes are read."""
    if isinstance(product, Dot):
        return jax.make_jaxpr(lambda g, other: _of_dot(product, side, g, other))(g, other)
    own = jax.ShapeDtypeStruct(product.shape(side), product.site.operands[side])

    def by_jax(g: jax.Array, other: jax.Array) -> jax.Array:
        def times(v: jax.Array) -> jax.Array:
            return product.as_traced(*((v, other) if side == 0 else (other, v)))

        return jax.linear_transpose(times, own)(g)[0]

    return jax.make_jaxpr(by_jax)(g, other)


def _of_dot(product: Dot, side: int, g: jax.Array, other: jax.Array) -> jax.Array:
    """The cotangent of one operand: the sum over the free dimensions of the other.

    Of y = x w that is dx = g w' and dw = x' g. A `dot_general` lays out its result as batch, then
    the free dimensions of its left, then of its right operand: of the two orders of (g, other) the
    one is taken whose result needs no transpose where the operand's own dimensions allow that.
    """
    (sums, batches), rest = product.numbers, 1 - side
    first = len(batches[0])
    lefts = len(product.free(0))
    in_g = (range(first, first + lefts), range(first + lefts, g.ndim))
    over = (tuple(product.free(rest)), tuple(in_g[rest]))
    along = (tuple(batches[rest]), tuple(range(first)))
    # This operand's dimensions are batch, `kept` (its free ones, which g has) and `met` (its summed
    # ones, which the other has as free ones in that product, in ascending order of theirs).
    met = [sums[side][sums[rest].index(d)] for d in sorted(sums[rest])]
    kept = product.free(side)
    dtype = product.site.operands[side]
    if min(met, default=0) < min(kept, default=0):
        order = [*batches[side], *met, *kept]
        out = jax.lax.dot_general(other, g, (over, along), preferred_element_type=dtype)
    else:
        order = [*batches[side], *kept, *met]
        flipped = (over[::-1], along[::-1])
        out = jax.lax.dot_general(g, other, flipped, preferred_element_type=dtype)
    return out.transpose([order.index(d) for d in range(len(order))])
