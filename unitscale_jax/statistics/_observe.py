"""Observers of the operands that meet parameters, in one call or over batches.

An `Observer` says what to measure of an operand; here is where it looks, and how numbers of several
products, loops and batches become one.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.formats import round_to_dtype
from unitscale_jax.statistics._measure import (
    CHANNELS,
    Measure,
    Numbers,
    Operand,
    host,
    joined_turns,
)
from unitscale_jax.statistics._stat import Stat
from unitscale_jax.trace.params import (
    MatrixForm,
    Meeting,
    above,
    channel_rows,
    count_rows,
    input_rows,
    valid_rows,
)
from unitscale_jax.trace.program import Place, Site, is_array
from unitscale_jax.trace.rewrite import captured


@dataclass(frozen=True, eq=False, kw_only=True)
class Observer:
    """Accumulates the statistics of what meets one parameter.

    Attributes:
        name: Of the parameter.
        layout: Which axes of it the numbers are about.
        met: The products that it meets.
        spec: How the operand is quantized; None: it has no range.
        kinds: Which of `CHANNELS` are measured.
        mask: Which rows count, (batch,) or (batch, time); None: all.
        found: Numbers of the range by a first pass, which the second refines.
    """

    name: str
    layout: MatrixForm
    met: Sequence[Meeting]
    spec: Operand | None
    kinds: frozenset[str]
    mask: Any = None
    found: Numbers = None

    def measure(self, meeting: Meeting, x: jax.Array) -> Stat:
        """Measures all numbers of one product, whose other operand is `x`."""
        v = round_to_dtype(jax.lax.stop_gradient(x))
        keep = valid_rows(self.name, meeting, v, self.mask)
        seen = v if keep is None else jnp.where(keep, v, np.float32(0))
        axes = tuple(range(v.ndim))
        numbers: dict[str, Numbers] = {}
        if self.found is not None:
            numbers["refined"] = self._refined(axes, v, keep)
        elif self.spec is not None:
            numbers["range"] = _measured(self.spec.measure(axes), v, keep)
        for kind in sorted(self.kinds):
            rows = channel_rows if kind == "channels" else input_rows
            numbers[kind] = CHANNELS[kind].measure(rows(self.name, self.layout, meeting, seen))
        rows = count_rows(meeting, v, self.mask)
        return Stat(rows, numbers, self.spec, self.layout)

    def _refined(self, axes: tuple[int, ...], v: jax.Array, keep: Any) -> Numbers:
        """(layers, ..): numbers by the first pass of each layer.

        The body of a loop does not know which layer it is, so n stacked layers are measured n times
        each, and `_own` picks.
        """

        def one(found: Numbers) -> Numbers:
            assert self.spec is not None
            measure = self.spec.refine(axes, found)
            assert measure is not None, f"{self.spec} needs no second pass"
            return _measured(measure, v, keep)

        def flat(x: Any) -> jax.Array:
            return jnp.asarray(x).reshape(-1, *np.shape(x)[self.layout.layers :])

        return jax.lax.map(one, jax.tree.map(flat, self.found))

    def folded(self, meeting: Meeting, stat: Stat) -> Stat:
        """Joins the captured numbers of a product over the loops around it that are no layers.

        Captures have an axis for each loop around the product, layers first. Numbers of input
        channels are summed along the others; ranges are joined turn by turn, as a measure says.
        """
        layers = self.layout.layers
        turns = tuple(range(layers, len(meeting.stacks)))
        inputs = {k: joined_turns(k, x, turns) for k, x in stat.numbers.items() if k in CHANNELS}
        ranges = {k: x for k, x in stat.numbers.items() if k not in CHANNELS}
        if self.found is not None:  # each layer has measured by the first passes of all
            ranges = jax.tree.map(lambda x: _own(x, layers, len(turns)), ranges)
            ranges["range"] = jax.tree.map(lambda x: _repeated(x, stat.rows, layers), self.found)
        whole = _joined_turns(replace(stat, numbers=ranges), turns)
        return replace(whole, numbers={**whole.numbers, **inputs})


def _joined_turns(stat: Stat, turns: Sequence[int]) -> Stat:
    """The numbers of all turns of loops, which are neighbouring axes, as one."""
    if not turns:
        return stat
    first, after = turns[0], turns[-1] + 1

    def in_turn(x: jax.Array) -> jax.Array:
        """All turns as one axis, the first."""
        return jnp.moveaxis(x.reshape(*x.shape[:first], -1, *x.shape[after:]), first, 0)

    rows = jax.tree.map(in_turn, stat)
    begin, rest = (jax.tree.map(lambda x, k=k: x[k], rows) for k in (0, slice(1, None)))
    return jax.lax.scan(lambda a, b: (a.joined(b), None), begin, rest)[0]


def _repeated(x: Any, rows: jax.Array, layers: int) -> jax.Array:
    """Numbers of layers, the same in each turn of the loops that `rows` has axes of."""
    x = jnp.asarray(x)
    spread = x.reshape(*x.shape[:layers], *[1] * (rows.ndim - layers), *x.shape[layers:])
    return jnp.broadcast_to(spread, (*rows.shape, *x.shape[layers:]))


def _measured(measure: Measure, v: jax.Array, keep: Any) -> Numbers:
    if keep is None:
        return measure.measure(v)
    try:
        inspect.signature(measure.measure).bind(v, keep)
    except TypeError:
        raise ValueError(
            "a calibrator's measure takes an array alone, so padding would count in it. Give "
            "it a second parameter `where`, true where an element counts, or leave out `valid`."
        ) from None
    return measure.measure(v, keep)


def _own(x: jax.Array, layers: int, turns: int) -> jax.Array:
    """(layers.., turns.., n, ..) to (layers.., turns.., ..): of n layers each its own numbers."""
    lead = x.shape[:layers]
    n = int(np.prod(lead, dtype=int))
    flat = jnp.moveaxis(x.reshape(n, *x.shape[layers:]), 1 + turns, 1)
    return flat[jnp.arange(n), jnp.arange(n)].reshape(*lead, *flat.shape[2:])


def observe(
    fn: Callable[..., Any], observers: Mapping[str, Observer], /, *args: Any, **kwargs: Any
) -> tuple[Any, dict[str, Stat]]:
    """Evaluates a call, and measures what meets some of its parameters.

    Args:
        fn: A function whose first argument is the parameters.
        observers: Parameter -> its observer, with the products it meets in this call.
        *args: Of `fn`.
        **kwargs: Of `fn`.

    Returns:
        The result of `fn`, by the same equations, and what was measured by parameter.

    Raises:
        ValueError: A product stands where nothing can be observed.
    """
    at: dict[Place, list[tuple[Observer, Meeting]]] = {}
    for observer in observers.values():
        for meeting in observer.met:
            at.setdefault(meeting.site.place, []).append((observer, meeting))

    def pick(site: Site, operands: list[Any], results: list[Any]) -> Any:
        del results
        found = at.get(site.place)
        return found and [o.measure(m, operands[1 - m.side]) for o, m in found]

    y, captures = captured(fn, pick, derived=True)(*args, **kwargs)
    out: dict[str, Stat] = {}
    for capture in captures:
        pairs = zip(at.pop(capture.place), capture.value, strict=True)
        for (observer, meeting), value in pairs:
            new, known = observer.folded(meeting, value), out.get(observer.name)
            out[observer.name] = new if known is None else known.joined(new)
    if at:
        raise ValueError(_unobserved([pair for pairs in at.values() for pair in pairs]))
    return y, {name: out[name] for name in observers}


def _unobserved(pairs: Sequence[tuple[Observer, Meeting]]) -> str:
    missed = []
    for observer, meeting in pairs:
        closed = [it.name for it in above(meeting.site) if it.name in ("while", "shard_map")]
        where = f" inside of {closed[0]}" if closed else ""
        missed.append(f"{observer.name} meets a {meeting.site.name}{where}")
    return (
        f"{'; '.join(missed)}: nothing can be observed there. Calibrate a function without it (a "
        "scan for a while loop, one shard), or leave these parameters out."
    )


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(np.add, a, b)


def over_batches(
    measured: Callable[..., tuple[Any, Any]],
    params: Any,
    batches: Iterable[Any],
    shared: Mapping[str, Any] | None = None,
    merge: Callable[[Any, Any], Any] = _add,
) -> Any:
    """Numbers of all batches, merged on the host.

    Args:
        measured: `measured(params, *inputs, **kwargs)` returns a result and a pytree of numbers; it
            is jitted, and traced anew for other inputs that are no arrays.
        params: Arrays.
        batches: Each a tuple of the inputs; or a pair of a tuple and a dict, of inputs by position
            and by keyword; or the only input.
        shared: Keywords of all batches.
        merge: Numbers of the batches so far and those of the next as one.

    Raises:
        ValueError: There are no batches.
    """

    def numbers(call: _Call, params: Any, arrays: Sequence[Any]) -> Any:
        args, kwargs = call.inputs(arrays)
        return measured(params, *args, **kwargs)[1]

    step = jax.jit(numbers, static_argnums=0)
    total = None
    for batch in batches:
        args, kwargs = inputs_of(batch)
        call, arrays = _split((args, {**(shared or {}), **kwargs}))
        new = host(step(call, params, arrays))
        total = new if total is None else merge(total, new)
    if total is None:
        raise ValueError(
            "there are no batches to calibrate on; an iterator that was used before is empty."
        )
    return total


def inputs_of(batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The inputs of a batch, by position and by keyword.

    Example:
        >>> inputs_of((1, 2)), inputs_of(((1,), {"train": True})), inputs_of(3)
        (((1, 2), {}), ((1,), {'train': True}), ((3,), {}))
    """
    pair = isinstance(batch, tuple) and len(batch) == 2
    if pair and isinstance(batch[0], tuple) and isinstance(batch[1], dict):
        return batch
    return (batch if isinstance(batch, tuple) else (batch,)), {}


@dataclass(frozen=True)
class _Call:
    """The inputs of a call that are no arrays: static, as they would be without `jit`."""

    structure: Any
    fixed: tuple[Any, ...]

    def inputs(self, arrays: Sequence[Any]) -> Any:
        """The inputs, with arrays in the places that have no fixed value."""
        rest = iter(arrays)
        return self.structure.unflatten(x[0] if x else next(rest) for x in self.fixed)


def _split(inputs: Any) -> tuple[_Call, list[Any]]:
    leaves, structure = jax.tree.flatten(inputs)
    fixed = tuple(() if is_array(x) else (x,) for x in leaves)
    return _Call(structure, fixed), [x for x in leaves if is_array(x)]
