"""Pruning: masks, and compaction into a really smaller model."""

from unitscale_jax.prune._groups import (
    Graph as Graph,
    Plan as Plan,
    groups as groups,
    plan_of as plan_of,
)
