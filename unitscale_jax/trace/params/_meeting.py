"""An equation that a parameter meets, and what becomes of the parameter's own axes there."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from unitscale_jax.trace.params._product import Product, product_of
from unitscale_jax.trace.program._walk import Site

Own: TypeAlias = frozenset[int]
"""Some of a parameter's own axes, counted from the end."""

Kind: TypeAlias = Literal["product", "lookup", "rows", "sum", "multiplication"]


@dataclass(frozen=True)
class HeldParam:
    """A parameter as an operand holds it.

    Attributes:
        name: Which parameter.
        axes: For each axis of the operand the parameter's own axes in it, counted from the end.
        whole: Whether it was only moved; else it was computed with, element by element.
        cut: Its own axes along which the operand has not each position once, in their order.
    """

    name: str
    axes: tuple[Own, ...]
    whole: bool = True
    cut: Own = frozenset()

    def own(self, dims: Sequence[int]) -> Own:
        """The parameter's own axes in some dimensions of the operand."""
        return frozenset().union(*(self.axes[d] for d in dims))


@dataclass(frozen=True, eq=False)
class Meeting:
    """An equation that a parameter meets, on one side of it.

    Attributes:
        site: Where.
        side: Which operand the parameter is.
        kind: What happens to it: "product" and "lookup"; "rows", a product of rows that a lookup
            took of it, as kernels of experts are; "sum" and "multiplication" of a bias or a gain
            with something that is no parameter.
        held: As what it is there.
        active: Whether an input reaches the other operands, which else are parameters, too.
        stacks: For each scan around, the outer first, the scan and the parameter's axis that it
            runs along, or None.
        fixed: Whether no input reaches the operand itself, as none reaches a kernel.
        first: Whether no parameter reaches the other operands, which are then data as they came.
        last: Whether its result meets no further product, but with what knows no parameter.
    """

    site: Site
    side: int
    kind: Kind
    held: HeldParam
    active: bool = True
    stacks: tuple[tuple[Site, int | None], ...] = ()
    fixed: bool = True
    first: bool = False
    last: bool = True

    @property
    def contracted(self) -> Own:
        """The parameter's own axes that are summed over; of a table those a lookup reads whole."""
        return self.held.own(self._contracted)

    @property
    def channels(self) -> Own:
        """The input channels among `contracted`: all but the window of a convolution."""
        if not self._is_product:
            return self.contracted
        return self.held.own(self._product.channels(self.side))

    @property
    def outputs(self) -> Own:
        """The parameter's own axes that a product's result has and the other operand has not."""
        if not self._is_product:
            return frozenset()
        shared = {*self._contracted, *self._product.batch(self.side)}
        return self.held.own([d for d in range(len(self.held.axes)) if d not in shared])

    @property
    def terms(self) -> int:
        """Number of terms of a result; of a table that of numbers that a lookup reads at once."""
        return math.prod(self.site.shapes[self.side][dim] for dim in self._contracted)

    @property
    def whole(self) -> bool:
        """True if the parameter was only moved on its way there."""
        return self.held.whole

    @property
    def clear(self) -> bool:
        """True if no axis of the parameter is in part summed over, in part not.

        A kernel (6, 4) that is reshaped to (2, 3, 4), of which the 3 is summed over, is not clear:
        its axis of 6 is on both sides.
        """
        summed = self._contracted
        kept = [d for d in range(len(self.held.axes)) if d not in summed]
        return self.contracted.isdisjoint(self.held.own(kept))

    @property
    def derived(self) -> bool:
        """True inside of a function with a custom derivative, which is one of arrays."""
        return any(site.name.startswith("custom_") for site in above(self.site))

    @property
    def _is_product(self) -> bool:
        return self.kind in ("product", "rows")

    @property
    def _product(self) -> Product:
        product = product_of(self.site)
        assert product is not None
        return product

    @property
    def _contracted(self) -> Sequence[int]:
        """Dimensions of the operand that are summed over; of a table those it reads whole."""
        if self._is_product:
            return self._product.contracted(self.side)
        return read_whole(self.site) if self.kind == "lookup" else ()


def read_whole(site: Site) -> list[int]:
    """Dimensions of a table that each row of a lookup (`gather`) has in full."""
    sizes, shape = site.eqn.params["slice_sizes"], site.shapes[0]
    indexed = site.eqn.params["dimension_numbers"].start_index_map
    pairs = enumerate(zip(sizes, shape, strict=True))
    return [dim for dim, (size, full) in pairs if size == full and dim not in indexed]


def above(site: Site) -> Iterator[Site]:
    """The equations whose bodies a site is inside of, the innermost first."""
    while site.parent is not None:
        site = site.parent
        yield site


def single(axes: Own) -> int | None:
    """The only member of a set of axes; None if there are several."""
    return next(iter(axes)) if len(axes) == 1 else None
