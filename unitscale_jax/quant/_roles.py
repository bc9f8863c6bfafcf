"""Which axes of a parameter share a scale: those that the function contracts it over."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from unitscale_jax import rules as named_rules, tree as trees
from unitscale_jax.quant._lsq import is_learned, trained
from unitscale_jax.quant._params import ACTIVATIONS, QuantRules, check_dtype, match
from unitscale_jax.quant._qtensor import has_codes, is_quantized
from unitscale_jax.quant._spec import DotSpec, QSpec
from unitscale_jax.quant._views import logical
from unitscale_jax.trace.params import (
    Meeting,
    Origin,
    input_origins,
    meetings,
    product_of,
    provenance,
    rule_names,
)
from unitscale_jax.trace.program import MOVES, Jaxpr, Site, TracedCall, bodies, sites, trace_call


def resolve(
    rules: QuantRules, fn: Callable[..., Any], params: Any, /, *inputs: Any, **kwargs: Any
) -> Any:
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
    params = _with_axes(params)
    plain = logical((params, *inputs))
    staged = trace_call(fn, *plain, **logical(kwargs))
    return resolved(rules, staged, params, plain[0])


def operands(rules: QuantRules, staged: TracedCall, params: Any) -> dict[str, QSpec | None]:
    """Parameter -> how what it meets is quantized, by rules for a call that is staged."""
    chosen = resolved(rules, staged, params, params)
    return {name: spec.x for name, spec in chosen if spec.w.axes != ACTIVATIONS}


def _with_axes(params: Any) -> Any:
    """A learned parameter as one that is quantized, which has axes."""

    def swap(leaf: Any) -> Any:
        return jax.eval_shape(trained, leaf) if is_learned(leaf) else leaf

    return jax.tree.map(swap, params, is_leaf=trees.is_compound)


def resolved(
    rules: QuantRules, staged: TracedCall, params: Any, plain: Any
) -> list[tuple[Any, DotSpec]]:
    """`resolve` for a call that is staged; `plain` are the parameters as arrays."""
    sources = input_origins(staged, plain)
    names = trees.names(params, is_leaf=is_quantized)
    pairs, others = named_rules.pairs_of(rules), _of_activations(rules, staged, sources, names)
    chosen = match(rules, params, others)
    found = {name: spec for name, spec in chosen.items() if spec is not None}
    known = trees.named_leaves(params, is_leaf=is_quantized)
    for name in found:
        check_dtype(name, known[name].dtype)
    met = meetings(staged, plain)
    lost = [name for name in found if all(m.kind not in _USES for m in met.get(name, []))]
    if lost:
        raise ValueError(_meets_nothing(lost[0], staged, sources))
    out: list[tuple[Any, DotSpec]] = []
    for name, spec in found.items():
        given = known[name].axes if is_quantized(known[name]) else None
        out.append((name, _filled(name, spec, met[name], given)))
    return out + [(pairs[k][0], pairs[k][1].with_axes(ACTIVATIONS)) for k in others]


def _of_activations(
    rules: QuantRules, staged: TracedCall, sources: list[Origin], names: list[str]
) -> list[int]:
    """Numbers of the rules that name no parameter; each must decide on a product of activations."""
    patterns = [pattern for pattern, _ in named_rules.pairs_of(rules)]
    of_params = [
        k for k in range(len(patterns)) if named_rules.first_match(patterns, names, [k]) is not None
    ]
    others = [k for k in range(len(patterns)) if k not in of_params]
    if others:
        items: dict[Any, tuple[str, ...]] = {name: (name,) for name in names}
        items |= activation_products(staged.closed.jaxpr, sources)
        named_rules.decided(rules, items, noun="parameter and product", skip=of_params)
    return others


def activation_products(
    jaxpr: Jaxpr, sources: Sequence[Origin], parent: Site | None = None, body: int = 0
) -> dict[tuple[int, ...], tuple[str, ...]]:
    """Place of each product of two activations -> its addresses, the most telling first."""
    at = provenance(jaxpr, sources, parent, body)
    found = {}
    for site in sites(jaxpr, parent, body):
        operands = at.get(site.place, ())[:2]
        coded = product_of(site) is not None and all(map(has_codes, site.operands[:2]))
        if coded and not any(origin.names for origin in operands):
            found[site.place] = tuple(rule_names(site, operands))
    return found


_USES = ("product", "lookup")


def _meets_nothing(name: str, staged: TracedCall, sources: list[Origin]) -> str:
    """Says that a parameter ends before any product, and in which primitives that are no moves."""
    jaxpr = staged.closed.jaxpr
    at = provenance(jaxpr, sources)
    ends = dict.fromkeys(
        site.name
        for site in sites(jaxpr)
        if not bodies(site.eqn) and site.name not in MOVES
        if any(name in origin.holds for origin in at.get(site.place, ()))
    )
    where = f" (it ends in {', '.join(ends)})" if ends else ""
    return (
        f"a rule names {name}, which meets no product and no lookup in this function{where}; "
        "exclude it, or name the parameter that does."
    )


def _filled(
    name: str, spec: DotSpec, found: list[Meeting], given: tuple[int, ...] | None
) -> DotSpec:
    met = [meeting for meeting in found if meeting.kind in _USES]
    if spec.w.axes is not None or given is not None:
        return spec if spec.w.axes is not None else spec.with_axes(given)
    direct = [meeting for meeting in met if meeting.whole] or met
    kinds = {meeting.contracted: meeting.site.name for meeting in direct}
    if len(kinds) > 1 or not all(meeting.clear and meeting.contracted for meeting in direct):
        listed = "; ".join(f"{each} over {tuple(sorted(axes))}" for axes, each in kinds.items())
        raise ValueError(
            f"{name} is used over different axes ({listed}), and a scale must be constant over "
            "one set. Say which by QSpec(axes=...); the other use folds the scale into what it "
            "meets."
        )
    return spec.with_axes(tuple(sorted(next(iter(kinds)))))
