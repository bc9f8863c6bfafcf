"""The best weights on a given mask: least squares against the dense products.

    W' = argmin ||X (W' - W)||^2,    W' zero outside of the mask

Whatever the mask comes from (magnitude, Wanda, blocks), this is the most that the weights left can
make up for, layer by layer.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.prune._activations import Moments, check_moments, check_second, matrices_of
from unitscale_jax.prune._surgeon import least_squares
from unitscale_jax.trace import Layout, canonical, uncanonical


def refit(params: Any, moments: Mapping[str, Moments], masks: Any, damp: float = 0.01) -> Any:
    """The weights on given masks whose products are closest to those of `params`: least squares.

    One system of K equations for each output, so it costs K / 3 times as much as `sparsegpt`.

    Args:
        params: A pytree of parameters, dense.
        moments: Of `calibrate(.., what="hessian")`.
        masks: Of any kind, a scalar for a parameter that stays.
        damp: What is added to the diagonal of H, in parts of its mean; with it weights that the
            data says nothing about stay near what they are.

    Returns:
        Parameters, exactly zero outside of the masks.

    Raises:
        ValueError: A parameter with a mask has no second moments, or they are singular.

    Law: with damp zero no other weights on these masks have a smaller ||X (W' - W)||^2.

    Example:
        >>> fn = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.array([[1.0], [0.5]])}, jnp.array([[1.0, 1.0], [2.0, 2.0]])
        >>> moments = us.prune.calibrate(fn, params, [x], ["w"], what="hessian")
        >>> masks = {"w": jnp.array([[False], [True]])}
        >>> refit(params, moments, masks, damp=0.0)["w"].round(1).tolist()
        [[0.0], [1.5]]
    """
    leaves = trees.named_leaves(params, is_leaf=trees.is_compound)
    of_leaf = dict(zip(leaves, jax.tree.leaves(masks), strict=True))
    chosen = [name for name, mask in of_leaf.items() if np.ndim(mask)]
    check_moments(moments, params)
    check_second(chosen, moments)
    done = dict(leaves)
    for name in chosen:
        h = matrices_of(moments[name])
        layout = moments[name].layout
        done[name] = _refitted(leaves[name], jnp.asarray(of_leaf[name]), h, damp, layout)
        if not bool(jnp.isfinite(done[name]).all()):
            raise ValueError(singular(name, [damp]))
    structure = jax.tree.structure(params, is_leaf=trees.is_compound)
    return structure.unflatten(list(done.values()))


def singular(name: str, tried: Sequence[float]) -> str:
    """The message for moments that have no factor."""
    return (
        f"the second moments of what meets {name} are singular in float32 at damp "
        f"{', '.join(f'{d:g}' for d in tried)}; give more batches, or a larger damp."
    )


@functools.partial(jax.jit, static_argnums=4)
def _refitted(
    w: jax.Array, mask: jax.Array, h: jax.Array, damp: float, layout: Layout
) -> jax.Array:
    one = lambda w, h, mask: least_squares(w, h, mask, damp)
    new = jax.vmap(one)(canonical(w.astype(jnp.float32), layout), h, canonical(mask, layout))
    return uncanonical(new, layout, w.shape).astype(w.dtype)
