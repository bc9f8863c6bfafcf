"""Compression: the numbers in which gradients travel between devices.

    sum_i x_i  =  sum_i dq(q(x_i))  +  rounding,    each x_i rounded once, added up in float32

A reduction in narrow numbers would round at every hop, and int8 would overflow; so each device
sends every other its share in narrow numbers (all-to-all), adds up what it receives in float32,
and, where everybody wants the whole sum, sends that on in narrow numbers again. All devices decode
the same codes, so they agree in every bit. bfloat16 rounds by 2^-9 of each number; int8 by 1/254 of
the largest in its block. What rounding took away can be kept and added to the next gradient (error
feedback: Seide et al. 2014; 1-bit Adam, arXiv 2102.02888).
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unitscale_jax.mesh_axes import devices_over

Compression: TypeAlias = Literal["bfloat16", "int8"]
BLOCK = 2048
"""How many numbers share a scale: its 4 bytes are then 0.2 % of the bytes of their codes."""


class CompressedSum(NamedTuple):
    """A sum over devices, and what rounding took away on this device.

    Attributes:
        total: The sum, or this device's share of it, in the dtype of what was added up.
        lost: The exact numbers of this device less those it sent, float32; None if uncompressed.
    """

    total: jax.Array
    lost: jax.Array | None


def summed(
    x: jax.Array, mesh_axis: str, compress: Compression | None, *, dim: int | None = None
) -> CompressedSum:
    """Adds up an array over a manual mesh axis.

    Args:
        x: Varies over `mesh_axis`, the same shape on each of its n devices.
        mesh_axis: The mesh axis.
        compress: The dtype that travels; None for the dtype of `x`.
        dim: A dimension that n divides, of which each device keeps its share of the sum; None for
            the whole sum on every device.

    Returns:
        The sum, in the dtype of `x`: of x's shape and the same on all devices, or a share of it.
    """
    if compress is None:
        if dim is None:
            return CompressedSum(lax.psum(x, mesh_axis), None)
        return CompressedSum(
            lax.psum_scatter(x, mesh_axis, scatter_dimension=dim, tiled=True), None
        )
    n, exact = devices_over(mesh_axis), x.astype(jnp.float32)
    shares = _dealt(exact, n) if dim is None else _cut(exact, n, dim)  # (n, share), row j for j
    sent = _encoded(shares, compress)
    received = [lax.all_to_all(codes, mesh_axis, 0, 0, tiled=True) for codes in sent]
    own = jnp.sum(_decoded(received, shares.shape), axis=0)
    lost = shares - _decoded(sent, shares.shape)
    if dim is not None:
        return CompressedSum(_kept(own, x, n, dim), _uncut(lost, x, dim))
    mine = _encoded(own[None], compress)
    # Typed as the same on all devices, which it is: all decode the same codes.
    gather = functools.partial(lax.all_gather, axis=0, tiled=True, to="invarying")
    total = _decoded([gather(codes, mesh_axis) for codes in mine], shares.shape)
    # The second rounding loses numbers of the sum, once for all devices. One device has to keep
    # them for its next gradient, and not all n: it is the one whose share of the sum this is.
    again = own - _decoded(mine, (1, *own.shape))[0]
    here = jnp.arange(n)[:, None] == lax.axis_index(mesh_axis)
    return CompressedSum(
        _whole(total, x).astype(x.dtype), _whole(lost + jnp.where(here, again, 0), x)
    )


# -------------------------------------------------------------------------------- shares


def _cut(x: jax.Array, n: int, dim: int) -> jax.Array:
    """Deals an array out along a dimension: `(n, size / n)`, row j the share of device j."""
    return jnp.moveaxis(x, dim, 0).reshape(n, -1)


def _uncut(shares: jax.Array, like: jax.Array, dim: int) -> jax.Array:
    """Puts the shares of all devices together again: the inverse of `_cut`."""
    moved = (like.shape[dim], *like.shape[:dim], *like.shape[dim + 1 :])
    return jnp.moveaxis(shares.reshape(moved), 0, dim)


def _kept(share: jax.Array, like: jax.Array, n: int, dim: int) -> jax.Array:
    """Shapes one row of `_cut` as the share of an array along a dimension."""
    moved = (like.shape[dim] // n, *like.shape[:dim], *like.shape[dim + 1 :])
    return jnp.moveaxis(share.reshape(moved), 0, dim).astype(like.dtype)


def _dealt(x: jax.Array, n: int) -> jax.Array:
    """Deals the numbers of an array of any shape out in n rows, the last filled up with zeros."""
    share = -(-x.size // n)
    return jnp.pad(x.reshape(-1), (0, n * share - x.size)).reshape(n, share)


def _whole(shares: jax.Array, like: jax.Array) -> jax.Array:
    """Puts an array together from its rows: the inverse of `_dealt`."""
    return shares.reshape(-1)[: like.size].reshape(like.shape)


# --------------------------------------------------------------------------------- codes


def _encoded(rows: jax.Array, compress: Compression) -> list[jax.Array]:
    """Rounds rows `(n, k)` to what travels: arrays with leading axis n, codes and their scales."""
    if compress == "bfloat16":
        return [rows.astype(jnp.bfloat16)]
    n, k = rows.shape
    blocks = jnp.pad(rows, ((0, 0), (0, -k % min(k, BLOCK)))).reshape(n, -1, min(k, BLOCK))
    largest = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    # Below 2^-119 the scale, a 127th, may be subnormal, and devices flush that to zero: such a
    # block is sent as zeros. A NaN is not below, so it makes a scale of NaN, which voids its block.
    tiny = largest < np.float32(2.0**-119)
    scale = jnp.where(tiny, 1, largest * np.float32(1 / 127))
    inverse = jnp.where(tiny, 0, np.float32(127) / largest)
    codes = jnp.clip(jnp.round(blocks * inverse), -127, 127).astype(jnp.int8)
    return [codes, scale]


def _decoded(arrays: Sequence[Any], shape: tuple[int, ...]) -> jax.Array:
    """Restores float32 rows `(n, k)`, up to rounding; a NaN comes back as a block of NaN."""
    if len(arrays) == 1:
        return arrays[0].astype(jnp.float32)
    codes, scale = arrays
    return (codes.astype(jnp.float32) * scale).reshape(shape[0], -1)[:, : shape[1]]
