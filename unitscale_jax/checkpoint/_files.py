"""The files of one checkpoint: written with their digests, read only when all of them agree."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import socket
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TextIO

import jax

from unitscale_jax.checkpoint import _arrays, _outline
from unitscale_jax.checkpoint._leaves import Leaf, decode, encode, matched, other_model
from unitscale_jax.errors import check_encodable
from unitscale_jax.processes import agreed, rank, together

FORMAT = 3
OTHER_FORMAT = "it has format"  # how the one flaw begins that is no damage
_SUMS, _MANIFEST, _ARRAYS = "SHA256SUMS", "manifest.json", "arrays"


def write(path: pathlib.Path, manifest: "Manifest") -> None:
    """Writes a checkpoint to a new directory and forces it to the disk; every process calls this.

    Raises:
        ValueError: Process 0 has no part of some array.
        OSError: One process cannot write, or does not see the directory.
    """
    agreed(lambda: (path / _ARRAYS).mkdir(parents=True))
    _check_seen(path / _ARRAYS)
    arrays = {leaf.name: leaf.array for leaf in manifest.leaves if leaf.array is not None}
    written = together(lambda: _arrays.write(path / _ARRAYS, arrays))
    agreed(lambda: _seal(path, manifest, written))


class Manifest(NamedTuple):
    """The content of a checkpoint's manifest file."""

    step: int
    leaves: list[Leaf]
    outline: _outline.Outline

    @classmethod
    def of(cls, step: int, tree: Any) -> "Manifest":
        """The manifest of a tree, with its arrays.

        Raises:
            ValueError: UTF-8 has no bytes for the name of a leaf.
        """
        leaves = encode(tree)
        for leaf in leaves:
            check_encodable("the leaf", leaf.name)
        return cls(step, leaves, _outline.outline(tree))

    @classmethod
    def parsed(cls, text: bytes) -> "Manifest":
        """Reads a manifest from the JSON of its file.

        Raises:
            ValueError: It is none, or of another format.
        """
        found = json.loads(text)
        if not isinstance(found, dict) or type(found.get("format")) is not int:
            raise ValueError(f"{_MANIFEST} names no format")
        if found["format"] != FORMAT:
            raise ValueError(
                f"{OTHER_FORMAT} {found['format']}, this version reads format {FORMAT}"
            )
        if type(found.get("step")) is not int or not isinstance(found.get("leaves"), list):
            raise ValueError(f"{_MANIFEST} has no step or no leaves")
        leaves = [Leaf.from_description(fields) for fields in found["leaves"]]
        if len({leaf.name for leaf in leaves}) != len(leaves):
            raise ValueError(f"{_MANIFEST} has two leaves of one name")
        return cls(found["step"], leaves, _outline.parsed(found.get("outline", _outline.UNKNOWN)))

    def text(self) -> bytes:
        """Writes the manifest as JSON, one leaf to a line."""
        lines = ",\n".join(json.dumps(leaf.described()) for leaf in self.leaves)
        head = f'"format": {FORMAT}, "step": {self.step}, "outline": {json.dumps(self.outline)}'
        return f'{{{head}, "leaves": [\n{lines}\n]}}\n'.encode()


def read(path: pathlib.Path, like: Any) -> tuple[Any, str | None]:
    """Reads a checkpoint as `like` is; every process calls this.

    Returns:
        The tree and None; or None and why it cannot be read, on all processes.

    Raises:
        ValueError: It is of another model, or a sharding does not divide a leaf.
    """
    if not agreed((path / _SUMS).exists):
        return None, f"{_SUMS} is missing"
    _check_seen(path / _SUMS)
    manifest, flaw = _attempted(lambda: Manifest.parsed((path / _MANIFEST).read_bytes()))
    if flaw is not None:
        return None, flaw
    forms = []
    together(lambda: forms.extend(_matched(manifest, like, path.name)))
    return _attempted(lambda: decode(manifest.leaves, like, forms, path / _ARRAYS))


def _matched(manifest: Manifest, like: Any, where: str) -> list[Any]:
    forms = matched(manifest.leaves, like, where)
    if difference := _outline.difference(manifest.outline, _outline.outline(like)):
        raise other_model(where, difference)
    return forms


def _attempted(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """One's own result of a call that all make, or what failed on the first for which it did."""
    results = []

    def attempt() -> str | None:
        try:
            results.append(call())
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # which says nothing of the files
        except Exception as error:  # a parser may raise anything
            return _unreadable(error)
        return None

    flaw = next((flaw for flaw in together(attempt) if flaw is not None), None)
    return (results[0] if flaw is None else None), flaw


def _unreadable(error: Exception) -> str:
    is_sentence = type(error) is ValueError
    text = str(error) if is_sentence else f"{type(error).__name__}: {error}"
    return text if text.startswith(OTHER_FORMAT) else f"it is not readable ({text:.200})"


def flaw(path: pathlib.Path, step: int) -> str | None:
    """Says what is wrong with a checkpoint, if anything is; whatever fails is."""
    try:
        listing, found = (path / _SUMS).read_bytes(), _digests(path)
        if listing != _listing(found):
            return _difference(listing, found)
        manifest = Manifest.parsed((path / _MANIFEST).read_bytes())
        if manifest.step != step:
            return f"it is a renamed step {manifest.step}"
        forms = {leaf.name: leaf.form() for leaf in manifest.leaves}
        return _arrays.flaw(path / _ARRAYS, {n: f for n, f in forms.items() if f is not None})
    except Exception as error:
        missing = isinstance(error, FileNotFoundError) and error.filename
        return f"{pathlib.Path(missing).name} is missing" if missing else _unreadable(error)


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[bool]:
    """Holds the lock of a directory, which the kernel takes from a process that dies.

    Yields:
        Whether it is held; a disk that has no locks is warned of.

    Raises:
        RuntimeError: Another process saves here.
    """
    path = directory / "lock"
    with path.open("a+") as file:
        held = _lock(file, path)
        try:
            yield held
        finally:
            if held:
                fcntl.flock(file, fcntl.LOCK_UN)  # a child that was forked meanwhile has it, too


def _lock(file: TextIO, path: pathlib.Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = path.read_text().strip() or "another process"
        raise RuntimeError(
            f"{holder} is saving here, to {path.parent}. End it, or save to another directory."
        ) from None
    except OSError as error:
        warnings.warn(f"{path} cannot be locked ({error}); let one job save here.", stacklevel=2)
        return False
    file.truncate(0)
    file.write(f"process {os.getpid()} on host {socket.gethostname()}\n")
    file.flush()
    return True


def sync(path: pathlib.Path) -> None:
    """Forces a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_seen(path: pathlib.Path) -> None:
    """Checks that every process sees what process 0 does; an error on all if one does not."""

    def see() -> None:
        if not path.exists():
            raise FileNotFoundError(
                f"{path.parent} is not there for process {rank()}. Every process needs the same "
                "directory: name one on a disk that they share."
            )

    together(see)


def _seal(path: pathlib.Path, manifest: Manifest, written: list[dict[str, int]]) -> None:
    """Makes a checkpoint of what all processes have written."""
    _arrays.finish(path / _ARRAYS)
    for process, (name, size) in [(i, file) for i, w in enumerate(written) for file in w.items()]:
        file = path / _ARRAYS / name
        # orbax would take what it does not find for zeros.
        if not file.exists() or file.stat().st_size != size:
            raise OSError(
                f"{file} is not what process {process} wrote. Every process needs the same "
                "directory: name one on a disk that they share."
            )
    (path / _MANIFEST).write_bytes(manifest.text())
    (path / _SUMS).write_bytes(_listing(_digests(path)))
    for sealed in [*path.rglob("*"), path]:
        sync(sealed)


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
