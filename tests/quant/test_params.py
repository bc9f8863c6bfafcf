"""Laws of quantized trees: bytes, errors, and passing through what treats a tree by its leaves."""

import gc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unitscale_jax as us

INT8 = us.DotSpec(w=us.QSpec(axes=(-2,)), x=us.QSpec())


def spec(**fields):
    return us.DotSpec(w=us.QSpec(**{"axes": (-2,)} | fields))


def weight(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (spec(), 64 * 32 + 4 * 32),
        (spec(format="int4"), 64 * 32 // 2 + 4 * 32),
        (spec(format="int4", group=us.quant.Group(16)), 64 * 32 // 2 + 4 * 4 * 32),
        (spec(format="int4", group=us.quant.Group(16, "integer")), 64 * 32 // 2 + 4 * 32 + 4 * 32),
        (spec(format="e4m3fn"), 64 * 32 + 4 * 32),
        (spec(symmetric=False), 64 * 32 + 4 * 32 + 4 * 32),
        (us.DotSpec(w=us.QSpec(axes=(-2,)), x=us.QSpec(symmetric=False)), 64 * 32 + 8 * 32),
    ],
    ids=str,
)
def test_bytes_are_those_of_codes_and_scales(chosen, expected):
    codes = us.quantize({"w": weight(64, 32)}, {"w": chosen})
    assert us.tree.nbytes(codes) == expected


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="int4 takes a byte on the CPU of 0.10")
def test_four_bits_take_half_a_byte_on_the_device():
    w = us.quantize({"w": weight(1024, 1024)}, {"w": spec(format="int4")})["w"]
    assert w.codes.on_device_size_in_bytes() == 1024 * 1024 // 2


def test_delete_frees_each_array_once_its_codes_are_there():
    params = {n: weight(256, 256, seed=k) for k, n in enumerate("abc")}
    params["bias"] = jnp.ones(8)
    before = us.tree.nbytes(params)
    jax.block_until_ready(us.quantize({"w": weight(256, 256)}, {"w": INT8}))  # compiled
    gc.collect()
    others = live() - before
    codes = us.quantize(params, {"?": INT8}, delete=True)
    assert all(params[n].is_deleted() for n in "abc") and not params["bias"].is_deleted()
    assert live() - others <= us.tree.nbytes(codes) + 64


def live():
    return sum(x.nbytes for x in jax.live_arrays())


def test_without_delete_the_floats_stay():
    params = {"w": weight(8, 4)}
    us.quantize(params, {"w": INT8})
    assert not params["w"].is_deleted()


def test_a_quantized_parameter_stays_if_the_spec_is_its_own():
    codes = us.quantize({"w": weight(8, 4)}, {"w": INT8})
    assert us.quantize(codes, {"w": INT8})["w"] is codes["w"]
    with pytest.raises(ValueError, match="w is quantized already, as int8 x int8, .* float x int4"):
        us.quantize(codes, {"w": spec(format="int4")})


@pytest.mark.parametrize(
    ("leaf", "chosen", "message"),
    [
        (weight(8, 4), us.DotSpec(), "rule for a/w does not say which axes share a scale.*resolve"),
        (jnp.ones((8, 4), int), INT8, "a/w is int32; only floats have codes"),
        (weight(8), INT8, r"a/w has shape \(8,\) and no axes \(-2,\)"),
        (
            weight(12, 4),
            spec(group=us.quant.Group(8)),
            "a/w along axis -2 has 12, .* 2, 3, 4, 6",
        ),
        (weight(8, 4).at[3, 1].set(jnp.nan), INT8, "a/w has NaN or infinite values"),
        (weight(8, 4).at[3, 1].set(jnp.inf), INT8, "a/w has NaN or infinite values"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors_name_the_parameter_and_the_way_out(leaf, chosen, message):
    with pytest.raises(ValueError, match=message):
        us.quantize({"a": {"w": leaf}}, {"a/*": chosen})


def test_a_rule_must_match_and_hold_a_spec():
    with pytest.raises(ValueError, match="'a/kernle', matched none of 1 parameters; .*'a/kernel'"):
        us.quantize({"a": {"kernel": weight(8, 4)}}, {"a/kernle": INT8})
    with pytest.raises(TypeError, match="has the value 'int8'; a quantization rule has a DotSpec"):
        us.quantize({"w": weight(8, 4)}, {"w": "int8"})


# ------------------------------------------------------------------ a tree of codes is a tree


def tree():
    rules = {"w": INT8, "v": spec(format="int4", group=us.quant.Group(4, "integer"))}
    return us.quantize({"w": weight(8, 4), "v": weight(8, 4, seed=1), "b": jnp.ones(4)}, rules)


def test_it_passes_jit_and_maps_unchanged():
    codes = tree()
    chex.assert_trees_all_equal(jax.jit(lambda t: t)(codes), codes)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x, codes), codes)
    assert jax.tree.map(lambda x: None, codes)["w"].spec == INT8  # rebuilt with anything as leaves


def test_a_checkpoint_restores_it(tmp_path):
    codes = tree()
    checkpoints = us.Checkpoints(tmp_path)
    checkpoints.save(1, codes)
    chex.assert_trees_all_equal(checkpoints.restore(codes)[1], codes)


def test_layers_stacked_are_rows_of_a_scan():
    layers = [us.quantize({"w": weight(8, 8, seed=k)}, {"w": INT8}) for k in range(3)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    x = weight(2, 8, seed=9)
    fn = lambda params, x: jax.lax.scan(lambda h, p: (jnp.tanh(h @ p["w"]), None), x, params)[0]
    expected = x
    for layer in layers:
        expected = us.quantized(lambda p, h: jnp.tanh(h @ p["w"]))(layer, expected)
    np.testing.assert_allclose(us.quantized(fn)(stacked, x), expected, rtol=1e-5, atol=1e-6)


def test_a_cast_changes_what_it_stands_for_and_no_scale():
    codes = us.tree.astype(tree(), "bfloat16")
    assert codes["w"].dtype == jnp.bfloat16 and codes["b"].dtype == jnp.bfloat16
    assert codes["w"].scale.dtype == jnp.float32 and codes["w"].codes.dtype == jnp.int8
    assert us.quant.dequantize(codes)["w"].dtype == jnp.bfloat16


def test_integers_are_no_weights_to_a_gradient():
    params = us.quantize({"w": weight(8, 4), "b": jnp.ones(4)}, {"w": INT8})
    held, rest = us.tree.partition(params, lambda name, leaf: us.quant.is_quantized(leaf))
    x = weight(2, 8, seed=3)
    fn = us.quantized(lambda p, x: x @ p["w"] + p["b"])
    grads = jax.grad(lambda b: fn(us.tree.combine(held, b), x).sum())(rest)
    np.testing.assert_array_equal(grads["b"], jnp.full(4, 2.0))
