"""Laws of serving over devices: a cache of keys and values lies where the heads are, and stays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

import unitscale_jax as us
from tests.support.sharded import assert_near
from unitscale_jax import parallel
from unitscale_jax.trace.costs import collectives

BATCH, LENGTH, WIDTH, HEADS, HEAD, FFN, VOCAB, LAYERS, STEPS = 4, 12, 16, 8, 4, 32, 40, 2, 9

RULES = {
    "tokens/embedding": P("tp"),
    "**/attention/query/*": {-2: "tp"},  # (width, heads, head) and (heads, head)
    "**/attention/key/*": {-2: "tp"},
    "**/attention/value/*": {-2: "tp"},
    "**/attention/out/kernel": {-3: "tp"},  # (heads, head, width)
    "**/up/*": "column",
    "**/down/kernel": "row",
}
CACHE = P("dp", None, "tp")  # (rows, length, heads, head)


class Decoder(nn.Module):
    """One token at a time, at its place in the sequence."""

    @nn.compact
    def __call__(self, ids, place):  # (batch, 1), ()
        table = nn.Embed(VOCAB, WIDTH, name="tokens")
        x = table(ids) + nn.Embed(LENGTH, WIDTH, name="places")(place)
        for layer in range(LAYERS):
            x = Block(name=f"block_{layer}")(x)
        return table.attend(nn.LayerNorm(name="norm")(x))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(name="norm_1")(x)
        x = x + nn.MultiHeadDotProductAttention(
            num_heads=HEADS, qkv_features=HEADS * HEAD, decode=True, name="attention"
        )(h)
        h = nn.gelu(nn.Dense(FFN, name="up")(nn.LayerNorm(name="norm_2")(x)))
        return x + nn.Dense(WIDTH, name="down")(h)


@functools.cache
def built():
    module, ids = Decoder(), jnp.zeros((BATCH, LENGTH), jnp.int32)  # a cache for all of LENGTH
    return us.from_linen(module, jax.jit(module.init)(jax.random.key(0), ids, jnp.int32(0)))


def generated(params, cache, first):
    """Tokens, greedily; the logits they were chosen by; the cache after them."""
    apply = built().apply

    def step(carry, place):
        cache, ids = carry
        logits, cache = apply(params, ids, place, state=cache)
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (cache, chosen), (chosen[:, 0], logits[:, 0])

    places = jnp.arange(STEPS, dtype=jnp.int32)
    (cache, _), (tokens, logits) = lax.scan(step, (cache, first), places)
    return tokens, logits, cache


def placed(mesh):
    """Parameters by rules, cache and first tokens, over a mesh."""
    params, cache, first = built().params, built().state, jnp.arange(BATCH)[:, None] * 7
    by_heads = lambda x: NamedSharding(mesh, CACHE if x.ndim == 4 else P())
    cache = jax.tree.map(lambda x: jax.device_put(x, by_heads(x)), cache)
    lay = parallel.layout(params, RULES, mesh, missing="whole")
    first = jax.device_put(first.astype(jnp.int32), NamedSharding(mesh, P("dp")))
    return parallel.shard(params, lay), cache, first


@pytest.mark.parametrize("sizes", [dict(dp=2, tp=4), dict(dp=1, tp=8)], ids=str)
def test_generation_over_devices_is_that_of_one(sizes):
    mesh = parallel.mesh(**sizes)
    args = placed(mesh)
    run = jax.jit(generated)
    tokens, logits, cache = run(*jax.device_get(args))
    with jax.set_mesh(mesh):
        program = run.lower(*args).compile()
        got = program(*args)
    np.testing.assert_array_equal(got[0], tokens)
    assert_near((got[1], got[2]), (logits, cache), limit=1e-5)
    assert len(np.unique(tokens)) > 4  # and not one token again and again

    rows, heads = BATCH // sizes["dp"], HEADS // sizes["tp"]
    caches = [x for x in jax.tree.leaves(got[2]) if x.ndim == 4]
    assert len(caches) == 2 * LAYERS
    for x in caches:
        assert x.addressable_shards[0].data.shape == (rows, LENGTH, heads, HEAD)

    # Nothing of the size of a cache is sent: a token's activations at most.
    sent = [c for c in collectives(program, mesh) if c.loops]
    assert {c.kind for c in sent} >= {"all-reduce"}
    assert max(c.bytes for c in sent) < caches[0].nbytes / mesh.size
