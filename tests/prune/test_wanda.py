"""Laws of Wanda: scores weigh what they meet, and each output keeps its own best."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st
from jax import lax

import unitscale_jax as us
from unitscale_jax.prune import (
    OWL,
    Block,
    NofM,
    SparsitySpec,
    Unstructured,
    apply_masks,
    calibrate,
    make_masks,
    owl_ratios,
    wanda,
    wanda_masks,
)
from unitscale_jax.prune._shares import shares
from unitscale_jax.statistics import Stat
from unitscale_jax.trace.params import MatrixForm
from unitscale_jax.tree import named_leaves


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dense(params, x):
    return x @ params["w"]


def spec_of(sparsity=0.5, pattern=None, **options):
    return SparsitySpec(patterns={"w": pattern or Unstructured()}, sparsity=sparsity, **options)


def masked(w, x, spec, fn=None):
    """The mask of w; of a plain product x @ w, whose sums are written out, if no `fn` is given."""
    params = {"w": jnp.asarray(w)}
    moments = summed(x) if fn is None else calibrate(fn, params, [x], ["w"])
    return np.asarray(wanda_masks(params, moments, spec)["w"])


def summed(x):
    squares = (np.asarray(x, np.float64) ** 2).sum(0)
    layout = MatrixForm(contracted=(-2,), channels=(-2,), clear=True)
    return {"w": Stat(np.asarray(len(x)), {"squares": squares}, layout=layout)}


EXAMPLE_W = jnp.array([[1, -4], [-2, 3], [3, 2], [0.5, 1]])
EXAMPLE_X = jnp.array([[3.0, 0, 1, 0], [0, 2, 0, 10], [4, 0, 0, 0]])


def test_the_example_of_the_page():
    moments = calibrate(dense, {"w": EXAMPLE_W}, [EXAMPLE_X], ["w"])
    assert np.sqrt(moments["w"].squares).tolist() == [5, 2, 1, 10]
    mask = masked(EXAMPLE_W, EXAMPLE_X, spec_of(), dense)
    assert mask.astype(int).tolist() == [[1, 1], [0, 0], [0, 0], [1, 1]]
    ones = jnp.ones((1, 4))
    magnitude = masked(EXAMPLE_W, ones, spec_of())
    assert magnitude.astype(int).tolist() == [[0, 1], [1, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize("k", [3, 8])
def test_scores_are_weights_times_lengths(k):
    w, x = normal(0, 6, 4), normal(1, k, 6)
    scores = wanda({"w": w}, calibrate(dense, {"w": w}, [x], ["w"]))["w"]
    lengths = np.linalg.norm(np.asarray(x, np.float64), axis=0)
    np.testing.assert_allclose(scores, np.abs(w) * lengths[:, None], rtol=1e-6)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), sparsity=st.sampled_from([0.0, 0.25, 0.5, 0.8]))
def test_each_output_keeps_its_best(seed, sparsity):
    w, x = np.round(normal(seed, 10, 4) * 2), normal(seed + 1, 5, 10)
    mask = masked(w, x, spec_of(sparsity))
    scores = np.abs(w) * np.sqrt((np.asarray(x, np.float64) ** 2).sum(0))[:, None]
    kept = 10 - round(10 * sparsity)
    order = np.argsort(-scores.astype(np.float32), axis=0, kind="stable")[:kept]
    expected = np.zeros(mask.shape, bool)
    np.put_along_axis(expected, order, True, axis=0)
    np.testing.assert_array_equal(mask, expected)


def test_a_rule_may_say_how_much():
    spec = spec_of(0.5, allocate={"w": 0.25})
    assert (masked(normal(0, 8, 3), normal(1, 5, 8), spec).sum(0) == 6).all()


def test_scaling_an_input_and_its_weights_back_changes_nothing():
    """What magnitude cannot see: the same function, the same mask."""
    w, x, s = normal(0, 8, 3), normal(1, 9, 8), jnp.exp2(jnp.arange(-4.0, 4.0))
    plain = masked(w, x, spec_of())
    np.testing.assert_array_equal(masked(w / s[:, None], x * s, spec_of()), plain)


LAYOUTS = {
    "transposed": (lambda p, x: x @ p["w"].T, lambda w: w.T),
    "query": (lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"]), lambda w: w.reshape(8, 2, 3)),
    "heads": (lambda p, x: jnp.einsum("bhk,hkd->bd", x.reshape(-1, 2, 4), p["w"]),
              lambda w: w.reshape(2, 4, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_mask_is_that_of_the_matrix_however_it_is_stored(name):
    fn, stored = LAYOUTS[name]
    w, x = normal(0, 8, 6), normal(1, 9, 8)
    expected = stored(masked(w, x, spec_of()))
    np.testing.assert_array_equal(masked(stored(w), x, spec_of(), fn), expected)


def test_layers_of_a_scan_are_those_one_by_one():
    fn = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
    w, x = normal(2, 3, 6, 6), normal(3, 9, 6)
    mask = masked(w, x, spec_of(stacked={"w": 1}), fn)
    for k in range(3):
        np.testing.assert_array_equal(mask[k], masked(w[k], x, spec_of()))
        x = jnp.tanh(x @ w[k])


def test_n_of_m_and_blocks_take_the_same_scores():
    w, x = normal(0, 8, 4), normal(1, 9, 8)
    moments = calibrate(dense, {"w": w}, [x], ["w"])
    for pattern in (NofM(2, 4, axis=-2), Block((2, 2))):
        spec = spec_of(pattern=pattern)
        by_scores = make_masks(wanda({"w": w}, moments), spec)["w"]
        np.testing.assert_array_equal(masked(w, x, spec), by_scores)


def test_parameters_that_are_not_selected_keep_a_scalar():
    fn = lambda p, x: x @ p["w"] + p["b"]
    params, spec = {"w": normal(0, 8, 4), "b": jnp.ones(4)}, spec_of()
    masks = wanda_masks(params, calibrate(fn, params, [normal(1, 9, 8)], spec), spec)
    assert masks["b"].shape == () and bool(masks["b"])


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)))


def test_a_state_of_nnx_is_calibrated_scored_and_pruned():
    graph, state = nnx.split(Mlp(nnx.Rngs(0)))
    apply = lambda state, x: nnx.merge(graph, state)(x)
    spec = SparsitySpec(patterns={"**/kernel": Unstructured()}, sparsity=0.5)
    moments = calibrate(apply, state, [normal(0, 9, 6)], spec)
    masks = wanda_masks(state, moments, spec)
    left = named_leaves(apply_masks(state, masks))
    assert (np.asarray(left["up/kernel"] != 0).sum(0) == 3).all()
    assert (np.asarray(left["down/kernel"] != 0).sum(0) == 4).all()


def test_a_quantized_parameter_beside_stays_one_leaf():
    params = {"w": normal(0, 8, 4), "v": normal(1, 4, 4)}
    v = us.quantize({"v": params["v"]}, {"v": us.DotSpec(w=us.QSpec(axes=(-2,)))})
    mixed, fn = params | v, us.quantized(lambda p, x: x @ p["w"] @ p["v"])
    spec = spec_of()
    masks = wanda_masks(mixed, calibrate(fn, mixed, [normal(2, 9, 8)], spec), spec)
    assert masks["v"].shape == ()
    assert apply_masks(mixed, masks)["v"] is mixed["v"]


# OWL.


def layers(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def test_ratios_are_shares_of_outliers():
    params, x = {"a": normal(0, 8, 6), "b": normal(1, 6, 4)}, normal(2, 9, 8)
    x = x.at[:, 0].multiply(60.0)
    moments = calibrate(layers, params, [x], ["a", "b"])
    ratios = owl_ratios(params, moments, m=3)
    for name, scores in wanda(params, moments).items():
        expected = np.mean(np.asarray(scores) > 3 * np.mean(np.asarray(scores, np.float64)))
        np.testing.assert_allclose(ratios[name], expected, rtol=1e-6)
    assert ratios["a"] > 0


def test_owl_leaves_more_where_outliers_are_and_the_total_holds():
    params, x = {"a": normal(0, 8, 6), "b": normal(1, 6, 4)}, normal(2, 9, 8)
    x = x.at[:, 0].multiply(60.0)
    moments = calibrate(layers, params, [x], ["a", "b"])
    allocate = OWL(owl_ratios(params, moments, m=3), 0.08)
    spec = SparsitySpec(patterns={"a": Unstructured(), "b": Unstructured()}, sparsity=0.5)
    more = SparsitySpec(patterns=spec.patterns, sparsity=0.5, allocate=allocate)
    masks = wanda_masks(params, moments, more)
    even = wanda_masks(params, moments, spec)
    total = sum(int(m.sum()) for m in jax.tree.leaves(masks))
    assert total == 72 - round(72 * 0.5)
    assert masks["a"].sum() > even["a"].sum()
    assert np.ptp(np.asarray(masks["a"]).sum(0)) <= 1


@given(total=st.integers(0, 40), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_shares_are_in_proportion_and_add_up(total, sizes):
    total = min(total, sum(sizes))
    got = shares(total, sizes)
    exact = np.array(sizes) * total / sum(sizes)
    assert got.sum() == total and (np.abs(got - exact) < 1).all() and (got <= sizes).all()


W, ONES = {"w": jnp.ones((4, 3))}, jnp.ones((5, 4))
ERRORS = {
    "none": (lambda: wanda_masks(W, {}, spec_of()), "no squares of what meets w.*calibrate"),
    "another": (
        lambda: wanda({"v": W["w"]}, calibrate(dense, W, [ONES], ["w"])),
        "stats are of w, and there is no such parameter.*v",
    ),
    "shape": (
        lambda: wanda({"w": jnp.ones((6, 3))}, calibrate(dense, W, [ONES], ["w"])),
        r"w has shape \(6, 3\).*stats",
    ),
    "open": (lambda: masked(W["w"], ONES, spec_of(pattern=NofM())), "resolve"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_says_what_to_do(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
