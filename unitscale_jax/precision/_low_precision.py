"""Bfloat16 weights without a float32 copy: what nearest rounding would lose, kept another way.

    stochastic:  p' = p + u rounded up or down at random, so that its mean is p + u
    kahan:       p' = bf16(p + z),  z = u + c,  c' = z - (p' - p)      c: what is still owed

A bfloat16 weight of 1 has neighbours 2^-7 above and 2^-8 below, so nearest rounding drops each
update under 2^-9, for ever. (Zamirai et al., Revisiting BFloat16 Training, arXiv 2010.06192; Ozkara
et al., Stochastic Rounding for LLM Training, arXiv 2502.20566.)
"""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from unitscale_jax import formats, tree as trees
from unitscale_jax.errors import check_key
from unitscale_jax.optimizer import (
    LossScaleState,
    LowPrecisionState,
    MultiStepsState,
    PrunedState,
    check_optimizer,
    check_state,
    refuse_inside,
)
from unitscale_jax.typing import Key, Params

Rounding: TypeAlias = Literal["stochastic", "kahan"]
_WHY = "it would round, and pay what Kahan's sum owes, where the other takes no step."


def low_precision_weights(
    inner: optax.GradientTransformation,
    rounding: Rounding = "stochastic",
    *,
    key: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Updates bfloat16 parameters as if small updates were not rounded away.

    Order of wrappers, innermost first: chain -> low_precision_weights -> pruned -> multi_steps ->
    loss_scaled -> sharded.

    Args:
        inner: The optimizer. It sees float32 parameters and float32 gradients.
        rounding: "stochastic" needs no memory, and its error is a random walk; "kahan" needs two
            more bytes a parameter, and its error stays within a rounding of the carry.
        key: For stochastic rounding, `jax.random.key(seed)`.

    Returns:
        A transform over bfloat16 parameters. Its updates are float32, the difference from the old
        weight to the new one, so that `optax.apply_updates` lands on the new one. (Adding float32
        to bfloat16 takes JAX's standard dtype promotion.) State: `LowPrecisionState`.

    Raises:
        ValueError: The rounding is unknown, or stochastic without a key; in `init`, `inner` holds
            a wrapper that belongs around it; in `init` and `update`, a parameter is not bfloat16 or
            parameters are missing.
        TypeError: The key is not a typed key.

    The random bits of a leaf are those of its whole shape whatever its sharding under `jit`, so
    replicas agree and a run does not depend on the number of devices. Inside `shard_map` this holds
    for replicated parameters only: a shard would draw the bits of its own shape.

    Example:
        >>> params = jnp.bfloat16(1.0)  # whose next number is 1.0078125
        >>> optimizer = low_precision_weights(optax.sgd(1.0), "kahan")
        >>> state = optimizer.init(params)
        >>> for _ in range(8):
        ...     updates, state = optimizer.update(jnp.float32(-(2.0**-10)), state, params)
        ...     params = (params.astype(jnp.float32) + updates).astype(jnp.bfloat16)
        >>> params.item(), state.owed.item()
        (1.0078125, 0.0)
    """
    check_optimizer(inner, "low_precision_weights")
    _check_rounding(rounding, key)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Params) -> Any:
        _check_params(params)
        owed = jax.tree.map(jnp.zeros_like, params) if rounding == "kahan" else None
        step, state = jnp.zeros((), jnp.int32), inner.init(_widened(params))
        for kind in (LossScaleState, MultiStepsState, PrunedState):
            refuse_inside(state, kind, "low_precision_weights", _WHY)
        return LowPrecisionState(step=step, owed=owed, inner=state)

    def update_fn(
        updates: Params, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Params, Any]:
        _check_params(params)
        check_state(state, LowPrecisionState, "low_precision_weights")
        params = _widened(params)
        updates, inner_state = inner.update(_widened(updates), state.inner, params, **extra)
        owed = state.owed
        if rounding == "kahan":
            updates, owed = _kahan(params, updates, owed)
        else:
            updates = _stochastic(params, updates, key, state.step)
        return updates, LowPrecisionState(step=state.step + 1, owed=owed, inner=inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _stochastic(params: Params, updates: Params, key: Key | None, step: jax.Array) -> Params:
    """Updates that land on a bfloat16 neighbor of p + u, on each as likely as it is near.

    The expected value of the new weight is p + u, so small updates add up in the mean
    (https://arxiv.org/abs/2010.06192). Bits depend on the step and the number of the leaf.
    """
    assert key is not None  # it was checked when the transform was made
    leaves, outline = jax.tree.flatten(params)
    key = jax.random.fold_in(key, step)
    keys = jax.tree.unflatten(outline, [jax.random.fold_in(key, i) for i in range(len(leaves))])

    def rounded(p: jax.Array, u: jax.Array, key: Key) -> jax.Array:
        bits = jax.random.bits(key, p.shape, jnp.uint16)
        return formats.stochastic_bf16(p + u, bits).astype(jnp.float32) - p

    return jax.tree.map(rounded, params, updates, keys)


def _kahan(params: Params, updates: Params, owed: Params) -> tuple[Params, Params]:
    """Updates that land on bfloat16, and the part that rounding still owes (Kahan's sum).

        due = u + owed,    paid = bf16(p + due) - p,    owed' = bf16(due - paid)

    `paid` is exact in float32, as the difference of two bfloat16 numbers near one another; what is
    owed is at most half of the way from the new weight to its neighbor.
    """
    due = jax.tree.map(lambda u, c: u + c.astype(jnp.float32), updates, owed)
    paid = jax.tree.map(lambda p, z: _nearest(p + z) - p, params, due)
    return paid, jax.tree.map(lambda z, d: (z - d).astype(jnp.bfloat16), due, paid)


def _nearest(x: jax.Array) -> jax.Array:
    """Rounds to the nearest bfloat16, kept as float32.

    Not a cast there and back: XLA may take such a pair for excess precision and remove it, and with
    it all that Kahan's sum has to keep.
    """
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _widened(tree: Params) -> Params:
    return trees.astype(tree, jnp.float32)


def _check_rounding(rounding: str, key: Key | None) -> None:
    if rounding not in ("stochastic", "kahan"):
        raise ValueError(
            f"rounding is {rounding!r}. Choose 'stochastic', which draws bits, or 'kahan', which "
            "carries the error."
        )
    if rounding == "stochastic" and key is None:
        raise ValueError(
            "stochastic rounding draws random bits and got no key. Pass key=jax.random.key(seed), "
            "or choose rounding='kahan', which draws none."
        )
    if key is not None:
        check_key(key)


def _check_params(params: Params | None) -> None:
    if params is None:
        raise ValueError(
            "low_precision_weights rounds new weights, for which it needs the old ones. Call "
            "update(grads, state, params)."
        )
    for name, leaf in zip(trees.names(params), jax.tree.leaves(params), strict=True):
        dtype = jnp.result_type(leaf)
        if dtype == jnp.bfloat16:
            continue
        if trees.is_floating(leaf):
            way_out = (
                "Cast the parameters first, Policy(param='bfloat16').cast_to_param(params); or "
                "give what stays as it is an optimizer of its own by optax.partition."
            )
        else:
            way_out = (
                "It cannot be trained: take it out of the parameters by tree.partition, or give it "
                "optax.set_to_zero() by optax.partition."
            )
        raise ValueError(f"parameter {name!r} is {dtype}, expected bfloat16. {way_out}")
