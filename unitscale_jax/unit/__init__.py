"""Unit scaling: values and gradients that start with RMS near 1, and u-muP.

    y = alpha f(x),    gradient of x = beta (df/dx)^T (gradient of y)

The operations here have fixed factors, from shapes alone, that keep activations, weights and
gradients of a model near 1 when training starts. So casts to 8 bits need no statistics, and one
learning rate serves every width.

Unit Scaling: https://arxiv.org/abs/2303.11257; u-muP: https://arxiv.org/abs/2407.17465.
"""

from unitscale_jax.unit import (
    _linen as linen,
    _nnx as nnx,
)
from unitscale_jax.unit._composite import (
    composite,
)
from unitscale_jax.unit._constants import (
    constants,
)
from unitscale_jax.unit._constraint import (
    CONSTRAINTS,
)
from unitscale_jax.unit._multipliers import (
    Multipliers,
    multipliers,
)
from unitscale_jax.unit._ops import (
    add,
    attention,
    conv,
    cross_entropy,
    dropout,
    elementwise,
    embed,
    gelu,
    layer_norm,
    linear,
    matmul,
    mse,
    readout,
    rms_norm,
    silu,
    silu_glu,
    softmax,
)
from unitscale_jax.unit._parametrized import (
    parametrized,
)
from unitscale_jax.unit._residual import (
    residual_add,
    residual_split,
    taus,
)
from unitscale_jax.unit._roles import (
    Role,
    roles,
)
from unitscale_jax.unit._scales import (
    Scales,
)
from unitscale_jax.unit._standardize import (
    standardize,
)
from unitscale_jax.unit._tracked import (
    tracked,
)
from unitscale_jax.unit._transform import (
    unit_scaled,
)

__all__ = [
    "CONSTRAINTS",
    "Multipliers",
    "Role",
    "Scales",
    "add",
    "attention",
    "composite",
    "constants",
    "conv",
    "cross_entropy",
    "dropout",
    "elementwise",
    "embed",
    "gelu",
    "layer_norm",
    "linear",
    "linen",
    "matmul",
    "mse",
    "multipliers",
    "nnx",
    "parametrized",
    "readout",
    "residual_add",
    "residual_split",
    "rms_norm",
    "roles",
    "silu",
    "silu_glu",
    "softmax",
    "standardize",
    "taus",
    "tracked",
    "unit_scaled",
]


def __dir__() -> list[str]:
    """What tab completion offers: the public names, and nothing that is imported here."""
    return [*__all__, "__all__", "__doc__", "__name__"]
