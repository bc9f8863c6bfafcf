"""A function seen as dataflow: what every op-level technique of the library is built on."""

from unitscale_jax.trace._axes import agree, varying, zeros
from unitscale_jax.trace._compat import ClosedJaxpr, Jaxpr, Literal, varying_axes
from unitscale_jax.trace._function import Staged, Traced, stage, trace
from unitscale_jax.trace._provenance import ACTIVATION, Origin, addresses, parameter, provenance
from unitscale_jax.trace._reach import reach, sliced
from unitscale_jax.trace._rewrite import Rewriter, Rule, Rules, rewritten
from unitscale_jax.trace._walk import Flow, Place, Site, bodies, is_call, sites, walk

__all__ = [
    "ACTIVATION",
    "ClosedJaxpr",
    "Flow",
    "Jaxpr",
    "Literal",
    "Origin",
    "Place",
    "Rewriter",
    "Rule",
    "Rules",
    "Site",
    "Staged",
    "Traced",
    "addresses",
    "agree",
    "bodies",
    "is_call",
    "parameter",
    "provenance",
    "reach",
    "rewritten",
    "sites",
    "sliced",
    "stage",
    "trace",
    "varying",
    "varying_axes",
    "walk",
    "zeros",
]
