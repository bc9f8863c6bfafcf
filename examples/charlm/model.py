"""The model: a byte-level GPT in plain Flax NNX, and the forms in which it trains and serves."""

import argparse
import functools
import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import unitscale_jax as us

VOCABULARY = 256  # bytes
RECENT = 4  # bytes whose embeddings are added up: see GPT


class Block(nnx.Module):
    """Attention to earlier bytes, then two dense layers, each added to the stream."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        dense = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.heads = heads
        self.norm_1, self.norm_2 = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.qkv = dense(width, 3 * width)
        self.out = dense(width, width)
        self.up = dense(width, 4 * width)
        self.down = dense(4 * width, width)

    def __call__(self, x):  # (rows, time, width)
        qkv = self.qkv(self.norm_1(x))
        q, k, v = (
            part.reshape(*part.shape[:-1], self.heads, -1)  # (rows, time, heads, width / heads)
            for part in jnp.split(qkv, 3, axis=-1)
        )
        mixed = attention(q, k, v)
        x = x + self.out(mixed.reshape(x.shape))
        # The square of a ReLU is as good as a GELU here, and a CPU computes it sooner.
        return x + self.down(jnp.square(nnx.relu(self.up(self.norm_2(x)))))


def attention(q, k, v):
    """Causal attention, (rows, time, heads, size) each.

    By hand, because `jax.nn.dot_product_attention` has no float16 on a CPU.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", q / math.sqrt(q.shape[-1]), k)
    earlier = jnp.tril(jnp.ones(scores.shape[-2:], bool))  # (time, time)
    weights = jax.nn.softmax(jnp.where(earlier, scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class GPT(nnx.Module):
    """Bytes to the scores of the next byte: (rows, time) to (rows, time, 256)."""

    def __init__(self, *, width: int, layers: int, heads: int, length: int, rngs: nnx.Rngs):
        # Tables, not nnx.Embed, whose result has the dtype that the table was made in.
        table = lambda rows, size: nnx.Param(size * jax.random.normal(rngs(), (rows, width)))
        self.recent, self.places = table(RECENT * VOCABULARY, 0.5), table(length, 0.1)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        flat = nnx.initializers.normal(0.02)  # all bytes equally likely: the loss starts at 8 bits
        self.head = nnx.Linear(width, VOCABULARY, use_bias=False, kernel_init=flat, rngs=rngs)

    def __call__(self, text):
        x = embed(self.recent, self.places, text)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def embed(recent, places, text):
    """(rows, time) to (rows, time, width).

    A byte and those just before it, each place with a table of its own: what an n-gram sees is
    there from the first step, and need not be found by attention. Zeros precede a text.
    """
    back = [jnp.pad(text, ((0, 0), (i, 0)))[:, : text.shape[1]] for i in range(RECENT)]
    x = places[: text.shape[1]]
    for i, bytes_before in enumerate(back):
        x = x + recent[VOCABULARY * i + bytes_before]
    return x


def make_model(settings: argparse.Namespace) -> GPT:
    size = dict(width=settings.width, layers=settings.layers, heads=settings.heads)
    return GPT(**size, length=settings.length, rngs=nnx.Rngs(settings.seed))


def losses(logits, following):
    """What each byte costs, in nats: (rows, time, 256) and (rows, time) to f32 (rows, time)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, following.astype(jnp.int32))


def mean_loss(logits, batch):
    costs = losses(logits, batch["next"])
    rows, time = costs.shape
    return {"loss": us.Mean(total=costs.sum(axis=1), weight=jnp.full(rows, float(time)))}


def build(settings: argparse.Namespace):
    """The model as a pure function in the dtypes of `settings.policy`, and its parameters."""
    apply, params, _ = us.from_nnx(make_model(settings))
    if settings.unit_scaled:
        params = us.unit.standardize(params, unit_roles(settings, params))
        scaled = scaled_loss(settings, with_logits=True)
        return lambda params, text: scaled(params, {"text": text, "next": text})[1], params
    return us.autocast(apply, settings.policy), params  # products; norms, softmax stay in float32


def scaled_loss(settings: argparse.Namespace, *, with_logits=False):
    """The loss of the same model, unit-scaled: nothing in the model knows of it.

    Logits are those of the scaled model, so that what is trained is what is served.
    """
    apply, _, _ = us.from_nnx(make_model(settings))
    mesh = settings.mesh or {"data": 1}

    def loss(params, batch):
        logits = apply(params, batch["text"])
        terms = mean_loss(logits, batch)
        return (terms, logits) if with_logits else terms

    # A step has more rows than the loss sees: those of other micro-batches and other devices.
    return us.autocast(
        us.unit_scaled(loss, batch_ratio=settings.parts * mesh["data"]), settings.policy
    )


def unit_roles(settings: argparse.Namespace, params):
    """The role of each parameter, by which u-muP gives it its learning rate."""
    apply, _, _ = us.from_nnx(make_model(settings))
    text = jnp.zeros((1, settings.length), jnp.int32)
    loss = lambda params, text: mean_loss(apply(params, text), {"next": text})
    return us.unit.roles(loss, params, text, depth=settings.layers)


def pieces(settings: argparse.Namespace):
    """The model in three: before its blocks, one block, after them. All see a batch's rows."""
    model = make_model(settings)
    block, norm, head = (us.from_nnx(m)[0] for m in (model.blocks[0], model.norm, model.head))
    first = lambda rest, batch: embed(rest["recent"], rest["places"], batch["text"])
    layer = lambda params, x, _: block(params, x)
    last = lambda rest, x, _: head(rest["head"], norm(rest["norm"], x))
    first, layer, last = (us.autocast(fn, settings.policy) for fn in (first, layer, last))
    return first, us.quantized(layer, QUANTIZE[settings.quantize]), last


# Kernels of the blocks; tables and head keep their precision, as is usual.
_INT4 = us.QSpec(format="int4", group=us.quant.Group(32, scale="integer"))
QUANTIZE = {
    "none": [],
    "int8": [("**/kernel", us.DotSpec(w=us.QSpec(), x=us.QSpec()))],
    "int4": [("**/kernel", us.DotSpec(w=_INT4, x=us.QSpec()))],
    "fp8": [("**/kernel", us.quant.fp8)],
}


def kernel_rules(settings: argparse.Namespace):
    """How the kernels of all blocks are quantized."""
    return [(f"blocks/{pattern}", spec) for pattern, spec in QUANTIZE[settings.quantize]]


def layout_of(settings: argparse.Namespace, params) -> us.parallel.Layout:
    """Which parameters lie over the tensor axis, read from the equations of the model."""
    apply, _ = build(settings)
    text = jnp.zeros((2, settings.length), jnp.int32)
    mesh = us.parallel.mesh(**settings.mesh)
    return us.parallel.infer(apply, params, text, mesh=mesh, mesh_axis="tensor")


def serving(settings: argparse.Namespace, params):
    """The model and its parameters as a server holds them: of kernels codes and scales, no floats.

    On a mesh heads and channels lie over the tensor axis, as they did in training.
    """
    apply, _ = build(settings)
    params, rules = us.parallel.unstack(params), kernel_rules(settings)
    tokens = jnp.zeros((1, settings.length), jnp.int32)
    codes = us.quantize(params, us.quant.resolve(rules, apply, params, tokens)) if rules else params
    if settings.mesh:
        codes = us.parallel.shard(codes, layout_of(settings, params))
    return us.quantized(apply), codes
