"""Allocations: how many units each parameter keeps, as integers with exact totals.

    kept(n, s) = n - round(n s)                                   in float64, half to even
    uniform   k_l = kept(n_l, s)
    ERK       k_l ~ e sum(dims_l) / prod(dims_l) n_l,  at most n_l     sum k_l = kept(sum n_l, s)
    OWL       k_l ~ (d_l + c) n_l,  0 <= k_l <= n_l                    likewise
    Global    one ranking over all of them

e and c are what makes the shares sum to the total; shares become integers by largest remainder.
Everything is on the host, and k is an int: in float32, 200,000,003 weights at 0.9 keep 4 too many.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from unitscale_jax import rules as named_rules
from unitscale_jax.errors import check_number, check_type
from unitscale_jax.prune._select import MOST
from unitscale_jax.sparsity import kept

EVERYWHERE = ""
"""The name of the count that all parameters share."""


@dataclass(frozen=True)
class Layer:
    """A parameter as an allocation sees it.

    Attributes:
        name: Its path.
        shape: That of the array; of one index where it is stacked.
        units: How many units are ranked, at each index.
        stacked: The sizes of the stacked axes.
    """

    name: str
    shape: tuple[int, ...]
    units: int
    stacked: tuple[int, ...] = ()

    @property
    def copies(self) -> int:
        """Number of indices of the stacked axes."""
        return math.prod(self.stacked)


Counts: TypeAlias = dict[str, np.ndarray]
Allocation: TypeAlias = Callable[[Sequence[Layer], float], Counts]


def uniform(layers: Sequence[Layer], sparsity: float) -> Counts:
    """Every parameter at the same sparsity.

    Example:
        >>> uniform([Layer("a", (2, 5), 10), Layer("b", (2, 3), 6)], 0.25)
        {'a': array(8, dtype=int32), 'b': array(4, dtype=int32)}
    """
    check_type("layers", layers, Sequence, "a list of layers")
    return {layer.name: np.asarray(kept(layer.units, sparsity), np.int32) for layer in layers}


def ERK(layers: Sequence[Layer], sparsity: float) -> Counts:  # noqa: N802, an acronym
    """Erdős-Rényi kernel: density in proportion to sum(dims) / prod(dims), small ones denser.

    A parameter whose density would exceed 1 is dense, and the others share the rest
    (https://arxiv.org/abs/1911.11134).

    Raises:
        ValueError: Units of different sizes, whose total would mean nothing.

    Law: the total is `kept` of all units together, exactly.

    Example:
        >>> layers = [("a", (784, 300)), ("b", (300, 100)), ("c", (100, 10))]
        >>> counts = ERK([Layer(n, dims, dims[0] * dims[1]) for n, dims in layers], 0.9)
        >>> {name: int(count) for name, count in counts.items()}
        {'a': 18714, 'b': 6906, 'c': 1000}
    """
    check_type("layers", layers, Sequence, "a list of layers")
    copies = _copies(layers, "ERK")
    sizes = np.array([n for n, _ in copies], np.float64)
    ratios = np.array([sum(layer.shape) / math.prod(layer.shape) for _, layer in copies])
    total = kept(int(sizes.sum()), sparsity)
    return _by_layer(layers, _apportion(_scaled(sizes, ratios, total), sizes, total))


def Global(layers: Sequence[Layer], sparsity: float) -> Counts:  # noqa: N802, like ERK
    """One ranking over all parameters: only their total is set.

    Scores have to mean the same everywhere; one parameter may lose all it has.

    Raises:
        ValueError: Units of different sizes, whose sums do not compare; or 2^31 of them.

    Example:
        >>> Global([Layer("a", (2, 5), 10), Layer("b", (2, 3), 6)], 0.25)
        {'': array(12, dtype=int32)}
    """
    check_type("layers", layers, Sequence, "a list of layers")
    total = sum(n for n, _ in _copies(layers, "Global"))
    if total > MOST:
        raise ValueError(
            f"Global ranks {total:,} units together, and counts are int32. Allocate by uniform or "
            "ERK, which rank each parameter on its own."
        )
    return {EVERYWHERE: np.asarray(kept(total, sparsity), np.int32)} if layers else {}


@dataclass(frozen=True)
class OWL:  # noqa: N801, used like the functions beside it
    """Outlier-weighed: layers with more outliers keep more (https://arxiv.org/abs/2310.05175).

        d_l = 2 lam (r_l - min r) / (max r - min r)       density_l = d_l - mean(d) + 1 - s

    The mean is weighted by size; a density beyond [0, 1] is cut, and the others share what is left.

    Attributes:
        ratios: By path, the share of outliers: a number, or one for every stacked index.
        lam: At most how far a layer is from the mean, up to its own; 0 is uniform.

    Raises:
        ValueError: In use: a parameter without a ratio, ratios of another one or of another shape,
            units of different sizes.

    Law: the total is `kept` of all units together, exactly.

    Example:
        >>> allocate = OWL({"a": 0.01, "b": 0.03, "c": 0.08})
        >>> counts = allocate([Layer(n, (1000, 1000), 10**6) for n in "abc"], 0.7)
        >>> {name: int(count) for name, count in counts.items()}
        {'a': 231429, 'b': 277143, 'c': 391428}
    """

    ratios: Mapping[str, Any]
    lam: float = 0.08

    def __post_init__(self) -> None:
        """Checks that `lam` is in [0, 1/2]."""
        check_number("OWL.lam", self.lam)
        if not 0 <= self.lam <= 0.5:
            raise ValueError(f"OWL: lam is {self.lam}; it is from 0 to 0.5.")

    def __call__(self, layers: Sequence[Layer], sparsity: float) -> Counts:
        """Returns the number of units that each parameter keeps."""
        sizes = np.array([n for n, _ in _copies(layers, "OWL")], np.float64)
        r = np.concatenate([np.zeros(0), *(self._ratios(layer) for layer in layers)])
        odd = sorted(self.ratios.keys() - {layer.name for layer in layers})
        if odd:
            raise ValueError(f"OWL has ratios for {', '.join(odd)}, which nothing ranked is named.")
        spread = np.ptp(r) if r.size else 0
        d = 2 * self.lam * (r - r.min()) / spread if spread else np.zeros_like(r)
        total = kept(int(sizes.sum()), sparsity)
        return _by_layer(layers, _apportion(_shifted(sizes, d, total), sizes, total))

    def _ratios(self, layer: Layer) -> np.ndarray:
        if layer.name not in self.ratios:
            raise ValueError(
                f"OWL has no ratio for {layer.name}. Calibrate it too, or leave it out."
            )
        r = np.asarray(self.ratios[layer.name], np.float64)
        if r.shape not in ((), layer.stacked) or not np.isfinite(r).all():
            raise ValueError(
                f"OWL's ratio for {layer.name} is {r}; one finite number is expected, or an array "
                f"of {layer.stacked} for its stacked layers."
            )
        return np.broadcast_to(r, layer.stacked).reshape(-1)


@dataclass(frozen=True)
class ByRule:
    """A sparsity of its own for every parameter, by the first rule that matches it.

    Below the spec's sparsity, on the way of a schedule, each is at the same fraction of its own.

    Attributes:
        rules: Pairs of a path's pattern and a sparsity in [0, 1).
        whole: The sparsity at which each has its own: that of the spec.
    """

    rules: named_rules.Rules[float]
    whole: float

    def __post_init__(self) -> None:
        """Checks that each rule has a sparsity in [0, 1)."""
        for pattern, s in named_rules.pairs_of(self.rules):
            if not (isinstance(s, int | float) and 0 <= s < 1):
                raise ValueError(f"allocate: rule {pattern!r} has {s!r}; a sparsity is in [0, 1).")

    def __call__(self, layers: Sequence[Layer], sparsity: float) -> Counts:
        """Returns the number of units that each parameter keeps."""
        own = named_rules.match(self.rules, [layer.name for layer in layers])
        for name, s in own.items():
            if s is None:
                raise ValueError(f"allocate has no sparsity for {name}. End the rules with '**'.")
        part = sparsity / self.whole if self.whole else float(sparsity > 0)
        if part * max(own.values(), default=0) > 1:
            raise ValueError(
                f"at sparsity {sparsity} of {self.whole}, the rules of `allocate` ask some "
                "parameter for more than it has. Give the spec the largest sparsity of a schedule."
            )
        return {
            layer.name: np.asarray(kept(layer.units, own[layer.name] * part), np.int32)
            for layer in layers
        }


def _copies(layers: Sequence[Layer], noun: str) -> list[tuple[int, Layer]]:
    """The units of every index of every layer."""
    sizes = {layer.name: math.prod(layer.shape) // max(layer.units, 1) for layer in layers}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ValueError(
            f"{noun} shares one total among units of different sizes ({listed}). Allocate by "
            "uniform or by rules, or give all parameters one pattern."
        )
    return [(layer.units, layer) for layer in layers for _ in range(layer.copies)]


def _by_layer(layers: Sequence[Layer], counts: np.ndarray) -> Counts:
    """Counts of all indices in a row, cut into those of each parameter."""
    ends = np.cumsum([layer.copies for layer in layers])[:-1]
    parts = np.split(counts.astype(np.int32), ends) if layers else []
    return {
        layer.name: part.reshape(layer.stacked) for layer, part in zip(layers, parts, strict=True)
    }


def _scaled(sizes: np.ndarray, ratios: np.ndarray, total: int) -> np.ndarray:
    """Shares e * ratio * size, those above their size cut and e solved again for the rest.

    With D the parameters that are dense, sum_D size + e sum_rest ratio size = total gives e.
    Cutting a share leaves more for the others, so e only grows from one round to the next: what was
    cut once stays cut, and there are at most as many rounds as sizes.
    """
    raw, dense = sizes * ratios, np.zeros(len(sizes), bool)
    while not dense.all():
        e = (total - sizes[dense].sum()) / raw[~dense].sum() if raw[~dense].any() else 0.0
        over = ~dense & (e * raw > sizes)
        if not over.any():
            return np.where(dense, sizes, e * raw)
        dense |= over
    return sizes


def _shifted(sizes: np.ndarray, d: np.ndarray, total: int) -> np.ndarray:
    """Shares (d + c) * size within 0 and size, c by bisection: the sum grows with it.

    Clipping makes the sum piecewise linear in c, and 100 halvings of an interval of length 2 reach
    the last bit of float64 long before they end.
    """

    def cut(c: float) -> np.ndarray:
        return np.clip(d + c, 0, 1) * sizes

    low, high = -1.0, 1.0  # 0 <= d <= 1, so these give nothing and everything
    for _ in range(100):
        c = (low + high) / 2
        low, high = (c, high) if cut(c).sum() < total else (low, c)
    return cut(high)


def _apportion(shares: np.ndarray, sizes: np.ndarray, total: int) -> np.ndarray:
    """Integers that sum to the total, by largest remainder, ties to the earlier."""
    # Remainders are compared to six digits: equal shares must tie, and the rounding of float64
    # would decide between them otherwise.
    counts = np.minimum(np.floor(shares), sizes).astype(np.int64)
    order = np.argsort(-np.round(shares - counts, 6), kind="stable")
    while counts.sum() < total:
        counts[next(i for i in order if counts[i] < min(sizes[i], np.floor(shares[i]) + 1))] += 1
    while counts.sum() > total:  # a share that rounding lifted to the next integer
        counts[next(i for i in order[::-1] if counts[i] > 0)] -= 1
    return counts
