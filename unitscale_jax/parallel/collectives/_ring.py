"""Ring attention: keys and values of a split sequence go around, queries stay where they are.

A softmax is kept as its maximum, its sum and weighted values, to which each block is added. A ring
never holds more than one other device's keys and values, in the backward pass neither: what is kept
for it are the output and log-sum-exp of the device's own rows, and the ring is run again with the
gradients of keys and values traveling along (Liu et al. 2023, arXiv:2310.01889; the recomputation:
Dao et al. 2022, arXiv:2205.14135). A body for a user's own `jax.shard_map`, as in `_tensor`; it
fits Flax's `attention_fn`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_array
from unitscale_jax.mesh_axes import agree, devices_over, match_vma, varying
from unitscale_jax.parallel.collectives._stripe import positions
from unitscale_jax.parallel.collectives._tensor import around
from unitscale_jax.typing import Array


def ring_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    *,
    mesh_axis: str,
    causal: bool = False,
    segments: Array | None = None,
    striped: bool = False,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
) -> jax.Array:
    """Softmax attention over all rows of a sequence of which each device has some.

    With `functools.partial(ring_attention, mesh_axis="cp", causal=True)` it is the `attention_fn`
    of a Flax attention layer.

    Args:
        query: `(.., rows / n, heads, dim)`, of the device's rows.
        key: `(.., rows / n, kv_heads, dim)`; `kv_heads` divides `heads`.
        value: `(.., rows / n, kv_heads, dim_v)`.
        mask: Bool, broadcasting to `(.., heads, rows / n, rows)`: which keys, of all devices and in
            the order of the sequence, a query may see. For long sequences use `causal` and
            `segments`, which need no memory.
        mesh_axis: The manual mesh axis.
        causal: A query sees the rows up to its own, by position in the whole sequence.
        segments: `(.., rows / n)` integers: a query sees the rows of its own number, so that
            several texts, and padding, share a sequence.
        striped: Row r of device i is row r n + i of the sequence, see `stripe`, not i rows / n + r.
            A query then sees only earlier rows of every device, causally, so that all have the
            same work and 5/8 of the products do (Brandon et al. 2023, arXiv:2311.09431).
        scale: Factor of the scores; 1 / sqrt(dim) if left out.
        dropout_rate: As Flax passes it; must be 0, or `deterministic` true.
        deterministic: As Flax passes it.

    Returns:
        `(.., rows / n, heads, dim_v)` in the dtype of `query`; sums are float32 or wider. A query
        that may see nothing has zeros.

    Raises:
        ValueError: Shapes that do not fit, a mask of the device's own keys only, dropout.

    Law: attention of one device over the whole sequence, with its gradients. There is no forward
    mode.
    """
    check_array("query", query, 3)
    _check(query, key, value, causal, deterministic or not dropout_rate)
    heads = key.shape[-2], query.shape[-2] // key.shape[-2]
    q = query.reshape(*query.shape[:-2], *heads, query.shape[-1])
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    ring = _Ring(mesh_axis, causal, striped, factor)
    seen = _Seen(segments, _of_all_keys(mask, key.shape[-3], heads, mesh_axis))
    out = _attend(ring, q, key, value, seen)
    return out.reshape(*query.shape[:-1], value.shape[-1])


class _Ring(NamedTuple):
    """The static side of a ring.

    Attributes:
        axis: The mesh axis.
        causal: Whether a query sees only the rows up to its own.
        striped: Whether a device holds every n-th row, and not neighbors.
        scale: Factor of the scores.
    """

    axis: str
    causal: bool
    striped: bool
    scale: float

    def pieces(self, rows: int) -> list[slice]:
        """Cuts queries into pieces, each multiplied with the keys that it may see at all.

        Of a causal, striped sequence a query sees the keys of a block up to its own row. In four
        pieces, each with the keys up to its end, (1 + 2 + 3 + 4) / 16 = 5/8 of the products are
        left; more pieces save little more and make smaller products.
        """
        count = 1
        if self.causal and self.striped:
            count = next(c for c in (4, 2, 1) if rows % c == 0)
        return [slice(k * rows // count, (k + 1) * rows // count) for k in range(count)]


class _Seen(NamedTuple):
    """Which keys a query may see, beside what `causal` says.

    Attributes:
        segments: `(.., rows)` of this device's rows, or None; those of keys go around with them.
        mask: `(.., kv_heads, rows, groups, all keys)`, sizes of 1 broadcast, or None.
    """

    segments: Any
    mask: Any


def _attend(ring: _Ring, q: Any, k: Any, v: Any, seen: _Seen) -> jax.Array:
    """Attention of `(.., rows, kv_heads, groups, dim)` to `(.., rows, kv_heads, dim)`."""

    @jax.custom_vjp
    def call(q: Any, k: Any, v: Any, seen: _Seen) -> jax.Array:
        return _forward(ring, q, k, v, seen)[0]

    def fwd(q: Any, k: Any, v: Any, seen: _Seen) -> tuple[jax.Array, Any]:
        out, norm = _forward(ring, q, k, v, seen)
        return out, (q, k, v, seen, out, norm)

    def bwd(kept: Any, g: jax.Array) -> tuple[Any, ...]:
        q, k, v, seen, out, norm = kept
        primals, made = (q, k, v), _backward(ring, q, k, v, seen, out, norm, g)
        cotangents = [x.astype(p.dtype) for x, p in zip(made, primals, strict=True)]
        return *match_vma(cotangents, list(primals)), None

    call.defvjp(fwd, bwd)
    return call(q, k, v, seen)


def _forward(ring: _Ring, q: Any, k: Any, v: Any, seen: _Seen) -> tuple[jax.Array, jax.Array]:
    """Computes the output, and each query's log-sum-exp of scores `(.., kv_heads, rows, groups)`.

    Scores are `(.., kv_heads, rows, groups, keys)`, as a batched product leaves them.
    """
    wide, pieces = trees.wide(q.dtype), ring.pieces(q.shape[-4])

    def with_piece(kept: Any, piece: slice, block: Any, step: Any) -> Any:
        (total, summed, top), (k, v, segments) = kept, _up_to(ring, piece, block)
        scores = _scores(ring, q, k, seen, segments, piece, step)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        shift = _finite(new_top)  # a query that has seen nothing yet has -inf
        weights, shrunk = jnp.exp(scores - shift[..., None]), jnp.exp(top - shift)
        added = _einsum("...hngk,...khd->...hngd", weights.astype(v.dtype), v, wide)
        total = total * shrunk[..., None] + added
        return total, summed * shrunk + jnp.sum(weights, axis=-1), new_top

    def with_block(kept: Any, block: Any, step: Any) -> Any:
        pairs = zip(kept, pieces, strict=True)
        return [with_piece(one, piece, block, step) for one, piece in pairs]

    def start(piece: slice) -> tuple[jax.Array, ...]:
        batch, (rows, heads, groups) = q.shape[:-4], q[..., piece, :, :, :].shape[-4:-1]
        stats = jnp.zeros((*batch, heads, rows, groups), wide)
        return jnp.zeros((*stats.shape, v.shape[-1]), wide), stats, jnp.full_like(stats, -jnp.inf)

    kept, _ = _around(ring, with_block, list(map(start, pieces)), (k, v, seen.segments))
    total, summed, top = (list(parts) for parts in zip(*kept, strict=True))
    total = jnp.concatenate(total, axis=-3)
    summed, top = (jnp.concatenate(x, axis=-2) for x in (summed, top))
    some = jnp.where(summed > 0, summed, 1)
    out = jnp.moveaxis(total / some[..., None], -3, -4)
    return out.astype(q.dtype), jnp.log(some) + _finite(top)


def _backward(
    ring: _Ring, q: Any, k: Any, v: Any, seen: _Seen, out: Any, norm: Any, g: Any
) -> tuple[Any, Any, Any]:
    """Computes gradients of q, k and v; those of k and v travel with them and arrive at home.

    With weights w = exp(scores - norm) and out = w v, the derivative of the softmax is

        dscores = w * (dw - sum_k w dw),    sum_k w dw = g . out

    so the sum over all keys, most of which are elsewhere, comes from this device's own output.
    """
    wide, pieces = trees.wide(q.dtype), ring.pieces(q.shape[-4])
    weighted = jnp.moveaxis(jnp.sum(g.astype(wide) * out.astype(wide), axis=-1), -2, -3)

    def with_piece(piece: slice, block: Any, step: Any) -> tuple[Any, Any, Any]:
        k, v, segments = _up_to(ring, piece, block)

        def of(x: jax.Array) -> jax.Array:  # (.., rows, kv_heads, groups, dim)
            return x[..., piece, :, :, :]

        def ours(x: jax.Array) -> jax.Array:  # (.., kv_heads, rows, groups), beside scores
            return x[..., piece, :, None]

        scores = _scores(ring, q, k, seen, segments, piece, step)
        weights = jnp.exp(scores - ours(norm))
        dv = _einsum("...hngk,...nhgd->...khd", weights.astype(g.dtype), of(g), wide)
        dweights = _einsum("...nhgd,...khd->...hngk", of(g), v, wide)
        dscores = (weights * (dweights - ours(weighted)) * ring.scale).astype(q.dtype)
        dk = _einsum("...hngk,...nhgd->...khd", dscores, of(q), wide)
        return _einsum("...hngk,...khd->...nhgd", dscores, k, wide), dk, dv

    def with_block(kept: Any, block: Any, step: Any) -> Any:
        dqs, dks, dvs = zip(*(with_piece(piece, block, step) for piece in pieces), strict=True)
        dq = [old + new for old, new in zip(kept, dqs, strict=True)]
        return dq, (total(dks), total(dvs))

    def total(parts: Sequence[jax.Array]) -> jax.Array:
        return functools.reduce(jnp.add, [_padded(x, k.shape[-3]) for x in parts])

    def empty(x: jax.Array) -> jax.Array:
        return jnp.zeros(x.shape, trees.wide(x.dtype))

    start = [empty(q[..., piece, :, :, :]) for piece in pieces]
    block = (k, v, seen.segments)
    dq, (dk, dv) = _around(ring, with_block, start, block, (empty(k), empty(v)))
    return jnp.concatenate(dq, axis=-4), dk, dv


def _around(
    ring: _Ring, with_block: Callable[..., Any], start: Any, block: Any, traveling: Any = None
) -> tuple[Any, Any]:
    """Sends blocks around the ring, until every device has met every block once.

    Args:
        ring: The ring.
        with_block: Called as `with_block(kept, block, step)`; the block met at a step is that of
            the device `step` places before. Returns what is kept, and with `traveling` sums what
            to add to them.
        start: What is kept at first.
        block: The device's own keys, values and segments.
        traveling: Sums that go around with a block, all zeros; None if there are none.

    Returns:
        `(kept, the sums of the device's own block)`.
    """
    n = devices_over(ring.axis)

    def send(tree: Any) -> Any:
        return jax.tree.map(lambda x: lax.ppermute(x, ring.axis, around(n)), tree)

    def meet(kept: Any, block: Any, sums: Any, step: Any) -> tuple[Any, Any]:
        if traveling is None:
            return with_block(kept, block, step), None
        kept, added = with_block(kept, block, step)
        return kept, jax.tree.map(jnp.add, sums, added)

    def one(carry: Any, step: Any) -> tuple[Any, None]:
        kept, block, sums = carry
        coming = send(block)  # ahead of the products of `meet`, which hide the message
        kept, sums = meet(kept, block, sums, step)
        return (kept, coming, send(sums)), None

    block, first = varying(block, [ring.axis]), jnp.int32(0)
    made = jax.eval_shape(meet, start, block, traveling, first)
    kept, sums = agree((start, traveling), made)
    if n > 1:
        steps = jnp.arange(n - 1, dtype=jnp.int32)
        (kept, block, sums), _ = lax.scan(one, (kept, block, sums), steps)
    kept, sums = meet(kept, block, sums, jnp.int32(n - 1))
    return kept, send(sums) if n > 1 else sums


def _scores(
    ring: _Ring, q: Any, k: Any, seen: _Seen, segments: Any, piece: slice, step: Any
) -> jax.Array:
    """Scores of a piece, `(.., kv_heads, rows, groups, keys)`, -inf where a query may not see."""
    part = q[..., piece, :, :, :]
    scores = _einsum("...nhgd,...khd->...hngk", part, k, trees.wide(q.dtype)) * ring.scale
    n, me = devices_over(ring.axis), lax.axis_index(ring.axis)
    where = functools.partial(positions, mesh_axis=ring.axis, striped=ring.striped)
    theirs = where((me - step) % n, k.shape[-3])
    if ring.causal:
        mine = where(me, q.shape[-4])[piece]
        scores = _hidden(scores, (mine[:, None] >= theirs)[:, None, :])
    if seen.segments is not None:
        same = seen.segments[..., piece, None] == segments[..., None, :]
        scores = _hidden(scores, same[..., None, :, None, :])
    if seen.mask is not None:
        rows = seen.mask if seen.mask.shape[-3] == 1 else seen.mask[..., piece, :, :]
        scores = _hidden(scores, jnp.take(rows, theirs, axis=-1))
    return scores


def _hidden(scores: jax.Array, seen: jax.Array) -> jax.Array:
    return jnp.where(seen, scores, -jnp.inf)


def _up_to(ring: _Ring, piece: slice, block: Any) -> Any:
    """Cuts a block to the keys that a piece of the queries may see at all."""
    if not (ring.causal and ring.striped):
        return block
    k, v, segments = block
    if segments is not None:
        segments = segments[..., : piece.stop]
    return k[..., : piece.stop, :, :], v[..., : piece.stop, :, :], segments


def _padded(x: jax.Array, rows: int) -> jax.Array:
    """Adds zeros for the keys that a piece did not see."""
    missing = rows - x.shape[-3]
    if not missing:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, missing), (0, 0), (0, 0)])


def _finite(x: jax.Array) -> jax.Array:
    """0 in place of -inf, the maximum of no scores: -inf less -inf would be NaN."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _einsum(equation: str, a: Any, b: Any, dtype: Any) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=dtype)


def _of_all_keys(mask: Any, keys: int, heads: tuple[int, int], mesh_axis: str) -> Any:
    """Lays a mask `(.., heads, rows, all keys)` out as scores are."""
    if mask is None:
        return None
    n = devices_over(mesh_axis)
    if mask.shape[-1] != keys * n:
        raise ValueError(
            f"ring_attention got a mask of {mask.shape[-1]} keys; {mesh_axis}={n} devices have "
            f"{keys * n} of them. Give a mask (.., heads or 1, own rows, all keys), or leave it to "
            "`causal=True` and `segments=`."
        )
    mask = jnp.asarray(mask).reshape((1,) * max(0, 3 - mask.ndim) + mask.shape)
    split = heads if mask.shape[-3] != 1 else (1, 1)
    apart = mask.reshape(*mask.shape[:-3], *split, *mask.shape[-2:])
    return jnp.moveaxis(apart, -3, -2)


def _check(query: Any, key: Any, value: Any, causal: bool, deterministic: bool) -> None:
    if not deterministic:
        raise ValueError(
            "ring_attention has no dropout of its weights: no device sees them all. Set the "
            "layer's dropout_rate to 0, or drop its outputs instead."
        )
    fits = (
        query.ndim == key.ndim == value.ndim >= 3
        and query.shape[:-3] == key.shape[:-3] == value.shape[:-3]
        and key.shape[-3:-1] == value.shape[-3:-1]
        and query.shape[-1] == key.shape[-1]
        and query.shape[-2] % key.shape[-2] == 0
    )
    if not fits or (causal and query.shape[-3] != key.shape[-3]):
        raise ValueError(
            f"ring_attention got query {query.shape}, key {key.shape}, value {value.shape}; "
            "expected (.., rows, heads, dim), (.., keys, kv_heads, dim), (.., keys, kv_heads, "
            "dim_v), heads a multiple of kv_heads, and with `causal` as many keys as rows."
        )
