"""Models in Flax Linen."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
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
from tests.support.zoo._ops import causal, damped, grouped_attention, rotary
from unitscale_jax.bridge import from_linen


def built(module, *inputs, key=None, train=True):
    """What an entry returns; a module with state returns the new one too, while it trains."""
    streams = dict.fromkeys(["params", "dropout"], jax.random.key(0))
    shapes = jax.eval_shape(functools.partial(module.init, streams), *inputs)
    variables = {name: filled(shapes[name]) for name in shapes}
    apply, params, state = from_linen(module, variables)

    def bound(params, *inputs):
        if not state:
            return apply(params, *inputs, key=key)
        outputs, new_state = apply(params, *inputs, state=state, key=key)
        return (outputs, new_state) if train else outputs

    return params, inputs, bound


class MLP(nn.Module):
    features: int = HEAD

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm(name="norm")(nn.gelu(nn.Dense(FFN, name="inner")(x)))
        return nn.Dense(self.features, name="outer")(h)


@entry("mlp", "gelu", "layer_norm")
def linen_mlp():
    return built(MLP(), activations(BATCH, WIDTH))


class CNN(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):  # (batch, height, width, 2)
        norm = functools.partial(nn.BatchNorm, use_running_average=not self.train)
        h = nn.Conv(9, (3, 3), strides=2, use_bias=False, name="conv_0")(x)
        h = nn.relu(norm(name="norm_0")(h))  # (batch, height / 2, width / 2, 9)
        h = nn.relu(norm(name="norm_1")(nn.Conv(11, (3, 3), use_bias=False, name="conv_1")(h)))
        h = nn.max_pool(h, (2, 2), strides=(2, 2))
        return nn.Dense(HEAD, name="head")(h.mean((1, 2)))


IMAGE = BATCH, 8, 10, 2


@entry("conv", "batch_stats", "pool")
def linen_cnn_train():
    return built(CNN(train=True), activations(*IMAGE))


@entry("conv", "batch_stats", "pool")
def linen_cnn_eval():
    return built(CNN(train=False), activations(*IMAGE), train=False)


class Mobile(nn.Module):
    """A depthwise convolution, channels weighed by what the image holds, and a dense connection."""

    @nn.compact
    def __call__(self, x):  # (batch, height, width, 2)
        h = nn.silu(nn.Conv(9, (1, 1), name="expand")(x))
        h = nn.Conv(9, (3, 3), feature_group_count=9, name="depthwise")(h)
        h = nn.silu(nn.GroupNorm(num_groups=3, name="norm")(h))
        squeezed = nn.relu(nn.Dense(4, name="squeeze")(h.mean((1, 2))))
        h = h * nn.sigmoid(nn.Dense(9, name="excite")(squeezed))[:, None, None]
        h = jnp.concatenate([x, nn.Conv(5, (1, 1), name="project")(h)], axis=-1)
        return nn.Dense(HEAD, name="head")(nn.silu(h).mean((1, 2)))  # of 7 channels


@entry("conv", "depthwise", "squeeze_excite", "concat", "group_norm", "silu")
def linen_mobile():
    return built(Mobile(), activations(*IMAGE))


class UNet(nn.Module):
    """Down and up by strides."""

    @nn.compact
    def __call__(self, x):  # (batch, height, width, 2)
        fine = nn.silu(nn.Conv(5, (3, 3), name="enter")(x))
        coarse = nn.silu(nn.Conv(7, (3, 3), strides=2, name="down")(fine))
        again = nn.ConvTranspose(9, (2, 2), strides=(2, 2), name="up")(coarse)
        return nn.Conv(2, (3, 3), name="leave")(jnp.concatenate([again, fine], axis=-1))


@entry("conv", "unet", "concat", "silu")
def linen_unet():
    return built(UNet(), activations(*IMAGE))


def heads(name, **options):
    return nn.MultiHeadDotProductAttention(
        num_heads=HEADS, qkv_features=HEADS * HEAD, name=name, **options
    )


class Block(nn.Module):
    post: bool = False

    @nn.compact
    def __call__(self, x):  # (batch, time, width)
        norm_1, norm_2 = nn.LayerNorm(name="norm_1"), nn.LayerNorm(name="norm_2")
        mix = lambda x: heads("attention")(x, mask=causal(x.shape[1]))
        mlp = MLP(WIDTH, name="mlp")
        if self.post:
            x = norm_1(x + mix(x))
            return norm_2(x + mlp(x))
        x = x + mix(norm_1(x))
        return x + mlp(norm_2(x))


class Language(nn.Module):
    """Logits of the next token; the table of the tokens is also the last layer."""

    post: bool = False

    @nn.compact
    def __call__(self, ids):  # (batch, time)
        table = nn.Embed(VOCAB, WIDTH, name="tokens")
        x = table(ids) + nn.Embed(TIME, WIDTH, name="places")(jnp.arange(TIME))
        for layer in range(LAYERS):
            x = Block(self.post, name=f"blocks_{layer}")(x)
        return table.attend(nn.LayerNorm(name="norm")(x))


TRANSFORMER = "transformer", "attention", "softmax", "layer_norm", "gelu", "where"


@entry(*TRANSFORMER, "pre_norm", "tied", "gather")
def linen_transformer():
    return built(Language(), tokens(BATCH, TIME, vocab=VOCAB))


@entry(*TRANSFORMER, "post_norm", "tied", "gather")
def linen_post_norm():
    return built(Language(post=True), tokens(BATCH, TIME, vocab=VOCAB))


class Stack(nn.Module):
    """The layers are one scan over stacked parameters; the backward pass keeps only matmuls."""

    @nn.compact
    def __call__(self, x):
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        block = nn.remat(Block, policy=policy, prevent_cse=False)(name="blocks")
        layers = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        return layers(block, x, None)[0]


@entry(*TRANSFORMER, "pre_norm", "scan", "remat")
def linen_scan_remat():
    return built(Stack(), activations(BATCH, TIME, WIDTH))


class Llama(nn.Module):
    kv: int = 2
    group: int = 4
    head: int = 10

    @nn.compact
    def __call__(self, x):  # (batch, time, width)
        to = lambda name, *shape: nn.DenseGeneral(shape, use_bias=False, name=name)
        h = nn.RMSNorm(name="norm_1")(x)
        q = rotary(to("query", self.kv, self.group, self.head)(h))
        k, v = rotary(to("key", self.kv, self.head)(h)), to("value", self.kv, self.head)(h)
        mixed = grouped_attention(q, k, v, causal(x.shape[1]))
        back = nn.DenseGeneral(WIDTH, axis=(-3, -2, -1), use_bias=False, name="out")
        x = x + back(mixed)
        h = nn.RMSNorm(name="norm_2")(x)
        return x + to("down", WIDTH)(nn.silu(to("gate", FFN)(h)) * to("up", FFN)(h))


@entry("attention", "gqa", "rope", "swiglu", "silu", "rms_norm", "softmax", "where", "pre_norm")
def linen_gqa():
    return built(Llama(), activations(BATCH, TIME, WIDTH))


class Translator(nn.Module):
    """The decoder looks at all that was encoded, but for padding; dropout everywhere."""

    @nn.compact
    def __call__(self, source, is_there, x):  # (batch, 8, 9), (batch, 8), (batch, time, width)
        attend = functools.partial(heads, dropout_rate=0.2, deterministic=False)
        drop = nn.Dropout(0.2, deterministic=False)
        memory = nn.LayerNorm(name="norm_1")(nn.Dense(WIDTH, name="encoder")(source))
        memory = memory + attend("self")(memory, mask=is_there[:, None, None, :])
        h = attend("cross")(nn.LayerNorm(name="norm_2")(x), memory, mask=is_there[:, None, None, :])
        x = x + drop(h)
        return x + drop(MLP(WIDTH, name="mlp")(x))


@entry(*TRANSFORMER[1:], "cross_attention", "dropout")
def linen_encoder_decoder():
    is_there = jnp.arange(8) < jnp.array([[8], [5], [6], [8], [1], [7]])
    inputs = activations(BATCH, 8, 9), is_there, activations(BATCH, TIME, WIDTH, seed=1)
    return built(Translator(), *inputs, key=jax.random.key(1))


class Experts(nn.Module):
    """Every expert sees every token; one module, mapped over stacked parameters."""

    experts: int = 5

    @nn.compact
    def __call__(self, x):  # (batch, time, width)
        stacked = nn.vmap(
            MLP,
            in_axes=None,
            out_axes=2,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            axis_size=self.experts,
        )
        weights = nn.softmax(nn.Dense(self.experts, name="router")(x))
        return jnp.einsum("bte,bted->btd", weights, stacked(WIDTH, name="experts")(x))


@entry("moe", "softmax", "gelu", "layer_norm")
def linen_moe():
    return built(Experts(), activations(BATCH, TIME, WIDTH))


class LSTM(nn.Module):
    @nn.compact
    def __call__(self, x):  # (batch, time, width)
        h = nn.RNN(nn.LSTMCell(FFN), name="rnn")(x)
        return nn.Dense(HEAD, name="head")(h[:, -1])


@entry("lstm", "scan")
def linen_lstm():
    return built(LSTM(), activations(BATCH, TIME, WIDTH))


class Mamba(nn.Module):
    """A selective state space, step by step: Gu and Dao 2023, arXiv:2312.00752."""

    states: int = 5

    @nn.compact
    def __call__(self, x):  # (batch, time, width)
        decay = self.param("decay", nn.initializers.ones, (WIDTH, self.states))
        step = nn.softplus(nn.Dense(WIDTH, name="step")(x))  # (batch, time, width)
        write = nn.Dense(self.states, name="write")(x)  # (batch, time, states)
        read = nn.Dense(self.states, name="read")(x)

        def advance(h, now):  # (batch, width, states)
            x, step, write, read = now
            kept = jnp.exp(-step[..., None] * jnp.exp(decay)) * h
            h = kept + (step * x)[..., None] * write[:, None]
            return h, jnp.einsum("bds,bs->bd", h, read)

        time_first = [y.swapaxes(0, 1) for y in (x, step, write, read)]
        start = jnp.zeros((x.shape[0], WIDTH, self.states), x.dtype)
        return x + lax.scan(advance, start, time_first)[1].swapaxes(0, 1)


@entry("ssm", "scan")
def linen_ssm():
    return built(Mamba(), activations(BATCH, TIME, WIDTH))


class Gated(nn.Module):
    """One layer, with an activation that depends on the batch."""

    @nn.compact
    def __call__(self, x):  # (batch, width)
        smooth = lambda layer, x: nn.gelu(layer(x))
        bounded = lambda layer, x: jnp.tanh(layer(x))
        h = nn.cond(x.mean() > 0.0, smooth, bounded, nn.Dense(FFN, name="inner"), x)
        return nn.Dense(HEAD, name="outer")(h)


@entry("mlp", "cond", "gelu")
def linen_cond():
    return built(Gated(), activations(BATCH, WIDTH))


class Damped(nn.Module):
    @nn.compact
    def __call__(self, x):  # (batch, width)
        h = jnp.tanh(nn.Dense(FFN, name="inner")(x))
        return damped(h, self.param("outer", nn.initializers.ones, (FFN, HEAD)))


@entry("mlp", "custom_vjp")
def linen_custom_vjp():
    return built(Damped(), activations(BATCH, WIDTH))
