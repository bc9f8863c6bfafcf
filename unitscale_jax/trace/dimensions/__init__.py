"""Dimensions as symbols: which axes of a function have to be cut together, and which are zero."""

from unitscale_jax.trace.dimensions._couplings import Coupled, Record, coupled, settled
from unitscale_jax.trace.dimensions._dims import DimGroup, Dims, Member, Refused, dims
from unitscale_jax.trace.dimensions._factors import (
    Axes,
    SymbolicDim,
    expanded,
    new_axes,
    pin,
    unify,
)

__all__ = [
    "Axes",
    "Coupled",
    "Dims",
    "SymbolicDim",
    "DimGroup",
    "Member",
    "Record",
    "Refused",
    "coupled",
    "dims",
    "expanded",
    "pin",
    "new_axes",
    "settled",
    "unify",
]
