"""Laws of a product of codes: exact integers and one rounding, in any form of the computation."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import unitscale_jax as us
from tests.quant.test_quantized import BF16, F32, W8A8, assert_same_bits, normal, operands
from unitscale_jax import DotSpec, QSpec
from unitscale_jax.quant import Group
from unitscale_jax.quant._qtensor import integer_codes
from unitscale_jax.trace.program import sites

I4, I8, ASYMMETRIC = QSpec(format="int4"), QSpec(), QSpec(symmetric=False)
S8, S32 = np.dtype(np.int8), np.dtype(np.int32)


def bits(*words):
    """Float32 values by their bits in hexadecimal."""
    return np.array([int(word, 16) for word in words], np.uint32).view(np.float32)


def coded(x, spec, axes, x_spec=None):
    """One array by itself, as `quantize` makes it."""
    return us.quantize({"": x}, {"": DotSpec(w=replace(spec, axes=axes), x=x_spec)})[""]


def dot(w, x):
    return x @ w


def value(fn, spec, w, *inputs):
    return jax.jit(us.quantized(fn, {"": spec}))(w, *inputs)


# ------------------------------------------------------------ worked examples (E5, E6, E7)

W = jnp.array([[0.5, -1.0], [0.25, 2.0], [1.0, -0.5]])
X = jnp.array([[1.0, 2.0, -3.0]])


def test_a_worked_example():
    w, x = coded(W, I8, (-2,)), coded(X, I8, (-1,))
    assert w.codes.tolist() == [[64, -64], [32, 127], [127, -32]]
    assert x.codes.tolist() == [[42, 85, -127]]
    np.testing.assert_array_equal(w.scale[0], bits("3c010204", "3c810204"))
    np.testing.assert_array_equal(x.scale[0], bits("3cc18306"))
    y = value(dot, W8A8, W, X)
    np.testing.assert_array_equal(y[0], bits("bfff3eff", "4090e245"))  # of floats -2 and 4.5


def test_a_worked_example_with_a_zero_point_and_with_float_activations():
    w, x = coded(W, I8, (-2,), ASYMMETRIC), coded(X, ASYMMETRIC, (-1,))
    assert x.codes.tolist() == [[76, 127, -128]] and x.zero_point.tolist() == [[25]]
    assert w.code_sums.tolist() == [[223, 31]]
    np.testing.assert_array_equal(x.scale[0], bits("3ca0a0a1"))
    y = value(dot, DotSpec(w=I8, x=ASYMMETRIC), W, X)
    np.testing.assert_array_equal(y[0], bits("bffefdfd", "40902041"))
    y = value(dot, DotSpec(w=I8), W, X)
    np.testing.assert_array_equal(y[0], bits("bffefdfc", "40902040"))


def test_a_worked_example_of_gradients():
    back = jax.vjp(us.quantized(dot, {"": W8A8}), W, X)[1]
    dw, dx = back(jnp.array([[1.0, -2.0]]))
    np.testing.assert_array_equal(dx[0], bits("40214285", "c06fdfc0", "40008102"))
    rows = ["3f7dfbf8", "bffdfbf8"], ["40008102", "c0808102"], ["c0400000", "40c00000"]
    np.testing.assert_array_equal(dw, np.stack([bits(*row) for row in rows]))


# --------------------------------------------------------------- the value, by a slow oracle

FORMS = {  # x, w -> y
    "rows": "bi,io->bo",
    "w on the left": "bi,oi->ob",
    "w transposed": "bi,oi->bo",
    "a vector": "i,io->o",
    "a vector of parameters": "bi,i->b",
    "two axes are summed": "bthk,hkd->btd",
    "in another order": "btkh,hkd->btd",
    "a batch of products": "ebi,eio->ebo",
    "experts": "bi,eio->ebo",
    "one row": "ai,io->ao",
    "rows are summed": "io,id->od",
    "a batch of them": "eio,eid->eod",
}
SIZES = dict(a=1, b=3, t=2, i=6, h=2, k=3, o=4, d=5, e=2)


def shaped(letters, seed):
    return normal(*(SIZES[letter] for letter in letters), seed=seed)


def dropped(term, summed):
    return "".join(letter for letter in term if letter not in summed)


def oracle(form, x, w):
    """f32(acc) * (s_x * s_w), acc summed by numpy in 64 bits."""
    terms, out = form.split("->")
    left, right = terms.split(",")
    summed = (set(left) & set(right)) - set(out)
    wide = []
    for t in (x, w):
        q = np.asarray(integer_codes(t).astype(jnp.int32)).astype(np.int64)
        wide.append(q - (0 if t.zero_point is None else np.asarray(t.zero_point)))
    acc = np.einsum(form, *wide)
    scales = [
        np.asarray(t.scale).squeeze(tuple(term.index(letter) for letter in summed))
        for t, term in ((x, left), (w, right))
    ]
    kept = f"{dropped(left, summed)},{dropped(right, summed)}->{out}"
    return acc.astype(np.float32) * np.einsum(kept, *scales)


def axes_of(form):
    """The axes of x and of w that the form sums over, from the end."""
    left, right = form.split("->")[0].split(",")
    summed = (set(left) & set(right)) - set(form.split("->")[1])
    at = lambda term: tuple(k - len(term) for k, letter in enumerate(term) if letter in summed)
    return at(left), at(right)


WITHOUT_GROUPS = {
    "w8a8": W8A8,
    "w4a8": DotSpec(w=I4, x=I8),
    "w4a4": DotSpec(w=I4, x=I4),
    "x asymmetric": DotSpec(w=I8, x=ASYMMETRIC),
    "w asymmetric": DotSpec(w=ASYMMETRIC, x=I8),
    "both asymmetric": DotSpec(w=ASYMMETRIC, x=ASYMMETRIC),
    "4 bits asymmetric": DotSpec(w=I4, x=QSpec(format="int4", symmetric=False)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("kind", WITHOUT_GROUPS)
def test_a_product_is_an_exact_integer_times_its_scales(kind, form):
    """P14: zero points too."""
    spec = WITHOUT_GROUPS[kind]
    left, right = form.split("->")[0].split(",")
    x, w = shaped(left, seed=1), shaped(right, seed=2)
    fn = lambda w, x: jnp.einsum(form, x, w)
    y = us.quantized(fn, {"": spec})(w, x)
    x_axes, w_axes = axes_of(form)
    expected = oracle(form, coded(x, spec.x, x_axes), coded(w, spec.w, w_axes))
    np.testing.assert_array_equal(y, expected)


def test_results_keep_the_dtype_of_the_product_and_are_rounded_once():
    w, x = normal(6, 4, seed=3).astype(BF16), normal(3, 6, seed=4).astype(BF16)
    full = oracle("bi,io->bo", coded(x, I8, (-1,)), coded(w, I8, (-2,)))
    assert_same_bits(value(dot, W8A8, w, x), jnp.asarray(full).astype(BF16))
    wide = lambda w, x: jnp.dot(x, w, preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(value(wide, W8A8, w, x), full)


@pytest.mark.parametrize("scale", ["free", "integer"])
@pytest.mark.parametrize("x_spec", [I8, ASYMMETRIC], ids=str)
def test_groups_are_summed_one_after_the_other(x_spec, scale):
    """Integer groups in one product; free ones in float32, each tile an exact integer."""
    spec = DotSpec(w=QSpec(format="int4", group=Group(4, scale=scale)), x=x_spec)
    w, x = normal(12, 5, seed=5), normal(3, 12, seed=6)
    q_w, q_x = coded(w, spec.w, (-2,)), coded(x, x_spec, (-1,))
    y = value(dot, spec, w, x)
    if scale == "integer":
        np.testing.assert_array_equal(y, oracle("bi,io->bo", q_x, q_w))
        return
    total = np.zeros((3, 5), np.float32)
    for k in range(3):
        cut = slice(4 * k, 4 * k + 4)
        part_x = replace(q_x, codes=q_x.codes[:, cut])
        part_w = replace(q_w, codes=q_w.codes[cut], scale=q_w.scale[k : k + 1])
        total = total + oracle("bi,io->bo", part_x, part_w)
    np.testing.assert_array_equal(y, total)


@pytest.mark.parametrize("form", ["bthk,hkd->btd", "ebi,eio->ebo", "bi,eio->ebo", "bi,oi->bo"])
def test_groups_are_near_the_product_of_their_values_in_any_form(form):
    left, right = form.split("->")[0].split(",")
    x, w = shaped(left, seed=1), shaped(right, seed=2)
    fn = lambda w, x: jnp.einsum(form, x, w)
    _, axes = axes_of(form)
    for group in (Group(3), Group(3, scale="integer")):
        spec = DotSpec(w=QSpec(format="int4", group=group), x=I8)
        y = value(fn, spec, w, x)
        full = fn(us.quant.dequantize(coded(w, spec.w, axes)), x)
        assert 0 < jnp.linalg.norm(y - full) < 0.01 * jnp.linalg.norm(full)


# ------------------------------------------------------------ float_exact and dequant (P10, P13)


@functools.cache
def in_form(compute, scale="free", x_format="int8", w_format="int8"):
    w, x = QSpec(format=w_format, scale=scale), QSpec(format=x_format, scale=scale)
    return jax.jit(us.quantized(dot, {"": DotSpec(w=w, x=x, compute=compute)}))


@pytest.mark.parametrize("terms", [1, 1040, 1041, 3000])
def test_float_exact_is_int_for_the_largest_codes(terms):
    """Inside of K Qx Qw <= 2^24 in one product, beyond it in parts."""
    w, x = jnp.ones((terms, 2)).at[0, 1].set(-1), jnp.ones((2, terms)).at[1].set(-1)
    assert_same_bits(in_form("float_exact")(w, x), in_form("int")(w, x))
    parts = operands(in_form("float_exact"), w, x)
    assert parts == [(F32, F32)] * math.ceil(terms / 1040)


def test_beyond_its_bound_one_float_product_is_wrong():
    """The counter-example K = 1041, for which `float_exact` takes two."""
    codes = np.full(1041, 127, np.int64)
    full = int(codes @ codes)
    assert full > 2**24
    highest = functools.partial(jnp.dot, precision="highest")
    assert int(highest(codes.astype(np.float32), codes.astype(np.float32))) != full
    fits = codes[:1040].astype(np.float32)
    assert int(highest(fits, fits)) == int(codes[:1040] @ codes[:1040])


@pytest.mark.parametrize("formats", [("int8", "int8"), ("int8", "int4"), ("int4", "int4")])
def test_float_exact_is_int(formats):
    w, x = normal(2100, 7, seed=7), normal(5, 2100, seed=8)
    each = [in_form(c, x_format=formats[0], w_format=formats[1]) for c in ("float_exact", "int")]
    assert_same_bits(each[0](w, x), each[1](w, x))


def test_float_exact_is_int_with_zero_points_and_with_groups():
    w, x = normal(2100, 7, seed=7), normal(5, 2100, seed=8)
    group = QSpec(format="int4", group=Group(1050, scale="integer"))
    for spec in [
        DotSpec(w=I8, x=ASYMMETRIC),
        DotSpec(w=ASYMMETRIC, x=ASYMMETRIC),
        DotSpec(w=group, x=I8),
        DotSpec(w=QSpec(group=Group(1050)), x=I8),
    ]:
        exact = value(dot, replace(spec, compute="float_exact"), w, x)
        assert_same_bits(exact, value(dot, spec, w, x))


def test_powers_of_two_make_dequant_equal_to_int():
    w, x = normal(1040, 16, seed=9), normal(16, 1040, seed=10)
    assert_same_bits(in_form("dequant", "po2")(w, x), in_form("int", "po2")(w, x))
    assert jnp.any(in_form("dequant")(w, x) != in_form("int")(w, x))


def test_a_bound_that_is_a_power_of_two_is_its_own_scale():
    """Whole numbers up to 127 have the scale 1, not 2, so their product is exact."""
    w, x = jnp.round(30 * normal(16, 4, seed=22)).at[0].set(127.0), jnp.arange(16.0)[None] * 8
    x = x.at[0, 3].set(-127.0)
    np.testing.assert_array_equal(in_form("int", "po2")(w, x), x @ w)


# -------------------------------------------------------------------------------- bounds

MOST = {
    "int8": (W8A8, 133_144),
    "x asymmetric": (DotSpec(w=I8, x=ASYMMETRIC), 66_311),
    "w4a8": (DotSpec(w=I4, x=I8), 2_415_617),
    "integer groups": (DotSpec(w=QSpec(format="int4", group=Group(1, "integer")), x=I8), 133_144),
}


def abstractly(spec, terms, fn=None):
    fn = fn or (lambda params, x: x @ params["head"]["w"])
    params = {"head": {"w": jax.ShapeDtypeStruct((terms, 2), F32)}}
    jax.eval_shape(us.quantized(fn, {"**": spec}), params, jax.ShapeDtypeStruct((3, terms), F32))


@pytest.mark.parametrize("kind", MOST)
def test_a_sum_that_int32_may_not_hold_is_an_error_that_names_the_product(kind):
    spec, most = MOST[kind]
    abstractly(spec, most)
    with pytest.raises(ValueError, match=rf"head/w.* sums {most + 1} .*the most is {most}"):
        abstractly(spec, most + 1)


def test_what_sums_less_or_in_floats_has_no_bound():
    abstractly(DotSpec(w=I8), 200_000)
    abstractly(replace(W8A8, compute="dequant"), 200_000)
    abstractly(DotSpec(w=QSpec(group=Group(50_000)), x=I8), 200_000)


def test_a_convolution_that_float32_may_not_hold_is_an_error_too():
    def fn(w, x):
        return lax.conv(x, w, (1, 1), "SAME")

    w, x = jax.ShapeDtypeStruct((2, 130, 3, 3), F32), jax.ShapeDtypeStruct((1, 130, 4, 4), F32)
    rules = {"": replace(W8A8, compute="float_exact")}
    with pytest.raises(ValueError, match='conv.* sums 1170 .*exact up to 1040.*compute="int"'):
        jax.eval_shape(us.quantized(fn, rules), w, x)


def test_the_largest_sum_that_int32_holds_is_right():
    """All codes 127, K at the bound: off by one more and the sign would change."""
    w, x = jnp.ones((133_144, 1)), jnp.ones((1, 133_144))
    y = value(dot, W8A8, w, x)
    np.testing.assert_allclose(y, 133_144, rtol=1e-6)


# --------------------------------------------------- a scale that crosses the sum: folded


def both_ways(table, ids):
    return jax.nn.relu(table[ids]) @ table.T


def test_a_table_serves_lookup_and_logits():
    """One scale for each row of the table is constant over the sum of the logits."""
    table, ids = normal(10, 6, seed=11), jnp.array([3, 3, 9, 0])
    t = coded(table, I8, (-1,), I8)
    y = us.quantized(both_ways)(t, ids)
    rows = jax.nn.relu(us.quant.dequantize(t)[ids])
    np.testing.assert_array_equal(y, oracle("bi,oi->bo", coded(rows, I8, (-1,)), t))


def test_a_scale_along_the_sum_is_folded_into_the_activation():
    w, x = normal(6, 4, seed=12), normal(3, 6, seed=13)
    t = coded(w, I8, (-1,), I8)  # a scale for each row, which the product sums over
    y = us.quantized(dot)(t, x)
    folded = np.asarray(x) * np.asarray(t.scale)[:, 0]
    ones = replace(t, scale=jnp.ones((1, 1)))
    expected = oracle("bi,io->bo", coded(jnp.asarray(folded), I8, (-1,)), ones)
    np.testing.assert_array_equal(y, expected)
    assert operands(us.quantized(dot), t, x) == [(S8, S8)]


@pytest.mark.parametrize("x_spec", [None, I8], ids=str)
def test_values_of_a_cache_fold_their_scales_into_the_weights_of_attention(x_spec):
    values, p = normal(2, 5, 3, 4, seed=14), jax.nn.softmax(normal(2, 3, 7, 5, seed=15))
    t = coded(values, I8, (-1,), x_spec)  # (batch, time, head, dh), a scale for token and head
    fn = lambda v, p: jnp.einsum("bhqt,bthd->bqhd", p, v)
    y, full = us.quantized(fn)(t, p), fn(values, p)
    assert 0 < jnp.linalg.norm(y - full) < 0.02 * jnp.linalg.norm(full)
    by_value = fn(us.quant.dequantize(t), p)
    if x_spec is None:
        np.testing.assert_allclose(y, by_value, rtol=1e-5, atol=1e-6)
    else:
        assert operands(us.quantized(fn), t, p) == [(S8, S8)]


def test_gradients_of_a_fold_are_those_of_the_values():
    w, x, g = normal(6, 4, seed=12), normal(3, 6, seed=13), normal(3, 4, seed=16)
    rules = {"": DotSpec(w=QSpec(axes=(-1,)))}
    t = us.quantize({"": w}, rules)[""]
    dw, dx = jax.vjp(us.quantized(dot, rules), w, x)[1](g)
    np.testing.assert_allclose(dw, x.T @ g, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, g @ us.quant.dequantize(t).T, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------ one row, and no rows


@pytest.mark.parametrize("spec", [W8A8, DotSpec(w=I8, x=ASYMMETRIC), DotSpec(w=I4, x=I8)], ids=str)
def test_one_row_is_the_row_of_many(spec):
    w, x = normal(6, 4, seed=17), normal(3, 6, seed=18)
    many = value(dot, spec, w, x)
    assert_same_bits(value(dot, spec, w, x[1:2]), many[1:2])
    assert_same_bits(value(dot, spec, w, x[1]), many[1])
    one_by_one = value(lambda w, x: jax.vmap(lambda row: row[None] @ w)(x), spec, w, x)
    assert_same_bits(one_by_one[:, 0], many)


def test_one_row_is_multiplied_as_two():
    """The kernel for one is slow; results are cut, so the shape is all that shows it."""
    run = us.quantized(dot, {"": W8A8})
    shapes = lambda rows: [
        site.eqn.invars[0].aval.shape
        for site in sites(jax.make_jaxpr(run)(jnp.ones((6, 4)), jnp.ones((rows, 6))).jaxpr)
        if site.name == "dot_general"
    ]
    assert (shapes(1), shapes(2), shapes(3)) == ([(2, 6)], [(2, 6)], [(3, 6)])


@pytest.mark.parametrize(
    ("form", "columns", "seen"),
    [("km,kn->mn", 4, (6, 2, 2)), ("km,nk->mn", 6, (6, 3, 2)), ("ekm,ekn->emn", 4, (2, 6, 2, 2))]
    # Left as they are: two columns, an odd number, and rows that come first.
    + [("km,kn->mn", 2, (6, 2)), ("km,kn->mn", 5, (6, 5)), ("mk,kn->mn", 4, (4, 6))],
)
def test_columns_of_what_is_summed_over_its_rows_are_two_dimensions(form, columns, seen):
    """The kernel for one is slow; results are the same, so this is all that shows it."""
    sizes = dict(e=2, k=6, m=columns, n=3)
    x, w = (jnp.ones([sizes[d] for d in term]) for term in form.split("->")[0].split(","))
    run = us.quantized(lambda w, x: jnp.einsum(form, x, w), {"": W8A8})
    (product,) = (s for s in sites(jax.make_jaxpr(run)(w, x).jaxpr) if s.name == "dot_general")
    assert product.shapes[0] == seen


def test_no_rows_and_no_terms():
    assert value(dot, W8A8, jnp.ones((6, 4)), jnp.ones((0, 6))).shape == (0, 4)
    zeros = value(dot, W8A8, jnp.ones((6, 4)), jnp.zeros((2, 6)))
    np.testing.assert_array_equal(zeros, np.zeros((2, 4)))


# ----------------------------------------------------------- products of activations by rules


def attention(params, x):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, params[n]) for n in "qkv")
    p = jax.nn.softmax(jnp.einsum("bqhk,bthk->bhqt", q, k))
    return jnp.einsum("bhqt,bthk->bqhk", p, v)


HEADS = {name: normal(8, 2, 4, seed=k) / 3 for k, name in enumerate("qkv")}


def test_a_rule_for_attention_quantizes_products_of_activations():
    x = normal(2, 5, 8, seed=19)
    run = us.quantized(attention, {"attention": W8A8})
    assert operands(run, HEADS, x) == [(F32, F32)] * 3 + [(S8, S8)] * 2

    def with_gradient(fn):
        loss = lambda p: (lambda y: (jnp.square(y).sum(), y))(fn(p, x))
        grads, y = jax.jit(jax.grad(loss, has_aux=True))(HEADS)
        return y, grads

    (y, got), (full, grads) = with_gradient(run), with_gradient(attention)
    assert 0 < jnp.linalg.norm(y - full) < 0.03 * jnp.linalg.norm(full)
    for name in HEADS:
        assert jnp.linalg.norm(got[name] - grads[name]) < 0.1 * jnp.linalg.norm(grads[name])


# ------------------------------------------------------------ what is in the program (P19)

PROGRAMS = {
    "int8": (W8A8, (S8, S8), S32),
    "int4": (DotSpec(w=I4, x=I4), (S8, S8), S32),
    "fp8": (
        DotSpec(w=QSpec(format="e4m3fn"), x=QSpec(format="e4m3fn")),
        (np.dtype(jnp.float8_e4m3fn),) * 2,
        F32,
    ),
    "float_exact": (replace(W8A8, compute="float_exact"), (F32, F32), F32),
    "weight-only": (DotSpec(w=I4), (F32, F32), F32),
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_matched_products_and_no_others_are_of_codes(kind):
    spec, codes, result = PROGRAMS[kind]
    params = {"a": jnp.ones((6, 6)), "b": jnp.ones((6, 6))}
    run = us.quantized(lambda p, x: ((x @ p["a"]) @ p["b"]) @ x.T, {"a": spec})
    found = [
        (*site.operands[:2], *site.results)
        for site in sites(jax.make_jaxpr(run)(params, jnp.ones((3, 6))).jaxpr)
        if site.name == "dot_general"
    ]
    assert found == [(*codes, result), (F32,) * 3, (F32,) * 3]


def test_the_lowered_program_multiplies_integers():
    text = (
        jax.jit(us.quantized(dot, {"": W8A8})).lower(jnp.ones((6, 4)), jnp.ones((3, 6))).as_text()
    )
    (line,) = [line for line in text.splitlines() if "dot_general" in line]
    assert "(tensor<3x6xi8>, tensor<6x4xi8>) -> tensor<3x4xi32>" in line


@pytest.mark.parametrize(
    ("spec", "terms", "codes", "bound"),
    [
        (W8A8, 1040, "±127 x ±127", "0.78% of int32, exact in float32"),
        (W8A8, 1041, "±127 x ±127", "0.78% of int32"),
        (DotSpec(w=I4, x=ASYMMETRIC), 8, "[-128, 127] x ±7", "0.00% of int32, exact in float32"),
        (DotSpec(w=I4), 8, "float x ±7", None),
    ],
)
def test_the_report_says_codes_terms_and_how_near_the_bounds_are(spec, terms, codes, bound):
    run = us.quantized(lambda w, x: x @ w, {"": spec})
    (row,) = us.explain(run)(jnp.ones((terms, 2)), jnp.ones((2, terms))).products.rows
    notes = row.notes
    assert (notes["codes"], notes["K"], notes.get("bound")) == (codes, terms, bound)


def test_experts_of_a_ragged_product_have_scales_of_their_own():
    w, x, sizes = normal(3, 6, 4, seed=20), normal(7, 6, seed=21), jnp.array([3, 0, 4])
    w = w * jnp.array([1.0, 100.0, 0.01])[:, None, None]
    fn = lambda w, x: lax.ragged_dot(x, w, sizes)
    t, q = coded(w, I8, (-2,)), coded(x, I8, (-1,))
    expected = np.concatenate(
        [
            oracle("bi,io->bo", cut, replace(t, codes=t.codes[k], scale=t.scale[k]))
            for k, rows in ((0, slice(0, 3)), (2, slice(3, 7)))
            for cut in [replace(q, codes=q.codes[rows], scale=q.scale[rows])]
        ]
    )
    np.testing.assert_array_equal(value(fn, W8A8, w, x), expected)
