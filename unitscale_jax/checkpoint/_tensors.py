"""The bytes of a safetensors file: a header in JSON, then the arrays one after the other.

    8 bytes    the length of the header
    header     {"__metadata__": {..}, name: {"dtype": "F32", "shape": [..], "data_offsets": [..]}}
    arrays     by their offsets

Format: https://github.com/huggingface/safetensors. The package checks a header against its file. It
does not write here, since it puts the metadata in an order of chance, so that one tree would have
many files; and it does not read arrays, since its NumPy has no 8-bit floats.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from unitscale_jax.checkpoint import _files

_DTYPES = {  # safetensors' name of each dtype that a file may hold
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    "bool": "BOOL",
}
_NAMES = {name: dtype for dtype, name in _DTYPES.items()}


class Stored(NamedTuple):
    """An array to be written: the name of its dtype, its shape, and how to get it."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def stored_array(name: str, leaf: Any) -> Stored:
    """An array as it is written, by its own bits.

    Raises:
        TypeError: It is no array, or of a dtype that a file does not hold.
        ValueError: Its name is not free.
    """
    dtype = str(getattr(leaf, "dtype", type(leaf).__name__))
    if name == "__metadata__":
        raise ValueError(f"{name!r} is a file's own name for its header; rename that leaf.")
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic) or dtype not in _DTYPES:
        raise TypeError(
            f"{name} is {dtype}, and a file holds arrays of {', '.join(_DTYPES)}. Cast it or leave "
            "it out; a training state goes to `Checkpoints`."
        )
    return Stored(dtype, tuple(leaf.shape), lambda: on_host(name, leaf))


def write(path: pathlib.Path, stored: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, all of it or nothing, with one array at a time on the host."""
    size = lambda name: jnp.dtype(stored[name].dtype).itemsize
    order = sorted(stored, key=lambda name: (-size(name), name))  # large ones first aligns them all
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        dtype, shape, _ = stored[name]
        start, end = end, end + size(name) * math.prod(shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def lines() -> Iterator[bytes]:
        yield len(text).to_bytes(8, "little") + text
        for name in order:
            yield stored[name].read().tobytes()

    replace_file(path, lines())


def replace_file(path: pathlib.Path, parts: Iterator[bytes]) -> None:
    """Writes a file under another name, forces it to the disk, and then gives it its own."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as opened:
            for part in parts:
                opened.write(part)
        _files.sync(unfinished)
        os.replace(unfinished, path)
        _files.sync(path.absolute().parent)
    finally:
        unfinished.unlink(missing_ok=True)


def on_host(name: str, array: Any) -> np.ndarray:
    """An array in NumPy.

    Raises:
        ValueError: Other processes have parts of it.
    """
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ValueError(
            f"{name} has parts on other processes, which this one cannot save. Gather it first: "
            "jax.experimental.multihost_utils.process_allgather."
        )
    return np.asarray(array)


class File(NamedTuple):
    """A file that was opened: its metadata, and of every array the form and the place."""

    path: pathlib.Path
    metadata: dict[str, str]
    shapes: dict[str, jax.ShapeDtypeStruct]
    offsets: dict[str, tuple[int, int]]

    def array(self, name: str) -> np.ndarray:
        """Reads one array."""
        start, end = self.offsets[name]
        found = np.fromfile(self.path, np.uint8, end - start, offset=start)
        return found.view(self.shapes[name].dtype).reshape(self.shapes[name].shape)


def open_file(path: pathlib.Path) -> File:
    """Reads the header of a file, and checks that the file has what the header says.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no safetensors file, not a whole one, or has a dtype unknown here.
    """
    try:
        with safe_open(path, "np") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}). It was cut short, or is of another "
            "kind; copy it again."
        ) from None
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    shapes = {name: _shape(path, name, entry) for name, entry in header.items()}
    start = lambda entry: tuple(8 + length + offset for offset in entry["data_offsets"])
    return File(path, metadata, shapes, {name: start(entry) for name, entry in header.items()})


def _shape(path: pathlib.Path, name: str, entry: dict[str, Any]) -> jax.ShapeDtypeStruct:
    if entry["dtype"] not in _NAMES:
        raise ValueError(
            f"{path}: {name} is {entry['dtype']}, which this library does not read; cast it before."
        )
    return jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(_NAMES[entry["dtype"]]))
