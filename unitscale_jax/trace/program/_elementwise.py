"""Rules for zeros of primitives that compute each position from the same position.

Zeros are the marks that removed channels leave in a computation. An operand is *zero* at some
positions, may be NaN or infinite there (*wild*), or is any finite number.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from unitscale_jax.trace.program._primitives import (
    IDENTITIES,
    MULTIPLICATIONS,
    QUOTIENTS,
    SHIFTS,
    SINGULAR,
    VANISHING,
)

State: TypeAlias = Literal["zero", "wild", "any"]


def at_zero(name: str, params: dict[str, Any], states: Sequence[State]) -> State:
    """State of an element-wise result where its operands are in some states.

    mul of ("zero", "any") is zero, div of ("any", "zero") is wild, add of ("zero", "any") is any.
    """
    if "wild" in states:
        return "wild"
    first, rest = states[0], states[1:]
    if name in SINGULAR:
        return "wild" if first == "zero" else "any"
    if name in QUOTIENTS:
        return "wild" if "zero" in rest else first
    if name in MULTIPLICATIONS:
        return any_zero(states)
    if name == "select_n":
        return all_zero(rest)
    if name == "integer_pow" and first == "zero":
        if params["y"] < 0:
            return "wild"
        return "zero" if params["y"] > 0 else "any"
    if name in IDENTITIES or name in SHIFTS:
        return first
    return all_zero(states) if name in VANISHING else "any"


def all_zero(states: Sequence[State]) -> State:
    """Zero if all of some values are; what is made of no value is not zero."""
    if "wild" in states:
        return "wild"
    return "zero" if states and all(state == "zero" for state in states) else "any"


def any_zero(states: Sequence[State]) -> State:
    """Zero if one of some values that are multiplied is."""
    if "wild" in states:
        return "wild"
    return "zero" if "zero" in states else "any"
