"""Scales moved from activations to weights, before either is quantized.

    X W = (X / s) (s W)        for any s > 0 per input channel

SmoothQuant (https://arxiv.org/abs/2211.10438) takes from outlier channels of X what W has to spare;
AWQ (https://arxiv.org/abs/2306.00978) gives channels that matter finer steps of W. The division is
folded into what produces X: the gain of a norm, the output channels of a layer.

Which parameters produce a channel, and who else consumes it, is read from the equations. Each
parameter that has the channel gets an unknown degree d, meaning a factor s^d; an equation says how
degrees relate (a product adds them, a sum needs them equal, a nonlinearity needs them zero), and
the result of the function must have degree zero. With degree one for the weight, the solution is
the fold, and there is none exactly if something in between is not homogeneous. Scales are powers of
two, so the folded function has the same bits, short of under- and overflow.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.quantization._params import ACTIVATIONS, Rules, encode
from unitscale_jax.quantization._product import PRODUCTS
from unitscale_jax.quantization._qtensor import is_quantized, value_of
from unitscale_jax.quantization._roles import resolved
from unitscale_jax.quantization._spec import DotSpec
from unitscale_jax.quantization._stats import Meetings, Stat, Stats, canonical, meetings
from unitscale_jax.trace import ClosedJaxpr, Dims, Flow, Place, Site, dims, stage, trace, walk

FEWEST = np.float32(1e-4)


def smoothquant(
    fn: Callable[..., Any], params: Any, stats: Stats, rules: Rules, alpha: float = 0.5
) -> Any:
    """Moves the outliers of activations into the weights that meet them.

        s_j = max|X_j|^a / max|W_j|^(1 - a),    1 where either is zero

    Args:
        fn: A function whose first argument is the parameters.
        params: Arrays.
        stats: Of `calibrate(.., collect=("channels",))`.
        rules: Pairs (pattern, `DotSpec`): the weights to smooth. Weights that share what they meet
            (query, key and value) share a scale.
        alpha: How much of the outliers moves, from 0 to 1.

    Returns:
        Parameters of the same function, to the bit. Ranges have changed: calibrate anew.

    Raises:
        ValueError: A rule matches nothing; statistics are missing; nothing that a scale could be
            folded into produces what a weight meets. The message lists these weights: leave them
            out of `rules`.

    Example:
        >>> import unitscale_jax as us
        >>> fn = lambda p, x: (x * p["gain"]) @ p["w"]
        >>> params = {"gain": jnp.array([16.0, 1.0]), "w": jnp.ones((2, 3))}
        >>> x, rules = jnp.array([[1.0, -1.0]]), {"w": us.DotSpec(w=us.QSpec(), x=us.QSpec())}
        >>> stats = us.calibrate(fn, params, [x], rules, collect=["channels"])
        >>> smooth = smoothquant(fn, params, stats, rules)
        >>> smooth["gain"].tolist(), bool((fn(smooth, x) == fn(params, x)).all())
        ([4.0, 1.0], True)
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it is between 0, all stays, and 1, all moves.")

    def scale(plan: "_Plan", weights: Mapping[str, Any]) -> np.ndarray:
        peaks = np.maximum.reduce([np.asarray(stats[name].peak) for name in plan.weights])
        sizes = [plan.channels(name, np.abs(_wide(weights[name]))) for name in plan.weights]
        most = np.maximum.reduce(sizes)
        zero = (peaks == 0) | (most == 0)
        log = alpha * np.log2(np.where(zero, 1, peaks)) - (1 - alpha) * np.log2(
            np.where(zero, 1, most)
        )
        return np.where(zero, 1.0, np.exp2(np.round(log)))

    return _smoothed(fn, params, stats, rules, scale, ["peak"])


def awq(fn: Callable[..., Any], params: Any, stats: Stats, rules: Rules) -> Any:
    """Scales input channels of weights so that those that matter are rounded more finely.

        s_j = max(mean|X_j|^a, 1e-4) / sqrt(max s min s),    a = 0, 1/20, .., 19/20

    of which the a is taken with the least |X W - (X / s) Q(s W)|^2 on the batches calibrated on;
    rounded to powers of two, like the scales of `smoothquant`.

    Args:
        fn: A function whose first argument is the parameters.
        params: Arrays.
        stats: Of `calibrate(.., collect=("channels", "hessian"))`.
        rules: Pairs (pattern, `DotSpec`): the weights, and how they will be quantized.

    Returns:
        Parameters of the same function, to the bit; never worse than before on these batches.

    Raises:
        ValueError: As `smoothquant`.
    """
    plans, specs = _plans(fn, params, stats, rules, ["total", "hessian"])

    def scale(plan: "_Plan", weights: Mapping[str, Any]) -> np.ndarray:
        size = np.maximum.reduce([np.asarray(stats[name].mean) for name in plan.weights])
        best, least = np.ones(size.shape), np.inf
        for step in range(20):
            s = np.maximum(size ** (step / 20), FEWEST)
            s = s / np.sqrt(s.max(axis=-1, keepdims=True) * s.min(axis=-1, keepdims=True))
            s = np.exp2(np.round(np.log2(s)))
            cost = sum(
                _cost(weights[name], plan.on(name, s), specs[name], stats[name])
                for name in plan.weights
            )
            if cost < least:
                best, least = s, cost
        return best

    return _applied(params, plans, scale)


def _cost(w: Any, s: Any, spec: DotSpec, stat: Stat) -> float:
    """|X W - (X / s) Q(s W)|^2 by the second moments of X."""
    s = jnp.asarray(s, jnp.float32)
    wide = jnp.asarray(w).astype(jnp.float32)
    off = value_of(encode(wide * s, spec)) / s - wide
    columns = canonical(off, stat.layout)
    h = jnp.asarray(stat.hessian, jnp.float32).reshape(-1, *stat.hessian.shape[-2:])
    exact = jax.lax.Precision.HIGHEST
    return float(jnp.einsum("bkn,bkl,bln->", columns, h, columns, precision=exact))


def _wide(x: Any) -> np.ndarray:
    return np.asarray(jnp.asarray(x).astype(jnp.float32))


Scale: TypeAlias = Callable[["_Plan", Mapping[str, Any]], np.ndarray]


def _smoothed(
    fn: Callable[..., Any], params: Any, stats: Stats, rules: Rules, scale: Scale, need: list[str]
) -> Any:
    plans, _ = _plans(fn, params, stats, rules, need)
    return _applied(params, plans, scale)


def _applied(params: Any, plans: Sequence["_Plan"], scale: Scale) -> Any:
    leaves = trees.named_leaves(params)
    for plan in plans:
        s = scale(plan, leaves)
        for name, degree in plan.degrees.items():
            by = jnp.asarray(plan.on(name, s**degree)).astype(jnp.result_type(leaves[name]))
            leaves[name] = leaves[name] * by
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


def _plans(
    fn: Callable[..., Any], params: Any, stats: Stats, rules: Rules, need: Sequence[str]
) -> tuple[list["_Plan"], dict[str, DotSpec]]:
    """A fold for every weight that rules name, those that share a scale together."""
    done = [
        k for k, v in trees.named_leaves(params, is_leaf=is_quantized).items() if is_quantized(v)
    ]
    if done:
        raise ValueError(f"{', '.join(done)}: quantized already; smooth the float parameters.")
    inputs = getattr(stats, "inputs", None)
    if inputs is None:
        raise ValueError("stats are not those of `calibrate`, which say what the inputs are like.")
    staged = stage(fn, params, *inputs)
    chosen = resolved(rules, staged, params, params)
    specs = {name: spec for name, spec in chosen if spec.w.axes != ACTIVATIONS}
    for name in specs:
        lacking = [field for field in need if getattr(stats.get(name), field, None) is None]
        if lacking:
            raise ValueError(
                f"stats have no channels of {name}; calibrate with these rules and "
                "collect=('channels', 'hessian'), or leave it out."
            )
    traced, met = trace(fn, params, *inputs), meetings(staged, params)
    graph = dims(traced)
    plans: list[_Plan] = []
    refused: list[str] = []
    for name in specs:
        if any(name in plan.weights for plan in plans):
            continue
        try:
            plans.append(_plan(name, list(specs), params, stats, traced.closed, graph, met))
        except _Rigid as error:
            refused.append(f"{name} ({error})")
    if refused:
        raise ValueError(
            "nothing that a scale could be folded into produces what these weights meet: "
            f"{'; '.join(refused)}. Leave them out of these rules."
        )
    return plans, specs


class _Rigid(ValueError):  # noqa: N818
    """Channels that nothing can be folded into; the message says what is in the way."""


Factors: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class _Plan:
    """One scale per channel, and the power of it that each parameter is multiplied with.

    Attributes:
        factors: The channels, as dimensions of the function, in the order of the weight's axes.
        axes: The axes of every parameter, in terms of dimensions.
        degrees: Parameter -> power; 1 for the weights, -1 for what produces the channels.
        weights: Those of the weights that rules name.
        shape: Of the scale, as statistics have it.
    """

    factors: Factors
    axes: Mapping[str, Any]
    degrees: Mapping[str, int]
    weights: tuple[str, ...]
    shape: tuple[int, ...]

    def on(self, name: str, s: np.ndarray) -> np.ndarray:
        """A scale, laid out to multiply a parameter."""
        flat = self._flat(name)
        order = [self.factors.index(f) for f in flat if f in self.factors]
        s = s.reshape([f.size for f in self.factors]).transpose(order)
        s = s.reshape([f.size if f in self.factors else 1 for f in flat])
        s = np.broadcast_to(s, [_size(f) for f in flat])
        return s.reshape([_length(axis) for axis in self.axes[name]])

    def channels(self, name: str, x: np.ndarray) -> np.ndarray:
        """The largest of a parameter's numbers in each channel."""
        flat = self._flat(name)
        x = x.reshape([_size(f) for f in flat])
        x = x.max(axis=tuple(k for k, f in enumerate(flat) if f not in self.factors))
        kept = [f for f in flat if f in self.factors]
        return x.transpose([kept.index(f) for f in self.factors]).reshape(self.shape)

    def _flat(self, name: str) -> list[Any]:
        """The dimensions of a parameter; an axis that is a sum of several stays one."""
        axes = self.axes[name]
        return [f for axis in axes for f in (axis[0] if len(axis) == 1 else (axis,))]


def _size(f: Any) -> int:
    return _length(f) if isinstance(f, tuple) else f.size


def _length(axis: Any) -> int:
    return sum(int(np.prod([f.size for f in term])) for term in axis)


def _plan(
    name: str,
    named: Sequence[str],
    params: Any,
    stats: Mapping[str, Stat],
    closed: ClosedJaxpr,
    graph: Dims,
    met: Meetings,
) -> _Plan:
    """The fold of one weight, or why there is none."""
    axes = {path: graph.axes(path) for path in trees.names(params)}
    mine = _channels(axes[name], stats[name])
    if any(len(axis) > 1 for axis in mine):
        raise _Rigid("its channels are several pieces, joined")
    factors = tuple(f for axis in mine for f in axis[0])
    if len(set(factors)) < len(factors):
        raise _Rigid("two of its axes are one dimension")
    layers = {
        place: axes[name][axis][0]
        for (place, path), axis in met.stacks.items()
        if path == name and axis is not None and len(axes[name][axis]) == 1
    }
    flow = _Degrees(graph, factors, {k: f[0] for k, f in layers.items() if len(f) == 1})
    leaves = trees.named_leaves(params)
    whole = frozenset(factors)
    degree = lambda path: (
        _unknown(path)
        if trees.is_floating(leaves[path]) and _carries(axes[path], whole) == "once"
        else ZERO
    )
    count = len(closed.jaxpr.invars) - len(axes)
    known: list[Degree] = [*map(degree, axes), *[ZERO] * count]
    for out in walk(flow, closed.jaxpr, known, closed.consts):
        flow.require(out, "a result of the function")
    degrees = _solved(name, flow.equations)
    shape = np.shape(stats[name].peak)
    weights = tuple(path for path in named if degrees.get(path) == 1)
    for path in weights:
        if _channels(axes[path], stats[path]) != mine:
            raise _Rigid(f"{path} has the same channels in another order, or not as inputs")
    return _Plan(factors, axes, degrees, weights, shape)


def _channels(axes: Any, stat: Stat) -> list[Any]:
    """The axes that statistics are about, in terms of dimensions; sizes of one have none."""
    return [axes[axis] for axis in (*stat.layout.batch, *stat.layout.channels)]


# Degrees: powers of the scale, as linear forms in the powers of the parameters.

Degree: TypeAlias = frozenset[tuple[str, int]] | None
"""Coefficients by parameter; None: whatever, as of zero."""
ZERO: Degree = frozenset()


def _unknown(name: str) -> Degree:
    return frozenset({(name, 1)})


def _combined(a: Degree, b: Degree, times: int) -> Degree:
    """The degree of a product with the power `times`; zero times anything is zero."""
    if a is None or b is None:
        return None
    sums = dict(a)
    for name, n in b:
        sums[name] = sums.get(name, 0) + times * n
    return frozenset((name, n) for name, n in sums.items() if n)


def _carries(axes: Any, factors: frozenset[Any]) -> str:
    """Whether a value has all the channels, "once" along axes of their own, or "never", or else."""
    flat = [f for axis in axes for term in axis for f in term if f in factors]
    clean = [f for axis in axes if len(axis) == 1 for f in axis[0] if f in factors]
    if len(flat) == len(clean) == len(set(flat)) == len(factors):
        return "once"
    return "never" if len(flat) == len(set(flat)) == len(clean) else "twice"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LINEAR = _names("""
    convert_element_type reshape transpose broadcast_in_dim squeeze expand_dims copy copy_p rev
    slice split dynamic_slice stop_gradient reduce_precision sharding_constraint name gather add sub
    add_any max min neg abs select_n concatenate pad dynamic_update_slice reduce_sum
    reduce_max reduce_min cumsum cummax cummin reduce_window_sum reduce_window_max reduce_window_min
    unit_scale straight_through
""")
"""All floating operands that have the channels, and all results, have one degree."""
COMPARISONS = _names("eq ne lt le gt ge sign is_finite")
"""The same of the operands; the result has degree zero."""


@dataclass
class _Degrees(Flow[Degree]):
    """The flow of degrees; `equations` collects (a form that must be zero, because of what)."""

    graph: Dims
    factors: Factors
    layers: Mapping[Place, Any]
    equations: list[tuple[Degree, str]] = field(default_factory=list)

    def require(self, form: Degree, because: str) -> None:
        if form:
            self.equations.append((form, because))

    def constant(self, value: Any) -> Degree:
        x = np.asarray(value)
        known = x.dtype == bool or np.issubdtype(x.dtype, np.integer)
        return None if not known and x.size and _is_scaleless(x) else ZERO

    def join(self, a: Degree, b: Degree) -> Degree:
        if a is None or b is None:
            return b if a is None else a
        self.require(_combined(a, b, -1), "a branch or a loop")
        return a

    def unstacked(self, site: Site, x: Degree) -> Degree:
        del site
        return x

    def repeated(self, site: Site, carry: list[Degree]) -> list[Degree]:
        if site.place in self.layers:  # inside, a scale is that of one layer
            for degree in carry:
                self.require(degree, "the carry of the loop over layers")
        return carry

    def visit(self, site: Site, inputs: list[Degree]) -> list[Degree]:
        ins, outs = self.graph.at(site.place)
        removed = frozenset(self._removed(site))
        factors = frozenset(self.factors) - removed
        had = [_carries(axes, factors) for axes in ins]
        has = [_carries(axes, factors) for axes in outs]
        met = {f for axes in (*ins, *outs) for axis in axes for term in axis for f in term}
        stacked = not removed.isdisjoint(met)  # all layers at once, in the loop over layers
        if stacked or "twice" in (*had, *has):
            had, has = ["never"] * len(had), ["never"] * len(has)
        known = [
            d if how == "once" else self._none(d, site) for d, how in zip(inputs, had, strict=True)
        ]
        made = self._made(site, known, ins, factors)
        made = made * len(outs) if len(made) < len(outs) else made
        return [
            d if how == "once" else self._none(d, site) for d, how in zip(made, has, strict=True)
        ]

    def _removed(self, site: Site) -> Iterator[Any]:
        while site.parent is not None:
            site = site.parent
            if site.place in self.layers:
                yield self.layers[site.place]

    def _none(self, degree: Degree, site: Site) -> Degree:
        self.require(degree, site.name)
        return None if degree is None else ZERO

    def _made(
        self, site: Site, known: list[Degree], ins: Any, factors: frozenset[Any]
    ) -> list[Degree]:
        name = site.name
        if name == "optimization_barrier":
            return known
        rounds = name == "convert_element_type" and not _is_float(site.results[0])
        if name in LINEAR and not rounds:
            first = 1 if name == "select_n" else 0
            for d in known[:first]:
                self.require(d, name)
            return [self._same(known[first : _operands(name)], name)]
        if name in COMPARISONS:
            self._same(known, name)
            return [ZERO]
        if name == "mul":
            return [_combined(known[0], known[1], 1)]
        if name == "div":
            return [_combined(known[0], known[1], -1)]
        if name in ("integer_pow", "square"):
            times = 2 if name == "square" else site.eqn.params["y"]
            return [_combined(ZERO, known[0], times)]
        if name in ("dot_general", "conv_general_dilated"):
            return [self._product(site, known, ins, factors)]
        for d in known:
            self.require(d, name)
        return [ZERO]

    def _same(self, known: Sequence[Degree], name: str) -> Degree:
        definite = [d for d in known if d is not None]
        for d in definite[1:]:
            self.require(_combined(definite[0], d, -1), name)
        return definite[0] if definite else None

    def _product(
        self, site: Site, known: list[Degree], ins: Any, factors: frozenset[Any]
    ) -> Degree:
        """Degrees add up; over the channels themselves to zero."""
        params = site.eqn.params
        if site.name == "dot_general":
            summed = params["dimension_numbers"][0][0]
        elif params["feature_group_count"] == params["batch_group_count"] == 1:
            summed = params["dimension_numbers"].lhs_spec[1:]
        else:
            for d in known:
                self.require(d, "a grouped convolution")
            return ZERO
        total = _combined(known[0], known[1], 1)
        over = {f for axis in summed for term in ins[0][axis] for f in term}
        if factors & over:
            self.require(total, site.name)
            return ZERO
        return total


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _operands(name: str) -> int | None:
    """How many of the operands are numbers; the rest are positions."""
    return {"gather": 1, "dynamic_slice": 1, "dynamic_update_slice": 2, "pad": 2}.get(name)


def _is_scaleless(x: np.ndarray) -> bool:
    """Whether all numbers stay what they are, times any positive one: zero and infinity."""
    wide = x.astype(np.float32)
    return bool(((wide == 0) | np.isinf(wide)).all())


def _solved(name: str, equations: Sequence[tuple[Degree, str]]) -> dict[str, int]:
    """Powers with that of `name` one, as many zero as the elimination leaves free."""
    rows: dict[str, dict[str, Fraction]] = {}  # by pivot, in terms of what is free
    causes: list[str] = []
    for form, because in equations:
        causes.append(because)
        row = _reduced({path: Fraction(n) for path, n in form or ()}, rows)
        others = sorted(path for path in row if path != name)
        if not row:
            continue
        if not others:
            raise _Rigid(_in_the_way(causes))
        pivot = others[0]
        scaled = {path: -n / row[pivot] for path, n in row.items() if path != pivot}
        for path, held in rows.items():
            rows[path] = _reduced(held, {pivot: scaled})
        rows[pivot] = scaled
    powers = {path: row.get(name, Fraction(0)) for path, row in rows.items()} | {name: Fraction(1)}
    broken = [path for path, power in powers.items() if power.denominator > 1]
    if broken:
        raise _Rigid(f"{broken[0]} would take a root of the scale")
    degrees = {path: int(power) for path, power in powers.items() if power}
    if min(degrees.values()) > 0:
        raise _Rigid("no parameter produces its channels")
    return degrees


def _in_the_way(causes: Sequence[str]) -> str:
    """What keeps a scale from passing: the last one, products aside, which only hand it on."""
    found = [cause for cause in causes if cause not in PRODUCTS]
    return f"in the way: {found[-1]}" if found else "no parameter before it has its channels"


def _reduced(
    row: Mapping[str, Fraction], rows: Mapping[str, Mapping[str, Fraction]]
) -> dict[str, Fraction]:
    out: dict[str, Fraction] = {}
    for path, n in row.items():
        for other, m in rows.get(path, {path: Fraction(1)}).items():
            out[other] = out.get(other, Fraction(0)) + n * m
    return {path: n for path, n in out.items() if n}
