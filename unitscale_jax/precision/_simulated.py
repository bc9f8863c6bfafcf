"""Products in the arithmetic of a number format, simulated in float32.

    y = round(a, forward) · round(b, forward),    ȳ <- round(ȳ, backward)

No scale and no statistics: values and cotangents are rounded where they are, straight through, as
hardware of that format would round them. What this shows is whether a model survives the format.
Eight-bit training without scales is the claim of unit scaling: https://arxiv.org/abs/2303.11257.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from unitscale_jax import rules as named_rules
from unitscale_jax.errors import check_key, expected, unknown
from unitscale_jax.formats import FORMATS, Format, FormatLike, format_of, round_to
from unitscale_jax.fwd_bwd import round_bwd, straight_through
from unitscale_jax.loss import around
from unitscale_jax.trace.params import (
    ACTIVATION,
    CONSTANT,
    Origin,
    input_origins,
    provenance,
    rule_names,
)
from unitscale_jax.trace.program import PRODUCTS, Jaxpr, Place, Site, sites, trace_call
from unitscale_jax.trace.rewrite import Derivative, Rewriter, dtypes_meant, noted, taking
from unitscale_jax.typing import Key

Rounding: TypeAlias = tuple[FormatLike, FormatLike] | None
"""Formats of the operands and of the cotangent of a product; None leaves the product alone."""


def simulated(
    fn: Callable[..., Any],
    forward: FormatLike = "e4m3fn",
    backward: FormatLike = "e5m2",
    *,
    rules: named_rules.Rules[Rounding] | None = None,
    key: Key | None = None,
) -> Callable[..., Any]:
    """Evaluates `fn` with its products (matrix products and convolutions) rounded to formats.

    Both operands of a product are rounded to `forward`, straight through; the product is computed
    in float32 and has the dtype it had; the cotangent of its result is rounded to `backward`, so
    that both gradients are products of rounded numbers. Values beyond a format saturate.

    Args:
        fn: A function whose first argument is the parameters.
        forward: The format of operands: a `formats.Format`, its name or its dtype.
        backward: The format of cotangents.
        rules: Pairs (pattern, (forward, backward) or None); the first that matches a parameter of
            a product decides on it, None leaves it alone. A product of two activations is
            addressed by its named scope and its kind, `"attention"` or `"dot"`. What no rule names
            has `forward` and `backward`, but for `"attention"`, which stays as it is.
        key: Rounds stochastically; every product has draws of its own, those of one scan share
            them over its turns.

    Returns:
        A function of the signature of `fn`, traced once per call: call it under `jit`.

    Raises:
        ValueError: A format is unknown; or, at the call, a rule decides on no product.
        TypeError: `fn` holds its backward pass already, or `key` is not a typed key.

    Laws: with formats "f32" it is the identity on a float32 function, and adds no equation. Forward
    mode and second derivatives take the rounding straight through. Equations that are no products,
    factors of `fwd_bwd.scale` among them, are not rounded; nor are products on codes, nor those in
    a user's own backward pass.

    Example:
        >>> fn = lambda params, x: x @ params["w"]
        >>> params, x = {"w": jnp.array([[1.1]])}, jnp.array([[500.0]])
        >>> simulated(fn)(params, x).item()  # 448 times 1.125
        504.0
        >>> jax.grad(lambda p: 1.1 * simulated(fn)(p, x)[0, 0])(params)["w"].item()  # 448 times 1
        448.0
    """
    default = _formats("forward, backward", (forward, backward))
    pairs = [
        (pattern, _formats(f"rule {named_rules.text_of(pattern)!r}", value))
        for pattern, value in named_rules.pairs_of(rules or ())
    ]
    if key is not None:
        check_key(key)

    @around(fn, "simulated")
    def simulated_fn(*args: Any, **kwargs: Any) -> Any:
        staged = trace_call(fn, *args, **kwargs)
        plan = _RoundingPlan(default, pairs)
        replay = _Simulated(plan, key)
        origins = input_origins(staged, args[0] if args else ())
        plan.decide(staged.closed.jaxpr, origins)
        results = replay(staged.closed.jaxpr, staged.closed.consts, staged.operands)
        named_rules.decided(pairs, plan.products, noun="product")
        return staged.finish(results)

    return simulated_fn


Formats: TypeAlias = tuple[Format, Format] | None


@dataclass(frozen=True)
class Decision:
    """How one product is rounded (None: it is not), and what decided so."""

    formats: Formats
    why: str


@dataclass
class _RoundingPlan:
    """Decisions by place, made before anything is evaluated."""

    default: Formats
    rules: Sequence[tuple[named_rules.Pattern, Formats]]
    decisions: dict[Place, Decision] = field(default_factory=dict)
    origins: dict[Place, tuple[Origin, ...]] = field(default_factory=dict)
    products: dict[Place, Sequence[str]] = field(default_factory=dict)  # by what rules name them
    entered: set[Place] = field(default_factory=set)  # equations that hold a rounded product

    def decide(
        self,
        jaxpr: Jaxpr,
        sources: Sequence[Origin],
        parent: Site | None = None,
        body: int = 0,
        skip: frozenset[Place] = frozenset(),
    ) -> None:
        """Decides on each product of a program, or of a derived body, but for those of `skip`."""
        self.origins |= provenance(jaxpr, sources, parent, body)
        for site in sites(jaxpr, parent, body):
            if site.name not in PRODUCTS or site.place in skip:
                continue
            self.decisions[site.place] = decision = self._decision(site)
            if decision.formats is not None:
                self.entered |= {site.place[:k] for k in range(1, len(site.place) + 1, 2)}

    def _decision(self, site: Site) -> Decision:
        floats = all(_is_wide_float(dtype) for dtype in site.operands[:2])
        if not floats or dtypes_meant(site):
            return Decision(None, "kept: on codes" if dtypes_meant(site) else "kept: no floats")
        names = self.products[site.place] = rule_names(site, self.origins[site.place][:2])
        rule = named_rules.first_match([pattern for pattern, _ in self.rules], names)
        if rule is not None:
            pattern, formats = self.rules[rule]
            return Decision(formats, f"rule {named_rules.text_of(pattern)!r}")
        if "attention" in names:
            return Decision(None, "kept: attention")
        return Decision(self.default, "default")


class _Simulated(Rewriter):
    """Replays a program with the products of a plan rounded."""

    def __init__(self, plan: _RoundingPlan, key: Key | None) -> None:
        super().__init__({}, self.evaluate)
        self.plan, self.key = plan, key

    def touches(self, site: Site, operands: list[Any]) -> bool:
        del operands
        return site.place in self.plan.entered or site.name.startswith("custom_") or taking()

    def evaluate(self, site: Site, operands: list[Any]) -> list[Any]:
        """An equation without a body: a product as decided, any other as it is."""
        decision = self.plan.decisions.get(site.place)
        if decision is None:
            return site.bind(operands)
        with noted(simulated=_note(decision)):
            if decision.formats is None:
                return site.bind(operands)
            return [self._product(site, operands, *decision.formats)]

    def _product(
        self, site: Site, operands: list[Any], forward: Format, backward: Format
    ) -> jax.Array:
        wide = jnp.promote_types(jnp.result_type(*site.operands[:2], *site.results), jnp.float32)
        keys = self._keys(site)
        pair = [
            _rounded(x if jnp.result_type(x) == wide else jnp.asarray(x, wide), forward, key)
            for x, key in zip(operands[:2], keys, strict=False)
        ]
        (out,) = site.bind([*pair, *operands[2:]], preferred_element_type=wide)
        return round_bwd(out, backward, key=keys[2]).astype(site.results[0])

    def _keys(self, site: Site) -> Sequence[Key | None]:
        """Draws of the two operands and of the cotangent of a product."""
        if self.key is None:
            return [None] * 3
        own = jax.random.fold_in(self.key, zlib.crc32(repr(site.place).encode()))
        return [jax.random.fold_in(own, number) for number in range(3)]

    def derived(self, derivative: Derivative, operands: list[Any]) -> list[Any]:
        """Products of the forward pass are rounded as in the call; a backward pass is the user's.

        A product of a tangent is linear in it, and rounding is not: it stays as it is.
        """
        site, jaxpr = derivative.site, derivative.closed.jaxpr
        if derivative.number == 1:
            own = self.plan.origins.get(site.place, ())
            tangents = len(jaxpr.invars) - len(own)
            primals = [CONSTANT] * len(own)
            at = provenance(jaxpr, [*primals, *[ACTIVATION] * tangents], site, 1)
            linear = frozenset(place for place, by in at.items() if any(o.active for o in by))
            self.plan.decide(jaxpr, [*own, *[ACTIVATION] * tangents], site, 1, linear)
        return super().derived(derivative, operands)


def _rounded(x: jax.Array, format: Format, key: Key | None) -> jax.Array:
    """The number of a format nearest to each, or a neighbour drawn by the key; straight through."""
    if format == FORMATS["f32"] and x.dtype == jnp.float32:
        return x
    return _rounded_through(x, format, key)


@functools.partial(jax.jit, static_argnums=1, inline=True)  # traced once for a shape
def _rounded_through(x: jax.Array, format: Format, key: Key | None) -> jax.Array:
    return straight_through(round_to(x, format, key=key), x)


def _note(decision: Decision) -> str:
    if decision.formats is None:
        return decision.why
    forward, backward = map(_name, decision.formats)
    return f"{forward}, {backward}: {decision.why}"


def _name(format: Format) -> str:
    return next((name for name, known in FORMATS.items() if known == format), str(format))


def _is_wide_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16


def _formats(what: str, value: Any) -> Formats:
    """The formats that a rule, or the arguments, give."""
    if value is None:
        return None
    if not isinstance(value, tuple | list) or len(value) != 2:
        wanted = "a pair (forward, backward) of formats, or None"
        raise ValueError(expected(what, value, wanted))
    forward, backward = (_format(what, each) for each in value)
    return forward, backward


def _format(what: str, given: Any) -> Format:
    try:
        return format_of(given)
    except (ValueError, TypeError):
        raise ValueError(f"{what}: {unknown(given, FORMATS, 'number format')}") from None
