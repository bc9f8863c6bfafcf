"""Residual connections of a function, found by their data flow, and the weight of each.

An addition of a value and of something computed from that value, with a parameter in between, is
a residual connection: y = (tau f(x) + x) / (1 + tau^2)^1/2. The gradient of the branch gets its
share tau / (1 + tau^2)^1/2 where the branch leaves the skip path, so that it is unit inside. In a
loop over layers, whose body stands in the program once, tau differs from turn to turn: there the
shares are data of the loop, one row for each turn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from unitscale_jax.trace.program import IN_PLACE, Place, Value
from unitscale_jax.unit._nodes import Edge, Network, Node, Order, Powers
from unitscale_jax.unit._residual import taus as taus_of

_MOVES = IN_PLACE | {"reshape", "transpose", "squeeze", "row"}


@dataclass(eq=False)
class Branch:
    """A residual connection.

    Attributes:
        node: The addition.
        branch: Its edge to the result of the branch.
        skip: Its edge to the skip path.
        source: What the skip path and the branch both come from.
        inside: The nodes of the branch.
        turns: How often the loops around evaluate it.
        taus: Its weight, one for each turn of the innermost loop.
    """

    node: Node
    branch: Edge
    skip: Edge
    source: Value
    inside: set[Node]
    turns: int
    taus: np.ndarray = field(default_factory=lambda: np.ones(1))

    @property
    def shares(self) -> dict[str, np.ndarray]:
        """`tau / D` of the branch and `1 / D` of the skip, for each turn."""
        whole = np.sqrt(1 + self.taus**2)
        return {"branch": self.taus / whole, "skip": 1 / whole}


def branches_of(net: Network, order: Order) -> list[Branch]:
    """All residual connections in the order of the program."""
    found = []
    for node in net.nodes:
        if node.rule != "add":
            continue
        for position in (0, 1):
            branch, skip = node.edges[position], node.edges[1 - position]
            made = _branch(net, order, node, branch, skip)
            if made is not None:
                found.append(made)
                break
    return found


def _branch(net: Network, order: Order, node: Node, branch: Edge, skip: Edge) -> Branch | None:
    """The residual connection that an addition makes, if it is one."""
    source = _origin(net, skip.value)
    start, end = net.source(source), net.maker.get(branch.value)
    if end is None or start not in order.number or not order.depends(end, start):
        return None
    inside = order.between(start, node) if isinstance(start, Node) else set()
    if not isinstance(start, Node):
        inside = {m for m in order.between(start, node) if order.depends(m, start)}
    inside = {m for m in inside if m is end or order.depends(end, m)}
    if not any(_has_parameter(net, m, inside, start) for m in inside):
        return None  # x - mean(x) is no residual connection
    turns = math.prod(loop.eqn.params["length"] for loop in node.last.loops)
    return Branch(node, branch, skip, source, inside, turns)


def _origin(net: Network, value: Value) -> Value:
    """The value before it was only moved."""
    while value in net.maker and net.maker[value].last.name in _MOVES - {"row"}:
        value = net.maker[value].edges[0].value
    return value


def _has_parameter(net: Network, node: Node, inside: set[Node], start: Node | Value) -> bool:
    sources = [net.source(edge.value) for edge in node.edges]
    return any(s is not start and s not in inside for s in sources)


def set_taus(branches: Sequence[Branch], given: Sequence[float] | None) -> None:
    """Gives each branch its weights: those given, in order of evaluation, or those of the rule.

    Raises:
        ValueError: Another number of weights is given than there are branches.
    """
    count = sum(branch.turns for branch in branches)
    if given is not None and len(given) != count:
        raise ValueError(
            f"taus has {len(given)} weights, and the function has {count} residual branches. Give "
            "one for each, in the order in which they are evaluated."
        )
    if not branches:
        return
    weights = np.array(taus_of(count) if given is None else given, float)
    if not (weights > 0).all():
        raise ValueError(f"taus has the weight {weights.min()}; expected positive numbers.")
    at = 0
    for group in _by_loop(branches):
        turns = group[0].turns
        own = weights[at : at + turns * len(group)].reshape(turns, len(group))
        for k, branch in enumerate(group):
            branch.taus = own[:, k]
        at += turns * len(group)


def _by_loop(branches: Sequence[Branch]) -> list[list[Branch]]:
    """Branches that are evaluated in turns: those of one loop, and each other one by itself."""
    groups: list[list[Branch]] = []
    for branch in branches:
        last = groups[-1][0] if groups else None
        loops = branch.node.last.loops
        if last is not None and loops and loops == last.node.last.loops:
            groups[-1].append(branch)
        else:
            groups.append([branch])
    return groups


def weigh(net: Network, branches: Sequence[Branch]) -> dict[Node | Value, Powers]:
    """Sets the factors of residual connections.

    Returns:
        For each node and leaf inside a branch whose weight differs from turn to turn the powers of
        the branch's share in its constant: its gradient is not yet multiplied by that share, and
        so its constant is the static one divided by it.
    """
    powers: dict[Node | Value, Powers] = {}
    for number, branch in enumerate(branches):
        branch.node.alpha, branch.node.rule = 1.0, "residual"
        if _differs(branch):
            branch.branch.shares = {(number, "branch"): 1}
            branch.skip.shares = {(number, "skip"): 1}
            for at in _owned(net, branch):
                powers.setdefault(at, {})[number, "branch"] = -1
        else:
            share = {name: float(np.median(x)) for name, x in branch.shares.items()}
            branch.branch.fwd, branch.skip.fwd = share["branch"], share["skip"]
    return powers


def _differs(branch: Branch) -> bool:
    """Whether the weight is data of the one loop around it: a joint cannot carry its share."""
    alone = len(branch.node.last.loops) == 1 and len(set(branch.taus)) > 1
    return alone and not any(m.last.is_joint for m in branch.inside)


def _owned(net: Network, branch: Branch) -> set[Node | Value]:
    """The nodes inside a branch, and the stacked parameters that only they read."""
    found: set[Node | Value] = set(branch.inside)
    for node in branch.inside:
        for edge in node.edges:
            found |= _only_for(net, edge.value)
    return found


def _only_for(net: Network, value: Value) -> set[Node | Value]:
    """The rows of a stacked parameter, down to the parameter, if nothing else reads them."""
    chain: set[Node | Value] = set()
    rows = False
    while len(net.uses[value]) == 1 and net.from_parameters(value):
        maker = net.maker.get(value)
        if maker is None:
            return chain | {value} if rows else set()
        if maker.last.name not in (_MOVES if not rows else IN_PLACE) or len(maker.edges) != 1:
            return set()
        rows = rows or maker.last.name == "row"
        chain.add(maker)
        value = maker.edges[0].value
    return set()


def loops_with_shares(
    branches: Sequence[Branch],
) -> dict[Place, list[tuple[tuple[int, str], np.ndarray]]]:
    """For each loop the shares that it takes row by row."""
    found: dict[Place, list[tuple[tuple[int, str], np.ndarray]]] = {}
    for number, branch in enumerate(branches):
        if branch.branch.shares:
            loop = branch.node.last.loops[-1].place
            rows = [((number, name), x) for name, x in branch.shares.items()]
            found.setdefault(loop, []).extend(rows)
    return found
