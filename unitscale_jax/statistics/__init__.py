"""Statistics of what meets parameters: one pass over the data for every technique."""

from unitscale_jax.statistics._calibrate import (
    Selects as Selects,
    calibrate as calibrate,
    observed as observed,
)
from unitscale_jax.statistics._measure import Measure as Measure, Operand as Operand
from unitscale_jax.statistics._observe import inputs_of as inputs_of, over_batches as over_batches
from unitscale_jax.statistics._required import (
    check_names as check_names,
    required as required,
    warn_unseen as warn_unseen,
)
from unitscale_jax.statistics._stat import (
    Stat as Stat,
    Stats as Stats,
    merge_stats as merge_stats,
)
