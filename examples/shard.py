"""Data and tensor parallelism: a training step on eight devices, which a CPU pretends to have.

    python examples/shard.py

`infer` reads from the equations which dimension of each parameter goes over the tensor axis, and
`reduced` sums the gradient over rows once a step, however many micro-batches there are.
"""

import jax

jax.config.update("jax_num_cpu_devices", 8)  # before JAX looks for devices; no effect on others

import jax.numpy as jnp
import optax

import unitscale_jax as us

ROWS, WIDTH, PARTS = 64, 128, 4


def apply(params, x):
    """A residual block: (rows, width) to the same."""
    return x + jax.nn.gelu(x @ params["up"]) @ params["down"]


def loss(params, batch):
    """Half of the squared distance to a target, per row."""
    errors = jnp.sum((apply(params, batch["x"]) - batch["y"]) ** 2, axis=-1) / 2
    return us.Mean(total=errors, weight=jnp.ones(len(errors)))


def main():
    """Prints the layout, what is sent, and the difference; returns the last two."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "up": jax.random.normal(keys[0], (WIDTH, 4 * WIDTH)) / WIDTH**0.5,
        "down": jax.random.normal(keys[1], (4 * WIDTH, WIDTH)) / WIDTH,
    }
    batch = {"x": jax.random.normal(keys[2], (ROWS, WIDTH)), "y": jnp.zeros((ROWS, WIDTH))}
    grad_fn, tx = us.accumulated(us.value_and_grad(loss), PARTS), optax.sgd(0.1)
    one_device, _, _, _ = jax.jit(us.updated(grad_fn, tx))(params, tx.init(params), batch)

    mesh = us.parallel.mesh(dp=2, tp=4)
    layout = us.parallel.infer(apply, params, batch["x"], mesh=mesh)
    print(layout)
    on_mesh = us.parallel.reduced(grad_fn, "dp", zero=2, layout=layout)
    sharded = us.parallel.sharded(tx, layout, layout.over("dp"))
    with jax.set_mesh(mesh):
        placed = us.parallel.shard(params, layout)
        state = sharded.init(placed)
        program = jax.jit(us.updated(on_mesh, sharded)).lower(placed, state, batch).compile()
        many_devices, _, _, _ = program(placed, state, batch)

    sent = [c for c in us.trace.collectives(program, mesh) if c.axes == ("dp",)]
    for collective in sent:
        size = f"{collective.bytes:9,} bytes"
        print(f"{collective.kind:16s} over dp: {size}, in {collective.loops} loops")
    pairs = zip(*map(jax.tree.leaves, (one_device, many_devices)), strict=True)
    difference = max(float(jnp.abs(a - b).max()) for a, b in pairs)
    print(f"largest difference of new parameters from one device: {difference:.0e}")
    return sum(collective.loops for collective in sent), difference


if __name__ == "__main__":
    main()
