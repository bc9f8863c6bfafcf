"""Loss scaling: float16 gradients that do not vanish, and steps that survive their overflow.

    g = ∇(S · L) / S      S = 2^k,  raised after `interval` finite steps, lowered on an overflow

Float16 has no number between 0 and 2^-24, so small gradients vanish in the backward pass; a loss
multiplied by S moves them up, float32 takes them down again. Powers of two make both exact.
Bfloat16 has float32's range and needs none of this (Micikevicius et al., arXiv 1710.03740).

`us.updated(grad_fn, optimizer)` carries the factor from the one to the other; by hand it is

    scale = current_scale(opt_state)
    terms, aux, grads = grad_fn(params, batch, scale=scale)    # grads carry the factor
    norm = optax.global_norm(unscaled(grads, opt_state))       # the state that gave the factor
    updates, opt_state = optimizer.update(grads, opt_state, params)
    batch_stats = unless_skipped(opt_state, aux["state"], batch_stats)
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey, SequenceKey

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_type, shown
from unitscale_jax.loss import Mean
from unitscale_jax.mesh_axes import names_of
from unitscale_jax.optimizer import (
    LossScaleState,
    applied,
    check_optimizer,
    check_state,
    find_state,
    flaws,
    step_or_skip,
    verdicts,
    without_scale,
)
from unitscale_jax.precision._scale import DynamicScale, StaticScale
from unitscale_jax.trace.program import compiled_once, is_concrete
from unitscale_jax.typing import MeshAxis, Params

Scale: TypeAlias = StaticScale | DynamicScale


def loss_scaled(
    inner: optax.GradientTransformation, spec: Scale, *, mesh_axis: MeshAxis = ()
) -> optax.GradientTransformationExtraArgs:
    """Unscales gradients, skips a step that overflowed, and adapts the scale.

    Order of wrappers, innermost first: chain -> low_precision_weights -> pruned -> multi_steps ->
    loss_scaled -> sharded. So clipping sees true gradients, and so do scores of pruning.

    Args:
        inner: The optimizer. It sees unscaled gradients, and only finite ones.
        spec: `StaticScale(2**k)` or `DynamicScale(...)`.
        mesh_axis: Inside `shard_map`, the names of **all** manual axes, those that split the data
            and those that split parameters: a step is skipped everywhere or nowhere.

    Returns:
        A transform whose `update(grads, state, params, *, dropped=0, **extra)` takes gradients
        that carry the factor `current_scale(state)` (with any float dtype, which is kept).
        `dropped` is the term "dropped" of an accumulation that leaves bad parts out, or a count of
        them: the step is applied and the scale takes it for an overflow. Where the term says that
        no part was left, the step is skipped. `extra` goes to `inner`. State: `LossScaleState`.

    Raises:
        ValueError: In `update`, gradients vary over a manual axis that `mesh_axis` lacks, or are
            not those of the parameters.
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
    check_optimizer(inner, "loss_scaled")
    check_type("spec", spec, Scale, "a us.StaticScale or us.DynamicScale, built and not its class")
    axes = names_of(mesh_axis)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Params) -> Any:
        return spec.start(params, inner.init(params))

    def update_fn(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        dropped: Mean | jax.Array | int = 0,
        **extra: Any,
    ) -> tuple[Params, Any]:
        check_state(state, LossScaleState, "loss_scaled")
        # One reduction carries both: a device that dropped a part lowers the scale of them all.
        found = flaws(updates, state.bad, dropped, axes=axes)

        def step(grads: Params, inner_state: Any) -> tuple[Params, Any]:
            # Unscaling in here, not before the branch, spares a copy of the gradients.
            return inner.update(without_scale(grads, state.scale), inner_state, params, **extra)

        updates, inner_state = step_or_skip(~found.all, step, updates, state.inner)
        inner_applied = applied(inner_state)
        fields = {
            "bad": found.bad,
            "skipped": state.skipped + found.all.astype(jnp.int32),
            "applied": ~found.all if inner_applied is None else ~found.all & inner_applied,
            "inner": inner_state,
        }
        return updates, dataclasses.replace(spec.after(state, ~found.some), **fields)

    return optax.GradientTransformationExtraArgs(init_fn, compiled_once(update_fn))


def current_scale(opt_state: Any) -> jax.Array:
    """The factor that the next gradients have to carry, wherever in `opt_state` it is.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: `opt_state` holds no loss scale, or several; or it stands behind another
            transform, as in `chain(clip, loss_scaled(optimizer))`, which sees scaled gradients.

    Example:
        >>> optimizer = optax.chain(loss_scaled(optax.sgd(0.1), StaticScale(1024)))
        >>> current_scale(optimizer.init(jnp.ones(3))).item()
        1024.0
    """
    found = find_state(opt_state, LossScaleState)
    if len(found) > 1:
        raise ValueError(
            f"opt_state holds {len(found)} loss scales, and gradients carry one factor. Wrap the "
            "whole optimizer once, loss_scaled outermost."
        )
    if not found:
        kinds = {type(node).__name__ for _, node in find_state(opt_state, object)}
        kinds -= {type(leaf).__name__ for leaf in jax.tree.leaves(opt_state)}
        raise ValueError(
            f"opt_state holds no LossScaleState, only {', '.join(sorted(kinds)) or 'leaves'}. Wrap "
            "the optimizer: loss_scaled(optimizer, StaticScale(1))."
        )
    path, state = found[0]
    _check_first(opt_state, path)
    return state.scale


def unscaled(grads: Params, opt_state: Any) -> Params:
    """Gradients without the factor that they carry: to log their norm, or to look at them.

    Args:
        grads: Gradients that carry `current_scale(opt_state)`.
        opt_state: The state before the update, which gave the factor.

    Returns:
        The gradients in their dtypes. `update` takes those with the factor, not these.

    Raises:
        ValueError: As `current_scale`.

    Law: bit-equal to the gradients without a scale, where nothing over- or underflows.

    Example:
        >>> state = loss_scaled(optax.sgd(0.1), StaticScale(1024)).init(jnp.ones(2))
        >>> unscaled(current_scale(state) * jnp.array([1.5, -3.0]), state).tolist()
        [1.5, -3.0]
    """
    return without_scale(grads, current_scale(opt_state))


def unless_skipped(opt_state: Any, new: Any, old: Any) -> Any:
    """Chooses the tree that goes with a step, such as batch statistics: old if it was skipped.

    Args:
        opt_state: The state after the update. A step is skipped by `loss_scaled`, and a part left
            out by `multi_steps`; an optimizer without them skips none.
        new: A tree as the step made it, which an overflow may have filled with NaN.
        old: The tree before the step.

    Returns:
        `new` if the last step was applied, else `old`, bit for bit.

    Raises:
        ValueError: `new` and `old` differ in structure, or a leaf in shape or dtype.

    Example:
        >>> optimizer = loss_scaled(optax.sgd(0.1), DynamicScale())
        >>> state = optimizer.init(jnp.ones(2))
        >>> _, state = optimizer.update(jnp.array([1.0, jnp.inf]), state)
        >>> unless_skipped(state, jnp.float32(jnp.inf), jnp.float32(0.5)).item()
        0.5
    """
    change = trees.difference(old, new)
    if change:
        name, was, now = change
        raise ValueError(
            f"of the state after a step {name!r} is {now}, and before it was {was}; if the step is "
            "skipped, the one takes the place of the other. Return a state as it came."
        )
    good = applied(opt_state)
    return new if good is None else trees.select(good, new, old)


def overflowing(opt_state: Any, params: Params) -> list[str]:
    """Names of the parameters whose gradient was not finite in the last step, in tree order.

    Args:
        opt_state: The state after the step, with concrete arrays.
        params: The parameters, of which only the structure matters.

    Raises:
        ValueError: `opt_state` holds nothing that skips a step, or several; or is not the state of
            `params`.
        TypeError: `opt_state` is traced, as inside of `jax.jit`, or abstract.

    Example:
        >>> params = {"head": {"bias": jnp.ones(2), "kernel": jnp.ones(2)}}
        >>> optimizer = loss_scaled(optax.sgd(0.1), DynamicScale())
        >>> grads = {"head": {"bias": jnp.ones(2), "kernel": jnp.array([1.0, jnp.nan])}}
        >>> overflowing(optimizer.update(grads, optimizer.init(params))[1], params)
        ['head/kernel']
    """
    found, names = verdicts(opt_state), trees.names(params)
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} states that say which gradients were not finite, and 1 "
            "is expected. Wrap the optimizer once: loss_scaled(optimizer, DynamicScale())."
        )
    bad = trees.named_leaves(found[0].bad)
    if list(bad) != names:
        raise ValueError(
            f"params has {len(names)} leaves, but the loss scale watches {len(bad)} others. Pass "
            "the parameters that the optimizer was initialized with."
        )
    for name, flags in bad.items():
        if isinstance(flags, jax.ShapeDtypeStruct) or not is_concrete(flags):
            raise TypeError(
                f"whether the gradient of {name} was finite is {shown(flags)} that is traced or "
                "abstract; expected its value. Call us.overflowing outside of jit, on the state "
                "that the step returned; inside, us.unless_skipped(opt_state, new, old) chooses by "
                "whether the step was skipped."
            )
    return [name for name, flags in bad.items() if np.any(flags)]


def _check_first(opt_state: Any, path: tuple) -> None:
    """Raises `ValueError` if another transform of a chain sees gradients before a loss scale."""
    node = opt_state
    for k, key in enumerate(path):
        ahead = isinstance(key, SequenceKey) and key.idx > 0
        # The states of `optax.partition` and `optax.named_chain` are dicts of tuples.
        beside = isinstance(key, DictKey) and len(node) > 1
        if ahead or (beside and all(isinstance(x, tuple | LossScaleState) for x in node.values())):
            place = jax.tree_util.keystr(path[: k + 1])
            raise ValueError(
                f"the loss scale stands at opt_state{place}, so another transform sees gradients "
                "that carry its factor: a norm clipped there is that of scaled gradients. Wrap the "
                "whole chain: loss_scaled(optax.chain(clip, optimizer), spec); and pass the state "
                "of the optimizer alone."
            )
        node = _child(node, key)


def _child(node: Any, key: Any) -> Any:
    if isinstance(key, SequenceKey):
        return node[key.idx]
    return node[key.key] if isinstance(key, DictKey) else getattr(node, key.name)
