"""Batches of several processes: each reads the rows that its devices hold, by their global index.

    row i of the batch is read(i), whichever process has it

So the data, and their order, are those of one process, for any number of processes and any mesh.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from unitscale_jax import tree as trees


def global_batch(
    read: Callable[[np.ndarray], Any],
    rows: int,
    mesh: Mesh,
    *,
    mesh_axis: str | tuple[str, ...] = "dp",
) -> Any:
    """Makes a batch that is spread over a mesh, of rows that each process reads for itself.

    Args:
        read: Maps indices `(n,)`, ascending and below `rows`, to a pytree of arrays `(n, ...)`, the
            rows of the batch that have them. It is called once, with what this process holds.
        rows: Rows of the whole batch.
        mesh: Of `mesh`.
        mesh_axis: The mesh axis, or axes, that rows are divided over.

    Returns:
        The tree of `read`, of global arrays `(rows, ...)`.

    Raises:
        ValueError: The mesh has no such axis, or it does not divide the rows; or `read` gave
            another number of rows, with the name of the array.

    Law: equal for any number of processes and any mesh, to the bit.

    Example:
        >>> mesh, text = us.parallel.mesh(dp=4, tp=2), jnp.arange(80).reshape(20, 4)
        >>> order = jax.random.permutation(jax.random.key(0), 20)
        >>> batch = us.parallel.global_batch(lambda i: {"text": text[order[i]]}, 8, mesh)
        >>> batch["text"].shape, batch["text"].sharding.spec
        ((8, 4), P('dp',))
        >>> bool((batch["text"] == text[order[:8]]).all())
        True
    """
    _check(rows, mesh, (mesh_axis,) if isinstance(mesh_axis, str) else mesh_axis)
    sharding = NamedSharding(mesh, PartitionSpec(mesh_axis))
    cuts = sharding.addressable_devices_indices_map((rows,)).values()
    held = sorted({cut[0].indices(rows)[:2] for cut in cuts if cut})
    index = np.concatenate([np.arange(*bounds) for bounds in held])

    def spread(name: str, leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        if leaf.ndim == 0 or len(leaf) != len(index):
            raise ValueError(
                f"`read` was asked for {len(index)} rows, and gave {name or 'an array'} of shape "
                f"{leaf.shape}. Return one row for each index, in their order."
            )

        def part(cut: Any) -> np.ndarray:
            start, stop, _ = cut[0].indices(rows)
            first = int(np.searchsorted(index, start))
            return leaf[first : first + stop - start]

        return jax.make_array_from_callback((rows, *leaf.shape[1:]), sharding, part)

    return trees.map_named(spread, read(index))


def _check(rows: int, mesh: Mesh, mesh_axis: tuple[str, ...]) -> None:
    absent = [axis for axis in mesh_axis if axis not in mesh.shape]
    if absent:
        raise ValueError(
            f"rows over {absent[0]!r}: the mesh has {', '.join(mesh.shape)}. Name one of them, or "
            f"make it with {absent[0]}=1."
        )
    parts = math.prod(mesh.shape[axis] for axis in mesh_axis)
    if rows % parts or rows < 1:
        listed = ", ".join(f"{axis}={mesh.shape[axis]}" for axis in mesh_axis)
        raise ValueError(
            f"{rows} rows do not divide over {listed}. Read {max(-(-rows // parts), 1) * parts}, "
            "the last of them with weight 0."
        )
