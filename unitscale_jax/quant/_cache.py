"""A quantized array that grows: the keys and values of generation.

k = append(k, new, index)        codes of the whole == codes of each token, appended
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

from unitscale_jax.errors import expected, wrong_shape
from unitscale_jax.quant._params import encode
from unitscale_jax.quant._qtensor import QTensor, is_quantized
from unitscale_jax.trace.program import is_concrete


def append(cache: Any, x: Any, index: Any, *, axis: int = 1, checked: bool = False) -> Any:
    """Writes `x` into a cache from `index` on, quantized as the cache is.

    Inside `quantized(fn)` a cache is an array to `fn`, so one model runs on a float cache and on
    one of codes.

    Args:
        cache: (batch, time, ...), a float array or a `QTensor` whose scales are for each token:
            its axes do not include `axis`.
        x: (batch, tokens, ...), floating, of the cache's shape but for `axis`.
        index: Where its first token goes, a whole number. Within a trace its value is not known
            here: if the tokens do not fit, what is written is NaN (of codes the scales are).
        axis: The axis of time.
        checked: An index within a trace that does not fit is an error of
            `jax.experimental.checkify`, around whose `checkify` the function then has to be.

    Returns:
        The cache, of the same type.

    Raises:
        TypeError: The cache is no float array or `QTensor`, or the index is no whole number.
        ValueError: The shapes differ beyond `axis`; tokens at this index do not fit; or tokens
            share a scale.

    Law: appending token by token is quantizing the whole, bit for bit.

    Example:
        >>> import unitscale_jax as us
        >>> rules = {"k": us.DotSpec(w=us.QSpec(axes=(-1,)), x=us.QSpec())}
        >>> k = jnp.arange(12.0).reshape(1, 3, 4)
        >>> cache = us.quantize({"k": jnp.zeros_like(k)}, rules)["k"]
        >>> for t in range(3):
        ...     cache = append(cache, k[:, t : t + 1], t)
        >>> bool((cache.codes == us.quantize({"k": k}, rules)["k"].codes).all())
        True
    """
    _check_shapes(cache, x, axis)
    x = _where_it_fits(cache, x, index, axis, checked)
    starts = [jnp.int32(0)] * len(cache.shape)
    starts[axis] = index
    if not is_quantized(cache):
        return jax.lax.dynamic_update_slice(cache, x.astype(cache.dtype), starts)
    made = appended([cache, x, *starts])
    if made is None:
        raise ValueError(
            f"a cache of shape {cache.shape} whose axes {cache.axes} share a scale cannot take "
            f"{x.shape}: every token needs scales of its own. Quantize it over the last axis."
        )
    return made[0]


def _check_shapes(cache: Any, x: Any, axis: int) -> None:
    if not (is_quantized(cache) or jnp.issubdtype(getattr(cache, "dtype", int), jnp.floating)):
        raise TypeError(expected("the cache", cache, "a float array or a QTensor"))
    if not -len(cache.shape) <= axis < len(cache.shape):
        raise ValueError(wrong_shape("the cache", cache.shape, f"one with an axis {axis}"))
    wanted = list(cache.shape)
    if np.ndim(x) == len(wanted):
        wanted[axis] = min(np.shape(x)[axis], wanted[axis])
    if np.shape(x) != tuple(wanted):
        rest = f"that of the cache, {cache.shape}, or less along axis {axis}, which is time"
        raise ValueError(wrong_shape("x", np.shape(x), rest))


def _where_it_fits(cache: Any, x: Any, index: Any, axis: int, checked: bool) -> Any:
    """The tokens, or NaN if an index that is not known while tracing leaves no place for them."""
    if np.shape(index) != () or not jnp.issubdtype(jnp.result_type(index), jnp.integer):
        raise TypeError(expected("the index", index, "one whole number"))
    size, tokens, x = cache.shape[axis], x.shape[axis], jnp.asarray(x)
    fits = (index >= 0) & (index <= size - tokens)
    if not is_concrete(fits):
        # `dynamic_update_slice` would move the tokens to where they fit, over those before them.
        if checked:
            checkify.check(fits, "tokens at {index} do not fit into the cache", index=index)
        return jnp.where(fits, x, jnp.asarray(jnp.nan, x.dtype))
    if not fits:
        raise ValueError(
            f"{tokens} tokens at {index} do not fit into a cache of {size}. Make the cache longer, "
            "or stop before it is full."
        )
    return x


def appended(operands: list[Any]) -> list[QTensor] | None:
    """`dynamic_update_slice` on codes and scales; None where a scale would have to change."""
    t, x, *starts = operands
    if not is_quantized(t) or t.master is not None or t.input_range is not None:
        return None
    shared = [axis % t.ndim for axis in t.axes]
    if any(x.shape[d] != t.shape[d] for d in shared) or is_quantized(x):
        return None
    new = encode(x.astype(t.dtype), t.spec.with_axes(t.axes))
    # A calibrator need not see NaN: a fixed range has its scale whatever x is.
    lost = jnp.any(jnp.isnan(x), axis=shared, keepdims=True)
    new = replace(new, scale=jnp.where(lost, jnp.nan, new.scale))
    # Scales and zero points have size 1 on shared axes, so their only start there is 0. The tokens
    # fill these axes, so theirs is 0 too, and one list of starts serves every array.
    at = [jnp.zeros_like(jnp.asarray(s)) if d in shared else s for d, s in enumerate(starts)]

    def put(name: str, old: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(old, getattr(new, name), at)

    return [t.over(put)]
