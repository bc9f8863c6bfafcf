"""Accumulation across loop steps, as an optax transform.

    total += w g;  W += w;   on every `parts`-th step, or on `flush`:  inner.update(total / W)

For loops that get one part at a time. Exact for one weight; for several terms of different
denominators, or when all parts are at hand, use `accumulated`, which also reduces over devices
once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unitscale_jax import tree as trees
from unitscale_jax.loss import check_params, inverse, to_accumulator


class MultiStepsState(NamedTuple):
    """State of `multi_steps`.

    Attributes:
        part: Parts taken of the current window, int32.
        step: Updates emitted, int32.
        weight: Sum of weights of the window, float32.
        total: Weighted sum of the window's gradients, float32 or wider, shaped as the parameters.
        value: Weighted sum of the window's `value`s, float32.
        dropped: Parts left out for not being finite, ever, int32.
        inner: State of the inner transform.
    """

    part: jax.Array
    step: jax.Array
    weight: jax.Array
    total: Any
    value: jax.Array
    dropped: jax.Array
    inner: optax.OptState


def multi_steps(
    inner: optax.GradientTransformation, parts: int | Callable[[jax.Array], Any]
) -> optax.GradientTransformationExtraArgs:
    """Feeds `inner` the mean gradient of every `parts` steps, and nothing in between.

    It is called as `update(grads, state, params, weight=1.0, flush=False, value=None, **extra)`:
    `weight` is what this part weighs (its tokens), `flush=True` ends the window now (at the end of
    the data), and the window's weighted mean of `value` reaches `inner`, for rules that watch the
    loss. A part whose gradients, weight or value are not finite is left out and counted, but uses
    its place in the window.

    Args:
        inner: Any optax transform; it runs on the emitting step only, and gets float32 gradients.
        parts: Number of parts, or a schedule that maps the number of updates so far to it.

    Returns:
        An optax transform. On steps that do not emit, updates are zero and the inner state is
        untouched, bit for bit.

    Example:
        >>> tx = us.multi_steps(optax.sgd(0.1), 2)
        >>> state = tx.init(jnp.float32(0.0))
        >>> for grad in (1.0, 3.0):
        ...     update, state = tx.update(jnp.float32(grad), state)
        ...     print(f"{float(update):.1f}")
        0.0
        -0.2
    """
    if not callable(parts) and (isinstance(parts, bool) or parts < 1):
        raise ValueError(f"`parts` is {parts!r}; expected a positive int, or a schedule of them.")
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> MultiStepsState:
        check_params(params)
        zero = lambda dtype: jnp.zeros((), dtype)
        return MultiStepsState(
            part=zero(jnp.int32),
            step=zero(jnp.int32),
            weight=zero(jnp.float32),
            total=jax.tree.map(lambda p: to_accumulator(jnp.zeros_like(p)), params),
            value=zero(jnp.float32),
            dropped=zero(jnp.int32),
            inner=inner.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        **extra: Any,
    ) -> tuple[optax.Updates, MultiStepsState]:
        weight, flush = extra.pop("weight", 1.0), extra.pop("flush", False)
        value = extra.pop("value", None)
        state = _take(state, updates, jnp.asarray(weight, jnp.float32), value)
        target = parts(state.step) if callable(parts) else parts
        ready = (state.part >= target) | jnp.asarray(flush)
        emit = ready & (state.weight > 0)
        share = inverse(state.weight)
        if value is not None:
            extra["value"] = state.value * share

        def emitted() -> tuple[optax.Updates, optax.OptState]:
            mean = jax.tree.map(lambda t: t * share.astype(t.dtype), state.total)
            return inner.update(mean, state.inner, params, **extra)

        def quiet() -> tuple[optax.Updates, optax.OptState]:
            shapes = jax.eval_shape(emitted)[0]
            return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), state.inner

        updates, inner_state = jax.lax.cond(emit, emitted, quiet)
        return updates, _restarted(state, ready, emit)._replace(inner=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _take(
    state: MultiStepsState, grads: optax.Updates, weight: jax.Array, value: Any
) -> MultiStepsState:
    """Adds one part to the window, or counts it as dropped."""
    value = jnp.zeros((), jnp.float32) if value is None else jnp.asarray(value, jnp.float32)
    ok = trees.is_finite((grads, weight, value))
    add = lambda total, x: (
        total + jnp.where(ok, weight.astype(total.dtype) * x.astype(total.dtype), 0)
    )
    return state._replace(
        part=state.part + 1,
        weight=state.weight + jnp.where(ok, weight, 0),
        total=jax.tree.map(add, state.total, grads),
        value=add(state.value, value),
        dropped=state.dropped + jnp.where(ok, 0, 1),
    )


def _restarted(state: MultiStepsState, ready: jax.Array, emit: jax.Array) -> MultiStepsState:
    zero_if_ready = lambda x: jnp.where(ready, jnp.zeros((), x.dtype), x)
    return state._replace(
        part=zero_if_ready(state.part),
        step=state.step + emit.astype(jnp.int32),
        weight=zero_if_ready(state.weight),
        total=jax.tree.map(zero_if_ready, state.total),
        value=zero_if_ready(state.value),
    )
