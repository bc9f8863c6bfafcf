"""Laws of compaction of arrays: slices of whole channels, and back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import unitscale_jax as us
from tests.support import zoo
from unitscale_jax.compaction import (
    channel_masks,
    compact,
    expand,
    groups,
    plan,
    plan_of,
    zero_channels,
)


def made_for(name, seed=0):
    """A model's parameters and a plan that keeps another number of channels of each group."""
    model, rng = zoo.model(name), np.random.default_rng(seed)
    graph = groups(model.apply, model.params, *model.inputs)
    some = lambda n: rng.permutation(n)[: rng.integers(1, n)].tolist()
    return model.params, plan_of(
        graph, {g.name: some(g.size) for g in graph.groups}, exact_only=False
    )


@pytest.mark.parametrize("name", ["plain_gqa", "linen_mobile"])
def test_compaction_takes_what_masks_keep(name):
    """C1, and the inverse: what is filled up again is the masked tree."""
    params, made = made_for(name)

    @jax.jit
    def every_way(params):
        small, zeroed = compact(params, made), zero_channels(params, made)
        pruned = us.prune.apply_masks(params, channel_masks(params, made))
        again = compact(zeroed, made), compact(expand(small, made), made)
        return (small, *again), (zeroed, expand(small, made), pruned)

    for same in every_way(params):
        for other in same[1:]:
            chex.assert_trees_all_equal(other, same[0])
    small = us.tree.named_leaves(compact(params, made))
    assert {name: np.shape(x) for name, x in small.items()} == made.new_shapes


# ------------------------------------------------------------------------ a small model by hand


def mlp(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"]


PARAMS = {"up": jnp.arange(12.0).reshape(2, 6), "down": jnp.arange(18.0).reshape(6, 3)}
X = jnp.ones((4, 2))
GRAPH = groups(mlp, PARAMS, X)
PLAN = plan_of(GRAPH, {"down:0": [5, 0, 3]})


def test_a_nan_in_a_channel_that_goes_is_gone():
    params = {**PARAMS, "up": PARAMS["up"].at[:, 1].set(jnp.nan)}
    assert us.tree.is_finite(compact(params, PLAN)) and us.tree.is_finite(
        zero_channels(params, PLAN)
    )


def test_what_has_the_paths_of_the_parameters_is_sliced_alike():
    """A part of the tree, other dtypes, abstract arrays, gradients."""
    at = np.array([0, 3, 5])
    chex.assert_trees_all_equal(compact({"up": -PARAMS["up"]}, PLAN), {"up": -PARAMS["up"][:, at]})
    narrow = compact(us.tree.astype(PARAMS, jnp.bfloat16), PLAN)
    assert narrow["down"].dtype == jnp.bfloat16
    abstract = jax.eval_shape(lambda p: compact(p, PLAN), PARAMS)
    assert {name: x.shape for name, x in abstract.items()} == PLAN.new_shapes
    grads = jax.grad(lambda p: compact(p, PLAN)["up"].sum())(PARAMS)
    chex.assert_trees_all_equal(
        grads, zero_channels(jax.tree.map(jnp.ones_like, grads), PLAN) | {"down": jnp.zeros((6, 3))}
    )


def test_batch_statistics_follow_the_channels_they_are_of():
    rngs = nnx.Rngs(0)
    layers = (nnx.Linear(2, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs))
    model = nnx.Sequential(*layers)
    model.eval()
    graph_def, state = nnx.split(model)
    fn = lambda state, x: nnx.merge(graph_def, state)(x)
    graph = groups(fn, state, X)
    (hidden,) = graph.groups
    made = plan_of(graph, {hidden.name: [0, 3, 5]})
    small = compact(state, made)
    sizes = {name: np.shape(x) for name, x in us.tree.named_leaves(small).items()}
    assert {name for name in sizes if sizes[name] == (3,)} >= {
        f"layers/1/{name}" for name in ("mean", "var", "scale", "bias")
    }
    got = us.compaction.compacted(fn, made)(small, X)
    np.testing.assert_allclose(
        got, fn(zero_channels(state, made), X), rtol=1e-6, atol=1e-6
    )  # a sum near 0


# ------------------------------------------------------------------------ sharded (C12)


def test_compact_of_sharded_is_sharded_of_compact_where_shards_keep_as_many():
    mesh = us.parallel.mesh(dp=4, tp=2)
    layout = {"up": NamedSharding(mesh, P(None, "tp")), "down": NamedSharding(mesh, P("tp"))}
    params = {"up": jnp.arange(16.0).reshape(2, 8), "down": jnp.arange(24.0).reshape(8, 3)}
    graph = groups(mlp, params, X)
    scores = {"down:0": [9, 8, 7, 6, 1, 2, 3, 4]}
    assert plan(graph, scores, keep=0.5).kept["down:0"] == (0, 1, 2, 3)
    made = plan(graph, scores, keep=0.5, tp=2)
    assert made.kept["down:0"] == (0, 1, 6, 7)
    small = compact(jax.device_put(params, layout), made)
    want = jax.device_put(compact(params, made), layout)
    chex.assert_trees_all_equal(small, want)
    for name, x in small.items():
        assert x.sharding == want[name].sharding
        for mine, other in zip(x.addressable_shards, want[name].addressable_shards, strict=True):
            np.testing.assert_array_equal(mine.data, other.data)


# ------------------------------------------------------------------------ bad input


def test_a_tree_of_another_model_is_refused_by_the_leaf():
    with pytest.raises(ValueError, match=r"other is no parameter of the plan, which knows down"):
        compact({"other": jnp.ones(3)}, PLAN)
    with pytest.raises(ValueError, match=r"up has shape \(2, 5\).*Another model's"):
        compact({"up": jnp.ones((2, 5))}, PLAN)
    with pytest.raises(ValueError, match=r"down has shape \(3, 3\).*That is what the plan makes"):
        compact(compact(PARAMS, PLAN), PLAN)
    with pytest.raises(ValueError, match=r"down has shape \(6, 3\), and in the compact model"):
        expand(PARAMS, PLAN)
    with pytest.raises(ValueError, match=r"up has shape \(2, 5\)"):
        channel_masks({"up": jnp.ones((2, 5))}, PLAN)
