"""Schedules: after which updates masks are made anew, and how sparse they are then.

    steps   start, start + every, .. below end, and always end
    s(t) = s_end + (s_start - s_end) (1 - (t - start) / (end - start))^p

With p = 3 most goes early, while there is much to choose from (https://arxiv.org/abs/1710.01878).
Schedules are tables on the host: what a step needs of them is data. Steps count optimizer steps,
so neither parts nor resumed runs change them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from unitscale_jax.errors import check_number


@dataclass(frozen=True)
class OneShot:
    """Reaches the whole sparsity at one step.

    Attributes:
        at: The step.
        final: The sparsity; None is that of the spec.

    Raises:
        ValueError: The step is negative, or the sparsity not in [0, 1).

    Example:
        >>> OneShot(100).steps, OneShot(100).sparsities(0.8)
        ((100,), (0.8,))
    """

    at: int = 0
    final: float | None = None

    def __post_init__(self) -> None:
        """Checks the step and the sparsity."""
        _check_steps(self, (self.at,))
        _check_sparsities(self, (self.final,))

    @property
    def steps(self) -> tuple[int, ...]:
        """The one step at which masks are updated."""
        return (self.at,)

    def sparsities(self, target: float) -> tuple[float, ...]:
        """The sparsity at each step; `target` is the spec's."""
        return (_or(self.final, target),)


@dataclass(frozen=True)
class _Ramp:
    """Steps from `start` to `end`, and a sparsity that rises with the part that is left of them."""

    start: int
    end: int
    every: int = 1
    initial: float = 0.0
    final: float | None = None

    def __post_init__(self) -> None:
        """Checks steps and sparsities."""
        _check_span(self)

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps at which masks are updated."""
        return (*range(self.start, self.end, self.every), self.end)

    def sparsities(self, target: float) -> tuple[float, ...]:
        """The sparsity at each step; `target` is the spec's."""
        final = _or(self.final, target)
        return tuple(self._at(t, final) for t in self.steps)

    def _at(self, t: int, final: float) -> float:
        if t == self.end:  # also where start is end
            return final
        left = 1 - (t - self.start) / (self.end - self.start)
        return final + (self.initial - final) * self._eased(left)

    def _eased(self, left: float) -> float:
        return left


@dataclass(frozen=True)
class Cubic(_Ramp):
    """Gradual pruning that slows down as it nears the end.

    Attributes:
        start: The first step.
        end: The last step, which is one whether or not `every` meets it.
        every: Steps between updates.
        initial: The sparsity at `start`.
        final: The sparsity at `end`; None is that of the spec.
        power: 3 is Zhu and Gupta's, 1 linear.

    Raises:
        ValueError: Not 0 <= start <= end, every < 1, a power not above 0 or not finite, or a
            sparsity not in [0, 1).

    Law: the last step has the final sparsity exactly, for every start, end and every.

    Example:
        >>> schedule = Cubic(200, 1000, every=300)
        >>> schedule.steps, schedule.sparsities(0.9)
        ((200, 500, 800, 1000), (0.0, 0.6802734375, 0.8859375, 0.9))
    """

    power: float = 3

    def __post_init__(self) -> None:
        """Checks steps, sparsities and the power."""
        super().__post_init__()
        check_number("Cubic.power", self.power)
        if not 0 < self.power < math.inf:
            raise ValueError(f"{self!r}: power is positive and finite.")

    def _eased(self, left: float) -> float:
        return left**self.power


@dataclass(frozen=True)
class Linear(_Ramp):
    """Raises the sparsity by equal amounts, from one update to the next.

    Attributes:
        start: The first step.
        end: The last step, which is one whether or not `every` meets it.
        every: Steps between updates.
        initial: The sparsity at `start`.
        final: The sparsity at `end`; None is that of the spec.

    Raises:
        ValueError: As `Cubic`.

    Example:
        >>> Linear(0, 20, every=10).sparsities(0.5)
        (0.0, 0.25, 0.5)
    """


@dataclass(frozen=True)
class Steps:
    """Takes steps and sparsities from a table.

    Attributes:
        steps: Increasing steps of updates.
        levels: The sparsity at each; None is that of the spec.

    Raises:
        ValueError: Not as many of one as of the other, steps that do not increase, or a sparsity
            not in [0, 1).

    Example:
        >>> Steps((100, 200), (0.5, None)).sparsities(0.9)
        (0.5, 0.9)
    """

    steps: tuple[int, ...]
    levels: tuple[float | None, ...]

    def __post_init__(self) -> None:
        """Makes tuples of steps and levels, and checks them."""
        object.__setattr__(self, "steps", tuple(self.steps))
        object.__setattr__(self, "levels", tuple(self.levels))
        if len(self.steps) != len(self.levels):
            raise ValueError(
                f"{self!r}: {len(self.steps)} steps and {len(self.levels)} sparsities; give one "
                "for each."
            )
        _check_steps(self, self.steps)
        _check_sparsities(self, self.levels)

    def sparsities(self, target: float) -> tuple[float, ...]:
        """The sparsity at each step; `target` is the spec's."""
        return tuple(_or(level, target) for level in self.levels)


Schedule: TypeAlias = OneShot | Cubic | Linear | Steps
"""Any of the schedules."""


def _or(sparsity: float | None, target: float) -> float:
    return target if sparsity is None else sparsity


def _check_span(schedule: _Ramp) -> None:
    if type(schedule.every) is not int or schedule.every < 1:
        raise ValueError(f"{schedule!r}: every is a positive whole number of steps.")
    ends = (schedule.start, schedule.end)
    if not (all(type(t) is int for t in ends) and 0 <= schedule.start <= schedule.end):
        raise ValueError(f"{schedule!r}: whole numbers of steps with 0 <= start <= end.")
    check_number(f"{type(schedule).__name__}.initial", schedule.initial)
    _check_sparsities(schedule, (schedule.initial, schedule.final))


def _check_steps(schedule: Schedule, steps: Sequence[int]) -> None:
    whole = all(type(t) is int and t >= 0 for t in steps)
    if not (steps and whole and all(a < b for a, b in zip(steps, steps[1:], strict=False))):
        raise ValueError(f"{schedule!r}: steps are whole numbers from 0 on, each above the last.")


def _check_sparsities(schedule: Schedule | _Ramp, sparsities: Sequence[float | None]) -> None:
    for s in sparsities:
        if s is None:  # that of the spec
            continue
        check_number(f"a sparsity of {type(schedule).__name__}", s)
        if not 0 <= s < 1:
            raise ValueError(f"{schedule!r}: a sparsity is the share that goes, in [0, 1).")
