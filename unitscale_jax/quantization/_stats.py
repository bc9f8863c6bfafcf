"""Calibration: `observed` measures one call, `calibrate` adds up batches.

The first is a pure function, which may be jitted; the second adds on the host, counts in int64 and
sums in float64.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.quantization._observer import Ranges, candidates
from unitscale_jax.quantization._params import ACTIVATIONS, Rules
from unitscale_jax.quantization._roles import resolved
from unitscale_jax.quantization._spec import QSpec
from unitscale_jax.quantization._stat import Stat, Stats, is_tried, on_host
from unitscale_jax.trace import (
    Layout,
    Meeting,
    layout_of,
    meetings,
    observable,
    observe,
    over_batches,
    stage,
)

Kind: TypeAlias = Literal["range", "channels", "hessian"]
Valid: TypeAlias = Callable[..., Any]


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
        observers: dict[str, tuple[Ranges, list[Meeting]]] = {}
        for name, (spec, layout, met) in wanted.items():
            observer = Ranges(
                name=name,
                layout=layout,
                mask=mask,
                spec=spec,
                collect=frozenset(collect),
                candidates=candidates(given, name),
            )
            observers[name] = observer, met
        return observe(fn, observers, params, *inputs, **kwargs)

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
    tries = [name for name, stat in stats.items() if is_tried(stat)]
    if tries:
        if iter(batches) is batches:
            raise ValueError(
                f"MSE() of what meets {tries[0]} takes two passes over the batches, and an "
                "iterator gives one; make it a list."
            )
        again, _ = _folded(measure(given=stats), params, batches)
        stats |= {name: replace(stats[name], errors=again[name].errors) for name in tries}
    return Stats(stats, inputs)


def _folded(
    measured: Callable[..., Any], params: Any, batches: Iterable[Any]
) -> tuple[dict[str, Stat], tuple[Any, ...]]:
    return over_batches(measured, params, batches, on_host, Stat.merge)


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
        for name, leaf in trees.named_leaves(params, is_leaf=trees.is_compound).items()
        if trees.is_compound(leaf)
    ]
    if done:
        raise ValueError(f"{', '.join(done)}: quantized already; calibrate the float parameters.")
    staged = stage(fn, params, *inputs, **kwargs)
    chosen = resolved(rules, staged, params, params)
    found = meetings(staged, params)
    sizes = {name: np.shape(leaf) for name, leaf in trees.named_leaves(params).items()}
    wanted = {}
    for name, spec in chosen:
        met = observable(found.get(name, []))
        more = bool({"channels", "hessian"} & set(collect))
        if spec.w.axes == ACTIVATIONS or not met or not (more or spec.x):
            continue
        layout = layout_of(name, sizes[name], met)
        wanted[name] = spec.x, layout, met
    return wanted
