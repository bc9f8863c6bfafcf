"""Ideal factors of each node by itself: what makes its result and its gradients unit.

One rule for each sort of operation, of its shapes alone; elementwise regions and joins of a value
with a statistic of itself (norms, softmax) are calibrated. An operation without a rule is left
alone, and says so.
"""

import math
from collections.abc import Callable

from unitscale_jax.trace.program import (
    ADDITIONS,
    ELEMENTWISE,
    IN_PLACE,
    JOINS,
    PRODUCTS,
    REDUCTIONS,
    WINDOWS,
    Operation,
    Value,
)
from unitscale_jax.unit._factors import exact_softmax
from unitscale_jax.unit._measure import largest_of, region_moments, sample_moments, snapped
from unitscale_jax.unit._nodes import SCALES, Edge, Network, Node, Order, names_of

_UNCHANGED = IN_PLACE | {"reshape", "transpose", "squeeze", "expand_dims", "rev"}


def set_ideal(net: Network, node: Node, batch_ratio: float) -> None:
    """Gives a node the factors of its rule; `batch_ratio` counts for gradients of parameters."""
    op = node.last
    if node.is_region:
        _elementwise(node)
    elif op.is_joint:
        node.keep("border of a loop or branch")
    elif op.name in SCALES:
        _own_scale(node)
    elif op.name in _UNCHANGED:
        node.keep("moves numbers")
    elif op.name in ADDITIONS and len(node.edges) == 2:
        _add(net, node)
    elif op.name in _RULES:
        node.rule = op.name
        _RULES[op.name](net, node, batch_ratio)
    elif op.name in ("mul", "div") or op.name in ADDITIONS or op.name in _PLAIN:
        node.rule = "as it is"
        _broadcast_inside(node)
        _pass(net, node)
    elif op.name == "custom_jvp_call" and len(node.edges) == 1:
        _calibrated(net, node)
    else:
        node.keep(f"kept: no rule for {op.name}")


_PLAIN = JOINS | frozenset({
    *("slice", "dynamic_slice", "split", "unstack", "tile", "pad", "max", "min", "select_n"),
    *("sort", "dynamic_update_slice", "clamp"),
})  # fmt: skip
"""Numbers stay as large as they are, and so do gradients but for the zeros between them."""


def _size(value: Value) -> int:
    return math.prod(value.shape)


def _rows(net: Network, edge: Edge, count: float, ratio: float) -> float:
    """Factor of a gradient that is a sum of so many terms: those of a parameter are of the step."""
    return (count * (ratio if net.from_parameters(edge.value) else 1)) ** -0.5


def _elementwise(node: Node) -> None:
    node.rule = "elementwise"
    out, slope = region_moments(node)
    if not (0 < out < math.inf):
        node.keep("kept: not finite on Gaussian numbers")
        return
    node.alpha = out**-0.5
    # A straight-through estimator has a body without a slope: its gradient passes as it is.
    ideal = slope**-0.5 if 0 < slope < math.inf else node.alpha
    for edge in node.edges:
        edge.ideal = ideal


def _own_scale(node: Node) -> None:
    """A scale that the user wrote keeps its factors, which say how the constants differ."""
    params = node.last.site.eqn.params
    node.keep("scaled by hand")
    if node.last.name == "unit_scale":
        node.fixed = math.log(abs(params["bwd"] / params["fwd"])) if params["fwd"] else 0.0


def _broadcast_inside(node: Node) -> None:
    """Axes of size 1 may broadcast inside the primitive: their gradient is a sum."""
    for edge in node.edges:
        edge.ideal = (_size(node.outputs[0]) / max(_size(edge.value), 1)) ** -0.5


def _pass(net: Network, node: Node) -> None:
    """Lets the gradient of the only data pass as it is: a factor here would be work for nothing.

    What comes before can have it as well, a product as a rule, where it costs next to nothing.
    """
    data = [edge for edge in node.edges if edge.value in net.by_data]
    same = [edge for edge in data if edge.value.shape == node.outputs[0].shape]
    if len(data) == len(same) == 1:
        node.fixed = 0.0
        for edge in node.edges:
            edge.free = edge not in data


def _add(net: Network, node: Node) -> None:
    _broadcast_inside(node)
    node.rule = "add"
    node.alpha = 2**-0.5
    left, right = (edge.value for edge in node.edges)
    if _is_bias(net, left, right) or _is_bias(net, right, left):
        node.rule, node.alpha = "bias", 1.0  # it is zero at first, and adds no variance
        _pass(net, node)


def _is_bias(net: Network, value: Value, other: Value) -> bool:
    """Whether a value is a parameter along one axis, or one number for each output of a product.

    A table of positions (length, width) is neither: it adds variance from the start.
    """
    if not net.from_parameters(value):
        return False
    own = _before_moves(value, {"broadcast_in_dim", "row"})
    stacked = any(user.name == "row" for user, _ in own.users)
    shape = own.shape[1 if stacked else 0 :]
    product = _before_moves(other, set()).maker
    if sum(n > 1 for n in shape) <= 1:
        return True
    if product is None or product.name != "dot_general":
        return False
    kernels = [k for k, v in enumerate(product.inputs[:2]) if net.from_parameters(v)]
    return len(kernels) == 1 and math.prod(shape) == _free(product, kernels[0])


def _before_moves(value: Value, more: set[str]) -> Value:
    while value.maker is not None and value.maker.name in _UNCHANGED | more:
        value = value.maker.inputs[0]
    return value


def _free(product: Operation, side: int) -> int:
    """How many outputs an operand of a dot has: its axes that are not summed over, nor batch."""
    contracted, batch = product.site.eqn.params["dimension_numbers"]
    used = (*contracted[side], *batch[side])
    return math.prod(n for d, n in enumerate(product.inputs[side].shape) if d not in used)


def _dot(net: Network, node: Node, ratio: float) -> None:
    contracted, _ = node.last.site.eqn.params["dimension_numbers"]
    shape = node.last.inputs[0].shape
    terms = math.prod(shape[d] for d in contracted[0])
    node.alpha = terms**-0.5
    if node in net.readouts:
        # Outputs shrink with width, as in u-muP: training aligns a readout with what it reads, and
        # sums of aligned terms grow with their number, not with its root.
        node.alpha, node.rule = 1 / terms, "readout"
    for edge in node.edges:
        edge.ideal = _rows(net, edge, _free(node.last, 1 - edge.position), ratio)


def _conv(net: Network, node: Node, ratio: float) -> None:
    params = node.last.site.eqn.params
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    kernel, out = node.last.inputs[1].shape, node.outputs[0].shape
    window = math.prod(kernel[d] for d in numbers.rhs_spec[2:])
    node.alpha = (window * kernel[numbers.rhs_spec[1]] / math.prod(params["lhs_dilation"])) ** -0.5
    for edge in node.edges:
        if edge.position == 0:
            # A position of x is met by window / stride positions of the kernel, of out / groups.
            terms = (
                window * kernel[numbers.rhs_spec[0]] / groups / math.prod(params["window_strides"])
            )
            edge.ideal = _rows(net, edge, terms, ratio)
        else:
            positions = out[numbers.out_spec[0]] * math.prod(out[d] for d in numbers.out_spec[2:])
            edge.ideal = _rows(net, edge, positions, ratio)


def _ragged(net: Network, node: Node, ratio: float) -> None:
    rows, width = node.last.inputs[0].shape
    groups, _, out = node.last.inputs[1].shape
    node.alpha = width**-0.5
    for edge in node.edges:
        edge.ideal = _rows(net, edge, out if edge.position == 0 else rows / groups, ratio)


def _sum(net: Network, node: Node, ratio: float) -> None:
    del net, ratio
    node.alpha = (_size(node.edges[0].value) / max(_size(node.outputs[0]), 1)) ** -0.5


def _largest(net: Network, node: Node, ratio: float) -> None:
    """Of n numbers: one of them takes the gradient."""
    del net, ratio
    count = _size(node.edges[0].value) // max(_size(node.outputs[0]), 1)
    node.alpha = largest_of(count) ** -0.5
    node.edges[0].ideal = count**0.5


def _cumulative(net: Network, node: Node, ratio: float) -> None:
    del net, ratio
    n = node.edges[0].value.shape[node.last.site.eqn.params["axis"]]
    node.alpha = node.edges[0].ideal = ((n + 1) / 2) ** -0.5


def _window_sum(net: Network, node: Node, ratio: float) -> None:
    del net, ratio
    params = node.last.site.eqn.params
    window, strides = math.prod(params["window_dimensions"]), math.prod(params["window_strides"])
    node.alpha = window**-0.5
    node.edges[0].ideal = (strides / window) ** 0.5


def _window_max(net: Network, node: Node, ratio: float) -> None:
    del net, ratio
    params = node.last.site.eqn.params
    node.alpha = largest_of(math.prod(params["window_dimensions"])) ** -0.5
    node.edges[0].ideal = math.prod(params["window_strides"]) ** 0.5


def _broadcast(net: Network, node: Node, ratio: float) -> None:
    terms = _size(node.outputs[0]) / max(_size(node.edges[0].value), 1)
    node.edges[0].ideal = _rows(net, node.edges[0], terms, ratio if terms > 1 else 1)


def _gather(net: Network, node: Node, ratio: float) -> None:
    """A row of a table of V rows is met by ids / V ids."""
    edge = node.edges[0]
    terms = _size(node.outputs[0]) / max(_size(edge.value), 1)
    edge.ideal = _rows(net, edge, terms, ratio) if terms else 1.0


_RULES: dict[str, Callable[[Network, Node, float], None]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged,
    "reduce_sum": _sum,
    "reduce_max": _largest,
    "reduce_min": _largest,
    "cumsum": _cumulative,
    "reduce_window_sum": _window_sum,
    "reduce_window_max": _window_max,
    "reduce_window_min": _window_max,
    "broadcast_in_dim": _broadcast,
    "gather": _gather,
}
assert _RULES.keys() >= PRODUCTS


# ----------------------------------------------------------------------------------------- joins


def _calibrated(net: Network, node: Node) -> None:
    """A function of one array that has a derivative of its own, measured on a sample."""
    found = sample_moments(net, node.edges[0].value, node)
    if found is None or not all(0 < x < math.inf for x in found):
        node.keep("kept: a custom derivative that is not calibrated")
        return
    node.rule = "calibrated"
    node.alpha, node.edges[0].ideal = (snapped(x**-0.5) for x in found)


def join(net: Network, order: Order, node: Node) -> bool:
    """Whether a node joins a value with a statistic of that value, as norms and softmax do.

    x - mean(x), x / norm(x), exp(x) / sum(exp(x)): what is inside stays as it is, for a scale
    inside would change the function and not only its size; the result is scaled by its RMS.
    """
    entry = order.entry[node]
    data = [edge for edge in node.edges if edge.value in net.by_data]
    if entry is None or len(data) < 2 or node.last.name not in ELEMENTWISE:
        return False
    inside = order.between(entry, node)
    names = set().union(*(names_of(m.operations) for m in inside))
    if names & PRODUCTS or not names & (REDUCTIONS | WINDOWS):
        return False
    for m in inside:
        if m.rule != INSIDE:
            _keep_data(net, m, INSIDE)
    start = _before_norms(order, node)
    own, rule = _join_factors(net, node, start, entry, inside)
    _keep_data(net, node, rule)
    node.alpha = own[0]
    for m in {*inside, node}:
        for edge in m.edges:
            made = net.maker.get(edge.value)
            if made is not None and made.last.name in REDUCTIONS:
                edge.ideal = math.inf  # a statistic of many numbers takes next to no gradient
            elif m is node and edge.value in net.by_data:
                edge.ideal = own[1]
    return True


def _before_norms(order: Order, node: Node) -> Node | Value | None:
    """The last value before a node that is about Gaussian: before the norms it is a part of."""
    at = order.entry[node]
    while isinstance(at, Node) and at.rule in _SHAPING and order.entry[at] is not None:
        at = order.entry[at]
    return at


INSIDE = "kept inside a norm or softmax"
_SHAPING = ("elementwise", "norm", "softmax", INSIDE)


def _keep_data(net: Network, node: Node, rule: str) -> None:
    """Leaves a node's data as they are; gains and biases among its operands stay free."""
    node.alpha, node.rule, node.fixed = 1.0, rule, 0.0
    for edge in node.edges:
        edge.fwd = 1.0
        edge.free = edge.value not in net.by_data
        if not edge.free:
            edge.ideal = 1.0


def _join_factors(
    net: Network,
    node: Node,
    start: Node | Value | None,
    entry: Node | Value,
    inside: set[Node],
) -> tuple[tuple[float, float], str]:
    """Factors of the result and of the value that is normalized, and the rule."""
    size = _softmax_size(node, {*inside, *([entry] if isinstance(entry, Node) else [])})
    if size is not None:
        of_softmax = exact_softmax(size, 1.0)
        ideal = of_softmax.bwd["x"]
        if isinstance(entry, Node) and entry.rule == "elementwise":
            # A factor of exp(x) cancels in exp(x) / sum(exp(x)), so it would be work for nothing.
            ideal /= entry.edges[0].ideal
            entry.alpha, entry.fixed, entry.rule = 1.0, 0.0, INSIDE
        return (of_softmax.fwd, ideal), "softmax"
    value = start.outputs[0] if isinstance(start, Node) else start
    found = None if value is None else sample_moments(net, value, node)
    if found is None:
        return (1.0, 1.0), "kept: a norm whose arrays are too large for a sample"
    if not all(0 < x < math.inf for x in found):
        return (1.0, 1.0), "kept: a norm without a finite scale"
    return (snapped(found[0] ** -0.5), snapped(found[1] ** -0.5)), "norm"


def _softmax_size(node: Node, inside: set[Node]) -> int | None:
    """Length of the axis of a softmax, exp(x) / sum(exp(x)); None for any other join."""
    sums = [m for m in inside if m.last.name == "reduce_sum"]
    exps = [m for m in inside if "exp" in names_of(m.operations)]
    if node.last.name != "div" or len(sums) != 1 or not exps:
        return None
    return _size(sums[0].edges[0].value) // max(_size(sums[0].outputs[0]), 1)
