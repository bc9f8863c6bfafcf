"""Text for the examples, and the scores to beat on it: an interpolated byte n-gram, and xz.

The text is the source of the Python standard library, which every machine has, or any file or
folder. Whole files are held out, by their names, so that no order of files and no copy of a line
decides what is tested.
"""

import dataclasses
import fnmatch
import hashlib
import lzma
import os
import pathlib
import platform
import sysconfig
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

# Tables, and files that differ from one build of Python to the next, teach nothing.
DROPPED = (
    *("encodings", "pydoc_data", "lib2to3", "distutils", "idlelib", "tkinter", "turtledemo"),
    *("ensurepip", "sitecustomize", "_sysconfigdata*", "config-*"),
)
HELD_OUT = {"email", "json", "logging", "unittest", "xml", "enum", "tarfile"}
HELD_OUT |= {"threading", "traceback"}
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "test", "tests", "idle_test"}
FOLDS = 10  # of a folder's files, one in ten is held out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text split by file: what a model may learn from, and what it is tested on."""

    identity: str
    train_files: Sequence[str]
    test_files: Sequence[str]
    train: np.ndarray  # uint8 (bytes,)
    test: np.ndarray  # uint8 (bytes,)

    def first_of_test(self, count: int | None) -> "Corpus":
        """The corpus with no more than `count` bytes to test on."""
        return dataclasses.replace(self, test=self.test[:count])

    def __str__(self) -> str:
        parts = [
            f"{role} {len(text) / 1e6:.2f} MB in {len(files)} file{'s' if len(files) > 1 else ''}"
            for role, text, files in (
                ("train", self.train, self.train_files),
                ("test", self.test, self.test_files),
            )
        ]
        return f"{self.identity}: {', '.join(parts)}"


def standard_library() -> Corpus:
    """The standard library's source; the split is by top-level name (`email`, `json`, ...)."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = [name for name in walk(root) if name.endswith(".py") and not dropped(top_level(name))]
    held_out = {name for name in names if top_level(name) in HELD_OUT}
    return read(f"standard library of Python {platform.python_version()}", root, names, held_out)


def files_below(path: pathlib.Path) -> Corpus:
    """A folder's text files, one in `FOLDS` of them held out; or a file, its end held out.

    Raises:
        ValueError: There is no text, or too little to hold any of it out.
    """
    if path.is_file():
        return one_file(path)
    if not path.is_dir():
        raise ValueError(f"{path} does not exist. Name a file or a folder of text files.")
    names = [name for name in walk(path) if is_text(path / name)]
    if len(names) < 2:
        raise ValueError(f"{path} holds {len(names)} text files; holding out needs two or more.")
    held_out = {name for name in names if fold(name) == 0} or {min(names, key=digest)}
    if len(held_out) == len(names):  # a few names can all fall in fold 0
        held_out.discard(max(names, key=digest))
    return read(str(path), path, names, held_out)


def one_file(path: pathlib.Path) -> Corpus:
    """The first nine tenths of a file train and the last tests, since no whole file is left."""
    text = np.fromfile(path, np.uint8)
    cut = len(text) - len(text) // FOLDS
    if cut == len(text):
        raise ValueError(f"{path} holds {len(text)} bytes, too few to hold out a tenth of them.")
    name = path.name
    return Corpus(
        identity=str(path),
        train_files=[f"{name}, first nine tenths"],
        test_files=[f"{name}, last tenth"],
        train=text[:cut],
        test=text[cut:],
    )


def read(identity: str, root: pathlib.Path, names: Sequence[str], held_out: set[str]) -> Corpus:
    train_files = [name for name in names if name not in held_out]
    test_files = [name for name in names if name in held_out]
    concatenate = lambda some: np.frombuffer(
        b"".join((root / name).read_bytes() for name in some), np.uint8
    )
    corpus = Corpus(
        identity=identity,
        train_files=train_files,
        test_files=test_files,
        train=concatenate(train_files),
        test=concatenate(test_files),
    )
    if not (corpus.train.size and corpus.test.size):
        raise ValueError(f"{identity} holds no text on one side of the split: {corpus}.")
    return corpus


def walk(root: pathlib.Path) -> Iterator[str]:
    """Names of files relative to `root`: sorted, and a folder's files before its sub-folders."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name for name in folders if name not in SKIPPED_FOLDERS and name[0] != "."
        )
        for name in sorted(files):
            yield (pathlib.Path(folder) / name).relative_to(root).as_posix()


def is_text(path: pathlib.Path) -> bool:
    """Whether a file is not empty and holds no zero byte, which text never does."""
    if path.name.startswith(".") or not path.is_file():
        return False
    text = path.read_bytes()
    return bool(text) and b"\0" not in text


def top_level(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def dropped(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in DROPPED)


def digest(key: str) -> int:
    return int(hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest(), 16)


def fold(key: str, folds: int = FOLDS) -> int:
    """A number below `folds`, a function of the name alone: the same on every machine."""
    return digest(key) % folds


# --- the scores to beat -------------------------------------------------------------------------


def xz_bits(text: np.ndarray) -> float:
    """Bits per byte of `xz -9` on the text alone: it learns from what it has packed so far."""
    return 8 * len(lzma.compress(text.tobytes(), preset=9)) / len(text)


def ngram_bits(train: np.ndarray, test: np.ndarray, orders: Iterable[int]) -> dict[int, float]:
    """Bits per byte of the test text under byte n-grams; order n looks back n bytes."""
    wanted = set(orders)
    return {
        order: float(-np.mean(np.log2(probability)))
        for order, probability in enumerate(witten_bell(train, test, max(wanted)))
        if order in wanted
    }


def witten_bell(train: np.ndarray, test: np.ndarray, order: int) -> Iterator[np.ndarray]:
    """Yields, for the orders 0 to `order`, the probability of each byte of `test`: f64 (bytes,).

        p(c | h) = (N(h c) + T(h) p(c | h')) / (N(h) + T(h))

    N counts in `train`, T(h) is the number of different bytes seen after h, h' is h less its
    oldest byte, and below order 0 all 256 bytes are equally likely. After a context that was
    never seen, or at the start of the text, the shorter context decides.
    Source: Witten and Bell, 1991, "The zero-frequency problem", method C, interpolated.
    """
    probability = np.full(len(test), 1 / 256)
    for n in range(order + 1):
        grams, occurrences = np.unique(packed(train, n + 1), return_counts=True)
        contexts, first = np.unique(grams >> 8, return_index=True)  # grams are sorted, so in runs
        seen = np.add.reduceat(occurrences, first) if first.size else occurrences
        different = np.diff(first, append=len(grams))

        queries, where = np.unique(packed(test, n + 1), return_inverse=True)  # few are different
        count = looked_up(grams, occurrences, queries)[where]
        total, kinds = (looked_up(contexts, v, queries >> 8)[where] for v in (seen, different))
        shorter = probability[n:]
        longer = (count + kinds * shorter) / np.maximum(total + kinds, 1)
        probability = np.concatenate([probability[:n], np.where(total > 0, longer, shorter)])
        yield probability


def packed(text: np.ndarray, n: int) -> np.ndarray:
    """Every run of n bytes as one integer, the first byte on top: (bytes - n + 1,), n <= 8."""
    dtype = np.uint32 if n <= 4 else np.uint64
    grams = np.zeros(max(len(text) - n + 1, 0), dtype)
    for i in range(n):
        grams = (grams << 8) | text[i : i + len(grams)]
    return grams


def looked_up(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """`values` at the place of each query among the sorted keys, and 0 where it is not there."""
    if not keys.size:
        return np.zeros(len(queries), values.dtype)
    place = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[place] == queries, values[place], 0)
