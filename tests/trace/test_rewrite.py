"""Laws of rewriting."""

import functools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec as P

from tests.support import zoo
from tests.support.programs import programs
from unitscale_jax.trace.program import sites, trace_call
from unitscale_jax.trace.rewrite import Rewriter, rewritten

W = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)), jnp.float32)

FAST = {"xla_backend_optimization_level": 0}


def replayed(fn):
    """`fn` with every equation replaced by itself, so that every body is built anew."""

    @functools.wraps(fn)
    def replayed_fn(*args, **kwargs):
        staged = trace_call(fn, *args, **kwargs)
        replay = Rewriter({}, default=lambda site, operands: site.bind(operands))
        return staged.finish(replay(staged.closed.jaxpr, staged.closed.consts, staged.operands))

    return replayed_fn


def doubling(calls=None):
    """A rule that commutes with differentiation, because a product is linear in each factor."""

    def rule(site, operands):
        if calls is not None:
            calls.append(site.place)
        return [2 * site.bind(operands)[0]]

    return {"dot_general": rule}


COSINES = {"sin": lambda site, operands: [jnp.cos(operands[0])]}


def found(fn, *args):
    return list(sites(jax.make_jaxpr(fn)(*args).jaxpr))


def calls(fn, *args, name):
    """Equations of one name at any depth, by their enclosing sites."""
    seen = {}
    for site in found(fn, *args):
        while site.parent is not None:
            site = site.parent
            seen[site.place] = site.eqn
    return [eqn for eqn in seen.values() if eqn.primitive.name in name.split()]


# The identity.


def costs(compiled):
    analysis = compiled.cost_analysis()
    return analysis["flops"], analysis["bytes accessed"]


def assert_same_program(fn, again, args):
    one, other = (jax.jit(f).lower(*args).compile() for f in (fn, again))
    chex.assert_trees_all_equal(other(*args), one(*args), strict=True)
    assert costs(other) == costs(one)


@pytest.mark.parametrize("name", zoo.EACH)
def test_the_identity_is_equal_to_the_bit_and_costs_the_same(name):
    model = zoo.model(name)
    assert_same_program(model.apply, replayed(model.apply), (model.params, *model.inputs))


OF_EACH = ["custom_vjp", "custom_jvp", "remat", "cond", "lstm", "conv", "top_k"]


@pytest.mark.parametrize("name", [zoo.named(having=(tag, "differentiable"))[0] for tag in OF_EACH])
def test_the_gradient_of_the_identity_is_the_gradient(name):
    model = zoo.model(name)
    one, other = jax.grad(model.loss), jax.grad(replayed(model.loss))
    assert_same_program(one, other, (model.params, *model.inputs))


@hypothesis.settings(max_examples=20)
@hypothesis.given(programs())
def test_any_program_is_itself_when_replayed(program):
    run = lambda fn: jax.jit(fn, compiler_options=FAST)(*program.args)
    chex.assert_trees_all_equal(run(replayed(program)), run(program), strict=True)


@hypothesis.settings(max_examples=20)
@hypothesis.given(programs(having="sin"))
def test_any_program_with_its_sines_replaced_is_the_one_with_cosines(program):
    run = lambda fn: jax.jit(fn, compiler_options=FAST)(*program.args)
    expected = run(program.with_ops(sin=jnp.cos))
    chex.assert_trees_all_equal(run(rewritten(program, COSINES)), expected, strict=True)


@hypothesis.settings(max_examples=10)
@hypothesis.given(programs())
def test_tangents_of_any_program_are_its_own_when_replayed(program):
    def pushed(fn):
        run = lambda x, y: jax.jvp(fn, (x, y), (y, x))
        return jax.jit(run, compiler_options=FAST)(*program.args)

    chex.assert_trees_all_equal(pushed(replayed(program)), pushed(program), strict=True)


def test_each_branch_keeps_the_constants_that_its_rules_bring():
    tables = {"sin": jnp.arange(4.0), "cos": -jnp.ones(4)}
    scaled = lambda name: lambda site, operands: [operands[0] * tables[name]]
    fn = rewritten(
        lambda i, x: lax.switch(i, [jnp.sin, jnp.cos, jnp.tanh], x),
        {name: scaled(name) for name in tables},
    )
    x = jnp.linspace(1.0, 2.0, 4)
    for i, want in enumerate([x * tables["sin"], -x, jnp.tanh(x)]):
        chex.assert_trees_all_equal(jax.jit(fn)(jnp.int32(i), x), want)


# Rewriting commutes with the transformations of JAX.


def layered(x, dot=jnp.matmul):
    """Products in a call, a loop, a branch and a rematerialized block."""
    step = lambda h, _: (jnp.tanh(jax.jit(dot)(h, W)), None)
    h, _ = lax.scan(step, x, None, length=2)
    h = jax.checkpoint(lambda h: jnp.sin(dot(h, W)))(h)
    return lax.cond(h.sum() > 0, lambda h: dot(h, W), lambda h: -dot(h, W), h)


doubled = functools.partial(layered, dot=lambda x, w: 2 * (x @ w))


def mapped(fn):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    summed = lambda x: lax.psum(fn(x).sum(0), "data")
    return jax.shard_map(summed, mesh=mesh, in_specs=P("data"), out_specs=P())


TRANSFORMATIONS = {
    "jit": jax.jit,
    "vmap": jax.vmap,
    "grad": lambda fn: jax.grad(lambda x: fn(x).sum()),
    "scan": lambda fn: lambda x: lax.scan(lambda c, row: (fn(c), fn(row)), x[0], x),
    "remat": lambda fn: jax.grad(lambda x: jax.checkpoint(fn)(x).sum()),
    "shard_map": mapped,
    "vmap of grad": lambda fn: jax.vmap(jax.grad(lambda x: fn(x).sum())),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_rewriting_commutes_with(name):
    transform = TRANSFORMATIONS[name]
    expected = jax.jit(transform(doubled))(X)
    inside = jax.jit(transform(rewritten(layered, doubling())))(X)
    outside = jax.jit(rewritten(transform(layered), doubling()))(X)
    chex.assert_trees_all_close(inside, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(outside, expected, rtol=1e-5, atol=1e-5)


def test_rewriting_works_without_jit():
    chex.assert_trees_all_close(rewritten(layered, doubling())(X), doubled(X), rtol=1e-5)


# Derivatives by hand.


@jax.custom_jvp
def wrong_jvp(x, k):
    return jnp.sin(x) * k


@wrong_jvp.defjvp
def _(primals, tangents):
    (x, k), (dx, _) = primals, tangents
    return wrong_jvp(x, k), 7 * jnp.sin(x) * dx  # wrong on purpose


@jax.custom_vjp
def wrong_vjp(x, k):
    return jnp.sin(x) * k


wrong_vjp.defvjp(
    lambda x, k: (wrong_vjp(x, k), jnp.sin(x)),
    lambda sine, g: (7 * sine * jnp.cos(g), None),  # wrong on purpose, and not linear
)
WRONG = {"jvp": (wrong_jvp, 7 * np.sin(2.0)), "vjp": (wrong_vjp, 7 * np.sin(2.0) * np.cos(1.0))}
TABLES = {"nothing": {}, "something else": {"tanh": COSINES["sin"]}}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("table", TABLES)
def test_a_derivative_is_the_users_where_nothing_inside_changes(kind, table):
    fn, expected = WRONG[kind]
    again = rewritten(lambda x: jnp.tanh(x) * 0 + fn(x, 3.0), TABLES[table])
    np.testing.assert_allclose(jax.grad(again)(2.0), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", WRONG)
def test_a_derivative_is_the_users_when_replayed(kind):
    fn, expected = WRONG[kind]
    np.testing.assert_allclose(jax.grad(replayed(fn))(2.0, 3.0), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("inside", ["rewritten of grad", "grad of rewritten"])
def test_a_derivative_is_the_users_rewritten_where_something_inside_changes(kind, inside):
    fn, expected = WRONG[kind]
    run = lambda x: fn(x, 3.0)
    grad = rewritten(jax.grad(run), COSINES)
    grad = grad if inside == "rewritten of grad" else jax.grad(rewritten(run, COSINES))
    np.testing.assert_allclose(grad(2.0), expected / np.tan(2.0), rtol=1e-6)
    np.testing.assert_allclose(rewritten(run, COSINES)(2.0), 3 * np.cos(2.0), rtol=1e-6)


@pytest.mark.parametrize("kind", WRONG)
def test_integers_among_the_operands_have_no_tangent(kind):
    fn, expected = WRONG[kind]
    with jax.numpy_dtype_promotion("standard"):
        grads = [jax.grad(f(fn))(2.0, 3) for f in (replayed, lambda f: rewritten(f, COSINES))]
    np.testing.assert_allclose(grads, [expected, expected / np.tan(2.0)], rtol=1e-6)


# What an equation says is kept.


def test_donation_name_and_shardings_of_a_call_are_kept():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    update = jax.jit(
        lambda w, x, unused: w + jnp.sin(x),
        donate_argnums=(0,),
        in_shardings=(rows, None, whole),
        out_shardings=rows,
        keep_unused=True,
        inline=False,
    )
    step = lambda w, x: update(w, x, x)
    ((one,), (other,)) = (calls(f, X, X, name="jit pjit") for f in (step, replayed(step)))
    assert one.params["donated_invars"] == (True, False, False)
    for key in set(one.params) - {"jaxpr"}:
        assert other.params[key] == one.params[key], key


def test_arguments_that_a_call_does_not_use_stay_arguments():
    step = lambda x: jax.jit(lambda x, unused: jnp.sin(x))(x, 2 * x)
    ((one,), (other,)) = (calls(f, X, name="jit pjit") for f in (step, replayed(step)))
    assert len(other.invars) == len(one.invars)


def saved(fn):
    """Shapes of what a backward pass needs."""
    return sorted(leaf.shape for leaf in jax.tree.leaves(jax.vjp(fn, X)[1]))


@pytest.mark.parametrize("policy", ["nothing_saveable", "everything_saveable", "dots_saveable"])
def test_the_policy_of_a_rematerialized_block_is_kept(policy):
    policy = getattr(jax.checkpoint_policies, policy)
    block = jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ W) @ W), policy=policy, prevent_cse=False)
    ((one,), (other,)) = (calls(f, X, name="checkpoint remat2") for f in (block, replayed(block)))
    for key in set(one.params) - {"jaxpr"}:
        assert other.params[key] == one.params[key], key
    assert saved(replayed(block)) == saved(block)


@jax.named_scope("outer")
def scoped(x):
    with jax.named_scope("first"):
        x = jnp.sin(x)
    block = jax.named_call(lambda x: jax.jit(lambda y: jnp.cos(y @ W))(x), name="block")
    return lax.scan(lambda c, _: (block(c), None), x, None, length=2)[0]


def line_of(eqn):
    """The innermost line of this file that an equation comes from."""
    return next(line for line in str(eqn.source_info.traceback).splitlines() if __file__ in line)


def test_scopes_and_source_lines_are_kept():
    told = lambda fn: [(site.name, site.scope, line_of(site.eqn)) for site in found(fn, X)]
    assert told(replayed(scoped)) == told(scoped)
    assert {scope for _, scope, _ in told(scoped)} == {"outer/first", "outer/block"}
    assert len({line for *_, line in told(scoped)}) == 2


def test_options_of_a_loop_are_kept():
    loop = lambda x: lax.scan(lambda c, r: (c + r, c), x[0], x, reverse=True, unroll=2)
    ((one,), (other,)) = (calls(f, X, name="scan") for f in (loop, replayed(loop)))
    for key in ("length", "reverse", "unroll"):
        assert other.params[key] == one.params[key]


# Functions of anything.


def flagged(params, x, *, train, name):
    h = jnp.sin(params["w"] * x)
    return h.sum() if train else h.mean(), {"name": name, "count": 3, "none": None, "h": h}


@pytest.mark.parametrize("train", [True, False])
def test_flags_keywords_and_results_that_are_not_arrays_are_kept(train):
    params = {"w": jnp.float32(2)}
    value, aux = rewritten(flagged, COSINES)(params, X, train=train, name="run")
    assert (aux["name"], aux["count"], aux["none"]) == ("run", 3, None)
    expected = np.cos(2 * X)
    np.testing.assert_allclose(aux["h"], expected, rtol=1e-5)
    np.testing.assert_allclose(value, expected.sum() if train else expected.mean(), rtol=1e-5)
    one, other = (f(params, X, train=train, name="run") for f in (flagged, replayed(flagged)))
    chex.assert_trees_all_equal(one[0], other[0], strict=True)
    assert jax.tree.structure(one) == jax.tree.structure(other)


def test_gradients_with_auxiliary_results():
    grad = jax.grad(rewritten(flagged, COSINES), has_aux=True)
    grads, aux = grad({"w": jnp.float32(2)}, X, train=True, name="run")
    np.testing.assert_allclose(grads["w"], -(X * np.sin(2 * X)).sum(), rtol=1e-5)
    assert aux["name"] == "run"


# What cannot be entered is left as it is.


def kernel(x_ref, out_ref):
    out_ref[...] = jnp.sin(x_ref[...])


def by_kernel(x):
    return pl.pallas_call(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


def by_solver(x):
    matvec = lambda y: y * (2 + jnp.sin(x))
    return lax.custom_linear_solve(matvec, x, lambda _, b: b / (2 + jnp.sin(x)))


@pytest.mark.parametrize("fn", [by_kernel, by_solver])
def test_an_opaque_equation_is_left_as_it_is(fn):
    # Its own sine stays one; that of its operand does not.
    again = rewritten(lambda x: fn(jnp.sin(x)), COSINES)
    chex.assert_trees_all_close(again(X), fn(jnp.cos(X)), rtol=1e-6)
    chex.assert_trees_all_equal(jax.jit(replayed(fn))(X), jax.jit(fn)(X), strict=True)


# The work is linear in the number of equations.


def nested(depth):
    def fn(x):
        h = x @ W
        return jax.jit(nested(depth - 1))(h) if depth > 1 else h

    return fn


shared = jax.jit(lambda x: jnp.sin(x @ W))
LINEAR = {
    "nested": (nested(6), 6),
    "shared": (lambda x: shared(shared(shared(x))), 3),
    "scan": (lambda x: lax.scan(lambda c, _: (shared(c), None), x, None, length=5)[0], 1),
    "while": (lambda x: lax.while_loop(lambda c: (c @ W).sum() < 3, shared, x), 2),
    "remat": (lambda x: jax.checkpoint(jax.checkpoint(shared))(x), 1),
    "cond": (lambda x: lax.cond(x.sum() > 0, shared, lambda x: shared(shared(x)), x), 3),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_rule_is_called_once_for_every_place(name):
    fn, count = LINEAR[name]
    places = []
    jax.make_jaxpr(rewritten(fn, doubling(places)))(X)
    assert len(places) == len(set(places)) == count
