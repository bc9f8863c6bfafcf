"""Laws of notes: they follow their equations, and leave no trace when nobody reads them."""

import jax
import jax.numpy as jnp

import unitscale_jax as us
from unitscale_jax.trace.program import sites
from unitscale_jax.trace.rewrite import (
    noted,
    notes_at,
    scope_without_notes,
    taking,
    taking_notes,
)

X = jnp.ones((3, 4))


def notes_of(fn, *args):
    """The notes of every equation of `fn`, by the name of its primitive."""
    with taking_notes() as notes:
        closed = jax.make_jaxpr(fn)(*args)
    return {site.name: notes_at(site, notes) for site in sites(closed.jaxpr)}


def test_the_inner_of_two_notes_of_one_name_is_read():
    def fn(x):
        with noted(rule="outer", only="outer"), noted(rule="inner"):
            return jnp.sin(x)

    assert notes_of(fn, X) == {"sin": {"rule": "inner", "only": "outer"}}


def test_a_note_follows_its_equations_through_calls_loops_and_derivatives():
    def fn(x):
        with noted(codes="int8"):
            step = lambda c, row: (c + jnp.sin(row), None)
            return jax.jit(lambda x: jax.lax.scan(step, jnp.zeros(4), x)[0])(x).sum()

    found = notes_of(jax.grad(fn), X)
    assert found["cos"] == {"codes": "int8"}


def test_the_users_scopes_are_read_without_the_marks():
    def fn(x):
        with jax.named_scope("encoder"), noted(rule=1), jax.named_scope("mlp"):
            return jnp.sin(x)

    with taking_notes():
        (site,) = sites(jax.make_jaxpr(fn)(X).jaxpr)
    assert scope_without_notes(site) == "encoder/mlp"
    assert site.scope != "encoder/mlp"


def test_without_a_reader_no_mark_is_left():
    fn = us.autocast(lambda params, x: jnp.tanh(x @ params))
    notes_of(fn, jnp.ones((4, 4)), X)
    assert not taking()
    assert "note:" not in jax.jit(fn).lower(jnp.ones((4, 4)), X).as_text(debug_info=True)


def test_a_function_that_has_run_is_traced_anew_for_its_notes():
    @jax.jit
    def fn(x):
        with noted(rule=1):
            return jnp.sin(x)

    fn(X)
    assert notes_of(fn, X) == notes_of(fn, X) == {"sin": {"rule": 1}}
    assert "note:" not in fn.lower(X).as_text(debug_info=True)
