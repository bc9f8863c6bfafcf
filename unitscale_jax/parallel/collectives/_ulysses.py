"""Ulysses attention: rows of a split sequence are traded for heads, and back.

Each device attends for some of the heads to all rows, by any attention of one device (Jacobs et al.
2023, arXiv:2309.14509). A body for a user's own `jax.shard_map`, as in `_tensor`; it fits Flax's
`attention_fn`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from unitscale_jax.errors import check_array
from unitscale_jax.mesh_axes import devices_over
from unitscale_jax.typing import Array


def ulysses_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mesh_axis: str,
    attention_fn: Callable[..., jax.Array] = jax.nn.dot_product_attention,
    **options: Any,
) -> jax.Array:
    """Any attention over all rows of a split sequence, each device for its part of the heads.

    Args:
        query: `(.., rows / n, heads, dim)`, of the device's rows, in the order of the sequence.
        key: `(.., rows / n, kv_heads, dim)`.
        value: `(.., rows / n, kv_heads, dim)`.
        mesh_axis: The manual mesh axis; it divides `heads` and `kv_heads`.
        attention_fn: Attention of one device, such as a fused kernel, with the heads on axis -2.
        **options: Passed to it, such as `is_causal=True`.

    Returns:
        `(.., rows / n, heads, dim)`.

    Raises:
        ValueError: The axis does not divide the heads.

    Law: `attention_fn` of one device, with its gradients. Four messages of the size of the
    device's rows, whatever n is, where a ring sends all keys and values.
    """
    check_array("query", query, 3)
    n = devices_over(mesh_axis)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.shape[-2] % n:
            raise ValueError(
                f"ulysses_attention got a {name} of {x.shape[-2]} heads, which {mesh_axis}={n} "
                "does not divide. Repeat key and value heads, or use `ring_attention`, which "
                "splits none."
            )
    trade = functools.partial(lax.all_to_all, axis_name=mesh_axis, tiled=True)

    def to_heads(x: Array) -> jax.Array:
        return trade(x, split_axis=x.ndim - 2, concat_axis=x.ndim - 3)

    out = attention_fn(to_heads(query), to_heads(key), to_heads(value), **options)
    return trade(out, split_axis=out.ndim - 3, concat_axis=out.ndim - 2)
