"""Pruning in training: an optax transform after which `optax.apply_updates` leaves exact zeros.

    due = (masks made so far) < (scheduled steps <= t)   and g is finite
    m'  = due ? masks of the scores : m
    u   = inner(m' ? g : 0,  state cleared where m' is False,  m' ? p : 0)
    u'  = m' ? u : -p                                         p + (-p) = +0, exactly

So norms, decays and moments see the kept weights only, whatever the inner transform is, and there
is nothing to remember after a step. Gradual pruning: https://arxiv.org/abs/1710.01878.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unitscale_jax import tree as trees
from unitscale_jax.mesh_axes import varying_axes
from unitscale_jax.optimizer import (
    LossScaleState,
    MultiStepsState,
    PrunedState,
    check_optimizer,
    check_state,
    common_dtype,
    find_state,
    no_update,
    none_left,
    refuse_inside,
    step_or_skip,
    without_scale,
)
from unitscale_jax.prune._masks import zeroed_leaf
from unitscale_jax.prune._schedules import OneShot, Schedule
from unitscale_jax.prune._scores import Score, magnitude
from unitscale_jax.prune._spec import SparsitySpec, counts, masks_from, selected
from unitscale_jax.trace.program import compiled_once, reach, trace
from unitscale_jax.typing import Params


def pruned(
    tx: optax.GradientTransformation,
    spec: SparsitySpec,
    schedule: Schedule = OneShot(0),  # noqa: B008, frozen
    score: Score = magnitude(),  # noqa: B008, a pair of pure functions
    *,
    sticky: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Prunes parameters while an optimizer trains the others.

    Order of wrappers, innermost first: chain -> low_precision_weights -> pruned -> multi_steps ->
    loss_scaled -> sharded. A factor applied to its updates would break the zeros; what is around it
    passes updates on as they are, so that steps are steps of the optimizer, not parts. Arrays may
    be sharded any way under `jit`.

    Args:
        tx: Any optax transform.
        spec: What to prune, and to which sparsity in the end.
        schedule: At which steps masks are made anew, and how sparse they are then. An update whose
            gradients are not finite is made up for at the next step.
        score: What a weight is worth.
        sticky: Whether masks only shrink. False: pruned weights are ranked too, and may return, at
            zero and with no moments. By `magnitude` and `saliency` a zero is worth nothing, by
            `movement` and `random` it is.

    Returns:
        A transform whose `update(grads, state, params, **extra)` needs the parameters; `extra` goes
        to `tx`. Gradients are those at the pruned parameters. Updates have the wider dtype of the
        inner update and the parameter. Its state is a `PrunedState`.

    Raises:
        ValueError: At `init`, the spec or the schedule does not fit the parameters; sticky masks
            and sparsities that fall; a wrapper inside that belongs around it: `multi_steps`, other
            masks, or `loss_scaled` where the score adds up gradients. In `update`, no parameters;
            gradients that vary over a manual axis of a `shard_map`.

    Laws: after every `optax.apply_updates` what masks leave out is zero, and so are its moments;
    masks have as many ones as scheduled; the last scheduled step has the sparsity of the spec, also
    if it was postponed; sticky masks are nested; with nothing pruned it is `tx`, bit for bit; the
    path of the kept weights under an element-wise `tx` is that of a model without the others.

    Example:
        >>> spec = SparsitySpec(patterns={"w": us.prune.Unstructured()}, sparsity=1 / 3)
        >>> tx, params = pruned(optax.sgd(0.1), spec), {"w": jnp.array([1.0, -2.0, 0.5])}
        >>> updates, state = tx.update({"w": jnp.ones(3)}, tx.init(params), params)
        >>> [round(w, 4) for w in optax.apply_updates(params, updates)["w"].tolist()]
        [0.9, -2.1, 0.0]
        >>> masks_of(state)["w"].tolist()
        [True, True, False]
    """
    check_optimizer(tx, "pruned")

    def start(params: Params) -> Any:
        _falling(spec, schedule, sticky)
        _table(spec, schedule, params, sticky)
        return full(spec, params)

    def renew(state: PrunedState, grads: Params, params: Params, number: jax.Array) -> Any:
        scores = score.value(state.score, grads, params, number)
        scores = sunk(scores, state.masks) if sticky else scores
        table = _table(spec, schedule, params, sticky)
        return masks_from(spec, scores, {name: rows[number - 1] for name, rows in table.items()})

    return evolving(tx, schedule.steps, score, start, renew, name="pruned")


def masks_of(state: Any) -> Any:
    """The masks in an optimizer's state, wherever in it they are.

    Args:
        state: The state of `pruned`, `rigl` or `SET`, or of a transform around it.

    Returns:
        A pytree like the parameters of bool arrays, as `make_masks` gives them.

    Raises:
        ValueError: There is no `PrunedState` in it, or there are several.

    Example:
        >>> tx = pruned(optax.sgd(0.1), SparsitySpec(patterns=us.prune.Unstructured()))
        >>> masks_of(us.multi_steps(tx, 2).init({"w": jnp.ones((1, 2))}))["w"].tolist()
        [[True, True]]
    """
    found = find_state(state, PrunedState)
    if len(found) != 1:
        raise ValueError(
            f"the state holds {len(found)} PrunedStates, and 1 is expected. Wrap the optimizer in "
            "us.prune.pruned once, with one spec for all parameters, and pass the whole state."
        )
    return found[0][1].masks


# ------------------------------------------------------------------- the step, for any method


def evolving(
    tx: optax.GradientTransformation,
    steps: Sequence[int],
    score: Score,
    start: Callable[[Params], Any],
    renew: Callable[[PrunedState, Params, Params, jax.Array], Any],
    *,
    name: str,
    rests: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The transform of masks that begin as `start` says and change as `renew` does.

    Args:
        tx: The inner transform.
        steps: At which masks are made anew.
        score: What is remembered for `renew`, in `state.score`.
        start: `start(params) -> masks`.
        renew: `renew(state, grads, params, number) -> masks`; number counts updates from 1, and
            grads and params have scalars for what is not pruned.
        name: That of the wrapper, for its errors.
        rests: Whether `tx` takes no step when masks change.
    """
    inner, table = optax.with_extra_args_support(tx), np.asarray(steps, np.int32)

    def init_fn(params: Params) -> PrunedState:
        # No two leaves share a buffer, so that a state can be donated.
        masks = jax.tree.map(lambda m: m if np.ndim(m) else jnp.ones((), bool), start(params))
        seen, inner_state = ranked(masks, params), inner.init(params)
        score_state, zero = score.init(seen), lambda: jnp.zeros((), jnp.int32)
        _check_inside(inner_state, name, rests or _adds_up(score, score_state, seen))
        return PrunedState(masks, zero(), zero(), score_state, inner_state)

    # Only this, since the inner transform has to give its own bits.
    @compiled_once
    def renewed(due: jax.Array, state: PrunedState, params: Params, *given: Any) -> tuple:
        return _renewed(due, lambda: renew(state, *given), state, params)

    def update_fn(
        updates: Params, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Params, PrunedState]:
        _check_params(params)
        check_state(state, PrunedState, name)
        grads, scale = updates, [s.scale for _, s in find_state(state.inner, LossScaleState)]
        # The factor of a loss scale inside is none of a score's business.
        true = without_scale(grads, scale[0]) if scale else grads
        good = _is_finite(grads) & ~none_left(extra.get("dropped", 0))
        seen = ranked(state.masks, true), ranked(state.masks, params)
        scheduled = jnp.sum(table <= state.count, dtype=jnp.int32)
        score_state = trees.select(good, score.update(state.score, *seen), state.score)
        new = state._replace(count=state.count + 1, score=score_state)
        due = good & (state.done < scheduled)
        masks, before = renewed(due, new, params, *seen, scheduled)

        def step(grads: Params, inner_state: Any) -> tuple[Params, Any]:
            return inner.update(grads, inner_state, zeroed(masks, params), **extra)

        kept = zeroed(masks, grads)
        # What overflowed has to reach the scale, also where it is pruned.
        kept = trees.select(good, kept, grads) if scale else kept
        updates, after = step_or_skip(~due, step, kept, before) if rests else step(kept, before)
        updates = jax.tree.map(_erased, masks, updates, params)
        done = jnp.where(due, scheduled, state.done)
        new = new._replace(masks=masks, done=done, inner=after)
        if not scale:
            return updates, new
        # A step that the scale skips is none, as in the other order: masks and counts stand still.
        still = jax.tree.map(no_update, updates), state._replace(inner=after)
        return trees.select(good, (updates, new), still)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def full(spec: SparsitySpec, params: Params) -> Any:
    """Masks that leave nothing out: arrays of True for what the spec prunes."""
    chosen = selected(spec, params)

    def ones(name: str, w: Any) -> jax.Array:
        # What is made like a parameter has its sharding.
        return jnp.ones_like(trees.values_of(w), bool) if name in chosen else jnp.ones((), bool)

    return trees.map_named(ones, params, is_leaf=trees.is_compound)


def zeroed(masks: Any, tree: Any) -> Any:
    """A tree with zeros where masks are False; what is not pruned is left as it is."""
    return jax.tree.map(zeroed_leaf, masks, tree)


def ranked(masks: Any, tree: Any) -> Any:
    """A tree of arrays, with a scalar in place of what is not pruned."""

    def values(mask: jax.Array, leaf: Any) -> Any:
        return trees.values_of(leaf) if np.ndim(mask) else jnp.zeros(())

    return jax.tree.map(values, masks, tree)


def sunk(scores: Any, masks: Any) -> Any:
    """Scores that rank what masks leave out below everything else.

    NaN is the lowest of all; so that it is theirs alone, scores that are NaN become the lowest
    number.
    """
    lowest = np.finfo(np.float32).min

    def sink(mask: jax.Array, s: jax.Array) -> jax.Array:
        if not np.ndim(mask):
            return s
        return jnp.where(mask, jnp.where(jnp.isnan(s), lowest, s), np.nan)

    return jax.tree.map(sink, masks, scores)


def _table(
    spec: SparsitySpec, schedule: Schedule, params: Params, sticky: bool
) -> dict[str, jax.Array]:
    """Parameter -> number of units that stay after each update, as data."""
    table = counts(spec, params, schedule.sparsities(spec.sparsity))
    if sticky:
        # Shares rounded to a common total may give one parameter 1 more at a higher sparsity, which
        # masks that only shrink cannot; so they keep that one from before.
        table = {n: np.maximum.accumulate(rows[::-1])[::-1] for n, rows in table.items()}
    return {name: jnp.asarray(rows, jnp.int32) for name, rows in table.items()}


def _falling(spec: SparsitySpec, schedule: Schedule, sticky: bool) -> None:
    levels = schedule.sparsities(spec.sparsity)
    falls = [(a, b) for a, b in zip(levels, levels[1:], strict=False) if b < a]
    if sticky and falls:
        raise ValueError(
            f"{schedule!r} goes from sparsity {falls[0][0]} to {falls[0][1]}, but sticky masks "
            "only shrink. Let sparsities rise, or weights return: pruned(..., sticky=False)."
        )


def _renewed(
    due: jax.Array, renew: Callable[[], Any], state: PrunedState, params: Params
) -> tuple[Any, Any]:
    """Masks and inner state, made anew and cleared if due."""

    def anew() -> tuple[Any, Any]:
        masks = renew()
        return masks, _cleared(state.inner, jax.tree.map(_in_form_of, masks, params))

    return jax.lax.cond(due, anew, lambda: (state.masks, state.inner))


def _in_form_of(mask: jax.Array, w: Any) -> Any:
    """A mask in the form of its parameter: of a compound its values have it, its scales none."""
    if not np.ndim(mask):
        return mask
    return trees.over_values(lambda _: mask, jax.tree.map(lambda _: np.True_, w))


def _cleared(inner: Any, masks: Any) -> Any:
    """The inner state with zeros where masks are False, in all that is one number per weight.

    That is an array of the shape of a parameter whose path ends with the parameter's, such as
    `mu/layer/kernel`: moments, averages and copies, whoever keeps them. Factored moments have other
    shapes, and hold sums over weights that are still there.
    """
    known = {tuple(path): m for path, m in jax.tree_util.tree_flatten_with_path(masks)[0]}
    leaves, structure = jax.tree_util.tree_flatten_with_path(inner)
    return structure.unflatten([_cleared_leaf(known, tuple(path), x) for path, x in leaves])


def _cleared_leaf(known: dict[tuple, jax.Array], path: tuple, x: Any) -> Any:
    ends = (path[i:] for i in range(len(path) + 1))
    mask = next((known[end] for end in ends if end in known), None)  # of the longest path
    if mask is None or not np.ndim(mask) or np.shape(mask) != np.shape(x):
        return x
    return jnp.where(mask, x, 0) if trees.is_floating(x) else x


def _erased(mask: jax.Array, update: Any, w: Any) -> Any:
    """The update where the mask is True, elsewhere what takes a weight to zero."""
    if not np.ndim(mask):
        return update

    def erased(update: Any, w: Any) -> jax.Array:
        # In the wider dtype: w minus bfloat16(w) is not zero for a float32 w.
        dtype = common_dtype(w, update)
        return jnp.where(mask, update.astype(dtype), -w.astype(dtype))

    return trees.over_values(erased, update, w)


def _adds_up(score: Score, state: Any, params: Params) -> bool:
    """True if what a score remembers depends on gradients.

    Read from the equations of `update(state, grads, params)`: leaves of the new state are traced
    back to leaves of the arguments, of which those of `grads` come after those of `state`.
    """
    sizes = [len(jax.tree.leaves(tree)) for tree in (state, params)]
    of_grads = set(range(sizes[0], sum(sizes)))
    sources = jax.tree.leaves(
        reach(trace(score.update, state, params, params)),
        is_leaf=lambda x: isinstance(x, frozenset),
    )
    return any(source & of_grads for source in sources)


def _check_inside(inner_state: Any, name: str, needs_gradients: bool) -> None:
    why = "its steps would be parts, whose gradients are not yet those of a step."
    refuse_inside(inner_state, MultiStepsState, name, why)
    once = "Wrap the optimizer once, with one spec for all parameters."
    refuse_inside(inner_state, PrunedState, name, "two specs would undo one another.", once)
    if needs_gradients:
        why = "gradients in here carry the factor of the loss scale, which changes between steps."
        refuse_inside(inner_state, LossScaleState, name, why)


def _is_finite(grads: Params) -> jax.Array:
    finite = trees.is_finite(grads)
    axes = sorted(varying_axes(finite))
    if axes:
        raise ValueError(
            f"gradients vary over the manual axes {axes}, and masks are ranked over whole arrays. "
            "Call `update` outside of the shard_map: under jit arrays may be sharded any way."
        )
    return finite


def _check_params(params: Params | None) -> None:
    if params is None:
        raise ValueError(
            "pruning needs the parameters, since it ranks and erases them. Pass them: "
            "update(grads, state, params)."
        )
