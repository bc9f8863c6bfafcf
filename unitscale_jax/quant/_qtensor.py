"""QTensor: an array as codes and scales, where the array was.

    value = (codes - zero_point) * multiplier * scale

A pytree node, so it passes through jit, loops, sharding and checkpoints; and a `tree.Compound`, so
whoever treats a tree by its arrays sees one array of a shape and a dtype.
"""

import functools
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.fwd_bwd import straight_through
from unitscale_jax.quant._ops import repeat_groups, round_and_cast, tiled
from unitscale_jax.quant._spec import DotSpec
from unitscale_jax.typing import DType

ARRAYS = ["codes", "scale", "zero_point", "multiplier", "code_sums", "input_range", "master"]
LIKE_SCALE = ("scale", "zero_point", "multiplier", "code_sums")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=ARRAYS, meta_fields=["spec", "axes", "dtype"]
)
@dataclass(frozen=True, eq=False)
class QTensor(trees.Compound):
    """A quantized array; made by `quantize` and `load`, which check it.

    Attributes:
        codes: int8, int4 or an 8-bit float, of the shape of the array. Symmetric integers are in
            [-Q, Q], Q = 2^(b-1) - 1.
        scale: float32, of the rank of the array: size 1 on `axes` (with groups the number of groups
            on the last of them), full elsewhere. Positive; 1 where a group is all zero.
        zero_point: int32, like the scale, or None.
        multiplier: int8, like the scale, its size on the last of `axes` the number of integer
            groups; or None.
        code_sums: int32, like the scale: sums of codes over `axes`, where an asymmetric activation
            needs them; or None.
        input_range: float32 (.., 2): bounds of what meets the parameter; None finds them in the
            call.
        master: The float array, inside of `quantized(fn, rules)` only.
        spec: How it was quantized, and what it does with what it meets.
        axes: The axes that share a scale, counted from the end.
        dtype: That of the array it stands for.
    """

    codes: Any
    scale: Any
    zero_point: Any = None
    multiplier: Any = None
    code_sums: Any = None
    input_range: Any = None
    master: Any = None
    _: KW_ONLY
    spec: DotSpec
    axes: tuple[int, ...]
    dtype: DType

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that the codes stand for."""
        return tuple(self.codes.shape)

    @property
    def ndim(self) -> int:
        """The rank of the array that the codes stand for."""
        return len(self.shape)

    def astype(self, dtype: Any) -> "QTensor":
        """Codes and scales as they are, standing for an array of another float dtype."""
        return replace(self, dtype=np.dtype(dtype))

    def take(self, axis: int, at: np.ndarray) -> "QTensor":
        """Some positions of an axis, ascending.

        Laws: its value is the array's at these positions. Along an axis that shares no scale, codes
        and scales are those of the smaller array; elsewhere they stay those of the whole one.

        Raises:
            ValueError: It would cut through a group.
        """
        return _moved(self, axis % self.ndim, np.asarray(at))

    def put(self, axis: int, at: np.ndarray, size: int) -> "QTensor":
        """Positions of an axis back to where they were `take`n from, with zeros elsewhere."""
        return _moved(self, axis % self.ndim, source_of(at, size))

    def over(self, change: Callable[[str, Any], Any], **statics: Any) -> "QTensor":
        """Maps `change(name, array)` over the arrays it has."""
        new = {name: change(name, x) for name, x in self.arrays().items()}
        return replace(self, **new, **statics)

    def arrays(self) -> dict[str, Any]:
        """The arrays that are present, by field name."""
        every = {name: getattr(self, name) for name in ARRAYS}
        return {name: x for name, x in every.items() if x is not None}

    def with_sums(self) -> "QTensor":
        """Adds `code_sums`, the sums of codes over the axes that share a scale."""
        return replace(self, code_sums=_sums(self))

    @property
    def groups(self) -> int:
        """Number of groups along the last of `axes`; 1 without groups."""
        by = self.scale if self.multiplier is None else self.multiplier
        return by.shape[max(self.axes)] if self.axes else 1

    def __repr__(self) -> str:
        """Shape, spec and dtype; numbers are in `codes` and `scale`."""
        shape = getattr(self.codes, "shape", self.codes)
        return f"QTensor({shape}, {self.spec}, axes={self.axes}, dtype={np.dtype(self.dtype)})"


def _moved(t: QTensor, axis: int, source: np.ndarray) -> QTensor:
    """An axis made anew; `source` says which position each comes from, -1 of a zero.

    Zero has the code of the zero point where there is one, and 0 elsewhere. A channel of zeros has
    scale and multiplier 1, as a channel of zeros has that is quantized.
    """
    shared = axis - t.ndim in t.axes
    zero = t.zero_point if shared and t.zero_point is not None else 0
    fills = {"codes": zero, "scale": 1, "multiplier": 1}

    def change(name: str, x: Any) -> Any:
        if name == "input_range" and axis >= x.ndim - 1:  # its last axis is that of the two bounds
            return x
        return moved(x, axis, source, t.shape[axis], fills.get(name, 0))

    out = t.over(change)
    return out.with_sums() if shared and out.code_sums is not None else out


def source_of(at: np.ndarray, size: int) -> np.ndarray:
    """For each of `size` positions which of `at` it is, or -1: [1, 3] of 4 -> [-1, 0, -1, 1]."""
    source = np.full(size, -1)
    source[at] = np.arange(len(at))
    return source


def moved(x: Any, axis: int, source: np.ndarray, size: int, fill: Any) -> Any:
    """An axis of `size` made anew, of an array or of what is like its scale, `fill` for -1.

    `source` has -1 for positions of zeros, which index the one row of `fill` at the end.
    """
    count = x.shape[axis]
    if count != size:  # like the scale: one for the whole axis, or one for each group along it
        if count == 1:
            return x
        source = _groups_of(source, size // count, axis)
    rest = [n if d != axis else 1 for d, n in enumerate(x.shape)]
    last = jnp.broadcast_to(jnp.asarray(fill).astype(x.dtype), rest)
    return jnp.take(jnp.concatenate([x, last], axis), source % (count + 1), axis=axis)


def _groups_of(source: np.ndarray, size: int, axis: int) -> np.ndarray:
    """The groups that positions come from: groups of 2, [2, 3, -1, -1] -> [1, -1].

    Raises:
        ValueError: Part of a group is taken, or its positions in another order.
    """
    whole = len(source) % size == 0
    rows = source.reshape(-1, size) if whole else source[:0].reshape(0, size)
    groups = np.where(rows[:, :1] < 0, -1, rows[:, :1] // size)
    expected = np.where(groups < 0, -1, groups * size + np.arange(size))
    if not (whole and np.array_equal(rows, expected)):
        raise ValueError(
            f"scales belong to groups of {size} along axis {axis}, which stay or go whole. Compact "
            "before quantizing, or keep whole groups of channels."
        )
    return groups[:, 0]


def is_quantized(leaf: Any) -> TypeGuard[QTensor]:
    """Tells whether a leaf of a tree is a `QTensor`."""
    return isinstance(leaf, QTensor)


def has_codes(dtype: Any) -> bool:
    """True if arrays of a dtype can be quantized: floats of 16 or 32 bits."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits in (16, 32)


def integer_codes(t: QTensor) -> jax.Array:
    """Codes with the integer of their group multiplied in: int8, or the codes as they are."""
    if t.multiplier is None:
        return t.codes
    return t.codes.astype(jnp.int8) * repeat_groups(t.multiplier, t.shape)


def _sums(t: QTensor) -> jax.Array:
    """Sums of codes over the axes that share a scale: int32, of the scale's shape."""
    whole = integer_codes(t).astype(jnp.int32)
    axes = tuple(axis % t.ndim for axis in t.axes)
    tiles = t.scale.shape[axes[-1]]
    if tiles == 1:
        return jnp.sum(whole, axis=axes, keepdims=True)
    last = axes[-1]
    inner = tuple(a if a < last else a + 1 for a in axes)
    return jnp.sum(tiled(whole, last, tiles), axis=inner, keepdims=True).squeeze(last + 1)


def steps_of(t: QTensor) -> jax.Array:
    """The values in units of the scale, float32: (codes - zero_point) * multiplier."""
    steps = integer_codes(t).astype(jnp.float32)
    if t.zero_point is not None:
        steps = steps - repeat_groups(t.zero_point, t.shape).astype(jnp.float32)
    return steps


def value_of(t: QTensor) -> jax.Array:
    """The array a QTensor stands for, in its dtype; gradients go to the master, if it has one."""
    value = round_and_cast(steps_of(t) * repeat_groups(t.scale, t.shape), t.dtype)
    return value if t.master is None else straight_through(value, t.master.astype(t.dtype))


def dequantize(params: Any) -> Any:
    """Replaces every `QTensor` of a tree by the array it stands for.

    Example:
        >>> import unitscale_jax as us
        >>> rules = {"w": us.DotSpec(w=us.QSpec(axes=(-2,)))}
        >>> tree = us.quantize({"w": jnp.array([[1.0, 2.0], [-1.0, 0.5]])}, rules)
        >>> tree["w"].codes.tolist(), dequantize(tree)["w"].tolist()
        ([[127, 127], [-127, 32]], [[1.0, 2.0], [-1.0, 0.5039370059967041]])
    """

    def swap(leaf: Any) -> Any:
        return value_of(leaf) if is_quantized(leaf) else leaf

    return jax.tree.map(swap, params, is_leaf=is_quantized)
