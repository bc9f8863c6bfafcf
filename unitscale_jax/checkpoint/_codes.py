"""A quantized array as it is stored: its arrays, what its spec says of them, and the spec as JSON.

The spec is the contract. From it follow which arrays there are, their shapes and dtypes and the
range of their values, and what differs is refused, whether it comes from a tree or from a file.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.errors import not_divisible
from unitscale_jax.formats import Format
from unitscale_jax.packing import pack_int4, unpack_int4
from unitscale_jax.quant import EMA, MSE, Absmax, DotSpec, Fixed, Group, Percentile, QSpec, QTensor

FIELDS = ("codes", "scale", "zero_point", "multiplier", "input_range")
"""What is stored; sums of codes are computed again."""

Shapes = Mapping[str, jax.ShapeDtypeStruct]
_KINDS = {
    kind.__name__: kind
    for kind in (DotSpec, QSpec, Group, Format, Absmax, EMA, MSE, Percentile, Fixed)
}
_F32, _I32, _I8 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.int8)


def check_arrays(where: str, t: QTensor) -> None:
    """Checks that the arrays of a QTensor are those of its spec, by shapes and dtypes.

    Raises:
        ValueError: They are not; the message names the first.
    """
    held = {field: getattr(t, field) for field in FIELDS if getattr(t, field) is not None}
    came = {field: jax.ShapeDtypeStruct(x.shape, x.dtype) for field, x in held.items()}
    _compare(where, t, came, _layout(where, t, came.get("input_range")))


def on_disk(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype an array of a QTensor is stored with: of four bits two to a byte."""
    shape, dtype = tuple(x.shape), np.dtype(x.dtype)
    if dtype.name != "int4":
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct((*shape[:-1], -(-shape[-1] // 2)), np.dtype(np.uint8))


def whole(where: str, field: str, x: Any, spec: QSpec) -> np.ndarray:
    """An array of a QTensor on the host, its values checked; codes of four bits in int8."""
    array = np.asarray(x)
    array = array.astype(np.int8) if array.dtype.name == "int4" else array
    flaw = _flaw(field, array, spec)
    if flaw:
        raise ValueError(f"{where}.{field} {flaw}. Quantize it again, or copy the file again.")
    return array


def encode(where: str, field: str, x: Any, spec: QSpec) -> np.ndarray:
    """An array of a QTensor as it is stored, its values checked."""
    array = whole(where, field, x, spec)
    return pack_int4(array) if np.dtype(x.dtype).name == "int4" else array


def decode(where: str, field: str, stored: np.ndarray, like: Any, spec: QSpec) -> np.ndarray:
    """The inverse of `encode`; `like` has the shape and dtype the array has in a QTensor."""
    if np.dtype(like.dtype).name != "int4":
        return whole(where, field, stored, spec)
    codes = whole(where, field, unpack_int4(stored, like.shape[-1]), spec)
    if not np.array_equal(pack_int4(codes), stored):
        raise ValueError(
            f"{where}.{field} is padded by something else than 0; copy the file again."
        )
    return codes.astype(like.dtype)


def describe(where: str, t: QTensor) -> str:
    """Spec, axes, dtype and shape as JSON.

    Raises:
        TypeError: The spec holds an object that JSON cannot name.
    """
    try:
        spec = to_json(t.spec)
    except TypeError as error:
        raise TypeError(f"{where}: {error}") from None
    rest = {"axes": list(t.axes), "dtype": np.dtype(t.dtype).name, "shape": list(t.shape)}
    return json.dumps({"spec": spec} | rest, sort_keys=True, separators=(",", ":"))


def described(where: str, text: str, stored: Shapes) -> QTensor:
    """The QTensor, of shapes and dtypes, that a description and what is stored beside it make.

    Args:
        where: Names it in errors.
        text: What `describe` wrote.
        stored: By field, the shapes and dtypes in the file.

    Raises:
        ValueError: The text is no description, or something else is stored than it says.
    """
    try:
        read = {key: from_json(value) for key, value in json.loads(text).items()}
        spec, axes, shape = (read.pop(key) for key in ("spec", "axes", "shape"))
        dtype = np.dtype(read.pop("dtype"))
        whole = all(type(n) is int for n in (*axes, *shape))
        if read or type(spec) is not DotSpec or not (whole and jnp.issubdtype(dtype, jnp.floating)):
            raise ValueError("expected a DotSpec, axes, a float dtype and a shape, no more")
    except Exception as error:  # what a spec makes of another's values may be any error
        raise ValueError(f"{where} has a spec that this version cannot read: {error}.") from None
    static = {"spec": spec, "axes": axes, "dtype": dtype}
    t = QTensor(jax.ShapeDtypeStruct(shape, spec.w.code_dtype), None, **static)
    arrays = _layout(where, t, stored.get("input_range"))
    _compare(where, t, stored, {field: on_disk(x) for field, x in arrays.items()})
    sums = spec.x is not None and not spec.x.symmetric
    code_sums = jax.ShapeDtypeStruct(arrays["scale"].shape, _I32) if sums else None
    return QTensor(**arrays, code_sums=code_sums, **static)


def to_json(x: Any) -> Any:
    """A spec as what JSON holds: an object is its class's name and its fields.

    Raises:
        TypeError: It holds an object that is not one of the library's.

    Example:
        >>> to_json(QSpec(calibrator=Percentile(99.9)).calibrator)
        {'type': 'Percentile', 'p': 99.9}
        >>> from_json(to_json(QSpec(group=Group(32)))) == QSpec(group=Group(32))
        True
    """
    if _KINDS.get(type(x).__name__) is type(x):
        return {"type": type(x).__name__} | {f.name: to_json(getattr(x, f.name)) for f in fields(x)}
    if isinstance(x, tuple):
        return [to_json(item) for item in x]
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, np.dtype | type):
        return np.dtype(x).name
    if x is None or isinstance(x, str | int | float):
        return x
    raise TypeError(f"{x!r} cannot be stored; a spec is made of {', '.join(_KINDS)}.")


def from_json(x: Any) -> Any:
    """The inverse of `to_json`, which makes nothing but the library's own specs.

    Raises:
        ValueError: A class or a field is unknown, or a value is refused.
    """
    if isinstance(x, list):
        return tuple(from_json(item) for item in x)
    if not isinstance(x, dict):
        return x
    values = {key: from_json(value) for key, value in x.items()}
    name = values.pop("type", None)
    kind = _KINDS.get(name) if isinstance(name, str) else None
    known = set() if kind is None else {f.name for f in fields(kind)}
    unknown = sorted(values.keys() - known)
    if kind is None or unknown:
        what = f"{name!r}" if kind is None else f"a field {unknown[0]!r} of {name}"
        raise ValueError(f"{what} is unknown to it")
    return kind(**values)


def _layout(where: str, t: QTensor, input_range: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays a QTensor has by its shape, spec and axes, and by `input_range` if it has one."""
    w, shape, axes, group = t.spec.w, t.shape, t.axes, t.spec.w.group
    if not axes or not all(-t.ndim <= axis < 0 for axis in axes):
        raise ValueError(f"{where} has shape {shape} and no axes {axes}; see QSpec(axes=...).")
    one = tuple(1 if k - t.ndim in axes else n for k, n in enumerate(shape))
    tiles = one
    if group is not None:
        inner = shape[max(axes)]
        if inner % group.size:
            says = not_divisible(
                f"{where} along axis {max(axes)}", inner, f"groups of {group.size}"
            )
            raise ValueError(f"{says} Quantize it by a group among them.")
        last = t.ndim + max(axes)
        tiles = (*one[:last], inner // group.size, *one[last + 1 :])
    integer = group is not None and group.scale == "integer"
    arrays: dict[str, tuple[tuple[int, ...], Any]] = {"codes": (shape, w.code_dtype)}
    arrays["scale"] = (one if integer else tiles, _F32)
    if not w.symmetric:
        arrays["zero_point"] = (one, _I32)
    if integer:
        arrays["multiplier"] = (tiles, _I8)
    if input_range is not None:
        arrays["input_range"] = ((*shape[: max(len(input_range.shape) - 1, 0)], 2), _F32)
    return {field: jax.ShapeDtypeStruct(s, d) for field, (s, d) in arrays.items()}


def _compare(where: str, t: QTensor, came: Shapes, expected: Shapes) -> None:
    for field in FIELDS:
        text, wanted = _text(came.get(field)), _text(expected.get(field))
        if text != wanted:
            raise ValueError(
                f"{where}.{field} is {text}, and {wanted} for {t.spec.w} of shape {t.shape} over "
                f"axes {t.axes}. Quantize it again."
            )


def _text(x: Any) -> str:
    return "missing" if x is None else f"{np.dtype(x.dtype)}[{','.join(map(str, x.shape))}]"


def _flaw(field: str, x: np.ndarray, w: QSpec) -> str | None:
    if x.dtype.kind == "i" and x.size:
        low, high = _range(field, w)
        least, most = int(x.min()), int(x.max())
        outside = least < low or most > high
        return f"has values from {least} to {most}, outside of [{low}, {high}]" if outside else None
    wide = x.astype(np.float32)
    if not np.isfinite(wide).all():
        return "has NaN or infinite values"
    if field == "scale" and (wide <= 0).any():
        return "has values that are not positive"
    if field == "input_range" and (wide[..., 0] > wide[..., 1]).any():
        return "has a lower end above the upper one"
    return None


def _range(field: str, w: QSpec) -> tuple[int, int]:
    """The least and the largest integer of a field; -Q - 1 is no code of a symmetric spec."""
    if field == "multiplier":
        return 1, w.most_multiplier
    signed = field == "codes" and w.symmetric
    return -w.max_code - (not signed), w.max_code
