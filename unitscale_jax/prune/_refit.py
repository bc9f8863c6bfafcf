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
from unitscale_jax.prune._surgeon import least_squares
from unitscale_jax.statistics import Stat, required, warn_unseen
from unitscale_jax.trace.params import MatrixForm, from_matrices, to_matrices


def refit(params: Any, stats: Mapping[str, Stat], masks: Any, damp: float = 0.01) -> Any:
    """The weights on given masks whose products are closest to those of `params`: least squares.

    Weights of inputs that no row used stay as they are.
    One system of K equations for each output, so it costs K / 3 times as much as `sparsegpt`.

    Args:
        params: A pytree of parameters, dense.
        stats: Of `calibrate(.., collect=("hessian",))`.
        masks: Of any kind, a scalar for a parameter that stays.
        damp: What is added to the diagonal of H, in parts of its mean; with it weights that the
            data says nothing about stay near what they are.

    Returns:
        Parameters, exactly zero outside of the masks.

    Raises:
        ValueError: A parameter with a mask has no second moments, or they are singular.

    Warns:
        UserWarning: No row used any input of a whole layer or expert.

    Law: with damp zero no other weights on these masks have a smaller ||X (W' - W)||^2.

    Example:
        >>> fn = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.array([[1.0], [0.5]])}, jnp.array([[1.0, 1.0], [2.0, 2.0]])
        >>> stats = us.calibrate(fn, params, [(x,)], ["w"], collect=("hessian",))
        >>> masks = {"w": jnp.array([[False], [True]])}
        >>> refit(params, stats, masks, damp=0.0)["w"].round(1).tolist()
        [[0.0], [1.5]]
    """
    leaves = trees.named_leaves(params, is_leaf=trees.is_compound)
    of_leaf = dict(zip(leaves, jax.tree.leaves(masks), strict=True))
    chosen = [name for name, mask in of_leaf.items() if np.ndim(mask)]
    required(stats, "hessian", params, chosen)
    done = dict(leaves)
    for name in chosen:
        stat, mask = stats[name], jnp.asarray(of_leaf[name])
        warn_unseen(name, stat, "kept as they are on the mask")
        done[name] = _refitted(leaves[name], mask, stat.matrices, damp, stat.layout)
        if not bool(jnp.isfinite(done[name]).all()):
            raise ValueError(singular(name, [damp]))
    return trees.by_names(done, params)


def singular(name: str, tried: Sequence[float]) -> str:
    """The message for moments that have no factor."""
    return (
        f"the second moments of what meets {name} are singular in float32 at damp "
        f"{', '.join(f'{d:g}' for d in tried)}; give more batches, or a larger damp."
    )


@functools.partial(jax.jit, static_argnums=4)
def _refitted(
    w: jax.Array, mask: jax.Array, h: jax.Array, damp: float, layout: MatrixForm
) -> jax.Array:
    columns, kept = to_matrices(w.astype(jnp.float32), layout), to_matrices(mask, layout)
    new = jax.vmap(functools.partial(least_squares, damp=damp))(columns, h, kept)
    return from_matrices(new, layout, w.shape).astype(w.dtype)
