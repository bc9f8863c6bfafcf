"""Shares of a parameter's count among its parts: columns for Wanda, blocks for SparseGPT."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unitscale_jax import rules as named_rules, tree as trees
from unitscale_jax.prune._allocate import uniform
from unitscale_jax.prune._spec import SparsitySpec, counts, selected, stacked_axes
from unitscale_jax.sparsity import kept
from unitscale_jax.trace.params import MatrixForm


def shares(total: int, sizes: Sequence[int]) -> np.ndarray:
    """Cuts a total in proportion to sizes: integers by largest remainder, ties to the earlier.

    Example:
        >>> shares(7, [4, 4, 2]).tolist(), shares(5, [4, 4, 4]).tolist()
        ([3, 3, 1], [2, 2, 1])
    """
    whole = sum(sizes)
    low = np.array([total * n // whole for n in sizes], np.int64)
    remainders = [total * n % whole for n in sizes]
    first = np.argsort([-r for r in remainders], kind="stable")[: total - int(low.sum())]
    low[first] += 1
    return low


def counts_of_parts(
    name: str, layout: MatrixForm, spec: SparsitySpec, params: Any, parts: Sequence[int]
) -> np.ndarray:
    """Number of weights that each part of each of a parameter's matrices keeps: (batch, parts).

    With one sparsity s for the parameter, a part of n weights keeps kept(n, s). Where sparsities
    are allocated over parameters, parts share what the parameter keeps, which so holds exactly.

    Args:
        name: Of the parameter.
        layout: Its matrices.
        spec: Its sparsity.
        params: All of them.
        parts: Sizes of the parts of one matrix.

    Raises:
        ValueError: The spec ranks all parameters together, or stacks axes that are not the layers.
    """
    shape = np.shape(trees.named_leaves(params)[name])
    batch = int(np.prod([shape[axis] for axis in layout.batch], dtype=int))
    found = counts(spec, params, [spec.sparsity])
    if name not in found:
        raise ValueError(
            f"Global ranks all parameters together, and {name} is pruned part by part. Allocate "
            "by uniform, ERK, OWL or rules."
        )
    sparsity = _sparsity(name, spec, params)
    if sparsity is not None:
        return np.tile([kept(n, sparsity) for n in parts], (batch, 1))
    totals = found[name][0].reshape(-1)
    stack = stacked_axes(spec, params)[name]
    if layout.batch[:stack] != tuple(range(-len(shape), stack - len(shape))):
        raise ValueError(
            f"the spec stacks {stack} leading axes of {name}, and the function runs along its axes "
            f"{layout.batch}. Give `stacked` what it runs along."
        )
    inner = batch // totals.size
    each = [shares(int(total), [*parts] * inner).reshape(inner, -1) for total in totals]
    return np.concatenate(each)


def _sparsity(name: str, spec: SparsitySpec, params: Any) -> float | None:
    """The one sparsity of a parameter, where the spec says it."""
    if spec.allocate is uniform:
        return spec.sparsity
    if isinstance(spec.allocate, Mapping):
        return named_rules.match(spec.allocate, selected(spec, params))[name]
    return None
