"""Where a value comes from: the parameter it holds, and the inputs that reach it.

Rules of every op-level technique name parameters, the one thing that Linen, NNX and plain JAX
share. A value *holds* a parameter as long as it was only moved (cast, reshaped, transposed,
broadcast, scaled, frozen, sliced from a stack, joined with others, passed into a call) and is
*derived* from parameters when no other input reaches it (a gain plus one, a masked kernel).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_type
from unitscale_jax.trace.program._compat import Equation, Jaxpr
from unitscale_jax.trace.program._function import TracedCall
from unitscale_jax.trace.program._primitives import JOINS, moved
from unitscale_jax.trace.program._walk import Flow, Place, Site, walk
from unitscale_jax.trace.rewrite._notes import scope_without_notes


@dataclass(frozen=True)
class Origin:
    """The inputs that a value is computed from.

    Attributes:
        holds: Names of the parameters whose numbers it holds, moved but not computed with: one, or
            those of kernels that were joined.
        parameters: Names of all the parameters that reach it.
        active: Whether an input that is no parameter reaches it.
        joined: Names of the parameters that the parts of a join come from, where each part has
            names and one is computed, as codes are that a training step joins. A report shows
            them; rules do not, since what a rule says of a parameter it says of its own numbers.
    """

    holds: frozenset[str] = frozenset()
    parameters: frozenset[str] = frozenset()
    active: bool = False
    joined: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters it holds, or the one that it is derived from; () for anything else."""
        alone = not self.active and len(self.parameters) == 1
        return tuple(sorted(self.holds or (self.parameters if alone else ())))

    @property
    def parameter(self) -> str | None:
        """The one parameter it holds or is derived from; None for anything else."""
        return self.names[0] if len(self.names) == 1 else None


_NONE = frozenset[str]()
CONSTANT = Origin()
ACTIVATION = Origin(active=True)


def provenance(
    jaxpr: Jaxpr, inputs: Sequence[Origin], parent: Site | None = None, body: int = 0
) -> dict[Place, tuple[Origin, ...]]:
    """The origin of every operand of every equation, calls and loops themselves included.

    Args:
        jaxpr: The equations of a function.
        inputs: What its inputs are: `parameter(name)`, or `ACTIVATION` for anything else.
        parent: The call whose body number `body` this is; None at the top.
        body: See `parent`.

    Returns:
        Place of an equation (`Site.place`) -> origins of its operands.

    Law: a parameter is among `parameters` of an operand if changing it changes the operand.
    """
    check_type("the equations", jaxpr, Jaxpr, "a Jaxpr, as `closed.jaxpr`")
    flow = Provenance()
    walk(flow, jaxpr, inputs, [None] * len(jaxpr.constvars), parent, body)
    return flow.operands


def parameter(name: str) -> Origin:
    """The origin of a parameter that nothing was done to.

    Example:
        >>> from unitscale_jax.trace import trace
        >>> double = trace(lambda w, x: x @ (2 * w), jnp.ones((2, 2)), jnp.ones((1, 2)))
        >>> at = provenance(double.closed.jaxpr, [parameter("w"), ACTIVATION])
        >>> [origin.parameter for origin in at[(1,)]]
        [None, 'w']
    """
    return Origin(frozenset({name}), frozenset({name}))


def input_origins(staged: TracedCall, params: Any) -> list[Origin]:
    """The origins of the operands of a call whose first argument is `params`."""
    owners = trees.owners(params)
    return [parameter(owners[k]) if k < len(owners) else ACTIVATION for k in staged.positions]


@dataclass
class Provenance(Flow[Origin]):
    """The flow of origins; `operands` collects those of every equation's operands by place."""

    operands: dict[Place, tuple[Origin, ...]] = field(default_factory=dict)

    def constant(self, value: Any) -> Origin:
        """The origin of a constant, which comes from nowhere."""
        del value
        return CONSTANT

    def on_inputs(self, site: Site, inputs: list[Origin]) -> None:
        """Records the operands; in a loop the last walk knows most."""
        self.operands[site.place] = tuple(inputs)

    def visit(self, site: Site, inputs: list[Origin]) -> list[Origin]:
        """Origins of the results: moves hold what they move, and everything else mixes."""
        if site.name == "optimization_barrier":
            return inputs
        parameters = frozenset[str]().union(*[origin.parameters for origin in inputs])
        active = any([origin.active for origin in inputs])
        sources = moved(site, inputs)
        if sources is None:
            return [Origin(_NONE, parameters, active)] * len(site.eqn.outvars)
        joins = site.name in JOINS
        return [
            Origin(held, parameters, active, _NONE if held else _joined(values, joins))
            for values, held in zip(sources, map(_held, sources), strict=True)
        ]

    def join(self, a: Origin, b: Origin) -> Origin:
        """The origin of a value that is either of two."""
        holds = a.holds if a.holds == b.holds else frozenset()
        joined = a.joined if a.joined == b.joined else frozenset()
        return Origin(holds, a.parameters | b.parameters, a.active or b.active, joined)

    def select(self, site: Site, by: Origin, out: Origin) -> Origin:
        """The origin of a value that a predicate decides on, which is part of it."""
        del site
        parameters, active = out.parameters | by.parameters, out.active or by.active
        return Origin(out.holds, parameters, active, out.joined)


def _held(values: Sequence[Origin]) -> frozenset[str]:
    """The parameters that values hold together; none if one of them holds anything else."""
    others = [origin for origin in values if not origin.holds and origin != CONSTANT]
    return _NONE if others else _NONE.union(*(origin.holds for origin in values))


def _joined(values: Sequence[Origin], joins: bool) -> frozenset[str]:
    """Names of the parameters that the parts of a join come from; none where a part has no name.

    A move of a joined value keeps them.
    """
    if not joins:
        return values[0].joined
    parts = [origin.names or origin.joined for origin in values if origin != CONSTANT]
    return _NONE.union(*parts) if all(parts) else _NONE


def rule_names(site: Site, origins: Sequence[Origin]) -> list[str]:
    """The names by which a rule may address an equation, the most telling first.

    The parameters of its operands; without one its named scopes, where it has any, and its kind:
    "attention" for a product of two activations with batch axes, "dot" for any other product,
    else the name of the primitive.
    """
    found = [name for origin in origins for name in origin.names]
    if found:
        return list(dict.fromkeys(found))
    return [name for name in (scope_without_notes(site), kind(site.eqn)) if name]


def kind(eqn: Equation) -> str:
    """The kind of operation that an equation is, in the word that rules have for it."""
    name = eqn.primitive.name
    if name != "dot_general":
        return "conv" if name == "conv_general_dilated" else name
    batch = eqn.params["dimension_numbers"][1][0]
    return "attention" if batch else "dot"
