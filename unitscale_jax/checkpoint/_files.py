"""The files of one checkpoint: written with their digests, read only when all of them agree."""

import hashlib
import json
import os
import pathlib
from typing import Any

from unitscale_jax.checkpoint import _arrays
from unitscale_jax.checkpoint._leaves import Leaf, decode
from unitscale_jax.parallel._agree import agreed, rank, together

FORMAT = 3
OTHER_FORMAT = "it has format"  # how the one flaw begins that is no damage
_SUMS, _MANIFEST, _ARRAYS = "SHA256SUMS", "manifest.json", "arrays"


def write(path: pathlib.Path, step: int, leaves: list[Leaf]) -> None:
    """Writes a checkpoint to a new directory and forces it to the disk; every process calls this.

    Raises:
        ValueError: Process 0 has no part of some array.
        OSError: One process cannot write, or does not see the directory.
    """
    agreed(lambda: (path / _ARRAYS).mkdir(parents=True))
    _check_seen(path / _ARRAYS)
    arrays = {leaf.name: leaf.array for leaf in leaves if leaf.array is not None}
    written = together(lambda: _arrays.write(path / _ARRAYS, arrays))
    agreed(lambda: _seal(path, step, leaves, written))


def read(path: pathlib.Path, like: Any) -> Any:
    """Reads a checkpoint in which `flaw` found none, as `like` is; every process calls this."""
    _check_seen(path / _SUMS)
    restored = []

    def restore() -> None:
        described = json.loads((path / _MANIFEST).read_bytes())["leaves"]
        leaves = [Leaf.from_description(fields) for fields in described]
        restored.append(decode(leaves, like, path / _ARRAYS))

    together(restore)
    return restored[0]


def flaw(path: pathlib.Path, step: int) -> str | None:
    """Says what is wrong with a checkpoint, if anything is."""
    try:
        listing, found = (path / _SUMS).read_bytes(), _digests(path)
    except FileNotFoundError:
        return f"{_SUMS} is missing"
    except OSError as error:
        return f"it is not readable ({error})"
    if listing != _listing(found):
        return _difference(listing, found)
    manifest = json.loads((path / _MANIFEST).read_bytes())
    if manifest["format"] != FORMAT:
        return f"{OTHER_FORMAT} {manifest['format']}, this version reads format {FORMAT}"
    return None if manifest["step"] == step else f"it is a renamed step {manifest['step']}"


def sync(path: pathlib.Path) -> None:
    """Forces a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_seen(path: pathlib.Path) -> None:
    """Whether every process sees what process 0 does; an error on all if one does not."""

    def see() -> None:
        if not path.exists():
            raise FileNotFoundError(
                f"{path.parent} is not there for process {rank()}. Every process needs the same "
                "directory: name one on a disk that they share."
            )

    together(see)


def _seal(path: pathlib.Path, step: int, leaves: list[Leaf], written: list[dict[str, int]]) -> None:
    """Makes a checkpoint of what all processes have written."""
    for process, (name, size) in [(i, file) for i, w in enumerate(written) for file in w.items()]:
        file = path / _ARRAYS / name
        # orbax would take what it does not find for zeros.
        if not file.exists() or file.stat().st_size != size:
            raise OSError(
                f"{file} is not what process {process} wrote. Every process needs the same "
                "directory: name one on a disk that they share."
            )
    _arrays.finish(path / _ARRAYS)
    (path / _MANIFEST).write_bytes(_manifest(step, leaves))
    (path / _SUMS).write_bytes(_listing(_digests(path)))
    for sealed in [*path.rglob("*"), path]:
        sync(sealed)


def _manifest(step: int, leaves: list[Leaf]) -> bytes:
    """A leaf to a line."""
    lines = ",\n".join(json.dumps(leaf.described()) for leaf in leaves)
    return f'{{"format": {FORMAT}, "step": {step}, "leaves": [\n{lines}\n]}}\n'.encode()


def _digests(path: pathlib.Path) -> dict[str, str]:
    files = (file for file in path.rglob("*") if file.is_file() and file != path / _SUMS)
    return {file.relative_to(path).as_posix(): _digest(file) for file in files}


def _digest(file: pathlib.Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _listing(digests: dict[str, str]) -> bytes:
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()


def _difference(listing: bytes, found: dict[str, str]) -> str:
    lines = [line.split("  ", 1) for line in listing.decode(errors="replace").splitlines()]
    listed = {words[1]: words[0] for words in lines if len(words) == 2}
    for name in sorted(listed.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if name not in listed:
            return f"{name} is not listed in {_SUMS}"
        if listed[name] != found[name]:
            return f"{name} was altered: its sha256 is not the one in {_SUMS}"
    return f"{_SUMS} was altered"
