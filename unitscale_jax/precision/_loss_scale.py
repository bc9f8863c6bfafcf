"""Loss scaling: float16 gradients that do not vanish, and steps that survive their overflow.

    g = ∇(S · L) / S      S = 2^k,  raised after `interval` finite steps, lowered on an overflow

Float16 has no number between 0 and 2^-24, so small gradients vanish in the backward pass; a loss
multiplied by S moves them up, float32 takes them down again. Powers of two make both exact.
Bfloat16 has float32's range and needs none of this (Micikevicius et al., arXiv 1710.03740).

    scale = current_scale(opt_state)
    terms, aux, grads = grad_fn(params, batch, scale=scale)    # grads carry the factor
    updates, opt_state = optimizer.update(grads, opt_state, params)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from unitscale_jax import tree as trees
from unitscale_jax.loss import Mean
from unitscale_jax.precision._scale import DynamicScale, LossScaleState, StaticScale
from unitscale_jax.trace import varying, varying_axes
from unitscale_jax.typing import Axes, Params

Scale: TypeAlias = StaticScale | DynamicScale


def loss_scaled(
    inner: optax.GradientTransformation, spec: Scale, *, axes: Axes = ()
) -> optax.GradientTransformationExtraArgs:
    """Unscales gradients, skips a step that overflowed, and adapts the scale.

    Place it outermost, so that clipping sees true gradients.

    Args:
        inner: The optimizer. It sees unscaled gradients, and only finite ones.
        spec: `StaticScale(2**k)` or `DynamicScale(...)`.
        axes: Inside `shard_map`, the names of **all** manual axes, those that split the data and
            those that split parameters: a step is skipped everywhere or nowhere.

    Returns:
        A transform whose `update(grads, state, params, *, dropped=0, **extra)` takes gradients
        that carry the factor `current_scale(state)` (with any float dtype, which is kept).
        `dropped` is the term "dropped" of an accumulation that leaves bad parts out, or a count of
        them: the step is applied and the scale takes it for an overflow. Where the term says that
        no part was left, the step is skipped. `extra` goes to `inner`. State: `LossScaleState`.

    Raises:
        ValueError: In `update`, gradients vary over a manual axis that `axes` lacks.
        TypeError: In `update`, `inner` changes the shape or dtype of its own state.

    Gradients at scale 2^k are bit-equal to those at scale 1 when nothing over- or underflows. A
    skipped step leaves parameters, the state of `inner` and with it every schedule bit-identical.

    Example:
        >>> optimizer = loss_scaled(optax.sgd(1.0), DynamicScale(init=8, interval=1))
        >>> state = optimizer.init(jnp.float32(0))
        >>> updates, state = optimizer.update(current_scale(state) * 3, state)
        >>> updates.item(), current_scale(state).item()
        (-3.0, 16.0)
        >>> updates, state = optimizer.update(jnp.float32(jnp.inf), state)
        >>> updates == 0, current_scale(state).item(), state.skipped.item()
        (Array(True, dtype=bool), 8.0, 1)
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Params) -> Any:
        return spec.start(len(jax.tree.leaves(params)), inner.init(params))

    def update_fn(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        dropped: Mean | jax.Array | int = 0,
        **extra: Any,
    ) -> tuple[Params, Any]:
        # One reduction carries both: a device that dropped a part lowers the scale of them all.
        flags = _anywhere(jnp.concatenate([_overflows(updates), _lost(dropped)]), axes)
        bad, nothing_left = flags[:-2], flags[-1]
        finite = ~jnp.any(bad) & ~nothing_left

        def step(grads: Params, inner_state: Any) -> tuple[Params, Any]:
            # Unscaling in here, not before the branch, spares a copy of the gradients.
            return inner.update(_unscaled(grads, state.scale), inner_state, params, **extra)

        updates, inner_state = _step_or_skip(finite, step, updates, state.inner)
        state = spec.after(state, ~jnp.any(flags))
        skipped = jnp.where(finite, state.skipped, state.skipped + 1)
        return updates, dataclasses.replace(state, bad=bad, skipped=skipped, inner=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def current_scale(opt_state: Any) -> jax.Array:
    """The factor that the next gradients have to carry, wherever in `opt_state` it is.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: `opt_state` holds no loss scale, or several.

    Example:
        >>> optimizer = optax.chain(loss_scaled(optax.sgd(0.1), StaticScale(1024)))
        >>> current_scale(optimizer.init(jnp.ones(3))).item()
        1024.0
    """
    return _state_in(opt_state).scale


def overflowing(opt_state: Any, params: Params) -> list[str]:
    """Names of the parameters whose gradient was not finite in the last step, in tree order.

    Args:
        opt_state: The state after the step, with concrete arrays.
        params: The parameters, of which only the structure matters.

    Raises:
        ValueError: `opt_state` holds no loss scale or several, or is not the state of `params`.

    Example:
        >>> params = {"head": {"bias": jnp.ones(2), "kernel": jnp.ones(2)}}
        >>> optimizer = loss_scaled(optax.sgd(0.1), DynamicScale())
        >>> grads = {"head": {"bias": jnp.ones(2), "kernel": jnp.array([1.0, jnp.nan])}}
        >>> overflowing(optimizer.update(grads, optimizer.init(params))[1], params)
        ['head/kernel']
    """
    bad, names = np.asarray(_state_in(opt_state).bad), trees.names(params)
    if bad.shape != (len(names),):
        raise ValueError(
            f"params has {len(names)} leaves, but the loss scale watches {bad.shape} of them. Pass "
            "the parameters that the optimizer was initialized with, and one replica's state."
        )
    return [name for name, is_bad in zip(names, bad, strict=True) if is_bad]


def _state_in(opt_state: Any) -> LossScaleState:
    nodes: list[Any] = []
    # `is_leaf` is asked about every node on the way down, which makes it a visitor.
    jax.tree.flatten(opt_state, is_leaf=lambda node: bool(nodes.append(node)))
    found = [node for node in nodes if isinstance(node, LossScaleState)]
    if len(found) > 1:
        raise ValueError(
            f"opt_state holds {len(found)} loss scales, and gradients carry one factor. Wrap the "
            "whole optimizer once, loss_scaled outermost."
        )
    if not found:
        kinds = {type(node).__name__ for node in nodes if not jax.tree_util.all_leaves([node])}
        raise ValueError(
            f"opt_state holds no LossScaleState, only {', '.join(sorted(kinds)) or 'leaves'}. Wrap "
            "the optimizer: loss_scaled(optimizer, StaticScale(1))."
        )
    return found[0]


def _overflows(grads: Params) -> jax.Array:
    """Which leaves hold a number that is not finite, as `bool[leaves]`.

    Inf - inf is NaN and NaN stays, so the sum over parts is checked once for all of them.
    """
    no = jnp.array(False)
    is_bad = lambda g: ~jnp.all(jnp.isfinite(g)) if _is_inexact(g) else no
    flags = [is_bad(g) for g in jax.tree.leaves(grads)]
    return jnp.stack(flags) if flags else jnp.zeros(0, bool)


def _lost(dropped: Mean | jax.Array | int) -> jax.Array:
    """Whether accumulation dropped some part, and whether it dropped every one; `bool[2]`."""
    if isinstance(dropped, Mean):
        return jnp.stack([dropped.total > 0, dropped.total >= dropped.weight])
    return jnp.stack([jnp.asarray(dropped) > 0, jnp.array(False)])


def _unscaled(grads: Params, scale: jax.Array) -> Params:
    def unscale(g: jax.Array) -> jax.Array:
        if not _is_inexact(g):
            return g
        # In float32 at least: 1/S may be below float16's range where g/S is not.
        wide = trees.wide(g.dtype)
        return (g.astype(wide) * inverse.astype(wide)).astype(g.dtype)

    inverse = 1 / scale  # exact, since both are powers of two
    return jax.tree.map(unscale, grads)


def _is_inexact(g: jax.Array) -> bool:
    return jnp.issubdtype(g.dtype, jnp.inexact)


def _anywhere(flags: jax.Array, axes: Axes) -> jax.Array:
    """Flags that are set on any device along `axes`."""
    forgotten = sorted(varying_axes(flags) - set(axes))
    if forgotten:
        raise ValueError(
            f"gradients vary over the manual axes {forgotten}, which axes={tuple(axes)} lacks: "
            f"devices would disagree about the scale. Pass axes={(*axes, *forgotten)}."
        )
    if not axes:
        return flags
    # A sum takes only values that vary over all of its axes.
    return lax.psum(varying(flags.astype(jnp.int32), axes), tuple(axes)) > 0


def _step_or_skip(finite: jax.Array, step: Callable, grads: Params, state: Any) -> tuple:
    """Runs `step(grads, state)`, or gives zero updates and the same state."""
    updates, new_state = jax.eval_shape(step, grads, state)
    _check_state(state, new_state)
    # Branches have to agree in the manual axes that they vary over, so each takes the union.
    both = lambda a, b: varying_axes(a) | varying_axes(b)
    union = jax.tree.map(both, (updates, state), (updates, new_state))

    def run(grads: Params, state: Any) -> tuple:
        return jax.tree.map(varying, step(grads, state), union)

    def skip(grads: Params, state: Any) -> tuple:
        del grads
        # Minus zero, because x + -0.0 is x for every x, whereas -0.0 + 0.0 is 0.0.
        zeros = jax.tree.map(lambda u: jnp.full(u.shape, -0.0, u.dtype), updates)
        return jax.tree.map(varying, (zeros, state), union)

    return lax.cond(finite, run, skip, grads, state)


def _check_state(old: Any, new: Any) -> None:
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise TypeError(
            "the inner transform changes the structure of its state from "
            f"{jax.tree.structure(old)} to {jax.tree.structure(new)}; a step that can be skipped "
            "needs both to be the same. Initialize with the parameters you update."
        )
    before, after = jax.tree.leaves(old), jax.tree.leaves(new)
    for name, x, y in zip(trees.names(old), before, after, strict=True):
        if (jnp.shape(x), jnp.result_type(x)) != (y.shape, y.dtype):
            raise TypeError(
                f"the inner transform changes its state {name!r} from {jnp.result_type(x)}"
                f"{jnp.shape(x)} to {y.dtype}{y.shape}; a step that can be skipped needs both to "
                "be the same. If parameters are 16 bits wide and gradients float32, wrap it: "
                "loss_scaled(low_precision_weights(inner, ...), ...)."
            )
