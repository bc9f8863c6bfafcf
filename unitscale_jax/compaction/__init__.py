"""Compaction: channels, heads, experts and layers leave, and the model is really smaller."""

from unitscale_jax.compaction._ablation import layer_losses, loss_increase
from unitscale_jax.compaction._budget import Bytes, Flops, Params
from unitscale_jax.compaction._compact import channel_masks, compact, expand, zero_channels
from unitscale_jax.compaction._compacted import compacted
from unitscale_jax.compaction._depth import layer_scores, without
from unitscale_jax.compaction._experts import expert_scores
from unitscale_jax.compaction._follow import Followed, follow
from unitscale_jax.compaction._group_activations import activation
from unitscale_jax.compaction._group_scores import l2, taylor
from unitscale_jax.compaction._groups import CompactionPlan, Graph, groups, plan_of
from unitscale_jax.compaction._plan import plan
from unitscale_jax.compaction._plan_file import load_plan, save_plan
from unitscale_jax.compaction._verify import Rebuilt, Verified, verify, verify_rebuild

__all__ = [
    "Bytes",
    "Flops",
    "Followed",
    "Graph",
    "Params",
    "CompactionPlan",
    "Rebuilt",
    "Verified",
    "activation",
    "compact",
    "compacted",
    "expand",
    "expert_scores",
    "follow",
    "groups",
    "l2",
    "layer_losses",
    "layer_scores",
    "load_plan",
    "loss_increase",
    "zero_channels",
    "channel_masks",
    "plan",
    "plan_of",
    "save_plan",
    "taylor",
    "verify",
    "verify_rebuild",
    "without",
]


def __dir__() -> list[str]:
    """What tab completion offers: the public names, and nothing that is imported here."""
    return [*__all__, "__all__", "__doc__", "__name__"]
