"""Constraints: one factor for several, where different factors would change the gradient.

    alpha, beta_1, .., beta_k  ->  one number that takes the place of each of them

The backward factor of an input may differ from the forward factor only on an edge that is a bridge
of the graph; elsewhere the gradients of two paths would be weighted differently. So operations tie
the factors of their inputs by default, and a caller who knows the graph may leave them independent
(`constraint=None`). Factors of weights and biases are used once, and are never tied.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from unitscale_jax.errors import unknown
from unitscale_jax.unit._factors import Factors

Constraint: TypeAlias = str | Callable[..., float] | None


def to_output_scale(alpha: float, *betas: float) -> float:
    """The forward factor: values are unit, and gradients what they become."""
    del betas
    return alpha


def to_grad_input_scale(alpha: float, beta: float) -> float:
    """The backward factor of the only input: its gradient is unit."""
    del alpha
    return beta


def to_left_grad_scale(alpha: float, left: float, right: float) -> float:
    """The backward factor of the left one of two inputs."""
    del alpha, right
    return left


def to_right_grad_scale(alpha: float, left: float, right: float) -> float:
    """The backward factor of the right one of two inputs."""
    del alpha, left
    return right


def gmean(*factors: float) -> float:
    """The geometric mean of all factors.

    Example:
        >>> gmean(0.25, 0.0625)
        0.125
    """
    return math.prod(factors) ** (1 / len(factors))


def hmean(*factors: float) -> float:
    """The harmonic mean of all factors."""
    return len(factors) / sum(1 / factor for factor in factors)


def amean(*factors: float) -> float:
    """The arithmetic mean of all factors."""
    return sum(factors) / len(factors)


CONSTRAINTS: Mapping[str, Callable[..., float]] = {
    fn.__name__: fn
    for fn in (
        to_output_scale,
        to_grad_input_scale,
        to_left_grad_scale,
        to_right_grad_scale,
        gmean,
        hmean,
        amean,
    )
}
"""The constraints by name; each is a function of the forward factor and of those of the inputs."""


def tied(factors: Factors, inputs: Sequence[str], constraint: Constraint) -> Factors:
    """Replaces the forward factor and those of the inputs by the one number of a constraint.

    Args:
        factors: Factors of an operation, each of them ideal by itself.
        inputs: The operands that are activations, in the order in which a constraint takes them.
        constraint: A name in `CONSTRAINTS`, a function of the factors, or None: no tie.

    Raises:
        ValueError: There is no such constraint, it takes another number of factors, or its result
            is no positive number.

    Example:
        >>> tied(Factors(0.5, {"x": 0.25, "kernel": 3.0}), ["x"], "to_output_scale")
        Factors(fwd=0.5, bwd={'x': 0.5, 'kernel': 3.0})
    """
    if constraint is None:
        return factors
    fn = _function(constraint)
    given = [factors.fwd, *(factors.bwd[name] for name in inputs)]
    try:
        one = float(fn(*given))
    except TypeError as error:
        raise ValueError(
            f"constraint {constraint!r} does not take the {len(given)} factors of the result and "
            f"of {', '.join(inputs)} ({error}). Use gmean, hmean, amean or to_output_scale, which "
            "take any number."
        ) from None
    if not (one > 0 and math.isfinite(one)):
        raise ValueError(
            f"constraint {constraint!r} of {given} is {one}; expected a positive number."
        )
    return Factors(one, {**factors.bwd, **dict.fromkeys(inputs, one)})


def _function(constraint: str | Callable[..., float]) -> Callable[..., float]:
    if callable(constraint):
        return constraint
    if constraint not in CONSTRAINTS:
        raise ValueError(
            f"{unknown(str(constraint), CONSTRAINTS, 'constraint')} A function of the factors is "
            "one, too, and None leaves them independent."
        )
    return CONSTRAINTS[constraint]
