"""Calibration: what meets a parameter in its products, as numbers that add up.

    stats(A and B) = merge(stats(A), stats(B))        for batches A and B

A `Stat` is a monoid: how batches are split, and in which order they come, changes no range (that of
`EMA` follows the order, as its name says). `observed` measures one call, as a pure function;
`calibrate` adds up batches on the host, counts in int64 and sums in float64.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.quantization._calibrators import EMA, MSE, Fixed, Percentile
from unitscale_jax.quantization._ops import on_grid, symmetric
from unitscale_jax.quantization._params import ACTIVATIONS, Rules
from unitscale_jax.quantization._product import Conv, Dot, Product, product_of
from unitscale_jax.quantization._qtensor import is_quantized
from unitscale_jax.quantization._roles import Held, Roles, resolved
from unitscale_jax.quantization._spec import QSpec
from unitscale_jax.trace import Place, Site, Staged, captured, origins, stage, walk

Axes: TypeAlias = tuple[int, ...]
Kind: TypeAlias = Literal["range", "channels", "hessian"]
Valid: TypeAlias = Callable[..., Any]

BINS = 8192
SHIFT = 18  # sign, exponent and five bits of the fraction of a float32 remain: bins of 2^-5


@dataclass(frozen=True)
class Layout:
    """Which axes of a parameter the statistics of what it meets are about, counted from the end.

    Attributes:
        batch: One statistic for each index: stacked layers first, then batch axes of the product.
        contracted: K, flattened in the order of the parameter's axes.
        channels: The input channels among them: all but the window of a convolution.
        layers: How many of `batch` are stacked layers; those a range has, too.
        clear: Whether `contracted` is known element by element, so that channels have statistics.
    """

    batch: Axes = ()
    contracted: Axes = ()
    channels: Axes = ()
    layers: int = 0
    clear: bool = False


_FIELDS = ["low", "high", "rows", "counts", "errors", "peak", "total", "hessian"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=_FIELDS, meta_fields=["spec", "layout"]
)
@dataclass(frozen=True, eq=False)
class Stat:
    """What is known of the operand that meets a parameter.

    Leading axes are those of stacked layers; `peak`, `total` and `hessian` then have the batch axes
    of the product.

    Attributes:
        low: float32: the least value, at most zero.
        high: float32: the largest value, at least zero.
        rows: How many rows were seen, of a convolution how many positions.
        counts: (.., 8192), of `Percentile`: how many magnitudes lie in each logarithmic bin.
        errors: (.., ratios), of `MSE`: squared quantization errors; see `observed`.
        peak: (.., channels): max |x_j|.
        total: (.., channels): sum |x_j|.
        hessian: (.., K, K): sum x x^T.
        spec: How the operand is quantized; None: it stays in floating point.
        layout: Which axes of the parameter these are.
    """

    low: Any
    high: Any
    rows: Any
    counts: Any = None
    errors: Any = None
    peak: Any = None
    total: Any = None
    hessian: Any = None
    _: KW_ONLY
    spec: QSpec | None
    layout: Layout = field(default_factory=Layout)

    @property
    def range(self) -> Any:
        """float32 (.., 2): the ends of the range, (-m, m) if it is symmetric; None without a spec.

        A range of `MSE` before its second pass is that of `Absmax`.
        """
        if self.spec is None:
            return None
        low, high = self._ends()
        if self.spec.symmetric:
            high = _module(high).maximum(-low, high)
            low = -high
        # What is on the host stays there, so that it is a number inside of a trace, too.
        return jnp.asarray(_module(low).stack([low, high], axis=-1), jnp.float32)

    def _ends(self) -> tuple[Any, Any]:
        calibrator = None if self.spec is None else self.spec.calibrator
        xp = _module(self.low)
        whole = xp.maximum(-self.low, self.high)
        if isinstance(calibrator, Fixed):
            full = lambda end: np.full(np.shape(self.low), end, np.float32)
            return full(calibrator.low), full(calibrator.high)
        if isinstance(calibrator, Percentile):
            m = np.minimum(_percentile(np.asarray(self.counts), calibrator), np.asarray(whole))
            return -m, m
        if isinstance(calibrator, MSE) and self.errors is not None:
            # Of equal errors argmin takes the first, which is the largest fraction.
            best = xp.asarray(calibrator.ratios)[xp.argmin(self.errors, axis=-1)]
            return -best * whole, best * whole
        return self.low, self.high

    @property
    def mean(self) -> Any:
        """(.., channels): mean |x_j|."""
        inner = math.prod(np.shape(self.total)[self.layout.layers : len(self.layout.batch)])
        rows = np.asarray(self.rows, np.float64) / inner
        rows = rows.reshape(*rows.shape, *[1] * (np.ndim(self.total) - rows.ndim))
        return np.asarray(self.total) / np.maximum(rows, 1)

    def merge(self, other: "Stat") -> "Stat":
        """Both together; `other` is the later one, which only `EMA` minds.

        Raises:
            ValueError: They are statistics of different things.
        """
        held = lambda stat: [getattr(stat, name) is not None for name in _FIELDS]
        same = (self.spec, self.layout, held(self)) == (other.spec, other.layout, held(other))
        if not same or np.shape(self.low) != np.shape(other.low):
            raise ValueError(
                f"statistics of {self.layout} for {self.spec} do not merge with those of "
                f"{other.layout} for {other.spec}; collect both by the same rules and kinds."
            )
        whole = self._joined(other)
        if self.spec is None or not isinstance(self.spec.calibrator, EMA):
            return whole
        new = np.float32(1 - self.spec.calibrator.decay)
        # a + new (b - a), so that the average of a constant is that constant to the bit.
        pairs = zip(self._bounds(), other._bounds(), strict=True)
        low, high = (self._unless_empty(other, a, a + new * (b - a), b) for a, b in pairs)
        return replace(whole, low=low, high=high)

    def _bounds(self) -> tuple[Any, Any]:
        """The ends of the range; both the largest magnitude, if it is symmetric."""
        assert self.spec is not None
        m = _module(self.low).maximum(-self.low, self.high)
        return (-m, m) if self.spec.symmetric else (self.low, self.high)

    def _unless_empty(self, other: "Stat", mine: Any, both: Any, theirs: Any) -> Any:
        xp = _module(both)
        return xp.where(self.rows == 0, theirs, xp.where(other.rows == 0, mine, both))

    def _joined(self, other: "Stat") -> "Stat":
        """Both together as parts of one batch."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in _FIELDS}
        return replace(
            self,
            **{name: None if a is None else _join(name, a, b) for name, (a, b) in pairs.items()},
        )


class Stats(dict[str, Stat]):
    """Parameter -> `Stat`, as `calibrate` returns them.

    Attributes:
        inputs: Shapes and dtypes of the inputs it was calibrated on, without the parameters.
    """

    def __init__(self, stats: Mapping[str, Stat], inputs: tuple[Any, ...]) -> None:
        """Statistics, and the outline of a batch."""
        super().__init__(stats)
        self.inputs = inputs


def observed(
    fn: Callable[..., Any],
    rules: Rules,
    *,
    collect: Collection[Kind] = ("range",),
    valid: Valid | None = None,
    given: Mapping[str, Stat] | None = None,
) -> Callable[..., tuple[Any, dict[str, Stat]]]:
    """Evaluates `fn`, and measures what meets the parameters that rules name.

    Args:
        fn: A function whose first argument is the parameters, arrays all of them.
        rules: Pairs (pattern, `DotSpec`), as of `quantized`; products of activations are always
            quantized by what they are at the moment, and have no statistics.
        collect: `"range"` for static ranges, of parameters with an `x`; `"channels"` for
            `smoothquant`; `"hessian"` for `gptq`, and both for `awq`.
        valid: `valid(*inputs)` is true where a row counts, (batch,) or (batch, time), and false for
            padding; the leading axes of what meets a parameter must be these.
        given: Earlier statistics, whose ranges `MSE` tries fractions of: its second pass.

    Returns:
        A function of the arguments of `fn` that returns its result, by the same equations (which
        compilers may fuse otherwise), and a dict parameter -> `Stat`; pure, so it may be jitted and
        its statistics carried.

    A parameter of several products has one `Stat` of all. Under a scan over stacked layers each
    layer has its own; layers that Python slices from a stack share one. With `MSE`, n stacked
    layers cost n times the work, since a loop's body does not know which layer it is.

    Raises:
        ValueError: A rule matches nothing; a parameter is quantized already; a product stands where
            nothing can be observed; channels or rows cannot be told apart.

    Example:
        >>> import unitscale_jax as us
        >>> fn = lambda params, x: jax.nn.relu(x @ params["w"])
        >>> rules = {"w": us.DotSpec(w=us.QSpec(), x=us.QSpec())}
        >>> y, stats = observed(fn, rules)({"w": jnp.eye(2)}, jnp.array([[1.0, -3.0]]))
        >>> y.tolist(), stats["w"].range.tolist()
        ([[1.0, 0.0]], [-3.0, 3.0])
    """
    unknown = set(collect) - {"range", "channels", "hessian"}
    if unknown or not collect:
        raise ValueError(f"collect is among 'range', 'channels', 'hessian', not {sorted(unknown)}.")

    @functools.wraps(fn)
    def observed_fn(params: Any, *inputs: Any, **kwargs: Any) -> tuple[Any, dict[str, Stat]]:
        wanted = _wanted(fn, rules, collect, params, *inputs, **kwargs)
        mask = None if valid is None else jnp.asarray(valid(*inputs, **kwargs))
        observers = {
            name: _Observer(name, spec, layout, frozenset(collect), mask, _candidates(given, name))
            for name, (spec, layout, _) in wanted.items()
        }
        at: dict[Place, list[tuple[_Observer, Meeting]]] = {}
        for name, (_, _, meetings) in wanted.items():
            for meeting in meetings:
                at.setdefault(meeting.site.place, []).append((observers[name], meeting))

        def pick(site: Site, operands: list[Any], results: list[Any]) -> Any:
            del results
            found = at.get(site.place)
            return found and [o.measure(m, operands[1 - m.side]) for o, m in found]

        y, captures = captured(fn, pick)(params, *inputs, **kwargs)
        stats: dict[str, Stat] = {}
        for capture in captures:
            for (observer, meeting), value in zip(
                at.pop(capture.place), capture.value, strict=True
            ):
                stat = observer.stat(meeting, value)
                known = stats.get(observer.name)
                stats[observer.name] = stat if known is None else known._joined(stat)
        if at:
            raise ValueError(_unobserved(at))
        return y, {name: stats[name] for name in wanted}

    return observed_fn


def calibrate(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    rules: Rules,
    *,
    collect: Collection[Kind] = ("range",),
    valid: Valid | None = None,
) -> Stats:
    """Statistics over batches of what meets the parameters that rules name.

    Args:
        fn: A function whose first argument is the parameters.
        params: Arrays.
        batches: Each a tuple of the inputs of `fn` after the parameters, or its only input.
            `MSE` goes through them twice, so for it they are a list and not an iterator.
        rules: Pairs (pattern, `DotSpec`).
        collect: See `observed`.
        valid: See `observed`; without it, padding counts as data.

    Returns:
        Parameter -> `Stat`, for `quantize(params, rules, stats)` and `quantized(.., stats=stats)`.

    Raises:
        ValueError: There are no batches, no parameter has anything to measure, what meets a
            parameter is not finite, or whatever `observed` raises.

    Law: batches may be split and ordered at will.

    Example:
        >>> import unitscale_jax as us
        >>> fn = lambda params, x: x @ params["w"]
        >>> rules = {"w": us.DotSpec(w=us.QSpec(axes=(-2,)), x=us.QSpec())}
        >>> params = {"w": jnp.eye(2)}
        >>> stats = calibrate(fn, params, [jnp.ones((1, 2)), -2 * jnp.ones((3, 2))], rules)
        >>> us.quantize(params, rules, stats)["w"].x_range.tolist()
        [-2.0, 2.0]
    """
    measure = functools.partial(observed, fn, rules, collect=collect, valid=valid)
    stats, inputs = _folded(measure(), params, batches)
    if not stats:
        raise ValueError(
            "no rule has anything to calibrate: none has an `x` that meets its parameter in a "
            "product. Give rules an x=QSpec(), or collect 'channels' or 'hessian'."
        )
    for name, stat in stats.items():
        if not (np.isfinite(stat.low).all() and np.isfinite(stat.high).all()):
            raise ValueError(
                f"what meets {name} is not finite in these batches, and no range fits NaN or "
                "infinity; mend the batches, or exclude the parameter."
            )
        if (np.asarray(stat.rows) == 0).any():
            raise ValueError(
                f"nothing met {name} in these batches: a branch that was never taken, or no valid "
                "rows. Give batches that reach it, or exclude it."
            )
    tries = [name for name, stat in stats.items() if _is_tried(stat)]
    if tries:
        if iter(batches) is batches:
            raise ValueError(
                f"MSE() of what meets {tries[0]} takes two passes over the batches, and an "
                "iterator gives one; make it a list."
            )
        again, _ = _folded(measure(given=stats), params, batches)
        stats |= {name: replace(stats[name], errors=again[name].errors) for name in tries}
    return Stats(stats, inputs)


def merge_stats(stats: Mapping[str, Stat], more: Mapping[str, Stat]) -> dict[str, Stat]:
    """Statistics of two batches as those of both, `more` the later one.

    Example:
        >>> import unitscale_jax as us
        >>> rules = {"w": us.DotSpec(w=us.QSpec(), x=us.QSpec(calibrator=us.EMA(0.5)))}
        >>> see = lambda x: observed(lambda p, x: x @ p["w"], rules)({"w": jnp.eye(1)}, x)[1]
        >>> merge_stats(see(jnp.array([[2.0]])), see(jnp.array([[4.0]])))["w"].range.tolist()
        [-3.0, 3.0]
    """
    if stats.keys() != more.keys():
        odd = sorted(stats.keys() ^ more.keys())
        raise ValueError(f"only one of the two has statistics of {', '.join(odd)}.")
    return {name: stat.merge(more[name]) for name, stat in stats.items()}


def _folded(
    measured: Callable[..., Any], params: Any, batches: Iterable[Any]
) -> tuple[dict[str, Stat], tuple[Any, ...]]:
    step = jax.jit(lambda params, *inputs: measured(params, *inputs)[1])
    stats: dict[str, Stat] | None = None
    inputs: tuple[Any, ...] = ()
    for batch in batches:
        inputs = batch if isinstance(batch, tuple) else (batch,)
        measured_now: dict[str, Stat] = step(params, *inputs)
        new = {name: _on_host(stat) for name, stat in measured_now.items()}
        stats = new if stats is None else merge_stats(stats, new)
    if stats is None:
        raise ValueError(
            "there are no batches to calibrate on; an iterator that was used before is empty."
        )
    return stats, jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), inputs
    )


_ON_HOST = {
    "low": np.float32,
    "high": np.float32,
    "peak": np.float32,
    "rows": np.int64,
    "counts": np.int64,
    "errors": np.float64,
    "total": np.float64,
    "hessian": np.float64,
}


def _on_host(stat: Stat) -> Stat:
    held: dict[str, Any] = {name: getattr(stat, name) for name in _FIELDS}
    wide: dict[str, Any] = {
        name: None if x is None else np.asarray(x).astype(_ON_HOST[name])
        for name, x in held.items()
    }
    return replace(stat, **wide)


def _module(x: Any) -> Any:
    return np if isinstance(x, np.ndarray | np.generic) else jnp


def _join(name: str, a: Any, b: Any) -> Any:
    if name == "low":
        return _module(a).minimum(a, b)
    return _module(a).maximum(a, b) if name in ("high", "peak") else a + b


def _percentile(counts: np.ndarray, calibrator: Percentile) -> np.ndarray:
    """The largest number of the bin that holds the k-th smallest magnitude."""
    flat = counts.reshape(-1, BINS)
    bins = [_bin(row, calibrator.rank(int(row.sum()))) for row in flat]
    edges = ((np.array(bins, np.uint32) + 1) << SHIFT) - 1
    return edges.view(np.float32).reshape(counts.shape[:-1])


def _bin(row: np.ndarray, rank: int) -> int:
    total = np.cumsum(row)
    return int(np.searchsorted(total, rank)) if rank <= total[-1] else 0  # of no elements 0


def _is_tried(stat: Stat) -> bool:
    return stat.spec is not None and isinstance(stat.spec.calibrator, MSE)


def _candidates(given: Mapping[str, Stat] | None, name: str) -> Any:
    """(layers,) bounds that the second pass of `MSE` takes fractions of."""
    stat = None if given is None else given.get(name)
    if stat is None or not _is_tried(stat):
        return None
    return jnp.maximum(-jnp.asarray(stat.low), jnp.asarray(stat.high)).reshape(-1)


# Where parameters meet what.


@dataclass(frozen=True, eq=False)
class Meeting:
    """A product that a parameter meets.

    Attributes:
        site: Where.
        side: Of the parameter.
        held: As what it is there.
        stacks: For each scan around, the outer first, the parameter's axis that it runs along.
    """

    site: Site
    side: int
    held: Held
    stacks: tuple[int | None, ...]


@dataclass
class Meetings(Roles):
    """The flow of parameters; `products` collects theirs."""

    products: dict[str, dict[tuple[Place, int], Meeting]] = field(default_factory=dict)
    stacks: dict[tuple[Place, str], int | None] = field(default_factory=dict)

    def unstacked(self, site: Site, x: tuple[Held, ...]) -> tuple[Held, ...]:
        """One row of a stack, whose axis is remembered."""
        for held in x:
            self.stacks[site.place, held.name] = _single(held.axes[0]) if held.whole else None
        return super().unstacked(site, x)

    def visit(self, site: Site, inputs: list[tuple[Held, ...]]) -> list[tuple[Held, ...]]:
        """Records a product; everything else as `Roles`."""
        if product_of(site) is not None:
            for side in (0, 1):
                for held in inputs[side]:
                    self._add(site, side, held)
        out = super().visit(site, inputs)
        if site.name == "rev":  # the numbers, in another order
            return [tuple(replace(held, whole=False) for held in helds) for helds in out]
        return out

    def _add(self, site: Site, side: int, held: Held) -> None:
        above = list(_above(site))
        if any(parent.name.startswith("custom_") for parent in above):
            return  # where nothing is quantized, a derivative being one of arrays
        scans = [parent for parent in reversed(above) if parent.name == "scan"]
        stacks = tuple(self.stacks.get((scan.place, held.name)) for scan in scans)
        found = self.products.setdefault(held.name, {})
        found[site.place, side] = Meeting(site, side, held, stacks)


def _single(axes: frozenset[int]) -> int | None:
    return next(iter(axes)) if len(axes) == 1 else None


def _above(site: Site) -> Iterator[Site]:
    while site.parent is not None:
        site = site.parent
        yield site


def meetings(staged: Staged, params: Any) -> Meetings:
    """Every product that each parameter meets, and the scans that run along its axes."""
    flow, jaxpr = Meetings(), staged.closed.jaxpr
    entering: list[tuple[Held, ...]] = []
    for x, origin in zip(staged.operands, origins(staged, params), strict=True):
        rank = len(np.shape(x))
        axes = tuple(frozenset({k - rank}) for k in range(rank))
        entering.append(() if origin.holds is None else (Held(origin.holds, axes),))
    walk(flow, jaxpr, entering, staged.closed.consts)
    return flow


def _wanted(
    fn: Callable[..., Any],
    rules: Rules,
    collect: Collection[Kind],
    params: Any,
    *inputs: Any,
    **kwargs: Any,
) -> dict[str, tuple[QSpec | None, Layout, list[Meeting]]]:
    """For each parameter to observe, how what it meets is quantized, and its products."""
    done = [
        name
        for name, leaf in trees.named_leaves(params, is_leaf=is_quantized).items()
        if is_quantized(leaf)
    ]
    if done:
        raise ValueError(f"{', '.join(done)}: quantized already; calibrate the float parameters.")
    staged = stage(fn, params, *inputs, **kwargs)
    chosen = resolved(rules, staged, params, params)
    found = meetings(staged, params)
    sizes = {name: np.shape(leaf) for name, leaf in trees.named_leaves(params).items()}
    wanted = {}
    for name, spec in chosen:
        met = list(found.products.get(name, {}).values())
        more = bool({"channels", "hessian"} & set(collect))
        if spec.w.axes == ACTIVATIONS or not met or not (more or spec.x):
            continue
        layout = _layout(name, sizes[name], met)
        wanted[name] = spec.x, layout, met
    return wanted


def _layout(name: str, shape: Sequence[int], met: Sequence[Meeting]) -> Layout:
    """What all products of a parameter agree on; at least the layers that all of them run along."""
    each = [_layout_of(name, shape, meeting) for meeting in met]
    layers = min(layout.layers for layout in each)
    cut = [
        replace(it, batch=it.batch[:layers] + it.batch[it.layers :], layers=layers) for it in each
    ]
    same = all(it == cut[0] for it in cut)
    return cut[0] if same else Layout(batch=cut[0].batch[:layers], layers=layers)


def _layout_of(name: str, shape: Sequence[int], meeting: Meeting) -> Layout:
    product, held, rank = product_of(meeting.site), meeting.held, len(shape)
    assert product is not None, name
    layers = 0
    for axis, length in zip(meeting.stacks, _lengths(meeting.site), strict=True):
        if axis is not None and axis + rank == layers and shape[axis] == length:
            layers += 1
        else:
            break
    stacked = tuple(k - rank for k in range(layers))
    unclear = Layout(stacked, layers=layers)
    pairs = _contraction(product, meeting)
    if pairs is None or not held.whole:
        return unclear
    contracted = sorted({axis for axis, _ in pairs if axis is not None})
    batch = sorted({axis for axis, _ in _batch(product, meeting) if axis is not None})
    window = _window(product, meeting)
    full = product.shape(meeting.side)
    at = {axis: full[dim] for dim, axes in enumerate(held.axes) for axis in axes}
    if any(at[axis] != shape[axis] for axis in (*contracted, *batch)) or set(stacked) & set(batch):
        return unclear
    channels = tuple(axis for axis in contracted if axis not in window)
    return Layout(stacked + tuple(batch), tuple(contracted), channels, layers, clear=True)


def _lengths(site: Site) -> list[int]:
    scans = [parent for parent in _above(site) if parent.name == "scan"]
    return [scan.eqn.params["length"] for scan in reversed(scans)]


Pairs: TypeAlias = list[tuple[int | None, int]]


def _contraction(product: Product, meeting: Meeting) -> Pairs | None:
    """(The parameter's own axis, the other operand's dimension) of what is summed over, in order.

    None where a dimension is none or several of its axes, or where this is not implemented.
    """
    side, held = meeting.side, meeting.held
    if isinstance(product, Dot):
        pairs = [(held.axes[dim], product.pair(side, dim)) for dim in product.contracted(side)]
    elif isinstance(product, Conv) and side == 1:
        numbers, groups = product._numbers, product.site.eqn.params["feature_group_count"]
        if groups != 1:
            return None
        _, channel, *window = numbers.rhs_spec
        dims = zip((channel, *window), numbers.lhs_spec[1:], strict=True)
        pairs = [(held.axes[dim], other) for dim, other in dims]
    else:
        return None
    own = [_single(axes) for axes, _ in pairs]
    elsewhere = [axis for dim, axes in enumerate(held.axes) for axis in axes]
    unclear = any(
        (axis is None and len(axes) > 0) or (axis is not None and elsewhere.count(axis) > 1)
        for axis, (axes, _) in zip(own, pairs, strict=True)
    )
    sized = [
        (a, d)
        for a, (axes, d) in zip(own, pairs, strict=True)
        if axes or product.shape(1 - side)[d] > 1
    ]
    if unclear or any(axis is None for axis, _ in sized):
        return None
    flat = [(a, d) for a, (_, d) in zip(own, pairs, strict=True)]
    return sorted(flat, key=lambda pair: -math.inf if pair[0] is None else pair[0])


def _batch(product: Product, meeting: Meeting) -> Pairs:
    """The same for batch dimensions that the parameter has itself."""
    if not isinstance(product, Dot):
        return []
    numbers = product._numbers[1]
    dims = zip(numbers[meeting.side], numbers[1 - meeting.side], strict=True)
    pairs = [(_single(meeting.held.axes[dim]), other) for dim, other in dims]
    return sorted([(axis, d) for axis, d in pairs if axis is not None])


def _window(product: Product, meeting: Meeting) -> list[int]:
    if not isinstance(product, Conv):
        return []
    window = product._numbers.rhs_spec[2:]
    return [axis for dim in window for axis in meeting.held.axes[dim]]


def _unobserved(at: Mapping[Place, Sequence[tuple["_Observer", Meeting]]]) -> str:
    missed = []
    for observer, meeting in [pair for pairs in at.values() for pair in pairs]:
        closed = [it.name for it in _above(meeting.site) if it.name in ("while", "shard_map")]
        where = f" inside of {closed[0]}" if closed else ""
        missed.append(f"{observer.name} meets a {meeting.site.name}{where}")
    return (
        f"{'; '.join(missed)}: nothing can be observed there. Calibrate a function without it (a "
        "scan for a while loop, one shard), or give these ranges by Fixed(..) or leave them open."
    )


def canonical(w: Any, layout: Layout) -> jax.Array:
    """A parameter as matrices (batch, K, outputs), in the order of its own axes."""
    first, k, last = _orders(w.ndim, layout)
    sizes = [math.prod(w.shape[axis] for axis in axes) for axes in (first, k, last)]
    return jnp.asarray(w).transpose(*first, *k, *last).reshape(sizes)


def uncanonical(m: jax.Array, layout: Layout, shape: Sequence[int]) -> jax.Array:
    """The inverse of `canonical`; `shape` is that of the array to make."""
    first, k, last = _orders(len(shape), layout)
    order = [axis % len(shape) for axis in (*first, *k, *last)]
    return m.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def _orders(rank: int, layout: Layout) -> tuple[Axes, Axes, Axes]:
    known = (*layout.batch, *layout.contracted)
    return layout.batch, layout.contracted, tuple(k for k in range(-rank, 0) if k not in known)


# What is measured.


@dataclass(frozen=True, eq=False)
class _Observer:
    """Measures what meets one parameter."""

    name: str
    spec: QSpec | None
    layout: Layout
    collect: frozenset[str]
    mask: Any
    candidates: Any

    def measure(self, meeting: Meeting, x: jax.Array) -> dict[str, Any]:
        """All numbers of one product; zeros are what an empty operand has."""
        product = product_of(meeting.site)
        assert product is not None
        v = on_grid(jax.lax.stop_gradient(x))
        keep = self._rows(product, meeting, v)
        seen = v if keep is None else jnp.where(keep, v, np.float32(0))
        out: dict[str, Any] = {
            "low": jnp.min(seen, initial=0.0),
            "high": jnp.max(seen, initial=0.0),
            "rows": self._count(product, meeting, v, keep),
        }
        calibrator = None if self.spec is None else self.spec.calibrator
        if isinstance(calibrator, Percentile):
            out["counts"] = _histogram(v, keep)
        if isinstance(calibrator, MSE) and self.candidates is not None:
            out["errors"] = self._tried(seen, calibrator)
        if {"channels", "hessian"} & self.collect:
            out |= self._channels(product, meeting, seen)
        return out

    def stat(self, meeting: Meeting, value: dict[str, Any]) -> Stat:
        """The numbers of a capture as a `Stat`, with leading axes only for the layers."""
        loops = len(meeting.stacks)
        gone = tuple(range(self.layout.layers, loops))
        fold = {"low": jnp.min, "high": jnp.max, "peak": jnp.max}
        out = {k: fold.get(k, jnp.sum)(x, axis=gone) for k, x in value.items()} if gone else value
        if "errors" in out:
            out = out | {"errors": self._own(out["errors"])}
        return Stat(**out, spec=self.spec, layout=self.layout)

    def _own(self, errors: jax.Array) -> jax.Array:
        """Each layer's errors at fractions of its own bound: (layers.., bounds, ratios)."""
        lead = errors.shape[: self.layout.layers]
        n = math.prod(lead)
        flat = errors.reshape(n, n, -1)[jnp.arange(n), jnp.arange(n)]
        return flat.reshape(*lead, -1)

    def _rows(self, product: Product, meeting: Meeting, v: jax.Array) -> jax.Array | None:
        """Which elements count, in the shape of the operand."""
        if self.mask is None:
            return None
        free = [d for d in range(v.ndim) if d not in product.contracted(1 - meeting.side)]
        shape, sizes = self.mask.shape, tuple(v.shape[d] for d in free)
        known = isinstance(product, Dot | Conv)
        if known and sizes[: len(shape)] == shape:
            return jax.lax.broadcast_in_dim(self.mask, v.shape, free[: len(shape)])
        if known and sizes and sizes[0] == math.prod(shape):
            return jax.lax.broadcast_in_dim(self.mask.reshape(-1), v.shape, free[:1])
        raise ValueError(
            f"valid has shape {shape}, and what meets {self.name} has rows {sizes} ("
            f"{meeting.site.name}), so padding cannot be told there. Give batches without padding, "
            f"or rules without {self.name}."
        )

    def _count(self, product: Product, meeting: Meeting, v: jax.Array, keep: Any) -> jax.Array:
        wide = _row_size(product, meeting)
        if keep is None:
            return jnp.int32(v.size // max(wide, 1))
        each = v.size // max(wide * self.mask.size, 1)
        return jnp.sum(self.mask, dtype=jnp.int32) * np.int32(each)

    def _tried(self, v: jax.Array, calibrator: MSE) -> jax.Array:
        spec = self.spec
        assert spec is not None

        def error(m: jax.Array) -> jax.Array:
            codes, scale = symmetric(v, m.reshape([1] * v.ndim), spec)
            off = codes.astype(jnp.float32) * scale - v
            return jnp.sum(off * off)

        tried = self.candidates[:, None] * jnp.asarray(calibrator.ratios)
        return jax.lax.map(error, tried.reshape(-1)).reshape(tried.shape)

    def _channels(self, product: Product, meeting: Meeting, v: jax.Array) -> dict[str, Any]:
        pairs = _contraction(product, meeting)
        if not self.layout.clear or pairs is None:
            raise ValueError(
                f"what meets {self.name} in {meeting.site.name} has no input channels that are its "
                "own axes, one by one (it is reshaped, cut, computed with, grouped, or used over "
                "different axes). Leave it out of these rules."
            )
        batch = _batch(product, meeting)
        out: dict[str, Any] = {}
        if "channels" in self.collect:
            conv = isinstance(product, Conv)  # whose channels are one dimension, windows aside
            dims = [product._numbers.lhs_spec[1]] if conv else [d for _, d in pairs]
            rows = _by_rows(v, [d for _, d in batch], dims)  # (batch.., rows, channels)
            size = jnp.abs(rows)
            out |= {"peak": jnp.max(size, axis=-2, initial=0.0), "total": jnp.sum(size, axis=-2)}
        if "hessian" in self.collect:
            if isinstance(product, Conv):
                rows = _patches(product, v, pairs)
            else:
                rows = _by_rows(v, [d for _, d in batch], [d for _, d in pairs])
            exact = jax.lax.Precision.HIGHEST
            out["hessian"] = jnp.einsum("...rk,...rl->...kl", rows, rows, precision=exact)
        return out


def _row_size(product: Product, meeting: Meeting) -> int:
    """Elements of a row: K, of a convolution its channels."""
    shape = product.shape(1 - meeting.side)
    if isinstance(product, Conv):
        return shape[product._numbers.lhs_spec[1]]
    return math.prod(shape[d] for d in product.contracted(1 - meeting.side))


def _by_rows(v: jax.Array, batch: Sequence[int], dims: Sequence[int]) -> jax.Array:
    rows = [d for d in range(v.ndim) if d not in (*batch, *dims)]
    sizes = [v.shape[d] for d in batch]
    count = math.prod(v.shape[d] for d in rows)
    return v.transpose(*batch, *rows, *dims).reshape(*sizes, count, -1)


def _patches(product: Conv, v: jax.Array, pairs: Pairs) -> jax.Array:
    """(rows, K): the windows of a convolution, K in the order of the kernel's axes."""
    params, numbers = product.site.eqn.params, product._numbers
    kernel = product.shape(1)
    window = [kernel[d] for d in numbers.rhs_spec[2:]]
    v = v.transpose(numbers.lhs_spec)  # (batch, channels, window..)
    patches = jax.lax.conv_general_dilated_patches(
        v,
        window,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        precision=jax.lax.Precision.HIGHEST,
    )
    patches = jnp.moveaxis(patches, 1, -1)
    cut = patches.reshape(-1, v.shape[1], *window)  # (rows, channels, window..)
    order = [1 + numbers.lhs_spec[1:].index(d) for _, d in pairs]
    return cut.transpose(0, *order).reshape(cut.shape[0], -1)


def _histogram(v: jax.Array, keep: jax.Array | None) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(jnp.abs(v), jnp.uint32) >> np.uint32(SHIFT)
    ones = jnp.ones(v.shape, jnp.int32) if keep is None else keep.astype(jnp.int32)
    return jnp.zeros(BINS, jnp.int32).at[bits.reshape(-1).astype(jnp.int32)].add(ones.reshape(-1))
