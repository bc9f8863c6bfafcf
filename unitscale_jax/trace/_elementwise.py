"""Primitives that compute each position from the same position, and what they make of zeros.

Zeros are the marks that removed channels leave in a computation. An operand is *zero* at some
positions, may be NaN or infinite there (*wild*), or is any finite number. A primitive without an
entry here is not taken for element-wise.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

State: TypeAlias = Literal["zero", "wild", "any"]


def named(names: str) -> frozenset[str]:
    """A set of primitives, by their names."""
    return frozenset(names.split())


IDENTITIES = named("""
    convert_element_type copy copy_p reduce_precision stop_gradient name sharding_constraint
    layout_constraint unit_scale unit_scale_by straight_through
""")
"""Zero where the first operand is; the others are scalars, or not seen in the value."""

VANISHING = named("""
    add sub add_any neg abs sign floor ceil round max min or xor gt lt ne square sqrt cbrt
    sin tan sinh tanh asin atan asinh atanh atan2 erf erf_inv expm1 log1p bessel_i1e
    real imag conj complex population_count
""")
"""Zero where all operands are."""

SHIFTS = named("shift_left shift_right_logical shift_right_arithmetic")
PRODUCTS = named("mul and")
QUOTIENTS = named("div rem")
SINGULAR = named("log rsqrt pow digamma lgamma acosh")

FINITE = named("""
    exp exp2 logistic cos cosh acos erfc bessel_i0e not clz is_finite eq ge le clamp nextafter
""")
"""Some finite number where the operands are zero."""

ELEMENTWISE = (
    IDENTITIES | VANISHING | SHIFTS | PRODUCTS | QUOTIENTS | SINGULAR | FINITE
) | frozenset({"integer_pow", "select_n"})


def at_zero(name: str, params: dict[str, Any], states: Sequence[State]) -> State:
    """What an element-wise primitive gives where its operands are in some states."""
    if "wild" in states:
        return "wild"
    first, rest = states[0], states[1:]
    if name in SINGULAR:
        return "wild" if first == "zero" else "any"
    if name in QUOTIENTS:
        return "wild" if "zero" in rest else first
    if name in PRODUCTS:
        return any_zero(states)
    if name == "select_n":
        return all_zero(rest)
    if name == "integer_pow" and first == "zero":
        return "zero" if params["y"] > 0 else "wild" if params["y"] < 0 else "any"
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
    return "wild" if "wild" in states else "zero" if "zero" in states else "any"
