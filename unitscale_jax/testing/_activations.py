"""Which values of a function are its activations: what layers make, and where paths join.

A layer is a product with a parameter and all that a factor or a bias does to its result; so
`x @ w`, `in^-1/2 (x @ w)` and `x @ w + b` are one activation each, the last of the chain. Products
of activations (attention), lookups and sums of two paths (a residual stream) are others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp

from unitscale_jax.trace.params import input_origins, meetings, product_of, provenance, rule_names
from unitscale_jax.trace.program import (
    ADDITIONS,
    IN_PLACE,
    MULTIPLICATIONS,
    QUOTIENTS,
    SHAPED,
    Flow,
    Place,
    Site,
    trace_call,
    walk,
)
from unitscale_jax.typing import Params

Made: TypeAlias = Literal["product", "lookup", "sum"]


@dataclass(frozen=True)
class Activation:
    """An activation of a function.

    Attributes:
        name: The parameter that makes it; where none does "sum", or of a product its named scope,
            or "attention" or "dot".
        made: By which operation.
        last: Whether no further product follows it, as none follows logits.
    """

    name: str
    made: Made
    last: bool = False


def activations(fn: Callable[..., Any], params: Params, *args: Any) -> dict[Place, Activation]:
    """Places of the equations that end activations, in the order in which these are made.

    Example:
        >>> fn = lambda p, x: jnp.tanh(0.5 * (x @ p["a"])) @ p["b"]
        >>> params = {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 2))}
        >>> for place, of in activations(fn, params, jnp.ones((3, 2))).items():
        ...     print(place, of.name, of.made, of.last)
        (1,) a product False
        (3,) b product True
    """
    staged = trace_call(fn, params, *args)
    origins = input_origins(staged, params)
    named = provenance(staged.closed.jaxpr, origins)
    last = {m.site.place: m.last for met in meetings(staged, params).values() for m in met}
    flow = _Making()
    known = [_Seen(origin.active, bool(origin.parameters)) for origin in origins]
    walk(flow, staged.closed.jaxpr, known, staged.closed.consts)
    found = {}
    for place, (site, made) in sorted(flow.made.items(), key=lambda item: item[0]):
        if made == "sum" and place not in flow.followed:  # a term of the loss, and no stream
            continue
        name = "sum" if made == "sum" else rule_names(site, named[place])[0]
        found[flow.ends[place]] = Activation(name, made, last.get(place, False))
    return found


@dataclass(frozen=True)
class _Seen:
    """What is known of a value.

    Attributes:
        active: Whether an input that is no parameter reaches it.
        given: Whether a parameter reaches it.
        of: The activation that it is, but for factors and a bias; where that was made.
        since: The activations that it is computed from, without another one in between.
    """

    active: bool = False
    given: bool = False
    of: Place | None = None
    since: frozenset[Place] = frozenset()


@dataclass
class _Making(Flow[_Seen]):
    """The flow of activations: where each is `made`, where its chain `ends`, and what follows."""

    made: dict[Place, tuple[Site, Made]] = field(default_factory=dict)
    ends: dict[Place, Place] = field(default_factory=dict)
    followed: set[Place] = field(default_factory=set)

    def constant(self, value: Any) -> _Seen:
        """A constant is no activation."""
        del value
        return _Seen()

    def join(self, a: _Seen, b: _Seen) -> _Seen:
        """What is one of two activations is neither for sure."""
        of = a.of if a.of == b.of else None
        return _Seen(a.active or b.active, a.given or b.given, of, a.since | b.since)

    def visit(self, site: Site, inputs: list[_Seen]) -> list[_Seen]:
        """Finds what is made, and follows it through factors and biases."""
        out = _Seen(
            any(x.active for x in inputs),
            any(x.given for x in inputs),
            None,
            frozenset[Place]().union(*[x.since for x in inputs]),
        )
        floating = all(jnp.issubdtype(dtype, jnp.inexact) for dtype in site.results)
        made = self._made(site, inputs) if floating and site.result_shapes[0] else None
        if made is not None:
            self.made[site.place], self.ends[site.place] = (site, made), site.place
            if made == "product":
                self.followed |= out.since
            return [replace(out, of=site.place, since=frozenset({site.place}))]
        same = _continued(site, inputs)
        if same is not None:
            self.ends[same] = site.place
        return [replace(out, of=same)] * len(site.eqn.outvars)

    def _made(self, site: Site, inputs: Sequence[_Seen]) -> Made | None:
        if not any(x.given for x in inputs):
            return None
        if product_of(site) is not None:
            return "product" if any(x.active for x in inputs[:2]) else None
        if site.name == "gather":
            return "lookup" if not inputs[0].active else None
        joins = site.name in ("add", "add_any") and all(x.active for x in inputs)
        # In `x + x**3`, part of an activation function, one term comes from the other.
        pairs = zip(inputs, reversed(inputs), strict=True)
        paths = joins and any(a.of is not None and a.of not in b.since for a, b in pairs)
        return "sum" if paths else None


def _continued(site: Site, inputs: Sequence[_Seen]) -> Place | None:
    """The activation that an equation's result still is: moved, scaled, or with a bias."""
    if site.name in IN_PLACE | SHAPED:
        return inputs[0].of
    if site.name not in ADDITIONS | MULTIPLICATIONS | QUOTIENTS:
        return None
    changing = [x for x in inputs if x.active]
    inverse = site.name in QUOTIENTS and inputs[1].active
    return changing[0].of if len(changing) == 1 and not inverse else None
