"""Which inputs reach which outputs, and the slice of a function that computes some of its outputs.

Reachability is a union of sets carried forward along the equations; it enters calls and branches
and takes the least fixpoint in loops. An equation it cannot look into passes every operand to every
result, so what it calls independent is independent.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeGuard

import jax

from unitscale_jax.trace import _compat
from unitscale_jax.trace._compat import Equation, Jaxpr, Literal, Var
from unitscale_jax.trace._function import Traced

Reach: TypeAlias = frozenset[int]
NOTHING: Reach = frozenset()


def reach(traced: Traced) -> Any:
    """For each output leaf the positions of the input leaves that it depends on.

    Positions count the leaves of all arguments together. A value reaches through `stop_gradient`
    and through integer and boolean operations: this is dependence, not differentiability.

    Example:
        >>> from unitscale_jax.trace import trace
        >>> reach(trace(lambda x, y: {"sum": x + y, "first": 2 * x}, 1.0, 2.0))
        {'first': frozenset({0}), 'sum': frozenset({0, 1})}
    """
    jaxpr = traced.closed.jaxpr
    out = _forward(jaxpr, [frozenset({i}) for i in range(len(jaxpr.invars))])
    return jax.tree.unflatten(traced.outputs, out)


def _forward(jaxpr: Jaxpr, inputs: Sequence[Reach]) -> list[Reach]:
    known: dict[Var, Reach] = dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda v: NOTHING if isinstance(v, Literal) else known.get(v, NOTHING)
    for eqn in jaxpr.eqns:
        rule = _RULES.get(eqn.primitive.name, _opaque)
        known.update(zip(eqn.outvars, rule(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _opaque(eqn: Equation, inputs: Sequence[Reach]) -> list[Reach]:
    return [NOTHING.union(*inputs)] * len(eqn.outvars)


def _call(eqn: Equation, inputs: Sequence[Reach]) -> list[Reach]:
    return _forward(_compat.opened(_compat.call_body(eqn))[0], inputs)


def _cond(eqn: Equation, inputs: Sequence[Reach]) -> list[Reach]:
    index, *operands = inputs
    branches = [_forward(_compat.opened(b)[0], operands) for b in eqn.params["branches"]]
    return [index.union(*results) for results in zip(*branches, strict=True)]


def _scan(eqn: Equation, inputs: Sequence[Reach]) -> list[Reach]:
    consts, carries = _compat.scan_counts(eqn)
    body = _compat.opened(eqn.params["jaxpr"])[0]
    before, rest = list(inputs[:consts]), list(inputs[consts + carries :])
    step = lambda carry: _forward(body, [*before, *carry, *rest])
    carry = _fixpoint(lambda carry: step(carry)[:carries], inputs[consts : consts + carries])
    return [*carry, *step(carry)[carries:]]


def _while(eqn: Equation, inputs: Sequence[Reach]) -> list[Reach]:
    of_cond, of_body = _compat.while_counts(eqn)
    cond_consts, body_consts = list(inputs[:of_cond]), list(inputs[of_cond : of_cond + of_body])
    cond, body = (_compat.opened(eqn.params[k])[0] for k in ("cond_jaxpr", "body_jaxpr"))

    def step(carry: list[Reach]) -> list[Reach]:
        (stops,) = _forward(cond, [*cond_consts, *carry])  # how often it runs decides every value
        return [stops | c for c in _forward(body, [*body_consts, *carry])]

    return _fixpoint(step, inputs[of_cond + of_body :])


def _fixpoint(step: Callable[[list[Reach]], list[Reach]], start: Sequence[Reach]) -> list[Reach]:
    carry = list(start)
    while (grown := [a | b for a, b in zip(carry, step(carry), strict=True)]) != carry:
        carry = grown
    return carry


_RULES: dict[str, Callable[[Equation, Sequence[Reach]], list[Reach]]] = {
    **dict.fromkeys(_compat.CALLS, _call),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}


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

    def sliced_fn(*args: Any) -> list[Any]:
        closed = traced.closed
        out = _evaluate(closed.jaxpr, closed.consts, traced.flat(*args), wanted)
        return [leaf for leaf, want in zip(out, wanted, strict=True) if want]

    return sliced_fn


def _evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], wanted: Sequence[bool]
) -> list[Any]:
    env: dict[Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= dict(zip(jaxpr.invars, args, strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else env.get(v)
    for eqn, live in _live(jaxpr, wanted)[0]:
        operands = [read(v) for v in eqn.invars]
        if eqn.primitive.name in _compat.INLINABLE:
            out = _evaluate(*_compat.opened(_compat.call_body(eqn)), operands, live)
        else:
            out = _compat.bind(eqn, operands)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(v) if want else None for v, want in zip(jaxpr.outvars, wanted, strict=True)]


def _live(
    jaxpr: Jaxpr, wanted: Sequence[bool]
) -> tuple[list[tuple[Equation, list[bool]]], set[Var]]:
    """The equations the wanted results need, each with which of its own results are needed.

    Also all variables they need, of which those among the inputs are what a caller must supply.
    """
    needed = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and _is_var(v)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        live = [v in needed for v in eqn.outvars]
        if any(live):
            kept.append((eqn, live))
            needed |= _uses(eqn, live)
    return kept[::-1], needed


def _uses(eqn: Equation, live: Sequence[bool]) -> set[Var]:
    """The operands an equation needs for its live results; a call needs what its body needs."""
    if eqn.primitive.name not in _compat.INLINABLE:
        return {v for v in eqn.invars if _is_var(v)}
    body = _compat.opened(_compat.call_body(eqn))[0]
    inside = _live(body, live)[1]
    pairs = zip(eqn.invars, body.invars, strict=True)
    return {v for v, inner in pairs if _is_var(v) and inner in inside}


def _is_var(v: Any) -> TypeGuard[Var]:
    return not isinstance(v, Literal)
