"""Mixed precision: bfloat16 products inside any function, float32 where rounding would hurt.

    python examples/autocast.py

`autocast` rewrites the equations of a function, so this plain JAX attention needs no `dtype=`.
`explain` lists what became of each product, and the gradients stay float32, like the parameters.
"""

import collections

import jax
import jax.numpy as jnp

import unitscale_jax as us

ROWS, TIME, WIDTH = 8, 64, 128


def attention(params, x):
    """One head of causal attention, (rows, time, width) to the same."""
    q, k, v = (x @ params[name] for name in ("query", "key", "value"))
    scores = q @ k.swapaxes(-1, -2) / jnp.sqrt(WIDTH)
    earlier = jnp.tril(jnp.ones((TIME, TIME), bool))
    return jax.nn.softmax(jnp.where(earlier, scores, -jnp.inf)) @ v


def main():
    """Prints dtypes, memory and error; returns the products in bfloat16 and the relative error."""
    names = ("query", "key", "value")
    keys = dict(zip(names, jax.random.split(jax.random.key(0), 3), strict=True))
    params = {name: jax.random.normal(keys[name], (WIDTH, WIDTH)) / WIDTH**0.5 for name in names}
    x = jax.random.normal(jax.random.key(1), (ROWS, TIME, WIDTH))
    lowered = us.autocast(attention, "bfloat16")

    report = us.explain(lowered)(params, x)
    dtypes = collections.Counter(row.operands[0] for row in report.products.rows)
    print(f"products by the dtype of their operands: {dict(dtypes)}")

    loss = lambda apply: lambda params: jnp.mean(apply(params, x).astype(jnp.float32) ** 2)
    found, expected = (jax.jit(jax.grad(loss(fn)))(params) for fn in (lowered, attention))
    error = max(
        float(jnp.linalg.norm(found[name] - expected[name]) / jnp.linalg.norm(expected[name]))
        for name in names
    )
    print(f"gradients are {found['query'].dtype}, within {error:.1%} of those in float32")
    return dict(dtypes), error


if __name__ == "__main__":
    main()
