"""Sums over devices that end a product: one product over all of what the devices hold.

    sum_i x_i W_i = [x_1 .. x_n] [W_1; ..; W_n]        y = psum(x @ w, "tp")

Where a sum over manual mesh axes reads the result of an equation and nothing else does, the two are
one equation with a longer contraction. What must be shared along a contraction (a scale) is then
shared by the devices.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
from jax import lax

from unitscale_jax.mesh_axes import varying, varying_axes
from unitscale_jax.trace.program._compat import Jaxpr, Literal
from unitscale_jax.trace.program._walk import Place, Site, bodies

SUMS = frozenset({"psum_invariant", "reduce_scatter"})


@dataclass(frozen=True, eq=False)
class DeviceSum:
    """A sum over manual mesh axes, whole or with each device keeping its part.

    Attributes:
        site: The equation.
    """

    site: Site

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that are summed over."""
        params = self.site.eqn.params
        return tuple(params["axes" if "axes" in params else "axis_name"])

    @property
    def terms(self) -> int:
        """The number of devices that a sum is over."""
        return math.prod(lax.axis_size(axis) for axis in self.axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The sum of other numbers of the same shape, of any dtype."""
        return self.site.bind([x])[0]

    def transposed(self, g: jax.Array) -> jax.Array:
        """The cotangent of what a device adds to the sum."""
        dim = self.site.eqn.params.get("scatter_dimension")
        if dim is None:
            return varying(g, self.axes)
        return lax.all_gather(g, self.axes, axis=dim, tiled=True)

    def part(self, x: jax.Array) -> jax.Array:
        """The device's part of an array that broadcasts against the operand, and is equal on all.

        A `reduce_scatter` leaves each device its slice of the sum; an array like the scale of the
        product is cut alike.
        """
        dim = self.site.eqn.params.get("scatter_dimension")
        if dim is None or x.shape[dim] == 1:
            return x
        size = x.shape[dim] // self.terms
        return lax.dynamic_slice_in_dim(x, lax.axis_index(self.axes) * size, size, dim)


def device_sums(jaxpr: Jaxpr, parent: Site | None = None, body: int = 0) -> dict[Place, DeviceSum]:
    """For each equation whose result is summed over devices, and not read otherwise, that sum.

    Args:
        jaxpr: A traced function, whose `shard_map`s check varying axes (`check_vma=True`, their
            default): without their types a sum may be one of equal numbers.
        parent: The equation it is a body of.
        body: Which one.

    Returns:
        By place, also inside of bodies.
    """
    readers: dict[Any, list[Site | None]] = {}
    for v in jaxpr.outvars:
        readers.setdefault(_key(v), []).append(None)
    for index, eqn in enumerate(jaxpr.eqns):
        for v in eqn.invars:
            readers.setdefault(_key(v), []).append(Site(eqn, index, body, parent))

    found: dict[Place, DeviceSum] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        site = Site(eqn, index, body, parent)
        readers_of = [reader for v in eqn.outvars for reader in readers.get(v, [])]
        if len(readers_of) == 1 and readers_of[0] is not None and _is_sum(readers_of[0]):
            found[site.place] = DeviceSum(readers_of[0])
        for number, (inner, _) in enumerate(bodies(eqn)):
            found |= device_sums(inner, site, number)
    return found


def _key(v: Any) -> Any:
    return None if isinstance(v, Literal) else v


def _is_sum(site: Site) -> bool:
    params = site.eqn.params
    if site.name not in SUMS or len(site.eqn.invars) != 1 or params.get("axis_index_groups"):
        return False
    if not params.get("tiled", True):
        return False
    return varying_axes(site.eqn.invars[0].aval) >= set(DeviceSum(site).axes)
