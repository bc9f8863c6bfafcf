"""Claims: unit-scaled gradients start near 1 at any width and depth; the best learning rate of
u-muP does not move with width; products of 8 bits lose nothing; the factors cost nothing.

The model is the reference decoder of `us.unit.linen`, and beside it the same architecture in the
standard parametrization (kernels of variance 1 / fan-in, one rate for all), on real text: the
source of Python's standard library. Each part prints what it measured, whatever that is.
"""

import functools
import math
import pathlib
import sysconfig

import harness
import jax
import jax.numpy as jnp
import linen_lm
import numpy as np
import optax

import unitscale_jax as us
from unitscale_jax.unit import linen

VOCABULARY, ROWS, LENGTH, HEAD = 256, 16, 64, 16


def text(count=64):
    """The bytes of some files of the standard library."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))[:count]
    return np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8).astype(np.int32)


def decoder(width, layers):
    """`(loss, params)` of the reference decoder."""
    sizes = dict(vocabulary=VOCABULARY, width=width, layers=layers, heads=max(width // HEAD, 1))
    model = linen.Decoder(**sizes, seq_len=LENGTH)

    def loss(params, ids):
        logits = model.apply({"params": params}, ids[:, :-1])
        return us.unit.cross_entropy(logits, ids[:, 1:])

    ids = jnp.zeros((1, LENGTH + 1), jnp.int32)
    return loss, lambda seed: model.init(jax.random.key(seed), ids[:, :-1])["params"]


def standard(width, layers):
    """The same architecture without factors, kernels of variance 1 / fan-in."""
    _, start = decoder(width, layers)
    heads = max(width // HEAD, 1)
    norm = lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)

    def loss(params, ids):
        x = params["embed"]["embedding"][ids[:, :-1]]
        for k in range(layers):
            kernel = {name: leaf["kernel"] for name, leaf in params[f"block_{k}"].items()}
            qkv = (norm(x) @ kernel["qkv"]).reshape(*x.shape[:2], 3, heads, -1)
            q, key, v = jnp.moveaxis(qkv, 2, 0)
            mixed = jax.nn.dot_product_attention(q, key, v, is_causal=True)
            x = x + mixed.reshape(x.shape) @ kernel["out"]
            h = norm(x)
            x = x + (h @ kernel["up"] * jax.nn.silu(h @ kernel["gate"])) @ kernel["down"]
        logits = norm(x) @ params["readout"]["kernel"]
        costs = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return us.Mean(costs.sum(1), jnp.full(len(costs), float(LENGTH)))

    def initial(seed):
        scaled = lambda name, w: w if name.startswith("embed") else w / math.sqrt(w.shape[0])
        return us.tree.map_named(scaled, start(seed))

    return loss, initial


def scale(widths, depths):
    """RMS of the gradients of all kernels when training starts."""
    ids = jax.random.randint(jax.random.key(0), (ROWS, LENGTH + 1), 0, VOCABULARY)
    for name, make in (("unit-scaled", decoder), ("standard", standard)):
        found = {}
        for width in widths:
            for layers in depths:
                loss, start = make(width, layers)
                grads = jax.jit(us.value_and_grad(loss))(start(0), ids)[2]
                sizes = [float(jnp.sqrt(jnp.mean(g * g))) for g in jax.tree.leaves(grads)]
                found[f"{width}x{layers}"] = [round(min(sizes), 5), round(max(sizes), 5)]
        inside = all(low >= 0.25 and high <= 4 for low, high in found.values())
        claimed = inside if name == "unit-scaled" else None
        claim = f"{name}: gradients of all kernels start with RMS in 1/4 .. 4"
        harness.claim(claim, claimed, least_and_largest=found)


def final_losses(loss, params, tx_of, rates, steps, data):
    """The mean of the last 20 losses for each rate."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, ids, rate):
        terms, _, grads = us.value_and_grad(loss)(params, ids)
        updates, state = tx_of(rate).update(grads, state, params)
        return optax.apply_updates(params, updates), state, us.loss_value(terms)

    found = []
    for rate in rates:
        now, state, losses = jax.tree.map(jnp.copy, params), tx_of(rate).init(params), []
        rng = np.random.default_rng(0)
        for _ in range(steps):
            at = rng.integers(0, len(data) - LENGTH - 1, ROWS)
            ids = jnp.asarray(np.stack([data[i : i + LENGTH + 1] for i in at]))
            now, state, value = step(now, state, ids, jnp.float32(rate))
            losses.append(value)
        found.append(float(np.mean(losses[-20:])))
    return found


def optimizer(name, loss, params, layers):
    """`rate -> optax transform`, of u-muP by roles or one Adam for all."""
    if name == "standard":
        return lambda rate: optax.chain(optax.scale_by_adam(), optax.scale(-rate))
    ids = jnp.zeros((1, LENGTH + 1), jnp.int32)
    roles = us.unit.roles(loss, params, ids, depth=layers)
    unit = us.unit.parametrized(optax.scale_by_adam(), roles, 1.0)
    return lambda rate: optax.chain(unit, optax.scale(rate))


def transfer(widths, octaves, steps, data, layers=2):
    """The best rate of each width, and the loss at every rate."""
    for name, make, center in (("u-muP", decoder, 0), ("standard", standard, -7)):
        best, losses = {}, {}
        for width in widths:
            loss, start = make(width, layers)
            rates = [2.0 ** (center + k) for k in octaves]
            params = start(0)
            tx_of = optimizer(name, loss, params, layers)
            found = final_losses(loss, params, tx_of, rates, steps, data)
            losses[width] = [round(x, 3) if math.isfinite(x) else None for x in found]
            best[width] = center + list(octaves)[int(np.nanargmin(found))]
        moved = max(best.values()) - min(best.values())
        supported = moved <= 1 if name == "u-muP" else None
        claim = (
            f"{name}: the best rate moves at most one octave from width {widths[0]} to {widths[-1]}"
        )
        more = dict(log2_rate=best, losses=losses, octaves=[center + k for k in octaves])
        harness.claim(claim, supported, steps=steps, seeds=1, **more)


def rounding(width, steps, data, layers=2):
    """What products of 8 bits cost, without a loss scale."""
    loss, start = decoder(width, layers)
    params = start(0)
    tx_of = optimizer("u-muP", loss, params, layers)
    forms = {"float32": loss, "e4m3fn, e5m2": us.simulated(loss)}
    forms["fp8"] = us.quantized(loss, {"block*/**/kernel": us.quant.fp8})
    found = {n: final_losses(fn, params, tx_of, [0.5], steps, data)[0] for n, fn in forms.items()}
    for name in ("e4m3fn, e5m2", "fp8"):
        lost = found[name] - found["float32"]
        claim = f"{name}: the loss is within 0.02 nats of float32"
        harness.claim(claim, lost < 0.02, lost=round(lost, 4), loss=round(found[name], 4))


def cost(width, rows):
    """What the factors cost in a Flax transformer that nobody edited."""
    model = linen_lm.Language(2, width)
    ids = jnp.zeros((rows, LENGTH), jnp.int32)
    params = model.init(jax.random.key(0), ids)
    loss = linen_lm.loss_of(model.apply)
    costs = []
    for fn in (loss, us.unit_scaled(loss)):
        costs.append(harness.cost(harness.compiled(jax.value_and_grad(fn), params, ids)))
    for key, most in (("flops", 1.01), ("bytes", 1.05)):
        share = harness.ratio(costs[1][key], costs[0][key])
        harness.claim(f"unit_scaled: {key} <= {most}x the plain step", share <= most, ratio=share)


def main():
    options = harness.arguments(__file__, __doc__)
    data = text(4 if options.smallest else 64)
    if options.smallest:
        scale([16], [1])
        transfer([16, 32], range(-1, 1), 20, data, layers=1)
        rounding(16, 20, data, layers=1)
        cost(32, 2)
        return
    scale([64, 256], [2, 8])
    cost(128, 32)
    rounding(64, 300, data)
    transfer([32, 64, 128], range(-4, 5), 120, data)


if __name__ == "__main__":
    main()
