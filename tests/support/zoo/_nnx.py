"""Models in Flax NNX."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
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
from tests.support.zoo._ops import causal, grouped_attention, recurrence, rotary, softplus
from unitscale_jax.bridge import from_nnx


def built(module, *inputs, key=None, train=True):
    """What an entry returns; a module with state returns the new one too, while it trains."""

    def made():
        model = module(rngs=nnx.Rngs(0))
        (model.train if train else model.eval)()
        return model

    apply, shapes, state_shapes = from_nnx(nnx.eval_shape(made))
    params, state = filled(shapes), filled(state_shapes)

    def bound(params, *inputs):
        if not jax.tree.leaves(state):
            return apply(params, *inputs, key=key)
        outputs, new_state = apply(params, *inputs, state=state, key=key)
        return (outputs, new_state) if train else outputs

    return params, inputs, bound


class MLP(nnx.Module):
    def __init__(self, features=HEAD, *, rngs):
        self.inner = nnx.Linear(WIDTH, FFN, rngs=rngs)
        self.norm = nnx.LayerNorm(FFN, rngs=rngs)
        self.outer = nnx.Linear(FFN, features, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.norm(nnx.gelu(self.inner(x))))


@entry("mlp", "gelu", "layer_norm")
def nnx_mlp():
    return built(MLP, activations(BATCH, WIDTH))


class Dropped(nnx.Module):
    def __init__(self, *, rngs):
        self.inner = nnx.Linear(WIDTH, FFN, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.outer = nnx.Linear(FFN, HEAD, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.drop(nnx.relu(self.inner(x))))


@entry("mlp", "dropout", "where")
def nnx_dropout():
    return built(Dropped, activations(BATCH, WIDTH), key=jax.random.key(1))


class CNN(nnx.Module):
    def __init__(self, *, rngs):
        self.conv_0 = nnx.Conv(2, 9, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm_0 = nnx.BatchNorm(9, rngs=rngs)
        self.conv_1 = nnx.Conv(9, 11, (3, 3), use_bias=False, rngs=rngs)
        self.norm_1 = nnx.BatchNorm(11, rngs=rngs)
        self.head = nnx.Linear(11, HEAD, rngs=rngs)

    def __call__(self, x):  # (batch, height, width, 2)
        h = nnx.relu(self.norm_0(self.conv_0(x)))  # (batch, height / 2, width / 2, 9)
        h = nnx.relu(self.norm_1(self.conv_1(h)))
        h = nnx.max_pool(h, (2, 2), strides=(2, 2))
        return self.head(h.mean((1, 2)))


IMAGE = BATCH, 8, 10, 2


@entry("conv", "batch_stats", "pool")
def nnx_cnn_train():
    return built(CNN, activations(*IMAGE))


@entry("conv", "batch_stats", "pool")
def nnx_cnn_eval():
    return built(CNN, activations(*IMAGE), train=False)


class UNet(nnx.Module):
    """Down and up by strides, with group norm."""

    def __init__(self, *, rngs):
        self.enter = nnx.Conv(2, 9, (3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(9, num_groups=3, rngs=rngs)
        self.down = nnx.Conv(9, 7, (3, 3), strides=2, rngs=rngs)
        self.up = nnx.ConvTranspose(7, 5, (2, 2), strides=(2, 2), rngs=rngs)
        self.leave = nnx.Conv(14, 2, (3, 3), rngs=rngs)

    def __call__(self, x):  # (batch, height, width, 2)
        fine = nnx.silu(self.norm(self.enter(x)))
        again = self.up(nnx.silu(self.down(fine)))
        return self.leave(jnp.concatenate([again, fine], axis=-1))


@entry("conv", "unet", "concat", "group_norm", "silu")
def nnx_unet():
    return built(UNet, activations(*IMAGE))


class Block(nnx.Module):
    def __init__(self, *, post=False, rngs):
        self.post = post
        self.norm_1, self.norm_2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, HEADS * HEAD, decode=False, rngs=rngs)
        self.mlp = MLP(WIDTH, rngs=rngs)

    def __call__(self, x):  # (batch, time, width)
        mix = lambda x: self.attention(x, mask=causal(x.shape[1]))
        if self.post:
            x = self.norm_1(x + mix(x))
            return self.norm_2(x + self.mlp(x))
        x = x + mix(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Language(nnx.Module):
    """Logits of the next token; the table of the tokens is also the last layer."""

    def __init__(self, *, post=False, rngs):
        self.tokens = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.places = nnx.Embed(TIME, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(post=post, rngs=rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, ids):  # (batch, time)
        x = self.tokens(ids) + self.places(jnp.arange(TIME))
        for block in self.blocks:
            x = block(x)
        return self.tokens.attend(self.norm(x))


TRANSFORMER = "transformer", "attention", "softmax", "layer_norm", "gelu", "where"


@entry(*TRANSFORMER, "pre_norm", "tied", "gather")
def nnx_transformer():
    return built(Language, tokens(BATCH, TIME, vocab=VOCAB))


@entry(*TRANSFORMER, "post_norm", "tied", "gather")
def nnx_post_norm():
    return built(functools.partial(Language, post=True), tokens(BATCH, TIME, vocab=VOCAB))


class Stack(nnx.Module):
    """The layers are one scan over stacked parameters; the backward pass keeps only matmuls."""

    def __init__(self, *, rngs):
        @nnx.split_rngs(splits=LAYERS)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return Block(rngs=rngs)

        self.blocks = stacked(rngs)

    def __call__(self, x):
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat(policy=policy, prevent_cse=False)
        def layers(x, block):
            return block(x)

        return layers(x, self.blocks)


@entry(*TRANSFORMER, "pre_norm", "scan", "remat")
def nnx_scan_remat():
    return built(Stack, activations(BATCH, TIME, WIDTH))


class Llama(nnx.Module):
    def __init__(self, *, kv=2, group=4, head=10, rngs):
        to = lambda inputs, *shape: nnx.LinearGeneral(inputs, shape, use_bias=False, rngs=rngs)
        self.norm_1, self.norm_2 = (nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.query = to(WIDTH, kv, group, head)
        self.key, self.value = to(WIDTH, kv, head), to(WIDTH, kv, head)
        self.out = nnx.LinearGeneral(
            (kv, group, head), WIDTH, axis=(-3, -2, -1), use_bias=False, rngs=rngs
        )
        self.gate, self.up, self.down = to(WIDTH, FFN), to(WIDTH, FFN), to(FFN, WIDTH)

    def __call__(self, x):  # (batch, time, width)
        h = self.norm_1(x)
        q, k, v = rotary(self.query(h)), rotary(self.key(h)), self.value(h)
        x = x + self.out(grouped_attention(q, k, v, causal(x.shape[1])))
        h = self.norm_2(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


@entry("attention", "gqa", "rope", "swiglu", "silu", "rms_norm", "softmax", "where", "pre_norm")
def nnx_gqa():
    return built(Llama, activations(BATCH, TIME, WIDTH))


class Experts(nnx.Module):
    """Each token goes to its two best experts; the others weigh nothing."""

    def __init__(self, *, experts=5, rngs):
        self.router = nnx.Linear(WIDTH, experts, rngs=rngs)
        self.up = nnx.Einsum("btd,edf->btef", (experts, WIDTH, FFN), (experts, FFN), rngs=rngs)
        self.down = nnx.Einsum("btef,efd->bted", (experts, FFN, WIDTH), rngs=rngs)

    def __call__(self, x):  # (batch, time, width)
        scores, chosen = lax.top_k(self.router(x), 2)
        places = jax.nn.one_hot(
            chosen, self.router.out_features, dtype=x.dtype
        )  # (batch, time, 2, experts)
        weights = jnp.einsum("btk,btke->bte", nnx.softmax(scores), places)
        return jnp.einsum("bte,bted->btd", weights, self.down(nnx.gelu(self.up(x))))


@entry("moe", "top_k", "softmax", "gelu")
def nnx_moe():
    return built(Experts, activations(BATCH, TIME, WIDTH))


class LSTM(nnx.Module):
    def __init__(self, *, rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(WIDTH, FFN, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(FFN, HEAD, rngs=rngs)

    def __call__(self, x):  # (batch, time, width)
        return self.head(self.rnn(x)[:, -1])


@entry("lstm", "scan")
def nnx_lstm():
    key = jax.random.key(1)  # NNX draws the start of a recurrence, though it is zero
    return built(LSTM, activations(BATCH, TIME, WIDTH), key=key)


class Griffin(nnx.Module):
    """A gated linear recurrence, over all times at once."""

    def __init__(self, *, rngs):
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.decay, self.drive = (nnx.Linear(WIDTH, FFN, rngs=rngs) for _ in range(2))
        self.outer = nnx.Linear(FFN, WIDTH, rngs=rngs)

    def __call__(self, x):  # (batch, time, width)
        u = self.norm(x)
        decay = nnx.sigmoid(self.decay(u))
        return x + self.outer(recurrence(decay, (1.0 - decay) * self.drive(u)))


@entry("ssm", "rms_norm")
def nnx_ssm():
    return built(Griffin, activations(BATCH, TIME, WIDTH))


class Gated(nnx.Module):
    """One layer, with an activation that depends on the batch."""

    def __init__(self, *, rngs):
        self.inner = nnx.Linear(WIDTH, FFN, rngs=rngs)
        self.outer = nnx.Linear(FFN, HEAD, rngs=rngs)

    def __call__(self, x):  # (batch, width)
        smooth = lambda layer, x: nnx.gelu(layer(x))
        bounded = lambda layer, x: jnp.tanh(layer(x))
        return self.outer(nnx.cond(x.mean() > 0.0, smooth, bounded, self.inner, x))


@entry("mlp", "cond", "gelu")
def nnx_cond():
    return built(Gated, activations(BATCH, WIDTH))


class Smooth(nnx.Module):
    def __init__(self, *, rngs):
        self.inner = nnx.Linear(WIDTH, FFN, rngs=rngs)
        self.outer = nnx.Linear(FFN, HEAD, rngs=rngs)

    def __call__(self, x):  # (batch, width)
        return self.outer(softplus(self.inner(x)))


@entry("mlp", "custom_jvp")
def nnx_custom_jvp():
    return built(Smooth, activations(BATCH, WIDTH))
