"""A function seen as dataflow: what every op-level technique of the library is built on."""

from unitscale_jax.trace._axes import agree, varying, zeros
from unitscale_jax.trace._capture import Capture, captured
from unitscale_jax.trace._compat import (
    ClosedJaxpr,
    Jaxpr,
    Literal,
    dtype_of,
    varying_axes,
)
from unitscale_jax.trace._cost import Cost, Row, cost
from unitscale_jax.trace._dims import Dims, Group, dims
from unitscale_jax.trace._function import Staged, Traced, stage, trace
from unitscale_jax.trace._notes import noted, notes_at, scope_without_notes, taking, taking_notes
from unitscale_jax.trace._op_cost import OpCost, cost_of
from unitscale_jax.trace._provenance import (
    ACTIVATION,
    Origin,
    addresses,
    origins,
    parameter,
    provenance,
)
from unitscale_jax.trace._reach import reach, sliced
from unitscale_jax.trace._rewrite import Rewriter, Rule, Rules, rewritten
from unitscale_jax.trace._walk import (
    Flow,
    Place,
    Site,
    bodies,
    is_call,
    is_constant,
    opaque,
    producers,
    sites,
    walk,
)

__all__ = [
    "ACTIVATION",
    "Capture",
    "ClosedJaxpr",
    "Cost",
    "Dims",
    "Flow",
    "Group",
    "Jaxpr",
    "Literal",
    "OpCost",
    "Origin",
    "Place",
    "Rewriter",
    "Row",
    "Rule",
    "Rules",
    "Site",
    "Staged",
    "Traced",
    "addresses",
    "agree",
    "bodies",
    "captured",
    "cost",
    "cost_of",
    "dims",
    "dtype_of",
    "is_call",
    "is_constant",
    "noted",
    "notes_at",
    "opaque",
    "origins",
    "parameter",
    "producers",
    "provenance",
    "reach",
    "rewritten",
    "scope_without_notes",
    "sites",
    "sliced",
    "stage",
    "taking",
    "taking_notes",
    "trace",
    "varying",
    "varying_axes",
    "walk",
    "zeros",
]
