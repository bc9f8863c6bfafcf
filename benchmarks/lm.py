"""The language model of the benchmarks: the block of the main job, scanned, rematerialized."""

import jax
import jax.numpy as jnp

import unitscale_jax as us

VOCABULARY, HEADS = 256, 2  # heads of 128, the width of a TPU's lanes


def init(key, *, layers=4, width=256):
    """Parameters, float32, layers stacked on the leading axis."""
    keys = iter(jax.random.split(key, 6))
    normal = lambda *shape: jax.random.normal(next(keys), shape) * shape[-2] ** -0.5
    return {
        "embed": normal(VOCABULARY, width),
        "layers": {
            "qkv": normal(layers, width, 3 * width),
            "out": normal(layers, width, width),
            "up": normal(layers, width, 4 * width),
            "down": normal(layers, 4 * width, width),
            "norm1": jnp.ones((layers, width)),
            "norm2": jnp.ones((layers, width)),
        },
        "head": normal(width, VOCABULARY),
    }


def norm(x, gain):
    mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + 1e-6).astype(x.dtype) * gain.astype(x.dtype)


def layer(x, p):  # x: (batch, time, width)
    batch, time, width = x.shape
    heads = lambda t: t.reshape(batch, time, HEADS, -1)
    q, k, v = map(heads, jnp.split(norm(x, p["norm1"]) @ p["qkv"].astype(x.dtype), 3, -1))
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
    x = x + attended @ p["out"].astype(x.dtype)
    hidden = jnp.square(jax.nn.relu(norm(x, p["norm2"]) @ p["up"].astype(x.dtype)))
    return x + hidden @ p["down"].astype(x.dtype)


def apply(params, tokens, dtype=jnp.float32, remat=True):
    """Logits (batch, time, vocabulary), float32, computed in `dtype`."""
    step = lambda x, p: (layer(x, p), None)
    x = params["embed"].astype(dtype)[tokens]
    x, _ = jax.lax.scan(jax.checkpoint(step) if remat else step, x, params["layers"])
    return (x @ params["head"].astype(dtype)).astype(jnp.float32)


def token_losses(params, batch, dtype=jnp.float32):
    """Cross-entropy of each token, (rows, time)."""
    logits = apply(params, batch["tokens"][:, :-1], dtype)
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, batch["tokens"][:, 1:, None], -1)[..., 0]


def loss(params, batch, dtype=jnp.float32):
    """The loss contract: a total and a count of tokens for each row."""
    return us.Mean(
        jnp.sum(token_losses(params, batch, dtype) * batch["mask"], -1), batch["mask"].sum(-1)
    )


def batch(key, rows, time):
    """Random tokens, of which the last quarter of every other row is padding."""
    mask = jnp.ones((rows, time)).at[::2, 3 * time // 4 :].set(0)
    return {"tokens": jax.random.randint(key, (rows, time + 1), 0, VOCABULARY), "mask": mask}
