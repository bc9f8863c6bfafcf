"""Dense weights behind a sparse forward pass: what is pruned still learns, and may return.

    forward  y = f(m ? w : 0),  m the masks of |w|          backward  w̄ = the gradient at m ? w : 0
    SR-STE   w̄ + decay (m ? 0 : w)

The gradient passes straight through the mask. SR-STE pulls pruned weights toward zero, so that
masks settle (https://arxiv.org/abs/2102.04010). When training ends, `prune(params, masks)` bakes
the masks in: the plain function of it is the masked one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unitscale_jax import fwd_bwd, tree as trees
from unitscale_jax.errors import check_type
from unitscale_jax.loss import around
from unitscale_jax.optimizer import LossScaleState, PrunedState, check_optimizer, refuse_inside
from unitscale_jax.prune._scores import magnitude
from unitscale_jax.prune._spec import SparsitySpec, make_masks
from unitscale_jax.typing import Apply, Params


def masked_straight_through(apply: Apply, spec: SparsitySpec) -> Apply:
    """The function at the parameters pruned by magnitude, with gradients for all of them.

    Masks are made anew at every call, from the parameters of that call.

    Args:
        apply: A function whose first argument is the parameters.
        spec: What to prune.

    Returns:
        A function of the same signature. Its parameters stay dense.

    Raises:
        ValueError: The spec does not fit the parameters.

    Laws: it is `apply` at `prune(params, magnitude_masks(params, spec))`, bit for bit; its gradient
    is that of `apply` at that point, of every weight.

    Example:
        >>> spec = us.prune.SparsitySpec(patterns={"w": us.prune.Unstructured()}, sparsity=0.5)
        >>> fn = masked_straight_through(lambda params, x: jnp.sum(params["w"] * x), spec)
        >>> value, grads = jax.value_and_grad(fn)({"w": jnp.array([3.0, 1.0])}, jnp.ones(2))
        >>> value.item(), grads["w"].tolist()
        (3.0, [1.0, 1.0])
    """

    @around(apply, "masked_straight_through")
    def masked_fn(params: Params, *inputs: Any, **kwargs: Any) -> Any:
        masks = magnitude_masks(params, spec)
        return apply(jax.tree.map(_through, masks, params), *inputs, **kwargs)

    return masked_fn


def sr_ste(
    tx: optax.GradientTransformation, spec: SparsitySpec, *, decay: float = 2e-4
) -> optax.GradientTransformationExtraArgs:
    """Decays what `masked_straight_through` prunes, before an optimizer sees the gradient.

    Args:
        tx: Any optax transform.
        spec: That of `masked_straight_through`.
        decay: How much of a pruned weight is added to its gradient.

    Returns:
        A transform whose `update(grads, state, params, **extra)` needs the parameters; its state is
        that of `tx`.

    Raises:
        ValueError: `decay` is negative. At `init`, `tx` holds a loss scale or masks. In `update`,
            no parameters, or the spec does not fit them.

    Example:
        >>> spec = us.prune.SparsitySpec(patterns={"w": us.prune.Unstructured()}, sparsity=0.5)
        >>> tx, params = sr_ste(optax.sgd(1.0), spec, decay=0.5), {"w": jnp.array([3.0, 1.0])}
        >>> updates, _ = tx.update({"w": jnp.zeros(2)}, tx.init(params), params)
        >>> updates["w"].tolist()
        [-0.0, -0.5]
    """
    check_optimizer(tx, "sr_ste")
    if not decay >= 0:
        raise ValueError(f"decay is {decay}; it is how fast pruned weights go to zero, at least 0.")
    inner = optax.with_extra_args_support(tx)

    def init_fn(params: Params) -> Any:
        state = inner.init(params)
        why = "the decay of a weight would be added to a gradient that carries a factor."
        refuse_inside(state, LossScaleState, "sr_ste", why)
        once = "Take masked_straight_through with sr_ste, or pruned."
        refuse_inside(state, PrunedState, "sr_ste", "it decays weights that masks erase.", once)
        return state

    def update_fn(
        updates: Params, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Params, Any]:
        if params is None:
            raise ValueError(
                "sr_ste decays the parameters: pass them, update(grads, state, params)."
            )
        pull = functools.partial(_pulled, decay)
        updates = jax.tree.map(pull, magnitude_masks(params, spec), updates, params)
        return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def magnitude_masks(params: Params, spec: SparsitySpec) -> Any:
    """The masks by |w|: those `masked_straight_through` uses, and that bake its parameters.

    Args:
        params: A pytree of parameters.
        spec: What to prune.

    Returns:
        Masks as `make_masks` gives them; they have no gradient.

    Raises:
        ValueError: The spec does not fit the parameters.

    Example:
        >>> spec = us.prune.SparsitySpec(patterns={"w": us.prune.Unstructured()}, sparsity=0.5)
        >>> magnitude_masks({"w": jnp.array([3.0, 1.0])}, spec)["w"].tolist()
        [True, False]
    """
    check_type("spec", spec, SparsitySpec, "a us.prune.SparsitySpec")
    still = jax.tree.map(jax.lax.stop_gradient, params)
    return make_masks(magnitude().value((), None, still, 0), spec)


def _through(mask: jax.Array, w: Any) -> Any:
    if not np.ndim(mask):
        return w
    return trees.over_values(lambda x: fwd_bwd.straight_through(jnp.where(mask, x, 0), x), w)


def _pulled(decay: float, mask: jax.Array, grad: Any, w: Any) -> Any:
    if not np.ndim(mask):
        return grad

    def pulled(grad: Any, w: Any) -> jax.Array:
        wide = trees.wide(grad.dtype)
        pull = jnp.where(mask, 0, decay * w.astype(wide))
        return (grad.astype(wide) + pull).astype(grad.dtype)

    return trees.over_values(pulled, grad, w)
