"""Distillation: losses against a teacher, and features of functions that nobody edited."""

from unitscale_jax.distill._cache import TopK, cache_top_k, kl_top_k, top_k
from unitscale_jax.distill._capture import features
from unitscale_jax.distill._chunked import chunked_kl
from unitscale_jax.distill._distilled import Term, distilled, teacher
from unitscale_jax.distill._features import cosine, hidden_mse, layer_map
from unitscale_jax.distill._losses import jsd, kl, reverse_kl

__all__ = [
    "Term",
    "TopK",
    "cache_top_k",
    "chunked_kl",
    "cosine",
    "distilled",
    "features",
    "hidden_mse",
    "jsd",
    "kl",
    "kl_top_k",
    "layer_map",
    "reverse_kl",
    "teacher",
    "top_k",
]


def __dir__() -> list[str]:
    """What tab completion offers: the public names, and nothing that is imported here."""
    return [*__all__, "__all__", "__doc__", "__name__"]
