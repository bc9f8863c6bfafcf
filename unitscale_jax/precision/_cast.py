"""Mixed precision of a whole model: cast what goes in, cast what comes out.

    cast(apply, policy)(params, x) = output(apply(compute(params), compute(x)))

The transpose of a cast is the cast back, so gradients arrive in the dtype of the parameters, and
float32 masters get float32 gradients of 16-bit arithmetic.
"""

from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax import rules, tree as trees
from unitscale_jax.loss import around
from unitscale_jax.precision._policy import Policy
from unitscale_jax.typing import Apply, DType, Params


def cast(apply: Apply, policy: Policy | DType) -> Apply:
    """Evaluates a model in the compute dtype of a policy.

    Args:
        apply: Maps `(params, *inputs)`, and keyword arguments, to any pytree. When it is called
            with a `state` (that is not None) and returns a pair, its second is the new state.
        policy: Parameters are cast to its compute dtype or to that of the override that names
            them, inputs to its compute dtype, outputs to its output dtype. `policy.param` plays no
            part here: parameters come as they are stored. A dtype is `Policy(compute=dtype)`.

    Returns:
        A function with the signature of `apply`, and its output structure and shapes. Only
        floating arrays of 16 bits and more are cast: integers, booleans, keys, Python numbers and
        8-bit codes pass through. State goes in and comes out as it is, since running statistics
        stall in 16 bits.

    Raises:
        TypeError: `apply` is no function.
        ValueError: The policy is neither one nor a dtype to compute in. At the call, an override
            names no parameter; the message lists near misses.

    The all-float32 policy is the identity on a float32 model (the jaxpr is the same), casting
    twice is casting once, and gradients have the dtype of the parameters.

    An override says in which dtype a parameter *arrives*. What a float32 gain does to the bfloat16
    activation that it multiplies is up to the model's own casts and JAX's promotion rules.

    Example:
        >>> apply = lambda params, x: x @ params["w"]
        >>> low = cast(apply, Policy(compute="bfloat16"))
        >>> params, x = {"w": jnp.ones((2, 1))}, jnp.array([[1.0, 1 / 512]])
        >>> apply(params, x).item(), low(params, x).item(), low(params, x).dtype
        (1.001953125, 1.0, dtype('float32'))
        >>> jax.grad(lambda params: low(params, x).sum())(params)["w"].dtype
        dtype('float32')
    """
    policy = policy if isinstance(policy, Policy) else Policy(compute=policy)

    @around(apply, "cast")
    def cast_fn(params: Params, *inputs: Any, **kwargs: Any) -> Any:
        dtypes = rules.assign(policy.overrides, params, policy.compute)
        state = {name: kwargs.pop(name) for name in ("state",) if name in kwargs}
        inputs, kwargs = _cast((inputs, kwargs), policy.compute)
        params = jax.tree.map(_cast, params, dtypes, is_leaf=trees.is_compound)
        out = apply(params, *inputs, **kwargs, **state)
        if state.get("state") is not None and isinstance(out, tuple) and len(out) == 2:
            return _cast(out[0], policy.output), out[1]
        return _cast(out, policy.output)

    return cast_fn


def _cast(tree: Any, dtype: DType) -> Any:
    """Casts floats of 16 bits and more to a dtype; the identity leaves no equation."""

    def cast_leaf(x: Any) -> Any:
        return trees.astype(x, dtype) if _is_wide(x) and x.dtype != dtype else x

    return jax.tree.map(cast_leaf, tree, is_leaf=trees.is_compound)


def _is_wide(leaf: Any) -> bool:
    """True for an array of floats that stand for themselves (8-bit ones are codes)."""
    # A Python number follows the arrays that it meets, so it needs no cast; a function, a string
    # or another static argument has no dtype at all.
    if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    return jnp.finfo(leaf.dtype).bits >= 16
