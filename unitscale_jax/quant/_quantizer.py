"""The replay on codes: what each equation does when a parameter is a `QTensor`.

Products multiply codes and moves move them. An equation that neither does gets the array back, and
the account says of which parameter and why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from unitscale_jax import rules as named_rules
from unitscale_jax.fwd_bwd import straight_through
from unitscale_jax.quant._cache import appended
from unitscale_jax.quant._contract import ProductReport, activation, axes_of, multiply
from unitscale_jax.quant._gradient import draw
from unitscale_jax.quant._left import Account, Unquantized, arrays_of
from unitscale_jax.quant._ops import round_and_cast
from unitscale_jax.quant._qtensor import (
    LIKE_SCALE,
    QTensor,
    has_codes,
    integer_codes,
    is_quantized,
    value_of,
)
from unitscale_jax.quant._roles import activation_products
from unitscale_jax.quant._served import Unquantizable
from unitscale_jax.quant._spec import DotSpec
from unitscale_jax.quant._views import partitioned, refusal, view
from unitscale_jax.trace.params import (
    ACTIVATION,
    CONSTANT,
    DeviceSum,
    Origin,
    Product,
    above,
    device_sums,
    product_of,
    provenance,
)
from unitscale_jax.trace.program import PRODUCTS, ClosedJaxpr, Jaxpr, Place, Site, dtype_of
from unitscale_jax.trace.rewrite import (
    Derivative,
    Rewriter,
    as_traced,
    noted,
    taking as notes_are_taken,
)
from unitscale_jax.typing import Key


def _first_matches(
    pairs: Sequence[tuple[Any, DotSpec]], met: Mapping[Place, Sequence[str]]
) -> dict[Place, DotSpec]:
    """The spec of each product of activations that a rule names."""
    patterns = [pattern for pattern, _ in pairs]
    first = {place: named_rules.first_match(patterns, names) for place, names in met.items()}
    return {place: pairs[k][1] for place, k in first.items() if k is not None}


@dataclass(frozen=True)
class DeviceSummed:
    """The result of a product on its way to a sum over devices that was made in integers."""

    total: Any


class Quantizer(Rewriter):
    """Replays a program with codes in place of parameters."""

    def __init__(
        self,
        activations: Sequence[tuple[Any, DotSpec]],
        key: Key | None,
        sums: Mapping[Place, DeviceSum],
        account: Account,
    ) -> None:
        super().__init__({}, self.evaluate)
        self.of_activations, self.key, self.account = activations, key, account
        self.sums = dict(sums)
        self.activations: dict[Place, DotSpec] = {}
        self.entered: set[Place] = set()  # equations with such a product inside
        self.linear: set[Place] = set()  # equations of tangents
        self.kept: dict[Place, list[bool]] = {}
        self._find_activations(account.jaxpr, account.sources)

    def _find_activations(
        self, jaxpr: Jaxpr, sources: Sequence[Origin], parent: Site | None = None, body: int = 0
    ) -> None:
        if self.of_activations:
            met = activation_products(jaxpr, sources, parent, body)
            found = _first_matches(self.of_activations, met)
            self.activations |= found
            self.entered |= {place[:k] for place in found for k in range(1, len(place) + 1, 2)}

    def touches(self, site: Site, operands: list[Any]) -> bool:
        quantized = any(isinstance(x, QTensor | DeviceSummed) for x in operands)
        return quantized or site.place in self.entered or notes_are_taken()

    def master(self, operand: Any) -> Any:
        """Gradients of codes go to the float array beside them."""
        return operand.master if is_quantized(operand) else operand

    def derived(self, derivative: Derivative, operands: list[Any]) -> list[Any]:
        """Products of the forward pass are of codes, as in the call; those of gradients of floats.

        So a gradient is the user's rule's, at the values served. What the rule keeps of a parameter
        for it is kept as codes.
        """
        site, closed = derivative.site, derivative.closed
        if derivative.number == 2:
            return super().derived(derivative, _typed(arrays_of(operands), closed))
        self._forward(site, closed, len(derivative.moving.before))
        out = super().derived(derivative, _typed(operands, closed))
        count = len(site.eqn.outvars)
        alone = [replace(x, master=None) if is_quantized(x) else x for x in out[count:]]
        return [*self.returned(site, out[:count]), *alone]

    def _forward(self, site: Site, closed: ClosedJaxpr, tangents: int) -> None:
        """Takes down what a derivative's equations are of, before they are replayed.

        They are none of the function's equations, so the walks over those have not seen them: sums
        over devices, products of activations, and origins are found here. Equations that a tangent
        reaches must stay linear in it, so these are replayed on arrays.
        """
        self.account.bodies.append((site, closed.jaxpr))
        self.sums |= device_sums(closed.jaxpr, site, 1)
        rest = [ACTIVATION] * tangents
        if self.of_activations:
            own = self.account.origins(site)
            self._find_activations(closed.jaxpr, [*own, *rest], site, 1)
        if tangents:  # a product of integers is not linear in a tangent
            primals = [CONSTANT] * len(site.eqn.invars)
            at = provenance(closed.jaxpr, [*primals, *rest], site, 1)
            self.linear |= {place for place, by in at.items() if any(o.active for o in by)}

    def step(self, site: Site, operands: list[Any]) -> Sequence[Any]:
        if site.place in self.linear and site.name.startswith("custom_"):
            return site.bind(arrays_of(operands))
        return super().step(site, operands)

    def evaluate(self, site: Site, operands: list[Any]) -> list[Any]:
        """Evaluates an equation without a body, by codes where it has some."""
        if any(isinstance(x, DeviceSummed) for x in operands):
            return [x.total for x in operands]
        if site.place in self.linear:
            return site.bind(arrays_of(operands))
        product = product_of(site, operands[2:])
        if product is not None and self._multiplies(site, operands):
            return [self._product(product, operands)]
        if not any(map(is_quantized, operands)):
            if site.name not in PRODUCTS:
                return site.bind(operands)
            with noted(quantize="kept: no rule" if product is not None else "kept: no floats"):
                return site.bind(operands)
        made = self._special(site, operands)
        if made is not None:
            return made
        with noted(quantize=f"kept: no rule for {site.name}"):
            why = refusal(site) if product is None else _too_wide(site)
            return site.bind(self.arrays(site, operands, why))

    def _special(self, site: Site, operands: list[Any]) -> list[Any] | None:
        if site.name == "gather":
            return _looked_up(site, operands)
        if site.name == "dynamic_update_slice":
            return appended(operands)
        return view(site, operands)

    def _multiplies(self, site: Site, operands: list[Any]) -> bool:
        chosen = any(map(is_quantized, operands[:2])) or site.place in self.activations
        return chosen and all(map(has_codes, site.operands[:2]))

    def _product(self, product: Product, operands: list[Any]) -> Any:
        site, (left, right) = product.site, operands[:2]
        spec, across = self.activations.get(site.place), self.sums.get(site.place)
        codes = [is_quantized(x) for x in (left, right)]
        bits = [jnp.finfo(dtype).bits for dtype in (*site.operands[:2], product.dtype)]
        low = bits[2] <= max(bits[:2])  # else the user asked for a wider result
        with noted(quantize=str(spec or _spec_of(left, right))), as_traced(low=low):
            if spec is not None and not codes[1]:
                right = activation(product, 1, right, spec.w, over=axes_of(across))
            spec = spec or _spec_of(left, right)
            try:
                own = draw(self.key, site.place)
                out, verdict = multiply(product, left, right, spec, own, across=across)
            except Unquantizable as error:
                raise ValueError(f"{self.account.named(site)} {error}") from None
        # Scales of groups may cross a sum by design; of whole axes they were given wrongly.
        grouped = any(is_quantized(x) and x.groups > 1 for x in (left, right))
        self._judge(site, verdict, spec, [held and (grouped or not verdict.kept) for held in codes])
        return DeviceSummed(out) if verdict.across else out

    def _judge(
        self, site: Site, verdict: ProductReport, spec: DotSpec, codes: Sequence[bool]
    ) -> None:
        if verdict.kept:
            self.account.left.append(Unquantized(site, verdict.kept.removeprefix("kept: ")))
        self.account.reached += [(site, side) for side in (0, 1) if codes[side]]
        own = any(parent.name.startswith("custom_") for parent in above(site))
        users = ("the derivative is the user's own",) if own and spec.g is not None else ()
        why = users or verdict.backward
        self.account.left += [Unquantized(site, reason, backward=True) for reason in why]

    def arrays(self, site: Site, operands: Sequence[Any], why: str) -> list[Any]:
        """Operands with arrays for whatever is quantized, which is reported."""
        if any(map(is_quantized, operands)):
            self.account.left.append(Unquantized(site, why))
        return arrays_of(operands)

    def carried(self, site: Site, carry: list[Any], step: Any) -> list[Any]:
        """A carry stays quantized if the body makes the like of it: a cache that is appended to."""
        while any(map(is_quantized, carry)):
            pairs = list(zip(carry, step(carry), strict=True))
            changed = [is_quantized(c) and not _alike(c, new) for c, new in pairs]
            if not any(changed):
                break
            dropped = [c for c, gone in zip(carry, changed, strict=True) if gone]
            self.arrays(site, dropped, "a loop's carry")
            carry = [value_of(c) if gone else c for c, gone in zip(carry, changed, strict=True)]
        self.kept[site.place] = [is_quantized(c) for c in carry]
        return carry

    def returned(self, site: Site, results: list[Any]) -> list[Any]:
        """Branches and shards return arrays, loops what they carry, calls whatever there is."""
        if site.name in ("scan", "while"):
            kept = self.kept[site.place]
            kept = [*kept, *[False] * (len(results) - len(kept))]
            return [
                x if keep else self.arrays(site, [x], f"a result of {site.name}")[0]
                for x, keep in zip(results, kept, strict=True)
            ]
        if site.name in ("cond", "shard_map"):
            return self.arrays(site, results, f"a result of {site.name}")
        return results

    def sliced(self, site: Site, operand: Any) -> Any:
        """Rows that share a scale, or the range of what meets them, have one of their own each."""
        if not is_quantized(operand):
            return operand
        first, rows = -operand.ndim, operand.shape[0]
        if operand.groups > 1 and max(operand.axes) == first:
            return self.arrays(site, [operand], "a group spans several rows")[0]
        if operand.input_range is not None and operand.input_range.ndim == 1:
            operand = replace(operand, input_range=jnp.broadcast_to(operand.input_range, (rows, 2)))
        if first not in operand.axes:
            return operand

        def change(name: str, x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(x, (rows, *x.shape[1:])) if name in LIKE_SCALE else x

        axes = tuple(axis for axis in operand.axes if axis != first)
        return replace(operand, code_sums=None).over(change, axes=axes)

    def entering(self, operand: Any, placement: Any) -> Any:
        """Drops sums of codes over an axis that a `shard_map` cuts; each shard makes its own."""
        if not is_quantized(operand) or operand.code_sums is None:
            return operand
        entries = [*placement, *[None] * (operand.ndim - len(placement))]
        cut = any(entries[axis] is not None for axis in operand.axes)
        return replace(operand, code_sums=None) if cut else operand

    def partitioned(self, operand: Any, placement: Any) -> Any:
        """Codes as the array was, scales likewise but for the axes that share one."""
        if not is_quantized(operand) or placement is None:
            return placement
        if isinstance(placement, PartitionSpec):
            return partitioned(operand, placement)
        if isinstance(placement, NamedSharding):
            specs = partitioned(operand, placement.spec)
            return specs.over(lambda _, spec: NamedSharding(placement.mesh, spec))
        return None


def _too_wide(site: Site) -> str:
    """Says why a product is not of codes: the other operand has a dtype without codes."""
    dtypes = ", ".join(str(dtype) for dtype in site.operands[:2])
    return f"its operands are {dtypes}, and floats of at most 32 bits meet codes"


def _typed(operands: Sequence[Any], closed: ClosedJaxpr) -> list[Any]:
    """Operands in the dtypes that a derived body is traced for; a master array has its own."""
    return [
        x if is_quantized(x) or jnp.result_type(x) == dtype else jnp.asarray(x, dtype)
        for x, dtype in zip(operands, map(dtype_of, closed.jaxpr.invars), strict=True)
    ]


def _alike(a: QTensor, b: Any) -> bool:
    """True if both are codes of one spec, of equal shapes and dtypes."""
    if not is_quantized(b) or jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in pairs)


def _spec_of(left: Any, right: Any) -> DotSpec:
    """The spec of the quantized operand; of two, that of the right one."""
    return right.spec if is_quantized(right) else left.spec


def _looked_up(site: Site, operands: list[Any]) -> list[Any] | None:
    """Rows of a table: those of the codes and those of the scales.

    An index out of range reads NaN where the float table would, by its scale.
    """
    t, indices = operands
    params = site.eqn.params
    if not is_quantized(t) or params["fill_value"] is not None:
        return None
    sizes, shape = params["slice_sizes"], t.shape
    shared = [t.scale.shape[d] == 1 for d in range(t.ndim)]
    groups = any(n not in (1, full) for n, full in zip(t.scale.shape, shape, strict=True))
    indexed = params["dimension_numbers"].start_index_map
    # Rows have a scale of their own if no axis that shares one is indexed, or read in part.
    cut = any(
        shared[d] and (sizes[d] != shape[d] or d in indexed) and shape[d] > 1 for d in range(t.ndim)
    )
    if groups or cut:
        return None
    small = tuple(1 if one else size for one, size in zip(shared, sizes, strict=True))
    whole = integer_codes(t)
    codes = site.bind([whole, indices], fill_value=_zero_fill(params))[0].astype(jnp.float32)
    if t.zero_point is not None:
        point = site.bind(
            [t.zero_point, indices], slice_sizes=small, fill_value=_zero_fill(params)
        )[0]
        codes = codes - point.astype(jnp.float32)
    with noted(quantize=f"{t.spec.w} rows"), as_traced(low=True):
        scale = site.bind([t.scale, indices], slice_sizes=small)[0]
        value = codes * scale
        if t.master is not None:
            rows = site.bind([t.master.astype(t.dtype), indices])[0]
            value = straight_through(value, rows.astype(jnp.float32))
        return [round_and_cast(value, t.dtype)]


def _zero_fill(params: Mapping[str, Any]) -> int | None:
    """The fill for codes out of range: integers have no NaN, and the scale has it for them."""
    return 0 if params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP else None
