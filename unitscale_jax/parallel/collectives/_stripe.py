"""Which rows of a sequence each device of a mesh axis holds: neighbors, or every n-th row.

    contiguous    row r of device i is row i rows + r of the sequence
    striped       row r of device i is row r n + i

Under a causal mask the last of contiguous devices sees n times as many keys as the first; striped
devices have the same work (Brandon et al. 2023, arXiv:2311.09431).
"""

import jax
import jax.numpy as jnp
from jax import lax

from unitscale_jax.errors import check_array, check_type
from unitscale_jax.mesh_axes import devices_over
from unitscale_jax.typing import Array


def stripe(x: Array, parts: int, dim: int = 1) -> jax.Array:
    """Deals rows out: a contiguous split of the result over n parts has row i on part i mod n.

    Args:
        x: Any array; tokens, labels and positions are dealt out alike.
        parts: Size of the mesh axis; it divides the rows.
        dim: That of the rows.

    Returns:
        The array with its rows reordered.

    Law: `unstripe` is the inverse.

    Example:
        >>> us.parallel.stripe(jnp.arange(6), 2, dim=0).tolist()
        [0, 2, 4, 1, 3, 5]
    """
    check_array("x", x, 1)
    shape, dim = jnp.shape(x), dim % jnp.ndim(x)
    split = jnp.reshape(x, (*shape[:dim], shape[dim] // parts, parts, *shape[dim + 1 :]))
    return split.swapaxes(dim, dim + 1).reshape(shape)


def unstripe(x: Array, parts: int, dim: int = 1) -> jax.Array:
    """Puts rows back that `stripe` has dealt out.

    Example:
        >>> us.parallel.unstripe(us.parallel.stripe(jnp.arange(6), 2, dim=0), 2, dim=0).tolist()
        [0, 1, 2, 3, 4, 5]
    """
    check_array("x", x, 1)
    return stripe(x, jnp.shape(x)[dim] // parts, dim)


def row_positions(rows: int, mesh_axis: str, *, striped: bool = False) -> jax.Array:
    """Where in the whole sequence a device's rows stand, for embeddings of positions.

    Args:
        rows: How many the device has.
        mesh_axis: The manual mesh axis.
        striped: As of `ring_attention`.

    Returns:
        `(rows,)`, int32.
    """
    check_type("rows", rows, int, "how many rows the device has")
    devices_over(mesh_axis)
    return positions(lax.axis_index(mesh_axis), rows, mesh_axis, striped)


def positions(device: jax.Array, rows: int, mesh_axis: str, striped: bool) -> jax.Array:
    """Where in the whole sequence the rows of a device stand: `(rows,)`, int32."""
    index = jnp.arange(rows, dtype=jnp.int32)
    if striped:
        return index * devices_over(mesh_axis) + device
    return device * rows + index
