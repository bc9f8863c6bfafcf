"""Pipeline parallelism: eight layers on four devices, and micro-batches that follow each other.

    python examples/pipeline.py

1F1B (https://arxiv.org/abs/1806.03377) runs a backward pass as soon as it can, so the memory of a
stage does not grow with the number of micro-batches; GPipe keeps the input of every one.
"""

import jax

jax.config.update("jax_num_cpu_devices", 8)  # before JAX looks for devices; no effect on others

import jax.numpy as jnp

import unitscale_jax as us

ROWS, WIDTH, LAYERS, STAGES = 2048, 128, 8, 4


def first(rest, batch):
    """What comes before the layers."""
    return batch["x"] @ rest["in"]


def layer(params, x, batch):
    """One of the layers that are divided over devices."""
    del batch
    return x + jnp.tanh(x @ params["kernel"])


def head(rest, x, batch):
    """What comes after the layers."""
    del batch
    return x @ rest["out"]


def loss(output, batch):
    """The squared distance to a target, per row."""
    errors = jnp.mean((output - batch["y"]) ** 2, axis=-1)
    return us.Mean(total=errors, weight=jnp.ones(len(errors)))


def main():
    """Prints and returns the memory of 1F1B and GPipe, and the difference from one device."""
    keys = jax.random.split(jax.random.key(0), LAYERS + 3)
    kernel = lambda key: jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH
    params = {"blocks": {str(i): {"kernel": kernel(keys[i])} for i in range(LAYERS)}}
    params |= {"in": kernel(keys[-3]), "out": kernel(keys[-2])}
    batch = {"x": jax.random.normal(keys[-1], (ROWS, WIDTH)), "y": jnp.ones((ROWS, WIDTH))}

    def whole(params, batch):
        x = first(params, batch)
        for i in range(LAYERS):
            x = layer(params["blocks"][str(i)], x, batch)
        return loss(head(params, x, batch), batch)

    expected = jax.jit(us.value_and_grad(whole))(params, batch)[2]
    stacked = us.parallel.stack(params, "blocks/*", STAGES)
    memory, difference = {}, 0.0
    with jax.set_mesh(us.parallel.mesh(pp=STAGES, devices=jax.devices()[:STAGES])):
        for schedule in ("1f1b", "gpipe"):
            for parts in (8, 32):
                grad_fn = us.parallel.pipelined(
                    first, layer, head, loss, parts=parts, schedule=schedule
                )
                program = jax.jit(grad_fn).lower(stacked, batch).compile()
                memory[schedule, parts] = program.memory_analysis().temp_size_in_bytes
                print(f"{schedule:6s} {parts:3d} parts {memory[schedule, parts] / 1e6:6.2f} MB")
                grads = us.parallel.unstack(program(stacked, batch)[2])
                pairs = zip(*map(jax.tree.leaves, (grads, expected)), strict=True)
                difference = max(difference, *(float(jnp.abs(a - b).max()) for a, b in pairs))
    print(f"largest difference of the gradient from one device: {difference:.0e}")
    return memory, difference


if __name__ == "__main__":
    main()
