"""Accumulation across loop steps, as an optax transform.

    total += w g;  W += w;   on every `parts`-th step, or on `flush`:  inner.update(total / W)

For loops that get one part at a time. Exact for one weight; for several terms of different
denominators, or when all parts are at hand, use `accumulated`, which also reduces over devices
once.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unitscale_jax.errors import expected, wrong_shape
from unitscale_jax.loss import Mean, check_params, inverse, to_accumulator
from unitscale_jax.optimizer import (
    LossScaleState,
    MultiStepsState,
    applied,
    check_gradients,
    check_optimizer,
    check_scalar,
    check_state,
    find_state,
    flaws,
    step_or_skip,
)
from unitscale_jax.trace.program import compiled_once, is_concrete
from unitscale_jax.typing import DType, Params


def multi_steps(
    inner: optax.GradientTransformation, parts: int | Callable[[jax.Array], Any]
) -> optax.GradientTransformationExtraArgs:
    """Feeds `inner` the mean gradient of every `parts` steps, and nothing in between.

    It is called as `update(grads, state, params, weight=1.0, flush=False, value=None, dropped=0,
    **extra)`: `weight` is what this part weighs (its tokens), `flush=True` ends the window now (at
    the end of the data), and the window's weighted mean of `value`, given with every part or with
    none, reaches `inner`, for rules that watch the loss. A part whose gradients, weight or value
    are not finite, or of which `dropped` (as in `loss_scaled`) leaves nothing, is left out and
    counted, on all devices alike, but uses its place in the window.

    Order of wrappers, innermost first: chain -> low_precision_weights -> pruned -> multi_steps ->
    loss_scaled -> sharded. `multi_steps(loss_scaled(..))` works, too: the same updates bit for bit
    wherever nothing overflows. There an overflow costs a part its place in the window, and lowers
    the scale when the window ends; `loss_scaled(multi_steps(..))` skips the part and lowers the
    scale at once, and the window waits for another.

    Args:
        inner: Any optax transform; it runs on the emitting step only, and gets float32 gradients.
        parts: Number of parts, or a schedule that maps the number of updates so far to it.

    Returns:
        An optax transform. On steps that do not emit, updates are -0.0 and the inner state is
        untouched, so that no bit of parameters changes. State: `MultiStepsState`.

    Raises:
        ValueError: Here, `parts` is no positive int and no function of one argument. In `update`,
            a schedule returns no integer; a gradient is not that of a parameter; `weight` is no
            scalar, or negative.
        TypeError: In `update`, `inner` changes the shape or dtype of its own state.

    Example:
        >>> tx = us.multi_steps(optax.sgd(0.1), 2)
        >>> state = tx.init(jnp.float32(0.0))
        >>> for grad in (1.0, 3.0):
        ...     update, state = tx.update(jnp.float32(grad), state)
        ...     print(f"{float(update):.1f}")
        -0.0
        -0.2
    """
    check_optimizer(inner, "multi_steps")
    _check_parts(parts)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Params) -> MultiStepsState:
        check_params(params)
        return _started(params, inner.init(params))

    def update_fn(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        weight: Any = 1.0,
        flush: Any = False,
        value: Any = None,
        dropped: Mean | jax.Array | int = 0,
        **extra: Any,
    ) -> tuple[Params, MultiStepsState]:
        check_state(state, MultiStepsState, "multi_steps")
        check_gradients(updates, state.total)
        state = _take(state, updates, jnp.asarray(weight, jnp.float32), value, dropped)
        target = _checked_target(parts(state.step)) if callable(parts) else parts
        ready = (state.part >= target) | jnp.asarray(flush)
        emit = ready & (state.weight > 0)
        if value is not None:
            extra["value"] = state.value * inverse(state.value_weight)
        if find_state(state.inner, LossScaleState):
            # The scale inside has to fall for what never reached it, and most of all if that is
            # the whole window: it would rise with each window that is clean, until none is.
            emit |= ready & (state.lost > 0)
            extra["dropped"] = Mean(
                state.lost, jnp.where(state.weight > 0, state.lost + 1, state.lost)
            )

        def step(total: Params, inner_state: Any) -> tuple[Params, Any]:
            share = inverse(state.weight)
            mean = jax.tree.map(lambda t: t * share.astype(t.dtype), total)
            return inner.update(mean, inner_state, params, **extra)

        updates, inner_state = step_or_skip(emit, step, state.total, state.inner)
        return updates, _restarted(state, ready, emit)._replace(
            applied=_judged(state.applied, emit, inner_state), inner=inner_state
        )

    compiled_fn = compiled_once(update_fn)

    @functools.wraps(update_fn)
    def checked_fn(*args: Any, weight: Any = 1.0, **options: Any) -> tuple[Params, MultiStepsState]:
        _check_weight(weight)  # out here, where its number is known
        for name in ("value", "flush"):
            if options.get(name) is not None:
                check_scalar(name, options[name])
        return compiled_fn(*args, weight=weight, **options)

    return optax.GradientTransformationExtraArgs(init_fn, checked_fn)


def _started(params: Params, inner_state: Any) -> MultiStepsState:
    """The state before the first part; no two of its leaves share a buffer."""

    def zero(dtype: DType) -> jax.Array:
        return jnp.zeros((), dtype)

    return MultiStepsState(
        part=zero(jnp.int32),
        step=zero(jnp.int32),
        weight=zero(jnp.float32),
        total=jax.tree.map(lambda p: to_accumulator(jnp.zeros_like(p)), params),
        value=zero(jnp.float32),
        value_weight=zero(jnp.float32),
        dropped=zero(jnp.int32),
        lost=zero(jnp.int32),
        bad=jax.tree.map(lambda _: zero(bool), params),
        applied=jnp.array(True),
        inner=inner_state,
    )


def _take(
    state: MultiStepsState, grads: Params, weight: jax.Array, value: Any, dropped: Any
) -> MultiStepsState:
    """Adds one part to the window, or counts it as dropped."""
    begins = state.part == 0
    fresh = jax.tree.map(lambda flag: flag & ~begins, state.bad)
    counts = jnp.where(weight < 0, jnp.nan, weight)  # a traced weight is known too late to refuse
    beside = (counts,) if value is None else (counts, jnp.asarray(value, jnp.float32))
    found = flaws(grads, fresh, dropped, *beside)
    weight = jnp.where(found.all, 0, weight)

    def add(total: jax.Array, x: jax.Array) -> jax.Array:
        # Selected, not multiplied by a weight of 0, since 0 times NaN is NaN.
        new = weight.astype(total.dtype) * x.astype(total.dtype)
        return total + jnp.where(found.all, 0, new)

    state = state._replace(
        part=state.part + 1,
        weight=state.weight + weight,
        total=jax.tree.map(add, state.total, jax.tree.map(jnp.asarray, grads)),
        dropped=state.dropped + found.all.astype(jnp.int32),
        lost=state.lost + found.some.astype(jnp.int32),
        bad=jax.tree.map(jnp.logical_or, fresh, found.bad),
        applied=~found.all,
    )
    if value is None:
        return state
    return state._replace(
        value=add(state.value, beside[-1]), value_weight=state.value_weight + weight
    )


def _restarted(state: MultiStepsState, ready: jax.Array, emit: jax.Array) -> MultiStepsState:
    """The state of the next window, if this one is full or was flushed."""

    def zero_if_ready(x: jax.Array) -> jax.Array:
        return jnp.where(ready, jnp.zeros((), x.dtype), x)

    return state._replace(
        part=zero_if_ready(state.part),
        step=state.step + (emit & (state.weight > 0)).astype(jnp.int32),
        weight=zero_if_ready(state.weight),
        total=jax.tree.map(zero_if_ready, state.total),
        value=zero_if_ready(state.value),
        value_weight=zero_if_ready(state.value_weight),
        lost=zero_if_ready(state.lost),
    )


def _judged(good: jax.Array, emit: jax.Array, inner_state: Any) -> jax.Array:
    """True if the part counts, and if it ended its window, if that was a step."""
    taken = applied(inner_state)
    return good if taken is None else good & (taken | ~emit)


def _check_parts(parts: Any) -> None:
    if callable(parts):
        try:
            inspect.signature(parts).bind(0)
        except TypeError:
            raise ValueError(
                f"{expected('`parts`', parts, _PARTS)} It is called with the number of updates."
            ) from None
        except ValueError:  # some builtin, which has no signature
            return
    elif isinstance(parts, bool) or not isinstance(parts, int | np.integer) or parts < 1:
        raise ValueError(expected("`parts`", parts, _PARTS))


_PARTS = "a positive int, or a schedule of them that takes one argument"


def _checked_target(parts: Any) -> jax.Array:
    target = jnp.asarray(parts)
    if target.shape or not jnp.issubdtype(target.dtype, jnp.integer):
        raise ValueError(
            f"{expected('what the schedule `parts` returned', target, 'an integer scalar')} Round "
            "it: lambda step: schedule(step).astype(jnp.int32)."
        )
    return target


def _check_weight(weight: Any) -> None:
    if hasattr(weight, "shape") and weight.shape:
        raise ValueError(
            f"{wrong_shape('`weight`', jnp.shape(weight), ())} Pass the sum over the part's rows."
        )
    check_scalar("weight", weight)
    if is_concrete(weight) and weight < 0:
        raise ValueError(
            f"{expected('`weight`', weight, 'what the part weighs, at least 0')} A part that does "
            "not count has the weight 0."
        )
