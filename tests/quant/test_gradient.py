"""Laws of backward passes in integers: convolutions by an oracle, and what is left in floats."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import unitscale_jax as us
from tests.quant.test_quantized import BF16, F32, W8A8, normal, off
from unitscale_jax import DotSpec, QSpec
from unitscale_jax.trace.program import PRODUCTS, sites

I8 = QSpec()
NEAREST, STOCHASTIC = replace(W8A8, g=I8), replace(W8A8, g=QSpec(rounding="stochastic"))
S8 = np.dtype(np.int8)
SAME = dict(window_strides=(1, 1), padding="SAME")


def conv(numbers=("NHWC", "HWIO", "NHWC"), **options):
    return lambda w, x: lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)


IMAGES, KERNEL = (4, 10, 10, 8), (3, 3, 8, 16)
KINDS = {  # function, shape of x, shape of w
    "same": (conv(**SAME), IMAGES, KERNEL),
    "strides": (conv(window_strides=(2, 2), padding="SAME"), IMAGES, KERNEL),
    "dilated": (conv(window_strides=(1, 1), padding="VALID", rhs_dilation=(2, 2)), IMAGES, KERNEL),
    "upsampled": (
        conv(window_strides=(1, 1), padding=((1, 1), (1, 1)), lhs_dilation=(2, 2)),
        (4, 5, 5, 8),
        KERNEL,
    ),
    "channels first": (conv(("NCHW", "OIHW", "NCHW"), **SAME), (4, 8, 10, 10), (16, 8, 3, 3)),
    "a sequence": (
        conv(("NWC", "WIO", "NWC"), window_strides=(1,), padding="SAME"),
        (4, 40, 8),
        (5, 8, 16),
    ),
}


@functools.cache
def problem(kind):
    """Function, w, x, and a cotangent."""
    fn, x_shape, w_shape = KINDS[kind]
    w, x = normal(*w_shape, seed=1), normal(*x_shape, seed=2)
    return fn, w, x, normal(*jax.eval_shape(fn, w, x).shape, seed=3)


def factors(fn, *args):
    """The dtypes of what each product multiplies."""
    found = sites(jax.make_jaxpr(fn)(*args).jaxpr)
    return [site.operands[:2] for site in found if site.name in PRODUCTS]


@functools.cache
def backward(kind, spec):
    fn, w, x, g = problem(kind)

    def run(key):
        return jax.vjp(us.quantized(fn, {"": spec}, key=key), w, x)[1](g)

    return jax.jit(run)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_pass_in_integers_is_off_by_little(kind):
    full, got = (backward(kind, spec)(jax.random.key(0)) for spec in (W8A8, NEAREST))
    for error, expected in zip(off(got, full), (0.020, 0.0076), strict=True):
        assert expected / 4 < error < expected * 1.5


def test_stochastic_rounding_is_unbiased():
    full, run = backward("same", W8A8)(jax.random.key(0)), backward("same", STOCHASTIC)
    each = [run(jax.random.key(n)) for n in range(36)]
    mean = jax.tree.map(lambda *gs: sum(gs) / len(gs), *each)
    for single, averaged in zip(off(each[0], full), off(mean, full), strict=True):
        assert single < 0.028 and 0.7 / 6 < averaged / single < 1.4 / 6


@pytest.mark.parametrize("kind", KINDS)
def test_all_three_products_are_of_codes(kind):
    fn, w, x, g = problem(kind)
    run = lambda w, x: jax.vjp(us.quantized(fn, {"": NEAREST}, strict=True), w, x)[1](g)
    assert factors(run, w, x) == [(S8, S8)] * 3


def value_of(x, axes):
    """What an array is served as, with a scale over some axes."""
    spec = DotSpec(w=QSpec(axes=axes))
    return us.quant.dequantize(us.quantize({"x": x}, {"x": spec}))["x"]


@pytest.mark.parametrize("kind", ["same", "strides"])
def test_a_derivative_is_the_float_one_at_the_values_of_codes(kind):
    """The scale that crosses its sum goes into the cotangent before that is quantized."""
    fn, w, x, g = problem(kind)
    t_w = us.quantize({"": w}, {"": DotSpec(w=QSpec(axes=(-4, -3, -2)))})[""]
    t_x = us.quantize({"": x}, {"": DotSpec(w=QSpec(axes=(-3, -2, -1)))})[""]
    codes = lambda t: t.codes.astype(jnp.float32)
    by_w = value_of(g * t_w.scale[0, 0, 0], (-3, -2, -1))  # a scale for each example
    dx = jax.vjp(lambda x: fn(codes(t_w), x), x)[1](by_w)[0]
    by_x = value_of(g * t_x.scale, (-4, -3, -2))  # a scale for each channel
    dw = jax.vjp(lambda w: fn(w, codes(t_x)), w)[1](by_x)[0]
    for got, expected in zip(backward(kind, NEAREST)(jax.random.key(0)), (dw, dx), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_in_16_bits_gradients_have_the_dtypes_of_what_they_are_of():
    fn, w, x, g = problem("same")
    half = lambda w, x: fn(w.astype(BF16), x)
    grads = [
        jax.vjp(us.quantized(half, {"": spec}), w, x.astype(BF16))[1](g.astype(BF16))
        for spec in (NEAREST, W8A8)
    ]
    assert [d.dtype for d in grads[0]] == [F32, BF16]
    wide = [[d.astype(jnp.float32) for d in each] for each in grads]
    assert max(off(*wide)) < 0.03


def dot(w, x):
    return x @ w


@pytest.mark.parametrize("of", ["stats", "learned"])
def test_a_cotangent_has_a_range_of_its_own(of):
    """And not that of the activation, which is a hundred times smaller here."""
    w, x, g = normal(64, 32, seed=4), normal(16, 64, seed=5) / 100, normal(16, 32, seed=6)
    errors = []
    for spec in (NEAREST, W8A8):
        rules = {"w": replace(spec, w=QSpec(axes=(-2,)))}
        fn = lambda p, x: dot(p["w"], x)
        stats = us.calibrate(fn, {"w": w}, [x], rules)
        if of == "stats":
            run, params = us.quantized(fn, rules, stats=stats), {"w": w}
        else:
            run, params = us.quantized(fn), us.quant.learned({"w": w}, rules, stats)
        errors.append(jax.tree.leaves(jax.vjp(run, params, x)[1](g)))
    assert max(off(*errors)) < 0.05


# ------------------------------------------------------------------ what is left, and why

LEFT = {  # function, w, x, spec, reasons
    "feature groups": (
        conv(**SAME, feature_group_count=4),
        normal(3, 3, 2, 16),
        normal(*IMAGES),
        NEAREST,
        ["left operand: of a convolution with feature groups", "right operand: of a convolution"],
    ),
    "ragged": (
        lambda w, x: lax.ragged_dot(x, w, jnp.array([2, 3])),
        normal(2, 6, 4),
        normal(5, 6),
        NEAREST,
        ["left operand: of a ragged product", "right operand: of a ragged product"],
    ),
    "zero points": (
        dot,
        normal(6, 4),
        normal(5, 6),
        DotSpec(w=I8, x=QSpec(symmetric=False), g=I8),
        ["right operand: codes with a zero point"],
    ),
    "no such product": (
        dot,
        normal(6, 4),
        normal(5, 6),
        DotSpec(w=QSpec(format="e4m3fn"), x=QSpec(format="e5m2"), g=QSpec(format="e5m2")),
        ["right operand: .*e5m2 x e5m2"],
    ),
    "float_exact": (
        conv(**SAME),
        normal(3, 3, 8, 16),
        normal(12, 10, 10, 8),
        replace(NEAREST, compute="float_exact"),
        ["right operand: sums 1200 .*exact up to 1040"],
    ),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_in_floats_is_said_before_it_runs(kind):
    fn, w, x, spec, reasons = LEFT[kind]
    with pytest.raises(ValueError) as error:
        us.quantized(fn, {"": spec}, strict=True)(w, x)
    found = str(error.value).split("the derivative by its ")[1:]
    assert len(found) == len(reasons)
    for text, reason in zip(found, reasons, strict=True):
        assert re.search(reason, text)
    got, full = (
        jax.vjp(us.quantized(fn, {"": s}), w, x)[1](jnp.ones(jax.eval_shape(fn, w, x).shape))
        for s in (spec, replace(spec, g=None))
    )
    sides = [text.split()[0] for text in reasons]
    for side, a, b in zip(("right", "left"), got, full, strict=True):
        assert bool((a == b).all()) == (side in sides)


def test_what_is_left_has_its_reason_in_the_report():
    fn, w, x, spec, _ = LEFT["feature groups"]
    grads = jax.grad(lambda w, x: us.quantized(fn, {"": spec})(w, x).sum(), (0, 1))
    notes = [row.notes["quantize"] for row in us.explain(grads)(w, x).products.rows]
    assert notes[0] == "int8 x int8, g int8"
    assert set(notes[1:]) == {"kept: of a convolution with feature groups it is in floating point"}
    fn, w, x, _ = problem("same")
    grads = jax.grad(lambda w, x: us.quantized(fn, {"": NEAREST})(w, x).sum(), (0, 1))
    notes = [row.notes["quantize"] for row in us.explain(grads)(w, x).products.rows]
    assert notes == ["int8 x int8, g int8", *["int8 x int8"] * 2]


def test_more_rows_than_int32_sums_up_are_left_in_floats_and_said():
    """133,144 products of two codes of 8 bits fit; a derivative by w sums over all pixels."""

    def strict(batch):
        shapes = (jax.ShapeDtypeStruct(s, F32) for s in ((3, 3, 2, 2), (batch, 128, 128, 2)))
        return jax.eval_shape(us.quantized(conv(**SAME), {"": NEAREST}, strict=True), *shapes)

    strict(8)  # 131,072
    with pytest.raises(ValueError, match="by its right operand: sums 147456 .*is 133144"):
        strict(9)


def test_serving_has_no_backward_pass_to_speak_of():
    fn, w, x, spec, _ = LEFT["feature groups"]
    rules = us.quant.resolve({"": spec}, fn, w, x)
    us.quantized(fn, strict=True)(us.quantize(w, rules), x)


def test_a_scale_along_the_channels_of_a_convolution_is_folded_into_the_images():
    fn, w, x, _ = problem("same")
    rules = {"": DotSpec(w=QSpec(axes=(-4, -3, -1)), x=I8)}
    codes = us.quantize(w, rules)
    assert codes.scale.shape == (1, 1, 8, 1)
    run = us.quantized(fn, strict=True)
    assert factors(run, codes, x) == [(S8, S8)]
    moved = value_of(x * codes.scale[0, 0, :, 0], (-3, -2, -1))
    expected = fn(codes.codes.astype(jnp.float32), moved)
    np.testing.assert_allclose(run(codes, x), expected, rtol=1e-4, atol=1e-4)
