"""Laws of the walk: where an equation stands, and what a flow knows."""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

from unitscale_jax.trace.program._walk import Flow, opaque, sites, walk

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


def test_only_what_hides_its_equations_is_opaque():
    def fn(x):
        scattered = x.at[jnp.array([0, 2])].add(1.0)  # has a body that adds two numbers
        return everything(lax.custom_linear_solve(lambda v: 2 * v, scattered, lambda _, b: b / 2))

    assert [site.name for site in opaque(jax.make_jaxpr(fn)(X).jaxpr)] == ["custom_linear_solve"]
