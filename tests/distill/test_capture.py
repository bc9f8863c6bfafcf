"""Laws of features by name: the model's own values, stacked in scans, and nothing else changed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import zoo
from unitscale_jax import trace, tree
from unitscale_jax.distill import features


def kernels(model):
    """Names and arrays of kernels: matrices, or stacks of them in a model with a scan."""
    rank = 3 if "scan" in model.tags else 2
    leaves = tree.named_leaves(model.params)
    return {
        name: x for name, x in leaves.items() if x.ndim == rank and name not in ("tokens", "places")
    }


@pytest.mark.parametrize("name", ["linen_mlp", "plain_transformer", "nnx_mlp", "plain_scan_remat"])
def test_a_kernels_output_is_its_input_times_the_kernel(name):
    model = zoo.model(name)
    found = kernels(model)
    sides = {f"{k}:{side}": f"{k}:{side}" for k in found for side in ("input", "output")}
    fn = jax.jit(features(model.apply, sides))
    y, values = fn(model.params, *model.inputs)
    expected = jax.jit(model.apply)(model.params, *model.inputs)
    jax.tree.map(np.testing.assert_array_equal, y, expected)
    assert set(values) == set(sides) and found
    for k, kernel in found.items():
        x, out = values[f"{k}:input"], values[f"{k}:output"]
        stacked = "l...i,lio->l...o" if kernel.ndim == 3 else "...i,io->...o"
        np.testing.assert_allclose(out, jnp.einsum(stacked, x, kernel), rtol=1e-4, atol=1e-5)


def test_a_convolutions_features_have_the_channels_last():
    x, w = np.random.default_rng(1).normal(size=(2, 5, 6, 3)), np.ones((3, 3, 3, 4))
    conv = lambda x, w, layout: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=layout
    )
    last = lambda p, x: conv(x, p["w"], ("NHWC", "HWIO", "NHWC"))
    first = lambda p, x: conv(x.transpose(0, 3, 1, 2), p["w"], ("NCHW", "HWIO", "NCHW"))
    wanted = {"in": "w:input", "out": "w:output"}
    expected, got = (features(fn, wanted)({"w": w}, x)[1] for fn in (last, first))
    assert expected["in"].shape == (2, 5, 6, 3) and expected["out"].shape == (2, 5, 6, 4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), got, expected)


def test_axes_are_in_one_order_on_whichever_side_the_kernel_stands():
    x, w = np.random.default_rng(0).normal(size=(2, 5)), np.ones((5, 3))
    left = lambda p, x: jnp.einsum("io,bi->bo", p["w"], x)
    turned = lambda p, x: jnp.einsum("oi,ib->ob", p["w"].T, x.T)
    right = lambda p, x: x @ p["w"]
    wanted = {"in": "w:input", "out": "w:output"}
    expected = features(right, wanted)({"w": w}, x)[1]
    for fn in (left, turned):
        got = features(fn, wanted)({"w": w}, x)[1]
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), got, expected)


def mlp(params, x):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return params["table"][jnp.argmax(hidden, -1)] + hidden @ params["down"]


PARAMS = {
    "up": {"kernel": jnp.eye(3), "bias": jnp.ones(3)},
    "table": jnp.arange(6.0).reshape(3, 2),
    "down": jnp.ones((3, 2)),
}
X = jnp.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])


def test_biases_and_tables_have_features():
    wanted = {"with": "up/bias:output", "without": "up/bias:input", "looked up": "table:output"}
    _, found = features(mlp, wanted)(PARAMS, X)
    np.testing.assert_array_equal(found["without"], X)
    np.testing.assert_array_equal(found["with"], X + 1)
    np.testing.assert_array_equal(found["looked up"], PARAMS["table"][jnp.array([2, 0])])


def test_derivatives_pass_through_features():
    def total(params, x, through):
        y, found = features(mlp, {"hidden": "down:input"})(params, x)
        return jnp.sum(found["hidden"] if through else y)

    grad = jax.grad(total)(PARAMS, X, True)
    expected = jax.grad(lambda p: jnp.sum(jnp.tanh(X @ p["up"]["kernel"] + p["up"]["bias"])))(
        PARAMS
    )
    np.testing.assert_allclose(grad["up"]["kernel"], expected["up"]["kernel"], rtol=1e-6)
    assert not np.any(grad["down"])
    plain = jax.grad(lambda p: jnp.sum(mlp(p, X)))(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, jax.grad(total)(PARAMS, X, False), plain)


def test_what_no_feature_needs_is_not_computed():
    fn = features(mlp, {"hidden": "up/kernel:output", "last": "down:output"})
    dots = lambda name: sum(
        row.total.flops
        for row in trace.cost(lambda p, x: fn(p, x)[1][name], PARAMS, X).rows
        if row.site.name == "dot_general"
    )
    assert dots("hidden") == 2 * 2 * 3 * 3
    assert dots("last") == 2 * 2 * 3 * (3 + 2)


def test_layers_of_a_scan_come_out_stacked_and_train():
    def apply(params, x):
        step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(step, x, params["layers"])[0]

    params = {"layers": jnp.stack([jnp.eye(3), 2 * jnp.eye(3)])}
    fn = jax.jit(features(apply, {"hidden": "layers:output"}))
    y, found = fn(params, X)
    np.testing.assert_allclose(found["hidden"][0], X, rtol=1e-6)
    np.testing.assert_allclose(jnp.tanh(found["hidden"][1]), y, rtol=1e-6)
    grad = jax.grad(lambda p: jnp.sum(fn(p, X)[1]["hidden"][0]))(params)["layers"]
    assert np.any(grad[0]) and not np.any(grad[1])


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("down", "expected the path of a parameter and what of it"),
        ("down:outputs", "'path:output' or 'path:input'"),
        ("dwon:output", "matched none of 4 parameters; closest: 'down'"),
        ("up/*:output", "matches 2 parameters, 'up/bias', 'up/kernel'"),
        ("table:input", "looked up.*'table:output'"),
    ],
)
def test_a_name_that_is_not_one_value_is_refused(address, message):
    with pytest.raises(ValueError, match=message):
        features(mlp, {"hidden": address})(PARAMS, X)


def test_a_parameter_that_is_used_twice_or_nowhere_is_refused():
    tied = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"]
    params = {"w": jnp.eye(3), "free": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"'w' meets a value 2 times \(dot_general, dot_general\)"):
        features(tied, {"hidden": "w:output"})(params, X)
    with pytest.raises(ValueError, match="'free' meets a value nowhere"):
        features(tied, {"hidden": "free:output"})(params, X)


def test_a_value_that_cannot_be_taken_out_is_refused():
    def looped(p, x):
        more = lambda c: c[0] < 3
        return jax.lax.while_loop(more, lambda c: (c[0] + 1, c[1] @ p["w"]), (jnp.int32(0), x))[1]

    with pytest.raises(ValueError, match="dot_general is inside of while.*as a scan"):
        features(looped, {"hidden": "w:output"})({"w": jnp.eye(3)}, X)
