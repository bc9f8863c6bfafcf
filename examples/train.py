"""A language model from text to serving, in one file to copy: `python examples/train.py`.

    text --> batches --> a step that accumulates, in 16 bits where that is fast, on 8-bit weights
         --> checkpoints --> a held-out score --> serving from codes

The model is plain Flax; each line with `us.` is a technique, and any of them can be left out.
"""

import argparse
import functools
import math
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import unitscale_jax as us

WIDTH, HEADS, LAYERS = 64, 4, 2
LENGTH = 64  # bytes in a window, the longest context
ROWS, PARTS = 32, 4  # windows in a batch; micro-batches that it is accumulated from
RATE = 3e-3  # highest learning rate; Adam's usual one for this width
DTYPE = "float32" if jax.default_backend() == "cpu" else "bfloat16"  # CPUs have no bfloat16 units
INT8 = {"**/kernel": us.DotSpec(w=us.QSpec(), x=us.QSpec())}  # kernels, and what meets them


class Block(nnx.Module):
    """Attention to earlier bytes, then two dense layers, each added to the residual stream."""

    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.RMSNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):  # (rows, time, width)
        earlier = nnx.make_causal_mask(x[..., 0])  # (rows, 1, time, time)
        x = x + self.attention(self.norms[0](x), mask=earlier)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class GPT(nnx.Module):
    """Bytes to logits of the next byte."""

    def __init__(self, rngs: nnx.Rngs):
        self.bytes = nnx.Embed(256, WIDTH, rngs=rngs)
        self.places = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm, self.head = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, text):  # int (rows, time) -> (rows, time, 256)
        x = self.bytes(text) + self.places(jnp.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def windows(text, starts):
    """Batches of `LENGTH` bytes and the bytes that follow them."""
    rows = text[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int32)
    return {"text": rows[:, :-1], "next": rows[:, 1:]}  # (rows, time) each


def mean_loss(apply, params, batch):
    """A sum over bytes and their number, per row, so that any split of the rows adds up to it."""
    logits = apply(params, batch["text"]).astype(jnp.float32)
    costs = optax.softmax_cross_entropy_with_integer_labels(logits, batch["next"])
    return us.Mean(total=costs.sum(axis=1), weight=jnp.full(len(costs), float(LENGTH)))


def bits_per_byte(apply, params, text):
    """The score on held-out text: the mean over all its whole windows, in bits."""
    cost = jax.jit(functools.partial(mean_loss, apply))
    starts = np.arange(0, len(text) - LENGTH, LENGTH)
    groups = [starts[i : i + ROWS] for i in range(0, len(starts) - ROWS + 1, ROWS)]
    means = [cost(params, windows(text, group)) for group in groups]
    total = sum(float(mean.total.sum()) for mean in means)
    return total / sum(float(mean.weight.sum()) for mean in means) / math.log(2)


def main(steps):
    """Trains for `steps` steps, then serves; returns bits per byte of text that it never saw."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])  # source code, which every machine has
    files = sorted(library.glob("*.py"))
    train, test = (
        np.frombuffer(b"".join(f.read_bytes() for f in some), np.uint8)
        for some in (files[: -len(files) // 10], files[-len(files) // 10 :])
    )

    # The model as a pure function of its parameters, which stay float32.
    apply, params, _ = us.from_nnx(GPT(nnx.Rngs(0)))
    apply = us.autocast(apply, DTYPE)
    trained = us.quantized(apply, INT8)  # what is trained is what will be served

    # The gradient of a batch, one part at a time, and one step with all that belongs to it.
    grad_fn = us.accumulated(us.value_and_grad(functools.partial(mean_loss, trained)), PARTS)
    rate = optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 10 + 1, steps + 1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    step_fn = jax.jit(us.updated(grad_fn, optimizer), donate_argnums=(0, 1))

    # The loop. A batch is a function of the step, so a resumed run goes on as if it never stopped.
    run = {"params": params, "opt_state": optimizer.init(params)}
    folder = pathlib.Path("runs", "train")
    checkpoints = us.Checkpoints(folder)
    first = 0
    if checkpoints.steps():
        first, run = checkpoints.restore(run)  # a finished run takes no step and is served again
        print(f"step {first:5d}  goes on from {folder}")
    for step in range(first, steps):
        starts = np.random.default_rng(step).integers(0, len(train) - LENGTH, ROWS)
        run["params"], run["opt_state"], mean, _ = step_fn(
            run["params"], run["opt_state"], windows(train, starts)
        )
        if (step + 1) % 100 == 0 or step + 1 == steps:
            bits = float(us.loss_value(mean)) / math.log(2)
            print(f"step {step + 1:5d}  {bits:.3f} bits per byte of the last batch")
            checkpoints.save(step + 1, run)

    # Serving: kernels become codes and scales, and no float of them is left.
    specs = us.quant.resolve(INT8, apply, run["params"], jnp.zeros((1, LENGTH), jnp.int32))
    codes = us.quantize(run["params"], specs)
    score = bits_per_byte(us.quantized(apply), codes, test)
    before, after = (us.tree.nbytes(p) / 1e6 for p in (run["params"], codes))
    print(
        f"served from {after:.2f} MB in place of {before:.2f}: {score:.3f} bits per held-out byte"
    )
    return score


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="training steps (default 500)")
    main(parser.parse_args().steps)
