"""Scores: what a weight is worth, as three pure functions.

    magnitude   |w|                         saliency   |w g|
    fisher      1/2 w^2 E[g^2]              movement   - sum over steps of w g,  signed
    random      uniform, by path and number of the update

g is the gradient at the pruned parameters, of every weight: a pruned one is a zero there, and its
gradient need not be. Larger stays. Movement: https://arxiv.org/abs/2005.07683; Fisher information:
https://arxiv.org/abs/1801.05787.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_type
from unitscale_jax.typing import Params


class Score(NamedTuple):
    """The worth of weights, as functions, and the state that they remember for it.

    Attributes:
        init: `init(params) -> state`.
        update: `update(state, grads, params) -> state`, at every step with finite gradients.
        value: `value(state, grads, params, count) -> scores`: a pytree like `params` of float32
            arrays, larger for what is to stay, with the scalar NaN for what is not floating.
            `count` is the number of the update of masks, from 1; 0 for the masks a run starts with.
    """

    init: Callable[[Params], Any]
    update: Callable[[Any, Params, Params], Any]
    value: Callable[[Any, Params, Params, Any], Any]


def magnitude() -> Score:
    """Scores weights by |w|: small weights are pruned first.

    Example:
        >>> magnitude().value((), None, jnp.array([1.0, -2.0]), 1).tolist()
        [1.0, 2.0]
    """
    return _stateless(lambda _, params: _each(lambda _, w: jnp.abs(_wide(w)), params))


def saliency() -> Score:
    """|w g|: what leaving a weight out costs, to first order.

    Example:
        >>> saliency().value((), jnp.array([3.0, 0.5]), jnp.array([1.0, -2.0]), 1).tolist()
        [3.0, 1.0]
    """

    def cost(name: str, w: jax.Array, g: jax.Array) -> jax.Array:
        del name
        return jnp.abs(_wide(w) * _wide(g))

    return _stateless(lambda grads, params: _each(cost, params, grads))


def random(seed: int) -> Score:
    """Uniform numbers in [0, 1): what any other score has to beat.

    Args:
        seed: Of all draws; each depends on nothing else but the parameter's path and shape and the
            number of the update.

    Example:
        >>> w = {"w": jnp.ones(100)}
        >>> first, again, later = (random(0).value((), None, w, n)["w"] for n in (1, 1, 2))
        >>> bool(jnp.all(first == again)), bool(jnp.any(first == later))
        (True, False)
    """

    def value_fn(state: Any, grads: Params, params: Params, count: Any) -> Any:
        del state, grads

        def draw(name: str, w: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
            return jax.random.uniform(jax.random.fold_in(key, count), w.shape, jnp.float32)

        return _each(draw, params)

    return Score(lambda _: (), lambda state, *_: state, value_fn)


class FisherState(NamedTuple):
    """State of `fisher`: sums of squared gradients.

    Attributes:
        steps: Gradients seen, int32.
        squares: A pytree like the parameters of float32: their decayed sum of (1 - decay) g^2.
    """

    steps: jax.Array
    squares: Any


def fisher(decay: float = 0.99) -> Score:
    """w^2 E[g^2] / 2: what leaving a weight out costs, to second order by Fisher's information.

    Args:
        decay: Of the running mean of squares, in [0, 1). Its start from zero is corrected for.

    Raises:
        ValueError: The decay is not in [0, 1).

    Example:
        >>> score, w, g = fisher(), jnp.array([1.0, 2.0]), jnp.array([3.0, 0.5])
        >>> state = score.update(score.init(w), g, w)
        >>> [round(s, 4) for s in score.value(state, g, w, 1).tolist()]
        [4.5, 0.5]
    """
    check_type("decay", decay, int | float, "a number in [0, 1)")
    if not 0 <= decay < 1:
        raise ValueError(
            f"fisher: decay is {decay}; it is in [0, 1), 0 for the last gradient only."
        )

    def update_fn(state: FisherState, grads: Params, params: Params) -> FisherState:
        def added(name: str, w: jax.Array, g: jax.Array, mean: jax.Array) -> jax.Array:
            del name, w
            return decay * mean + (1 - decay) * jnp.square(_wide(g))

        return FisherState(state.steps + 1, _each(added, params, grads, state.squares))

    def value_fn(state: FisherState, grads: Params, params: Params, count: Any) -> Any:
        del grads, count
        steps = jnp.maximum(state.steps, 1).astype(jnp.float32)
        seen = 1 - jnp.power(jnp.float32(decay), steps)

        def cost(name: str, w: jax.Array, mean: jax.Array) -> jax.Array:
            del name
            return 0.5 * jnp.square(_wide(w)) * (mean / seen)

        return _each(cost, params, state.squares)

    return Score(lambda p: FisherState(jnp.zeros((), jnp.int32), _zeros(p)), update_fn, value_fn)


def movement() -> Score:
    """-sum w g over all steps: what the optimizer moves toward zero goes, however large it is.

    Example:
        >>> score, w = movement(), jnp.array([1.0, 2.0])
        >>> state = score.update(score.init(w), jnp.array([3.0, -0.5]), w)
        >>> score.value(state, None, w, 1).tolist()
        [-3.0, 1.0]
    """

    def update_fn(state: Any, grads: Params, params: Params) -> Any:
        return _each(lambda _, w, g, s: s - _wide(w) * _wide(g), params, grads, state)

    return Score(_zeros, update_fn, lambda state, *_: state)


def _stateless(value: Callable[[Params, Params], Any]) -> Score:
    """A score that remembers nothing: `value(grads, params)`."""

    def value_fn(state: Any, grads: Params, params: Params, count: Any) -> Any:
        del state, count
        return value(grads, params)

    return Score(lambda _: (), lambda state, *_: state, value_fn)


def _each(fn: Callable[..., jax.Array], params: Params, *rest: Any) -> Any:
    """Maps `fn(name, w, *leaves of rest)` over what is floating; elsewhere is NaN."""

    def ranked(name: str, *leaves: Any) -> jax.Array:
        w, *others = map(trees.values_of, leaves)
        if w is None or not trees.is_floating(w):
            return jnp.full((), np.nan, jnp.float32)
        return fn(name, w, *others)

    return trees.map_named(ranked, params, *rest, is_leaf=trees.is_compound)


def _zeros(params: Params) -> Any:
    return _each(lambda _, w: jnp.zeros_like(w, dtype=jnp.float32), params)


def _wide(x: Any) -> jax.Array:
    return jnp.asarray(x).astype(jnp.float32)
