"""Models in plain JAX: parameters in dicts and lists, the model a function."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.support.zoo._model import (
    BATCH,
    FFN,
    HEAD,
    HEADS,
    LAYERS,
    TIME,
    VOCAB,
    WIDTH,
    activations,
    entry,
    filled,
    tokens,
)
from tests.support.zoo._ops import (
    attention,
    causal,
    conv,
    conv_shapes,
    damped,
    dense,
    dense_shapes,
    dropout,
    group_norm,
    grouped_attention,
    layer_norm,
    norm_shapes,
    recurrence,
    rms_norm,
    rotary,
    softplus,
)


@entry("mlp", "gelu")
def plain_mlp():
    params = filled({"inner": dense_shapes(WIDTH, FFN), "outer": dense_shapes(FFN, HEAD)})

    def apply(params, x):  # (batch, width)
        return dense(params["outer"], jax.nn.gelu(dense(params["inner"], x)))

    return params, (activations(BATCH, WIDTH),), apply


@entry("mlp", "dropout", "layer_norm", "silu", "where")
def plain_dropout():
    shapes = {"inner": dense_shapes(WIDTH, FFN), "norm": norm_shapes(FFN)}
    params, key = filled(shapes | {"outer": dense_shapes(FFN, HEAD)}), jax.random.key(0)

    def apply(params, x):  # (batch, width)
        h = jax.nn.silu(dense(params["inner"], x))
        return dense(params["outer"], dropout(key, layer_norm(params["norm"], h)))

    return params, (activations(BATCH, WIDTH),), apply


@entry("conv", "group_norm", "silu", "pool", "gather")
def plain_cnn():
    """The step of a diffusion model: an image and its time, by number."""
    shapes = {"inner": conv_shapes(2, 9), "norm": norm_shapes(9), "time": (TIME, 9)}
    params = filled(shapes | {"middle": conv_shapes(9, 11), "outer": dense_shapes(11, HEAD)})

    def apply(params, x, step):  # (batch, height, width, 2), (batch,)
        h = conv(params["inner"], x, stride=2) + params["time"][step][:, None, None]
        h = jax.nn.silu(group_norm(params["norm"], h, groups=3))
        h = conv(params["middle"], h).max((1, 2))  # (batch, 11)
        return dense(params["outer"], h)

    return params, (activations(BATCH, 8, 10, 2), tokens(BATCH, vocab=TIME)), apply


@entry("conv", "unet", "concat", "silu", "pool")
def plain_unet():
    """Down by pooling, up by repeating, with a bridge between."""
    shapes = {"down": conv_shapes(2, 5), "bottom": conv_shapes(5, 7), "up": conv_shapes(12, 9)}
    params = filled(shapes | {"outer": conv_shapes(9, 2, size=1)})

    def apply(params, x):  # (batch, height, width, 2)
        fine = jax.nn.silu(conv(params["down"], x))
        coarse = lax.reduce_window(fine, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4.0
        coarse = jax.nn.silu(conv(params["bottom"], coarse))
        again = jnp.repeat(jnp.repeat(coarse, 2, axis=1), 2, axis=2)
        h = jnp.concatenate([again, fine], axis=-1)
        return conv(params["outer"], jax.nn.silu(conv(params["up"], h)))

    return params, (activations(BATCH, 8, 10, 2),), apply


def block_shapes(width=WIDTH):
    return {
        "norm_1": norm_shapes(width),
        "qkv": {"kernel": (width, 3, HEADS, HEAD), "bias": (3, HEADS, HEAD)},
        "out": {"kernel": (HEADS, HEAD, width), "bias": (width,)},
        "norm_2": norm_shapes(width),
        "inner": dense_shapes(width, FFN),
        "outer": dense_shapes(FFN, width),
    }


def self_attention(p, x):
    """One matrix makes queries, keys and values."""
    q, k, v = jnp.moveaxis(
        jnp.einsum("btd,dchn->btchn", x, p["qkv"]["kernel"]) + p["qkv"]["bias"], 2, 0
    )
    mixed = attention(q, k, v, causal(x.shape[1]))
    return jnp.einsum("bthn,hnd->btd", mixed, p["out"]["kernel"]) + p["out"]["bias"]


def feed_forward(p, x):
    return dense(p["outer"], jax.nn.gelu(dense(p["inner"], x)))


def pre_norm_block(p, x):  # (batch, time, width)
    x = x + self_attention(p, layer_norm(p["norm_1"], x))
    return x + feed_forward(p, layer_norm(p["norm_2"], x))


def post_norm_block(p, x):  # (batch, time, width)
    x = layer_norm(p["norm_1"], x + self_attention(p, x))
    return layer_norm(p["norm_2"], x + feed_forward(p, x))


def language_model(block):
    """Logits of the next token; the table of the tokens is also the last layer."""
    shapes = {"tokens": (VOCAB, WIDTH), "places": (TIME, WIDTH), "norm": norm_shapes(WIDTH)}
    params = filled(shapes | {"blocks": [block_shapes() for _ in range(LAYERS)]})

    def apply(params, ids):  # (batch, time)
        x = params["tokens"][ids] + params["places"]
        for p in params["blocks"]:
            x = block(p, x)
        return layer_norm(params["norm"], x) @ params["tokens"].T

    return params, (tokens(BATCH, TIME, vocab=VOCAB),), apply


TRANSFORMER = "transformer", "attention", "softmax", "layer_norm", "gelu", "where"
LANGUAGE = *TRANSFORMER, "fused_qkv", "tied", "gather"


@entry(*LANGUAGE, "pre_norm")
def plain_transformer():
    return language_model(pre_norm_block)


@entry(*LANGUAGE, "post_norm")
def plain_post_norm():
    return language_model(post_norm_block)


@entry(*TRANSFORMER, "pre_norm", "fused_qkv", "scan", "remat")
def plain_scan_remat():
    """The layers are one scan over stacked parameters; the backward pass keeps only matmuls."""
    stack = lambda shape: (LAYERS, *shape)
    is_shape = lambda x: isinstance(x, tuple)
    params = filled({"blocks": jax.tree.map(stack, block_shapes(), is_leaf=is_shape)})
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    block = jax.checkpoint(pre_norm_block, policy=policy)

    def apply(params, x):  # (batch, time, width)
        return lax.scan(lambda x, p: (block(p, x), None), x, params["blocks"])[0]

    return params, (activations(BATCH, TIME, WIDTH),), apply


@entry("attention", "gqa", "rope", "swiglu", "silu", "rms_norm", "softmax", "where", "pre_norm")
def plain_gqa():
    """A Llama block."""
    kv, group, head = 2, 4, 10
    shapes = {"norm_1": {"scale": (WIDTH,)}, "norm_2": {"scale": (WIDTH,)}}
    shapes |= {"q": (WIDTH, kv, group, head), "k": (WIDTH, kv, head), "v": (WIDTH, kv, head)}
    shapes |= {"o": (kv, group, head, WIDTH)}
    shapes |= {"gate": (WIDTH, FFN), "up": (WIDTH, FFN), "down": (FFN, WIDTH)}

    def block(p, x):
        h = rms_norm(p["norm_1"], x)
        q, k = (rotary(jnp.einsum("btd,d...->bt...", h, p[name])) for name in "qk")
        v = jnp.einsum("btd,dnh->btnh", h, p["v"])
        mixed = grouped_attention(q, k, v, causal(x.shape[1]))
        x = x + jnp.einsum("btngh,nghd->btd", mixed, p["o"])
        h = rms_norm(p["norm_2"], x)
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]

    def apply(params, x):  # (batch, time, width)
        for p in params["blocks"]:
            x = block(p, x)
        return x

    params = filled({"blocks": [shapes] * LAYERS})
    return params, (activations(BATCH, TIME, WIDTH),), apply


@entry("attention", "cross_attention", "softmax", "layer_norm", "gelu", "where")
def plain_encoder_decoder():
    """The decoder looks at all that was encoded, but for padding."""
    to_heads = lambda width: {"kernel": (width, HEADS, HEAD)}
    shapes = {"encoder": dense_shapes(9, WIDTH), "norm": norm_shapes(WIDTH)}
    shapes |= {"q": to_heads(WIDTH), "k": to_heads(WIDTH), "v": to_heads(WIDTH)}
    params = filled(shapes | {"o": (HEADS, HEAD, WIDTH), "decoder": block_shapes()})

    def apply(params, source, is_there, x):  # (batch, 8, 9), (batch, 8), (batch, time, width)
        memory = jax.nn.gelu(dense(params["encoder"], source))  # (batch, 8, width)
        to = lambda name, y: jnp.einsum("btd,dhn->bthn", y, params[name]["kernel"])
        q = to("q", layer_norm(params["norm"], x))
        mixed = attention(q, to("k", memory), to("v", memory), is_there[:, None, None, :])
        return pre_norm_block(
            params["decoder"], x + jnp.einsum("bthn,hnd->btd", mixed, params["o"])
        )

    is_there = jnp.arange(8) < jnp.array([[8], [5], [6], [8], [1], [7]])
    inputs = activations(BATCH, 8, 9), is_there, activations(BATCH, TIME, WIDTH, seed=1)
    return params, inputs, apply


def expert_shapes(experts):
    up, down = (experts, WIDTH, FFN), (experts, FFN, WIDTH)
    return {"router": dense_shapes(WIDTH, experts), "up": up, "down": down}


@entry("moe", "softmax", "gelu")
def plain_moe_dense():
    """Every expert sees every token."""

    def apply(params, x):  # (batch, time, width)
        gates = jax.nn.softmax(dense(params["router"], x))  # (batch, time, experts)
        h = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, params["up"]))
        return jnp.einsum("bte,btef,efd->btd", gates, h, params["down"])

    return filled(expert_shapes(5)), (activations(BATCH, TIME, WIDTH),), apply


@entry("moe", "top_k", "softmax", "gelu", "gather")
def plain_moe_top_k():
    """A token fetches the matrices of its two best experts."""

    def apply(params, x):  # (batch, time, width)
        scores, chosen = lax.top_k(dense(params["router"], x), 2)  # (batch, time, 2)
        h = jax.nn.gelu(jnp.einsum("btd,btkdf->btkf", x, params["up"][chosen]))
        out = jnp.einsum("btkf,btkfd->btkd", h, params["down"][chosen])
        return jnp.einsum("btk,btkd->btd", jax.nn.softmax(scores), out)

    return filled(expert_shapes(5)), (activations(BATCH, TIME, WIDTH),), apply


@entry("lstm", "scan", "concat")
def plain_lstm():
    params = filled({"cell": dense_shapes(WIDTH + FFN, 4 * FFN), "head": dense_shapes(FFN, HEAD)})

    def apply(params, x):  # (batch, time, width)
        def step(carry, x_now):
            c, h = carry
            gates = dense(params["cell"], jnp.concatenate([x_now, h], axis=-1))
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (c, h), h

        start = jnp.zeros((x.shape[0], FFN), x.dtype)
        _, h = lax.scan(step, (start, start), x.swapaxes(0, 1))  # (time, batch, ffn)
        return dense(params["head"], h[-1])

    return params, (activations(BATCH, TIME, WIDTH),), apply


@entry("ssm", "silu", "rms_norm")
def plain_ssm():
    """A gated linear recurrence, over all times at once."""
    shapes = {name: dense_shapes(WIDTH, FFN) for name in ("decay", "drive", "gate")}
    params = filled(shapes | {"norm": {"scale": (WIDTH,)}, "outer": dense_shapes(FFN, WIDTH)})

    def apply(params, x):  # (batch, time, width)
        u = rms_norm(params["norm"], x)
        decay = jax.nn.sigmoid(dense(params["decay"], u))
        h = recurrence(decay, (1.0 - decay) * dense(params["drive"], u))
        return x + dense(params["outer"], h * jax.nn.silu(dense(params["gate"], u)))

    return params, (activations(BATCH, TIME, WIDTH),), apply


@entry("mlp", "custom_vjp")
def plain_custom_vjp():
    params = filled({"inner": dense_shapes(WIDTH, FFN), "outer": dense_shapes(FFN, HEAD)})

    def apply(params, x):  # (batch, width)
        h = jnp.tanh(dense(params["inner"], x))
        return damped(h, params["outer"]["kernel"]) + params["outer"]["bias"]

    return params, (activations(BATCH, WIDTH),), apply


@entry("mlp", "custom_jvp")
def plain_custom_jvp():
    params = filled({"inner": dense_shapes(WIDTH, FFN), "outer": dense_shapes(FFN, HEAD)})

    def apply(params, x):  # (batch, width)
        return dense(params["outer"], softplus(dense(params["inner"], x)))

    return params, (activations(BATCH, WIDTH),), apply


@entry("mlp", "cond", "scan")
def plain_cond():
    """An early exit: a row that is sure of itself skips the second layer."""
    shapes = {"inner": dense_shapes(WIDTH, FFN), "more": dense_shapes(FFN, FFN)}
    shapes |= {"quick": dense_shapes(FFN, HEAD), "slow": dense_shapes(FFN, HEAD)}

    def apply(params, x):  # (batch, width)
        def row(x):
            h = jnp.tanh(dense(params["inner"], x))
            quick = lambda h: dense(params["quick"], h)
            slow = lambda h: dense(params["slow"], jnp.tanh(dense(params["more"], h)))
            return lax.cond(h.mean() > 0.0, quick, slow, h)

        return lax.map(row, x)

    return filled(shapes), (activations(BATCH, WIDTH),), apply


@entry("mlp", "while")
def plain_equilibrium():
    """A layer repeated until its output stays, 30 times at most."""
    params = filled({"inner": dense_shapes(WIDTH, WIDTH), "outer": dense_shapes(WIDTH, HEAD)})

    def apply(params, x):  # (batch, width)
        def moving(carry):
            count, change, _ = carry
            return (count < 30) & (change > 1e-3)

        def step(carry):
            count, _, z = carry
            new = jnp.tanh(0.25 * dense(params["inner"], z) + x)
            return count + 1, jnp.abs(new - z).max(), new

        start = 0, jnp.ones((), x.dtype), jnp.zeros_like(x)
        return dense(params["outer"], lax.while_loop(moving, step, start)[2])

    return params, (activations(BATCH, WIDTH),), apply


@entry("mlp", "while", "trips")
def plain_spectral():
    """A layer divided by its norm, which three power iterations estimate."""
    params = filled({"kernel": (WIDTH, FFN), "bias": (FFN,)})

    def apply(params, x):  # (batch, width)
        w, unit = params["kernel"], lambda v: v * lax.rsqrt(jnp.square(v).sum())

        def step(carry):
            count, v = carry
            return count + 1, unit((v @ w.T) @ w)

        start = 0, unit(jnp.ones(FFN, x.dtype))
        _, v = lax.while_loop(lambda carry: carry[0] < 3, step, start)
        return x @ w * lax.rsqrt(jnp.square(v @ w.T).sum()) + params["bias"]

    return params, (activations(BATCH, WIDTH),), apply
