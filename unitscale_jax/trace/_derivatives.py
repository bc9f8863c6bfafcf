"""Custom derivatives of a rewritten function: the user's own rules, rewritten by the same table.

The rule is read by differentiating the original call, which runs the user's code and nothing else;
its equations are then replayed. In forward mode that is one function of primals and tangents, in
reverse mode one that returns residuals and one that takes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.trace._walk import Site


def custom_jvp(rewriter: Any, site: Site, operands: list[Any]) -> Sequence[Any]:
    """The same value and the user's rule for its tangent, both rewritten."""
    avals, differentiable = _types(site.eqn.invars)

    @jax.custom_jvp
    def call(*xs: Any) -> list[Any]:
        return rewriter.inline(site, list(xs))

    @call.defjvp
    def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        def both(xs: Sequence[Any], ts: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            given = iter(ts)
            full = [
                next(given) if d else _no_tangent(x)
                for x, d in zip(xs, differentiable, strict=True)
            ]
            out, out_ts = jax.jvp(lambda *xs: site.bind(xs), xs, full)
            return list(out), [t for t in out_ts if t.dtype != jax.dtypes.float0]

        real = [t for t, d in zip(tangents, differentiable, strict=True) if d]
        of = [aval for aval, d in zip(avals, differentiable, strict=True) if d]
        closed = jax.make_jaxpr(both)(avals, of)
        out = rewriter.derived(site, 1, closed, [*primals, *real])
        results, moving = out[: len(site.eqn.outvars)], iter(out[len(site.eqn.outvars) :])
        floats = zip(results, _types(site.eqn.outvars)[1], strict=True)
        return results, [next(moving) if f else _no_tangent(r) for r, f in floats]

    return call(*operands)


def custom_vjp(rewriter: Any, site: Site, operands: list[Any]) -> Sequence[Any]:
    """The same value and the user's two passes, all rewritten."""
    avals, differentiable = _types(site.eqn.invars)
    backward: list[jax.tree_util.PyTreeDef] = []  # the pullback's structure, once traced

    @jax.custom_vjp
    def call(*xs: Any) -> list[Any]:
        return rewriter.inline(site, list(xs))

    def pull(*xs: Any) -> tuple[list[Any], list[Any]]:
        out, pullback = jax.vjp(lambda *xs: site.bind(xs), *xs)
        residuals, structure = jax.tree.flatten(pullback)
        backward[:] = [structure]
        return list(out), residuals

    def fwd(*xs: Any) -> tuple[list[Any], tuple[list[Any], Any]]:
        closed = jax.make_jaxpr(pull)(*avals)
        out = rewriter.derived(site, 1, closed, list(xs))
        count = len(site.eqn.outvars)
        like = _Backward(backward[0], tuple(closed.out_avals[count:]))
        return out[:count], (out[count:], like)

    def bwd(residuals: tuple[list[Any], Any], cotangents: list[Any]) -> tuple[Any, ...]:
        values, like = residuals

        def push(leaves: Sequence[Any], cts: Sequence[Any]) -> list[Any]:
            grads = jax.tree.unflatten(like.structure, leaves)(list(cts))
            return [g for g, d in zip(grads, differentiable, strict=True) if d]

        cts = [v.aval for v in site.eqn.outvars]
        closed = jax.make_jaxpr(push)(like.avals, cts)
        out = iter(rewriter.derived(site, 2, closed, [*values, *cotangents]))
        return tuple(next(out) if d else None for d in differentiable)

    call.defvjp(fwd, bwd)
    return call(*operands)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Backward:
    """What the backward pass is traced from: its structure, and its residuals' types."""

    structure: jax.tree_util.PyTreeDef
    avals: tuple[Any, ...]


def _no_tangent(x: Any) -> np.ndarray:
    return np.zeros(np.shape(x), jax.dtypes.float0)


def _types(variables: Sequence[Any]) -> tuple[list[Any], list[bool]]:
    """Abstract values, and which of them have a tangent of their own dtype."""
    avals = [v.aval for v in variables]
    return avals, [jnp.issubdtype(aval.dtype, jnp.inexact) for aval in avals]
