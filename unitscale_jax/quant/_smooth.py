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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_callable
from unitscale_jax.quant._degrees import (
    ZERO,
    Degree,
    DegreeFactors,
    Degrees,
    Rigid,
    carries,
    solved,
    unknown,
)
from unitscale_jax.quant._params import ACTIVATIONS, QuantRules, encode
from unitscale_jax.quant._qtensor import is_quantized, value_of
from unitscale_jax.quant._roles import resolved
from unitscale_jax.quant._spec import DotSpec
from unitscale_jax.statistics import Stat, Stats, required
from unitscale_jax.trace.dimensions import Axes, Dims, SymbolicDim, dims
from unitscale_jax.trace.params import Meeting, meetings, stacks_of, to_matrices
from unitscale_jax.trace.program import ClosedJaxpr, trace, trace_call, walk

FEWEST = np.float32(1e-4)


def smoothquant(
    fn: Callable[..., Any], params: Any, stats: Stats, rules: QuantRules, alpha: float = 0.5
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
    check_callable("fn", fn)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it is between 0, all stays, and 1, all moves.")

    def scale(plan: "_SmoothingPlan", weights: Mapping[str, Any]) -> np.ndarray:
        wide = {name: jnp.asarray(weights[name]).astype(jnp.float32) for name in plan.weights}
        peaks = np.maximum.reduce([np.asarray(stats[name].peak) for name in plan.weights])
        sizes = [plan.channels(name, np.abs(np.asarray(w))) for name, w in wide.items()]
        most = np.maximum.reduce(sizes)
        zero = (peaks == 0) | (most == 0)
        peaks, most = (np.where(zero, 1, x) for x in (peaks, most))
        log = alpha * np.log2(peaks) - (1 - alpha) * np.log2(most)
        return np.where(zero, 1.0, np.exp2(np.round(log)))

    plans, _ = _plans(fn, params, stats, rules, ["channels"])
    return _applied(params, plans, scale)


def awq(fn: Callable[..., Any], params: Any, stats: Stats, rules: QuantRules) -> Any:
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
    check_callable("fn", fn)
    plans, specs = _plans(fn, params, stats, rules, ["channels", "hessian"])

    def scale(plan: "_SmoothingPlan", weights: Mapping[str, Any]) -> np.ndarray:
        size = np.maximum.reduce([np.asarray(stats[name].mean) for name in plan.weights])
        # A channel that no row used would take the least scale of all and be rounded to zero: it
        # keeps its size, and those of the others are as if it were not there.
        used = size > 0
        best, least = np.ones(size.shape), np.inf
        for step in range(20):
            s = np.maximum(size ** (step / 20), FEWEST)
            ends = (
                s.max(axis=-1, keepdims=True, initial=FEWEST, where=used),
                s.min(axis=-1, keepdims=True, initial=np.inf, where=used),
            )
            s = np.where(used, s, 1) / np.where(used, np.sqrt(ends[0] * ends[1]), 1)
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
    columns = to_matrices(off, stat.layout)
    exact = jax.lax.Precision.HIGHEST
    return float(jnp.einsum("bkn,bkl,bln->", columns, stat.matrices, columns, precision=exact))


Scale: TypeAlias = Callable[["_SmoothingPlan", Mapping[str, Any]], np.ndarray]


def _applied(params: Any, plans: Sequence["_SmoothingPlan"], scale: Scale) -> Any:
    leaves = trees.named_leaves(params)
    for plan in plans:
        s = scale(plan, leaves)
        for name, degree in plan.degrees.items():
            by = jnp.asarray(plan.on(name, s**degree)).astype(jnp.result_type(leaves[name]))
            leaves[name] = leaves[name] * by
    return jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))


def _plans(
    fn: Callable[..., Any], params: Any, stats: Stats, rules: QuantRules, kinds: Sequence[str]
) -> tuple[list["_SmoothingPlan"], dict[str, DotSpec]]:
    """A fold for every weight that rules name, those that share a scale together."""
    done = [
        k for k, v in trees.named_leaves(params, is_leaf=is_quantized).items() if is_quantized(v)
    ]
    if done:
        raise ValueError(f"{', '.join(done)}: quantized already; smooth the float parameters.")
    inputs = getattr(stats, "inputs", None)
    if inputs is None:
        raise ValueError("stats are not those of `calibrate`, which say what the inputs are like.")
    staged = trace_call(fn, params, *inputs.args, **inputs.kwargs)
    chosen = resolved(rules, staged, params, params)
    specs = {name: spec for name, spec in chosen if spec.w.axes != ACTIVATIONS}
    for kind in kinds:
        required(stats, kind, params, specs)
    traced, met = trace(fn, params, *inputs.args, **inputs.kwargs), meetings(staged, params)
    graph = dims(traced)
    plans: list[_SmoothingPlan] = []
    refused: list[str] = []
    for name in specs:
        if any(name in plan.weights for plan in plans):
            continue
        try:
            plans.append(_plan(name, list(specs), params, stats, traced.closed, graph, met))
        except Rigid as error:
            refused.append(f"{name} ({error})")
    if refused:
        raise ValueError(
            "nothing that a scale could be folded into produces what these weights meet: "
            f"{'; '.join(refused)}. Leave them out of these rules."
        )
    return plans, specs


@dataclass(frozen=True)
class _SmoothingPlan:
    """One scale per channel, and the power of it that each parameter is multiplied with.

    Attributes:
        factors: The channels, as dimensions of the function, in the order of the weight's axes.
        axes: The axes of every parameter, in terms of dimensions.
        degrees: Parameter -> power; 1 for the weights, -1 for what produces the channels.
        weights: Those of the weights that rules name.
        shape: Of the scale, as statistics have it.
    """

    factors: DegreeFactors
    axes: Mapping[str, Axes]
    degrees: Mapping[str, int]
    weights: tuple[str, ...]
    shape: tuple[int, ...]

    def on(self, name: str, s: np.ndarray) -> np.ndarray:
        """A scale, laid out to multiply a parameter.

        Three steps: dimensions of the channels in the parameter's order; size 1 beside each of its
        other dimensions, then repeated along those; joined to its axes.
        """
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


def _length(axis: Sequence[Sequence[SymbolicDim]]) -> int:
    return sum(int(np.prod([f.size for f in term])) for term in axis)


def _plan(
    name: str,
    named: Sequence[str],
    params: Any,
    stats: Mapping[str, Stat],
    closed: ClosedJaxpr,
    graph: Dims,
    met: Mapping[str, Sequence[Meeting]],
) -> _SmoothingPlan:
    """The fold of one weight, or why there is none."""
    axes = {path: graph.axes(path) for path in trees.names(params)}
    mine = _channels(axes[name], stats[name])
    if any(len(axis) > 1 for axis in mine):
        raise Rigid("its channels are several pieces, joined")
    factors = tuple(f for axis in mine for f in axis[0])
    if len(set(factors)) < len(factors):
        raise Rigid("two of its axes are one dimension")
    layers = {
        place: axes[name][axis][0]
        for place, axis in stacks_of(met[name]).items()
        if len(axes[name][axis]) == 1
    }
    flow = Degrees(graph, factors, {k: f[0] for k, f in layers.items() if len(f) == 1})
    leaves = trees.named_leaves(params)
    whole = frozenset(factors)

    def degree(path: str) -> Degree:
        """A parameter that has the channels may take a power of the scale; others take none."""
        open_ = trees.is_floating(leaves[path]) and carries(axes[path], whole) == "once"
        return unknown(path) if open_ else ZERO

    count = len(closed.jaxpr.invars) - len(axes)
    known: list[Degree] = [*map(degree, axes), *[ZERO] * count]
    for out in walk(flow, closed.jaxpr, known, closed.consts):
        flow.require(out, "a result of the function")
    degrees = solved(name, flow.equations)
    shape = np.shape(stats[name].peak)
    weights = tuple(path for path in named if degrees.get(path) == 1)
    for path in weights:
        if _channels(axes[path], stats[path]) != mine:
            raise Rigid(f"{path} has the same channels in another order, or not as inputs")
    return _SmoothingPlan(factors, axes, degrees, weights, shape)


def _channels(axes: Axes, stat: Stat) -> Axes:
    """The axes that statistics are about, in terms of dimensions; sizes of one have none."""
    return tuple(axes[axis] for axis in (*stat.layout.batch, *stat.layout.channels))
