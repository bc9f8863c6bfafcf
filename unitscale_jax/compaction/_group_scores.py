"""The worth of channels, by the weights of all its members.

    l2       sum over members of w^2
    taylor   (sum over members of w g)^2,  or  sum over members of |w g|

A channel of a group is a slice of every member, and its score is that of all slices together.
Scores are divided by their mean in the group, so that groups of any size can be compared. Taylor
scores estimate how much the loss changes without the channel, from gradients averaged over batches
(Molchanov et al. 2019, https://arxiv.org/abs/1906.10771).
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import rules as named_rules, tree as trees
from unitscale_jax.compaction._groups import Graph
from unitscale_jax.compaction._named_axes import along, named_groups, places
from unitscale_jax.errors import check_type
from unitscale_jax.rules import Pattern, Rules

Scores: TypeAlias = dict[str, jax.Array]
"""Group -> (size,) floats: what each channel is worth, the mean being 1."""


def l2(
    graph: Graph,
    params: Any,
    *,
    only: Sequence[Pattern] | None = None,
    counted: Rules[bool] | None = None,
) -> Scores:
    """Scores channels by the squares of their weights.

    Args:
        graph: The groups of a function.
        params: Its parameters.
        only: Patterns of the names of groups to score; None: all but layers, which
            `layer_scores` are for.
        counted: Rules from parameters to whether they count; those that no rule names do. Batch
            statistics are members of groups without being weights: `{"batch_stats/**": False}`.

    Returns:
        Scores in float32; a group whose weights are all zero has zeros.

    Raises:
        ValueError: Parameters are not those of the graph; a rule or pattern matches nothing; no
            floating parameter of a group counts.

    Law: permuting the channels of a group permutes its scores.

    Example:
        >>> params = {"up": jnp.ones((1, 2)), "down": jnp.array([[0.0, 0.0], [1.0, 1.0]])}
        >>> fn = lambda p, x: x @ p["up"] @ p["down"]
        >>> graph = us.compaction.groups(fn, params, jnp.ones((2, 1)))
        >>> l2(graph, params)["down:0"].tolist()  # 1 and 3, by their mean
        [0.5, 1.5]
    """
    check_type("graph", graph, Graph, "what us.compaction.groups returns")
    sums = _sums(graph, params, only, counted, jnp.square)
    return {name: _normalized(x) for name, x in sums.items()}


def taylor(
    graph: Graph,
    params: Any,
    grads: Any,
    *,
    squared: bool = True,
    only: Sequence[Pattern] | None = None,
    counted: Rules[bool] | None = None,
) -> Scores:
    """Scores channels by how much the loss changes without them, to first order.

    Args:
        graph: The groups of a function.
        params: Its parameters.
        grads: Gradients of a loss, of the structure of `params`, averaged over batches.
        squared: Whether the slices' products are added before they lose their sign: that is the
            change of the loss, squared. Else the sum of |w g|.
        only: As for `l2`.
        counted: As for `l2`.

    Returns:
        Scores in float32.

    Raises:
        ValueError: As `l2`.

    Example:
        >>> params = {"up": jnp.array([[1.0, 2.0]]), "down": jnp.array([[1.0], [1.5]])}
        >>> fn = lambda p, x: x @ p["up"] @ p["down"]
        >>> graph = us.compaction.groups(fn, params, jnp.ones((2, 1)))
        >>> grads = jax.grad(lambda p: fn(p, jnp.ones((2, 1))).sum())(params)
        >>> taylor(graph, params, grads, squared=False)["down:0"].tolist()  # 4 and 12
        [0.5, 1.5]
    """
    check_type("graph", graph, Graph, "what us.compaction.groups returns")
    _check_shapes(graph, grads, "grads")
    other = dict(zip(trees.names(params), jax.tree.leaves(grads), strict=True))
    products = trees.map_named(lambda path, w: _wide(w) * _wide(other[path]), params)
    if squared:
        sums = _sums(graph, products, only, counted, lambda x: x)
        return {name: _normalized(jnp.square(x)) for name, x in sums.items()}
    sums = _sums(graph, products, only, counted, jnp.abs)
    return {name: _normalized(x) for name, x in sums.items()}


def chosen(graph: Graph, only: Sequence[Pattern] | None) -> list[str]:
    """Names of the groups to score: those that patterns name, or all but layers."""
    if only is None:
        return [group.name for group in graph.groups if "layer" not in group.flags]
    return named_groups(graph, only)


def _sums(
    graph: Graph,
    params: Any,
    only: Sequence[Pattern] | None,
    counted: Rules[bool] | None,
    part: Callable[[jax.Array], jax.Array],
) -> Scores:
    """Sums over all slices of a channel of `part` of a parameter."""
    _check_shapes(graph, params, "params")
    leaves, names = trees.named_leaves(params), chosen(graph, only)
    counts = named_rules.match(counted or (), leaves, True)
    sizes, sums = {group.name: group.size for group in graph.groups}, {}
    for path, leaf in leaves.items():
        if counts[path] and trees.is_floating(leaf):
            x = part(_wide(leaf))
            for k, axis in enumerate(graph.axes[path]):
                each = jnp.sum(x, axis=tuple(j for j in range(x.ndim) if j != k))
                for term, position, name in places(axis):
                    new = along(each, axis, term, position, sizes, jnp.sum)
                    sums[name] = sums[name] + new if name in sums else new
    _check_scored(set(names) - sums.keys())
    return {name: sums[name] for name in names}


def _wide(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(trees.wide(x.dtype)) if trees.is_floating(x) else x


def _normalized(x: jax.Array) -> jax.Array:
    """Scores divided by their mean; zeros stay."""
    mean = jnp.mean(x)
    return x / jnp.where(mean > 0, mean, jnp.ones_like(mean))


def _check_shapes(graph: Graph, params: Any, what: str) -> None:
    shapes = {path: np.shape(x) for path, x in trees.named_leaves(params).items()}
    for path in (*graph.shapes, *shapes):
        want, came = graph.shapes.get(path), shapes.get(path)
        if want != came:
            raise ValueError(
                f"{path} has shape {came} in {what} and {want} in the graph. Score the parameters "
                "that `groups` was called with."
            )


def _check_scored(missing: Collection[str]) -> None:
    if missing:
        raise ValueError(
            f"no floating parameter of {', '.join(sorted(missing))} counts, so there is nothing to "
            "score. Let `counted` leave one, or leave the group out by `only`."
        )
