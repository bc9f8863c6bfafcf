"""Laws of counting: a loop runs as often as its equations say, or is not counted at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from unitscale_jax.trace.program import sites

X = jnp.arange(1.0, 4.0)


def named(fn, *args, name):
    return [site for site in sites(jax.make_jaxpr(fn)(*args).jaxpr) if site.name == name]


TWO, SEVEN = jnp.int32(2), jnp.int32(7)
COUNTERS = {
    "lt": (lambda i: i < 5, lambda i: i + 1, 0),
    "le": (lambda i: i <= 5, lambda i: i + 1, 0),
    "by three": (lambda i: i < 10, lambda i: 3 + i, 0),
    "by three, to the point": (lambda i: i < 9, lambda i: i + 3, 0),
    "le by three": (lambda i: i <= 9, lambda i: i + 3, 0),
    "down gt": (lambda i: i > 0, lambda i: i - 2, 9),
    "down ge": (lambda i: i >= 1, lambda i: i - 2, 9),
    "down by adding": (lambda i: i >= 0, lambda i: i + -2, 9),
    "ne": (lambda i: i != 9, lambda i: i + 3, 0),
    "ne never": (lambda i: i != 4, lambda i: i + 1, 4),
    "ne down": (lambda i: i != 0, lambda i: i - 1, 4),
    "eq": (lambda i: i == 3, lambda i: i + 1, 3),
    "eq never": (lambda i: i == 3, lambda i: i + 1, 2),
    "never": (lambda i: i < 5, lambda i: i + 1, 7),
    "at the limit": (lambda i: i < 5, lambda i: i + 1, 5),
    "flipped": (lambda i: np.int32(5) > i, lambda i: 1 + i, 0),
    "adds before it asks": (lambda i: i + 1 < 5, lambda i: i + 1, 0),
    "two steps": (lambda i: i < 5, lambda i: (i + 3) - 1, 0),
    "numpy": (lambda i: i < np.int32(5), lambda i: i + np.int32(1), np.int32(0)),
    "arrays": (lambda i: i < jnp.int32(5), lambda i: i + jnp.int32(1), 0),
    "jit": (jax.jit(lambda i: i < 5), jax.jit(lambda i: jax.jit(lambda j: j + 1)(i)), 0),
    "narrow": (lambda i: i.astype(jnp.int32) < 5, lambda i: i + jnp.uint8(1), np.uint8(0)),
    "negative": (lambda i: i < -3, lambda i: i + 2, -10),
}


def turns_of(cond, body, init):
    """Trips of the loop as found, and as counted by running it."""
    loop = lambda x: lax.while_loop(
        lambda c: cond(c[0]), lambda c: (body(c[0]), c[1] * x), (init, x)
    )
    (found,) = {s.repeats for s in named(loop, 1.0, name="mul")}
    turns, i = 0, jnp.asarray(init)
    while cond(i):
        turns, i = turns + 1, body(i)
    return found, turns


@pytest.mark.parametrize("name", COUNTERS)
def test_a_loop_that_counts_runs_as_often_as_it_is_found_to(name):
    found, turns = turns_of(*COUNTERS[name])
    assert found == turns


def test_the_condition_is_asked_once_more():
    loop = lambda x: lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] * 2), (0, x))
    assert [s.repeats for s in named(loop, X, name="lt")] == [6]


BOUNDS = {
    "numbers": lambda body, x: lax.fori_loop(2, 7, body, x),
    "numpy": lambda body, x: lax.fori_loop(np.int32(2), np.int32(7), body, x),
    "arrays": lambda body, x: lax.fori_loop(jnp.int32(2), jnp.int32(7), body, x),
    "one array": lambda body, x: lax.fori_loop(2, jnp.array(7), body, x),
    "closed over": lambda body, x: lax.fori_loop(TWO, SEVEN, body, x),
    "shape": lambda body, x: lax.fori_loop(0, jnp.ones((5, 2)).shape[0], body, x),
    "unrolled": lambda body, x: lax.fori_loop(2, 7, body, x, unroll=2),
}


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.vmap], ids=["plain", "jit", "vmap"])
def test_a_fori_loop_is_counted_for_any_kind_of_bounds(name, around):
    fn = around(lambda x: BOUNDS[name](lambda i, c: jnp.sin(c) + i.astype(c.dtype), x))
    assert sum(s.repeats for s in named(fn, X, name="sin")) == 5


def test_a_limit_may_be_a_constant_of_the_condition_or_a_carry():
    def captured(x):
        n = jnp.int32(7)
        return lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, x))

    def carried(x):
        step = lambda c: (c[0], c[1] + 2, jnp.sin(c[2]))
        return lax.while_loop(lambda c: c[0] > c[1], step, (7, 0, x))

    def approaching(x):
        step = lambda c: (c[0] + 1, c[1] - 2, jnp.sin(c[2]))
        return lax.while_loop(lambda c: c[0] < c[1], step, (0, 10, x))

    found = [[s.repeats for s in named(f, X, name="sin")] for f in (captured, carried, approaching)]
    assert found == [[7], [4], [4]]


UNKNOWN = {
    "a limit given as data": lambda x, n: lax.fori_loop(0, n, lambda i, c: jnp.sin(c), x),
    "a start given as data": lambda x, n: lax.fori_loop(n, 9, lambda i, c: jnp.sin(c), x),
    "a value decides": lambda x, n: lax.while_loop(lambda c: c.sum() < 9, jnp.sin, x),
    "a value may decide": lambda x, n: lax.while_loop(
        lambda c: (c[0] < 5) & (c[1].sum() < 9), lambda c: (c[0] + 1, jnp.sin(c[1])), (0, x)
    ),
    "a step given as data": lambda x, n: lax.while_loop(
        lambda c: c[0] < 5, lambda c: (c[0] + n, jnp.sin(c[1])), (0, x)
    ),
    "a doubling counter": lambda x, n: lax.while_loop(
        lambda c: c[0] < 5, lambda c: (c[0] + c[0], jnp.sin(c[1])), (1, x)
    ),
    "another carry": lambda x, n: lax.while_loop(
        lambda c: c[0] < 5, lambda c: (c[1] + 1, c[0], jnp.sin(c[2])), (0, 0, x)
    ),
    "a limit that moves by data": lambda x, n: lax.while_loop(
        lambda c: c[0] < c[1], lambda c: (c[0] + 1, c[1] - n, jnp.sin(c[2])), (0, 9, x)
    ),
    "away from the limit": lambda x, n: lax.while_loop(
        lambda c: c[0] < 5, lambda c: (c[0] - 1, jnp.sin(c[1])), (0, x)
    ),
    "past the limit": lambda x, n: lax.while_loop(
        lambda c: c[0] != 5, lambda c: (c[0] + 2, jnp.sin(c[1])), (0, x)
    ),
    "around the end of its dtype": lambda x, n: lax.while_loop(
        lambda c: c[0] < np.int8(120),
        lambda c: (c[0] + np.int8(100), jnp.sin(c[1])),
        (np.int8(0), x),
    ),
    "a subtraction from": lambda x, n: lax.while_loop(
        lambda c: c[0] < 5, lambda c: (1 - c[0], jnp.sin(c[1])), (0, x)
    ),
    "a float": lambda x, n: lax.while_loop(
        lambda c: c[0] < 5, lambda c: (c[0] + 0.1, jnp.sin(c[1])), (0.0, x)
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_loop_that_data_stop_is_not_counted(name):
    assert [s.repeats for s in named(UNKNOWN[name], X, 5, name="sin")] == [None]


def test_what_is_inside_an_uncounted_loop_is_not_counted_either():
    inner = lambda c: lax.fori_loop(0, 3, lambda i, y: jnp.sin(y), c)
    fn = lambda x: lax.while_loop(lambda c: c.sum() < 9, inner, x)
    assert [s.repeats for s in named(fn, X, name="sin")] == [None]
