"""Which axes of which parameters are the same dimension: the coupling graph.

    w (8, 16), v (16, 4) in (x w) v :    w:1 and v:0 are one group of 16 channels

Axes are expressions over factors (`_factors`), one rule per primitive unifies them (`_couplings`),
and a second walk proves what removing channels does (`_zeros`). A factor that reaches a parameter
and bears no mark is a group: its channels may be taken out of all members together, and the
function is still defined. Everything else is refused, with the reasons. The idea of coupled
channels: Fang et al. 2023, https://arxiv.org/abs/2301.12900, whose graphs take what they do not
know for element-wise; here it is refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from unitscale_jax import tree
from unitscale_jax.errors import check_type
from unitscale_jax.tables import Tabular
from unitscale_jax.trace.dimensions._couplings import Record, coupled, settled
from unitscale_jax.trace.dimensions._factors import Axes, SymbolicDim, new_axes, pin
from unitscale_jax.trace.dimensions._zero_rules import KnownZeros
from unitscale_jax.trace.dimensions._zeros import Zeros
from unitscale_jax.trace.program._function import Traced
from unitscale_jax.trace.program._walk import Place, walk

CLOSED_OVER = (
    "constant: meets an array that the function closes over, such as batch statistics, which no "
    'plan can cut. Pass them as parameters: {"params": .., "state": ..}'
)


class Member(NamedTuple):
    """A place where a factor stands: in the axis `axis` of the parameter `path`.

    An axis is a sum of terms, and a term a product of factors; most are one term of one factor.
    """

    path: str
    axis: int
    term: int
    position: int


@dataclass(frozen=True)
class DimGroup:
    """Channels that can be removed, from all members together.

    Attributes:
        name: Its first member, "layers/0/up:1"; in a product of factors "q:1[0]" is the first one,
            in a sum "qkv:1[2, 0]" the first one of the third term.
        size: How many channels there are.
        members: Where they are, in the order of the parameters.
        flags: "exact": with the channels of all members set to zero, the function has the value,
            and the gradients, of the function without them, wherever these are finite.
            "reduce:sum": and it sums over them, so that a mean or a norm that counts them
            has another divisor in the function built for fewer. "reduce:nonlin": not proven,
            because something mixes the channels that are not zero; then `mixed` says what.
            "layer": a scan runs along it, and removing a channel is removing a layer.
        mixed: The primitives that mix channels which are not zero.
        factor: The dimension itself, as it stands in axis expressions.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    flags: frozenset[str]
    mixed: tuple[str, ...]
    factor: SymbolicDim = field(repr=False)


@dataclass(frozen=True)
class Refused:
    """Channels of parameters that cannot be removed, and why."""

    name: str
    size: int
    members: tuple[Member, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Dims(Tabular):
    """The dimensions of a function of parameters.

    Attributes:
        groups: In the order in which the parameters have them.
        refused: Every factor of a parameter that is no group.
        unknown: Primitives without a rule, and how often they occur.
    """

    groups: tuple[DimGroup, ...]
    refused: tuple[Refused, ...]
    unknown: Mapping[str, int]
    _axes: Mapping[str, Axes] = field(repr=False)
    _record: Record = field(repr=False)

    def axes(self, path: str) -> Axes:
        """The axes of a parameter, each a sum of products of factors."""
        if path not in self._axes:
            raise KeyError(f"no parameter is named {path!r}. There are {', '.join(self._axes)}.")
        return self._axes[path]

    def at(self, place: Place) -> tuple[list[Axes], list[Axes]]:
        """The axes of operands and results of the equation at `site.place`.

        Equations with a body that the analysis enters (calls, loops, branches) have none.
        """
        return self._record[place]

    @property
    def rows(self) -> tuple[DimGroup | Refused, ...]:
        """The groups, and then the dimensions that are refused."""
        return (*self.groups, *self.refused)

    def data(self) -> list[dict[str, Any]]:
        """Size, flags or reasons, and members of each dimension."""
        titles, lines = self.cells()
        return [dict(zip((t.removeprefix(">") for t in titles), x, strict=True)) for x in lines]

    def cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """One line for each group and for each dimension that is refused."""

        def says(row: DimGroup | Refused) -> str:
            if isinstance(row, DimGroup):
                return ", ".join(sorted(row.flags))
            return f"refused: {', '.join(row.reasons)}"

        lines = [[str(row.size), says(row), self._members(row)] for row in self.rows]
        return [">size", "flags or reasons", "members"], lines

    def below(self) -> Sequence[str]:
        """Primitives without a rule, and whether arrays that are closed over stand in the way."""
        lines = [f"no rule for {name}, which occurs {n} x" for name, n in self.unknown.items()]
        closed = any("constant" in other.reasons for other in self.refused)
        return [*lines, CLOSED_OVER] if closed else lines

    def why_refused(self, name: str) -> str:
        """Why an axis such as "up:1" is of no group, as a sentence."""
        of = (other.reasons for other in self.refused if name in self._members(other).split(" "))
        reasons = next(of, ())
        if "constant" in reasons:
            return f"{name!r} is refused, {CLOSED_OVER}."
        return f"{name!r} is refused: {', '.join(reasons)}." if reasons else ""

    def _members(self, of: DimGroup | Refused) -> str:
        return " ".join(_name(member, self._axes) for member in of.members)


def dims(traced: Traced) -> Dims:
    """Which axes of the parameters of a function are the same dimension.

    Args:
        traced: The function; its first argument is the parameters, a pytree of arrays. Give every
            dimension that is to be found a size above 1: an axis of size 1 says nothing.

    Returns:
        Groups of axes and what is known of them. Renaming parameters, splitting a jit, adding
        remat or stacking layers changes no group. An unknown primitive makes fewer groups, never
        wrong ones. Time is linear in the number of equations.

    Groups are those of the traced equations: what Python reads from a shape leaves no trace in
    them. `ones_like(h)` is not tied to h, and a divisor `sqrt(h.shape[-1])` stays what it was.

    Example:
        >>> from unitscale_jax.trace import trace
        >>> params = {"up": jnp.ones((8, 16)), "bias": jnp.ones(16), "down": jnp.ones((16, 8))}
        >>> mlp = lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
        >>> print(dims(trace(mlp, params, jnp.ones((2, 8)))))
        size  flags or reasons  members
          16  exact             bias:0 down:0 up:1
           8  refused: output   down:1
           8  refused: input    up:0
    """
    check_type("the function", traced, Traced, "what us.trace.trace returns")
    params, *inputs = traced.arguments
    axes = {path: new_axes(leaf.shape) for path, leaf in tree.named_leaves(params).items()}
    given = [new_axes(leaf.shape, "input") for leaf in jax.tree.leaves(inputs)]
    closed = traced.closed
    found = coupled(closed.jaxpr, [*axes.values(), *given], closed.consts)
    for out in found.results:
        pin(out, "output")
    axes = dict(zip(axes, settled(axes.values()), strict=True))
    members, record = _members(axes), found.record
    _mark_unused(members, record)
    zeros = Zeros(record, {factor for factor in members if not factor.marks})
    start = [*map(zeros.parameter, axes.values()), *[KnownZeros()] * len(given)]
    walk(zeros, closed.jaxpr, start, closed.consts)
    grouped = {factor: factor.marks <= {"layer"} for factor in members}
    return Dims(
        tuple(_group(f, members[f], axes, zeros) for f in members if grouped[f]),
        tuple(_refused(f, members[f], axes) for f in members if not grouped[f]) + _singles(axes),
        found.unknown,
        axes,
        record,
    )


def _members(axes: Mapping[str, Axes]) -> dict[SymbolicDim, list[Member]]:
    out: dict[SymbolicDim, list[Member]] = {}
    for path, of_path in axes.items():
        for k, axis in enumerate(of_path):
            for t, term in enumerate(axis):
                for i, factor in enumerate(term):
                    out.setdefault(factor, []).append(Member(path, k, t, i))
    return out


def _mark_unused(members: Iterable[SymbolicDim], record: Record) -> None:
    """Marks what no equation meets: it is bound to nothing here, but may be so elsewhere."""
    met = {
        factor
        for ins, _ in record.values()
        for axes in ins
        for axis in axes
        for term in axis
        for factor in term
    }
    for factor in members:
        if factor not in met and not factor.marks:
            factor.marks.add("unused")


def _group(
    factor: SymbolicDim, members: list[Member], axes: Mapping[str, Axes], zeros: Zeros
) -> DimGroup:
    mixed = tuple(sorted(zeros.leaks.get(factor, ())))
    if factor.marks:
        flags = {"layer"}
    elif mixed:
        flags = {"reduce:nonlin"}
    else:
        flags = {"exact", "reduce:sum"} if factor in zeros.sums else {"exact"}
    name = _name(members[0], axes)
    return DimGroup(name, factor.size, tuple(members), frozenset(flags), mixed, factor)


def _refused(factor: SymbolicDim, members: list[Member], axes: Mapping[str, Axes]) -> Refused:
    name = _name(members[0], axes)
    return Refused(name, factor.size, tuple(members), tuple(sorted(factor.marks)))


def _singles(axes: Mapping[str, Axes]) -> tuple[Refused, ...]:
    """Positions that the function picks one by one, such as q, k and v of a stacked kernel."""
    members = [
        Member(path, k, t, 0)
        for path, of_path in axes.items()
        for k, axis in enumerate(of_path)
        for t, term in enumerate(axis)
        if len(axis) > 1 and not term
    ]
    return (Refused(_name(members[0], axes), 1, tuple(members), ("single",)),) if members else ()


def _name(member: Member, axes: Mapping[str, Axes]) -> str:
    axis = axes[member.path][member.axis]
    where = f"{member.path}:{member.axis}"
    if len(axis) > 1:
        return f"{where}[{member.term}, {member.position}]"
    return where if len(axis[0]) == 1 else f"{where}[{member.position}]"
