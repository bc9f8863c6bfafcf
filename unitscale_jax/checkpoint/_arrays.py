"""Arrays as orbax stores them: each process writes its shards, and reads what its devices need.

The files are orbax's own, and its tools open them. Its handlers do the work without the
checkpointer around them, which would wait at barriers to which a process that failed never comes:
here the steps lie inside of `agreed` and `together`, which hand an error of one to all.
"""

import asyncio
import contextlib
import errno
import logging
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import type_handlers

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
        with _waiting():
            _handler().save(epath.Path(folder), args=ocp.args.PyTreeSave(given))
    written = [path for path in folder.glob(f"ocdbt.process_{rank()}/**/*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in written}


def finish(folder: pathlib.Path) -> None:
    """Makes one checkpoint of what all processes wrote; process 0 alone calls this."""
    if any(folder.iterdir()):
        with _waiting():
            _handler().finalize(epath.Path(folder))


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that ends when all of its tasks have; of errors, the first is raised."""

    def __init__(self) -> None:
        super().__init__()
        self.set_exception_handler(lambda *_: None)

    def close(self) -> None:
        """Waits for what is left."""
        if left := () if self.is_closed() else asyncio.all_tasks(self):
            self.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        super().close()

    def call_soon_threadsafe(
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        """As ever; of what was cancelled and ends after the loop, nobody wants to know."""
        try:
            return super().call_soon_threadsafe(callback, *args, context=context)
        except RuntimeError:
            if not self.is_closed():
                raise
            return asyncio.Handle(callback, args, self)


class _Loops(asyncio.DefaultEventLoopPolicy):
    new_event_loop = staticmethod(_Loop)


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    """Orbax, as this file needs it where it fails.

    When one of its arrays fails it abandons the others, which write on into a folder that is to be
    removed, and find their event loop closed; and each of its threads logs the error, with a
    traceback, that it also raises.
    """
    logger, policy = logging.getLogger("absl"), asyncio.get_event_loop_policy()
    told_twice = lambda record: "_SignalingThread.run() raised" not in record.getMessage()
    asyncio.set_event_loop_policy(_Loops())
    logger.addFilter(told_twice)
    try:
        yield
    except ValueError as error:
        if "RESOURCE_EXHAUSTED" in str(error) and "Failed writing" in str(error):
            raise OSError(errno.ENOSPC, f"no space left: {error}") from None
        raise
    finally:
        logger.removeFilter(told_twice)
        asyncio.set_event_loop_policy(policy)


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
    with _waiting():
        listed = _handler().metadata(epath.Path(folder)).tree if wanted else {}
    for name, form in wanted.items():
        there = listed.get(_key(name))
        came = None if there is None else (tuple(there.shape), str(there.dtype))
        stored = "uint8" if str(form.dtype) in _AS_BYTES else str(form.dtype)
        if came != (form.shape, stored):
            return f"of array {name!r}, {stored}{list(form.shape)}, it has {came or 'nothing'}"
    return None


def read(folder: pathlib.Path, forms: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Reads all arrays, each as its form says: with its sharding, or to NumPy if it has none."""
    wanted = {_key(name): _wanted(form) for name, form in forms.items() if form.size}
    if not wanted:
        return {name: _empty(form) for name, form in forms.items()}
    args = ocp.args.PyTreeRestore(restore_args=wanted)
    with _waiting():
        found = _handler().restore(epath.Path(folder), args=args)
    pick = lambda name, form: _as_it_was(found.pop(_key(name)), form) if form.size else _empty(form)
    arrays = {name: pick(name, form) for name, form in forms.items()}
    for name, form in forms.items():
        if (arrays[name].shape, arrays[name].dtype) != (form.shape, form.dtype):
            raise ValueError(wrong_shape(name, arrays[name].shape, f"{form.dtype} {form.shape}"))
    return arrays


def _handler() -> ocp.PyTreeCheckpointHandler:
    # Of replicas the first is written: to cut them among replicas compiles for each shape. The
    # shardings are those of `like`, so none is stored. Numbers hardly compress, at a tenth of the
    # speed of a disk.
    registry = type_handlers.create_type_handler_registry(
        (
            jax.Array,
            type_handlers.ArrayHandler(
                use_replica_parallel=False, enable_write_sharding_file=False
            ),
        ),
        (np.ndarray, type_handlers.NumpyHandler()),
    )
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)


def _key(name: str) -> str:
    return name or "."  # a tree that is a leaf has the empty name, which orbax drops


def _gives(name: str, array: Any) -> bool:
    """Whether this process gives the array to orbax, which writes NumPy's from process 0 alone."""
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


def _wanted(form: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if form.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=form.sharding)


def _as_it_was(array: Any, form: jax.ShapeDtypeStruct) -> Any:
    if array.dtype == form.dtype:
        return array
    if form.sharding is None:
        return array.view(form.dtype)
    return _recast(array, form.dtype, form.sharding)


def _recast(array: jax.Array, dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """In another dtype: integers with their numbers, of which few have bytes, others with bits."""
    integers = all(jnp.issubdtype(d, jnp.integer) for d in (array.dtype, dtype))
    recast = lambda x: x.astype(dtype) if integers else jax.lax.bitcast_convert_type(x, dtype)
    return jax.jit(recast, out_shardings=sharding)(array)


def _empty(form: jax.ShapeDtypeStruct) -> Any:
    if form.sharding is None:
        return np.zeros(form.shape, form.dtype)
    return jnp.zeros(form.shape, form.dtype, device=form.sharding)
