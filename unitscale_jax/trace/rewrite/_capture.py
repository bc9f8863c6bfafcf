"""Values from inside a function, brought out as results, without editing it.

    captured(fn, pick) -> fn returning (result, captures)

What calibration, pruning scores and the distillation of features need: numbers about what flows
through a function, as a pure function of its arguments. Bodies of loops and branches return what
was picked beside their own results, so no tracer leaks and everything compiles.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from unitscale_jax.errors import check_callable
from unitscale_jax.trace.program import _compat
from unitscale_jax.trace.program._function import trace_call
from unitscale_jax.trace.program._walk import Place, Site, bodies
from unitscale_jax.trace.rewrite._rewrite import Rewriter

Pick: TypeAlias = Callable[[Site, list[Any], list[Any]], Any]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["value", "ran"], meta_fields=["place", "loops"]
)
@dataclass(frozen=True)
class Capture:
    """A value that was picked at one equation.

    Attributes:
        value: The picked pytree; in a scan each array has a leading axis, of nested scans the outer
            one first, whose index is that of the scan's rows.
        ran: Whether it was evaluated, with the same leading axes; False for the branch of a cond
            that was not taken, whose value is zeros.
        place: Where the equation stands; see `Site.place`.
        loops: Lengths of the scans around it, the outer one first.
    """

    value: Any
    ran: jax.Array
    place: Place
    loops: tuple[int, ...] = ()


def captured(
    fn: Callable[..., Any], pick: Pick, *, derived: bool = False
) -> Callable[..., tuple[Any, list[Capture]]]:
    """Evaluates `fn`, and brings out what `pick` takes on the way.

    Args:
        fn: Any function of pytrees.
        pick: `pick(site, operands, results)` is called for every equation without a body, while the
            function is traced, and returns a pytree of arrays or None.
        derived: Whether to pick inside of functions with custom derivatives too. The derivative is
            the user's, which knows nothing of captures, so these have none; they are evaluated
            beside the call, and compilers find the common part.

    Returns:
        A function of the arguments of `fn` that returns its result, by the same equations, and a
        list of `Capture`s in order of evaluation; a pytree, so it may be jitted.

    Nothing is picked inside of while loops, `shard_map` and kernels, and by default of functions
    with custom derivatives, which are evaluated as they stand: compare `place` with the places that
    are wanted. Derivatives of the result are those of `fn`.

    Example:
        >>> fn = lambda xs: jax.lax.scan(lambda c, x: (c + x, jnp.sin(c)), 0.0, xs)[0]
        >>> largest = lambda site, operands, _: operands[0] if site.name == "sin" else None
        >>> total, captures = captured(fn, largest)(jnp.array([1.0, 2.0, 3.0]))
        >>> float(total), captures[0].value.tolist(), captures[0].loops
        (6.0, [0.0, 1.0, 3.0], (3,))
    """
    check_callable("the function", fn)

    @functools.wraps(fn)
    def captured_fn(*args: Any, **kwargs: Any) -> tuple[Any, list[Capture]]:
        staged = trace_call(fn, *args, **kwargs)
        recorder = _Recorder(pick, derived)
        results = recorder(staged.closed.jaxpr, staged.closed.consts, staged.operands)
        return staged.finish(results), recorder.tape

    return captured_fn


_NEVER_ENTERED = frozenset({"while", "shard_map"})


def picked_inside(site: Site) -> bool:
    """Whether `captured` picks inside of an equation, as it does by default: of calls and loops."""
    closed = site.name in _NEVER_ENTERED or site.name.startswith("custom_")
    return bool(bodies(site.eqn)) and not closed


class _Recorder(Rewriter):
    """Replays a program as it stands, and keeps what is picked on a tape."""

    def __init__(self, pick: Pick, derived: bool) -> None:
        super().__init__({}, self.evaluate)
        self.pick, self.beside = pick, derived
        self.tape: list[Capture] = []

    def touches(self, site: Site, operands: list[Any]) -> bool:
        del operands
        beside = self.beside and site.name in _STRUCTURES
        return beside if site.name.startswith("custom_") else site.name not in _NEVER_ENTERED

    def evaluate(self, site: Site, operands: list[Any]) -> list[Any]:
        """An equation without a body, and what is picked there."""
        out = site.bind(operands)
        value = self.pick(site, operands, out)
        if value is not None:
            self.tape.append(Capture(value, jnp.array(True), site.place))
        return out

    def step(self, site: Site, operands: list[Any]) -> Sequence[Any]:
        enter = _STRUCTURES.get(site.name)
        if enter is None or not self.touches(site, operands):
            return super().step(site, operands)
        return enter(self, site, operands)

    def apart(self, site: Site, number: int, operands: Sequence[Any]) -> tuple[list[Any], Any]:
        """A body's results, and a tape of its own."""
        outside, self.tape = self.tape, []
        try:
            return self.enter(site, number, operands), self.tape
        finally:
            self.tape = outside


def _inlined(recorder: _Recorder, site: Site, operands: list[Any]) -> list[Any]:
    return recorder.enter(site, 0, operands)


def _beside(recorder: _Recorder, site: Site, operands: list[Any]) -> Sequence[Any]:
    recorder.enter(site, 0, list(map(jax.lax.stop_gradient, operands)))
    return site.bind(operands)


def _rematerialized(recorder: _Recorder, site: Site, operands: list[Any]) -> list[Any]:
    out, tape = _compat.restage(site.eqn, lambda *xs: recorder.apart(site, 0, xs), operands)
    recorder.tape += tape
    return out


def _scanned(recorder: _Recorder, site: Site, operands: list[Any]) -> list[Any]:
    consts, carries = _compat.scan_counts(site.eqn)
    before, init = operands[:consts], operands[consts : consts + carries]

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], Any]:
        out, tape = recorder.apart(site, 0, [*before, *carry, *x])
        return out[:carries], (out[carries:], tape)

    options = _compat.scan_options(site.eqn)
    carry, (ys, tape) = jax.lax.scan(body, init, operands[consts + carries :], **options)
    recorder.tape += [replace(c, loops=(options["length"], *c.loops)) for c in tape]
    return [*carry, *ys]


def _branched(recorder: _Recorder, site: Site, operands: list[Any]) -> list[Any]:
    """A branch returns the tapes of all branches: its own, and those of others empty.

    Branches return values of one type, so a tape of zeros, whose captures are not `taken`, stands
    for what another branch would have recorded.
    """
    index, *rest = operands
    numbers = range(len(site.eqn.params["branches"]))

    def run(k: int) -> Callable[..., tuple[list[Any], Any]]:
        return lambda *xs: recorder.apart(site, k, xs)

    tapes = [jax.eval_shape(run(k), *rest)[1] for k in numbers]

    def branch(k: int) -> Callable[..., Any]:
        def taken(*xs: Any) -> tuple[list[Any], Any]:
            out, tape = run(k)(*xs)
            return out, [tape if j == k else jax.tree.map(_zeros, tapes[j]) for j in numbers]

        return taken

    out, taken = _compat.recond(site.eqn, [branch(k) for k in numbers], index, rest)
    recorder.tape += [capture for tape in taken for capture in tape]
    return out


def _zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype)


_STRUCTURES: dict[str, Callable[[_Recorder, Site, list[Any]], Sequence[Any]]] = {
    **dict.fromkeys(_compat.JITS | {"closed_call", "core_call"}, _inlined),
    **dict.fromkeys(_compat.REMATS, _rematerialized),
    "scan": _scanned,
    "cond": _branched,
    "custom_jvp_call": _beside,
    "custom_vjp_call": _beside,
}
