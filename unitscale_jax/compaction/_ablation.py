"""The loss that a plan costs, by trying it.

    increase = loss(compacted, compact(params)) - loss(fn, params)

The slow and honest score of a layer, a branch or a whole plan. Plans that leave the same sizes
share one compilation, so trying every layer of a scan compiles twice.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from unitscale_jax.compaction._compact import compact
from unitscale_jax.compaction._compacted import compacted
from unitscale_jax.compaction._groups import CompactionPlan, Graph, plan_of
from unitscale_jax.errors import check_callable
from unitscale_jax.loss import Mean, Terms, evaluate, loss_value
from unitscale_jax.typing import Batch, Loss, Params


def loss_increase(
    loss: Loss, params: Params, batches: Iterable[Batch], plans: Sequence[CompactionPlan]
) -> np.ndarray:
    """Measures how much a loss rises with each of several plans, each carried out by itself.

    Args:
        loss: `loss(params, batch)`: a `us.Mean`, named ones, or a scalar mean over rows.
        params: The dense parameters.
        batches: Its batches, which are kept in memory; totals and weights are added up.
        plans: What to try. The groups must be groups of the loss, as those of the model are.

    Returns:
        (plans,) float64, negative where the loss falls.

    Raises:
        ValueError: There are no batches; a plan does not fit the loss or the parameters.

    Example:
        >>> loss = lambda p, x: jnp.mean((x @ p["up"] @ p["down"]) ** 2)
        >>> params, x = {"up": jnp.eye(2), "down": jnp.eye(2)}, jnp.array([[1.0, 3.0]])
        >>> graph = us.compaction.groups(loss, params, x)
        >>> plans = [us.compaction.plan_of(graph, {"down:0": [k]}) for k in (0, 1)]
        >>> loss_increase(loss, params, [x], plans).tolist()  # 1 / 2 and 9 / 2, of 10 / 2
        [-4.5, -0.5]
    """
    check_callable("loss", loss)
    those = list(batches)
    if not those:
        raise ValueError("there are no batches to try plans on; an iterator may have been used up.")
    compiled: dict[Any, Any] = {}

    def of(plan: CompactionPlan) -> float:
        key = tuple(sorted(plan.new_sizes.items())), tuple(sorted(plan.kept))
        if key not in compiled:
            compiled[key] = _jitted(compacted(loss, plan))
        return _value(compiled[key], compact(params, plan), those)

    dense = _value(_jitted(loss), params, those)
    return np.array([of(plan) - dense for plan in plans], np.float64)


def layer_losses(
    loss: Loss, graph: Graph, params: Params, batches: Iterable[Batch]
) -> dict[str, np.ndarray]:
    """Scores the layers of every scan over stacked layers by the loss without each of them.

    Args:
        loss: As of `loss_increase`.
        graph: The groups of the loss, or of its model.
        params: The dense parameters.
        batches: As of `loss_increase`.

    Returns:
        Group of layers -> (layers,) float64: how much the loss rises without the layer.

    Raises:
        ValueError: The graph has no group of layers; as `loss_increase`.
    """
    check_callable("loss", loss)
    those = list(batches)
    layers = [group for group in graph.groups if "layer" in group.flags]
    if not layers:
        raise ValueError("no scan runs over stacked layers here; try plans by `loss_increase`.")
    out = {}
    for group in layers:
        rests = ([j for j in range(group.size) if j != k] for k in range(group.size))
        plans = [plan_of(graph, {group.name: rest}, exact_only=False) for rest in rests]
        out[group.name] = loss_increase(loss, params, those, plans)
    return out


def _jitted(loss: Loss) -> Any:
    return jax.jit(lambda params, batch: evaluate(loss, params, batch)[0])


def _value(terms_of: Any, params: Params, batches: Sequence[Batch]) -> float:
    total: Terms = {}
    for batch in batches:
        for name, new in terms_of(params, batch).items():
            old = total.get(name, Mean(0.0, 0.0))
            total[name] = Mean(old.total + new.total, old.weight + new.weight, new.coef)
    return float(loss_value(total))
