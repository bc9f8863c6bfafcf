"""The cost of a function: operations and bytes of its equations, collectives of its program."""

from unitscale_jax.trace.costs._cost import Cost, OpRow, cost
from unitscale_jax.trace.costs._hlo import Collective, collectives
from unitscale_jax.trace.costs._op_cost import OpCost, cost_of

__all__ = [
    "Collective",
    "Cost",
    "OpCost",
    "OpRow",
    "collectives",
    "cost",
    "cost_of",
]
