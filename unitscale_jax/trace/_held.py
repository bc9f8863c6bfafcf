"""Parameters as the operands of products and lookups hold them, axis by axis.

A walk forward follows each parameter through casts, transposes, reshapes, slices and loops to the
products and lookups it meets, and says there which of its own axes are contracted. Quantization
takes from it which axes share a scale, N:M pruning along which axis its groups run.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from unitscale_jax.trace._function import Staged
from unitscale_jax.trace._primitives import IN_PLACE, cut_axes, moved, moved_axes
from unitscale_jax.trace._product import product_of
from unitscale_jax.trace._provenance import Origin
from unitscale_jax.trace._walk import Flow, Site, walk

Axes = frozenset[int]


@dataclass(frozen=True)
class Held:
    """A parameter as an operand holds it.

    Attributes:
        name: Which parameter.
        axes: For each axis of the operand the parameter's own axes in it, counted from the end.
        whole: Whether it was only moved; else it was computed with, element by element.
        cut: Its own axes along which the operand has not all positions in their order.
    """

    name: str
    axes: tuple[Axes, ...]
    whole: bool = True
    cut: Axes = frozenset()


@dataclass(frozen=True)
class Use:
    """A product or lookup that a parameter meets.

    Attributes:
        site: Where.
        axes: Which of the parameter's own axes it sums over; of a lookup, those it reads whole.
        channels: Those of `axes` that are input channels: all but the window of a convolution.
        whole: Whether the parameter was only moved on its way there.
        clear: Whether no axis is in part summed over, in part not.
    """

    site: Site
    axes: Axes
    channels: Axes
    whole: bool
    clear: bool


@dataclass
class Roles(Flow[tuple[Held, ...]]):
    """The flow of parameters; `uses` collects what they meet."""

    uses: dict[str, dict[tuple[int, ...], Use]] = field(default_factory=dict)

    def constant(self, value: Any) -> tuple[Held, ...]:
        """A constant holds none."""
        del value
        return ()

    def join(self, a: tuple[Held, ...], b: tuple[Held, ...]) -> tuple[Held, ...]:
        """Either of two values."""
        return a if set(b) <= set(a) else tuple(dict.fromkeys((*a, *b)))

    def unstacked(self, site: Site, x: tuple[Held, ...]) -> tuple[Held, ...]:
        """One row of a stack."""
        del site
        return tuple(replace(held, axes=held.axes[1:]) for held in x)

    def stacked(self, site: Site, y: tuple[Held, ...]) -> tuple[Held, ...]:
        """Rows that were stacked again are followed no further."""
        del site, y
        return ()

    def visit(self, site: Site, inputs: list[tuple[Held, ...]]) -> list[tuple[Held, ...]]:
        """Records a product or a lookup; everything else moves axes, or computes."""
        product = product_of(site)
        if product is not None:
            for side in (0, 1):
                dims = product.contracted(side), product.channels(side)
                self._meet(site, inputs[side], *dims)
            return [()]
        if site.name == "gather":
            dims = _looked_up_whole(site)
            self._meet(site, inputs[0], dims, dims)
            return [()]
        moved = _moved(site, inputs)
        return moved if moved is not None else [()] * len(site.eqn.outvars)

    def _meet(
        self,
        site: Site,
        helds: tuple[Held, ...],
        contracted: Sequence[int],
        channels: Sequence[int],
    ) -> None:
        for held in helds:
            own = _own(held, contracted)
            free = _own(held, [d for d in range(len(held.axes)) if d not in contracted])
            use = Use(site, own, _own(held, channels), held.whole, own.isdisjoint(free))
            self.uses.setdefault(held.name, {})[site.place] = use


def _looked_up_whole(site: Site) -> list[int]:
    """Dimensions of a table that a lookup reads whole."""
    sizes, shape = site.eqn.params["slice_sizes"], site.shapes[0]
    indexed = site.eqn.params["dimension_numbers"].start_index_map
    pairs = enumerate(zip(sizes, shape, strict=True))
    return [dim for dim, (size, full) in pairs if size == full and dim not in indexed]


def _moved(site: Site, inputs: list[tuple[Held, ...]]) -> list[tuple[Held, ...]] | None:
    """What the results of a move hold; of anything else, see `_computed`."""
    sources = moved(site, inputs)
    if sources is None:
        return _computed(site, inputs)
    if site.name in IN_PLACE:
        return [values[0] for values in sources]
    axes, cut = moved_axes(site), cut_axes(site)
    laid_out = lambda held: replace(
        held,
        axes=tuple(_own(held, of) for of in axes),
        cut=held.cut | _own(held, cut),
    )
    return [tuple(map(laid_out, dict.fromkeys(itertools.chain(*values)))) for values in sources]


def _own(held: Held, dims: Sequence[int]) -> Axes:
    """The parameter's own axes in some dimensions of an operand."""
    return frozenset().union(*(held.axes[d] for d in dims))


def _computed(site: Site, inputs: list[tuple[Held, ...]]) -> list[tuple[Held, ...]] | None:
    """Element by element, as far as shapes tell: a kernel with a mask or a low-rank update."""
    if len(site.eqn.outvars) != 1:
        return None
    shape = site.result_shapes[0]
    same = [
        held
        for own, helds in zip(site.shapes, inputs, strict=True)
        for held in helds
        if own == shape
    ]
    return [tuple(replace(held, whole=False) for held in same)] if same else None


def uses(staged: Staged, sources: Sequence[Origin]) -> dict[str, list[Use]]:
    """The products and lookups that each parameter meets in a call; `sources` as of `origins`."""
    flow = Roles()
    walk(flow, staged.closed.jaxpr, entering(staged, sources), staged.closed.consts)
    return {name: list(found.values()) for name, found in flow.uses.items()}


def entering(staged: Staged, sources: Sequence[Origin]) -> list[tuple[Held, ...]]:
    """What the operands of a call hold: a parameter itself, or none."""
    return [_entering(x, origin) for x, origin in zip(staged.operands, sources, strict=True)]


def _entering(x: Any, origin: Origin) -> tuple[Held, ...]:
    if origin.parameter is None:
        return ()
    rank = len(np.shape(x))
    return (Held(origin.parameter, tuple(frozenset({k - rank}) for k in range(rank))),)
