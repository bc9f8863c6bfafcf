"""Statistics of what meets parameters: one pass over the data for every technique."""

from unitscale_jax.statistics._calibrate import (
    Selects,
    calibrate,
    observed,
)
from unitscale_jax.statistics._measure import (
    Measure,
    Operand,
)
from unitscale_jax.statistics._observe import (
    inputs_of,
    over_batches,
)
from unitscale_jax.statistics._required import (
    check_names,
    required,
    warn_unseen,
)
from unitscale_jax.statistics._stat import (
    Stat,
    Stats,
    merge_stats,
)

__all__ = [
    "Measure",
    "Operand",
    "Selects",
    "Stat",
    "Stats",
    "calibrate",
    "check_names",
    "inputs_of",
    "merge_stats",
    "observed",
    "over_batches",
    "required",
    "warn_unseen",
]


def __dir__() -> list[str]:
    """What tab completion offers: the public names, and nothing that is imported here."""
    return [*__all__, "__all__", "__doc__", "__name__"]
