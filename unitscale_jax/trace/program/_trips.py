"""Turns of a loop that counts, read from its equations.

    i = s;  while i < n:  i += d        runs max(0, ⌈(n - s) / d⌉) times

Both sides of the test are lines in the number of turns t: the counter is `s + d t`, a limit is
`n + 0 t`. So the test compares their difference, one line, with zero, and two counters that
approach each other are no special case.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from unitscale_jax.trace.program import _compat
from unitscale_jax.trace.program._compat import Atom, Equation, Jaxpr, Literal, Var


class Count(NamedTuple):
    """An integer known up to a carry: carry number `carry` at the start of a turn + `number`."""

    carry: int | None
    number: int


class Test(NamedTuple):
    """A comparison of two counters, which decides whether a loop goes on."""

    name: str
    left: Count
    right: Count


Counted = Count | Test | None
Enter = Callable[[Equation], Jaxpr | None]


def while_trips(eqn: Equation) -> int | None:
    """Number of turns of a while loop that counts up or down to a known limit; else None."""
    opened, inlinable = _compat.opened, _compat.INLINABLE
    cond, body = (opened(eqn.params[key])[0] for key in ("cond_jaxpr", "body_jaxpr"))
    consts = sum(_compat.while_counts(eqn))

    def inside(eqn: Equation) -> Jaxpr | None:
        return opened(_compat.call_body(eqn))[0] if eqn.primitive.name in inlinable else None

    return turns(cond, body, eqn.invars[:consts], eqn.invars[consts:], inside)


def turns(
    cond: Jaxpr, body: Jaxpr, consts: Sequence[Any], init: Sequence[Any], enter: Enter
) -> int | None:
    """Number of turns of a while loop; None where only its data say.

    Args:
        cond: From constants of its own and the carries, whether to go on.
        body: From constants of its own and the carries, the carries.
        consts: Operands of the loop: the constants of `cond`, then those of `body`.
        init: Operands of the loop: the first carries.
        enter: The body of an equation that is a call; None for other equations.
    """
    of_cond = len(cond.invars) - len(init)
    given, start = [_literal(v) for v in consts], [_literal(v) for v in init]
    carries = [Count(k, 0) for k in range(len(init))]
    after = _counted(body, [*given[of_cond:], *carries], body.outvars, enter)
    (test,) = _counted(cond, [*given[:of_cond], *carries], cond.outvars, enter)
    if not isinstance(test, Test):
        return None
    left, right = _line(test.left, start, after), _line(test.right, start, after)
    if left is None or right is None:
        return None
    found = _until(test.name, left[0] - right[0], left[1] - right[1])
    if found is None:
        return None
    sides = ((test.left, left), (test.right, right))
    return found if all(_in_range(side, line, found, init) for side, line in sides) else None


def _line(
    side: Count, start: Sequence[Counted], after: Sequence[Counted]
) -> tuple[int, int] | None:
    """The start of a side of the test, and what every turn adds to it."""
    if side.carry is None:
        return side.number, 0
    s, a = start[side.carry], after[side.carry]
    if not (isinstance(s, Count) and isinstance(a, Count) and a.carry == side.carry):
        return None
    return s.number + side.number, a.number


def _until(name: str, gap: int, step: int) -> int | None:
    """The first t >= 0 at which `gap + step t` no longer stands in a relation to zero.

    `gap` is one side of the comparison less the other before the first turn, and `step` what a turn
    adds to it: `i < n` from i = s in steps of d has gap s - n and step d. None where the relation
    holds for ever, and so the loop does not end.

        lt    gap + step t >= 0    first at ⌈-gap / step⌉
        le    gap + step t >= 1    first at ⌈(1 - gap) / step⌉, as all are integers
    """
    if name == "eq":  # holds at t = 0 alone, unless nothing moves
        if gap:
            return 0
        return 1 if step else None
    if name == "ne":  # ends where the line meets zero exactly, which it may step over
        if gap == 0:
            return 0
        meets = step != 0 and gap % step == 0 and -gap // step > 0
        return -gap // step if meets else None
    if name in ("gt", "ge"):  # gap > 0 is -gap < 0
        gap, step = -gap, -step
    # Now gap < 0, or gap <= 0, has to fail: the line must rise by so much, rounded up to turns;
    # -(-a // b) is ⌈a / b⌉ in integers.
    missing = -gap + (name in ("le", "ge"))
    if missing <= 0:
        return 0
    return -(-missing // step) if step > 0 else None


def _in_range(side: Count, line: tuple[int, int], turns: int, init: Sequence[Any]) -> bool:
    """True if a counter stays in the range of its dtype, beyond which it would wrap around.

    An int8 that counts to 200 never gets there: 127 + 1 is -128, and the test holds for ever.
    """
    if side.carry is None:
        return True
    limits, (start, step) = jnp.iinfo(init[side.carry].aval.dtype), line
    return all(limits.min <= at <= limits.max for at in (start, start + step * turns))


def _literal(v: Atom) -> Counted:
    """The number that a literal integer is; None of a variable, or of another literal."""
    return Count(None, int(v.val)) if isinstance(v, Literal) and _is_integer(v) else None


def _is_integer(v: Atom) -> bool:
    return _compat.shape_of(v) == () and jnp.issubdtype(_compat.dtype_of(v), jnp.integer)


def _counted(
    jaxpr: Jaxpr, inputs: Sequence[Counted], wanted: Sequence[Any], enter: Enter
) -> list[Counted]:
    """Counters among some variables of a body, given those among its inputs.

    Read backward from what is wanted, so that no equation is looked at that the counter does not
    depend on: a loop's body may be a whole model, and its counter one addition.
    """
    made = {v: (eqn, i) for eqn in jaxpr.eqns for i, v in enumerate(eqn.outvars)}
    given = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(v: Atom) -> Counted:
        return _literal(v) if isinstance(v, Literal) else of(v)

    @functools.cache
    def of(v: Var) -> Counted:
        if v not in made or _compat.shape_of(v):
            return given.get(v)
        eqn, number = made[v]
        inner, rule = enter(eqn), _RULES.get(eqn.primitive.name)
        operands = [read(x) for x in eqn.invars] if inner or rule else []
        if inner:
            return _counted(inner, operands, [inner.outvars[number]], enter)[0]
        return rule(eqn, *operands) if rule else None

    return [read(v) for v in wanted]


def _add(eqn: Equation, a: Counted, b: Counted, sign: int = 1) -> Counted:
    del eqn
    if not (isinstance(a, Count) and isinstance(b, Count)):
        return None
    if b.carry is None:
        return Count(a.carry, a.number + sign * b.number)
    return Count(b.carry, a.number + b.number) if a.carry is None and sign == 1 else None


def _sub(eqn: Equation, a: Counted, b: Counted) -> Counted:
    return _add(eqn, a, b, sign=-1)


def _convert(eqn: Equation, a: Counted) -> Counted:
    before, after = map(_compat.dtype_of, (eqn.invars[0], eqn.outvars[0]))
    return a if _is_integer(eqn.outvars[0]) and np.can_cast(before, after, "safe") else None


def _compare(eqn: Equation, a: Counted, b: Counted) -> Counted:
    both = isinstance(a, Count) and isinstance(b, Count)
    return Test(eqn.primitive.name, a, b) if both else None


_RULES: dict[str, Callable[..., Counted]] = {
    "add": _add,
    "sub": _sub,
    "convert_element_type": _convert,
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), _compare),
}
