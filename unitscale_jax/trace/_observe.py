"""Numbers about what meets parameters, per layer, that add up over products and batches.

An `Observer` says what to measure of an operand; here is where it looks, and how numbers of several
products, loops and batches become one.
"""

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.trace._capture import captured
from unitscale_jax.trace._layouts import Layout
from unitscale_jax.trace._meetings import Meeting, above
from unitscale_jax.trace._walk import Place, Site


class Joins(Protocol):
    """Numbers of one parameter, of which two are one."""

    def joined(self, other: Any) -> Any:
        """Both together as parts of one batch."""


T = TypeVar("T", bound=Joins)


@dataclass(frozen=True, eq=False, kw_only=True)
class Observer(abc.ABC, Generic[T]):
    """Measures what meets one parameter.

    Attributes:
        name: Of the parameter.
        layout: Which axes of it the numbers are about.
        mask: Which rows count, (batch,) or (batch, time); None: all.
        reductions: How numbers of the turns of a loop that is no stack of layers become one; those
            not named are added.
    """

    name: str
    layout: Layout
    mask: Any = None

    reductions: ClassVar[Mapping[str, Any]] = {}

    @abc.abstractmethod
    def measure(self, meeting: Meeting, x: jax.Array) -> dict[str, Any]:
        """Numbers of one product, `x` the other operand."""

    @abc.abstractmethod
    def made(self, value: dict[str, Any]) -> T:
        """The numbers, with leading axes only for stacked layers, as the user gets them."""

    def folded(self, meeting: Meeting, value: dict[str, Any]) -> T:
        """What was captured of a product, over the loops around it that are no layers."""
        gone = tuple(range(self.layout.layers, len(meeting.stacks)))
        if gone:
            by = lambda k: self.reductions.get(k, jnp.sum)
            value = {k: by(k)(x, axis=gone) for k, x in value.items()}
        return self.made(value)


Observers = Mapping[str, tuple[Observer[T], Sequence[Meeting]]]


def observe(
    fn: Callable[..., Any], observers: Observers[T], *args: Any, **kwargs: Any
) -> tuple[Any, dict[str, T]]:
    """Evaluates a call, and measures what meets some of its parameters.

    Args:
        fn: A function whose first argument is the parameters.
        observers: Parameter -> its observer, and the products it meets in this call; see
            `meetings`.
        *args: Of `fn`.
        **kwargs: Of `fn`.

    Returns:
        The result of `fn`, by the same equations, and what was measured by parameter.

    Raises:
        ValueError: A product stands where nothing can be observed.
    """
    at: dict[Place, list[tuple[Observer[T], Meeting]]] = {}
    for observer, met in observers.values():
        for meeting in met:
            at.setdefault(meeting.site.place, []).append((observer, meeting))

    def pick(site: Site, operands: list[Any], results: list[Any]) -> Any:
        del results
        found = at.get(site.place)
        return found and [o.measure(m, operands[1 - m.side]) for o, m in found]

    y, captures = captured(fn, pick)(*args, **kwargs)
    out: dict[str, T] = {}
    for capture in captures:
        pairs = zip(at.pop(capture.place), capture.value, strict=True)
        for (observer, meeting), value in pairs:
            new, known = observer.folded(meeting, value), out.get(observer.name)
            out[observer.name] = new if known is None else known.joined(new)
    if at:
        raise ValueError(_unobserved([pair for pairs in at.values() for pair in pairs]))
    return y, {name: out[name] for name in observers}


def _unobserved(pairs: Sequence[tuple[Observer[Any], Meeting]]) -> str:
    missed = []
    for observer, meeting in pairs:
        closed = [it.name for it in above(meeting.site) if it.name in ("while", "shard_map")]
        where = f" inside of {closed[0]}" if closed else ""
        missed.append(f"{observer.name} meets a {meeting.site.name}{where}")
    return (
        f"{'; '.join(missed)}: nothing can be observed there. Calibrate a function without it (a "
        "scan for a while loop, one shard), or leave these parameters out."
    )


def over_batches(
    measured: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    on_host: Callable[[Any], Any],
    merge: Callable[[Any, Any], Any],
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Numbers of all batches.

    Args:
        measured: `measured(params, *inputs)` returns a result and a dict of numbers; it is jitted.
        params: Arrays.
        batches: Each a tuple of the inputs, or the only input.
        on_host: What becomes of one parameter's numbers before they are merged.
        merge: Numbers of the batches so far and those of the next as one.

    Returns:
        Parameter -> numbers; shapes and dtypes of the last batch's inputs.

    Raises:
        ValueError: There are no batches.
    """
    step = jax.jit(lambda params, *inputs: measured(params, *inputs)[1])
    total: dict[str, Any] | None = None
    inputs: tuple[Any, ...] = ()
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        now: dict[str, Any] = step(params, *inputs)
        new = {name: on_host(x) for name, x in now.items()}
        total = new if total is None else {k: merge(x, new[k]) for k, x in total.items()}
    if total is None:
        raise ValueError(
            "there are no batches to calibrate on; an iterator that was used before is empty."
        )
    outline = lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x))
    return total, jax.tree.map(outline, inputs)
