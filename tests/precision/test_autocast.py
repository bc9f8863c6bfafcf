"""Laws of autocast, read from the equations of what it makes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tests.support import zoo
from unitscale_jax.precision import autocast
from unitscale_jax.precision._classes import OPS
from unitscale_jax.trace import sites

BF16, F16, F32 = np.dtype(jnp.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
F8 = np.dtype(jnp.float8_e4m3fn)
PARAMS = {
    "inner": {"kernel": 0.3 * jnp.ones((4, 5)), "bias": jnp.arange(5.0)},
    "outer": {"kernel": 0.2 * jnp.ones((5, 4)), "bias": -jnp.ones(4)},
}
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)


def two_layers(params, x):  # (batch, 4)
    h = jnp.tanh(x @ params["inner"]["kernel"] + params["inner"]["bias"])
    return h @ params["outer"]["kernel"] + params["outer"]["bias"]


def source(fn, *args):
    """The equations as text, without the addresses of the functions that they mention."""
    return re.sub(r"0x[0-9a-f]+", "", str(jax.make_jaxpr(fn)(*args)))


def sites_of(fn, *args):
    return list(sites(jax.make_jaxpr(fn)(*args).jaxpr))


def products(fn, *args):
    """`(dtypes of the operands, dtype of the result)` of every product."""
    found = [s for s in sites_of(fn, *args) if OPS.get(s.name) == "low"]
    return [(*s.operands, *s.results) for s in found]


def dtypes(fn, *args, name):
    """Dtypes of the results of every equation of a primitive."""
    return [s.results[0] for s in sites_of(fn, *args) if s.name == name]


def is_float(dtype):
    return jnp.issubdtype(dtype, jnp.floating)


# Laws over the zoo.


@pytest.mark.parametrize("name", zoo.NAMES)
def test_float32_is_the_identity(name):
    model = zoo.model(name)
    args = model.params, *model.inputs
    assert source(autocast(model.apply, "float32"), *args) == source(model.apply, *args)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_twice_is_once(name):
    model = zoo.model(name)
    once = autocast(model.apply)
    args = model.params, *model.inputs
    assert source(autocast(once), *args) == source(once, *args)


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_results_have_the_shapes_and_dtypes_they_had(name, compute):
    model = zoo.model(name)
    args = model.params, *model.inputs
    assert jax.eval_shape(autocast(model.apply, compute), *args) == jax.eval_shape(
        model.apply, *args
    )


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_products_are_in_the_compute_dtype_and_what_is_unsafe_in_float32(name, compute):
    model = zoo.model(name)
    found = sites_of(autocast(model.apply, compute), model.params, *model.inputs)
    wanted = {"low": np.dtype(compute), "float32": F32}
    classes = set()
    for site in found:
        chosen = OPS.get(site.name)
        if chosen in wanted and is_float(site.operands[0]):
            classes.add(chosen)
            floats = [d for d in (*site.operands, *site.results) if is_float(d)]
            assert set(floats) == {wanted[chosen]}, (site.place, site.name, floats)
    assert "low" in classes


@pytest.mark.parametrize("name", zoo.named(having=("differentiable",)))
def test_in_a_gradient_too(name):
    """The backward pass of a product is made of products, in the same dtype."""
    model = zoo.model(name)
    grad = jax.grad(lambda params: model.loss(params, *model.inputs))
    low = jax.grad(autocast(lambda params: model.loss(params, *model.inputs)))
    found = [dtypes for dtypes in products(low, model.params) if all(map(is_float, dtypes))]
    assert len(found) == len(products(grad, model.params))
    assert {dtype for dtypes in found for dtype in dtypes} == {BF16}


COMPILED = [
    "plain_mlp",
    "plain_scan_remat",
    "plain_lstm",
    "plain_custom_vjp",
    "plain_custom_jvp",
    "plain_cond",
    "linen_moe",
    "nnx_mlp",
]


@pytest.mark.parametrize("name", COMPILED)
def test_gradients_are_of_the_parameters_dtype_and_near_those_of_float32(name):
    model = zoo.model(name)
    low_loss = autocast(model.loss)
    both = lambda p, xs: (jax.grad(low_loss)(p, *xs), jax.grad(model.loss)(p, *xs))
    low, full = jax.jit(both)(model.params, model.inputs)
    like = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert like(low) == like(model.params)
    flat = lambda tree: jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
    difference = jnp.linalg.norm(flat(low) - flat(full))
    assert 0 < difference < 0.05 * jnp.linalg.norm(flat(full))  # bfloat16 keeps 8 bits: 0.4 %


# Where the demand for float32 goes.


def test_a_softmax_is_as_precise_as_its_logits():
    """Nothing is rounded between the product and the exponential, or the error is of 6 %."""
    logits = jnp.linspace(-11.5, 11.5, 64)[None]
    fn = lambda params, x: jax.nn.softmax(x @ params["w"])
    got = autocast(fn)({"w": jnp.eye(64)}, logits)
    rounded = logits.astype(BF16).astype(jnp.float32)
    np.testing.assert_allclose(got, jax.nn.softmax(rounded), rtol=1e-3)


def test_demand_goes_through_calls_and_stops_at_a_sum():
    def fn(params, x):
        residual = x @ params["w"] + jnp.tanh(x @ params["w"])
        return jnp.exp(jax.jit(lambda h: jnp.negative(h).reshape(-1))(residual))

    low = autocast(fn), {"w": jnp.eye(4)}, X
    assert dtypes(*low, name="add") == [BF16]
    assert dtypes(*low, name="neg") == [F32]


def mask_of(h):
    return jnp.where(jnp.arange(h.shape[-1]) < 2, h, jnp.float32(-1e9))


ADAPTING = {
    "literal": lambda p, h: h * np.float32(0.5),
    "array": lambda p, h: h + jnp.arange(4.0),
    "bias": lambda p, h: h + p["b"],
    "derived gain": lambda p, h: h * (1.0 + p["b"]),
    "mask": lambda p, h: mask_of(h),
    "relu": lambda p, h: jax.nn.relu(h),
    "max": lambda p, h: jnp.maximum(h, jnp.zeros(4)),
    "truth": lambda p, h: h * (h > 0).astype(jnp.float32),
}


@pytest.mark.parametrize("kind", ADAPTING)
def test_constants_and_parameters_do_not_widen_a_stream(kind):
    fn = lambda params, x: jnp.tanh(ADAPTING[kind](params, x @ params["w"]))
    assert dtypes(autocast(fn), {"w": jnp.eye(4), "b": jnp.ones(4)}, X, name="tanh") == [BF16]


def test_an_embedding_starts_a_narrow_stream():
    fn = lambda params, ids: jnp.tanh(params["table"][ids])
    assert dtypes(autocast(fn), {"table": jnp.ones((5, 4))}, jnp.arange(3), name="tanh") == [BF16]


def test_a_float32_activation_does_widen():
    fn = lambda params, x: jnp.tanh(x @ params["w"] + x)
    assert dtypes(autocast(fn), {"w": jnp.eye(4)}, X, name="tanh") == [F32]


def test_a_cast_by_the_user_wins():
    fn = lambda params, x: jnp.tanh((x @ params["w"]).astype(jnp.float16))
    assert dtypes(autocast(fn), {"w": jnp.eye(4)}, X, name="tanh") == [F16]


def carries(fn, *args):
    """Dtypes of the carry of the only scan."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    return [v.aval.dtype for v in scan.outvars]


def test_a_carry_that_starts_at_float32_zeros_becomes_narrow():
    model = zoo.model("plain_lstm")
    assert set(carries(autocast(model.apply), model.params, *model.inputs)) == {BF16}


def test_a_carry_that_is_a_long_sum_stays_wide():
    def fn(params, x):
        add = lambda total, row: (total + jnp.exp(row @ params["w"]).sum(), None)
        return lax.scan(add, jnp.zeros(()), x)[0]

    assert carries(autocast(fn), {"w": jnp.eye(4)}, X) == [F32]


# The same everywhere.


def dot(params, x):
    return x @ params["w"]


@jax.custom_jvp
def dot_jvp(w, x):
    return x @ w


dot_jvp.defjvp(lambda primals, ts: (dot_jvp(*primals), ts[1] @ primals[0] + primals[1] @ ts[0]))


@jax.custom_vjp
def dot_vjp(w, x):
    return x @ w


dot_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))


def counted(params, x):
    return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, dot(params, c[1])), (0, x))[1]


def branched(params, x):
    return lax.cond(x[0, 0] > 0, dot, lambda p, x: dot(p, 2 * x), params, x)


def on_devices(params, x):
    mesh = jax.make_mesh((1,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    return jax.shard_map(dot, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))(params, x)


WRAPPED = {
    "plain": dot,
    "jit": lambda p, x: jax.jit(dot)(p, x),
    "vmap": lambda p, x: jax.vmap(dot, (None, 0))(p, x),
    "scan": lambda p, x: lax.scan(lambda c, row: (c, dot(p, row)), 0, x)[1],
    "while": counted,
    "cond": branched,
    "remat": lambda p, x: jax.checkpoint(dot)(p, x),
    "custom_jvp": lambda p, x: dot_jvp(p["w"], x),
    "custom_vjp": lambda p, x: dot_vjp(p["w"], x),
    "shard_map": on_devices,
    "nested": lambda p, x: jax.jit(jax.checkpoint(counted))(p, x),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_product_has_the_same_dtypes_wherever_it_stands(kind):
    params = {"w": jnp.eye(4) + 0.1}
    assert set(products(autocast(WRAPPED[kind]), params, X)) == {(BF16, BF16, BF16)}
    rule = autocast(WRAPPED[kind], rules=[("w", ("float16", "float32"))])
    assert set(products(rule, params, X)) == {(F16, F16, F32)}


@pytest.mark.parametrize("kind", [kind for kind in WRAPPED if kind not in ("while", "nested")])
def test_gradients_work_wherever_a_product_stands(kind):
    params = {"w": jnp.eye(4) + 0.1}
    low = autocast(lambda p: jnp.square(WRAPPED[kind](p, X)).sum())
    assert all(d == BF16 for dtypes in products(jax.grad(low), params) for d in dtypes)
    full = jax.grad(lambda p: jnp.square(WRAPPED[kind](p, X)).sum())(params)["w"]
    got = jax.grad(low)(params)["w"]
    assert got.dtype == F32
    np.testing.assert_allclose(got, full, atol=0.02 * float(jnp.abs(full).max()))
