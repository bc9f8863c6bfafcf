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
from unitscale_jax.trace.program import sites

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


@pytest.mark.parametrize("name", zoo.EACH)
def test_float32_is_the_identity(name):
    model = zoo.model(name)
    args = model.params, *model.inputs
    assert source(autocast(model.apply, "float32"), *args) == source(model.apply, *args)


@pytest.mark.parametrize("name", zoo.EACH)
def test_twice_is_once(name):
    model = zoo.model(name)
    once = autocast(model.apply)
    args = model.params, *model.inputs
    assert source(autocast(once), *args) == source(once, *args)


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", zoo.EACH)
def test_results_have_the_shapes_and_dtypes_they_had(name, compute):
    model = zoo.model(name)
    args = model.params, *model.inputs
    assert jax.eval_shape(autocast(model.apply, compute), *args) == jax.eval_shape(
        model.apply, *args
    )


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", zoo.EACH)
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


@pytest.mark.parametrize("name", [n for n in zoo.COVER if "while" not in zoo.tags_of(n)])
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


def test_a_row_that_is_masked_whole_is_no_nan():
    lowest = np.finfo(np.float32).min  # -inf in 16 bits
    fn = lambda params, x: jax.nn.softmax(jnp.where(x > 9, x @ params["w"], lowest))
    for compute in (BF16, F16):
        assert (autocast(fn, compute)({"w": jnp.eye(4)}, X) == 0.25).all()


def test_a_temperature_is_divided_by_in_float32():
    fn = lambda params, x: jax.nn.softmax(x @ params["w"] / np.float32(3))
    assert set(dtypes(autocast(fn), {"w": jnp.eye(4)}, X, name="div")) == {F32}


def test_a_cast_made_in_a_loop_stays_in_it():
    """A kernel that a loop closes over is cast in its condition and in its body, each alone."""
    again = lambda params: lambda c: (c @ params["w"]).sum() < 9
    loop = lambda params, x: lax.while_loop(again(params), lambda c: c @ params["w"] + 1, x)
    fn = lambda params, x: loop(params, x) @ params["w"]
    assert jnp.isfinite(jax.jit(autocast(fn))({"w": jnp.eye(4)}, X)).all()


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
    "mask of data": lambda p, h: h + jnp.where(h > 0, jnp.float32(0), jnp.float32(-1e9)),
    "branch of data": lambda p, h: h * lax.cond(h.sum() > 0, lambda: p["b"], lambda: 2 * p["b"]),
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


def test_a_wrong_derivative_stays_wrong():
    """The derivative is the user's, and nothing is differentiated anew."""

    @jax.custom_jvp
    def forward(w, x):
        return x @ w

    forward.defjvp(lambda primals, ts: (forward(*primals), 7.0 * (primals[1] @ ts[0])))

    @jax.custom_vjp
    def reverse(w, x):
        return x @ w

    reverse.defvjp(lambda w, x: (x @ w, x), lambda x, g: (7.0 * (x.T @ g), jnp.zeros_like(x)))
    for wrong in (forward, reverse):
        low = autocast(lambda params, wrong=wrong: wrong(params["w"], jnp.ones((2, 4))).sum())
        np.testing.assert_allclose(jax.grad(low)({"w": jnp.eye(4)})["w"], 14.0)


# Rules.


def by_product(**options):
    """The dtypes of the inner and of the outer product of two layers."""
    return products(autocast(two_layers, **options), PARAMS, X)


LOW, FULL = (BF16, BF16, BF16), (F32, F32, F32)


def test_a_rule_changes_exactly_the_products_of_its_parameter():
    assert by_product() == [LOW, LOW]
    assert by_product(rules=[("inner/*", "float32")]) == [FULL, LOW]
    assert by_product(rules={"outer/kernel": "float16"}) == [LOW, (F16, F16, F16)]
    assert by_product(rules=[("outer/*", ("bfloat16", "float32"))]) == [LOW, (BF16, BF16, F32)]
    assert by_product(keep_float32=["outer/**"]) == [LOW, FULL]
    assert by_product(compute=("bfloat16", "float32")) == [(BF16, BF16, F32)] * 2


def test_the_first_rule_wins_and_keep_float32_comes_before():
    rules = [("inner/*", "float32"), ("**", "float16")]
    assert by_product(rules=rules) == [FULL, (F16, F16, F16)]
    assert by_product(rules=[("**", "float16")], keep_float32=["inner/*"]) == [FULL, (F16,) * 3]


@pytest.mark.parametrize("name", ["plain_scan_remat", "plain_gqa", "linen_lstm", "nnx_custom_jvp"])
def test_a_rule_for_all_is_the_compute_dtype(name):
    model = zoo.model(name)
    args = model.params, *model.inputs
    ruled = autocast(model.apply, "float32", rules={"**": "bfloat16"})
    assert source(ruled, *args) == source(autocast(model.apply), *args)


@pytest.mark.parametrize(("name", "stacks"), [("plain_transformer", 2), ("plain_scan_remat", 1)])
def test_products_of_activations_are_called_attention(name, stacks):
    model = zoo.model(name)
    args = model.params, *model.inputs
    found = products(autocast(model.apply, rules={"attention": "float32"}), *args)
    assert found.count(FULL) == 2 * stacks  # of queries and keys, and of weights and values
    assert found.count(LOW) == len(found) - 2 * stacks


def test_products_of_activations_without_batch_axes_are_called_dot():
    fn = lambda params, x: (x @ params["w"]) @ x.T
    low = autocast(fn, rules={"dot": "float32"})
    assert products(low, {"w": jnp.eye(4)}, X) == [LOW, FULL]


def test_products_of_activations_are_called_by_their_scope():
    def fn(params, x):
        with jax.named_scope("encoder"):
            similar = jax.jit(jax.named_scope("scores")(lambda x: x @ x.T))(x)
        return similar + x @ x.T + (x @ params["w"]).sum()

    low = autocast(fn, rules={"encoder/**/scores": "float32"})
    assert sorted(products(low, {"w": jnp.eye(4)}, X)) == sorted([FULL, LOW, LOW])


def test_a_class_can_be_chosen_for_a_primitive():
    fn = lambda params, x: jnp.tanh(x @ params["w"])
    args = {"w": jnp.eye(4)}, X
    assert dtypes(autocast(fn), *args, name="tanh") == [BF16]
    assert dtypes(autocast(fn, ops={"tanh": "float32"}), *args, name="tanh") == [F32]
    assert products(autocast(fn, ops={"dot_general": "keep"}), *args) == [FULL]


def test_a_rule_that_reaches_nothing_is_an_error_with_the_closest_names():
    with pytest.raises(ValueError, match="rule 0, 'iner/kernel'.*closest: 'inner/kernel'"):
        by_product(rules=[("iner/kernel", "float32")])
    with pytest.raises(ValueError, match="'inner/bias', matched none of 2 products"):
        by_product(rules=[("inner/bias", "float32")])  # a bias is in no product


def test_a_rule_behind_another_that_takes_all_it_matches_is_an_error():
    with pytest.raises(
        ValueError, match="rule 1, 'inner/kernel', decides on nothing: rule 0, .*first"
    ):
        by_product(rules=[("inner/*", "float32"), ("inner/kernel", "float16")])
    with pytest.raises(ValueError, match="decides on nothing"):
        by_product(keep_float32=["**"], rules=[("outer/*", "float16")])


def test_a_dtype_or_a_class_that_there_is_not_is_an_error():
    for wrong in ("int8", "float64", ("bfloat16", "int32")):
        with pytest.raises(ValueError, match="cannot compute in (int|float).*choose bfloat16"):
            autocast(two_layers, wrong)
    with pytest.raises(ValueError, match=r"ops\['exp'\] is 'wide'; expected 'low', 'float32'"):
        autocast(two_layers, ops={"exp": "wide"})


# 8-bit floats.


def test_8_bit_operands_are_seen_by_the_product():
    narrow = autocast(dot, "float8_e4m3fn")
    assert products(narrow, {"w": jnp.eye(4)}, X) == [(F8, F8, BF16)]
    pair = autocast(dot, ("float8_e5m2", "float32"))
    assert products(pair, {"w": jnp.eye(4)}, X) == [(np.dtype(jnp.float8_e5m2),) * 2 + (F32,)]


def test_8_bit_operands_saturate_and_keep_what_is_not_finite():
    times_one = lambda x: autocast(dot, "float8_e4m3fn")({"w": jnp.ones((1, 1))}, x)
    out = times_one(jnp.array([[1e4], [-1e4], [448.0], [1.0], [jnp.nan]]))
    np.testing.assert_array_equal(out[:, 0], [448, -448, 448, 1, np.nan])
    # There is no infinity in this format, so it becomes NaN rather than a number.
    assert not jnp.isfinite(times_one(jnp.full((1, 1), jnp.inf))).any()


def test_8_bit_products_have_gradients_in_the_dtype_of_their_result():
    """In 8 bits a gradient of 3000 is NaN and one of 1e-4 is zero."""
    narrow = autocast(dot, "float8_e4m3fn")
    for size in (3000.0, 1e-4):
        params, x = {"w": 2.0 * jnp.ones((4, 4))}, jnp.ones((2, 4))
        grads = jax.grad(lambda p, x, s=size: s * narrow(p, x).sum(), (0, 1))(params, x)
        np.testing.assert_allclose(grads[0]["w"], 2 * size, rtol=0.01)
        np.testing.assert_allclose(grads[1], 8 * size, rtol=0.01)
    saturated = jax.grad(lambda p: narrow(p, 1e4 * jnp.ones((2, 4))).sum())(params)["w"]
    np.testing.assert_allclose(saturated, 2 * 448.0)


def test_8_bit_convolutions_have_gradients_too():
    model = zoo.model("plain_cnn")
    narrow = autocast(lambda params: model.loss(params, *model.inputs), "float8_e4m3fn")
    grads = jax.tree.leaves(jax.grad(narrow)(model.params))
    assert all(bool(jnp.isfinite(g).all()) and bool(jnp.any(g)) for g in grads)


# What stays as it is.


def test_integers_stay():
    fn = lambda params, x: x @ params["w"]
    args = {"w": jnp.eye(4, dtype=jnp.int32)}, jnp.ones((3, 4), jnp.int32)
    with pytest.warns(UserWarning, match="1 of 1 products: their operands are integers"):
        assert source(autocast(fn), *args) == source(fn, *args)


def test_64_bits_stay():
    with jax.enable_x64(True):
        args = {"w": jnp.eye(4, dtype=jnp.float64)}, jnp.ones((3, 4), jnp.float64)
        fn = lambda params, x: jax.nn.softmax(x @ params["w"])
        with pytest.warns(UserWarning, match="neither 16 nor 32 bits wide"):
            assert source(autocast(fn), *args) == source(fn, *args)


def test_the_highest_precision_stays_unless_a_rule_names_it():
    fn = lambda params, x: jnp.dot(x, params["w"], precision="highest")
    with pytest.warns(UserWarning, match="asks for precision='highest'"):
        assert products(autocast(fn), {"w": jnp.eye(4)}, X) == [FULL]
    assert products(autocast(fn, rules={"w": "bfloat16"}), {"w": jnp.eye(4)}, X) == [LOW]


def test_a_wider_result_stays():
    fn = lambda params, x: jnp.dot(x, params["w"], preferred_element_type=jnp.float32)
    args = {"w": jnp.eye(4, dtype=BF16)}, X.astype(BF16)
    assert products(autocast(fn), *args) == [(BF16, BF16, F32)]


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_passes_through(value, compute):
    x = jnp.ones((2, 1)).at[0].set(value)
    out = autocast(dot, compute)({"w": jnp.ones((1, 1))}, x)
    np.testing.assert_array_equal(out, x)


# A function like any other.


def test_commutes_with_jit_and_vmap():
    low = autocast(two_layers)
    out = jax.jit(low)(PARAMS, X)
    np.testing.assert_allclose(jax.jit(autocast(jax.jit(two_layers)))(PARAMS, X), out)
    inside = jax.jit(autocast(jax.vmap(two_layers, (None, 0))))(PARAMS, X)
    outside = jax.jit(jax.vmap(low, (None, 0)))(PARAMS, X)
    np.testing.assert_allclose(inside, outside, rtol=1e-2, atol=1e-2)
    assert set(products(jax.vmap(low, (None, 0)), PARAMS, X)) == {LOW}


def test_takes_keywords_flags_and_returns_what_is_no_array():
    def fn(params, *, x, scale, mode="train", flag=False):
        h = x @ params["w"] * scale
        return {"out": -h if flag else h, "mode": mode, "none": None, "pair": (3, h.sum())}

    low = autocast(fn)
    assert low.__name__ == "fn"
    given = dict(x=X, scale=2, mode="eval", flag=True)
    out, expected = low({"w": jnp.eye(4)}, **given), fn({"w": jnp.eye(4)}, **given)
    assert jax.tree.structure(out) == jax.tree.structure(expected)
    assert (out["mode"], out["none"], out["pair"][0]) == ("eval", None, 3)
    np.testing.assert_allclose(out["out"], expected["out"], rtol=0.01)
    assert products(lambda p, x: low(p, x=x, scale=2)["out"], {"w": jnp.eye(4)}, X) == [LOW]


def test_what_16_bits_lose_is_in_float32():
    """Listed here again, so that the table cannot lose one unseen."""
    unsafe = "exp exp2 expm1 log log1p pow sqrt rsqrt cbrt reduce_sum cumsum cumprod lgamma fft"
    assert {OPS[name] for name in unsafe.split()} == {"float32"}
