"""A report of the weights that masks leave, parameter by parameter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.prune._masks import paired
from unitscale_jax.tables import Tabular
from unitscale_jax.trace.program import is_concrete
from unitscale_jax.typing import Params


@dataclass(frozen=True)
class ParamSparsity:
    """The number of weights that are left of one parameter.

    Attributes:
        name: Its path.
        kept: How many of its numbers stay.
        size: How many it has.
        masked: Whether it has a mask at all.
    """

    name: str
    kept: int
    size: int
    masked: bool

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are pruned."""
        return 1 - self.kept / self.size if self.size else 0.0


@dataclass(frozen=True)
class SparsityReport(Tabular):
    """The weights that are left of every parameter; printed, a table.

    Attributes:
        rows: One for each parameter, in tree order.
    """

    rows: tuple[ParamSparsity, ...]

    @property
    def total(self) -> ParamSparsity:
        """Total over all parameters, those without a mask included."""
        return _sum("all", self.rows)

    @property
    def masked(self) -> ParamSparsity:
        """Total over the parameters that have a mask."""
        return _sum("masked", [row for row in self.rows if row.masked])

    def cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """One line for each parameter, and two for the totals."""

        def line(row: ParamSparsity) -> list[str]:
            sparsity = f"{row.sparsity:.4f}" if row.masked else "dense"
            return [row.name, f"{row.kept:,}", f"{row.size:,}", sparsity]

        titles = ["parameter", ">kept", ">of", ">sparsity"]
        return titles, [line(row) for row in (*self.rows, self.masked, self.total)]


def report(params: Params, masks: Any) -> SparsityReport:
    """Counts what masks leave of each parameter.

    Args:
        params: A pytree of parameters.
        masks: One like it of concrete bool arrays, as of `prune`.

    Returns:
        A `SparsityReport`.

    Raises:
        ValueError: As `prune`; masks that are traced.
        TypeError: As `prune`.

    Example:
        >>> params = {"w": jnp.ones(4), "b": jnp.ones(2)}
        >>> masks = {"w": jnp.array([True, False, False, False]), "b": jnp.array(True)}
        >>> found = report(params, masks)
        >>> found.masked.sparsity, found.total.kept, found.total.size
        (0.75, 3, 6)
    """
    known = trees.named_leaves(params, is_leaf=trees.is_compound)
    pairs = paired(params, masks).items()
    return SparsityReport(tuple(_share(name, known[name], mask) for name, mask in pairs))


def _share(name: str, leaf: Any, mask: Any) -> ParamSparsity:
    if not is_concrete(mask):
        raise ValueError(f"the mask of {name} is traced; report on masks outside of jit.")
    size, masked = int(np.prod(np.shape(leaf))), bool(np.shape(mask))
    return ParamSparsity(name, int(np.asarray(mask).sum()) if masked else size, size, masked)


def _sum(name: str, rows: Any) -> ParamSparsity:
    kept, size = sum(row.kept for row in rows), sum(row.size for row in rows)
    return ParamSparsity(name, kept, size, True)
