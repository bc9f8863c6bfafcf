"""Every pair of techniques in both orders: equal, or an error that names the right order.

These are the wrappers of functions of parameters, and what refuses to go around a gradient station;
pairs of wrappers of optimizers are in `test_wrappers.py`.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unitscale_jax as us
from tests.support import zoo

INT8 = us.DotSpec(w=us.QSpec(), x=us.QSpec())


class Technique(NamedTuple):
    """A wrapper of functions of parameters, and what it asks of the parameters."""

    wrap: Callable[..., Any]
    params: Callable[[Any], Any] = lambda params: params


class Case(NamedTuple):
    """A model with one kernel to quantize and prune, and one group of channels to take out."""

    model: zoo.Model
    kernel: str
    plan: us.compaction.CompactionPlan


@functools.cache
def case(name):
    model = zoo.model(name)
    graph = us.compaction.groups(model.apply, model.params, *model.inputs)
    group = graph.groups[0]
    plan = us.compaction.plan_of(graph, {group.name: range(0, group.size, 2)})
    leaves = us.tree.named_leaves(model.params)
    kernel = next(path for path, leaf in leaves.items() if path.endswith("kernel"))
    return Case(model, kernel, plan)


def techniques(of: Case) -> dict[str, Technique]:
    """All wrappers of functions whose results keep their structure."""
    spec = us.prune.SparsitySpec(patterns={of.kernel: us.prune.Unstructured()}, sparsity=0.5)

    def features_alone(fn):
        with_features = us.distill.features(fn, {"input": f"{of.kernel}:input"})
        return lambda *args: with_features(*args)[0]

    return {
        "autocast": Technique(lambda fn: us.autocast(fn, "bfloat16")),
        "cast": Technique(lambda fn: us.cast(fn, us.Policy(compute="bfloat16"))),
        "quantized": Technique(lambda fn: us.quantized(fn, {of.kernel: INT8})),
        "masked_straight_through": Technique(lambda fn: us.prune.masked_straight_through(fn, spec)),
        "compacted": Technique(
            lambda fn: us.compaction.compacted(fn, of.plan),
            lambda params: us.compaction.compact(params, of.plan),
        ),
        "features": Technique(features_alone),
        "rewritten": Technique(lambda fn: us.trace.rewritten(fn, {})),
    }


NAMES = list(techniques(case("plain_mlp")))
MODELS = [
    "plain_mlp",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("linen_mlp", "nnx_mlp")),
]
REFUSED = {  # (outer, inner): the other order is right
    ("cast", "quantized"),
    ("compacted", "quantized"),
    ("features", "quantized"),
    ("compacted", "masked_straight_through"),
    ("quantized", "masked_straight_through"),
}


def step(of: Case, outer: str, inner: str):
    """Value and gradients of a loss of one technique around another."""
    ways = techniques(of)
    fn = ways[outer].wrap(ways[inner].wrap(of.model.apply))
    params = ways[outer].params(ways[inner].params(of.model.params))

    def loss(params):
        outputs = jax.tree.leaves(fn(params, *of.model.inputs))
        return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in outputs)

    # Linen and NNX mix the float32 of their own constants with what a cast gives them.
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.filterwarnings("ignore:autocast")  # which finds less to lower behind codes
@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(NAMES, 2)))
@pytest.mark.parametrize("name", MODELS)
def test_both_orders_are_equal_or_one_is_refused_by_name(name, one, other):
    found = {}
    for outer, inner in ((one, other), (other, one)):
        if (outer, inner) in REFUSED:
            right = rf"Put {outer} inside: {inner}\({outer}\("
            with pytest.raises(ValueError, match=right):
                step(case(name), outer, inner)
        else:
            found[outer] = step(case(name), outer, inner)
    if len(found) == 2:
        for leaf, twin in zip(*map(jax.tree.leaves, found.values()), strict=True):
            np.testing.assert_allclose(leaf, twin, rtol=0, atol=1e-5 * float(jnp.abs(leaf).max()))


STATIONS = [name for name in NAMES if name != "rewritten"]  # the engine sees gradients, too


@pytest.mark.parametrize("name", [*STATIONS, "value_and_grad", "distilled"])
def test_what_rewrites_a_function_is_refused_around_a_gradient_station(name):
    more = {
        "value_and_grad": us.value_and_grad,
        "distilled": lambda fn: us.distilled(fn, lambda batch: batch, us.distill.kl),
    }
    ways = {key: way.wrap for key, way in techniques(case("plain_mlp")).items()} | more
    grad_fn = us.value_and_grad(lambda params, batch: jnp.sum(batch @ params["w"]))
    for station in (grad_fn, us.accumulated(grad_fn, 2)):
        with pytest.raises(TypeError, match=f"Put {name} inside. The order is reduced"):
            ways[name](station)
    with pytest.raises(TypeError, match="goes around a function"):
        ways[name](3)
