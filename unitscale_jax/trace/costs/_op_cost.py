"""The cost of one equation: floating-point operations, transcendentals, and bytes.

Bytes are operands plus results, each moved once, packed to bits for 4-bit dtypes. That is what an
unfused program moves, an upper bound for a fused one. Slices, gathers and scatters move what they
touch, not the array they touch it in; views (reshape, squeeze, ..) move nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax.trace.costs._work import COMBINING, VIEWS, size, update, work
from unitscale_jax.trace.program._compat import Equation


@dataclass(frozen=True)
class OpCost:
    """A cost, of one evaluation of an equation or of many equations together.

    Attributes:
        flops: Arithmetic operations, a multiply-add being two.
        bytes: Bytes of operands and results.
        transcendentals: Evaluations of exp, log, tanh, sqrt, pow, ..
    """

    flops: int = 0
    bytes: int = 0
    transcendentals: int = 0

    def __add__(self, other: "OpCost") -> "OpCost":
        """The cost of both, one after the other."""
        return OpCost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.transcendentals + other.transcendentals,
        )

    def __mul__(self, times: int) -> "OpCost":
        """The cost of the same work, repeated."""
        return OpCost(self.flops * times, self.bytes * times, self.transcendentals * times)


def cost_of(eqn: Equation) -> OpCost:
    """The cost of one evaluation of an equation that has no body which can be entered.

    A primitive that is not in the table (see `is_counted`) has 0 FLOPs and the bytes of its
    operands and results; it is not guessed. A kernel that comes with a `cost_estimate`, as
    `pallas_call` may, costs what that says.
    """
    stated = _stated(eqn)
    if stated is not None:
        return OpCost(stated.flops, stated.bytes_accessed, stated.transcendentals)
    flops, transcendentals = work(eqn) or (0, 0)
    return OpCost(flops, _BYTES.get(eqn.primitive.name, _moved)(eqn), transcendentals)


def is_counted(eqn: Equation) -> bool:
    """True if the FLOPs of an equation are known."""
    return _stated(eqn) is not None or work(eqn) is not None


def operand_dtype(eqn: Equation) -> str:
    """The dtype that an equation computes in: that of its widest floating operand, if it has one.

    So a select computes in what it selects, a gather in what it gathers, and a product of int8
    codes with a bfloat16 activation in bfloat16.
    """
    dtypes = [v.aval.dtype for v in (*eqn.invars, *eqn.outvars) if hasattr(v.aval, "dtype")]
    operands = dtypes[: len(eqn.invars)]

    def rank(dtype: Any) -> tuple[bool, int]:
        return jnp.issubdtype(dtype, jnp.inexact), _bits(dtype)

    return str(max(operands or dtypes, key=rank, default="none"))


def _stated(eqn: Equation) -> Any:
    return eqn.params.get("cost_estimate")


def _bits(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return 8 * dtype.itemsize
    return 0 if dtype == jax.dtypes.float0 else jax.dtypes.itemsize_bits(dtype)


def _nbytes(*values: Any) -> int:
    arrays = [v for v in values if hasattr(v.aval, "dtype")]
    return sum(-(-size(v) * _bits(v.aval.dtype) // 8) for v in arrays)


def _moved(eqn: Equation) -> int:
    return _nbytes(*eqn.invars, *eqn.outvars)


def _taken(eqn: Equation) -> int:
    """Bytes of a slice or a gather: the part that is read, the same written, and the indices."""
    return 2 * _nbytes(*eqn.outvars) + _nbytes(*eqn.invars[1:])


def _put(eqn: Equation) -> int:
    """Bytes of an update in place, which is read and written; the rest are indices.

    The first operand is not moved.
    """
    rest = [v for v in eqn.invars[1:] if v is not update(eqn)]
    return 2 * _nbytes(update(eqn)) + _nbytes(*rest)


def _put_combined(eqn: Equation) -> int:
    """Bytes of a combining scatter, which reads the old values as well."""
    return _put(eqn) + _nbytes(update(eqn))


_BYTES: dict[str, Callable[[Equation], int]] = {
    **dict.fromkeys(VIEWS, lambda _: 0),
    **dict.fromkeys(("slice", "dynamic_slice", "gather", "get"), _taken),
    **dict.fromkeys(("dynamic_update_slice", "scatter", "swap"), _put),
    **dict.fromkeys(COMBINING.split(), _put_combined),
}
