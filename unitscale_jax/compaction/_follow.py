"""Optimizer state that follows its parameters when they are compacted.

    compact(init(params)) and init(compact(params)) have the same shapes

No table of optimizers: the update itself is traced, a gradient has the axes of its parameter, and
so whatever is added to it, averaged with it or a mean over it has axes of a parameter too. Moments,
factored moments, accumulators, averages of parameters are sliced where their parameters are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unitscale_jax import tree as trees
from unitscale_jax.compaction._compact import compact
from unitscale_jax.compaction._cuts import Cuts
from unitscale_jax.compaction._groups import CompactionPlan
from unitscale_jax.errors import check_type
from unitscale_jax.trace.dimensions import Axes, coupled, new_axes, unify
from unitscale_jax.trace.program import as_arrays, trace


class Followed(NamedTuple):
    """The state of an optimizer of compact parameters.

    Attributes:
        state: As `tx.init(compact(params, plan))` would have it, with what was learned so far.
        reset: Names of the leaves that follow no parameter, or have another form for the smaller
            one: they are as `tx.init` makes them.
    """

    state: Any
    reset: tuple[str, ...]


def follow(
    state: Any, plan: CompactionPlan, params: Any, tx: optax.GradientTransformation, **extra: Any
) -> Followed:
    """Compacts the state of an optimizer along with its parameters.

    Args:
        state: The state of `tx` for dense parameters.
        plan: What is kept.
        params: The dense parameters.
        tx: The optimizer; its update is traced, and not run.
        extra: What else its update takes, such as `value=`.

    Returns:
        The state, and the names of what was initialized again.

    Raises:
        ValueError: `params` are not those of the plan, or `state` is of another optimizer.

    Law: with updates and moments of the removed channels held at zero, the kept parameters of the
    dense model go the way of the compact one, for every optimizer that treats parameters one by one
    or by their norm. Adafactor's means over rows are over fewer channels.

    Example:
        >>> params = {"up": jnp.ones((8, 16)), "down": jnp.ones((16, 4))}
        >>> mlp = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
        >>> graph = us.compaction.groups(mlp, params, jnp.ones((2, 8)))
        >>> plan = us.compaction.plan_of(graph, {"down:0": [0, 3, 5]})
        >>> tx = optax.sgd(0.1, momentum=0.9)
        >>> (momentum, _), reset = follow(tx.init(params), plan, params, tx)
        >>> momentum.trace["up"].shape, reset
        ((8, 3), ())
    """
    check_type("plan", plan, CompactionPlan, "what us.compaction.plan or plan_of returns")
    small = compact(params, plan)
    target = jax.eval_shape(tx.init, small)
    structure = jax.tree.structure(state)
    if structure != jax.tree.structure(target):
        raise ValueError(
            f"the state has the structure {structure}, and the optimizer makes "
            f"{jax.tree.structure(target)} for the compact parameters. Pass the optimizer that the "
            "state is of, and the dense state."
        )
    cuts, axes = _state_axes(state, plan, params, tx, extra)
    fresh: list[Any] = []  # made only if it is needed
    leaves, reset = [], []
    rows = zip(
        trees.names(state), jax.tree.leaves(state), axes, jax.tree.leaves(target), strict=True
    )
    for k, (name, leaf, of_leaf, wanted) in enumerate(rows):
        new = _cut(leaf, of_leaf, cuts)
        if new is None or np.shape(new) != wanted.shape:
            reset.append(name)
            fresh = fresh or jax.tree.leaves(tx.init(small))
            new = fresh[k]
        leaves.append(new)
    return Followed(jax.tree.unflatten(structure, leaves), tuple(reset))


def _state_axes(
    state: Any,
    plan: CompactionPlan,
    params: Any,
    tx: optax.GradientTransformation,
    extra: dict[str, Any],
) -> tuple[Cuts, list[Axes]]:
    """The axes of each leaf of a state, in terms of those of the parameters."""

    def update(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        return tx.update(grads, state, params, **extra)

    closed = trace(update, *as_arrays((params, params, state))).closed
    cuts = Cuts(plan, heed_marks=False)  # the update runs on the smaller arrays as it is
    of_params = _param_axes(cuts, params)
    of_state = [new_axes(np.shape(leaf)) for leaf in jax.tree.leaves(state)]
    found = coupled(closed.jaxpr, [*of_params, *of_params, *of_state], closed.consts)
    # Updates are added to parameters, and a new state takes the place of the old one.
    for result, place in zip(found.results, [*of_params, *of_state], strict=True):
        for x, y in zip(result, place, strict=True):
            unify(x, y)
    cuts.settle()
    return cuts, of_state


def _param_axes(cuts: Cuts, params: Any) -> list[Axes]:
    """The axes of each leaf; those of a scale are its parameter's where it has one for each."""
    out = []
    for path, leaf in trees.named_leaves(params, is_leaf=trees.is_compound).items():
        own, shape = cuts.axes(path), np.shape(leaf)
        for part in jax.tree.leaves(leaf):
            alike = zip(new_axes(np.shape(part)), own, np.shape(part), shape, strict=False)
            out.append(tuple(a if n == full else fresh for fresh, a, n, full in alike))
    return out


def _cut(leaf: Any, axes: Axes, cuts: Cuts) -> Any:
    """A leaf without the channels that go; None if some axis of it is no parameter's."""
    if not all(cuts.follows(axis) for axis in axes):
        return None
    for k, axis in enumerate(axes):
        if cuts.loses(axis):
            leaf = jnp.take(leaf, cuts.positions(axis), axis=k)
    return leaf
