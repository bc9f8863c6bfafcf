"""Model parallelism on JAX's own runtime: meshes, layouts, and functions that run on them.

One mesh axis has one owner: manual, inside a `shard_map` of these functions, or automatic, the
partitioner's. The types of varying axes place the transposed collectives.
"""

from unitscale_jax.parallel._launch import initialize, watchdog
from unitscale_jax.parallel.collectives._experts import Load, expert_parallel
from unitscale_jax.parallel.collectives._ring import (
    ring_attention,
)
from unitscale_jax.parallel.collectives._stripe import (
    row_positions,
    stripe,
    unstripe,
)
from unitscale_jax.parallel.collectives._tensor import (
    column,
    enter_sequence,
    exit_sequence,
    ring_matmul,
    ring_scatter,
    row,
)
from unitscale_jax.parallel.collectives._ulysses import (
    ulysses_attention,
)
from unitscale_jax.parallel.collectives._vocabulary import (
    vocab_argmax,
    vocab_embed,
    vocab_logsumexp,
    vocab_loss,
)
from unitscale_jax.parallel.data._data import reduced
from unitscale_jax.parallel.data._feedback import Feedback, feedback
from unitscale_jax.parallel.data._gathered import gathered
from unitscale_jax.parallel.data._optimizer import sharded
from unitscale_jax.parallel.data._rows import global_batch
from unitscale_jax.parallel.layouts._infer import Inferred, Sum, infer
from unitscale_jax.parallel.layouts._layout import Layout, layout, shard
from unitscale_jax.parallel.layouts._mesh import mesh
from unitscale_jax.parallel.layouts._specs import merge_specs, zero_spec
from unitscale_jax.parallel.merge import Packed, merged, pack, unpack
from unitscale_jax.parallel.pipeline._pipeline import Pipelined, pipelined
from unitscale_jax.parallel.pipeline._schedule import Schedule
from unitscale_jax.parallel.pipeline._stack import stack, unstack
from unitscale_jax.parallel.pipeline._stages import Stages

__all__ = [
    "Feedback",
    "Inferred",
    "Layout",
    "Load",
    "Packed",
    "Pipelined",
    "Schedule",
    "Stages",
    "Sum",
    "column",
    "enter_sequence",
    "exit_sequence",
    "expert_parallel",
    "feedback",
    "gathered",
    "global_batch",
    "infer",
    "initialize",
    "layout",
    "merge_specs",
    "merged",
    "mesh",
    "pack",
    "pipelined",
    "reduced",
    "ring_attention",
    "ring_matmul",
    "ring_scatter",
    "row",
    "row_positions",
    "shard",
    "sharded",
    "stack",
    "stripe",
    "ulysses_attention",
    "unpack",
    "unstack",
    "unstripe",
    "vocab_argmax",
    "vocab_embed",
    "vocab_logsumexp",
    "vocab_loss",
    "watchdog",
    "zero_spec",
]


def __dir__() -> list[str]:
    """What tab completion offers: the public names, and nothing that is imported here."""
    return [*__all__, "__all__", "__doc__", "__name__"]
