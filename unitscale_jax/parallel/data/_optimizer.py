"""Optimizer state in shares: what ZeRO does to the update.

Gradients arrive as shares, moments are kept as shares, and only the update is made whole again,
one gather a step. All of it is the partitioner's work; here it is told where things lie.
"""

from typing import Any

import optax

from unitscale_jax.optimizer import check_optimizer
from unitscale_jax.parallel.layouts._layout import Layout, shard
from unitscale_jax.typing import Params


def sharded(
    inner: optax.GradientTransformation, layout: Layout, state: Layout | None = None
) -> optax.GradientTransformationExtraArgs:
    """Keeps an optimizer's state by one layout and returns its updates by that of the parameters.

    Order of wrappers, innermost first: chain -> low_precision_weights -> pruned -> multi_steps ->
    loss_scaled -> sharded. It changes no number, so any other place is right, too.

    Args:
        inner: The optimizer. It sees global arrays, so norms and clipping are those of one device.
        layout: The layout of the parameters.
        state: The layout of moments, and of gradients as they are used; that of the parameters if
            left out. ZeRO 1 and 2: `layout.over("dp")`; with ZeRO 3 the parameters lie so too.

    Returns:
        A transform of the same updates. After every step parameters and state lie as before it.

    Example:
        >>> params, mesh = {"w": jnp.ones((8, 6))}, us.parallel.mesh(dp=4, tp=2)
        >>> layout = us.parallel.layout(params, {}, mesh)
        >>> tx = us.parallel.sharded(optax.sgd(0.1, momentum=0.9), layout, layout.over("dp"))
        >>> state = tx.init(us.parallel.shard(params, layout))
        >>> state[0].trace["w"].addressable_shards[0].data.shape
        (2, 6)
        >>> jax.jit(tx.update)(params, state, params)[0]["w"].sharding.is_fully_replicated
        True
    """
    check_optimizer(inner, "sharded")
    inner = optax.with_extra_args_support(inner)
    held = layout if state is None else state

    def init_fn(params: Params) -> Any:
        return shard(inner.init(params), held)

    def update_fn(
        updates: Params, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Params, Any]:
        updates, state = inner.update(shard(updates, held), shard(state, held), params, **extra)
        # Shares first: else the partitioner may gather the moments to compute the whole update.
        return shard(shard(updates, held), layout), shard(state, held)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
