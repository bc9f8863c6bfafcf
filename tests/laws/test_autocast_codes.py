"""Laws of autocast: it knows products on codes, and says when it lowered nothing."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unitscale_jax as us
from tests.quant.test_quantized import BOTH_WAYS, W8A8, named_by_use, normal
from tests.support import zoo
from unitscale_jax import DotSpec, QSpec
from unitscale_jax.quant import Group

PARAMS = {"w": normal(8, 6, seed=1) / 3, "v": normal(6, 4, seed=2)}
X = normal(5, 8)
CASTS = {"convert_element_type", "reduce_precision"}
BF16 = jnp.dtype(jnp.bfloat16)


def mlp(p, x):
    return jax.nn.softmax(jnp.tanh(x @ p["w"]) @ p["v"])


def operations(fn, *args):
    """Every operation that is no cast, with its dtypes, in order."""
    rows = us.explain(fn)(*args).rows
    return [(row.name, row.operands, row.results) for row in rows if row.name not in CASTS]


def assert_either_order(fn, rules, params, *inputs, compute="bfloat16"):
    inside = us.quantized(us.autocast(fn, compute), rules)
    around = us.autocast(us.quantized(fn, rules), compute)
    assert operations(around, params, *inputs) == operations(inside, params, *inputs)
    return jax.jit(inside), jax.jit(around)


@pytest.mark.parametrize("given", ["rules", "codes"])
@pytest.mark.parametrize("name", zoo.COVER)
def test_autocast_around_quantized_and_inside_of_it_have_the_same_dtypes(name, given):
    model = zoo.model(name)
    rules = BOTH_WAYS.get(name) or named_by_use(name)
    if given == "rules":
        assert_either_order(model.apply, rules, model.params, *model.inputs)
    else:
        assert_either_order(model.apply, None, us.quantize(model.params, rules), *model.inputs)


SPECS = {
    "w8a8": W8A8,
    "weights alone": DotSpec(w=QSpec(format="int4")),
    "groups": DotSpec(w=QSpec(format="int4", group=Group(2)), x=QSpec()),
    "asymmetric": DotSpec(w=QSpec(), x=QSpec(symmetric=False)),
    "dequant": DotSpec(w=QSpec(), x=QSpec(), compute="dequant"),
    "float_exact": DotSpec(w=QSpec(), x=QSpec(), compute="float_exact"),
    "e4m3": DotSpec(w=QSpec(format="e4m3fn"), x=QSpec(format="e4m3fn")),
}


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", SPECS)
def test_either_order_has_the_same_numbers(kind, compute):
    """Scales and codes are made in float32; operands and results of a product are rounded."""
    inside, around = assert_either_order(mlp, {"*": SPECS[kind]}, PARAMS, X, compute=compute)
    np.testing.assert_allclose(inside(PARAMS, X), around(PARAMS, X), rtol=0.02, atol=0.005)


def test_gradients_of_either_order_are_alike():
    loss = lambda fn: lambda p: jnp.square(fn(p, X)).sum()
    inside, around = assert_either_order(mlp, {"*": W8A8}, PARAMS, X)
    grads = [jax.tree.leaves(jax.grad(loss(fn))(PARAMS)) for fn in (inside, around)]
    for a, b in zip(*grads, strict=True):
        assert a.dtype == np.float32
        assert jnp.linalg.norm(a - b) < 0.02 * jnp.linalg.norm(a)


def test_a_backward_pass_in_integers_stays_one_under_autocast():
    spec = DotSpec(w=QSpec(), x=QSpec(), g=QSpec())
    grad = jax.grad(lambda p: us.autocast(us.quantized(mlp, {"*": spec}))(p, X)[:, 0].sum())
    rows = us.explain(grad)(PARAMS).products.rows
    assert [row.operands for row in rows].count(("int8", "int8")) >= 4


def test_what_follows_a_product_on_codes_is_narrow():
    fn = lambda p, x: jnp.tanh(x @ p["w"])
    rows = us.explain(us.autocast(us.quantized(fn, {"w": W8A8})))(PARAMS, X).rows
    assert [row.operands for row in rows if row.name == "tanh"] == [("bfloat16",)]


def test_a_rule_decides_on_a_product_of_codes():
    fn = us.quantized(lambda p, x: jnp.tanh(x @ p["w"]), {"w": W8A8})
    low = us.autocast(fn, "bfloat16", rules={"w": "float16"})
    wide = us.autocast(fn, "bfloat16", keep_float32=["w"])
    of_tanh = lambda fn: [r.operands for r in us.explain(fn)(PARAMS, X).rows if r.name == "tanh"]
    assert (of_tanh(low), of_tanh(wide)) == ([("float16",)], [("float32",)])


# ------------------------------------------------------------------------ what was not lowered


def test_a_call_that_lowers_no_product_says_why_once():
    def fn(params, x):
        dot = lambda x, w: jnp.matmul(x, w, precision="highest")
        return dot(dot(x, params["w"]), params["v"])

    with pytest.warns(
        UserWarning, match="2 of 2 products: the model asks for precision='highest'"
    ) as w:
        us.autocast(fn)(PARAMS, X)
    assert len(w) == 1
    us.autocast(fn, rules={"w": "bfloat16"})(PARAMS, X)


def test_where_some_product_is_lowered_or_there_is_none_nothing_is_said():
    def some(params, x):
        return jnp.matmul(x, params["w"], precision="highest") @ params["v"]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        us.autocast(some)(PARAMS, X)
        us.autocast(us.autocast(mlp))(PARAMS, X)
        us.autocast(us.quantized(mlp, {"*": W8A8}))(PARAMS, X)
        us.autocast(mlp, keep_float32=["*"])(PARAMS, X)
        us.autocast(lambda p, x: jnp.tanh(x))(PARAMS, X)


def test_what_autocast_widens_itself_is_no_silent_upcast():
    residual = lambda p, x: x[:, :6] + jnp.tanh(x @ p["w"])
    assert not us.explain(us.autocast(residual))(PARAMS, X).upcasts
    users = lambda p, x: x[:, :6] + (x @ p["w"]).astype(BF16).astype(jnp.float32)
    assert [row.name for row in us.explain(us.autocast(users))(PARAMS, X).upcasts] == ["add"]


@pytest.mark.parametrize("name", zoo.COVER)
def test_no_model_has_upcasts_that_are_not_its_own(name):
    model = zoo.model(name)
    assert not us.explain(us.autocast(model.apply))(model.params, *model.inputs).upcasts
