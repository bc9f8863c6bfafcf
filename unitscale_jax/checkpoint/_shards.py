"""Arrays as the shards they are in: each process writes its own, and reads what it needs.

    arrays/0, arrays/1, ..    the shards of process 0, 1, .., one after the other, each at a
                              multiple of 64 bytes

Nothing is gathered, so that a host holds one shard at a time while it saves, and one leaf at most
while it restores; and since each shard says where in its array it was, any cut of the array can be
read back, on any mesh and by any number of processes.
"""

import hashlib
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from unitscale_jax.parallel._agree import rank

_ALIGNMENT = 64


class Shard(NamedTuple):
    """A part of an array, and where it is."""

    file: int  # of which process
    offset: int
    start: Sequence[int]  # its first index of each dimension
    shape: Sequence[int]


class Written(NamedTuple):
    """What one process wrote."""

    shards: Mapping[str, list[Shard]]  # by the name of the array
    size: int
    digest: str


def write(folder: pathlib.Path, arrays: Mapping[str, Any]) -> Written:
    """Writes the shards of this process to its file, and forces it to the disk.

    Raises:
        FileNotFoundError: The folder is not there.
    """
    at, digest, shards = 0, hashlib.sha256(), {name: [] for name in arrays}
    with _opened(folder) as file:
        for name, array in arrays.items():
            for start, shard in _own(array):
                # Bytes that do not lie in a row, and 0-d arrays, have no flat view of their own.
                flat = np.ascontiguousarray(shard).reshape(-1).view(np.uint8)
                gap = bytes(-at % _ALIGNMENT)
                for part in (gap, flat.data):
                    file.write(part)
                    digest.update(part)
                shards[name].append(Shard(rank(), at + len(gap), start, shard.shape))
                at += len(gap) + flat.size
        file.flush()
        os.fsync(file.fileno())
    return Written(shards, at, digest.hexdigest())


def read(
    folder: pathlib.Path,
    shards: Sequence[Shard],
    dtype: np.dtype,
    shape: Sequence[int],
    index: Sequence[slice] | None = None,
) -> np.ndarray:
    """The part of an array at an index, or all of it, in memory of its own."""
    index = [slice(None)] * len(shape) if index is None else index
    bounds = [cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True)]
    out = np.empty([stop - start for start, stop in bounds], dtype)
    for shard in shards:
        ends = [start + size for start, size in zip(shard.start, shard.shape, strict=True)]
        common = [
            (max(a, start), min(b, end))
            for (a, b), start, end in zip(bounds, shard.start, ends, strict=True)
        ]
        if all(a < b for a, b in common):
            source = _mapped(folder, shard, dtype)
            into = _cut(common, [start for start, _ in bounds])
            out[into] = source[_cut(common, shard.start)]
    return out


def missing(shards: Sequence[Shard], shape: Sequence[int]) -> int:
    """How many numbers of an array no shard has; shards do not overlap."""
    return math.prod(shape) - sum(math.prod(shard.shape) for shard in shards)


def _opened(folder: pathlib.Path):
    try:
        return (folder / str(rank())).open("wb")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder.parent} is not there for process {rank()}. Every process needs the same "
            "directory: name one on a disk that they share."
        ) from None


def _own(array: Any) -> Iterator[tuple[list[int], np.ndarray]]:
    """The shards that this process writes, and where they start.

    Of replicas that is the first, and of arrays that each process has for itself, process 0's.
    """
    if isinstance(array, jax.Array):
        processes = {device.process_index for device in array.sharding.device_set}
        for shard in array.addressable_shards if len(processes) > 1 or rank() == 0 else ():
            if shard.replica_id == 0:
                # An array keeps what NumPy copied to the host for as long as it lives itself, and
                # so the host would come to hold all of the run; this copy is let go.
                let_go = jax.device_put(shard.data, shard.device, may_alias=False)
                yield [cut.start or 0 for cut in shard.index], np.asarray(let_go)
    elif rank() == 0:
        array = np.asarray(array)
        yield [0] * array.ndim, array


def _mapped(folder: pathlib.Path, shard: Shard, dtype: np.dtype) -> np.ndarray:
    size = math.prod(shard.shape) * dtype.itemsize
    file = folder / str(shard.file)
    mapped = np.memmap(file, np.uint8, "r", offset=shard.offset, shape=(size,))
    return np.asarray(mapped).view(dtype).reshape(shard.shape)


def _cut(bounds: Sequence[tuple[int, int]], start: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - at, b - at) for (a, b), at in zip(bounds, start, strict=True))
