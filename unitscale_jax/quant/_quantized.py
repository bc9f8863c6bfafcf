"""A function on codes: quantized training and integer serving are one function.

    quantized(fn, rules)(params, x)  ==  quantized(fn, rules)(quantize(params, rules), x)

bit for bit. The equations of `fn` are evaluated again with a `QTensor` wherever a parameter was:
products multiply codes, movements move them, and what has no rule gets the array back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from unitscale_jax import rules as named_rules, tree as trees
from unitscale_jax.fwd_bwd import straight_through
from unitscale_jax.loss import around
from unitscale_jax.quant._cache import appended
from unitscale_jax.quant._contract import ProductReport, activation, axes_of, multiply
from unitscale_jax.quant._gradient import draw
from unitscale_jax.quant._left import Account, Unquantized, arrays_of
from unitscale_jax.quant._lsq import Trained, entered
from unitscale_jax.quant._ops import round_and_cast
from unitscale_jax.quant._params import (
    ACTIVATIONS,
    QuantRules,
    agrees,
    check_leaf,
    check_range,
    encode,
    inside,
    range_of,
    widths_by_name,
)
from unitscale_jax.quant._qtensor import (
    LIKE_SCALE,
    QTensor,
    has_codes,
    integer_codes,
    is_quantized,
    value_of,
)
from unitscale_jax.quant._roles import activation_products, resolved
from unitscale_jax.quant._served import Unquantizable
from unitscale_jax.quant._spec import DotSpec
from unitscale_jax.quant._views import logical, partitioned, refusal, view
from unitscale_jax.statistics import check_names
from unitscale_jax.trace.params import (
    ACTIVATION,
    CONSTANT,
    DeviceSum,
    Meeting,
    Origin,
    Product,
    above,
    device_sums,
    input_origins,
    meetings,
    product_of,
    provenance,
)
from unitscale_jax.trace.program import (
    PRODUCTS,
    ClosedJaxpr,
    Jaxpr,
    Place,
    Site,
    dtype_of,
    trace_call,
)
from unitscale_jax.trace.rewrite import (
    Derivative,
    Rewriter,
    as_traced,
    noted,
    taking as notes_are_taken,
)
from unitscale_jax.typing import Key


def quantized(
    fn: Callable[..., Any],
    rules: QuantRules | None = None,
    *,
    stats: Mapping[str, Any] | None = None,
    key: Key | None = None,
    strict: bool = False,
) -> Callable[..., Any]:
    """Evaluates `fn` on quantized parameters, or quantizes them in the call to train them.

    Args:
        fn: A function whose first argument is the parameters.
        rules: Pairs (pattern, `DotSpec`): parameters by name, products of two activations by
            named scope or kind (`"attention"`, `"dot"`). Axes may be open. Float parameters that a
            rule names are quantized in the call, and receive straight-through gradients.
        stats: What `calibrate` found, for parameters quantized in the call; see `quantize`.
        key: Draws for stochastic rounding in a quantized backward pass. Layers of one scan share
            their draws.
        strict: Raises where any quantized array had to be dequantized.

    Returns:
        A function of the signature of `fn`, traced once per call: call it under `jit`. Any argument
        may hold `QTensor`s, and `Learned` parameters, whose scales receive gradients too. Results
        keep their dtypes; one that is a quantized array itself (a cache) stays one.

    Raises:
        ValueError: A rule matches nothing, or names a parameter that meets no product; all
            products of a parameter whose rule has an `x` were left in floating point; a product
            sums more than int32 holds; with `strict`, anything was left in floating point, and why.

    Law: training is serving, see above: to the bit, where the compiler orders the float sums of
    `fn` itself alike in both programs (a norm's mean may be fused in another order). Gradients are
    those of the float function at the dequantized values, zero where a calibrator clips; inside of
    a custom derivative they are the user's rule's. There is no forward mode.

    In a `shard_map` a product that a sum over its axes ends, `psum(x @ w, axis)`, is one product
    over all devices: they share scales (of `Percentile` and `MSE` the largest device's) and sum
    integers, so it has the bits of one device. Groups with free scales are summed as floats.

    Example:
        >>> import unitscale_jax as us
        >>> fn = lambda params, x: jax.nn.relu(x @ params["w"] + 0.3)
        >>> rules = {"w": us.DotSpec(w=us.QSpec(), x=us.QSpec())}
        >>> params = {"w": jnp.array([[0.5, -1], [0.25, 2], [1, -0.5]])}
        >>> x = jnp.array([[1.0, 2, -3]])
        >>> train = quantized(fn, rules)(params, x)
        >>> codes = us.quantize(params, us.quant.resolve(rules, fn, params, x))
        >>> bool((quantized(fn)(codes, x) == train).all())
        True
        >>> grads = jax.grad(lambda p: quantized(fn, rules)(p, x).sum())(params)
        >>> [round(g, 3) for g in grads["w"][:, 1].tolist()]  # x, at the values of its codes
        [0.992, 2.008, -3.0]
    """

    @around(fn, "quantized", marks=rules is not None)
    def quantized_fn(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = entered((args, kwargs))
        plain, plain_kwargs = logical((args, kwargs))
        with widths_by_name(args):
            staged = trace_call(fn, *plain, **plain_kwargs)
        leaves = jax.tree.leaves((args, kwargs), is_leaf=is_quantized)
        operands = [leaves[k] for k in staged.positions]
        params, sources = (args[0], plain[0]) if args else ((), ())
        known = input_origins(staged, sources)
        check_names(stats, trees.names(sources))
        chosen = [] if rules is None else resolved(rules, staged, params, sources)
        _check_key([*chosen, *_learned_specs(params)], key)
        specs = {name: spec for name, spec in chosen if spec.w.axes != ACTIVATIONS}
        sums = device_sums(staged.closed.jaxpr)
        over = _split_over(meetings(staged, sources), sums) if sums and specs else {}
        operands = [
            _entered(origin.parameter, x, specs, stats, over)
            for origin, x in zip(known, operands, strict=True)
        ]
        of_activations = [pair for pair in chosen if pair[1].w.axes == ACTIVATIONS]
        account = Account(staged.closed.jaxpr, known)
        replay = _Quantizer(of_activations, key, sums, account)
        out = replay(staged.closed.jaxpr, staged.closed.consts, operands)
        if strict and account.left:
            raise ValueError(f"left in floating point: {account}.")
        if account.left:
            account.check(meetings(staged, sources), {**_specs_of_codes(params), **specs})
        return staged.finish([_result(x) for x in out])

    return quantized_fn


def _learned_specs(params: Any) -> list[tuple[str, DotSpec]]:
    named = trees.named_leaves(params, is_leaf=is_quantized)
    return [(name, leaf.spec) for name, leaf in named.items() if isinstance(leaf, Trained)]


def _check_key(rules: Sequence[tuple[Any, DotSpec]], key: Key | None) -> None:
    for pattern, spec in rules:
        if key is None and spec.g is not None and spec.g.rounding == "stochastic":
            raise ValueError(
                f"the rule for {pattern} rounds cotangents stochastically, which needs draws: "
                "quantized(fn, rules, key=key), a new key each step."
            )


def _split_over(
    met: Mapping[str, Sequence[Meeting]], sums: Mapping[Place, DeviceSum]
) -> dict[str, tuple[str, ...]]:
    """By parameter the manual mesh axes that all of its products are summed over."""
    ends = lambda m: axes_of(sums.get(m.site.place))
    uses = lambda found: [m for m in found if m.kind in ("product", "lookup")]
    axes = {name: set(map(ends, uses(found))) for name, found in met.items()}
    return {name: next(iter(one)) for name, one in axes.items() if len(one) == 1}


def _entered(
    name: str | None,
    x: Any,
    specs: Mapping[str, DotSpec],
    stats: Mapping[str, Any] | None,
    over: Mapping[str, tuple[str, ...]],
) -> Any:
    """A parameter as the function receives it: quantized, its float array beside it."""
    spec = specs.get(name) if name is not None else None
    if spec is None or name is None:
        return x
    if is_quantized(x):
        if not agrees(x.spec, spec):
            raise ValueError(f"{name} is quantized as {x.spec}, and a rule asks for {spec}.")
        if isinstance(x, Trained):
            check_range(name, range_of(stats, name))
        return x
    check_leaf(name, x, spec)
    x, axes = jnp.asarray(x), over.get(name, ())
    with as_traced():
        t = replace(encode(x, spec, axes), input_range=range_of(stats, name))
    master = jnp.where(inside(x, t, axes), x, jax.lax.stop_gradient(x)) if spec.w.clips else x
    return replace(t, master=master)


def _result(x: Any) -> Any:
    return value_of(x) if is_quantized(x) and x.master is not None else x


def _specs_of_codes(params: Any) -> dict[str, DotSpec]:
    named = trees.named_leaves(params, is_leaf=is_quantized)
    return {name: leaf.spec for name, leaf in named.items() if is_quantized(leaf)}


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


class _Quantizer(Rewriter):
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
        """What is to be known of the equations of a derivative before they are replayed."""
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
        each = lambda x: jnp.broadcast_to(x, (rows, *x.shape[1:]))
        change = lambda name, x: each(x) if name in LIKE_SCALE else x
        axes = tuple(axis for axis in operand.axes if axis != first)
        return replace(operand, code_sums=None).over(change, axes=axes)

    def entering(self, operand: Any, placement: Any) -> Any:
        """What enters a `shard_map`: sums over an axis that is cut are made anew inside."""
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
    """Why a product of codes is none: the other operand has no codes."""
    dtypes = ", ".join(str(dtype) for dtype in site.operands[:2])
    return f"its operands are {dtypes}, and floats of at most 32 bits meet codes"


def _typed(operands: Sequence[Any], closed: ClosedJaxpr) -> list[Any]:
    """Operands in the dtypes that a derived body is traced for; a master array has its own."""
    pairs = zip(operands, map(dtype_of, closed.jaxpr.invars), strict=True)
    wanted = lambda x, dtype: is_quantized(x) or jnp.result_type(x) == dtype
    return [x if wanted(x, dtype) else jnp.asarray(x, dtype) for x, dtype in pairs]


def _alike(a: QTensor, b: Any) -> bool:
    types = lambda t: [(x.shape, x.dtype) for x in jax.tree.leaves(t)]
    return (
        is_quantized(b) and jax.tree.structure(a) == jax.tree.structure(b) and types(a) == types(b)
    )


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
    return 0 if params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP else None
