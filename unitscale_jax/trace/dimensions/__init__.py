"""Dimensions as symbols: which axes of a function have to be cut together, and which are zero."""

from unitscale_jax.trace.dimensions._couplings import (
    Coupled,
    Record,
    coupled,
    settled,
)
from unitscale_jax.trace.dimensions._dims import (
    DimGroup,
    Dims,
    Member,
    Refused,
    dims,
)
from unitscale_jax.trace.dimensions._factors import (
    Axes,
    Factor,
    expanded,
    mark,
    new_axes,
    unify,
)

__all__ = [
    "Axes",
    "Coupled",
    "Dims",
    "Factor",
    "DimGroup",
    "Member",
    "Record",
    "Refused",
    "coupled",
    "dims",
    "expanded",
    "mark",
    "new_axes",
    "settled",
    "unify",
]
