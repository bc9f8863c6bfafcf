"""Which axes of a parameter share a scale: those that the function contracts it over.

A walk forward follows each parameter through casts, transposes, reshapes, slices and loops to the
products and lookups it meets, and says there which of its own axes are contracted.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from unitscale_jax import rules as named_rules, tree as trees
from unitscale_jax.quantization._params import ACTIVATIONS, Rules, match
from unitscale_jax.quantization._product import product_of
from unitscale_jax.quantization._qtensor import is_quantized
from unitscale_jax.quantization._spec import DotSpec
from unitscale_jax.quantization._views import logical, segments
from unitscale_jax.trace import (
    Flow,
    Origin,
    Site,
    Staged,
    addresses,
    origins,
    provenance,
    sites,
    stage,
    walk,
)

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
    """A product or lookup that a parameter meets: over which axes, and whether as it is."""

    site: Site
    axes: Axes
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
                self._meet(site, inputs[side], product.contracted(side))
            return [()]
        if site.name == "gather":
            dims = _looked_up_whole(site)
            self._meet(site, inputs[0], dims)
            return [()]
        moved = _moved(site, inputs)
        return moved if moved is not None else [()] * len(site.eqn.outvars)

    def _meet(self, site: Site, helds: tuple[Held, ...], contracted: Sequence[int]) -> None:
        for held in helds:
            own = frozenset().union(*(held.axes[dim] for dim in contracted))
            free = [axes for dim, axes in enumerate(held.axes) if dim not in contracted]
            clear = own.isdisjoint(frozenset().union(*free))
            use = Use(site, own, held.whole, clear)
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


def resolve(rules: Rules, fn: Callable[..., Any], params: Any, *inputs: Any, **kwargs: Any) -> Any:
    """Says for each parameter that rules name which of its axes share a scale.

    They are the axes it is contracted over where `fn` uses it; of a table, those a lookup reads
    whole. Nothing is computed.

    Args:
        rules: Pairs (pattern, `DotSpec`). Patterns name parameters; a product of two activations
            goes by its named scope and its kind, `"attention"` or `"dot"`.
        fn: A function whose first argument is the parameters.
        params: Arrays, or their shapes and dtypes.
        *inputs: The rest of the arguments of `fn`, likewise.
        **kwargs: Keywords of `fn`.

    Returns:
        The rules as a list of pairs, one for each parameter by its full name, axes filled; then
        those of products of activations.

    Raises:
        ValueError: A rule matches nothing; a parameter meets no product and no lookup, or meets
            two over different axes.

    Example:
        >>> import unitscale_jax as us
        >>> fn = lambda params, x: jnp.einsum("bd,dhk->bhk", x, params["query"])
        >>> shapes = {"query": jax.ShapeDtypeStruct((8, 2, 4), jnp.float32)}, jnp.ones((3, 8))
        >>> resolve({"**": us.DotSpec()}, fn, *shapes)[0][1].w.axes
        (-3,)
    """
    plain = logical((params, *inputs))
    staged = stage(fn, *plain, **logical(kwargs))
    return resolved(rules, staged, params, plain[0])


def resolved(rules: Rules, staged: Staged, params: Any, plain: Any) -> list[tuple[Any, DotSpec]]:
    """`resolve` for a call that is staged; `plain` are the parameters as arrays."""
    sources = origins(staged, plain)
    names = trees.names(params, is_leaf=is_quantized)
    pairs = list(_of_activations(rules, staged, sources, names))
    kept = [pair for pair in named_rules.pairs_of(rules) if pair[0] not in [p for p, _ in pairs]]
    found = {name: spec for name, spec in match(kept, params).items() if spec is not None}
    uses = _uses(staged, sources)
    known = trees.named_leaves(params, is_leaf=is_quantized)
    given = lambda name: known[name].axes if is_quantized(known[name]) else None
    out = [(name, _filled(name, spec, uses, given(name))) for name, spec in found.items()]
    return out + [(pattern, spec.with_axes(ACTIVATIONS)) for pattern, spec in pairs]


def _of_activations(
    rules: Rules, staged: Staged, sources: list[Origin], names: list[str]
) -> Iterator[tuple[Any, DotSpec]]:
    """The rules that name no parameter, each of which must name a product of activations."""
    pairs = named_rules.pairs_of(rules)
    others = [p for p in pairs if not any(named_rules.matches(p[0], name) for name in names)]
    if not others:
        return
    met = activation_products(staged, sources)
    everything = [*names, *dict.fromkeys(itertools.chain(*met.values()))]
    named_rules.match(pairs, everything, noun="parameter and product")
    yield from others


def activation_products(
    staged: Staged, sources: list[Origin]
) -> dict[tuple[int, ...], tuple[str, ...]]:
    """Place of each product of two activations -> its addresses, the most telling first."""
    jaxpr = staged.closed.jaxpr
    at = provenance(jaxpr, sources)
    found = {}
    for site in sites(jaxpr):
        operands = at.get(site.place, ())[:2]
        if product_of(site) is not None and all(o.parameter is None for o in operands):
            found[site.place] = tuple(addresses(site, operands))
    return found


def _uses(staged: Staged, sources: list[Origin]) -> dict[str, list[Use]]:
    flow, jaxpr = Roles(), staged.closed.jaxpr
    inputs = [_entering(x, origin) for x, origin in zip(staged.operands, sources, strict=True)]
    walk(flow, jaxpr, inputs, staged.closed.consts)
    return {name: list(found.values()) for name, found in flow.uses.items()}


def _entering(x: Any, origin: Origin) -> tuple[Held, ...]:
    if origin.holds is None:
        return ()
    rank = len(x.shape)
    return (Held(origin.holds, tuple(frozenset({k - rank}) for k in range(rank))),)


def _filled(
    name: str, spec: DotSpec, uses: dict[str, list[Use]], given: tuple[int, ...] | None
) -> DotSpec:
    met = uses.get(name, [])
    if not met:
        raise ValueError(
            f"a rule names {name}, which meets no product and no lookup in this function; "
            "exclude it, or name the parameter that does."
        )
    if spec.w.axes is not None or given is not None:
        return spec if spec.w.axes is not None else spec.with_axes(given)
    direct = [use for use in met if use.whole] or met
    kinds = {use.axes: use for use in direct}
    unclear = [use for use in direct if not use.clear or not use.axes]
    if len(kinds) > 1 or unclear:
        listed = "; ".join(
            f"{use.site.name} over {tuple(sorted(use.axes))}" for use in kinds.values()
        )
        raise ValueError(
            f"{name} is used over different axes ({listed}), and a scale must be constant over "
            "one set. Say which by QSpec(axes=...); the other use folds the scale into what it "
            "meets."
        )
    return spec.with_axes(tuple(sorted(next(iter(kinds)))))
