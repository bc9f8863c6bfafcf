"""Sparse all along: a fixed number of weights, of which some move at every update of masks.

    n = floor(f_t k),     f_t = drop / 2 (1 + cos(pi t / T))
    drop the n smallest |w| of the k that are active; grow n of all the others:
    RigL the largest |g|, SET at random

A weight that is dropped and grown again in one update keeps its value and its moments; one that is
new begins at zero, with none. RigL: https://arxiv.org/abs/1911.11134; SET:
https://arxiv.org/abs/1707.04780.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unitscale_jax.optimizer import PrunedState, check_optimizer
from unitscale_jax.prune._patterns import Balanced, NofM
from unitscale_jax.prune._pruned import evolving, full, ranked, sunk
from unitscale_jax.prune._schedules import Schedule
from unitscale_jax.prune._scores import Score, magnitude, random
from unitscale_jax.prune._spec import SparsitySpec, counts, masks_from, selected
from unitscale_jax.typing import Params

# What grows: the score of `(number of the update, gradients, parameters)`.
Growth = Callable[[jax.Array, Params, Params], Any]


def rigl(
    tx: optax.GradientTransformation,
    spec: SparsitySpec,
    schedule: Schedule,
    *,
    drop: float = 0.3,
    end: int | None = None,
    score: Score = random(0),  # noqa: B008, a triple of pure functions
) -> optax.GradientTransformationExtraArgs:
    """Trains a fixed number of weights, and lets the gradient say which.

    Where a weight is pruned the gradient is taken too: nothing of the model is left out, so a step
    costs what a dense one does. At an update of masks the optimizer takes no step.

    Order of wrappers, innermost first: chain -> low_precision_weights -> rigl -> multi_steps ->
    loss_scaled -> sharded.

    Args:
        tx: Any optax transform.
        spec: What to prune, and to which sparsity, from the first step on.
        schedule: At which steps masks change. Its sparsities play no part.
        drop: The share of active weights that moves at step 0, in [0, 1]; it falls to 0 along a
            cosine.
        end: The step at which it is 0. None: the schedule's last.
        score: Ranks the weights that begin active. `magnitude()` begins with those of parameters
            that are pruned already.

    Returns:
        A transform as `pruned` gives it. Masks are there from `init` on, and the first update
        prunes by them; so that the first gradient is of the pruned model too, begin with
        `us.prune.apply_masks(params, us.prune.masks_of(state))`.

    Raises:
        ValueError: `drop` is not in [0, 1], or `end` not positive. At `init`, the spec does not fit
            the parameters; a pattern is `NofM`, which is not ranked; `tx` holds `multi_steps`,
            `loss_scaled` or other masks, of which the first two belong around it.

    Law: masks have the same number of ones always, exactly.

    Example:
        >>> spec = us.prune.SparsitySpec(patterns={"w": us.prune.Unstructured()}, sparsity=0.5)
        >>> tx = rigl(optax.sgd(0.1), spec, us.prune.OneShot(0), drop=0.5, end=100,
        ...     score=us.prune.magnitude())
        >>> params = {"w": jnp.array([0.5, -0.1, 0.3, 0.2, 0.0, 0.0, 0.0, 0.0])}
        >>> grads = {"w": jnp.array([0.0, 9.0, 0.0, 0.0, 1.0, -3.0, 2.0, 0.5])}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> us.prune.masks_of(state)["w"].astype(int).tolist()
        [1, 1, 1, 0, 0, 1, 0, 0]
    """
    check_optimizer(tx, "rigl")

    def of_gradient(number: jax.Array, grads: Params, params: Params) -> Any:
        del params
        return magnitude().value((), None, grads, number)

    return _moving("rigl", tx, spec, schedule, of_gradient, score, drop, end)


def SET(  # noqa: N802, an acronym
    tx: optax.GradientTransformation,
    spec: SparsitySpec,
    schedule: Schedule,
    *,
    drop: float = 0.3,
    end: int | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains a fixed number of weights, and tries others at random.

    Order of wrappers, innermost first: chain -> low_precision_weights -> SET -> multi_steps ->
    loss_scaled -> sharded.

    Args:
        tx: Any optax transform.
        spec: As of `rigl`.
        schedule: As of `rigl`.
        drop: As of `rigl`.
        end: As of `rigl`.
        seed: Of the first masks and of what grows; see `random`.

    Returns:
        A transform as `rigl` gives it.

    Raises:
        ValueError: As `rigl`.

    Law: masks have the same number of ones always, exactly.

    Example:
        >>> spec = us.prune.SparsitySpec(patterns=us.prune.Unstructured(), sparsity=0.75)
        >>> tx, params = SET(optax.sgd(0.1), spec, us.prune.OneShot(0)), {"w": jnp.ones((4, 8))}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> int(us.prune.masks_of(state)["w"].sum())
        8
    """
    check_optimizer(tx, "SET")
    draw = random(seed)

    def at_random(number: jax.Array, grads: Params, params: Params) -> Any:
        return draw.value((), grads, params, number)

    return _moving("SET", tx, spec, schedule, at_random, draw, drop, end)


def _moving(
    name: str,
    tx: optax.GradientTransformation,
    spec: SparsitySpec,
    schedule: Schedule,
    growth: Growth,
    first: Score,
    drop: float,
    end: int | None,
) -> optax.GradientTransformationExtraArgs:
    end = max(schedule.steps[-1], 1) if end is None else end
    _check(drop, end)
    shares = [moving_share(t, drop, end) for t in schedule.steps]

    def start(params: Params) -> Any:
        _check_patterns(spec, params)
        seen = ranked(full(spec, params), params)
        still = jax.tree.map(jnp.zeros_like, seen)
        scores = first.value(first.init(seen), still, seen, 0)
        return masks_from(spec, scores, _active(spec, params))

    def renew(state: PrunedState, grads: Params, params: Params, number: jax.Array) -> Any:
        # k of f move: the k - moving largest stay, and among all others, those that just left
        # included, as many as moved grow. `sunk` ranks below all what may not be chosen.
        active = _active(spec, params)
        moving = {name: _of(shares, k)[number - 1] for name, k in active.items()}
        staying = {name: jnp.asarray(k) - moving[name] for name, k in active.items()}
        sizes = magnitude().value((), grads, params, number)
        stay = masks_from(spec, sunk(sizes, state.masks), staying)
        others = jax.tree.map(lambda m: ~m if np.ndim(m) else m, stay)
        grow = masks_from(spec, sunk(growth(number, grads, params), others), moving)
        return jax.tree.map(jnp.logical_or, stay, grow)

    # The first masks' score is asked once, at `init`: nothing of it is kept up to date.
    return evolving(tx, schedule.steps, magnitude(), start, renew, name=name, rests=True)


def moving_share(t: int, drop: float, end: int) -> float:
    """f_t: the share of active weights that moves at step t.

    Example:
        >>> [round(moving_share(t, 0.3, 1000), 4) for t in (0, 250, 500, 750, 1000, 2000)]
        [0.3, 0.2561, 0.15, 0.0439, 0.0, 0.0]
    """
    return drop / 2 * (1 + math.cos(math.pi * min(t, end) / end))


def _active(spec: SparsitySpec, params: Params) -> dict[str, np.ndarray]:
    return {name: rows[0] for name, rows in counts(spec, params, [spec.sparsity]).items()}


def _of(shares: list[float], k: np.ndarray) -> jax.Array:
    """floor(f k) for every update, as data."""
    # In float64, .29 of 100 is a little below 29.
    return jnp.asarray([np.floor(f * k.astype(np.float64) + 1e-9) for f in shares], jnp.int32)


def _check(drop: float, end: int) -> None:
    if not 0 <= drop <= 1:
        raise ValueError(
            f"drop is {drop}; it is the share of active weights that moves, in [0, 1]."
        )
    if end < 1:
        raise ValueError(f"end is {end}; it is a step after the first, at which masks stop moving.")


def _check_patterns(spec: SparsitySpec, params: Params) -> None:
    for name, pattern in selected(spec, params).items():
        if isinstance(pattern, NofM):
            raise ValueError(
                f"{name} has {pattern!r}, which keeps n of every m and has no count to move. Use "
                "Unstructured, Block or Channel, or `pruned` or `masked_straight_through` for N:M."
            )
        if isinstance(pattern, Balanced):
            raise ValueError(
                f"{name} has {pattern!r}, whose parts would not stay equally full while weights "
                "move. Use the pattern alone, or `pruned` or `masked_straight_through` for "
                "balanced ones."
            )
