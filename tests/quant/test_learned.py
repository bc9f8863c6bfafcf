"""Laws of learned scales: the worked example, training is serving, and gradients by numpy."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax

import unitscale_jax as us
from tests.quant.test_quantized import F32, W8A8, assert_same_bits, normal
from unitscale_jax import DotSpec, QSpec
from unitscale_jax.quant import Group
from unitscale_jax.quant._lsq import carrier, least_scale
from unitscale_jax.quant._ops import threshold

ROWS, IN, OUT = 4, 12, 6
I3, I4, I8 = (QSpec(format=f, axes=(-2,)) for f in ("int3", "int4", "int8"))
SPECS = {
    "weight-only": DotSpec(w=I4),
    "w8a8": DotSpec(w=I8, x=QSpec()),
    "w4a4": DotSpec(w=I4, x=QSpec(format="int4")),
    "groups": DotSpec(w=replace(I4, group=Group(4)), x=QSpec()),
    "int2": DotSpec(w=replace(I4, format="int2"), x=QSpec()),
    "float_exact": DotSpec(w=I8, x=QSpec(), compute="float_exact"),
    "dequant": DotSpec(w=I8, x=QSpec(), compute="dequant"),
    "quantized backward": DotSpec(w=I8, x=QSpec(), g=QSpec()),
}


def dense(params, x):
    return jax.nn.relu(x @ params["w"] + params["b"])


PARAMS = {"w": normal(IN, OUT, seed=1), "b": normal(OUT, seed=2)}
X = normal(ROWS, IN)


def begun(spec, params=PARAMS, fn=dense, x=X, dtype=F32, collect=("range", "channels")):
    """Learned parameters, by what was calibrated on `x`."""
    rules, params = {"w": spec}, us.tree.astype(params, dtype)
    stats = (
        None
        if spec.x is None
        else us.calibrate(fn, params, [x.astype(dtype)], rules, collect=collect)
    )
    return us.quant.learned(params, rules, stats)


def least(spec):
    return least_scale(spec)


# ------------------------------------------------------------------- the worked example (E11)

V = jnp.array([0.24, -1.5, 5, 0.8, -0.3])
E11 = [(-0.48, 1), (-3, 0), (3, 0), (0.4, 1), (-0.4, 1)]  # slope, mask


def test_a_worked_example():
    spec = DotSpec(w=QSpec(format="int3", axes=(-1,)))
    leaf = us.quant.learned({"v": V}, {"v": spec})["v"]
    np.testing.assert_allclose(leaf.scale, [1.81057], rtol=1e-5)
    leaf = {"v": replace(leaf, scale=jnp.array([0.5]))}
    for index, (slope, mask) in enumerate(E11):
        one = lambda p, k=index: us.quantized(lambda q: q["v"])(p)[k]
        grads = jax.grad(one)(leaf)["v"]
        np.testing.assert_allclose(grads.scale[0], slope / np.sqrt(15), rtol=1e-5)
        np.testing.assert_array_equal(grads.master, mask * np.eye(5)[index])


# ------------------------------------------------------------------ training is serving, bitwise


@functools.cache
def programs(kind, dtype):
    spec = SPECS[kind]
    start = begun(spec, dtype=dtype)
    cast = lambda p, x: (us.tree.astype(p, dtype), x.astype(dtype))
    train = us.quantized(lambda p, x: dense(*cast(p, x)))

    def with_gradient(p, x):
        loss = lambda p: (jnp.square((y := train(p, x)).astype(jnp.float32)).sum(), y)
        return jax.value_and_grad(loss, has_aux=True)(p)[0][1]

    return start, jax.jit(train), jax.jit(with_gradient)


@pytest.mark.parametrize("dtype", [F32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SPECS)
def test_training_is_serving_to_the_bit(kind, dtype):
    start, train, with_gradient = programs(kind, dtype)
    q = SPECS[kind].w.max_code
    sizes = hnp.arrays(np.float32, start["w"].scale.shape, elements=st.floats(0.0625, 2, width=32))

    @settings(max_examples=10)
    @given(by=sizes, x_by=st.floats(0.0625, 3, width=32), seed=st.integers(0, 9))
    def law(by, x_by, seed):
        leaf, x = start["w"], normal(ROWS, IN, seed=seed)
        x_scale = None if leaf.x_scale is None else leaf.x_scale * np.float32(x_by)
        params = start | {"w": replace(leaf, scale=leaf.scale * by, x_scale=x_scale)}
        codes = us.quantize(params)
        assert abs(codes["w"].codes.astype(jnp.int32)).max() <= q
        served = train(codes, x)
        assert served.dtype == dtype
        assert_same_bits(train(params, x), served)
        assert_same_bits(with_gradient(params, x), served)

    law()


def test_training_is_serving_without_jit():
    params = begun(SPECS["w8a8"])
    run = us.quantized(dense)
    assert_same_bits(run(params, X), jax.jit(run)(us.quantize(params), X))


def test_served_values_are_codes_by_the_scale():
    params = begun(SPECS["w4a4"])
    leaf, t = params["w"], us.quantize(params)["w"]
    steps = np.asarray(leaf.master) * (np.float32(1) / np.asarray(leaf.scale))
    expected = np.clip(np.rint(steps), -7, 7)
    np.testing.assert_array_equal(t.codes.astype(jnp.int32), expected)
    np.testing.assert_array_equal(t.scale, leaf.scale)
    np.testing.assert_allclose(
        t.input_range, np.float32(leaf.x_scale) * np.array([-7, 7]), rtol=1e-6
    )
    assert t.spec == leaf.spec and t.dtype == leaf.dtype and t.master is None


# ------------------------------------------------------------------------ gradients, by numpy


def by_hand(v, s, q):
    """Value in steps, its slope by the scale, and whether it is inside; float64."""
    steps = np.asarray(v, np.float64) / np.asarray(s, np.float64)
    inside = np.abs(steps) < q
    slope = np.where(inside, np.rint(steps) - steps, np.sign(steps) * q)
    return np.clip(np.rint(steps), -q, q), slope, inside


@pytest.mark.parametrize("kind", ["weight-only", "w8a8", "w4a4", "groups", "float_exact"])
def test_gradients_are_those_of_the_paper(kind):
    spec = SPECS[kind]
    params = begun(spec)
    leaf = replace(params["w"], scale=params["w"].scale * 0.3)  # so that some are outside
    if leaf.x_scale is not None:
        leaf = replace(leaf, x_scale=leaf.x_scale * np.float32(0.2))
    fn = us.quantized(lambda p, x: x @ p["w"])
    g = normal(ROWS, OUT, seed=3)
    grads, dx = jax.vjp(fn, {"w": leaf}, X)[1](g)
    got = grads["w"]

    q, tiles = spec.w.max_code, leaf.scale.shape[0]
    s = np.repeat(np.asarray(leaf.scale), IN // tiles, axis=0)
    w_steps, w_slope, w_inside = by_hand(leaf.master, s, q)
    values, x_inside = np.asarray(X), np.ones(X.shape, bool)
    if leaf.x_scale is not None:
        x_q, x_s = spec.x.max_code, np.asarray(leaf.x_scale)
        x_steps, x_slope, x_inside = by_hand(X, x_s, x_q)
        values = x_steps * x_s
        dvalues = np.asarray(g) @ (w_steps * s).T
        expected = (dvalues * x_slope).sum() / np.sqrt(IN * x_q)
        np.testing.assert_allclose(got.x_scale, expected, rtol=1e-4)
        assert got.x_scale.shape == ()
    dw = values.T @ np.asarray(g)
    np.testing.assert_allclose(got.master, np.where(w_inside, dw, 0), rtol=1e-4, atol=1e-5)
    ds = (dw * w_slope).reshape(tiles, IN // tiles, OUT).sum(1) / np.sqrt(IN // tiles * q)
    np.testing.assert_allclose(got.scale, ds, rtol=1e-4, atol=1e-5)
    full = np.asarray(g) @ (w_steps * s).T
    np.testing.assert_allclose(dx, np.where(x_inside, full, 0), rtol=1e-4, atol=1e-5)
    assert w_inside.any() and (kind != "w4a4" or not (w_inside.all() or x_inside.all()))


@given(v=hnp.arrays(np.float32, (3, 8), elements=st.floats(-9, 9, width=32)))
def test_what_lies_outside_has_no_gradient_and_moves_the_scale_by_the_largest_code(v):
    scale = jnp.array([[0.5], [1.0], [2.0]])
    pull = jax.vjp(lambda v, s: carrier(v, s, 7, 8), v, scale)[1]
    dv, ds = pull(jnp.ones((3, 8)))
    _, slope, inside = by_hand(v, scale, 7)
    np.testing.assert_array_equal(dv, inside.astype(np.float32))
    np.testing.assert_allclose(ds[:, 0], slope.sum(1) / np.sqrt(56), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_batch_is_the_sum_over_its_parts():
    """For N counts the elements of a row."""
    params = begun(SPECS["w8a8"])
    x = normal(8, IN, seed=4)
    loss = lambda p, x: jnp.mean(jnp.square(us.quantized(dense)(p, x)))
    whole = jax.jit(jax.grad(loss))(params, x)
    parts = jax.jit(us.accumulated(us.value_and_grad(loss), 4))(params, x)[2]
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert whole["w"].scale.dtype == whole["w"].x_scale.dtype == F32


def test_a_scale_that_an_update_made_negative_is_the_least_one_and_comes_back():
    params = begun(SPECS["weight-only"])
    below = {**params, "w": replace(params["w"], scale=-params["w"].scale)}
    codes = us.quantize(below)["w"]
    assert (codes.scale == least(I4)).all() and least(I4) * 7 >= threshold(7)
    x, target = jnp.eye(IN), params["w"].master

    def loss(p):
        return jnp.square(us.quantized(lambda p, x: x @ p["w"])(p, x) - target).sum()

    grads = jax.grad(loss)(below)["w"]
    assert (grads.scale < 0).all()  # so a step of descent makes it larger


def test_an_array_that_is_not_finite_is_served_as_nan_in_its_channel():
    params = begun(SPECS["w8a8"])
    broken = {**params, "w": replace(params["w"], master=params["w"].master.at[3, 2].set(jnp.nan))}
    y = us.quantized(lambda p, x: x @ p["w"])(broken, X)
    assert np.isnan(y[:, 2]).all() and np.isfinite(np.delete(y, 2, axis=1)).all()
    with pytest.raises(ValueError, match="w has NaN"):
        us.quantize(broken)
    y = us.quantized(lambda p, x: x @ p["w"])(params, X.at[1, 0].set(jnp.inf))
    assert np.isnan(y[1]).all() and np.isfinite(np.delete(y, 1, axis=0)).all()


# ------------------------------------------------------------------------------- the first scale


def test_the_first_scales_are_twice_the_mean_magnitude():
    params = begun(SPECS["w4a4"])
    mean = lambda x, axis=None: np.abs(np.asarray(x)).mean(axis, keepdims=axis is not None)
    two = 2 / np.sqrt(7)
    np.testing.assert_allclose(params["w"].scale, two * mean(PARAMS["w"], 0), rtol=1e-5)
    np.testing.assert_allclose(params["w"].x_scale, two * mean(X), rtol=1e-5)
    by_range = begun(SPECS["w4a4"], collect=("range",))["w"]
    np.testing.assert_allclose(by_range.x_scale, np.abs(X).max() / 7, rtol=1e-6)


def test_a_group_of_zeros_starts_with_the_least_scale():
    leaf = us.quant.learned({"w": PARAMS["w"].at[:, 1].set(0.0)}, {"w": DotSpec(w=I4)})["w"]
    assert leaf.scale[0, 1] == least(I4) and us.quantize({"w": leaf})["w"].scale[0, 1] > 0


# -------------------------------------------------------------- layers, optimizers, checkpoints

STACK = {"w": normal(3, IN, IN, seed=5) / 3, "b": normal(3, IN, seed=6)}


def layers(params, x):
    return lax.scan(lambda h, p: (dense(p, h), None), x, params)[0]


def test_stacked_layers_have_scales_of_their_own():
    params = begun(SPECS["w8a8"], STACK, layers)
    assert params["w"].scale.shape == (3, 1, IN) and params["w"].x_scale.shape == (3,)
    run = us.quantized(layers)
    assert_same_bits(jax.jit(run)(params, X), jax.jit(run)(us.quantize(params), X))
    loss = lambda fn: lambda p: jnp.square(fn(p)).sum()
    stacked = jax.jit(jax.grad(loss(lambda p: run(p, X))))(params)
    each = [jax.tree.map(lambda leaf, k=k: leaf[k], params) for k in range(3)]

    def unrolled(each):
        h = X
        for p in each:
            h = us.quantized(dense)(p, h)
        return h

    by_layer = jax.jit(jax.grad(loss(unrolled)))(each)
    for k in range(3):
        for a, b in zip(jax.tree.leaves(stacked), jax.tree.leaves(by_layer[k]), strict=True):
            np.testing.assert_allclose(a[k], b, rtol=1e-4, atol=1e-5)


def target(x):
    return jnp.sin(3 * x @ PARAMS["w"])


@functools.cache
def trained_for(steps, train_scales=True):
    """Adam on a layer of two bits, and its loss before and after."""
    params = begun(DotSpec(w=replace(I4, format="int3"), x=QSpec(format="int3")))
    optimizer = optax.adam(0.02)

    def loss(p, x):
        return jnp.mean(
            jnp.square(us.quantized(lambda p, x: x @ p["w"] + p["b"])(p, x) - target(x))
        )

    def step(carry, x):
        p, state = carry
        value, grads = jax.value_and_grad(loss)(p, x)
        if not train_scales:
            grads["w"] = replace(
                grads["w"],
                **jax.tree.map(
                    jnp.zeros_like, {"scale": grads["w"].scale, "x_scale": grads["w"].x_scale}
                ),
            )
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(p, updates), state), value

    xs = normal(steps, 64, IN, seed=7)
    with jax.numpy_dtype_promotion("standard"):
        (params, state), losses = jax.jit(lambda c: lax.scan(step, c, xs))(
            (params, optimizer.init(params))
        )
    return params, state, losses


def test_an_optimizer_trains_latents_and_scales():
    params, _, losses = trained_for(150)
    start = begun(DotSpec(w=replace(I4, format="int3"), x=QSpec(format="int3")))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, start)
    assert all(jax.tree.leaves(moved))
    assert losses[-20:].mean() < 0.8 * losses[:20].mean()
    assert losses[-20:].mean() < trained_for(150, False)[2][-20:].mean()


def test_learned_parameters_go_through_checkpoints(tmp_path):
    params, state, _ = trained_for(150)
    saved = us.Checkpoints(tmp_path)
    saved.save(1, {"params": params, "state": state})
    _, restored = saved.restore({"params": params, "state": state})
    assert jax.tree.structure(restored["params"]) == jax.tree.structure(params)
    assert_same_bits(restored["params"], params)


def test_names_and_casts_see_one_array_of_a_shape():
    params = begun(SPECS["w8a8"])
    assert us.tree.names(params) == ["b", "w/master", "w/scale", "w/x_scale"]
    half = us.tree.astype(params, jnp.bfloat16)["w"]
    assert half.dtype == jnp.bfloat16 and half.scale.dtype == half.x_scale.dtype == F32
    assert half.shape == (IN, OUT) and "Learned((12, 6), int8 x int8" in repr(half)
    rules = us.quant.resolve({"w": W8A8}, dense, params, X)
    assert rules[0][1].w.axes == (-2,)
    assert_same_bits(us.quantized(dense, rules)(params, X), us.quantized(dense)(params, X))


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: (x @ p["w"]) @ p["w"].T,
        lambda p, x: x @ (p["w"] * jnp.tril(jnp.ones((IN, OUT)))),
        lambda p, x: x @ p["w"] + p["w"][jnp.array([0, 0, 3, 1])],
        lambda p, x: jax.vmap(lambda row: row @ p["w"])(x),
        lambda p, x: jax.checkpoint(lambda p, x: x @ p["w"])(p, x),
    ],
    ids=["both ways", "mask", "lookup", "vmap", "remat"],
)
def test_wherever_it_stands_scales_receive_the_gradient_of_its_value(fn):
    """That of the values served, weighted by the slopes."""
    spec = DotSpec(w=I4)
    leaf = us.quant.learned({"w": PARAMS["w"]}, {"w": spec})["w"]
    leaf = replace(leaf, scale=leaf.scale * 0.7)
    g = normal(*jax.eval_shape(fn, {"w": PARAMS["w"]}, X).shape, seed=8)
    got = jax.jit(lambda p: jax.vjp(lambda p: us.quantized(fn)(p, X), p)[1](g)[0])({"w": leaf})["w"]
    value = us.quant.dequantize(us.quantize({"w": leaf}))
    dw = np.asarray(jax.vjp(lambda p: fn(p, X), value)[1](g)[0]["w"])
    _, slope, inside = by_hand(leaf.master, leaf.scale, 7)
    np.testing.assert_allclose(got.master, np.where(inside, dw, 0), rtol=1e-3, atol=1e-4)
    expected = (dw * slope).sum(0, keepdims=True) / np.sqrt(IN * 7)
    np.testing.assert_allclose(got.scale, expected, rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DotSpec(w=replace(I8, scale="po2")), "w: the scale of w as int8 po2 cannot be learned"),
        (DotSpec(w=replace(I8, symmetric=False)), "scale of w as int8 asymmetric cannot"),
        (DotSpec(w=replace(I8, format="e4m3fn")), "scale of w as e4m3fn cannot"),
        (DotSpec(w=replace(I4, group=Group(4, "integer"))), "scale of w as int4 g4i cannot"),
        (DotSpec(w=I8, x=QSpec(symmetric=False)), "scale of x as int8 asymmetric cannot"),
        (DotSpec(w=replace(I8, calibrator=us.quant.MSE())), "has no calibrator.*leave it out"),
        (DotSpec(w=I8, x=QSpec()), "stats do not say where.*calibrate"),
        (DotSpec(w=replace(I8, axes=None)), "does not say which axes.*resolve"),
        (DotSpec(w=replace(I4, group=Group(5))), "groups of 5 do not divide"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_learned_is_an_error_that_names_it(spec, message):
    with pytest.raises(ValueError, match=message):
        us.quant.learned({"w": PARAMS["w"]}, {"w": spec})


def test_learned_once_is_learned():
    spec = SPECS["weight-only"]
    params = begun(spec)
    assert us.quant.learned(params, {"w": spec})["w"] is params["w"]
    with pytest.raises(ValueError, match="w is quantized already, as float x int4"):
        us.quant.learned(params, {"w": DotSpec(w=I8)})
    with pytest.raises(ValueError, match="w is quantized already"):
        us.quant.learned(us.quantize(params), {"w": spec})
    with pytest.raises(ValueError, match="w is quantized already, as float x int4"):
        us.quantize(params, {"w": DotSpec(w=I8)})
    with pytest.raises(ValueError, match="w is quantized as float x int4, and a rule asks"):
        us.quantized(dense, {"w": DotSpec(w=I8)})(params, X)
    with pytest.raises(ValueError, match="w has NaN"):
        us.quant.learned({"w": PARAMS["w"].at[0, 0].set(jnp.nan)}, {"w": spec})
    with pytest.raises(ValueError, match="quantized already; calibrate the float"):
        us.calibrate(dense, params, [X], {"w": spec})


def test_a_second_range_and_draws_that_are_missing_are_errors():
    spec = SPECS["w8a8"]
    params, stats = begun(spec), us.calibrate(dense, PARAMS, [X], {"w": spec})
    with pytest.raises(ValueError, match="w is learned.*leave it out of the stats"):
        us.quantize(params, stats=stats)
    with pytest.raises(ValueError, match="w is learned.*leave it out of the stats"):
        us.quantized(dense, {"w": spec}, stats=stats)(params, X)
    draws = begun(replace(spec, g=QSpec(rounding="stochastic")))
    with pytest.raises(ValueError, match="w rounds cotangents stochastically"):
        us.quantized(dense)(draws, X)
    with pytest.raises(ValueError, match="there are no rules"):
        us.quantize(PARAMS)


def test_deleting_frees_the_latent():
    params = us.quant.learned({"w": PARAMS["w"] + 1}, {"w": DotSpec(w=I8)})
    us.quantize(params, delete=True)
    assert params["w"].master.is_deleted()
