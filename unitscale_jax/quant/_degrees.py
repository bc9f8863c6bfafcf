"""Degrees: powers of a scale, as linear forms in the powers of the parameters.

    a product adds degrees, a sum needs them equal, a nonlinearity needs them zero

A walk over the function collects the equations, and `solved` finds the powers with which the
scale can be taken out of one parameter and into others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from unitscale_jax.trace.dimensions import Axes, Dims, SymbolicDim
from unitscale_jax.trace.params import Product, product_of
from unitscale_jax.trace.program import ADDITIONS, MOVES, PRODUCTS, Flow, Place, Site

DegreeFactors: TypeAlias = tuple[SymbolicDim, ...]
Degree: TypeAlias = frozenset[tuple[str, int]] | None
"""Coefficients by parameter; None: whatever, as of zero."""
ZERO: Degree = frozenset()


class Rigid(ValueError):  # noqa: N818
    """Channels that nothing can be folded into; the message says what is in the way."""


def unknown(name: str) -> Degree:
    """The degree of a parameter, to be solved for."""
    return frozenset({(name, 1)})


def _combined(a: Degree, b: Degree, times: int) -> Degree:
    """The degree of a product with the power `times`; zero times anything is zero."""
    if a is None or b is None:
        return None
    sums = dict(a)
    for name, n in b:
        sums[name] = sums.get(name, 0) + times * n
    return frozenset((name, n) for name, n in sums.items() if n)


def carries(axes: Axes, factors: frozenset[SymbolicDim]) -> str:
    """Tells how a value has the channels: "once" along axes of their own, "never", or "twice".

    "twice" stands for all that has no single power of the scale: (c, c), some of the channels, or
    an axis that joins them with other positions.
    """
    flat = [f for axis in axes for term in axis for f in term if f in factors]
    clean = [f for axis in axes if len(axis) == 1 for f in axis[0] if f in factors]
    if len(flat) == len(clean) == len(set(flat)) == len(factors):
        return "once"
    return "never" if len(flat) == len(set(flat)) == len(clean) else "twice"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


LINEAR = (
    (MOVES - {"unit_scale_by"})
    | ADDITIONS
    | _names("""
    gather max min neg abs select_n pad dynamic_update_slice reduce_sum reduce_max reduce_min cumsum
    cummax cummin reduce_window_sum reduce_window_max reduce_window_min
""")
)
"""All floating operands that have the channels, and all results, have one degree."""
COMPARISONS = _names("eq ne lt le gt ge sign is_finite")
"""The same of the operands; the result has degree zero."""
_NUMBERS = {"gather": 1, "dynamic_slice": 1, "dynamic_update_slice": 2, "pad": 2}
"""How many of the operands are numbers, where the rest are positions."""


@dataclass
class Degrees(Flow[Degree]):
    """The flow of degrees; `equations` collects (a form that must be zero, because of what)."""

    graph: Dims
    factors: DegreeFactors
    layers: Mapping[Place, SymbolicDim]
    equations: list[tuple[Degree, str]] = field(default_factory=list)

    def require(self, form: Degree, because: str) -> None:
        """Adds the equation that a form is zero, unless it is zero as it stands."""
        if form:
            self.equations.append((form, because))

    def constant(self, value: Any) -> Degree:
        x = np.asarray(value)
        known = x.dtype == bool or np.issubdtype(x.dtype, np.integer)
        return None if not known and x.size and _is_scaleless(x) else ZERO

    def join(self, a: Degree, b: Degree) -> Degree:
        if a is None or b is None:
            return b if a is None else a
        self.require(_combined(a, b, -1), "a branch or a loop")
        return a

    def unstacked(self, site: Site, x: Degree) -> Degree:
        del site
        return x

    def restart(self, site: Site, carry: list[Degree]) -> list[Degree]:
        if site.place in self.layers:  # inside, a scale is that of one layer
            for degree in carry:
                self.require(degree, "the carry of the loop over layers")
        return carry

    def visit(self, site: Site, inputs: list[Degree]) -> list[Degree]:
        """Passes degrees through one equation.

        A degree is meant for values that have the channels on exactly one axis. What has them on
        none cannot be scaled by channel, so its degree must be zero; what has them twice, or all
        layers of a stack at once, has no single power, and its degree must be zero as well.
        """
        ins, outs = self.graph.at(site.place)
        # Inside of a loop over layers the scale is that of one layer: the dimension of layers,
        # which the stacked parameter has, is gone from the channels. A value that still has it
        # holds all layers at once, and no power of one layer's scale is its degree.
        removed = frozenset(self._removed(site))
        factors = frozenset(self.factors) - removed
        had = [carries(axes, factors) for axes in ins]
        has = [carries(axes, factors) for axes in outs]
        met = {f for axes in (*ins, *outs) for axis in axes for term in axis for f in term}
        if not removed.isdisjoint(met) or "twice" in (*had, *has):
            # One such value spoils the equation for all of them. In x x' with the channels on both
            # axes of the result each operand has them once, yet no degree of the operands makes the
            # result a multiple by channel: all must be zero.
            had, has = ["never"] * len(had), ["never"] * len(has)
        known = self._settled(site, inputs, had)
        made = self._made(site, known, ins, factors)
        if len(made) < len(outs):  # one degree, of all results alike
            made = made * len(outs)
        return self._settled(site, made, has)

    def _settled(self, site: Site, degrees: list[Degree], how: list[str]) -> list[Degree]:
        """Degrees where the channels are there once; elsewhere they are required to be zero."""
        pairs = zip(degrees, how, strict=True)
        return [d if one == "once" else self._none(d, site) for d, one in pairs]

    def _removed(self, site: Site) -> Iterator[SymbolicDim]:
        """Dimensions of layers whose loops an equation stands in."""
        while site.parent is not None:
            site = site.parent
            if site.place in self.layers:
                yield self.layers[site.place]

    def _none(self, degree: Degree, site: Site) -> Degree:
        self.require(degree, site.name)
        return None if degree is None else ZERO

    def _made(
        self, site: Site, known: list[Degree], ins: list[Axes], factors: frozenset[SymbolicDim]
    ) -> list[Degree]:
        name = site.name
        if name == "optimization_barrier":
            return known
        # A cast to integers rounds, which is not linear.
        rounds = name == "convert_element_type" and not jnp.issubdtype(
            site.results[0], jnp.floating
        )
        if name in LINEAR and not rounds:
            first = 1 if name == "select_n" else 0  # what selects has degree zero
            for d in known[:first]:
                self.require(d, name)
            return [self._same(known[first : _NUMBERS.get(name)], name)]  # positions have none
        if name in COMPARISONS:
            self._same(known, name)
            return [ZERO]
        if name in ("mul", "unit_scale_by"):
            return [_combined(known[0], known[1], 1)]
        if name == "div":
            return [_combined(known[0], known[1], -1)]
        if name in ("integer_pow", "square"):
            times = 2 if name == "square" else site.eqn.params["y"]
            return [_combined(ZERO, known[0], times)]
        product = product_of(site)
        if product is not None:
            return [self._product(product, known, ins, factors)]
        for d in known:
            self.require(d, name)
        return [ZERO]

    def _same(self, known: Sequence[Degree], name: str) -> Degree:
        definite = [d for d in known if d is not None]
        for d in definite[1:]:
            self.require(_combined(definite[0], d, -1), name)
        return definite[0] if definite else None

    def _product(
        self,
        product: Product,
        known: list[Degree],
        ins: list[Axes],
        factors: frozenset[SymbolicDim],
    ) -> Degree:
        """Degrees add up; over the channels themselves to zero."""
        site = product.site
        if site.eqn.params.get("feature_group_count", 1) != 1:
            for d in known:
                self.require(d, "a grouped convolution")
            return ZERO
        total = _combined(known[0], known[1], 1)
        over = {f for axis in product.contracted(0) for term in ins[0][axis] for f in term}
        if factors & over:
            self.require(total, site.name)
            return ZERO
        return total


def _is_scaleless(x: np.ndarray) -> bool:
    """True if a positive factor changes no number of an array: all are zero or infinite."""
    wide = x.astype(np.float32)
    return bool(((wide == 0) | np.isinf(wide)).all())


def solved(name: str, equations: Sequence[tuple[Degree, str]]) -> dict[str, int]:
    """Solves for the powers of the scale, that of `name` being one.

    Gauss-Jordan elimination in fractions. A row says what its pivot is in terms of the parameters
    that are still free: {"gain": {"w": -1}} means d_gain = -d_w. In the end those that are free are
    set to zero, but for `name`: the scale is folded into no more parameters than it has to be.

    Args:
        name: The parameter that the scale is taken out of.
        equations: Forms that are zero, each with its cause, in the order of the program.

    Returns:
        Parameter -> its power, of those that are not zero.

    Raises:
        Rigid: The power of `name` must be zero, another one is a fraction, or no power is negative,
            so that nothing produces what the scale is taken from.
    """
    rows: dict[str, dict[str, Fraction]] = {}
    causes: list[str] = []
    for form, because in equations:
        causes.append(because)
        row = _reduced({path: Fraction(n) for path, n in form or ()}, rows)
        others = sorted(path for path in row if path != name)
        if not row:
            continue
        if not others:  # `name` alone is left: its power would be zero
            raise Rigid(_in_the_way(causes))
        pivot = others[0]
        scaled = {path: -n / row[pivot] for path, n in row.items() if path != pivot}
        for path, held in rows.items():  # earlier rows lose the new pivot
            rows[path] = _reduced(held, {pivot: scaled})
        rows[pivot] = scaled
    powers = {path: row.get(name, Fraction(0)) for path, row in rows.items()} | {name: Fraction(1)}
    broken = [path for path, power in powers.items() if power.denominator > 1]
    if broken:
        raise Rigid(f"{broken[0]} would take a root of the scale")
    degrees = {path: int(power) for path, power in powers.items() if power}
    if min(degrees.values()) > 0:
        raise Rigid("no parameter produces its channels")
    return degrees


def _in_the_way(causes: Sequence[str]) -> str:
    """Names what keeps a scale from passing.

    That is the last cause, products aside: a product only hands on what the nonlinearity before or
    after it demands.
    """
    found = [cause for cause in causes if cause not in PRODUCTS]
    return f"in the way: {found[-1]}" if found else "no parameter before it has its channels"


def _reduced(
    row: Mapping[str, Fraction], rows: Mapping[str, Mapping[str, Fraction]]
) -> dict[str, Fraction]:
    """A form with every pivot replaced by its row."""
    out: dict[str, Fraction] = {}
    for path, n in row.items():
        for other, m in rows.get(path, {path: Fraction(1)}).items():
            out[other] = out.get(other, Fraction(0)) + n * m
    return {path: n for path, n in out.items() if n}
