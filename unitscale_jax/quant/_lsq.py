"""A parameter whose scale is trained beside it: learned step size quantization.

    v^ = s clip(rne(v / s), -Q, Q)
    dv^/ds = rne(v / s) - v / s  where |v / s| < Q,  else Q sign(v),  times 1 / sqrt(N Q)
    dv^/dv = 1                   where |v / s| < Q,  else 0

N is how many elements share the scale; of an activation those of one row, so that the gradient of a
batch is the sum of those of its parts. Reference: https://arxiv.org/abs/1902.08153.
"""

import functools
import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.formats import round_to_dtype
from unitscale_jax.fwd_bwd import straight_through
from unitscale_jax.mesh_axes import match_vma
from unitscale_jax.quant._calibrators import AxisNumbers, Calibrator
from unitscale_jax.quant._ops import (
    bounds_of,
    codes_of,
    nearest_even,
    no_fma,
    repeat_groups,
    threshold,
)
from unitscale_jax.quant._qtensor import ARRAYS, QTensor, moved, source_of
from unitscale_jax.quant._spec import DotSpec, QSpec
from unitscale_jax.typing import DType


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["master", "scale", "x_scale"],
    meta_fields=["spec"],
)
@dataclass(frozen=True, eq=False)
class Learned(trees.Compound):
    """A parameter and its scales, all of them trained; made by `learned`, which checks it.

    An optimizer sees three arrays, "w/master", "w/scale" and "w/x_scale".

    Attributes:
        master: The float array.
        scale: float32, of its rank: size 1 on the axes that share a scale (with groups the number
            of groups on the last of them), full elsewhere.
        x_scale: float32: that of what meets the parameter, its axes those of stacked layers; None
            if that stays in floating point.
        spec: How it is quantized, and what it does with what it meets.
    """

    master: Any
    scale: Any
    x_scale: Any = None
    _: KW_ONLY
    spec: DotSpec

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the master array, which is the parameter's."""
        return tuple(self.master.shape)

    @property
    def dtype(self) -> DType:
        """The dtype of the master array, which is the parameter's."""
        return np.dtype(self.master.dtype)

    @property
    def values(self) -> Any:
        """The float array, without its scales."""
        return self.master

    def with_values(self, values: Any) -> "Learned":
        """Another float array, and the same scales."""
        return replace(self, master=values)

    def astype(self, dtype: Any) -> "Learned":
        """The array in another float dtype; scales stay as they are."""
        return replace(self, master=self.master.astype(dtype))

    def take(self, axis: int, at: np.ndarray) -> "Learned":
        """Some positions of an axis, ascending; scales that they share stay.

        Raises:
            ValueError: It would cut through a group.
        """
        return self._moved(axis % len(self.shape), np.asarray(at))

    def put(self, axis: int, at: np.ndarray, size: int) -> "Learned":
        """Positions of an axis back to where they were `take`n from, with zeros elsewhere."""
        return self._moved(axis % len(self.shape), source_of(at, size))

    def _moved(self, axis: int, source: np.ndarray) -> "Learned":
        master, scale = (
            moved(x, axis, source, self.shape[axis], fill)
            for x, fill in ((self.master, 0), (self.scale, 1))
        )
        x_scale = self.x_scale
        if x_scale is not None and axis < x_scale.ndim:  # of stacked layers
            x_scale = moved(x_scale, axis, source, self.shape[axis], 1)
        return replace(self, master=master, scale=scale, x_scale=x_scale)

    def __repr__(self) -> str:
        """Shape, spec and dtype, in place of the arrays."""
        shape = getattr(self.master, "shape", self.master)
        return f"Learned({shape}, {self.spec}, axes={self.spec.w.axes})"


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=ARRAYS, meta_fields=["spec", "axes", "dtype"]
)
@dataclass(frozen=True, eq=False, repr=False)
class Trained(QTensor):
    """A `Learned` inside of `quantized(fn)`: its master and its `input_range` carry gradients."""


def is_learned(leaf: Any) -> TypeGuard[Learned]:
    """Tells whether a leaf of a tree is a `Learned`."""
    return isinstance(leaf, Learned)


def encoded(leaf: Learned) -> QTensor:
    """The codes that are served, by the trained scale; NaN where the array is not finite."""
    w, shape = leaf.spec.w, leaf.shape
    assert w.axes is not None
    axes = tuple(axis % len(shape) for axis in w.axes)
    v = round_to_dtype(jax.lax.stop_gradient(leaf.master))
    largest = bounds_of(v, axes, QSpec(), tiles_of(shape, w))
    scale = _kept(jax.lax.stop_gradient(leaf.scale), w)
    scale = jnp.where(jnp.isfinite(largest), scale, np.float32(np.nan))
    codes = codes_of(v * repeat_groups(1 / scale, shape), w)
    input_range = None if leaf.x_scale is None else range_of_scale(leaf.x_scale, leaf.spec.x)
    return QTensor(
        codes, scale, input_range=input_range, spec=leaf.spec, axes=w.axes, dtype=leaf.dtype
    )


def trained(leaf: Learned) -> Trained:
    """The codes that `quantized` computes with, and the carrier that takes their gradients."""
    t = encoded(leaf)
    scale = _kept(leaf.scale, leaf.spec.w)
    count = math.prod(leaf.shape) // max(math.prod(scale.shape), 1)
    master = carrier(leaf.master, scale, leaf.spec.w.max_code, count)
    statics = {"spec": t.spec, "axes": t.axes, "dtype": t.dtype}
    return Trained(t.codes, t.scale, input_range=t.input_range, master=master, **statics)


def entered(tree: Any) -> Any:
    """A tree with a `Trained` for every `Learned`."""

    def swap(leaf: Any) -> Any:
        return trained(leaf) if is_learned(leaf) else leaf

    return jax.tree.map(swap, tree, is_leaf=trees.is_compound)


def tiles_of(shape: tuple[int, ...], spec: QSpec) -> int:
    """Number of groups along the last of the axes that share a scale; 1 without groups."""
    assert spec.axes is not None
    return 1 if spec.group is None else shape[max(spec.axes)] // spec.group.size


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def carrier(x: jax.Array, scale: jax.Array, q: int, count: int) -> jax.Array:
    """An array that takes the cotangent of its served value, and gives the scale its share.

    Args:
        x: Floating.
        scale: float32, of the rank of x.
        q: The largest code.
        count: N, how many elements share a scale.
    """
    del scale, q, count
    return x


def _forward(x: jax.Array, scale: jax.Array, q: int, count: int) -> tuple[jax.Array, Any]:
    del q, count
    return x, (x, scale)


def _backward(q: int, count: int, kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale = kept
    steps = round_to_dtype(x) * repeat_groups(1 / scale, x.shape)
    inside = jnp.abs(steps) < q
    slope = jnp.where(inside, nearest_even(steps) - steps, jnp.sign(steps) * np.float32(q))

    def repeat(s: jax.Array) -> jax.Array:
        return jnp.broadcast_to(repeat_groups(s, x.shape), x.shape)

    # The transpose of repeating a scale to its elements sums over the elements of each scale.
    (total,) = jax.vjp(repeat, scale)[1](slope * g.astype(jnp.float32))
    dx = jnp.where(inside, g, jnp.zeros_like(g))
    return match_vma((dx, total * np.float32(1 / math.sqrt(max(count, 1) * q))), (x, scale))


carrier.defvjp(_forward, _backward)


def least_scale(spec: QSpec) -> np.float32:
    """The first number from t(Q) / Q on whose product with Q is not below t(Q)."""
    q, least = np.float32(spec.max_code), threshold(spec.max_code)
    scale = np.float32(least / q)
    return scale if scale * q >= least else np.nextafter(scale, np.float32(1))


def _kept(scale: Any, spec: QSpec) -> jax.Array:
    """The scale, at least the least; one that an update made smaller still has its gradient."""
    wide = jnp.asarray(scale).astype(jnp.float32)
    return straight_through(jnp.maximum(wide, least_scale(spec)), wide)


def range_of_scale(scale: Any, spec: QSpec | None) -> jax.Array:
    """The range (-s Q, s Q) on a new last axis."""
    assert spec is not None
    # Fenced, or s Q / Q would be s in one program and not in the other.
    high = no_fma(_kept(scale, spec) * np.float32(spec.max_code))
    return jnp.stack([-high, high], axis=-1)


def first_scale(x: Any, spec: QSpec) -> jax.Array:
    """2 mean |x| / sqrt(Q) for each scale, at least the least; NaN where x is not finite.

    Example:
        >>> v = jnp.array([0.24, -1.5, 5, 0.8, -0.3])
        >>> round(first_scale(v, QSpec(format="int3", axes=(-1,)))[0].item(), 5)
        1.81057
    """
    assert spec.axes is not None
    axes = tuple(axis % x.ndim for axis in spec.axes)
    tiles = tiles_of(x.shape, spec)
    mean = bounds_of(round_to_dtype(x), axes, replace(spec, calibrator=_Mean()), tiles)
    return first_of_mean(mean, spec)


def first_of_mean(mean: Any, spec: QSpec) -> jax.Array:
    """The first scale of numbers with a mean magnitude."""
    first = jnp.asarray(mean, jnp.float32) * np.float32(2 / math.sqrt(spec.max_code))
    return jnp.maximum(first, least_scale(spec))


@dataclass(frozen=True)
class _Mean(Calibrator):
    """The mean magnitude, which is no bound, by the axes and groups of one."""

    def bound(self, x: jax.Array, axes: AxisNumbers, error: Any) -> jax.Array:
        """The mean magnitude over `axes`."""
        del error
        return jnp.mean(jnp.abs(x), axis=axes, keepdims=True)
