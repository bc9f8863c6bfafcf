"""The files of one checkpoint: written with their digests, read only when all of them agree."""

import hashlib
import json
import os
import pathlib

import numpy as np
import orbax.checkpoint as ocp

from unitscale_jax.checkpoint._leaves import Leaf

FORMAT = 1
_SUMS, _MANIFEST, _ARRAYS = "SHA256SUMS", "manifest.json", "arrays"


def write(path: pathlib.Path, step: int, leaves: list[Leaf]) -> None:
    """Writes a checkpoint to a new directory and forces it to the disk."""
    path.mkdir()
    # orbax takes neither empty arrays nor empty trees; the manifest says all about those.
    arrays = {_key(leaf): leaf.bits for leaf in leaves if leaf.bits is not None and leaf.bits.size}
    if arrays:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path / _ARRAYS, arrays)
    manifest = {"format": FORMAT, "step": step, "leaves": [leaf.described() for leaf in leaves]}
    (path / _MANIFEST).write_text(json.dumps(manifest, indent=1))
    (path / _SUMS).write_bytes(_listing(_digests(path)))
    for written in [*path.rglob("*"), path]:
        sync(written)


def read(path: pathlib.Path) -> list[Leaf]:
    """Reads the leaves of a checkpoint in which `flaw` found none."""
    described = json.loads((path / _MANIFEST).read_bytes())["leaves"]
    leaves = [Leaf.from_description(fields) for fields in described]
    arrays = _read_arrays(path / _ARRAYS)
    return [leaf.with_bits(arrays.get(_key(leaf))) for leaf in leaves]


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
        return f"it has format {manifest['format']}, this version reads format {FORMAT}"
    return None if manifest["step"] == step else f"it is a renamed step {manifest['step']}"


def sync(path: pathlib.Path) -> None:
    """Forces a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path).item_metadata.tree
        # To NumPy whatever they were, so that a checkpoint does not care about the devices here.
        as_numpy = {key: ocp.RestoreArgs(restore_type=np.ndarray) for key in stored}
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def _key(leaf: Leaf) -> str:
    return leaf.name or "."  # a tree that is a leaf has the empty name, which orbax drops


def _digests(path: pathlib.Path) -> dict[str, str]:
    files = sorted(file for file in path.rglob("*") if file.is_file() and file != path / _SUMS)
    return {file.relative_to(path).as_posix(): _digest(file) for file in files}


def _digest(file: pathlib.Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _listing(digests: dict[str, str]) -> bytes:
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()


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
