"""SparseGPT: pruning that makes up for itself, input by input.

    H = sum x x^T + damp mean(diag H) I,        U upper triangular, U^T U = H^-1
    for j ascending:  e = (w_j - q_j) / U_jj,    w_l -= U_jl e    for l >= j

where q_j is w_j, zero where it is pruned. The error of each pruned weight is spread over the inputs
that are still to come, as far as the data says they are alike (https://arxiv.org/abs/2301.00774).
Which weights go is decided block by block, by w^2 / U_jj^2 of the weights as they are by then.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_type
from unitscale_jax.prune._patterns import NofM, Unstructured
from unitscale_jax.prune._refit import singular
from unitscale_jax.prune._shares import counts_of_parts
from unitscale_jax.prune._spec import SparsitySpec, selected, stacked_axes
from unitscale_jax.prune._surgeon import obs_sweep, squared_error
from unitscale_jax.statistics import Stat, required, warn_unseen
from unitscale_jax.tables import Tabular
from unitscale_jax.trace.params import MatrixForm, from_matrices, inverse_factor, to_matrices

RETRIES = 3


@dataclass(frozen=True)
class Pruned:
    """Squared errors ||X (W' - W)||^2 of the products of one pruned parameter.

    Attributes:
        dense: ||X W||^2, to compare with.
        masked: With the mask alone.
        updated: With the weights that make up for it.
        damp: The damping of each of the parameter's matrices (layers, experts).
        unseen: How many inputs no row used, summed over the matrices. They are pruned by magnitude.
    """

    dense: float
    masked: float
    updated: float
    damp: tuple[float, ...]
    unseen: int


@dataclass(frozen=True)
class SparseGPTReport(Tabular):
    """Errors of the pruned products, one row per parameter.

    Attributes:
        errors: Parameter -> errors of its products, on the batches calibrated on.
        kept: Parameters that the spec leaves dense.
        retries: Parameter -> dampings at which its moments were singular, before the one that was
            used; only of parameters that needed one.
    """

    errors: Mapping[str, Pruned]
    kept: tuple[str, ...]
    retries: Mapping[str, tuple[float, ...]]

    @property
    def rows(self) -> tuple[tuple[str, Pruned], ...]:
        """Pairs of a parameter's name and its errors."""
        return tuple(self.errors.items())

    def data(self) -> list[dict[str, Any]]:
        """The errors, with the name of the parameter beside them."""
        return [{"name": name, **asdict(error)} for name, error in self.rows]

    def cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """One line for each parameter: |X (W' - W)| / |X W|, and the largest damping."""

        def line(name: str, e: Pruned) -> list[str]:
            whole = e.dense if e.dense > 0 else math.inf
            errors = [f"{math.sqrt(error / whole):.4f}" for error in (e.masked, e.updated)]
            return [name, *errors, f"{max(e.damp):.2g}", str(e.unseen)]

        titles = ["parameter", ">masked", ">updated", ">damp", ">unseen"]
        return titles, [line(name, error) for name, error in self.rows]

    def below(self) -> Sequence[str]:
        """One line for each parameter whose damping had to be raised."""
        return [
            f"{name}: singular at damp {', '.join(f'{d:g}' for d in tried)}"
            for name, tried in self.retries.items()
        ]


def sparsegpt(
    params: Any,
    stats: Mapping[str, Stat],
    spec: SparsitySpec,
    damp: float = 0.01,
    block: int = 128,
) -> tuple[Any, Any, SparseGPTReport]:
    """Prunes the parameters a spec selects, the others making up for what goes.

    Args:
        params: A pytree of parameters.
        stats: Of `calibrate(.., collect=("hessian",))`.
        spec: Patterns are `Unstructured` or `NofM` along an input axis, as `resolve` gives it. Each
            block of inputs keeps its share of what the parameter keeps; stacked layers and experts
            are pruned each by its own moments. Inputs that no row used are pruned by magnitude,
            with their share of what goes, and counted in the report.
        damp: What is added to the diagonal of H, in parts of its mean. Where H is singular in
            float32 all the same, ten times as much, three times at most; the report says so.
        block: How many inputs are decided on together.

    Returns:
        `(params, masks, report)`: parameters of the same dtypes with exact zeros; masks as
        `make_masks` gives them; errors and dampings.

    Raises:
        ValueError: A parameter has no second moments, is not finite, or has a pattern of blocks or
            channels; its moments stay singular.

    Warns:
        UserWarning: No row used any input of a whole layer or expert.

    Law: ||X (W' - W)||^2 is at least that of `refit`, the least squares on the same mask.

    Example:
        >>> fn = lambda params, x: x @ params["w"]
        >>> params = {"w": jnp.array([[1.0], [0.5]])}
        >>> x = jnp.array([[1.0, 1.0], [2.0, 2.0]])  # two inputs that are one
        >>> spec = SparsitySpec(patterns=Unstructured(), sparsity=0.5)
        >>> stats = us.calibrate(fn, params, [(x,)], spec, collect=("hessian",))
        >>> pruned, masks, report = sparsegpt(params, stats, spec)
        >>> pruned["w"].round(1).tolist(), masks["w"].tolist()
        ([[0.0], [1.5]], [[False], [True]])
    """
    check_type("spec", spec, SparsitySpec, "a us.prune.SparsitySpec")
    if not damp >= 0 or block < 1:
        raise ValueError(f"damp is {damp}, block {block}; they are at least 0 and 1.")
    chosen = selected(spec, params)
    leaves = trees.named_leaves(params, is_leaf=trees.is_compound)
    required(stats, "hessian", params, chosen)
    done = dict(leaves)
    masks: dict[str, Any] = {name: jnp.array(True) for name in leaves}
    errors, retries = {}, {}
    for name, pattern in chosen.items():
        layout = stats[name].layout
        warn_unseen(name, stats[name], "pruned by magnitude")
        shape, stacked = np.shape(leaves[name]), stacked_axes(spec, params)[name]
        plan = _plan(name, pattern, shape, stacked, layout, block)
        if plan.ratio is None:
            counts = counts_of_parts(name, layout, spec, params, plan.parts)
        else:  # of a group, by its own ratio
            counts = np.zeros((math.prod(shape[a] for a in layout.batch), len(plan.parts)), int)
        out = _pruned(name, leaves[name], stats[name], plan, counts, damp)
        done[name], masks[name], errors[name], tried = out
        if tried:
            retries[name] = tried
    report = SparseGPTReport(errors, tuple(n for n in leaves if n not in chosen), retries)
    return trees.by_names(done, params), trees.by_names(masks, params), report


@dataclass(frozen=True)
class _UpdatePlan:
    """The plan by which one parameter is pruned.

    Attributes:
        layout: Its matrices.
        sizes: Sizes of its input axes.
        axis: The place among its input axes that groups run along; it becomes the last of them.
        block: How many inputs are decided on together.
        parts: Number of weights in each block.
        ratio: N and M of an `NofM`; None for a count of each block.
    """

    layout: MatrixForm
    sizes: tuple[int, ...]
    axis: int
    block: int
    parts: tuple[int, ...]
    ratio: tuple[int, int] | None

    @property
    def order(self) -> np.ndarray:
        """K in the order it is pruned in: groups are consecutive."""
        k = np.arange(math.prod(self.sizes)).reshape(self.sizes)
        return np.moveaxis(k, self.axis, -1).reshape(-1)


def _plan(
    name: str, pattern: Any, shape: tuple[int, ...], stacked: int, layout: MatrixForm, block: int
) -> _UpdatePlan:
    sizes = tuple(shape[axis] for axis in layout.contracted)
    k, last, ratio = math.prod(sizes), len(sizes) - 1, None
    if isinstance(pattern, NofM):
        last = _place(name, pattern, shape, stacked, layout)
        ratio = pattern.n, pattern.m
        block = max(block // pattern.m, 1) * pattern.m
    elif not isinstance(pattern, Unstructured):
        raise ValueError(
            f"{name} has the pattern {pattern}, and SparseGPT decides weight by weight: it prunes "
            "Unstructured() and NofM(..). Make masks of blocks by make_masks(wanda(..), spec), and "
            "let `refit` make up for them."
        )
    block = min(block, k)
    outputs = math.prod(shape) // (k * math.prod(shape[axis] for axis in layout.batch))
    cuts = tuple(outputs * min(block, k - start) for start in range(0, k, block))
    return _UpdatePlan(layout, sizes, last, block, cuts, ratio)


def _place(
    name: str, pattern: NofM, shape: tuple[int, ...], stacked: int, layout: MatrixForm
) -> int:
    pattern.units(name, shape[stacked:])  # the axis is known, and M divides it
    assert pattern.axis is not None
    axis = pattern.axis if pattern.axis < 0 else pattern.axis + stacked - len(shape)
    if axis not in layout.contracted:
        raise ValueError(
            f"{name} is pruned {pattern.n} of {pattern.m} along axis {axis}, and its inputs "
            f"are along {layout.contracted}; groups run along an input axis. Use `resolve`."
        )
    return layout.contracted.index(axis)


_Found = tuple[Any, Any, Pruned, tuple[float, ...]]


def _pruned(
    name: str, w: Any, of: Stat, plan: _UpdatePlan, counts: np.ndarray, damp: float
) -> _Found:
    if not bool(jnp.isfinite(w).all()):
        raise ValueError(f"{name} has NaN or infinite values; mend it first.")
    h = of.matrices
    u, dead, damps, tried = _factored(name, h[:, plan.order][:, :, plan.order], damp)
    new, mask = _swept(jnp.asarray(w), u, dead, jnp.asarray(counts, jnp.int32), plan)
    wide = to_matrices(jnp.asarray(w, jnp.float32), plan.layout)
    alone = jnp.where(mask, w, jnp.zeros_like(w))
    offs = [to_matrices(x.astype(jnp.float32), plan.layout) - wide for x in (alone, new)]
    dense, masked, updated = (float(squared_error(x, h)) for x in (wide, *offs))
    return new, mask, Pruned(dense, masked, updated, damps, int(of.unseen.sum())), tried


def _factored(
    name: str, h: jax.Array, damp: float
) -> tuple[jax.Array, jax.Array, tuple[float, ...], tuple[float, ...]]:
    """U of each matrix, and its dampings: those used, and those at which one was singular."""
    damps = np.full(h.shape[0], damp, np.float64)
    tried: list[float] = []
    while True:
        u, dead = _factors(h, jnp.asarray(damps, jnp.float32))
        bad = ~np.isfinite(np.asarray(u)).all((-2, -1))
        if not bad.any():
            return u, dead, tuple(map(float, damps)), tuple(tried)
        tried.append(float(damps[bad].max()))
        if len(tried) > RETRIES or damp == 0:
            raise ValueError(singular(name, tried))
        damps[bad] *= 10


_factors = jax.jit(jax.vmap(inverse_factor))


@functools.partial(jax.jit, static_argnums=4)
def _swept(
    w: jax.Array, u: jax.Array, dead: jax.Array, counts: jax.Array, plan: _UpdatePlan
) -> tuple[jax.Array, jax.Array]:
    columns = to_matrices(w.astype(jnp.float32), plan.layout)[:, plan.order]
    sweep = functools.partial(obs_sweep, block=plan.block, ratio=plan.ratio)
    back = np.argsort(plan.order)
    new, mask = (
        from_matrices(x[:, back], plan.layout, w.shape)
        for x in jax.vmap(sweep)(columns, u, dead, counts)
    )
    return new.astype(w.dtype), mask
