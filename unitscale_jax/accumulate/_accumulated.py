"""Gradient accumulation: the gradient of a large batch, one part of its rows at a time.

    W_t   = sum_k w_(k,t)                                  first pass: only the weights
    grads = sum_k d/dparams sum_t c_t * total_(k,t)        second pass: c_t = coef_t * scale / W_t

Both are scans, so the activations of a single part are alive at any moment, and the result is the
gradient of the whole batch for any number of parts, whatever each part weighs.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from unitscale_jax import rules, tree as trees
from unitscale_jax.accumulate import _inplace
from unitscale_jax.errors import uneven_rows
from unitscale_jax.loss import (
    Denominators,
    Given,
    Grad,
    Mean,
    Part,
    Reduction,
    Terms,
    check_grad,
    first,
    keys_of_rows,
    reduction_of,
    row_count,
    scalar_terms,
    split,
    weight_slice,
)
from unitscale_jax.mesh_axes import (
    agree,
    axes_of,
    devices_over,
    names_of,
    varying,
    varying_axes,
    zeros,
)
from unitscale_jax.trace.program import (
    Traced,
    as_arrays,
    compiled_once,
    trace,
)
from unitscale_jax.typing import Batch, Loss, MeshAxis, Params, State


def accumulated(
    grad_fn: Grad,
    parts: int,
    *,
    mesh_axis: MeshAxis = (),
    mask: rules.Pattern | Sequence[rules.Pattern] | None = None,
    reduce: rules.Rules[str] = (),
    nonfinite: Literal["keep", "drop"] = "keep",
    inplace: bool = False,
) -> Grad:
    """Evaluates a gradient station part by part, summing in float32.

    The result equals `grad_fn` on the whole batch for every `parts` from 1 to the number of rows,
    whether or not it divides them, for token weights and for several terms alike. What is not a sum
    over rows (in-batch negatives, batch normalization) no accumulator can split exactly;
    `us.testing.check_parts` finds it.

    Args:
        grad_fn: A `us.Grad`, as `us.value_and_grad` or another technique returns it.
        parts: Number of parts K. Part k holds rows k, k + K, k + 2K, ...
        mesh_axis: Manual mesh axes, inside `shard_map`, over which the batch is sharded. The
            gradient is then that of the whole batch, with one reduction over them a step.
        mask: Patterns of the batch leaves to set to zero in rows that only fill up the last part.
            Needed for a loss that sums its rows itself when `parts` does not divide them.
        reduce: Rules `(pattern, kind)` for auxiliary outputs, with a kind of "sum", "mean" (by rows
            that count), "max", "last" and "concat" (rows in order). A `us.Mean` needs none. With
            "last", `aux["state"]` (or `aux`, if it has the structure of `state`) is what the next
            part receives as `state`.
        nonfinite: "keep" lets a NaN reach the result, where a loss scale sees it. "drop" leaves a
            part out of sums and weights if any of its totals or gradients is not finite, at the
            price of a second pass and one more gradient; the term "dropped" then counts such parts.
            Of a dropped part "concat" gives NaN (0 for integers); "last" is the last good one, and
            if none is good, `state` as it came.
        inplace: Adds gradients into one buffer inside the backward pass, instead of holding a
            part's gradient beside the sum. Takes float32 parameters, cast inside the loss.

    Returns:
        A `Grad` of the same signature.

    Raises:
        TypeError: `grad_fn` is not a `Grad`, or `mesh_axis` no name.
        ValueError: Here for options that exclude each other; on a call for what `value_and_grad`
            refuses, more parts than rows, and auxiliary outputs without a rule.

    Example:
        >>> def loss(w, batch):
        ...     return us.Mean(jnp.sum(batch["m"] * (batch["x"] * w) ** 2), batch["m"].sum())
        >>> batch = {"x": jnp.arange(1.0, 9.0), "m": jnp.array([1.0, 1, 1, 1, 1, 0, 0, 0])}
        >>> grad_fn = us.value_and_grad(loss)
        >>> [float(us.accumulated(grad_fn, parts)(2.0, batch)[2]) for parts in (1, 2, 4, 8)]
        [44.0, 44.0, 44.0, 44.0]
    """
    _check_options(grad_fn, parts, nonfinite, inplace)
    axes = names_of(mesh_axis)

    def call(params: Params, batch: Batch, given: Given) -> tuple[Terms, Any, Params]:
        if nonfinite == "drop":
            _check_drop(given.denominators)
        devices_over(axes)
        rows, state = row_count(batch), given.state
        key = keys_of_rows(given.key, rows, start=_first_row(axes, rows))
        stacked = split(batch, key, given.valid, rows, parts, mask)
        if rows % parts and mask is None:
            _check_tail(grad_fn.loss, params, first(stacked), given, rows, parts)
        params = varying(params, axes)
        weigh = _weigher(grad_fn.loss, params, stacked, given, axes)
        buffers = _inplace.buffers(params) if inplace else None
        part_fn = _part_fn(grad_fn, given.scale, buffers)
        traced = trace(part_fn, *as_arrays((params, first(stacked), state, weigh(None))))
        per_part, uneven = -(-rows // parts), stacked.valid is not None and mask is None
        kinds = (
            reduction_of(traced.result[0], (), per_part, uneven=uneven),
            reduction_of(traced.result[1], reduce, per_part, uneven=uneven),
        )
        run = lambda kept: _sum_parts(traced, params, stacked, state, weigh(kept), kinds, kept)
        sums, kept = _until_stable(run, parts, axes) if nonfinite == "drop" else run(None)
        if inplace:
            sums = sums._replace(grads=_inplace.contents(buffers))
        terms, aux, grads = _whole(sums, kinds, rows, axes)
        return (terms if kept is None else _counted(terms, kept, axes)), aux, grads

    return Grad(loss=grad_fn.loss, call=compiled_once(call))


class _Sums(NamedTuple):
    """What the parts so far add up to, and what was kept of each of them.

    Attributes:
        terms: For each term the reduction of its totals and weights.
        aux: For each auxiliary leaf its reduction.
        grads: Sum of gradients, float32 or wider.
        whole: For terms and aux what is kept of every part, stacked.
    """

    terms: list[Any]
    aux: list[Any]
    grads: Params
    whole: Any = ()


def _part_fn(grad_fn: Grad, scale: Any, buffers: Any) -> Callable[..., tuple[Terms, Any, Params]]:
    """`(params, part, state, denominators) -> (terms, aux, grads)` on some of the rows."""
    if buffers is not None:
        return _inplace.part_fn(grad_fn.loss, scale, buffers)
    return lambda params, part, state, denominators: grad_fn.call(
        params, part.batch, Given(state, None, denominators, scale).of(part)
    )


def _sum_parts(
    part_fn: Traced,
    params: Params,
    stacked: Part,
    state: State,
    denominators: Denominators,
    kinds: tuple[Reduction, Reduction],
    kept: jax.Array | None,
) -> tuple[_Sums, jax.Array | None]:
    """One pass over the parts; given `kept`, over those kept and finite, which it also returns."""
    (of_terms, of_aux), (terms, aux, grads) = kinds, part_fn.result
    blank = jax.tree.map(lambda x: zeros(x.shape, x.dtype, like=x), grads)
    start = (_Sums(of_terms.start(terms), of_aux.start(aux, state), blank), state)
    thread = of_aux.threading(aux, state)

    def add_part(carry: tuple[_Sums, State], xs: tuple[Part, Any]) -> tuple[Any, Any]:
        (so_far, state), (part, keep) = carry, xs
        terms, aux, grads = part_fn(params, part, state, denominators)
        used = None if keep is None else keep & trees.is_finite((terms, grads))
        sums = _Sums(
            terms=of_terms.step(so_far.terms, terms, None),
            aux=of_aux.step(so_far.aux, aux, part.valid),
            grads=jax.tree.map(jnp.add, so_far.grads, grads),
        )
        after = (sums, thread(aux, state))
        after = after if used is None else trees.select(used, after, carry)
        whole = of_terms.kept_whole(terms, used), of_aux.kept_whole(aux, used)
        return agree(after, carry), (whole, used)

    # A sum must vary over the axes of what is added to it, and of what decides whether it is added.
    mixed = start if kept is None else varying(start, axes_of((part_fn.result, stacked)))
    mixed = (mixed[0], agree(mixed[1], thread(aux, mixed[1])))
    (sums, _), (whole, used) = jax.lax.scan(add_part, mixed, (stacked, kept))
    return sums._replace(whole=whole), used


class _Pass(NamedTuple):
    sums: _Sums
    kept: jax.Array
    stable: jax.Array


def _until_stable(
    run: Callable[..., Any], parts: int, axes: Sequence[str]
) -> tuple[_Sums, jax.Array]:
    """Repeats passes until no part of the last one was bad: one when all are finite, else two.

    The weights of a pass count the parts it keeps, so a part that turns out bad makes the pass
    void: no common factor could repair a sum of terms with different denominators.
    """
    kept = varying(jnp.ones(parts, bool), axes)
    sums, used = jax.eval_shape(run, kept)
    kept = varying(kept, sorted(varying_axes(used)))

    def again(last: _Pass) -> _Pass:
        sums, used = run(last.kept)
        changed = jnp.any(used != last.kept).astype(jnp.int32)
        over = sorted(varying_axes(changed))
        return _Pass(sums, used, (jax.lax.psum(changed, tuple(over)) if over else changed) == 0)

    blank = jax.tree.map(lambda x: zeros(x.shape, x.dtype, like=x), sums)
    last = jax.lax.while_loop(lambda p: ~p.stable, again, _Pass(blank, kept, jnp.array(False)))
    return last.sums, last.kept


def _whole(sums: _Sums, kinds: Any, rows: int, axes: Sequence[str]) -> tuple[Terms, Any, Params]:
    """Sums over the mesh axes: the one reduction of the step."""
    of_terms, of_aux = kinds
    grads = jax.lax.psum(sums.grads, tuple(axes)) if axes else sums.grads
    terms = of_terms.finish(sums.terms, sums.whole[0], rows, axes)
    return terms, of_aux.finish(sums.aux, sums.whole[1], rows, axes), grads


def _counted(terms: Terms, kept: jax.Array, axes: Sequence[str]) -> Terms:
    """Adds the term "dropped": how many parts, of how many."""
    bad, all_parts = jnp.sum(~kept).astype(jnp.float32), jnp.float32(kept.size)
    if axes:
        bad, all_parts = jax.lax.psum(bad, tuple(axes)), jax.lax.psum(all_parts, tuple(axes))
    return terms | {"dropped": Mean(bad, all_parts, jnp.float32(0))}  # a name of `loss.RESERVED`


def _weigher(
    loss: Loss,
    params: Params,
    stacked: Part,
    given: Given,
    axes: Sequence[str],
) -> Callable[[jax.Array | None], Denominators]:
    """`kept -> weights` of the parts kept, over all devices: the first of the two passes."""
    fixed = given.denominators
    if fixed is not None:
        return lambda _: fixed
    part = first(stacked)
    slice_fn = weight_slice(loss, params, part.batch, given.of(part))
    one = lambda _, p: (None, slice_fn(p.batch, given.of(p)))
    weights = jax.lax.scan(one, None, stacked)[1]  # (parts,) for each term

    def weigh(kept: jax.Array | None) -> Denominators:
        keep = lambda w: w if kept is None else jnp.where(kept, w, 0)
        total = lambda w: jnp.sum(keep(w))
        whole = lambda w: jax.lax.psum(total(w), tuple(axes)) if axes else total(w)
        return {name: whole(w) for name, w in weights.items()}

    return weigh


def _first_row(axes: Sequence[str], rows: int) -> Any:
    """Index in the whole batch of this device's first row."""
    shard: Any = 0
    for axis in axes:
        shard = shard * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
    return shard * rows


def _check_options(grad_fn: Grad, parts: int, nonfinite: str, inplace: bool) -> None:
    check_grad(grad_fn, "accumulated")
    if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
        raise ValueError(f"`parts` is {parts!r}; expected a positive int.")
    if nonfinite not in ("keep", "drop"):
        raise ValueError(f"`nonfinite` is {nonfinite!r}; expected 'keep' or 'drop'.")
    if inplace and nonfinite == "drop":
        raise ValueError(
            "inplace=True adds a part's gradient before anyone can see whether it is finite. Use "
            "nonfinite='keep' and a loss scale, or leave inplace out."
        )
    if inplace and not grad_fn.direct:
        raise ValueError(
            "inplace=True takes the result of us.value_and_grad itself; with another technique "
            "in between, leave inplace out."
        )


def _check_drop(denominators: Denominators | None) -> None:
    if denominators is not None:
        raise ValueError(
            "nonfinite='drop' must know the weights it drops, so it goes on the outermost "
            "accumulation; this one was given `denominators`."
        )


def _check_tail(
    loss: Loss, params: Params, part: Part, given: Given, rows: int, parts: int
) -> None:
    fixed = scalar_terms(loss, params, part.batch, given.of(part))
    if fixed:
        raise ValueError(
            f"{uneven_rows(f'{parts} parts', rows, fixed[0])}; or name in `mask` the batch leaves "
            "that are zero in rows that do not count; or choose `parts` among the divisors of "
            f"{rows}."
        )
