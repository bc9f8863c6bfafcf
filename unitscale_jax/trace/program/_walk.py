"""One walk over the equations of a function, for every analysis that follows values forward.

A `Flow` says what it knows of a constant, what an equation makes of what is known of its operands,
and how two ways to the same value join. The walk does the rest: it enters calls, branches and
loops, and repeats a loop's body until what is known of its carry stands still. An equation whose
body cannot be entered (a Pallas kernel, a custom linear solve, a primitive of somebody else's) is
given to `visit` like any other.

A jitted function has one body, however often it is called, so what an analysis records must be
keyed by the *place* of an equation, which counts through calls, and never by the equation.
"""

import abc
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from unitscale_jax.errors import check_type
from unitscale_jax.trace.program import _compat
from unitscale_jax.trace.program._compat import Atom, Equation, Jaxpr, Literal, Var
from unitscale_jax.trace.program._trips import while_trips

V = TypeVar("V")
Place: TypeAlias = tuple[int, ...]


class _Once(Generic[V]):
    """A `cached_property` without the lock that one takes on Python 3.11."""

    def __init__(self, make: Callable[[Any], V]) -> None:
        self.make = make
        self.__doc__ = make.__doc__

    def __get__(self, owner: Any, kind: Any = None) -> V:
        made = vars(owner)[self.make.__name__] = self.make(owner)
        return made


@dataclass(eq=False)  # made for every equation of a program, which takes twice as long if frozen
class Site:
    """An equation where it stands: in the body number `body` of the equation at `parent`.

    Attributes:
        eqn: The equation.
        index: Its position in its body.
        body: Which body of the parent: 0 for a call or a scan; the branch of a cond; 0 for the
            condition of a while loop and 1 for its body.
        parent: Where the enclosing equation stands; None at the top.
    """

    eqn: Equation
    index: int
    body: int = 0
    parent: "Site | None" = None

    def __post_init__(self) -> None:
        """Finds the place, positions and body numbers from the top: (3,) or (3, 0, 1) inside it."""
        above = self.parent
        self.place: Place = (
            (self.index,) if above is None else (*above.place, self.body, self.index)
        )

    def bind(self, operands: Sequence[Any], **params: Any) -> list[Any]:
        """Evaluates the equation on new operands, as it stands but for the parameters given."""
        return _compat.bind(self.eqn, operands, **params)

    @property
    def name(self) -> str:
        """The name of the equation's primitive."""
        return self.eqn.primitive.name

    @_Once
    def operands(self) -> tuple[Any, ...]:
        """The dtypes of the operands, as traced; None for a token."""
        return tuple([_compat.dtype_of(v) for v in self.eqn.invars])

    @_Once
    def results(self) -> tuple[Any, ...]:
        """The dtypes of the results, as traced; None for a token."""
        return tuple([_compat.dtype_of(v) for v in self.eqn.outvars])

    @_Once
    def _inside(self) -> dict[int, tuple[Jaxpr, list["Site"]]]:
        """The equations of its bodies, as `listed` made them."""
        return {}

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the operands, as traced."""
        return tuple(map(_compat.shape_of, self.eqn.invars))

    @functools.cached_property
    def result_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the results, as traced."""
        return tuple(map(_compat.shape_of, self.eqn.outvars))

    @functools.cached_property
    def scope(self) -> str:
        """The named scopes around it ("encoder/attention"), across calls; "" without any."""
        here = _compat.scope(self.eqn)
        above = "" if self.parent is None else self.parent.scope
        return "/".join(part for part in (above, here) if part)

    @property
    def is_opaque(self) -> bool:
        """True if it stands for equations that cannot be entered, or is one of those; `opaque`."""
        closed = _compat.is_closed(self.eqn) and not bodies(self.eqn)
        return closed or (self.parent is not None and self.parent.is_opaque)

    @functools.cached_property
    def repeats(self) -> int | None:
        """Number of runs in one evaluation of the function; None if that depends on data."""
        if self.parent is None:
            return 1
        above, times = self.parent.repeats, self.parent.trips(self.body)
        return None if above is None or times is None else above * times

    def trips(self, body: int) -> int | None:
        """Number of runs of a body in one evaluation; None if that depends on data."""
        if self.name == "scan":
            return self.eqn.params["length"]
        if self.name == "while":
            turns = self._turns
            return None if turns is None else turns + (body == 0)  # it asks once more than it runs
        return 1

    @functools.cached_property
    def _turns(self) -> int | None:
        return while_trips(self.eqn)


def bodies(eqn: Equation) -> list[tuple[Jaxpr, Sequence[Any]]]:
    """`(jaxpr, constants)` of every body an equation can be entered by; [] if it is opaque."""
    name, params = eqn.primitive.name, eqn.params
    if name in _compat.CALLS:
        return [_compat.opened(_compat.call_body(eqn))]
    if name == "scan":
        return [_compat.opened(params["jaxpr"])]
    if name == "while":
        return [_compat.opened(params[key]) for key in ("cond_jaxpr", "body_jaxpr")]
    if name == "cond":
        return [_compat.opened(branch) for branch in params["branches"]]
    return []


def is_call(eqn: Equation) -> bool:
    """True if an equation evaluates one body, once, on its own operands: jit, remat, .."""
    return eqn.primitive.name in _compat.CALLS


_PROGRAMS: weakref.WeakKeyDictionary[Jaxpr, list[Site]] = weakref.WeakKeyDictionary()


def listed(jaxpr: Jaxpr, parent: Site | None = None, body: int = 0) -> list[Site]:
    """Every equation of one body, in order; those of calls and loops are not entered.

    A body is listed once, however many walks there are, since what a walk asks of an equation (its
    place, its dtypes) the next one asks again. A program's list lives as long as its equations.
    """
    if parent is None:
        if jaxpr not in _PROGRAMS:
            _PROGRAMS[jaxpr] = [Site(eqn, index, body) for index, eqn in enumerate(jaxpr.eqns)]
        return _PROGRAMS[jaxpr]
    known = parent._inside.get(body)
    if known is None or known[0] is not jaxpr:  # a derivative is traced anew for each call
        inside = [Site(eqn, index, body, parent) for index, eqn in enumerate(jaxpr.eqns)]
        known = parent._inside[body] = jaxpr, inside
    return known[1]


def sites(jaxpr: Jaxpr, parent: Site | None = None, body: int = 0) -> Iterator[Site]:
    """Every equation without a body that can be entered, in order of evaluation."""
    for site in listed(jaxpr, parent, body):
        inside = bodies(site.eqn)
        if not inside:
            yield site
        for number, (inner, _) in enumerate(inside):
            yield from sites(inner, site, number)


def opaque(jaxpr: Jaxpr) -> list[Site]:
    """Equations that have a body which cannot be entered: kernels, solvers, others' primitives.

    Rewriting leaves what is inside as it stands, and every analysis takes it for one operation.

    Example:
        >>> solve = jax.make_jaxpr(lambda a, b: jnp.linalg.solve(a, b))(jnp.eye(2), jnp.ones(2))
        >>> [site.name for site in opaque(solve.jaxpr)]
        ['custom_linear_solve']
    """
    check_type("the equations", jaxpr, Jaxpr, "a Jaxpr, as `closed.jaxpr`")
    return [site for site in sites(jaxpr) if site.is_opaque]


def producers(
    jaxpr: Jaxpr, parent: Site | None = None, body: int = 0
) -> dict[Place, tuple[Site | None, ...]]:
    """For each equation the one in its body that made each of its operands; None for others."""
    made: dict[Any, Site] = {}
    found: dict[Place, tuple[Site | None, ...]] = {}
    for site in listed(jaxpr, parent, body):
        found[site.place] = tuple(None if is_constant(v) else made.get(v) for v in site.eqn.invars)
        made |= dict.fromkeys(site.eqn.outvars, site)
        for number, (inner, _) in enumerate(bodies(site.eqn)):
            found |= producers(inner, site, number)
    return found


def is_constant(operand: Atom) -> bool:
    """True if an operand is written into the equation, as a literal."""
    return isinstance(operand, Literal)


class Flow(abc.ABC, Generic[V]):
    """The interface of an analysis: its knowledge of a value, and how that passes an equation.

    A subclass must say three things, and may say the others:

        constant       knowledge of a literal, or of an array that the function closes over
        visit          knowledge of the results of an equation, from that of its operands
        join           knowledge of a value that is either of two: of a branch, of a loop's carry
        on_inputs      told of every equation before it is followed, calls and loops included
        on_outputs     told of every equation after it was followed
        on_fixpoint    told of what is known in the end of a loop's carry, of a branch's results
        restart        what the next walk of a loop's body begins with
        select         knowledge of a result that a predicate or an index decides on
        unstacked      knowledge of one row of an array that a scan takes row by row
        stacked        knowledge of the rows that a scan returns as one array
        enter, exit    knowledge as it passes into the body of a call, and out of it

    Knowledge must be comparable, and grow when joined: `join(a, join(a, b)) == join(a, b)`. A flow
    that keeps its knowledge aside (a union-find) joins by side effect and returns `a`, and then a
    loop's body is walked once.
    """

    @abc.abstractmethod
    def constant(self, value: Any) -> V:
        """Knowledge of a literal or of an array that the function closes over."""

    @abc.abstractmethod
    def visit(self, site: Site, inputs: list[V]) -> list[V]:
        """Knowledge of the results of an equation without a body that can be entered."""

    @abc.abstractmethod
    def join(self, a: V, b: V) -> V:
        """Knowledge of a value that is either of two: branches, or a loop's carry."""

    def on_inputs(self, site: Site, inputs: list[V]) -> None:
        """Told of every equation, calls and loops included, before it is followed."""

    def on_outputs(self, site: Site, outputs: list[V]) -> None:
        """Told of every equation, calls and loops included, after it was followed."""

    def restart(self, site: Site, carry: list[V]) -> list[V]:
        """Knowledge that the next walk of a loop's body starts from, as of its carry by now.

        A loop inside a loop is walked again with each walk of the outer body. Starting where it
        ended, instead of at its first operands, it is walked as often as it learns something.
        """
        del site
        return carry

    def on_fixpoint(self, site: Site, values: list[V]) -> None:
        """Told of what is known in the end of a loop's carry and of a branch's results."""

    def select(self, site: Site, by: V, out: V) -> V:
        """Knowledge of a result of a branch or a loop that a value decides on."""
        del site, by
        return out

    def unstacked(self, site: Site, x: V) -> V:
        """Knowledge of one row, in a scan's body, of a stacked operand."""
        del site
        return x

    def stacked(self, site: Site, y: V) -> V:
        """Knowledge of a scan's stacked result, from that of one row."""
        del site
        return y

    def enter(self, site: Site, inputs: list[V]) -> list[V]:
        """Knowledge of the operands in the body of a call (jit, remat, shard_map, ..)."""
        del site
        return inputs

    def exit(self, site: Site, outputs: list[V]) -> list[V]:
        """Knowledge of the results of a call, from `outputs`, that of its body."""
        del site
        return outputs


def walk(
    flow: Flow[V],
    jaxpr: Jaxpr,
    inputs: Sequence[V],
    consts: Sequence[Any] = (),
    parent: Site | None = None,
    body: int = 0,
) -> list[V]:
    """Returns what `flow` knows of the results of `jaxpr`, given what it knows of the inputs.

    Args:
        flow: The analysis.
        jaxpr: The equations of a function, or of a body.
        inputs: Its knowledge of the inputs.
        consts: Arrays that the function closes over.
        parent: Where the equation stands whose body `jaxpr` is; None at the top.
        body: Which body of the parent.
    """
    check_type("`flow`", flow, Flow, "a us.trace.Flow")
    known: dict[Var, V] = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {v: flow.constant(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}

    def read(v: Atom) -> V:
        return flow.constant(v.val) if isinstance(v, Literal) else known[v]

    for site in listed(jaxpr, parent, body):
        eqn = site.eqn
        operands = [read(v) for v in eqn.invars]
        flow.on_inputs(site, operands)
        enter = _STRUCTURES.get(site.name)
        out = enter(flow, site, operands) if enter else flow.visit(site, operands)
        flow.on_outputs(site, out)
        known.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _enter(flow: Flow[V], site: Site, number: int, inputs: Sequence[V]) -> list[V]:
    jaxpr, consts = bodies(site.eqn)[number]
    return walk(flow, jaxpr, inputs, consts, site, number)


def _call(flow: Flow[V], site: Site, inputs: list[V]) -> list[V]:
    return flow.exit(site, _enter(flow, site, 0, flow.enter(site, inputs)))


def _cond(flow: Flow[V], site: Site, inputs: list[V]) -> list[V]:
    index, *operands = inputs
    branches = [_enter(flow, site, k, operands) for k in range(len(site.eqn.params["branches"]))]
    joined = [functools.reduce(flow.join, results) for results in zip(*branches, strict=True)]
    out = [flow.select(site, index, out) for out in joined]
    flow.on_fixpoint(site, out)
    return out


def _scan(flow: Flow[V], site: Site, inputs: list[V]) -> list[V]:
    consts, carries = _compat.scan_counts(site.eqn)
    before, carry = inputs[:consts], inputs[consts : consts + carries]
    rows = [flow.unstacked(site, x) for x in inputs[consts + carries :]]
    while True:
        carry = flow.restart(site, carry)
        out = _enter(flow, site, 0, [*before, *carry, *rows])
        grown = [flow.join(a, b) for a, b in zip(carry, out[:carries], strict=True)]
        if grown == carry:
            flow.on_fixpoint(site, carry)
            return [*carry, *(flow.stacked(site, y) for y in out[carries:])]
        carry = grown


def _while(flow: Flow[V], site: Site, inputs: list[V]) -> list[V]:
    of_cond, of_body = _compat.while_counts(site.eqn)
    cond_consts, body_consts = inputs[:of_cond], inputs[of_cond : of_cond + of_body]
    carry = inputs[of_cond + of_body :]
    while True:
        carry = flow.restart(site, carry)
        (stops,) = _enter(flow, site, 0, [*cond_consts, *carry])
        out = [flow.select(site, stops, c) for c in _enter(flow, site, 1, [*body_consts, *carry])]
        grown = [flow.join(a, b) for a, b in zip(carry, out, strict=True)]
        if grown == carry:
            flow.on_fixpoint(site, carry)
            return carry
        carry = grown


_STRUCTURES: dict[str, Callable[[Any, Site, list[Any]], list[Any]]] = {
    **dict.fromkeys(_compat.CALLS, _call),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
