"""Compaction: channels leave, the arrays are smaller, and so is the work.

    python examples/compact.py

`groups` reads from the equations which channels belong together; nothing is annotated. The small
model computes what the whole one does with those channels at zero.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

import unitscale_jax as us


class Model(nn.Module):
    """A convolution, its features pooled, and two dense layers: (rows, 8, 8, 3) to (rows, 10)."""

    @nn.compact
    def __call__(self, x):
        """The scores of ten classes."""
        x = nn.relu(nn.Conv(32, (3, 3), name="conv")(x)).mean((1, 2))
        return nn.Dense(10, name="head")(nn.relu(nn.Dense(128, name="hidden")(x)))


def main():
    """Prints sizes and the difference; returns FLOPs of both models and the difference."""
    x = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    model = Model()
    apply, params, _ = us.from_linen(model, model.init(jax.random.key(1), x))

    graph = us.compaction.groups(apply, params, x)
    for group in graph.groups:
        print(f"{group.name:24s} {group.size:4d} channels")
    plan = us.compaction.plan(graph, us.compaction.l2(graph, params), keep=0.5)

    small = us.compact(params, plan)
    small_apply = us.compacted(apply, plan)
    zeroed = us.compaction.zero_channels(params, plan)
    difference = float(jnp.abs(small_apply(small, x) - apply(zeroed, x)).max())
    flops = [
        us.trace.cost(fn, p, x).total.flops for fn, p in ((apply, params), (small_apply, small))
    ]
    print(f"parameters {us.tree.size(params):,} -> {us.tree.size(small):,}")
    print(f"FLOPs {flops[0]:,} -> {flops[1]:,}; largest difference {difference:.1e}")
    return *flops, difference


if __name__ == "__main__":
    main()
