"""Schedules of a pipeline as data: which stage works on which part at which tick.

    gpipe     F(m) on stage s at tick m + s; then all backward passes, in reverse
    circular  F(m, r) on s at r M + m + s: a stage holds `repeats` chunks of layers; then in reverse
    1f1b      F(m) on s at m + s, B(m) on s at m + 2 (S - 1) - s: at most 2 S - 1 parts in flight

A tick is a step of every device at once, and what one stage sends arrives at the next tick. In a
tick of 1f1b a stage does a forward and a backward pass, in the order of both tables here. Sources:
GPipe (arXiv 1811.06965), flushed 1F1B (2006.09503), interleaving (2104.04473).
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

from unitscale_jax.errors import expected

Name: TypeAlias = Literal["gpipe", "circular", "1f1b"]
Pass: TypeAlias = Literal["F", "B"]
NAMES = get_args(Name)


class Job(NamedTuple):
    """One pass of one part through one chunk of layers.

    Attributes:
        part: Which of the parts of a batch.
        repeat: Which chunk of those that the stage holds.
    """

    part: int
    repeat: int


Tick: TypeAlias = Mapping[tuple[int, Pass], Job]
"""The job of each stage and pass in a tick; a stage that is not in it idles."""


@dataclass(frozen=True)
class Schedule:
    """Which stage runs which part at which tick; it prints as a table of stages and ticks.

    Attributes:
        name: "gpipe", "circular" or "1f1b".
        stages: Number of stages S, devices along the axis.
        parts: Number of parts M of a batch.
        repeats: Number of chunks V that each stage holds; more than one for "circular" alone.

    Raises:
        ValueError: An unknown name, a number below 1, repeats where the schedule has none, or fewer
            parts than stages where parts come round again.

    Example:
        >>> print(us.parallel.Schedule("1f1b", stages=2, parts=3))
        tick      0      1      2      3      4
        stage 0   F0     F1     F2 B0  B1     B2
        stage 1          F0 B0  F1 B1  F2 B2
        bubble 1/4 = 25%, at most 3 parts in flight
    """

    name: Name
    stages: int
    parts: int
    repeats: int = 1

    def __post_init__(self) -> None:
        """Checks the numbers of parts, stages and repeats."""
        _check(self.name, self.stages, self.parts, self.repeats)

    @functools.cached_property
    def ticks(self) -> Sequence[Tick]:
        """The ticks of a training step, in order."""
        if self.name == "1f1b":
            return _one_forward_one_backward(self.stages, self.parts)
        forward = _in_turn(self.stages, self.parts, self.repeats)
        back: list[Tick] = [
            {(s, "B"): job for (s, _), job in tick.items()} for tick in reversed(forward)
        ]
        return [*forward, *back]

    @functools.cached_property
    def forward(self) -> Sequence[Tick]:
        """The ticks of a forward pass alone, for inference; of "1f1b" those of "gpipe"."""
        return _in_turn(self.stages, self.parts, self.repeats)

    def bubble(self, *, skip_idle: bool = True) -> tuple[int, int]:
        """Computes the share of time a stage idles, as a fraction `(idle, all)` in lowest terms.

        A forward and a backward pass count the same. Law: `(S - 1) / (V M + S - 1)` for all three
        schedules; without skipping, every tick of 1f1b costs both passes, and it is
        `(2 S - 2) / (M + 2 S - 2)`.

        Example:
            >>> us.parallel.Schedule("circular", stages=4, parts=6, repeats=3).bubble()
            (1, 7)
        """
        both = self.name == "1f1b" and not skip_idle
        passes = [2 if both else len({which for _, which in tick}) for tick in self.ticks]
        idle, whole = sum(passes) - 2 * self.parts * self.repeats, sum(passes)
        common = _common(idle, whole)
        return idle // common, whole // common

    @functools.cached_property
    def in_flight(self) -> int:
        """The most parts that ever wait on one stage for their backward pass."""
        return max(map(self._in_flight, range(self.stages)))

    def _in_flight(self, stage: int) -> int:
        most = now = 0
        for tick in self.ticks:
            now += (stage, "F") in tick
            most = max(most, now)
            now -= (stage, "B") in tick
        return most

    def __str__(self) -> str:
        """Writes the schedule as a table of text."""
        rows = [["tick", *map(str, range(len(self.ticks)))]]
        rows += [
            [f"stage {s}", *(self._cell(tick, s) for tick in self.ticks)]
            for s in range(self.stages)
        ]
        width = max(len(cell) for row in rows for cell in row[1:])
        lines = [f"{row[0]:<10}" + "  ".join(f"{cell:{width}}" for cell in row[1:]) for row in rows]
        idle, whole = self.bubble()
        says = f"bubble {idle}/{whole} = {100 * idle / whole:.3g}%, at most {self.in_flight} parts"
        return "\n".join([*(line.rstrip() for line in lines), f"{says} in flight"])

    def _cell(self, tick: Tick, stage: int) -> str:
        """Writes the jobs of one stage in one tick, as "F1 B0", or "F1.2" with the chunk."""
        found = []
        for which in ("F", "B"):
            job = tick.get((stage, which))
            if job is not None:
                chunk = f".{job.repeat}" if self.repeats > 1 else ""
                found.append(f"{which}{job.part}{chunk}")
        return " ".join(found)


def _in_turn(stages: int, parts: int, repeats: int) -> Sequence[Tick]:
    """Forward passes of all parts through all chunks, repeat after repeat, one tick a stage."""
    ticks: list[dict[tuple[int, Pass], Job]] = [{} for _ in range(repeats * parts + stages - 1)]
    for s in range(stages):
        for r in range(repeats):
            for m in range(parts):
                ticks[r * parts + m + s][s, "F"] = Job(m, r)
    return ticks


def _one_forward_one_backward(stages: int, parts: int) -> Sequence[Tick]:
    """Forward and backward passes, each cotangent sent back as soon as the last stage has it.

    The backward pass of part m starts on the last stage in the tick of its forward pass there, and
    comes down by one stage a tick: stage s waits 2 (S - 1 - s) ticks, so at most 2 S - 1 parts.
    """
    ticks: list[dict[tuple[int, Pass], Job]] = [{} for _ in range(parts + 2 * stages - 2)]
    for s in range(stages):
        for m in range(parts):
            ticks[m + s][s, "F"] = Job(m, 0)
            ticks[m + 2 * (stages - 1) - s][s, "B"] = Job(m, 0)
    return ticks


def _common(a: int, b: int) -> int:
    return a if not b else _common(b, a % b)


def _check(name: str, stages: int, parts: int, repeats: int) -> None:
    if name not in NAMES:
        raise ValueError(expected("the schedule", name, NAMES))
    for noun, number in {"stages": stages, "parts": parts, "repeats": repeats}.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(expected(f"`{noun}`", number, "a positive int"))
    if repeats > 1 and name != "circular":
        raise ValueError(
            f"the schedule {name!r} takes each part through every stage once, and each stage holds "
            f"{repeats} chunks of layers. Use schedule='circular', or stack with repeats=1."
        )
    if repeats > 1 and parts < stages:
        raise ValueError(
            f"{parts} parts come round to the first of {stages} stages before it is free. Make at "
            f"least {stages} parts, or stack with repeats=1."
        )
