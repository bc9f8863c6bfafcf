"""Laws of fp8 products with scale 1: they are dots of rounded operands, in every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unitscale_jax as us
from unitscale_jax.formats import round_to

W = {"kernel": jax.random.normal(jax.random.key(0), (32, 16))}
X, CT = jax.random.normal(jax.random.key(1), (4, 32)), jax.random.normal(jax.random.key(2), (4, 16))


def product(params, x):
    return x @ params["kernel"]


@pytest.fixture(params=[product, jax.jit(product)], ids=["plain", "jit"])
def low(request):
    return us.quantized(request.param, {"kernel": us.quant.fp8})


def test_the_forward_pass_is_the_product_of_rounded_operands(low):
    want = round_to(X, "e4m3fn") @ round_to(W["kernel"], "e4m3fn")
    np.testing.assert_array_equal(low(W, X), want)


def test_gradients_are_products_with_the_rounded_gradient(low):
    of_params, of_x = jax.vjp(low, W, X)[1](CT)
    ct = round_to(CT, "e5m2")
    np.testing.assert_array_equal(of_x, ct @ round_to(W["kernel"], "e4m3fn").T)
    np.testing.assert_array_equal(of_params["kernel"], round_to(X, "e4m3fn").T @ ct)


def test_products_are_of_codes_of_eight_bits():
    low = us.quantized(product, {"kernel": us.quant.fp8})
    rows = us.explain(lambda p, x: jax.grad(lambda p, x: low(p, x).sum(), (0, 1))(p, x))(W, X)
    dtypes = {row.operands for row in rows.products.rows}
    e4, e5 = "float8_e4m3fn", "float8_e5m2"
    assert dtypes <= {(e4, e4), (e5, e4), (e4, e5)} and len(dtypes) >= 2


def test_what_is_too_large_is_clipped_and_what_is_infinite_is_not_hidden():
    low = us.quantized(product, {"kernel": us.quant.fp8})
    x = X.at[0, 0].set(1e6)
    np.testing.assert_array_equal(low(W, x), low(W, X.at[0, 0].set(448.0)))
    assert not np.isfinite(low(W, X.at[0, 0].set(jnp.inf))[0]).any()


def test_a_unit_scaled_model_trains_in_fp8_without_a_loss_scale():
    def loss(params, batch):
        h = jax.nn.gelu(batch["x"] @ params["a"]["kernel"]) @ params["b"]["kernel"]
        return us.Mean(((h - batch["y"]) ** 2).sum(-1), jnp.ones(len(h)))

    keys = jax.random.split(jax.random.key(3), 4)
    params = {
        n: {"kernel": jax.random.normal(k, (32, 32))} for n, k in zip("ab", keys, strict=False)
    }
    batch = dict(zip("xy", jax.random.normal(keys[2], (2, 64, 32)), strict=True))
    scaled = us.unit_scaled(loss)
    low = us.quantized(scaled, {"**/kernel": us.quant.fp8})
    wide, narrow = (us.value_and_grad(fn)(params, batch)[2] for fn in (scaled, low))
    for a, b in zip(*map(jax.tree.leaves, (wide, narrow)), strict=True):
        cosine = jnp.sum(a * b) / jnp.sqrt(jnp.sum(a * a) * jnp.sum(b * b))
        assert cosine > 0.99
    with pytest.raises(ValueError, match="Put unit_scaled inside"):
        us.unit_scaled(us.quantized(loss, {"**/kernel": us.quant.fp8}))
