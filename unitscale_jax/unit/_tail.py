"""The end of a function keeps its value: from the last parameter on nothing is scaled forward.

So the loss is the user's loss of scaled activations. One factor on its gradient makes what leaves
this tail unit again: it is the same for all losses, so their weighting stays the user's.
"""

import math
from collections.abc import Iterator

from unitscale_jax.trace.program import PRODUCTS, Value
from unitscale_jax.unit._nodes import Network, Node, Order


def tail_parts(net: Network, order: Order) -> Iterator[tuple[Node, Node | Value | None]]:
    """The last node of each part of the tail, and what the part is a function of.

    A part without such a value is a sum of losses, whose terms are parts of their own.
    """
    todo = [net.source(value) for value in net.sinks if value in net.active]
    seen: set[Node | Value] = set()
    while todo:
        node = todo.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        top = order.top(node)
        if top is not None:
            yield node, top
        elif all(math.prod(value.shape) <= 1 for value in node.outputs):
            yield node, None
            todo += [net.source(edge.value) for edge in node.edges]


def find_readouts(net: Network, order: Order) -> set[Node]:
    """The products with a parameter that a part of the tail begins with."""
    tops = [top for _, top in tail_parts(net, order) if isinstance(top, Node)]
    return {
        top
        for top in tops
        if top.last.name in PRODUCTS
        and sum(net.from_parameters(edge.value) for edge in top.edges) == 1
    }


def set_tail(net: Network, order: Order) -> None:
    """Takes the forward factors from all nodes between the last parameters and the losses."""
    for node, top in tail_parts(net, order):
        inner = {node} if top is None else {*order.between(top, node), node}
        for member in inner:
            _keep_value(net, member)
        if top is not None:
            net.tops.append((node, top.outputs[0] if isinstance(top, Node) else top))


def _keep_value(net: Network, node: Node) -> None:
    """Keeps the value of a node; by what its slope multiplies gradients is known by `ideal`."""
    if node in net.tail:
        return
    net.tail.add(node)
    node.alpha, node.fixed = 1.0, 0.0 if node.fixed is None else node.fixed
    if not node.rule.startswith("kept"):
        node.rule = f"loss ({node.rule})"
    for edge in node.edges:
        edge.free = edge.value not in net.by_data  # a last bias, a penalty
        edge.fwd = 1.0
