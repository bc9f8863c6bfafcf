"""A transform of one's own on the engine: a mask at every product of a kernel, in forty lines.

    python examples/rewrite.py

`us.trace.rewritten` evaluates a function with some of its equations replaced, through jit, loops,
remat and custom derivatives. A rule gets the equation's site and its operands and returns the list
of its results; `site.bind` is the equation itself.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import unitscale_jax as us


def half_masked(fn):
    """`fn` with every second row of every kernel at zero, in whatever model it is."""

    def rule(site, operands):
        left, kernel = operands
        rows = jnp.arange(kernel.shape[0]) % 2 == 0
        return site.bind([left, jnp.where(rows[:, None], kernel, 0)])

    return us.trace.rewritten(fn, {"dot_general": rule})


def main():
    """Prints and returns the largest difference from zeros that are written into the parameters."""
    model = nnx.Sequential(nnx.Linear(8, 32, rngs=nnx.Rngs(0)), nnx.relu,
                           nnx.Linear(32, 4, rngs=nnx.Rngs(1)))  # fmt: skip
    apply, params, _ = us.from_nnx(model)
    x = jax.random.normal(jax.random.key(0), (16, 8))

    zero = lambda name, leaf: leaf.at[1::2].set(0) if name.endswith("kernel") else leaf
    expected = apply(us.tree.map_named(zero, params), x)
    found = jax.jit(half_masked(apply))(params, x)  # composes with jit, grad, vmap, scan
    difference = float(jnp.abs(found - expected).max())
    print(f"masked inside the function, or in the parameters: difference {difference}")
    return difference


if __name__ == "__main__":
    main()
