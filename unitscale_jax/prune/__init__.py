"""Pruning: masks, and compaction into a really smaller model."""

from unitscale_jax.optimizer import MaskedState as MaskedState
from unitscale_jax.prune._ablation import (
    layer_losses as layer_losses,
    loss_increase as loss_increase,
)
from unitscale_jax.prune._allocate import (
    erk as erk,
    global_ as global_,
    kept as kept,
    owl as owl,
    uniform as uniform,
)
from unitscale_jax.prune._budget import Bytes as Bytes, Flops as Flops, Params as Params
from unitscale_jax.prune._compact import (
    compact as compact,
    expand as expand,
    mask as mask,
    masks as masks,
)
from unitscale_jax.prune._compacted import compacted as compacted
from unitscale_jax.prune._depth import layer_scores as layer_scores, without as without
from unitscale_jax.prune._experts import expert_scores as expert_scores
from unitscale_jax.prune._follow import Followed as Followed, follow as follow
from unitscale_jax.prune._group_activations import activation as activation
from unitscale_jax.prune._group_scores import l2 as l2, taylor as taylor
from unitscale_jax.prune._groups import (
    Graph as Graph,
    Plan as Plan,
    groups as groups,
    plan_of as plan_of,
)
from unitscale_jax.prune._masked import masked as masked, masks_of as masks_of
from unitscale_jax.prune._masks import prune as prune, with_masks as with_masks
from unitscale_jax.prune._movement import (
    Scored as Scored,
    add_scores as add_scores,
    movement_masked as movement_masked,
    movement_masks as movement_masks,
    movement_penalty as movement_penalty,
)
from unitscale_jax.prune._packed import (
    Bits as Bits,
    Packed as Packed,
    pack as pack,
    packed as packed,
    unpack as unpack,
)
from unitscale_jax.prune._patterns import (
    Balanced as Balanced,
    Block as Block,
    Channel as Channel,
    NofM as NofM,
    Unstructured as Unstructured,
)
from unitscale_jax.prune._plan import plan as plan
from unitscale_jax.prune._plan_file import load_plan as load_plan, save_plan as save_plan
from unitscale_jax.prune._refit import refit as refit
from unitscale_jax.prune._report import SparsityReport as SparsityReport, report as report
from unitscale_jax.prune._resolve import resolve as resolve
from unitscale_jax.prune._rigl import rigl as rigl, set_ as set_
from unitscale_jax.prune._schedules import (
    Cubic as Cubic,
    Linear as Linear,
    OneShot as OneShot,
    Steps as Steps,
)
from unitscale_jax.prune._scores import (
    FisherState as FisherState,
    Score as Score,
    fisher as fisher,
    magnitude as magnitude,
    movement as movement,
    random as random,
    saliency as saliency,
)
from unitscale_jax.prune._select import (
    exact_k as exact_k,
    exact_k_of as exact_k_of,
    n_of_m as n_of_m,
)
from unitscale_jax.prune._sparsegpt import (
    SparseGPTReport as SparseGPTReport,
    sparsegpt as sparsegpt,
)
from unitscale_jax.prune._spec import (
    SparsitySpec as SparsitySpec,
    make_masks as make_masks,
)
from unitscale_jax.prune._straight import (
    magnitude_masks as magnitude_masks,
    sr_ste as sr_ste,
    straight_through as straight_through,
)
from unitscale_jax.prune._verify import (
    Rebuilt as Rebuilt,
    Verified as Verified,
    verify as verify,
    verify_rebuild as verify_rebuild,
)
from unitscale_jax.prune._wanda import (
    owl_ratios as owl_ratios,
    wanda as wanda,
    wanda_masks as wanda_masks,
)
from unitscale_jax.statistics import calibrate as calibrate
