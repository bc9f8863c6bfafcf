"""A layout for tensor parallelism, read from what a function does with its parameters.

    x + gelu(x w1) w2 :    w1 by column, w2 by row, and one sum over devices in each direction

Megatron's layout (Shoeybi et al. 2019, arXiv:1909.08053), found in the coupling graph: a dimension
that kernels make and other kernels sum over, and that nothing needs whole, is divided over the
mesh axis in all its members together. Names are no guide to it: in Linen's
`Dense(d)(gelu(Dense(f)(x)))` the row-parallel layer is `Dense_0`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jax.sharding import AbstractMesh, Mesh, PartitionSpec as P

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_callable, keywords
from unitscale_jax.parallel.layouts._divide import DivisionGraph, divided
from unitscale_jax.parallel.layouts._layout import Layout, Missing, abstract, no_axis
from unitscale_jax.parallel.layouts._meets import DimSet, factors_of
from unitscale_jax.parallel.layouts._specs import WHOLE
from unitscale_jax.trace.dimensions import SymbolicDim, dims
from unitscale_jax.trace.program import Site, trace


def infer(
    fn: Callable[..., Any],
    params: Any,
    /,
    *args: Any,
    mesh: Mesh | AbstractMesh,
    mesh_axis: str = "tp",
    missing: Missing = "error",
    kwargs: Mapping[str, Any] | None = None,
    **named: Any,
) -> "Inferred":
    """Finds the tensor-parallel layout of a function's parameters.

    Args:
        fn: A function of `(params, *args, **named)`: a model or a loss; nothing is run. Not a
            decoding step with a cache, whose heads are an input: the layout of the model serves it
            as well.
        params: Its parameters, arrays or abstract ones; not quantized ones, which follow the
            layout of what they stand for (`Layout.specs_of`).
        args: Inputs like those it will get, with sizes above 1; what is no array is static.
        mesh: Of `mesh`; an abstract one will do to look at a layout.
        mesh_axis: The mesh axis.
        missing: What a mesh without that axis means: an "error", or that everything is "whole".
        kwargs: Keywords of the function that have the name of an option here.
        named: Its other keywords.

    Returns:
        A `Layout` that says of every parameter why it is where it is, and which sums over devices
        are to be expected. A dimension is divided if

        - some kernels make it (column) and others sum over it (row), and none does both;
        - it is no input's, no output's and no residual stream, and nothing mixes its positions;
        - the axis divides it, and its parameters have it as an axis or first in one. Queries, keys
          and values one after the other in an axis are divided too, but then devices hold other
          parts than they need, and activations are rearranged: axes (inputs, 3, heads, dim) or
          three parameters save that;
        - of attention it is the heads, that of queries, keys, values and outputs alike;

        or if it is the vocabulary: the rows of the longest table that tokens are looked up in, and
        outputs of that size. Of two dimensions of one parameter, that of which more bytes of
        parameters are is divided, and the other one nowhere.

    Raises:
        ValueError: Parameters that are quantized; a mesh without the axis.

    Law: any layout computes the same values; this one with one sum over devices for each
    row-parallel product in the forward pass and for each column-parallel one in the backward pass.

    Example:
        >>> params = {"up": jnp.ones((8, 16)), "bias": jnp.ones(16), "down": jnp.ones((16, 8))}
        >>> mlp = lambda p, x: x + jax.nn.gelu(x @ p["up"] + p["bias"]) @ p["down"]
        >>> mesh = us.parallel.mesh(dp=2, tp=4)
        >>> print(us.parallel.infer(mlp, params, jnp.ones((4, 8)), mesh=mesh))
        parameter  shape    spec           bytes  reason
        bias       (16,)    P('tp',)          16  beside: 16 of up:1
        down       (16, 8)  P('tp',)         128  row: 16 of up:1
        up         (8, 16)  P(None, 'tp')    128  column: 16 of up:1
        all                                  272  on each device
        forward sum of (4, 8): down
    """
    check_callable("fn", fn)
    leaves = trees.named_leaves(params, is_leaf=trees.is_compound)
    for name, leaf in leaves.items():
        if trees.is_compound(leaf):
            raise ValueError(
                f"{name} is a {type(leaf).__name__}. Infer the layout of the arrays it was made "
                "from; `specs_of` lays out what goes with them."
            )
    if missing == "error" and mesh_axis not in mesh.shape:
        raise ValueError(no_axis(mesh_axis, mesh))
    traced = trace(fn, params, *args, **named, **keywords(kwargs))
    graph = DivisionGraph(traced, dims(traced), leaves)
    chosen, against = divided(graph, mesh.shape.get(mesh_axis, 1), mesh_axis)
    found = {name: _placed(graph, name, chosen, against, mesh_axis) for name in leaves}
    specs = {name: spec for name, (spec, _) in found.items()}
    reasons = {name: reason for name, (_, reason) in found.items()}
    sums = tuple(_sums(graph, frozenset(chosen)))
    return Inferred(abstract(params), mesh, specs, reasons, sums)


@dataclass(frozen=True)
class Sum:
    """A sum over devices that a layout asks for.

    Attributes:
        direction: Whether the forward pass makes it or the backward one.
        what: The parameters of the product, or what it is otherwise.
        shape: The shape of what is summed, of all rows.
        nbytes: Its bytes.
        times: How often it is made; None if that depends on data.
    """

    direction: Literal["forward", "backward"]
    what: str
    shape: tuple[int, ...]
    nbytes: int
    times: int | None


@dataclass(frozen=True)
class Inferred(Layout):
    """A layout that `infer` has found, with the sums that it costs.

    Attributes:
        sums: Which sums over devices to expect of values and gradients. Sums in the backward pass
            of what is not a product are not among them.
    """

    sums: tuple[Sum, ...] = field(repr=False)

    def below(self) -> Sequence[str]:
        """The sums over devices."""
        times = lambda one: "" if one.times == 1 else f" x {one.times or '?'}"
        return [f"{one.direction} sum of {one.shape}{times(one)}: {one.what}" for one in self.sums]


def _placed(
    graph: DivisionGraph,
    name: str,
    chosen: Sequence[SymbolicDim],
    against: dict[SymbolicDim, str],
    mesh_axis: str,
) -> tuple[P, str]:
    """The spec of a parameter, and the reason for it."""
    axes, own = graph.dims.axes(name), graph.of(name)
    divided = next((factor for factor in chosen if factor in own), None)
    if divided is not None:
        at = next(k for k, terms in enumerate(axes) if divided in factors_of([terms]))
        role = ", ".join(sorted(graph.roles.get((name, divided), {"beside"})))
        terms = f"; {len(axes[at])} terms, rearranged" if len(axes[at]) > 1 else ""
        return P(*[None] * at, mesh_axis), f"{role}: {divided.size} of {graph.name(divided)}{terms}"
    each = dict.fromkeys(factor for terms in axes for term in terms for factor in term)
    why = dict.fromkeys(f"{factor.size}: {against[factor]}" for factor in each)
    return WHOLE, f"whole ({'; '.join(why)})" if why else "whole"


def _sums(graph: DivisionGraph, chosen: DimSet) -> Iterator[Sum]:
    """A result that sums over what is divided, and a gradient that does."""
    for product in graph.meets.products:
        names = sorted({name for side in product.kernels for name in side.params})
        site, what = product.site, ", ".join(names) or "two activations"
        if product.contracted & chosen:
            yield _sum("forward", what, site, site.result_shapes[0])
        for side, other in (product.sides, product.sides[::-1]):
            if other.free & chosen and side.params:
                yield _sum("backward", what, site, side.shape)
    for lookup in graph.meets.lookups:
        if lookup.rows & chosen:
            what = ", ".join(sorted(lookup.tables))
            yield _sum("forward", what, lookup.site, lookup.site.result_shapes[0])
    for site, gone in graph.meets.sums:
        if gone & chosen:
            yield _sum("forward", site.name, site, site.result_shapes[0])


def _sum(
    direction: Literal["forward", "backward"], what: str, site: Site, shape: tuple[int, ...]
) -> Sum:
    return Sum(direction, what, shape, math.prod(shape) * site.results[0].itemsize, site.repeats)
