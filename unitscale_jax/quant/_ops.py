"""The equations of quantization on arrays, all in float32.

    s = m / Q,    q = clip(rne(x Q / m), -Q, Q),    x^ = q s                        symmetric
    s = r / n,    q = clip(rne(x n / r) + z, L, L + n),    x^ = (q - z) s           asymmetric

Products are written as products: XLA makes of a division by a constant a product with its
reciprocal, which rounds otherwise. Three guards make results the same bits in any program:
`on_grid` says the rounding to 16 bits aloud, since XLA may drop a cast and its inverse; `fence`
keeps a product from being fused with the sum after it; and scales are always associated alike,
`f32(acc) * (s_x * s_w)`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.mesh_axes import varying_axes
from unitscale_jax.quant._spec import QSpec
from unitscale_jax.trace.rewrite import made_result
from unitscale_jax.typing import Key

# The layers of a model have few shapes and specs, and many operands: what is computed for each of
# them is traced once for a shape and a spec, and stands in the program as if it were traced there.
_inlined = functools.partial(jax.jit, inline=True)


def no_fma(x: jax.Array) -> jax.Array:
    """The identity, opaque to the compiler: no fused multiply-add across it.

    A barrier would be dropped on one JAX line and cost a kernel on a GPU; this costs nothing.
    """
    return jnp.where(x == x, x, np.float32(np.nan))


@functools.partial(_inlined, static_argnames="dtype")
def round_and_cast(y: jax.Array, dtype: Any) -> jax.Array:
    """A float32 result in its dtype, rounded aloud."""
    info = jnp.finfo(dtype)
    if info.bits >= 32:
        with made_result():
            fenced = no_fma(y)
    else:
        fenced = no_fma(y)
        fenced = jax.lax.reduce_precision(fenced, info.nexp, info.nmant)
    return fenced.astype(dtype)


def threshold(q: float) -> np.float32:
    """t(Q) = 2^(ceil(log2 Q) - 126): from here on both m / Q and Q / m are normal numbers."""
    return np.float32(2.0 ** (math.ceil(math.log2(q)) - 126))


def scales(m: jax.Array, spec: QSpec) -> tuple[jax.Array, jax.Array]:
    """Scale m / Q and its inverse Q / m for a bound m.

    Below t(Q) the two are not both normal numbers, and a flushed one would make NaN of zeros: the
    scale is 1 there and the inverse 0, so all codes are zero. Of NaN both are NaN.
    """
    q = spec.max_code
    zero = m < threshold(q)  # `<`, so that a NaN stays one
    step = m * np.float32(1 / q)
    if spec.scale == "free":
        return jnp.where(zero, 1.0, step), jnp.where(zero, 0.0, np.float32(q) / m)
    fraction, exponent = jnp.frexp(step)
    # ceil(log2(m / Q)): frexp's fraction is in [1/2, 1), and a power of two is its own ceiling.
    exponent = jnp.where(zero, 0, jnp.where(fraction == 0.5, exponent - 1, exponent))
    finite = jnp.isfinite(step)

    def power(e: jax.Array, otherwise: jax.Array) -> jax.Array:
        return jnp.where(finite, jnp.ldexp(jnp.float32(1), e), otherwise)

    return power(exponent, step), jnp.where(zero, 0.0, power(-exponent, 1 / step))


@functools.partial(_inlined, static_argnames="spec")
def symmetric(x: jax.Array, m: jax.Array, spec: QSpec, key: Key | None = None) -> Any:
    """Returns codes and scale of a symmetric grid.

    Args:
        x: float32.
        m: Bound of |x|, of the shape of the scale.
        spec: Format and rounding.
        key: Draws of stochastic rounding.
    """
    scale, inverse = scales(m, spec)
    return codes_of(x * repeat_groups(inverse, x.shape), spec, key), scale


def codes_of(steps: jax.Array, spec: QSpec, key: Key | None = None) -> jax.Array:
    """Values in units of the scale, rounded to codes; clipped first, for no cast saturates."""
    q = np.float32(spec.max_code)
    if not spec.is_integer:
        steps = jnp.clip(steps, -q, q)
    elif key is not None and spec.rounding == "stochastic":
        steps = jnp.floor(steps + jax.random.uniform(key, steps.shape))
    else:
        steps = nearest_even(steps)
    return as_codes(jnp.clip(steps, -q, q), spec)


def nearest_even(x: jax.Array) -> jax.Array:
    """Rounds to whole numbers, ties to even."""
    return jax.lax.round(x, jax.lax.RoundingMethod.TO_NEAREST_EVEN)


def as_codes(whole: jax.Array, spec: QSpec) -> jax.Array:
    """Whole numbers in the dtype of codes; to four bits by way of eight."""
    if not spec.is_integer:
        return whole.astype(spec.code_dtype)
    return whole.astype(jnp.int8).astype(spec.code_dtype)


@functools.partial(_inlined, static_argnames="spec")
def asymmetric(x: jax.Array, low: jax.Array, high: jax.Array, spec: QSpec) -> Any:
    """Codes, scale and zero point for a range that contains zero."""
    n = 2**spec.grid.bits - 1
    least = -(2 ** (spec.grid.bits - 1))
    r = high - low
    r = jnp.where(jnp.isinf(r), np.float32(np.nan), r)  # else an infinity would stay one
    zero = r < threshold(n)
    scale = jnp.where(zero, 1.0, r * np.float32(1 / n))
    inverse = jnp.where(zero, 0.0, np.float32(n) / r)
    point = jnp.clip(least - nearest_even(low * inverse), least, least + n)
    # The zero point is added after rounding, where no multiply-add can be fused.
    steps = nearest_even(x * repeat_groups(inverse, x.shape))
    codes = jnp.clip(steps + repeat_groups(point, x.shape), least, least + n)
    return as_codes(codes, spec), scale, point.astype(jnp.int32)


def integer_groups(
    x: jax.Array, tiles: jax.Array, axis: int, spec: QSpec, over: Sequence[str] = ()
) -> Any:
    """Codes, a scale for each channel, and an int8 multiplier for each of its groups.

    s = m / (Q I),    i_t = clip(ceil(m_t / (Q s)), 1, I),    q = clip(rne(x / s / i_t), -Q, Q)

    Args:
        x: float32.
        tiles: Bounds of the groups, whose number is its size along `axis`.
        axis: The grouped axis.
        spec: Its group is `Group(.., scale="integer")`.
        over: Manual mesh axes that the groups are split over.
    """
    q, most = spec.max_code, spec.most_multiplier
    m = shared(jnp.max(tiles, axis=axis, keepdims=True), over)
    zero = m < threshold(q * most)
    scale = jnp.where(zero, 1.0, m * np.float32(1 / (q * most)))
    inverse = jnp.where(zero, 0.0, np.float32(q * most) / m)
    multiplier = jnp.clip(jnp.ceil((tiles * inverse) * np.float32(1 / q)), 1, most)
    steps = (x * repeat_groups(inverse, x.shape)) * repeat_groups(1 / multiplier, x.shape)
    return codes_of(steps, spec), scale, multiplier.astype(jnp.int8)


def repeat_groups(s: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Repeats what belongs to groups to the elements of the groups; sizes of 1 stay."""
    for axis, (n, full) in enumerate(zip(s.shape, shape, strict=True)):
        if n not in (1, full):
            sizes = (*s.shape[: axis + 1], full // n, *s.shape[axis + 1 :])
            kept = [d for d in range(s.ndim + 1) if d != axis + 1]
            repeated = jax.lax.broadcast_in_dim(s, sizes, kept)
            s = repeated.reshape(*s.shape[:axis], full, *s.shape[axis + 1 :])
    return s


def tiled(x: jax.Array, axis: int, count: int) -> jax.Array:
    """Splits an axis in `count` tiles: (.., K, ..) to (.., count, K / count, ..)."""
    return x.reshape(*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])


def bounds_of(
    x: jax.Array, axes: Sequence[int], spec: QSpec, tiles: int = 1, over: Sequence[str] = ()
) -> jax.Array:
    """The calibrator's bound of |x| over axes; with tiles, for each along the last of them.

    `over` are manual mesh axes that the axes are split over: devices share the largest.
    """
    return _bounds(x, tuple(sorted(axes)), spec, tiles, tuple(over))


@functools.partial(_inlined, static_argnums=(1, 2, 3, 4))
def _bounds(
    x: jax.Array, axes: tuple[int, ...], spec: QSpec, tiles: int, mesh_axis: tuple[str, ...]
) -> jax.Array:
    if tiles == 1:
        return shared(_bound(x, axes, spec), mesh_axis)
    last = axes[-1]
    inner = tuple(a if a < last else a + 1 for a in axes)
    return _bound(tiled(x, last, tiles), inner, spec).squeeze(last + 1)


def ends_of(
    x: jax.Array, axes: Sequence[int], spec: QSpec, over: Sequence[str] = ()
) -> tuple[jax.Array, jax.Array]:
    """The calibrator's range of x over axes, zero included; `over` as of `bounds_of`."""
    low, high = spec.calibrator.bounds(x, tuple(axes))
    low, high = _poisoned(low, x, axes, spec), _poisoned(high, x, axes, spec)
    return -shared(-low, over), shared(high, over)


def shared(m: jax.Array, over: Sequence[str]) -> jax.Array:
    """The largest bound of all devices of manual mesh axes; of a NaN, which pmax may lose, inf.

    An infinite bound, too, has nothing but NaN for results.
    """
    axes = tuple(sorted(varying_axes(m) & set(over)))
    return jax.lax.pmax(jnp.where(jnp.isnan(m), np.float32(np.inf), m), axes) if axes else m


def _bound(x: jax.Array, axes: tuple[int, ...], spec: QSpec) -> jax.Array:
    m = spec.calibrator.bound(x, axes, _squared_error(x, axes, spec))
    return _poisoned(m, x, axes, spec)


def _poisoned(m: jax.Array, x: jax.Array, axes: Sequence[int], spec: QSpec) -> jax.Array:
    """NaN where x has a NaN or an infinity, which a range that clips would hide."""
    if not spec.clips:
        return m
    finite = jnp.all(jnp.isfinite(x), axis=tuple(axes), keepdims=True)
    return jnp.where(finite, m, np.float32(np.nan))


def _squared_error(x: jax.Array, axes: tuple[int, ...], spec: QSpec) -> Callable[[Any], Any]:
    def error(m: jax.Array) -> jax.Array:
        codes, scale = symmetric(x, m, spec)
        off = codes.astype(jnp.float32) * scale - x
        return jnp.sum(off * off, axis=axes, keepdims=True)

    return error


def whole_error(spec: QSpec, x: jax.Array, m: jax.Array) -> jax.Array:
    """The squared error of all of an array for one bound, a scalar."""
    bound = m.reshape([1] * x.ndim)
    return _squared_error(x, tuple(range(x.ndim)), spec)(bound).reshape(())
