"""Laws of schedules, checked without devices."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

import unitscale_jax as us
from unitscale_jax.parallel.pipeline import _orders

SHAPES = [("gpipe", s, m, 1) for s, m in itertools.product(range(1, 9), range(1, 25)) if m <= 3 * s]
SHAPES += [("1f1b", s, m, 1) for _, s, m, _ in SHAPES]
SHAPES += [
    ("circular", s, m, v) for s in range(1, 9) for m in range(s, 3 * s + 1) for v in (1, 2, 3)
]


def times(schedule):
    """`{(stage, pass, part, repeat): tick}`."""
    at = {}
    for t, tick in enumerate(schedule.ticks):
        for (s, which), job in tick.items():
            assert (s, which, *job) not in at, "a job is done twice"
            at[s, which, *job] = t
    return at


def before(schedule, s, which, m, r):
    """The job whose result a job needs, and whether it comes from another stage."""
    last, final = schedule.stages - 1, schedule.repeats - 1
    if which == "F":
        return None if s == r == 0 else (s - 1, "F", m, r) if s else (last, "F", m, r - 1)
    if s == last and r == final:
        return s, "F", m, r
    return (s + 1, "B", m, r) if s < last else (0, "B", m, r + 1)


def test_every_job_is_done_once_and_after_what_it_needs():
    for name, s, m, v in SHAPES:
        schedule = us.parallel.Schedule(name, s, m, v)
        at = times(schedule)
        assert len(at) == 2 * s * m * v
        for job, t in at.items():
            needed = before(schedule, *job)
            if needed is not None:
                # What is sent arrives at the next tick; a part may turn round within one.
                travels = needed[1] == job[1]
                assert at[needed] + travels <= t, (name, s, m, v, job)
            if job[1] == "B":
                assert at[job[0], "F", job[2], job[3]] <= t


def test_ticks_and_bubbles_are_those_of_the_papers():
    for name, s, m, v in SHAPES:
        schedule = us.parallel.Schedule(name, s, m, v)
        one_pass = v * m + s - 1
        ticks = m + 2 * s - 2 if name == "1f1b" else 2 * one_pass
        assert len(schedule.ticks) == ticks and len(schedule.forward) == one_pass
        assert Fraction(*schedule.bubble()) == Fraction(s - 1, one_pass)
        always = Fraction(2 * s - 2, m + 2 * s - 2) if name == "1f1b" else Fraction(s - 1, one_pass)
        assert Fraction(*schedule.bubble(skip_idle=False)) == always


def test_parts_in_flight_are_bounded_by_the_stages_in_1f1b_and_by_the_parts_otherwise():
    for name, s, m, v in SHAPES:
        flight = us.parallel.Schedule(name, s, m, v).in_flight
        assert flight == (min(m, 2 * s - 1) if name == "1f1b" else v * m)


def test_the_worked_example_of_two_stages_and_three_parts():
    found = [
        {f"{which}{job.part}@{s}" for (s, which), job in tick.items()}
        for tick in us.parallel.Schedule("1f1b", 2, 3).ticks
    ]
    assert found == [
        {"F0@0"},
        {"F1@0", "F0@1", "B0@1"},
        {"F2@0", "B0@0", "F1@1", "B1@1"},
        {"B1@0", "F2@1", "B2@1"},
        {"B2@0"},
    ]


def simulate(schedule, plan, stash=False):
    """Runs the orders with names for arrays: what each stage holds, sends and reads is checked."""
    stages = schedule.stages
    slots = {
        k: [[None] * n for _ in range(stages)]
        for k, n in {
            "source": plan.sources,
            "cotangent": plan.cotangents,
            "kept": plan.kept,
        }.items()
    }
    sent = {"F": [None] * stages, "B": [None] * stages}
    done = []
    for loop in plan.loops:
        length = len(next(o for o in loop if o is not None).run)
        for t in range(length):
            for which, orders in zip("FB", loop, strict=True):
                if orders is None:
                    continue
                kind, step = ("source", -1) if which == "F" else ("cotangent", 1)
                arrived = list(sent[which])
                sent[which] = [None] * stages
                for s in range(stages):
                    o = {n: x[t, s] for n, x in orders._asdict().items()}
                    if o["arrives"]:
                        slots[kind][s][o["into"]] = arrived[(s + step) % stages]
                    if not o["run"]:
                        continue
                    m, r = int(o["part"]), int(o["repeat"])
                    assert o["chunk"] == r * stages + s
                    name = ("x", m, int(o["chunk"]))
                    if which == "F" and o["first"]:
                        slots["source"][s][o["source"]] = name
                    assert slots["source"][s][o["source"]] == name or (
                        which == "B" and stash and slots["kept"][s][o["kept"]] == name
                    )
                    if which == "F":
                        slots["kept"][s][o["kept"]] = name
                        sent["F"][s] = ("x", m, int(o["chunk"]) + 1)
                    else:
                        if not o["last"]:
                            want = ("dx", m, int(o["chunk"]))
                            assert slots["cotangent"][s][o["cotangent"]] == want
                        sent["B"][s] = ("dx", m, int(o["chunk"]) - 1)
                    done.append((s, which, m, r))
    return done


@pytest.mark.parametrize("stash", [False, True])
def test_orders_read_from_slots_what_was_put_there_for_them(stash):
    for name, s, m, v in SHAPES:
        if s == 1 or s > 5:
            continue
        schedule = us.parallel.Schedule(name, s, m, v)
        plan = _orders.training(schedule, stash=stash)
        done = simulate(schedule, plan, stash)
        turned = {(s - 1, "F", part, v - 1) for part in range(m)}  # within the backward pass
        assert sorted(done) == sorted(set(times(schedule)) - turned)
        if not stash:
            assert plan.sources <= schedule.in_flight
    serving = _orders.serving(us.parallel.Schedule("circular", 4, 6, 3))
    assert len(simulate(us.parallel.Schedule("circular", 4, 6, 3), serving)) == 4 * 6 * 3
    assert serving.sources == 6 - 4 + 1  # those that wait for their next round


def test_what_cannot_be_scheduled_says_so():
    with pytest.raises(ValueError, match="'zigzag'; expected 'gpipe', 'circular' or '1f1b'"):
        us.parallel.Schedule("zigzag", 2, 2)
    with pytest.raises(ValueError, match="2 parts come round .* 4 stages .* at least 4 parts"):
        us.parallel.Schedule("circular", 4, 2, 2)
    with pytest.raises(ValueError, match="holds 2 chunks of layers. Use schedule='circular'"):
        us.parallel.Schedule("1f1b", 4, 8, 2)
    with pytest.raises(ValueError, match="`parts` is 0; expected a positive int"):
        us.parallel.Schedule("gpipe", 4, 0)
    assert us.parallel.Schedule("circular", 4, 2).bubble() == (3, 5)
    assert np.all(_orders.serving(us.parallel.Schedule("gpipe", 1, 3)).loops[0][0].run)
