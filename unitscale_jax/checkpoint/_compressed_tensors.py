"""Export to the compressed-tensors layout, which vLLM and transformers read.

    int-quantized      integers that meet integers       weight I8 (out, in)
    pack-quantized     integers, weight-only             weight_packed I32 (out, ceil(in b / 32))
    float-quantized    8-bit floats (e4m3fn)             weight F8_E4M3 (out, in)

each with weight_scale F32 (out, 1), or (out, in / g) by groups. A packed word holds the codes of
neighbours along `in` as q + 2^(b-1), the first in its lowest bits; weight_shape is [out, in].
Layout: https://github.com/vllm-project/compressed-tensors.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.checkpoint import _codes
from unitscale_jax.checkpoint._tensors import Stored, replace_file, stored_array, write
from unitscale_jax.quant import QSpec, QTensor, is_quantized

_WEIGHTS = ("kernel", "embedding", "scale")
_FLOAT = "float8_e4m3fn"


def torch_name(name: str) -> str:
    """The name of a parameter in torch: dots, and "weight" for what Flax calls otherwise.

    Example:
        >>> torch_name("encoder/layer_0/kernel"), torch_name("norm/scale"), torch_name("norm/bias")
        ('encoder.layer_0.weight', 'norm.weight', 'norm.bias')
    """
    *words, last = name.split("/")
    return ".".join([*words, "weight" if last in _WEIGHTS else last])


def export_compressed_tensors(
    folder: str | os.PathLike[str],
    params: Any,
    *,
    rename: Callable[[str], str] = torch_name,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Writes `model.safetensors` and `config.json` in the layout of compressed-tensors.

    Weights go from (in, out) to (out, in). A quantized one has two axes, or three that are one
    matrix, as those of attention's `DenseGeneral`: its contracted axes come first or last, and each
    side is flattened. (A convolution over one axis looks alike: leave it in floats.) A `kernel` of
    two axes that is not quantized is transposed too; everything else is written as it is. Codes of
    2 or 3 bits are stored as 4, those of 5 to 7 as 8, and the integers of groups are multiplied
    into their scales. What meets a weight is quantized by the program that reads it: for each token
    by its largest magnitude, or not at all.

    Args:
        folder: Is made if it is missing.
        params: A pytree with `QTensor` leaves, of one layer each.
        rename: Maps the path of a parameter to its name in the file. That of a quantized one ends
            in ".weight".
        config: Other entries of `config.json` (architecture, sizes). Those of a `config.json` that
            is there stay.

    Raises:
        ValueError: Nothing is quantized, two names are one, or the layout has no place for a
            parameter: not a matrix, asymmetric codes, e5m2, a calibrated or clipped activation.

    Example:
        >>> import json, pathlib, tempfile
        >>> rules = {"head/kernel": us.DotSpec(w=us.QSpec(format="int4", axes=(-2,)))}
        >>> served = us.quantize({"head": {"kernel": jnp.ones((16, 8))}}, rules)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export_compressed_tensors(folder, served)
        ...     written = json.loads(pathlib.Path(folder, "config.json").read_text())
        >>> written["quantization_config"]["format"]
        'pack-quantized'
    """
    stored: dict[str, Stored] = {}
    schemes: dict[str, list[str]] = {}
    ignore = []
    for name, leaf in trees.named_leaves(params, is_leaf=is_quantized).items():
        new = rename(name)
        if is_quantized(leaf):
            scheme, arrays = _exported(name, new, leaf)
            schemes.setdefault(json.dumps(scheme), []).append(new.removesuffix(".weight"))
        else:
            arrays = {new: _as_in_torch(name, stored_array(name, leaf))}
            if new.endswith(".weight") and len(leaf.shape) > 1:
                ignore.append(new.removesuffix(".weight"))
        for twice in sorted(arrays.keys() & stored.keys()):
            raise ValueError(f"{name} and another parameter are both renamed to {twice!r}.")
        stored |= arrays
    if not schemes:
        raise ValueError("no parameter is quantized; `quantize` them first, or `save` the tree.")
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    there = path / "config.json"
    entries = json.loads(there.read_text()) if there.exists() else {}
    entries |= {**(config or {}), "quantization_config": _config(schemes, ignore)}
    write(path / "model.safetensors", stored, {"format": "pt"})
    text = json.dumps(entries, indent=2).encode()
    replace_file(there, lambda opened: opened.write(text))


def _config(schemes: Mapping[str, list[str]], ignore: list[str]) -> dict[str, Any]:
    groups = [json.loads(text) | {"targets": targets} for text, targets in schemes.items()]
    formats = {group["format"] for group in groups}
    if len(formats) == 1:  # said once for all of them, as older readers expect
        groups = [{k: v for k, v in group.items() if k != "format"} for group in groups]
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{k}": group for k, group in enumerate(groups)},
        "ignore": ignore,
    }


def _exported(name: str, new: str, t: QTensor) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The scheme of a quantized parameter, and its arrays."""
    for reason in _reasons(new, t):
        raise ValueError(f"{name} ({t.spec}) does not fit the compressed-tensors layout: {reason}")
    w, x = t.spec.w, t.spec.x
    _codes.check_arrays(name, t)
    codes = _matrix(t, _codes.whole(name, "codes", t.codes, w))
    scale = _codes.whole(name, "scale", t.scale, w)
    if t.multiplier is not None:
        scale = _codes.whole(name, "multiplier", t.multiplier, w).astype(np.float32) * scale
    scale = _matrix(t, _over_outer_axes(t, scale))
    weights = _numbers(w) | {"strategy": "channel", "group_size": None, "dynamic": False}
    if w.group is not None and scale.shape[1] > 1:
        weights |= {"strategy": "group", "group_size": codes.shape[1] // scale.shape[1]}
    activations = None if x is None else _numbers(x) | {"strategy": "token", "dynamic": True}
    kind = _layout_name(w, x)
    arrays = {new: codes, f"{new}_scale": scale}
    if kind == "pack-quantized":
        arrays[f"{new}_packed"] = pack_int32(arrays.pop(new), weights["num_bits"])
        arrays[f"{new}_shape"] = np.asarray(codes.shape, np.int64)
    scheme = {"weights": weights, "input_activations": activations, "format": kind}
    return scheme, {key: stored_array(key, array) for key, array in arrays.items()}


def _layout_name(w: QSpec, x: QSpec | None) -> str:
    """The name of one of three layouts, by a weight's own format and by that of what it meets."""
    if not w.is_integer:
        return "float-quantized"
    return "pack-quantized" if x is None else "int-quantized"


def pack_int32(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (out, in) as words of 32 bits: q + 2^(b-1), the first lowest; padded by zero bits.

    Example:
        >>> words = pack_int32(np.array([[-7, -1, 0, 1, 2, 4, 7, -3, 5]]), 4)
        >>> [f"{word:08x}" for word in words.view(np.uint32)[0]]
        ['5fca9871', '0000000d']
    """
    rows, columns = codes.shape
    each = 32 // bits
    padded = np.zeros((rows, -(-columns // each) * each), np.uint32)
    padded[:, :columns] = codes.astype(np.int32) + 2 ** (bits - 1)
    shifted = padded.reshape(rows, -1, each) << (np.arange(each, dtype=np.uint32) * bits)
    return np.bitwise_or.reduce(shifted, axis=2).view(np.int32)


def _reasons(new: str, t: QTensor) -> Iterator[str]:
    w, x = t.spec.w, t.spec.x
    if not new.endswith(".weight"):
        yield f"it is renamed to {new!r}, which does not end in '.weight'; see `rename`."
    if t.ndim not in (2, 3) or _sides(t) is None:
        yield (
            f"its shape {t.shape} with axes {t.axes} is not one matrix. Export stacked layers one "
            "by one, as jax.tree.map(lambda x: x[k], params), or leave it in floats."
        )
    if not w.symmetric:
        yield "its codes are asymmetric; use QSpec(symmetric=True)."
    if any(not spec.is_integer and spec.code_dtype.name != _FLOAT for spec in (w, x) if spec):
        yield "of the 8-bit floats it has e4m3fn."
    if t.input_range is not None:
        yield "activations are quantized by each token; drop input_range: quantize without stats."
    if x is None:
        return
    if x.scale == "po2" or not x.calibrator.takes_the_maximum:
        yield "activations have free scales there, of the largest magnitude; use QSpec() for x."
    if x.is_integer and x.grid.bits not in (4, 8):
        yield "activations have 4 or 8 bits; use int4 or int8 for x."


def _sides(t: QTensor) -> bool | None:
    """True if the contracted axes come first, False if last; None for neither, or for all axes."""
    contracted = [k - t.ndim in t.axes for k in range(t.ndim)]
    for first in (True, False):
        if contracted == sorted(contracted, reverse=first) and not all(contracted):
            return first
    return None


def _matrix(t: QTensor, x: np.ndarray) -> np.ndarray:
    """An array of the rank of a parameter as (out, in)."""
    count = len(t.axes)
    if _sides(t):
        return x.reshape(math.prod(x.shape[:count]), -1).T
    return x.reshape(-1, math.prod(x.shape[-count:]))


def _over_outer_axes(t: QTensor, scale: np.ndarray) -> np.ndarray:
    """Scales of groups, which the outer contracted axes share, repeated for those."""
    if t.groups == 1:
        return scale
    outer = sorted(t.axes)[:-1]
    shape = [t.shape[k] if k - t.ndim in outer else n for k, n in enumerate(scale.shape)]
    return np.broadcast_to(scale, shape)


def _numbers(spec: QSpec) -> dict[str, Any]:
    bits = 4 if spec.grid.bits <= 4 else 8
    kind = "int" if spec.is_integer else "float"
    return {"num_bits": bits, "type": kind, "symmetric": spec.symmetric}


def _as_in_torch(name: str, stored: Stored) -> Stored:
    if name.rpartition("/")[2] != "kernel" or len(stored.shape) != 2:
        return stored
    return Stored(stored.dtype, stored.shape[::-1], lambda: stored.read().T)
