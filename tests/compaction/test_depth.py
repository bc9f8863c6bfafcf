"""Laws of depth: layers that turn little score little, and what is dropped is the identity."""

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
    layer_losses,
    layer_scores,
    loss_increase,
    plan,
    plan_of,
    without,
    zero_channels,
)

TOLERANCE = 200 * np.finfo(np.float32).eps


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def block(h, p):
    return h + jnp.tanh(h @ p["up"]) @ p["down"] + p["bias"]


STACK = {"up": normal(0, 4, 5, 7), "down": 0.3 * normal(1, 4, 7, 5), "bias": normal(2, 4, 5)}
X = normal(3, 6, 3, 5)


def stacked(wrap):
    return lambda p, x: jax.lax.scan(lambda h, row: (wrap(block)(h, row), None), x, p)[0]


FN = stacked(jax.checkpoint)
GRAPH = groups(FN, STACK, X)
(LAYER,) = (group.name for group in GRAPH.groups if "layer" in group.flags)


def cosines(x, valid=None):
    """1 - the mean cosine, layer by layer."""
    h, out = x.astype(np.float64), []
    for k in range(4):
        new = np.asarray(block(h, {name: np.float64(w[k]) for name, w in STACK.items()}))
        cos = (h * new).sum(-1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(new, axis=-1)
        out.append(1 - (cos.mean() if valid is None else cos[valid].mean()))
        h = new
    return out


@pytest.mark.parametrize(
    "wrap", [lambda f: f, jax.checkpoint, jax.jit, lambda f: jax.jit(jax.jit(f))]
)
def test_layers_score_by_how_much_they_turn(wrap):
    fn = stacked(wrap)
    found = layer_scores(groups(fn, STACK, X), fn, STACK, [X[:2], X[2:]])
    np.testing.assert_allclose(found[LAYER], cosines(X), atol=1e-6)


def test_padding_does_not_count():
    valid = np.arange(3) < np.array([1, 3, 2, 1, 2, 3])[:, None]
    found = layer_scores(GRAPH, FN, STACK, [X], valid=lambda x: valid)
    np.testing.assert_allclose(found[LAYER], cosines(X, valid), atol=1e-6)
    with pytest.raises(ValueError, match=r"valid has shape \(4,\).*padding cannot be told"):
        layer_scores(GRAPH, FN, STACK, [X], valid=lambda x: jnp.ones(4, bool))


def test_a_plan_of_layers_shortens_the_scan():
    """The oracle: what a dropped layer adds, bias included, is zero."""
    scores = {LAYER: np.array([0.4, 0.1, 0.9, 0.2])}
    made = plan(GRAPH, scores, keep=0.5, exact_only=False)
    assert made.kept == {LAYER: (0, 2)}
    kept = np.isin(np.arange(4), [0, 2])
    gone = {name: np.where(kept.reshape(4, *[1] * (w.ndim - 1)), w, 0) for name, w in STACK.items()}
    small = compact(STACK, made)
    assert small["up"].shape == (2, 5, 7)
    np.testing.assert_allclose(
        compacted(FN, made)(small, X), FN(gone, X), rtol=TOLERANCE, atol=TOLERANCE
    )


def test_layers_need_consent():
    with pytest.raises(ValueError, match="exact_only=False"):
        plan(GRAPH, {LAYER: np.ones(4)}, keep=0.5)


def test_without_layers_there_is_nothing_to_score():
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    params = {"up": STACK["up"][0], "down": STACK["down"][0]}
    graph = groups(fn, params, X)
    with pytest.raises(ValueError, match="no scan runs over stacked layers"):
        layer_scores(graph, fn, params, [X])
    with pytest.raises(ValueError, match="no scan runs over stacked layers"):
        layer_losses(fn, graph, params, [X])


# -------------------------------------------------------------------------------- unrolled


def unrolled(p, x):
    for row in p["layers"]:
        x = x + jnp.tanh(x @ row["up"]) @ row["down"]
    return x @ p["out"]


UNROLLED = {
    "layers": [{k: STACK[k][n] for k in ("up", "down")} for n in range(3)],
    "out": normal(5, 5, 2),
}
UNROLLED = jax.tree.map(jnp.asarray, UNROLLED)  # NumPy's products round another way


def test_a_branch_without_channels_is_the_identity_to_the_bit():
    graph = groups(unrolled, UNROLLED, X)
    gone = without(graph, ["layers/1/*"])
    small = compact(UNROLLED, gone)
    assert small["layers"][1]["up"].shape == (5, 0)
    rest = UNROLLED | {"layers": [UNROLLED["layers"][0], UNROLLED["layers"][2]]}
    found = compacted(unrolled, gone)(small, X)
    np.testing.assert_array_equal(found, unrolled(zero_channels(UNROLLED, gone), X))
    np.testing.assert_array_equal(found, unrolled(rest, X))
    jitted = jax.jit(compacted(unrolled, gone))(small, X)  # fuses, and so rounds, another way
    np.testing.assert_allclose(jitted, found, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_branch_vanishes_besides_what_a_plan_removes():
    graph = groups(unrolled, UNROLLED, X)
    half = plan_of(graph, {"layers/0/down:0": [0, 1]})
    both = without(graph, ["layers/1/*"], plan=half)
    assert both.new_sizes["layers/0/down:0"] == 2 and both.new_sizes["layers/1/down:0"] == 0
    with pytest.raises(ValueError, match="matched none of .* groups"):
        without(graph, ["layers/7/*"])


# ---------------------------------------------------------------------------- loss increase


def loss(p, batch):
    y = FN(p, batch)
    return us.Mean(jnp.square(y).sum(axis=(1, 2)), jnp.ones(y.shape[0]))


def test_layer_losses_are_those_without_each_layer():
    found = layer_losses(loss, GRAPH, STACK, [X[:4], X[4:]])[LAYER]
    rows = lambda k: {name: np.delete(w, k, axis=0) for name, w in STACK.items()}
    value = lambda p: float(np.square(np.asarray(FN(p, X), np.float64)).sum() / 6)
    expected = [value(rows(k)) - value(STACK) for k in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_plans_of_one_size_share_a_compilation():
    traced = []
    counted = lambda p, x: traced.append(0) or loss(p, x)
    plans = [plan_of(GRAPH, {LAYER: [k]}, exact_only=False) for k in range(4)]
    loss_increase(counted, STACK, [X], plans[:1])
    once = len(traced)
    loss_increase(counted, STACK, [X, X], plans)
    assert len(traced) == 2 * once
    with pytest.raises(ValueError, match="there are no batches"):
        loss_increase(loss, STACK, [], plans)


# ---------------------------------------------------------------------------------- experts


def test_without_experts_the_router_has_minus_infinity_for_them():
    """The oracle of a mixture: logits of those that are gone leave the softmax."""
    model = zoo.model("plain_moe_dense")
    graph = groups(model.apply, model.params, *model.inputs)
    (name,) = (g.name for g in graph.groups if g.size == 5)
    made = plan_of(graph, {name: [0, 2, 3]}, exact_only=False)
    kept = np.isin(np.arange(5), [0, 2, 3])
    router = model.params["router"]
    closed = router | {"bias": jnp.where(kept, router["bias"], np.float32(-1e30))}
    oracle = model.apply(model.params | {"router": closed}, *model.inputs)
    small = compacted(model.apply, made)(compact(model.params, made), *model.inputs)
    np.testing.assert_allclose(small, oracle, rtol=TOLERANCE, atol=TOLERANCE)
    zeros = model.apply(zero_channels(model.params, made), *model.inputs)
    assert np.abs(np.asarray(small - zeros)).max() > 0.01
