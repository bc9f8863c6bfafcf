"""Quantization: train on 8-bit weights and activations, then serve the very same numbers.

    python examples/quantize.py

One spec says how. In training parameters stay floats and become codes in each call, with
straight-through gradients; `quantize` then makes the codes once, and the function stays the same.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import unitscale_jax as us

STEPS, ROWS, WIDTH = 400, 128, 256
INT8 = {"**/kernel": us.DotSpec(w=us.QSpec(), x=us.QSpec())}


def main():
    """Prints error and bytes; returns how many outputs differ, and the bytes of both models."""
    dense = lambda a, b, seed: nnx.Linear(a, b, rngs=nnx.Rngs(seed))
    model = nnx.Sequential(dense(16, WIDTH, 0), nnx.relu, dense(WIDTH, WIDTH, 1), nnx.relu,
                           dense(WIDTH, 1, 2))  # fmt: skip
    apply, params, _ = us.from_nnx(model)
    trained = us.quantized(apply, INT8)

    def loss(params, x):
        errors = (trained(params, x)[:, 0] - jnp.sin(x.sum(1))) ** 2
        return us.Mean(total=errors, weight=jnp.ones(len(x)))

    optimizer = optax.adam(2e-3)
    step = jax.jit(us.updated(us.value_and_grad(loss), optimizer))
    opt_state, mean = optimizer.init(params), None
    for k in range(STEPS):
        x = jax.random.uniform(jax.random.key(k), (ROWS, 16))
        params, opt_state, mean, _ = step(params, opt_state, x)

    # Rules become specs, one for each parameter: along which axes its scales are shared.
    codes = us.quantize(params, us.quant.resolve(INT8, apply, params, x))
    served = us.quantized(apply)  # no rules: codes say themselves what to do
    outputs = [jax.jit(fn)(p, x) for fn, p in ((trained, params), (served, codes))]
    differ = int((outputs[0] != outputs[1]).sum())
    sizes = us.tree.nbytes(params), us.tree.nbytes(codes)
    print(f"mean square error after {STEPS} steps: {float(us.loss_value(mean)):.4f}")
    print(f"outputs that training and serving have different: {differ} of {ROWS}")
    print(f"bytes: {sizes[0]:,} in floats, {sizes[1]:,} served ({sizes[1] / sizes[0]:.2f})")
    return differ, *sizes


if __name__ == "__main__":
    main()
