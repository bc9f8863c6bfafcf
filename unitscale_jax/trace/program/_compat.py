"""The only file that knows JAX versions apart, and the only one that reads unstable jaxpr params.

Everything else in `trace/` speaks of equations through these few functions. Verified on JAX 0.10
and 0.12: their scans count carries differently, and bodies are `ClosedJaxpr` in one, bare in the
other.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core, source_info_util
from jax.interpreters import ad

Jaxpr = core.Jaxpr
ClosedJaxpr = core.ClosedJaxpr
Equation = core.JaxprEqn
Literal = core.Literal
Var = core.Var
Atom = Var | Literal
as_function = core.jaxpr_as_fun

_NAMES = """
jit pjit closed_call core_call remat2 checkpoint
custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr shard_map
"""
CALLS = frozenset(_NAMES.split())
"""Primitives that evaluate one body, whose operands and results are the equation's own."""

JITS = frozenset({"jit", "pjit"})
REMATS = frozenset({"remat2", "checkpoint"})

INLINABLE = CALLS - {"shard_map"}
"""Calls whose body may replace them where no derivative is taken."""


_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def opened(body: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """`(jaxpr, consts)` of a body, closed or bare."""
    return (body.jaxpr, body.consts) if isinstance(body, ClosedJaxpr) else (body, ())


def call_body(eqn: Equation) -> Any:
    """The body of an equation of `CALLS`."""
    for name in _BODIES:
        if name in eqn.params:
            return eqn.params[name]
    raise KeyError(f"{eqn.primitive.name} has no body among its parameters {sorted(eqn.params)}")


def function_name(eqn: Equation) -> str:
    """Name of the function that the body of an equation of `CALLS` was traced from."""
    return opened(call_body(eqn))[0].debug_info.func_name


@functools.cache
def known_primitives() -> frozenset[str]:
    """Names of the primitives of this JAX, and of those of libraries that have a derivative."""
    listed = {value for name, value in vars(core.primitives).items() if name.endswith("_p")}
    registered = itertools.chain(listed, ad.primitive_jvps, ad.primitive_transposes)
    return frozenset(primitive.name for primitive in registered)


def primitives_of(params: Mapping[str, Any]) -> frozenset[str]:
    """Names of the primitives in the body of a call, and in calls inside of it.

    Args:
        params: The parameters of the call's equation.
    """
    body = next((params[name] for name in _BODIES if name in params), None)
    eqns = [] if body is None else opened(body)[0].eqns
    inside = [primitives_of(eqn.params) for eqn in eqns]
    return frozenset(eqn.primitive.name for eqn in eqns).union(*inside)


def scan_counts(eqn: Equation) -> tuple[int, int]:
    """`(number of constants, number of carries)` of a scan equation."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].update(range(len(eqn.invars))).unpack()
    return len(consts), len(carry)


def while_counts(eqn: Equation) -> tuple[int, int]:
    """`(constants of the condition, constants of the body)` of a while equation."""
    return eqn.params["cond_nconsts"], eqn.params["body_nconsts"]


_TRACINGS = itertools.count()


@contextlib.contextmanager
def traced_apart() -> Iterator[None]:
    """Traces anew whatever is traced inside, and hides that from what is traced outside.

    JAX remembers the trace of a jitted function under the settings of the moment; this is one.
    """
    with set_xla_metadata(unitscale_jax_tracing=str(next(_TRACINGS))):
        yield


def not_before(x: jax.Array, event: jax.Array) -> jax.Array:
    """`x` to the bit, computed no sooner than `event` is.

    Args:
        x: Floats above -inf, or NaN.
        event: An array of floats.

    A barrier says so, and costs nothing. For a CPU XLA removes barriers before it decides on an
    order, so there `x` is bounded from below by a number that depends on the event, and that no
    number of `x` is below; of an event that is sharded under `jit` that number is sent around.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.optimization_barrier((x, event))[0]
    if event.size == 0:
        return x
    first = jax.lax.slice(event, [0] * event.ndim, [1] * event.ndim).reshape(())
    below, lowest = (np.array(n, x.dtype) for n in (-np.inf, np.finfo(x.dtype).min))
    bound = jax.lax.select(first == first, below, lowest)
    return jax.lax.max(x, jax.lax.broadcast(bound, x.shape))


def devices(eqn: Equation) -> int:
    """On how many devices a `shard_map` equation evaluates its body."""
    mesh = eqn.params["mesh"]
    return math.prod(mesh.shape[axis] for axis in eqn.params["newly_manual_axes"])


def solver(eqn: Equation) -> Jaxpr:
    """The body that evaluates a `custom_linear_solve`."""
    return opened(eqn.params["jaxprs"].solve)[0]


def is_concrete(value: Any) -> bool:
    """True if a constant's numbers are known now, outside of any transformation around."""
    return not isinstance(value, jax.core.Tracer)


_COMBINERS = ("scatter", "reduce", "select_and_scatter")  # their bodies combine two numbers


def is_closed(eqn: Equation) -> bool:
    """True if an equation has equations of its own among its parameters, of any kind."""
    combines = eqn.primitive.name.startswith(_COMBINERS)
    return not combines and next(iter(core.jaxprs_in_params(eqn.params)), None) is not None


def dtype_of(value: Atom) -> Any:
    """The dtype of a variable or a literal; None for a token."""
    return getattr(value.aval, "dtype", None)


def shape_of(value: Atom) -> tuple[int, ...]:
    """The shape of a variable or a literal; of a token ()."""
    return tuple(getattr(value.aval, "shape", ()))


def scope(eqn: Equation) -> str:
    """The named scopes an equation was traced under, inside its own body."""
    scopes = eqn.source_info.name_stack
    return _text(scopes) if scopes.stack else ""


@functools.lru_cache(4096)  # asked for each equation by each walk, and the same for most of them
def _text(scopes: Any) -> str:
    return str(scopes)


def within(eqn: Equation, make: Callable[..., Any], *args: Any) -> Any:
    """`make(*args)`, whose equations have the name scopes, line and settings of an equation."""
    info, scopes = eqn.source_info, source_info_util.current_name_stack()
    scopes = scopes + info.name_stack if info.name_stack.stack else scopes
    with source_info_util.user_context(info.traceback, name_stack=scopes), eqn.ctx.manager:
        return make(*args)


def scan_options(eqn: Equation) -> dict[str, Any]:
    """The keywords of `jax.lax.scan` that make this scan again."""
    names = ("length", "reverse", "unroll", "_split_transpose")
    return {name: eqn.params[name] for name in names if name in eqn.params}


def rejit(
    eqn: Equation,
    body: Callable[..., Any],
    operands: Sequence[Any],
    partitioned: Callable[[Any, Any], Any],
) -> Callable[..., Any]:
    """`body` jitted as an equation's own was: donation, shardings, layouts, name."""
    params = eqn.params
    body.__name__ = body.__qualname__ = params["name"]
    kinds = zip(params["in_shardings"], params["in_layouts"], strict=True)
    kinds_out = zip(params["out_shardings"], params["out_layouts"], strict=True)
    return jax.jit(
        body,
        in_shardings=tuple(
            partitioned(x, _placement(*kind)) for x, kind in zip(operands, kinds, strict=True)
        ),
        out_shardings=[_placement(*kind) for kind in kinds_out],
        donate_argnums=tuple(i for i, d in enumerate(params["donated_invars"]) if d),
        keep_unused=params["keep_unused"],
        inline=params["inline"],
        compiler_options=dict(params["compiler_options_kvs"]) or None,
    )


def _placement(sharding: Any, layout: Any) -> Any:
    """A sharding as `jax.jit` takes it: None where nothing was said."""
    given = isinstance(sharding, jax.sharding.Sharding)
    if layout is None:
        return sharding if given else None
    return Format(layout, sharding if given else None)


def restage(eqn: Equation, body: Callable[..., Any], operands: Sequence[Any]) -> list[Any]:
    """Evaluates a call equation (remat) with `body` in place of its own, other params kept."""
    flat, structure = jax.tree.flatten(list(operands))
    jaxpr, consts, out = staged(lambda *xs: body(*jax.tree.unflatten(structure, xs)), flat)
    params = eqn.params | {"jaxpr": like(eqn.params["jaxpr"], jaxpr)}
    return jax.tree.unflatten(out, eqn.primitive.bind(*consts, *flat, **params))


def recond(
    eqn: Equation, branches: Sequence[Callable[..., Any]], index: Any, operands: Sequence[Any]
) -> list[Any]:
    """Evaluates a cond equation with other branches, whose results have one structure and type."""
    flat, structure = jax.tree.flatten(list(operands))
    inner = [lambda *xs, b=b: b(*jax.tree.unflatten(structure, xs)) for b in branches]
    made = [staged(b, flat) for b in inner]
    consts = [c for _, own, _ in made for c in own]
    jaxprs, before = [], 0
    for (jaxpr, own, _), old in zip(made, eqn.params["branches"], strict=True):
        jaxprs.append(like(old, _padded(jaxpr, len(own), before, consts)))
        before += len(own)
    params = eqn.params | {"branches": tuple(jaxprs)}
    return jax.tree.unflatten(made[0][2], eqn.primitive.bind(index, *consts, *flat, **params))


def staged(fn: Callable[..., Any], flat: Sequence[Any]) -> tuple[Jaxpr, list[Any], Any]:
    """A function of arrays as equations, its constants (as first operands), its result's shape."""
    closed, shape = jax.make_jaxpr(fn, return_shape=True)(*flat)
    jaxpr = closed.jaxpr
    opened_up = jaxpr.replace(
        constvars=[],
        invars=[*jaxpr.constvars, *jaxpr.invars],
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return opened_up, list(closed.consts), jax.tree.structure(shape)


def _padded(jaxpr: Jaxpr, own: int, before: int, consts: Sequence[Any]) -> Jaxpr:
    """A branch that takes the constants of all branches and uses its own, from `before` on."""
    names = [core.Var(jax.typeof(c)) for c in consts]
    names[before : before + own] = jaxpr.invars[:own]
    return jaxpr.replace(
        invars=[*names, *jaxpr.invars[own:]], debug_info=jaxpr.debug_info.with_unknown_names()
    )


def like(old: Any, jaxpr: Jaxpr) -> Any:
    """A body in the form, closed or bare, of an old one."""
    return ClosedJaxpr(jaxpr, ()) if isinstance(old, ClosedJaxpr) else jaxpr


def reshard_map(
    eqn: Equation,
    body: Callable[..., Any],
    operands: Sequence[Any],
    partitioned: Callable[[Any, Any], Any],
) -> Callable[..., Any]:
    """`body` mapped over the mesh as an equation's own was."""
    params = eqn.params
    pairs = zip(operands, params["in_specs"], strict=True)
    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(partitioned(x, spec) for x, spec in pairs),
        out_specs=list(params["out_specs"]),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )


def bind(eqn: Equation, operands: Sequence[Any], **changed: Any) -> list[Any]:
    """Evaluates one equation on new operands, some of its parameters changed."""
    given = eqn.params | changed if changed else eqn.params
    if not eqn.effects and _is_differentiated(operands):
        once = _traced_once(eqn.primitive, given)
        if once is not None:
            return once(*operands)
    got = eqn.primitive.get_bind_params(given)
    subfuns, params = got if isinstance(got, tuple) else ((), got)
    out = eqn.primitive.bind(*subfuns, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def converted(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """`jax.lax.convert_element_type` of an array of another, plain dtype, without its checks."""
    given = {"new_dtype": dtype, "weak_type": False, "sharding": None}
    primitive = core.primitives.convert_element_type_p
    once = _traced_once(primitive, given) if _is_differentiated([x]) else None
    return primitive.bind(x, **given) if once is None else once(x)[0]


def _is_differentiated(operands: Sequence[Any]) -> bool:
    """True if `jax.grad` or `jax.vjp` follows one of the operands as it is evaluated."""
    return any([type(x).__name__ == "LinearizeTracer" for x in operands])


def _traced_once(primitive: Any, params: Mapping[str, Any]) -> Callable[..., list[Any]] | None:
    """The primitive as a jitted function of its operands, to be inlined; None if it is a call.

    What is differentiated eagerly is differentiated anew each time, which takes ten times as long
    as evaluating it. JAX keeps the derivative of a jitted function for operands of one type.
    """
    if not _inlines() or any(True for _ in core.jaxprs_in_params(params)):
        return None
    try:
        return _jitted(primitive, tuple(params.items()))
    except TypeError:  # a parameter that is no key
        return None


@functools.cache
def _inlines() -> bool:
    """True if a call to be inlined is gone from a gradient; JAX 0.12 leaves it there."""
    gradient = jax.make_jaxpr(jax.grad(jax.jit(jax.lax.sin, inline=True)))
    return all(eqn.primitive.name not in JITS for eqn in gradient(1.0).eqns)


@functools.lru_cache(1024)
def _jitted(primitive: Any, params: tuple[tuple[str, Any], ...]) -> Callable[..., list[Any]]:
    def make(*operands: Any) -> list[Any]:
        out = primitive.bind(*operands, **dict(params))
        return list(out) if primitive.multiple_results else [out]

    return jax.jit(make, inline=True)


def no_cotangent(aval: Any) -> ad.Zero:
    """The zero that a function of `jax.vjp` takes for a result without a cotangent."""
    return ad.Zero(aval.to_ct_aval())
