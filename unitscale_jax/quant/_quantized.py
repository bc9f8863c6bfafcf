"""A function on codes: quantized training and integer serving are one function.

    quantized(fn, rules)(params, x)  ==  quantized(fn, rules)(quantize(params, rules), x)

bit for bit. The equations of `fn` are evaluated again with a `QTensor` wherever a parameter was:
products multiply codes, movements move them, and what has no rule gets the array back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax import tree as trees
from unitscale_jax.loss import around
from unitscale_jax.quant._contract import axes_of
from unitscale_jax.quant._left import Account
from unitscale_jax.quant._lsq import Trained, entered
from unitscale_jax.quant._params import (
    ACTIVATIONS,
    QuantRules,
    agrees,
    check_leaf,
    check_range,
    encode,
    inside,
    range_of,
    widths_by_name,
)
from unitscale_jax.quant._qtensor import QTensor, is_quantized, value_of
from unitscale_jax.quant._quantizer import Quantizer
from unitscale_jax.quant._roles import resolved
from unitscale_jax.quant._spec import DotSpec
from unitscale_jax.quant._views import logical
from unitscale_jax.statistics import check_names
from unitscale_jax.trace.params import DeviceSum, Meeting, device_sums, input_origins, meetings
from unitscale_jax.trace.program import Place, trace_call
from unitscale_jax.trace.rewrite import as_traced
from unitscale_jax.typing import Key


def quantized(
    fn: Callable[..., Any],
    rules: QuantRules | None = None,
    *,
    stats: Mapping[str, Any] | None = None,
    key: Key | None = None,
    strict: bool = False,
) -> Callable[..., Any]:
    """Evaluates `fn` on quantized parameters, or quantizes them in the call to train them.

    Args:
        fn: A function whose first argument is the parameters.
        rules: Pairs (pattern, `DotSpec`): parameters by name, products of two activations by
            named scope or kind (`"attention"`, `"dot"`). Axes may be open. Float parameters that a
            rule names are quantized in the call, and receive straight-through gradients.
        stats: What `calibrate` found, for parameters quantized in the call; see `quantize`.
        key: Draws for stochastic rounding in a quantized backward pass. Layers of one scan share
            their draws.
        strict: Raises where any quantized array had to be dequantized.

    Returns:
        A function of the signature of `fn`, traced once per call: call it under `jit`. Any argument
        may hold `QTensor`s, and `Learned` parameters, whose scales receive gradients too. Results
        keep their dtypes; one that is a quantized array itself (a cache) stays one.

    Raises:
        ValueError: A rule matches nothing, or names a parameter that meets no product; all
            products of a parameter whose rule has an `x` were left in floating point; a product
            sums more than int32 holds; with `strict`, anything was left in floating point, and why.

    Law: training is serving, see above: to the bit, where the compiler orders the float sums of
    `fn` itself alike in both programs (a norm's mean may be fused in another order). Gradients are
    those of the float function at the dequantized values, zero where a calibrator clips; inside of
    a custom derivative they are the user's rule's. There is no forward mode.

    In a `shard_map` a product that a sum over its axes ends, `psum(x @ w, axis)`, is one product
    over all devices: they share scales (of `Percentile` and `MSE` the largest device's) and sum
    integers, so it has the bits of one device. Groups with free scales are summed as floats.

    Example:
        >>> import unitscale_jax as us
        >>> fn = lambda params, x: jax.nn.relu(x @ params["w"] + 0.3)
        >>> rules = {"w": us.DotSpec(w=us.QSpec(), x=us.QSpec())}
        >>> params = {"w": jnp.array([[0.5, -1], [0.25, 2], [1, -0.5]])}
        >>> x = jnp.array([[1.0, 2, -3]])
        >>> train = quantized(fn, rules)(params, x)
        >>> codes = us.quantize(params, us.quant.resolve(rules, fn, params, x))
        >>> bool((quantized(fn)(codes, x) == train).all())
        True
        >>> grads = jax.grad(lambda p: quantized(fn, rules)(p, x).sum())(params)
        >>> [round(g, 3) for g in grads["w"][:, 1].tolist()]  # x, at the values of its codes
        [0.992, 2.008, -3.0]
    """

    @around(fn, "quantized", marks=rules is not None)
    def quantized_fn(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = entered((args, kwargs))
        plain, plain_kwargs = logical((args, kwargs))
        with widths_by_name(args):
            staged = trace_call(fn, *plain, **plain_kwargs)
        leaves = jax.tree.leaves((args, kwargs), is_leaf=is_quantized)
        operands = [leaves[k] for k in staged.positions]
        params, sources = (args[0], plain[0]) if args else ((), ())
        known = input_origins(staged, sources)
        check_names(stats, trees.names(sources))
        chosen = [] if rules is None else resolved(rules, staged, params, sources)
        codes = _codes(params)
        learned = [(name, t.spec) for name, t in codes.items() if isinstance(t, Trained)]
        _check_key([*chosen, *learned], key)
        specs = {name: spec for name, spec in chosen if spec.w.axes != ACTIVATIONS}
        sums = device_sums(staged.closed.jaxpr)
        over = _split_over(meetings(staged, sources), sums) if sums and specs else {}
        operands = [
            _entered(origin.parameter, x, specs, stats, over)
            for origin, x in zip(known, operands, strict=True)
        ]
        of_activations = [pair for pair in chosen if pair[1].w.axes == ACTIVATIONS]
        account = Account(staged.closed.jaxpr, known)
        replay = Quantizer(of_activations, key, sums, account)
        out = replay(staged.closed.jaxpr, staged.closed.consts, operands)
        if strict and account.left:
            raise ValueError(f"left in floating point: {account}.")
        if account.left:
            held = {name: t.spec for name, t in codes.items()}
            account.check(meetings(staged, sources), held | specs)
        return staged.finish([_result(x) for x in out])

    return quantized_fn


def _codes(params: Any) -> dict[str, QTensor]:
    """The parameters that came as codes, by name."""
    named = trees.named_leaves(params, is_leaf=is_quantized)
    return {name: leaf for name, leaf in named.items() if is_quantized(leaf)}


def _check_key(rules: Sequence[tuple[Any, DotSpec]], key: Key | None) -> None:
    for pattern, spec in rules:
        if key is None and spec.g is not None and spec.g.rounding == "stochastic":
            raise ValueError(
                f"the rule for {pattern} rounds cotangents stochastically, which needs draws: "
                "quantized(fn, rules, key=key), a new key each step."
            )


def _split_over(
    met: Mapping[str, Sequence[Meeting]], sums: Mapping[Place, DeviceSum]
) -> dict[str, tuple[str, ...]]:
    """Parameter -> the manual mesh axes that all of its products are summed over.

    A parameter whose products disagree, one summed over ("model",) and another over nothing, is
    left out: its codes cannot be those of one device for both.
    """
    axes: dict[str, set[tuple[str, ...]]] = {name: set() for name in met}
    for name, found in met.items():
        for meeting in found:
            if meeting.kind in ("product", "lookup"):
                axes[name].add(axes_of(sums.get(meeting.site.place)))
    return {name: next(iter(one)) for name, one in axes.items() if len(one) == 1}


def _entered(
    name: str | None,
    x: Any,
    specs: Mapping[str, DotSpec],
    stats: Mapping[str, Any] | None,
    over: Mapping[str, tuple[str, ...]],
) -> Any:
    """A parameter as the function receives it: quantized, its float array beside it."""
    spec = specs.get(name) if name is not None else None
    if spec is None or name is None:
        return x
    if is_quantized(x):
        if not agrees(x.spec, spec):
            raise ValueError(f"{name} is quantized as {x.spec}, and a rule asks for {spec}.")
        if isinstance(x, Trained):
            check_range(name, range_of(stats, name))
        return x
    check_leaf(name, x, spec)
    x, axes = jnp.asarray(x), over.get(name, ())
    with as_traced():
        t = replace(encode(x, spec, axes), input_range=range_of(stats, name))
    master = jnp.where(inside(x, t, axes), x, jax.lax.stop_gradient(x)) if spec.w.clips else x
    return replace(t, master=master)


def _result(x: Any) -> Any:
    """A result of the function: codes of a cache stay codes, those of a parameter do not."""
    return value_of(x) if is_quantized(x) and x.master is not None else x
