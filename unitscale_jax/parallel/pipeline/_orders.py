"""A schedule as arrays that a loop over ticks reads, and where each stage keeps what waits.

An input waits from its arrival until the last pass that needs it, a cotangent until its backward
pass, residuals from forward to backward. Two of them share a slot if they do not wait at the same
time, so buffers are as long as the schedule's own bound, and no longer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from unitscale_jax.parallel.pipeline._schedule import Job, Pass, Schedule, Tick
from unitscale_jax.typing import Array


class Orders(NamedTuple):
    """What one pass of every stage does at every tick; arrays `(ticks, stages)`.

    Attributes:
        run: Whether there is a job.
        part: Its part.
        repeat: Its chunk among those of the stage.
        chunk: Its chunk among all of them.
        first: Whether its input comes from `first`.
        last: Whether its output goes to `head`.
        source: Slot of its input.
        cotangent: Slot of its cotangent; of a forward pass unused.
        kept: Slot of its residuals.
        arrives: Whether something arrives.
        into: In which slot that waits.
    """

    run: Array
    part: Array
    repeat: Array
    chunk: Array
    first: Array
    last: Array
    source: Array
    cotangent: Array
    kept: Array
    arrives: Array
    into: Array


@dataclass(frozen=True)
class TickTable:
    """The loops of a step, one after another, and how many slots they need.

    Attributes:
        loops: For each loop the orders of its forward and of its backward passes; None for none.
        sources: Slots for inputs.
        cotangents: Slots for cotangents.
        kept: Slots for residuals.
    """

    loops: Sequence[tuple[Orders | None, Orders | None]]
    sources: int
    cotangents: int
    kept: int


def training(schedule: Schedule, *, stash: bool) -> TickTable:
    """The tick table of a training step.

    The forward pass of the last chunk is the first half of its backward pass, so it has no orders
    of its own. With `stash` backward passes read residuals, else they need the input again.
    """
    at = _Jobs(schedule, schedule.ticks)
    until = lambda s, job: at.when["F" if stash and not at.is_last(s, job) else "B"][s, job]
    sources = _slots(at.span(lambda s, job: (at.arrival(s, job), until(s, job))))
    backward = lambda s, job: (at.cotangent_arrival(s, job), at.when["B"][s, job])
    cotangents = _slots(at.span(backward, but=at.is_last))
    both = lambda s, job: (at.when["F"][s, job], at.when["B"][s, job])
    kept = _slots(at.span(both, but=at.is_last)) if stash else {}
    forward = at.orders("F", sources, cotangents, kept, but=at.is_last)
    back = at.orders("B", sources, cotangents, kept)
    return TickTable(_loops(forward, back), *map(_length, (sources, cotangents, kept)))


def serving(schedule: Schedule) -> TickTable:
    """The tick table of a forward pass alone."""
    at = _Jobs(schedule, schedule.forward)
    sources = _slots(at.span(lambda s, job: (at.arrival(s, job), at.when["F"][s, job])))
    return TickTable([(at.orders("F", sources, {}, {}), None)], _length(sources), 1, 1)


_Place: TypeAlias = tuple[int, Job]
_Span: TypeAlias = Mapping[_Place, tuple[int, int]]
_Slots: TypeAlias = Mapping[_Place, int]


def _never(s: int, job: Job) -> bool:
    del s, job
    return False


class _Jobs:
    """When each stage does each of its jobs, and when what it needs arrives."""

    def __init__(self, schedule: Schedule, ticks: Sequence[Tick]) -> None:
        self.size, self.repeats, self.ticks = schedule.stages, schedule.repeats, len(ticks)
        self.when: dict[Pass, dict[_Place, int]] = {"F": {}, "B": {}}
        for t, tick in enumerate(ticks):
            for (s, which), job in tick.items():
                self.when[which][s, job] = t

    def is_first(self, s: int, job: Job) -> bool:
        return s == 0 and job.repeat == 0

    def is_last(self, s: int, job: Job) -> bool:
        return s == self.size - 1 and job.repeat == self.repeats - 1

    def arrival(self, s: int, job: Job) -> int:
        """The tick at whose start a job's input is there."""
        if self.is_first(s, job):
            return self.when["F"][s, job]
        before = (s - 1, job) if s else (self.size - 1, Job(job.part, job.repeat - 1))
        return self.when["F"][before] + 1

    def cotangent_arrival(self, s: int, job: Job) -> int:
        after = (s + 1, job) if s < self.size - 1 else (0, Job(job.part, job.repeat + 1))
        return self.when["B"][after] + 1

    def span(
        self,
        fn: Callable[[int, Job], tuple[int, int]],
        but: Callable[[int, Job], bool] = _never,
    ) -> _Span:
        return {place: fn(*place) for place in self.when["F"] if not but(*place)}

    def orders(
        self,
        which: Pass,
        sources: _Slots,
        cotangents: _Slots,
        kept: _Slots,
        but: Callable[[int, Job], bool] = _never,
    ) -> Orders:
        make = lambda dtype: np.zeros((self.ticks, self.size), dtype)
        columns = {name: make(bool if name in _FLAGS else np.int32) for name in Orders._fields}
        for (s, job), t in self.when[which].items():
            self._arrive(columns, which, s, job, cotangents if which == "B" else sources)
            if but(s, job):
                continue
            row = {
                "run": True,
                "part": job.part,
                "repeat": job.repeat,
                "chunk": job.repeat * self.size + s,
                "first": self.is_first(s, job),
                "last": self.is_last(s, job),
                "source": sources[s, job],
                "cotangent": cotangents.get((s, job), 0),
                "kept": kept.get((s, job), 0),
            }
            for name, value in row.items():
                columns[name][t, s] = value
        return Orders(**columns)

    def _arrive(self, columns: Any, which: Pass, s: int, job: Job, slots: _Slots) -> None:
        sent = not (self.is_first(s, job) if which == "F" else self.is_last(s, job))
        if sent:
            t = self.arrival(s, job) if which == "F" else self.cotangent_arrival(s, job)
            columns["arrives"][t, s], columns["into"][t, s] = True, slots[s, job]


_FLAGS = ("run", "first", "last", "arrives")


def _slots(spans: _Span) -> _Slots:
    """A slot for each, such that no two in one slot of a stage wait at the same tick."""
    slots, busy = {}, {}
    for (s, job), (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        until = busy.setdefault(s, [])
        free = next((k for k, last in enumerate(until) if last < start), len(until))
        until[free : free + 1] = [end]
        slots[s, job] = free
    return slots


def _length(slots: _Slots) -> int:
    return max(slots.values(), default=0) + 1


def _loops(forward: Orders, back: Orders) -> list[tuple[Orders | None, Orders | None]]:
    """One loop if some tick has both passes, else one for each, of the ticks that have any."""
    busy = [np.any(o.run | o.arrives, axis=1) for o in (forward, back)]
    if (busy[0] & busy[1]).any():
        return [(forward if busy[0].any() else None, back)]
    cut = lambda orders, ticks: Orders(*[x[ticks] for x in orders])
    ahead = [(cut(forward, busy[0]), None)] if busy[0].any() else []
    return [*ahead, (None, cut(back, busy[1]))]
