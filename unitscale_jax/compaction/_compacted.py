"""Compaction of functions: the traced equations on smaller arrays.

    compacted(fn, plan)(compact(params, plan), x) == fn(mask(params, plan), x)

The equations of the dense function are evaluated again, and the few that say a size say the smaller
one. Constants stay what they were: a mean over a removed channel still divides by the dense width,
a scale by the dense fan-in. So it *is* the masked function, without the work on zeros, and it goes
on being it while the kept parameters are trained. A function built anew for the smaller sizes
has other constants where it computes them from sizes; `verify_rebuild` names those.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.compaction._cuts import Cuts
from unitscale_jax.compaction._groups import CompactionPlan
from unitscale_jax.loss import around
from unitscale_jax.trace.dimensions import Axes, coupled, new_axes, pin
from unitscale_jax.trace.program import Site, shape_of, trace_call
from unitscale_jax.trace.rewrite import Derivative, Rewriter


def compacted(fn: Callable[..., Any], plan: CompactionPlan) -> Callable[..., Any]:
    """Evaluates `fn` on compact parameters.

    Args:
        fn: The function of `(params, *args)` that the plan was made for.
        plan: What is kept.

    Returns:
        A function with the signature of `fn` that takes `compact(params, plan)`. Other inputs may
        have other shapes, such as another batch size. `fn` is traced once per call, at its dense
        shapes: call it under `jit`. Jit, remat, loops and custom derivatives stay where they are.

    Raises:
        ValueError: Parameters do not have the shapes that the plan leaves, or a group of the plan
            is no group of `fn` at these inputs.

    Law: for groups that are `exact` it equals `fn` on `mask(params, plan)`, and its gradients are
    those of `fn` in the kept channels, for all parameters for which these are finite. A custom
    derivative is taken at its word: `verify` compares gradients, too. Along a `layer` group a scan
    runs over the kept layers only.

    Example:
        >>> params = {"up": jnp.ones((8, 16)), "down": jnp.ones((16, 4))}
        >>> mlp = lambda p, x: jax.nn.relu(x @ p["up"]).reshape(2, 16) @ p["down"]
        >>> x = jnp.ones((2, 8))
        >>> graph = us.compaction.groups(mlp, params, x)
        >>> plan = us.compaction.plan_of(graph, {"down:0": [0, 3, 5]})
        >>> small = compacted(mlp, plan)(us.compaction.compact(params, plan), x)
        >>> bool((small == mlp(us.compaction.zero_channels(params, plan), x)).all())
        True
    """

    @around(fn, "compacted")
    def compacted_fn(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        dense = _dense(params, plan)
        staged = trace_call(fn, dense, *args, **kwargs)
        leaves = jax.tree.leaves(((params, *args), kwargs))
        paths = dict(enumerate(trees.names(params)))
        cuts, closed = Cuts(plan), staged.closed
        axes = [
            cuts.axes(paths[k]) if k in paths else new_axes(shape_of(var), "input")
            for k, var in zip(staged.positions, closed.jaxpr.invars, strict=True)
        ]
        found = coupled(closed.jaxpr, axes, closed.consts)
        for out in found.results:
            pin(out, "output")
        _check_groups(cuts.include(found), "the function")
        operands = [leaves[k] for k in staged.positions]
        return staged.finish(_Compactor(cuts)(closed.jaxpr, closed.consts, operands))

    return compacted_fn


def _dense(params: Any, plan: CompactionPlan) -> Any:
    """Compact parameters as abstract dense ones."""
    leaves = jax.tree.leaves(params, is_leaf=trees.is_compound)
    compounds = [x for x in leaves if trees.is_compound(x)]
    if compounds:
        raise ValueError(
            f"params hold a {type(compounds[0]).__name__}, of which a compact function knows no "
            "codes. Compact first: quantized(compacted(fn, plan), rules), not the other way round."
        )
    missing = [path for path in plan.shapes if path not in trees.named_leaves(params)]
    if missing:
        raise ValueError(
            f"params have no {missing[0]}, which the plan knows. Pass compact(params, plan) of the "
            "tree that the groups were found for."
        )

    def dense_leaf(path: str, x: Any) -> Any:
        if np.shape(x) != plan.new_shapes.get(path):
            raise ValueError(
                f"{path} has shape {np.shape(x)}, and the plan leaves {plan.new_shapes.get(path)} "
                f"of {plan.shapes.get(path)}. Pass compact(params, plan)."
            )
        return jax.typeof(x).update(shape=plan.shapes[path]) if np.ndim(x) else x

    return trees.map_named(dense_leaf, params)


def _check_groups(broken: dict[str, str], where: str) -> None:
    if broken:
        listed = "; ".join(f"{name} ({why})" for name, why in broken.items())
        raise ValueError(
            f"the plan cuts what is no group of {where} at these inputs: {listed}. Find the groups "
            "and make the plan at inputs of this kind, or keep these whole."
        )


class _Compactor(Rewriter):
    """Evaluates the equations of a dense function on compact arrays."""

    def __init__(self, cuts: Cuts) -> None:
        super().__init__(
            {name: functools.partial(self._resized, change) for name, change in SIZES.items()},
            default=lambda site, operands: site.bind(operands),
        )
        self._cuts = cuts
        self._residuals: dict[Any, list[Axes]] = {}  # of a call with a derivative of its own

    def _resized(
        self, change: Callable[..., dict[str, Any]], site: Site, operands: list[Any]
    ) -> list[Any]:
        if site.place not in self._cuts.changed:
            return site.bind(operands)
        return site.bind(operands, **change(self._cuts, site, *self._cuts.record[site.place]))

    def touches(self, site: Site, operands: list[Any]) -> bool:
        """True if something in an equation loses channels."""
        shapes = zip(operands, site.shapes, strict=True)
        return site.place in self._cuts.changed or any(np.shape(x) != shape for x, shape in shapes)

    def derived(self, derivative: Derivative, operands: list[Any]) -> list[Any]:
        """A custom derivative has equations of its own, which the plan is laid over as well."""
        site, number, closed = derivative.site, derivative.number, derivative.closed
        ins, outs = self._cuts.calls[site.place]
        own, of = (ins, ins) if number == 1 else (self._residuals[site.place], outs)
        axes = [*own, *(of[k] for k in derivative.moving.before)]
        found = coupled(closed.jaxpr, axes, closed.consts, site, number)
        if number == 1:
            self._residuals[site.place] = found.results[len(outs) :]
        _check_groups(self._cuts.include(found), f"the derivative of {site.name}")
        fitted = [self._fitted(x, a) for x, a in zip(operands, axes, strict=True)]
        return super().derived(derivative, fitted)

    def _fitted(self, x: Any, axes: Axes) -> Any:
        """A residual loses channels that it had before the backward pass said they were such."""
        for k, axis in enumerate(axes):
            if np.shape(x)[k] != self._cuts.size(axis):
                x = jnp.take(x, self._cuts.positions(axis), axis=k)
        return x


# ------------------------------------------------ what equations say of sizes, by primitive
# A rule has the dense equation and the axes of its operands and results; it returns the parameters
# that change.


def _shape(cuts: Cuts, site: Site, ins: list[Axes], outs: list[Axes]) -> dict[str, Any]:
    del site, ins
    return {"shape": cuts.shape(outs[0])}


def _new_sizes(cuts: Cuts, site: Site, ins: list[Axes], outs: list[Axes]) -> dict[str, Any]:
    del site, ins
    return {"new_sizes": cuts.shape(outs[0])}


def _slice_sizes(cuts: Cuts, site: Site, ins: list[Axes], outs: list[Axes]) -> dict[str, Any]:
    """Sizes of a slice: of an axis that loses channels it takes the whole."""
    del outs
    dense = site.eqn.params["slice_sizes"]
    sized = zip(dense, ins[0], strict=True)
    return {"slice_sizes": tuple(cuts.size(a) if cuts.loses(a) else n for n, a in sized)}


def _split_sizes(cuts: Cuts, site: Site, ins: list[Axes], outs: list[Axes]) -> dict[str, Any]:
    del ins
    axis = site.eqn.params["axis"]
    return {"sizes": tuple(cuts.size(out[axis]) for out in outs)}


def _limits(cuts: Cuts, site: Site, ins: list[Axes], outs: list[Axes]) -> dict[str, Any]:
    """A slice begins after as many channels as are kept before it."""
    del outs
    at = [cuts.positions(axis) for axis in ins[0]]

    def moved(key: str) -> tuple[int, ...]:
        pairs = zip(at, site.eqn.params[key], strict=True)
        return tuple(int(np.searchsorted(kept, n)) for kept, n in pairs)

    return {key: moved(key) for key in ("start_indices", "limit_indices")}


def _conv_groups(cuts: Cuts, site: Site, ins: list[Axes], outs: list[Axes]) -> dict[str, Any]:
    """Number of groups of a convolution: its input channels by those of one group."""
    del outs
    spec = site.eqn.params["dimension_numbers"]
    of_in, of_group = (
        cuts.size(axes[where[1]])
        for axes, where in zip(ins, (spec.lhs_spec, spec.rhs_spec), strict=True)
    )
    return {"feature_group_count": max(1, of_in // max(1, of_group))}


SIZES: dict[str, Callable[[Cuts, Site, list[Axes], list[Axes]], dict[str, Any]]] = {
    "broadcast_in_dim": _shape,
    "iota": _shape,
    "reshape": _new_sizes,
    "gather": _slice_sizes,
    "dynamic_slice": _slice_sizes,
    "split": _split_sizes,
    "slice": _limits,
    "conv_general_dilated": _conv_groups,
}
"""Primitive -> the parameters that say its new sizes; the others have theirs from the operands."""
