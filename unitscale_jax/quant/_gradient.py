"""The derivative of a product on codes: that of the float product at the values served.

Straight through (https://arxiv.org/abs/1308.3432), and what is kept for it are codes and scales.
"""

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import jax

from unitscale_jax.mesh_axes import zeros
from unitscale_jax.quant._cpu_forms import transposed
from unitscale_jax.quant._ops import repeat_groups
from unitscale_jax.quant._qtensor import QTensor, is_quantized, steps_of, value_of
from unitscale_jax.quant._served import Unquantizable, served
from unitscale_jax.quant._spec import DotSpec
from unitscale_jax.quant._views import view
from unitscale_jax.trace.params import Conv, Dot, Product, product_of
from unitscale_jax.trace.program import Site, not_before
from unitscale_jax.trace.rewrite import as_traced, noted, operand_enters, taking
from unitscale_jax.typing import DType, Key

Multiply = Callable[..., Any]
T = TypeVar("T")


def straight_through(
    product: Product, sides: list[Any], spec: DotSpec, key: Key | None, multiply: Multiply
) -> jax.Array:
    """`served`, whose derivative is that of the float product at the values served.

    `multiply` makes the products of a quantized backward pass.

    A model has few kinds of products, and both passes of a kind are traced once; not where notes
    are taken, or devices sum, since those differ from place to place.
    """
    if taking() or product.across is not None:
        return _straight_through(product, sides, spec, key, multiply)

    def compiled() -> Callable[..., jax.Array]:
        # Of the program that the product stands in, nothing is kept but its own equation.
        alone = replace(product, site=Site(product.site.eqn, 0), extra=(), note={})

        def run(extra: Any, sides: list[Any], key: Key | None) -> jax.Array:
            return _straight_through(replace(alone, extra=extra), sides, spec, key, multiply)

        return jax.jit(run, inline=True)

    program = _once(_PROGRAMS, _kind(product, sides, spec), compiled)
    return program(product.extra, sides, key)


_PROGRAMS: dict[Any, Callable[..., jax.Array]] = {}
_MOST_KINDS = 512
"""How many kinds of products are remembered: a model has some dozens, and a process many models."""


def _once(cache: dict[Any, T], kind: Any, make: Callable[[], T]) -> T:
    """Returns what `make` gives for a kind of product, made once while the kind is remembered.

    A dict keeps the order in which keys were put in, so that the kind which was asked for longest
    ago stands first, and is forgotten first.
    """
    found = cache.pop(kind, None)
    cache[kind] = found = make() if found is None else found
    while len(cache) > _MOST_KINDS:
        cache.pop(next(iter(cache)), None)
    return found


def _straight_through(
    product: Product, sides: list[Any], spec: DotSpec, key: Key | None, multiply: Multiply
) -> jax.Array:
    # Codes have no derivative. The carriers, master arrays and float operands, are arguments of the
    # custom derivative that its value does not read, so their cotangents are what `bwd` returns;
    # the value is a function of the other argument, in which nothing is differentiated.
    carriers = [t.master if is_quantized(t) else t for t in sides]
    with operand_enters():
        parts = [
            replace(t, master=None) if is_quantized(t) else jax.lax.stop_gradient(t) for t in sides
        ]
    if all(c is None for c in carriers):
        return served(product, parts, spec)
    beside = (product.extra, key)  # data, so they go in as arguments

    @jax.custom_vjp
    def call(carriers: Any, parts: Any, beside: Any) -> jax.Array:
        del carriers
        return served(replace(product, extra=beside[0]), parts, spec)

    def fwd(carriers: Any, parts: Any, beside: Any) -> tuple[jax.Array, Any]:
        like = [None if c is None else c.reshape(-1)[:0] for c in carriers]  # dtypes, no numbers
        return served(replace(product, extra=beside[0]), parts, spec), (parts, beside, like)

    def back(kept: Any, g: jax.Array) -> Any:
        parts, (extra, key), like = kept
        g = g if product.across is None else product.across.transposed(g)
        open_product = replace(product, extra=extra)

        def backward(side: int, dtype: DType) -> jax.Array:
            return _backward(open_product, parts, side, g, spec, key, multiply).astype(dtype)

        return [None if c is None else backward(k, c.dtype) for k, c in enumerate(like)]

    traced_back = back if taking() else jax.jit(back, inline=True)

    def bwd(kept: Any, g: jax.Array) -> tuple[Any, None, None]:
        return traced_back(kept, g), None, None

    call.defvjp(fwd, bwd)
    return call(carriers, parts, beside)


def _backward(
    product: Product,
    parts: list[Any],
    side: int,
    g: jax.Array,
    spec: DotSpec,
    key: Key | None,
    multiply: Multiply,
) -> jax.Array:
    """The cotangent of one operand, in the dtype it was traced in."""
    other = parts[1 - side]
    if spec.g is None or not is_quantized(other):
        return _float_backward(product, parts, side, g)
    own = None if key is None else jax.random.fold_in(key, side)
    try:
        return _quantized_backward(product, other, side, g, spec, own, multiply)
    except Unquantizable as error:  # which `refusals` said in the forward pass
        with noted(quantize=f"kept: {error}"):
            return _float_backward(product, parts, side, g)


def _float_backward(product: Product, parts: list[Any], side: int, g: jax.Array) -> jax.Array:
    values = [_value(_waiting(t, g)) if is_quantized(t) else t for t in parts]

    def times(v: jax.Array) -> jax.Array:
        pair = [v, values[1]] if side == 0 else [values[0], v]
        return product.as_traced(*pair)

    return jax.vjp(times, values[side])[1](g)[0]


def refusals(
    product: Product, sides: list[Any], spec: DotSpec, multiply: Multiply
) -> tuple[str, ...]:
    """Why a backward pass that was to be quantized will be in floating point, operand by operand.

    Nothing is computed: the backward pass is traced on a cotangent of zeros, once for products that
    are alike. Only of what is trained; codes that are served have no backward pass to speak of.
    """
    parts = [replace(t, master=None) if is_quantized(t) else t for t in sides]
    weights = [t for t in sides if is_quantized(t) and t.spec.x is not None]
    if weights and all(t.master is None for t in weights):
        return ()

    def found() -> tuple[str, ...]:
        each = (_refusal(product, parts, side, spec, multiply) for side in (0, 1))
        return tuple(why for why in each if why is not None)

    return _once(_REFUSALS, _kind(product, parts, spec), found)


# Sentences about products that were seen, by what they depend on: a model has few kinds of them.
_REFUSALS: dict[Any, tuple[str, ...]] = {}


def _kind(product: Product, parts: list[Any], spec: DotSpec) -> Any:
    """The key of a kind: all that a program depends on, equation, types of operands, and spec."""
    leaves, structure = jax.tree.flatten(parts)
    params = frozenset(product.site.eqn.params.items())
    types = tuple(map(jax.typeof, leaves))
    return product.site.name, params, product.site.operands, product.dtype, structure, types, spec


def _refusal(
    product: Product, parts: list[Any], side: int, spec: DotSpec, multiply: Multiply
) -> str | None:
    other = parts[1 - side]
    if not is_quantized(other):
        return None

    def attempt() -> jax.Array:
        g = zeros(product.result_shape, product.dtype, like=other.codes)
        return _quantized_backward(product, other, side, g, spec, None, multiply)

    try:
        jax.eval_shape(attempt)
    except Unquantizable as error:
        return f"the derivative by its {('left', 'right')[side]} operand: {error}"
    return None


def _waiting(t: QTensor, g: jax.Array) -> QTensor:
    """Codes whose scale is there no sooner than the cotangent is.

    Their values depend on the forward pass alone. A compiler that is free to make them early makes
    those of all layers at once: of three residual blocks 35 MB where the float program takes 13.
    """
    return replace(t, scale=not_before(t.scale, g))


def _value(t: QTensor) -> jax.Array:
    """The value for derivatives, which unlike `value_of` need not be the same bits everywhere."""
    return (steps_of(t) * repeat_groups(t.scale, t.shape)).astype(t.dtype)


def _quantized_backward(
    product: Product,
    other: QTensor,
    side: int,
    g: jax.Array,
    spec: DotSpec,
    key: Key | None,
    multiply: Multiply,
) -> jax.Array:
    """The transposed product, on the codes of the other operand and codes of g.

    The other operand's scale varies along this sum, so it is folded into g before g is quantized.
    """
    other = replace(other, input_range=None, code_sums=None)  # those of the forward pass
    backward = _backward_spec(product, other, spec)
    program = transposed(product, side, g, value_of(other)).jaxpr
    draws = key if spec.g is not None and spec.g.rounding == "stochastic" else None
    env: dict[Any, Any] = dict(zip(program.invars, (g, other), strict=True))
    for index, eqn in enumerate(program.eqns):
        site = Site(eqn, index)
        operands = [env[v] for v in eqn.invars]
        inner = product_of(site)
        if inner is not None:
            results = [_multiplied(inner, operands, backward, draws, multiply)]
        elif any(map(is_quantized, operands)):
            results = view(site, operands)
            assert results is not None, site.name
        else:
            results = site.bind(operands)
        env |= dict(zip(eqn.outvars, results, strict=True))
    return env[program.outvars[0]]


def _multiplied(
    inner: Product, operands: list[Any], spec: DotSpec, draws: Key | None, multiply: Multiply
) -> jax.Array:
    with noted(quantize=str(spec)), as_traced(low=True):
        out, verdict = multiply(inner, *operands, spec, draws=draws)
    if verdict.kept:
        raise Unquantizable(verdict.kept.removeprefix("kept: "))
    return out


def _backward_spec(product: Product, other: QTensor, spec: DotSpec) -> DotSpec:
    """The spec by which a transposed product is computed on codes.

    Raises:
        Unquantizable: There is none, and the product is computed in floating point.
    """
    assert spec.g is not None
    if not isinstance(product, Dot | Conv):
        raise Unquantizable("of a ragged product it is in floating point")
    if isinstance(product, Conv) and product.site.eqn.params["feature_group_count"] != 1:
        raise Unquantizable("of a convolution with feature groups it is in floating point")
    if other.zero_point is not None:
        raise Unquantizable("codes with a zero point have scales that cross its sum")
    nearest = replace(spec.g, rounding="nearest")  # draws say that it is not
    try:
        return DotSpec(w=other.spec.w, x=nearest, compute=spec.compute)
    except ValueError as error:
        raise Unquantizable(str(error)) from None


def draw(key: Key | None, place: tuple[int, ...]) -> Key | None:
    """Derives the random key of the equation at a place."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(repr(place).encode()))
