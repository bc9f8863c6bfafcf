"""Verification of a compact function: the same values and gradients as with zeros.

    verify           fn(mask(params), x)  against  compacted(fn, plan)(compact(params), x)
    verify_rebuild   compacted(fn, plan)  against  a function built anew for the smaller sizes

Flags are proofs, and these are checks: for groups that no proof covers, for custom derivatives,
which a proof does not look into, and for a model that was built anew. Such a model has other
constants wherever it computes them from a size; comparing both lists of equations names them.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.compaction._compact import compact, zero_channels
from unitscale_jax.compaction._compacted import compacted
from unitscale_jax.compaction._groups import CompactionPlan
from unitscale_jax.errors import check_callable, keywords
from unitscale_jax.trace.program import (
    Arguments,
    ClosedJaxpr,
    Jaxpr,
    Literal,
    as_arrays,
    bodies,
    dtype_of,
    sites,
    trace,
)


class Verified(NamedTuple):
    """The distance of two functions: max |a - b| over max |a| of a leaf, the largest of all.

    Attributes:
        outputs: Of their results.
        gradients: Of the gradients of a random projection of them; None if not asked for.
        tolerance: What was allowed.
    """

    outputs: float
    gradients: float | None
    tolerance: float


@dataclass(frozen=True)
class Rebuilt:
    """The difference of a function that was built anew from the compact one.

    Attributes:
        outputs: As in `Verified`.
        moved: The constants that differ, "div 12.0 -> 6.0", dense before new, and equations that
            only one of them has.
    """

    outputs: float
    moved: tuple[str, ...]


def verify(
    fn: Callable[..., Any],
    plan: CompactionPlan,
    params: Any,
    /,
    *args: Any,
    gradients: bool = True,
    tolerance: float | None = None,
    kwargs: Mapping[str, Any] | None = None,
    **named: Any,
) -> Verified:
    """Compares the compact function with the masked one.

    Args:
        fn: The function of `(params, *args, **named)` that the plan was made for.
        plan: What is kept.
        params: Dense parameters, masked or not.
        args: Its other inputs; what is no array is static.
        gradients: Whether to compare gradients too; not for a loop that has no reverse mode.
        tolerance: What is allowed, relative to the largest number of each leaf; None takes 300
            roundings of the least precise float that the function computes in.
        kwargs: Keywords of the function that have the name of an option here.
        named: Its other keywords.

    Raises:
        ValueError: They differ by more, or are not finite; the message names the leaf.

    Example:
        >>> params = {"up": jnp.ones((8, 16)), "down": jnp.ones((16, 4))}
        >>> mlp = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
        >>> x = jnp.ones((2, 8))
        >>> graph = us.compaction.groups(mlp, params, x)
        >>> plan = us.compaction.plan_of(graph, {"down:0": [0, 3, 5]})
        >>> verify(mlp, plan, params, x).outputs
        0.0
    """
    check_callable("fn", fn)
    given = Arguments.of(args, {**named, **keywords(kwargs)})
    allowed = _tolerance(fn, params, given) if tolerance is None else tolerance

    def evaluated(fn: Callable[..., Any], params: Any, arrays: Any) -> tuple[Any, Any]:
        call = _with(fn, given.filled(arrays))
        return call(params), _gradient(call, params) if gradients else None

    both = jax.jit(
        lambda p, q, arrays: (evaluated(fn, p, arrays), evaluated(compacted(fn, plan), q, arrays))
    )
    masked, small = both(zero_channels(params, plan), compact(params, plan), given.arrays)
    (old, slope), (new, slope_too) = masked, small
    apart = _apart("output", old, new, allowed, plan)
    if not gradients:
        return Verified(apart, None, allowed)
    slopes_apart = _apart("gradient of", compact(slope, plan), slope_too, allowed, plan)
    return Verified(apart, slopes_apart, allowed)


def verify_rebuild(
    fn: Callable[..., Any],
    plan: CompactionPlan,
    rebuilt_fn: Callable[..., Any],
    params: Any,
    /,
    *args: Any,
    tolerance: float | None = None,
    accept_moved: bool = False,
    kwargs: Mapping[str, Any] | None = None,
    **named: Any,
) -> Rebuilt:
    """Compares the compact function with one that was built for the smaller sizes.

    Args:
        fn: The dense function.
        plan: What is kept.
        rebuilt_fn: A function of `(compact(params, plan), *args, **named)`.
        params: Dense parameters.
        args: Other inputs; what is no array is static.
        tolerance: As in `verify`.
        accept_moved: True returns the report even if values differ, provided that constants that
            moved explain it: a new width in a norm is right for a model that is trained on.
        kwargs: As in `verify`.
        named: Likewise.

    Raises:
        ValueError: Values differ by more than the tolerance; the message says what moved.
    """
    small_fn, small = compacted(fn, plan), compact(params, plan)
    given = Arguments.of(args, {**named, **keywords(kwargs)})
    traced = [_traced(f, small, given) for f in (small_fn, rebuilt_fn)]
    moved = tuple(_moved(*traced))
    allowed = _tolerance(fn, params, given) if tolerance is None else tolerance

    def both(small: Any, arrays: Any) -> Any:
        return [_with(f, given.filled(arrays))(small) for f in (small_fn, rebuilt_fn)]

    old, new = jax.jit(both)(small, given.arrays)
    if moved and accept_moved:
        return Rebuilt(_apart("output", old, new, np.inf, plan), moved)
    try:
        return Rebuilt(_apart("output", old, new, allowed, plan), moved)
    except ValueError as error:
        what = "; ".join(moved) or "no constant: other equations, or another order of channels"
        raise ValueError(
            f"the rebuilt function is another one: {error} What moved: {what}. Give it the dense "
            "constants, use compacted(fn, plan), or consent with accept_moved=True and train on."
        ) from None


# ------------------------------------------------------------------------------ how far apart


def _with(fn: Callable[..., Any], given: tuple[Any, Any]) -> Callable[[Any], Any]:
    """`fn` as a function of its parameters alone, whose results are arrays."""
    args, kwargs = given
    return lambda params: as_arrays(fn(params, *args, **kwargs), None)


def _traced(fn: Callable[..., Any], params: Any, given: Arguments) -> ClosedJaxpr:
    args, kwargs = given.filled(given.arrays)
    return trace(fn, params, *args, **kwargs).closed


def _gradient(fn: Callable[[Any], Any], params: Any) -> Any:
    """The gradient of a random projection of all floating results."""
    floats, rest = trees.partition(params, lambda _, leaf: trees.is_floating(leaf))

    def projected(floats: Any) -> jax.Array:
        leaves = jax.tree.leaves(fn(trees.combine(floats, rest)))
        out = [y.astype(trees.wide(y.dtype)) for y in leaves if trees.is_floating(y)]
        keys = jax.random.split(jax.random.key(0), max(1, len(out)))
        terms = [
            jnp.sum(y * jax.random.normal(key, y.shape, y.dtype))
            for y, key in zip(out, keys, strict=False)
        ]
        return sum(terms, jnp.zeros(()))

    return jax.grad(projected)(floats)


def _apart(what: str, old: Any, new: Any, allowed: float, plan: CompactionPlan) -> float:
    """The largest relative difference over the leaves."""
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ValueError(
            f"results have the structure {jax.tree.structure(old)} and {jax.tree.structure(new)}."
        )
    worst = 0.0
    rows = zip(trees.names(old), jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    for name, a, b in rows:
        if np.shape(a) != np.shape(b):
            raise ValueError(f"{what} {name} has shape {np.shape(a)} and {np.shape(b)}.")
        worst = max(worst, _checked(f"{what} {name}".strip(), a, b, allowed, plan))
    return worst


def _checked(what: str, a: Any, b: Any, allowed: float, plan: CompactionPlan) -> float:
    if not np.size(a) or jnp.issubdtype(jnp.result_type(a), jax.dtypes.extended):
        return 0.0
    old, new = (np.asarray(x).astype(np.float64) for x in (a, b))
    if not (np.isfinite(old).all() and np.isfinite(new).all()):
        raise ValueError(
            f"{what} is not finite, so nothing can be said: "
            f"{int((~np.isfinite(old)).sum())} numbers before and "
            f"{int((~np.isfinite(new)).sum())} after compaction."
        )
    apart = float(np.abs(old - new).max() / max(np.abs(old).max(), np.finfo(np.float32).tiny))
    if apart > allowed:
        unproven = [name for name in plan.kept if "exact" not in plan.flags[name]]
        listed = f" Not exact: {', '.join(unproven)}." if unproven else ""
        raise ValueError(
            f"{what} differs by {apart:.1e} of its largest number, and {allowed:.1e} is allowed."
            f"{listed} Leave groups whole, one after the other, to find the one that matters."
        )
    return apart


def _tolerance(fn: Callable[..., Any], params: Any, given: Arguments) -> float:
    """300 roundings of the least precise float in the equations."""
    closed = _traced(fn, params, given)
    dtypes = {dtype_of(var) for var in closed.jaxpr.invars}
    dtypes |= {dtype for site in sites(closed.jaxpr) for dtype in site.results}
    floats = [d for d in dtypes if d is not None and jnp.issubdtype(d, jnp.floating)]
    return 300 * max((float(jnp.finfo(d).eps) for d in floats), default=0.0)


# ---------------------------------------------------------------------------------- what moved

_ASIDE = frozenset({"convert_element_type"})


def _moved(old: ClosedJaxpr, new: ClosedJaxpr) -> Iterator[str]:
    """Constants that differ between two lists of equations, and equations without counterpart."""
    before, after = list(_operations(old.jaxpr)), list(_operations(new.jaxpr))
    names = [[name for name, _ in operations] for operations in (before, after)]
    matcher = difflib.SequenceMatcher(None, *names, autojunk=False)
    for tag, i, j, k, n in matcher.get_opcodes():
        if tag != "equal":
            gone, come = (" ".join(names[0][i:j]) or "none"), (" ".join(names[1][k:n]) or "none")
            yield f"equations: {gone} -> {come}"
            continue
        for (name, old_numbers), (_, new_numbers) in zip(before[i:j], after[k:n], strict=True):
            for a, b in zip(old_numbers, new_numbers, strict=False):
                if np.ndim(a) == np.ndim(b) == 0 and a != b and not (a != a and b != b):
                    yield f"{name} {a} -> {b}"
    for a, b in zip(old.consts, new.consts, strict=False):
        if np.shape(a) != np.shape(b):
            yield f"constant of shape {np.shape(a)} -> {np.shape(b)}"


def _operations(jaxpr: Jaxpr) -> Iterator[tuple[str, list[Any]]]:
    """Name and literal numbers of every equation, inside of calls too; conversions aside."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _ASIDE:
            continue
        yield eqn.primitive.name, [v.val for v in eqn.invars if isinstance(v, Literal)]
        for inner, _ in bodies(eqn):
            yield from _operations(inner)
