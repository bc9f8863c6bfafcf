"""A step or none: whether gradients are good, on all devices alike, and what happens if not."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.loss import Mean
from unitscale_jax.mesh_axes import devices_over, varying, varying_axes
from unitscale_jax.optimizer._order import check_scalar
from unitscale_jax.typing import Params

# ------------------------------------------------------------------------------ a step, or none


def step_or_skip(
    when: jax.Array, step: Callable[[Any, Any], tuple[Any, Any]], updates: Any, state: Any
) -> tuple[Any, Any]:
    """Takes a step, or leaves every bit of parameters and state as it is.

    Args:
        when: Whether to take it, a boolean scalar.
        step: `(updates, state) -> (updates, state)`, such as the update of an optax transform.
        updates: What `step` gets, such as gradients.
        state: The state before.

    Returns:
        `step(updates, state)`, or updates of -0.0 and the same state. Inside `shard_map` both
        differ over every mesh axis that `when` or the results of `step` differ over.

    Raises:
        TypeError: `step` changes the structure of the state, or the shape or dtype of a leaf.

    Example:
        >>> tx, params = optax.sgd(1.0, momentum=0.9), jnp.float32(-0.0)
        >>> updates, state = step_or_skip(jnp.array(False), tx.update, params + 3, tx.init(params))
        >>> optax.apply_updates(params, updates).item()
        -0.0
    """
    new_updates, new_state = jax.eval_shape(step, updates, state)
    _check_state(state, new_state)
    # Branches have to agree in the manual axes that they vary over. JAX does not add those of the
    # predicate by itself.
    own = varying_axes(when)
    over = lambda *xs: sorted(own.union(*map(varying_axes, xs)))
    axes = jax.tree.map(over, (new_updates, state), (new_updates, new_state))
    typed = lambda tree: jax.tree.map(varying, tree, axes)

    def skip(updates: Any, state: Any) -> tuple[Any, Any]:
        del updates
        return typed((jax.tree.map(no_update, new_updates), state))

    return jax.lax.cond(when, lambda *args: typed(step(*args)), skip, updates, state)


def common_dtype(p: Any, update: Any) -> np.dtype:
    """The wider dtype of a parameter and its update, which is added in it."""
    with jax.numpy_dtype_promotion("standard"):  # strict promotion has none for two of 16 and 32
        return jnp.promote_types(jnp.result_type(p), update.dtype)


def no_update(update: Any) -> jax.Array:
    """Minus zero, because x + -0.0 is x for every x, whereas -0.0 + 0.0 is 0.0."""
    return jnp.full(update.shape, -0.0).astype(update.dtype)


def _check_state(old: Any, new: Any) -> None:
    change = trees.difference(old, new)
    if change:
        name, was, now = change
        raise TypeError(
            f"the inner transform changes its state {name!r} from {was} to {now}; a step that can "
            "be skipped needs both to be the same. Initialize with the parameters you update; if "
            "they are 16 bits wide and gradients float32, wrap it: "
            "loss_scaled(low_precision_weights(inner, ...), ...)."
        )


# ------------------------------------------------------------------------- what gradients are like


class Flaws(NamedTuple):
    """What is wrong with the gradients of a step, the same on all devices.

    Attributes:
        bad: Flags in the structure of the gradients: which of them are not finite.
        some: Whether anything is not finite, or was left out before.
        all: Whether there is nothing to step by: some gradient is not finite, or no part is left.
    """

    bad: Any
    some: jax.Array
    all: jax.Array


def flaws(
    grads: Params, flags: Any, dropped: Any, *beside: Any, axes: Sequence[str] | None = None
) -> Flaws:
    """Looks for what is not finite, with one reduction over devices.

    Args:
        grads: The gradients.
        flags: Flags as they were before: a scalar for each gradient, or one for each layer of a
            stack of them. Those that come have their shapes.
        dropped: The term "dropped" of an accumulation that leaves bad parts out, or a count.
        beside: Trees of numbers without which there is no step either, such as a weight.
        axes: Manual mesh axes that devices have to agree along; None: those that the gradients
            differ over. Without the checks of `shard_map` nothing says what differs between
            devices, so then it is all manual axes.

    Raises:
        ValueError: The gradients have another structure than the flags, or vary over a manual axis
            that `axes` lacks.
    """
    check_scalar("dropped", dropped.total if isinstance(dropped, Mean) else dropped)
    names = lambda tree: jax.tree.map(lambda _: 0, tree)
    check_gradients(names(grads), names(flags))
    bad = jax.tree.map(_is_bad, flags, grads)
    some, useless = _is_any(dropped), none_left(dropped) | ~trees.is_finite(beside)
    vector = jnp.concatenate([jnp.ravel(x) for x in (*jax.tree.leaves(bad), some, useless)])
    *found, some, useless = _split(_anywhere(vector, axes), [*jax.tree.leaves(bad), some, useless])
    useless = functools.reduce(jnp.logical_or, map(jnp.any, found), useless)
    return Flaws(jax.tree.unflatten(jax.tree.structure(bad), found), some | useless, useless)


def none_left(dropped: Any) -> jax.Array:
    """Whether accumulation dropped every part; a count does not say of how many."""
    if not isinstance(dropped, Mean):
        return jnp.array(False)
    return jnp.asarray(dropped.total) >= jnp.asarray(dropped.weight)


def check_gradients(grads: Any, like: Any) -> None:
    """Raises `ValueError` naming the first gradient without its parameter's name or shape."""
    change = trees.difference(like, grads, dtypes=False)
    if change:
        name, was, now = change
        raise ValueError(
            f"the gradient of {name or 'the parameters'!r} is {now}, and the parameter is {was}. "
            "Pass gradients of the parameters that the optimizer was initialized with."
        )


def without_scale(grads: Params, scale: jax.Array) -> Params:
    """Gradients without the factor that they carry, in their dtypes."""

    def unscale(g: jax.Array) -> jax.Array:
        if not _is_inexact(g):
            return g
        # In float32 at least: 1/S may be below float16's range where g/S is not.
        wide = trees.wide(g.dtype)
        return (g.astype(wide) * inverse.astype(wide)).astype(g.dtype)

    inverse = 1 / scale  # exact, since both are powers of two
    return jax.tree.map(unscale, grads)


def _is_bad(flag: jax.Array, g: jax.Array) -> jax.Array:
    """Inf - inf is NaN and NaN stays, so the sum over parts is checked once for all of them."""
    if not _is_inexact(g):
        return jnp.zeros_like(flag)
    inside = tuple(range(jnp.ndim(flag), jnp.ndim(g)))
    return ~jnp.all(jnp.isfinite(g), axis=inside)


def _is_inexact(g: jax.Array) -> bool:
    return jnp.issubdtype(jnp.result_type(g), jnp.inexact)


def _is_any(dropped: Any) -> jax.Array:
    return jnp.asarray(dropped.total if isinstance(dropped, Mean) else dropped) > 0


def _anywhere(flags: jax.Array, axes: Sequence[str] | None) -> jax.Array:
    """Flags that are set on any device along `axes`."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    own = varying_axes(flags)
    if axes is not None and own - set(axes):
        forgotten = sorted(own - set(axes))
        raise ValueError(
            f"gradients vary over the manual axes {forgotten}, which mesh_axis={tuple(axes)} "
            f"lacks: devices would disagree about the scale. Pass mesh_axis={(*axes, *forgotten)}."
        )
    over = sorted(own) if axes is None else [*axes]
    devices_over(over)
    # Without the checks of `shard_map` not even the index of a device varies, by its type.
    if not any(varying_axes(jax.lax.axis_index(axis)) for axis in manual):
        over = [*dict.fromkeys((*over, *manual))]
    # A sum takes only values that vary over all of its axes.
    whole = lambda x: jax.lax.psum(varying(x.astype(jnp.int32), over), tuple(over)) > 0
    return whole(flags) if over else flags


def _split(vector: jax.Array, like: list[Any]) -> list[jax.Array]:
    """The arrays that were joined to one."""
    ends = list(itertools.accumulate(int(np.prod(jnp.shape(x))) for x in like))
    pieces = zip([0, *ends], ends, like, strict=False)
    return [jnp.reshape(vector[i:k], jnp.shape(x)) for i, k, x in pieces]
