"""Orbax's handlers of arrays, without the checkpointer around them; no other file imports orbax.

The checkpointer would wait at barriers to which a process that failed never comes; here the steps
lie inside of `agreed` and `together`, which hand an error of one process to all.
"""

import asyncio
import contextlib
import errno
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import type_handlers


def save(folder: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Writes this process's shards of all arrays."""
    with _waiting():
        _handler().save(epath.Path(folder), args=ocp.args.PyTreeSave(dict(arrays)))


def finalize(folder: pathlib.Path) -> None:
    """Merges what all processes wrote into one checkpoint."""
    with _waiting():
        _handler().finalize(epath.Path(folder))


def metadata(folder: pathlib.Path) -> Mapping[str, Any]:
    """Shape and dtype of every array in a folder, by name."""
    with _waiting():
        return _handler().metadata(epath.Path(folder)).tree


def restore(
    folder: pathlib.Path, wanted: Mapping[str, jax.sharding.Sharding | None]
) -> dict[str, Any]:
    """Reads arrays, each with its sharding, or as a NumPy array where that is None."""
    args = ocp.args.PyTreeRestore(restore_args={k: _restore_args(s) for k, s in wanted.items()})
    with _waiting():
        return _handler().restore(epath.Path(folder), args=args)


def _restore_args(sharding: jax.sharding.Sharding | None) -> ocp.RestoreArgs:
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=sharding)


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


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that ends when all of its tasks have; of errors, the first is raised."""

    def __init__(self) -> None:
        super().__init__()
        self.set_exception_handler(lambda *_: None)

    def close(self) -> None:
        """Waits for the tasks that are left, and closes."""
        if left := () if self.is_closed() else asyncio.all_tasks(self):
            self.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        super().close()

    def call_soon_threadsafe(
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        """Calls soon, unless the loop is closed: nobody waits for what was cancelled before."""
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

    def is_news(record: logging.LogRecord) -> bool:
        return "_SignalingThread.run() raised" not in record.getMessage()

    asyncio.set_event_loop_policy(_Loops())
    logger.addFilter(is_news)
    try:
        yield
    except ValueError as error:
        if "RESOURCE_EXHAUSTED" in str(error) and "Failed writing" in str(error):
            raise OSError(errno.ENOSPC, f"no space left: {error}") from None
        raise
    finally:
        logger.removeFilter(is_news)
        asyncio.set_event_loop_policy(policy)
