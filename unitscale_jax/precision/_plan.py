"""The dtype of every value of a program under autocast, decided before anything is evaluated.

Two walks. Backwards, the demand for float32: from the operands of float32 operations through the
prefix operations that feed them, across calls, to the product, sum or boundary where it stops.
Forwards, the dtypes: each equation's from those of its operands, loops to a fixpoint.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import rules as named_rules
from unitscale_jax.precision._classes import OpClass
from unitscale_jax.trace.params import Origin, provenance, rule_names
from unitscale_jax.trace.program import (
    Flow,
    Jaxpr,
    Place,
    Site,
    bodies,
    is_call,
    is_constant,
    listed,
)
from unitscale_jax.trace.rewrite import dtypes_meant

FLOAT32 = np.dtype(np.float32)
_LOOKUPS = frozenset({"gather", "dynamic_slice"})
DTypes: TypeAlias = tuple[np.dtype | None, ...]


class KnownDtype(NamedTuple):
    """The dtype of a value, and whether it is an activation or adapts to those it meets."""

    dtype: Any
    active: bool = False


@dataclass(frozen=True)
class Decision:
    """The dtypes that autocast evaluates an equation in.

    Attributes:
        operands: The dtype each operand is cast to; None leaves it.
        results: The dtype of each result.
        why: The class of the primitive, or the rule that decided.
        widens: Whether an operand that autocast made narrow is cast back.
    """

    operands: DTypes
    results: DTypes
    why: str
    widens: bool = False

    @property
    def meant(self) -> dict[str, bool]:
        """The note that float32 is meant: the operation needs it, or autocast itself chose it."""
        needed = self.why in ("float32", "prefix of float32")
        return {"wide": True} if needed or self.widens else {}


class Outcome(NamedTuple):
    """The plan's answer for a kind of equation: all of one kind have the same.

    Attributes:
        decision: The dtypes of operands and results.
        results: Knowledge of the results, for the equations that read them.
        changes: Whether it is evaluated otherwise than it was traced.
    """

    decision: Decision
    results: list[KnownDtype]
    changes: bool


@dataclass
class DtypePlan(Flow[KnownDtype]):
    """Decisions by place, as the forward walk makes them."""

    low: tuple[np.dtype, np.dtype]  # of the operands of a product, and of its result
    rules: Sequence[tuple[Any, tuple[np.dtype, np.dtype]]]
    ops: Mapping[str, OpClass]
    origins: dict[Place, tuple[Origin, ...]] = field(default_factory=dict)
    unfollowed: list[tuple[Any, ...]] = field(default_factory=list)  # bodies of no origins yet
    outcomes: dict[Any, Outcome] = field(default_factory=dict)  # by kind of equation
    constants: dict[Any, KnownDtype] = field(default_factory=dict)  # by dtype
    demanded: set[Place] = field(default_factory=set)
    decisions: dict[Place, Decision] = field(default_factory=dict)
    operands: dict[Place, list[KnownDtype]] = field(default_factory=dict)  # of calls and loops
    results: dict[Place, list[KnownDtype]] = field(default_factory=dict)  # likewise
    carries: dict[Place, list[KnownDtype]] = field(default_factory=dict)  # of loops and branches
    changed: set[Place] = field(default_factory=set)  # equations with another dtype, or one inside
    products: dict[Place, Sequence[str]] = field(default_factory=dict)  # by what rules name them
    reasons: dict[Place, str] = field(default_factory=dict)  # what decided on each product
    coded: np.dtype | None = None  # of the result of the product on codes that is walked through

    def prepare(
        self, jaxpr: Jaxpr, origins: Sequence[Origin], parent: Site | None = None, body: int = 0
    ) -> None:
        """Finds demands, and what origins are asked for, of a program or a call's derived body."""
        self.unfollowed.append((jaxpr, origins, parent, body))
        self.demand(jaxpr, [False] * len(jaxpr.outvars), parent, body)

    def origins_at(self, site: Site) -> tuple[Origin, ...]:
        """Origins of the operands of an equation; only rules and derivatives ask for them."""
        while self.unfollowed:
            self.origins |= provenance(*self.unfollowed.pop(0))
        return self.origins[site.place]

    def demand(
        self, jaxpr: Jaxpr, wanted: Sequence[bool], parent: Site | None = None, body: int = 0
    ) -> list[bool]:
        """For each input whether float32 is wanted of it, given that of each result.

        So `x * 0.5 - max` before an `exp` is computed in float32 from the product's result on:
        rounding it to 16 bits again would lose what the `exp` needs.
        """
        needed = {
            v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and not is_constant(v)
        }
        for site in reversed(listed(jaxpr, parent, body)):
            wide = [v in needed for v in site.eqn.outvars]
            passed = zip(site.eqn.invars, self._passed(site, wide), strict=True)
            needed.update([v for v, p in passed if p and not is_constant(v)])
        return [v in needed for v in jaxpr.invars]

    def _passed(self, site: Site, wide: Sequence[bool]) -> Sequence[bool]:
        eqn = site.eqn
        if is_call(eqn):
            return self.demand(bodies(eqn)[0][0], wide, site)
        for number, (inner, _) in enumerate(bodies(eqn)):
            self.demand(inner, [False] * len(inner.outvars), site, number)
        chosen = self._class(site)
        passes = chosen == "float32" or (chosen == "prefix" and any(wide))
        if not passes or dtypes_meant(site):
            return [False] * len(eqn.invars)
        if chosen == "prefix":
            self.demanded.add(site.place)
        return [True] * len(eqn.invars)

    def _class(self, site: Site) -> OpClass:
        """The class of a primitive; scaling by a literal belongs to a prefix."""
        name = site.name
        if name in ("mul", "div") and any(map(is_constant, site.eqn.invars)):
            return "prefix"
        return self.ops.get(name, "keep")

    def constant(self, value: Any) -> KnownDtype:
        """A constant takes the dtype of what it meets."""
        given = getattr(value, "dtype", None)
        if given is None:
            return KnownDtype(jnp.result_type(value))
        if given not in self.constants:
            self.constants[given] = KnownDtype(jnp.result_type(value))
        return self.constants[given]

    def join(self, a: KnownDtype, b: KnownDtype) -> KnownDtype:
        """The widest of two activations; a value that adapts takes the other's dtype."""
        if a.active != b.active and is_float(a.dtype):
            return a if a.active else b
        same = a.dtype == b.dtype
        return KnownDtype(a.dtype if same else _widest(a.dtype, b.dtype), a.active or b.active)

    def on_inputs(self, site: Site, inputs: list[KnownDtype]) -> None:
        """Keeps the dtypes that calls and loops are called with."""
        if bodies(site.eqn):
            self.operands[site.place] = inputs
            if _arrive_changed(site, inputs):
                self._change(site)

    def on_outputs(self, site: Site, outputs: list[KnownDtype]) -> None:
        """Records the dtypes that calls and loops return."""
        if bodies(site.eqn):
            self.results[site.place] = outputs

    def on_fixpoint(self, site: Site, values: list[KnownDtype]) -> None:
        """Keeps the dtypes of carries and branches."""
        self.carries[site.place] = values

    def visit(self, site: Site, inputs: list[KnownDtype]) -> list[KnownDtype]:
        """Decides on the dtypes of one equation."""
        outcome = self._outcome(site, inputs)
        self.decisions[site.place] = outcome.decision
        if self.ops.get(site.name) == "low":
            self.reasons[site.place] = outcome.decision.why
        if outcome.changes:
            self._change(site)
        return outcome.results

    def _outcome(self, site: Site, inputs: list[KnownDtype]) -> Outcome:
        """The layers of a model are alike: most equations are of a kind that was decided on."""
        meant, chosen = dtypes_meant(site), self._class(site)
        if meant or (chosen == "low" and self.rules):
            return self._decided(site, self._decide(site, meant, inputs), inputs)
        precision = site.eqn.params.get("precision") if chosen == "low" else None
        demanded = chosen == "prefix" and site.place in self.demanded
        known = tuple(inputs)
        key = site.name, chosen, site.operands, site.results, known, demanded, precision
        if key not in self.outcomes:
            self.outcomes[key] = self._decided(site, self._decide(site, meant, inputs), inputs)
        return self.outcomes[key]

    def _decided(self, site: Site, decision: Decision, inputs: list[KnownDtype]) -> Outcome:
        if any(map(_is_widened, inputs, site.operands, decision.operands)):
            decision = replace(decision, widens=True)
        casts = zip(decision.operands, site.operands, strict=True)
        casted = any(to not in (None, of) for to, of in casts)
        changes = decision.results != site.results or casted or _arrive_changed(site, inputs)
        active = any(known.active for known in self._shaping(site, inputs))
        return Outcome(decision, [KnownDtype(dtype, active) for dtype in decision.results], changes)

    def _shaping(self, site: Site, inputs: list[KnownDtype]) -> list[KnownDtype]:
        """The operands whose dtype the results follow.

        What only chooses among constants (a mask between 0 and -1e9) does not make them an
        activation; what looks a row of a table up does.
        """
        floats = [known for known in inputs if is_float(known.dtype)]
        chosen = floats and site.name not in _LOOKUPS and self._class(site) != "keep"
        return floats if chosen else inputs

    def _change(self, site: Site | None) -> None:
        while site is not None and site.place not in self.changed:
            self.changed.add(site.place)
            site = site.parent

    def _decide(self, site: Site, meant: str, inputs: list[KnownDtype]) -> Decision:
        if meant:
            return self._meant(site, meant, inputs)
        traced = [*site.operands, *site.results]
        floats = [dtype for dtype in traced if is_float(dtype)]
        if not floats:
            return _kept(site, "no floats")
        if any(_bits(dtype) not in (16, 32) for dtype in floats):
            return _back(_kept(site, "kept: not a float of 16 or 32 bits"), site, inputs)
        return _BY_CLASS[self._class(site)](self, site, inputs)

    def _low(self, site: Site, inputs: list[KnownDtype]) -> Decision:
        """A product, by the first rule that addresses it, else in the compute dtype."""
        operands = site.operands
        if not all(map(is_float, operands[:2])):
            return _kept(site, "kept: no floats")
        given, result, why = self._dtypes(site)
        if why == "kept: precision":
            return _back(_kept(site, why), site, inputs)
        asked = site.results[0]  # wider than its operands, if the user asked for it
        wider = _widest(*operands[:2]) != asked and _bits(asked) > _bits(result)
        casts = tuple(given if is_float(d) else None for d in operands)
        return Decision(casts, (asked if wider else result,), why)

    def _dtypes(self, site: Site) -> tuple[np.dtype, np.dtype, str]:
        """Dtypes of the operands and of the result of a product, and what decided on them."""
        rule = None
        if self.rules:
            names = self.products[site.place] = rule_names(site, self.origins_at(site))
            rule = named_rules.first_match([pattern for pattern, _ in self.rules], names)
        if rule is not None:
            pattern, (given, result) = self.rules[rule]
            return given, result, f"rule {named_rules.text_of(pattern)!r}"
        precise = _is_precise(site.eqn.params.get("precision"))
        return *self.low, "kept: precision" if precise else "low"

    def _meant(self, site: Site, meant: str, inputs: list[KnownDtype]) -> Decision:
        """An equation of a product on codes, which computes as traced, or its result.

        The result has the dtype that the product of the arrays would have, so that it does not
        matter which of two transforms is around the other.
        """
        kept = _kept(site, "as traced")
        if self.ops.get(site.name) == "low":
            given, self.coded, why = self._dtypes(site)
            floats = all(map(is_float, site.operands[:2])) and _bits(site.operands[0]) >= 16
            if why == "kept: precision" and not floats:  # floats on codes ask for it themselves
                self.coded = FLOAT32
            if floats and why != "kept: precision":
                casts = tuple(given if is_float(d) else None for d in site.operands)
                return Decision(casts, site.results, why)
            return replace(kept, why="low" if floats else why)
        if meant == "result" and site.results[0] == FLOAT32:
            dtype, self.coded = self.coded or self.low[1], None
            return replace(kept, results=(dtype,), why="low")
        if meant == "operand" and site.results[0] == FLOAT32:
            dtype = self.low[0] if _bits(self.low[0]) >= 16 else self.low[1]
            dtype = inputs[0].dtype if _bits(inputs[0].dtype) < 32 else dtype
            return Decision((dtype,), (dtype,), "low")
        return kept

    def _prefix(self, site: Site, inputs: list[KnownDtype]) -> Decision:
        """As it follows its operands, unless a float32 operation reads its result."""
        if site.place in self.demanded:
            return _uniform(site, FLOAT32, "prefix of float32")
        return self._follow(site, inputs)

    def _follow(self, site: Site, inputs: list[KnownDtype]) -> Decision:
        """The widest dtype of the activations, which others adapt to."""
        if site.name == "convert_element_type":
            return self._convert(site, inputs[0])
        active = [k.dtype for k in inputs if k.active and is_float(k.dtype)]
        if active:
            return _uniform(site, _widest(*active), "follow")
        if any(known.active for known in inputs) and site.name in _LOOKUPS:
            results = tuple(self.low[1] if is_float(dtype) else dtype for dtype in site.results)
            return Decision((None,) * len(inputs), results, "lookup")
        return _kept(site, "follow")

    def _convert(self, site: Site, known: KnownDtype) -> Decision:
        """A user's cast wins; a truth value is exact in any dtype, so it takes the narrow one."""
        before, after = site.operands[0], site.results[0]
        if before == np.bool_ and after == FLOAT32 and known.active:
            return Decision((None,), (self.low[1],), "follow")
        if is_float(before) and before == after:  # a change of weak type only
            return Decision((None,), (known.dtype,), "follow")
        return Decision((None,), (after,), "cast by the user")


def _float32(plan: DtypePlan, site: Site, inputs: list[KnownDtype]) -> Decision:
    del plan, inputs
    return _uniform(site, FLOAT32, "float32")


def _each(plan: DtypePlan, site: Site, inputs: list[KnownDtype]) -> Decision:
    """Every result has the dtype of the operand at its place."""
    del plan, site
    return Decision((None,) * len(inputs), tuple(k.dtype for k in inputs), "each")


def _keep(plan: DtypePlan, site: Site, inputs: list[KnownDtype]) -> Decision:
    del plan
    return _back(_kept(site, "kept: unknown"), site, inputs)


_BY_CLASS: dict[OpClass, Callable[[DtypePlan, Site, list[KnownDtype]], Decision]] = {
    "low": DtypePlan._low,
    "float32": _float32,
    "prefix": DtypePlan._prefix,
    "follow": DtypePlan._follow,
    "each": _each,
    "keep": _keep,
}
"""How an equation of each class is decided on."""


def _arrive_changed(site: Site, inputs: list[KnownDtype]) -> bool:
    """True if an operand has another dtype than it was traced with."""
    return any(k.dtype != traced for k, traced in zip(inputs, site.operands, strict=True))


def _kept(site: Site, why: str) -> Decision:
    operands = tuple(d if is_float(d) else None for d in site.operands)
    return Decision(operands, site.results, why)


def _back(decision: Decision, site: Site, inputs: list[KnownDtype]) -> Decision:
    """The decision with results back in the dtype that the activations came in.

    An operation kept in float32 in the middle of a bfloat16 model would make float32 of all that
    follows it.
    """
    pairs = zip(inputs, site.operands, strict=True)
    floats = [(k.dtype, traced) for k, traced in pairs if k.active and is_float(k.dtype)]
    narrow = [dtype for dtype, traced in floats if dtype != traced]
    if not narrow:
        return decision
    results = tuple(_widest(*narrow) if d == FLOAT32 else d for d in decision.results)
    return Decision(decision.operands, results, decision.why)


def _uniform(site: Site, dtype: Any, why: str) -> Decision:
    """Gives every float one dtype."""
    operands = tuple(dtype if is_float(traced) else None for traced in site.operands)
    results = tuple(dtype if is_float(traced) else traced for traced in site.results)
    return Decision(operands, results, why)


def _is_widened(known: KnownDtype, traced: Any, to: Any) -> bool:
    """True if autocast made a value narrow, and casts it back to what it was."""
    return to == traced and known.dtype != traced and is_float(traced)


@functools.lru_cache
def _bits(dtype: Any) -> int:
    return jnp.finfo(dtype).bits


def _is_precise(precision: Any) -> bool:
    """True if a user asked for the highest precision of a product."""
    given = precision if isinstance(precision, tuple) else (precision,)
    return jax.lax.Precision.HIGHEST in given


@functools.lru_cache  # asked for every operand of every equation, of a handful of dtypes
def is_float(dtype: Any) -> bool:
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _widest(*dtypes: Any) -> np.dtype:
    """The dtype that holds all; bfloat16 and float16 meet in float32."""
    out = dtypes[0]
    for dtype in dtypes[1:]:
        if out != dtype:
            wider = [d for d in (out, dtype) if _bits(d) > 16]
            out = max(wider, key=_bits) if wider else FLOAT32
    return np.dtype(out)
