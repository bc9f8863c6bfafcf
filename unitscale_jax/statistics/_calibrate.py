"""Calibration: `observed` measures one call, `calibrate` adds up batches.

The first is a pure function, which may be jitted; the second adds on the host, counts in int64 and
sums in float64. What is measured serves every technique: quantization, pruning, distillation.
"""

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import rules as named_rules, tree as trees
from unitscale_jax.errors import check_callable, expected
from unitscale_jax.rules import Pattern
from unitscale_jax.statistics._measure import CHANNELS, Operand
from unitscale_jax.statistics._observe import Observer, observe, over_batches
from unitscale_jax.statistics._stat import Outline, Stat, Stats, merge_stats
from unitscale_jax.trace.params import matrix_form, meetings
from unitscale_jax.trace.program import TracedCall, trace_call

Kind: TypeAlias = Literal["range", "channels", "squares", "hessian"]
KINDS = ("range", *CHANNELS)


@runtime_checkable
class Selects(Protocol):
    """A spec that says which parameters it needs statistics of, such as `SparsitySpec`."""

    def observes(self, params: Any) -> Collection[str]:
        """Names of parameters, each of which must meet a product."""
        ...


@runtime_checkable
class Quantizes(Protocol):
    """The value of a rule that quantizes what meets a parameter, such as `DotSpec`."""

    @staticmethod
    def operands(rules: Any, staged: TracedCall, params: Any) -> Mapping[str, Operand | None]:
        """Parameter -> how what it meets is quantized, by rules with such values."""
        ...


Wanted: TypeAlias = named_rules.Rules[Quantizes] | Selects | Sequence[Pattern]


def observed(
    fn: Callable[..., Any],
    rules: Wanted,
    *,
    collect: Collection[Kind] | None = None,
    valid: Callable[..., Any] | None = None,
    given: Mapping[str, Stat] | None = None,
) -> Callable[..., tuple[Any, Stats]]:
    """Evaluates `fn`, and measures what meets the parameters that are named.

    Args:
        fn: A function whose first argument is the parameters, arrays all of them.
        rules: Which parameters, and how what they meet is quantized: pairs (pattern, `DotSpec`) as
            of `quantized`; or a `SparsitySpec`, or patterns of names, which quantize nothing.
            Products of activations are always quantized by what they are at the moment, and have no
            statistics.
        collect: Kinds of statistics. `"range"` is for static ranges: it needs rules with an `x`,
            and what these quantize has its range whatever else is collected. `"channels"` is for
            `smoothquant`; `"squares"` for `wanda` and `owl_ratios`; `"hessian"`, which has the
            squares, for `gptq`, `sparsegpt` and `refit`; `"channels"` and `"hessian"` for `awq`.
            None: `"range"` for rules that quantize, else `"squares"`.
        valid: `valid(*inputs)` is true where a row counts, (batch,) or (batch, time), and false for
            padding; the leading axes of what meets a parameter must be these.
        given: Earlier statistics, for a range that takes two passes (`MSE`): this is the second.

    Returns:
        A function of the arguments of `fn` that returns its result, by the same equations (which
        compilers may fuse otherwise), and `Stats`; pure, so it may be jitted and its statistics
        carried.

    A parameter of several products has one `Stat` of all. Under a scan over stacked layers each
    layer has its own; layers that Python slices from a stack share one. The second pass of n
    stacked layers costs n times the work, since a loop's body does not know which layer it is.

    Raises:
        ValueError: A rule matches nothing; a parameter is quantized already; a calibrator's range
            cannot be read from numbers that add up; a product stands where nothing can be observed;
            channels or rows cannot be told apart; a parameter that is named by a pattern alone, or
            a `SparsitySpec`, meets no product.

    Example:
        >>> import unitscale_jax as us
        >>> fn = lambda params, x: jax.nn.relu(x @ params["w"])
        >>> rules = {"w": us.DotSpec(w=us.QSpec(), x=us.QSpec())}
        >>> y, stats = observed(fn, rules)({"w": jnp.eye(2)}, jnp.array([[1.0, -3.0]]))
        >>> y.tolist(), stats["w"].range.tolist()
        ([[1.0, 0.0]], [-3.0, 3.0])
    """
    if collect is not None and (not collect or set(collect) - set(KINDS)):
        raise ValueError(expected("collect", list(collect), f"some of {', '.join(KINDS)}"))

    @functools.wraps(fn)
    def observed_fn(params: Any, /, *inputs: Any, **kwargs: Any) -> tuple[Any, Stats]:
        staged = functools.partial(trace_call, fn, params, *inputs, **kwargs)
        observers = _observers(staged, rules, collect, params)
        mask = None if valid is None else jnp.asarray(valid(*inputs, **kwargs))
        observers = {name: replace(by, mask=mask) for name, by in observers.items()}
        for name in (given or {}).keys() & observers.keys():
            if given is not None and given[name].takes_two_passes:
                found = given[name].numbers["range"]
                observers[name] = replace(observers[name], found=found, kinds=frozenset())
        y, stats = observe(fn, observers, params, *inputs, **kwargs)
        return y, Stats(stats, Outline(inputs, kwargs))

    return observed_fn


def calibrate(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    rules: Wanted,
    /,
    *,
    collect: Collection[Kind] | None = None,
    valid: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Stats:
    """Statistics over batches of what meets the parameters that are named: one pass for all.

    Args:
        fn: A function whose first argument is the parameters.
        params: Arrays.
        batches: Each a tuple of the inputs of `fn` after the parameters; or a pair of a tuple and a
            dict, `((x,), {"train": False})`, of inputs by position and by keyword; or the only
            input. What is no array is static. A range that takes two passes (`MSE`) goes through
            them twice, so for it they are a list and not an iterator.
        rules: See `observed`.
        collect: See `observed`.
        valid: See `observed`; without it, padding counts as data.
        **kwargs: Keywords of `fn` that all batches share.

    Returns:
        Parameter -> `Stat`, as NumPy arrays, for `quantize`, `gptq`, `smoothquant`, `awq`,
        `learned`, `amax_history`, `wanda`, `owl_ratios`, `sparsegpt` and `refit`.

    Raises:
        ValueError: There are no batches, no parameter has anything to measure, what meets a
            parameter is not finite, nothing met it, or whatever `observed` raises.

    Law: batches may be split and ordered at will (but for a calibrator that minds their order):
    extremes and counts keep their bits, and sums where float32 holds those of each batch exactly.

    Example:
        >>> import unitscale_jax as us
        >>> fn = lambda params, x: x @ params["w"]
        >>> rules = {"w": us.DotSpec(w=us.QSpec(axes=(-2,)), x=us.QSpec())}
        >>> params, x = {"w": jnp.eye(2)}, jnp.array([[1.0, 2.0], [-2.0, 0.0]])
        >>> stats = calibrate(fn, params, [(x[:1],), (x[1:],)], rules, collect=("range", "hessian"))
        >>> us.quantize(params, rules, stats)["w"].input_range.tolist()
        [-2.0, 2.0]
        >>> spec = us.prune.SparsitySpec(patterns=us.prune.Unstructured(), sparsity=0.5)
        >>> us.prune.wanda_masks(params, stats, spec)["w"].astype(int).tolist()
        [[1, 0], [0, 1]]
    """
    check_callable("fn", fn)
    measure = functools.partial(observed, fn, rules, collect=collect, valid=valid)
    folded = functools.partial(over_batches, params=params, shared=kwargs, merge=merge_stats)
    stats = folded(measure(), batches=batches)
    if not stats:
        raise ValueError(
            "no rule has anything to calibrate: none has an `x` that meets its parameter in a "
            "product. Give rules an x=QSpec(), or collect 'channels', 'squares' or 'hessian'."
        )
    for name, stat in stats.items():
        _check(name, stat)
    again = [name for name, stat in stats.items() if stat.takes_two_passes]
    if not again:
        return stats
    if iter(batches) is batches:
        raise ValueError(
            f"the range of what meets {again[0]} takes two passes over the batches, and an "
            "iterator gives one; make it a list."
        )
    second = folded(measure(given=stats), batches=batches)
    for name in again:
        numbers = {**stats[name].numbers, "refined": second[name].numbers["refined"]}
        stats[name] = replace(stats[name], numbers=numbers)
    return stats


def _check(name: str, stat: Stat) -> None:
    if (stat.rows == 0).any():
        raise ValueError(
            f"nothing met {name} in these batches: a branch that was never taken, or no valid "
            "rows. Give batches that reach it, or exclude it."
        )
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(stat.numbers)):
        raise ValueError(
            f"what meets {name} is not finite in these batches (or its squares are not, in "
            "float32), and no statistics fit NaN or infinity; mend the batches, or exclude the "
            "parameter."
        )


def _observers(
    staged: Callable[[], TracedCall], rules: Wanted, collect: Collection[Kind] | None, params: Any
) -> dict[str, Observer]:
    """For each parameter to observe, what is measured of what it meets."""
    selected = _selected(rules, params)
    kinds = set(collect or (("range",) if selected is None else ("squares",)))
    if selected is not None and "range" in kinds:
        raise ValueError(
            "a range is of an operand that is quantized, and these rules quantize none. Give rules "
            "{'**/kernel': DotSpec(x=QSpec())}, whose statistics serve pruning too, or collect no "
            "'range'."
        )
    if selected is None:
        _check_rules(rules, params)
    call = staged()
    operands = _operands(rules, call, params) if selected is None else dict.fromkeys(selected)
    leaves = trees.named_leaves(params, is_leaf=trees.is_compound)
    found = meetings(call, params)
    met = {name: [m for m in some if m.kind == "product"] for name, some in found.items()}
    missing = [name for name in operands if not met.get(name)]
    if missing and selected is not None:
        raise ValueError(
            f"{', '.join(missing)}: meets no product in this function, so there is nothing to "
            "calibrate (a lookup, a bias, a norm's scale). Leave it out: name the parameters that "
            "do by patterns, {'**/kernel': ..}."
        )
    out = {}
    for name, spec in operands.items():
        spec = None if spec is None else _servable(name, spec, "range" in kinds)
        inputs = frozenset(kinds - {"range"})
        if name not in missing and (inputs or spec):
            layout = matrix_form(name, np.shape(leaves[name]), met[name])
            out[name] = Observer(name=name, layout=layout, met=met[name], spec=spec, kinds=inputs)
    return out


def _selected(rules: Wanted, params: Any) -> Collection[str] | None:
    """Parameters that are named without being quantized; None: rules quantize what they meet."""
    if isinstance(rules, Selects):
        return rules.observes(params)
    patterns = [p for p in rules if isinstance(p, str | re.Pattern)]
    if not patterns or isinstance(rules, Mapping):
        return None
    pairs = [(pattern, True) for pattern in patterns]
    found = named_rules.match(pairs, trees.names(params), default=False)
    return [name for name, named in found.items() if named]


def _check_rules(rules: Any, params: Any) -> None:
    for pattern, value in named_rules.pairs_of(rules):
        if not isinstance(value, Quantizes):
            raise TypeError(
                f"rule {pattern!r} has the value {value!r}; a rule of what is measured has a "
                "DotSpec, such as DotSpec(w=QSpec(), x=QSpec())."
            )
    leaves = trees.named_leaves(params, is_leaf=trees.is_compound)
    done = [name for name, leaf in leaves.items() if trees.is_compound(leaf)]
    if done:
        raise ValueError(f"{', '.join(done)}: quantized already; calibrate the float parameters.")


def _operands(rules: Any, staged: TracedCall, params: Any) -> Mapping[str, Operand | None]:
    """Parameter -> the operand that it meets, as the technique resolves its own rules."""
    pairs = named_rules.pairs_of(rules)
    return pairs[0][1].operands(pairs, staged, params) if pairs else {}


def _servable(name: str, spec: Operand, demanded: bool) -> Operand | None:
    """The spec, if its range can be read from numbers that add up; None if no range is wanted.

    Raises:
        ValueError: A range is wanted, and it cannot.
    """
    try:
        if spec.measure((0,)).range is None:
            raise ValueError(f"the measure of {spec} has no `range`.")
    except ValueError as error:
        if not demanded:
            return None
        raise ValueError(f"no range of what meets {name} can be calibrated: {error}") from error
    return spec
