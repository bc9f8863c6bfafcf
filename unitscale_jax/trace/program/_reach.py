"""Which inputs reach which outputs, and the slice of a function that computes some of its outputs.

Reachability is a union of sets carried forward along the equations. An equation that cannot be
entered passes every operand to every result, so what it calls independent is independent.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax

from unitscale_jax.trace.program import _compat
from unitscale_jax.trace.program._compat import Atom, Jaxpr, Literal, Var
from unitscale_jax.trace.program._function import Traced
from unitscale_jax.trace.program._live import live
from unitscale_jax.trace.program._walk import Flow, Site, walk

Reach: TypeAlias = frozenset[int]
NOTHING: Reach = frozenset()


def reach(traced: Traced) -> Any:
    """For each output leaf the positions of the input leaves that it depends on.

    Positions count the arrays of all arguments together. A value reaches through `stop_gradient`
    and through integer and boolean operations: this is dependence, not differentiability.

    Example:
        >>> from unitscale_jax.trace import trace
        >>> reach(trace(lambda x, y: {"sum": x + y, "first": 2 * x}, 1.0, jnp.ones(())))
        {'first': frozenset({0}), 'sum': frozenset({0, 1})}
    """
    jaxpr = traced.closed.jaxpr
    inputs = [frozenset({i}) for i in range(len(jaxpr.invars))]
    out = walk(_Reach(), jaxpr, inputs, traced.closed.consts)
    return jax.tree.unflatten(traced.outputs, out)


class _Reach(Flow[Reach]):
    def constant(self, value: Any) -> Reach:
        del value
        return NOTHING

    def visit(self, site: Site, inputs: list[Reach]) -> list[Reach]:
        return [NOTHING.union(*inputs)] * len(site.eqn.outvars)

    def join(self, a: Reach, b: Reach) -> Reach:
        return a | b

    def select(self, site: Site, by: Reach, out: Reach) -> Reach:
        del site
        return by | out  # which branch, or how often a loop runs, decides every value


def sliced(traced: Traced, wanted: Sequence[bool]) -> Callable[..., list[Any]]:
    """The part of a function that computes the wanted leaves of its result, and nothing else.

    Calls are inlined and cut in turn; effects (prints, callbacks) that the wanted leaves do not
    need do not happen. It is meant for evaluation: a `custom_vjp` inside loses its derivative.

    Args:
        traced: The function.
        wanted: For each leaf of the result, whether to compute it.

    Returns:
        A function of the same arguments that returns the list of the wanted leaves.

    Example:
        >>> from unitscale_jax.trace import trace
        >>> both = trace(lambda x, y: (x + 1.0, y.sum()), 1.0, jnp.ones(3))
        >>> [float(x) for x in sliced(both, [True, False])(1.0, jnp.ones(3))]
        [2.0]
    """

    def sliced_fn(*args: Any, **kwargs: Any) -> list[Any]:
        closed = traced.closed
        out = _evaluate(closed.jaxpr, closed.consts, traced.flat(*args, **kwargs), wanted)
        return [leaf for leaf, want in zip(out, wanted, strict=True) if want]

    return sliced_fn


def _evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], wanted: Sequence[bool]
) -> list[Any]:
    env: dict[Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= dict(zip(jaxpr.invars, args, strict=True))

    def read(v: Atom) -> Any:  # None for what nothing needs
        return v.val if isinstance(v, Literal) else env.get(v)

    needed, _ = live(jaxpr, wanted, _compat.INLINABLE, effects=False)
    for eqn, own in zip(jaxpr.eqns, needed, strict=True):
        if not any(own):
            continue
        operands = [read(v) for v in eqn.invars]
        if eqn.primitive.name in _compat.INLINABLE:
            out = _evaluate(*_compat.opened(_compat.call_body(eqn)), operands, own)
        else:
            out = _compat.bind(eqn, operands)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(v) if want else None for v, want in zip(jaxpr.outvars, wanted, strict=True)]
