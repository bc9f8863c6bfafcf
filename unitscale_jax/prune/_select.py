"""Masks with exactly k ones, the same on one device and on many.

    key(a) > key(b)  iff  a > b,     NaN below -Inf,  -0 = +0,     ties to the earlier index

Floats are compared as integers of their own width. The k-th largest key is found bit by bit, from
the top: a bit stays if at least k keys reach it; among equal keys the same search runs over the
index. Nothing is sorted and nothing is moved: of a sharded array only counts travel, so the mask
does not depend on the layout. k may be traced, so a schedule needs one compilation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_array, check_type, not_divisible
from unitscale_jax.mesh_axes import varying, varying_axes

MOST = 2**31 - 1
"""How many numbers can be ranked together: counts are int32."""


def exact_k(scores: Any, k: Any, *, balanced: str | int | None = None) -> jax.Array:
    """Marks the k largest numbers of an array.

    Args:
        scores: Floating numbers of any shape, fewer than 2^31.
        k: How many; an int, or an int32 scalar that may be traced.
        balanced: How many equal parts the first axis has, of which every one keeps k / parts of its
            own (the first ones one more where that leaves a rest), so all stay equally full; or,
            inside `shard_map`, the manual axis whose devices have a part each. It is another mask
            than that of the whole array, and the same one for any layout.

    Returns:
        A bool array of the shape of `scores` with exactly k ones: in the order of score, largest
        first, then row-major index, smallest first. NaN comes last, and is kept if k leaves no
        choice. A traced k beyond 0 .. n counts as the nearer end.

    Raises:
        TypeError: Scores are not floating, or k is not a whole number.
        ValueError: k is not in 0 .. n, or there are too many scores.

    Law: equals a stable sort; commutes with jit, vmap and sharding.

    Example:
        >>> exact_k(jnp.array([3, 1, jnp.nan, 1, 1, 2, 0, -0.0]), 3).astype(int).tolist()
        [1, 1, 0, 0, 0, 1, 0, 0]
        >>> exact_k(jnp.array([9.0, 8, 7, 6, 1, 2, 3, 4]), 4, balanced=2).astype(int).tolist()
        [1, 1, 0, 0, 0, 0, 1, 1]
    """
    check_array("scores", scores)
    if isinstance(balanced, int):
        return _in_parts(scores, k, balanced)
    if balanced is not None:
        _check_count(k, _size([scores]) * lax.axis_size(balanced))
        k = _share(k, lax.axis_size(balanced), lax.axis_index(balanced))
    return exact_k_of([scores], k)[0]


def exact_k_of(scores: Sequence[Any], k: Any) -> list[jax.Array]:
    """Marks the k largest of several arrays together; nothing is concatenated.

    Args:
        scores: Arrays as of `exact_k`, fewer than 2^31 numbers in all.
        k: How many of all of them.

    Returns:
        A mask for each: in the order of score, then array, then index.

    Raises:
        TypeError: As `exact_k`.
        ValueError: As `exact_k`.

    Example:
        >>> a, b = exact_k_of([jnp.array([3.0, 1.0, 2.0]), jnp.array([2.0, 2.0, 5.0])], 3)
        >>> a.astype(int).tolist(), b.astype(int).tolist()
        ([1, 0, 1], [0, 0, 1])
    """
    check_type("scores", scores, Sequence, "a list of arrays")
    _check_count(k, _size(scores))
    if not _size(scores):  # no arrays, or of branches that were taken out
        return [jnp.zeros(key.shape, bool) for key in _keys(scores)]
    return _exact_k_of(_keys(scores), jnp.asarray(k, jnp.int32))


def n_of_m(scores: Any, n: int, m: int, axis: int) -> jax.Array:
    """Marks the n largest of every m neighbors along an axis, the earlier ones of equals.

    Args:
        scores: Floating numbers of any shape.
        n: How many stay; 1 <= n <= m.
        m: How many make a group; it divides the axis.
        axis: Along which groups run.

    Returns:
        A bool array of the shape of `scores` with exactly n ones in every group.

    Raises:
        TypeError: Scores are not floating.
        ValueError: n > m, or m does not divide the axis.

    Law: idempotent: the mask, as scores, has itself as mask.

    Example:
        >>> w = jnp.array([[1.0, -4.0], [-1.0, 3.0], [1.0, 3.0], [0.0, -3.0]])
        >>> n_of_m(jnp.abs(w), 2, 4, axis=0).astype(int).tolist()
        [[1, 1], [1, 1], [0, 0], [0, 0]]
    """
    check_array("scores", scores, 1)
    size = np.shape(scores)[axis]
    if not 1 <= n <= m:
        raise ValueError(f"{n} of {m}: n is from 1 to m, how many of m neighbors stay.")
    if size % m:
        raise ValueError(not_divisible(f"axis {axis} of the scores", size, f"groups of {m}"))
    x = jnp.moveaxis(order_key(scores), axis, -1)
    groups = x.reshape(*x.shape[:-1], -1, m)
    i = np.arange(m)
    a, b = groups[..., None, :], groups[..., :, None]
    ahead = (a > b) | ((a == b) & (i[None, :] < i[:, None]))
    ranks = jnp.sum(ahead, axis=-1, dtype=jnp.int32)
    return jnp.moveaxis((ranks < n).reshape(x.shape), -1, axis)


def order_key(x: Any) -> jax.Array:
    """Unsigned integers in the order of floats; NaN is 0, and -0 and +0 are equal.

    Only integers are compared, so subnormal numbers differ even where arithmetic flushes them.

    Args:
        x: An array of floats.

    Returns:
        uint16 for 16 bits, uint64 for float64, else uint32, of the shape of `x`.

    Raises:
        TypeError: `x` is not floating.

    Example:
        >>> order_key(jnp.array([jnp.nan, -jnp.inf, -0.0, 0.0, 1e-42])).tolist()
        [0, 8388607, 2147483648, 2147483648, 2147484362]
    """
    x = jnp.asarray(x)
    if not trees.is_floating(x):
        raise TypeError(f"scores are {x.dtype}; ranks are of floating numbers: cast them first.")
    x = x if jnp.finfo(x.dtype).bits >= 16 else x.astype(jnp.float32)
    unsigned = np.dtype(f"uint{jnp.finfo(x.dtype).bits}")
    sign = unsigned.type(1 << (8 * unsigned.itemsize - 1))
    infinity = np.array(np.inf, x.dtype).view(unsigned)[()]
    raw = lax.bitcast_convert_type(x, unsigned)
    magnitude = raw & ~sign
    raw = jnp.where(magnitude == 0, unsigned.type(0), raw)
    key = jnp.where(raw >= sign, ~raw, raw | sign)
    return jnp.where(magnitude > infinity, unsigned.type(0), key)


@jax.jit  # so that outside of any jit, too, a shape is compiled once
def _exact_k_of(keys: list[jax.Array], k: jax.Array) -> list[jax.Array]:
    axes = sorted(varying_axes(k).union(*map(varying_axes, keys)))
    bits = 8 * keys[0].dtype.itemsize
    threshold = _largest(bits, keys[0].dtype, lambda c: _count([x >= c for x in keys]) >= k, axes)
    need = k - _count([x > threshold for x in keys])
    tied = [x == threshold for x in keys]
    earlier = _before(tied, need, axes)
    return [(x > threshold) | (t & e) for x, t, e in zip(keys, tied, earlier, strict=True)]


def _keys(scores: Sequence[Any]) -> list[jax.Array]:
    """Keys of one width: of float16 and bfloat16 together, those of float32."""
    arrays = [jnp.asarray(x) for x in scores]
    dtypes = {x.dtype for x in arrays if trees.is_floating(x)}
    if len(dtypes) > 1:
        widest = max(np.dtype(np.float32), *dtypes, key=lambda dtype: jnp.finfo(dtype).bits)
        arrays = [x.astype(widest) if trees.is_floating(x) else x for x in arrays]
    return [order_key(x) for x in arrays]


def _largest(bits: int, dtype: Any, holds: Callable, axes: Sequence[str]) -> jax.Array:
    """The largest number of so many bits that `holds`, a test true of all up to some number."""
    top, one = dtype.type(bits - 1), dtype.type(1)

    def step(i: jax.Array, p: jax.Array) -> jax.Array:
        candidate = p | (one << (top - i.astype(dtype)))
        return jnp.where(holds(candidate), candidate, p)

    return lax.fori_loop(0, bits, step, varying(jnp.zeros((), dtype), axes))


def _before(tied: list[jax.Array], need: jax.Array, axes: Sequence[str]) -> list[jax.Array]:
    """Marks positions early enough to be among the first `need` of the tied ones.

    That is the largest bound i such that at most `need` ties lie before it, found bit by bit.
    """
    sizes = [x.size for x in tied]
    starts = np.cumsum([0, *sizes[:-1]])
    index = [_positions(x.shape, int(start)) for x, start in zip(tied, starts, strict=True)]
    unsigned = np.dtype(np.uint32)

    def search() -> jax.Array:
        def few(c: jax.Array) -> jax.Array:
            # A prefix sum over ties would follow the shards; counting does not.
            return _count([t & (i < c) for t, i in zip(tied, index, strict=True)]) <= need

        return _largest(sum(sizes).bit_length(), unsigned, few, axes)

    def everything() -> jax.Array:
        return varying(jnp.asarray(sum(sizes), unsigned), axes)

    bound = lax.cond(_count(tied) == need, everything, search)
    return [i < bound for i in index]


def _positions(shape: tuple[int, ...], start: int) -> jax.Array:
    """Row-major indices from `start` on, made where they are needed."""
    index, stride = jnp.full(shape, start, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
        stride *= shape[axis]
    return index


def _count(tests: list[jax.Array]) -> jax.Array:
    total = jnp.zeros((), jnp.int32)
    for test in tests:
        total = total + jnp.sum(test, dtype=jnp.int32)
    return total


def _in_parts(scores: Any, k: Any, parts: int) -> jax.Array:
    """Ranks each part of the first axis on its own."""
    size, *rest = np.shape(scores)
    if parts < 1 or size % parts:
        raise ValueError(not_divisible("axis 0 of the scores", size, f"{parts} parts"))
    _check_count(k, _size([scores]))
    apart = jnp.reshape(scores, (parts, size // parts, *rest))
    shares = _share(k, parts, jnp.arange(parts, dtype=jnp.int32))
    return jax.vmap(lambda x, k: exact_k_of([x], k)[0])(apart, shares).reshape(size, *rest)


def _share(k: Any, parts: int, part: jax.Array) -> jax.Array:
    k = jnp.asarray(k, jnp.int32)
    return k // parts + (part < k % parts).astype(jnp.int32)


def _size(scores: Sequence[Any]) -> int:
    return sum(int(np.prod(np.shape(x), dtype=object)) for x in scores)


def _check_count(k: Any, n: int) -> None:
    if n > MOST:
        raise ValueError(
            f"{n:,} scores are ranked together, and counts are int32. Rank layers on their own: "
            "`stacked` of a SparsitySpec, or vmap."
        )
    if np.shape(k) != () or not jnp.issubdtype(jnp.result_type(k), jnp.integer):
        raise TypeError(f"k is {k!r}; it is one whole number. For several use vmap.")
    if isinstance(k, int | np.integer | np.ndarray) and not 0 <= int(k) <= n:
        raise ValueError(f"k is {int(k)}, of {n} scores; it is from 0 to {n}.")
