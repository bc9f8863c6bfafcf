"""What a function really does: every operation with its dtypes, its cost, and who decided on it.

    print(us.explain(us.autocast(apply))(params, x))

It reads the equations of the function after all transforms, so it shows what will be compiled and
not what was meant. A transform adds columns by leaving notes at its equations (`trace.noted`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from unitscale_jax.errors import check_callable
from unitscale_jax.tables import Tabular
from unitscale_jax.trace.costs import Cost, OpRow, cost
from unitscale_jax.trace.params import Origin, input_origins, provenance
from unitscale_jax.trace.program import (
    PRODUCTS,
    Site,
    is_constant,
    producers,
    trace_call,
)
from unitscale_jax.trace.rewrite import notes_at, scope_without_notes, taking_notes


@dataclass(frozen=True)
class ReportRow:
    """One operation of a function, as often as it runs.

    Attributes:
        place: Where it stands, counted through calls and loops.
        module: Named scopes around it; "" without any.
        name: Its primitive.
        parameters: Names of the parameters that its operands are, or are joined from.
        operands: Dtypes of the operands.
        results: Dtypes of the results.
        flops: Arithmetic operations in all its evaluations.
        bytes: Bytes of operands and results in all of them.
        repeats: How often it is evaluated.
        notes: What transforms say of it, by column: `{"autocast": "low"}`.
        warnings: What may be wrong with it.
    """

    place: tuple[int, ...]
    module: str
    name: str
    parameters: tuple[str, ...]
    operands: tuple[str, ...]
    results: tuple[str, ...]
    flops: int
    bytes: int
    repeats: int
    notes: dict[str, Any]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Report(Tabular):
    """The operations of a function, in order of evaluation; printed, a table.

    Attributes:
        rows: All of them.
        cost: Their totals; see `unitscale_jax.trace.cost`.
    """

    rows: tuple[ReportRow, ...]
    cost: Cost

    @property
    def upcasts(self) -> tuple[ReportRow, ...]:
        """Operations that a float32 operand made wider than their 16-bit one."""
        return tuple(row for row in self.rows if _UPCAST in row.warnings)

    @property
    def left(self) -> tuple[ReportRow, ...]:
        """Operations that some transform left as they were; its note says "kept: ..." and why."""
        kept = lambda row: any(str(note).startswith("kept") for note in row.notes.values())
        return tuple(row for row in self.rows if kept(row))

    @property
    def products(self) -> "Report":
        """The same of products alone: dots and convolutions, where quantization has its columns."""
        return replace(self, rows=tuple(row for row in self.rows if row.name in PRODUCTS))

    @property
    def flops_by_dtype(self) -> dict[str, int]:
        """FLOPs by the dtype of the operands."""
        return self.cost.by_dtype

    @property
    def warnings(self) -> tuple[tuple[ReportRow, str], ...]:
        """Every warning, paired with the operation it is about."""
        return tuple((row, warning) for row in self.rows for warning in row.warnings)

    def cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """One line for each operation, with a column for every kind of note."""
        kinds = list(dict.fromkeys(name for row in self.rows for name in row.notes))
        kinds = [name for name in kinds if name != "wide"]

        def line(row: ReportRow) -> list[str]:
            dtypes = f"{' '.join(row.operands)} -> {' '.join(row.results)}"
            where = ", ".join(row.parameters) or row.module
            flops = f"{row.flops:,}" if row.flops else ""
            noted = [str(row.notes.get(name, "")) for name in kinds]
            return [where, row.name, dtypes, *noted, flops, ", ".join(row.warnings)]

        titles = ["module or parameter", "operation", "dtypes", *kinds, ">FLOPs", "warnings"]
        return titles, [line(row) for row in self.rows]

    def below(self) -> Sequence[str]:
        """The totals."""
        return [f"{len(self.rows)} operations, {self.cost.flops:,} FLOPs"]


def explain(fn: Callable[..., Any]) -> Callable[..., Report]:
    """Lists every operation of `fn` at a call, without running it.

    Args:
        fn: A function whose first argument is the parameters, under any transforms.

    Returns:
        A function of the same arguments that returns a `Report`.

    Warnings: a *silent upcast*, where a float32 operand widens a 16-bit one outside the operations
    that need it; a *cast back and forth*; *float64*; and *integer overflow*, where integers of less
    than 32 bits are summed or a wide integer is cast to a narrow one; *not entered*, where a kernel
    or a solver has operations that no transform sees.

    Example:
        >>> import unitscale_jax as us
        >>> apply = lambda params, x: jnp.tanh(x @ params["w"])
        >>> params, x = {"w": jnp.ones((2, 2))}, jnp.ones((3, 2))
        >>> report = us.explain(us.autocast(apply, "bfloat16"))(params, x)
        >>> [(row.name, row.operands) for row in report.rows if row.parameters == ("w",)]
        [('convert_element_type', ('float32',)), ('dot_general', ('bfloat16', 'bfloat16'))]
        >>> report.rows[-3].notes
        {'autocast': 'low', 'before': 'float32 float32'}
    """
    check_callable("fn", fn)

    def explain_fn(*args: Any, **kwargs: Any) -> Report:
        with taking_notes() as notes:
            staged = trace_call(fn, *args, **kwargs)
        jaxpr = staged.closed.jaxpr
        sources = provenance(jaxpr, input_origins(staged, args[0] if args else ()))
        bill, before = cost(staged.traced), producers(jaxpr)
        operations = []
        for row in bill.rows:
            place = row.site.place
            made = before.get(place, (None,) * len(row.site.operands))  # a solver's own equations
            operations.append(_operation(row, notes, sources.get(place, ()), made))
        return Report(tuple(operations), bill)

    return explain_fn


def _operation(
    row: OpRow,
    notes: list[dict[str, Any]],
    sources: Sequence[Origin],
    before: Sequence[Site | None],
) -> ReportRow:
    site, said = row.site, notes_at(row.site, notes)
    return ReportRow(
        place=site.place,
        module=scope_without_notes(site),
        name=site.name,
        parameters=tuple(dict.fromkeys(name for origin in sources for name in _names(origin))),
        operands=tuple(map(str, site.operands)),
        results=tuple(map(str, site.results)),
        flops=row.total.flops,
        bytes=row.total.bytes,
        repeats=row.repeats,
        notes=said,
        warnings=tuple(_warnings(site, before, said)),
    )


_UPCAST = "silent upcast"
_SUMS = frozenset(["reduce_sum", "reduce_prod", "cumsum", "cumprod", "dot_general"])


def _names(origin: Origin) -> Sequence[str]:
    return origin.names or sorted(origin.joined)


def _warnings(site: Site, before: Sequence[Site | None], notes: dict[str, Any]) -> Iterator[str]:
    if any(dtype == np.float64 for dtype in (*site.operands, *site.results)):
        yield "float64"
    if site.name == "convert_element_type":
        yield from _cast_warnings(site, before)
    widened = [made is not None and _widens(made) for made in before]
    wide = [
        dtype == np.float32 and not cast and not is_constant(v)
        for dtype, cast, v in zip(site.operands, widened, site.eqn.invars, strict=True)
    ]
    if any(widened) and any(wide) and not notes.get("wide"):
        yield _UPCAST
    if site.is_opaque:
        yield "not entered"
    if site.name in _SUMS and _integer_bits(site.results[0]) < 32:
        yield "integer overflow"


def _cast_warnings(site: Site, before: Sequence[Site | None]) -> Iterator[str]:
    made = before[0] if before else None
    if made is not None and made.name == site.name and made.operands[0] == site.results[0]:
        yield "cast back and forth"
    if _integer_bits(site.results[0]) < _integer_bits(site.operands[0]) < 128:
        yield "integer overflow"


def _widens(site: Site) -> bool:
    """Whether an equation is a cast from 16 bits to 32."""
    bits = lambda dtype: jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else 0
    cast = site.name == "convert_element_type"
    return cast and bits(site.operands[0]) == 16 and bits(site.results[0]) == 32


def _integer_bits(dtype: Any) -> int:
    """Width of an integer dtype; of anything else more than any integer has."""
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 128
