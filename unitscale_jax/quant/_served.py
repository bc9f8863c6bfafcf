"""The served value of a product: a pure function of codes, scales and float operands.

    acc = sum q_x q_w  (int32)        y = round(f32(acc) * (s_x * s_w))

One equation for training and serving, in whatever program it stands.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax.mesh_axes import agree, zeros
from unitscale_jax.quant._cpu_forms import product_of_codes
from unitscale_jax.quant._ops import no_fma, round_and_cast, tiled
from unitscale_jax.quant._qtensor import QTensor, integer_codes, is_quantized, value_of
from unitscale_jax.quant._spec import DotSpec
from unitscale_jax.trace.params import Conv, Dot, Product

EXACT = 2**24
"""Up to here float32 holds every integer, so that sums of integers are exact in any order."""


class Unquantizable(ValueError):  # noqa: N818
    """A product that no form computes exactly; the message says why."""


def served(product: Product, sides: list[Any], spec: DotSpec) -> jax.Array:
    """The value of a product; a pure function of codes, scales and float operands."""
    if spec.compute == "dequant":
        return _of_values(product, sides)
    if not all(map(is_quantized, sides)):
        return _weight_only(product, sides)
    side = next((k for k in (0, 1) if grouped(product, k, sides[k])), None)
    if side is not None:
        return round_and_cast(_tile_by_tile(product, sides, side, spec), product.dtype)
    acc = _integer_product(product, sides, spec, [integer_codes(t) for t in sides])
    scale = product.placed(sides[0].scale, 0) * product.placed(sides[1].scale, 1)
    if product.across is not None:  # in integers, which have the same sum in any order
        acc, scale = product.across(acc), product.across.part(scale)
    return round_and_cast(acc.astype(jnp.float32) * scale, product.dtype)


def varying(product: Product, side: int, t: QTensor) -> list[int]:
    """Contracted dimensions along which a scale differs."""
    return [d for d in product.contracted(side) if t.scale.shape[d] != 1]


def grouped(product: Product, side: int, t: QTensor) -> bool:
    """True if a scale differs along one contracted dimension only, by its groups.

    Such a product is summed tile by tile; of other products that vary the scale crosses the sum.
    """
    last = max(t.axes, default=-1) % t.ndim
    tiles = varying(product, side, t)
    return tiles == [last] and t.scale.shape[last] < t.shape[last] and product.splits


def reach(t: QTensor) -> int:
    """The largest magnitude of a factor: a code, or a code times the integer of its group."""
    if t.multiplier is not None:
        return 127
    return t.spec.w.reach if t.spec.w.symmetric else 2 ** (t.spec.w.grid.bits - 1)


def _of_values(product: Product, sides: list[Any]) -> jax.Array:
    bare = [value_of(replace(t, master=None)) if is_quantized(t) else t for t in sides]
    return round_and_cast(product.bind(bare[0], bare[1], jnp.float32), product.dtype)


def _weight_only(product: Product, sides: list[Any]) -> jax.Array:
    """Codes in the dtype of the activation, where they are exact; their scale after the sum."""
    side = 0 if is_quantized(sides[0]) else 1
    t, x = sides[side], sides[1 - side]
    if t.zero_point is not None or grouped(product, side, t):
        return _of_values(product, sides)
    codes = integer_codes(t).astype(x.dtype)
    both = [codes, x] if side == 0 else [x, codes]
    acc = product.bind(both[0], both[1], jnp.float32)
    return round_and_cast(acc * product.placed(t.scale, side), product.dtype)


def _integer_product(
    product: Product, sides: list[QTensor], spec: DotSpec, codes: list[jax.Array]
) -> jax.Array:
    """The sum of products of codes less zero points: int32, or float32 of 8-bit floats."""
    if not sides[0].spec.w.is_integer:
        if isinstance(product, Conv) and codes[0].dtype != codes[1].dtype:
            codes = [c.astype(jnp.float32) for c in codes]  # JAX has no convolution of two dtypes
        return product.bind(codes[0], codes[1], jnp.float32)
    if spec.compute == "float_exact":
        acc = _float_exact(product, codes, [reach(t) for t in sides])
    else:
        # int4 x int4 has no kernel on a CPU, and int8 x int4 a slow one on a GPU.
        acc = product_of_codes(product, *(c.astype(jnp.int8) for c in codes))
    return _less_zero_points(product, sides, codes, acc)


def _less_zero_points(
    product: Product, sides: list[QTensor], codes: list[jax.Array], acc: jax.Array
) -> jax.Array:
    """Sum (a - z_a)(b - z_b) = acc - z_a sum b - z_b sum a + K z_a z_b."""
    points = [t.zero_point for t in sides]
    for side in (0, 1):
        point = points[side]
        if point is None:
            continue
        other = sides[1 - side]
        sums = _sums(product, other, codes[1 - side], 1 - side)
        acc = acc - product.placed(point, side) * sums
    if points[0] is not None and points[1] is not None:
        both = product.placed(points[0], 0) * product.placed(points[1], 1)
        acc = acc + product.terms * both
    return acc


def _sums(product: Product, t: QTensor, codes: jax.Array, side: int) -> jax.Array:
    """Sums of codes over the contraction: kept with the parameter, or made now."""
    kept = t.code_sums is not None and not isinstance(product, Conv)
    if kept and t.code_sums.shape == tuple(
        1 if d in product.contracted(side) else n for d, n in enumerate(t.shape)
    ):
        return product.placed(t.code_sums, side)
    return product.sum_over(codes, side)


def _float_exact(product: Product, codes: list[jax.Array], reach: list[int]) -> jax.Array:
    """The integer product by float32 arithmetic, in parts that float32 sums exactly.

    Partial sums of n products are integers up to n Qx Qw, and float32 has every integer up to 2^24:
    so a part has at most 2^24 / (Qx Qw) terms, 1040 for int8 (127 * 127), and parts are added up as
    int32. Cutting one dimension at `step` leaves each part `step` times the size of all others.
    """
    highest = {"precision": (jax.lax.Precision.HIGHEST,) * 2}
    wide = [c.astype(jnp.float32) for c in codes]
    most = EXACT // (reach[0] * reach[1])

    def times(a: jax.Array, b: jax.Array) -> jax.Array:
        return product.bind(a, b, jnp.float32, **highest).astype(jnp.int32)

    if product.terms <= most:
        return times(*wide)
    if not product.splits:
        raise Unquantizable(
            f"sums {product.terms} products of codes, and float32 is exact up to {most}; only dots "
            'are split. Use compute="int".'
        )
    dim = max(product.contracted(1), key=lambda d: product.shape(1)[d])
    size = product.shape(1)[dim]
    step = most * size // product.terms
    if step == 0:
        raise Unquantizable(f"has {product.terms} terms; float32 is exact up to {most}.")
    pair = product.pair(1, dim)
    total = None
    for start in range(0, size, step):
        stop = min(start + step, size)
        cut = [
            jax.lax.slice_in_dim(wide[0], start, stop, axis=pair),
            jax.lax.slice_in_dim(wide[1], start, stop, axis=dim),
        ]
        part = times(*cut)
        total = part if total is None else total + part
    assert total is not None
    return total


def _tile_by_tile(product: Product, sides: list[QTensor], side: int, spec: DotSpec) -> jax.Array:
    """Groups with scales of their own, one after the other into a float32 sum.

    One batched product and a sum would take a result for each group, and sum in an order that
    changes with the program.
    """
    t, other = sides[side], sides[1 - side]
    dim = max(t.axes) % t.ndim
    pair, count = product.pair(side, dim), t.groups

    def front(x: jax.Array, axis: int) -> jax.Array:
        """Tiles of an axis as a leading axis: (.., K, ..) to (count, .., K / count, ..)."""
        return jnp.moveaxis(tiled(x, axis, count), axis, 0)

    def row(x: jax.Array | None) -> jax.Array | None:
        """Scales of tiles as a leading axis, size 1 where it was: (.., count, ..) likewise."""
        return None if x is None else jnp.expand_dims(jnp.moveaxis(x, dim, 0), dim + 1)

    stacked = (
        front(integer_codes(t), dim),
        row(t.scale),
        row(t.zero_point),
        row(t.code_sums),
        front(integer_codes(other), pair),
    )

    def add(total: jax.Array, tile: Any) -> tuple[jax.Array, None]:
        codes, scale, point, code_sums, against = tile
        here = replace(t, codes=codes, scale=scale, zero_point=point, code_sums=code_sums)
        here = replace(here, multiplier=None)
        beside = replace(other, codes=against, multiplier=None, code_sums=None)
        pieces = [beside, here] if side == 1 else [here, beside]
        part = _Tile(product.site, product.extra, pieces)
        acc = _integer_product(part, pieces, spec, [p.codes for p in pieces])
        by = product.placed(scale, side) * product.placed(other.scale, 1 - side)
        return total + no_fma(acc.astype(jnp.float32) * by), None

    shape = product.result_shape
    start = agree(zeros(shape, jnp.float32, like=t.codes), other.codes)
    return jax.lax.scan(add, start, stacked)[0]


class _Tile(Dot):
    """A dot of one tile: the same equation on operands cut along the contraction."""

    def __init__(self, site: Any, extra: Any, pieces: list[QTensor]) -> None:
        super().__init__(site, extra)
        object.__setattr__(self, "_shapes", [p.shape for p in pieces])

    def shape(self, side: int) -> tuple[int, ...]:
        """The shape of one operand, cut to the tile."""
        return self._shapes[side]  # type: ignore[attr-defined]
