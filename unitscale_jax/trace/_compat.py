"""The only file that knows JAX versions apart, and the only one that reads unstable jaxpr params.

Everything else in `trace/` speaks of equations through these few functions. Verified on JAX 0.10
and 0.12: their scans count carries differently, and bodies are `ClosedJaxpr` in one, bare in the
other.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core

Jaxpr = core.Jaxpr
ClosedJaxpr = core.ClosedJaxpr
Equation = core.JaxprEqn
Literal = core.Literal
Var = core.Var
as_function = core.jaxpr_as_fun

_NAMES = """
jit pjit closed_call core_call remat2 checkpoint
custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr shard_map
"""
CALLS = frozenset(_NAMES.split())
"""Primitives that evaluate one body, whose operands and results are the equation's own."""

INLINABLE = CALLS - {"shard_map"}
"""Calls whose body may replace them where no derivative is taken."""


def opened(body: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """`(jaxpr, consts)` of a body, closed or bare."""
    return (body.jaxpr, body.consts) if isinstance(body, ClosedJaxpr) else (body, ())


def call_body(eqn: Equation) -> Any:
    """The body of an equation of `CALLS`."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            return eqn.params[name]
    raise KeyError(f"{eqn.primitive.name} has no body among its parameters {sorted(eqn.params)}")


def scan_counts(eqn: Equation) -> tuple[int, int]:
    """`(number of constants, number of carries)` of a scan equation."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].update(range(len(eqn.invars))).unpack()
    return len(consts), len(carry)


def while_counts(eqn: Equation) -> tuple[int, int]:
    """`(constants of the condition, constants of the body)` of a while equation."""
    return eqn.params["cond_nconsts"], eqn.params["body_nconsts"]


def while_trips(eqn: Equation) -> int | None:
    """How often a while loop that counts by ones to a known limit runs; None for any other."""
    jaxpr = opened(eqn.params["cond_jaxpr"])[0]
    of_cond, of_body = while_counts(eqn)
    if of_cond or len(jaxpr.eqns) != 1 or jaxpr.eqns[0].primitive.name != "lt":
        return None
    counter, limit = jaxpr.eqns[0].invars
    body = opened(eqn.params["body_jaxpr"])[0]
    if isinstance(counter, Literal) or not isinstance(limit, Literal):
        return None
    k = jaxpr.invars.index(counter)
    start, after = eqn.invars[of_cond + of_body + k], body.outvars[k]
    if not isinstance(start, Literal) or not _adds_one(body, body.invars[of_body + k], after):
        return None
    return max(0, int(limit.val) - int(start.val))


def _adds_one(jaxpr: Jaxpr, before: Var, after: Any) -> bool:
    made = next((e for e in jaxpr.eqns if after in e.outvars), None)
    if made is None or made.primitive.name != "add" or before not in made.invars:
        return False
    return any(isinstance(v, Literal) and v.val == 1 for v in made.invars)


def scope(eqn: Equation) -> str:
    """The named scopes an equation was traced under, inside its own body."""
    return str(eqn.source_info.name_stack)


def bind(eqn: Equation, operands: Sequence[Any]) -> list[Any]:
    """Evaluates one equation on new operands."""
    got = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = got if isinstance(got, tuple) else ((), got)
    out = eqn.primitive.bind(*subfuns, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def varying_axes(value: Any) -> frozenset[str]:
    """The manual mesh axes over which an array, or an abstract one, differs between devices."""
    typed = value if hasattr(value, "manual_axis_type") else jax.typeof(value)
    kind = typed.manual_axis_type
    return frozenset() if kind is None else kind.varying  # None: shard_map without check_vma
