"""Laws of SparseGPT: against the algorithm written out, and against least squares."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax import lax

from unitscale_jax.prune import (
    Block,
    NofM,
    SparsitySpec,
    Unstructured,
    calibrate,
    refit,
    sparsegpt,
)
from unitscale_jax.prune._surgeon import obs_sweep
from unitscale_jax.statistics import Stat
from unitscale_jax.trace.params import MatrixForm


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense(params, x):
    return x @ params["w"]


def spec_of(sparsity=0.5, pattern=None, **options):
    return SparsitySpec(patterns={"w": pattern or Unstructured()}, sparsity=sparsity, **options)


def pruned(w, x, spec=None, fn=None, **options):
    """Prunes w; of a plain product x @ w, whose sums are written out, if no `fn` is given."""
    spec = spec or spec_of()
    params = {"w": jnp.asarray(w)}
    if fn is None:
        moments = moments_of(x)
    else:
        moments = calibrate(fn, params, [jnp.asarray(x)], spec, collect=("hessian",))
    out, masks, report = sparsegpt(params, moments, spec, **options)
    return np.asarray(out["w"]), np.asarray(masks["w"]), report


def moments_of(x):
    x = np.asarray(x, np.float64)
    layout = MatrixForm(contracted=(-2,), channels=(-2,), clear=True)
    return {"w": Stat(np.asarray(len(x)), {"hessian": x.T @ x}, layout=layout)}


def test_sums_written_out_are_those_of_calibrate():
    w, x = jnp.asarray(normal(0, 4, 3)), jnp.asarray(normal(1, 6, 4))
    found, expected = (
        calibrate(dense, {"w": w}, [x], ["w"], collect=("hessian",))["w"],
        moments_of(x)["w"],
    )
    np.testing.assert_allclose(found.hessian, expected.hessian, rtol=1e-5, atol=1e-5)
    assert found.layout == expected.layout and found.rows == expected.rows


# The page's example.

EXAMPLE_X = np.array(
    [[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 2], [1, 0, 0, 1]], np.float32
)
EXAMPLE_W = np.array([[1, 0.2], [-0.5, 1], [0.25, -1], [2, 0.5]], np.float32)


@pytest.mark.parametrize("pattern", [Unstructured(), NofM(2, 4, axis=-2)])
def test_the_example_of_the_page(pattern):
    w, mask, report = pruned(EXAMPLE_W, EXAMPLE_X, spec_of(pattern=pattern))
    expected = [[1, 0], [0, 1.070882], [0, -0.929118], [1.958609, 0]]
    np.testing.assert_allclose(w, expected, atol=1e-6)
    np.testing.assert_array_equal(mask, np.array(expected) != 0)
    errors = report.errors["w"]
    assert (errors.masked, errors.updated) == pytest.approx((2.4975, 2.282151), rel=1e-5)
    assert errors.dense == pytest.approx(((EXAMPLE_X @ EXAMPLE_W) ** 2).sum(), rel=1e-6)
    assert errors.damp == (0.01,) and not report.retries
    least = refit({"w": EXAMPLE_W}, moments_of(EXAMPLE_X), {"w": mask}, damp=0.0)
    off = EXAMPLE_X @ (np.asarray(least["w"]) - EXAMPLE_W)
    assert (off**2).sum() == pytest.approx(2.111, abs=5e-4)


# Against the algorithm written out, in float64.


def oracle(w, x, kept, block, damp=0.01, ratio=None):
    """Column by column, one block after another, as the paper has it."""
    w, x = np.array(w, np.float64), np.asarray(x, np.float64)
    h = x.T @ x
    dead = np.diag(h) == 0
    h = h / np.mean(np.diag(h)) + np.diag(np.where(dead, 1.0, damp))
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    mask = np.zeros(w.shape, bool)
    for start in range(0, len(w), block):
        stop = min(start + block, len(w))
        if ratio is None:
            scores = np.abs(w[start:stop]) / np.diag(u)[start:stop, None]
            unseen = kept[start // block] * dead[start:stop].sum() // (stop - start)
            for rows, count in ((~dead, kept[start // block] - unseen), (dead, unseen)):
                those = np.where(rows[start:stop, None], scores, -1).ravel()
                order = np.argsort(-those, kind="stable")[:count]
                flat = np.zeros(scores.size, bool)
                flat[order] = True
                mask[start:stop] |= flat.reshape(scores.shape)
        for j in range(start, stop):
            if ratio is not None and j % ratio[1] == 0:
                scores = np.abs(w[j : j + ratio[1]]) / np.diag(u)[j : j + ratio[1], None]
                order = np.argsort(-scores, axis=0, kind="stable")[: ratio[0]]
                np.put_along_axis(mask[j : j + ratio[1]], order, True, axis=0)
            error = np.where(mask[j], 0, w[j]) / u[j, j]
            w[j + 1 :] -= np.outer(u[j, j + 1 :], error)
            w[j] = np.where(mask[j], w[j], 0)
    return w, mask


@pytest.mark.parametrize("block", [4, 5, 12, 128])
def test_equals_the_algorithm_written_out(block):
    w, x = normal(0, 12, 6), normal(1, 40, 12) * np.arange(1, 13, dtype=np.float32)
    x[:, 3] = 0
    cuts = [min(block, 12 - k) for k in range(0, 12, block)]
    kept = [6 * n - round(6 * n * 0.6) for n in cuts]
    expected, mask = oracle(w, x, kept, block)
    got, got_mask, _ = pruned(w, x, spec_of(0.6), block=block)
    np.testing.assert_array_equal(got_mask, mask)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ratio", [(2, 4), (1, 3), (4, 6)])
@pytest.mark.parametrize("block", [6, 128])
def test_n_of_m_equals_the_algorithm_written_out_for_any_block(ratio, block):
    w, x = normal(2, 12, 5), normal(3, 40, 12)
    expected, mask = oracle(w, x, None, 12, ratio=ratio)
    got, got_mask, _ = pruned(w, x, spec_of(pattern=NofM(*ratio, axis=-2)), block=block)
    np.testing.assert_array_equal(got_mask, mask)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    assert (got_mask.reshape(-1, ratio[1], 5).sum(1) == ratio[0]).all()


# What is kept.


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), sparsity=st.sampled_from([0.0, 0.25, 0.5, 0.85]))
def test_keeps_exactly_its_share_of_each_block_and_zeros_are_exact(seed, sparsity):
    w, x = normal(seed, 8, 4), normal(seed + 1, 30, 8)
    out, mask, _ = pruned(w, x, spec_of(sparsity), block=4)
    assert mask.reshape(2, -1).sum(1).tolist() == [16 - round(16 * sparsity)] * 2
    np.testing.assert_array_equal(out != 0, mask)
    if sparsity == 0:
        np.testing.assert_array_equal(out, w)


def test_ties_keep_the_count():
    """Published code keeps one too few, or all that tie."""
    out, mask, _ = pruned(np.ones((8, 4), np.float32), np.eye(8, dtype=np.float32), block=8)
    assert mask.sum() == 16 and out[mask].tolist() == [1.0] * 16


def test_independent_inputs_are_pruned_by_wanda_s_order_and_nothing_moves():
    """With a diagonal H nothing can make up for anything."""
    scale = np.array([1, 2, 4, 8], np.float32)
    w, x = normal(4, 4, 6), np.diag(scale)
    out, mask, _ = pruned(w, x, damp=0.0, block=4)
    scores = np.abs(w) * scale[:, None]
    np.testing.assert_array_equal(mask, scores >= np.sort(scores, axis=None)[12])
    np.testing.assert_allclose(out, np.where(mask, w, 0), rtol=1e-6)


def test_inputs_that_no_row_used_are_pruned_by_magnitude_with_their_share():
    x, w = normal(5, 30, 6), normal(4, 6, 4)
    x[:, 2] = 0
    out, mask, report = pruned(w, x, spec_of(0.5))
    assert mask[2].sum() == 2 and mask.sum() == 12 and not report.retries
    np.testing.assert_array_equal(mask[2], np.abs(w[2]) >= np.sort(np.abs(w[2]))[2])
    np.testing.assert_array_equal(out[2], np.where(mask[2], w[2], 0))
    assert report.errors["w"].unseen == 1 and str(report).splitlines()[0].endswith("unseen")


# The error (M13).


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_least_squares_on_the_mask_is_at_most_sparsegpt_is_at_most_the_mask_alone(seed):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(8, 8)) + 2 * rng.normal(size=(8, 1))
    x, w = (rng.normal(size=(40, 8)) @ mix).astype(np.float32), normal(seed, 8, 4)
    moments = moments_of(x)
    params = {"w": jnp.asarray(w)}
    out, masks, report = sparsegpt(params, moments, spec_of())
    least = refit(params, moments, masks, damp=1e-6)
    error = lambda p: float(
        ((x.astype(np.float64) @ (np.asarray(p["w"], np.float64) - w)) ** 2).sum()
    )
    alone = {"w": np.where(masks["w"], w, 0)}
    found = report.errors["w"]
    assert error(least) <= error(out) * 1.0001
    assert error(out) == pytest.approx(found.updated, rel=1e-2)
    assert error(alone) == pytest.approx(found.masked, rel=1e-3)
    assert found.updated <= found.masked
    np.testing.assert_array_equal(np.asarray(least["w"])[~np.asarray(masks["w"])], 0)


def test_refitting_with_everything_kept_changes_nothing():
    w, x = normal(0, 6, 4), normal(1, 40, 6)
    again = refit({"w": w}, moments_of(x), {"w": jnp.ones((6, 4), bool)}, damp=0.01)
    np.testing.assert_allclose(again["w"], w, rtol=1e-4, atol=1e-5)


# Layers, experts, layouts, dtypes.


def test_stacked_layers_are_pruned_each_by_its_own_moments():
    fn = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
    w, x = normal(6, 3, 6, 6), normal(7, 30, 6)
    spec = spec_of(0.6, stacked={"w": 1})
    out, mask, report = pruned(w, x, spec, fn, block=4)
    assert len(report.errors["w"].damp) == 3
    for k in range(3):
        alone, alone_mask, _ = pruned(w[k], x, spec_of(0.6), block=4)
        np.testing.assert_array_equal(mask[k], alone_mask)
        np.testing.assert_allclose(out[k], alone, rtol=1e-4, atol=1e-4)
        x = np.tanh(x @ w[k])


def test_a_transposed_product_is_pruned_as_its_transpose():
    w, x = normal(0, 8, 5), normal(1, 30, 8)
    fn = lambda p, x: x @ p["w"].T
    out, mask, _ = pruned(w.T, x, fn=fn, block=4)
    plain, plain_mask, _ = pruned(w, x, block=4)
    np.testing.assert_array_equal(mask.T, plain_mask)
    np.testing.assert_allclose(out.T, plain, rtol=1e-5)


@pytest.mark.parametrize("order", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")])
def test_groups_of_a_convolution_run_along_its_input_features(order):
    last = order[0] == "NHWC"
    fn = lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=order)
    w, x = normal(0, 3, 3, 4, 2), normal(1, 2, 8, 8, 4)
    axis = -2
    if not last:
        w, x, axis = w.transpose(3, 2, 0, 1), x.transpose(0, 3, 1, 2), -3
    out, mask, report = pruned(w, x, spec_of(pattern=NofM(2, 4, axis=axis)), fn)
    assert (mask.sum(axis) == 2).all() and ((out != 0) == mask).all()
    assert report.errors["w"].updated < report.errors["w"].masked


def test_parameters_keep_their_dtypes_and_others_stay():
    params = {"w": jnp.asarray(normal(0, 8, 4), jnp.bfloat16), "b": jnp.ones(4)}
    fn = lambda p, x: x @ p["w"].astype(jnp.float32) + p["b"]
    spec = spec_of()
    moments = calibrate(fn, params, [jnp.asarray(normal(1, 30, 8))], spec, collect=("hessian",))
    out, masks, report = sparsegpt(params, moments, spec)
    assert out["w"].dtype == jnp.bfloat16 and out["b"] is params["b"]
    np.testing.assert_array_equal(np.asarray(out["w"] != 0), masks["w"])
    assert masks["b"].shape == () and bool(masks["b"]) and report.kept == ("b",)


# Damping is reported, never a silent fallback.


def test_a_singular_matrix_raises_damp_tenfold_and_says_so():
    w, x = normal(0, 8, 3), np.outer(normal(1, 30), np.ones(8)).astype(np.float32)
    out, _, report = pruned(w, x, damp=1e-9)
    tried, used = report.retries["w"], report.errors["w"].damp[0]
    assert tried[0] == 1e-9 and used == pytest.approx(1e-9 * 10 ** len(tried))
    assert np.isfinite(out).all() and f"w: singular at damp {tried[0]:g}" in str(report)


def test_what_stays_singular_is_an_error():
    x = np.outer(normal(1, 30), np.ones(8)).astype(np.float32)
    with pytest.raises(ValueError, match="what meets w are singular.*1e-15.*more batches"):
        pruned(normal(0, 8, 3), x, damp=1e-15)


W, ONES = {"w": jnp.ones((4, 3))}, jnp.ones((5, 4))
ERRORS = {
    "squares only": (
        lambda: sparsegpt(W, calibrate(dense, W, [ONES], ["w"]), spec_of()),
        "no second moments of what meets w.*collect=\\('hessian',\\)",
    ),
    "none": (lambda: sparsegpt(W, {}, spec_of()), "no second moments of what meets w"),
    "blocks": (lambda: pruned(W["w"], ONES, spec_of(pattern=Block((2, 3)))), "w has the pattern"),
    "open": (lambda: pruned(W["w"], ONES, spec_of(pattern=NofM())), "w.*resolve"),
    "outputs": (
        lambda: pruned(W["w"], ONES, spec_of(pattern=NofM(1, 3, axis=-1))),
        r"w .*axis -1.*\(-2,\)",
    ),
    "nan": (lambda: pruned(np.full((4, 3), np.nan, np.float32), ONES), "w has NaN"),
    "shape": (
        lambda: sparsegpt({"w": jnp.ones((6, 3))}, moments_of(ONES), spec_of()),
        "w has shape",
    ),
    "damp": (lambda: pruned(W["w"], ONES, damp=-1.0), "damp is -1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_says_what_to_do(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_one_program_for_every_count():
    run = jax.jit(functools.partial(obs_sweep, block=4))
    w, u, dead = jnp.ones((8, 2)), jnp.eye(8), jnp.zeros(8, bool)
    for k in range(4):
        assert run(w, u, dead, jnp.full(2, k, jnp.int32))[1].sum() == 2 * k
    assert run._cache_size() == 1
