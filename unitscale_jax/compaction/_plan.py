"""Which channels to remove: a share of each group, or what a budget asks for.

    plan(graph, scores, keep=0.5)                 half of every group, the best half of each
    plan(graph, scores, budget=Params(10**6))     where least of the score is lost for what is saved

Scores say what a channel is worth, the graph what it costs: channels are removed
`lcm(round_to, tp)` at a time, the cheapest first (greedily, as Molchanov et al. 2019,
https://arxiv.org/abs/1906.10771, remove filters), and where the last ones made room, some come
back.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from unitscale_jax import rules as named_rules
from unitscale_jax.compaction._budget import Budget
from unitscale_jax.compaction._groups import CompactionPlan, Graph, plan_of
from unitscale_jax.compaction._search import Removal, removal_of, within
from unitscale_jax.errors import check_type
from unitscale_jax.rules import Rules
from unitscale_jax.sparsity import kept

Keep: TypeAlias = float | Rules[float | int]


def plan(
    graph: Graph,
    scores: Mapping[str, Any],
    *,
    keep: Keep | None = None,
    budget: Budget | None = None,
    round_to: int = 1,
    tp: int = 1,
    exact_only: bool = True,
) -> CompactionPlan:
    """Plans which channels of each group stay.

    Args:
        graph: The groups of a function.
        scores: Group -> (size,) what each channel is worth; a group without scores stays whole.
        keep: How much of each group stays: a fraction, or rules from names of groups to fractions
            (float) or counts (int). A fraction is that of `kept`, to the nearest multiple of
            `round_to` and `tp`, at least one; a group that no rule names stays whole.
        budget: What the model may cost: `Params(n)`, `Flops(n)` or `Bytes(n)`.
        round_to: Every group that loses channels keeps a multiple of this; 128 fills the lanes of
            a TPU, 8 those of a GPU. A group with no more channels than that stays whole.
        tp: Over how many shards channels will lie: the same number is kept of each consecutive
            part, so nothing moves between devices. A group that it does not divide stays whole.
        exact_only: False consents to groups that are not `exact`; see `plan_of`.

    Returns:
        A plan. Of equal channels the earlier one stays.

    Raises:
        ValueError: Neither or both of `keep` and `budget`; scores that are not finite, not
            (size,) or of no group; a group would lose its last channel; a rule names no group, or
            one that needs consent; the budget cannot be met.

    Laws: kept channels are ascending and different, a multiple of `round_to` and of `tp` where some
    are removed. The budget holds, and breaks with one more unit of any group.

    Example:
        >>> params = {"up": jnp.ones((8, 16)), "down": jnp.ones((16, 4))}
        >>> mlp = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
        >>> graph = us.compaction.groups(mlp, params, jnp.ones((2, 8)))
        >>> scores = {"down:0": jnp.arange(16.0)}
        >>> plan(graph, scores, keep=0.25).kept
        {'down:0': (12, 13, 14, 15)}
        >>> plan(graph, scores, budget=us.compaction.Params(100), round_to=4).new_sizes
        {'down:0': 8}
        >>> plan(graph, scores, keep=0.25, tp=2).kept
        {'down:0': (6, 7, 14, 15)}
    """
    check_type("graph", graph, Graph, "what us.compaction.groups returns")
    if (keep is None) == (budget is None):
        raise ValueError("say how much stays: either keep=.. or budget=.., and not both.")
    if min(round_to, tp) < 1:
        raise ValueError(f"round_to={round_to}, tp={tp}: both are 1 (no matter) or more.")
    unit = math.lcm(round_to, tp)
    values = {name: _checked(graph, name, x) for name, x in scores.items()}
    mine = [
        group
        for group in graph.groups
        if group.name in values and ("exact" in group.flags or not exact_only)
    ]
    if not mine:
        raise ValueError(_nothing_to_remove(graph, values))
    removals = {g.name: removal_of(values[g.name], unit, tp) for g in mine}
    if budget is not None:
        cuts = _under_budget(graph, budget, removals)
    else:
        assert keep is not None
        cuts = _by_share(graph, keep, removals, unit)
    chosen = {name: removals[name].kept(n) for name, n in cuts.items() if n}
    return plan_of(graph, chosen, exact_only=exact_only)


def _checked(graph: Graph, name: str, scores: Any) -> np.ndarray:
    if name not in graph.by_name:
        raise ValueError(
            f"scores are given for {name!r}, which is no group. There are "
            f"{', '.join(graph.by_name) or 'none'}."
        )
    values, size = np.asarray(scores, np.float64), graph.by_name[name].size
    if values.shape != (size,):
        raise ValueError(
            f"scores of {name} have shape {values.shape}; it has {size} channels, one score each."
        )
    if not np.isfinite(values).all():
        where = int(np.argmin(np.isfinite(values)))
        raise ValueError(
            f"the score of channel {where} of {name} is {values[where]}. Mend what it was made of, "
            "or leave the group out of the scores: it then stays whole."
        )
    return values


def _nothing_to_remove(graph: Graph, scores: Mapping[str, Any]) -> str:
    flags = {name: ", ".join(sorted(graph.by_name[name].flags)) for name in scores}
    if not flags:
        return "there are no scores, so nothing may be removed. Score groups: l2(graph, params)."
    listed = "; ".join(f"{name} ({why})" for name, why in flags.items())
    return f"no group with scores is exact: {listed}. Consent to them with exact_only=False."


# ------------------------------------------------------------------------------------ by budget


def _under_budget(graph: Graph, budget: Budget, removals: Mapping[str, Removal]) -> dict[str, int]:
    whole = {g.name: Removal(np.arange(g.size), (0,), ()) for g in graph.groups}
    try:
        return within(budget.limit, budget.price(graph), {**whole, **removals})
    except ValueError as error:
        raise ValueError(
            f"{budget!r} cannot be met: with all {len(removals)} groups at their smallest the "
            f"model has {float(error.args[0]):,.0f} {budget}. Allow that many, score more groups, "
            "or consent to more of them with exact_only=False."
        ) from None


# -------------------------------------------------------------------------------------- by share


def _by_share(
    graph: Graph, keep: Keep, removals: Mapping[str, Removal], unit: int
) -> dict[str, int]:
    shares = _shares(graph, keep, removals)
    sizes = {name: len(removal.order) for name, removal in removals.items()}
    return {
        name: _cuts(name, share, removals[name], sizes[name], unit)
        for name, share in shares.items()
        if share is not None
    }


def _shares(
    graph: Graph, keep: Keep, removals: Mapping[str, Removal]
) -> dict[str, float | int | None]:
    if isinstance(keep, float):
        return dict.fromkeys(removals, keep)
    if isinstance(keep, int):
        raise ValueError(f"keep={keep!r}: a fraction such as 0.5; counts are given by rules.")
    for pattern, _ in named_rules.pairs_of(keep):
        others = [g for g in graph.groups if g.name not in removals]
        closed = [g for g in others if named_rules.matches(pattern, g.name)]
        if closed and not any(named_rules.matches(pattern, name) for name in removals):
            why = ", ".join(sorted(closed[0].flags))
            raise ValueError(
                f"{closed[0].name} is {why}, and has no scores or needs consent: score it, and say "
                "exact_only=False if it is not exact."
            )
    return named_rules.match(keep, removals, noun="group")


def _cuts(name: str, share: float | int, removal: Removal, size: int, unit: int) -> int:
    """The number of cuts that leaves a share of a group, or the nearest to it that there is."""
    left = [size - end for end in removal.ends]
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise ValueError(f"keep of {name} is {share!r}; a fraction (float) or a count (int).")
    if isinstance(share, int):
        if share == 0:
            raise ValueError(_last_channel(name, size, "a count above 0"))
        if share not in left:
            raise ValueError(
                f"{name} cannot keep {share} of {size}: in units of {unit} it keeps "
                f"{', '.join(map(str, left[-3:]))}{' ..' if len(left) > 3 else ''}."
            )
        return left.index(share)
    if not 0 <= share <= 1:
        raise ValueError(f"{name} cannot keep {share} of its channels; a fraction is in (0, 1].")
    target = kept(size, 1 - share) if share < 1 else size
    if target == 0:
        raise ValueError(_last_channel(name, size, f"at least {1 / size:.3g} of it"))
    return min(range(len(left)), key=lambda n: (abs(left[n] - target), n))


def _last_channel(name: str, size: int, least: str) -> str:
    return (
        f"{name} would lose its last channel of {size}. Keep {least}, or leave it whole by rules; "
        "a branch that may vanish altogether is removed by `without`."
    )
