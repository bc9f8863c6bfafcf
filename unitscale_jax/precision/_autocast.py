"""Autocast: each operation of a function in the arithmetic that it is safe in.

    products in the compute dtype; softmax, norms, logs and sums in float32; the rest follows

It rewrites the equations of the function, so it works for any model, written in any way, inside
loops, `remat` and custom derivatives, and casts a parameter where it is used, one layer at a time.
Compose as `grad(autocast(fn))`: a cast's transpose is the cast back, and float32 parameters get
float32 gradients.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import rules as named_rules
from unitscale_jax.errors import closest, expected, unknown
from unitscale_jax.loss import around
from unitscale_jax.precision._classes import CLASSES, OPS, OpClass
from unitscale_jax.precision._plan import FLOAT32, Decision, DtypePlan, KnownDtype, is_float
from unitscale_jax.trace.params import ACTIVATION, Origin, input_origins
from unitscale_jax.trace.program import (
    Site,
    TracedCall,
    converted,
    dtype_of,
    is_concrete,
    known_primitives,
    sites,
    trace_call,
    walk,
)
from unitscale_jax.trace.rewrite import Derivative, Rewriter, noted, taking
from unitscale_jax.typing import DType

Products: TypeAlias = DType | tuple[DType, DType]


def autocast(
    fn: Callable[..., Any],
    compute: Products = "bfloat16",
    *,
    rules: named_rules.Rules[Products] = (),
    keep_float32: Sequence[named_rules.Pattern] = (),
    ops: Mapping[str, OpClass] | None = None,
) -> Callable[..., Any]:
    """Evaluates `fn` with products in `compute` and what needs it in float32.

    Args:
        fn: A function whose first argument is the parameters: a model's `apply`, a loss, or any
            other. Its arrays are float32, or what the user made them.
        compute: The dtype of products (matrix products and convolutions): bfloat16 or float16,
            or a pair `(operands, result)`. An 8-bit float is a dtype of operands: alone, it gives
            results in bfloat16.
        rules: Pairs (pattern, dtype or pair); the first that matches a parameter of a product
            decides on it. A product of two activations is addressed by its named scope and its
            kind, `"attention"` (with batch axes) or `"dot"`.
        keep_float32: Patterns of products that stay in float32; they come before `rules`, and
            are counted first where an error says "rule 0".
        ops: Primitive name -> class, over the table in `precision/_classes.py`: `"low"`,
            `"float32"`, `"prefix"`, `"follow"`, `"each"` or `"keep"`.

    Returns:
        A function of the signature of `fn`. Results have the dtypes they had.

    Raises:
        ValueError: A dtype is not one to compute in; or, at the call, a rule decides on no
            product, or `ops` has a name that is no primitive's.

    With `compute="float32"` it is the identity on a float32 function; twice is once. A product
    that asks for `precision="highest"` or for a wider result keeps what it asks for, unless a
    rule names it. Integers, 64-bit and 8-bit floats, and primitives it does not know stay as they
    are; `unitscale_jax.explain` shows them. A call in which no product was lowered warns, and says
    why. A product on codes is one in the compute dtype: inside of `quantized` or around it,
    autocast gives the same dtypes.

    Example:
        >>> fn = lambda params, x: jax.nn.softmax(x @ params["w"])
        >>> low = autocast(fn, "bfloat16")
        >>> params, x = {"w": jnp.eye(2)}, jnp.array([[1.0, 1.001]])
        >>> bool(low(params, x)[0, 0] == low(params, x)[0, 1]), low(params, x).dtype
        (True, dtype('float32'))
        >>> precise = autocast(fn, "bfloat16", keep_float32=["w"])
        >>> bool(precise(params, x)[0, 0] == precise(params, x)[0, 1])
        False
    """
    low = _products(compute)
    decided = [(pattern, (FLOAT32, FLOAT32)) for pattern in keep_float32]
    decided += [(pattern, _products(to)) for pattern, to in named_rules.pairs_of(rules)]
    table = {**OPS, **_checked(ops or {})}

    @around(fn, "autocast")
    def autocast_fn(*args: Any, **kwargs: Any) -> Any:
        staged = trace_call(fn, *args, **kwargs)
        _check_names(ops or {}, staged)
        caster = _Autocast(DtypePlan(low, decided, table))
        results = caster.program(staged, input_origins(staged, args[0] if args else ()))
        named_rules.decided(decided, caster.plan.products, noun="product")
        _check_lowered(caster.plan)
        return staged.finish(results)

    return autocast_fn


class _Autocast(Rewriter):
    """Replays a program in the dtypes of a plan."""

    def __init__(self, plan: DtypePlan) -> None:
        super().__init__({}, self.evaluate)
        self.plan = plan
        self.casts: dict[tuple[int, Any], tuple[Any, Any]] = {}  # a body casts a value once

    def program(self, staged: TracedCall, inputs: list[Origin]) -> list[Any]:
        jaxpr, consts = staged.closed.jaxpr, staged.closed.consts
        self.plan.prepare(jaxpr, inputs)
        known = [
            KnownDtype(dtype_of(v), o.active) for v, o in zip(jaxpr.invars, inputs, strict=True)
        ]
        walk(self.plan, jaxpr, known, consts)
        out = self(jaxpr, consts, staged.operands)
        return [self.cast(x, dtype_of(v)) for x, v in zip(out, jaxpr.outvars, strict=True)]

    def __call__(self, *args: Any) -> list[Any]:
        # A cast made in a loop's body must not be seen outside, even if it is one of a constant.
        outside, self.casts = self.casts, {}
        try:
            return super().__call__(*args)
        finally:
            self.casts = outside

    def touches(self, site: Site, operands: list[Any]) -> bool:
        del operands
        return site.place in self.plan.changed or taking()

    def evaluate(self, site: Site, operands: list[Any]) -> list[Any]:
        """Evaluates an equation without a body as decided, with a note if notes are taken."""
        decision = self.plan.decisions[site.place]
        if not taking():
            return self._as_decided(site, operands, decision)
        before = " ".join(map(str, site.operands))
        with noted(autocast=decision.why, before=before, **decision.meant):
            return self._as_decided(site, operands, decision)

    def _as_decided(self, site: Site, operands: list[Any], decision: Decision) -> list[Any]:
        pairs = list(zip(operands, decision.operands, strict=True))
        if site.name in _TYPED and any(_narrows(x, dtype) for x, dtype in pairs):
            return _narrow_product(site, operands, decision)
        given = [x if dtype is None else self.cast(x, dtype) for x, dtype in pairs]
        if site.name in _TYPED and decision.why != "cast by the user":
            out = _TYPED[site.name](site, given, decision.results[0])
        else:
            out = site.bind(given)
        return [self.cast(x, d) for x, d in zip(out, decision.results, strict=True)]

    def cast(self, x: Any, dtype: Any) -> Any:
        if not is_float(dtype) or _dtype(x) == dtype:
            return x
        if not isinstance(x, jax.Array):
            return np.asarray(x).astype(dtype)
        if (id(x), dtype) not in self.casts:
            make = _convert if _is_8bit(dtype) else converted
            self.casts[id(x), dtype] = x, make(x, dtype)
        return self.casts[id(x), dtype][1]

    def carried(self, site: Site, carry: list[Any], step: Any) -> list[Any]:
        del step
        return self._settled(site, carry)

    def returned(self, site: Site, results: list[Any]) -> list[Any]:
        settled = self._settled(site, results)
        return [*settled, *results[len(settled) :]] if site.name == "scan" else settled

    def _settled(self, site: Site, values: list[Any]) -> list[Any]:
        known = self.plan.carries.get(site.place)
        if known is None:
            return values
        return [self.cast(x, k.dtype) for x, k in zip(values, known, strict=False)]

    def derived(self, derivative: Derivative, operands: list[Any]) -> list[Any]:
        """A custom derivative is planned for the dtypes that its call received.

        Results and tangents have the dtypes of the call's results, gradients those of its operands.
        """
        site, number, closed = derivative.site, derivative.number, derivative.closed
        own = list(self.plan.origins_at(site)) if number == 1 else []
        sources = [*own, *[ACTIVATION] * (len(operands) - len(own))]
        self.plan.prepare(closed.jaxpr, sources, site, number)
        pairs = zip(operands, sources, strict=True)
        known = [KnownDtype(jnp.result_type(x), origin.active) for x, origin in pairs]
        walk(self.plan, closed.jaxpr, known, closed.consts, site, number)
        out = self(closed.jaxpr, closed.consts, operands, site, number)
        called = self.plan.operands[site.place] if number == 2 else self.plan.results[site.place]
        like = [*([] if number == 2 else called), *(called[k] for k in derivative.moving.after)]
        cast = [self.cast(x, k.dtype) for x, k in zip(out, like, strict=False)]
        return [*cast, *out[len(cast) :]]


def _convert(x: jax.Array, dtype: Any) -> jax.Array:
    """A cast; to an 8-bit float a saturating one, since a plain one makes NaN of what is large."""
    if not _is_8bit(dtype):
        return jax.lax.convert_element_type(x, dtype)
    limit = np.asarray(jnp.finfo(dtype).max).astype(x.dtype)
    bounded = jnp.where(jnp.isfinite(x), jnp.clip(x, -limit, limit), x)
    return jax.lax.convert_element_type(bounded, dtype)


def _narrows(x: Any, dtype: Any) -> bool:
    """True if autocast casts an operand to 8 bits; a user's own 8-bit floats stay the user's."""
    return dtype is not None and _is_8bit(dtype) and _dtype(x) != dtype


def _dtype(x: Any) -> Any:
    """The dtype of an array or of a number; that of a tracer is at hand."""
    return jnp.result_type(x) if is_concrete(x) else x.dtype


@functools.lru_cache
def _is_8bit(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16


def _narrow_product(site: Site, operands: list[Any], decision: Decision) -> list[Any]:
    """A product of 8-bit floats, whose derivative is that of the rounded values, in its result's.

    JAX would give the gradient of an operand the operand's dtype, and a gradient in 8 bits is zero
    where it is small, and NaN where it is large.
    """
    dtype = np.dtype(decision.results[0])

    def rounded(xs: Sequence[Any]) -> list[Any]:
        pairs = zip(xs, decision.operands, strict=True)
        return [x if to is None else _convert(jnp.asarray(x), to) for x, to in pairs]

    def wide(xs: Sequence[Any]) -> list[Any]:
        pairs = zip(xs, decision.operands, strict=True)
        return [x if to is None else jax.lax.convert_element_type(x, dtype) for x, to in pairs]

    @jax.custom_jvp
    def product(*xs: Any) -> list[Any]:
        return _product(site, rounded(xs), dtype)

    @product.defjvp
    def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        by = wide(rounded(primals))
        _, moving = jax.jvp(lambda *xs: _product(site, xs, dtype), by, wide(tangents))
        return product(*primals), moving

    return product(*operands)


def _product(site: Site, operands: Sequence[Any], dtype: Any) -> list[Any]:
    return site.bind(operands, preferred_element_type=np.dtype(dtype))


def _cast_again(site: Site, operands: list[Any], dtype: Any) -> list[Any]:
    return site.bind(operands, new_dtype=np.dtype(dtype))


_TYPED: dict[str, Callable[[Site, Any, Any], list[Any]]] = {
    "dot_general": _product,
    "ragged_dot_general": _product,
    "conv_general_dilated": _product,
    "convert_element_type": _cast_again,
}


def _products(to: Products) -> tuple[np.dtype, np.dtype]:
    """The dtypes of a product's operands and of its result."""
    given, result = to if isinstance(to, tuple) else (to, None)
    for dtype in (given, result if isinstance(to, tuple) else given):
        _check_dtype(dtype)
    given = np.dtype(given)
    if result is None:  # a sum of products of 8 bits needs more than 8
        result = jnp.bfloat16 if _is_8bit(given) else given
    result = np.dtype(result)
    for dtype in (given, result):
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits > 32:
            raise ValueError(
                f"autocast cannot compute in {dtype.name}; choose bfloat16, float16, float32 or an "
                "8-bit float, or a pair of them for the operands and the result of a product."
            )
    return given, result


def _check_dtype(dtype: Any) -> None:
    """Raises `TypeError` for what names no dtype; NumPy would take None for float64."""
    try:
        known = dtype is not None and np.dtype(dtype) is not None
    except TypeError:
        known = False
    if not known:
        wanted = "a dtype, as 'bfloat16', or a pair of them for operands and result of products"
        raise TypeError(expected("the dtype of autocast", dtype, wanted))


def _check_names(ops: Mapping[str, OpClass], staged: TracedCall) -> None:
    """Each names a primitive of JAX or of the function; this one may lack what others have."""
    known = OPS.keys() | known_primitives()
    if ops.keys() <= known:
        return
    here = {site.name for site in sites(staged.closed.jaxpr)}
    for name in ops:
        if name not in known | here:
            among = sorted(here) if closest(name, here) else sorted(known)
            raise ValueError(f"ops: {unknown(name, among, 'primitive')}")


def _checked(ops: Mapping[str, OpClass]) -> Mapping[str, OpClass]:
    for name, chosen in ops.items():
        if chosen not in CLASSES:
            raise ValueError(expected(f"ops[{name!r}]", chosen, CLASSES))
    return ops


def _check_lowered(plan: DtypePlan) -> None:
    """Warns where there are products, and the reason is the same for most that none is narrower."""
    products = list(plan.reasons.values())
    if not products or not all(why in _REASONS for why in products):
        return
    reason, count = Counter(products).most_common(1)[0]
    warnings.warn(
        f"autocast lowered nothing: {count} of {len(products)} products: {_REASONS[reason]}.",
        stacklevel=3,
    )


_REASONS = {
    "kept: precision": "the model asks for precision='highest'; a rule that names them decides "
    "against it",
    "no floats": "their operands are integers",
    "kept: no floats": "one of their operands is of integers",
    "kept: not a float of 16 or 32 bits": "their operands are neither 16 nor 32 bits wide",
}
