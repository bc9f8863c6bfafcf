"""Laws of scores: a channel is worth what all its slices are worth together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unitscale_jax as us
from tests.support import zoo
from tests.trace.test_dims import language_model
from unitscale_jax.compaction import (
    activation,
    expert_scores,
    groups,
    l2,
    plan_of,
    taylor,
    zero_channels,
)

TOLERANCE = 200 * np.finfo(np.float32).eps


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def filled(shapes, seed=0):
    leaves, structure = jax.tree.flatten(shapes)
    return structure.unflatten([normal(seed + k, *x.shape) for k, x in enumerate(leaves)])


def by_masks(graph, params, of_slice):
    """For each channel of each group: its slices, by keeping it alone and no other."""
    out = {}
    for group in graph.groups:
        if "layer" in group.flags:
            continue
        alone = lambda c, group=group: plan_of(graph, {group.name: [c]}, exact_only=False)
        members = {m.path for m in group.members}
        out[group.name] = [of_slice(alone(c), members) for c in range(group.size)]
    return out


def compared(found, expected):
    assert set(found) == set(expected)
    for name, values in expected.items():
        mean = np.mean(values)
        np.testing.assert_allclose(
            found[name], np.asarray(values) / mean, rtol=TOLERANCE, atol=TOLERANCE
        )
        assert found[name].dtype == jnp.float32


def twice(plan, path):
    """Whether a parameter has a channel along two axes, and so two slices that cross."""
    return sum(any(isinstance(e, str) and e in plan.kept for e in term)
               for axis in plan.axes[path] for term in axis[:1]) > 1  # fmt: skip


@pytest.mark.parametrize("how", [{}, {"fused": True}, {"stacked": True}])
def test_l2_is_the_sum_of_squares_of_all_slices(how):
    fn, shapes, ids = language_model(layers=2 if "stacked" in how else 1, **how)
    params = filled(shapes)
    graph = groups(fn, params, ids)

    def squares(plan, members):
        leaves = us.tree.named_leaves(zero_channels(params, plan))
        assert not any(twice(plan, path) for path in members)
        return sum(_sliced_squares(plan, path, leaves[path]) for path in members)

    compared(l2(graph, params), by_masks(graph, params, squares))


def _sliced_squares(plan, path, x):
    """Of a fused kernel whose terms have the group or not, only those terms that have it."""
    x = np.asarray(x, np.float64) ** 2
    for k, axis in enumerate(plan.axes[path]):
        mine = [any(e in plan.kept for e in term) for term in axis]
        if any(mine) and not all(mine):
            sizes = [int(np.prod([plan.sizes.get(e, e) for e in term])) for term in axis]
            x = np.compress(np.repeat(mine, sizes), x, axis=k)
    return x.sum()


def test_a_kernel_with_a_channel_along_both_axes_has_two_slices():
    """The residual stream times itself: rows and columns of each channel."""
    fn = lambda p, x: (h := x @ p["in"], (h + h @ p["w"]) @ p["out"])[1]
    params = {"in": normal(0, 3, 5), "w": normal(1, 5, 5), "out": normal(2, 5, 2)}
    graph = groups(fn, params, normal(3, 4, 3))
    s = lambda x, axis: (x.astype(np.float64) ** 2).sum(axis)
    expected = s(params["in"], 0) + s(params["w"], 0) + s(params["w"], 1) + s(params["out"], 1)
    (name,) = (group.name for group in graph.groups)
    compared(l2(graph, params), {name: expected})


def mlp(p, x):
    return jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"]


MLP = {"up": normal(0, 4, 6), "bias": normal(1, 6), "down": normal(2, 6, 3)}
X = normal(3, 5, 4)
GRAPH = groups(mlp, MLP, X)
NAME = GRAPH.groups[0].name


@pytest.mark.parametrize("squared", [True, False])
def test_taylor_is_weights_times_gradients(squared):
    grads = jax.grad(lambda p: jnp.square(mlp(p, X)).mean())(MLP)
    product = {k: np.asarray(MLP[k], np.float64) * np.asarray(grads[k]) for k in MLP}
    part = (lambda x: x) if squared else np.abs
    each = part(product["up"]).sum(0) + part(product["bias"]) + part(product["down"]).sum(1)
    compared(taylor(GRAPH, MLP, grads, squared=squared), {NAME: each**2 if squared else each})


def test_taylor_estimates_what_removing_a_channel_does():
    """To first order: a channel scaled down by a little, in all its slices."""
    loss = lambda p: jnp.square(mlp(p, X)).mean()
    scores = taylor(GRAPH, MLP, jax.grad(loss)(MLP))[NAME]

    def less(c, eps=1e-2):
        scale = jnp.where(jnp.arange(6) == c, np.float32(1 - eps), np.float32(1))
        return {"up": MLP["up"] * scale, "bias": MLP["bias"] * scale,
                "down": MLP["down"] * scale[:, None]}  # fmt: skip

    change = np.array([float(loss(less(c)) - loss(MLP)) for c in range(6)]) ** 2
    np.testing.assert_allclose(scores, change / change.mean(), rtol=0.15, atol=0.05)


SCORERS = {
    "l2": lambda p: l2(GRAPH, p),
    "taylor": lambda p: taylor(GRAPH, p, jax.tree.map(jnp.ones_like, p)),
    "activation": lambda p: activation(GRAPH, mlp, p, [X]),
}


@pytest.mark.parametrize("score", SCORERS)
def test_permuting_channels_permutes_scores_of_mean_one(score):
    order = np.array([3, 1, 5, 0, 4, 2])
    moved = {"up": MLP["up"][:, order], "bias": MLP["bias"][order], "down": MLP["down"][order]}
    before, after = SCORERS[score](MLP)[NAME], SCORERS[score](moved)[NAME]
    np.testing.assert_allclose(after, np.asarray(before)[order], rtol=TOLERANCE)
    np.testing.assert_allclose(np.mean(before), 1, rtol=TOLERANCE)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_weights_are_summed_in_float32(dtype):
    params = {"up": np.full((4000, 2), 0.25), "down": np.ones((2, 1))}
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    fn = lambda p, x: x @ p["up"] @ p["down"]
    graph = groups(fn, params, jax.ShapeDtypeStruct((2, 4000), dtype))
    grads = jax.tree.map(jnp.ones_like, params)
    sums = taylor(graph, params | {"up": params["up"].at[:, 1].set(0)}, grads, squared=False)
    np.testing.assert_allclose(sums["down:0"], np.array([1001, 1]) / 501, rtol=TOLERANCE)


def test_zero_weights_have_zero_scores():
    assert l2(GRAPH, jax.tree.map(jnp.zeros_like, MLP))[NAME].tolist() == [0.0] * 6


def normed(p, x):
    h = x @ p["params"]["up"] - p["batch_stats"]["mean"]
    return jax.nn.relu(h) @ p["params"]["down"]


def test_rules_say_that_batch_statistics_do_not_count():
    params = {"batch_stats": {"mean": normal(9, 6)}, "params": {k: MLP[k] for k in ("up", "down")}}
    graph = groups(normed, params, X)
    (name,) = graph.by_name
    apart = l2(graph, params, counted={"batch_stats/**": False})[name]
    s = lambda x, axis: (x.astype(np.float64) ** 2).sum(axis)
    without = s(MLP["up"], 0) + s(MLP["down"], 1)
    np.testing.assert_allclose(apart, without / without.mean(), rtol=TOLERANCE)
    assert not np.allclose(l2(graph, params)[name], apart)
    with pytest.raises(ValueError, match="no floating parameter of .* counts"):
        l2(graph, params, counted={"**": False})
    with pytest.raises(ValueError, match="rule 0, 'stats', matched none of 3 parameters"):
        l2(graph, params, counted={"stats": False})


def test_patterns_say_which_groups_are_scored():
    model = zoo.model("plain_gqa")
    graph = groups(model.apply, model.params, *model.inputs)
    found = l2(graph, model.params, only=["blocks/0/down:0"])
    np.testing.assert_array_equal(
        found["blocks/0/down:0"], l2(graph, model.params)[next(iter(found))]
    )
    with pytest.raises(ValueError, match="matched none of .* groups; closest"):
        l2(graph, model.params, only=["blocks/0/dwon:0"])


def test_parameters_of_another_model_are_named():
    with pytest.raises(ValueError, match=r"bias has shape \(7,\) in params and \(6,\) in the"):
        l2(GRAPH, MLP | {"bias": normal(0, 7)})
    with pytest.raises(ValueError, match=r"down has shape None in grads and \(6, 3\)"):
        taylor(GRAPH, MLP, {"up": MLP["up"], "bias": MLP["bias"]})


# --------------------------------------------------------------------------------- activations


def rms_of_means(h, axis):
    """h (rows, positions..): the formula of the page, over all axes but rows and `axis`."""
    others = tuple(k for k in range(1, h.ndim) if k != axis % h.ndim)
    means = np.abs(h.astype(np.float64)).mean(others)
    return np.sqrt((means**2).sum(0))


def test_activations_are_those_at_the_input_of_the_consumer():
    x = normal(5, 3, 7, 4)
    h = jax.nn.gelu(x @ MLP["up"] + MLP["bias"])
    compared(activation(GRAPH, mlp, MLP, [x]), {NAME: rms_of_means(np.asarray(h), -1)})


def test_activations_of_heads_are_means_over_their_features():
    def fn(p, x):  # (rows, time, 4)
        h = jnp.tanh(jnp.einsum("btd,dhn->bthn", x, p["a"]))
        return jnp.einsum("bthn,hnd->btd", h, p["b"])

    params, x = {"a": normal(0, 4, 3, 5), "b": normal(1, 3, 5, 2)}, normal(2, 6, 7, 4)
    h = np.tanh(np.einsum("btd,dhn->bthn", x, params["a"]))
    graph = groups(fn, params, x)
    expected = {"a:1": rms_of_means(h, 2), "a:2": rms_of_means(h, 3)}
    compared(activation(graph, fn, params, [x]), expected)


def test_activations_of_a_convolution_are_means_over_the_image():
    conv = lambda x, p: jax.lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    fn = lambda p, x: conv(jnp.tanh(conv(x, p["a"])), p["b"])
    params = {"a": {"kernel": normal(0, 3, 3, 2, 5)}, "b": {"kernel": normal(1, 3, 3, 5, 2)}}
    x = normal(2, 4, 6, 8, 2)
    graph = groups(fn, params, x)
    h = jnp.tanh(conv(x, params["a"]))
    compared(activation(graph, fn, params, [x]), {"a/kernel:3": rms_of_means(np.asarray(h), -1)})


def test_activations_of_layers_of_a_scan_are_added_in_squares():
    body = lambda h, w: (h + jnp.tanh(h @ w["a"]) @ w["b"], None)
    fn = lambda p, x: jax.lax.scan(jax.checkpoint(body), x, p)[0]
    params, x = {"a": normal(0, 3, 4, 6), "b": normal(1, 3, 6, 4)}, normal(2, 5, 4)
    graph = groups(fn, params, x)
    h, total = x, 0.0
    for a, b in zip(params["a"], params["b"], strict=True):
        total = total + rms_of_means(np.tanh(h @ a), -1) ** 2
        h = h + np.tanh(h @ a) @ b
    compared(activation(graph, fn, params, [x]), {"a:2": np.sqrt(total)})


def test_rows_may_be_split_into_batches_at_will():
    x = normal(7, 6, 3, 4)
    whole = activation(GRAPH, mlp, MLP, [x])[NAME]
    parts = activation(GRAPH, mlp, MLP, [x[4:], x[:4]])[NAME]
    np.testing.assert_allclose(parts, whole, rtol=TOLERANCE)


def test_padding_counts_for_nothing():
    """A row of three positions is the mean of three, whatever stands in the others."""
    x, valid = normal(8, 4, 5, 4), np.arange(5) < np.array([[5], [3], [1], [2]])
    noisy = np.where(valid[..., None], x, 1e3 * normal(9, 4, 5, 4)).astype(np.float32)
    h = np.abs(np.asarray(jax.nn.gelu(x @ MLP["up"] + MLP["bias"]), np.float64))
    means = np.where(valid[..., None], h, 0).sum(1) / valid.sum(1)[:, None]
    found = activation(GRAPH, mlp, MLP, [noisy], valid=lambda x: valid)
    compared(found, {NAME: np.sqrt((means**2).sum(0))})


def test_padding_that_cannot_be_told_is_an_error():
    with pytest.raises(ValueError, match=r"valid has shape \(9,\).*so padding cannot be told"):
        activation(GRAPH, mlp, MLP, [X], valid=lambda x: jnp.ones(9, bool))


def test_what_cannot_be_seen_is_an_error_that_says_so():
    fn = lambda p, x: jnp.tanh(x @ p["a"]).sum(-1)
    graph = groups(fn, {"a": MLP["up"]}, X)
    with pytest.raises(ValueError, match="no product that can be seen sums over a:1"):
        activation(graph, fn, {"a": MLP["up"]}, [X])
    with pytest.raises(ValueError, match="there are no batches"):
        activation(GRAPH, mlp, MLP, [])


# ------------------------------------------------------------------------------------ experts


def mixture(p, x, gates=None):  # (tokens, d)
    gates = jax.nn.softmax(x @ p["router"]) if gates is None else gates
    h = jnp.tanh(jnp.einsum("td,edf->tef", x, p["up"]))
    return jnp.einsum("te,tef,efd->td", gates, h, p["down"])


def summed(p, x, gates=None):
    gates = jax.nn.softmax(x @ p["router"]) if gates is None else gates
    h = jnp.tanh(jnp.einsum("td,edf->tef", x, p["up"]))
    out = jnp.einsum("tef,efd->ted", h, p["down"])
    return (gates[..., None] * out).sum(1)


EXPERTS = {"router": normal(0, 4, 3), "up": normal(1, 3, 4, 6), "down": normal(2, 3, 6, 4)}


def lengths(p, x, gates):
    """(tokens, experts): the length of what each adds."""
    h = np.tanh(np.einsum("td,edf->tef", x, p["up"]))
    return gates * np.linalg.norm(np.einsum("tef,efd->ted", h, p["down"]), axis=-1)


@pytest.mark.parametrize("fn", [mixture, summed])
def test_experts_are_worth_the_length_of_what_they_add(fn):
    graph = groups(fn, EXPERTS, X)
    gates = np.asarray(jax.nn.softmax(X @ EXPERTS["router"]))
    found = expert_scores(graph, fn, EXPERTS, [X[:2], X[2:]], ["down:0"])["down:0"]
    np.testing.assert_allclose(found, lengths(EXPERTS, X, gates).mean(0), rtol=1e-5)


@pytest.mark.parametrize("fn", [mixture, summed])
def test_tokens_that_are_not_routed_to_an_expert_do_not_count_for_it(fn):
    routed = lambda p, x: fn(p, x, jax.nn.relu(x @ p["router"]))
    params = EXPERTS | {
        "router": np.array([[9, -9, 0], [0, 0, 0], [0, 0, 0], [1, 1, 0]], np.float32)
    }
    gates = np.maximum(X @ params["router"], 0)
    graph = groups(routed, params, X)
    found = expert_scores(graph, routed, params, [X], ["down:0"])["down:0"]
    total, many = lengths(params, X, gates), (gates > 0).sum(0)
    np.testing.assert_allclose(found, total.sum(0) / np.maximum(many, 1), rtol=1e-5)
    assert found[2] == 0 and 0 < many[0] < len(X)


def test_a_group_that_is_none_of_experts_is_an_error():
    fn = lambda p, x: jax.nn.softmax(x @ p["router"]).max(-1)
    graph = groups(fn, {"router": normal(0, 4, 3)}, X)
    with pytest.raises(ValueError, match="no sum over router:1 can be seen"):
        expert_scores(graph, fn, {"router": normal(0, 4, 3)}, [X], ["router:1"])
