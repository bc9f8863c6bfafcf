"""Functions that know nothing of manual mesh axes, evaluated where there are some.

Inside `shard_map` a loop's carry has one type throughout, and one that begins with zeros, the same
on every device, and goes on with rows that differ is refused. A model written for one device has
many such loops. Traced as on one device it has none: its equations are then evaluated with every
value typed as differing over the axes, which is what a function of a device's rows computes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from unitscale_jax.mesh_axes import varying
from unitscale_jax.trace.program._function import trace_call
from unitscale_jax.trace.program._walk import Site, bodies
from unitscale_jax.trace.rewrite._rewrite import Rewriter


def as_on_one_device(fn: Callable[..., Any], *args: Any, axes: Sequence[str]) -> Callable[..., Any]:
    """Traces a function where no axis is manual, to be called where some are.

    Args:
        fn: A function of pytrees, without collectives over `axes`.
        args: Arguments like those it will get, on one device; abstract ones will do.
        axes: The mesh axes that will be manual.

    Returns:
        A function of such arguments, to be called inside of `shard_map`. All its results are typed
        as differing over `axes`.

    Example:
        >>> total = lambda x: jax.lax.fori_loop(0, len(x), lambda i, t: t + x[i], jnp.float32(0))
        >>> local = as_on_one_device(total, jnp.ones(2), axes=["dp"])
        >>> P = jax.sharding.PartitionSpec
        >>> of_all = lambda x: jax.lax.psum(local(x), "dp")
        >>> mesh = us.parallel.mesh(dp=8)
        >>> jax.shard_map(of_all, mesh=mesh, in_specs=P("dp"), out_specs=P())(jnp.ones(16)).item()
        16.0
    """
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        call = trace_call(fn, *args)  # without a mesh, whose axes would have another type here

    def local_fn(*args: Any) -> Any:
        leaves = jax.tree.leaves((args, {}))
        operands = [leaves[k] for k in call.positions]
        closed = call.closed
        return call.finish(_Caster(axes)(closed.jaxpr, closed.consts, operands))

    return local_fn


class _Caster(Rewriter):
    """Replays equations on values that all differ over some axes."""

    def __init__(self, axes: Sequence[str]) -> None:
        super().__init__({})
        self._axes, self._mesh = axes, jax.sharding.get_abstract_mesh()

    def touches(self, site: Site, operands: list[Any]) -> bool:
        """True if there are equations inside, whose types change as well."""
        del operands
        return bool(bodies(site.eqn))

    def step(self, site: Site, operands: list[Any]) -> Sequence[Any]:
        with jax.sharding.use_abstract_mesh(self._mesh):  # not that of where it was traced
            return super().step(site, self._cast(operands))

    def __call__(self, *args: Any) -> list[Any]:
        """Results of equations, of a loop's turn too, so that it returns what it was given."""
        return self._cast(super().__call__(*args))

    def _cast(self, values: Sequence[Any]) -> list[Any]:
        return [varying(jax.numpy.asarray(x), self._axes) for x in values]
