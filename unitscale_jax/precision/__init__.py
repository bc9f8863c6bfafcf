"""Mixed precision: dtypes by policy, loss scaling, and weights of 16 bits."""

from unitscale_jax.optimizer import (
    LossScaleState as LossScaleState,
    LowPrecisionState as LowPrecisionState,
)
from unitscale_jax.precision._autocast import autocast as autocast
from unitscale_jax.precision._cast import cast as cast
from unitscale_jax.precision._float16 import (
    Float16Report as Float16Report,
    to_float16 as to_float16,
)
from unitscale_jax.precision._loss_scale import (
    current_scale as current_scale,
    loss_scaled as loss_scaled,
    overflowing as overflowing,
    unless_skipped as unless_skipped,
    unscaled as unscaled,
)
from unitscale_jax.precision._low_precision import low_precision_weights as low_precision_weights
from unitscale_jax.precision._policy import Policy as Policy
from unitscale_jax.precision._scale import (
    DynamicScale as DynamicScale,
    StaticScale as StaticScale,
)
from unitscale_jax.precision._updated import updated as updated
