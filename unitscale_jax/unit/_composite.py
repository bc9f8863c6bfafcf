"""Composites: a function that unit scaling takes as one operation, with the factors it is given."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax

from unitscale_jax.errors import check_callable
from unitscale_jax.trace.program import Site
from unitscale_jax.unit._nodes import Node

Forward: TypeAlias = float | Callable[..., float]
Backward: TypeAlias = float | Sequence[float] | Callable[..., float | Sequence[float]]

_PREFIX = "us::"


@dataclass(frozen=True)
class _Composite:
    name: str
    fwd: Forward
    bwd: Backward

    def apply(self, node: Node) -> None:
        """Gives a node the factors; those of operands are ideals, as of any other operation."""
        avals = [v.aval for v in node.last.site.eqn.invars]
        fwd = self.fwd(*avals) if callable(self.fwd) else self.fwd
        bwd = self.bwd(*avals) if callable(self.bwd) else self.bwd
        each = [float(bwd)] * len(avals) if isinstance(bwd, float | int) else list(bwd)
        if len(each) != len(avals):
            raise ValueError(
                f"composite {self.name!r} has {len(each)} backward factors and {len(avals)} "
                "operands. Give one number, or one for each array among its arguments."
            )
        _check_positive(self.name, fwd, *each)
        node.alpha, node.rule = float(fwd), f"composite {self.name}"
        for edge in node.edges:
            edge.ideal = float(each[edge.position])


COMPOSITES: dict[str, _Composite] = {}


def composite(fwd: Forward, bwd: Backward) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function one operation of `unit_scaled`, with these factors; alone it stays itself.

    Args:
        fwd: What makes its result unit for unit operands: a positive number, or a function of the
            operands' abstract values (shape, dtype).
        bwd: What makes the gradients of its operands unit: a number, one for each array among its
            arguments, or a function that returns either. They are ideals: where paths meet,
            `unit_scaled` ties them.

    Returns:
        A decorator of functions of arrays.

    Raises:
        ValueError: A number is not positive; for functions, when a scaled program is traced.

    Example:
        >>> @composite(fwd=2.0, bwd=0.5)
        ... def halved(x):
        ...     return x / 2
        >>> halved(jnp.float32(3.0)).item()
        1.5
    """
    _check_positive("composite", *(x for x in (fwd, bwd) if isinstance(x, int | float)))

    def mark(fn: Callable[..., Any]) -> Callable[..., Any]:
        check_callable("a composite", fn)
        name = f"{_PREFIX}{len(COMPOSITES)}:{getattr(fn, '__name__', 'function')}"
        COMPOSITES[name] = _Composite(name.rpartition(":")[2], fwd, bwd)

        @functools.wraps(fn)
        def named(*args: Any, **kwargs: Any) -> Any:
            return fn(*args, **kwargs)

        named.__name__ = named.__qualname__ = name
        return functools.wraps(fn)(jax.jit(named))

    return mark


def composite_of(site: Site) -> str | None:
    """The name of the composite that a call is; None for any other equation."""
    name = str(site.eqn.params.get("name", ""))
    return name if name in COMPOSITES else None


def _check_positive(name: str, *factors: float) -> None:
    for factor in factors:
        if not (factor > 0 and math.isfinite(factor)):
            raise ValueError(
                f"{name} has the factor {factor}; expected positive numbers, for a gradient of the "
                "other sign is no multiple of the true one."
            )
