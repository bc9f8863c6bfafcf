"""One step of training: scale, counts of dropped parts and model state travel together.

    S, g_S = scale of the state, ∇(S · L)         u = tx(g_S, dropped)         θ' = θ + u
    s'     = the loss's state if the step was taken, else s

Each of them belongs to the same step, so one function carries them. A loop that is written by hand
and forgets `scale=` trains with updates that are S times too small; this one cannot.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unitscale_jax import tree as trees
from unitscale_jax.errors import expected
from unitscale_jax.loss import Grad, Terms
from unitscale_jax.optimizer import (
    LossScaleState,
    check_optimizer,
    common_dtype,
    find_state,
    none_left,
)
from unitscale_jax.precision._loss_scale import current_scale, unless_skipped
from unitscale_jax.typing import Batch, Key, Params, State


def updated(
    grad_fn: Grad, tx: optax.GradientTransformation
) -> Callable[..., tuple[Params, Any, Terms, Any]]:
    """Joins a gradient station and an optimizer to a step.

    Args:
        grad_fn: A `us.Grad`, as `us.value_and_grad`, `us.accumulated`, `us.parallel.reduced` or
            `us.parallel.pipelined` return it.
        tx: Any optax transform, with a loss scale or without.

    Returns:
        `step(params, opt_state, batch, *, state=None, key=None, valid=None, **extra)`, a pure
        function that returns `(params, opt_state, terms, aux)`. It gives `grad_fn` the loss scale
        that `opt_state` holds, if any; `tx` the gradients that carry it, the term "dropped" if
        there is one, and `extra`, such as `weight=` for `us.multi_steps`; and adds the updates in
        the dtypes of the parameters. If the step was skipped, the model state that the loss returns
        in `aux["state"]` (or as `aux`, a container with the structure of `state`) is `state` again.

    Raises:
        TypeError: `grad_fn` is not a `Grad`, or `tx` is not an optax transform.
        ValueError: On a call, as `us.current_scale`; or the loss returns a model state of another
            structure than `state` has.

    Laws: after a skipped step parameters, the state inside of the loss scale and model state are
    the old ones, bit for bit; with a loss scale it is the step without, wherever nothing overflows.

    Example:
        >>> def loss(w, batch, *, state):
        ...     return us.Mean(batch * w, jnp.ones_like(batch)), {"state": state + batch.sum()}
        >>> tx = us.loss_scaled(optax.sgd(0.5), us.DynamicScale(init=1024.0))
        >>> step, w, seen = us.updated(us.value_and_grad(loss), tx), jnp.float32(1), jnp.float32(0)
        >>> opt_state = tx.init(w)
        >>> for batch in (jnp.array([1.0, 3.0]), jnp.array([1.0, jnp.inf])):
        ...     w, opt_state, terms, aux = step(w, opt_state, batch, state=seen)
        ...     seen = aux["state"]
        >>> w.item(), seen.item(), opt_state.skipped.item()
        (0.0, 4.0, 1)
    """
    _check(grad_fn, tx)
    tx = optax.with_extra_args_support(tx)

    def updated_fn(
        params: Params,
        opt_state: Any,
        batch: Batch,
        *,
        state: State = None,
        key: Key | None = None,
        valid: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[Params, Any, Terms, Any]:
        scaled = find_state(opt_state, LossScaleState)
        scale = current_scale(opt_state) if scaled else 1.0
        terms, aux, grads = grad_fn(params, batch, state=state, key=key, valid=valid, scale=scale)
        if "dropped" in terms:
            extra["dropped"] = terms["dropped"]
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        params = jax.tree.map(_moved, params, updates)
        return params, opt_state, terms, _kept(aux, state, terms, opt_state)

    return updated_fn


def _moved(p: Any, update: Any) -> jax.Array:
    """`p + update` in the wider of their dtypes, back in that of the parameter."""
    p, wide = jnp.asarray(p), common_dtype(p, update)
    return (p.astype(wide) + update.astype(wide)).astype(p.dtype)


def _kept(aux: Any, state: State, terms: Terms, opt_state: Any) -> Any:
    """Auxiliary outputs, in which a model state that a skipped step made is the one before it.

    So is what no part made: the mean of none is no state, whether the optimizer skips such steps.
    """
    if state is None:
        return aux
    none = none_left(terms.get("dropped", 0))

    def kept(new: Any) -> Any:
        return trees.select(none, state, unless_skipped(opt_state, new, state))

    if isinstance(aux, Mapping) and "state" in aux:
        return {**aux, "state": kept(aux["state"])}
    outline = jax.tree.structure(state)
    # A lone array beside a lone array may be any metric.
    is_state = outline == jax.tree.structure(aux) and not jax.tree_util.treedef_is_leaf(outline)
    return kept(aux) if is_state else aux


def _check(grad_fn: Any, tx: Any) -> None:
    if not isinstance(grad_fn, Grad):
        wanted = "a us.Grad, which takes the loss scale"
        raise TypeError(
            f"{expected('grad_fn', grad_fn, wanted)} Make one of a loss by us.value_and_grad(loss)."
        )
    check_optimizer(tx, "updated")
