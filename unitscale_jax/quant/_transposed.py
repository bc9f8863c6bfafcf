"""The derivative of a product by one operand: a linear program of the cotangent and the other one.

    y = x w:    dx = g w',    dw = x' g

JAX's own rule gives dw as the transpose of g' x, and a product of integers is a kernel that no
transpose is fused into: two more passes over every gradient of weights. So dots say theirs here.
"""

from typing import Any

import jax

from unitscale_jax.trace.params import Dot, Product


def transposed(product: Product, side: int, g: Any, other: Any) -> Any:
    """The closed jaxpr of (g, other) -> the cotangent of operand `side`; only shapes are read."""
    if isinstance(product, Dot):
        return jax.make_jaxpr(lambda g, other: _of_dot(product, side, g, other))(g, other)
    own = jax.ShapeDtypeStruct(product.shape(side), product.site.operands[side])

    def by_jax(g: jax.Array, other: jax.Array) -> jax.Array:
        times = lambda v: product.as_traced(*((v, other) if side == 0 else (other, v)))
        return jax.linear_transpose(times, own)(g)[0]

    return jax.make_jaxpr(by_jax)(g, other)


def _of_dot(product: Dot, side: int, g: jax.Array, other: jax.Array) -> jax.Array:
    """Sums over what the other operand has to itself, operands in the order of the result."""
    (sums, batches), rest = product.numbers, 1 - side
    first = len(batches[0])
    lefts = len(product.free(0))
    in_g = (range(first, first + lefts), range(first + lefts, g.ndim))
    over = (tuple(product.free(rest)), tuple(in_g[rest]))
    along = (tuple(batches[rest]), tuple(range(first)))
    # Dimensions of this operand, in the order in which the product of the other and g has them.
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
