"""A product of quantized operands: the served value, and its straight-through derivative.

    acc = sum q_x q_w  (int32)        y = round(f32(acc) * (s_x * s_w))

Training and serving evaluate the same equations on the same codes, so they agree to the bit. The
backward pass is that of the float product at the dequantized operands (https://arxiv.org/abs/1308.3432);
what it keeps are codes and scales.
"""

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.quantize._ops import (
    asymmetric,
    bounds_of,
    emit,
    fence,
    on_grid,
    spread,
    symmetric,
    tiled,
)
from unitscale_jax.quantize._product import Conv, Dot, Product, product_of
from unitscale_jax.quantize._qtensor import QTensor, integer_codes, is_quantized, value_of
from unitscale_jax.quantize._spec import DotSpec, QSpec
from unitscale_jax.trace import Site, agree, zeros
from unitscale_jax.typing import Key

EXACT = 2**24
"""Up to here float32 holds every integer, so that sums of integers are exact in any order."""
INT32 = 2**31


@dataclass(frozen=True)
class Verdict:
    """How a product is computed, for `explain`; `kept` says why it is in floating point."""

    compute: str
    terms: int = 0
    bound: int = 0  # K Qx Qw
    kept: str = ""


class Unquantizable(ValueError):  # noqa: N818
    """A product that no form computes exactly; the message says why."""


def multiply(
    product: Product,
    left: Any,
    right: Any,
    spec: DotSpec,
    key: Key | None = None,
    draws: Key | None = None,
) -> tuple[jax.Array, Verdict]:
    """The product of two operands, at least one of them quantized, by a spec.

    Args:
        product: Which dimensions meet.
        left: A float array or a `QTensor`.
        right: Likewise.
        spec: How the other operand is quantized, and the form of the computation.
        key: Draws for a stochastic backward pass.
        draws: Draws for a float operand that is quantized stochastically.

    Raises:
        Unquantizable: int32 cannot hold the sum.
    """
    sides = [left, right]
    folded = [_folded(product, sides, side) for side in (0, 1)]
    for side in (0, 1):
        if folded[side] is not None:
            sides = folded[side]
    sides = [_settled(product, side, operand) for side, operand in enumerate(sides)]
    if not any(map(is_quantized, sides)):
        values = [value.astype(t) for value, t in zip(sides, product.site.operands, strict=False)]
        return product.as_traced(*values), Verdict("float", kept="kept: scales cross the sum")
    if spec.x is not None and not all(map(is_quantized, sides)):
        open_side = 1 if is_quantized(sides[0]) else 0
        held = sides[1 - open_side]
        x = sides[open_side]
        sides[open_side] = activation(product, open_side, x, spec.x, held.x_range, draws)
    verdict = _verdict(product, sides, spec)
    product = replace(product, note=_note(verdict, spec))
    return _straight_through(product, sides, spec, key), verdict


def activation(
    product: Product,
    side: int,
    x: jax.Array,
    spec: QSpec,
    x_range: jax.Array | None = None,
    key: Key | None = None,
) -> QTensor:
    """A float operand as codes; a scale for each row, or for what was calibrated."""
    axes = product.contracted(side)
    v = on_grid(jax.lax.stop_gradient(x))
    latent = x
    if x_range is not None:
        flat = [1] * x.ndim
        finite = jnp.all(jnp.isfinite(v), axis=axes, keepdims=True)
        given = lambda b: jnp.where(finite, b.reshape(flat), np.float32(np.nan))
        bounds, clips = (given(x_range[..., 0]), given(x_range[..., 1])), True
    elif spec.symmetric:
        m = bounds_of(v, axes, spec)
        bounds, clips = (None, m), spec.clips
    else:
        bounds, clips = spec.calibrator.bounds(v, axes), spec.clips
    low, high = bounds
    if clips:
        inside = (jnp.abs(v) <= high) if low is None else (low <= v) & (v <= high)
        latent = jnp.where(inside, x, jax.lax.stop_gradient(x))
    quiet = DotSpec(w=replace(spec, rounding="nearest", axes=None))
    statics = dict(spec=quiet, axes=tuple(a - x.ndim for a in axes), dtype=np.dtype(x.dtype))
    if not spec.symmetric:
        codes, scale, point = asymmetric(v, low, high, spec)
        return QTensor(codes, scale, point, latent=latent, **statics)
    m = high if low is None else jnp.maximum(-low, high)
    codes, scale = symmetric(v, m, spec, key)
    return QTensor(codes, scale, latent=latent, **statics)


def _varying(product: Product, side: int, t: QTensor) -> list[int]:
    """Contracted dimensions along which a scale differs."""
    return [d for d in product.contracted(side) if t.scale.shape[d] != 1]


def _grouped(product: Product, side: int, t: QTensor) -> bool:
    """Whether a scale differs along one contracted dimension only, by its groups."""
    last = max(t.axes) % t.ndim if t.axes else None
    tiles = _varying(product, side, t)
    return tiles == [last] and t.scale.shape[last] < t.shape[last] and product.splits


def _folded(product: Product, sides: list[Any], side: int) -> list[Any] | None:
    """Both operands, the scale of one that varies along the sum multiplied into the other.

    sum_k (x_k s_k) q_k: the same algebra, with one rounding of x s.
    """
    t, other = sides[side], sides[1 - side]
    if not is_quantized(t) or is_quantized(other) or not isinstance(product, Dot):
        return None
    free = any(t.scale.shape[d] != 1 for d in product.free(side))
    if not _varying(product, side, t) or _grouped(product, side, t) or free:
        return None
    if t.zero_point is not None:
        return None
    # Laid out like the other operand: batch and contracted dimensions, none of its free ones.
    numbers = product.site.eqn.params["dimension_numbers"]
    mine = [*numbers[1][side], *numbers[0][side]]
    theirs = [*numbers[1][1 - side], *numbers[0][1 - side]]
    by = spread(
        t.scale, [t.scale.shape[d] if t.scale.shape[d] == 1 else n for d, n in enumerate(t.shape)]
    )
    by = by.transpose(*mine, *product.free(side))
    by = by.reshape(by.shape[: len(mine)])
    order = sorted(range(len(theirs)), key=lambda k: theirs[k])
    by = by.transpose(order)
    by = jax.lax.broadcast_in_dim(by, _embedded(by, other, sorted(theirs)), sorted(theirs))
    moved = emit(on_grid(other) * by, other.dtype)
    ones = jnp.ones([1] * t.ndim, jnp.float32)
    rest = replace(t, scale=ones, spec=replace(t.spec, w=replace(t.spec.w, group=None)))
    if t.latent is not None:
        rest = replace(rest, latent=_unscaled(t))
    out = [moved, rest]
    return out if side == 1 else out[::-1]


def _embedded(by: jax.Array, other: jax.Array, dims: list[int]) -> list[int]:
    sizes = dict(zip(dims, by.shape, strict=True))
    return [sizes.get(d, 1) for d in range(other.ndim)]


def _unscaled(t: QTensor) -> jax.Array:
    """The latent of codes whose scale is elsewhere."""
    return (on_grid(t.latent) / spread(t.scale, t.shape)).astype(t.latent.dtype)


def _settled(product: Product, side: int, t: Any) -> Any:
    """An operand whose scale still crosses the sum, dequantized."""
    if not is_quantized(t) or not _varying(product, side, t) or _grouped(product, side, t):
        return t
    return value_of(t)


def _reach(t: QTensor) -> int:
    """The largest magnitude of a factor: a code, or a code times the integer of its group."""
    return (
        127
        if t.multiplier is not None
        else (t.spec.w.reach if t.spec.w.symmetric else 2 ** (t.spec.w.grid.bits - 1))
    )


def _verdict(product: Product, sides: list[Any], spec: DotSpec) -> Verdict:
    if not all(map(is_quantized, sides)):
        return Verdict("float x codes", product.terms)
    if not sides[0].spec.w.is_integer:
        return Verdict(spec.compute, product.terms)
    tiles = [t.groups for side, t in enumerate(sides) if _grouped(product, side, t)]
    terms = product.terms // max(tiles, default=1)
    # With a zero point the correction is as large again, and their difference must fit too.
    reach = [t.spec.w.reach if not t.spec.w.symmetric else _reach(t) for t in sides]
    bound = terms * reach[0] * reach[1]
    if bound >= INT32 and spec.compute != "dequant":
        most = (INT32 - 1) // (reach[0] * reach[1])
        raise Unquantizable(
            f"sums {terms} products of codes up to {reach[0]} and {reach[1]}, which int32 may not "
            f"hold (the most is {most}). Use fewer bits, groups with free scales, or "
            'compute="dequant".'
        )
    return Verdict(spec.compute, terms, bound)


def _note(verdict: Verdict, spec: DotSpec) -> dict[str, Any]:
    """What `explain` shows of a product: how long its sums are, and how near to the bounds."""
    ends = lambda s: f"±{s.max_code:g}" if s.symmetric else f"[{-s.max_code - 1}, {s.max_code}]"
    note = {"codes": f"{'float' if spec.x is None else ends(spec.x)} x {ends(spec.w)}"}
    note |= {"K": verdict.terms}
    if verdict.bound:
        exact = ", exact in float32" if verdict.bound <= EXACT else ""
        note |= {"bound": f"{verdict.bound / INT32:.2%} of int32{exact}"}
    return note


# ------------------------------------------------------------------------------ the served value


def served(product: Product, sides: list[Any], spec: DotSpec) -> jax.Array:
    """The value of a product; a pure function of codes, scales and float operands."""
    if spec.compute == "dequant":
        return _of_values(product, sides)
    if not all(map(is_quantized, sides)):
        return _weight_only(product, sides)
    side = next((k for k in (0, 1) if _grouped(product, k, sides[k])), None)
    if side is not None:
        return emit(_tile_by_tile(product, sides, side, spec), product.dtype)
    acc = _integer_product(product, sides, spec, [integer_codes(t) for t in sides])
    scale = product.placed(sides[0].scale, 0) * product.placed(sides[1].scale, 1)
    return emit(acc.astype(jnp.float32) * scale, product.dtype)


def _of_values(product: Product, sides: list[Any]) -> jax.Array:
    bare = [value_of(replace(t, latent=None)) if is_quantized(t) else t for t in sides]
    return emit(product.bind(*bare, jnp.float32), product.dtype)


def _weight_only(product: Product, sides: list[Any]) -> jax.Array:
    """Codes in the dtype of the activation, where they are exact; their scale after the sum."""
    side = 0 if is_quantized(sides[0]) else 1
    t, x = sides[side], sides[1 - side]
    if t.zero_point is not None or _grouped(product, side, t):
        return _of_values(product, sides)
    both = [None, None]
    both[side], both[1 - side] = integer_codes(t).astype(x.dtype), x
    acc = product.bind(*both, jnp.float32)
    return emit(acc * product.placed(t.scale, side), product.dtype)


def _integer_product(
    product: Product, sides: list[QTensor], spec: DotSpec, codes: list[jax.Array]
) -> jax.Array:
    """The sum of products of codes less zero points: int32, or float32 of 8-bit floats."""
    if not sides[0].spec.w.is_integer:
        return product.bind(*codes, jnp.float32)
    if spec.compute == "float_exact":
        acc = _float_exact(product, codes, [_reach(t) for t in sides])
    else:
        # int4 x int4 has no kernel on a CPU, and int8 x int4 a slow one on a GPU.
        acc = _padded(product, *(c.astype(jnp.int8) for c in codes))
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
    kept = t.colsum is not None and not isinstance(product, Conv)
    if kept and t.colsum.shape == tuple(
        1 if d in product.contracted(side) else n for d, n in enumerate(t.shape)
    ):
        return product.placed(t.colsum, side)
    return product.sum_over(codes, side)


def _padded(product: Product, left: jax.Array, right: jax.Array) -> jax.Array:
    """An integer product; of one row as of two, since XLA's CPU kernel for one is 2.5 times slower.

    2048 x 2048, two cores: 0.80 ms for one row, 0.31 ms for two, 0.34 ms in float32.
    """
    free = product.free(0) if isinstance(product, Dot) else []
    rows = math.prod(left.shape[d] for d in free)
    whole = product.bind(left, right, jnp.int32) if rows != 1 or not free else None
    if whole is not None:
        return whole
    at = len(product.site.eqn.params["dimension_numbers"][1][0]) + len(free) - 1
    doubled = product.bind(jnp.repeat(left, 2, axis=free[-1]), right, jnp.int32)
    return jax.lax.slice_in_dim(doubled, 0, 1, axis=at)


def _float_exact(product: Product, codes: list[jax.Array], reach: list[int]) -> jax.Array:
    """The integer product by float32 arithmetic, in parts that float32 sums exactly."""
    highest = {"precision": (jax.lax.Precision.HIGHEST,) * 2}
    wide = [c.astype(jnp.float32) for c in codes]
    most = EXACT // (reach[0] * reach[1])
    times = lambda a, b: product.bind(a, b, jnp.float32, **highest).astype(jnp.int32)
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
    front = lambda x, axis: jnp.moveaxis(tiled(x, axis, count), axis, 0)
    row = lambda x: None if x is None else jnp.expand_dims(jnp.moveaxis(x, dim, 0), dim + 1)
    stacked = (
        front(integer_codes(t), dim),
        row(t.scale),
        row(t.zero_point),
        row(t.colsum),
        front(integer_codes(other), pair),
    )

    def add(total: jax.Array, tile: Any) -> tuple[jax.Array, None]:
        codes, scale, point, colsum, against = tile
        here = replace(t, codes=codes, scale=scale, zero_point=point, colsum=colsum)
        here = replace(here, multiplier=None)
        beside = replace(other, codes=against, multiplier=None, colsum=None)
        pieces = [beside, here] if side == 1 else [here, beside]
        part = _Tile(product.site, product.extra, pieces)
        acc = _integer_product(part, pieces, spec, [p.codes for p in pieces])
        by = product.placed(scale, side) * product.placed(other.scale, 1 - side)
        return total + fence(acc.astype(jnp.float32) * by), None

    shape = product.site.eqn.outvars[0].aval.shape
    start = agree(zeros(shape, jnp.float32, like=t.codes), other.codes)
    return jax.lax.scan(add, start, stacked)[0]


class _Tile(Dot):
    """A dot of one tile: the same equation on operands cut along the contraction."""

    def __init__(self, site: Any, extra: Any, pieces: list[QTensor]) -> None:
        super().__init__(site, extra)
        object.__setattr__(self, "_shapes", [p.shape for p in pieces])

    def shape(self, side: int) -> tuple[int, ...]:
        """Shape of a cut operand."""
        return self._shapes[side]  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------- the derivative


def _straight_through(
    product: Product, sides: list[Any], spec: DotSpec, key: Key | None
) -> jax.Array:
    """`served`, whose derivative is that of the float product at the values served."""
    carriers = [t.latent if is_quantized(t) else t for t in sides]
    parts = [
        replace(t, latent=None) if is_quantized(t) else jax.lax.stop_gradient(t) for t in sides
    ]
    if all(c is None for c in carriers):
        return served(product, parts, spec)
    beside = (product.extra, key)  # data, so they go in as arguments

    @jax.custom_vjp
    def call(carriers: Any, parts: Any, beside: Any) -> jax.Array:
        del carriers
        return served(replace(product, extra=beside[0]), parts, spec)

    def fwd(carriers: Any, parts: Any, beside: Any) -> tuple[jax.Array, Any]:
        like = [None if c is None else c.reshape(-1)[:0] for c in carriers]  # dtypes, no numbers
        return served(replace(product, extra=beside[0]), parts, spec), (parts, beside, like)

    def bwd(kept: Any, g: jax.Array) -> tuple[Any, None, None]:
        parts, (extra, key), like = kept
        open_product = replace(product, extra=extra)
        backward = lambda side: _backward(open_product, parts, side, g, spec, key)
        back = [None if c is None else backward(k).astype(c.dtype) for k, c in enumerate(like)]
        return back, None, None

    call.defvjp(fwd, bwd)
    return call(carriers, parts, beside)


def _backward(
    product: Product, parts: list[Any], side: int, g: jax.Array, spec: DotSpec, key: Key | None
) -> jax.Array:
    """The cotangent of one operand, in the dtype it was traced in."""
    other = parts[1 - side]
    if spec.g is not None and isinstance(product, Dot) and is_quantized(other):
        own = None if key is None else jax.random.fold_in(key, side)
        try:
            return _quantized_backward(product, other, side, g, spec, own)
        except Unquantizable:  # more rows than int32 can sum up: in floating point
            pass
    values = [_value(t) if is_quantized(t) else t for t in parts]

    def times(v: jax.Array) -> jax.Array:
        pair = [v, values[1]] if side == 0 else [values[0], v]
        return product.as_traced(*pair)

    return jax.vjp(times, values[side])[1](g)[0]


def _value(t: QTensor) -> jax.Array:
    """As `value_of`, but for derivatives, which need not be the same bits in every program."""
    whole = integer_codes(t).astype(jnp.float32)
    if t.zero_point is not None:
        whole = whole - spread(t.zero_point, t.shape).astype(jnp.float32)
    return (whole * spread(t.scale, t.shape)).astype(t.dtype)


def _quantized_backward(
    product: Product, other: QTensor, side: int, g: jax.Array, spec: DotSpec, key: Key | None
) -> jax.Array:
    """The transposed product, on the codes of the other operand and codes of g.

    The other operand's scale varies along this sum, so it is folded into g before g is quantized.
    """
    own = product.site.eqn.invars[side].aval
    own = jax.ShapeDtypeStruct(own.shape, own.dtype)
    transposed = jax.make_jaxpr(
        lambda g, o: jax.linear_transpose(
            lambda v: product.as_traced(*((v, o) if side == 0 else (o, v))), own
        )(g)
    )(g, value_of(other))
    backward = DotSpec(w=other.spec.w, x=spec.g, compute=spec.compute)
    env = dict(zip(transposed.jaxpr.invars, (g, other), strict=True))
    for index, eqn in enumerate(transposed.jaxpr.eqns):
        site = Site(eqn, index)
        operands = [env[v] for v in eqn.invars]
        inner = product_of(site)
        if inner is not None:
            env[eqn.outvars[0]] = multiply(inner, operands[0], operands[1], backward, draws=key)[0]
        else:
            env |= dict(zip(eqn.outvars, site.bind(operands), strict=True))
    return env[transposed.jaxpr.outvars[0]]


def draw(key: Key | None, place: tuple[int, ...]) -> Key | None:
    """A key for the equation at a place."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(repr(place).encode()))
