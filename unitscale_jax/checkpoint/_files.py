"""The files of one checkpoint: written with their digests, read only when all of them agree."""

import dataclasses
import hashlib
import json
import os
import pathlib

from unitscale_jax.checkpoint import _shards
from unitscale_jax.checkpoint._leaves import Leaf
from unitscale_jax.parallel._agree import agreed, together

FORMAT = 2
OTHER_FORMAT = "it has format"  # how the one flaw begins that is no damage
_SUMS, _MANIFEST, _ARRAYS = "SHA256SUMS", "manifest.json", "arrays"


def write(path: pathlib.Path, step: int, leaves: list[Leaf]) -> None:
    """Writes a checkpoint to a new directory and forces it to the disk; every process calls this.

    Raises:
        ValueError: Of some array there are parts that no process has.
        OSError: One process cannot write, or does not see the directory.
    """
    agreed(lambda: (path / _ARRAYS).mkdir(parents=True))
    arrays = {leaf.name: leaf.array for leaf in leaves if leaf.array is not None}
    written = together(lambda: _shards.write(path / _ARRAYS, arrays)._asdict())
    agreed(lambda: _seal(path, step, leaves, written))


def read(path: pathlib.Path) -> list[Leaf]:
    """The leaves of a checkpoint in which `flaw` found none, without their arrays."""
    described = json.loads((path / _MANIFEST).read_bytes())["leaves"]
    return [Leaf.from_description(path / _ARRAYS, fields) for fields in described]


def check_seen(path: pathlib.Path) -> None:
    """Whether every process sees a checkpoint; an error on all if one does not."""

    def see() -> None:
        if not (path / _SUMS).exists():
            raise FileNotFoundError(
                f"{path} is not there, but process 0 has it. Every process needs the same "
                "directory: name one on a disk that they share."
            )

    together(see)


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


def _seal(path: pathlib.Path, step: int, leaves: list[Leaf], written: list[dict]) -> None:
    """Writes what the files of all processes are, which makes a checkpoint of them."""
    digests = {}
    for process, (size, digest) in enumerate((w["size"], w["digest"]) for w in written):
        file = path / _ARRAYS / str(process)
        if not file.exists() or file.stat().st_size != size:
            raise OSError(
                f"{file} is not what process {process} wrote. Every process needs the same "
                "directory: name one on a disk that they share."
            )
        digests[f"{_ARRAYS}/{process}"] = digest
    text = _manifest(step, [_with_shards(leaf, written) for leaf in leaves])
    (path / _MANIFEST).write_bytes(text)
    digests[_MANIFEST] = hashlib.sha256(text).hexdigest()
    (path / _SUMS).write_bytes(_listing(digests))
    for sealed in (path / _MANIFEST, path / _SUMS, path / _ARRAYS, path):
        sync(sealed)


def _with_shards(leaf: Leaf, written: list[dict]) -> Leaf:
    if leaf.array is None:
        return leaf
    shards = [shard for w in written for shard in w["shards"][leaf.name]]
    shards = tuple(_shards.Shard(*shard) for shard in shards)
    if _shards.missing(shards, leaf.array.shape):
        raise ValueError(
            f"{leaf.name} has parts that no process gave: its devices are not process 0's, or "
            "not all processes save. Start them by `parallel.initialize`, and put it on a mesh "
            "of all devices."
        )
    return dataclasses.replace(leaf, shards=shards)


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
