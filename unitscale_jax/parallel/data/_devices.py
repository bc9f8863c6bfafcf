"""Rows as devices hold them, and what comes back from all of them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from unitscale_jax import rules
from unitscale_jax.loss import Mean, Part, Reduction, reduction_of, row_count
from unitscale_jax.mesh_axes import varying, varying_axes


def filled(part: Part, rows: int, n: int) -> Part:
    """Fills rows up to a multiple of n; the added ones repeat the last row and do not count."""
    missing = -rows % n
    if not missing:
        return part

    # The last row in place of zeros, for which a loss or its gradient may not be finite.
    def more(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing, *x.shape[1:]))])

    counted = jnp.ones(rows, bool) if part.valid is None else part.valid
    valid = jnp.concatenate([counted, jnp.zeros(missing, bool)])
    return Part(jax.tree.map(more, part.batch), jax.tree.map(more, part.key), valid)


class Outputs:
    """Auxiliary outputs of all devices: sums leave whole, rows as they lie."""

    def __init__(self, kinds: rules.Rules[str], mesh_axis: str) -> None:
        """Takes rules on the names of outputs, and the mesh axis that holds the rows."""
        self._kinds, self._over = kinds, mesh_axis
        self._reduction: Reduction | None = None

    def check(self, aux: Any, part: Part) -> Reduction:
        """Finds how outputs of these rows combine; raises `ValueError` if one of them cannot."""
        rows = row_count(part.batch)
        reduction = reduction_of(aux, self._kinds, rows, uneven=part.valid is not None)
        if "last" in reduction.kinds:
            raise ValueError(
                "an auxiliary output of kind 'last' would differ between devices, which have seen "
                "other rows. Choose 'mean', as is usual for batch statistics."
            )
        return reduction

    def __call__(self, aux: Any, part: Part) -> tuple[list[Any], list[Any]]:
        """Combines the outputs of this device: `(those that are the same on all devices, rows)`."""
        rows = row_count(part.batch)
        self._reduction = reduction = self.check(aux, part)
        aux = varying(aux, [self._over])
        sums = reduction.step(reduction.start(aux), aux, part.valid)
        whole = [None if x is None else x[None] for x in reduction.kept_whole(aux, None)]
        found = jax.tree.leaves(
            reduction.finish(sums, whole, rows, [self._over]), is_leaf=lambda x: isinstance(x, Mean)
        )
        found = [self._with_one_coef(x) if isinstance(x, Mean) else x for x in found]
        pairs = list(zip(reduction.kinds, found, strict=True))
        return [x for k, x in pairs if k != "concat"], [x for k, x in pairs if k == "concat"]

    def _with_one_coef(self, mean: Mean) -> Mean:
        """A `Mean` whose coefficient is typed as the same on all devices."""
        return Mean(mean.total, mean.weight, same(mean.coef, self._over))

    def outputs(self, sums: list[Any], stacks: list[Any], rows: int) -> Any:
        """Puts outputs together as the loss returned them, without the rows that filled it up."""
        assert self._reduction is not None  # set while the body was traced
        each = {True: iter(x[:rows] for x in stacks), False: iter(sums)}
        found = [next(each[kind == "concat"]) for kind in self._reduction.kinds]
        return jax.tree.unflatten(self._reduction.structure, found)


def total(term: Mean, mesh_axis: str) -> Mean:
    """Adds up a term of the loss over all devices."""
    whole, weight = lax.psum(varying((term.total, term.weight), [mesh_axis]), mesh_axis)
    return Mean(whole, weight, same(term.coef, mesh_axis))


def same(x: jax.Array, mesh_axis: str) -> jax.Array:
    """Types a number that all devices have alike as the same on all of them."""
    return lax.pmax(x, mesh_axis) if mesh_axis in varying_axes(x) else x
