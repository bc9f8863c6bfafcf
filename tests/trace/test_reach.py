"""Laws of reachability and slices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from unitscale_jax.trace.program import reach, sliced, trace

X, Y, Z = jnp.arange(1.0, 4.0), jnp.ones(3), jnp.full(3, 0.5)


@jax.custom_vjp
def doubled(x, y):
    return 2 * x, y


doubled.defvjp(lambda x, y: (doubled(x, y), None), lambda _, g: (g[0], g[1]))


@jax.custom_jvp
def kept(x, y):
    return x, y * y


kept.defjvp(lambda primals, tangents: (kept(*primals), tangents))


def rotating(x, y, z):
    """A carry that needs three turns before `z` has come all the way round to the first place."""
    return jax.lax.scan(lambda c, _: ((c[1], c[2], c[2]), c[0]), (x, y, z), None, length=3)


def counted(x, y, z):
    """How often the loop runs depends on y, so everything it carries does."""
    body = lambda c: (c[0] + 1, c[1] * 2, c[2] - 1)
    return jax.lax.while_loop(lambda c: c[0] < y[0], body, (0.0, x, z))


def branched(x, y, z):
    swap = lambda a, b: (b, a)
    return jax.lax.cond(x[0] > 0, lambda a, b: (a, b), swap, y, z)


def on_devices(x, y, z):
    types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("d",), types, devices=jax.devices()[:1])
    pair = jax.shard_map(lambda a, b: (a * 2, b), mesh=mesh, in_specs=(P(), P()), out_specs=P())
    return *pair(x, y), z


PROGRAMS = {
    "plain": lambda x, y, z: (x + y, z * 0 + x[0], jnp.sin(z)),
    "jit": lambda x, y, z: (*jax.jit(lambda a, b: (a + 1, b * a))(x, y), z),
    "remat": lambda x, y, z: (*jax.checkpoint(lambda a, b: (jnp.sin(a), b))(x, y), z),
    "custom_vjp": lambda x, y, z: (*doubled(x, y), z),
    "custom_jvp": lambda x, y, z: (*kept(x, y), z),
    "scan": rotating,
    "while": counted,
    "cond": branched,
    "shard_map": on_devices,
    "stop_gradient": lambda x, y, z: (jax.lax.stop_gradient(x) + y, z, jnp.argmax(x)),
    "constant": lambda x, y, z: (jnp.ones(3), y, x.shape[0]),
    "nested": lambda x, y, z: jax.jit(lambda: jax.lax.map(lambda a: branched(x, y, z), X))(),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_output_that_changes_with_an_input_is_reached_by_it(name):
    """Soundness, against a slow oracle that perturbs one input at a time."""
    program = PROGRAMS[name]
    reached = jax.tree.leaves(reach(trace(program, X, Y, Z)), is_leaf=_is_set)
    base = jax.tree.leaves(program(X, Y, Z))
    for i in range(3):
        for change in (lambda x: x + 1.5, lambda x: -2 * x):
            args = [change(a) if i == j else a for j, a in enumerate((X, Y, Z))]
            for got, before, inputs in zip(
                jax.tree.leaves(program(*args)), base, reached, strict=True
            ):
                assert i in inputs or np.array_equal(got, before)


EXACT = {
    "plain": [{0, 1}, {0, 2}, {2}],
    "jit": [{0}, {0, 1}, {2}],
    "remat": [{0}, {1}, {2}],
    "custom_vjp": [{0}, {1}, {2}],
    "custom_jvp": [{0}, {1}, {2}],
    "scan": [{0, 1, 2}, {1, 2}, {2}, {0, 1, 2}],
    "while": [{1}, {0, 1}, {1, 2}],
    "cond": [{0, 1, 2}, {0, 1, 2}],
    "shard_map": [{0}, {1}, {2}],
    "stop_gradient": [{0, 1}, {2}, {0}],
    "constant": [set(), {1}, set()],
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_independent_is_found_so(name):
    reached = reach(trace(PROGRAMS[name], X, Y, Z))
    assert jax.tree.leaves(reached, is_leaf=_is_set) == EXACT[name]


def _is_set(node):
    return isinstance(node, frozenset)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_slice_computes_each_output_bit_for_bit(name):
    program = PROGRAMS[name]
    traced = trace(program, X, Y, Z)
    whole = jax.tree.leaves(jax.jit(program)(X, Y, Z))
    for i, want in enumerate(whole):
        chosen = [i == j for j in range(len(whole))]
        (got,) = jax.jit(sliced(traced, chosen))(X, Y, Z)
        assert np.array_equal(got, want) and got.dtype == want.dtype


def test_a_slice_has_no_effects_of_what_it_leaves_out():
    seen = []

    @jax.jit
    def inner(x):
        jax.debug.callback(lambda: seen.append("inside"))
        return jnp.sin(x), x + 1

    def program(x):
        a, b = inner(x)
        jax.debug.callback(lambda: seen.append("outside"))
        return a, b

    traced = trace(program, X)
    sliced(traced, [False, True])(X)
    jax.effects_barrier()
    assert seen == []


def test_a_slice_computes_nothing_for_effects_that_it_leaves_out():
    def program(x):
        jax.debug.callback(lambda y: None, jnp.sin(x))
        return x + 1, x

    left = jax.make_jaxpr(sliced(trace(program, X), [True, False]))(X)
    assert [eqn.primitive.name for eqn in left.jaxpr.eqns] == ["add"]


def test_a_slice_leaves_out_the_matmul_it_does_not_need():
    def program(w, x):
        return jnp.sum(jnp.tanh(x @ w)), jnp.sum(x > 0)

    w, x = jnp.ones((16, 16)), jnp.ones((4, 16))
    count = sliced(trace(program, w, x), [False, True])
    assert "dot_general" not in str(jax.make_jaxpr(count)(w, x))
    assert "dot_general" in str(jax.make_jaxpr(sliced(trace(program, w, x), [True, False]))(w, x))


def test_a_traced_function_is_the_function_and_is_not_called_again():
    calls = []

    def fn(tree, y):
        calls.append(0)
        return {"out": tree["x"] * y}

    traced = trace(fn, {"x": X}, Y)
    assert np.array_equal(traced({"x": X}, Z)["out"], X * Z) and len(calls) == 1
    assert traced.result["out"].shape == (3,)


def test_tracing_closes_over_the_values_of_an_outer_transformation():
    def outer(w):
        traced = trace(lambda x: w * x, X)
        return jnp.sum(traced(X))

    assert jax.grad(outer)(2.0) == X.sum()
    assert jax.jit(jax.grad(outer))(2.0) == X.sum()


def test_arguments_of_another_structure_are_refused():
    with pytest.raises(TypeError, match="traced with arguments of"):
        trace(lambda t: t["x"], {"x": X})({"y": X})


def test_deeply_nested_calls_are_sliced_without_delay():
    depth, fn = 40, lambda x, y: (x, y)
    for _ in range(depth):
        fn = functools.partial(lambda f, x, y: jax.jit(f)(x + 1, y), fn)
    traced = trace(fn, X, Y)
    (got,) = sliced(traced, [True, False])(X, Y)
    assert np.array_equal(got, X + depth)
