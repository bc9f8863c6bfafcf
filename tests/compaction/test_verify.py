"""Laws of verification: it passes what is the same function, and names what is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from unitscale_jax.compaction import (
    compact,
    groups,
    plan_of,
    verify,
    verify_rebuild,
)


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def normed(x):
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def block(p, x):
    """A stream of 12 channels that a norm divides by their number, and a hidden layer of 8."""
    h = x @ p["in"]
    h = h + jax.nn.silu(normed(h) @ p["up"]) @ p["down"]
    return {"out": normed(h) @ p["out"]}


PARAMS = {"in": drawn(5, 12), "up": drawn(12, 8, seed=1), "down": drawn(8, 12, seed=2)}
PARAMS |= {"out": drawn(12, 3, seed=3)}
X = drawn(4, 5, seed=4)
GRAPH = groups(block, PARAMS, X)
HIDDEN = plan_of(GRAPH, {"down:0": [0, 3, 5]})
STREAM = plan_of(GRAPH, {"down:1": range(6)})


# ------------------------------------------------------------------------ against zeros


@pytest.mark.parametrize("plan", [HIDDEN, STREAM], ids=["hidden", "stream"])
def test_values_and_gradients_of_exact_groups_are_those_with_zeros(plan):
    found = verify(block, plan, PARAMS, X)
    assert found.outputs < 1e-6 and found.gradients < 1e-5


def test_a_group_that_zeros_do_not_stand_for_is_named():
    fn = lambda p, x: jax.nn.sigmoid(x @ p["a"]).mean(-1)
    params = {"a": drawn(5, 6)}
    plan = plan_of(groups(fn, params, X), {"a:1": [0, 1]}, exact_only=False)
    with pytest.raises(ValueError, match=r"output differs by .*Not exact: a:1"):
        verify(fn, plan, params, X)


@jax.custom_vjp
def lying(h):
    return jnp.tanh(h)


# cos 0 = 1: the derivative counts the channels that are zero, which no proof looks into.
lying.defvjp(lambda h: (jnp.tanh(h), h), lambda h, g: (g + jnp.cos(h).sum(-1, keepdims=True),))


def test_a_custom_derivative_that_counts_channels_is_found_by_its_gradient():
    fn = lambda p, x: lying(x @ p["a"]) @ p["b"]
    params = {"a": drawn(5, 6), "b": drawn(6, 2, seed=1)}
    plan = plan_of(groups(fn, params, X), {"a:1": [0, 1, 4]})
    with pytest.raises(ValueError, match=r"gradient of a differs by"):
        verify(fn, plan, params, X)
    assert verify(fn, plan, params, X, gradients=False).gradients is None


def test_numbers_that_are_not_finite_prove_nothing():
    with pytest.raises(
        ValueError, match=r"output out is not finite.* numbers before and \d+ after"
    ):
        verify(block, HIDDEN, PARAMS, jnp.full_like(X, jnp.nan))


# ------------------------------------------------------------------------ against a new model


def test_a_rebuilt_hidden_layer_is_the_same_function():
    assert verify_rebuild(block, HIDDEN, block, PARAMS, X).moved == ()


def test_a_rebuilt_stream_has_constants_that_moved_and_says_which():
    with pytest.raises(ValueError, match=r"another one.*What moved: div 12.0 -> 6.0"):
        verify_rebuild(block, STREAM, block, PARAMS, X)
    found = verify_rebuild(block, STREAM, block, PARAMS, X, accept_moved=True)
    assert set(found.moved) == {"div 12.0 -> 6.0"} and found.outputs > 1e-3


def test_a_model_built_with_other_equations_or_another_order_is_refused():
    other = lambda p, x: {"out": jnp.tanh(block(p, x)["out"])}
    with pytest.raises(ValueError, match="equations: none -> tanh"):
        verify_rebuild(block, HIDDEN, other, PARAMS, X)
    turned = lambda p, x: block({**p, "down": p["down"][::-1]}, x)
    with pytest.raises(ValueError, match="another one"):
        verify_rebuild(block, HIDDEN, turned, PARAMS, X)
    with pytest.raises(ValueError, match=r"shape \(4, 3\) and \(4, 2\)"):
        verify_rebuild(block, HIDDEN, lambda p, x: {"out": block(p, x)["out"][:, :2]}, PARAMS, X)


def test_the_rebuilt_function_gets_the_compact_parameters():
    seen = []
    spy = lambda p, x: seen.append(jax.tree.map(jnp.shape, p)) or block(p, x)
    verify_rebuild(block, HIDDEN, spy, PARAMS, X)
    assert seen[0] == jax.tree.map(jnp.shape, compact(PARAMS, HIDDEN))
