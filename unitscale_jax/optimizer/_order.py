"""The order of wrappers of an optimizer, and what each refuses to have inside of it."""

from typing import Any

import jax.numpy as jnp

from unitscale_jax.errors import expected, wrong_shape
from unitscale_jax.optimizer._states import (
    LossScaleState,
    LowPrecisionState,
    MultiStepsState,
    PrunedState,
    find_state,
)


def check_optimizer(tx: Any, technique: str) -> None:
    """Raises `TypeError` unless `tx` is an optimizer."""
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(
            expected(f"what {technique} goes around", tx, "an optimizer, as optax.adam(1e-3)")
        )


def check_state(state: Any, kind: type, technique: str) -> None:
    """Raises `TypeError` unless a wrapper was given the state that its `init` returned."""
    if not isinstance(state, kind):
        raise TypeError(
            f"{expected(f'the state of {technique}', state, f'a {kind.__name__}, as init made it')}"
            " Pass update(grads, state, params), the state as the last update returned it."
        )


def check_scalar(what: str, value: Any) -> None:
    """Raises `TypeError` unless a value is a number, and `ValueError` if it has any axes."""
    if not hasattr(value, "dtype") and not isinstance(value, bool | int | float):
        raise TypeError(expected(f"`{what}`", value, "a scalar"))
    if jnp.shape(value):
        raise ValueError(wrong_shape(f"`{what}`", jnp.shape(value), ()))


def refuse_inside(
    state: Any, kind: type, wrapper: str, why: str, instead: str | None = None
) -> None:
    """Raises `ValueError` if a wrapper was placed around one that belongs around it.

    Args:
        state: The state of what the wrapper was placed around.
        kind: The class of states that may not be in there.
        wrapper: The name of the wrapper.
        why: What would go wrong, as a sentence.
        instead: The way out, if it is not to swap the two.
    """
    if not find_state(state, kind):
        return
    other = _WRAPPERS[kind]
    instead = instead or f"Place {other} around it, {other}({wrapper}(..))."
    raise ValueError(
        f"{wrapper}({other}(..)) is not possible: {why} {instead} The order of wrappers, innermost "
        f"first, is {ORDER}."
    )


ORDER = "chain -> low_precision_weights -> pruned -> multi_steps -> loss_scaled -> sharded"
_WRAPPERS = {
    LowPrecisionState: "low_precision_weights",
    PrunedState: "pruned",
    MultiStepsState: "multi_steps",
    LossScaleState: "loss_scaled",
}
