"""Distillation: losses against a teacher, and features of functions that nobody edited."""

from unitscale_jax.distill._cache import (
    TopK as TopK,
    cache_top_k as cache_top_k,
    kl_top_k as kl_top_k,
    top_k as top_k,
)
from unitscale_jax.distill._capture import features as features
from unitscale_jax.distill._chunked import chunked_kl as chunked_kl
from unitscale_jax.distill._distilled import (
    Term as Term,
    distilled as distilled,
    teacher as teacher,
)
from unitscale_jax.distill._features import (
    attention_scores as attention_scores,
    attention_transfer as attention_transfer,
    cosine as cosine,
    hidden_mse as hidden_mse,
    layer_map as layer_map,
    minilm as minilm,
)
from unitscale_jax.distill._losses import jsd as jsd, kl as kl, reverse_kl as reverse_kl
