"""Unit scaling: an ordinary Flax model whose values and gradients start near 1, in both passes.

    python examples/unit_scaling.py

The model knows nothing of unit scaling. The transform puts a factor between its operations, so that
8-bit floats hold what flows there without statistics and without a loss scale.
"""

import argparse
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import unitscale_jax as us

ROWS, LENGTH, WIDTH, DEPTH, STEPS = 16, 64, 64, 2, 60


class Block(nn.Module):
    """Attention and an MLP, as anybody writes them."""

    @nn.compact
    def __call__(self, x):  # (rows, length, width)
        seen = nn.make_causal_mask(x[..., 0])
        h = nn.LayerNorm(name="norm_1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(h, mask=seen)
        h = nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm(name="norm_2")(x))
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(h))


class Model(nn.Module):
    """A byte-level language model."""

    @nn.compact
    def __call__(self, ids):  # (rows, length)
        x = nn.Embed(256, WIDTH, name="embed")(ids)
        for k in range(DEPTH):
            x = Block(name=f"block_{k}")(x)
        return nn.Dense(256, name="head")(nn.LayerNorm(name="norm")(x))


def batches():
    """Endless rows of real text, the source of a module: (rows, length + 1)."""
    text = np.frombuffer(pathlib.Path(argparse.__file__).read_bytes(), np.uint8).astype(np.int32)
    rng = np.random.default_rng(0)
    while True:
        starts = rng.integers(0, len(text) - LENGTH - 1, ROWS)
        yield jnp.asarray(np.stack([text[i : i + LENGTH + 1] for i in starts]))


def main(plot=None):
    """Prints sizes before and after, and losses in float32 and in fp8; returns both."""
    model, data = Model(), batches()
    first = next(data)
    params = model.init(jax.random.key(0), first[:, :-1])

    def loss(params, ids):
        logits = model.apply(params, ids[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return us.Mean(nats.sum(1), jnp.full(len(ids), float(LENGTH)))

    scaled = us.unit_scaled(loss)
    roles = us.unit.roles(loss, params, first, depth=DEPTH)
    unit_params = us.unit.standardize(params, roles)

    away = {}
    for name, fn, start in (("plain", loss, params), ("unit-scaled", scaled, unit_params)):
        _, scales = us.unit.tracked(fn, format="e5m2")(start, first)
        sizes = [row.rms for row in scales.rows if row.direction == "backward" and row.rms > 0]
        away[name] = float(np.mean(np.abs(np.log2(sizes))))
        print(f"{name:12} gradients are 2^{away[name]:.1f} away from 1 in the mean")
        if plot is not None:
            scales.plot(f"{plot}-{name}.png")

    low = us.quantized(scaled, {"**/kernel": us.quant.fp8})  # scale 1: no amax, no loss scale
    last = {}
    for name, fn in (("float32", scaled), ("fp8", low)):
        last[name] = trained(fn, unit_params, roles)
        print(f"{name:12} cross entropy after {STEPS} steps: {last[name]:.3f}")
    return away, last


def trained(loss, params, roles):
    """The mean loss of the last ten steps of a training."""
    optimizer, data = us.unit.parametrized(optax.scale_by_adam(), roles, 0.25), batches()
    step = jax.jit(us.updated(us.value_and_grad(loss), optimizer))
    opt_state, losses = optimizer.init(params), []
    for _ in range(STEPS):
        params, opt_state, terms, _ = step(params, opt_state, next(data))
        losses.append(float(us.loss_value(terms)))
    return float(np.mean(losses[-10:]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", help="write PLOT-plain.png and PLOT-unit-scaled.png")
    main(parser.parse_args().plot)
