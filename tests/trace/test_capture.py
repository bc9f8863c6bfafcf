"""Laws of values brought out from inside a function."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import zoo
from unitscale_jax.trace.rewrite import captured


def sines(site, operands, results):
    return {"in": operands[0], "out": results[0]} if site.name == "sin" else None


def plain(x):
    return jnp.sin(x) * 2


def layered(xs, *, reverse=False):
    step = lambda c, x: (c * 0.5 + jnp.sin(x * c), jnp.cos(c))
    return jax.lax.scan(step, jnp.float32(1.0), xs, reverse=reverse)


def by_hand(xs, *, reverse=False):
    seen, c = {}, jnp.float32(1.0)
    order = range(len(xs))[::-1] if reverse else range(len(xs))
    for k in order:
        seen[k] = xs[k] * c
        c = c * 0.5 + jnp.sin(xs[k] * c)
    return np.array([seen[k] for k in range(len(xs))])


XS = jnp.array([0.3, -1.2, 2.0, 0.7])


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_gives_one_value_for_each_row(reverse):
    fn = lambda xs: layered(xs, reverse=reverse)
    result, captures = jax.jit(captured(fn, sines))(XS)
    chex.assert_trees_all_equal(result, jax.jit(fn)(XS))
    (capture,) = captures
    assert capture.loops == (4,)
    np.testing.assert_allclose(capture.value["in"], by_hand(XS, reverse=reverse), rtol=1e-6)
    np.testing.assert_array_equal(capture.value["out"], jnp.sin(capture.value["in"]))
    assert capture.ran.tolist() == [True] * 4


def test_nested_scans_put_the_outer_one_first():
    def nested(grid):
        row = lambda c, xs: (c + 1, jax.lax.scan(lambda d, x: (d, jnp.sin(x + c)), 0.0, xs)[1])
        return jax.lax.scan(row, 0.0, grid)[1]

    grid = jnp.arange(6.0).reshape(2, 3)
    (capture,) = captured(nested, sines)(grid)[1]
    assert capture.loops == (2, 3)
    np.testing.assert_array_equal(capture.value["in"], grid + jnp.array([[0.0], [1.0]]))


@pytest.mark.parametrize("taken", [False, True])
def test_a_branch_that_was_not_taken_did_not_run(taken):
    fn = lambda p, x: jax.lax.cond(p, lambda x: jnp.sin(x), lambda x: jnp.sin(x + 1) + 0 * x, x)
    result, captures = jax.jit(captured(fn, sines))(taken, jnp.float32(2.0))
    np.testing.assert_array_equal(result, jax.jit(fn)(taken, jnp.float32(2.0)))
    assert len(captures) == 2
    ran = [c for c in captures if c.ran]
    assert len(ran) == 1 and float(ran[0].value["in"]) == (2.0 if taken else 3.0)
    assert [float(c.value["in"]) for c in captures if not c.ran] == [0.0]


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: lambda x: jax.jit(f)(x)])
def test_calls_are_entered(wrap):
    result, captures = captured(wrap(plain), sines)(XS)
    chex.assert_trees_all_equal(result, plain(XS))
    chex.assert_trees_all_equal(captures[0].value["in"], XS)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint])
def test_the_gradient_is_the_function_s_own(wrap):
    fn = wrap(lambda x: jnp.sum(layered(x)[0]))
    value = lambda x: captured(fn, sines)(x)
    grads, captures = jax.jit(jax.grad(value, has_aux=True))(XS)
    chex.assert_trees_all_close(grads, jax.jit(jax.grad(fn))(XS), rtol=1e-6)
    np.testing.assert_allclose(captures[0].value["in"], by_hand(XS), rtol=1e-6)


def test_batches_under_vmap():
    batch = jnp.stack([XS, 2 * XS])
    _, captures = jax.vmap(captured(layered, sines))(batch)
    each = [captured(layered, sines)(row)[1][0].value["in"] for row in batch]
    np.testing.assert_allclose(captures[0].value["in"], np.stack(each), rtol=1e-6)


def test_custom_derivatives_and_while_loops_are_left_as_they_stand():
    @jax.custom_vjp
    def clipped(x):
        return jnp.sin(x)

    clipped.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.full_like(x, 7.0),))
    fn = lambda x: clipped(x) + jax.lax.while_loop(lambda c: c > 1, lambda c: jnp.sin(c) - 1, x)
    assert captured(fn, sines)(2.0)[1] == []
    assert jax.grad(lambda x: captured(clipped, sines)(x)[0])(2.0) == 7.0

    beside = captured(fn, sines, derived=True)  # but for captures beside a custom derivative
    assert [float(c.value["in"]) for c in beside(2.0)[1]] == [2.0]
    assert jax.grad(lambda x: captured(clipped, sines, derived=True)(x)[0])(2.0) == 7.0


@pytest.mark.parametrize("name", zoo.NAMES[::3])
def test_results_of_the_zoo_are_the_same_bits(name):
    model = zoo.model(name)
    dots = lambda site, operands, results: (
        jnp.max(jnp.abs(operands[0])) if site.name == "dot_general" else None
    )
    args = (model.params, *model.inputs)
    result, captures = jax.jit(captured(model.apply, dots))(*args)
    chex.assert_trees_all_equal(result, jax.jit(model.apply)(*args))
    assert all(np.isfinite(c.value).all() for c in captures)


def test_picking_nothing_leaves_the_equations():
    nothing = lambda site, operands, results: None
    mine = jax.make_jaxpr(lambda x: captured(layered, nothing)(x)[0])(XS)
    assert str(mine) == str(jax.make_jaxpr(layered)(XS))
