"""Laws of caches of codes: appending is quantizing the whole, and one model runs on both."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.experimental import checkify

import unitscale_jax as us

BATCH, TIME, HEADS, SIZE, WIDTH = 3, 6, 2, 8, 16
SPECS = {
    "stored": us.DotSpec(w=us.QSpec(axes=(-1,))),
    "integer": us.DotSpec(w=us.QSpec(axes=(-1,)), x=us.QSpec()),
    "four bits": us.DotSpec(w=us.QSpec(format="int4", axes=(-1,))),
    "asymmetric": us.DotSpec(w=us.QSpec(axes=(-1,), symmetric=False)),
}
tokens = hnp.arrays(np.float32, (BATCH, TIME, HEADS, SIZE), elements=st.floats(-9, 9, width=32))


@pytest.mark.parametrize("name", SPECS)
@given(k=tokens)
def test_appending_tokens_is_quantizing_the_whole(name, k):
    rules = {"k": SPECS[name]}
    cache = us.quantize({"k": jnp.zeros_like(k)}, rules)["k"]
    for t in range(TIME):
        cache = us.quant.append(cache, k[:, t : t + 1], t)
    chex.assert_trees_all_equal(cache, us.quantize({"k": jnp.asarray(k)}, rules)["k"])


def model():
    keys = jax.random.split(jax.random.key(0), 4)
    weight = lambda key, *shape: jax.random.normal(key, shape) / 4
    shapes = dict.fromkeys("qkv", (WIDTH, HEADS, SIZE)) | {"o": (HEADS, SIZE, WIDTH)}
    return {n: weight(key, *s) for key, (n, s) in zip(keys, shapes.items(), strict=True)}


def step(params, cache, x, t):
    q, k, v = (jnp.einsum("bd,dhk->bhk", x, params[n])[:, None] for n in "qkv")
    cache = {"k": us.quant.append(cache["k"], k, t), "v": us.quant.append(cache["v"], v, t)}
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, cache["k"]) / SIZE**0.5
    weights = jax.nn.softmax(jnp.where(jnp.arange(TIME) <= t, scores, -jnp.inf))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, cache["v"])
    return jnp.einsum("bhd,hde->be", mixed[:, 0], params["o"]), cache


def generate(params, cache, x):
    def body(carry, t):
        cache, x = carry
        y, cache = step(params, cache, x, t)
        return (cache, jnp.tanh(y + x)), y

    (cache, _), ys = jax.lax.scan(body, (cache, x), jnp.arange(TIME))
    return ys, cache


def empty():
    return {n: jnp.zeros((BATCH, TIME, HEADS, SIZE)) for n in "kv"}


def relative(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize(("name", "error"), [("stored", 0.006), ("integer", 0.009)])
def test_a_cache_of_codes_is_carried_through_generation(name, error):
    params, x = model(), jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
    exact, whole = jax.jit(generate)(params, empty(), x)
    codes = us.quantize(empty(), {"?": SPECS[name]})
    ys, cache = jax.jit(us.quantized(generate, strict=True))(params, codes, x)
    assert 0 < relative(ys, exact) < error
    for n in "kv":
        assert us.quant.is_quantized(cache[n]) and cache[n].codes.dtype == jnp.int8
        assert relative(us.quant.dequantize(cache)[n], whole[n]) < 0.01


def test_weights_and_cache_are_quantized_together():
    params, x = model(), jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
    rules = {"?": us.DotSpec(w=us.QSpec(), x=us.QSpec())}
    served = us.quantize(params, us.quant.resolve(rules, generate, params, empty(), x))
    codes = us.quantize(empty(), {"?": SPECS["integer"]})
    ys, _ = jax.jit(us.quantized(generate, strict=True))(served, codes, x)
    trained, _ = jax.jit(us.quantized(generate, rules, strict=True))(params, codes, x)
    chex.assert_trees_all_equal(ys, trained)
    assert relative(ys, generate(params, empty(), x)[0]) < 0.03


def test_a_carry_that_is_computed_with_becomes_an_array_and_is_reported():
    def doubled(params, cache):
        return jax.lax.scan(lambda c, _: (2 * c, None), cache["k"], None, length=2)[0]

    codes = us.quantize({"k": jnp.ones((2, 3, 4))}, {"k": SPECS["stored"]})
    out = us.quantized(doubled)((), codes)
    np.testing.assert_array_equal(out, 4 * us.quant.dequantize(codes)["k"])
    with pytest.raises(ValueError, match="left in floating point: .*a loop's carry"):
        us.quantized(doubled, strict=True)((), codes)


def test_a_cache_whose_tokens_share_a_scale_cannot_be_appended_to():
    shared = us.quantize({"k": jnp.ones((2, 3, 4))}, {"k": us.DotSpec(w=us.QSpec(axes=(-2,)))})["k"]
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) whose axes \(-2,\) .*over the last axis"):
        us.quant.append(shared, jnp.ones((2, 1, 4)), 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_float_cache_keeps_its_dtype(dtype):
    cache = us.quant.append(jnp.zeros((1, 2, 4), dtype), jnp.ones((1, 1, 4)), 1)
    assert cache.dtype == dtype and cache[0, :, 0].tolist() == [0, 1]


# --- what does not fit (I2)

FIXED = us.QSpec(axes=(-1,), calibrator=us.quant.Fixed(-9, 9))
CACHES = {"float": None, "fixed": us.DotSpec(w=FIXED)}
CACHES |= SPECS | {
    "groups": us.DotSpec(w=us.QSpec(format="int4", axes=(-1,), group=us.quant.Group(4, "integer")))
}


def cache_of(name, *shape):
    zeros = jnp.zeros(shape)
    return zeros if CACHES[name] is None else us.quantize({"k": zeros}, {"k": CACHES[name]})["k"]


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize(("tokens", "index"), [(2, 3), (1, 9), (1, 4), (1, -1), (4, 1)])
def test_tokens_that_do_not_fit_are_refused_and_within_a_trace_are_nan(name, tokens, index):
    cache, x = cache_of(name, 1, 4, 8), jnp.ones((1, tokens, 8))
    for known in (index, np.int32(index), jnp.asarray(index)):
        with pytest.raises(
            ValueError, match=f"{tokens} tokens at {index} do not fit .* cache of 4"
        ):
            us.quant.append(cache, x, known)
    value = us.quant.dequantize({"k": jax.jit(us.quant.append)(cache, x, index)})["k"]
    assert int(jnp.isnan(value).sum()) == tokens * 8


@pytest.mark.parametrize("name", CACHES)
def test_a_trace_changes_nothing_where_tokens_fit(name):
    cache, x = cache_of(name, 1, 4, 8), jnp.linspace(-3, 3, 16).reshape(1, 2, 8)
    chex.assert_trees_all_equal(jax.jit(us.quant.append)(cache, x, 2), us.quant.append(cache, x, 2))


@pytest.mark.parametrize("name", ["stored", "fixed", "asymmetric"])
def test_a_model_served_from_codes_that_runs_past_its_cache_gives_nan(name):
    write = lambda c, x, t: us.quant.append(c["k"], x, t)
    codes, x = {"k": cache_of(name, 1, 4, 8)}, jnp.ones((1, 2, 8))
    served = jax.jit(us.quantized(write))(codes, x, 3)
    assert bool(jnp.isnan(us.quant.dequantize({"k": served})["k"]).any())


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 5, 8), (2, 1, 8), (1, 8), (1, 1, 1, 8), ()])
@pytest.mark.parametrize("name", ["float", "stored"])
def test_another_shape_is_refused_whatever_the_index(name, shape):
    cache = cache_of(name, 1, 4, 8)
    for run in (us.quant.append, jax.jit(us.quant.append)):
        with pytest.raises(ValueError, match=r"x has shape .*; expected that of the cache"):
            run(cache, jnp.ones(shape), 0)


def test_a_checked_index_is_an_error():
    run = jax.jit(checkify.checkify(lambda c, x, t: us.quant.append(c, x, t, checked=True)))
    cache, x = cache_of("float", 1, 4, 8), jnp.ones((1, 2, 8))
    assert run(cache, x, 2)[0].get() is None
    assert "tokens at 3 do not fit" in run(cache, x, 3)[0].get()


@pytest.mark.parametrize("wrong", [jnp.zeros((1, 4, 8), int), 3, "cache"])
def test_what_is_no_cache_is_refused(wrong):
    with pytest.raises(TypeError, match="the cache is .*; expected a float array or a QTensor"):
        us.quant.append(wrong, jnp.ones((1, 1, 8)), 0)


@pytest.mark.parametrize("index", [0.5, jnp.zeros(2, int), None])
def test_what_is_no_index_is_refused(index):
    with pytest.raises(TypeError, match="the index is .*; expected one whole number"):
        us.quant.append(jnp.zeros((1, 4, 8)), jnp.ones((1, 1, 8)), index)
