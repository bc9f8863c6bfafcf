"""A tree of parameters in one safetensors file, quantized ones as codes and scales.

    kernel.codes         I8, U8 (up to four bits: two to a byte), F8_E4M3 or F8_E5M2
    kernel.scale         F32
    kernel.zero_point    I32    where codes are asymmetric
    kernel.multiplier    I8     where groups have integers
    kernel.x_range       F32    where the range of what meets it was calibrated
    bias                 what is not quantized, in its own dtype
    __metadata__         format, version, and "spec:kernel", JSON of its spec, axes, dtype, shape

A name is the path of a leaf, "encoder/layer_0/kernel". Codes of four bits and less are packed along
the last axis, the low nibble first, padded by a zero. This is version 1, and it stays as it is.
Nothing in a file is executed, and what does not fit the spec beside it is refused.
"""

import difflib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from unitscale_jax import tree as trees
from unitscale_jax.checkpoint import _files, _leaves
from unitscale_jax.formats import Format
from unitscale_jax.quantize import (
    EMA,
    MSE,
    Absmax,
    DotSpec,
    Fixed,
    Group,
    Percentile,
    QSpec,
    QTensor,
    is_quantized,
)
from unitscale_jax.quantize._ops import pack_int4, unpack_int4
from unitscale_jax.quantize._params import sum_codes

FORMAT, VERSION = "unitscale_jax", "1"
_SPEC = "spec:"
_KINDS = (DotSpec, QSpec, Group, Format, Absmax, EMA, MSE, Percentile, Fixed)
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    "BOOL": "bool",
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def save(path: str | os.PathLike[str], params: Any) -> None:
    """Writes a tree of arrays and quantized arrays to a safetensors file.

    The file appears when it is whole, and equal trees give equal bytes. For a training state (keys,
    Python numbers, the last few steps) take `Checkpoints`.

    Args:
        path: The file; its folder exists.
        params: A pytree of arrays and `QTensor` leaves; one that is sharded is gathered.

    Raises:
        TypeError: A leaf is not a numeric array, or a spec holds an object of yours.
        ValueError: A `QTensor` does not fit its spec, or two arrays would have one name.

    Example:
        >>> import tempfile, pathlib
        >>> rules = {"w": us.DotSpec(w=us.QSpec(axes=(-2,)))}
        >>> served = us.quantize({"w": jnp.ones((4, 2)), "b": jnp.zeros(2)}, rules)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(pathlib.Path(folder, "model.safetensors"), served)
        ...     restored = load(pathlib.Path(folder, "model.safetensors"))
        >>> restored["w"]
        QTensor((4, 2), float x int8, axes=(-2,), dtype=float32)
        >>> bool((us.dequantize(restored)["w"] == us.dequantize(served)["w"]).all())
        True
    """
    stored: dict[str, Stored] = {}
    metadata = {"format": FORMAT, "version": VERSION}
    for name, leaf in trees.named_leaves(params, is_leaf=is_quantized).items():
        new = {name: stored_array(name, leaf)}
        if is_quantized(leaf):
            metadata[_SPEC + name] = _described(name, leaf)
            new = dict(_stored_codes(name, leaf))
        for twice in new.keys() & stored.keys():
            raise ValueError(f"two arrays would be stored as {twice!r}; rename one of the leaves.")
        stored |= new
    write(pathlib.Path(path), stored, metadata)


def load(path: str | os.PathLike[str], like: Any = None, *, abstract: bool = False) -> Any:
    """Reads what `save` wrote; neither the float model nor the rules are needed.

    Args:
        path: The file.
        like: A pytree of the structure, shapes and dtypes expected: arrays or
            `jax.ShapeDtypeStruct`, of the float model or of the quantized one. Arrays come back
            with the shardings that are committed there; scales follow their codes. Without it the
            tree comes back as nested dicts, by the words of the names.
        abstract: Reads the header alone, and returns shapes and dtypes for arrays.

    Returns:
        The tree, of JAX arrays and `QTensor` leaves.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, not from `save`, or of another version; an array does not
            fit the spec beside it; or the tree is not like `like`, with the first leaf that differs.

    Law: load after save is the identity, bit for bit, specs included.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(pathlib.Path(folder, "b.safetensors"), {"head": {"b": jnp.zeros(2)}})
        ...     load(pathlib.Path(folder, "b.safetensors"), abstract=True)
        {'head': {'b': ShapeDtypeStruct(shape=(2,), dtype=float32)}}
    """
    file = _open(pathlib.Path(path))
    found = dict(_abstract_leaves(file))
    if like is None:
        whole = found if abstract else {name: _read(file, name, x) for name, x in found.items()}
        return _nested(file.path, whole)
    wanted = trees.named_leaves(like, is_leaf=is_quantized)
    for difference in _differences(found, wanted):
        raise ValueError(
            f"{file.path} is of another model: {difference}. Load with the model that was saved, "
            "or without `like`."
        )
    leaves = []
    for name, beside in wanted.items():
        leaf = found[name]
        if is_quantized(leaf) and is_quantized(beside):
            leaf = replace(leaf, spec=beside.spec)  # equal, but perhaps another way to say it
        leaves.append(leaf if abstract else _placed(_read(file, name, leaf), beside))
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=is_quantized), leaves)


# Arrays and bytes.


class Stored(NamedTuple):
    """An array to be written: its dtype by safetensors' name, its shape, and how to get it."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def stored_array(name: str, leaf: Any) -> Stored:
    """An array as it is written: its own bits.

    Raises:
        TypeError: It is no array of a dtype that safetensors has.
    """
    dtype = str(getattr(leaf, "dtype", None))
    if is_quantized(leaf) or isinstance(leaf, jax.Array | np.ndarray | np.generic):
        _check_here(name, leaf)
        if is_quantized(leaf) or dtype in _NAMES:
            return Stored(_NAMES.get(dtype, ""), tuple(leaf.shape), lambda: np.asarray(leaf))
    came = f"an array of {dtype}" if hasattr(leaf, "shape") else f"a {type(leaf).__name__}"
    raise TypeError(
        f"{name} is {came}, which a safetensors file does not hold. It holds arrays of "
        f"{', '.join(_NAMES)}; cast it, leave it out, or save a training state by `Checkpoints`."
    )


def write(path: pathlib.Path, stored: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, all of it or nothing; one array at a time is on the host.

    The writer of the safetensors package puts metadata in an order of chance, and so gives other
    bytes each time.
    """
    size = lambda name: np.dtype(_DTYPES[stored[name].dtype]).itemsize
    order = sorted(stored, key=lambda name: (-size(name), name))  # which aligns every array
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in order:
        start, end = end, end + size(name) * math.prod(stored[name].shape)
        dtype, shape, _ = stored[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = _compact(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                opened.write(stored[name].read().tobytes())
        _files.sync(unfinished)
        os.replace(unfinished, path)
        _files.sync(path.absolute().parent)
    finally:
        unfinished.unlink(missing_ok=True)


class _File(NamedTuple):
    path: pathlib.Path
    metadata: dict[str, str]
    header: dict[str, dict[str, Any]]
    start: int

    def has(self, name: str) -> bool:
        return name in self.header

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.header[name]["shape"])

    def dtype(self, name: str) -> np.dtype:
        dtype = self.header[name]["dtype"]
        if dtype not in _DTYPES:
            raise ValueError(f"{self.path}: {name} is {dtype}, which version {VERSION} has not.")
        return np.dtype(_DTYPES[dtype])

    def array(self, name: str) -> np.ndarray:
        start, end = self.header[name]["data_offsets"]
        found = np.fromfile(self.path, np.uint8, end - start, offset=self.start + start)
        return found.view(self.dtype(name)).reshape(self.shape(name))


def _open(path: pathlib.Path) -> _File:
    try:
        with safe_open(path, "np") as opened:  # which checks the header against the file
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no whole safetensors file ({error}). It was cut short, or it is of another "
            "kind; copy it again."
        ) from None
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} was not written by `save`: its format is {metadata.get('format')!r}, not "
            f"{FORMAT!r}. Read it by safetensors.numpy.load_file."
        )
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {metadata.get('version')!r}, and this library reads {VERSION!r}. "
            "Load it with the unitscale_jax that wrote it, or a newer one."
        )
    # The package's NumPy interface has no 8-bit floats, so bytes are read by their offsets here.
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    del header["__metadata__"]
    return _File(path, metadata, header, 8 + length)


# Quantized arrays: what a spec says of them, and what a file has.


def layout(t: QTensor) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays that a QTensor has by its shape, spec and axes, without what is optional."""
    w, shape, last = t.spec.w, t.shape, max(t.axes)
    one = tuple(1 if k - t.ndim in t.axes else n for k, n in enumerate(shape))
    tiled = list(one)
    if w.group is not None:
        tiled[last] = shape[last] // w.group.size
    integer = w.group is not None and w.group.scale == "integer"
    of = jax.ShapeDtypeStruct
    arrays = {
        "codes": of(shape, w.code_dtype),
        "scale": of(one if integer else tuple(tiled), np.dtype(np.float32)),
    }
    if not w.symmetric:
        arrays["zero_point"] = of(one, np.dtype(np.int32))
    if integer:
        arrays["multiplier"] = of(tuple(tiled), np.dtype(np.int8))
    return arrays


def _check_arrays(where: str, t: QTensor) -> None:
    """Whether the arrays of a QTensor, or their shapes and dtypes, are those of its spec."""
    axes, ndim, group = t.axes, t.ndim, t.spec.w.group
    if not axes or not all(-ndim <= axis < 0 for axis in axes):
        raise ValueError(f"{where} has shape {t.shape} and no axes {axes}; see QSpec(axes=...).")
    if group is not None and t.shape[max(axes)] % group.size:
        raise ValueError(
            f"{where} has {t.shape[max(axes)]} elements along axis {max(axes)}, which groups of "
            f"{group.size} do not divide."
        )
    wanted = layout(t)
    if t.x_range is not None:
        stacked = t.shape[: max(len(t.x_range.shape) - 1, 0)]
        wanted["x_range"] = jax.ShapeDtypeStruct((*stacked, 2), np.dtype(np.float32))
    for field in ("codes", "scale", "zero_point", "multiplier", "x_range"):
        came, expected = _label(getattr(t, field)), _label(wanted.get(field))
        if came != expected:
            raise ValueError(
                f"{where}.{field} is {came}; of shape {t.shape}, {t.spec.w} over axes {axes} has "
                f"{expected}. Quantize it again."
            )


def _check_values(where: str, field: str, x: np.ndarray, w: QSpec) -> None:
    """Whether numbers are in the range that a spec gives them."""
    below = np.zeros(())
    if field == "codes" and w.is_integer:
        below, above = (-w.max_code if w.symmetric else -w.max_code - 1), w.max_code
    elif field == "zero_point":
        below, above = -w.max_code - 1, w.max_code
    elif field == "multiplier":
        below, above = 1, w.most_multiplier
    else:
        wide = x.astype(np.float32)
        if not np.isfinite(wide).all():
            raise ValueError(f"{where}.{field} has NaN or infinite values; quantize it again.")
        if field == "scale" and not (wide > 0).all():
            raise ValueError(f"{where}.scale has values that are not positive; quantize it again.")
        if field == "x_range" and not (wide[..., 0] <= wide[..., 1]).all():
            raise ValueError(f"{where}.x_range has a lower end above the upper; calibrate again.")
        return
    if x.size and not below <= int(x.min()) <= int(x.max()) <= above:
        raise ValueError(
            f"{where}.{field} has values from {x.min()} to {x.max()}, and those of {w} are in "
            f"[{below}, {above}]; quantize it again."
        )


def _stored_codes(name: str, t: QTensor) -> Iterator[tuple[str, Stored]]:
    if t.latent is not None:
        raise ValueError(f"{name} is a QTensor inside of a trace; save outside of `quantized`.")
    _check_arrays(name, t)
    for field, dtype, shape in _on_disk(t):
        array = getattr(t, field)
        _check_here(f"{name}.{field}", array)

        def read(field: str = field, array: Any = array, packed: bool = dtype == "U8") -> Any:
            x = np.asarray(array)
            x = x.astype(np.int8) if packed else x
            _check_values(name, field, x, t.spec.w)
            return pack_int4(x) if packed else x

        yield f"{name}.{field}", Stored(dtype, shape, read)


def _on_disk(t: QTensor) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Field, dtype and shape of what a QTensor is stored as."""
    for field in ("codes", "scale", "zero_point", "multiplier", "x_range"):
        array = getattr(t, field)
        if array is None:
            continue
        shape, dtype = tuple(array.shape), str(array.dtype)
        if dtype == "int4":
            yield field, "U8", (*shape[:-1], -(-shape[-1] // 2))
        else:
            yield field, _NAMES[dtype], shape


def _described(name: str, t: QTensor) -> str:
    try:
        spec = to_json(t.spec)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    described = {"spec": spec, "axes": list(t.axes), "shape": list(t.shape)}
    return _compact(described | {"dtype": np.dtype(t.dtype).name})


def _abstract_leaves(file: _File) -> Iterator[tuple[str, Any]]:
    """Every leaf by name, of shapes and dtypes; all that can be checked without values is."""
    left = dict.fromkeys(file.header)
    found = {}
    for key, text in file.metadata.items():
        if key.startswith(_SPEC):
            name = key.removeprefix(_SPEC)
            found[name] = _abstract_codes(file, name, text)
            for field, _, _ in _on_disk(found[name]):
                del left[f"{name}.{field}"]
    for name in left:
        owner, _, field = name.rpartition(".")
        if name in found or (owner in found and field in ("zero_point", "multiplier")):
            raise ValueError(f"{file.path}: {name} has no place beside the spec of that leaf.")
        found[name] = jax.ShapeDtypeStruct(file.shape(name), file.dtype(name))
    yield from sorted(found.items())


def _abstract_codes(file: _File, name: str, text: str) -> QTensor:
    where = f"{file.path}: {name}"
    try:
        described = json.loads(text)
        spec, axes, shape = (from_json(described[key]) for key in ("spec", "axes", "shape"))
        dtype = np.dtype(described["dtype"])
        whole = (*axes, *shape)
        if not isinstance(spec, DotSpec) or not all(isinstance(n, int) for n in whole):
            raise ValueError("it is not of a DotSpec, axes and a shape")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"a quantized array stands for floats, not {dtype}")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where} has a spec that cannot be read: {error}.") from None
    codes = jax.ShapeDtypeStruct(shape, spec.w.code_dtype)
    t = QTensor(codes, None, spec=spec, axes=axes, dtype=dtype)
    _check_axes_only = replace(t, **_without_codes(t)) if _has_axes(t) else t
    t = _check_axes_only
    if file.has(f"{name}.x_range"):
        key = f"{name}.x_range"
        t = replace(t, x_range=jax.ShapeDtypeStruct(file.shape(key), file.dtype(key)))
    _check_arrays(where, t)
    return t


def _read(file: _File, name: str, leaf: Any) -> Any:
    raise NotImplementedError
