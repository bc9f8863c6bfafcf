"""Backward factors that change no direction: one constant for each value.

    bwd of an edge from v to w  =  alpha_w fwd c(v) / c(w)

If each value has a constant c > 0 for which this holds, and c = 1 at the loss, the gradient of each
value is c times the true gradient of the scaled function (induct in reverse order: a gradient is
the sum over uses of linear maps of the users' gradients). So any c is right, and the best one is
c(v) = 1 / T(v), where T is how large the true gradient is expected to be: each edge multiplies it
by alpha fwd / ideal, and gradients of several uses add up in squares. Where an operation leaves no
choice (a reshape, a norm, a loop's carry, which is one value for all turns), the constants of a
group have fixed ratios, and the group takes the geometric mean of what its members want.
"""

import math
from collections.abc import Mapping

import numpy as np

from unitscale_jax.trace.program import Value
from unitscale_jax.unit._ideal import INSIDE
from unitscale_jax.unit._measure import sample_moments, snapped
from unitscale_jax.unit._nodes import Edge, Network, Node, Powers

Sizes = dict[Node | Value, float]


def constants_of(
    net: Network, weights: Mapping[int, float], references: Mapping[tuple[int, str], float]
) -> tuple[dict[Node | Value, float], float]:
    """Constants of all nodes and leaves, and the factor of the gradients of the losses.

    Args:
        net: The network, its forward and ideal factors set.
        weights: For each output that is a loss the number of items that it is divided by.
        references: Typical values of the shares that are data.
    """
    once = _sizes(net, weights, references, {})
    carried = {node: once[node] for node in net.nodes if node.last.back is not None}
    sizes = _sizes(net, weights, references, carried)  # now with what comes back by carries
    by_slopes = _leaving_tail(net, sizes, references)
    return _grouped(net, sizes, by_slopes), 1 / _measured(net, sizes, by_slopes)


def _sizes(
    net: Network,
    weights: Mapping[int, float],
    references: Mapping[tuple[int, str], float],
    carried: Mapping[Node, float],
) -> Sizes:
    """The expected RMS of the true gradient of every node and leaf, for losses without a factor."""
    squares: dict[Node | Value, float] = dict.fromkeys([*net.nodes, *net.leaves.values()], 0.0)
    for at, count in weights.items():
        value = net.graph.outputs[at]
        if value in net.active:
            squares[net.source(value)] += count**-2
    for node, size in carried.items():
        back = node.last.back
        if back is not None and back in net.active:
            squares[net.source(back)] += size * size
    for node in reversed(net.nodes):
        for edge in node.uses:
            slope = _slope(node, edge, references)
            part = squares[node] * slope * slope
            squares[net.source(edge.value)] += part * _turns(edge)
    return {at: math.sqrt(square) for at, square in squares.items()}


def _slope(node: Node, edge: Edge, references: Mapping[tuple[int, str], float]) -> float:
    """What an edge multiplies the RMS of the true gradient by."""
    share = math.prod(references[key] ** power for key, power in edge.shares.items())
    return node.alpha * edge.fwd * share / edge.ideal


def _turns(edge: Edge) -> float:
    """How many gradients of one use add up: those of a loop's turns, of a value from outside."""
    made = edge.value.maker
    outside = len(made.loops) if made is not None else 0
    operation = edge.operation
    loops = operation.loops[outside:]
    if operation.name in ("row", "carry"):
        loops = loops[:-1]  # each turn takes its own row, and the first turn the carry
    return math.prod(loop.eqn.params["length"] for loop in loops)


def _measured(net: Network, sizes: Sizes, by_slopes: float) -> float:
    """How large the gradients are that leave the tail, measured where its arrays are small.

    A part of the tail is a function of one value, so it is differentiated on a sample of it. Slopes
    of single operations, which stand in where arrays are too large, know nothing of each other.
    """
    total = 0.0
    for node, start in net.tops:
        if start not in net.by_data:
            continue  # a penalty on parameters
        found = sample_moments(net, start, node)
        if found is None or not 0 < found[1] < math.inf:
            return by_slopes
        total = math.hypot(total, sizes[node] * found[1] ** 0.5)
    return by_slopes * snapped(total / by_slopes) if total else by_slopes


def _leaving_tail(net: Network, sizes: Sizes, references: Mapping[tuple[int, str], float]) -> float:
    """How large the gradients are that leave the tail, from the slopes of its operations.

    Parameters in the tail (a last bias, a penalty) count only where there is nothing else.
    """
    data = others = 0.0
    sinks = [v for v in net.sinks if v in net.active and net.source(v) not in net.tail]
    data = math.hypot(*(sizes[net.source(v)] for v in sinks)) if sinks else 0.0
    for node in net.tail:
        for edge in node.uses:
            if net.source(edge.value) in net.tail:
                continue
            size = sizes[node] * _slope(node, edge, references)
            if edge.value in net.by_data:
                data = math.hypot(data, size)
            else:
                others = math.hypot(others, size)
    found = data or others
    return found if found and math.isfinite(found) else 1.0


class _Groups:
    """Nodes whose constants have a fixed ratio: union by weight, in logarithms."""

    def __init__(self) -> None:
        self.parent: dict[Node | Value, tuple[Node | Value, float]] = {}

    def find(self, at: Node | Value) -> tuple[Node | Value, float]:
        """The representative of a node, and log c(node) - log c(representative)."""
        path, offset = [], 0.0
        while at in self.parent:
            above, ratio = self.parent[at]
            path.append((at, offset))
            at, offset = above, offset + ratio
        for node, before in path:
            self.parent[node] = at, offset - before
        return at, offset

    def tie(self, a: Node | Value, b: Node | Value, ratio: float) -> None:
        """Fixes log c(a) - log c(b), unless it is fixed already."""
        (root_a, of_a), (root_b, of_b) = self.find(a), self.find(b)
        if root_a is not root_b:
            self.parent[root_a] = root_b, ratio + of_b - of_a


_SINK = Value((), None)
_LARGEST = 28.0  # of a constant's logarithm: e^28 is about 2^40


def _grouped(net: Network, sizes: Sizes, leaving: float) -> dict[Node | Value, float]:
    groups = _tied(net)
    every: list[Node | Value] = [*net.nodes, *net.leaves.values()]
    wishes: dict[Node | Value, list[tuple[float, bool]]] = {}
    for at in every:
        root, offset = groups.find(at)
        if sizes[at] > 0:
            inner = isinstance(at, Node) and at.rule == INSIDE
            wish = -math.log(sizes[at] / leaving) - offset
            wishes.setdefault(root, []).append((wish, inner))
    # Any constant is right, but not one that a float cannot hold: gradients of a thousand uses in
    # a row are expected to grow beyond all bounds, and do not.
    bounded = lambda x: min(max(x, -_LARGEST), _LARGEST)
    logs = {root: bounded(_mean_of(members)) for root, members in wishes.items()}
    root, offset = groups.find(_SINK)
    logs[root] = -offset
    found: dict[Node | Value, float] = {}
    for at in every:
        root, offset = groups.find(at)
        found[at] = math.exp(logs.get(root, 0.0) + offset)
    return found


def _tied(net: Network) -> _Groups:
    groups = _Groups()
    for value in net.sinks:
        if value in net.active:
            groups.tie(net.source(value), _SINK, 0.0)
    for node in net.nodes:
        for edge in node.edges:
            if node.fixed is not None and not edge.free:
                groups.tie(net.source(edge.value), node, node.fixed)
        back = node.last.back
        if back is not None and back in net.active:
            groups.tie(net.source(back), node, 0.0)
    return groups


def _mean_of(members: list[tuple[float, bool]]) -> float:
    """The mean wish; nodes inside norms, whose gradients mostly cancel, have no say with others."""
    outer = [wish for wish, inner in members if not inner]
    return float(np.mean(outer or [wish for wish, _ in members]))


def set_backward(
    net: Network, constants: Mapping[Node | Value, float], powers: Mapping[Node | Value, Powers]
) -> dict[Edge, Powers]:
    """Sets the backward factor of every edge; returns the powers of data shares in each."""
    found: dict[Edge, Powers] = {}
    for node in net.nodes:
        for edge in node.edges:
            source = net.source(edge.value)
            edge.bwd = node.alpha * edge.fwd * constants[source] / constants[node]
            found[edge] = _product(edge.shares, powers.get(source, {}), powers.get(node, {}))
    return found


def without_shares(
    constants: Mapping[Node | Value, float],
    powers: Mapping[Node | Value, Powers],
    references: Mapping[tuple[int, str], float],
) -> dict[Node | Value, float]:
    """The static part of constants, of which some have powers of data shares as factors."""
    part = lambda own: math.prod(references[key] ** power for key, power in own.items())
    return {at: c / part(powers.get(at, {})) for at, c in constants.items()}


def _product(own: Powers, of_value: Powers, of_node: Powers) -> Powers:
    """Powers of fwd c(value) / c(node)."""
    total = dict(own)
    for powers, sign in ((of_value, 1), (of_node, -1)):
        for key, power in powers.items():
            total[key] = total.get(key, 0) + sign * power
    return {key: power for key, power in total.items() if power}
