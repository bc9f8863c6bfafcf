"""Laws of masks on parameters: exact zeros, whatever was there, and a report that counts them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import unitscale_jax as us
from unitscale_jax.prune import apply_masks, masked, report

DTYPES = ["float32", "bfloat16", "float16"]
floats = st.floats(-4, 4, width=16) | st.sampled_from([np.nan, np.inf, -0.0])
KEEP = {"w": jnp.array([[True, False], [False, True]]), "b": jnp.array(True)}


def drawn(data, dtype="float32"):
    w = data.draw(hnp.arrays(np.float32, (3, 4), elements=floats)).astype(jnp.dtype(dtype))
    mask = data.draw(hnp.arrays(bool, (3, 4)))
    return {"w": w, "n": jnp.arange(3)}, {"w": jnp.asarray(mask), "n": jnp.array(True)}


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_zero_where_masked_and_the_same_bits_elsewhere(dtype, data):
    params, masks = drawn(data, dtype)
    pruned = apply_masks(params, masks)
    w, mask = np.asarray(pruned["w"]), np.asarray(masks["w"])
    assert w.dtype == params["w"].dtype and not w[~mask].view(np.uint8).any()
    assert w[mask].tobytes() == params["w"][mask].tobytes()
    assert np.asarray(apply_masks(pruned, masks)["w"]).tobytes() == w.tobytes()
    assert pruned["n"] is params["n"]


def test_a_nan_under_a_mask_reaches_neither_values_nor_gradients():
    params = {"w": jnp.array([[1.0, jnp.nan], [jnp.nan, 2.0]]), "b": jnp.ones(2)}
    apply = lambda params, x: jnp.sum(x @ params["w"] + params["b"])
    value, grads = jax.value_and_grad(masked(apply, KEEP))(params, jnp.ones(2))
    assert value == 5
    assert grads["w"].tolist() == [[1, 0], [0, 1]] and grads["b"].tolist() == [1, 1]


def test_all_true_masks_change_nothing():
    params = {"w": jnp.array([[1.0, jnp.nan], [-0.0, 2.0]]), "b": jnp.ones(2)}
    masks = {"w": jnp.ones((2, 2), bool), "b": jnp.array(True)}
    np.testing.assert_array_equal(apply_masks(params, masks)["w"], params["w"])


def test_masks_are_data_under_jit_and_vmap():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    np.testing.assert_array_equal(jax.jit(apply_masks)(params, KEEP)["w"], np.eye(2))
    both = jax.tree.map(lambda m: jnp.stack([m, ~m]), KEEP)
    pruned = jax.vmap(apply_masks, in_axes=(None, {"w": 0, "b": None}))(
        params, {**both, "b": KEEP["b"]}
    )
    np.testing.assert_array_equal(pruned["w"], np.stack([np.eye(2), 1 - np.eye(2)]))


def test_symmetric_codes_of_pruned_weights_are_zero():
    params = apply_masks({"w": jnp.array([[3.0, 2.0], [1.0, -4.0]]), "b": jnp.ones(2)}, KEEP)
    codes = us.quantize(params, {"w": us.DotSpec(w=us.QSpec(axes=(-2,)))})["w"].codes
    assert codes.tolist() == [[127, 0], [0, -127]]


def test_the_report_counts():
    found = report({"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, KEEP)
    assert [(r.name, r.kept, r.size, r.masked) for r in found.rows] == [
        ("b", 2, 2, False),
        ("w", 2, 4, True),
    ]
    assert (found.total.kept, found.total.size, found.masked.sparsity) == (4, 6, 0.5)
    assert all(word in str(found) for word in ("w", "0.5000", "dense", "0.3333"))


PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
QUANTIZED = us.quantize(PARAMS, {"w": us.DotSpec(w=us.QSpec(axes=(-2,)))})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: apply_masks(PARAMS, {"w": KEEP["w"]}),
            ValueError,
            "masks and parameters differ in b",
        ),
        (
            lambda: apply_masks({"w": PARAMS["w"]}, KEEP),
            ValueError,
            "masks and parameters differ in b",
        ),
        (
            lambda: apply_masks(PARAMS, {**KEEP, "w": jnp.packbits(KEEP["w"], axis=-1)}),
            TypeError,
            "the mask of w is uint8; masks are bool",
        ),
        (
            lambda: apply_masks(PARAMS, {**KEEP, "w": jnp.ones(2)}),
            TypeError,
            "the mask of w is float32",
        ),
        (
            lambda: apply_masks(PARAMS, {**KEEP, "w": jnp.ones(2, bool)}),
            ValueError,
            r"w has the shape \(2, 2\), its mask \(2,\)",
        ),
        (
            lambda: apply_masks(QUANTIZED, KEEP),
            ValueError,
            "w is quantized.*Mask before quantizing",
        ),
        (
            lambda: jax.jit(lambda m: report(PARAMS, m) and 0)(KEEP),
            ValueError,
            "the mask of .* is traced; report on masks outside of jit",
        ),
    ],
)
def test_errors_say_the_way_out(make, error, message):
    with pytest.raises(error, match=message):
        make()
