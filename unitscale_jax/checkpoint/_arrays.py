"""Arrays as orbax stores them: each process writes its shards, and reads what its devices need.

The files are orbax's own, and its tools open them.
"""

import errno
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.errors import wrong_shape
from unitscale_jax.processes import count, rank

REFUSED = ("float6_e2m3fn", "float6_e3m2fn", "int1", "uint1", "float128", "complex256")
"""Dtypes that orbax does not store, nor does JAX compute with them."""

_AS_BYTES = ("uint2", "uint4", "float8_e4m3")  # these JAX has, and orbax has not


def write(folder: pathlib.Path, arrays: Mapping[str, Any]) -> dict[str, int]:
    """Writes the shards of this process; says which files it has written, and their sizes.

    Raises:
        ValueError: Process 0 has no part of an array that others have.
        OSError: There is no space left.
    """
    given = {_key(name): _known(x) for name, x in arrays.items() if x.size and _gives(name, x)}
    _check_space(folder, sum(map(_bytes, given.values())))
    if given:
        _orbax().save(folder, given)
    written = [path for path in folder.glob(f"ocdbt.process_{rank()}/**/*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in written}


def finish(folder: pathlib.Path) -> None:
    """Makes one checkpoint of what all processes wrote; process 0 alone calls this."""
    if any(folder.iterdir()):
        _orbax().finalize(folder)


def _orbax() -> Any:
    """The handlers of orbax, imported when they are first needed: a sixth of our import time."""
    from unitscale_jax.checkpoint import _orbax

    return _orbax


def _check_space(folder: pathlib.Path, needed: int) -> None:
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < needed:
        raise OSError(
            errno.ENOSPC, f"no space left: arrays take {needed} bytes, and {folder} has {disk.free}"
        )


def _bytes(array: Any) -> int:
    if not isinstance(array, jax.Array):
        return array.nbytes
    return sum(shard.data.nbytes for shard in array.addressable_shards if shard.replica_id == 0)


def flaw(folder: pathlib.Path, forms: Mapping[str, jax.ShapeDtypeStruct]) -> str | None:
    """Says which array is missing, or of another shape or dtype, if one is; reads none of them."""
    wanted = {name: form for name, form in forms.items() if form.size}
    listed = _orbax().metadata(folder) if wanted else {}
    for name, form in wanted.items():
        there = listed.get(_key(name))
        came = None if there is None else (tuple(there.shape), str(there.dtype))
        stored = "uint8" if str(form.dtype) in _AS_BYTES else str(form.dtype)
        if came != (form.shape, stored):
            return f"of array {name!r}, {stored}{list(form.shape)}, it has {came or 'nothing'}"
    return None


def read(folder: pathlib.Path, forms: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Reads all arrays, each as its form says: with its sharding, or to NumPy if it has none."""
    wanted = {_key(name): form.sharding for name, form in forms.items() if form.size}
    if not wanted:
        return {name: _empty(form) for name, form in forms.items()}
    found = _orbax().restore(folder, wanted)
    arrays = {}
    for name, form in forms.items():
        array = _as_it_was(found.pop(_key(name)), form) if form.size else _empty(form)
        if (array.shape, array.dtype) != (form.shape, form.dtype):
            raise ValueError(wrong_shape(name, array.shape, f"{form.dtype} {form.shape}"))
        arrays[name] = array
    return arrays


def _key(name: str) -> str:
    return name or "."  # a tree that is a leaf has the empty name, which orbax drops


def _gives(name: str, array: Any) -> bool:
    """True if this process gives the array to orbax, which writes NumPy's from process 0 alone."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return rank() == 0
    if rank() == 0 and not array.addressable_shards:
        raise ValueError(
            f"{name} has no part on process 0, which says of each array what it is. Put it on a "
            "mesh of devices of all processes: `parallel.mesh` makes one."
        )
    return bool(array.addressable_shards)


def _known(array: Any) -> Any:
    """An array of a dtype that orbax has; one that each process has for itself, in NumPy."""
    if not isinstance(array, jax.Array) or (count() > 1 and array.is_fully_addressable):
        array = np.asarray(array)
        return array.view(np.uint8) if str(array.dtype) in _AS_BYTES else array
    return _recast(array, jnp.uint8, array.sharding) if str(array.dtype) in _AS_BYTES else array


def _as_it_was(array: Any, form: jax.ShapeDtypeStruct) -> Any:
    if array.dtype == form.dtype:
        return array
    if form.sharding is None:
        return array.view(form.dtype)
    return _recast(array, form.dtype, form.sharding)


def _recast(array: jax.Array, dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array in another dtype: of integers the numbers stay, of others the bits.

    int4 has less than a byte, so that its numbers go into uint8 and not its bits.
    """
    integers = all(jnp.issubdtype(d, jnp.integer) for d in (array.dtype, dtype))

    def recast(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if integers else jax.lax.bitcast_convert_type(x, dtype)

    return jax.jit(recast, out_shardings=sharding)(array)


def _empty(form: jax.ShapeDtypeStruct) -> Any:
    if form.sharding is None:
        return np.zeros(form.shape, form.dtype)
    return jnp.zeros(form.shape, form.dtype, device=form.sharding)
