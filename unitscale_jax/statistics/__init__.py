"""Statistics of what meets parameters: one pass over the data for every technique."""

from unitscale_jax.statistics._calibrate import Selects, calibrate, observed
from unitscale_jax.statistics._measure import Measure, Operand
from unitscale_jax.statistics._observe import inputs_of as inputs_of, over_batches as over_batches
from unitscale_jax.statistics._required import (
    check_names as check_names,
    required as required,
    warn_unseen as warn_unseen,
)
from unitscale_jax.statistics._stat import Stat, Stats, merge_stats

__all__ = ["Measure", "Operand", "Selects", "Stat", "Stats", "calibrate", "merge_stats", "observed"]


def __dir__() -> list[str]:
    """What tab completion offers: the public names, and nothing that is imported here."""
    return [*__all__, "__all__", "__doc__", "__name__"]
