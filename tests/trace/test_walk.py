"""Laws of the walk: where an equation stands, how often it runs, and what a flow knows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from unitscale_jax.trace._walk import Flow, sites, walk

X = jnp.arange(1.0, 4.0)


def sites_of(fn, *args):
    return list(sites(jax.make_jaxpr(fn)(*args).jaxpr))


def named(fn, *args, name):
    return [site for site in sites_of(fn, *args) if site.name == name]


@jax.jit
def sine(x):
    return jnp.sin(x)


def everything(x):
    """Each kind of body, some twice, and some inside others."""
    x = sine(sine(x))
    x = jax.checkpoint(lambda y: sine(y) * 2)(x)
    x, _ = lax.scan(lambda c, _: (sine(c), None), x, None, length=3)
    x = lax.while_loop(lambda c: c.sum() < 9, lambda c: sine(c) + 1, x)
    return lax.cond(x[0] > 0, sine, lambda y: sine(sine(y)), x)


def test_every_equation_and_call_has_a_place_of_its_own():
    found = sites_of(everything, X)
    assert len({site.place for site in found}) == len(found)
    assert len(named(everything, X, name="sin")) == 8  # of one equation, in one shared body


def test_a_place_leads_to_its_equation():
    jaxpr = jax.make_jaxpr(everything)(X).jaxpr
    for site in sites(jaxpr):
        chain = [site]
        while chain[0].parent is not None:
            chain.insert(0, chain[0].parent)
        steps = [(s.body, s.index) for s in chain]
        assert site.place == (steps[0][1], *itertools.chain(*steps[1:]))


def test_places_are_in_the_order_of_evaluation():
    places = [site.place for site in sites_of(everything, X)]
    assert places == sorted(places)


def test_the_length_of_nested_scans_multiplies():
    row = lambda c, x: (c, jnp.sin(x))
    table = lambda c, x: (jnp.cos(c), lax.scan(row, c, x)[1])
    fn = lambda x: lax.scan(table, 0.0, x)
    assert [s.repeats for s in named(fn, jnp.ones((4, 5)), name="sin")] == [20]
    assert [s.repeats for s in named(fn, jnp.ones((4, 5)), name="cos")] == [4]


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


def test_scopes_are_joined_across_calls():
    def fn(x):
        with jax.named_scope("encoder"):
            y, _ = lax.scan(lambda c, _: (attention(c), None), x, None, length=2)
        return jnp.cos(y)

    @jax.jit
    def attention(x):
        with jax.named_scope("attention"):
            return jnp.sin(x)

    assert [s.scope for s in named(fn, X, name="sin")] == ["encoder/attention"]
    assert [s.scope for s in named(fn, X, name="cos")] == [""]


class Origins(Flow):
    """From which inputs a value comes, and through how many sines at most (of up to 5)."""

    def constant(self, value):
        return frozenset()

    def visit(self, site, inputs):
        longer = site.name == "sin"
        seen = frozenset((name, min(n + longer, 5)) for name, n in frozenset().union(*inputs))
        return [seen] * len(site.eqn.outvars)

    def join(self, a, b):
        return a | b


def origins(fn, *args):
    closed = jax.make_jaxpr(fn)(*args)
    inputs = [frozenset({(name, 0)}) for name, _ in zip("xyz", closed.jaxpr.invars, strict=False)]
    return [sorted(out) for out in walk(Origins(), closed.jaxpr, inputs, closed.consts)]


def test_a_loop_is_walked_until_its_carry_stands_still():
    turn = lambda c, _: ((c[1], c[2], jnp.sin(c[0])), c[0])
    (_, _, _, rows) = origins(lambda x, y, z: lax.scan(turn, (x, y, z), None, 2), X, X, X)
    assert rows == sorted((name, n) for name in "xyz" for n in range(6))


def test_a_loop_may_run_no_turn_at_all():
    fn = lambda x: lax.while_loop(lambda c: c.sum() < 9, lambda c: jnp.sin(c), x)
    assert ("x", 0) in origins(fn, X)[0] and ("x", 5) in origins(fn, X)[0]


def test_branches_are_joined():
    fn = lambda x, y: lax.cond(x[0] > 0, lambda a, b: jnp.sin(a), lambda a, b: b, x, y)
    assert origins(fn, X, X) == [[("x", 1), ("y", 0)]]


def test_calls_keep_what_they_do_not_touch():
    fn = lambda x, y: jax.jit(lambda a, b: (sine(a), b))(x, y)
    assert origins(fn, X, X) == [[("x", 1)], [("y", 0)]]


def test_every_kind_of_body_is_entered():
    assert ("x", 5) in origins(everything, X)[0]
    assert "sin" not in {site.parent and site.parent.name for site in sites_of(everything, X)}
    opaque = {"jit", "pjit", "scan", "while", "cond", "checkpoint", "remat2"}
    assert not opaque & {site.name for site in sites_of(everything, X)}
