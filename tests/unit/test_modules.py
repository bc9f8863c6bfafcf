"""Laws of the modules: Linen, NNX and plain operations are one function of the same parameters."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import unitscale_jax as us
from tests.support.scales import rms
from unitscale_jax import unit
from unitscale_jax.unit import linen

SIZES = dict(vocabulary=32, width=16, layers=2, heads=4)
IDS = jax.random.randint(jax.random.key(0), (3, 8), 0, 32)


def decoders():
    """Both decoders on the same kernels, and the Linen one's parameters."""
    module = linen.Decoder(**SIZES)
    params = module.init(jax.random.key(1), IDS)["params"]
    twin = unit.nnx.Decoder(**SIZES, rngs=nnx.Rngs(0))
    twin.embed.embedding[...] = params["embed"]["embedding"]
    for k, block in enumerate(twin.blocks):
        for name in ("qkv", "out", "up", "gate", "down"):
            getattr(block, name).kernel[...] = params[f"block_{k}"][name]["kernel"]
    twin.readout.kernel[...] = params["readout"]["kernel"]
    return module, params, twin


def by_operations(params, ids):
    x = unit.embed(ids, params["embed"]["embedding"])
    taus = unit.taus(2 * SIZES["layers"])
    for k in range(SIZES["layers"]):
        kernel = {name: leaf["kernel"] for name, leaf in params[f"block_{k}"].items()}
        branch, skip = unit.residual_split(x, taus[2 * k])
        qkv = unit.linear(unit.rms_norm(branch), kernel["qkv"])
        q, key, v = qkv.reshape(3, 8, 3, 4, 4).transpose(2, 0, 1, 3, 4)
        mixed = unit.attention(q, key, v, causal=True).reshape(x.shape)
        x = unit.residual_add(unit.linear(mixed, kernel["out"]), skip, taus[2 * k])
        branch, skip = unit.residual_split(x, taus[2 * k + 1])
        h = unit.rms_norm(branch)
        up, gate = (unit.linear(h, kernel[n], constraint=None) for n in ("up", "gate"))
        down = unit.linear(unit.silu_glu(up, gate), kernel["down"], constraint=None)
        x = unit.residual_add(down, skip, taus[2 * k + 1])
    return unit.readout(unit.rms_norm(x), params["readout"]["kernel"])


def test_linen_nnx_and_operations_agree_in_every_bit():
    module, params, twin = decoders()
    expected = by_operations(params, IDS)
    np.testing.assert_array_equal(module.apply({"params": params}, IDS), expected)
    np.testing.assert_array_equal(twin(IDS), expected)


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("name", ["Dense", "Readout"])
def test_layers_agree_in_every_bit(name, use_bias):
    x = jax.random.normal(jax.random.key(0), (4, 8))
    module = getattr(linen, name)(5, use_bias=use_bias)
    params = module.init(jax.random.key(1), x)["params"]
    twin = getattr(unit.nnx, name)(8, 5, use_bias=use_bias, rngs=nnx.Rngs(0))
    twin.kernel[...] = params["kernel"]
    np.testing.assert_array_equal(module.apply({"params": params}, x), twin(x))
    assert ("bias" in params) == use_bias == (twin.bias is not None)


def test_parameters_and_gradients_start_near_one():
    module, params, _ = decoders()
    loss = lambda p: unit.cross_entropy(module.apply({"params": p}, IDS)[:, :-1], IDS[:, 1:]).value
    for name, grad in us.tree.named_leaves(jax.grad(loss)(params)).items():
        assert 0.25 < rms(grad) < 4, name
    assert all(0.7 < rms(p) < 1.3 for p in jax.tree.leaves(params))
    constants = unit.constants(loss, params)
    assert all(c > 0 for c in jax.tree.leaves(constants))


def test_sizes_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match="width of a decoder has 16, which heads do not divide"):
        linen.Decoder(**SIZES | {"heads": 3}).init(jax.random.key(0), IDS)
    with pytest.raises(ValueError, match="layers of a decoder is 0"):
        unit.nnx.Decoder(**SIZES | {"layers": 0}, rngs=nnx.Rngs(0))


def test_modules_are_modules_of_flax():
    assert issubclass(linen.Decoder, flax.linen.Module) and issubclass(unit.nnx.Dense, nnx.Module)
    apply, params, _ = us.from_nnx(unit.nnx.Decoder(**SIZES, rngs=nnx.Rngs(0)))
    assert apply(params, IDS).shape == (3, 8, 32) and jnp.isfinite(apply(params, IDS)).all()
