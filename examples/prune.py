"""Pruning by masks: nine of ten weights go while a model learns, and zeros stay zero.

    python examples/prune.py

`pruned` wraps any optax transform, and its masks live in the optimizer's state. Gradual magnitude
pruning (https://arxiv.org/abs/1710.01878) stands beside removing all of them at once, in the end.
"""

import jax
import jax.numpy as jnp
import optax

import unitscale_jax as us

STEPS, ROWS, WIDTH = 400, 128, 128
SPEC = us.prune.SparsitySpec(patterns={"up": us.prune.Unstructured()}, sparsity=0.9)
SCHEDULES = {
    "dense": None,
    "gradually": us.prune.Cubic(start=50, end=250, every=10),
    "at once, in the end": us.prune.OneShot(STEPS - 1),
}


def apply(params, x):
    """A hidden layer: (rows, 16) to (rows,)."""
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def loss(params, x):
    """The distance to a sum over four of sixteen inputs, for which 8 hidden units are enough."""
    errors = (apply(params, x) - jnp.abs(x[:, :4]).sum(1)) ** 2
    return us.Mean(total=errors, weight=jnp.ones(len(x)))


def trained(schedule):
    """Parameters after all steps, and their loss on rows that were not among them."""
    params = {
        "up": 0.3 * jax.random.normal(jax.random.key(0), (16, WIDTH)),
        "down": 0.1 * jax.random.normal(jax.random.key(1), (WIDTH,)),
    }
    tx = optax.adam(5e-3)
    tx = tx if schedule is None else us.pruned(tx, SPEC, schedule)
    step, opt_state = jax.jit(us.updated(us.value_and_grad(loss), tx)), tx.init(params)
    for k in range(STEPS):
        x = jax.random.normal(jax.random.key(k), (ROWS, 16))
        params, opt_state, _, _ = step(params, opt_state, x)
    fresh = jax.random.normal(jax.random.key(STEPS), (4096, 16))
    return params, float(loss(params, fresh).value)


def main():
    """Prints and returns the loss, and the share of zeros, for each schedule."""
    found = {}
    for name, schedule in SCHEDULES.items():
        params, error = trained(schedule)
        found[name] = error, float((params["up"] == 0).mean())
        print(f"{name:20s} {found[name][1]:4.0%} zeros, loss {error:.4f}")
    return found


if __name__ == "__main__":
    main()
