"""Specs of pruning and their masks: a spec as data, counts on the host, masks from scores.

spec                          which parameters, in which pattern, how many in all
counts(spec, params, ...)     how many units each keeps, as integers
masks_from(spec, scores, ..)  bool arrays with exactly so many ones
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import rules as named_rules, tree as trees
from unitscale_jax.errors import check_number, check_type
from unitscale_jax.prune._allocate import EVERYWHERE, Allocation, ByRule, Global, Layer, uniform
from unitscale_jax.prune._patterns import Balanced, NofM, Pattern, Ranked
from unitscale_jax.prune._select import exact_k, exact_k_of
from unitscale_jax.typing import Params


@dataclass(frozen=True, kw_only=True)
class SparsitySpec:
    """Which parameters are pruned, in which pattern, and how many weights go.

    Attributes:
        patterns: A pattern, for every parameter of at least two axes; or rules from paths to
            patterns, where None leaves a parameter dense, as does no rule.
        sparsity: The share of units that goes, in [0, 1). An `NofM` has its own.
        allocate: How the total is shared out: `uniform`, `ERK`, `Global`, `OWL(ratios)`; or rules
            from paths to sparsities.
        stacked: Rules from paths to how many leading axes are layers of a scan, or experts. Each
            index of them is ranked on its own, and axes of patterns count within it.

    Raises:
        ValueError: A sparsity outside [0, 1), a negative number of axes.
        TypeError: A value that is no pattern, an allocation that is none.

    Example:
        >>> spec = SparsitySpec(patterns={"**/kernel": us.prune.Unstructured()}, sparsity=0.75)
        >>> masks = us.prune.make_masks({"kernel": jnp.arange(8.0), "bias": jnp.ones(2)}, spec)
        >>> masks["kernel"].astype(int).tolist(), masks["bias"].item()
        ([0, 0, 0, 0, 0, 0, 1, 1], True)
    """

    patterns: Pattern | named_rules.Rules[Pattern | None]
    sparsity: float = 0.8
    allocate: Allocation | named_rules.Rules[float] = uniform
    stacked: named_rules.Rules[int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the sparsity and the values of all rules."""
        check_number("SparsitySpec.sparsity", self.sparsity)
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is {self.sparsity}; it is the share that goes, in [0, 1).")
        if not isinstance(self.patterns, Pattern):
            for rule, pattern in named_rules.pairs_of(self.patterns):
                if not (pattern is None or isinstance(pattern, Pattern)):
                    raise TypeError(
                        f"rule {rule!r} has the value {pattern!r}; a rule of `patterns` has a "
                        "pattern, such as Unstructured() or NofM(2, 4), or None."
                    )
        for rule, axes in named_rules.pairs_of(self.stacked):
            if type(axes) is not int or axes < 0:
                raise ValueError(f"stacked: rule {rule!r} has {axes!r}; it is a number of axes.")
        assert callable(self.allocation)

    def observes(self, params: Params) -> list[str]:
        """The parameters whose inputs `calibrate` measures: all that are pruned."""
        return list(selected(self, params))

    @property
    def allocation(self) -> Allocation:
        """The function that shares out the total."""
        if callable(self.allocate):
            return self.allocate
        return ByRule(self.allocate, self.sparsity)


def selected(spec: SparsitySpec, params: Params) -> dict[str, Pattern]:
    """The parameters that a spec prunes, with their patterns, in tree order.

    Args:
        spec: What to prune.
        params: Arrays, or their shapes and dtypes.

    Raises:
        ValueError: A rule matches nothing; nothing is pruned; a parameter cannot be: quantized, not
            floating, without axes beside the stacked ones.

    Example:
        >>> spec = SparsitySpec(patterns=us.prune.Unstructured())
        >>> list(selected(spec, {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}))
        ['kernel']
    """
    return {name: pattern for name, (pattern, _) in _chosen(spec, params).items()}


def stacked_axes(spec: SparsitySpec, params: Params) -> dict[str, int]:
    """Parameter -> number of its leading axes that are stacked, of those that a spec prunes."""
    return {name: axes for name, (_, axes) in _chosen(spec, params).items()}


def counts(
    spec: SparsitySpec, params: Params, sparsities: Sequence[float]
) -> dict[str, np.ndarray]:
    """Counts the units that each parameter keeps at each of several sparsities.

    Args:
        spec: What to prune.
        params: Arrays, or their shapes and dtypes.
        sparsities: Shares that go, such as a schedule's.

    Returns:
        By path, int32 (sparsities,): the units that stay, at each index of stacked axes. Where an
        allocation shares one total among them (`ERK`, `OWL`), (sparsities, *stacked axes).
        `Global` has a single entry, "", the total. An `NofM` has none.

    Raises:
        ValueError: As `selected`; a pattern that does not fit its parameter.

    Example:
        >>> spec = SparsitySpec(patterns={"w": us.prune.Block((2, 2))})
        >>> counts(spec, {"w": jnp.ones((4, 8))}, [0.0, 0.5])
        {'w': array([8, 4], dtype=int32)}
    """
    if not all(0 <= s < 1 for s in sparsities):
        raise ValueError(f"sparsities are {tuple(sparsities)}; each is a share in [0, 1).")
    layers = _layers(spec, params)
    tables = [spec.allocation(layers, s) for s in sparsities]
    return {name: np.stack([t[name] for t in tables]) for name in (tables or [{}])[0]}


def masks_from(spec: SparsitySpec, scores: Any, counts: Mapping[str, Any]) -> Any:
    """Masks with as many units as `counts` says, those of the highest scores.

    Args:
        spec: What to prune; `NofM` needs its axis.
        scores: A pytree like the parameters of floating numbers, the larger the likelier to stay.
            What is not pruned may hold anything.
        counts: One row of what `counts` gives, so int32 scalars, or one for each stacked index;
            they may be traced.

    Returns:
        A pytree like `scores` of bool arrays; what is not pruned has the scalar True.

    Raises:
        ValueError: As `counts`; counts of other parameters than the spec's.

    Laws: a mask has exactly its count of units, and a global total is met exactly; stacked layers
    have the masks they would have alone; what is not pruned plays no part, nor do names.
    """
    chosen = _chosen(spec, scores)
    _check_counts(spec, chosen, counts)
    _layers(spec, scores)  # checks that patterns fit
    known, structure = _known(scores), jax.tree.structure(scores, is_leaf=trees.is_compound)
    if spec.allocate is Global and counts:
        masks = _masks_together(known, chosen, counts[EVERYWHERE])
    else:
        masks = {
            name: _mask(known[name], pattern, axes, counts[name])
            for name, (pattern, axes) in chosen.items()
            if not isinstance(pattern, NofM)
        }
    masks |= {
        name: _over(pattern.mask, axes)(jnp.asarray(known[name]))
        for name, (pattern, axes) in chosen.items()
        if isinstance(pattern, NofM)
    }
    everything = jnp.array(True)
    return structure.unflatten([masks.get(name, everything) for name in known])


def make_masks(scores: Any, spec: SparsitySpec, at: float | None = None) -> Any:
    """Masks from scores: `masks_from` with the counts of one sparsity.

    Args:
        scores: As of `masks_from`.
        spec: What to prune.
        at: The sparsity; None is that of the spec.

    Returns:
        A pytree like `scores` of bool arrays; what is not pruned has the scalar True.

    Raises:
        ValueError: As `counts`.

    Example:
        >>> spec = SparsitySpec(patterns=us.prune.NofM(2, 4, axis=-1))
        >>> make_masks(jnp.array([[4.0, 1.0, 3.0, 2.0]]), spec).astype(int).tolist()
        [[1, 0, 1, 0]]
    """
    check_type("spec", spec, SparsitySpec, "a us.prune.SparsitySpec")
    table = counts(spec, scores, [spec.sparsity if at is None else at])
    return masks_from(spec, scores, {name: row[0] for name, row in table.items()})


def quantized_message(name: str) -> str:
    return f"{name} is quantized; codes are not masked. Mask before quantizing: zeros stay zeros."


def _chosen(spec: SparsitySpec, params: Any) -> dict[str, tuple[Pattern, int]]:
    """Pattern and number of stacked axes of each parameter that is pruned."""
    patterns: Mapping[str, Pattern | None]
    known = _known(params)
    stacked = named_rules.match(spec.stacked, known, 0)
    if isinstance(spec.patterns, Pattern):
        # Codes count as matrices, so that `_check_leaf` refuses them rather than nobody.
        patterns = {
            name: spec.patterns if leaf is None or _is_matrix(leaf, stacked[name]) else None
            for name, leaf in known.items()
        }
    else:
        patterns = named_rules.match(spec.patterns, known)
    chosen = {n: (p, stacked[n]) for n, p in patterns.items() if p is not None}
    if not chosen:
        raise ValueError(
            f"the spec prunes none of {len(known)} parameters; name some by `patterns`, such as "
            "{'**/kernel': Unstructured()}."
        )
    for name, (_, axes) in chosen.items():
        _check_leaf(name, known[name], axes)
    return chosen


def _known(params: Any) -> dict[str, Any]:
    """The array that is each parameter, by name; None for codes."""
    named = trees.named_leaves(params, is_leaf=trees.is_compound)
    return {name: trees.values_of(leaf) for name, leaf in named.items()}


def _is_matrix(leaf: Any, stacked: int) -> bool:
    return trees.is_floating(leaf) and np.ndim(leaf) - stacked >= 2


def _check_leaf(name: str, leaf: Any, stacked: int) -> None:
    if leaf is None:
        raise ValueError(quantized_message(name))
    if not trees.is_floating(leaf):
        raise ValueError(
            f"{name} is {jnp.result_type(leaf)}; only floating parameters are pruned. Give it None "
            "by an earlier rule."
        )
    if np.ndim(leaf) <= stacked:
        raise ValueError(
            f"{name} has the shape {np.shape(leaf)}, of which {stacked} axes are stacked: there is "
            "nothing to rank. Give it None by an earlier rule, or stack fewer axes."
        )


def _layers(spec: SparsitySpec, params: Any) -> list[Layer]:
    """The ranked parameters as allocations see them; every pattern is checked on the way."""
    known, out = _known(params), []
    for name, (pattern, axes) in _chosen(spec, params).items():
        shape = tuple(np.shape(known[name]))
        units = pattern.units(name, shape[axes:])
        if not isinstance(pattern, NofM):
            size = int(np.prod(units, dtype=object))
            out.append(Layer(name, shape[axes:], size, shape[:axes]))
    return out


def _check_counts(spec: SparsitySpec, chosen: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
    ranked = [name for name, (pattern, _) in chosen.items() if not isinstance(pattern, NofM)]
    expected = {EVERYWHERE} if spec.allocate is Global and ranked else set(ranked)
    if set(counts) != expected:
        raise ValueError(
            f"counts are of {sorted(counts)}, and these scores need them of {sorted(expected)}. "
            "Take them from `counts(spec, params, sparsities)`, and score what the spec prunes."
        )


def _mask(scores: Any, pattern: Ranked, axes: int, count: Any) -> jax.Array:
    """The mask of one parameter, at each of its stacked indices."""
    scores, stacked = jnp.asarray(scores), np.shape(scores)[:axes]
    if np.shape(count) not in ((), stacked):
        raise ValueError(f"a count has the shape {np.shape(count)}; () or {stacked} is expected.")

    def of_one(x: jax.Array, k: Any) -> jax.Array:
        # Of a balanced pattern parts are the first axis of the units.
        parts = pattern.parts if isinstance(pattern, Balanced) else None
        return pattern.spread(exact_k(pattern.pooled(x), k, balanced=parts), x.shape)

    if axes:
        count = jnp.broadcast_to(jnp.asarray(count, jnp.int32), stacked)
    return _over(of_one, axes)(scores, count)


def _masks_together(
    known: Mapping[str, Any], chosen: Mapping[str, tuple[Pattern, int]], count: Any
) -> dict[str, jax.Array]:
    """Masks of one ranking over all parameters."""
    ranked = {n: (p, axes) for n, (p, axes) in chosen.items() if not isinstance(p, NofM)}
    for name, (pattern, _) in ranked.items():
        if isinstance(pattern, Balanced):
            raise ValueError(
                f"{name} is balanced over {pattern.parts} parts, and `Global` ranks all weights "
                "together, wherever they are. Choose another allocation, such as `ERK`."
            )
    pooled = [_over(p.pooled, axes)(jnp.asarray(known[n])) for n, (p, axes) in ranked.items()]
    out = {}
    found = zip(ranked.items(), exact_k_of(pooled, count), strict=True)
    for (name, (pattern, axes)), keep in found:
        shape = np.shape(known[name])[axes:]
        out[name] = _over(functools.partial(pattern.spread, shape=shape), axes)(keep)
    return out


def _over(fn: Callable[..., Any], axes: int) -> Callable[..., Any]:
    """A function of one index, over stacked axes."""
    for _ in range(axes):
        fn = jax.vmap(fn)
    return fn
