"""Proofs that removing channels changes nothing: where a computation holds zeros.

    zero(y; c) for y = Wx + b    if zero(W; c) and zero(b; c)
    Σ_c w_c h_c without channel c is the same    if zero(w; c) or zero(h; c), and both are finite

Set the channels of a factor to zero in all parameters. A second walk carries along which axes of
which values these channels then hold exact zeros, and along which they may be NaN or infinite. If
every contraction over the factor multiplies by a zero there and every sum adds one, the function
without these channels is the function with zeros in them, for all parameters for which that one
stays finite, and so are its gradients. What else mixes the channels (a maximum, a sum of ones)
leaks them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.trace.dimensions._couplings import Record
from unitscale_jax.trace.dimensions._factors import Axes, SymbolicDim
from unitscale_jax.trace.dimensions._zero_rules import (
    EVERYWHERE,
    MIXING,
    NOTHING,
    RESULTS,
    ZERO,
    AxisKey,
    KnownZeros,
    ZeroOperands,
    mixes_nothing,
)
from unitscale_jax.trace.program._compat import is_concrete
from unitscale_jax.trace.program._primitives import REDUCTIONS
from unitscale_jax.trace.program._walk import Flow, Place, Site


class Zeros(Flow[KnownZeros]):
    """The walk that carries knowledge of zeros through a program.

    Attributes:
        leaks: For a factor, what mixes its channels with others although they are not zero.
        sums: The factors over which something was summed.
    """

    def __init__(self, record: Record, watched: set[SymbolicDim]) -> None:
        """A walk over equations whose axes, expanded, are in `record`."""
        self._record, self._watched = record, watched
        self._loops: dict[Place, list[KnownZeros]] = {}
        self.leaks: dict[SymbolicDim, set[str]] = {}
        self.sums: set[SymbolicDim] = set()

    def parameter(self, axes: Axes) -> KnownZeros:
        """Knowledge of a parameter whose removed channels are zero."""
        return KnownZeros(frozenset(self._keys(axes)))

    def constant(self, value: Any) -> KnownZeros:
        """A concrete zero is zero everywhere; of other constants nothing is known."""
        if not is_concrete(value) or np.ndim(value):
            return NOTHING
        if jnp.issubdtype(jnp.result_type(value), jax.dtypes.extended):
            return NOTHING
        return ZERO if value == 0 else NOTHING

    def join(self, a: KnownZeros, b: KnownZeros) -> KnownZeros:
        """Keeps the zeros that both values have."""
        # A value that is zero everywhere is zero at each key of the other, so these are shared.
        zero = a.zero & b.zero
        if a == ZERO:
            zero = b.zero
        elif b == ZERO:
            zero = a.zero
        return KnownZeros(zero, a.wild | b.wild)

    def unstacked(self, site: Site, x: KnownZeros) -> KnownZeros:
        """Every axis moves to the front by one."""
        del site
        return _shifted(x, -1)

    def stacked(self, site: Site, y: KnownZeros) -> KnownZeros:
        """Every axis moves to the back by one."""
        del site
        return _shifted(y, 1)

    def restart(self, site: Site, carry: list[KnownZeros]) -> list[KnownZeros]:
        """Zeros only become fewer, so what a loop has lost once it has lost for good."""
        before = self._loops.get(site.place, carry)
        joined = [self.join(a, b) for a, b in zip(before, carry, strict=True)]
        self._loops[site.place] = joined
        return joined

    def visit(self, site: Site, inputs: list[KnownZeros]) -> list[KnownZeros]:
        """Notes which channels an equation mixes, and says what its results know, by the tables."""
        call = ZeroOperands(site.eqn, *self._record[site.place], inputs)
        for factor, state in MIXING.get(site.name, mixes_nothing)(call):
            if factor not in self._watched:
                continue
            if state != "zero":
                self.leaks.setdefault(factor, set()).add(site.name)
            elif site.name in REDUCTIONS:
                self.sums.add(factor)
        return [self._result(call, number) for number in range(len(call.outs))]

    def _result(self, call: ZeroOperands, number: int) -> KnownZeros:
        rule = RESULTS.get(call.name)
        if rule is None:
            return NOTHING
        if rule(call, number, EVERYWHERE) == "zero":
            return ZERO
        states = {key: rule(call, number, key) for key in self._keys(call.outs[number])}
        zero, wild = (
            frozenset(key for key, state in states.items() if state == wanted)
            for wanted in ("zero", "wild")
        )
        return KnownZeros(zero, wild)

    def _keys(self, axes: Axes) -> set[AxisKey]:
        keys = {(k, f) for k, axis in enumerate(axes) for term in axis for f in term}
        return {(k, f) for k, f in keys if f in self._watched}


def _shifted(known: KnownZeros, by: int) -> KnownZeros:
    if known == ZERO:
        return ZERO
    return KnownZeros(*(frozenset((k + by, f) for k, f in keys if k + by >= 0) for keys in known))
