"""The cheapest channels first: which of a model's channels to remove until a budget holds.

    argmin over groups   score lost / cost saved       one cut at a time

A cut is as many channels of one group as hardware and mesh ask for. Scores lost grow along a group
and costs saved shrink as others are cut, so a queue of old ratios is a queue of lower bounds, and
only what comes to its head is computed again.
"""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from unitscale_jax.compaction._budget import Monomial, Polynomial


@dataclass(frozen=True)
class Removal:
    """The order in which a group loses its channels, and how many at a time.

    Attributes:
        order: All channels, the one to lose first at the front.
        ends: How many are lost after each cut, beginning with 0 for none.
        losses: What each cut loses of the score.
    """

    order: np.ndarray
    ends: tuple[int, ...]
    losses: tuple[float, ...]

    def kept(self, cuts: int) -> list[int]:
        """The channels that are left after so many cuts, ascending."""
        return sorted(map(int, self.order[self.ends[cuts] :]))


def removal_of(scores: np.ndarray, unit: int, tp: int) -> Removal:
    """The cuts of a group, of `unit` channels each, the same number from each of `tp` shards.

    The first cut takes what leaves a multiple of the unit. A group that `tp` does not divide, or
    that has no more channels than a unit, has none. Of equal scores the later channel goes first.
    """
    size, whole = len(scores), Removal(np.arange(len(scores)), (0,), ())
    if size % tp or size <= unit:
        return whole
    shards = scores.reshape(tp, -1)
    later = -np.broadcast_to(np.arange(shards.shape[1]), shards.shape)
    each = np.lexsort((later, shards), axis=-1)  # (tp, size / tp)
    order = (each + np.arange(tp)[:, None] * shards.shape[1]).T.reshape(-1)
    first = size % unit or unit
    ends = (0, *range(first, size - unit + 1, unit))
    pairs = zip(ends[:-1], ends[1:], strict=True)
    losses = tuple(float(scores[order[a:b]].sum()) for a, b in pairs)
    return Removal(order, ends, losses)


def within(budget: float, price: Polynomial, groups: Mapping[str, Removal]) -> dict[str, int]:
    """Finds numbers of cuts, one for each group, that make the price fit a budget.

    Args:
        budget: What the model may cost.
        price: What it costs by the sizes of groups.
        groups: By name, all that the price names, in the order in which ties are broken.

    Returns:
        Numbers of cuts. The price fits, and does not with one cut of any group less.

    Raises:
        ValueError: All cuts together are not enough; its argument is the least price.
    """
    search = _Search(price, groups)
    search.shrink(budget)
    search.grow(budget)
    return search.done


@dataclass
class _Search:
    price: Polynomial
    groups: Mapping[str, Removal]
    done: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.done = dict.fromkeys(self.groups, 0)
        self._sizes = {name: len(cuts.order) for name, cuts in self.groups.items()}
        self._cost = self.price.at(self._sizes)
        self._terms: dict[str, list[tuple[Monomial, int | Fraction]]] = {n: [] for n in self.groups}
        for monomial, c in self.price.terms.items():
            for name in set(monomial):
                self._terms[name].append((monomial, c))

    def shrink(self, budget: float) -> None:
        """Removes where least is lost for what is saved, until the price fits.

        Keys in the queue may be old. A group's key only grows: its next cut loses more, and as
        others are cut it saves less. So an old key is a lower bound, and the group at the head is
        the next one if its key of now is still at most that of the one behind it.
        """
        names = list(self.groups)
        queue = [(key, k) for k, name in enumerate(names) if (key := self._key(name)) is not None]
        heapq.heapify(queue)
        while self._cost > budget:
            if not queue:
                raise ValueError(self._cost)
            _, k = heapq.heappop(queue)
            key = self._key(names[k])
            if key is None:
                continue
            if not queue or (key, k) <= queue[0]:
                self._move(names[k], 1)
                key = self._key(names[k])
            if key is not None:
                heapq.heappush(queue, (key, k))

    def grow(self, budget: float) -> None:
        """Takes cuts back that the last one made room for, where most is gained for the cost."""
        while True:
            back = {
                name: (self.groups[name].losses[cuts - 1] / float(rise) if rise else math.inf)
                for name, cuts in self.done.items()
                if cuts and self._cost + (rise := -self._change(name, -1)) <= budget
            }
            if not back:
                return
            self._move(max(back, key=lambda name: back[name]), -1)

    def _key(self, name: str) -> float | None:
        """The score lost by the cost saved with a group's next cut; None if there is no such."""
        cuts, done = self.groups[name], self.done[name]
        if done == len(cuts.losses) or (saved := self._change(name, 1)) <= 0:
            return None
        return cuts.losses[done] / float(saved)

    def _change(self, name: str, by: int) -> int | Fraction:
        """The fall of the price with so many more cuts of a group; negative if it rises.

        Only terms that name the group change: c n^k rest becomes c n'^k rest.
        """
        old, new = self._sizes[name], self._size(name, self.done[name] + by)
        out: int | Fraction = 0
        for monomial, c in self._terms[name]:
            power = monomial.count(name)
            rest = math.prod(self._sizes[other] for other in monomial if other != name)
            out += c * rest * (old**power - new**power)
        return out

    def _size(self, name: str, cuts: int) -> int:
        return len(self.groups[name].order) - self.groups[name].ends[cuts]

    def _move(self, name: str, by: int) -> None:
        self._cost -= self._change(name, by)
        self.done[name] += by
        self._sizes[name] = self._size(name, self.done[name])
