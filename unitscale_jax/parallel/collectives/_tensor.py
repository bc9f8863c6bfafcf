"""Tensor parallelism by hand: layers whose kernels are split over a manual mesh axis.

    column      y_i = x W_i               W = [W_1 .. W_n] by outputs; no message forward
    row         y = sum_i h_i W_i         W by inputs; one sum over the axis
    sequence    the same bytes: gather rows before a column, scatter the sum's rows after a row

These are bodies for a user's own `jax.shard_map` with `check_vma=True`, its default: the types of
varying values place the transposed messages, so `jax.grad` is exact inside of it and outside, and
no conjugate operators are needed (Shoeybi et al. 2019, arXiv:1909.08053; rows split between layers:
Korthikanti et al. 2022, arXiv:2205.05198). With `check_vma=False` gradients taken inside are wrong
by factors of the axis size.
"""

import jax
import jax.numpy as jnp
from jax import lax

from unitscale_jax.errors import check_array
from unitscale_jax.mesh_axes import devices_over, varying, zeros
from unitscale_jax.typing import Array


def column(x: Array, w: Array, bias: Array | None = None) -> jax.Array:
    """Multiplies by a kernel split over its outputs; each device makes its part of them.

    Args:
        x: `(.., in)`, the same on all devices of the axis, or gathered by `enter_sequence`.
        w: `(in, *out)`, split over one of `out`: the in_spec is `P(None, "tp")`.
        bias: `out`, split likewise.

    Returns:
        `(.., *out)`, the device's part.

    Law: as of one device, with gradients; the gradient of x is summed over the axis once.

    Example:
        >>> from jax.sharding import PartitionSpec as P
        >>> x, w = jnp.ones((2, 3)), jnp.arange(12.0).reshape(3, 4)
        >>> split = jax.shard_map(us.parallel.column, in_specs=(P(), P(None, "tp")),
        ...                       out_specs=P(None, "tp"))
        >>> with jax.set_mesh(us.parallel.mesh(dp=2, tp=4)):
        ...     bool((split(x, w) == x @ w).all())
        True
    """
    check_array("x", x, 1)
    y = jnp.tensordot(x, w, 1)
    return y if bias is None else y + bias


def row(h: Array, w: Array, bias: Array | None = None, *, mesh_axis: str) -> jax.Array:
    """Multiplies by a kernel split over its inputs and sums over the axis.

    Args:
        h: `(.., *in)`, split as `column` leaves it.
        w: `(*in, out)`, split over one of `in`: the in_spec is `P("tp", None)`.
        bias: `(out,)`, whole; it is added once, after the sum.
        mesh_axis: The manual mesh axis.

    Returns:
        `(.., out)`, the same on all devices.

    Law: as of one device, up to the order of the sum; quantized to integers, to the bit.

    Example:
        >>> from jax.sharding import PartitionSpec as P
        >>> h, w = jnp.ones((2, 4)), jnp.arange(12.0).reshape(4, 3)
        >>> split = jax.shard_map(lambda h, w: us.parallel.row(h, w, mesh_axis="tp"),
        ...                       in_specs=(P(None, "tp"), P("tp", None)), out_specs=P())
        >>> with jax.set_mesh(us.parallel.mesh(dp=2, tp=4)):
        ...     bool((split(h, w) == h @ w).all())
        True
    """
    check_array("h", h, 1)
    devices_over(mesh_axis)
    y = lax.psum(jnp.tensordot(h, w, jnp.ndim(w) - 1), mesh_axis)
    return y if bias is None else y + bias


def enter_sequence(x: Array, mesh_axis: str, *, dim: int = -2) -> jax.Array:
    """Gathers the rows of all devices, as a `column` needs them.

    Args:
        x: `(.., rows / n, width)`, the device's rows.
        mesh_axis: The manual mesh axis.
        dim: That of the rows.

    Returns:
        `(.., rows, width)`. All devices have the same, though its type varies over the axis.
    """
    check_array("x", x, 1)
    devices_over(mesh_axis)
    return lax.all_gather(x, mesh_axis, axis=dim % jnp.ndim(x), tiled=True)


def exit_sequence(partial: Array, mesh_axis: str, *, dim: int = -2) -> jax.Array:
    """Sums a split contraction over the axis, each device keeping its rows of the sum.

    Norms, residuals and dropout between the layers then hold 1 / n of the activations, for the
    bytes of the sum alone.

    Args:
        partial: `(.., rows, width)`, as `h @ w` with a kernel split over its inputs.
        mesh_axis: The manual mesh axis; it divides the rows.
        dim: That of the rows.

    Returns:
        `(.., rows / n, width)`.

    Raises:
        ValueError: The axis does not divide the rows.

    Law: `enter_sequence(exit_sequence(h @ w))` is `row(h, w)`.

    Example:
        >>> from jax.sharding import PartitionSpec as P
        >>> h, w = jnp.ones((4, 8)), jnp.ones((8, 3))
        >>> split = jax.shard_map(lambda h, w: us.parallel.exit_sequence(h @ w, "tp"),
        ...                       in_specs=(P(None, "tp"), P("tp", None)), out_specs=P("tp"))
        >>> with jax.set_mesh(us.parallel.mesh(dp=2, tp=4)):
        ...     bool((split(h, w) == h @ w).all())
        True
    """
    check_array("partial", partial, 1)
    dim %= jnp.ndim(partial)
    check_rows(jnp.shape(partial)[dim], mesh_axis, "exit_sequence")
    return lax.psum_scatter(partial, mesh_axis, scatter_dimension=dim, tiled=True)


def ring_matmul(x: Array, w: Array, mesh_axis: str, *, dim: int = -2) -> jax.Array:
    """Multiplies gathered rows, the gathering hidden under the products.

    The rows that a device holds are multiplied while the next ones travel to it: n - 1 messages
    between neighbors, where `enter_sequence(x) @ w` waits for one message of all rows.

    Args:
        x: `(.., rows / n, in)`, the device's rows.
        w: `(in, *out)`, split over its outputs or whole.
        mesh_axis: The manual mesh axis.
        dim: That of the rows, one of the axes of x before the last.

    Returns:
        `(.., rows, *out)`: `column(enter_sequence(x, axis), w)`. The gradient of x goes around the
        ring the other way, equally hidden.

    Raises:
        ValueError: `dim` is the last axis, which the product sums over.
    """
    check_array("x", x, 1)
    dim = _rows_dim(x, dim, "ring_matmul")
    n, me, rows = devices_over(mesh_axis), lax.axis_index(mesh_axis), x.shape[dim]
    x, out = varying(x, [mesh_axis]), None
    for k in range(n):
        coming = lax.ppermute(x, mesh_axis, around(n)) if k < n - 1 else x
        part = jnp.tensordot(x, w, 1)
        if out is None:
            shape = (*part.shape[:dim], rows * n, *part.shape[dim + 1 :])
            out = zeros(shape, part.dtype, like=part)
        out = lax.dynamic_update_slice_in_dim(out, part, (me - k) % n * rows, dim)
        x = coming
    assert out is not None
    return out


def ring_scatter(h: Array, w: Array, mesh_axis: str, *, dim: int = -2) -> jax.Array:
    """Sums a split contraction and scatters its rows, the messages hidden under the products.

    The sum for a device goes around the ring and every device adds its part of it, made while the
    sum before was on its way.

    Args:
        h: `(.., rows, in / n)`, split over what the product sums over.
        w: `(in / n, *out)`, the device's inputs.
        mesh_axis: The manual mesh axis; it divides the rows.
        dim: That of the rows, one of the axes of h before the last.

    Returns:
        `(.., rows / n, *out)`: `exit_sequence(h @ w, axis)`, up to the order of the sum.

    Raises:
        ValueError: The axis does not divide the rows, or `dim` is the last axis.
    """
    check_array("h", h, 1)
    dim = _rows_dim(h, dim, "ring_scatter")
    n, me = devices_over(mesh_axis), lax.axis_index(mesh_axis)
    rows = check_rows(h.shape[dim], mesh_axis, "ring_scatter")

    def piece(k: int) -> jax.Array:
        # The sum for device d is begun by d + 1 and ends at d, after n - 1 messages. So at step k
        # this device has the sum for the device k + 1 places before it.
        return lax.dynamic_slice_in_dim(h, (me - k - 1) % n * rows, rows, dim)

    total = jnp.tensordot(piece(0), w, 1)
    for k in range(1, n):
        total = lax.ppermute(total, mesh_axis, around(n)) + jnp.tensordot(piece(k), w, 1)
    return total


def around(n: int) -> list[tuple[int, int]]:
    """Pairs each device with the next one, as `ppermute` takes it."""
    return [(i, (i + 1) % n) for i in range(n)]


def check_rows(rows: int, mesh_axis: str, name: str) -> int:
    """Computes how many rows each device of an axis gets.

    Raises:
        ValueError: The axis does not divide them.
    """
    n = devices_over(mesh_axis)
    if rows % n:
        raise ValueError(
            f"{name} splits {rows} rows over {mesh_axis}={n}, which does not divide them. Pad the "
            f"rows to {-(-rows // n) * n}, with weight 0 in the loss, or choose another `dim`."
        )
    return rows // n


def _rows_dim(x: Array, dim: int, name: str) -> int:
    if dim % x.ndim == x.ndim - 1:
        raise ValueError(
            f"{name} got dim={dim} of {x.shape}, the axis that the product sums over. `dim` is an "
            "axis of rows, such as -2."
        )
    return dim % x.ndim
