"""Laws of the specs: what they promise of codes, what they refuse, what they print."""

from dataclasses import FrozenInstanceError, replace

import jax.numpy as jnp
import numpy as np
import pytest

from unitscale_jax import DotSpec, QSpec, formats
from unitscale_jax.formats import Format
from unitscale_jax.quant import EMA, MSE, Absmax, Fixed, Group, Percentile

INT4, FP8, E5M2 = (QSpec(format=name) for name in ("int4", "e4m3fn", "e5m2"))


@pytest.mark.parametrize(
    ("format", "q", "dtype"),
    [
        *((f"int{b}", 2 ** (b - 1) - 1, "int4" if b <= 4 else "int8") for b in range(2, 9)),
        ("e4m3fn", 448.0, "float8_e4m3fn"),
        ("e5m2", 57344.0, "float8_e5m2"),
    ],
)
def test_a_format_has_a_largest_code_and_a_dtype(format, q, dtype):
    spec = QSpec(format=format)
    assert spec.max_code == spec.reach == q and spec.code_dtype == jnp.dtype(dtype)
    assert spec.is_integer == format.startswith("int")
    assert QSpec(format=spec.grid) == spec  # a `Format` will do
    assert QSpec(format=spec.grid).max_code == q
    if spec.is_integer:
        assert replace(spec, symmetric=False).reach == 2 ** int(format[3:]) - 1
        assert spec.most_multiplier * q <= 127 < (spec.most_multiplier + 1) * q


def test_the_largest_integer_of_a_group_of_4_bits_is_18():
    assert INT4.most_multiplier == 18


GROUPED = QSpec(format="int4", group=Group(32))
WITH_AXES = QSpec(axes=(-1,))
STOCHASTIC = QSpec(rounding="stochastic")
ASYMMETRIC = QSpec(symmetric=False)
PLAIN = dict(w=QSpec(), x=QSpec())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (lambda size=size: Group(size), "size is a positive whole number")
            for size in (0, -4, 2.0)
        ),
        (lambda: Group(4, "po2"), r"Group\(size=4, scale='po2'\): scale is 'free' or 'integer'"),
        *(
            (lambda f=f: QSpec(format=f), f"format '{f}' has no codes; choose int2 to int8, e4m3fn")
            for f in ("int1", "int9", "int16", "uint8", "f32", "bf16", "e4m3fnuz", "int", "half")
        ),
        (lambda: QSpec(format=formats.FORMATS["bf16"]), "has no codes; choose int2 to int8"),
        (lambda: QSpec(scale="linear"), "scale is 'free' or 'po2'"),
        (lambda: QSpec(rounding="up"), "rounding is 'nearest' or 'stochastic'"),
        (lambda: QSpec(calibrator="absmax"), r"calibrator is an object such as Absmax\(\)"),
        (lambda: QSpec(calibrator=Absmax), r"calibrator is an object such as Absmax\(\)"),
        (lambda: QSpec(axes=(0,)), r"axes are different and count from the end, as \(-2,\)"),
        (lambda: QSpec(axes=(-2, 1)), r"axes are different and count from the end, as \(-2,\)"),
        *(
            (lambda k=k: QSpec(symmetric=False, **k), "asymmetric range is for integers with free")
            for k in (dict(format="e4m3fn"), dict(scale="po2"), dict(group=Group(4)))
        ),
        *(
            (
                lambda c=c: QSpec(symmetric=False, calibrator=c),
                "finds one bound, and this range has two",
            )
            for c in (Percentile(99), MSE())
        ),
        *(
            (lambda f=f: QSpec(format=f, group=Group(4, "integer")), "integer groups need room")
            for f in ("int8", "e4m3fn", "e5m2")
        ),
        (
            lambda: QSpec(format="int4", group=Group(4, "integer"), scale="po2"),
            "integer groups have a free scale for each channel",
        ),
        (lambda: DotSpec(compute="fast"), "compute is 'int', 'float_exact' or 'dequant'"),
        *(
            (lambda s=s: DotSpec(w=QSpec(), x=s), "x has neither groups nor axes of its own")
            for s in (GROUPED, WITH_AXES)
        ),
        *(
            (lambda s=s: DotSpec(**PLAIN, g=s), "g has neither groups nor axes of its own")
            for s in (GROUPED, WITH_AXES)
        ),
        (lambda: DotSpec(w=QSpec(), x=FP8), "w and x are both integers, or both 8-bit floats"),
        (lambda: DotSpec(w=FP8, x=QSpec()), "w and x are both integers, or both 8-bit floats"),
        (lambda: DotSpec(**PLAIN, g=E5M2), "w and g are both integers, or both 8-bit floats"),
        (lambda: DotSpec(w=ASYMMETRIC, x=QSpec(), g=QSpec()), "needs symmetric weights"),
        (
            lambda: DotSpec(w=STOCHASTIC),
            "rounding is for cotangents, not w: serving is reproducible",
        ),
        (lambda: DotSpec(w=QSpec(), x=STOCHASTIC), "rounding is for cotangents, not x"),
        (lambda: DotSpec(w=QSpec(), g=QSpec()), "backward pass needs quantized activations"),
        (lambda: DotSpec(**PLAIN, g=ASYMMETRIC), "needs quantized activations, and a symmetric g"),
        (lambda: DotSpec(w=QSpec(), compute="float_exact"), "for integer codes of both operands"),
        (lambda: DotSpec(w=FP8, x=FP8, compute="float_exact"), "for integer codes of both"),
        (lambda: DotSpec(w=E5M2, x=E5M2), "e5m2 x e5m2 is no product of any hardware"),
    ],
)
def test_a_spec_that_cannot_be_is_refused_with_the_way_out(make, message):
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert str(raised.value).startswith(("Group(", "QSpec(", "DotSpec("))  # what was given


@pytest.mark.parametrize(
    "make",
    [
        lambda: QSpec(symmetric=False, calibrator=EMA()),
        lambda: QSpec(symmetric=False, calibrator=Fixed(-1.0, 3.0)),
        lambda: QSpec(format="int7", group=Group(4, "integer")),
        lambda: QSpec(format="e4m3fn", group=Group(4), scale="po2"),
        lambda: DotSpec(w=GROUPED, x=ASYMMETRIC),
        lambda: DotSpec(w=WITH_AXES, x=QSpec(), g=STOCHASTIC),
        lambda: DotSpec(w=FP8, x=E5M2),
        lambda: DotSpec(w=FP8, x=FP8, g=E5M2),
        lambda: DotSpec(w=ASYMMETRIC, x=ASYMMETRIC, compute="float_exact"),
    ],
)
def test_what_its_neighbors_allow_is_allowed(make):
    assert make() == make() and hash(make()) == hash(make())


def test_axes_are_in_order_however_they_are_given():
    assert QSpec(axes=(-2, -3)) == QSpec(axes=(-3, -2))
    spec = DotSpec(w=INT4, x=QSpec())
    assert spec.with_axes((-1, -2)) == DotSpec(w=replace(INT4, axes=(-2, -1)), x=QSpec())
    assert spec.with_axes((-1,)).with_axes(None) == spec


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (QSpec(), "int8"),
        (QSpec(format=formats.integers(5)), "int5"),
        (ASYMMETRIC, "int8 asymmetric"),
        (QSpec(format="int4", scale="po2"), "int4 po2"),
        (GROUPED, "int4 g32"),
        (QSpec(format="int4", scale="po2", group=Group(32)), "int4 po2 g32"),
        (QSpec(format="int4", group=Group(16, "integer")), "int4 g16i"),
        (E5M2, "e5m2"),
        (QSpec(format=formats.FORMATS["e4m3fn"]), "e4m3fn"),
        (DotSpec(), "float x int8"),
        (DotSpec(w=INT4, x=QSpec()), "int8 x int4"),
        (DotSpec(**PLAIN, g=QSpec()), "int8 x int8, g int8"),
        (
            DotSpec(w=GROUPED, x=ASYMMETRIC, compute="dequant"),
            "int8 asymmetric x int4 g32, dequant",
        ),
        (DotSpec(**PLAIN, g=INT4, compute="float_exact"), "int8 x int8, g int4, float_exact"),
    ],
)
def test_a_spec_prints_its_formats_and_what_is_not_the_default(spec, text):
    assert str(spec) == text


@pytest.mark.parametrize(
    "spec",
    [
        DotSpec(),
        DotSpec(w=GROUPED, x=ASYMMETRIC),
        DotSpec(w=replace(WITH_AXES, calibrator=MSE()), x=QSpec(calibrator=Percentile(99.9))),
        DotSpec(**PLAIN, g=STOCHASTIC, compute="float_exact"),
        QSpec(format=formats.integers(5)),
    ],
    ids=str,
)
def test_a_spec_is_what_its_repr_says(spec):
    names = {c.__name__: c for c in (DotSpec, QSpec, Group, Format, Absmax, MSE, Percentile)}
    again = eval(repr(spec), names)
    assert again == spec and hash(again) == hash(spec) and repr(again) == repr(spec)


def test_a_spec_is_not_changed_by_being_asked():
    spec = QSpec(format="int4")
    before = hash(spec)
    assert spec.grid is spec.grid and hash(spec) == before and spec == QSpec(format="int4")
    with pytest.raises(FrozenInstanceError):
        spec.format = "int8"
    assert np.dtype(spec.code_dtype).itemsize == 1
