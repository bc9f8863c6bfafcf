"""Data parallelism and ZeRO: rows on many devices, one reduction a step.

    W     = sum_i w_i                                    of scalars, before any gradient
    grads = sum_i d/dparams sum_t coef_t total_(t,i) / W_t    device i on its own rows

Parameters are cast to differing over the data axis *before* they are differentiated, so that no
device's gradient is reduced inside a loop, however many parts it comes in: the sum over devices is
the last thing a step does. ZeRO (Rajbhandari et al., arXiv 1910.02054) keeps a share of that sum.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from unitscale_jax import rules, tree as trees
from unitscale_jax.errors import expected, uneven_rows
from unitscale_jax.loss import (
    Denominators,
    Given,
    Grad,
    Part,
    Terms,
    check_grad,
    keys_of_rows,
    row_count,
    scalar_terms,
)
from unitscale_jax.mesh_axes import varying, varying_axes
from unitscale_jax.parallel.data._compress import Compression, summed
from unitscale_jax.parallel.data._devices import Outputs, filled, total
from unitscale_jax.parallel.data._feedback import Feedback, check_feedback
from unitscale_jax.parallel.data._local import Local, direct, replayed
from unitscale_jax.parallel.layouts._context import axis_size, under
from unitscale_jax.parallel.layouts._layout import Layout
from unitscale_jax.parallel.layouts._specs import held, spec_of, zero_spec
from unitscale_jax.typing import Batch, Params, State


def reduced(
    grad_fn: Grad,
    mesh_axis: str = "dp",
    *,
    zero: Literal[0, 1, 2, 3] = 0,
    gather: Literal["step", "layer"] = "step",
    layout: Layout | None = None,
    compress: Compression | None = None,
    reduce: rules.Rules[str] = (),
) -> Grad:
    """Evaluates a gradient station on the rows of each device, and adds up once a step.

    Args:
        grad_fn: A `us.Grad`, as `us.value_and_grad`, `us.accumulated` or `pipelined` return it.
            Accumulation goes inside: `reduced(accumulated(grad_fn, parts))` reduces once.
        mesh_axis: The mesh axis that holds the rows; it is manual in here. All other axes stay with
            the partitioner, so any layout of the parameters over them is kept.
        zero: What each of n devices keeps. 0: everything. 1, 2: gradients leave as shares, and so
            optimizer state is one (`sharded`). 3: parameters come as shares too.
        gather: With `zero=3`, when parameters are whole: "step", once, before the parts; "layer",
            each where it is used and again in the backward pass, by a loss wrapped in `gathered`.
        layout: How the parameters lie over the other axes; its `over(over)` says where shares are
            cut. Needed with `zero` or `compress` on a mesh that has such axes.
        compress: "bfloat16" or "int8", the numbers that gradients travel in; added up in float32.
        reduce: Rules `(pattern, kind)` for auxiliary outputs, as in `us.accumulated`, with a kind
            of "sum", "mean" (by rows that count), "max" and "concat". A `us.Mean` needs none.

    Returns:
        A `Grad` of global arrays with the same signature, to be called under `jax.set_mesh(mesh)`.
        It equals `grad_fn` on one device for any size of the axis, also where that does not
        divide the rows: rows are then filled up with ones that do not count. With `compress`,
        `state=` may be a `Feedback`.

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
    _check_options(grad_fn, zero, gather, compress)

    def call(params: Params, batch: Batch, given: Given) -> tuple[Terms, Any, Params]:
        n, rows = axis_size(mesh_axis, "reduced"), row_count(batch)
        part = filled(Part(batch, keys_of_rows(given.key, rows), given.valid), rows, n)
        feedback = given.state if isinstance(given.state, Feedback) else None
        given = given._replace(state=given.state if feedback is None else feedback.state).of(part)
        _check_filled(grad_fn, params, part.batch, given, rows, n)
        check_feedback(feedback, params, compress, n)
        combine = Outputs(reduce, mesh_axis)
        if n == 1 and gather == "step" and feedback is None:
            # No collective is needed, not even one of one device.
            terms, aux, grads = grad_fn.call(params, batch, given)
            combine.check(aux, part)
            return terms, aux, grads
        cuts = _cuts(params, layout, mesh_axis, n)
        given = given._replace(scale=jnp.asarray(given.scale))
        one = _OneDevice(direct(grad_fn), mesh_axis, zero, gather, compress, params, cuts)
        errors = None if feedback is None else jax.tree.leaves(feedback.error)
        try:
            out = _on_devices(one, combine, part, given, errors)
        except TypeError as refused:
            # JAX refuses a loop whose carry starts alike on all devices and ends differently, as
            # that of a recurrent layer. Traced where the axis is not manual, it has no such type.
            try:
                local = replayed(grad_fn, params, part, given.state, given.scale, mesh_axis)
            except Exception:  # the station fails without the axis too, so the axis is not to blame
                raise refused from None
            out = _on_devices(replace(one, local=local), combine, part, given, errors)
        terms, grads, lost, sums, stacks = out
        aux = combine.outputs(sums, stacks, rows)
        aux = aux if feedback is None else feedback.after(lost, aux)
        return terms, aux, jax.tree.structure(params).unflatten(grads)

    return Grad(loss=grad_fn.loss, call=call)


# ------------------------------------------------------------------------------ one device's work


class _Cut(NamedTuple):
    """Where a parameter is cut over the data axis, and how it lies over the other axes.

    Attributes:
        dim: The dimension that is cut; None where every device keeps the whole parameter.
        spec: The data axis alone, as the `shard_map` over it takes it.
        others: All other mesh axes, which stay with the partitioner.
    """

    dim: int | None
    spec: P
    others: P


@dataclass(frozen=True)
class _OneDevice:
    """The work of one device inside the `shard_map`; the options are those of `reduced`."""

    local: Local
    over: str
    zero: int
    gather: str
    compress: Compression | None
    params: Params  # for their structure
    cuts: list[_Cut]

    def gradients(
        self,
        leaves: list[Any],
        part: Part,
        state: State,
        denominators: Denominators | None,
        scale: jax.Array,
    ) -> tuple[Terms, Any, list[jax.Array]]:
        """Evaluates this device's rows, their terms divided by the weights of all devices' rows."""
        if self.zero == 3 and self.gather == "step":
            pairs = zip(leaves, self.cuts, strict=True)
            leaves = [_gathered_leaf(x, cut, self.over) for x, cut in pairs]
        params = varying(jax.tree.structure(self.params).unflatten(leaves), [self.over])
        if denominators is None:
            mine = self.local.weigh(params, part, state)
            denominators = lax.psum(varying(mine, [self.over]), self.over)
        terms, aux, grads = self.local.grad(params, part, state, denominators, scale)
        return terms, aux, jax.tree.leaves(grads)

    def sums(
        self, grads: list[jax.Array], errors: list[jax.Array] | None, scale: jax.Array
    ) -> tuple[list[Any], list[Any]]:
        """Adds up gradients over devices: `(totals or shares of them, what compression lost)`."""
        add = functools.partial(_added_up, mesh_axis=self.over, compress=self.compress, scale=scale)
        if errors is not None:
            # One device that overflows voids the step of all, so all keep the errors they had.
            finite = lax.pmin(trees.is_finite(grads).astype(jnp.int32), self.over) > 0
            add = functools.partial(add, finite=finite)
        totals, lost = [], []
        owed = [None] * len(grads) if errors is None else errors
        named = zip(trees.names(self.params), grads, self.cuts, owed, strict=True)
        for name, grad, cut, error in named:
            if self.gather == "layer" and cut.dim is not None:
                whole, left = grad, None  # the transpose of its gather has added it up already
            else:
                dim = cut.dim if self.zero else None
                whole, left = add(name, grad, cut, error, dim=dim)
            totals.append(whole)
            lost.append(left)
        return totals, lost


def _on_devices(
    one: _OneDevice, combine: Outputs, part: Part, given: Given, errors: list[jax.Array] | None
) -> tuple[Any, ...]:
    """Does one device's work on every device of the data axis.

    Args:
        one: The work.
        combine: How auxiliary outputs of all devices become one.
        part: The rows of all devices.
        given: Its state, denominators and scale, which all devices have.
        errors: What compression lost in earlier steps, one row for each device; None: nothing.

    Returns:
        `(terms, gradients, errors, sums, stacks)`: gradients are totals, or with ZeRO shares, leaf
        by leaf; sums and stacks are the auxiliary outputs, for `combine.outputs`.
    """
    axis, shares = one.over, [cut.spec for cut in one.cuts]

    def body(
        leaves: list[Any], part: Part, state: State, errors: Any, factors: Any
    ) -> tuple[Any, ...]:
        terms, aux, grads = one.gradients(leaves, part, state, *factors)
        sums = one.sums(grads, errors, factors[1])
        whole = {name: total(term, axis) for name, term in terms.items()}
        return (whole, *sums, *combine(aux, part))

    return jax.shard_map(
        body,
        in_specs=(shares if one.zero == 3 else P(), P(axis), P(), P(axis), P()),
        out_specs=(P(), shares if one.zero else P(), P(axis), P(), P(axis)),
        axis_names={axis},
    )(jax.tree.leaves(one.params), part, given.state, errors, (given.denominators, given.scale))


def _cuts(params: Params, layout: Layout | None, mesh_axis: str, n: int) -> list[_Cut]:
    """Decides for each parameter where the data axis of `n` devices cuts it."""
    leaves = trees.named_leaves(params)
    if layout is None:
        specs = {name: zero_spec(jnp.shape(x), mesh_axis, n) for name, x in leaves.items()}
        return [_cut(spec, mesh_axis) for spec in specs.values()]
    if layout.mesh.shape.get(mesh_axis, 1) != n:
        raise ValueError(
            f"the layout is for a mesh of {dict(layout.mesh.shape)}, and here {mesh_axis}={n}. Lay "
            "the parameters out on the mesh that is set."
        )
    if set(layout.by_name) != set(leaves):
        missing = sorted(set(layout.by_name) ^ set(leaves))
        raise ValueError(
            f"the layout and the parameters differ in {missing[0]!r}. Make the layout of these "
            "parameters."
        )
    both = layout.over(mesh_axis).by_name
    return [_cut(both[name], mesh_axis) for name in leaves]


def _cut(both: P, mesh_axis: str) -> _Cut:
    """Takes a spec apart: `P("tp", "dp")` is `P(None, "dp")` of rows and `P("tp")` of the others.

    One dimension under two axes, as in `P(("dp", "tp"))`, cannot be taken apart, since one of them
    is manual and the other one the partitioner's.
    """
    by = held(both, len(both))
    dim = next((k for k, axes in enumerate(by) if mesh_axis in axes), None)
    if dim is None:
        return _Cut(None, P(), both)
    if by[dim] != (mesh_axis,):
        raise ValueError(
            f"dimension {dim} is to be held by {by[dim]}, and {mesh_axis!r}, which is manual here, "
            "must hold a dimension alone. Leave it out of the layout; ZeRO finds a free dimension."
        )
    others = spec_of([() if k == dim else axes for k, axes in enumerate(by)])
    return _Cut(dim, P(*[None] * dim, mesh_axis), others)


def _gathered_leaf(share: jax.Array, cut: _Cut, mesh_axis: str) -> jax.Array:
    """Makes a parameter whole from the shares of all devices."""
    if cut.dim is None:
        return share

    def gather(x: jax.Array) -> jax.Array:
        return lax.all_gather(x, mesh_axis, axis=cut.dim, tiled=True)

    return under(cut.others, gather)(share)


def _added_up(
    name: str,
    grad: jax.Array,
    cut: _Cut,
    error: jax.Array | None,
    *,
    mesh_axis: str,
    compress: Compression | None,
    scale: jax.Array,
    dim: int | None,
    finite: jax.Array | bool = True,
) -> tuple[jax.Array, jax.Array | None]:
    """Adds up one gradient over devices.

    Returns:
        The gradient of all rows, or this device's share of it; and with an `error` what compression
        takes away on this device, to be added to the next gradient.
    """
    if mesh_axis not in varying_axes(grad):
        raise ValueError(
            f"the gradient of {name!r} is reduced over {mesh_axis!r} already, and would be counted "
            f"once per device. Leave {mesh_axis!r} out of `mesh_axis=` of what is inside `reduced`."
        )
    add = functools.partial(summed, mesh_axis=mesh_axis, compress=compress, dim=dim)
    if error is None:
        return under(cut.others, lambda g: add(g).total)(grad), None
    # Gradients carry the loss scale, which may change before the next step; errors do not carry it.
    owed = error[0] * scale.astype(jnp.float32)
    total, lost = under(cut.others, add)(grad + owed)
    left = lost / scale.astype(jnp.float32)
    return total, jnp.where(finite, left, error[0])[None]


# --------------------------------------------------------------------------------- checks


def _check_options(grad_fn: Grad, zero: int, gather: str, compress: str | None) -> None:
    check_grad(grad_fn, "reduced")
    if zero not in (0, 1, 2, 3) or isinstance(zero, bool):
        raise ValueError(expected("`zero`", zero, (0, 1, 2, 3)))
    if compress not in (None, "bfloat16", "int8"):
        raise ValueError(expected("`compress`", compress, (None, "bfloat16", "int8")))
    if gather not in ("step", "layer") or (gather == "layer" and zero != 3):
        raise ValueError(
            f"`gather` is {gather!r} with zero={zero}; expected 'step', or 'layer' with zero=3, "
            "where parameters come as shares."
        )


def _check_filled(
    grad_fn: Grad, params: Params, batch: Batch, given: Given, rows: int, n: int
) -> None:
    """Raises `ValueError` if rows that fill up the last device would count in a term of the loss.

    They get weight 0 where the loss returns a term per row. A sum over rows includes them.
    """
    if rows % n == 0:
        return
    fixed = scalar_terms(grad_fn.loss, params, batch, given)
    if fixed:
        raise ValueError(
            f"{uneven_rows(f'{n} devices', rows, fixed[0])}, or give {rows + -rows % n} rows, some "
            "of weight 0."
        )
