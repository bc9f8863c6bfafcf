"""Parameters in shares, gathered where they are used: ZeRO 3, layer by layer.

    forward:  gather, use, forget        backward:  gather again, use, scatter the gradient's sum

A share goes through the equations of a function in place of its parameter until something computes
with it, inside of loops too, so that of stacked layers one is whole at any moment. A stack that is
shared out along its layers is cut anew ahead of a loop over them: each device trades its layers for
a share of every layer. What is gathered is not kept for the backward pass, nor a cast of it; what
the function rematerializes stays so. The transposed gather is a scattered sum: the gradient of a
share is the share of the whole gradient. Where a function casts a parameter before it uses it, the
cast share travels, and its gradient is still summed in the parameter's dtype.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_type
from unitscale_jax.loss import around
from unitscale_jax.mesh_axes import devices_over, varying
from unitscale_jax.parallel.layouts._context import under
from unitscale_jax.parallel.layouts._layout import Layout
from unitscale_jax.parallel.layouts._specs import Held, held, spec_of, zero_spec
from unitscale_jax.trace.program import (
    MOVES,
    Site,
    primitives_of,
    scan_counts,
    trace_call,
)
from unitscale_jax.trace.rewrite import Rewriter


def gathered(fn: Callable[..., Any], layout: Layout, mesh_axis: str = "dp") -> Callable[..., Any]:
    """Evaluates a function of parameters on this device's shares of them.

    Args:
        fn: `fn(params, *args)`: a loss or an `apply`.
        layout: The layout of the parameters over the other mesh axes; as `layout.over(over)` says,
            each device has its share. Layers that are stacked for a loop may be divided along any
            dimension; those without one that the axis divides, beside that of the layers, are
            gathered before the loop.
        mesh_axis: The mesh axis of the shares, manual where this is called: inside `reduced(...,
            zero=3, gather="layer")`, or a `shard_map` of your own.

    Returns:
        A function of the same signature that takes shares, and whose gradient is one of shares. It
        is traced once per call. Inside a scan, `remat` or `jit` a share stays one until it is used;
        elsewhere (branches, other loops, custom derivatives) it is gathered before.

    Raises:
        ValueError: On a call: a leaf is not a share of the layout's.

    Example:
        >>> def loss(params, x):
        ...     layer = lambda h, w: (jnp.tanh(h @ w), None)
        ...     h = jax.lax.scan(layer, x, params["layers"])[0]
        ...     return us.Mean(jnp.sum(h, -1), jnp.ones(len(h)))
        >>> params, x = {"layers": jnp.ones((3, 8, 8)) / 8}, jnp.ones((8, 8))
        >>> mesh = us.parallel.mesh(dp=8)
        >>> layout = us.parallel.layout(params, {}, mesh)
        >>> by_layer = us.value_and_grad(us.parallel.gathered(loss, layout))
        >>> fn = us.parallel.reduced(by_layer, zero=3, gather="layer", layout=layout)
        >>> with jax.set_mesh(mesh):
        ...     grads = jax.jit(fn)(params, x)[2]
        >>> bool(jnp.allclose(grads["layers"], us.value_and_grad(loss)(params, x)[2]["layers"]))
        True
    """
    check_type("layout", layout, Layout, "a us.parallel.Layout")
    laid = layout.over(mesh_axis)

    @around(fn, "gathered")
    def gathered_fn(params: Any, *args: Any, **kwargs: Any) -> Any:
        shares = _shares(params, layout, laid, mesh_axis)
        # Only their types matter; the compiler drops what computes them.
        dense = [share.whole() if isinstance(share, ParamShare) else share for share in shares]
        call = trace_call(fn, jax.tree.structure(params).unflatten(dense), *args, **kwargs)
        position = dict(zip(call.positions, call.operands, strict=True))
        operands = [shares[k] if k < len(shares) else position[k] for k in call.positions]
        closed = call.closed

        @functools.partial(jax.checkpoint, policy=_kept)
        def evaluate(operands: list[Any]) -> list[Any]:
            return _Gatherer({})(closed.jaxpr, closed.consts, operands)

        return call.finish(evaluate(operands))

    return gathered_fn


def _kept(primitive: Any, *_: Any, **params: Any) -> bool:
    """Whether the forward pass keeps a result for the backward pass; else it is computed again.

    A policy of `jax.checkpoint`. A gathered parameter is not kept, or all layers would be whole at
    once at the end of the forward pass; neither is what only moves one (a cast, a transpose), of
    the same size. All other results are kept, as if there were no policy.
    """
    inside = primitives_of(params)
    moves = MOVES | {"all_gather"}
    gathers = "all_gather" in inside and inside <= moves | {"shard_map"}
    return not (gathers or primitive.name in moves)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["local"],
    meta_fields=["dim", "over", "others", "dtype"],
)
@dataclass(frozen=True)
class ParamShare:
    """One device's share of a parameter, gathered where it is used.

    Attributes:
        local: The share.
        dim: Which dimension is divided, counted from the end, so that rows of a stack have it too.
        over: The mesh axis it is divided over.
        others: The mesh axes that hold each dimension besides.
        dtype: Of the array, where it has been cast since; None for that of the share.
    """

    local: jax.Array
    dim: int = field(metadata=dict(static=True))
    over: str = field(metadata=dict(static=True))
    others: tuple[Held, ...] = field(metadata=dict(static=True))
    dtype: Any = field(default=None, metadata=dict(static=True))

    def whole(self) -> jax.Array:
        """Gathers the shares of all devices into the parameter."""
        axis = self.local.ndim + self.dim
        others = spec_of(self.others[len(self.others) - self.local.ndim :])
        own = self.local.dtype
        return _gather(self.over, axis, others, self.dtype or own, own)(self.local)

    def of_each_row(self) -> "ParamShare | None":
        """Trades a share that is some layers for a share of every layer, or returns None.

        A loop over the layers can take such a share one layer at a time. The trade is an
        all-to-all, whose transpose is another: both ways it sends no more than a share. None means
        that the axis divides no other dimension of the parameter.
        """
        rank, n = self.local.ndim, devices_over(self.over)
        others = self.others[len(self.others) - rank :]
        free = zero_spec(self.local.shape[1:], self.over, n, spec_of(others[1:]))
        if not free:
            return None
        dim = len(free)  # the last that `free` names, counted with the rows

        def trade(x: jax.Array) -> jax.Array:
            return lax.all_to_all(x, self.over, dim, 0, tiled=True)

        return replace(self, local=under(spec_of(others), trade)(self.local), dim=dim - rank)


@functools.cache
def _gather(
    mesh_axis: str, axis: int, others: P, dtype: Any, own: Any
) -> Callable[[jax.Array], jax.Array]:
    """Makes a cast and a gather whose transpose is a cast back and a scattered sum.

    JAX's own transpose sums in the dtype of the cast, and sums of bfloat16 lose digits. Cached, so
    that layers of one shape share one function.
    """

    def whole(x: jax.Array) -> jax.Array:
        return lax.all_gather(x.astype(dtype), mesh_axis, axis=axis, tiled=True)

    def share(ct: jax.Array) -> jax.Array:
        return lax.psum_scatter(ct.astype(own), mesh_axis, scatter_dimension=axis, tiled=True)

    @jax.custom_vjp
    def gather(x: jax.Array) -> jax.Array:
        return under(others, whole)(x)

    def backward(_: None, ct: jax.Array) -> tuple[jax.Array]:
        return (under(others, share)(ct),)

    gather.defvjp(lambda x: (gather(x), None), backward)
    return gather


def _shares(params: Any, layout: Layout, laid: Layout, mesh_axis: str) -> list[Any]:
    """Wraps the leaves that the layout divides over the axis; the others are whole arrays.

    Raises:
        ValueError: A leaf has not the shape of a share.
    """
    n, out = devices_over(mesh_axis), []
    for name, leaf in trees.named_leaves(params).items():
        by = held(laid.by_name[name], leaf.ndim)
        dim = next((k for k, axes in enumerate(by) if mesh_axis in axes), None)
        if dim is None:
            out.append(varying(leaf, [mesh_axis]))
            continue
        whole = dict(zip(trees.names(layout.params), jax.tree.leaves(layout.params), strict=True))
        expected = tuple(s // n if k == dim else s for k, s in enumerate(whole[name].shape))
        if leaf.shape != expected:
            raise ValueError(
                f"{name!r} has shape {leaf.shape}, and a share of {whole[name].shape} over "
                f"{mesh_axis}={n} has {expected}. Call this inside us.parallel.reduced(..., "
                f"zero=3, gather='layer', layout=layout), with the same layout."
            )
        others = tuple(axes if k != dim else () for k, axes in enumerate(by))
        out.append(ParamShare(varying(leaf, [mesh_axis]), dim - leaf.ndim, mesh_axis, others))
    return out


class _Gatherer(Rewriter):
    """Replays equations on shares; what computes with one gathers it."""

    def touches(self, site: Site, operands: list[Any]) -> bool:
        """Whether an operand is a share, or something is rematerialized as the user says."""
        inside = primitives_of(site.eqn.params) | {site.name}
        return any(isinstance(x, ParamShare) for x in operands) or (
            site.name in _ENTERED and not _REMATS.isdisjoint(inside)
        )

    def step(self, site: Site, operands: list[Any]) -> Sequence[Any]:
        if not self.touches(site, operands):
            return site.bind(operands)
        if site.name == "scan":
            first = sum(scan_counts(site.eqn))  # of what the loop takes one by one
            operands = [_for_loop(x, k >= first) for k, x in enumerate(operands)]
        elif site.name in _REMATS:
            return self._apart(site, operands)
        elif site.name == "convert_element_type" and operands[0].dtype is None:
            return [replace(operands[0], dtype=site.results[0])]
        elif site.name not in _ENTERED:
            return site.bind([_whole(x) for x in operands])
        return super().step(site, operands)

    def _apart(self, site: Site, operands: list[Any]) -> Sequence[Any]:
        """Replays a `jax.checkpoint` of the user's, which keeps what the user says, and no more.

        JAX would let the policy of `gathered_fn` decide for what is inside too, and keep nearly all
        of it. As a function with a derivative of its own, the body is closed to that policy.
        """
        own = site.eqn.params["policy"]
        if own is not None:

            def both(*args: Any, **params: Any) -> bool:
                return _kept(*args, **params) and own(*args, **params)

            changed = site.eqn.params | {"policy": both}
            site = replace(site, eqn=site.eqn.replace(params=changed))
        flat, structure = jax.tree.flatten(operands)
        replay = super().step

        def remat(*flat: Any) -> Sequence[Any]:
            return replay(site, structure.unflatten(flat))

        evaluate = jax.custom_vjp(remat)
        evaluate.defvjp(lambda *flat: jax.vjp(remat, *flat), lambda vjp, cts: vjp(cts))
        return evaluate(*flat)

    def carried(self, site: Site, carry: list[Any], step: Any) -> list[Any]:
        """A loop's carry is gathered before the loop."""
        del site, step
        return [_whole(x) for x in carry]

    def partitioned(self, operand: Any, placement: Any) -> Any:
        """Drops the placement of a share in a call: it is that of the whole parameter."""
        return None if isinstance(operand, ParamShare) else placement

    def returned(self, site: Site, results: list[Any]) -> list[Any]:
        """The results of a body are gathered."""
        del site
        return [_whole(x) for x in results]

    def __call__(self, *args: Any) -> list[Any]:
        """Evaluates equations; none of the results is a share."""
        return [_whole(x) for x in super().__call__(*args)]


_REMATS = frozenset({"remat2", "checkpoint"})
_ENTERED = _REMATS | {"jit", "pjit", "scan"}


def _whole(x: Any) -> Any:
    return x.whole() if isinstance(x, ParamShare) else x


def _for_loop(x: Any, stacked: bool) -> Any:
    """Makes an operand one that a loop can take.

    A share along the first axis is one device's layers, and a loop over layers needs all of them:
    it is traded for a share of every layer, or gathered if no dimension will do.
    """
    if not isinstance(x, ParamShare) or -x.dim < x.local.ndim:
        return x
    traded = x.of_each_row() if stacked else None
    return x.whole() if traded is None else traded
