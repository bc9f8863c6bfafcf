"""Data parallelism and ZeRO: rows on many devices, one reduction a step.

    W     = sum_i w_i                                    of scalars, before any gradient
    grads = sum_i d/dparams sum_t coef_t total_(t,i) / W_t    device i on its own rows

Parameters are cast to differing over the data axis *before* they are differentiated, so that no
device's gradient is reduced inside a loop, however many parts it comes in: the sum over devices is
the last thing a step does. ZeRO (Rajbhandari et al., arXiv 1910.02054) keeps a share of that sum.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from unitscale_jax import rules, tree as trees
from unitscale_jax.loss import (
    Denominators,
    Grad,
    Mean,
    Part,
    Reduction,
    Terms,
    keys_of_rows,
    reduction_of,
    row_count,
    scalar_terms,
    weights_of,
)
from unitscale_jax.parallel._context import axis_size, under
from unitscale_jax.parallel._layout import Layout
from unitscale_jax.parallel._specs import held, spec_of, zero_spec
from unitscale_jax.parallel._wire import WireDType, summed
from unitscale_jax.trace import varying, varying_axes
from unitscale_jax.typing import Batch, Key, Params, State


def reduced(
    grad_fn: Grad,
    over: str = "dp",
    *,
    zero: Literal[0, 1, 2, 3] = 0,
    gather: Literal["step", "layer"] = "step",
    layout: Layout | None = None,
    wire: WireDType | None = None,
    reduce: rules.Rules[str] = (),
) -> Grad:
    """Evaluates a gradient station on the rows of each device, and adds up once a step.

    Args:
        grad_fn: A `us.Grad`, as `us.value_and_grad`, `us.accumulated` or `pipelined` return it.
            Accumulation goes inside: `reduced(accumulated(grad_fn, parts))` reduces once.
        over: The mesh axis that holds the rows; it is manual in here. All other axes stay with the
            partitioner, so any layout of the parameters over them is kept.
        zero: What each of n devices keeps. 0: everything. 1, 2: gradients leave as shares, and so
            optimizer state is one (`sharded`). 3: parameters come as shares too.
        gather: With `zero=3`, when parameters are whole: "step", once, before the parts; "layer",
            each where it is used and again in the backward pass, by a loss wrapped in `gathered`.
        layout: How the parameters lie over the other axes; its `over(over)` says where shares are
            cut. Needed with `zero` or `wire` on a mesh that has such axes.
        wire: "bfloat16" or "int8", the numbers that gradients travel in; added up in float32.
        reduce: Rules `(pattern, kind)` for auxiliary outputs, as in `us.accumulated`, with a kind
            of "sum", "mean" (by rows that count), "max" and "concat". A `us.Mean` needs none.

    Returns:
        A `Grad` of global arrays with the same signature, to be called under `jax.set_mesh(mesh)`.
        It equals `grad_fn` on one device for any size of the axis, also where that does not
        divide the rows: rows are then filled up with ones that do not count. With `wire`, `state=`
        may be a `Feedback`.

    Raises:
        TypeError: `grad_fn` is not a `Grad`.
        ValueError: On a call: no mesh, no such axis, or another owner of it; `grad_fn` has reduced
            over it already; the axis does not divide the rows of a loss that sums them itself; an
            auxiliary output without a rule.

    Example:
        >>> def loss(w, batch):
        ...     return us.Mean(batch["m"] * (batch["x"] * w), batch["m"])
        >>> batch = {"x": jnp.arange(1.0, 9.0), "m": jnp.array([1.0, 1, 1, 0, 1, 0, 0, 0])}
        >>> grad_fn = us.accumulated(us.value_and_grad(loss), 2)
        >>> with jax.set_mesh(us.parallel.mesh(dp=2, tp=4)):
        ...     terms, _, grads = jax.jit(us.parallel.reduced(grad_fn, "dp"))(1.0, batch)
        >>> float(terms["loss"].total), float(terms["loss"].weight), float(grads)
        (11.0, 4.0, 2.75)
    """
    _check_options(grad_fn, zero, gather, wire)

    def call(
        params: Params,
        batch: Batch,
        *,
        state: State,
        key: Key | None,
        denominators: Denominators | None,
        scale: Any,
        valid: jax.Array | None,
    ) -> tuple[Terms, Any, Params]:
        n, rows = axis_size(over, "reduced"), row_count(batch)
        leaves, structure = jax.tree.flatten(params)
        cuts = _cuts(params, layout, over, n)
        part = _filled(Part(batch, keys_of_rows(key, rows), valid), rows, n)
        _check_filled(grad_fn, params, part, state, rows, n)
        feedback = state if isinstance(state, Feedback) else None
        _check_feedback(feedback, leaves, wire, n)
        errors = None if feedback is None else jax.tree.leaves(feedback.error)
        combine = _Outputs(reduce, over)

        def body(
            leaves: list[Any], part: Part, state: State, errors: Any, given: Any
        ) -> tuple[Any, ...]:
            denominators, scale = given
            if zero == 3 and gather == "step":
                leaves = [_gathered_leaf(x, cut, over) for x, cut in zip(leaves, cuts, strict=True)]
            local = varying(structure.unflatten(leaves), [over])
            if denominators is None:
                mine = weights_of(grad_fn.loss, local, part.batch, state, part.key, part.valid)
                denominators = lax.psum(varying(mine, [over]), over)
            terms, aux, grads = grad_fn(
                local,
                part.batch,
                state=state,
                key=part.key,
                denominators=denominators,
                scale=scale,
                valid=part.valid,
            )
            add = functools.partial(_added_up, over=over, wire=wire, scale=scale)
            if errors is not None:  # one device that overflows voids the step of all
                finite = lax.pmin(trees.is_finite(grads).astype(jnp.int32), over) > 0
                add = functools.partial(add, finite=finite)
            errors = [None] * len(cuts) if errors is None else errors
            whole = lambda cut: zero == 0 or cut.dim is None
            done = lambda cut: gather == "layer" and zero == 3 and cut.dim is not None
            named = zip(trees.names(params), jax.tree.leaves(grads), cuts, errors, strict=True)
            sums = [
                (g, None)
                if done(cut)
                else add(name, g, cut, e, dim=None if whole(cut) else cut.dim)
                for name, g, cut, e in named
            ]
            return (
                {name: _total(term, over) for name, term in terms.items()},
                [total for total, _ in sums],
                [lost for _, lost in sums],
                *combine(aux, part),
            )

        shares = [cut.spec for cut in cuts]
        terms, grads, lost, sums, stacks = jax.shard_map(
            body,
            in_specs=(shares if zero == 3 else P(), P(over), P(), P(over), P()),
            out_specs=(P(), shares if zero else P(), P(over), P(), P(over)),
            axis_names={over},
        )(
            leaves,
            part,
            state if feedback is None else feedback.state,
            errors,
            (denominators, jnp.asarray(scale)),
        )
        aux = combine.outputs(sums, stacks, rows)
        if feedback is not None:
            of_error = jax.tree.structure(feedback.error)
            aux = Feedback(error=of_error.unflatten(lost), state=aux)
        return terms, aux, structure.unflatten(grads)

    return Grad(loss=grad_fn.loss, call=call)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Feedback:
    """What wires have rounded away, to be added to the next gradient; made by `feedback`.

    Given as `state=` to a gradient that is `reduced` with a `wire`; the next one is its auxiliary
    output. It does not carry the loss scale, and a step that overflows leaves it as it was.

    Attributes:
        error: In the structure of the parameters, float32 `(n, *shape)`: of each device its own.
        state: The model's state, and in an auxiliary output the model's auxiliary outputs.
    """

    error: Any
    state: Any = None


def feedback(params: Params, over: str = "dp", state: State = None) -> Feedback:
    """Nothing rounded away yet; called under `jax.set_mesh(mesh)`.

    Args:
        params: The parameters, or their shapes.
        over: The mesh axis that gradients are reduced over.
        state: The model's state.

    Example:
        >>> with jax.set_mesh(us.parallel.mesh(dp=4, tp=2)):
        ...     us.parallel.feedback({"w": jnp.ones((3, 5))}).error["w"].shape
        (4, 3, 5)
    """
    n = axis_size(over, "feedback")
    make = lambda: jax.tree.map(lambda x: jnp.zeros((n, *jnp.shape(x)), jnp.float32), params)
    return Feedback(jax.jit(make, out_shardings=P(over))(), state)


# --------------------------------------------------------------------------------- leaves


class _Cut(NamedTuple):
    """Where a parameter is cut over the data axis, and how it lies over the other axes."""

    dim: int | None
    spec: P
    others: P


def _cuts(params: Params, layout: Layout | None, over: str, n: int) -> list[_Cut]:
    leaves = trees.named_leaves(params)
    if layout is None:
        specs = {name: zero_spec(jnp.shape(x), over, n) for name, x in leaves.items()}
        return [_cut(spec, over) for spec in specs.values()]
    if layout.mesh.shape.get(over, 1) != n:
        raise ValueError(
            f"the layout is for a mesh of {dict(layout.mesh.shape)}, and here {over}={n}. Lay the "
            "parameters out on the mesh that is set."
        )
    if set(layout.by_name) != set(leaves):
        missing = sorted(set(layout.by_name) ^ set(leaves))
        raise ValueError(
            f"the layout and the parameters differ in {missing[0]!r}. Make the layout of these "
            "parameters."
        )
    both = layout.over(over).by_name
    return [_cut(both[name], over) for name in leaves]


def _cut(both: P, over: str) -> _Cut:
    by = held(both, len(both))
    dim = next((k for k, axes in enumerate(by) if over in axes), None)
    if dim is None:
        return _Cut(None, P(), both)
    if by[dim] != (over,):
        raise ValueError(
            f"dimension {dim} is to be held by {by[dim]}, and {over!r}, which is manual here, must "
            "hold a dimension alone. Leave it out of the layout; ZeRO finds a free dimension."
        )
    return _Cut(
        dim, P(*[None] * dim, over), spec_of([a if k != dim else () for k, a in enumerate(by)])
    )


def _gathered_leaf(share: jax.Array, cut: _Cut, over: str) -> jax.Array:
    if cut.dim is None:
        return share
    whole = lambda x: lax.all_gather(x, over, axis=cut.dim, tiled=True)
    return under(cut.others, whole)(share)


def _added_up(
    name: str,
    grad: jax.Array,
    cut: _Cut,
    error: jax.Array | None,
    *,
    over: str,
    wire: WireDType | None,
    scale: jax.Array,
    dim: int | None,
    finite: jax.Array | bool = True,
) -> tuple[jax.Array, jax.Array | None]:
    """The gradient of all rows, or a share of it, and what this device's wire took away."""
    if over not in varying_axes(grad):
        raise ValueError(
            f"the gradient of {name!r} is reduced over {over!r} already, and would be counted once "
            f"per device. Leave {over!r} out of `axes=` of what is inside `reduced`."
        )
    if error is None:
        return under(cut.others, lambda g: summed(g, over, wire, dim=dim).total)(grad), None
    owed = error[0] * scale.astype(jnp.float32)
    total, lost = under(cut.others, lambda g: summed(g, over, wire, dim=dim))(grad + owed)
    left = lost / scale.astype(jnp.float32)
    return total, jnp.where(finite, left, error[0])[None]


def _total(term: Mean, over: str) -> Mean:
    total, weight = lax.psum(varying((term.total, term.weight), [over]), over)
    return Mean(total, weight, _same(term.coef, over))


def _same(x: jax.Array, over: str) -> jax.Array:
    """A number that all devices have alike, typed so."""
    return lax.pmax(x, over) if over in varying_axes(x) else x


# ------------------------------------------------------------------------------ rows and outputs


def _filled(part: Part, rows: int, n: int) -> Part:
    """Rows in a number that n divides; those that were added repeat the last and do not count."""
    missing = -rows % n
    if not missing:
        return part
    more = lambda x: jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing, *x.shape[1:]))])
    counted = jnp.ones(rows, bool) if part.valid is None else part.valid
    valid = jnp.concatenate([counted, jnp.zeros(missing, bool)])
    return Part(jax.tree.map(more, part.batch), jax.tree.map(more, part.key), valid)


class _Outputs:
    """Auxiliary outputs of all devices: sums leave whole, rows as they lie."""

    def __init__(self, kinds: rules.Rules[str], over: str) -> None:
        self._kinds, self._over = kinds, over
        self._reduction: Reduction | None = None

    def __call__(self, aux: Any, part: Part) -> tuple[list[Any], list[Any]]:
        """`(what is the same on all devices, rows)`."""
        rows = row_count(part.batch)
        reduction = reduction_of(aux, self._kinds, rows, uneven=part.valid is not None)
        if "last" in reduction.kinds:
            raise ValueError(
                "an auxiliary output of kind 'last' would differ between devices, which have seen "
                "other rows. Choose 'mean', as is usual for batch statistics."
            )
        self._reduction = reduction
        aux = varying(aux, [self._over])
        sums = reduction.step(reduction.start(aux), aux, part.valid)
        whole = [None if x is None else x[None] for x in reduction.kept_whole(aux, None)]
        found = jax.tree.leaves(
            reduction.finish(sums, whole, rows, [self._over]), is_leaf=lambda x: isinstance(x, Mean)
        )
        alike = lambda x: Mean(x.total, x.weight, _same(x.coef, self._over))
        found = [alike(x) if isinstance(x, Mean) else x for x in found]
        pairs = list(zip(reduction.kinds, found, strict=True))
        return [x for k, x in pairs if k != "concat"], [x for k, x in pairs if k == "concat"]

    def outputs(self, sums: list[Any], stacks: list[Any], rows: int) -> Any:
        """Both as the loss returned them."""
        assert self._reduction is not None  # set while the body was traced
        each = {True: iter(x[:rows] for x in stacks), False: iter(sums)}
        found = [next(each[kind == "concat"]) for kind in self._reduction.kinds]
        return jax.tree.unflatten(self._reduction.structure, found)


# --------------------------------------------------------------------------------- checks


def _check_options(grad_fn: Grad, zero: int, gather: str, wire: str | None) -> None:
    if not isinstance(grad_fn, Grad):
        raise TypeError(
            f"reduced takes what us.value_and_grad(loss) returns, and got {grad_fn!r}. A loss "
            "knows what its rows weigh; a bare gradient function does not."
        )
    if zero not in (0, 1, 2, 3) or isinstance(zero, bool):
        raise ValueError(f"`zero` is {zero!r}; expected 0, 1, 2 or 3.")
    if wire not in (None, "bfloat16", "int8"):
        raise ValueError(f"`wire` is {wire!r}; expected None, 'bfloat16' or 'int8'.")
    if gather not in ("step", "layer") or (gather == "layer" and zero != 3):
        raise ValueError(
            f"`gather` is {gather!r} with zero={zero}; expected 'step', or 'layer' with zero=3, "
            "where parameters come as shares."
        )


def _check_filled(
    grad_fn: Grad, params: Params, part: Part, state: State, rows: int, n: int
) -> None:
    if rows % n == 0:
        return
    inner = state.state if isinstance(state, Feedback) else state
    fixed = scalar_terms(grad_fn.loss, params, part.batch, inner, part.key)
    if fixed:
        raise ValueError(
            f"{n} devices do not divide {rows} rows, and term {fixed[0]!r} sums its rows itself, "
            "so those that fill up the last device cannot be left out. Return one number per row, "
            f"us.Mean(total=losses, weight=counts), or give {rows + -rows % n} rows, some of "
            "weight 0."
        )


def _check_feedback(feedback: Feedback | None, leaves: list[Any], wire: str | None, n: int) -> None:
    if feedback is None:
        return
    if wire is None:
        raise ValueError(
            "`state` is a Feedback, and without a `wire` nothing is rounded away. Pass "
            "wire='int8', or the model's own state."
        )
    want = [(n, *jnp.shape(x)) for x in leaves]
    got = [jnp.shape(x) for x in jax.tree.leaves(feedback.error)]
    if got != want:
        raise ValueError(
            f"`state.error` has shapes {got}, expected {want}. Make it with "
            "us.parallel.feedback(params) under the mesh that is set."
        )
