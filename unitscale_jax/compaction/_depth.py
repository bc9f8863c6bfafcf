"""Depth: which layers a model can do without.

    score_l = 1 - mean over positions of cos(h_l, h_l+1)

A layer that hardly turns its input is hardly missed (Men et al. 2024,
https://arxiv.org/abs/2403.03853). Layers that a scan runs over are a group, with the flag `layer`:
a plan takes rows of every stacked leaf, and the scan is shorter. Layers that are unrolled vanish
when the groups inside their branches lose all channels: x + f(x) is x then, to the bit, but for a
bias at the end of the branch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.compaction._budget import scans_of
from unitscale_jax.compaction._groups import CompactionPlan, Graph, groups, plan_of
from unitscale_jax.compaction._named_axes import named_groups
from unitscale_jax.errors import check_type
from unitscale_jax.rules import Pattern
from unitscale_jax.statistics import over_batches
from unitscale_jax.trace.params import above
from unitscale_jax.trace.program import Jaxpr, Place, Site, bodies, dtype_of, is_call, shape_of
from unitscale_jax.trace.rewrite import Capture, captured


def layer_scores(
    graph: Graph,
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    valid: Callable[..., Any] | None = None,
) -> dict[str, np.ndarray]:
    """Scores the layers of every scan over stacked layers by how much they turn what they get.

    Args:
        graph: The groups of `fn`.
        fn: The function; what a scan carries from layer to layer has features on the last axis.
            Of several carries it is the largest floating one.
        params: Its parameters.
        batches: Each a tuple of the inputs of `fn` after the parameters, or its only input.
        valid: `valid(*inputs)` is true where a position counts, (rows,) or (rows, time), and false
            for padding.

    Returns:
        Group of layers -> (layers,) float64, from 0 for a layer that scales its input to 2. To be
        used with `plan(.., exact_only=False)`, for a layer is no zero to begin with.

    Raises:
        ValueError: The graph has no group of layers; there are no batches; what a scan carries
            cannot be seen, or padding cannot be told.

    Remove one layer at a time, and score again: layers that are alike are alike to each other, too.

    Example:
        >>> params = {"angle": jnp.array([0.0, jnp.pi / 2, jnp.pi])}
        >>> turned = lambda h, a: h * jnp.cos(a) + h[:, ::-1] * jnp.sin(a)
        >>> fn = lambda p, x: jax.lax.scan(lambda h, p: (turned(h, p["angle"]), None), x, p)[0]
        >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> scores = layer_scores(us.compaction.groups(fn, params, x), fn, params, [x])
        >>> scores["angle:0"].round(3).tolist()
        [0.0, 1.0, 2.0]
    """
    check_type("graph", graph, Graph, "what us.compaction.groups returns")
    layers = [group.name for group in graph.groups if "layer" in group.flags]
    if not layers:
        raise ValueError(
            "no scan runs over stacked layers here; layers that are unrolled are removed by "
            "`without`, and scored by `loss_increase`."
        )

    def measured(params: Any, /, *inputs: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        mask = None if valid is None else jnp.asarray(valid(*inputs, **kwargs))
        ends = _ends(groups(fn, params, *inputs, **kwargs))
        at = {place for end in ends for place, _ in (end.reads, end.makes)}

        def pick(site: Site, operands: list[Any], results: list[Any]) -> Any:
            return (operands, results) if site.place in at else None

        result, captures = captured(fn, pick)(params, *inputs, **kwargs)
        found = {capture.place: capture for capture in captures}
        return result, {end.group: _cosines(end, found, mask) for end in ends}

    totals = over_batches(measured, params, batches)
    return {name: 1 - total / count for name, (total, count) in totals.items()}


def without(
    graph: Graph,
    branches: Sequence[Pattern],
    *,
    plan: CompactionPlan | None = None,
    exact_only: bool = True,
) -> CompactionPlan:
    """Plans to remove all channels of some groups, and so the branches they are inside of.

    Args:
        graph: The groups of a function.
        branches: Patterns of the names of groups. A transformer's block that is unrolled vanishes
            without its feed-forward channels and its heads.
        plan: What else is removed; None: nothing.
        exact_only: As for `plan_of`.

    Raises:
        ValueError: A pattern names no group, or a group is not exact.

    Law: `compacted(fn, without(graph, ..))` is `fn` with zeros in all members of these groups.

    Example:
        >>> params = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}
        >>> block = lambda p, x: x + jax.nn.relu(x @ p["up"]) @ p["down"]
        >>> x = jnp.arange(8.0).reshape(2, 4)
        >>> gone = without(us.compaction.groups(block, params, x), ["down:0"])
        >>> small = us.compaction.compact(params, gone)
        >>> small["down"].shape, bool((us.compaction.compacted(block, gone)(small, x) == x).all())
        ((0, 4), True)
    """
    check_type("graph", graph, Graph, "what us.compaction.groups returns")
    empty = named_groups(graph, branches)
    kept = ({} if plan is None else dict(plan.kept)) | {name: () for name in empty}
    return plan_of(graph, kept, exact_only=exact_only, empty=empty)


# --------------------------------------------------------------------- what a scan carries


@dataclass(frozen=True)
class _Ends:
    """The equations in a scan's body that read its carry and make it, where it can be seen.

    Attributes:
        group: The scan's layers.
        depth: How many scans are around it.
        reads: Place of an equation, and the number of its operand.
        makes: Place of an equation, and the number of its result.
    """

    group: str
    depth: int
    reads: tuple[Place, int]
    makes: tuple[Place, int]


def _ends(graph: Graph) -> list[_Ends]:
    out = []
    for site, group in scans_of(graph):
        (jaxpr, _), *_ = bodies(site.eqn)
        carry = _carried(site, jaxpr)
        reads = _reads(jaxpr, jaxpr.invars[carry[0]], site) if carry else None
        makes = _makes(jaxpr, jaxpr.outvars[carry[1]], site) if carry else None
        if reads is None or makes is None:
            raise ValueError(
                f"what the scan over {group} carries cannot be seen: no equation outside of loops "
                "and custom derivatives reads it and makes it. Score layers by `layer_losses`."
            )
        depth = sum(outer.name == "scan" for outer in above(site))
        out.append(_Ends(group, depth, reads, makes))
    return out


def _carried(site: Site, jaxpr: Jaxpr) -> tuple[int, int] | None:
    """The largest floating carry, as an operand and as a result of the body."""
    eqn = site.eqn
    # Results of a body are carries, then rows, which outside are stacked: one more axis. Operands
    # are constants, carries, then rows, likewise.
    carries = sum(
        len(shape_of(a)) == len(shape_of(b))
        for a, b in zip(eqn.outvars, jaxpr.outvars, strict=True)
    )
    rows = sum(
        len(shape_of(a)) != len(shape_of(b)) for a, b in zip(eqn.invars, jaxpr.invars, strict=True)
    )
    consts = len(jaxpr.invars) - rows - carries
    made = jaxpr.outvars[:carries]
    floating = [
        k for k, v in enumerate(made) if shape_of(v) and jnp.issubdtype(dtype_of(v), jnp.floating)
    ]
    if not floating:
        return None
    largest = max(floating, key=lambda k: math.prod(shape_of(made[k])))
    return consts + largest, largest


def _reads(jaxpr: Jaxpr, v: Any, parent: Site) -> tuple[Place, int] | None:
    """The first equation without a body that reads a variable."""
    for index, eqn in enumerate(jaxpr.eqns):
        for k, operand in enumerate(eqn.invars):
            if operand is v:
                site, inside = Site(eqn, index, 0, parent), bodies(eqn)
                found = (site.place, k) if not inside else None
                if _is_open(site):
                    found = _reads(inside[0][0], inside[0][0].invars[k], site)
                if found is not None:
                    return found
    return None


def _makes(jaxpr: Jaxpr, v: Any, parent: Site) -> tuple[Place, int] | None:
    """The equation without a body that makes a variable."""
    for index, eqn in enumerate(jaxpr.eqns):
        for k, result in enumerate(eqn.outvars):
            if result is v:
                site, inside = Site(eqn, index, 0, parent), bodies(eqn)
                if _is_open(site):
                    return _makes(inside[0][0], inside[0][0].outvars[k], site)
                return None if inside else (site.place, k)
    return None


def _is_open(site: Site) -> bool:
    """True if equations inside of a call can be captured."""
    return is_call(site.eqn) and not site.name.startswith(("custom_", "shard_map"))


def _cosines(ends: _Ends, found: dict[Place, Capture], mask: Any) -> tuple[Any, Any]:
    """(layers,) sums of cosines over positions, and how many positions there are."""
    (read, k), (make, j) = ends.reads, ends.makes
    before, after = found[read].value[0][k], found[make].value[1][j]
    a, b = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (before, after))
    dot, aa, bb = (jnp.sum(x * y, axis=-1) for x, y in ((a, b), (a, a), (b, b)))
    length = jnp.sqrt(aa) * jnp.sqrt(bb)
    cos = jnp.where(length > 0, dot / jnp.where(length > 0, length, 1), np.float32(1))
    counts = jnp.ones(cos.shape, bool) if mask is None else _valid(mask, cos, found[read], ends)
    others = tuple(k for k in range(cos.ndim) if k != ends.depth)
    total = jnp.sum(jnp.where(counts, cos, np.float32(0)), axis=others)
    return total, jnp.sum(counts, axis=others, dtype=jnp.float32)


def _valid(mask: Any, cos: jax.Array, capture: Capture, ends: _Ends) -> jax.Array:
    lead = len(capture.loops)
    if cos.shape[lead : lead + mask.ndim] != mask.shape:
        raise ValueError(
            f"valid has shape {mask.shape}, and what the scan over {ends.group} carries has rows "
            f"{cos.shape[lead:]}, so padding cannot be told. Give batches without padding."
        )
    return jax.lax.broadcast_in_dim(mask, cos.shape, tuple(range(lead, lead + mask.ndim)))
