"""A quantized array that grows: the keys and values of generation.

k = append(k, new, index)        codes of the whole == codes of each token, appended
"""

from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax.quantization._params import encode
from unitscale_jax.quantization._qtensor import QTensor, is_quantized


def append(cache: Any, x: Any, index: Any, *, axis: int = 1) -> Any:
    """Writes `x` into a cache from `index` on, quantized as the cache is.

    Inside `quantized(fn)` a cache is an array to `fn`, so one model runs on a float cache and on
    one of codes.

    Args:
        cache: (batch, time, ...), a float array or a `QTensor` whose scales are for each token:
            its axes do not include `axis`.
        x: (batch, tokens, ...), floating.
        index: Where its first token goes.
        axis: The axis of time.

    Returns:
        The cache, of the same type.

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


def appended(operands: list[Any]) -> list[QTensor] | None:
    """`dynamic_update_slice` on codes and scales; None where a scale would have to change."""
    t, x, *starts = operands
    if not is_quantized(t) or t.latent is not None or t.x_range is not None:
        return None
    shared = [axis % t.ndim for axis in t.axes]
    if any(x.shape[d] != t.shape[d] for d in shared) or is_quantized(x):
        return None
    new = encode(x.astype(t.dtype), t.spec.with_axes(t.axes))
    zero = lambda s: jnp.zeros_like(jnp.asarray(s))
    at = [zero(s) if d in shared else s for d, s in enumerate(starts)]
    put = lambda name, old: jax.lax.dynamic_update_slice(old, getattr(new, name), at)
    return [t.over(put)]
