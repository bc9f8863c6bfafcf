"""Rules for zeros, by primitive: which results have them, and which channels it mixes.

Two tables, by primitive. A primitive that is in neither mixes nothing that could still be removed
(its axes are marked), and nothing is known of its results.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from unitscale_jax.trace.dimensions._axis_rules import ALIKE, others
from unitscale_jax.trace.dimensions._factors import Axes, SymbolicDim
from unitscale_jax.trace.program._compat import Equation, dtype_of, shape_of
from unitscale_jax.trace.program._elementwise import State, all_zero, any_zero, at_zero
from unitscale_jax.trace.program._primitives import (
    CUMULATIVE,
    CUTS,
    ELEMENTWISE,
    REDUCTIONS,
    SCATTERS,
    WINDOWS,
    moved_axes,
)
from unitscale_jax.trace.program._walk import Site

AxisKey: TypeAlias = tuple[int, SymbolicDim | None]
"""An axis of a value, and a factor in it."""

EVERYWHERE: AxisKey = (-1, None)


class KnownZeros(NamedTuple):
    """Places where a value holds zeros, and where it may be NaN or infinite.

    Attributes:
        zero: Keys of zeros: along an axis, at the removed channels of a factor; or everywhere.
        wild: Keys at which a number may be NaN or infinite.
    """

    zero: frozenset[AxisKey] = frozenset()
    wild: frozenset[AxisKey] = frozenset()

    def at(self, key: AxisKey) -> State:
        """State of the value at one key."""
        if EVERYWHERE in self.zero or key in self.zero:
            return "zero"
        return "wild" if key in self.wild else "any"


NOTHING, ZERO = KnownZeros(), KnownZeros(frozenset({EVERYWHERE}))


@dataclass(frozen=True)
class ZeroOperands:
    """An equation, the expanded axes of its operands and results, and what the operands know."""

    eqn: Equation
    ins: list[Axes]
    outs: list[Axes]
    known: list[KnownZeros]

    @property
    def name(self) -> str:
        """The name of the equation's primitive."""
        return self.eqn.primitive.name

    def factors(self, operand: int, axis: int) -> set[SymbolicDim]:
        """Symbolic dimensions of one axis of an operand."""
        return {factor for term in self.ins[operand][axis] for factor in term}

    def at(self, operand: int, axis: int, factor: SymbolicDim) -> State:
        """State of an operand along an axis, at the removed channels of a factor in it."""
        return self.known[operand].at((axis, factor))


# ------------------------------------------------------------- what mixes channels of a factor

Mixed: TypeAlias = Iterator[tuple[SymbolicDim, State]]
"""Factors whose channels are added up, and what the removed ones contribute."""

SUMS = frozenset({"reduce_sum", "reduce_or", "reduce_xor"})


def mixes_nothing(call: ZeroOperands) -> Mixed:
    """The rule of most primitives: an output position depends on its own inputs."""
    del call
    return iter(())


def _contracted(call: ZeroOperands, left: int, right: int) -> Mixed:
    for factor in call.factors(0, left) | call.factors(1, right):
        yield factor, any_zero([call.at(0, left, factor), call.at(1, right, factor)])


def _dot_mixes(call: ZeroOperands) -> Mixed:
    (left, right), _ = call.eqn.params["dimension_numbers"]
    for a, b in zip(left, right, strict=True):
        yield from _contracted(call, a, b)


def _ragged_mixes(call: ZeroOperands) -> Mixed:
    (left, right), _ = call.eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    for a, b in zip(left, right, strict=True):
        yield from _contracted(call, a, b)


def _conv_mixes(call: ZeroOperands) -> Mixed:
    dims = call.eqn.params["dimension_numbers"]
    within = call.factors(1, dims.rhs_spec[1])  # the channels in a group; groups are not mixed
    for factor, state in _contracted(call, dims.lhs_spec[1], dims.rhs_spec[1]):
        if factor in within:
            yield factor, state


def _reduction_mixes(call: ZeroOperands) -> Mixed:
    for k in call.eqn.params["axes"]:
        for factor in call.factors(0, k):
            yield factor, call.at(0, k, factor) if call.name in SUMS else "any"


MIXING: dict[str, Callable[[ZeroOperands], Mixed]] = {
    **dict.fromkeys(REDUCTIONS, _reduction_mixes),
    "dot_general": _dot_mixes,
    "conv_general_dilated": _conv_mixes,
    "ragged_dot_general": _ragged_mixes,
}

# ---------------------------------------------------------------------- what the results know

Result: TypeAlias = Callable[[ZeroOperands, int, AxisKey], State]
"""What result number n is at a key."""

Sources: TypeAlias = Callable[[ZeroOperands, int, int], Sequence[int]]
"""The axes of operand i that axis k of a result is made of."""


def _pointwise(call: ZeroOperands, number: int, key: AxisKey) -> State:
    del number
    return at_zero(call.name, call.eqn.params, [known.at(key) for known in call.known])


def _same(call: ZeroOperands, i: int, k: int) -> list[int]:
    del call, i
    return [k]


def _any_axis(call: ZeroOperands, i: int, k: int) -> list[int]:
    """No position is new, so it is enough that all axes with the factor are zero there."""
    del k
    return list(range(len(call.ins[i])))


def _made_of(
    operands: Sequence[int] | Literal["all", "own"],
    sources: Sources = _same,
    combined: Callable[[Sequence[State]], State] = all_zero,
    kept: Callable[[ZeroOperands], bool] = lambda _: True,
) -> Result:
    """The rule of what moves values, or multiplies them.

    Args:
        operands: Which of them make a result; its "own" is the one at its place.
        sources: The axes of an operand that an axis of the result is made of.
        combined: What becomes of their states.
        kept: Whether zeros stay zeros, as far as the parameters of the equation say.
    """

    def result(call: ZeroOperands, number: int, key: AxisKey) -> State:
        k, factor = key
        named = {"all": range(len(call.ins)), "own": [number]}
        those = named[operands] if isinstance(operands, str) else operands
        if factor is None:
            states = [call.known[i].at(EVERYWHERE) for i in those]
        else:
            at = [(i, j) for i in those for j in sources(call, i, k)]
            states = [call.at(i, j, factor) for i, j in at if factor in call.factors(i, j)]
        state = combined(states)
        return "any" if state == "zero" and not kept(call) else state

    return result


def _laid_out(call: ZeroOperands, i: int, k: int) -> list[int]:
    del i  # along a new axis a value is what it was, whatever that axis becomes later
    return moved_axes(Site(call.eqn, 0))[k]


def _left(call: ZeroOperands, i: int, k: int) -> list[int]:
    return [others(len(call.ins[i]), call.eqn.params["axes"])[k]]


def _dot(call: ZeroOperands, i: int, k: int) -> list[int]:
    contracted, batch = call.eqn.params["dimension_numbers"]
    mine = [others(len(call.ins[j]), contracted[j], batch[j]) for j in (0, 1)]
    if k < len(batch[0]):
        return [batch[i][k]]
    k -= len(batch[0]) + i * len(mine[0])
    return [mine[i][k]] if 0 <= k < len(mine[i]) else []


def _ragged(call: ZeroOperands, i: int, k: int) -> list[int]:
    numbers = call.eqn.params["ragged_dot_dimension_numbers"]
    (left, right), _ = numbers.dot_dimension_numbers
    mine = (
        others(len(call.ins[0]), left),
        others(len(call.ins[1]), right, numbers.rhs_group_dimensions),
    )
    k -= i * len(mine[0])
    return [mine[i][k]] if 0 <= k < len(mine[i]) else []


def _conv(call: ZeroOperands, i: int, k: int) -> list[int]:
    dims = call.eqn.params["dimension_numbers"]
    if k == dims.out_spec[0]:
        return [dims.lhs_spec[0]] if i == 0 else []
    if k != dims.out_spec[1]:
        return []
    # A channel is made of the kernel that computes it; in a depthwise one, of one channel as well.
    depthwise = not call.factors(1, dims.rhs_spec[1])
    if i == 1:
        return [dims.rhs_spec[0]]
    return [dims.lhs_spec[1]] if depthwise else []


def _gathered(call: ZeroOperands, i: int, k: int) -> list[int]:
    dims = call.eqn.params["dimension_numbers"]
    if k in dims.offset_dims:
        mine = others(len(call.ins[i]), dims.collapsed_slice_dims, dims.operand_batching_dims)
        return [mine[tuple(dims.offset_dims).index(k)]]
    laid_out = [n for n in range(len(call.outs[0])) if n not in dims.offset_dims].index(k)
    pairs = zip(dims.start_indices_batching_dims, dims.operand_batching_dims, strict=True)
    return [operand for indices, operand in pairs if indices == laid_out]


def _scattered(call: ZeroOperands, i: int, k: int) -> list[int]:
    dims = call.eqn.params["dimension_numbers"]
    if i == 0:
        return [k]
    mine = others(len(call.ins[0]), dims.inserted_window_dims, dims.operand_batching_dims)
    return [dims.update_window_dims[mine.index(k)]] if k in mine else []


def _fills_with_zeros(call: ZeroOperands) -> bool:
    """Out of bounds a gather gives a fill value: zero, or NaN, which no law survives anyway."""
    params = call.eqn.params
    fills, value = "FILL" in str(params["mode"]), params["fill_value"]
    floating = jnp.issubdtype(dtype_of(call.eqn.outvars[0]), jnp.inexact)
    return not fills or (floating if value is None else bool(value == 0 or value != value))


def _pads_with_zeros(call: ZeroOperands) -> bool:
    return call.known[1] == ZERO


def _sees_something(call: ZeroOperands) -> bool:
    """Every window has a position that is not padding, so a maximum of zeros is zero."""
    params = call.eqn.params
    dilated = {*params["base_dilation"], *params["window_dilation"]} != {1}
    narrow = all(
        max(pads) < n
        for pads, n in zip(params["padding"], params["window_dimensions"], strict=True)
    )
    return call.name == "reduce_window_sum" or (narrow and not dilated)


def _not_empty(call: ZeroOperands) -> bool:
    """A maximum over no position is not zero."""
    sizes = shape_of(call.eqn.invars[0])
    return call.name in SUMS or all(sizes[k] for k in call.eqn.params["axes"])


_moved = _made_of([0])


def _top_k(call: ZeroOperands, number: int, key: AxisKey) -> State:
    return _moved(call, 0, key) if number == 0 else "any"  # zeros have places that are none


RESULTS: dict[str, Result] = {
    **dict.fromkeys(ELEMENTWISE, _pointwise),
    **dict.fromkeys(ALIKE, _made_of("own")),
    **dict.fromkeys(CUMULATIVE - {"cumlogsumexp"}, _moved),
    **dict.fromkeys(REDUCTIONS, _made_of([0], _left, kept=_not_empty)),
    **dict.fromkeys(SCATTERS, _made_of([0, 2], _scattered)),
    **dict.fromkeys(WINDOWS, _made_of([0], kept=_sees_something)),
    **dict.fromkeys(CUTS - {"unstack"}, _moved),
    **dict.fromkeys(("broadcast_in_dim", "transpose", "unstack"), _made_of([0], _laid_out)),
    "bitcast_convert_type": _moved,
    **dict.fromkeys(("reshape", "squeeze"), _made_of([0], _any_axis)),
    "concatenate": _made_of("all"),
    "conv_general_dilated": _made_of([0, 1], _conv, any_zero),
    "dot_general": _made_of([0, 1], _dot, any_zero),
    "dynamic_update_slice": _made_of([0, 1]),
    "gather": _made_of([0], _gathered, kept=_fills_with_zeros),
    "ragged_dot_general": _made_of([0, 1], _ragged, any_zero),
    "pad": _made_of([0], kept=_pads_with_zeros),
    "sort": _made_of("own"),
    "stack": _made_of("all", _laid_out),
    "top_k": _top_k,
}
