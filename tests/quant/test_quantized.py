"""Laws of `quantized`: training is serving to the bit, and gradients are straight-through."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax
from jax.sharding import PartitionSpec as P

import unitscale_jax as us
from tests.support import zoo
from unitscale_jax import DotSpec, QSpec
from unitscale_jax.quant import EMA, MSE, Fixed, Group, Percentile
from unitscale_jax.trace.program import sites

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(jnp.bfloat16)
W8A8 = DotSpec(w=QSpec(), x=QSpec())
ROWS, IN, OUT = 5, 16, 8


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def same_bits(a, b):
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    pairs = list(zip(*leaves, strict=True))
    return all(x.dtype == y.dtype for x, y in pairs) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )


def assert_same_bits(a, b):
    __tracebackhide__ = True
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert same_bits(a, b)  # the signs of zeros too


def served_and_trained(fn, rules, params, *inputs):
    """One jitted program on codes, and one on the float parameters that makes them."""
    codes = us.quantize(params, us.quant.resolve(rules, fn, params, *inputs))
    served = jax.jit(us.quantized(fn))(codes, *inputs)
    return served, jax.jit(us.quantized(fn, rules))(params, *inputs)


# ------------------------------------------------------------------- training is serving (P11)

DENSE = {"w": normal(IN, OUT, seed=1), "b": normal(OUT, seed=2)}
X = normal(ROWS, IN)


def dense(params, x, dtype=jnp.float32):
    """Dot, bias and relu: of float operations only those that agree in all programs."""
    cast = lambda v: v.astype(dtype)
    return jax.nn.relu(cast(x) @ cast(params["w"]) + cast(params["b"]))


I4 = QSpec(format="int4")
INT4_BY_4 = QSpec(format="int4", group=Group(4))
BY_INTEGERS = QSpec(format="int4", group=Group(4, scale="integer"))
SPECS = [
    W8A8,
    DotSpec(),
    DotSpec(w=I4),
    DotSpec(w=I4, x=QSpec()),
    DotSpec(w=I4, x=I4),
    DotSpec(w=QSpec(format="int2"), x=QSpec()),
    DotSpec(w=QSpec(scale="po2"), x=QSpec(scale="po2")),
    DotSpec(w=QSpec(), x=QSpec(symmetric=False)),
    DotSpec(w=QSpec(symmetric=False), x=QSpec()),
    DotSpec(w=QSpec(symmetric=False), x=QSpec(symmetric=False)),
    DotSpec(w=QSpec(), x=QSpec(), compute="float_exact"),
    DotSpec(w=QSpec(), x=QSpec(), compute="dequant"),
    DotSpec(w=INT4_BY_4),
    DotSpec(w=INT4_BY_4, x=QSpec()),
    DotSpec(w=INT4_BY_4, x=QSpec(symmetric=False)),
    DotSpec(w=BY_INTEGERS, x=QSpec()),
    DotSpec(w=BY_INTEGERS, x=QSpec(symmetric=False)),
    DotSpec(w=QSpec(format="e4m3fn"), x=QSpec(format="e4m3fn")),
    DotSpec(w=QSpec(format="e4m3fn"), x=QSpec(format="e5m2")),
    DotSpec(w=QSpec(calibrator=Percentile(90)), x=QSpec(calibrator=Percentile(90))),
    DotSpec(w=QSpec(calibrator=MSE(steps=5)), x=QSpec(calibrator=Fixed(1.5))),
    DotSpec(w=QSpec(), x=QSpec(symmetric=False, calibrator=Fixed(-1.0, 2.0))),
    DotSpec(w=QSpec(), x=QSpec(), g=QSpec()),
]


@functools.cache
def programs(spec, dtype):
    """`dense` on codes, and on float parameters: alone and with its gradient."""
    fn = functools.partial(dense, dtype=dtype)
    rules = us.quant.resolve({"w": spec}, fn, DENSE, X)
    train = us.quantized(fn, rules)

    def loss(params, x):
        y = train(params, x)
        return jnp.square(y.astype(jnp.float32)).sum(), y

    code = jax.jit(lambda params: us.quantize(params, rules))
    with_gradient = jax.jit(lambda p, x: jax.value_and_grad(loss, has_aux=True)(p, x)[0][1])
    return code, jax.jit(us.quantized(fn)), jax.jit(train), with_gradient


values = functools.partial(hnp.arrays, np.float32, elements=st.floats(-4, 4, width=32))


# What the dtype changes is seen with fewer specs.
IN_16_BITS = [0, 1, 7, 12, 13, 17]
CASES = [(spec, F32) for spec in SPECS]
CASES += [(SPECS[k], dtype) for k in IN_16_BITS for dtype in (BF16, F16)]


@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=str)
def test_training_is_serving_to_the_bit(spec, dtype):
    code, serve, train, with_gradient = programs(spec, dtype)

    @given(x=values((ROWS, IN)), seed=st.integers(0, 9))
    def law(x, seed):
        params = {"w": normal(IN, OUT, seed=seed), "b": DENSE["b"]}
        y = serve(code(params), x)
        assert y.dtype == dtype
        assert_same_bits(train(params, x), y)
        assert_same_bits(with_gradient(params, x), y)

    law()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[7], SPECS[13]], ids=str)
def test_under_jit_and_without_it(spec, dtype):
    fn = functools.partial(dense, dtype=dtype)
    rules = us.quant.resolve({"w": spec}, fn, DENSE, X)
    codes = us.quantize(DENSE, rules)
    served = jax.jit(us.quantized(fn))(codes, X)
    assert_same_bits(us.quantized(fn)(codes, X), served)
    assert_same_bits(us.quantized(fn, rules)(DENSE, X), served)


def gelus(params, x, dtype=jnp.bfloat16):
    """Gelu leaves float32 values that a compiler would rather not round before they are codes."""
    for name in ("a", "b"):
        w, b = (params[name][leaf].astype(dtype) for leaf in "wb")
        x = jax.nn.gelu(x.astype(dtype) @ w + b)
    return x


def test_what_is_quantized_was_rounded_to_16_bits_in_every_program():
    fn, params = gelus, {"a": SQUARE, "b": SQUARE}
    rules, x = us.quant.resolve({"*/w": W8A8}, fn, params, X), normal(48, IN)
    codes = us.quantize(params, rules)
    served = jax.jit(us.quantized(fn))(codes, x)
    assert_same_bits(us.quantized(fn)(codes, x), served)
    assert_same_bits(jax.jit(us.quantized(fn, rules))(params, x), served)


def layer(params, x):
    return jax.nn.relu(x @ params["w"] + params["b"])


@jax.custom_jvp
def layer_jvp(params, x):
    return layer(params, x)


layer_jvp.defjvp(lambda primals, tangents: jax.jvp(layer, primals, tangents))


def counted(params, x):
    return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, layer(params, c[1])), (0, x))[1]


def on_devices(params, x):
    mesh = jax.make_mesh((1,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    return jax.shard_map(layer, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))(params, x)


WRAPPED = {
    "jit": jax.jit(layer),
    "vmap over rows": jax.vmap(layer, (None, 0)),
    "vmap outside of jit": jax.vmap(jax.jit(layer), (None, 0)),
    "scan over rows": lambda p, x: lax.scan(lambda c, row: (c, layer(p, row)), 0, x)[1],
    "scan that repeats": lambda p, x: lax.scan(lambda h, _: (layer(p, h), None), x, length=3)[0],
    "scan, remat": lambda p, x: lax.scan(
        jax.checkpoint(lambda h, _: (layer(p, h), None)), x, length=2
    )[0],
    "while": counted,
    "cond": lambda p, x: lax.cond(x[0, 0] > 9, lambda p, x: -layer(p, x), layer, p, x),
    "remat": jax.checkpoint(layer),
    "custom_jvp": layer_jvp,
    "shard_map": on_devices,
    "nested": lambda p, x: jax.jit(jax.checkpoint(counted))(p, x),
}
SQUARE = {"w": normal(IN, IN, seed=3) / 4, "b": normal(IN, seed=4)}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wherever_a_product_stands(kind):
    fn = WRAPPED[kind]
    served, trained = served_and_trained(fn, {"w": W8A8}, SQUARE, X)
    assert_same_bits(trained, served)
    float_product = jax.jit(fn)(SQUARE, X)
    assert 0 < jnp.linalg.norm(served - float_product) < 0.05 * jnp.linalg.norm(float_product)


BACKWARD = [kind for kind in WRAPPED if kind not in ("while", "nested")]


@pytest.mark.parametrize("kind", BACKWARD)
def test_gradients_wherever_a_product_stands(kind):
    loss = lambda fn: lambda p, x: jnp.square(fn(p, x)).sum()
    fn = WRAPPED[kind]
    got = jax.jit(jax.grad(loss(us.quantized(fn, {"w": W8A8})), (0, 1)))(SQUARE, X)
    full = jax.jit(jax.grad(loss(fn), (0, 1)))(SQUARE, X)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(full), strict=True):
        assert jnp.linalg.norm(a - b) < 0.1 * jnp.linalg.norm(b)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_over_stacked_layers(dtype, remat):
    stack = {"w": normal(3, IN, IN, seed=5) / 4, "b": normal(3, IN, seed=6)}
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
    step = lambda h, p: (layer(cast(p), h), None)

    def fn(params, x):
        return lax.scan(jax.checkpoint(step) if remat else step, x.astype(dtype), params)[0]

    served, trained = served_and_trained(fn, {"w": W8A8}, stack, X)
    assert served.dtype == dtype
    assert_same_bits(trained, served)
    unrolled = X.astype(dtype)
    codes = us.quantize(stack, us.quant.resolve({"w": W8A8}, fn, stack, X))
    one = jax.jit(us.quantized(lambda p, x: layer(cast(p), x)))
    for k in range(3):
        unrolled = one(jax.tree.map(lambda leaf, k=k: leaf[k], codes), unrolled)
    assert_same_bits(unrolled, served)


# ------------------------------------------------------------------------------- over the zoo


@functools.cache
def named_by_use(name):
    """A rule for each parameter of a model that a rule can name: it meets a product."""
    model, rules = zoo.model(name), []
    for leaf, value in us.tree.named_leaves(model.params).items():
        if value.ndim >= 2:
            try:
                rules += us.quant.resolve({leaf: W8A8}, model.apply, model.params, *model.inputs)
            except ValueError as error:
                assert "meets no product" in str(error) or "different axes" in str(error), error
    return rules


# A table (Koopman operator, spectral norm) that is contracted both ways needs its axes from us.
BOTH_WAYS = {"plain_spectral": [("kernel", DotSpec(w=QSpec(axes=(-2,)), x=QSpec()))]}

# The order of a model's own float32 sums is up to the compiler: fused into one loop with other
# neighbors, the mean of a norm after a product moves by an ulp in 3 of the 47 models.
UNFUSED = {"xla_disable_hlo_passes": "fusion"}


@pytest.mark.parametrize("name", zoo.COVER)
def test_every_model_is_served_as_it_was_trained(name):
    model = zoo.model(name)
    rules = BOTH_WAYS.get(name) or named_by_use(name)
    assert rules
    codes = us.quantize(model.params, rules)
    run = lambda fn: jax.jit(fn, compiler_options=UNFUSED)
    served = run(us.quantized(model.apply))(codes, *model.inputs)
    trained = run(us.quantized(model.apply, rules))(model.params, *model.inputs)
    float_outputs = jax.eval_shape(model.apply, model.params, *model.inputs)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(served) == types(float_outputs)
    assert_same_bits(trained, served)


@pytest.mark.parametrize("name", [n for n in zoo.COVER if "while" not in zoo.tags_of(n)])
def test_no_gradient_is_lost_in_any_model(name):
    """Each leaf has the gradient of the float model, but for what eight bits change."""
    model = zoo.model(name)
    rules = BOTH_WAYS.get(name) or named_by_use(name)
    quantized_loss = lambda p, xs: replace_apply(model, rules).loss(p, *xs)
    both = lambda p, xs: (jax.grad(quantized_loss)(p, xs), jax.grad(model.loss)(p, *xs))
    fast = {"xla_backend_optimization_level": 0}
    got, full = map(
        us.tree.named_leaves, jax.jit(both, compiler_options=fast)(model.params, model.inputs)
    )
    size = max(float(jnp.linalg.norm(g)) for g in full.values())
    for leaf, g in full.items():
        assert bool(jnp.isfinite(got[leaf]).all()), leaf
        if jnp.linalg.norm(g) > 1e-3 * size:
            assert jnp.linalg.norm(got[leaf] - g) < 0.5 * jnp.linalg.norm(g), leaf


def replace_apply(model, rules):
    return replace(model, apply=us.quantized(model.apply, rules))


# ------------------------------------------------------------------------- gradients (P15)


def stopped(x, by):
    """X, served as another value: the straight-through estimator as one writes it by hand."""
    return x + lax.stop_gradient(by - x)


def through_codes(x, spec, axes):
    """What is served for an array, by `quantize` alone, and where it is not clipped."""
    t = us.quantize({"x": x}, {"x": DotSpec(w=replace(spec, axes=axes))})["x"]
    return us.quant.dequantize(t)


def clipped(x, calibrator, axis):
    """Where |x| is above the calibrator's bound, by numpy."""
    size = np.abs(np.asarray(x))
    if isinstance(calibrator, Fixed):
        return (x < calibrator.low) | (x > calibrator.high)
    if not isinstance(calibrator, Percentile):
        return np.zeros(x.shape, bool)
    k = int(np.ceil(calibrator.p * x.shape[axis] / 100))
    return size > np.take(np.sort(size, axis=axis), [k - 1], axis=axis)


ORACLES = {
    "w8a8": W8A8,
    "po2": DotSpec(w=QSpec(scale="po2"), x=QSpec(scale="po2")),
    "int4": DotSpec(w=I4, x=I4),
    "groups": DotSpec(w=INT4_BY_4, x=QSpec()),
    "integer groups": DotSpec(w=BY_INTEGERS, x=QSpec()),
    "asymmetric": DotSpec(w=QSpec(symmetric=False), x=QSpec(symmetric=False)),
    "fp8": DotSpec(w=QSpec(format="e4m3fn"), x=QSpec(format="e4m3fn")),
    "percentile": DotSpec(w=QSpec(calibrator=Percentile(80)), x=QSpec(calibrator=Percentile(70))),
    "fixed": DotSpec(w=QSpec(calibrator=Fixed(0.5)), x=QSpec(calibrator=Fixed(1.0))),
    "fixed range": DotSpec(w=QSpec(), x=QSpec(symmetric=False, calibrator=Fixed(-0.5, 1.0))),
    "float_exact": replace(W8A8, compute="float_exact"),
    "dequant": replace(W8A8, compute="dequant"),
}


@pytest.mark.parametrize("kind", ORACLES)
def test_gradients_are_those_of_the_straight_through_estimator(kind):
    spec = ORACLES[kind]
    w, x, g = DENSE["w"], X, normal(ROWS, OUT, seed=7)
    dot = lambda w, x: x @ w
    y, back = jax.vjp(lambda w, x: us.quantized(dot, {"": spec})(w, x), w, x)
    dq_w, dq_x = through_codes(w, spec.w, (-2,)), through_codes(x, spec.x, (-1,))
    oracle, oracle_back = jax.vjp(lambda w, x: stopped(x, dq_x) @ stopped(w, dq_w), w, x)
    np.testing.assert_allclose(y, oracle, rtol=1e-5, atol=1e-5)
    masks = [clipped(w, spec.w.calibrator, 0), clipped(x, spec.x.calibrator, 1)]
    for got, full, mask in zip(back(g), oracle_back(g), masks, strict=True):
        expected = np.where(mask, 0.0, full)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(full).max())
        assert (np.asarray(got)[np.asarray(mask)] == 0).all()
        assert (np.asarray(got)[~np.asarray(mask)] != 0).all()
    if spec.w.clips:
        assert np.any(masks[0]) and np.any(masks[1])


@pytest.mark.parametrize("calibrator", [MSE(steps=2), Percentile(100), EMA()], ids=repr)
def test_the_largest_element_has_a_gradient(calibrator):
    """For the mask is |x| <= m: Q s is below m for four of a hundred m."""
    spec = DotSpec(w=QSpec(calibrator=calibrator), x=QSpec(calibrator=calibrator))
    fn = us.quantized(lambda w, x: x @ w, {"": spec})
    w, x = normal(IN, 500, seed=14), normal(500, IN, seed=15)
    for g in jax.grad(lambda w, x: jnp.square(fn(w, x)).sum(), (0, 1))(w, x):
        assert bool((g != 0).all())


def test_gradients_have_the_dtype_of_the_parameter():
    def fn(params, x):
        return dense(params, x, BF16)

    grads = jax.grad(lambda p: us.quantized(fn, {"w": W8A8})(p, X).astype(jnp.float32).sum())(DENSE)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {F32}


def dropping(params, x):
    """The parameter is masked inside, which codes do not survive."""
    return x @ (params["w"] * jnp.tril(jnp.ones((IN, OUT))))


@jax.custom_vjp
def dot_vjp(w, x):
    return x @ w


dot_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))


FALLBACKS = {
    "mask": lambda p, x: dropping(p, x) + x @ p["w"],
    "custom_vjp": lambda p, x: dot_vjp(p["w"], x) + x @ p["w"],
    "regularized": lambda p, x: x @ p["w"] + jnp.square(p["w"]).sum(0),
    "normalized": lambda p, x: x @ p["w"] / jnp.linalg.norm(p["w"], axis=0),
    "lookup": lambda p, x: x @ p["w"] + p["w"][jnp.array([3, 3, 0, 1, 7])],
    "both ways": lambda p, x: (x @ p["w"]) @ p["w"].T,
    "sum over groups": lambda p, x: x @ p["w"] + p["w"].reshape(4, -1, OUT).sum((0, 1)),
}


@pytest.mark.parametrize("kind", FALLBACKS)
def test_a_fallback_loses_no_gradient(kind):
    fn, w = FALLBACKS[kind], {"w": DENSE["w"]}
    rules = {"w": DotSpec(w=QSpec(axes=(-2,)), x=QSpec())}
    loss = lambda fn: lambda p, x: jnp.square(fn(p, x)).sum()
    got = jax.jit(jax.grad(loss(us.quantized(fn, rules)), (0, 1)))(w, X)
    full = jax.jit(jax.grad(loss(fn), (0, 1)))(w, X)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(full), strict=True):
        assert jnp.linalg.norm(a - b) < 0.05 * jnp.linalg.norm(b)
    served, trained = served_and_trained(fn, rules, w, X)
    np.testing.assert_allclose(trained, served, rtol=1e-6)  # sums of the function's own


@pytest.mark.parametrize("calibrator", [us.quant.Absmax(), Percentile(50)], ids=repr)
def test_a_gradient_goes_through_a_lookup_to_the_rows_read(calibrator):
    """Where nothing is clipped, all of it, twice for a row that is read twice."""
    table, ids = normal(6, 8, seed=16), jnp.array([4, 0, 4])
    fn = us.quantized(lambda p, ids: p[ids], {"": DotSpec(w=QSpec(calibrator=calibrator))})
    got = jax.grad(lambda p: fn(p, ids).sum())(table)
    times = np.array([1, 0, 0, 0, 2, 0])[:, None]
    inside = ~np.asarray(clipped(table, calibrator, 1))
    np.testing.assert_array_equal(got, np.broadcast_to(times, table.shape) * inside)


def test_there_is_no_forward_mode():
    fn = us.quantized(lambda w, x: x @ w, {"": W8A8})
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda w: fn(w, X), (DENSE["w"],), (DENSE["w"],))


# ------------------------------------------------------------------- a backward pass in integers

WIDE = {"w": normal(256, 128, seed=8), "x": normal(64, 256, seed=9), "g": normal(64, 128, seed=10)}


@functools.cache
def backward(rounding):
    spec = replace(W8A8, g=None if rounding is None else QSpec(rounding=rounding))

    def run(key):
        fn = us.quantized(lambda w, x: x @ w, {"": spec}, key=key)
        return jax.vjp(fn, WIDE["w"], WIDE["x"])[1](WIDE["g"])

    return jax.jit(run)


def off(got, full):
    return [
        float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(got, full, strict=True)
    ]


@pytest.mark.parametrize(
    ("rounding", "dw", "dx"),
    [
        ("nearest", 0.020, 0.0076),
        ("stochastic", 0.028, 0.0104),
    ],
)
def test_a_backward_pass_in_integers_is_off_by_little(rounding, dw, dx):
    full = backward(None)(jax.random.key(0))
    errors = off(backward(rounding)(jax.random.key(0)), full)
    for error, expected in zip(errors, (dw, dx), strict=True):
        assert expected / 4 < error < expected * 1.5


def test_stochastic_rounding_is_unbiased():
    """The mean over n keys is off by a single one's error over the root of n."""
    full, run = backward(None)(jax.random.key(0)), backward("stochastic")
    each = [run(jax.random.key(n)) for n in range(64)]
    mean = jax.tree.map(lambda *gs: sum(gs) / len(gs), *each)
    for single, averaged in zip(off(each[0], full), off(mean, full), strict=True):
        assert 0.7 / 8 < averaged / single < 1.4 / 8


def test_the_same_key_draws_the_same_and_another_one_does_not():
    run = backward("stochastic")
    one, again, other = (run(jax.random.key(n)) for n in (1, 1, 2))
    assert_same_bits(one, again)
    assert not same_bits(one, other)


def test_two_products_draw_differently():
    spec = replace(W8A8, g=QSpec(rounding="stochastic"))
    params = {"a": WIDE["w"], "b": WIDE["w"]}
    fn = us.quantized(lambda p, x: x @ p["a"] + x @ p["b"], {"**": spec}, key=jax.random.key(0))
    grads = jax.vjp(lambda p: fn(p, WIDE["x"]), params)[1](WIDE["g"])[0]
    assert not same_bits(grads["a"], grads["b"])


# ------------------------------------------------------------------- what stays as it is (P27)


def source(fn, *args):
    return str(jax.make_jaxpr(fn)(*args))


@pytest.mark.parametrize("rules", [None, {}, []])
@pytest.mark.parametrize("name", ["plain_scan_remat", "linen_cond", "nnx_mlp", "plain_cnn"])
def test_without_rules_it_is_the_identity(name, rules):
    model = zoo.model(name)
    args = model.params, *model.inputs
    assert source(us.quantized(model.apply, rules), *args) == source(model.apply, *args)


def test_only_what_a_rule_names_is_quantized():
    params = {"a": SQUARE["w"], "b": SQUARE["w"]}
    fn = us.quantized(lambda p, x: (x @ p["a"]) @ p["b"], {"b": W8A8})
    assert operands(fn, params, X) == [(F32, F32), (np.dtype(np.int8),) * 2]


def operands(fn, *args):
    found = sites(jax.make_jaxpr(fn)(*args).jaxpr)
    return [site.operands[:2] for site in found if site.name == "dot_general"]


def test_takes_keywords_and_flags_and_returns_what_is_no_array():
    def fn(params, *, x, scale, mode="train", flag=False):
        h = x @ params["w"] * scale
        return {"out": -h if flag else h, "mode": mode, "none": None, "pair": (3, h.sum())}

    given = dict(x=X, scale=2.0, mode="eval", flag=True)
    rules = us.quant.resolve({"w": W8A8}, fn, {"w": DENSE["w"]}, **given)
    out = us.quantized(fn, rules)({"w": DENSE["w"]}, **given)
    assert (out["mode"], out["none"], out["pair"][0]) == ("eval", None, 3)
    served = us.quantized(fn)(us.quantize({"w": DENSE["w"]}, rules), **given)
    assert_same_bits(out["out"], served["out"])
    assert us.quantized(fn).__name__ == "fn"


def test_codes_may_come_in_any_argument():
    fn = lambda state, x, w: (state, x @ w)
    w = us.quantize({"w": DENSE["w"]}, {"w": DotSpec(w=QSpec(axes=(-2,)), x=QSpec())})["w"]
    _, y = us.quantized(fn)(0, X, w)
    _, by_name = us.quantized(fn)(0, X, w=w)
    assert_same_bits(y, by_name)
    assert operands(us.quantized(fn), 0, X, w) == [(np.dtype(np.int8),) * 2]


def test_codes_that_are_returned_stay_codes():
    rules = {"w": DotSpec(w=QSpec(axes=(-2,)))}
    codes = us.quantize({"w": DENSE["w"]}, rules)
    out = us.quantized(lambda p, x: (p, x @ p["w"]))(codes, X)[0]["w"]
    assert isinstance(out, us.quant.QTensor)
    assert_same_bits(out.codes, codes["w"].codes)


@pytest.mark.parametrize("spec", [W8A8, SPECS[7], DotSpec(), SPECS[17]], ids=str)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(spec, poison):
    x = X.at[2, 3].set(poison)
    rules = {"w": spec.with_axes((-2,))}
    fn = lambda p, x: x @ p["w"]
    y = us.quantized(fn, rules)({"w": DENSE["w"]}, x)
    clean = us.quantized(fn, rules)({"w": DENSE["w"]}, X)
    rows = np.arange(ROWS) != 2
    assert not jnp.isfinite(y[2]).any()
    assert_same_bits(y[rows], clean[rows])


# ---------------------------------------------------------------------------------- errors


def test_a_rule_that_matches_nothing_is_an_error_with_the_closest_name():
    with pytest.raises(ValueError, match="'kernle', matched none.*closest"):
        us.quantized(lambda p, x: x @ p["kernel"], {"kernle": W8A8})({"kernel": DENSE["w"]}, X)


def test_a_parameter_that_meets_no_product_is_an_error():
    with pytest.raises(ValueError, match="names b, which meets no product.*exclude it"):
        us.quantized(dense, {"*": W8A8})(DENSE, X)


def test_codes_of_another_spec_are_an_error():
    codes = us.quantize(DENSE, {"w": DotSpec(w=QSpec(axes=(-2,)), x=QSpec())})
    assert_same_bits(us.quantized(dense, {"w": W8A8})(codes, X), us.quantized(dense)(codes, X))
    with pytest.raises(ValueError, match="w is quantized as int8 x int8.*asks for float x int4"):
        us.quantized(dense, {"w": DotSpec(w=I4)})(codes, X)


def test_groups_that_do_not_divide_are_an_error_with_the_divisors():
    rules = {"w": DotSpec(w=QSpec(format="int4", group=Group(5)))}
    with pytest.raises(ValueError, match="w along axis -2 has 16.*groups of 5.*2, 4, 8, 16"):
        us.quantized(dense, rules)(DENSE, X)


def test_a_rule_needs_a_spec_of_products():
    with pytest.raises(TypeError, match="rule 'w' has the value QSpec.*has a DotSpec"):
        us.quantized(dense, {"w": QSpec()})(DENSE, X)


STRICT = {
    "mask": (FALLBACKS["mask"], "mul.*no rule"),
    "cond": (
        lambda p, x: x @ p["w"] + x @ lax.cond(x[0, 0] > 9, lambda w: w, jnp.negative, p["w"]),
        "a result of cond",
    ),
    "carry": (
        lambda p, x: lax.fori_loop(0, 2, lambda _, w: w * 2.0, p["w"]) + (x @ p["w"]).sum(),
        "loop's carry",
    ),
}


@pytest.mark.parametrize("kind", STRICT)
def test_strict_says_what_was_left_in_floating_point_and_why(kind):
    fn, why = STRICT[kind]
    rules = {"w": DotSpec(w=QSpec(axes=(-2,)), x=QSpec())}
    us.quantized(fn, rules)({"w": DENSE["w"]}, X)
    with pytest.raises(ValueError, match=f"left in floating point: .*{why}"):
        us.quantized(fn, rules, strict=True)({"w": DENSE["w"]}, X)


@pytest.mark.parametrize("kind", WRAPPED)
def test_strict_is_content_where_all_is_in_integers(kind):
    us.quantized(WRAPPED[kind], {"w": W8A8}, strict=True)(SQUARE, X)


# ---------------------------------------------------- where peers fail (F1 to F11 of the design)


def test_a_function_compiled_before_in_floating_point_is_quantized():
    """F1: what patches `lax` is bypassed by the cache of a jitted function."""
    helper = jax.jit(lambda x, w: x @ w)
    helper(X, DENSE["w"])
    jnp.dot(X, DENSE["w"])
    for fn in (lambda p, x: helper(x, p["w"]), lambda p, x: jnp.dot(x, p["w"])):
        assert operands(us.quantized(fn, {"w": W8A8}), DENSE, X) == [(np.dtype(np.int8),) * 2]


DOTS = {
    "lax.dot": lambda p, x: lax.dot(x, p["w"]),
    "lax.dot_general": lambda p, x: lax.dot_general(x, p["w"], (((1,), (0,)), ((), ()))),
    "jnp.tensordot": lambda p, x: jnp.tensordot(x, p["w"], 1),
    "jnp.einsum": lambda p, x: jnp.einsum("bi,io->bo", x, p["w"]),
    "einsum of three": lambda p, x: jnp.einsum("bi,io,o->bo", x, p["w"], p["b"]),
    "vmap": lambda p, x: jax.vmap(lambda row: row @ p["w"])(x),
}


@pytest.mark.parametrize("kind", DOTS)
def test_every_way_to_write_a_product_is_seen(kind):
    """F1, F2 and F11."""
    fn = us.quantized(DOTS[kind], {"w": W8A8})
    assert (np.dtype(np.int8),) * 2 in operands(fn, DENSE, X)
    y = jax.jit(DOTS[kind])(DENSE, X)
    assert jnp.linalg.norm(jax.jit(fn)(DENSE, X) - y) < 0.02 * jnp.linalg.norm(y)


def test_an_activation_of_the_parameters_shape_is_an_activation():
    """F4 and F5: a parameter is known by name, not by its shape."""
    fn = lambda p, x: x @ p["w"]
    params, x = {"w": SQUARE["w"]}, normal(IN, IN, seed=11)
    weight_only = us.quantized(fn, {"w": DotSpec(w=I4)})(params, x)
    value = us.quant.dequantize(us.quantize(params, {"w": DotSpec(w=replace(I4, axes=(-2,)))}))["w"]
    np.testing.assert_allclose(weight_only, x @ value, rtol=1e-4, atol=1e-5)
    served, trained = served_and_trained(fn, {"w": W8A8}, params, x)
    assert_same_bits(trained, served)


@pytest.mark.parametrize("format", ["int2", "int4", "int8"])
def test_the_negative_is_the_negative_of_the_product(format):
    """F8: codes are symmetric."""
    spec = DotSpec(w=QSpec(format=format), x=QSpec(format=format))
    run = jax.jit(us.quantized(lambda p, x: x @ p["w"], {"w": spec}))
    y = run({"w": DENSE["w"]}, X)
    assert_same_bits(run({"w": -DENSE["w"]}, X) + 0.0, -y + 0.0)
    assert_same_bits(run({"w": DENSE["w"]}, -X) + 0.0, -y + 0.0)


def convolved(params, x):
    return lax.conv_general_dilated(
        x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


CONVOLUTIONS = {
    "weight-only": DotSpec(),
    "w4a8": DotSpec(w=I4, x=QSpec()),
    "w8a8": W8A8,
    "asymmetric": DotSpec(w=QSpec(), x=QSpec(symmetric=False)),
    "groups": DotSpec(w=QSpec(format="int4", group=Group(2)), x=QSpec()),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_of_all_kinds_are_served_as_trained(kind):
    """F10."""
    params, x = {"w": normal(3, 3, 4, 6, seed=12)}, normal(2, 5, 5, 4, seed=13)
    served, trained = served_and_trained(convolved, {"w": CONVOLUTIONS[kind]}, params, x)
    assert_same_bits(trained, served)
    y = convolved(params, x)
    assert jnp.linalg.norm(served - y) < 0.15 * jnp.linalg.norm(y)


def test_a_product_that_codes_reach_and_that_stays_one_of_floats_says_why():
    params, x = {"w": normal(3, 3, 4, 6, seed=12)}, normal(2, 5, 5, 4, seed=13)
    fn = us.quantized(convolved, {"w": CONVOLUTIONS["groups"]})
    (row,) = us.explain(fn)(params, x).products.rows
    assert row.operands == ("float32", "float32")
    assert row.notes["quantize"] == "kept: scales cross the sum"


@pytest.mark.parametrize("groups", [2, 4], ids=["grouped", "depthwise"])
def test_convolutions_with_groups_of_features_are_served_as_trained(groups):
    def fn(params, x):
        options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)
        return lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", **options)

    params, x = {"w": normal(3, 3, 4 // groups, 8, seed=14)}, normal(2, 5, 5, 4, seed=15)
    served, trained = served_and_trained(fn, {"w": W8A8}, params, x)
    assert_same_bits(trained, served)
    exact = us.quantized(fn, {"w": replace(W8A8, compute="float_exact")})
    assert_same_bits(jax.jit(exact)(params, x), served)
    y = fn(params, x)
    assert jnp.linalg.norm(served - y) < 0.02 * jnp.linalg.norm(y)


def test_a_product_of_a_highest_precision_is_quantized_and_float_ones_keep_theirs():
    def fn(params, x):
        dot = functools.partial(jnp.dot, precision="highest")
        return dot(dot(x, params["a"]), params["b"])

    params = {"a": SQUARE["w"], "b": SQUARE["w"]}
    found = sites(jax.make_jaxpr(us.quantized(fn, {"a": W8A8}))(params, X).jaxpr)
    dots = [site for site in found if site.name == "dot_general"]
    assert [site.operands[0] for site in dots] == [np.dtype(np.int8), F32]
    assert "HIGHEST" in str(dots[1].eqn.params["precision"])
