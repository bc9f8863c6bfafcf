"""Liveness: the equations that results need, and which results of each."""

from collections.abc import Collection, Sequence

from unitscale_jax.trace.program import _compat
from unitscale_jax.trace.program._compat import Equation, Jaxpr
from unitscale_jax.trace.program._walk import is_constant


def live(
    jaxpr: Jaxpr, wanted: Sequence[bool], calls: Collection[str], effects: bool
) -> tuple[list[list[bool]], list[bool]]:
    """For each equation which of its results are needed, and which inputs of the body are.

    Args:
        jaxpr: The body.
        wanted: Which of its results are wanted.
        calls: Primitives that need of their operands what their body needs; others need all.
        effects: Whether an equation with an effect (a print, a callback) is needed anyway.
    """
    needed = {
        v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and not is_constant(v)
    }
    found = []
    for eqn in reversed(jaxpr.eqns):
        own = [v in needed for v in eqn.outvars]
        found.append(own)
        if any(own) or (effects and eqn.effects):
            uses = zip(eqn.invars, _uses(eqn, own, calls, effects), strict=True)
            needed |= {v for v, use in uses if use and not is_constant(v)}
    return found[::-1], [v in needed for v in jaxpr.invars]


def _uses(eqn: Equation, own: Sequence[bool], calls: Collection[str], effects: bool) -> list[bool]:
    """For each operand, whether the needed results of an equation need it."""
    if eqn.primitive.name in calls:
        return live(_compat.opened(_compat.call_body(eqn))[0], own, calls, effects)[1]
    return [True] * len(eqn.invars)
