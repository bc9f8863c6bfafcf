"""Re-evaluation of a function with some of its equations replaced.

    rewritten(fn, {"dot_general": rule})     rule(site, operands) -> results

A rule receives the equation where it stands and the operands, which may be anything that the other
rules can take (an array of another dtype, a quantized tensor), and returns the results. It enters
jit, scan, while, cond, remat, shard_map and custom derivatives. What no rule touches is evaluated
as it stands: the very equation with its parameters, name scopes and source lines, so that
an empty table is the identity to the bit and to the byte.

Where something changes inside a function with a custom derivative, the derivative stays the user's:
its own equations are rewritten by the same table, and nothing is differentiated anew.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from unitscale_jax.errors import check_callable
from unitscale_jax.trace.program import _compat
from unitscale_jax.trace.program._compat import Atom, Equation, Jaxpr, Literal, Var
from unitscale_jax.trace.program._function import trace_call
from unitscale_jax.trace.program._walk import Site, bodies, listed
from unitscale_jax.trace.rewrite._derivatives import Derivative, custom_jvp, custom_vjp

Rule: TypeAlias = Callable[[Site, list[Any]], Sequence[Any]]
RewriteRules: TypeAlias = Mapping[str, Rule]


def rewritten(fn: Callable[..., Any], rules: RewriteRules) -> Callable[..., Any]:
    """Evaluates `fn` with the equations of some primitives replaced.

    Args:
        fn: Any function of pytrees. Leaves that are not arrays (flags, strings, Python numbers)
            are part of the program, as they are when `fn` is called.
        rules: Primitive name -> `rule(site, operands)`, which returns the list of results;
            `site.bind(operands)` is the equation itself.

    Returns:
        A function with the signature of `fn`, traced once per call: call it under `jit`.

    What is inside a Pallas kernel, a custom linear solve or a primitive of somebody else's is left
    as it stands; `opaque` lists these equations, and `unitscale_jax.explain` warns of them.

    An empty table is the identity: same compiled FLOPs and bytes, bit-equal results. Rewriting
    commutes with jit, vmap, grad, scan, remat and shard_map as far as the rules do.

    Example:
        >>> ones = rewritten(lambda x: jax.jit(jnp.sin)(x) + x, {"sin": lambda site, x: [x[0] * 2]})
        >>> float(ones(3.0 * jnp.ones(())))
        9.0
    """
    check_callable("the function", fn)

    @functools.wraps(fn)
    def rewritten_fn(*args: Any, **kwargs: Any) -> Any:
        staged = trace_call(fn, *args, **kwargs)
        closed = staged.closed
        return staged.finish(Rewriter(rules)(closed.jaxpr, closed.consts, staged.operands))

    return rewritten_fn


class Rewriter:
    """Replays equations by a table of rules; a subclass may say more by its hooks.

    Whom it asks, and when:

        step           every equation, before any rule: evaluates it; `super().step` is the rest
        touches        an equation without a rule: whether it, or one inside it, is replaced
        carried        a loop: its initial carry, as the body will return it
        sliced         a scan: an operand that it takes row by row
        turns          a scan: arrays of its own that it takes row by row as well
        turn           a scan's body: the rows of those arrays
        returned       a body: its results, of a branch as the others return them
        entering       a `shard_map`: an operand that a spec cuts
        partitioned    a call: how an operand that was one array is partitioned
        master         an operand: the leaf that takes its gradient
        derived        a custom derivative: one pass of it

    Attributes:
        rules: Primitive name -> rule.
        default: The rule of every primitive without one and without a body; None leaves it alone.
    """

    def __init__(self, rules: RewriteRules, default: Rule | None = None) -> None:
        """Makes a rewriter from a table of rules."""
        self.rules, self.default = rules, default
        self._touched: dict[int, tuple[Jaxpr, bool]] = {}  # by identity, which the jaxpr keeps

    def carried(
        self, site: Site, carry: list[Any], step: Callable[[list[Any]], list[Any]]
    ) -> list[Any]:
        """The initial carry of a loop, as its body will return it.

        `step` is what the body makes of a carry, abstractly and before it is `returned`.
        """
        del site, step
        return carry

    def sliced(self, site: Site, operand: Any) -> Any:
        """An operand as it enters a scan that takes its rows."""
        del site
        return operand

    def turns(self, site: Site) -> Sequence[Any]:
        """Arrays, as long as the scan, of which each turn is to see its row."""
        del site
        return ()

    def turn(self, site: Site, rows: Sequence[Any]) -> None:
        """Told, in a scan's body, of the rows of `turns`."""

    def entering(self, operand: Any, placement: Any) -> Any:
        """An operand as it enters a `shard_map` that cuts it by a spec."""
        del placement
        return operand

    def partitioned(self, operand: Any, placement: Any) -> Any:
        """The partitioning (a spec, a sharding) of an operand of a call that was one array."""
        del operand
        return placement

    def returned(self, site: Site, results: list[Any]) -> list[Any]:
        """The results of a body: of a branch as the others return them, of a loop as carried."""
        del site
        return results

    def master(self, operand: Any) -> Any:
        """The leaf of an operand that takes its gradient; None if it takes none."""
        return operand

    def derived(self, derivative: Derivative, operands: list[Any]) -> list[Any]:
        """Replays one pass of the custom derivative of a call.

        Args:
            derivative: The call, its equations, and whose derivatives there are.
            operands: Those of the pass, each whatever the rules can take.
        """
        closed = derivative.closed
        return self(closed.jaxpr, closed.consts, operands, derivative.site, derivative.number)

    def __call__(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        operands: Sequence[Any],
        parent: Site | None = None,
        body: int = 0,
    ) -> list[Any]:
        """Evaluates `jaxpr`, whose equations stand in body `body` of `parent`."""
        env: dict[Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env |= dict(zip(jaxpr.invars, operands, strict=True))
        last = _last_uses(jaxpr)

        def read(v: Atom) -> Any:
            return v.val if isinstance(v, Literal) else env[v]

        for site in listed(jaxpr, parent, body):
            eqn = site.eqn
            out = _compat.within(eqn, self.step, site, [read(v) for v in eqn.invars])
            env.update(zip(eqn.outvars, out, strict=True))
            for v in last.get(site.index, ()):  # a value lives until its last use
                del env[v]
        return [read(v) for v in jaxpr.outvars]

    def step(self, site: Site, operands: list[Any]) -> Sequence[Any]:
        """Evaluates one equation: by its rule, as it is, or by replaying what is inside it."""
        rule = self.rules.get(site.name)
        if rule is not None:
            return rule(site, operands)
        if not self.touches(site, operands):
            return site.bind(operands)
        structure = _STRUCTURES.get(site.name)
        if structure is not None:
            return structure(self, site, operands)
        assert self.default is not None  # for what else touches an equation without a body?
        return self.default(site, operands)

    def touches(self, site: Site, operands: list[Any]) -> bool:
        """True if the equation at `site` is to be replaced, or one inside it."""
        del operands
        return self._applies(site.eqn)

    def _applies(self, eqn: Equation) -> bool:
        if eqn.primitive.name in self.rules:
            return True
        inside = bodies(eqn)
        return any(self._touches(body) for body, _ in inside) if inside else bool(self.default)

    def _touches(self, jaxpr: Jaxpr) -> bool:
        if id(jaxpr) not in self._touched:
            self._touched[id(jaxpr)] = jaxpr, any(self._applies(eqn) for eqn in jaxpr.eqns)
        return self._touched[id(jaxpr)][1]

    def enter(self, site: Site, number: int, operands: Sequence[Any]) -> list[Any]:
        """Replays a body of the equation at `site`."""
        jaxpr, consts = bodies(site.eqn)[number]
        return self(jaxpr, consts, operands, site, number)

    def inline(self, site: Site, operands: Sequence[Any]) -> list[Any]:
        """Replays the only body of a call, which returns what the call does."""
        return self.returned(site, self.enter(site, 0, operands))


def _last_uses(jaxpr: Jaxpr) -> dict[int, list[Var]]:
    """For each equation the variables that nothing after it reads."""
    last: dict[Var, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        last.update((v, index) for v in eqn.outvars)
        last.update((v, index) for v in eqn.invars if not isinstance(v, Literal))
    out: dict[int, list[Var]] = {}
    returned = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    for v, index in last.items():
        if v not in returned:
            out.setdefault(index, []).append(v)
    return out


def _inlined(rewriter: Rewriter, site: Site) -> Callable[..., list[Any]]:
    """The replayed body of a call, as a function of its operands."""
    return lambda *xs: rewriter.inline(site, xs)


def _jit(rewriter: Rewriter, site: Site, operands: list[Any]) -> Sequence[Any]:
    call = _compat.rejit(site.eqn, _inlined(rewriter, site), operands, rewriter.partitioned)
    return call(*operands)


def _remat(rewriter: Rewriter, site: Site, operands: list[Any]) -> Sequence[Any]:
    return _compat.restage(site.eqn, _inlined(rewriter, site), operands)


def _shard_map(rewriter: Rewriter, site: Site, operands: list[Any]) -> Sequence[Any]:
    specs = site.eqn.params["in_specs"]
    operands = [rewriter.entering(x, spec) for x, spec in zip(operands, specs, strict=True)]
    call = _compat.reshard_map(site.eqn, _inlined(rewriter, site), operands, rewriter.partitioned)
    return call(*operands)


def _scan(rewriter: Rewriter, site: Site, operands: list[Any]) -> Sequence[Any]:
    consts, carries = _compat.scan_counts(site.eqn)
    before, xs = operands[:consts], [rewriter.sliced(site, x) for x in operands[consts + carries :]]
    own = list(rewriter.turns(site))

    def enter(carry: list[Any], rows: tuple[list[Any], list[Any]]) -> list[Any]:
        x, own_rows = rows
        rewriter.turn(site, own_rows)
        return rewriter.enter(site, 0, [*before, *carry, *x])

    def abstract(carry: list[Any]) -> list[Any]:
        rows = jax.tree.map(_row, xs), jax.tree.map(_row, own)
        return jax.eval_shape(lambda *args: enter(*args)[:carries], carry, rows)

    init = rewriter.carried(site, operands[consts : consts + carries], abstract)

    def body(carry: list[Any], rows: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
        out = rewriter.returned(site, enter(carry, rows))
        return out[:carries], out[carries:]

    options = _compat.scan_options(site.eqn)
    if xs:
        options["length"] = None  # that of the operands, which rules may have made shorter
    carry, ys = jax.lax.scan(body, init, (xs, own), **options)
    return [*carry, *ys]


def _row(x: Any) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda x: x[0], x)


def _while(rewriter: Rewriter, site: Site, operands: list[Any]) -> Sequence[Any]:
    of_cond, of_body = _compat.while_counts(site.eqn)
    cond_consts, body_consts = operands[:of_cond], operands[of_cond : of_cond + of_body]

    def again(carry: list[Any]) -> Any:
        return rewriter.enter(site, 0, [*cond_consts, *carry])[0]

    def turn(carry: list[Any]) -> list[Any]:
        return rewriter.enter(site, 1, [*body_consts, *carry])

    def body(carry: list[Any]) -> list[Any]:
        return rewriter.returned(site, turn(carry))

    first = operands[of_cond + of_body :]
    init = rewriter.carried(site, first, functools.partial(jax.eval_shape, turn))
    return jax.lax.while_loop(again, body, init)


def _cond(rewriter: Rewriter, site: Site, operands: list[Any]) -> Sequence[Any]:
    index, *rest = operands

    def branch(k: int) -> Callable[..., list[Any]]:
        return lambda *xs: rewriter.returned(site, rewriter.enter(site, k, xs))

    branches = [branch(k) for k in range(len(site.eqn.params["branches"]))]
    return _compat.recond(site.eqn, branches, index, rest)


_STRUCTURES: dict[str, Callable[[Rewriter, Site, list[Any]], Sequence[Any]]] = {
    **dict.fromkeys(_compat.CALLS, Rewriter.inline),
    **dict.fromkeys(_compat.JITS, _jit),
    **dict.fromkeys(_compat.REMATS, _remat),
    "shard_map": _shard_map,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_jvp_call": custom_jvp,
    "custom_vjp_call": custom_vjp,
}
