"""The worth of channels, by what flows through it.

    score_c = sqrt(sum over rows of (mean over positions of |x_c|)^2)

where x is what meets the products that sum over the channel (Muralidharan et al. 2024,
https://arxiv.org/abs/2407.14679): forward passes only, no labels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.compaction._group_scores import Scores, chosen
from unitscale_jax.compaction._groups import Graph, groups
from unitscale_jax.compaction._named_axes import along, places, totals
from unitscale_jax.errors import check_type
from unitscale_jax.rules import Pattern
from unitscale_jax.statistics import over_batches
from unitscale_jax.trace.params import meetings, observable, product_of
from unitscale_jax.trace.program import PRODUCTS, Place, Site, TracedCall, sites, trace_call
from unitscale_jax.trace.rewrite import captured

Valid = Callable[..., Any]


def activation(
    graph: Graph,
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    valid: Valid | None = None,
    only: Sequence[Pattern] | None = None,
) -> Scores:
    """Scores channels by the activations that reach the products which sum over them.

    Args:
        graph: The groups of `fn`.
        fn: The function; the first axis of what flows through it is that of rows.
        params: Its parameters.
        batches: Each a tuple of the inputs of `fn` after the parameters, or its only input.
        valid: `valid(*inputs)` is true where a position counts, (rows,) or (rows, time), and false
            for padding.
        only: Patterns of the names of groups to score; None: all but layers.

    Returns:
        Scores in float32. Of several products, and of the layers of a scan, the
        squares are added.

    Raises:
        ValueError: There are no batches; a pattern matches nothing; no product that can be seen
            sums over a group; padding cannot be told.

    Law: rows may be split into batches and ordered at will.

    Example:
        >>> params = {"up": jnp.array([[1.0, -3.0]]), "down": jnp.ones((2, 4))}
        >>> fn = lambda p, x: x @ p["up"] @ p["down"]
        >>> x = jnp.ones((2, 1))
        >>> activation(us.compaction.groups(fn, params, x), fn, params, [x])["down:0"].tolist()
        [0.5, 1.5]
    """
    check_type("graph", graph, Graph, "what us.compaction.groups returns")
    names = chosen(graph, only)

    def measured(params: Any, /, *inputs: Any, **kwargs: Any) -> tuple[Any, dict[str, jax.Array]]:
        mask = None if valid is None else jnp.asarray(valid(*inputs, **kwargs))
        here = groups(fn, params, *inputs, **kwargs)
        seen = _met(here, trace_call(fn, params, *inputs, **kwargs), params)

        def pick(site: Site, operands: list[Any], results: list[Any]) -> dict[str, Any] | None:
            del results
            return _squares(here, names, seen, mask, site, operands)

        result, captures = captured(fn, pick)(params, *inputs, **kwargs)
        return result, totals(capture.value for capture in captures)

    squares = over_batches(measured, params, batches)
    missing = [name for name in names if name not in squares]
    if missing:
        raise ValueError(
            f"no product that can be seen sums over {', '.join(missing)} (what is inside of while "
            "loops, custom derivatives and shard_map cannot be). Leave it out by `only`."
        )
    out = {}
    for name in names:
        x = np.sqrt(squares[name])
        mean = x.mean()
        out[name] = jnp.asarray(x / (mean if mean > 0 else 1.0), jnp.float32)
    return out


def _met(graph: Graph, staged: TracedCall, params: Any) -> dict[Place, list[int]]:
    """Which sides of each product are no parameters."""
    found = meetings(staged, params)
    held = {(m.site.place, m.side) for met in found.values() for m in observable(met)}
    every = [s for s in sites(graph.traced.closed.jaxpr) if s.name in PRODUCTS]
    return {s.place: [k for k in (0, 1) if (s.place, k) not in held] for s in every}


def _squares(
    graph: Graph,
    names: Sequence[str],
    seen: Mapping[Place, Sequence[int]],
    mask: Any,
    site: Site,
    operands: Sequence[Any],
) -> dict[str, jax.Array] | None:
    """Group -> (size,) sums over rows of squared means, of the operands of one product."""
    if site.place not in seen:
        return None
    sizes = {group.name: group.size for group in graph.groups}
    out: list[dict[str, jax.Array]] = []
    for side in seen[site.place]:
        axes = graph.named(graph.dims.at(site.place)[0][side])
        product = product_of(site)
        for dim in () if product is None else product.channels(side):
            for t, i, name in places(axes[dim]):
                if name in names:
                    x = _means(operands[side], dim, mask, site)
                    each = along(x, axes[dim], t, i, sizes, jnp.mean)
                    out.append({name: jnp.sum(jnp.square(each), axis=0)})
    return totals(out)


def _means(x: jax.Array, dim: int, mask: Any, site: Site) -> jax.Array:
    """(rows, n): means of |x| over all positions of a row that count."""
    size = jnp.abs(jax.lax.stop_gradient(x)).astype(jnp.float32)
    counts = jnp.ones(x.shape, bool) if mask is None else _valid(mask, x, dim, site)
    last = [jnp.moveaxis(y, dim, -1) for y in (jnp.where(counts, size, np.float32(0)), counts)]
    middle = tuple(range(1, x.ndim - 1))
    total, many = (jnp.sum(y, axis=middle, dtype=jnp.float32) for y in last)
    means = total / jnp.maximum(many, np.float32(1))
    return means if means.ndim > 1 else means[None]


def _valid(mask: Any, x: jax.Array, dim: int, site: Site) -> jax.Array:
    if dim < mask.ndim or x.shape[: mask.ndim] != mask.shape:
        raise ValueError(
            f"valid has shape {mask.shape}, and a {site.name} sums over axis {dim} of an operand "
            f"of shape {x.shape}, so padding cannot be told there. Give batches without padding, "
            "or leave the group out by `only`."
        )
    return jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x.shape)
