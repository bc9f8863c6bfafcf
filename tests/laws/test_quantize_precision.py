"""Laws across quantization, mixed precision, accumulation and loss scaling."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unitscale_jax as us
from tests.quant.test_quantized import W8A8, assert_same_bits, normal, operands
from unitscale_jax import DotSpec, QSpec

ROWS, IN, HIDDEN = 12, 8, 16
PARAMS = {
    "up": normal(IN, HIDDEN, seed=1) / 3,
    "bias": normal(HIDDEN, seed=2),
    "down": normal(HIDDEN, seed=3) / 4,
}
BATCH = {"x": normal(ROWS, IN, seed=4), "y": normal(ROWS, seed=5), "m": jnp.arange(12.0) % 3}
SPECS = {
    "w8a8": W8A8,
    "weight-only": DotSpec(w=QSpec(format="int4")),
    "asymmetric": DotSpec(w=QSpec(), x=QSpec(symmetric=False)),
    "integers backward": DotSpec(w=QSpec(), x=QSpec(), g=QSpec()),
}
S8 = np.dtype(np.int8)


def apply(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"]


def rules_of(fn, spec):
    return us.quant.resolve({"up": spec, "down": spec}, fn, PARAMS, BATCH["x"])


def loss_of(apply):
    def loss(params, batch):
        errors = (apply(params, batch["x"]) - batch["y"]) ** 2
        return us.Mean(batch["m"] * errors, batch["m"])

    return loss


LOWERED = {
    "cast": lambda dtype: us.cast(apply, us.Policy(compute=dtype)),
    "autocast": lambda dtype: us.autocast(apply, dtype),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("how", LOWERED)
@pytest.mark.parametrize("kind", SPECS)
def test_a_model_in_16_bits_is_served_as_it_was_trained(kind, how, dtype):
    """Codes are of the leaf as it is stored; the cast inside changes only what they stand for."""
    fn = LOWERED[how](dtype)
    rules = rules_of(fn, SPECS[kind])
    codes = us.quantize(PARAMS, rules)
    served = jax.jit(us.quantized(fn, strict=True))(codes, BATCH["x"])
    assert served.dtype == np.float32
    assert_same_bits(jax.jit(us.quantized(fn, rules))(PARAMS, BATCH["x"]), served)
    full = apply(PARAMS, BATCH["x"])
    assert jnp.linalg.norm(served - full) < 0.2 * jnp.linalg.norm(full)


@pytest.mark.parametrize("how", LOWERED)
def test_float_parts_are_in_16_bits_and_quantized_products_on_codes(how):
    fn = LOWERED[how]("bfloat16")
    bf16 = np.dtype(jnp.bfloat16)
    run = us.quantized(fn, {"up": W8A8})
    assert operands(run, PARAMS, BATCH["x"]) == [(S8, S8), (bf16, bf16)]


def test_codes_pass_a_cast_whole():
    """Their scales stay in float32, where 16 bits would move a code in twelve."""
    rules = rules_of(apply, W8A8)
    codes = us.quantize(PARAMS, rules)
    seen = {}

    def watched(params, x):
        seen.update(params)
        return apply(us.quant.dequantize(params), x)

    us.cast(watched, us.Policy(compute="bfloat16"))(codes, BATCH["x"])
    assert seen["up"].dtype == jnp.bfloat16 and seen["up"].scale.dtype == np.float32
    assert_same_bits(seen["up"].codes, codes["up"].codes)
    assert_same_bits(seen["up"].scale, codes["up"].scale)


def test_a_cast_outside_serves_codes_like_one_inside():
    policy = us.Policy(compute="bfloat16")
    codes = us.quantize(PARAMS, rules_of(apply, W8A8))
    outside = jax.jit(us.cast(us.quantized(apply), policy))(codes, BATCH["x"])
    inside = jax.jit(us.quantized(us.cast(apply, policy)))(codes, BATCH["x"])
    assert_same_bits(outside, inside)


@pytest.mark.parametrize("how", LOWERED)
def test_gradients_of_a_model_in_16_bits_are_float32_and_near(how):
    fn = LOWERED[how]("bfloat16")
    grads = us.value_and_grad(loss_of(us.quantized(fn, rules_of(fn, W8A8))))(PARAMS, BATCH)[2]
    full = us.value_and_grad(loss_of(apply))(PARAMS, BATCH)[2]
    for name, g in full.items():
        assert grads[name].dtype == np.float32
        assert 0 < jnp.linalg.norm(grads[name] - g) < 0.1 * jnp.linalg.norm(g)


@functools.cache
def scaled(kind, parts):
    model = us.quantized(apply, rules_of(apply, SPECS[kind]))
    grad_fn = us.value_and_grad(loss_of(model))
    grad_fn = us.accumulated(grad_fn, parts) if parts > 1 else grad_fn
    return jax.jit(lambda params, batch, scale: grad_fn(params, batch, scale=scale)[2])


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", SPECS)
def test_unscaled_gradients_are_bit_equal_at_any_scale(kind, parts):
    """Codes of 2^k g are those of g, so a backward pass in integers keeps the law too."""
    plain = scaled(kind, parts)(PARAMS, BATCH, jnp.float32(1))
    for power in (-12, 3, 15):
        grads = scaled(kind, parts)(PARAMS, BATCH, jnp.float32(2.0**power))
        chex.assert_trees_all_equal(jax.tree.map(lambda g, p=power: g / 2.0**p, grads), plain)


@pytest.mark.parametrize("kind", ["w8a8", "weight-only", "asymmetric"])
def test_in_parts_is_in_one(kind):
    """Scales are of rows, so a row is served alike in any part; only float sums differ."""
    whole = scaled(kind, 1)(PARAMS, BATCH, jnp.float32(1))
    for parts in (3, 5):
        split = scaled(kind, parts)(PARAMS, BATCH, jnp.float32(1))
        chex.assert_trees_all_close(split, whole, rtol=1e-5, atol=1e-6)


def test_an_overflow_skips_the_step_and_a_finite_one_trains():
    model = us.quantized(apply, rules_of(apply, W8A8))
    tx = us.loss_scaled(optax.sgd(0.05), us.DynamicScale(init=2**10))
    grad_fn = jax.jit(us.accumulated(us.value_and_grad(loss_of(model)), 3).__call__)
    state, params, losses = tx.init(PARAMS), PARAMS, []
    for step in range(8):
        batch = BATCH | ({"x": BATCH["x"].at[4].set(jnp.inf)} if step == 3 else {})
        terms, _, grads = grad_fn(params, batch, scale=us.current_scale(state))
        updates, state = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates)
        if step == 3:
            chex.assert_trees_all_equal(new, params)
        else:
            losses.append(float(us.loss_value(terms)))
        params = new
    assert us.current_scale(state) == 2**9
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


def test_what_was_trained_is_served():
    """A few steps in bfloat16 with a scaled loss, then codes: the last evaluation to the bit."""
    fn = us.cast(apply, us.Policy(compute="bfloat16"))
    rules = rules_of(fn, W8A8)
    model = us.quantized(fn, rules)
    grad = jax.jit(lambda params: us.value_and_grad(loss_of(model))(params, BATCH)[2])
    params = PARAMS
    for _ in range(3):
        params = jax.tree.map(lambda p, g: p - np.float32(0.05) * g, params, grad(params))
    served = jax.jit(us.quantized(fn))(us.quantize(params, rules), BATCH["x"])
    assert_same_bits(jax.jit(model)(params, BATCH["x"]), served)
