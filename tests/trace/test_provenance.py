"""Laws of provenance: which parameter a value holds, and which ones reach it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.support import zoo
from unitscale_jax import tree
from unitscale_jax.trace.params import (
    ACTIVATION,
    Origin,
    parameter,
    provenance,
    rule_names,
)
from unitscale_jax.trace.params._provenance import kind
from unitscale_jax.trace.program import (
    Literal,
    Site,
    sites,
    trace,
)

W, X = jnp.arange(12.0).reshape(3, 4), jnp.ones((2, 3))


def origins_of(model):
    """The jaxpr of a model, the names of its parameters, and the origins of all operands."""
    closed = jax.make_jaxpr(model.apply)(model.params, *model.inputs)
    names = tree.names(model.params)
    rest = len(closed.jaxpr.invars) - len(names)
    inputs = [*map(parameter, names), *[ACTIVATION] * rest]
    return closed, names, provenance(closed.jaxpr, inputs)


def operands_of(closed, leaves):
    """Place -> operands of the equations at the top, evaluated eagerly, one after the other."""
    jaxpr, seen = closed.jaxpr, {}
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *leaves], strict=True))
    for index, eqn in enumerate(jaxpr.eqns):
        site = Site(eqn, index)
        operands = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        seen[site.place] = [np.asarray(x) for x in operands]
        env.update(zip(eqn.outvars, site.bind(operands), strict=True))
    return seen


def changes(model):
    """Place -> for each operand the parameters that change it: one is perturbed at a time."""
    closed, names, origins = origins_of(model)
    leaves = jax.tree.leaves((model.params, model.inputs))
    base = operands_of(closed, leaves)
    found = {place: [set() for _ in operands] for place, operands in base.items()}
    for k, name in enumerate(names):
        noise = np.random.default_rng(k).normal(size=np.shape(leaves[k]))
        moved = leaves[k] + jnp.asarray(noise, leaves[k].dtype)
        for place, operands in operands_of(closed, [*leaves[:k], moved, *leaves[k + 1 :]]).items():
            for i, (a, b) in enumerate(zip(base[place], operands, strict=True)):
                if not np.array_equal(a, b):
                    found[place][i].add(name)
    return found, origins


ORACLE = ["plain_mlp", "plain_cnn", "plain_lstm", "plain_cond", "plain_equilibrium"]
ORACLE += ["plain_custom_vjp", "plain_moe_top_k"]


@pytest.mark.parametrize("name", ORACLE)
def test_a_parameter_that_changes_an_operand_is_among_its_parameters(name):
    """Soundness, against a slow oracle that perturbs one parameter at a time."""
    changed, origins = changes(zoo.model(name))
    assert any(names for operands in changed.values() for names in operands)
    for place, operands in changed.items():
        for names, origin in zip(operands, origins[place], strict=True):
            assert names <= origin.parameters, place


@pytest.mark.parametrize("name", ["plain_mlp", "plain_lstm", "plain_custom_jvp"])
def test_a_parameter_among_those_of_an_operand_changes_it(name):
    """The converse, on models without operations that ignore what they take."""
    changed, origins = changes(zoo.model(name))
    for place, operands in changed.items():
        for names, origin in zip(operands, origins[place], strict=True):
            assert names == origin.parameters, place


def at(fn, name, *inputs, args=(W, X)):
    """Origins of the operands of the equations of a primitive, in order of evaluation."""
    closed = trace(fn, *args).closed
    found = provenance(closed.jaxpr, inputs or (parameter("w"), ACTIVATION))
    return [found[site.place] for site in sites(closed.jaxpr) if site.name == name]


MOVED = {
    "plain": lambda w: w,
    "cast": lambda w: w.astype(jnp.bfloat16).astype(jnp.float32),
    "reshape": lambda w: w.reshape(3, 2, 2).reshape(3, 4),
    "transpose": lambda w: w.T.T,
    "broadcast": lambda w: jnp.broadcast_to(w, (5, 3, 4))[0],
    "squeeze": lambda w: w[None].squeeze(0),
    "reverse": lambda w: w[::-1, ::-1],
    "stop_gradient": lax.stop_gradient,
    "barrier": lambda w: lax.optimization_barrier((w, jnp.ones(3)))[0],
    "jit": lambda w: jax.jit(jnp.transpose)(w).T,
    "remat": lambda w: jax.checkpoint(lambda w: w.T)(w).T,
    "cond": lambda w: lax.cond(True, lambda w: w.T, lambda w: w.reshape(4, 3), w).T,
}


@pytest.mark.parametrize("kind", MOVED)
def test_what_is_only_moved_is_held(kind):
    ((x, w),) = at(lambda w, x: x @ MOVED[kind](w), "dot_general")
    assert w == Origin(frozenset("w"), frozenset("w")) and w.parameter == "w"
    assert x.active and not x.parameters


INSIDE = {
    "jit": lambda w, x: jax.jit(jnp.matmul)(x, w),
    "remat": lambda w, x: jax.checkpoint(lambda w, x: x @ w)(w, x),
    "cond": lambda w, x: lax.cond(x[0, 0] > 0, lambda w: x @ w, lambda w: x @ (-w), w),
    "scan": lambda w, x: lax.scan(lambda c, row: (c, x @ row.reshape(3, 1)), 0, w.T)[1],
    "scan_const": lambda w, x: lax.scan(lambda c, _: (c, c @ w), x, None, length=2)[1],
    "while": lambda w, x: lax.fori_loop(0, 2, lambda k, c: (c @ w)[:, :3], x),
    "vmap": lambda w, x: jax.vmap(lambda row: row @ w)(x),
}


@pytest.mark.parametrize("kind", INSIDE)
def test_a_parameter_is_held_across_borders(kind):
    held = [w for _, w in at(INSIDE[kind], "dot_general")]
    assert held[-1].holds == {"w"}  # the first branch's is derived
    assert all(w.parameter == "w" for w in held)


DERIVED = {
    "masked": lambda w: w * jnp.eye(3, 4),
    "gain plus one": lambda w: 1.0 + w,
    "twice itself": lambda w: w + w[::-1],
    "normalized": lambda w: w / jnp.square(w).sum(),
    "loop": lambda w: lax.fori_loop(0, 2, lambda _, v: v * 0.5, w),
}


@pytest.mark.parametrize("kind", DERIVED)
def test_what_is_computed_of_one_parameter_alone_is_derived(kind):
    ((_, w),) = at(lambda w, x: x @ DERIVED[kind](w), "dot_general")
    assert not w.holds and w.parameter == "w" and not w.active


def test_what_is_of_two_parameters_or_of_an_activation_is_of_none():
    both = at(
        lambda w, v, x: x @ (w + v),
        "dot_general",
        *map(parameter, "wv"),
        ACTIVATION,
        args=(W, W, X),
    )
    assert both[0][1] == Origin(frozenset(), frozenset("wv")) and both[0][1].parameter is None
    ((_, w),) = at(lambda w, x: x @ (w * x.sum()), "dot_general")
    assert w == Origin(frozenset(), frozenset("w"), active=True) and w.parameter is None


def test_a_choice_between_two_parameters_holds_neither():
    fn = lambda w, v, x: x @ lax.cond(x[0, 0] > 0, lambda w, v: w, lambda w, v: v, w, v)
    ((_, w),) = at(fn, "dot_general", *map(parameter, "wv"), ACTIVATION, args=(W, W, X))
    assert w == Origin(frozenset(), frozenset("wv"), active=True)


def test_a_carry_that_swaps_two_parameters_holds_neither():
    def fn(w, v, x):
        return lax.scan(lambda c, _: ((c[1], c[0]), x @ c[0]), (w, v), None, length=2)[1]

    ((_, w),) = at(fn, "dot_general", *map(parameter, "wv"), ACTIVATION, args=(W, W, X))
    assert w == Origin(frozenset(), frozenset("wv"))


def products_of(name):
    """Addresses of every product, sorted."""
    closed, _, found = origins_of(zoo.model(name))
    low = [s for s in sites(closed.jaxpr) if s.name in ("dot_general", "conv_general_dilated")]
    return sorted(rule_names(site, found[site.place])[-1].replace("_", "/") for site in low)


@pytest.mark.parametrize("what", ["mlp", "transformer", "post_norm"])
def test_linen_and_nnx_name_the_same_products(what):
    linen, nnx = products_of(f"linen_{what}"), products_of(f"nnx_{what}")
    assert len(linen) > 1 and linen == nnx


@pytest.mark.parametrize("name", zoo.EACH)
def test_every_product_is_of_a_parameter_of_the_model_or_of_activations(name):
    closed, names, found = origins_of(zoo.model(name))
    called = set()
    for site in sites(closed.jaxpr):
        if site.name in ("dot_general", "conv_general_dilated"):
            called |= set(rule_names(site, found[site.place]))
            assert rule_names(site, found[site.place])
    assert called & set(names)


def test_an_address_is_the_parameters_else_the_scope_and_the_kind():
    def fn(w, x):
        with jax.named_scope("encoder"):
            scores = jnp.einsum("bd,be->bde", x, x) + jnp.einsum("bd,ed->be", x, x).sum()
        return x @ w, scores, jnp.sin(x), x @ x.T

    closed = trace(fn, W, X).closed
    found = provenance(closed.jaxpr, [parameter("w"), ACTIVATION])
    called = [rule_names(s, found[s.place]) for s in sites(closed.jaxpr) if "dot" in s.name]
    assert ["w"] in called and ["dot"] in called
    assert [name for name in called if name[0].startswith("encoder")]
    sine = next(s for s in sites(closed.jaxpr) if s.name == "sin")
    assert rule_names(sine, found[sine.place]) == ["sin"]


def test_the_kinds_of_products():
    image, kernel = jnp.ones((1, 3, 3, 2)), jnp.ones((2, 2, 2, 5))
    numbers = ("NHWC", "HWIO", "NHWC")
    of = lambda fn, *args: [kind(s.eqn) for s in sites(jax.make_jaxpr(fn)(*args).jaxpr)][0]
    assert of(lambda x: lax.dot(x, x), jnp.ones((2, 2))) == "dot"
    assert of(lambda x: lax.batch_matmul(x, x), jnp.ones((3, 2, 2))) == "attention"
    conv = functools.partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=numbers,
    )
    assert of(conv, image, kernel) == "conv"


def test_the_parameter_that_a_branch_is_chosen_by_is_part_of_the_value():
    fn = lambda w, v, x: x @ lax.cond(v[0, 0] > 0, lambda w: w, lambda w: -w, w)
    ((_, w),) = at(fn, "dot_general", *map(parameter, "wv"), ACTIVATION, args=(W, W, X))
    assert w.parameters == frozenset("wv")
