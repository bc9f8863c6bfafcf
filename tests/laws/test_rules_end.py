"""Laws of rules: what a derivative's rule is told, and that a rule for parameters ends somewhere.

A rule may ask which operands are differentiated, and which cotangents are zero. Whatever transform
is around it, it is told the same as without.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

import unitscale_jax as us
from tests.quant.test_quantized import (
    BOTH_WAYS,
    W8A8,
    assert_same_bits,
    named_by_use,
    normal,
)
from tests.support import zoo
from unitscale_jax import DotSpec, QSpec, trace
from unitscale_jax.mesh_axes import varying
from unitscale_jax.trace.program import trace_call
from unitscale_jax.trace.rewrite import rewritten

ROWS, WIDTH = 3, 4
PARAMS = {"w": normal(WIDTH, WIDTH, seed=1), "b": normal(WIDTH, seed=2)}
X = normal(ROWS, WIDTH)

# ----------------------------------------------------------------- what a user's rule is told

told: list[tuple] = []


@jax.custom_vjp
def both(a, c):
    """Two results of two operands, whose rule says what it is told, and gives `c` nothing."""
    return jnp.sin(a) * c, jnp.cos(a) + c


def both_forward(a, c):
    told.append(("forward", a.perturbed, c.perturbed))
    return both(a.value, c.value), (a.value, c.value)


def both_backward(kept, cotangents):
    a, c = kept
    zero = [isinstance(g, SymbolicZero) for g in cotangents]
    if not all(zero):  # where nothing is asked, the answer is none
        told.append(("backward", *zero))
    first, second = (0.0 if z else g for g, z in zip(cotangents, zero, strict=True))
    return first * jnp.cos(a) * c - second * jnp.sin(a), None


both.defvjp(both_forward, both_backward, symbolic_zeros=True)


@jax.custom_jvp
def pair(a, c):
    return jnp.sin(a) * c, jnp.cos(c)


def pair_rule(primals, tangents):
    """The second result moves with nothing, which the rule says by a symbolic zero."""
    zero = [isinstance(t, SymbolicZero) for t in tangents]
    told.append(("tangents", *zero))
    (a, c), (da, dc) = primals, tangents
    da, dc = (jnp.zeros_like(a) if z else t for t, z in zip((da, dc), zero, strict=True))
    out = pair(a, c)
    return out, (da * jnp.cos(a) * c + dc * jnp.sin(a), SymbolicZero(jax.typeof(out[1])))


pair.defjvp(pair_rule, symbolic_zeros=True)


@jax.custom_vjp
def outer(a, c):
    return both(a, jnp.tanh(c))[0]


def outer_forward(a, c):
    told.append(("outer", a.perturbed, c.perturbed))
    out, back = jax.vjp(lambda a: both(a, jnp.tanh(c.value))[0], a.value)
    return out, back


outer.defvjp(outer_forward, lambda back, g: (*back(g), None), symbolic_zeros=True)

still = lambda v: jnp.cos(lax.stop_gradient(v))


def given_nothing(a, b):
    """The outer rule gives its second operand nothing, and the inner one sees that."""
    first, second = both(a, a + b)
    return both(a, second)[0] + first


KERNELS = {
    "one operand": lambda a, b: both(a, jnp.cos(jnp.ones_like(a)))[0],
    "both operands": lambda a, b: both(a, jnp.tanh(a) + b)[0],
    "the other operand": lambda a, b: both(still(a), b + a)[1],
    "stopped": lambda a, b: both(a + b, still(a))[1],
    "both results": lambda a, b: sum(both(a, b + jnp.zeros_like(a))),
    "one after the other": lambda a, b: both(both(a, still(a))[0], b + a)[0],
    "given nothing": given_nothing,
    "nested": lambda a, b: outer(a, still(a)),
    "jvp, one operand": lambda a, b: pair(a, still(a))[0],
    "jvp, the other": lambda a, b: pair(still(a), a + b)[0],
    "jvp, then vjp": lambda a, b: both(a, pair(a, a)[1])[0],
    "vjp, then jvp": lambda a, b: sum(pair(*both(a, still(a)))),
}
FEW = ["both operands", "stopped", "given nothing", "nested", "vjp, then jvp"]


def scanned(kernel):
    step = lambda h, b: (kernel(h, b), None)
    return lambda a, b: lax.scan(step, a, jnp.stack([b, 2 * b]))[0]


def looped(kernel):
    return lambda a, b: lax.scan(lambda h, _: (kernel(h, b), still(h)), a, length=2)[0]


AROUND = {
    "alone": lambda kernel: kernel,
    "jit": jax.jit,
    "scan": scanned,
    "scan of constants": looped,
    "remat": lambda kernel: jax.checkpoint(kernel),
    "vmap": lambda kernel: jax.vmap(kernel, (0, None)),
    "cond": lambda kernel: lambda a, b: lax.cond(a[0, 0] > 9, lambda a, b: a, kernel, a, b),
}


def model(kernel, around):
    fresh = lambda a, b: KERNELS[kernel](a, b)  # so that no trace made before is found again
    run = AROUND[around](fresh)
    return lambda p, x: run(x @ p["w"], p["b"]).sum()


SINE = {"sin": lambda site, x: [jnp.sin(x[0])], "cos": lambda site, x: [jnp.cos(x[0])]}
TRANSFORMS = {
    "autocast": lambda fn: us.autocast(fn, "bfloat16"),
    "quantized": lambda fn: us.quantized(fn, {"w": W8A8}),
    "rewritten": lambda fn: rewritten(fn, SINE),
    "quantized, autocast": lambda fn: us.quantized(us.autocast(fn, "bfloat16"), {"w": W8A8}),
    "autocast twice": lambda fn: us.autocast(us.autocast(fn, "bfloat16"), "float16"),
}


def heard(fn, argnums):
    """What the rules inside of a function are told while its gradient is traced."""
    told.clear()
    jax.eval_shape(jax.grad(fn, argnums), PARAMS, X)
    return set(told)


@functools.cache
def told_without(kernel, around, argnums):
    return heard(model(kernel, around), argnums)


@pytest.mark.parametrize("how", TRANSFORMS)
@pytest.mark.parametrize("around", AROUND)
def test_a_rule_is_told_the_same_under_every_transform(around, how):
    """As a set: how often JAX calls a rule while it traces a loop is up to JAX."""
    kernels = KERNELS if around == "alone" else FEW
    for kernel, argnums in itertools.product(kernels, (0, 1) if around == "alone" else (0,)):
        expected = told_without(kernel, around, argnums)
        assert expected
        fn = TRANSFORMS[how](model(kernel, around))
        assert heard(fn, argnums) == expected, (kernel, argnums)


@pytest.mark.parametrize("how", TRANSFORMS)
def test_gradients_are_those_of_the_rules(how):
    kernels = lambda p, x: jnp.stack([model(kernel, "alone")(p, x) for kernel in KERNELS])
    both = lambda p, x: (jax.jacrev(kernels)(p, x), jax.jacrev(TRANSFORMS[how](kernels))(p, x))
    full, got = jax.jit(both)(PARAMS, X)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(full), strict=True):
        each = lambda v: jnp.linalg.norm(v.reshape(len(KERNELS), -1), axis=1)
        assert jnp.all(each(a - b) <= 0.05 * each(b) + 0.02), each(a - b)


def test_a_rule_of_which_nothing_is_asked_is_run_all_the_same():
    """It may return what no cotangent says: statistics in the place of a gradient."""

    @jax.custom_vjp
    def noted(x, slot):
        return x

    noted.defvjp(lambda x, slot: (x, x), lambda x, g: (g, jnp.abs(x).max()))
    fn = lambda slot, x: both(x, noted(jnp.sin(x), slot))[0].sum()
    expected = jax.grad(fn)(jnp.zeros(()), X)
    assert expected > 0
    np.testing.assert_array_equal(expected, jax.grad(rewritten(fn, SINE))(jnp.zeros(()), X))


# ------------------------------------------------------- rules inside of custom derivatives (B2)


@jax.custom_vjp
def layer(w, x):
    """A product whose gradient is halved on its way down."""
    return x @ w


layer.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, 0.5 * (g @ kept[0].T)))


@jax.custom_jvp
def layer_jvp(w, x):
    return x @ w


@layer_jvp.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return layer_jvp(w, x), x @ dw + 0.5 * (dx @ w)


@jax.custom_vjp
def turned(w):
    """The parameter itself, whose gradient is turned around."""
    return w


turned.defvjp(lambda w: (w, None), lambda _, g: (-g,))


@jax.custom_vjp
def block(w, x):
    return jnp.tanh(layer(w, x))


def block_forward(w, x):
    y, back = jax.vjp(lambda w, x: jnp.tanh(layer(w, x)), w, x)
    return y, back


block.defvjp(block_forward, lambda back, g: back(g))


def on_devices(w, x):
    mesh = jax.make_mesh((1,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    specs = dict(in_specs=(P(), P("d")), out_specs=P("d"))
    body = lambda w, x: layer(varying(w, ("d",)), x)
    return jax.shard_map(body, mesh=mesh, **specs)(w, x)


INSIDE = {
    "vjp": layer,
    "jvp": layer_jvp,
    "nested": block,
    "turned": lambda w, x: x @ turned(w),
    "jit": lambda w, x: jax.jit(layer)(w.T, x),
    "remat": jax.checkpoint(layer),
    "vmap": lambda w, x: jax.vmap(lambda row: layer(w, row[None])[0])(x),
    "scan": lambda w, x: lax.scan(lambda h, _: (jnp.tanh(layer(w, h)), None), x, length=2)[0],
    "scan, jvp": lambda w, x: lax.scan(lambda h, _: (layer_jvp(w, h), None), x, length=2)[0],
    "cond": lambda w, x: lax.cond(x[0, 0] > 9, lambda w, x: x, layer, w, x),
    "shard_map": on_devices,
    "beside": lambda w, x: layer(w, x) + x @ w,
}
W = {"w": PARAMS["w"] / 2}


def served_alike(fn, rules, params, x):
    """Value served; value and gradient trained, the value of two programs to the bit."""
    codes = us.quantize(params, us.quant.resolve(rules, fn, params, x))
    loss = lambda p, x: (lambda y: (jnp.square(y).sum(), y))(us.quantized(fn, rules)(p, x))
    served, trained = jax.jit(us.quantized(fn)), jax.jit(us.quantized(fn, rules))
    (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
    assert_same_bits(trained(params, x), served(codes, x))
    assert_same_bits(y, served(codes, x))
    return grads


@pytest.mark.parametrize("spec", [W8A8, DotSpec(w=QSpec(format="int4"))], ids=str)
@pytest.mark.parametrize("kind", INSIDE)
def test_a_product_inside_of_a_custom_derivative_is_one_of_codes(kind, spec):
    """Served as trained, and every gradient is the user's."""
    fn = lambda p, x: INSIDE[kind](p["w"], x)
    grads = served_alike(fn, {"w": spec}, W, X)
    us.quantized(fn, {"w": spec}, strict=True)(W, X)
    rows = us.explain(us.quantized(fn, {"w": spec}))(W, X).products.rows
    assert rows and all("codes" in row.notes for row in rows)
    full = jax.jit(jax.grad(lambda p, x: jnp.square(fn(p, x)).sum(), (0, 1)))(W, X)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(full), strict=True):
        assert jnp.linalg.norm(a - b) < (0.05 if spec is W8A8 else 0.3) * jnp.linalg.norm(b)


@pytest.mark.parametrize("kind", ["vjp", "jvp"])
def test_the_gradient_is_the_rule_of_the_user_at_the_values_served(kind):
    fn, g = lambda p, x: INSIDE[kind](p["w"], x), normal(ROWS, WIDTH, seed=7)
    value = us.quant.dequantize(us.quantize(W, us.quant.resolve({"w": W8A8}, fn, W, X)))["w"]
    dw, dx = jax.vjp(us.quantized(fn, {"w": W8A8}), W, X)[1](g)
    np.testing.assert_allclose(dw["w"], X.T @ g, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, 0.5 * (g @ value.T), rtol=1e-5, atol=1e-6)


def test_scales_that_are_trained_are_trained_inside_of_a_custom_derivative():
    fn = lambda p, x: layer(p["w"], x)
    spec = DotSpec(w=QSpec(format="int3", axes=(-2,)))
    params = us.quant.learned(W, {"w": spec})
    loss = lambda fn: lambda p: jnp.square(us.quantized(fn)(p, X)).sum()
    got, plain = jax.grad(loss(fn))(params), jax.grad(loss(lambda p, x: x @ p["w"]))(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@jax.custom_vjp
def scores(q, k):
    return jnp.einsum("bij,bkj->bik", q, k)


scores.defvjp(
    lambda q, k: (jnp.einsum("bij,bkj->bik", q, k), (q, k)),
    lambda kept, g: (g @ kept[1], g.transpose(0, 2, 1) @ kept[0]),
)


def test_products_of_activations_inside_of_a_custom_derivative_have_their_rule():
    fn = lambda p, x: scores(x[None] @ p["w"], x[None])
    rules = {"attention": W8A8}
    run = us.quantized(fn, rules)
    rows = us.explain(run)(W, X).products.rows
    assert [row.operands[0] for row in rows] == ["float32", "int8"]
    value, _ = jax.jit(jax.value_and_grad(lambda p: run(p, X).sum()))(W)
    assert_same_bits(value, jax.jit(lambda p: run(p, X).sum())(W))


def test_strict_says_that_a_derivative_is_the_users_own():
    rules = {"w": DotSpec(w=QSpec(), x=QSpec(), g=QSpec())}
    fn = lambda p, x: layer(p["w"], x)
    us.quantized(fn, rules)(W, X)
    with pytest.raises(ValueError, match="dot_general of w .the derivative is the user's own"):
        us.quantized(fn, rules, strict=True)(W, X)


# ------------------------------------------------------------------------- rules that end somewhere

IN_THE_WAY = {
    "mul": lambda w: w * jnp.tril(jnp.ones((WIDTH, WIDTH))),
    "tanh": jnp.tanh,
    "div": lambda w: w / jnp.linalg.norm(w, axis=0),
    "sort": jnp.sort,
    "add": lambda w: w + normal(WIDTH, WIDTH, seed=9),
    "cumsum": lambda w: jnp.cumsum(w, axis=0),
    "scan": lambda w: lax.fori_loop(0, 2, lambda _, w: w * 2.0, w),
    "cond": lambda w: lax.cond(w[0, 0] > 9, lambda w: w, lambda w: w.T, w),
}
BY_AXES = DotSpec(w=QSpec(axes=(-2,)), x=QSpec())


@pytest.mark.parametrize("given", ["rules", "codes"])
@pytest.mark.parametrize("name", IN_THE_WAY)
def test_a_rule_that_leaves_no_integer_product_is_an_error_that_names_what_is_in_the_way(
    name, given
):
    fn = lambda p, x: jnp.tanh(x @ p["v"]) @ IN_THE_WAY[name](p["w"])
    params = {"v": W["w"], "w": W["w"]}
    rules = {"*": BY_AXES}
    rule, args = (rules, params) if given == "rules" else (None, us.quantize(params, rules))
    with pytest.raises(
        ValueError, match=rf"^w has a rule, .*stayed in floating.*: .*{name}.* of w "
    ):
        us.quantized(fn, rule)(args, X)
    us.quantized(fn, {"v": BY_AXES})(params, X)


def test_scales_that_cross_the_only_product_are_in_the_way_of_it():
    along = lambda axis: DotSpec(w=QSpec(axes=(axis,)), x=QSpec())
    fn = lambda p, x: x + p["w"] @ p["v"]
    with pytest.raises(ValueError, match="has a rule.*dot_general of w and v .scales cross the"):
        us.quantized(fn, {"w": along(-2), "v": along(-1)})({"w": W["w"], "v": W["w"]}, X[:1])
    us.quantized(fn, {"w": along(-1), "v": along(-2)})({"w": W["w"], "v": W["w"]}, X[:1])


def test_a_part_in_integers_is_enough_and_strict_asks_for_all():
    fn = lambda p, x: x @ p["w"] + x @ jnp.tanh(p["w"])
    us.quantized(fn, {"w": BY_AXES})(W, X)
    with pytest.raises(ValueError, match=r"left in floating point: tanh of w \(no rule for it\)"):
        us.quantized(fn, {"w": BY_AXES}, strict=True)(W, X)


def test_what_is_only_looked_up_or_dequantized_on_purpose_is_no_error():
    ids = jnp.array([2, 0])
    us.quantized(lambda p, x: x[: len(ids)] * p["w"][ids], {"w": DotSpec()})(W, X)
    for compute in ("dequant", "float_exact"):
        us.quantized(
            lambda p, x: x @ p["w"], {"w": DotSpec(w=QSpec(), x=QSpec(), compute=compute)}
        )(W, X)


@pytest.mark.parametrize("name", zoo.COVER)
def test_products_with_a_rule_are_those_in_integers_and_those_that_are_left(name):
    model = zoo.model(name)
    rules = BOTH_WAYS.get(name) or named_by_use(name)
    ruled = [pattern for pattern, _ in rules]
    met = trace.meetings(trace_call(model.apply, model.params, *model.inputs), model.params)
    places = {m.site.place for leaf in ruled for m in met.get(leaf, ()) if m.kind == "product"}
    codes = us.quantize(model.params, rules)
    rows = us.explain(us.quantized(model.apply))(codes, *model.inputs).products.rows
    integers = [row for row in rows if "int8" in row.operands]
    left = [row for row in rows if row not in integers and set(row.parameters) & set(ruled)]
    assert len(places) == len(integers) + len(left) > 0


def test_a_rule_for_weights_alone_may_be_dequantized():
    """It asks for no integers; `strict` does."""
    fn = lambda p, x: x @ jnp.tanh(p["w"])
    us.quantized(fn, {"w": DotSpec(w=QSpec(axes=(-2,)))})(W, X)
    with pytest.raises(ValueError, match="left in floating point: tanh of w"):
        us.quantized(fn, {"w": DotSpec(w=QSpec(axes=(-2,)))}, strict=True)(W, X)
