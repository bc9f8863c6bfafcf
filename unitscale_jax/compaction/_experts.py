"""Which experts a mixture can do without.

    score_j = mean over routed tokens of g_j ||f_j||

the length of what expert j adds to a token, gate included (REAP, Lasby et al. 2025,
https://arxiv.org/abs/2510.13999). A group of experts is not exact: a softmax over fewer is another
softmax. What `compacted` computes then is the model whose router has -inf for those that are gone,
which is what removing experts means.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.compaction._groups import Graph, groups
from unitscale_jax.compaction._named_axes import named_groups, totals
from unitscale_jax.errors import check_type
from unitscale_jax.rules import Pattern
from unitscale_jax.statistics import over_batches
from unitscale_jax.trace.program import Site
from unitscale_jax.trace.rewrite import captured


def expert_scores(
    graph: Graph,
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    experts: Sequence[Pattern],
) -> dict[str, np.ndarray]:
    """Scores experts by the length of what they add to the tokens that are routed to them.

    Args:
        graph: The groups of `fn`.
        fn: The function; what experts add up to has features on the last axis.
        params: Its parameters.
        batches: Each a tuple of the inputs of `fn` after the parameters, or its only input.
        experts: Patterns of the names of groups of experts.

    Returns:
        Group -> (experts,) float64; an expert that no token is routed to has 0. To be used with
        `plan(.., exact_only=False)`.

    Raises:
        ValueError: There are no batches; a pattern matches nothing; no sum over a group of experts
            can be seen.

    Law: an expert whose gate is zero for a token does not count it.

    Example:
        >>> def fn(p, x):  # (tokens, 2), two experts
        ...     gates = jax.nn.softmax(x @ p["router"])
        ...     return jnp.einsum("te,td,edf->tf", gates, x, p["expert"])
        >>> expert = jnp.stack([jnp.eye(2), 3 * jnp.eye(2)])
        >>> params = {"router": jnp.zeros((2, 2)), "expert": expert}
        >>> x = jnp.array([[0.0, 4.0], [2.0, 0.0]])
        >>> graph = us.compaction.groups(fn, params, x)
        >>> expert_scores(graph, fn, params, [x], ["expert:0"])["expert:0"].tolist()
        [1.5, 4.5]
    """
    check_type("graph", graph, Graph, "what us.compaction.groups returns")
    names = named_groups(graph, experts)

    def measured(params: Any, /, *inputs: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        here = groups(fn, params, *inputs, **kwargs)

        def pick(site: Site, operands: list[Any], results: list[Any]) -> dict[str, Any] | None:
            del results
            return _lengths(here, names, site, operands)

        result, captures = captured(fn, pick)(params, *inputs, **kwargs)
        return result, totals(capture.value for capture in captures)

    sums = over_batches(measured, params, batches)
    missing = [name for name in names if name not in sums]
    if missing:
        raise ValueError(
            f"no sum over {', '.join(missing)} can be seen that leaves features on the last axis; "
            "such a group is none of experts."
        )
    return {name: sums[name][0] / np.maximum(sums[name][1], 1) for name in names}


def _lengths(
    graph: Graph, names: Sequence[str], site: Site, operands: Sequence[Any]
) -> dict[str, Any] | None:
    """Group -> sums of the lengths of the terms of one sum over experts, and how many there are."""
    if site.name not in ("dot_general", "reduce_sum") or site.is_opaque:
        return None
    ins, _ = graph.dims.at(site.place)
    axes = graph.named(ins[0])
    out: dict[str, Any] = {}
    for k in _summed(site):
        name = axes[k][0][0] if len(axes[k]) == 1 and len(axes[k][0]) == 1 else None
        if isinstance(name, str) and name in names and not _is_softmax(site, k):
            terms = _terms(site, k, operands)  # (experts, .., features)
            lengths = jnp.sqrt(jnp.sum(jnp.square(terms), axis=-1)).reshape(terms.shape[0], -1)
            many = jnp.sum(lengths > 0, axis=1, dtype=jnp.float32)
            out[name] = jnp.sum(lengths, axis=1), many
    return out


def _summed(site: Site) -> Sequence[int]:
    """The axes of the first operand that are summed over."""
    if site.name == "reduce_sum":
        return site.eqn.params["axes"]
    return site.eqn.params["dimension_numbers"][0][0]


def _is_softmax(site: Site, axis: int) -> bool:
    """True if the terms of a sum have no features, such as the denominator of the gates."""
    return site.name == "reduce_sum" and axis == len(site.shapes[0]) - 1


def _terms(site: Site, axis: int, operands: Sequence[Any]) -> jax.Array:
    """The terms that are added up over an axis of the first operand, that axis first; float32.

    Of a product summed over experts e and features d, te,td,edf->tf, the terms are etf: the axis is
    taken for a batch dimension, and the other contractions stay.
    """
    x, *others = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in operands[:2])
    if site.name == "reduce_sum":
        rest = [k - (k > axis) + 1 for k in site.eqn.params["axes"] if k != axis]
        return jnp.sum(jnp.moveaxis(x, axis, 0), axis=tuple(rest))
    (left, right), (left_batch, right_batch) = site.eqn.params["dimension_numbers"]
    at = list(left).index(axis)
    left_rest, right_rest = ([*dims[:at], *dims[at + 1 :]] for dims in (left, right))
    batch = [left[at], *left_batch], [right[at], *right_batch]
    return jax.lax.dot_general(x, others[0], ((left_rest, right_rest), batch))
