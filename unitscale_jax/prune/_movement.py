"""Movement pruning: scores are trained beside dense weights, and the largest stay.

    forward    y = f(m ? w : 0),    m = the k largest s,   or sigmoid(s) > threshold
    backward   w̄ = m ? ḡ : 0,       s̄ = ḡ w,               ḡ the gradient at m ? w : 0

So an optimizer moves s by -sum w g: down where the weight shrinks, up where it grows, and also for
weights that are pruned, which keep their values and may return (https://arxiv.org/abs/2005.07683).
`pruned(..., score=movement())` needs no second function, and sets to zero what it prunes.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import fwd_bwd
from unitscale_jax.errors import check_callable, check_type
from unitscale_jax.prune._patterns import Unstructured
from unitscale_jax.prune._pruned import full
from unitscale_jax.prune._schedules import Schedule
from unitscale_jax.prune._spec import SparsitySpec, counts, make_masks, masks_from, selected
from unitscale_jax.typing import Apply, Params


class Scored(NamedTuple):
    """Parameters and their scores, both of them trained.

    Attributes:
        params: The parameters, dense.
        scores: A pytree like them of float32 arrays; a scalar where nothing is pruned.
    """

    params: Params
    scores: Any


def add_scores(params: Params, spec: SparsitySpec) -> Scored:
    """Puts scores of zero beside parameters.

    Raises:
        ValueError: The spec does not fit the parameters.

    Example:
        >>> spec = us.prune.SparsitySpec(patterns={"w": us.prune.Unstructured()})
        >>> add_scores({"w": jnp.ones(2)}, spec).scores["w"].tolist()
        [0.0, 0.0]
    """
    check_type("spec", spec, SparsitySpec, "a us.prune.SparsitySpec")
    zeros = lambda mask: jnp.zeros_like(mask, dtype=jnp.float32)
    return Scored(params, jax.tree.map(zeros, full(spec, params)))


def movement_masked(
    apply: Apply,
    spec: SparsitySpec,
    schedule: Schedule | None = None,
    *,
    threshold: float | None = None,
) -> Apply:
    """The function at the parameters that scores leave, with gradients for both.

    Args:
        apply: A function whose first argument is the parameters.
        spec: What to prune, and to which sparsity.
        schedule: How sparse when; the function then takes the step, which may be traced, as the
            keyword `step`. It is dense before the first. None: the sparsity of the spec.
        threshold: Keeps every weight with sigmoid(s) above it, in place of a number of them; add
            `movement_penalty` to the loss. Of the spec then only what it selects is used.

    Returns:
        `fn(scored, *inputs)` in place of `apply(params, *inputs)`.

    Raises:
        ValueError: As `movement_masks`.

    Laws: it is `apply` at `prune(scored.params, movement_masks(scored, ...))`, bit for bit; the
    gradient of a score is its weight times the gradient that the weight would get if it stayed.

    Example:
        >>> spec = us.prune.SparsitySpec(patterns={"w": us.prune.Unstructured()}, sparsity=0.5)
        >>> fn = movement_masked(lambda params, x: jnp.sum(params["w"] * x), spec)
        >>> both = add_scores({"w": jnp.array([3.0, 5.0])}, spec)
        >>> value, grads = jax.value_and_grad(fn)(both, jnp.array([2.0, 1.0]))
        >>> value.item(), grads.params["w"].tolist(), grads.scores["w"].tolist()
        (6.0, [2.0, 0.0], [6.0, 5.0])
    """
    check_callable("apply", apply)

    @functools.wraps(apply)
    def movement_masked_fn(scored: Scored, *inputs: Any, **kwargs: Any) -> Any:
        step = kwargs.pop("step", None) if schedule is not None else None
        masks = movement_masks(scored, spec, schedule, threshold=threshold, step=step)
        params = jax.tree.map(_carried, masks, scored.params, scored.scores)
        return apply(params, *inputs, **kwargs)

    return movement_masked_fn


def movement_masks(
    scored: Scored,
    spec: SparsitySpec,
    schedule: Schedule | None = None,
    *,
    threshold: float | None = None,
    step: Any = None,
) -> Any:
    """The masks that scores stand for: those of `movement_masked`, to report or to bake in.

    Args:
        scored: Parameters and scores.
        spec: As of `movement_masked`.
        schedule: As of `movement_masked`.
        threshold: As of `movement_masked`.
        step: The step, if there is a schedule.

    Returns:
        Masks as `make_masks` gives them; they have no gradient.

    Raises:
        ValueError: The spec does not fit; a schedule without a step or a step without a schedule;
            a threshold that is not in (0, 1), has a schedule, or a pattern that ranks.

    Example:
        >>> spec = us.prune.SparsitySpec(patterns={"w": us.prune.Unstructured()}, sparsity=0.5)
        >>> both = Scored({"w": jnp.ones(2)}, {"w": jnp.array([-3.0, -1.0])})
        >>> movement_masks(both, spec)["w"].tolist()
        [False, True]
        >>> movement_masks(both, spec, threshold=0.01)["w"].tolist()
        [True, True]
    """
    check_type("scored", scored, Scored, "what us.prune.add_scores returns")
    scores = jax.lax.stop_gradient(scored.scores)
    if threshold is not None:
        _check_threshold(scored.params, spec, schedule, threshold)
        above = lambda s: jax.nn.sigmoid(s) > threshold if np.ndim(s) else jnp.array(True)
        return jax.tree.map(above, scores)
    if (schedule is None) != (step is None):
        raise ValueError(
            "a schedule needs the step, and a step needs a schedule. Pass both, `step=` to the "
            "function at every call, or neither, for the sparsity of the spec."
        )
    if schedule is None:
        return make_masks(scores, spec)
    levels = (0.0, *schedule.sparsities(spec.sparsity))  # dense before the first step
    made = jnp.sum(np.asarray(schedule.steps, np.int32) <= step, dtype=jnp.int32)
    table = counts(spec, scores, levels)
    return masks_from(spec, scores, {n: jnp.asarray(rows)[made] for n, rows in table.items()})


def movement_penalty(scored: Scored) -> jax.Array:
    """The mean of sigmoid(s): how much a `threshold` keeps, as a term of the loss.

    Args:
        scored: Parameters and scores.

    Returns:
        A float32 scalar in (0, 1). Its coefficient takes the place of the sparsity.

    Example:
        >>> movement_penalty(Scored({"w": jnp.ones(2)}, {"w": jnp.zeros(2)})).item()
        0.5
    """
    check_type("scored", scored, Scored, "what us.prune.add_scores returns")
    scores = [s for s in jax.tree.leaves(scored.scores) if np.ndim(s)]
    total = sum((jnp.sum(jax.nn.sigmoid(s)) for s in scores), start=jnp.zeros((), jnp.float32))
    return total / max(sum(s.size for s in scores), 1)


def _carried(mask: jax.Array, w: Any, score: jax.Array) -> Any:
    if not np.ndim(mask):
        return w
    stays = jnp.where(mask, w, 0)
    # Of the carrier only the derivative is used: 1 for what stays, w for each score.
    carrier = stays + (score * jax.lax.stop_gradient(w).astype(score.dtype)).astype(w.dtype)
    return fwd_bwd.straight_through(stays, carrier)


def _check_threshold(
    params: Params, spec: SparsitySpec, schedule: Schedule | None, threshold: float
) -> None:
    if not 0 < threshold < 1 or schedule is not None:
        raise ValueError(
            f"threshold is {threshold}, schedule {schedule!r}; a threshold of sigmoid(s) is in "
            "(0, 1), and takes the place of a schedule: put the coefficient of the penalty on one."
        )
    for name, pattern in selected(spec, params).items():
        if not isinstance(pattern, Unstructured):
            raise ValueError(
                f"{name} has {pattern!r}, and a threshold is for weights one by one. Use "
                "Unstructured, or no threshold."
            )
