"""Meshes: devices arranged along named axes, made in one place.

A mesh names the axes along which devices are arranged. All axes are Auto: inside `shard_map` one is
manual, everywhere else the partitioner's. (Explicit axes, JAX's default in `make_mesh`, refuse
models that were written without them.)
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh


def mesh(*, devices: Sequence[jax.Device] | None = None, **axes: int) -> Mesh:
    """Arranges devices along named axes, neighbors in the last axis closest to one another.

    Args:
        devices: Which devices; all of them, of all processes, if left out.
        **axes: Size of each axis, in order, such as `dp=4, tp=2`; one may be -1, for what is left.
            An axis of size 1 changes nothing, so one program serves every mesh.

    Returns:
        A `jax.sharding.Mesh` of Auto axes; enter it with `jax.set_mesh`. On a TPU its axes follow
        the torus.

    Raises:
        ValueError: The sizes do not multiply to the number of devices.

    Example:
        >>> dict(us.parallel.mesh(dp=4, tp=-1).shape)
        {'dp': 4, 'tp': 2}
        >>> us.parallel.mesh(dp=3, tp=2)
        Traceback (most recent call last):
            ...
        ValueError: a mesh of dp=3, tp=2 has 6 devices, and 8 are given. Choose sizes whose \
product is 8, -1 for one of them, or pass `devices`.
    """
    count = jax.device_count() if devices is None else len(devices)
    listed = ", ".join(f"{name}={size}" for name, size in axes.items())
    bad = [name for name, size in axes.items() if size < 1 and size != -1]
    if not axes or bad or list(axes.values()).count(-1) > 1:
        raise ValueError(
            f"a mesh of {listed or 'no axes'}: expected at least one axis, sizes above 0, and at "
            "most one of -1, for what is left."
        )
    known = math.prod(size for size in axes.values() if size != -1)
    sizes = tuple(count // known if size == -1 else size for size in axes.values())
    if math.prod(sizes) != count:
        raise ValueError(
            f"a mesh of {listed} has {known} devices, and {count} are given. Choose sizes whose "
            f"product is {count}, -1 for one of them, or pass `devices`."
        )
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, tuple(axes), axis_types=kinds, devices=devices)
