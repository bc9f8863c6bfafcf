"""The end of a function keeps its value: from the last parameter on nothing is scaled forward.

So the loss is the user's loss of scaled activations. One factor on its gradient makes what leaves
this tail unit again: it is the same for all losses, so their weighting stays the user's.
"""

import math

from unitscale_jax.trace.program import Value
from unitscale_jax.unit._nodes import Network, Node, Order


def set_tail(net: Network, order: Order) -> None:
    """Takes the forward factors from all nodes between the last parameters and the losses."""
    todo = [net.source(value) for value in net.sinks if value in net.active]
    seen: set[Node | Value] = set()
    while todo:
        node = todo.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        top = order.top(node)
        if top is not None:
            net.tops.append((node, top.outputs[0] if isinstance(top, Node) else top))
            for inner in {*order.between(top, node), node}:
                _keep_value(net, inner)
        elif all(math.prod(value.shape) <= 1 for value in node.outputs):
            _keep_value(net, node)  # a sum of losses
            todo += [net.source(edge.value) for edge in node.edges]


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
