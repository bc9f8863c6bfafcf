"""Laws of schedules: the last step is always one, and has the target."""

import pytest
from hypothesis import given, strategies as st

from unitscale_jax.prune import Cubic, Linear, OneShot, Steps

shares = st.floats(0, 0.99)
KINDS = [Cubic, Linear]


@st.composite
def spans(draw):
    start = draw(st.integers(0, 50))
    return start, start + draw(st.integers(0, 100)), draw(st.integers(1, 120))


@pytest.mark.parametrize("kind", KINDS)
@given(span=spans(), initial=shares, target=shares)
def test_reaches_the_target_for_every_start_end_and_every(kind, span, initial, target):
    start, end, every = span
    schedule = kind(start, end, every, initial)
    steps, levels = schedule.steps, schedule.sparsities(target)
    assert steps[0] == start or start == end
    assert steps[-1] == end and levels[-1] == target
    assert all(0 < b - a <= every for a, b in zip(steps, steps[1:], strict=False))
    assert len(steps) == len(levels)
    assert kind(start, end, every, initial, final=0.5).sparsities(target)[-1] == 0.5


@pytest.mark.parametrize("kind", KINDS)
@given(span=spans(), low=shares, high=shares)
def test_levels_stay_between_the_ends_and_in_order(kind, span, low, high):
    low, high = sorted((low, high))
    levels = kind(*span, low).sparsities(high)
    assert list(levels) == sorted(levels)
    assert min(levels) >= low - 1e-12 and max(levels) <= high


def test_worked_example():
    schedule = Cubic(200, 1000, every=300)
    assert schedule.steps == (200, 500, 800, 1000)
    assert schedule.sparsities(0.9) == (0, 0.6802734375, 0.8859375, 0.9)


def test_power_1_is_linear():
    assert Cubic(0, 8, 2, power=1).sparsities(0.8) == Linear(0, 8, 2).sparsities(0.8)
    assert Linear(0, 8, 2).sparsities(0.8) == pytest.approx((0, 0.2, 0.4, 0.6, 0.8))


def test_one_step_and_a_table():
    assert (OneShot(3).steps, OneShot(3).sparsities(0.7)) == ((3,), (0.7,))
    assert OneShot(3, final=0.5).sparsities(0.7) == (0.5,)
    table = Steps([1, 5], [0.5, None])
    assert (table.steps, table.sparsities(0.9)) == ((1, 5), (0.5, 0.9))
    assert hash(table) == hash(Steps((1, 5), (0.5, None)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cubic(10, 5), "0 <= start <= end"),
        (lambda: Linear(-1, 5), "0 <= start <= end"),
        (lambda: Linear(0, 5.0), "whole numbers"),
        (lambda: Cubic(0, 5, 0), "every is a positive whole number"),
        (lambda: Cubic(0, 5, power=0), "power is positive"),
        (lambda: Cubic(0, 5, final=1.0), r"a sparsity is the share that goes, in \[0, 1\)"),
        (lambda: Linear(0, 5, initial=-0.1), "a sparsity is the share"),
        (lambda: OneShot(-1), "steps are whole numbers from 0 on"),
        (lambda: OneShot(0, final=80), "a sparsity is the share"),
        (lambda: Steps((1, 2), (0.5,)), "2 steps and 1 sparsities; give one for each"),
        (lambda: Steps((2, 2), (0.5, 0.6)), "each above the last"),
        (lambda: Steps((), ()), "steps are whole numbers"),
        (lambda: Steps((1,), (float("nan"),)), "a sparsity is the share"),
    ],
)
def test_errors_say_the_way_out(make, message):
    with pytest.raises(ValueError, match=message):
        make()
