"""The bytes of a safetensors file: a header in JSON, then the arrays one after the other.

    8 bytes    the length of the header
    header     {"__metadata__": {..}, name: {"dtype": "F32", "shape": [..], "data_offsets": [..]}}
    arrays     by their offsets

The metadata have a "sha256" of the whole file, with zeros in place of its 64 digits. A header is
not covered by anything else: one bit of it makes another name, or another number in a spec.

Format: https://github.com/huggingface/safetensors. The package checks a header against its file. It
does not write here, since it puts the metadata in an order of chance, so that one tree would have
many files; and it does not read arrays, since its NumPy has no 8-bit floats.
"""

import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from unitscale_jax.checkpoint import _files
from unitscale_jax.errors import check_encodable, check_folder

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
_DIGEST, _NO_DIGEST = "sha256", "0" * 64


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
    """Writes a safetensors file, all of it or nothing, with one array at a time on the host.

    Raises:
        ValueError: UTF-8 has no bytes for a name. JSON would escape it, and no reader take it.
    """
    for name in stored:
        check_encodable("the array", name)
    sizes = {name: jnp.dtype(one.dtype).itemsize for name, one in stored.items()}
    # Arrays of large elements first, which aligns them all.
    order = sorted(stored, key=lambda name: (-sizes[name], name))
    metadata = dict(metadata) | {_DIGEST: _NO_DIGEST}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        dtype, shape, _ = stored[name]
        start, end = end, end + sizes[name] * math.prod(shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def put(opened: BinaryIO) -> None:
        opened.write(len(text).to_bytes(8, "little") + text)
        digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
        for name in order:
            part = stored[name].read().tobytes()
            digest.update(part)
            opened.write(part)
        # No string of JSON has this text inside, since it would have backslashes there.
        opened.seek(8 + text.index(f'"{_DIGEST}":"'.encode()) + len(f'"{_DIGEST}":"'))
        opened.write(digest.hexdigest().encode())

    replace_file(path, put)


def replace_file(path: pathlib.Path, put: Callable[[BinaryIO], Any]) -> None:
    """Writes a file under another name, forces it to the disk, and then gives it its own.

    Raises:
        FileNotFoundError: Its folder does not exist.
        IsADirectoryError: It is a directory.
    """
    check_folder(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as opened:
            put(opened)
        _files.sync(unfinished)
        os.replace(unfinished, path)
        _files.sync(path.absolute().parent)
    finally:
        unfinished.unlink(missing_ok=True)


def on_host(name: str, array: Any) -> np.ndarray:
    """Copies an array to NumPy, whole.

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
        """Reads one array of the file, with the shape and dtype of its header."""
        start, end = self.offsets[name]
        found = np.fromfile(self.path, np.uint8, end - start, offset=start)
        return found.view(self.shapes[name].dtype).reshape(self.shapes[name].shape)

    def check_digest(self) -> None:
        """Reads the file once to compare its digest, if it has one.

        Raises:
            ValueError: The file was altered.
        """
        if (said := self.metadata.get(_DIGEST)) is None:
            return
        with self.path.open("rb") as opened:
            head = opened.read(8)
            head += opened.read(int.from_bytes(head, "little"))
            zeros = rb"\g<1>" + _NO_DIGEST.encode()
            head = re.sub(rb'("sha256"\s*:\s*")[0-9a-f]{64}', zeros, head, count=1)
            found = hashlib.file_digest(opened, lambda: hashlib.sha256(head)).hexdigest()
        if found != said:
            raise ValueError(
                f"{self.path} was altered: its sha256 is not the one in it. Copy it again; or, if "
                f"a program rewrote it on purpose, take {_DIGEST!r} out of its metadata."
            )


def open_file(path: pathlib.Path) -> File:
    """Reads the header of a file, and checks that the file has what the header says.

    Raises:
        FileNotFoundError: There is none.
        IsADirectoryError: It is a directory.
        ValueError: It is no safetensors file, not a whole one, or has a dtype unknown here.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; expected a safetensors file.")
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
    shapes, offsets = {}, {}
    for name, entry in header.items():
        shapes[name] = _shape(path, name, entry)
        start, end = entry["data_offsets"]  # counted from the end of the header
        offsets[name] = 8 + length + start, 8 + length + end
    return File(path, metadata, shapes, offsets)


def _shape(path: pathlib.Path, name: str, entry: dict[str, Any]) -> jax.ShapeDtypeStruct:
    if entry["dtype"] not in _NAMES:
        raise ValueError(
            f"{path}: {name} is {entry['dtype']}, which this library does not read; cast it before."
        )
    return jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(_NAMES[entry["dtype"]]))
