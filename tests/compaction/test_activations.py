"""Laws of the sums that pruning by activations needs: they add up, and they are the sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax

from unitscale_jax.prune import NofM, SparsitySpec, Unstructured, calibrate

floats = functools.partial(hnp.arrays, np.float32, elements=st.floats(-8, 8, width=32))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dense(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"] + params["b"]


PARAMS = {"w": normal(0, 4, 3), "v": normal(1, 3, 2), "b": jnp.zeros(2)}
X = normal(2, 6, 4)


@pytest.mark.parametrize("what", ["squares", "hessian"])
@pytest.mark.parametrize("cut", [1, 2, 5])
@settings(max_examples=3)
@given(x=floats((6, 4)))
def test_batches_may_be_split_and_ordered_at_will(what, cut, x):
    whole = calibrate(dense, PARAMS, [x], ["w", "v"], collect=(what,))
    parts = calibrate(dense, PARAMS, [x[cut:], x[:cut]], ["w", "v"], collect=(what,))
    for name in ("w", "v"):
        for a, b in zip(jax.tree.leaves(whole[name]), jax.tree.leaves(parts[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
        assert whole[name].layout == parts[name].layout


def test_sums_are_those_of_what_meets_each_parameter():
    moments = calibrate(dense, PARAMS, [X, 2 * X], ["w", "v"], collect=("hessian",))
    met = {"w": [X, 2 * X], "v": [jnp.tanh(k * X @ PARAMS["w"]) for k in (1, 2)]}
    for name, xs in met.items():
        rows = np.concatenate([np.asarray(x, np.float64) for x in xs])
        np.testing.assert_allclose(moments[name].hessian, rows.T @ rows, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(moments[name].squares, (rows**2).sum(0), rtol=1e-5)
        assert moments[name].rows == 12 and moments[name].hessian.dtype == np.float64


def test_squares_are_the_diagonal_of_the_second_moments():
    squares = calibrate(dense, PARAMS, [X], ["w"])["w"]
    full = calibrate(dense, PARAMS, [X], ["w"], collect=("hessian",))["w"]
    np.testing.assert_allclose(squares.squares, np.diagonal(full.hessian), rtol=1e-6)
    assert squares.hessian is None


def test_sums_of_batches_do_not_lose_small_ones():
    big, small = jnp.full((1, 4), 4096.0), jnp.full((1, 4), 0.5)
    moments = calibrate(dense, PARAMS, [big] + [small] * 8, ["w"])["w"]
    np.testing.assert_array_equal(moments.squares, 4096.0**2 + 8 * 0.25)


def test_a_spec_says_which_parameters():
    spec = SparsitySpec(patterns={"w": Unstructured(), "v": None, "b": None})
    assert list(calibrate(dense, PARAMS, [X], spec)) == ["w"]
    every = SparsitySpec(patterns=NofM(2, 4))
    assert sorted(calibrate(dense, PARAMS, [X], every)) == ["v", "w"]


def test_each_layer_of_a_scan_has_its_own():
    fn = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
    w, x = normal(3, 3, 4, 4), X
    moments = calibrate(fn, {"w": w}, [x], ["w"])["w"]
    assert moments.squares.shape == (3, 4) and moments.rows.tolist() == [6, 6, 6]
    for k in range(3):
        np.testing.assert_allclose(moments.squares[k], (x**2).sum(0), rtol=1e-5)
        x = jnp.tanh(x @ w[k])


def test_experts_have_their_own():
    fn = lambda p, x: jnp.einsum("eri,eio->ero", x, p["w"])
    x = normal(4, 2, 5, 4)
    moments = calibrate(fn, {"w": normal(3, 2, 4, 3)}, [x], ["w"])["w"]
    np.testing.assert_allclose(moments.squares, (x**2).sum(1), rtol=1e-5)


def test_a_convolution_has_those_of_its_windows():
    numbers = ("NHWC", "HWIO", "NHWC")
    fn = lambda p, x: lax.conv_general_dilated(
        x, p["w"], (2, 1), "VALID", dimension_numbers=numbers
    )
    w, x = normal(3, 3, 2, 4, 1), normal(4, 2, 7, 6, 4)
    moments = calibrate(fn, {"w": w}, [x], ["w"], collect=("hessian",))["w"]
    flat = np.asarray(w).reshape(-1)
    power = flat @ moments.hessian @ flat
    np.testing.assert_allclose(power, (fn({"w": w}, x) ** 2).sum(), rtol=1e-5)


def test_padding_does_not_count():
    fn = lambda p, batch: batch["x"] @ p["w"]
    x, mask = normal(1, 3, 5, 4), jnp.arange(5)[None] < jnp.array([[5], [2], [3]])
    padded = {"x": jnp.where(mask[..., None], x, jnp.nan), "mask": mask}
    params = {"w": PARAMS["w"]}
    seen = calibrate(fn, params, [padded], ["w"], valid=lambda batch: batch["mask"])["w"]
    alone = calibrate(dense, PARAMS, [x[mask]], ["w"])["w"]
    np.testing.assert_allclose(seen.squares, alone.squares, rtol=1e-6)
    assert seen.rows == alone.rows == 10


def test_narrow_inputs_are_summed_in_float32():
    fn = lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
    ones = jnp.ones((600, 4))  # a bfloat16 sum of ones stops growing at 256
    assert calibrate(fn, PARAMS, [ones], ["w"])["w"].squares.tolist() == [600.0] * 4


def looked_up(params, ids):
    return params["w"][ids]


def never(params, x):
    return lax.cond(jnp.sum(x) > 1e9, lambda x: x @ params["w"], lambda x: x[:, :3], x)


IDS = jnp.array([0, 1])
ERRORS = {
    "no batches": (lambda: calibrate(dense, PARAMS, [], ["w"]), "no batches"),
    "unmatched": (lambda: calibrate(dense, PARAMS, [X], ["u"]), "'u', matched none of 3"),
    "bias": (lambda: calibrate(dense, PARAMS, [X], ["b"]), "b: meets no product.*patterns"),
    "lookup": (lambda: calibrate(looked_up, PARAMS, [IDS], ["w"]), "w: meets no product"),
    "nan": (lambda: calibrate(dense, PARAMS, [X.at[0].set(jnp.nan)], ["w"]), "w is not finite"),
    "never": (lambda: calibrate(never, PARAMS, [X], ["w"]), "nothing met w"),
    "what": (lambda: calibrate(dense, PARAMS, [X], ["w"], collect=("norms",)), "expected some of"),
    "two axes": (
        lambda: calibrate(lambda p, x: (x @ p["w"]) @ p["w"].T, PARAMS, [X], ["w"]),
        "w in dot_general has no input channels",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_says_what_to_do(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()
