"""Laws of graphs and plans: consent, names, and two plans one after the other."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unitscale_jax as us
from tests.support import zoo
from unitscale_jax.compaction import (
    compact,
    compacted,
    groups,
    plan,
    plan_of,
)


def mlp(p, x):
    return jax.nn.relu(x @ p["up"]) @ p["down"]


PARAMS = {"up": jnp.ones((2, 6)), "down": jnp.ones((6, 3))}
X = jnp.ones((4, 2))
GRAPH = groups(mlp, PARAMS, X)


def test_a_graph_prints_its_groups_and_why_others_are_refused():
    table = str(GRAPH)
    assert all(word in table for word in ("down:0", "exact", "output", "input"))


# ------------------------------------------------------------------------ one after the other (C13)


@pytest.mark.parametrize("name", ["plain_gqa", "linen_mobile"])
def test_a_compact_model_compacts_again_as_by_one_plan(name):
    model = zoo.model(name)
    graph = groups(model.apply, model.params, *model.inputs)
    first = thinned(graph, seed=0)
    small = compact(model.params, first)
    again = groups(compacted(model.apply, first), small, *model.inputs)
    second = thinned(again, seed=1)
    assert second.kept, "the second plan takes nothing"
    both = first.then(second)
    chex.assert_trees_all_equal(compact(small, second), compact(model.params, both))
    twice = compacted(compacted(model.apply, first), second)(compact(small, second), *model.inputs)
    once = compacted(model.apply, both)(compact(model.params, both), *model.inputs)
    chex.assert_trees_all_close(twice, once, rtol=1e-5, atol=1e-6)


def thinned(graph, seed):
    """About two thirds of each exact group, and never fewer than two channels."""
    rng = np.random.default_rng(seed)
    some = lambda n: rng.permutation(n)[: max(2, 2 * n // 3)].tolist()
    return plan_of(graph, {g.name: some(g.size) for g in graph.groups if "exact" in g.flags})


def test_a_second_plan_of_another_model_is_refused():
    first = plan_of(GRAPH, {"down:0": [0, 1, 2]})
    with pytest.raises(
        ValueError, match=r"down has shape \(6, 3\) in the second plan.*leaves \(3, 3\)"
    ):
        first.then(first)


# ------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("kept", "match"),
    [
        ({"down:0": []}, "down:0 would lose its last channel of 6. Keep one, or say empty="),
        ({"down:0": [6]}, "must be different, ascending and among 0 to 5"),
        ({"down:0": [-1]}, "must be different, ascending and among 0 to 5"),
        ({"down:0": [1, 1]}, "must be different"),
        ({"up:0": [0]}, "no group is named 'up:0'. There are down:0"),
    ],
)
def test_a_plan_that_cannot_be_says_why(kept, match):
    with pytest.raises(ValueError, match=match):
        plan_of(GRAPH, kept)


def test_groups_that_are_not_exact_need_consent():
    fn = lambda p, x: jax.nn.softmax(x @ p["up"]) @ p["down"]
    graph = groups(fn, PARAMS, X)
    with pytest.raises(ValueError, match=r"down:0 is reduce:nonlin \(mixed by .*exact_only=False"):
        plan_of(graph, {"down:0": [0, 1]})
    with pytest.raises(ValueError, match=r"no group with scores is exact: down:0"):
        plan(graph, {"down:0": np.arange(6)}, keep=0.5)
    assert plan_of(graph, {"down:0": [0, 1]}, exact_only=False).new_sizes == {"down:0": 2}
    assert plan_of(graph, {"down:0": range(6)}).kept == {}, "what stays whole needs no consent"


def test_statistics_that_are_closed_over_are_refused_with_the_way_out():
    """As a parameter the same array is cut with the channels that meet it."""
    mean, x = jnp.arange(8.0), jnp.ones((2, 4))
    params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 3))}
    normed = lambda p, mean, x: jax.nn.relu(x @ p["up"] - mean) @ p["down"]
    closed = us.compaction.groups(lambda p, x: normed(p, mean, x), params, x)
    way_out = r"Pass them as parameters: {\"params\": \.\., \"state\": \.\.}"
    assert re.search(way_out, str(closed))
    with pytest.raises(ValueError, match=rf"'up:1' is refused, constant.*{way_out}"):
        us.compaction.plan_of(closed, {"up:1": [0, 1]})
    both = {"params": params, "state": mean}
    passed = us.compaction.groups(lambda p, x: normed(p["params"], p["state"], x), both, x)
    assert [group.size for group in passed.groups] == [8]
    assert "constant" not in str(passed)
