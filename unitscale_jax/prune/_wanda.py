"""Wanda: a weight counts as much as what it multiplies.

    S_ij = |W_ij| ||X_j||_2,        ranked for each output i on its own

(https://arxiv.org/abs/2306.11695). OWL takes from the same scores how many outliers each layer has,
and leaves more to the layers that have many (https://arxiv.org/abs/2310.05175).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_type
from unitscale_jax.prune._allocate import Global
from unitscale_jax.prune._patterns import Unstructured
from unitscale_jax.prune._select import exact_k
from unitscale_jax.prune._shares import counts_of_parts
from unitscale_jax.prune._spec import SparsitySpec, make_masks, selected
from unitscale_jax.statistics import Stat, required, warn_unseen
from unitscale_jax.trace.params import MatrixForm, from_matrices, to_matrices


def wanda(params: Any, stats: Mapping[str, Stat]) -> Any:
    """Scores |W_ij| ||X_j||_2 of the parameters that statistics are of.

    An input that no row used has the root mean square of the lengths of those that were used: its
    weights rank by magnitude, as of an input like the others.

    Args:
        params: A pytree of parameters.
        stats: Of `calibrate(.., collect=("squares",))`, or `"hessian"`.

    Returns:
        A pytree like `params` of float32 scores; a parameter without statistics has the scalar NaN,
        which no mask can be made of.

    Raises:
        ValueError: Statistics lack squares, or are of a parameter that is not there, or has another
            shape.

    Warns:
        UserWarning: No row used any input of a whole layer or expert.

    Example:
        >>> x, params = jnp.array([[3.0, 1.0], [4.0, 0.0]]), {"w": jnp.array([[1.0], [-2.0]])}
        >>> stats = us.calibrate(lambda p, x: x @ p["w"], params, [(x,)], ["w"])
        >>> wanda(params, stats)["w"].tolist()
        [[5.0], [2.0]]
    """
    required(stats, "squares", params)
    for name, stat in stats.items():
        warn_unseen(name, stat, "ranked by magnitude")
    return _scores(params, stats)


def _scores(params: Any, stats: Mapping[str, Stat]) -> Any:
    """|W| ||X|| for each parameter with statistics, and the scalar NaN for others."""

    def score(name: str, w: Any) -> jax.Array:
        return _score(w, stats[name]) if name in stats else jnp.full((), np.nan, jnp.float32)

    return trees.map_named(score, params, is_leaf=trees.is_compound)


def _score(w: Any, of: Stat) -> jax.Array:
    norms = _norms(of)[..., None]
    columns = to_matrices(jnp.asarray(w, jnp.float32), of.layout)
    return from_matrices(jnp.abs(columns) * norms, of.layout, np.shape(w))


def _norms(of: Stat) -> jax.Array:
    """float32 (matrices, K): lengths ||X_k|| of the inputs; a typical one where no row used it."""
    squares = np.asarray(of.squares, np.float64)
    squares = squares.reshape(-1, squares.shape[-1])
    used = ~of.unseen
    typical = squares.sum() / max(used.sum(), 1) if used.any() else 1.0
    return jnp.asarray(np.sqrt(np.where(used, squares, typical)), jnp.float32)


def wanda_masks(params: Any, stats: Mapping[str, Stat], spec: SparsitySpec) -> Any:
    """Masks of Wanda: each output keeps its own best inputs.

    Args:
        params: A pytree of parameters.
        stats: Of `calibrate`, for every parameter that the spec selects; see `wanda`.
        spec: Of an `Unstructured` parameter with the sparsity s each output keeps
            kept(inputs, s) weights; where sparsities are allocated over parameters, outputs share
            what the parameter keeps as evenly as can be, the first ones one more. Other patterns,
            and `Global`, take the same scores as they are.

    Returns:
        Masks as `make_masks` gives them.

    Raises:
        ValueError: A parameter has no squares, or a pattern does not fit it.

    Warns:
        UserWarning: As `wanda`.

    Law: scaling an input up and its weights down changes no mask.

    Example:
        >>> params = {"w": jnp.array([[1.0, 4.0], [2.0, 3.0]])}
        >>> x, spec = jnp.array([[9.0, 1.0]]), SparsitySpec(patterns=Unstructured(), sparsity=0.5)
        >>> stats = us.calibrate(lambda p, x: x @ p["w"], params, [(x,)], spec)
        >>> wanda_masks(params, stats, spec)["w"].astype(int).tolist()
        [[1, 1], [0, 0]]
    """
    check_type("spec", spec, SparsitySpec, "a us.prune.SparsitySpec")
    chosen = selected(spec, params)
    leaves = trees.named_leaves(params, is_leaf=trees.is_compound)
    required(stats, "squares", params, chosen)
    own = {name: stats[name] for name in chosen}
    for name, stat in own.items():
        warn_unseen(name, stat, "ranked by magnitude")
    masks = {name: jnp.array(True) for name in leaves}
    by_output = [n for n, p in chosen.items() if isinstance(p, Unstructured)]
    if spec.allocate is Global:
        by_output = []
    if len(by_output) < len(chosen):
        made = make_masks(_scores(params, own), spec)
        masks = dict(zip(leaves, jax.tree.leaves(made), strict=True))
    for name in by_output:
        masks[name] = _per_output(name, leaves[name], stats[name], spec, params)
    return trees.by_names(masks, params)


def _per_output(name: str, w: Any, of: Stat, spec: SparsitySpec, params: Any) -> jax.Array:
    shape, layout = np.shape(w), of.layout
    columns = to_matrices(_score(w, of), layout).swapaxes(-1, -2)  # (batch, outputs, K)
    parts = [columns.shape[-1]] * columns.shape[-2]
    counts = counts_of_parts(name, layout, spec, params, parts)
    best = _best(columns, jnp.asarray(counts, jnp.int32))
    return from_matrices(best.swapaxes(-1, -2), layout, shape)


_best = jax.jit(jax.vmap(jax.vmap(exact_k)))


def owl_ratios(params: Any, stats: Mapping[str, Stat], m: float = 5.0) -> dict[str, Any]:
    """Measures the share of outliers of each parameter: of scores above m times their mean.

    Args:
        params: A pytree of parameters.
        stats: Of `calibrate(.., collect=("squares",))`, or `"hessian"`.
        m: From how many times the mean of |W| ||X|| on a score is an outlier.

    Returns:
        Parameter -> ratio, for `OWL(ratios)`; of stacked layers an array, one for each.

    Example:
        >>> params = {"w": jnp.ones((4, 1))}
        >>> x = jnp.array([[90.0, 1.0, 1.0, 1.0]])
        >>> stats = us.calibrate(lambda p, x: x @ p["w"], params, [(x,)], ["w"])
        >>> owl_ratios(params, stats, m=3)
        {'w': 0.25}
    """
    check_type("stats", stats, Mapping, "what us.calibrate or us.statistics.observed returns")
    required(stats, "squares", params)
    leaves = trees.named_leaves(params)
    return {name: _ratio(_score(leaves[name], of), of.layout, m) for name, of in stats.items()}


def _ratio(scores: jax.Array, layout: MatrixForm, m: float) -> Any:
    stack = scores.shape[: layout.layers]
    flat = np.asarray(scores, np.float64).reshape(*stack, -1)
    out = np.mean(flat > m * np.mean(flat, axis=-1, keepdims=True), axis=-1)
    return out if stack else float(out)
