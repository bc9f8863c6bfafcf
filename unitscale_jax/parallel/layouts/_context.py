"""The mesh that a function finds itself under: `jax.set_mesh` outside, or an outer `shard_map`."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from unitscale_jax.errors import check_type
from unitscale_jax.parallel.layouts._specs import axes_of, held, spec_of


def axis_size(mesh_axis: str, who: str) -> int:
    """Finds the size of a mesh axis that `who` is to make manual.

    Raises:
        TypeError: It is no name.
        ValueError: There is no mesh, it lacks the axis, or the axis has an owner already.
    """
    check_type(f"the mesh axis of {who}", mesh_axis, str, "one name, as 'dp'")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh_axis not in mesh.shape:
        listed = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
        found = f"the mesh here has {listed}" if listed else "there is no mesh here"
        raise ValueError(
            f"{who} runs over the mesh axis {mesh_axis!r}, and {found}. Call it under "
            f"`with jax.set_mesh(us.parallel.mesh({mesh_axis}=...)):`."
        )
    if mesh_axis in mesh.manual_axes:
        raise ValueError(
            f"{who} runs over the mesh axis {mesh_axis!r}, which a shard_map around it owns "
            "already. Leave one of the two out."
        )
    return mesh.shape[mesh_axis]


def shared_axes(mesh_axis: str) -> list[str]:
    """Lists the mesh axes beside `mesh_axis` that the partitioner divides arrays over."""
    mesh = jax.sharding.get_abstract_mesh()
    return [a for a in mesh.auto_axes if a != mesh_axis and mesh.shape[a] > 1]


def under(spec: P, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Evaluates `fn` on the pieces of arrays that lie by `spec`, all of its axes manual.

    In a `shard_map` that is manual over some axes only, a sum keeps what the partitioner has
    divided over the others, but a gather, a scattered sum or an all-to-all would gather it first.
    """
    automatic = set(jax.sharding.get_abstract_mesh().auto_axes)
    own = spec_of([tuple(a for a in by if a in automatic) for by in held(spec, len(spec))])
    axes = set(axes_of(own))
    if not axes:
        return fn
    return jax.shard_map(fn, in_specs=own, out_specs=own, axis_names=axes)
