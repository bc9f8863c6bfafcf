"""Which dimensions of a model a mesh axis can divide, and what keeps the others whole.

A dimension is divided in all parameters that have it, or in none. What speaks against it is found
in one pass of questions, each a few lines; what is left competes for the parameters.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from unitscale_jax import tree as trees
from unitscale_jax.parallel.layouts._meets import DimSet, Meets, factors_of, meets
from unitscale_jax.trace.dimensions import Dims, Member, SymbolicDim
from unitscale_jax.trace.program import Traced

Role: TypeAlias = Literal["column", "row", "batch", "rows"]
"""Uses of a dimension of a parameter: a product makes it ("column"), sums over it ("row") or has it
on both sides ("batch"); tokens pick from the "rows" of a table."""

HARMLESS = frozenset({"constant", "iota", "random_bits"})
"""Why channels cannot be taken out one by one, though they can be divided: each knows its place."""

OF_VOCABULARY = HARMLESS | {"gather", "output"}

WHY = {
    "layer": "a scan runs along it",
    "input": "of an input",
    "output": "of an output",
    "unused": "nothing uses it",
}


@dataclass(frozen=True)
class DivisionGraph:
    """The dimensions of a function's parameters, and the roles that they have in its equations.

    Attributes:
        traced: The function.
        dims: Its dimensions.
        leaves: Its parameters by name.
    """

    traced: Traced
    dims: Dims
    leaves: Mapping[str, Any] = field(repr=False)

    @functools.cached_property
    def members(self) -> dict[SymbolicDim, list[Member]]:
        """Where each dimension is, in the order of the parameters."""
        found: dict[SymbolicDim, list[Member]] = {}
        for path in self.leaves:
            for k, axis in enumerate(self.dims.axes(path)):
                for t, term in enumerate(axis):
                    for i, factor in enumerate(term):
                        found.setdefault(factor, []).append(Member(path, k, t, i))
        return found

    @functools.cached_property
    def meets(self) -> Meets:
        """Collects products, lookups, sums and streams from the equations."""
        return meets(self.traced, self.dims, [f for f in self.members if f.marks <= HARMLESS])

    @functools.cached_property
    def roles(self) -> dict[tuple[str, SymbolicDim], set[Role]]:
        """Collects what products and lookups do with each dimension of each parameter."""
        found: dict[tuple[str, SymbolicDim], set[Role]] = {}

        def add(paths: frozenset[str], factors: DimSet, role: Role) -> None:
            for path in paths:
                for factor in factors & self.of(path):
                    found.setdefault((path, factor), set()).add(role)

        for product in self.meets.products:
            for side in product.kernels:
                add(side.params, side.free, "column")
                add(side.params, product.contracted, "row")
                add(side.params, product.shared, "batch")
        for lookup in self.meets.lookups:
            add(lookup.tables, lookup.rows, "rows")
            add(lookup.tables, lookup.whole, "column")
        return found

    def of(self, path: str) -> DimSet:
        """Lists the dimensions of one parameter."""
        return factors_of(self.dims.axes(path))

    def roles_of(self, factor: SymbolicDim) -> set[Role]:
        """Collects the roles of a dimension in all parameters that have it."""
        paths = {member.path for member in self.members[factor]}
        return set().union(*(self.roles.get((path, factor), set()) for path in paths))

    def nbytes(self, factor: SymbolicDim) -> int:
        """Counts the bytes of all parameters that have a dimension."""
        paths = {member.path for member in self.members[factor]}
        return sum(trees.nbytes(self.leaves[path]) for path in paths)

    def name(self, factor: SymbolicDim) -> str:
        """Names a dimension by the first parameter that makes it, and its axis there."""
        members = self.members[factor]
        made = (m for m in members if "column" in self.roles.get((m.path, factor), ()))
        path, axis, *_ = next(made, members[0])
        return f"{path}:{axis}"

    @functools.cached_property
    def heads(self) -> DimSet:
        """Dimensions along which products of two activations run one by one: heads of attention.

        Queries and keys both have them, or the queries alone if there is one head of keys. A
        product that sums over experts is of two activations too, and none of attention.
        """
        found: set[SymbolicDim] = set()
        for product in self.meets.products:
            summed = product.contracted & self.members.keys()
            if not product.kernels and any("batch" not in self.roles_of(f) for f in summed):
                left, right = product.sides
                shared = product.shared & self.members.keys()
                found |= shared or ((left.free | right.free) & self.members.keys())
        return frozenset(f for f in found if f.marks <= HARMLESS) - self.meets.streams

    @functools.cached_property
    def summed_between_activations(self) -> DimSet:
        """Dimensions that a product of two activations sums over."""
        pairs = [p.contracted for p in self.meets.products if not p.kernels]
        return frozenset().union(*pairs)

    @functools.cached_property
    def vocabulary(self) -> int:
        """The number of rows of the longest table that tokens are looked up in; 0 without one."""
        rows = [f.size for lookup in self.meets.lookups for f in lookup.rows if f in self.members]
        return max(rows, default=0)


def divided(
    graph: DivisionGraph, n: int, mesh_axis: str
) -> tuple[list[SymbolicDim], dict[SymbolicDim, str]]:
    """Chooses the dimensions that a mesh axis of `n` devices divides, and says why not the others.

    A parameter can be divided along one dimension only. The vocabulary goes first, since its table
    is usually the largest parameter and its logits the largest activation; then the dimension whose
    parameters have the most bytes.

    Returns:
        `(dimensions to divide, the reason against each other one)`.
    """
    against = {f: why for f in graph.members if (why := _against(graph, f, n, mesh_axis))}
    left = [factor for factor in graph.members if factor not in against]
    chosen: list[SymbolicDim] = []
    taken: dict[str, SymbolicDim] = {}

    def rank(factor: SymbolicDim) -> tuple[bool, int]:
        return _is_vocabulary(graph, factor), graph.nbytes(factor)

    for factor in sorted(left, key=rank, reverse=True):
        paths = [member.path for member in graph.members[factor]]
        other = next((path for path in paths if path in taken), None)
        if other is None:
            chosen.append(factor)
            taken |= dict.fromkeys(paths, factor)
        else:
            against[factor] = f"{graph.name(taken[other])} goes first"
    return chosen, against


def _against(graph: DivisionGraph, factor: SymbolicDim, n: int, mesh_axis: str) -> str | None:
    """The first reason not to divide a dimension, or None."""
    questions = _of_vocabulary if _is_vocabulary(graph, factor) else _of_groups
    if n == 1:
        return f"no {mesh_axis} to divide it"
    asked = (question(graph, factor) for question in (*questions, _in_pieces))
    found = next((why for why in asked if why), None)
    if found is None and factor.size % n:
        return f"not divisible by {mesh_axis}={n}"
    return found


def _is_vocabulary(graph: DivisionGraph, factor: SymbolicDim) -> bool:
    """Whether a dimension counts words: the rows of a table, or what a head makes of them.

    A kernel that sums over as many channels by accident is none, so logits have no "row".
    """
    roles = graph.roles_of(factor)
    logits = "column" in roles and "row" not in roles
    return factor.size == graph.vocabulary and ("rows" in roles or logits)


# ------------------------------------------------------------------------------- the questions


def _marked(graph: DivisionGraph, factor: SymbolicDim) -> str | None:
    """An equation that needs the whole dimension, such as a softmax or a sort along it."""
    del graph
    marks = sorted(factor.marks - HARMLESS)
    return ", ".join(WHY.get(mark, f"{mark} mixes it") for mark in marks) or None


def _marked_in_vocabulary(graph: DivisionGraph, factor: SymbolicDim) -> str | None:
    """The same of a vocabulary, which may be the output and be looked up in."""
    return None if factor.marks <= OF_VOCABULARY else _marked(graph, factor)


def _stream(graph: DivisionGraph, factor: SymbolicDim) -> str | None:
    """The width of the residual stream, on every kernel: divided, it would leave no other free."""
    return "the residual stream" if factor in graph.meets.streams else None


def _of_both_sides(graph: DivisionGraph, factor: SymbolicDim) -> str | None:
    """A recurrent kernel, of which only one side could be divided."""
    paths = [member.path for member in graph.members[factor]]
    axes = {(member.path, member.axis) for member in graph.members[factor]}
    both = [path for path in dict.fromkeys(paths) if sum(p == path for p, _ in axes) > 1]
    both += [path for path in paths if graph.roles.get((path, factor), set()) >= {"column", "row"}]
    return f"{both[0]} has it on both sides" if both else None


def _beside_heads(graph: DivisionGraph, factor: SymbolicDim) -> str | None:
    """The size of a head: heads of the same kernel are divided, and need no sum of every score."""
    if factor in graph.heads:
        return None
    paths = (member.path for member in graph.members[factor])
    beside = next((path for path in paths if graph.heads & graph.of(path)), None)
    return f"beside the heads of {beside}" if beside else None


def _between_activations(graph: DivisionGraph, factor: SymbolicDim) -> str | None:
    """A product of activations over it, whose every score would be a sum over devices.

    Experts are the exception: their outputs are to be summed over devices, once for each token.
    """
    wrong = factor in graph.summed_between_activations and "batch" not in graph.roles_of(factor)
    return "activations are multiplied over it" if wrong else None


def _without_use(graph: DivisionGraph, factor: SymbolicDim) -> str | None:
    """No pair of a kernel that makes a dimension and one that sums over it, which need one sum."""
    roles = graph.roles_of(factor)
    if "column" not in roles:
        return "no kernel makes it"
    expert = "batch" in roles and factor in graph.summed_between_activations
    return None if "row" in roles or expert else "no kernel sums over it"


def _in_pieces(graph: DivisionGraph, factor: SymbolicDim) -> str | None:
    """Devices hold neighbors, so a dimension has to come first in its axis, in all its terms."""
    for path, axis, *_ in graph.members[factor]:
        terms = graph.dims.axes(path)[axis]
        if any(not term or term[0] is not factor for term in terms):
            inside = factor in terms[0][1:]
            return f"{'inside' if inside else 'a part'} of {path}:{axis}"
    return None


_of_groups = (
    _marked,
    _stream,
    _of_both_sides,
    _beside_heads,
    _between_activations,
    _without_use,
)
_of_vocabulary = (_marked_in_vocabulary,)
