"""Scales that are parameters: `learned` puts them beside the weights, and training moves them."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.quant._lsq import Learned, first_of_mean, first_scale, is_learned, least_scale
from unitscale_jax.quant._params import QuantRules, agrees, check_leaf, match
from unitscale_jax.quant._qtensor import is_quantized
from unitscale_jax.quant._spec import DotSpec, QSpec
from unitscale_jax.statistics import check_names
from unitscale_jax.trace.program import is_concrete


def learned(params: Any, rules: QuantRules, stats: Mapping[str, Any] | None = None) -> Any:
    """Puts trained scales beside the parameters that rules name (LSQ).

    `quantized(fn)` takes the result in place of parameters, and `jax.grad` and any optimizer see
    arrays; `quantize` makes codes of it for serving.

    Args:
        params: A pytree of parameters.
        rules: Pairs (pattern, `DotSpec`) whose axes are given, as `resolve` gives them: symmetric
            integers with free scales.
        stats: What `calibrate` found of what meets each parameter; needed by rules with an `x`.

    Returns:
        `params` with a `Learned` for each parameter named. A scale starts as 2 mean |v| / sqrt(Q);
        that of an activation likewise if the statistics have `"channels"` and its calibrator is
        `Absmax`, else as the range / Q. One that is learned already, by the same spec, stays.

    Raises:
        ValueError: A rule matches nothing, has no axes, a spec that scales cannot be learned of, or
            an `x` that the statistics do not have; or a parameter cannot be quantized.

    Law: training is serving, `quantized(fn)(p, x) == quantized(fn)(quantize(p), x)` to the bit.
    Gradients go to the array where |v| < s Q, and to the scale as in the paper
    (https://arxiv.org/abs/1902.08153).

    Example:
        >>> import unitscale_jax as us
        >>> fn = lambda params, x: x @ params["w"]
        >>> rules = {"w": us.DotSpec(w=us.QSpec(format="int3", axes=(-2,)))}
        >>> params = learned({"w": jnp.array([[0.24], [-1.5], [5], [0.8], [-0.3]])}, rules)
        >>> params["w"].scale.round(5).tolist()
        [[1.8105700016021729]]
        >>> grads = jax.grad(lambda p: us.quantized(fn)(p, jnp.ones((1, 5))).sum())(params)
        >>> grads["w"].master[:, 0].tolist()  # 5 is in steps of the scale nearly 3, and inside
        [1.0, 1.0, 1.0, 1.0, 1.0]
        >>> jax.tree.map(jnp.shape, grads["w"].scale)
        (1, 1)
        >>> us.quantize(params)["w"].codes[:, 0].tolist()
        [0, -1, 3, 0, 0]
    """
    found = match(rules, params)
    check_names(stats, trees.named_leaves(params, is_leaf=trees.is_compound))

    def one(name: str, leaf: Any) -> Any:
        return leaf if found[name] is None else _learned(name, leaf, found[name], stats)

    return trees.map_named(one, params, is_leaf=trees.is_compound)


def _learned(
    name: str, leaf: Any, spec: DotSpec | None, stats: Mapping[str, Any] | None
) -> Learned:
    assert spec is not None
    if is_learned(leaf) and agrees(leaf.spec, spec):
        return leaf
    if is_learned(leaf) or is_quantized(leaf):
        raise ValueError(
            f"{name} is quantized already, as {leaf.spec}, and a rule asks for scales learned as "
            f"{spec}; begin with the float parameter, or leave it out."
        )
    check_leaf(name, leaf, spec)
    _check_spec(name, spec)
    x_scale = None if spec.x is None else _x_scale(name, spec.x, stats)
    scale = _first(jnp.asarray(leaf), spec.w)
    if is_concrete(leaf) and not bool(jnp.isfinite(scale).all()):
        raise ValueError(f"{name} has NaN or infinite values, which no scale fits; mend it first.")
    return Learned(leaf, scale, x_scale, spec=spec)


@functools.partial(jax.jit, static_argnums=1)
def _first(x: jax.Array, spec: QSpec) -> jax.Array:
    return first_scale(x, spec)


def _check_spec(name: str, spec: DotSpec) -> None:
    """Checks that scales can be learned by a spec.

    Raises:
        ValueError: They cannot; the message names the parameter and the way out.
    """
    for role, own in (("w", spec.w), ("x", spec.x)):
        if own is None:
            continue
        integers = own.group is not None and own.group.scale == "integer"
        if not own.is_integer or not own.symmetric or own.scale != "free" or integers:
            raise ValueError(
                f"{name}: the scale of {role} as {own} cannot be learned, which is for symmetric "
                "integers with free scales, in groups or not. Quantize it without `learned`."
            )
    if not spec.w.calibrator.takes_the_maximum:
        raise ValueError(
            f"{name}: a scale that is learned has no calibrator, and w has {spec.w.calibrator}; "
            "leave it out. That of x may have one, for the range it starts from."
        )


def _x_scale(name: str, spec: QSpec, stats: Mapping[str, Any] | None) -> jax.Array:
    """The first scale of what meets a parameter, by its statistics."""
    stat = None if stats is None else stats.get(name)
    if stat is None or stat.range is None:
        raise ValueError(
            f"the rule for {name} quantizes what meets it, and stats do not say where that scale "
            "starts. Give learned(.., stats=calibrate(fn, params, batches, rules)), or x=None."
        )
    plain = spec.calibrator.takes_the_maximum and spec.measure((0,)).merge is None
    mean = getattr(stat, "mean", None)
    if plain and mean is not None:  # a calibrator that decides on something is heard instead
        lead = stat.layout.layers
        return first_of_mean(np.mean(mean, axis=tuple(range(lead, mean.ndim))), spec)
    m = jnp.max(jnp.abs(jnp.asarray(stat.range, jnp.float32)), axis=-1)
    return jnp.maximum(m * np.float32(1 / spec.max_code), least_scale(spec))
