"""Parameters as the operands of products and lookups hold them, axis by axis.

A walk forward follows each parameter through casts, transposes, reshapes, slices and loops to the
products and lookups it meets, and says there which of its own axes are contracted. Quantization
takes from it which axes share a scale, N:M pruning along which axis its groups run.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from unitscale_jax.trace._function import Staged
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
    """

    name: str
    axes: tuple[Axes, ...]
    whole: bool = True


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
            own_axes = lambda dims, held=held: frozenset().union(*(held.axes[d] for d in dims))
            own = own_axes(contracted)
            free = own_axes([d for d in range(len(held.axes)) if d not in contracted])
            use = Use(site, own, own_axes(channels), held.whole, own.isdisjoint(free))
            self.uses.setdefault(held.name, {})[site.place] = use


def _looked_up_whole(site: Site) -> list[int]:
    """Dimensions of a table that a lookup reads whole."""
    sizes, shape = site.eqn.params["slice_sizes"], site.shapes[0]
    indexed = site.eqn.params["dimension_numbers"].start_index_map
    pairs = enumerate(zip(sizes, shape, strict=True))
    return [dim for dim, (size, full) in pairs if size == full and dim not in indexed]


_IN_PLACE = frozenset(
    [
        "convert_element_type",
        "copy",
        "copy_p",
        "stop_gradient",
        "sharding_constraint",
        "name",
        "reduce_precision",
        "slice",
        "dynamic_slice",
        "split",
        "rev",
    ]
)


def _moved(site: Site, inputs: list[tuple[Held, ...]]) -> list[tuple[Held, ...]] | None:
    name, params = site.name, site.eqn.params
    none: Axes = frozenset()
    if name == "optimization_barrier":
        return inputs
    if name == "concatenate":
        return [tuple(dict.fromkeys(itertools.chain(*inputs)))]
    if name == "stack":
        at, every = params["axis"], dict.fromkeys(itertools.chain(*inputs))
        new = lambda axes: (*axes[:at], none, *axes[at:])
        return [tuple(replace(held, axes=new(held.axes)) for held in every)]
    change: Callable[[tuple[Axes, ...]], tuple[Axes, ...]] | None = None
    if name in _IN_PLACE:
        change = lambda axes: axes
    elif name == "transpose":
        change = lambda axes: tuple(axes[k] for k in params["permutation"])
    elif name == "squeeze":
        change = lambda axes: tuple(a for k, a in enumerate(axes) if k not in params["dimensions"])
    elif name == "broadcast_in_dim":
        where = params["broadcast_dimensions"]
        rank = len(params["shape"])
        change = lambda axes: tuple(
            axes[where.index(k)] if k in where else none for k in range(rank)
        )
    elif name == "reshape":
        change = lambda axes: _reshaped(site, axes)
    if change is not None:
        moved = tuple(replace(held, axes=change(held.axes)) for held in inputs[0])
        return [moved] * len(site.eqn.outvars)
    return _computed(site, inputs)


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


def _reshaped(site: Site, axes: tuple[Axes, ...]) -> tuple[Axes, ...]:
    old, new = site.shapes[0], site.result_shapes[0]
    out: list[Axes] = [frozenset()] * len(new)
    for before, after in segments(old, new):
        joined = frozenset().union(*(axes[k] for k in before if old[k] > 1))
        for k in after:
            out[k] = joined if new[k] > 1 else frozenset()
    return tuple(out)


def uses(staged: Staged, sources: Sequence[Origin]) -> dict[str, list[Use]]:
    """The products and lookups that each parameter meets in a call; `sources` as of `origins`."""
    flow = Roles()
    walk(flow, staged.closed.jaxpr, entering(staged, sources), staged.closed.consts)
    return {name: list(found.values()) for name, found in flow.uses.items()}


def entering(staged: Staged, sources: Sequence[Origin]) -> list[tuple[Held, ...]]:
    """What the operands of a call hold: a parameter itself, or none."""
    return [_entering(x, origin) for x, origin in zip(staged.operands, sources, strict=True)]


def _entering(x: Any, origin: Origin) -> tuple[Held, ...]:
    if origin.holds is None:
        return ()
    rank = len(np.shape(x))
    return (Held(origin.holds, tuple(frozenset({k - rank}) for k in range(rank))),)


def segments(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The shortest runs of axes of two shapes that have the same size; axes of size 1 alone.

    Example:
        >>> list(segments((6, 4, 5), (2, 3, 20)))
        [([0], [0, 1]), ([1, 2], [2])]
    """
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = list(range(i, i + 1))[: len(old) - i], list(range(j, j + 1))[: len(new) - j]
        if 0 in (*old, *new):
            before, after = list(range(i, len(old))), list(range(j, len(new)))
        size = lambda shape, axes: math.prod(shape[k] for k in axes)
        while size(old, before) != size(new, after):
            if size(old, before) < size(new, after):
                before.append(i + len(before))
            else:
                after.append(j + len(after))
        yield before, after
        i, j = i + len(before), j + len(after)
