"""The graph that unit scaling gives factors to: what a function computes from its parameters.

A node is one operation, or a region of elementwise operations that together are one function of
one value. An edge is one use of a value by a node. Only what is *active* is there: floating, made
from parameters, and on its way to the loss.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np

from unitscale_jax.trace.program import (
    ELEMENTWISE,
    PLACED,
    Graph,
    Operation,
    Value,
    bodies,
    shape_of,
)

Powers: TypeAlias = dict[tuple[int, str], int]
"""Shares of residual branches in a loop over layers, `(branch, which)`, to some power."""

SCALES = frozenset({"unit_scale", "unit_scale_by"})
_UNFUSED = PLACED | SCALES | {"straight_through", "stop_gradient", "optimization_barrier"}
VARIES = frozenset({"pvary", "pcast"})
"""Moves that have no meaning outside of a mesh."""

_UNFUSED |= VARIES
_ALONE = frozenset({"convert_element_type", "copy", "copy_p", "name", "reduce_precision"})


@dataclass(eq=False, repr=False)
class Edge:
    """One use of a value by a node.

    Attributes:
        value: The value.
        operation: The operation of the node that reads it.
        position: As which operand.
        fwd: Factor of the value on this way, such as a share of a residual connection.
        ideal: The backward factor that makes the gradient unit.
        bwd: The one that was chosen.
        shares: Data factors of `fwd`, which differ from turn to turn of a loop over layers.
        free: Whether its backward factor is free though that of the node's other operands is not.
    """

    value: Value
    operation: Operation
    position: int
    fwd: float = 1.0
    ideal: float = 1.0
    bwd: float = 1.0
    shares: Powers = field(default_factory=dict)
    free: bool = False


@dataclass(eq=False, repr=False)
class Node:
    """An operation, or a region of elementwise operations, with its factors.

    Attributes:
        operations: Its operations in order.
        edges: Its uses of active values from outside.
        outputs: Its active results that are used outside.
        alpha: Forward factor of each result.
        fixed: log of c(operand) / c(result) where the operation leaves no choice; None where the
            backward factors are free.
        rule: The rule that its factors are from, for `explain`.
        index: Its position in the graph.
        is_region: Whether it is an elementwise function of one value.
    """

    operations: list[Operation]
    edges: list[Edge]
    outputs: list[Value]
    alpha: float = 1.0
    fixed: float | None = None
    rule: str = ""
    index: int = 0
    is_region: bool = False

    @property
    def uses(self) -> list[Edge]:
        """Its edges, the reads of a region as one use of the value that it is a function of."""
        return self.edges[:1] if self.is_region else self.edges

    @property
    def last(self) -> Operation:
        """The operation that makes its result."""
        return self.operations[-1]

    @property
    def name(self) -> str:
        """The primitives of its operations."""
        return "+".join(op.name for op in self.operations)

    def keep(self, rule: str, alpha: float = 1.0) -> None:
        """Leaves its gradient the factor of its value: then nothing can go wrong."""
        self.alpha, self.fixed, self.rule = alpha, 0.0, rule
        for edge in self.edges:
            edge.fwd = edge.ideal = 1.0


@dataclass(eq=False, repr=False)
class Network:
    """The active part of a function.

    Attributes:
        graph: The whole function.
        leaves: Values of the parameters that are active, by position among all parameters.
        nodes: Its nodes, each after those that it depends on but for the `back` of a carry.
        sinks: The values of the loss.
        maker: The node that makes a value.
        uses: The edges of a value.
        active: All active values.
        by_data: Values that depend on something else than parameters.
        readouts: Products with a parameter that all of a loss passes, and no product after them.
        tail: Nodes between the last parameters and the losses.
        tops: The last node of each part of the tail, and the value that the part is a function of.
    """

    graph: Graph
    leaves: Mapping[int, Value]
    nodes: list[Node]
    sinks: list[Value]
    maker: dict[Value, Node]
    uses: dict[Value, list[tuple[Node, Edge]]]
    active: set[Value]
    by_data: set[Value]
    readouts: set[Node] = field(default_factory=set)
    tail: set[Node] = field(default_factory=set)
    tops: list[tuple[Node, Value]] = field(default_factory=list)

    def from_parameters(self, value: Value) -> bool:
        """Whether a value is computed from parameters and constants alone."""
        return value in self.active and value not in self.by_data

    def source(self, value: Value) -> Node | Value:
        """The node that makes a value, or the value itself, of a leaf."""
        return self.maker.get(value, value)


def network(graph: Graph, leaves: Sequence[Value], sinks: Sequence[Value]) -> Network:
    """The active part of a flat program between parameters and the values of a loss."""
    floating = [v for v in leaves if is_floating(v)]
    found = reached(graph.operations, set(floating))
    others = {v for v in graph.inputs if v not in set(leaves)}
    by_data = reached(graph.operations, others, gradients=False)
    active = found & needed(sinks)
    regions = _regions(graph.operations, active, set(sinks))
    nodes = _nodes(graph.operations, active, regions, set(sinks))
    maker = {value: node for node in nodes for value in node.outputs}
    uses: dict[Value, list[tuple[Node, Edge]]] = defaultdict(list)
    for node in nodes:
        for edge in node.edges:
            uses[edge.value].append((node, edge))
    live = {k: v for k, v in enumerate(leaves) if v in active}
    return Network(graph, live, nodes, list(sinks), maker, uses, active, by_data)


def is_floating(value: Value) -> bool:
    return value.dtype is not None and jnp.issubdtype(value.dtype, np.floating)


def reached(
    operations: Sequence[Operation], start: set[Value], *, gradients: bool = True
) -> set[Value]:
    """All values that depend on some; with `gradients` only where a gradient passes."""
    found, before = set(start), -1
    while len(found) != before:  # a second time round, for what comes back by a loop's carry
        before = len(found)
        for op in operations:
            given = [*op.inputs, *([op.back] if op.back is not None else [])]
            if any(v in found for v in given) and not (gradients and op.name == "stop_gradient"):
                found |= {v for v in op.outputs if not gradients or is_floating(v)}
    return found


def needed(sinks: Sequence[Value]) -> set[Value]:
    """All values that some depend on by ways that gradients take."""
    found, todo = set(), list(sinks)
    while todo:
        value = todo.pop()
        if value in found:
            continue
        found.add(value)
        if value.maker is not None and value.maker.name != "stop_gradient":
            back = value.maker.back
            todo += [*value.maker.inputs, *([] if back is None else [back])]
    return found


# --------------------------------------------------------------------------------------- regions


def is_elementwise(op: Operation) -> bool:
    """Whether an equation computes each position of its result from that position alone."""
    if op.is_joint or len(op.outputs) != 1:
        return False
    if op.name == "custom_jvp_call":
        return _body_is_elementwise(op)
    return op.name in ELEMENTWISE and op.name not in _UNFUSED


def _body_is_elementwise(op: Operation) -> bool:
    """Whether the body of a call is: its equations are, and arrays in it have the call's shape."""
    todo = [bodies(op.site.eqn)[0][0]]
    while todo:
        jaxpr = todo.pop()
        for eqn in jaxpr.eqns:
            inside = [body for body, _ in bodies(eqn)]
            todo += inside
            shapes = set(map(shape_of, eqn.outvars))
            known = eqn.primitive.name in (ELEMENTWISE - _UNFUSED) | {"broadcast_in_dim"} | VARIES
            if not (inside or known) or not shapes <= {op.outputs[0].shape, ()}:
                return False
    return True


def _regions(
    operations: Sequence[Operation], active: set[Value], sinks: set[Value]
) -> dict[Operation, Value]:
    """For each operation of an elementwise region the one value that the region is a function of.

    A value that is used outside its region as well as inside ends a region, and the next begins.
    """
    ends: set[Value] = set()
    while True:
        roots = _rooted(operations, active, ends)
        more = {
            op.outputs[0]
            for op in roots
            if op.outputs[0] in active
            and op.outputs[0] not in ends
            and _leaves_region(op, roots, sinks)
            and any(roots.get(user) is roots[op] for user, _ in op.outputs[0].users)
        }
        if not more:
            return roots
        ends |= more


def _rooted(
    operations: Sequence[Operation], active: set[Value], ends: set[Value]
) -> dict[Operation, Value]:
    root: dict[Value, Value] = {}
    found: dict[Operation, Value] = {}
    for op in operations:
        if not is_elementwise(op):
            continue
        moving = [v for v in op.inputs if v in active or v in root]
        shape = op.outputs[0].shape
        if not moving or any(v.shape != shape for v in moving):
            continue
        if any(v.constant is None for v in op.inputs if v not in active and v not in root):
            continue
        of = {root.get(v, v) for v in moving}
        alone = op.name in _ALONE and not any(v in root for v in moving)
        if len(of) == 1 and not alone:
            found[op] = next(iter(of))
            if op.outputs[0] not in ends:
                root[op.outputs[0]] = found[op]
    return found


def _leaves_region(op: Operation, roots: Mapping[Operation, Value], sinks: set[Value]) -> bool:
    """Whether the result of an operation is used outside its region."""
    value = op.outputs[0]
    return value in sinks or any(roots.get(user) is not roots[op] for user, _ in value.users)


def _nodes(
    operations: Sequence[Operation],
    active: set[Value],
    regions: Mapping[Operation, Value],
    sinks: set[Value],
) -> list[Node]:
    """Nodes in order: a region stands where its first operation does."""
    groups = _connected(operations, regions)
    found: list[Node] = []
    for op in operations:
        if op not in groups:
            node = _node([op], active, None)
        elif groups[op][0] is op:
            node = _node(groups[op], active, regions[op])
            exits = [o.outputs[0] for o in groups[op] if _leaves_region(o, regions, sinks)]
            node.outputs = [v for v in node.outputs if v in exits]
            node.is_region = True
        else:
            continue
        if node.outputs and (node.edges or op.back is not None):
            node.index = len(found)
            found.append(node)
    return found


def _connected(
    operations: Sequence[Operation], regions: Mapping[Operation, Value]
) -> dict[Operation, list[Operation]]:
    """The operations of a region that share a value inside of it, for each of them."""
    groups: dict[Operation, list[Operation]] = {}
    for op in operations:
        if op not in regions:
            continue
        mine = [op]
        for value in op.inputs:
            maker = value.maker
            if value is not regions[op] and maker in groups and regions.get(maker) is regions[op]:
                other = groups[maker]
                if other is not mine:
                    mine = other + mine
                    for member in other:
                        groups[member] = mine
        for member in mine:
            groups[member] = mine
    order = {op: k for k, op in enumerate(operations)}
    for members in {id(g): g for g in groups.values()}.values():
        members.sort(key=order.__getitem__)
    return groups


def _node(members: list[Operation], active: set[Value], root: Value | None) -> Node:
    inside = {v for op in members for v in op.outputs} if root is not None else set()
    edges = [
        Edge(value, op, k)
        for op in members
        for k, value in enumerate(op.inputs)
        if value in active and value not in inside
    ]
    outputs = [v for op in members for v in op.outputs if v in active]
    return Node(members, edges, outputs)


# ------------------------------------------------------------------------------------ dominators


class Order:
    """Which nodes a node depends on, and the last one that everything it depends on passes.

    Parameters that only shift or stretch (gains, biases) do not count as a way of their own: a
    norm with an affine part is a function of the value that it normalizes.
    """

    def __init__(self, net: Network) -> None:
        self.net = net
        self.number: dict[Node | Value, int] = {}
        self.before: dict[Node | Value, int] = {}  # bits of `number`
        self.entry: dict[Node, Node | Value | None] = {}
        self._depth: dict[Node | Value | None, int] = {None: 0}
        for leaf in net.leaves.values():
            self._add(leaf, 0, None)
        for node in net.nodes:
            sources = [net.source(edge.value) for edge in node.edges]
            sources = [s for s in sources if s in self.number]
            bits = 0
            for source in sources:
                bits |= self.before[source] | 1 << self.number[source]
            self._add(node, bits, self._dominator(node, sources))

    def _add(self, at: Node | Value, bits: int, entry: Node | Value | None) -> None:
        self.number[at], self.before[at] = len(self.number), bits
        self._depth[at] = self._depth[entry] + 1
        if isinstance(at, Node):
            self.entry[at] = entry

    def _dominator(self, node: Node, sources: list[Node | Value]) -> Node | Value | None:
        if node.last.is_joint or not sources:
            return None  # a loop's body is no function of what is outside alone
        data = [s for s, e in zip(sources, node.edges, strict=False) if e.value in self.net.by_data]
        if data and node.last.name in ELEMENTWISE:
            sources = data
        common = sources[0]
        for source in sources[1:]:
            common = self._nearest(common, source)
        return common

    def _nearest(self, a: Node | Value | None, b: Node | Value | None) -> Node | Value | None:
        while a is not b:
            if self._depth[a] >= self._depth[b]:
                a = self._above(a)
            else:
                b = self._above(b)
        return a

    def _above(self, at: Node | Value | None) -> Node | Value | None:
        return self.entry.get(at) if isinstance(at, Node) else None

    def depends(self, node: Node | Value, on: Node | Value) -> bool:
        """Whether a node depends on another one, or on a leaf."""
        return bool(self.before[node] >> self.number[on] & 1)

    def top(self, node: Node) -> Node | Value | None:
        """The first node or leaf, as early as possible, that all of a node's values pass."""
        at: Node | Value | None = self.entry[node]
        while isinstance(at, Node) and self.entry[at] is not None:
            at = self.entry[at]
        return at

    def between(self, source: Node | Value, node: Node) -> set[Node]:
        """The nodes strictly between two, on any way from the one to the other."""
        found: set[Node] = set()
        todo: list[Node] = [node]
        while todo:
            for edge in todo.pop().edges:
                maker = self.net.maker.get(edge.value)
                if maker is None or maker is source or maker in found:
                    continue
                if self.depends(maker, source):
                    found.add(maker)
                    todo.append(maker)
        return found


def names_of(operations: Iterable[Operation]) -> set[str]:
    """Names of the primitives of some operations."""
    return {op.name for op in operations}
