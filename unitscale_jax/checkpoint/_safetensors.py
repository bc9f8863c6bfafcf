"""A tree of parameters in one safetensors file, quantized ones as codes and scales.

    kernel.codes         I8, U8 (up to four bits: two to a byte), F8_E4M3 or F8_E5M2
    kernel.scale         F32
    kernel.zero_point    I32    where codes are asymmetric
    kernel.multiplier    I8     where groups have integers
    kernel.input_range       F32    where the range of what meets it was calibrated
    bias                 what is not quantized, in its own dtype
    __metadata__         format, version, and "spec:kernel", JSON of its spec, axes, dtype, shape;
                         outline, the containers (`_outline`); sha256, of the file (`_tensors`)

A name is the path of a leaf, "encoder/layer_0/kernel". Codes of four bits and less are packed along
the last axis, the low nibble first, padded by a zero. This is version 1, and it stays as it is; its
first files had neither an outline nor a digest, and are read as nested dicts. Nothing in a file is
executed, and an array that does not fit the spec beside it is refused.
"""

import functools
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from unitscale_jax import tree as trees
from unitscale_jax.checkpoint import _codes, _leaves, _outline
from unitscale_jax.checkpoint._tensors import File, Stored, on_host, open_file, stored_array, write
from unitscale_jax.errors import closest
from unitscale_jax.quant import QSpec, QTensor, is_quantized

FORMAT, VERSION = "unitscale_jax", "1"
_SPEC, _OUTLINE = "spec:", "outline"


def save(path: str | os.PathLike[str], params: Any) -> None:
    """Writes a tree of arrays and quantized arrays to a safetensors file.

    The file appears when it is whole, and equal trees give equal bytes. For a training state (keys,
    Python numbers, the last few steps) take `Checkpoints`.

    Args:
        path: The file; its folder exists.
        params: A pytree of arrays and `QTensor` leaves; what is sharded is gathered.

    Raises:
        TypeError: A leaf is not an array of a dtype that a file holds, or a spec holds an object
            that is not the library's.
        ValueError: A `QTensor` does not fit its spec, or two arrays would have one name.

    Example:
        >>> import pathlib, tempfile
        >>> rules = {"w": us.DotSpec(w=us.QSpec(axes=(-2,)))}
        >>> served = us.quantize({"w": jnp.ones((4, 2)), "b": jnp.zeros(2)}, rules)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(pathlib.Path(folder, "model.safetensors"), served)
        ...     restored = load(pathlib.Path(folder, "model.safetensors"))
        >>> restored["w"], bool((restored["w"].codes == served["w"].codes).all())
        (QTensor((4, 2), float x int8, axes=(-2,), dtype=float32), True)
    """
    try:
        _save(pathlib.Path(path), params)
    except RecursionError:
        raise ValueError(
            f"the tree is nested deeper than Python's recursion limit of {sys.getrecursionlimit()} "
            "allows. Give the leaves a flatter tree, or raise it with sys.setrecursionlimit."
        ) from None


def _save(path: pathlib.Path, params: Any) -> None:
    leaves = trees.named_leaves(params, is_leaf=is_quantized)
    quantized = [name for name, leaf in leaves.items() if is_quantized(leaf)]
    reserved = {f"{name}.{field}" for name in quantized for field in _codes.FIELDS}
    for twice in sorted(reserved & leaves.keys()):
        raise ValueError(f"two arrays would be named {twice!r} in the file; rename that leaf.")
    stored: dict[str, Stored] = {}
    for name, leaf in leaves.items():
        stored |= (
            _stored_codes(name, leaf) if is_quantized(leaf) else {name: stored_array(name, leaf)}
        )
    specs = {_SPEC + name: _codes.describe(name, leaves[name]) for name in quantized}
    outline = _outline.to_text(_outline.outline(params, is_quantized))
    metadata = {"format": FORMAT, "version": VERSION, _OUTLINE: outline} | specs
    write(path, stored, metadata)


def load(path: str | os.PathLike[str], like: Any = None, *, abstract: bool = False) -> Any:
    """Reads what `save` wrote; neither the float model nor the rules are needed.

    Args:
        path: The file.
        like: A pytree of the structure, shapes and dtypes expected: arrays or
            `jax.ShapeDtypeStruct`, of the float model or of the quantized one. Arrays come back
            with the shardings that are committed there, scales as their codes. That of a compacted
            model is `jax.eval_shape(lambda p: us.compaction.compact(p, plan), params)`. Without it
            the tree comes back with its dicts (whatever mapping it was), their keys, lists and
            tuples; what has named fields as a tuple with those. `apply` of a bridged module takes
            it so.
        abstract: Reads the header alone, and returns shapes and dtypes in place of arrays.

    Returns:
        The tree, of JAX arrays and `QTensor` leaves.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: The path is that of a directory.
        ValueError: The file is damaged (a digest says so of any bit), not from `save`, or of
            another version; an array does not fit the spec beside it; the tree differs from `like`,
            with the first leaf that does; or without `like`, a container is one that only its own
            class makes.

    Law: load after save is the identity, bit for bit, specs included.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(pathlib.Path(folder, "b.safetensors"), {"head": {"b": jnp.zeros(2)}})
        ...     load(pathlib.Path(folder, "b.safetensors"), abstract=True)["head"]["b"].shape
        (2,)
    """
    file = _opened(pathlib.Path(path))
    found = _abstract_leaves(file)
    outline, wanted = None, dict.fromkeys(found)
    if like is None:
        outline = _outline_of(file, list(found))
    else:
        wanted = trees.named_leaves(like, is_leaf=is_quantized)
        _check_same(file.path, found, wanted)
    leaves = {name: _as_said(found[name], beside) for name, beside in wanted.items()}
    if not abstract:
        leaves = {name: _read(file, name, x, wanted[name]) for name, x in leaves.items()}
        file.check_digest()  # last: what has a name of its own for a flaw has said so by now
    if like is None:
        return _made(file.path, outline, leaves)
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=is_quantized), list(leaves.values()))


def _stored_codes(name: str, t: QTensor) -> dict[str, Stored]:
    if t.master is not None:
        raise ValueError(f"{name} is a QTensor inside of a trace; save outside of `quantized`.")
    _codes.check_arrays(name, t)
    held = {field: getattr(t, field) for field in _codes.FIELDS}
    out = {}
    for field, array in ((field, x) for field, x in held.items() if x is not None):
        like = _codes.on_disk(array)
        read = functools.partial(_read_codes, name, field, array, t.spec.w)
        out[f"{name}.{field}"] = Stored(like.dtype.name, like.shape, read)
    return out


def _read_codes(name: str, field: str, x: Any, spec: QSpec) -> np.ndarray:
    return _codes.encode(name, field, on_host(name, x), spec)


def _opened(path: pathlib.Path) -> File:
    file = open_file(path)
    form, version = file.metadata.get("format"), file.metadata.get("version")
    if form != FORMAT:
        raise ValueError(
            f"{path} was not written by `save`: its format is {form!r}, not {FORMAT!r}. Read it by "
            "safetensors.numpy.load_file."
        )
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version!r}, and this library reads version {VERSION!r}. Load it "
            "with the unitscale_jax that wrote it, or a newer one."
        )
    return file


def _abstract_leaves(file: File) -> dict[str, Any]:
    """Every leaf by name, as shapes and dtypes; what can be checked without values is."""
    found, plain = {}, dict(file.shapes)
    specs = {key: text for key, text in file.metadata.items() if key.startswith(_SPEC)}
    for name, text in ((key.removeprefix(_SPEC), text) for key, text in specs.items()):
        keys = {field: f"{name}.{field}" for field in _codes.FIELDS}
        stored = {field: plain.pop(key) for field, key in keys.items() if key in plain}
        found[name] = _codes.described(f"{file.path}: {name}", text, stored)
    for name in sorted(found.keys() & plain.keys()):
        raise ValueError(f"{file.path}: {name} is there twice, as codes and as an array.")
    return dict(sorted((found | plain).items()))


def _read(file: File, name: str, leaf: Any, like: Any = None) -> Any:
    """A leaf with its values; `like` says where it goes."""
    if not is_quantized(leaf):
        return _leaves.placed(_leaves.on_device(f"{file.path}: {name}", file.array(name)), like)
    where, spec = f"{file.path}: {name}", leaf.spec.w

    def values(field: str, x: Any) -> np.ndarray | None:
        if field == "code_sums":
            return None
        return _codes.decode(where, field, file.array(f"{name}.{field}"), x, spec)

    placed = _placed(leaf.over(values), like)
    if leaf.code_sums is None:
        return placed
    # The sums alone are jitted: the codes stay in place.
    sums = jax.jit(lambda t: t.with_sums().code_sums)(placed)
    return replace(placed, code_sums=sums)


def _placed(t: QTensor, like: Any) -> QTensor:
    """On the devices of `like`: each array as the one it replaces, or scales as their codes."""
    t = t.over(lambda _, x: jnp.asarray(x))
    if is_quantized(like):
        return t.over(lambda field, x: _leaves.placed(x, getattr(like, field)))
    codes = _leaves.placed(t.codes, like)
    if not getattr(codes, "committed", False):
        return t

    def moved(field: str, x: jax.Array) -> jax.Array:
        return x if field == "codes" else jax.device_put(x, _beside(codes, x))

    return replace(t, codes=codes).over(moved)


def _beside(codes: jax.Array, x: jax.Array) -> Any:
    """The sharding of codes for an array whose axes are those of the codes, or of size 1."""
    if not isinstance(codes.sharding, NamedSharding):
        return codes.sharding
    cut = (*codes.sharding.spec, *[None] * codes.ndim)
    same = [a if m == n else None for a, m, n in zip(cut, x.shape, codes.shape, strict=False)]
    spec = PartitionSpec(*same) if x.ndim == codes.ndim else PartitionSpec()
    return NamedSharding(codes.sharding.mesh, spec)


def _as_said(leaf: Any, like: Any) -> Any:
    """A leaf with the spec of `like`, equal but perhaps said in other words."""
    both = is_quantized(leaf) and is_quantized(like)
    return replace(leaf, spec=like.spec) if both else leaf


def _outline_of(file: File, found: list[str]) -> _outline.Outline:
    """The outline in a file; of nested dicts, by the words of the names, if it has none."""
    nested = _nested(file.path, found)
    if (text := file.metadata.get(_OUTLINE)) is None:
        return nested
    try:
        outline = _outline.from_text(text)
    except ValueError as error:
        raise ValueError(f"{file.path} was altered: of its outline, {error}.") from None
    if sorted(_outline.names(outline)) != sorted(found):
        raise ValueError(
            f"{file.path} was altered: its outline does not name the arrays that it holds."
        )
    return outline


def _made(path: pathlib.Path, outline: _outline.Outline, leaves: Mapping[str, Any]) -> Any:
    try:
        return _outline.made(outline, (leaves[name] for name in _outline.names(outline)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}. Load with `like`, the tree that was saved.") from None


def _nested(path: pathlib.Path, found: list[str]) -> _outline.Outline:
    if found == [""]:
        return _outline.LEAF
    root: dict[str, Any] = {}
    for name in found:
        *parents, last = name.split("/")
        node: Any = root
        for word in parents:
            node = node.setdefault(word, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            raise ValueError(
                f"{path}: {name} is a leaf inside of a leaf, which nested dicts have not. Load "
                "with `like`, the tree that was saved."
            )
        node[last] = _outline.LEAF
    return _outline.outline(root)


def _check_same(path: pathlib.Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for difference in _differences(found, wanted):
        raise ValueError(
            f"{path} is of another model: {difference}. Load with the model that was saved, or "
            "without `like`."
        )


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for name, like in wanted.items():
        if name not in found:
            near = closest(name, found)
            yield f"leaf {name!r}, {_text(like)}, is missing from it{near}"
        elif not _fits(found[name], like):
            yield f"leaf {name!r} is expected to be {_text(like)}, and is {_text(found[name])}"
    for name in (name for name in found if name not in wanted):
        near = closest(name, wanted)
        yield f"it has a leaf {name!r}, {_text(found[name])}, that is not expected{near}"


def _fits(leaf: Any, like: Any) -> bool:
    if is_quantized(like):
        return is_quantized(leaf) and _codes.describe("", leaf) == _codes.describe("", like)
    if not hasattr(like, "dtype"):
        return False
    return (leaf.dtype, leaf.shape) == (like.dtype, tuple(like.shape))


def _text(leaf: Any) -> str:
    if not hasattr(leaf, "dtype"):
        return f"a Python {type(leaf).__name__}"
    text = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return f"{text} as {leaf.spec} over axes {leaf.axes}" if is_quantized(leaf) else text
