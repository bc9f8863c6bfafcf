"""The cost of a function: every equation's operations and bytes, as often as it runs.

    cost = Σ equations   cost of one evaluation · turns of the loops around it · devices

It is counted on the equations of the function, before a compiler fuses or rewrites them, so that
each number belongs to an operation that can be named. Loops count with their turns, where the
compiler's own analysis takes their body once.
"""

import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from unitscale_jax.errors import check_callable
from unitscale_jax.trace.costs._op_cost import OpCost, cost_of, is_counted, operand_dtype
from unitscale_jax.trace.program import _compat
from unitscale_jax.trace.program._compat import Equation, Jaxpr
from unitscale_jax.trace.program._function import Traced, trace
from unitscale_jax.trace.program._live import live
from unitscale_jax.trace.program._walk import Place, Site, bodies
from unitscale_jax.trace.rewrite._notes import scope_without_notes

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class OpRow:
    """One row of a cost table: an equation and what it adds.

    Attributes:
        site: The equation where it stands; `site.place` is its key.
        op: What one evaluation costs.
        repeats: How often it is evaluated, on all devices together. A loop whose turns depend on
            data is taken to turn once.
        runs: False if it is not part of the totals: no result depends on it, or it stands in a
            branch of a cond that is not the costliest.
    """

    site: Site
    op: OpCost
    repeats: int
    runs: bool = True

    @property
    def total(self) -> OpCost:
        """The cost that the row adds to the totals, all its repetitions together."""
        return self.op * (self.repeats * self.runs)


@dataclass(frozen=True)
class Cost:
    """The bill of a function: a row for every equation, in order of evaluation.

    Attributes:
        rows: One for every equation without a body that can be entered, also if it does not run.
    """

    rows: tuple[OpRow, ...]

    def by(self, key: Callable[[Site], K]) -> dict[K, OpCost]:
        """Totals of groups of equations, in order of first appearance; they add up to `total`."""
        groups: dict[K, OpCost] = {}
        for row in self.rows:
            if row.runs:
                name = key(row.site)
                groups[name] = groups.get(name, OpCost()) + row.total
        return groups

    @functools.cached_property
    def total(self) -> OpCost:
        """The sum over all rows."""
        return sum((row.total for row in self.rows), OpCost())

    @property
    def flops(self) -> int:
        """Arithmetic operations; a multiply-add is two."""
        return self.total.flops

    @property
    def bytes(self) -> int:
        """Bytes of operands and results, as if nothing were fused."""
        return self.total.bytes

    @property
    def transcendentals(self) -> int:
        """Evaluations of exp, log, tanh, sqrt, .."""
        return self.total.transcendentals

    @property
    def by_dtype(self) -> dict[str, int]:
        """FLOPs by the dtype of the operands; see `operand_dtype`."""
        groups = self.by(lambda site: operand_dtype(site.eqn))
        return {dtype: cost.flops for dtype, cost in groups.items() if cost.flops}

    @property
    def by_scope(self) -> dict[str, OpCost]:
        """Totals by named scope, "" for what has none."""
        return self.by(scope_without_notes)

    @property
    def by_primitive(self) -> dict[str, OpCost]:
        """Totals by the name of the primitive."""
        return self.by(lambda site: site.name)

    @property
    def unknown(self) -> dict[str, int]:
        """Primitives that run and whose FLOPs are not known, counted as 0: name -> equations."""
        names = [row.site.name for row in self.rows if row.runs and not is_counted(row.site.eqn)]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    @property
    def data_dependent(self) -> tuple[Site, ...]:
        """Loops that run and whose turns depend on data, counted as one turn each."""
        loops: dict[Place, Site] = {}
        for row in self.rows:
            around = row.site.parent if row.runs else None
            while around is not None:
                if around.trips(1) is None:
                    loops[around.place] = around
                around = around.parent
        return tuple(loops.values())


def cost(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Cost:
    """Counts the operations of a function and the bytes they move, without running it.

    FLOPs and transcendentals equal XLA's own count of the program before it is optimized
    (`jax.jit(fn).lower(*args).cost_analysis()`) where that has no loop, but for constants that it
    folds and a few primitives that `trace._work` lists with the reason. They are exact through
    scans, nested ones too, and through while loops that count. A cond costs its costliest branch.
    What no result depends on costs nothing, as `jit` drops it. The body of a `shard_map` counts
    once for every device of the axes it makes manual, so a cost is that of the whole computation,
    and the same for any mesh if no work is done twice.

    Bytes are an upper bound of the traffic with memory: a fused program moves less.

    Args:
        fn: A function of pytrees, or one traced before.
        *args: Its arguments, as of `trace`; none for one traced before.
        **kwargs: Its keywords, likewise.

    Returns:
        The rows and their totals.

    Example:
        >>> layer = lambda x, w: (jnp.tanh(x @ w), None)
        >>> x, stack = jnp.ones((8, 16)), jnp.ones((3, 16, 16))
        >>> bill = cost(lambda x, stack: jax.lax.scan(layer, x, stack)[0], x, stack)
        >>> bill.flops == 3 * (2 * 8 * 16 * 16), bill.transcendentals == 3 * 8 * 16
        (True, True)
        >>> [(row.site.name, row.op.flops, row.repeats) for row in bill.rows]
        [('dot_general', 4096, 3), ('tanh', 0, 3)]
    """
    check_callable("the function", fn)
    if isinstance(fn, Traced):
        if more := len(args) + len(kwargs):
            raise TypeError(f"a traced function has its arguments; got {more} more. Drop them")
        traced = fn
    else:
        traced = trace(fn, *args, **kwargs)
    jaxpr = traced.closed.jaxpr
    return Cost(tuple(_rows(jaxpr, [True] * len(jaxpr.outvars))))


def _rows(
    jaxpr: Jaxpr,
    wanted: Sequence[bool],
    runs: bool = True,
    repeats: int = 1,
    parent: Site | None = None,
    body: int = 0,
) -> Iterator[OpRow]:
    """The rows of a body of which some results are wanted."""
    for index, (eqn, own) in enumerate(zip(jaxpr.eqns, _live(jaxpr, wanted)[0], strict=True)):
        site = Site(eqn, index, body, parent)
        run, inside = runs and (any(own) or bool(eqn.effects)), _bodies(eqn)
        if not inside:
            yield OpRow(site, cost_of(eqn), repeats, run)
            continue
        within = [
            list(_rows(inner, _wanted(eqn, own, k), run, repeats * _times(site, k), site, k))
            for k, inner in enumerate(inside)
        ]
        yield from itertools.chain(*(_costliest(within) if site.name == "cond" else within))


def _bodies(eqn: Equation) -> list[Jaxpr]:
    """The bodies that an equation evaluates: `bodies`, and the solver of a linear solve."""
    if eqn.primitive.name == "custom_linear_solve":
        return [_compat.solver(eqn)]
    return [jaxpr for jaxpr, _ in bodies(eqn)]


def _times(site: Site, body: int) -> int:
    """Number of evaluations of a body, on all devices, in one of the equation around it."""
    if site.name == "shard_map":
        return _compat.devices(site.eqn)
    times = site.trips(body)
    return 1 if times is None else times


def _costliest(branches: list[list[OpRow]]) -> list[list[OpRow]]:
    """All rows of all branches; those of the costliest branch run, and others do not."""

    def price(number: int) -> tuple[int, int, int]:
        total = sum((row.total for row in branches[number]), OpCost())
        return total.flops, total.transcendentals, total.bytes

    chosen = max(range(len(branches)), key=price)
    return [
        rows if number == chosen else [replace(row, runs=False) for row in rows]
        for number, rows in enumerate(branches)
    ]


# --- what the results depend on ---


def _live(jaxpr: Jaxpr, wanted: Sequence[bool]) -> tuple[list[list[bool]], list[bool]]:
    return live(jaxpr, wanted, _compat.CALLS, effects=True)


def _wanted(eqn: Equation, live: Sequence[bool], body: int) -> Sequence[bool]:
    """Which results of a body the live results of the equation need."""
    name, jaxpr = eqn.primitive.name, _bodies(eqn)[body]
    if name == "scan":
        return _wanted_of_scan(eqn, jaxpr, live)
    return live if name in _compat.CALLS or name == "cond" else [True] * len(jaxpr.outvars)


def _wanted_of_scan(eqn: Equation, jaxpr: Jaxpr, live: Sequence[bool]) -> Sequence[bool]:
    """A carry is wanted also by the next turn."""
    consts, carries = _compat.scan_counts(eqn)
    while True:
        of_carry = _live(jaxpr, live)[1][consts : consts + carries]
        padded = [*of_carry, *[False] * (len(live) - carries)]
        grown = [a or b for a, b in zip(live, padded, strict=True)]
        if grown == list(live):
            return live
        live = grown
