"""Custom derivatives of a rewritten function: the user's own rules, rewritten by the same table.

The rule is read by differentiating the original call, which runs the user's code and nothing else;
its equations are then replayed. In forward mode that is one function of primals and tangents, in
reverse mode one that returns residuals and one that takes them.

A rule may ask which of its operands are differentiated (`x.perturbed`) and which cotangents are
zero (`symbolic_zeros=True`), and libraries assert what they expect. So the call is differentiated
by exactly those operands that the caller differentiates, and cotangents that nobody made stay
symbolic zeros on their way to the rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from unitscale_jax.trace.program._compat import ClosedJaxpr, Jaxpr, Literal, no_cotangent
from unitscale_jax.trace.program._walk import Site


@dataclass(frozen=True)
class Moving:
    """Whose derivatives a derived body takes and gives.

    Attributes:
        before: Of a jvp the operands of the call whose tangents it takes; of a backward pass the
            results whose cotangents it does.
        after: Of a jvp the results of the call whose tangents it gives; of a backward pass the
            operands whose gradients it does.
    """

    before: Sequence[int] = ()
    after: Sequence[int] = ()


@dataclass(frozen=True)
class Derivative:
    """The equations of one pass of a custom derivative, for the hook `Rewriter.derived`.

    Attributes:
        site: The call whose derivative it is.
        number: 1 for what a call is differentiated by in forward mode (primals and tangents to
            results and tangents) and for the forward pass of reverse mode (primals to results and
            residuals); 2 for its backward pass (residuals and cotangents to gradients).
        closed: Its equations.
        moving: Whose tangents, cotangents and gradients there are.
    """

    site: Site
    number: int
    closed: ClosedJaxpr
    moving: Moving = Moving()


def custom_jvp(rewriter: Any, site: Site, operands: list[Any]) -> Sequence[Any]:
    """Replays a call and the user's rule for its tangent, both rewritten.

    The rule is traced by `jax.jvp` of the original call, with tangents for the operands in `moving`
    alone. Its equations take all primals and these tangents, and give results and the tangents of
    floating results; they are replayed on whatever the operands are by now.
    """
    flat, structure = jax.tree.flatten(operands)
    avals, master = [v.aval for v in site.eqn.invars], _master_leaves(rewriter, structure)
    floats = [k for k, v in enumerate(site.eqn.outvars) if _is_inexact(v.aval)]

    @jax.custom_jvp
    def call(*xs: Any) -> list[Any]:
        return rewriter.inline(site, structure.unflatten(xs))

    def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        is_zero = [isinstance(t, SymbolicZero) for t in tangents]
        moving = _moving(avals, master, [not zero for zero in is_zero])
        if not moving:
            results = call(*primals)
            return results, jax.tree.map(_no_tangent, results)

        def both(xs: Sequence[Any], ts: Sequence[Any]) -> list[Any]:
            out, out_ts = jax.jvp(_open(site, xs, moving), [xs[k] for k in moving], list(ts))
            return [*out, *(out_ts[k] for k in floats)]

        closed = jax.make_jaxpr(both)(avals, [avals[k] for k in moving])
        given = [*structure.unflatten(primals), *(tangents[master[k]] for k in moving)]
        out = rewriter.derived(Derivative(site, 1, closed, Moving(moving, floats)), given)
        moved = dict(zip(floats, _after(site, out), strict=True))
        if site.eqn.params["symbolic_zeros"]:  # the rule may say so of results, too
            still = zip(floats, _after(site, _are_zeros(closed.jaxpr)), strict=True)
            moved |= {k: None for k, zero in still if zero}
        results = out[: len(site.eqn.outvars)]
        return results, [_tangent(rewriter, r, moved.get(k)) for k, r in enumerate(results)]

    call.defjvp(jvp, symbolic_zeros=True)
    return call(*flat)


def custom_vjp(rewriter: Any, site: Site, operands: list[Any]) -> Sequence[Any]:
    """Replays a call and the user's two passes, all rewritten.

    JAX keeps the user's functions and not their equations, so each pass is traced here by
    differentiating the original call: `_forward_pass` traces `jax.vjp` of it, whose residuals are
    the leaves of the pullback, and `_backward_pass` the pullback itself, with traced leaves put
    back into it. Both are then replayed by the rules. Operands that nothing differentiates by are
    constants of both traces, so that rules which assert what is perturbed find what they expect.
    """
    flat, structure = jax.tree.flatten(operands)
    avals, master = [v.aval for v in site.eqn.invars], _master_leaves(rewriter, structure)
    dtypes = [jnp.result_type(x) for x in flat]
    # Another rule cannot tell, and not every place takes one that can (a shard_map outside of jit).
    symbolic = site.eqn.params["symbolic_zeros"]

    @jax.custom_vjp
    def call(*xs: Any) -> list[Any]:
        return rewriter.inline(site, structure.unflatten(xs))

    def fwd(*xs: Any) -> tuple[list[Any], tuple[list[Any], Any]]:
        values = [x.value for x in xs] if symbolic else list(xs)
        moving = _moving(avals, master, [x.perturbed if symbolic else True for x in xs])
        if not moving:
            return call(*values), ([], None)
        return _forward_pass(rewriter, site, structure.unflatten(values), avals, moving)

    def bwd(kept: tuple[list[Any], Any], cotangents: list[Any]) -> tuple[Any, ...]:
        residuals, pullback = kept
        gradients: list[Any] = [None] * len(flat)
        if pullback is None:  # nothing was differentiated
            return tuple(gradients)
        given = [rewriter.master(g) for g in cotangents]
        found = _backward_pass(rewriter, site, residuals, pullback, given)
        for k, g in zip(pullback.moving, found, strict=True):
            gradients[master[k]] = None if g is None else g.astype(dtypes[master[k]])
        return tuple(gradients)

    call.defvjp(fwd, bwd, symbolic_zeros=symbolic)
    return call(*flat)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Pullback:
    """A user's backward pass, without its residuals.

    Attributes:
        structure: The pullback of `jax.vjp` as a tree, whose leaves are the residuals.
        avals: Shapes and dtypes of the residuals.
        moving: The operands that it gives gradients of.
    """

    structure: jax.tree_util.PyTreeDef
    avals: tuple[Any, ...]
    moving: tuple[int, ...]


def _forward_pass(
    rewriter: Any, site: Site, operands: list[Any], avals: Sequence[Any], moving: Sequence[int]
) -> tuple[list[Any], tuple[list[Any], _Pullback]]:
    """Results of the call, and the residuals with the pullback that takes them."""
    structures: list[jax.tree_util.PyTreeDef] = []  # that of the pullback, once traced

    def pull(*xs: Any) -> tuple[list[Any], list[Any]]:
        out, pullback = jax.vjp(_open(site, xs, moving), *(xs[k] for k in moving))
        residuals, tree = jax.tree.flatten(pullback)
        structures[:] = [tree]
        return list(out), residuals

    closed = jax.make_jaxpr(pull)(*avals)
    out = rewriter.derived(Derivative(site, 1, closed), operands)
    count = len(site.eqn.outvars)
    pullback = _Pullback(structures[0], tuple(closed.out_avals[count:]), tuple(moving))
    return out[:count], (_after(site, out), pullback)


def _backward_pass(
    rewriter: Any, site: Site, residuals: list[Any], pullback: _Pullback, cotangents: list[Any]
) -> list[Any]:
    """Gradients of the moving operands; None where the rule wrote zeros.

    Args:
        rewriter: Replays the pass.
        site: The call.
        residuals: Of the forward pass, as it was replayed.
        pullback: How the pass is traced.
        cotangents: One for each result; None or a symbolic zero where nobody made one.
    """
    types: list[Any] = [v.aval for v in site.eqn.outvars]
    is_zero = [g is None or isinstance(g, SymbolicZero) for g in cotangents]
    if all(is_zero):  # where none is left JAX passes over the rule, which may do without
        pairs = zip(cotangents, types, strict=True)
        is_zero = [g is None or not _is_inexact(aval) for g, aval in pairs]
        cotangents = [
            None if g is None else jnp.zeros(g.aval.shape, g.aval.dtype) for g in cotangents
        ]

    def push(leaves: Sequence[Any], cts: Sequence[Any]) -> list[Any]:
        rest = iter(cts)
        pairs = zip(types, is_zero, strict=True)
        full = [no_cotangent(aval) if zero else next(rest) for aval, zero in pairs]
        return list(jax.tree.unflatten(pullback.structure, leaves)(full))

    real = [k for k, zero in enumerate(is_zero) if not zero]
    closed = jax.make_jaxpr(push)(pullback.avals, [types[k] for k in real])
    moving = Moving(real, pullback.moving)
    own = [*residuals, *(cotangents[k] for k in real)]
    out = rewriter.derived(Derivative(site, 2, closed, moving), own)
    zeros = _are_zeros(closed.jaxpr)
    return [None if zero else g for g, zero in zip(out, zeros, strict=True)]


def _master_leaves(rewriter: Any, structure: jax.tree_util.PyTreeDef) -> list[Any]:
    """For each operand which of all leaves takes its gradient; None if none of its leaves does."""
    numbered = structure.unflatten(range(structure.num_leaves))
    return [rewriter.master(x) for x in numbered]


def _moving(avals: Sequence[Any], master: Sequence[Any], moves: Sequence[bool]) -> list[int]:
    """The operands that are differentiated by, given which leaves are."""
    pairs = enumerate(zip(avals, master, strict=True))
    return [k for k, (a, at) in pairs if at is not None and moves[at] and _is_inexact(a)]


def _open(site: Site, xs: Sequence[Any], moving: Sequence[int]) -> Any:
    """The call as a function of some of its operands: JAX takes the others for constants."""

    def call(*given: Any) -> list[Any]:
        new = dict(zip(moving, given, strict=True))
        return site.bind([new.get(k, x) for k, x in enumerate(xs)])

    return call


def _after(site: Site, out: Sequence[Any]) -> list[Any]:
    """The tangents or residuals, which a derived body returns after the results of the call."""
    return list(out[len(site.eqn.outvars) :])


def _tangent(rewriter: Any, result: Any, tangent: Any) -> Any:
    """A result's tangent in the form of the result: that of its master leaf, and zeros."""
    leaves, structure = jax.tree.flatten(result)
    (at,) = _master_leaves(rewriter, jax.tree.structure([result]))
    moves = [tangent if k == at else None for k in range(len(leaves))]
    pairs = zip(leaves, moves, strict=True)
    return structure.unflatten(
        [_no_tangent(x) if t is None else t.astype(jnp.result_type(x)) for x, t in pairs]
    )


def _no_tangent(x: Any) -> SymbolicZero:
    return SymbolicZero(jax.typeof(x).to_tangent_aval())


def _are_zeros(jaxpr: Jaxpr) -> list[bool]:
    """Which results are zeros written into the program, as JAX writes a gradient of None."""
    full = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "broadcast_in_dim"]
    constants = {v: eqn.invars[0] for eqn in full for v in eqn.outvars}
    found = [v if isinstance(v, Literal) else constants.get(v) for v in jaxpr.outvars]
    return [isinstance(v, Literal) and not v.val for v in found]


def _is_inexact(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.inexact)
