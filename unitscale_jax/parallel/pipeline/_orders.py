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
    """The jobs of one pass, forward or backward; arrays `(ticks, stages)`.

    Attributes:
        run: Whether there is a job.
        part: The part that the job takes.
        repeat: The chunk that it runs, counted among those of the stage.
        chunk: The same chunk, counted among those of all stages.
        first: Whether its input comes from the model's `first`.
        last: Whether its output goes to the model's `head`.
        source: Slot of its input.
        cotangent: Slot of its cotangent; unused in a forward pass.
        kept: Slot of its residuals.
        arrives: Whether an input (forward) or a cotangent (backward) arrives.
        into: Slot in which that is put.
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
    """Makes the tick table of a training step.

    The forward pass of the last chunk is the first half of its backward pass, so it has no orders
    of its own. With `stash` backward passes read residuals, else they need the input again.
    """
    at = _Jobs(schedule, schedule.ticks)

    def source_waits(s: int, job: Job) -> tuple[int, int]:
        # The last chunk has no forward pass of its own and so no residuals: its input waits for B.
        last_use: Pass = "F" if stash and not at.is_last(s, job) else "B"
        return at.arrival(s, job), at.when[last_use][s, job]

    def cotangent_waits(s: int, job: Job) -> tuple[int, int]:
        return at.cotangent_arrival(s, job), at.when["B"][s, job]

    def residuals_wait(s: int, job: Job) -> tuple[int, int]:
        return at.when["F"][s, job], at.when["B"][s, job]

    sources = _slots(at.span(source_waits))
    cotangents = _slots(at.span(cotangent_waits, but=at.is_last))
    kept = _slots(at.span(residuals_wait, but=at.is_last)) if stash else {}
    forward = at.orders("F", sources, cotangents, kept, but=at.is_last)
    back = at.orders("B", sources, cotangents, kept)
    return TickTable(_loops(forward, back), *map(_length, (sources, cotangents, kept)))


def serving(schedule: Schedule) -> TickTable:
    """Makes the tick table of a forward pass alone."""
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
        before = (s - 1, job)
        if s == 0:  # the part comes round, from the last stage's chunk of the repeat before
            before = (self.size - 1, Job(job.part, job.repeat - 1))
        return self.when["F"][before] + 1

    def cotangent_arrival(self, s: int, job: Job) -> int:
        """The tick at whose start a job's cotangent is there; the last chunk makes its own."""
        after = (s + 1, job)
        if s == self.size - 1:
            after = (0, Job(job.part, job.repeat + 1))
        return self.when["B"][after] + 1

    def span(
        self,
        fn: Callable[[int, Job], tuple[int, int]],
        but: Callable[[int, Job], bool] = _never,
    ) -> _Span:
        """From which tick to which something waits, for each job but some."""
        return {place: fn(*place) for place in self.when["F"] if not but(*place)}

    def orders(
        self,
        which: Pass,
        sources: _Slots,
        cotangents: _Slots,
        kept: _Slots,
        but: Callable[[int, Job], bool] = _never,
    ) -> Orders:
        """Writes the jobs of one pass as arrays; jobs of `but` receive and do not run."""
        dtypes = {name: bool if name in _FLAGS else np.int32 for name in Orders._fields}
        columns = {name: np.zeros((self.ticks, self.size), dtypes[name]) for name in dtypes}
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
        """Notes the arrival of a job's input or cotangent, if another stage sends it."""
        if which == "F":
            made_here, arrival = self.is_first, self.arrival
        else:
            made_here, arrival = self.is_last, self.cotangent_arrival
        if not made_here(s, job):
            t = arrival(s, job)
            columns["arrives"][t, s], columns["into"][t, s] = True, slots[s, job]


_FLAGS = ("run", "first", "last", "arrives")


def _slots(spans: _Span) -> _Slots:
    """Gives each job a slot, such that no two in one slot of a stage wait at the same tick.

    In order of their starts, each takes the first slot that is free. A new slot is made only when
    all others are taken at that tick, so their number is the largest that ever waits at once.
    """
    slots: dict[_Place, int] = {}
    last_ticks: dict[int, list[int]] = {}  # for each stage the last tick that a slot is taken
    for (s, job), (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        until = last_ticks.setdefault(s, [])
        free = next((k for k, last in enumerate(until) if last < start), len(until))
        until[free : free + 1] = [end]
        slots[s, job] = free
    return slots


def _length(slots: _Slots) -> int:
    return max(slots.values(), default=0) + 1


def _loops(forward: Orders, back: Orders) -> list[tuple[Orders | None, Orders | None]]:
    """Makes one loop if some tick has both passes, else one for each pass, of its own ticks.

    A loop over ticks with one pass does not pay for the half of a tick that would only idle.
    """
    busy = [np.any(o.run | o.arrives, axis=1) for o in (forward, back)]
    if (busy[0] & busy[1]).any():
        return [(forward if busy[0].any() else None, back)]
    ahead, behind = (
        Orders(*[x[ticks] for x in orders])
        for orders, ticks in zip((forward, back), busy, strict=True)
    )
    return [(ahead, None), (None, behind)] if busy[0].any() else [(None, behind)]
