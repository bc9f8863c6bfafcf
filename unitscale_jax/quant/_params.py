"""The way from parameters to codes, leaf by leaf: `quantize`, its rules and its checks."""

import contextlib
import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import rules as named_rules, tree as trees
from unitscale_jax.errors import not_divisible
from unitscale_jax.formats import round_to_dtype
from unitscale_jax.quant._lsq import encoded, is_learned, tiles_of
from unitscale_jax.quant._ops import (
    asymmetric,
    bounds_of,
    ends_of,
    integer_groups,
    repeat_groups,
    symmetric,
)
from unitscale_jax.quant._qtensor import QTensor, has_codes, is_quantized
from unitscale_jax.quant._spec import DotSpec
from unitscale_jax.statistics import check_names
from unitscale_jax.trace.program import is_concrete

QuantRules = named_rules.Rules[DotSpec]
ACTIVATIONS: tuple[int, ...] = ()
"""The axes of a rule's spec once it is known to name products of activations, no parameter."""


def quantize(
    params: Any,
    rules: QuantRules | None = None,
    stats: Mapping[str, Any] | None = None,
    *,
    delete: bool = False,
) -> Any:
    """Replaces the parameters that rules name, and every `Learned`, by codes and scales.

    Args:
        params: A pytree of parameters.
        rules: Pairs (pattern, `DotSpec`) whose axes are given, as `resolve` gives them. A `Learned`
            needs none.
        stats: What `calibrate` found: by parameter, the range of what meets it. A parameter that
            they do not have finds the range of each input when it meets it.
        delete: Frees each float array once its codes are there, so that the peak is the model and
            the codes of one leaf; the arrays cannot be used afterwards.

    Returns:
        `params` with a `QTensor` for each parameter named. One that is quantized already, by the
        same spec, stays.

    Raises:
        ValueError: A rule matches nothing, has no axes, or names a parameter that cannot be
            quantized: not floating, not finite, axes it does not have, groups that do not divide.

    Law: |x - dequantize(quantize(x))| <= s / 2 where nothing is clipped, up to rounding.

    Example:
        >>> import unitscale_jax as us
        >>> rules = {"w": us.DotSpec(w=us.QSpec(axes=(-1,)), x=us.QSpec())}
        >>> w = quantize({"w": jnp.array([[-1.0, 0.3, 0.5, 1.0]])}, rules)["w"]
        >>> w.codes.tolist(), w.scale.shape
        ([[-127, 38, 64, 127]], (1, 1))
    """
    known = trees.named_leaves(params, is_leaf=trees.is_compound)
    chosen = {name: leaf.spec for name, leaf in known.items() if is_learned(leaf)}
    if rules is None and not chosen and not any(map(is_quantized, known.values())):
        raise ValueError(
            "no parameter is learned, and there are no rules: give quantize(.., rules)"
        )
    found = {} if rules is None else match(rules, params)
    check_names(stats, known)
    chosen |= {name: spec for name, spec in found.items() if spec is not None}
    done = dict(known)
    # Small ones first: the largest is doubled by its codes when most of the others are freed.
    for name in sorted(chosen, key=lambda name: trees.nbytes(known[name])):
        leaf, spec = known[name], chosen[name]
        done[name] = _quantized(name, leaf, spec, range_of(stats, name))
        array = leaf.master if is_learned(leaf) else leaf
        if delete and done[name] is not leaf and isinstance(array, jax.Array):
            jax.block_until_ready(done[name])
            array.delete()
    return trees.by_names(done, params)


def match(rules: QuantRules, params: Any, skip: Collection[int] = ()) -> dict[str, DotSpec | None]:
    """The spec of each parameter; rules known to name activations, or to skip, need match none."""
    names = trees.names(params, is_leaf=trees.is_compound)
    specs = map(_checked, named_rules.pairs_of(rules))
    others = [k for k, spec in enumerate(specs) if spec.w.axes == ACTIVATIONS]
    return named_rules.match(rules, names, skip={*skip, *others})


def _checked(pair: tuple[Any, Any]) -> DotSpec:
    pattern, spec = pair
    if not isinstance(spec, DotSpec):
        raise TypeError(
            f"rule {pattern!r} has the value {spec!r}; a quantization rule has a DotSpec, such as "
            "DotSpec(w=QSpec(), x=QSpec())."
        )
    return spec


def agrees(held: DotSpec, asked: DotSpec) -> bool:
    """True if a spec is the asked one, whose axes may be open."""
    return held == (asked if asked.w.axes is not None else asked.with_axes(held.w.axes))


def range_of(stats: Mapping[str, Any] | None, name: str) -> Any:
    """The calibrated range of what meets a parameter, if there is one."""
    stat = None if stats is None else stats.get(name)
    return None if stat is None else stat.range


def check_range(name: str, input_range: Any) -> None:
    """Checks that a parameter whose activation has a learned scale is given no other range.

    Raises:
        ValueError: It is given one; the message says the way out.
    """
    if input_range is not None:
        raise ValueError(
            f"{name} is learned, its activation's scale with it, and stats give another range; "
            "leave it out of the stats."
        )


def _quantized(name: str, leaf: Any, spec: DotSpec, input_range: Any) -> QTensor:
    if is_quantized(leaf) or is_learned(leaf):
        if not agrees(leaf.spec, spec):
            raise ValueError(
                f"{name} is quantized already, as {leaf.spec}, and a rule asks for {spec}; "
                "dequantize it first, or leave it out."
            )
        if is_quantized(leaf):
            return leaf
        check_range(name, input_range)
        made = _of_learned(leaf)
        input_range = made.input_range
    else:
        check_leaf(name, leaf, spec)
        made = _on_device(leaf, spec)
    if is_concrete(made.scale) and not bool(jnp.isfinite(made.scale).all()):
        raise ValueError(f"{name} has NaN or infinite values, which no scale fits; mend it first.")
    return replace(made, input_range=input_range)


@contextlib.contextmanager
def widths_by_name(args: tuple[Any, ...]) -> Iterator[None]:
    """Names the codes that what meets them does not fit, where JAX gives two shapes alone."""
    try:
        yield
    except TypeError as error:
        shapes = re.search(
            r"contracting dimensions .*got \(([\d, ]+)\) and \(([\d, ]+)\)", str(error)
        )
        digits = [] if shapes is None else re.findall(r"\d+", " ".join(shapes.groups()))
        widths = list(map(int, digits))
        params = args[0] if args and widths else ()
        for name, t in trees.named_leaves(params, is_leaf=is_quantized).items():
            own = [t.shape[axis] for axis in t.axes] if is_quantized(t) else []
            for size in (size for size in own if size in widths):
                other = next((n for n in widths if n != size), size)
                raise TypeError(
                    f"{name} has {size} input channels, and what meets it has {other}. Give it "
                    f"what it was quantized for. ({error})"
                ) from None
        raise


def check_leaf(name: str, leaf: Any, spec: DotSpec) -> None:
    """Checks that a parameter can be quantized by a spec.

    Raises:
        ValueError: It cannot; the message names it and the way out.
    """
    axes = spec.w.axes
    check_dtype(name, jnp.result_type(leaf))
    if axes is None:
        raise ValueError(
            f"the rule for {name} does not say which axes share a scale. Use "
            "`resolve(rules, fn, params, *inputs)`, which finds them, or QSpec(axes=(-2,))."
        )
    shape = np.shape(leaf)
    if any(-axis > len(shape) for axis in axes) or not axes:
        raise ValueError(f"{name} has shape {shape} and no axes {axes}.")
    group = spec.w.group
    if group is not None and shape[max(axes)] % group.size:
        where, by = f"{name} along axis {max(axes)}", f"groups of {group.size}"
        says = not_divisible(where, shape[max(axes)], by)
        raise ValueError(f"{says} Choose a group among them, or pad the parameter.")


def check_dtype(name: str, dtype: Any) -> None:
    """Checks that parameters of a dtype have codes.

    Raises:
        ValueError: They have none; the message names the parameter and the way out.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} is {np.dtype(dtype)}; only floats have codes. Exclude it.")
    if not has_codes(dtype):
        raise ValueError(
            f"{name} is {np.dtype(dtype)}, which has no codes: floats of 16 and 32 bits have. "
            "Cast it to float32 first, or exclude it."
        )


_of_learned = jax.jit(encoded)


@functools.partial(jax.jit, static_argnums=1)
def _on_device(x: jax.Array, spec: DotSpec) -> QTensor:
    return encode(x, spec)


def encode(x: jax.Array, spec: DotSpec, over: Sequence[str] = ()) -> QTensor:
    """One array as codes and scales; axes are given, and nothing is checked.

    `over` are manual mesh axes that the axes are split over, so that devices share a scale.
    """
    w = spec.w
    assert w.axes is not None
    axes = tuple(axis % x.ndim for axis in w.axes)
    v = round_to_dtype(jax.lax.stop_gradient(x))
    made = functools.partial(QTensor, spec=spec, axes=w.axes, dtype=np.dtype(x.dtype))
    if not w.symmetric:
        codes, scale, point = asymmetric(v, *ends_of(v, axes, w, over), w)
        return _summed(made(codes, scale, point))
    # Groups are whole on each device, so devices share no bound of theirs; integer groups share the
    # scale of a channel, which `integer_groups` sees to.
    m = bounds_of(v, axes, w, tiles_of(x.shape, w), over if w.group is None else ())
    if w.group is not None and w.group.scale == "integer":
        codes, scale, multiplier = integer_groups(v, m, max(axes), w, over)
        return _summed(made(codes, scale, multiplier=multiplier))
    return _summed(made(*symmetric(v, m, w)))


def _summed(t: QTensor) -> QTensor:
    """Adds the sums of codes that an asymmetric activation needs."""
    if t.spec.x is None or t.spec.x.symmetric:
        return t
    return t.with_sums()


def inside(x: jax.Array, t: QTensor, over: Sequence[str] = ()) -> jax.Array:
    """A mask of the values that are within their range, and so receive gradients.

    `over` as of `encode`.
    """
    w = t.spec.w
    axes = tuple(axis % x.ndim for axis in t.axes)
    v = round_to_dtype(x)
    if not w.symmetric:
        low, high = ends_of(v, axes, w, over)
        return (low <= v) & (v <= high)
    m = bounds_of(v, axes, w, tiles_of(x.shape, w), over if w.group is None else ())
    # |x| <= m, and never Q s: f32(127) s is below m for 4 % of all m.
    return jnp.abs(v) <= repeat_groups(m, x.shape)
