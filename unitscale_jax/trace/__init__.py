"""A function seen as dataflow: what every op-level technique of the library is built on.

    program       equations and bodies; the table of primitives; the walk
    rewrite       functions made anew from their equations, with notes for `explain`
    params        where values come from; what each parameter meets
    dimensions    axes that have to be cut together
    costs         operations, bytes, collectives

These names are for transforms of one's own; techniques of the library import from the rooms.
"""

from unitscale_jax.trace.costs import collectives, cost
from unitscale_jax.trace.dimensions import dims
from unitscale_jax.trace.params import meetings, provenance
from unitscale_jax.trace.program import Flow, Site, opaque, trace, trace_call, walk
from unitscale_jax.trace.rewrite import Rewriter, captured, rewritten

__all__ = [
    "Flow",
    "Rewriter",
    "Site",
    "captured",
    "collectives",
    "cost",
    "dims",
    "meetings",
    "opaque",
    "provenance",
    "rewritten",
    "trace",
    "trace_call",
    "walk",
]


def __dir__() -> list[str]:
    """What tab completion offers: the public names, and nothing that is imported here."""
    return [*__all__, "__all__", "__doc__", "__name__"]
