"""Patterns: which weights of an array stay or go together.

    Unstructured   every weight on its own
    Block          tiles, kept whole by the sum of their scores
    Channel        slices along one axis, likewise
    Balanced       any of these, equally many in each of several parts
    NofM           N of every M neighbors: the pattern fixes the ratio, nothing is allocated

A pattern turns scores into scores of its *units* (`pooled`), of which the k largest stay, and a
mask of units into one of weights (`spread`).
"""

from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.errors import not_divisible
from unitscale_jax.prune._select import n_of_m

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Unstructured:
    """Every weight stays or goes on its own.

    Example:
        >>> us.prune.SparsitySpec(patterns=Unstructured()).patterns
        Unstructured()
    """

    def units(self, name: str, shape: Shape) -> Shape:
        """The shape of the weights, as each is a unit."""
        del name
        return shape

    def pooled(self, scores: jax.Array) -> jax.Array:
        """Each weight is a unit, so the scores stay."""
        return scores

    def spread(self, keep: jax.Array, shape: Shape) -> jax.Array:
        """The mask of weights that a mask of units stands for."""
        del shape
        return keep


@dataclass(frozen=True)
class NofM:
    """N of every M neighbors along an axis stay, whatever the sparsity: it is 1 - N / M.

    Attributes:
        n: How many stay, at least 1.
        m: Of how many; it divides the axis.
        axis: That of the input channels, which a product sums over. None is open, until
            `resolve(spec, fn, params, *inputs)` fills it in. Within `stacked` layers it counts in
            one of them.

    Raises:
        ValueError: Not 1 <= n <= m.

    Example:
        >>> NofM(2, 4, axis=-1).mask(jnp.array([1.0, 3.0, 3.0, 3.0])).astype(int).tolist()
        [0, 1, 1, 0]
    """

    n: int = 2
    m: int = 4
    axis: int | None = None

    def __post_init__(self) -> None:
        """Checks that N is at most M, and the axis a whole number."""
        if not (type(self.n) is int and type(self.m) is int and 1 <= self.n <= self.m):
            raise ValueError(f"{self!r}: n of m neighbors stay, whole numbers with 1 <= n <= m.")
        if self.axis is not None:
            _check_axis(self, self.axis)

    def units(self, name: str, shape: Shape) -> Shape:
        """The shape of the array, once the axis and M are known to fit it."""
        if self.axis is None:
            raise ValueError(
                f"{name}: {self!r} does not say along which axis. Fill it in by "
                "`us.prune.resolve_axes(spec, fn, params, *inputs)`, or give that of the input "
                "channels: NofM(axis=-2) for a kernel (in, out)."
            )
        size = _size_of(name, shape, self.axis)
        if size % self.m:
            says = not_divisible(f"{name} along axis {self.axis}", size, f"groups of {self.m}")
            raise ValueError(f"{says} Choose `m` among them or leave {name} out.")
        return shape

    def mask(self, scores: jax.Array) -> jax.Array:
        """The mask of the weights: the N largest scores of every M neighbors."""
        assert self.axis is not None
        return n_of_m(scores, self.n, self.m, self.axis)


@dataclass(frozen=True)
class Block:
    """Tiles of the last axes stay or go whole, by the sum of their scores.

    Attributes:
        shape: Sides of a tile; each divides its axis. Axes before them are not tiled.

    Raises:
        ValueError: A side is not a positive whole number.

    Example:
        >>> w = jnp.arange(1.0, 17.0).reshape(4, 4)
        >>> Block((2, 2)).pooled(w**2).tolist()
        [[66.0, 138.0], [546.0, 746.0]]
    """

    shape: Shape = (16, 16)

    def __post_init__(self) -> None:
        """Checks that sides are positive whole numbers."""
        object.__setattr__(self, "shape", tuple(self.shape))
        if not (self.shape and all(type(side) is int and side > 0 for side in self.shape)):
            raise ValueError(f"{self!r}: sides of a block are positive whole numbers.")

    def units(self, name: str, shape: Shape) -> Shape:
        """The number of tiles, axis by axis."""
        if len(self.shape) > len(shape):
            raise ValueError(
                f"{name} has the shape {shape}, and {self!r} has more axes. Give a block of at "
                f"most {len(shape)} sides or leave {name} out."
            )
        sides = self._sides(shape)
        for axis, (size, side) in enumerate(zip(shape, sides, strict=True)):
            if size % side:
                says = not_divisible(f"{name} along axis {axis}", size, f"blocks of {side}")
                raise ValueError(f"{says} Choose a side among them or leave {name} out.")
        return tuple(size // side for size, side in zip(shape, sides, strict=True))

    def pooled(self, scores: jax.Array) -> jax.Array:
        """Sums the scores over each tile, in float32."""
        tiled, inner = self._tiled(scores.shape)
        return jnp.sum(scores.astype(jnp.float32).reshape(tiled), axis=inner)

    def spread(self, keep: jax.Array, shape: Shape) -> jax.Array:
        """Repeats the bit of each tile over its weights."""
        tiled, inner = self._tiled(shape)
        return jnp.broadcast_to(jnp.expand_dims(keep, inner), tiled).reshape(shape)

    def _tiled(self, shape: Shape) -> tuple[Shape, tuple[int, ...]]:
        """A shape with each axis cut into tiles, and the axes within a tile.

        Of blocks (2, 4) it makes of (6, 8) the shape (3, 2, 2, 4), and the axes 1 and 3.
        """
        pairs = zip(shape, self._sides(shape), strict=True)
        tiled = tuple(n for size, side in pairs for n in (size // side, side))
        return tiled, tuple(range(1, len(tiled), 2))

    def _sides(self, shape: Shape) -> Shape:
        return (1,) * (len(shape) - len(self.shape)) + self.shape


@dataclass(frozen=True)
class Channel:
    """Slices of one tensor along an axis stay or go whole, by the sum of their scores.

    The tensor keeps its shape. Channels that several tensors share, and a smaller model, are the
    matter of `compact`.

    Attributes:
        axis: Along which channels are counted; -1 are the outputs of a kernel (in, out).

    Raises:
        ValueError: The axis is not a whole number.

    Example:
        >>> Channel(axis=0).pooled(jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
        [3.0, 7.0]
    """

    axis: int = -1

    def __post_init__(self) -> None:
        """Checks that there is an axis, and that it is a whole number."""
        if self.axis is None:
            raise ValueError(f"{self!r}: channels are along one axis, as Channel(axis=-1).")
        _check_axis(self, self.axis)

    def units(self, name: str, shape: Shape) -> Shape:
        """The number of channels, each of which is a unit."""
        return (_size_of(name, shape, self.axis),)

    def pooled(self, scores: jax.Array) -> jax.Array:
        """Sums the scores of each channel, in float32."""
        others = tuple(a for a in range(scores.ndim) if a != self.axis % scores.ndim)
        return jnp.sum(scores.astype(jnp.float32), axis=others)

    def spread(self, keep: jax.Array, shape: Shape) -> jax.Array:
        """Repeats the bit of each channel over its weights."""
        others = tuple(a for a in range(len(shape)) if a != self.axis % len(shape))
        return jnp.broadcast_to(jnp.expand_dims(keep, others), shape)


@dataclass(frozen=True)
class Balanced:
    """Units of another pattern, equally many of them in each of several parts of an axis.

    For weights that lie over devices along that axis: all stay equally full, and the mask is the
    same for any number of devices that divides `parts`, one included.

    Attributes:
        pattern: What stays or goes together, within a part.
        parts: How many parts; the first ones keep one unit more where they leave a rest.
        axis: Which axis of the weights is cut.

    Raises:
        ValueError: `parts` is not a positive whole number, the axis not a whole one.
        TypeError: The pattern is not one of units that are ranked.

    Example:
        >>> spec = us.prune.SparsitySpec(patterns=Balanced(parts=2, axis=0), sparsity=0.5)
        >>> scores = jnp.array([9.0, 8, 7, 6, 1, 2, 3, 4])[:, None]
        >>> us.prune.make_masks(scores, spec)[:, 0].astype(int).tolist()
        [1, 1, 0, 0, 0, 0, 1, 1]
    """

    pattern: "Unstructured | Block | Channel" = field(default_factory=Unstructured)
    _: KW_ONLY
    parts: int
    axis: int

    def __post_init__(self) -> None:
        """Checks the parts, the pattern and the axis."""
        if type(self.parts) is not int or self.parts < 1:
            raise ValueError(f"{self!r}: parts is a positive whole number.")
        if not isinstance(self.pattern, Unstructured | Block | Channel):
            raise TypeError(
                f"{self!r}: parts rank Unstructured(), Block(..) or Channel(..). NofM is balanced "
                "wherever M divides what a device has."
            )
        _check_axis(self, self.axis)

    def units(self, name: str, shape: Shape) -> Shape:
        """Parts first, then the units of each."""
        size = _size_of(name, shape, self.axis)
        if size % self.parts:
            says = not_divisible(f"{name} along axis {self.axis}", size, f"{self.parts} parts")
            raise ValueError(f"{says} Choose `parts` among them or leave {name} out.")
        return self.parts, *self.pattern.units(name, self._part(shape))

    def pooled(self, scores: jax.Array) -> jax.Array:
        """Sums the scores of weights into scores of units, part by part."""
        axis, part = self.axis % scores.ndim, self._part(scores.shape)
        cut = scores.reshape(*part[:axis], self.parts, *part[axis:])
        return jax.vmap(self.pattern.pooled)(jnp.moveaxis(cut, axis, 0))

    def spread(self, keep: jax.Array, shape: Shape) -> jax.Array:
        """The mask of weights that a mask of units stands for."""
        part = self._part(shape)
        masks = jax.vmap(lambda k: self.pattern.spread(k, part))(keep)  # (parts, *part)
        return jnp.moveaxis(masks, 0, self.axis % len(shape)).reshape(shape)

    def _part(self, shape: Shape) -> Shape:
        axis = self.axis % len(shape)
        return (*shape[:axis], shape[axis] // self.parts, *shape[axis + 1 :])


Ranked: TypeAlias = Unstructured | Block | Channel | Balanced
"""Patterns whose units are ranked, so that any number of them may stay."""

Pattern: TypeAlias = Ranked | NofM
"""Any of the patterns."""


def _check_axis(pattern: Any, axis: Any) -> None:
    if type(axis) is not int:
        raise ValueError(f"{pattern!r}: axis is a whole number, as -1.")


def _size_of(name: str, shape: Shape, axis: int) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"{name} has the shape {shape}, and no axis {axis}. Choose one of its own."
        )
    return int(np.asarray(shape)[axis])
