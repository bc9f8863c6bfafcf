"""A function as one flat graph: calls inlined, loops and branches opened, values with their users.

    graph = flat(closed)        graph.operations, in order; value.maker, value.users

The walk goes forward and knows one body at a time. Some questions look at a whole function: which
values lie between two others, what every path to a value passes, where two paths part and meet
again. A loop's body stands here once. What joins it to the outside are operations of their own,
without an equation:

    row       one row of an array that a scan takes row by row
    carry     a loop's carry inside its body; `back` is what the body makes of it
    final     a loop's carry after its last turn
    stacked   the rows that a scan returns as one array
    branch    a result of a cond, whichever branch made it
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.trace.program import _compat
from unitscale_jax.trace.program._compat import ClosedJaxpr, Jaxpr, Literal
from unitscale_jax.trace.program._function import evaluated_now
from unitscale_jax.trace.program._primitives import ELEMENTWISE, IN_PLACE
from unitscale_jax.trace.program._walk import Site, bodies, is_call, listed

JOINTS = frozenset({"row", "carry", "final", "stacked", "branch"})
"""Operations that stand for no equation, but for the border of a loop or of a branch."""


@dataclass(eq=False, repr=False)  # it is among what it refers to
class Value:
    """A value of a flat program.

    Attributes:
        shape: Its shape.
        dtype: Its dtype; None of a token.
        maker: The operation that it is a result of; None for an input and for a constant.
        users: Operations that take it, and as which of their operands.
        constant: The one number that it holds everywhere, if that is known; else None.
        array: The array that the function closes over, if it is one whose numbers are known.
    """

    shape: tuple[int, ...]
    dtype: Any
    maker: "Operation | None" = None
    users: list[tuple["Operation", int]] = field(default_factory=list)
    constant: Any = None
    array: Any = None


@dataclass(eq=False, repr=False)  # it is among what it refers to
class Operation:
    """An equation of a flat program, or one of `JOINTS`.

    Attributes:
        name: Its primitive, or which joint it is.
        site: Where the equation stands; for a joint the loop or the cond.
        inputs: Its operands.
        outputs: Its results.
        loops: The scans around it, the innermost last.
        back: Of a `carry`, what the loop's body makes of it.
    """

    name: str
    site: Site
    inputs: list[Value]
    outputs: list[Value] = field(default_factory=list)
    loops: tuple[Site, ...] = ()
    back: Value | None = None

    @property
    def is_joint(self) -> bool:
        """Whether it stands for no equation."""
        return self.name in JOINTS


@dataclass(eq=False, repr=False)  # it is among what it refers to
class Graph:
    """A function as a list of operations; see the module.

    Attributes:
        inputs: Values of the function's inputs.
        operations: All operations, each after those that it depends on.
        outputs: Values of the function's results.
    """

    inputs: list[Value]
    operations: list[Operation]
    outputs: list[Value]


def flat(closed: ClosedJaxpr, leaves: Callable[[Site], bool] | None = None) -> Graph:
    """The flat graph of a function.

    Calls with a derivative of their own, `shard_map` and `while` are one operation each, and so is
    a call that `leaves` says so of.

    Example:
        >>> graph = flat(jax.make_jaxpr(lambda x: jax.jit(jnp.sin)(x) * x)(1.0))
        >>> [op.name for op in graph.operations], len(graph.inputs[0].users)
        (['sin', 'mul'], 2)
    """
    builder = _Builder(leaves)
    variables = closed.jaxpr.invars
    inputs = [Value(_compat.shape_of(v), _compat.dtype_of(v)) for v in variables]
    outputs = builder.body(closed.jaxpr, closed.consts, inputs, None, 0, ())
    return Graph(inputs, builder.operations, outputs)


class _Builder:
    def __init__(self, leaves: Callable[[Site], bool] | None) -> None:
        self.leaves = leaves
        self.operations: list[Operation] = []

    def body(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Any],
        args: Sequence[Value],
        parent: Site | None,
        number: int,
        loops: tuple[Site, ...],
    ) -> list[Value]:
        env: dict[Any, Value] = dict(zip(jaxpr.invars, args, strict=True))
        env |= {v: _constant(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}
        read = lambda v: _constant(v.val, v.aval) if isinstance(v, Literal) else env[v]
        for site in listed(jaxpr, parent, number):
            inputs = [read(v) for v in site.eqn.invars]
            env.update(zip(site.eqn.outvars, self.step(site, inputs, loops), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def step(self, site: Site, inputs: list[Value], loops: tuple[Site, ...]) -> list[Value]:
        if self._is_inlined(site):
            return self.enter(site, 0, inputs, loops)
        if site.name == "scan":
            return self.scan(site, inputs, loops)
        if site.name == "cond":
            return self.cond(site, inputs, loops)
        results = self.add(site.name, site, inputs, site.eqn.outvars, loops)
        if len(results) == 1 and results[0].dtype is not None:
            results[0].constant = _evaluated(site, inputs, results[0])
        return results

    def _is_inlined(self, site: Site) -> bool:
        own = site.name.startswith("custom_") or site.name == "shard_map"
        if not is_call(site.eqn) or own:
            return False
        return self.leaves is None or not self.leaves(site)

    def enter(
        self, site: Site, number: int, inputs: list[Value], loops: tuple[Site, ...]
    ) -> list[Value]:
        jaxpr, consts = bodies(site.eqn)[number]
        return self.body(jaxpr, consts, inputs, site, number, loops)

    def add(
        self,
        name: str,
        site: Site,
        inputs: list[Value],
        like: Iterable[Any],
        loops: tuple[Site, ...],
    ) -> list[Value]:
        op = Operation(name, site, inputs, loops=loops)
        for k, value in enumerate(inputs):
            value.users.append((op, k))
        op.outputs = [Value(_compat.shape_of(v), _compat.dtype_of(v), op) for v in like]
        self.operations.append(op)
        return op.outputs

    def scan(self, site: Site, inputs: list[Value], loops: tuple[Site, ...]) -> list[Value]:
        consts, carries = _compat.scan_counts(site.eqn)
        inside = (*loops, site)
        inner = bodies(site.eqn)[0][0].invars
        given = list(inputs[:consts])
        for k, value in enumerate(inputs[consts:], consts):
            kind = "carry" if k < consts + carries else "row"
            given += self.add(kind, site, [value], [inner[k]], inside)
        out = self.enter(site, 0, given, inside)
        for value, back in zip(given[consts : consts + carries], out, strict=False):
            assert value.maker is not None
            value.maker.back = back
        results: list[Value] = []
        for k, (value, like) in enumerate(zip(out, site.eqn.outvars, strict=True)):
            kind = "final" if k < carries else "stacked"
            results += self.add(kind, site, [value], [like], loops)
        return results

    def cond(self, site: Site, inputs: list[Value], loops: tuple[Site, ...]) -> list[Value]:
        numbers = range(len(site.eqn.params["branches"]))
        made = [self.enter(site, k, inputs[1:], loops) for k in numbers]
        pairs = zip(zip(*made, strict=True), site.eqn.outvars, strict=True)
        results: list[Value] = []
        for values, like in pairs:
            results += self.add("branch", site, list(values), [like], loops)
        return results


def _constant(value: Any, aval: Any = None) -> Value:
    """A literal, or an array that the function closes over; the number, where it is one number."""
    aval = jax.typeof(value) if aval is None else aval
    dtype = getattr(aval, "dtype", None)
    plain = dtype is not None and not jax.dtypes.issubdtype(dtype, jax.dtypes.extended)
    known = value if plain and _compat.is_concrete(value) else None
    number = np.asarray(value, dtype) if known is not None and not aval.shape else None
    return Value(tuple(aval.shape), dtype, constant=number, array=known)


def _evaluated(site: Site, inputs: Sequence[Value], result: Value) -> Any:
    """The one number that a result holds, of an equation on such; None if that is not known."""
    if not inputs or any(value.constant is None for value in inputs):
        return None
    moved = site.name in IN_PLACE - {"convert_element_type"}
    if site.name == "broadcast_in_dim" or (moved and len(inputs) == 1):
        return inputs[0].constant  # as it is, whatever mesh axes it varies over
    if result.shape or site.name not in ELEMENTWISE - IN_PLACE | {"convert_element_type"}:
        return None
    with evaluated_now():
        return np.asarray(site.bind([jnp.asarray(value.constant) for value in inputs])[0])
