"""The account of a rewrite: equations left in floating point, and rules that decided nothing.

A rule ends somewhere: the codes of a parameter that has one, and meets products, reach one of them
at least, or it is an error that names what is in the way. A product that codes have reached may
still be one of floats where scales of groups cross its sum; that is listed, and refused by
`strict`.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unitscale_jax.quant._qtensor import is_quantized, value_of
from unitscale_jax.quant._spec import DotSpec
from unitscale_jax.trace.params import ACTIVATION, Meeting, Origin, provenance, rule_names
from unitscale_jax.trace.program import Jaxpr, Place, Site


@dataclass(frozen=True)
class Unquantized:
    """An equation that got an array back.

    Attributes:
        site: Where.
        why: What was in the way of codes there.
        backward: Whether it is so of its derivative alone.
    """

    site: Site
    why: str
    backward: bool = False


@dataclass
class Account:
    """The record of what a rewrite did with the codes of parameters.

    Attributes:
        jaxpr: The equations of the function.
        sources: What its inputs are.
        left: What was left in floating point.
        reached: Sides of products that came as codes.
        bodies: Forward passes of custom derivatives, whose equations are not among the function's.
    """

    jaxpr: Jaxpr
    sources: Sequence[Origin]
    left: list[Unquantized] = field(default_factory=list)
    reached: list[tuple[Site, int]] = field(default_factory=list)
    bodies: list[tuple[Site, Jaxpr]] = field(default_factory=list)

    @functools.cached_property
    def _origins(self) -> dict[Place, tuple[Origin, ...]]:
        return provenance(self.jaxpr, self.sources)

    def origins(self, site: Site) -> tuple[Origin, ...]:
        """Origins of the operands of an equation, found by a walk when they are first asked for."""
        while self.bodies:
            call, jaxpr = self.bodies.pop(0)
            own = self._origins.get(call.place, ())
            rest = [ACTIVATION] * (len(jaxpr.invars) - len(own))
            self._origins.update(provenance(jaxpr, [*own, *rest], call, 1))
        return self._origins.get(site.place, ())

    def named(self, site: Site) -> str:
        """An equation and what it is of: "dot_general of w"."""
        return f"{site.name} of {' and '.join(rule_names(site, self.origins(site)[:2]))}"

    def __str__(self) -> str:
        """The parameters that stayed in floats, with reasons, as text."""
        each = (f"{self.named(left.site)} ({left.why})" for left in self.left)
        return "; ".join(dict.fromkeys(each))

    def check(self, met: Mapping[str, Sequence[Meeting]], specs: Mapping[str, DotSpec]) -> None:
        """Checks that each parameter with a rule that meets products reached one of them as codes.

        A rule for weights alone asks for no product of integers: where its codes are dequantized,
        they are weights of as few values all the same.

        Raises:
            ValueError: It was not; the message names it and the equations in the way.
        """
        done = {name for site, side in self.reached for name in self._held(site, side)}
        for name, spec in specs.items():
            products = [m for m in met.get(name, ()) if m.kind == "product"]
            if products and spec.x is not None and name not in done:
                raise ValueError(
                    f"{name} has a rule, and every product that it meets stayed in floating "
                    f"point: {self._in_the_way(name)}. Quantize what that makes of it, or name "
                    f"other parameters than {name}."
                )

    def _held(self, site: Site, side: int) -> frozenset[str]:
        origins = self.origins(site)
        return origins[side].parameters if side < len(origins) else frozenset()

    def _in_the_way(self, name: str) -> str:
        """The equations that took an array in place of the codes of a parameter."""

        def meets(site: Site) -> bool:
            return any(name in origin.names for origin in self.origins(site))

        found = [left for left in self.left if not left.backward and meets(left.site)]
        each = (f"{self.named(left.site)} ({left.why})" for left in found or self.left)
        return "; ".join(dict.fromkeys(each))


def arrays_of(operands: Sequence[Any]) -> list[Any]:
    """Operands with an array for whatever is quantized."""
    return [value_of(x) if is_quantized(x) else x for x in operands]
