"""States of the wrappers of optimizers, and how one is found in the state of others."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unitscale_jax.typing import Params

# ----------------------------------------------------------------------- states, inside to outside


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowPrecisionState:
    """What rounding carries from step to step.

    Attributes:
        step: int32 scalar, how many updates were made; the random bits derive from it.
        owed: Kahan's tree of bfloat16, what the weights are short of; `None` if stochastic.
        inner: State of the wrapped transform, initialized on float32 parameters.
    """

    step: jax.Array
    owed: Params | None
    inner: Any


class PrunedState(NamedTuple):
    """State of `pruned`, `rigl` and `SET`.

    Attributes:
        masks: A pytree like the parameters of bool arrays; the scalar True where nothing is pruned.
        done: Scheduled updates of masks that are made, int32.
        count: Steps taken, int32.
        score: State of the score.
        inner: State of the inner transform.
    """

    masks: Any
    done: jax.Array
    count: jax.Array
    score: Any
    inner: Any


class MultiStepsState(NamedTuple):
    """State of `multi_steps`: a sum of gradients and its progress.

    Attributes:
        part: Parts taken of the current window, int32.
        step: Updates emitted, int32.
        weight: Sum of weights of the window, float32.
        total: Weighted sum of the window's gradients, float32 or wider, shaped as the parameters.
        value: Weighted sum of the window's `value`s, float32.
        value_weight: Sum of weights of the parts that had a `value`, float32.
        dropped: Parts left out for not being finite, ever, int32.
        lost: Parts of the window that were left out, or of which something was, int32.
        bad: A pytree like the parameters of bool scalars: which gradients were not finite in some
            part of the window; after its last part still those of the window that ended.
        applied: Boolean scalar, whether the last part counts, and if it ended a window, whether the
            inner transform took that step.
        inner: State of the inner transform.
    """

    part: jax.Array
    step: jax.Array
    weight: jax.Array
    total: Any
    value: jax.Array
    value_weight: jax.Array
    dropped: jax.Array
    lost: jax.Array
    bad: Any
    applied: jax.Array
    inner: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossScaleState:
    """State of `loss_scaled`: the scale, its history, and the inner state.

    Attributes:
        scale: float32 scalar, the factor that the next gradients carry.
        good: int32 scalar, finite steps since the scale last moved or a step overflowed.
        credits: int32 scalar, overflows that are still forgiven without lowering the scale.
        stuck: Boolean scalar, whether the last step overflowed at the lowest scale. The step does
            not stop by itself: what to do about it is up to the loop.
        bad: A pytree like the parameters of bool scalars, which gradients were not finite in the
            last step; `overflowing` names them. Stacked with the parameters, it says which layer.
        skipped: int32 scalar, how many steps were skipped so far.
        applied: Boolean scalar, whether the last step was not skipped.
        inner: State of the wrapped transform.
    """

    scale: jax.Array
    good: jax.Array
    credits: jax.Array
    stuck: jax.Array
    bad: Any
    skipped: jax.Array
    applied: jax.Array
    inner: Any


# ------------------------------------------------------------------------------- finding states


def find_state(tree: Any, kind: type | tuple[type, ...]) -> list[tuple[tuple, Any]]:
    """Finds the states of some kind, wherever they are in a tree.

    Args:
        tree: The state of an optimizer, or anything that holds it.
        kind: A class of states, or several.

    Returns:
        `[(path, state), ...]`, in the order of the tree, one inside of another after it. A path has
        the keys of `jax.tree_util`.

    Example:
        >>> tx = optax.chain(optax.clip(1.0), us.multi_steps(optax.sgd(0.1), 2))
        >>> [(path, state.part.item()) for path, state in find_state(tx.init(1.0), MultiStepsState)]
        [((SequenceKey(idx=1),), 0)]
    """
    found: list[tuple[tuple, Any]] = []

    def visit(path: tuple, node: Any) -> bool:
        if isinstance(node, kind):
            found.append((tuple(path), node))
        return False

    # `is_leaf` is asked about every node on the way down, which makes it a visitor.
    jax.tree_util.tree_flatten_with_path(tree, is_leaf=visit, is_leaf_takes_path=True)
    return found


def verdicts(tree: Any) -> list[Any]:
    """The outermost states that say whether the last step was applied, and what was bad in it."""
    found = find_state(tree, (LossScaleState, MultiStepsState))
    paths = [path for path, _ in found]
    inside = lambda path: any(path[: len(p)] == p for p in paths if len(p) < len(path))
    return [state for path, state in found if not inside(path)]


def applied(opt_state: Any) -> jax.Array | None:
    """Whether the last step was taken; None if nothing in the state ever skips one."""
    flags = [state.applied for state in verdicts(opt_state)]
    return jnp.all(jnp.stack(flags), axis=0) if flags else None
