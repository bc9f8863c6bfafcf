"""Micro-batches: the gradient of a large batch, one part at a time, in the memory of one part.

    python examples/accumulate.py

Rows have different numbers of tokens, so a mean of the means of parts would be wrong. The loss
returns a sum and a count, and the accumulated gradient is that of the whole batch.
"""

import jax
import jax.numpy as jnp

import unitscale_jax as us

ROWS, LENGTH, WIDTH, PARTS = 256, 16, 256, 8


def loss(params, batch):
    """Squares of errors over the tokens that count: per row their sum, and how many they are."""
    hidden = jax.nn.gelu(batch["x"] @ params["up"])  # (rows, time, 4 width): most of the memory
    errors = jnp.mean((hidden @ params["down"] - batch["x"]) ** 2, axis=-1)  # (rows, time)
    return us.Mean(total=(errors * batch["mask"]).sum(1), weight=batch["mask"].sum(1))


def main():
    """Prints memory and differences; returns both memories and the largest difference."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "up": 0.05 * jax.random.normal(keys[0], (WIDTH, 4 * WIDTH)),
        "down": 0.05 * jax.random.normal(keys[1], (4 * WIDTH, WIDTH)),
    }
    lengths = jax.random.randint(keys[2], (ROWS, 1), 1, LENGTH)
    batch = {
        "x": jax.random.normal(keys[3], (ROWS, LENGTH, WIDTH)),
        "mask": (jnp.arange(LENGTH) < lengths).astype(jnp.float32),
    }
    whole = us.value_and_grad(loss)
    in_parts = us.accumulated(whole, PARTS)

    programs = {name: jax.jit(fn).lower(params, batch).compile() for name, fn in
                (("whole", whole), ("in parts", in_parts))}  # fmt: skip
    memory = {name: p.memory_analysis().temp_size_in_bytes for name, p in programs.items()}
    grads = [program(params, batch)[2] for program in programs.values()]
    difference = max(
        float(jnp.abs(a - b).max() / jnp.abs(a).max())
        for a, b in zip(*map(jax.tree.leaves, grads), strict=True)
    )
    for name, size in memory.items():
        print(f"{name:10s} {size / 1e6:7.1f} MB of temporary memory")
    print(
        f"{memory['whole'] / memory['in parts']:.1f} times less, gradients within {difference:.0e}"
    )
    return memory["whole"], memory["in parts"], difference


if __name__ == "__main__":
    main()
