"""Claim: casts and loss scaling cost only the casts; float32 masters keep what bfloat16 loses.

On the language model of `lm.py`: the policy cast and autocast against the same model with its dtype
written by hand (and `jmp`, when installed: the extra `bench`); on a Linen transformer, autocast
against Flax's own `dtype=`; a step with `loss_scaled` against the same step
with flax's `DynamicScale`; and 1,000 small steps on bfloat16 weights, with and without a master.
"""

import functools
import importlib.util
import itertools

import harness
import jax
import jax.numpy as jnp
import linen_lm
import lm
import optax
from flax.training.dynamic_scale import DynamicScale

import unitscale_jax as us

BF16 = us.Policy(compute="bfloat16")


def apply(params, tokens):
    """The model in the dtype its parameters arrive in."""
    return lm.apply(params, tokens, params["embed"].dtype)


def loss_of(apply):
    def loss(params, batch):
        log_probs = jax.nn.log_softmax(apply(params, batch["tokens"][:, :-1]))
        costs = -jnp.take_along_axis(log_probs, batch["tokens"][:, 1:, None], -1)[..., 0]
        return us.Mean(jnp.sum(costs * batch["mask"], -1), batch["mask"].sum(-1))

    return loss


def casts(params, batch, runs):
    forms = {
        "float32": apply,
        "cast": us.cast(apply, BF16),
        "autocast": us.autocast(functools.partial(lm.apply, dtype=jnp.float32), "bfloat16"),
        "by_hand": functools.partial(lm.apply, dtype=jnp.bfloat16),
    }
    if importlib.util.find_spec("jmp"):
        forms["jmp"] = _with_jmp()
    grads = {n: lambda p, b, f=f: us.value_and_grad(loss_of(f))(p, b)[2] for n, f in forms.items()}
    programs = {name: harness.compiled(fn, params, batch) for name, fn in grads.items()}
    costs = {name: harness.cost(program) for name, program in programs.items()}
    times = harness.seconds({n: lambda p=p: p(params, batch) for n, p in programs.items()}, runs)
    for ours, theirs in itertools.product(("cast", "autocast"), ("by_hand", "jmp")):
        for key in ("flops", "bytes", "temp_bytes") if theirs in forms else ():
            share = harness.ratio(costs[ours][key], costs[theirs][key])
            harness.claim(f"{ours}: {key} <= 1.01x {theirs}", share <= 1.01, ratio=share)
    harness.claim("gradients in bfloat16", None, seconds=times, costs=costs)


def flax(layers, width, rows, time, runs):
    """Autocast of a Linen model against the same model with `dtype=bfloat16` in every layer."""
    plain = linen_lm.Language(layers, width)
    by_hand = linen_lm.Language(layers, width, dtype=jnp.bfloat16)
    tokens = jax.random.randint(jax.random.key(0), (rows, time), 0, 256)
    params = plain.init(jax.random.key(1), tokens)
    same_softmax = linen_lm.Language(layers, width, dtype=jnp.bfloat16, float32_softmax=True)
    forms = {"float32": plain.apply, "dtype": by_hand.apply, "autocast": us.autocast(plain.apply)}
    forms["float32 softmax"] = same_softmax.apply
    grads = {name: jax.grad(linen_lm.loss_of(apply)) for name, apply in forms.items()}
    programs = {name: harness.compiled(fn, params, tokens) for name, fn in grads.items()}
    costs = {name: harness.cost(program) for name, program in programs.items()}
    times = harness.seconds({n: lambda p=p: p(params, tokens) for n, p in programs.items()}, runs)
    for key in ("flops", "bytes", "temp_bytes"):
        share = harness.ratio(costs["autocast"][key], costs["dtype"][key])
        harness.claim(f"autocast: {key} <= 1.0x Flax's dtype=", share <= 1.0, ratio=share)
    for key in ("bytes", "temp_bytes"):
        share = harness.ratio(costs["autocast"][key], costs["float32 softmax"][key])
        text = f"autocast: {key} <= 1.02x Flax's dtype= with a float32 softmax"
        harness.claim(text, share <= 1.02, ratio=share)
    exact, *low = (programs[name](params, tokens) for name in ("float32", "dtype", "autocast"))
    errors = [float(optax.tree.norm(jax.tree.map(jnp.subtract, g, exact))) for g in low]
    share = harness.ratio(errors[1], errors[0])
    harness.claim("autocast: gradient error <= 1.1x Flax's dtype=", share <= 1.1, ratio=share)
    harness.claim("gradients of the Linen model", None, seconds=times, costs=costs)


def _with_jmp():
    import jmp

    policy = jmp.get_policy("params=float32,compute=bfloat16,output=float32")

    def run(params, tokens):
        return policy.cast_to_output(apply(policy.cast_to_compute(params), tokens))

    return run


def scaling(params, batch, runs):
    """A whole SGD step with momentum, its loss scaled, everything donated but the batch."""
    optimizer = optax.sgd(1e-2, momentum=0.9)
    loss = loss_of(apply)
    grad_fn, tx = us.value_and_grad(loss), us.loss_scaled(optimizer, us.DynamicScale())

    def ours(params, state, batch):
        terms, _, grads = grad_fn(params, batch, scale=us.current_scale(state))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, us.loss_value(terms)

    def theirs(params, state, batch):
        scale, inner = state
        value_and_grad = scale.value_and_grad(lambda p: loss(p, batch).value)
        scale, finite, value, grads = value_and_grad(params)
        updates, after = optimizer.update(grads, inner, params)
        keep = functools.partial(jnp.where, finite)
        params = jax.tree.map(keep, optax.apply_updates(params, updates), params)
        return params, (scale, jax.tree.map(keep, after, inner)), value

    def unscaled(params, state, batch):
        terms, _, grads = grad_fn(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, us.loss_value(terms)

    sides = {
        "loss_scaled": (ours, tx.init(params)),
        "flax": (theirs, (DynamicScale(), optimizer.init(params))),
        "unscaled": (unscaled, optimizer.init(params)),
    }
    programs = {
        name: harness.compiled(step, params, state, batch, donate=(0, 1))
        for name, (step, state) in sides.items()
    }
    costs = {name: harness.cost(program) for name, program in programs.items()}
    times = harness.seconds(
        {n: _stepper(programs[n], params, state, batch) for n, (_, state) in sides.items()}, runs
    )
    temp = harness.ratio(costs["loss_scaled"]["temp_bytes"], costs["flax"]["temp_bytes"])
    text = "loss scaling: temporary memory <= 1.0x flax's DynamicScale"
    harness.claim(text, temp <= 1.0, ratio=temp)
    time = harness.ratio(times["loss_scaled"]["median"], times["unscaled"]["median"])
    harness.claim("loss scaling: time <= 1.05x the unscaled step", time <= 1.05, ratio=time)
    harness.claim("steps with a loss scale", None, seconds=times, costs=costs)


def _stepper(program, params, state, batch):
    holder = jax.tree.map(jnp.copy, [params, state])

    def run():
        holder[0], holder[1], value = program(*holder, batch)
        return value

    return run


def masters(steps):
    """A thousand updates of 0.001 on a weight of 1: where does it end?"""
    optimizer, one = optax.sgd(1.0), jnp.bfloat16(1)
    forms = {
        "stochastic": us.low_precision_weights(optimizer, key=jax.random.key(0)),
        "kahan": us.low_precision_weights(optimizer, "kahan"),
    }
    plain, master = one, jnp.float32(1)
    for _ in range(steps):
        plain = (plain.astype(jnp.float32) + 0.001).astype(jnp.bfloat16)
        master = master + 0.001
    ends = {"plain_bfloat16": float(plain), "float32_master": float(master)}
    for name, tx in forms.items():
        ends[name] = float(jax.jit(functools.partial(_walk, tx, steps))(one))
    text = "float32 masters and 16-bit weights with kept rounding move where plain bfloat16 stands"
    goal = 1 + 0.001 * steps
    others = [v for k, v in ends.items() if k != "plain_bfloat16"]
    moved = all(abs(v - goal) < 0.25 * (goal - 1) + 2**-7 for v in others)
    harness.claim(text, ends["plain_bfloat16"] == 1 and moved, ends=ends)


def _walk(tx, steps, weight):
    def step(carry, _):
        weight, state = carry
        updates, state = tx.update(jnp.float32(-0.001), state, weight)
        return ((weight.astype(jnp.float32) + updates).astype(jnp.bfloat16), state), None

    return jax.lax.scan(step, (weight, tx.init(weight)), None, length=steps)[0][0]


def main():
    options = harness.arguments(__file__, __doc__)
    small = options.smallest
    params = lm.init(jax.random.key(0), layers=1 if small else 4, width=16 if small else 256)
    batch = lm.batch(jax.random.key(1), *((8, 8) if small else (4, 128)))
    casts(params, batch, options.runs)
    flax(*((1, 16, 2, 8) if small else (4, 256, 4, 128)), options.runs)
    scaling(params, batch, options.runs)
    masters(20 if small else 1000)


if __name__ == "__main__":
    main()
