"""Scale statistics: how large every value and every gradient of a function is.

    y = mark[at=k back=False] f(x)    in the function, and in the equations of its gradient also
    ȳ = mark[at=k back=True] ȳ        where the whole cotangent of y has been summed up

One mechanism serves both passes: an identity behind each float value whose transpose is itself, so
that differentiation puts the second mark where the gradient is. There are no extra operands, no
zeros that are added and no custom derivatives; loops and `jax.checkpoint` carry marks as they carry
any equation.
"""

import functools
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax import tree as trees
from unitscale_jax.formats import Format, FormatLike, format_of
from unitscale_jax.fwd_bwd import mark
from unitscale_jax.loss import around, objective
from unitscale_jax.trace.params import ACTIVATION, Origin, input_origins, provenance
from unitscale_jax.trace.program import (
    Place,
    Site,
    TracedCall,
    as_arrays,
    bodies,
    function_name,
    is_call,
    trace_call,
)
from unitscale_jax.trace.rewrite import (
    Capture,
    Rewriter,
    captured,
    picked_inside,
    scope_without_notes,
)
from unitscale_jax.typing import Params
from unitscale_jax.unit._scales import Mark, Scales, Value, measured

__all__ = ["tracked"]


def tracked(
    fn: Callable[..., Any], *, format: FormatLike = "e4m3fn"
) -> Callable[..., tuple[Any, Scales]]:
    """Evaluates a loss and its gradient, and measures every float value on the way.

    Args:
        fn: `fn(params, *args)`, any function of parameters that returns what a loss does: a scalar,
            a `Mean` or a dict of those; or a pair of that and anything else.
        format: The number format whose underflow and saturation are counted, a `Format`, its name
            or its dtype.

    Returns:
        A function of the arguments of `fn` that returns its result, and `Scales`. The gradient is
        that of `sum_t coef_t * total_t / weight_t` with respect to the floating parameters.

    Raises:
        ValueError: On a call: the result is no loss, no parameter is floating point, or the format
            is not known.

    Every float value has a row: arguments, and the results of all equations, inside of `jit`,
    scans, branches and `jax.checkpoint` too. A value has a second row, of its gradient, if the loss
    depends on it and it depends on a floating parameter. While loops, `shard_map`, functions with
    custom derivatives, kernels and solvers are not entered: their results have rows, what is inside
    has none, and the report says so.

    Law: the marks change neither value nor gradient in any bit of any equation, and a gradient's
    row is that with respect to a zero which is added to the value. The result is that of `fn`
    itself, whose derivatives are those of `fn`. Call `tracked(fn)` under `jit`, `vmap` or `grad` as
    you would call `fn`; the rows are read outside. (Under `jit` measuring may change what XLA fuses
    with what, and thereby last bits.)

    Example:
        >>> loss = lambda p, x: jnp.mean((x @ p["w"]) ** 2)
        >>> params, x = {"w": jnp.full((2, 2), 0.5)}, jnp.array([[2.0, 4.0]])
        >>> value, scales = jax.jit(us.unit.tracked(loss))(params, x)
        >>> bool(value == loss(params, x))
        True
        >>> [(row.direction, row.rms) for row in scales.rows if row.primitive == "dot_general"]
        [('forward', 3.0), ('backward', 3.0)]
    """
    spec = format_of(format)

    @around(fn, "tracked", marks=False)
    def tracked_fn(params: Params, /, *args: Any, **kwargs: Any) -> tuple[Any, Scales]:
        result, arrays = fn(params, *args, **kwargs), as_arrays(params)
        staged = trace_call(fn, arrays, *args, **kwargs)
        marker = _Marker(staged, arrays)
        trained = marker.trained

        def loss(arrays: Sequence[jax.Array]) -> jax.Array:
            return objective(marker.evaluate(dict(zip(trained, arrays, strict=True))))

        see = lambda site, _, results: _seen(site, results[0], spec) if results else None
        _, captures = captured(jax.grad(loss), see)([staged.operands[k] for k in trained])
        marks, numbers = _gathered(captures, marker.values)
        closed = tuple(sorted(Counter(marker.closed.values()).items()))
        return result, Scales(numbers, marks, spec, closed)

    return tracked_fn


class _Marker(Rewriter):
    """Replays a call with a mark behind every float value.

    Attributes:
        values: What is marked, in program order; the number of a mark is its position.
        trained: Positions of the operands that are floating parameters.
        closed: Names of what was not entered, by place.
    """

    def __init__(self, staged: TracedCall, params: Params) -> None:
        super().__init__({}, lambda site, operands: site.bind(operands))
        self.staged, self.inputs = staged, input_origins(staged, params)
        self.origins = provenance(staged.closed.jaxpr, self.inputs)
        self.values: list[Value] = []
        self.closed: dict[Place, str] = {}
        self._numbers: dict[Hashable, int] = {}  # a body may be replayed more than once
        pairs = zip(self.inputs, staged.operands, strict=True)
        self.trained = [
            k for k, (o, x) in enumerate(pairs) if o != ACTIVATION and trees.is_floating(x)
        ]
        if not self.trained:
            raise ValueError(
                "no parameter is floating point, so there is no gradient to track. The parameters "
                "are the first argument of the function."
            )

    def evaluate(self, trained: dict[int, jax.Array]) -> Any:
        """The result of the call, some of whose operands are replaced."""
        operands = [
            self.marked(("operand", k), trained.get(k, x), _of_argument(origin))
            for k, (x, origin) in enumerate(zip(self.staged.operands, self.inputs, strict=True))
        ]
        closed = self.staged.closed
        return self.staged.finish(self(closed.jaxpr, closed.consts, operands))

    def step(self, site: Site, operands: list[Any]) -> Sequence[Any]:
        """Marks the results of an equation, or enters it."""
        if site.name == "mark":  # of another analysis, whose numbers would be taken for ours
            return operands
        if picked_inside(site):
            return super().step(site, operands)
        results, said = site.bind(operands), self._of_equation(site)
        if (bodies(site.eqn) or site.is_opaque) and any(map(trees.is_floating, results)):
            self.closed[site.place] = site.name
        return [self.marked((site.place, k), x, said) for k, x in enumerate(results)]

    def marked(self, key: Hashable, x: Any, said: dict[str, str]) -> Any:
        """`x` behind its mark; as it is if it is not floating point."""
        if not trees.is_floating(x):
            return x
        if key not in self._numbers:
            self._numbers[key] = order = len(self.values)
            self.values.append(Value(order, **said, shape=jnp.shape(x), dtype=str(x.dtype)))
        return mark(x, at=self._numbers[key])

    def _of_equation(self, site: Site) -> dict[str, str]:
        names = [name for origin in self.origins[site.place] for name in origin.names]
        called = f"[{function_name(site.eqn)}]" if is_call(site.eqn) else ""
        return {
            "scope": scope_without_notes(site),
            "primitive": site.name + called,
            "parameter": ", ".join(dict.fromkeys(names)),
        }


def _of_argument(origin: Origin) -> dict[str, str]:
    kind = "input" if origin == ACTIVATION else "parameter"
    return {"scope": "", "primitive": kind, "parameter": ", ".join(origin.names)}


def _seen(site: Site, result: Any, spec: Format) -> Any:
    """What is captured at a mark: which mark, and its numbers. At anything else nothing."""
    if site.name != "mark":
        return None
    return _Seen(measured(result, spec), site.eqn.params["at"], site.eqn.params["back"])


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["numbers"], meta_fields=["at", "back"]
)
@dataclass(frozen=True)
class _Seen:
    """Numbers at a mark."""

    numbers: jax.Array
    at: int
    back: bool


def _gathered(
    captures: Sequence[Capture], values: Sequence[Value]
) -> tuple[tuple[Mark, ...], tuple[jax.Array, ...]]:
    """Each mark once, and its numbers; a body that is recomputed shows the same ones again."""
    found: dict[Mark, jax.Array] = {}
    seen: set[tuple[int, bool]] = set()
    for capture in captures:
        at, back = capture.value.at, capture.value.back
        if (at, back) not in seen:
            seen.add((at, back))
            ran = capture.ran[..., None].astype(capture.value.numbers.dtype)
            numbers = jnp.concatenate([capture.value.numbers, ran], axis=-1)
            found[Mark(values[at], back, capture.loops)] = numbers
    return tuple(found), tuple(found.values())
