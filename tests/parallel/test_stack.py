"""Laws of stacking: a permutation that comes undone, whatever holds the layers."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core, nnx
from jax.sharding import PartitionSpec as P

import unitscale_jax as us

stack, unstack = us.parallel.stack, us.parallel.unstack


def layer(i, dtype=jnp.float32):
    return {"kernel": jnp.arange(6.0).reshape(2, 3).astype(dtype) + 10 * i, "bias": jnp.full(3, i)}


def named(count):
    layers = {f"layer_{i}": layer(i) for i in range(count)}
    return {"embed": jnp.ones((5, 2)), "decoder": {**layers, "norm": jnp.ones(2)}}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize(("stages", "repeats"), [(1, 1), (4, 1), (2, 2), (2, 6), (12, 1), (1, 12)])
def test_unstacking_undoes_stacking_to_the_bit(stages, repeats):
    params = named(12)  # layer_10 comes after layer_9
    stacked = stack(params, "decoder/layer_*", stages, repeats)
    kernel = stacked["decoder"].layers["kernel"]
    assert kernel.shape == (repeats, stages, 12 // (stages * repeats), 2, 3)
    assert [int(x) // 10 for x in kernel[..., 0, 0].ravel()] == list(range(12))
    assert_same(unstack(stacked), params)
    again = stack(unstack(stacked), "decoder/layer_*", 3, 2)
    assert_same(again, stack(params, "decoder/layer_*", 3, 2))


def test_chunks_go_round_the_stages():
    stacked = stack(named(8), "decoder/layer_*", 4, 2)["decoder"].layers["bias"]
    assert stacked[..., 0, 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 2, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(4)])


def containers():
    yield named(4), "decoder/layer_*"
    yield core.freeze(named(4)), "decoder/layer_*"
    yield nnx.state(Model(nnx.Rngs(0)), nnx.Param), "blocks/*"
    yield {"layers": [layer(i) for i in range(4)], "head": jnp.ones(2)}, "layers/*"
    yield {"layers": tuple(layer(i) for i in range(4))}, "layers/*"
    yield {f"layer_{i}": jnp.full((2,), i, jnp.bfloat16) for i in range(4)}, "layer_*"


@pytest.mark.parametrize("case", range(6))
def test_layers_may_be_in_any_container(case):
    params, pattern = list(containers())[case]
    stacked = stack(params, pattern, 2)
    assert_same(unstack(stacked), params)
    assert_same(jax.jit(unstack)(jax.jit(lambda p: stack(p, pattern, 2))(params)), params)
    words = {name.replace(pattern.rpartition("/")[2], "?") for name in us.tree.names(stacked)}
    assert any("?" in word for word in words)  # a rule with a star holds for both
    assert us.rules.assign({f"{pattern}/**": 1}, stacked) is not None


def test_the_state_of_an_optimizer_is_stacked_as_its_parameters(relaxed_promotion):
    params, optimizer = named(4), optax.adam(0.1)
    stacked = stack(params, "**/layer_*", 2)
    state = optimizer.update(stacked, optimizer.init(stacked), stacked)[1]
    plain = optimizer.update(params, optimizer.init(params), params)[1]
    assert_same(unstack(state), plain)
    assert_same(stack(plain, "**/layer_*", 2), state)


def test_flags_of_a_loss_scale_are_stacked_as_its_parameters():
    """A scalar for a stack goes to each of its layers; one for each layer says which it was."""
    params = {"head": jnp.ones(3), "layers": [jnp.ones(2), jnp.ones(2)]}
    tx = us.loss_scaled(optax.sgd(0.1), us.DynamicScale())
    stacked = us.parallel.stack(params, "layers/*", 2)
    grads = jax.tree.map(jnp.zeros_like, stacked)
    state = us.parallel.unstack(tx.update(grads, tx.init(stacked))[1])
    chex.assert_trees_all_equal(state.bad, tx.init(params).bad)
    state = us.parallel.stack(state, "**/layers/*", 2)
    grads["layers"].layers = grads["layers"].layers.at[0, 1].set(jnp.inf)
    state = us.parallel.unstack(jax.jit(tx.update)(grads, state)[1])
    assert us.overflowing(state, params) == ["layers/1"]


def test_flags_of_a_scanned_stack_are_those_of_its_array():
    params, tx = {"layers": jnp.ones((2, 4))}, us.loss_scaled(optax.sgd(0.1), us.DynamicScale())
    state = us.parallel.unstack(tx.init(us.parallel.stack(params, "layers", 2, axis=1)))
    chex.assert_trees_all_equal(state, tx.init(params))


def test_a_scanned_stack_becomes_stages_along_the_axis_of_its_layers():
    for axis in (0, 1):
        kernels = jnp.moveaxis(jnp.arange(24.0).reshape(4, 2, 3), 0, axis)
        params = {"layers": {"kernel": kernels}, "head": jnp.ones(3)}
        stacked = stack(params, "layers", 2, axis=axis)
        assert stacked.layers["kernel"].shape == (1, 2, 2, 2, 3)
        assert stacked.layers["kernel"][0, 1, 0, 0, 0] == 12
        assert_same(unstack(stacked), params)


def test_rules_lay_stages_out():
    params = stack(named(4), "decoder/layer_*", 2)
    mesh = us.parallel.mesh(pp=2, tp=4)
    layout = us.parallel.layout(params, {"decoder/layer_*/**": {1: "pp"}}, mesh)
    placed = us.parallel.shard(params, layout)
    assert layout.by_name["decoder/layer_*/kernel"] == P(None, "pp")
    assert placed["decoder"].layers["kernel"].addressable_shards[0].data.shape == (1, 1, 2, 2, 3)
    assert_same(unstack(placed), named(4))


def test_what_cannot_be_stacked_says_why():
    with pytest.raises(ValueError, match="7 layers match 'decoder/layer_.*multiple of 8.*divisors"):
        stack(named(7), "decoder/layer_*", 4, 2)
    with pytest.raises(ValueError, match="'decoder/laier_.*matched none of .*layers; closest"):
        stack(named(4), "decoder/laier_*", 2)
    odd = {"layer_0": layer(0), "layer_1": {"kernel": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match="'layer_1' and 'layer_0' differ in 'bias'"):
        stack(odd, "layer_*", 2)
    wide = {"layer_0": layer(0), "layer_1": layer(1, jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"'layer_1/kernel' is bfloat16\[2, 3\].*is float32"):
        stack(wide, "layer_*", 2)
    with pytest.raises(ValueError, match="matches 2 of 3 entries of a list"):
        stack([layer(0), layer(1), jnp.ones(2)], re.compile("[01]"), 2)
    with pytest.raises(ValueError, match="`stages` is 0"):
        stack(named(4), "decoder/layer_*", 0)
    with pytest.raises(ValueError, match="4 entries of one container.*where `axis` says"):
        stack(named(4), "decoder/layer_*", 2, axis=0)
