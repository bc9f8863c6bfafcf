"""Proof that gradients are multiples of the true ones, and the factor of each, without running.

    unit_scale[fwd, bwd]:   c(operand) = c(result) bwd / fwd;      any other equation:  all equal

A gradient with backward factors of its own is c times the gradient of the same function without
them, if there is a c > 0 for each value such that both lines hold and c = 1 at the loss (by
induction in reverse order). The walk collects the lines in a union-find, and a line that
contradicts those before it names the equation.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.trace.program import (
    IN_PLACE,
    Graph,
    Operation,
    Value,
    flat,
    primitives_of,
    trace_call,
)
from unitscale_jax.trace.rewrite import scope_without_notes
from unitscale_jax.unit._losses import losses_of
from unitscale_jax.unit._nodes import SCALES, is_floating, needed, reached

_CLOSE = 1e-6
"""Logarithms that differ by less are the same: factors are rounded where they are data."""


def constants(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Any:
    """The constant of each gradient: what a loss's backward factors multiply the true gradient by.

    Args:
        fn: A loss as for `unit_scaled`, with factors of `us.fwd_bwd.scale` in it, put there by hand
            or by `unit_scaled`.
        params: Its parameters.
        *args: Its other arguments; only shapes and dtypes count.
        **kwargs: Its keywords.

    Returns:
        A tree of the structure of `params`: for each leaf one float, or, of a leaf that a loop over
        layers takes row by row, an array of one for each row; 0.0 for a leaf without a gradient.

    Raises:
        ValueError: The gradients are no multiples of the true ones; it names the equation where
            two ways disagree. Or a factor is data that is not known.

    Law: `grad(fn)(params)` is `constants(fn, params)` times the gradient of `fn` whose scales are
    `scale(x, fwd=f, bwd=f)`.

    Example:
        >>> tied = lambda w, x: us.unit.linear(x, w["w"]).sum()
        >>> constants(tied, {"w": jnp.ones((4, 1))}, jnp.ones((16, 4)))
        {'w': 0.5}
    """
    staged = trace_call(fn, params, *args, **kwargs)
    graph = flat(staged.closed)
    names = trees.names(params)
    of_leaf = {k: v for k, v in zip(staged.positions, graph.inputs, strict=True) if k < len(names)}
    proof = _Proof(graph, list(of_leaf.values()), [graph.outputs[k] for k in losses_of(staged)])
    found = [
        proof.constant(of_leaf[k], name) if k in of_leaf else 0.0 for k, name in enumerate(names)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), found)


class _Proof:
    """The constants of all values between parameters and losses, by union-find in logarithms."""

    def __init__(self, graph: Graph, leaves: Sequence[Value], sinks: Sequence[Value]) -> None:
        floating = {v for v in leaves if is_floating(v)}
        self.active = reached(graph.operations, floating) & needed(sinks)
        self.above: dict[Value, tuple[Value, Any]] = {}  # log c(value) - log c(above)
        self.rows: set[Value] = set()  # parameters that a loop takes row by row
        self.sink = Value((), None)
        for op in graph.operations:
            if any(v in self.active for v in op.outputs):
                self.step(op)
        for value in sinks:
            if value in self.active:
                self.tie(value, self.sink, 0.0, "the loss")

    def step(self, op: Operation) -> None:
        """Says what an operation says of the constants of its operands and results."""
        at = f"{op.name} in {scope_without_notes(op.site) or 'the function'}"
        results = [v for v in op.outputs if v in self.active]
        operands = [v for v in op.inputs if v in self.active]
        if op.name == "straight_through":
            operands = [v for v in op.inputs[1:] if v in self.active]
        if op.name in SCALES:
            self.scaled(op, at)
            return
        if op.name == "row":
            self.rows |= {v for v in map(_stored, operands) if v in self.active}
        elif not op.is_joint and SCALES & primitives_of(op.site.eqn.params):
            raise ValueError(
                f"at {at} there are scales that the proof cannot enter: of a custom derivative, a "
                "while loop or a shard_map it knows no equations. Put unit scaling around it."
            )
        more = [op.back] if op.back is not None and op.back in self.active else []
        for value in [*operands, *results[1:], *more]:
            self.tie(value, results[0], 0.0, at)

    def scaled(self, op: Operation, at: str) -> None:
        """c(operand) = c(result) bwd / fwd."""
        params = op.site.eqn.params
        if op.name == "unit_scale":
            fwd, bwd = np.float64(params["fwd"]), np.float64(params["bwd"])
        else:
            fwd, bwd = (_numbers(v, at) for v in op.inputs[1:])
        if not (np.all(fwd > 0) and np.all(bwd > 0)):
            raise ValueError(f"at {at} the factors {fwd} and {bwd} are not both positive.")
        self.tie(op.inputs[0], op.outputs[0], np.log(bwd) - np.log(fwd), at)

    def find(self, value: Value) -> tuple[Value, Any]:
        """The representative of a value and log c(value) - log c(representative)."""
        path: list[tuple[Value, Any]] = []
        while value in self.above:
            path.append((value, self.above[value]))
            value = self.above[value][0]
        total: Any = 0.0
        for node, (_, ratio) in reversed(path):
            total = total + ratio
            self.above[node] = value, total
        return value, total

    def tie(self, a: Value, b: Value, ratio: Any, at: str) -> None:
        """Says log c(a) - log c(b).

        Raises:
            ValueError: Another ratio follows from what was said before.
        """
        (root_a, of_a), (root_b, of_b) = self.find(a), self.find(b)
        if root_a is not root_b:
            self.above[root_a] = root_b, ratio + of_b - of_a
        elif not np.allclose(of_a - of_b, ratio, rtol=0, atol=_CLOSE):
            off = math.exp(float(np.max(np.abs(np.asarray(of_a - of_b - ratio)))))
            raise ValueError(
                f"gradients are no multiples of the true ones: at {at} two ways to the loss differ "
                f"by a factor of {off:.6g}. Where paths meet, backward factors must be those of "
                "the forward pass: use constraint='to_output_scale' there."
            )

    def constant(self, leaf: Value, name: str) -> Any:
        """The constant of a parameter; 0.0 if no gradient reaches it."""
        if leaf not in self.active:
            return 0.0
        (root, own), (top, of_sink) = self.find(leaf), self.find(self.sink)
        if root is not top:
            return 0.0
        logs = np.asarray(own - of_sink)
        if np.ptp(logs) < _CLOSE:
            return math.exp(float(logs.flat[0]))
        if leaf not in self.rows:
            raise ValueError(
                f"the constant of {name!r} differs from turn to turn of a loop, and the loop takes "
                "the whole of it in each turn, so its gradient is no multiple of the true one. "
                "Take it row by row."
            )
        return np.exp(logs)


def _stored(value: Value) -> Value:
    """The value whose rows are those of another one, which was only cast or placed."""
    while value.maker is not None and value.maker.name in IN_PLACE - SCALES:
        value = value.maker.inputs[0]
    return value


def _numbers(value: Value, at: str) -> Any:
    """The numbers of a factor that is data, one or one for each turn of the loop around.

    Raises:
        ValueError: They are not known when the function is traced.
    """
    if value.constant is not None:
        return np.float64(value.constant)
    maker = value.maker
    if maker is not None and maker.name == "row":
        rows = _known(maker.inputs[0])
        if rows is not None and maker.site.eqn.params["reverse"]:
            rows = rows[::-1]
    elif maker is not None and maker.name in _ARITHMETIC:
        return _ARITHMETIC[maker.name](*(_numbers(v, at) for v in maker.inputs))
    else:
        rows = _known(value)
    if rows is None:
        raise ValueError(
            f"at {at} a factor is data that is not known when the function is traced, so nothing "
            "can be proved of it. Close over its numbers."
        )
    return rows


def _known(value: Value) -> Any:
    value = _stored(value)
    return None if value.array is None else np.asarray(value.array, np.float64)


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "mul": np.multiply,
    "div": np.divide,
    "convert_element_type": np.positive,
    "copy": np.positive,
}
