"""Masks on parameters: zeros where a mask is False.

    w' = where(mask, w, 0)

A mask is chosen from, never multiplied with, so whatever was under it is gone, NaN too. Masks alone
make no model smaller and no product faster: `pack` saves storage, `compact` both.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_callable
from unitscale_jax.prune._spec import quantized_message
from unitscale_jax.typing import Apply, Params


def apply_masks(params: Params, masks: Any) -> Params:
    """Sets to zero the weights that masks leave out.

    Args:
        params: A pytree of parameters.
        masks: One like it, of bool arrays; the scalar True leaves a parameter as it is.

    Returns:
        `params`, exact zeros where a mask is False, whatever was there: NaN too. Dtypes stay.

    Raises:
        ValueError: Masks of other names or shapes than the parameters; a masked parameter that is
            quantized.
        TypeError: A mask that is not bool, such as packed bits.

    Law: idempotent; its gradient is zero where the mask is False.

    Example:
        >>> masks = {"w": jnp.array([True, False])}
        >>> apply_masks({"w": jnp.array([1.0, jnp.nan])}, masks)["w"].tolist()
        [1.0, 0.0]
    """
    leaves, structure = jax.tree.flatten(params, is_leaf=trees.is_compound)
    return structure.unflatten(map(zeroed_leaf, paired(params, masks).values(), leaves))


def zeroed_leaf(mask: Any, leaf: Any) -> Any:
    """A parameter with zeros where its mask is False, its scales as they are."""
    if not np.ndim(mask):
        return leaf
    return trees.over_values(lambda x: jnp.where(mask, x, 0), leaf)


def masked(apply: Apply, masks: Any) -> Apply:
    """The function at the pruned parameters.

    Args:
        apply: A function whose first argument is the parameters.
        masks: As of `prune`.

    Returns:
        A function of the same signature. Its gradient is zero for what is pruned.

    Example:
        >>> apply = lambda params, x: params["w"] * x
        >>> masked_apply = masked(apply, {"w": jnp.array([True, False])})
        >>> masked_apply({"w": jnp.array([2.0, 3.0])}, 1.0).tolist()
        [2.0, 0.0]
    """
    check_callable("apply", apply)

    @functools.wraps(apply)
    def masked_apply(params: Params, *inputs: Any, **kwargs: Any) -> Any:
        return apply(apply_masks(params, masks), *inputs, **kwargs)

    return masked_apply


def paired(params: Params, masks: Any) -> dict[str, Any]:
    """The mask of each parameter, checked; in the order of the parameters."""
    known = trees.named_leaves(params, is_leaf=trees.is_compound)
    found = trees.named_leaves(masks)
    odd = sorted(known.keys() ^ found.keys())
    if odd:
        raise ValueError(
            f"masks and parameters differ in {', '.join(odd)}. Make masks of these parameters; "
            "what is not pruned has the scalar True."
        )
    for name, leaf in known.items():
        _check_mask(name, leaf, found[name])
    return {name: found[name] for name in known}


def _check_mask(name: str, leaf: Any, mask: Any) -> None:
    if jnp.result_type(mask) != np.bool_:
        raise TypeError(f"the mask of {name} is {jnp.result_type(mask)}; masks are bool.")
    if np.shape(mask) not in ((), np.shape(leaf)):
        raise ValueError(
            f"{name} has the shape {np.shape(leaf)}, its mask {np.shape(mask)}. Make masks of "
            "these parameters."
        )
    if np.shape(mask) and trees.values_of(leaf) is None:
        raise ValueError(quantized_message(name))
