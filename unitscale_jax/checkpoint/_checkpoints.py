"""The checkpoints of a run: which there are, which is restored, which may go."""

import contextlib
import operator
import os
import pathlib
import re
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from unitscale_jax.checkpoint import _files
from unitscale_jax.processes import agreed, rank

_UNFINISHED = "unfinished_"


class Checkpoints:
    """The checkpoints of one run, in one directory.

    Any pytree can be saved: parameters, an optimiser state, a loss scale, typed random keys, the
    position in the data. Leaves are arrays of any numeric dtype (8-bit floats and 4-bit integers
    included), typed keys, and Python's `int`, `float`, `bool` and `str`. Arrays may be spread over
    devices in any way; orbax stores them shard by shard, and nothing is gathered.

    With several processes the directory is on a disk that they share, and every process calls
    every method, in the same order. Each writes its shards and reads what its devices need; of
    what each has for itself, NumPy's arrays and Python's scalars, process 0's is saved. All go on
    from the checkpoint that process 0 finds whole, and an error of one is an error on all.

    Laws: restore after save is the identity, bit for bit and with its containers, on any mesh and
    with any number of processes, or an error; a process killed at any moment leaves the last
    completed save whole and no lock; a checkpoint of which one byte changed is refused. What a
    process writes or reads, its own shards, may all be in the memory of its host at once.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> checkpoints = Checkpoints(folder.name, keep=2)
        >>> run = {"w": jnp.ones(3, jnp.bfloat16), "key": jax.random.key(0), "position": 0}
        >>> for step in range(3):
        ...     checkpoints.save(step, run | {"position": 10 * step})
        >>> checkpoints.steps()
        [1, 2]
        >>> step, restored = checkpoints.restore(run)
        >>> step, restored["position"], restored["w"].dtype
        (2, 20, dtype(bfloat16))
        >>> folder.cleanup()
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 3):
        """Names the directory; the first save creates it.

        Args:
            directory: Where the checkpoints are.
            keep: How many stay; 3 leaves two to fall back to should the newest be damaged.

        Raises:
            ValueError: `keep` is not at least 1.
        """
        if keep < 1:
            raise ValueError(f"keep={keep}, expected at least 1: the newest checkpoint stays.")
        self.directory = pathlib.Path(directory).absolute()
        self.keep = keep

    def __repr__(self) -> str:
        """The call that makes this object."""
        return f"Checkpoints({str(self.directory)!r}, keep={self.keep})"

    def steps(self) -> list[int]:
        """The steps that were saved to the end, in order; `restore` finds out which are whole."""
        return agreed(lambda: sorted({found.step for found in _newest_first(self.directory)}))

    def save(self, step: int, tree: Any) -> None:
        """Saves a pytree, then removes all but the newest `keep` checkpoints.

        Returns when the checkpoint is on the disk. Saving the newest step again replaces it.
        Damaged checkpoints of later steps, those a restore has passed over, are removed. While it
        saves, it holds the lock of the directory, `directory/lock`.

        Args:
            step: A natural number.
            tree: Any pytree of the leaves above.

        Raises:
            ValueError: A later checkpoint is whole, so this run did not start from it; or two
                leaves have one name; or an array lies on other processes alone, not on process 0.
            TypeError: A leaf is neither a numeric array, nor a key, nor a Python scalar.
            RuntimeError: Another run is saving here; the message names its process and host.
            OSError: There is no space left, or a process cannot write.
        """
        manifest = _files.Manifest.of(_natural(step), tree)
        with self._locked() as unfinished:
            passed_over = agreed(
                lambda: [found.name for found in self._damaged_after(manifest.step)]
            )
            try:
                _files.write(unfinished, manifest)
                agreed(lambda: self._finish(unfinished, manifest.step, passed_over))
            except Exception:
                if rank() == 0:
                    shutil.rmtree(unfinished, ignore_errors=True)  # a full disk needs the space
                raise

    def restore(self, like: Any) -> tuple[int, Any]:
        """Restores the newest checkpoint that is whole.

        Args:
            like: A pytree of the structure, shapes and dtypes to restore: what a new run would
                start from, or `jax.eval_shape` of it. A leaf comes back as what it is in `like`: a
                NumPy array, a Python scalar, or a JAX array, this with its sharding if the leaf
                is committed to one; a `jax.ShapeDtypeStruct` may say one. Without
                `jax_enable_x64`, JAX has no 64 bits: an abstract leaf of 64 bits comes back in
                NumPy, and a Python number that 32 bits do not hold as it was.

        Returns:
            `(step, tree)`.

        Raises:
            FileNotFoundError: Nothing was saved to the end.
            ValueError: Every checkpoint is damaged, each listed with its flaw; or the checkpoint
                is of another model, with the name of the first leaf or of the first container (a
                list, an optimizer's state) that differs; or a sharding does not divide its leaf.

        Warns:
            UserWarning: A newer checkpoint is damaged, or could not be read, and was passed over.
        """
        refused: dict[str, str] = {}
        while True:
            name, step, flaw = agreed(lambda: self._next(refused))
            tree, flaw = (None, flaw) if flaw else _files.read(self.directory / name, like)
            if flaw is None:
                if refused:
                    warnings.warn(_passed_over(name, refused), stacklevel=2)
                return step, tree
            refused[name] = flaw

    def _next(self, refused: Mapping[str, str]) -> tuple[str, int, str | None]:
        """The newest checkpoint but those, and its flaw; another run may add and remove some."""
        for found in _newest_first(self.directory):
            if found.path.name not in refused:
                return found.path.name, found.step, _files.flaw(found.path, found.step)
        raise _nothing_to_restore(self.directory, refused)

    def _damaged_after(self, step: int) -> list[pathlib.Path]:
        later = [found for found in _newest_first(self.directory) if found.step > step]
        for found in later:
            flaw = _files.flaw(found.path, found.step)
            if flaw is None or flaw.startswith(_files.OTHER_FORMAT):
                raise ValueError(
                    f"saving step {step}, but {self.directory} holds the later {found.path.name}, "
                    "so this run did not start from it. Restore it first, remove it, or save to "
                    "another directory."
                )
        return [found.path for found in later]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[pathlib.Path]:
        """Holds the lock, on process 0; gives the folder of what is not yet finished."""
        with contextlib.ExitStack() as until_done:
            yield self.directory / agreed(lambda: self._lock(until_done))

    def _lock(self, until_done: contextlib.ExitStack) -> str:
        self.directory.mkdir(parents=True, exist_ok=True)
        is_locked = until_done.enter_context(_files.locked(self.directory))
        # With the lock, whoever left something is dead; without, that is known of oneself alone.
        for leftover in self.directory.glob(f"{_UNFINISHED}{'*' if is_locked else _mine('*')}"):
            shutil.rmtree(leftover)
        return f"{_UNFINISHED}{_mine()}"

    def _finish(self, unfinished: pathlib.Path, step: int, passed_over: list[str]) -> None:
        self._publish(unfinished, self.directory / f"step_{step:08d}")
        self._remove(*(self.directory / name for name in passed_over))
        self._remove(*(found.path for found in _newest_first(self.directory)[self.keep :]))

    def _publish(self, unfinished: pathlib.Path, final: pathlib.Path) -> None:
        aside = final.with_name(f"{final.name}~")
        if final.exists():
            # No rename replaces a directory that has files, and at no moment may there be none to
            # restore: under its second name the old one stays valid until the new one stands.
            self._remove(aside)
            final.rename(aside)
        unfinished.rename(final)
        _files.sync(self.directory)
        self._remove(aside)

    def _remove(self, *paths: pathlib.Path) -> None:
        for path in filter(pathlib.Path.exists, paths):
            # Renamed first: a removal killed halfway must not leave what looks like a checkpoint.
            doomed = path.rename(path.with_name(f"{_UNFINISHED}{_mine(path.name)}"))
            shutil.rmtree(doomed)


def _mine(name: str = "") -> str:
    """A name that no other process gives."""
    return f"{socket.gethostname()}_{os.getpid()}_{name}"


class _Found(NamedTuple):
    step: int
    replaces: bool  # over one of the same step that was set aside, `step_00000300~`
    path: pathlib.Path


def _newest_first(directory: pathlib.Path) -> list[_Found]:
    matches = [(re.fullmatch(r"step_(\d+)(~?)", p.name), p) for p in directory.glob("step_*")]
    found = [_Found(int(match[1]), not match[2], path) for match, path in matches if match]
    return sorted(found, reverse=True)


def _natural(step: int) -> int:
    step = operator.index(step)
    if step < 0:
        raise ValueError(f"step {step} is negative. Number the steps from 0.")
    return step


def _passed_over(name: str, refused: Mapping[str, str]) -> str:
    listed = "; ".join(f"{other}: {flaw}" for other, flaw in refused.items())
    return f"restored {name}, since what is newer is damaged: {listed}."


def _nothing_to_restore(directory: pathlib.Path, refused: Mapping[str, str]) -> Exception:
    if not refused:
        return FileNotFoundError(
            f"{directory} holds no checkpoint. Check the path, or start a new run; `steps()` is "
            "empty then."
        )
    listed = "\n  ".join(f"{name}: {flaw}" for name, flaw in refused.items())
    return ValueError(
        f"every checkpoint in {directory} is damaged:\n  {listed}\n"
        "Bring one back from a copy, or start a new run in another directory."
    )
