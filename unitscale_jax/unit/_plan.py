"""What unit scaling puts into a program: a factor for each use and each result, in two passes.

The graph gets its forward factors first (`_ideal`, `_branches`), then the constants that all
backward factors follow from (`_potential`); what is left is to multiply as rarely as possible.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from unitscale_jax import rules as named_rules, tree as trees
from unitscale_jax.errors import closest
from unitscale_jax.trace.program import (
    Place,
    TracedCall,
    Value,
    flat,
)
from unitscale_jax.trace.rewrite import scope_without_notes
from unitscale_jax.unit._branches import Branch, branches_of, loops_with_shares, set_taus, weigh
from unitscale_jax.unit._composite import COMPOSITES, composite_of
from unitscale_jax.unit._ideal import join, set_ideal
from unitscale_jax.unit._losses import Term, losses_of, weights_of_losses
from unitscale_jax.unit._nodes import Edge, Network, Node, Order, Powers, network
from unitscale_jax.unit._potential import constants_of, set_backward, without_shares
from unitscale_jax.unit._tail import find_readouts, set_tail

Share: TypeAlias = tuple[int, str]


@dataclass(frozen=True)
class Factor:
    """Factors of a value on its way into an operation, or out of one: numbers, and data shares."""

    fwd: float = 1.0
    bwd: float = 1.0
    fwd_shares: tuple[tuple[Share, int], ...] = ()
    bwd_shares: tuple[tuple[Share, int], ...] = ()

    @property
    def is_one(self) -> bool:
        """Whether it changes nothing."""
        return self == Factor()

    def then(self, other: "Factor") -> "Factor":
        """The factor that is this one and another one after it."""
        return Factor(
            self.fwd * other.fwd,
            self.bwd * other.bwd,
            self.fwd_shares + other.fwd_shares,
            self.bwd_shares + other.bwd_shares,
        )


@dataclass(frozen=True)
class ScalePlan:
    """What unit scaling puts into a program.

    Attributes:
        operands: Place of an equation and position of an operand -> its factor.
        results: Place of an equation and position of a result -> its factor.
        outputs: Position of an output of the program -> its factor.
        loops: Place of a scan -> the shares that it takes row by row.
        notes: Place of an equation -> what `explain` says.
        inside: Places of all equations around those that change.
    """

    operands: Mapping[tuple[Place, int], Factor]
    results: Mapping[tuple[Place, int], Factor]
    outputs: Mapping[int, Factor]
    loops: Mapping[Place, list[tuple[Share, np.ndarray]]]
    notes: Mapping[Place, str]
    inside: frozenset[Place]


def plan_of(
    staged: TracedCall,
    params: Any,
    taus: Sequence[float] | None,
    keep: Sequence[named_rules.Pattern],
    batch_ratio: float,
) -> ScalePlan:
    """Decides on all factors of a traced call."""
    graph = flat(staged.closed, lambda site: composite_of(site) is not None)
    names = trees.names(params)
    is_param = [at < len(names) for at in staged.positions]
    leaves = [v for v, own in zip(graph.inputs, is_param, strict=True) if own]
    named = {
        v: names[at]
        for v, at in zip(graph.inputs, staged.positions, strict=True)
        if at < len(names)
    }
    losses = losses_of(staged)
    net = network(graph, leaves, [graph.outputs[k] for k in losses])
    if not any(value in net.active for value in net.sinks):
        raise ValueError(
            "no parameter reaches the loss, so there is nothing to scale. The first argument of "
            "the function is its parameters, of floating-point numbers."
        )
    branches, powers = _set_forward(net, taus, _kept(net, named, keep), batch_ratio)
    references = {
        (k, name): float(np.median(x))
        for k, b in enumerate(branches)
        for name, x in b.shares.items()
    }
    weights = weights_of_losses(staged, losses, batch_ratio)
    constants, of_losses = constants_of(net, weights, references)
    shares = set_backward(net, without_shares(constants, powers, references), powers)
    return _as_plan(net, losses, branches, shares, of_losses)


def _set_forward(
    net: Network,
    taus: Sequence[float] | None,
    kept: Callable[[Node], bool],
    batch_ratio: float,
) -> tuple[list[Branch], Mapping[Node | Value, Powers]]:
    """Sets forward factors and the ideal backward ones."""
    order = Order(net)
    net.readouts = find_readouts(net, order)
    for node in net.nodes:
        own = composite_of(node.last.site)
        if own is not None:
            COMPOSITES[own].apply(node)
        elif not join(net, order, node):
            set_ideal(net, node, batch_ratio)
    branches = branches_of(net, order)
    set_taus(branches, taus)
    powers = weigh(net, branches)
    for node in net.nodes:
        if kept(node):
            node.keep("kept: by `keep`")
    set_tail(net, order)
    return branches, powers


def _kept(
    net: Network, named: Mapping[Value, str], keep: Sequence[named_rules.Pattern]
) -> Callable[[Node], bool]:
    """Whether a node has a name that a pattern of `keep` matches."""
    names = {node: _names(net, named, node) for node in net.nodes}
    every = sorted(set().union(*names.values())) if names else []
    for pattern in keep:
        if not any(named_rules.matches(pattern, name) for name in every):
            raise ValueError(
                f"keep: {pattern!r} matched no parameter and no scope"
                f"{closest(str(pattern), every)}."
            )
    return lambda node: any(named_rules.matches(p, n) for p in keep for n in names[node])


def _names(net: Network, named: Mapping[Value, str], node: Node) -> set[str]:
    found = {scope_without_notes(op.site) for op in node.operations}
    for edge in node.edges:
        value = edge.value
        while value in net.maker and len(net.maker[value].edges) == 1:
            value = net.maker[value].edges[0].value
        if value in named:
            found.add(named[value])
    return found - {""}


def _as_plan(
    net: Network,
    losses: Mapping[int, Term],
    branches: Sequence[Branch],
    shares: Mapping[Edge, Powers],
    of_losses: float,
) -> ScalePlan:
    uses, results = _factors(net, shares)
    operands: dict[tuple[Place, int], Factor] = {}
    for edge, own in uses.items():
        if not edge.operation.is_joint and not _is_near_one(own):
            operands[edge.operation.site.place, edge.position] = own
    made: dict[tuple[Place, int], Factor] = {}
    for value, own in results.items():
        if value.maker is not None and not _is_near_one(own):
            made[value.maker.site.place, value.maker.outputs.index(value)] = own
    active = {k for k in losses if net.graph.outputs[k] in net.active}
    outputs = {k: Factor(bwd=of_losses) for k in active if of_losses != 1.0}
    loops = loops_with_shares(branches)
    changed = [place for place, _ in (*operands, *made)] + list(loops)
    inside = {place[: 2 * k + 1] for place in changed for k in range(len(place) // 2)}
    inside |= set(loops)
    equations = [(op, node) for node in net.nodes for op in node.operations if not op.is_joint]
    notes = {op.site.place: _note(node) for op, node in equations}
    return ScalePlan(operands, made, outputs, loops, notes, frozenset(inside))


def _factors(
    net: Network, shares: Mapping[Edge, Powers]
) -> tuple[dict[Edge, Factor], dict[Value, Factor]]:
    """Where each factor is multiplied by: at the use of a value, or where the value is made.

    A multiplication is a pass over an array, so there are as few as can be: one for a node whose
    operands all have the same backward factor, at its result, where its forward factor is; and one
    for a value whose uses all have the same factor, where it is made.
    """
    uses = {
        edge: Factor(edge.fwd, edge.bwd, _sorted(edge.shares), _sorted(shares[edge]))
        for node in net.nodes
        for edge in node.edges
    }
    results: dict[Value, Factor] = {}
    for node in net.nodes:
        if node.last.is_joint:
            continue
        own = Factor(fwd=node.alpha)
        first = uses[node.edges[0]] if node.edges else Factor()
        if first == Factor(bwd=first.bwd) and all(uses[edge] == first for edge in node.edges):
            own = Factor(node.alpha, first.bwd)
            uses |= dict.fromkeys(node.edges, Factor())
        results |= dict.fromkeys(node.outputs, own)
    for value, own in results.items():
        edges = [edge for _, edge in net.uses[value]]
        if not edges or own.is_one or not _all_uses(value, edges):
            continue
        first = uses[edges[0]]
        if all(uses[edge] == first for edge in edges):
            results[value] = own.then(first)
            uses |= dict.fromkeys(edges, Factor())
    return uses, results


def _all_uses(value: Value, edges: Sequence[Edge]) -> bool:
    """Whether the active uses of a value are all there are, in the loops that it is made in."""
    assert value.maker is not None
    users = {(edge.operation, edge.position) for edge in edges}
    inside = all(edge.operation.loops == value.maker.loops for edge in edges)
    plain = not any(edge.operation.is_joint for edge in edges)
    return inside and plain and users == set(value.users)


def _sorted(powers: Powers) -> tuple[tuple[Share, int], ...]:
    return tuple(sorted(powers.items()))


def _is_near_one(factor: Factor) -> bool:
    """Whether a factor is 1 but for the rounding of the solution, which must not add equations.

    Leaving it out changes a constant by that rounding, far below what any dtype resolves.
    """
    shares = factor.fwd_shares or factor.bwd_shares
    near = abs(factor.fwd - 1) < 1e-12 and abs(factor.bwd - 1) < 1e-12
    return near and not shares


def _note(node: Node) -> str:
    if node.rule.startswith("kept"):
        return node.rule
    backward = " ".join(f"{edge.bwd:.3g}" for edge in node.edges)
    return f"{node.rule}: {node.alpha:.3g} | {backward}"
