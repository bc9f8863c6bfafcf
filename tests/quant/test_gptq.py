"""Laws of GPTQ: to nearest where inputs are unrelated, and less error where they are not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import unitscale_jax as us
from unitscale_jax import DotSpec, QSpec
from unitscale_jax.quant import MSE, Group, gptq
from unitscale_jax.statistics import calibrate

INT4 = QSpec(format="int4")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense(params, x):
    return x @ params["w"]


def rounded(fn, params, batches, rules, *, damp=0.01, collect=("hessian",)):
    rules = us.quant.resolve(rules, fn, params, batches[0])
    stats = calibrate(fn, params, batches, rules, collect=collect)
    return gptq(params, stats, rules, damp), us.quantize(params, rules, stats)


@functools.cache
def related(k=256, n=128, rows=2048):
    """Inputs of which each is nearly a sum of others, and weights."""
    mix = normal(0, k, k) * np.exp(-np.arange(k) / 40)[:, None]
    x = (normal(1, rows, k) @ mix + 0.1 * normal(2, rows, k)).astype(np.float32)
    return x, {"w": normal(3, k, n)}


def off(fn, params, served, x):
    """Relative error of what the served weights compute on a float input."""
    y = fn(params, x)
    return float(jnp.linalg.norm(fn(us.quant.dequantize(served), x) - y) / jnp.linalg.norm(y))


def test_the_worked_example():
    params = {"w": jnp.array([[0.49], [0.49], [1.0]])}
    root = np.linalg.cholesky([[2, 1.8, 0], [1.8, 2, 0], [0, 0, 1.0]]).T.astype(np.float32)
    (served, report), nearest = rounded(dense, params, [root], {"w": DotSpec(w=INT4)}, damp=0.0)
    assert served["w"].codes[:, 0].tolist() == [3, 4, 7]
    assert nearest["w"].codes[:, 0].tolist() == [3, 3, 7]
    power = lambda e: float(np.sum((root @ np.asarray(e)) ** 2))
    errors = [power(us.quant.dequantize(t)["w"] - params["w"]) for t in (served, nearest)]
    np.testing.assert_allclose(errors, [0.00280, 0.02868], rtol=2e-3)
    whole = power(params["w"]) ** 0.5
    report = report.errors["w"]
    np.testing.assert_allclose(
        [report.gptq * whole, report.nearest * whole], np.sqrt(errors), rtol=1e-4
    )


SPECS = {
    **{f"int{b}": QSpec(format=f"int{b}") for b in (2, 3, 4, 8)},
    "po2": QSpec(format="int4", scale="po2"),
    "asymmetric": QSpec(format="int4", symmetric=False),
    "groups": QSpec(format="int4", group=Group(4)),
    "integer groups": QSpec(format="int4", group=Group(4, "integer")),
    "po2 groups": QSpec(format="int4", group=Group(4), scale="po2"),
    "mse": QSpec(format="int4", calibrator=MSE()),
    "fp8": QSpec(format="e4m3fn"),
}


def alike(a, b):
    for name in ("codes", "scale", "zero_point", "multiplier", "code_sums"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype, name
            np.testing.assert_array_equal(
                np.asarray(x, np.float32), np.asarray(y, np.float32), name
            )
    assert (a.spec, a.axes, a.dtype) == (b.spec, b.axes, b.dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_unrelated_inputs_are_rounded_to_nearest(name, dtype):
    params = {"w": jnp.asarray(normal(4, 8, 5), dtype)}
    x = jnp.diag(jnp.arange(1.0, 9.0)).astype(dtype)
    x_spec = QSpec(symmetric=False) if SPECS[name].is_integer else None
    rules = {"w": DotSpec(w=SPECS[name], x=x_spec)}
    (served, report), nearest = rounded(dense, params, [x], rules)
    alike(served["w"], nearest["w"])
    assert report.errors["w"].gptq == report.errors["w"].nearest
    if x_spec is not None:
        assert served["w"].input_range.tolist() == nearest["w"].input_range.tolist() == [0, 8]


@pytest.mark.parametrize(
    ("bits", "nearest", "most"), [(3, 0.31, 0.11), (4, 0.135, 0.048), (8, 0.0072, 0.0027)]
)
def test_related_inputs_make_up_for_each_other(bits, nearest, most):
    x, params = related()
    rules = {"w": DotSpec(w=QSpec(format=f"int{bits}"))}
    (served, report), plain = rounded(dense, params, [x[:1000], x[1000:]], rules)
    errors = [off(dense, params, t, x) for t in (plain, served)]
    assert 0.9 * nearest < errors[0] < nearest and errors[1] < most
    found = report.errors["w"]
    np.testing.assert_allclose([found.nearest, found.gptq], errors, rtol=1e-3)
    weights = [jnp.linalg.norm(us.quant.dequantize(t)["w"] - params["w"]) for t in (plain, served)]
    assert weights[1] > weights[0]  # the weights themselves are further off


@pytest.mark.parametrize("name", ["asymmetric", "groups", "integer groups", "mse", "fp8"])
def test_every_spec_gains(name):
    x, params = related(64, 32, 512)
    (_, report), _ = rounded(dense, params, [x], {"w": DotSpec(w=SPECS[name])})
    assert report.errors["w"].gptq < 0.7 * report.errors["w"].nearest


def test_scales_are_those_of_the_given_weights():
    x, params = related(64, 32, 512)
    (served, _), nearest = rounded(dense, params, [x], {"w": DotSpec(w=INT4)})
    np.testing.assert_array_equal(served["w"].scale, nearest["w"].scale)
    assert (served["w"].codes != nearest["w"].codes).any()


@pytest.mark.parametrize("name", ["int4", "asymmetric", "groups", "integer groups", "fp8"])
def test_what_is_pruned_stays_zero(name):
    x, params = related(64, 32, 512)
    mask = np.random.default_rng(5).random((64, 32)) < 0.5
    pruned = {"w": params["w"] * mask}
    (served, report), _ = rounded(dense, pruned, [x], {"w": DotSpec(w=SPECS[name])})
    assert not np.asarray(us.quant.dequantize(served)["w"])[~mask].any()
    if served["w"].zero_point is None:
        assert not np.asarray(served["w"].codes, np.float32)[~mask].any()
    assert report.errors["w"].gptq < report.errors["w"].nearest


@pytest.mark.parametrize("name", ["int4", "asymmetric", "po2", "fp8"])
def test_inputs_that_no_row_used_are_rounded_to_nearest_and_disturb_nothing(name):
    x, params = related(64, 32, 512)
    used = np.arange(64) % 3 != 0
    (served, report), nearest = rounded(dense, params, [x * used], {"w": DotSpec(w=SPECS[name])})
    codes = lambda t: np.asarray(t["w"].codes, np.float32)
    np.testing.assert_array_equal(codes(served)[~used], codes(nearest)[~used])
    np.testing.assert_array_equal(served["w"].scale, nearest["w"].scale)
    found = report.errors["w"]
    assert found.unseen == np.sum(~used) and found.gptq < 0.9 * found.nearest


# Any contraction axes, any batch of matrices.


def layers(params, x):
    return lax.scan(lambda h, w: (h @ w, None), x, params["w"])[0]


def conv(params, x):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=dims)


def heads(params, x):
    return jnp.einsum("rhk,hkd->rd", x, params["w"])


def queries(params, x):
    return jnp.einsum("ri,ihk->rhk", x, params["w"])


def experts(params, x):
    return jnp.einsum("eri,eio->ero", x, params["w"])


def left(params, x):
    return params["w"] @ x.T


def smooth_images():
    x = normal(1, 4, 10, 10, 3)
    return x + 2 * np.roll(x, 1, 1) + 2 * np.roll(x, 1, 2) + 2 * np.roll(x, 1, 3)


PROGRAMS = {
    "layers": (layers, (3, 64, 64), lambda x: x),
    "conv": (conv, (3, 3, 3, 8), lambda x: smooth_images()),
    "heads": (heads, (4, 16, 8), lambda x: x.reshape(-1, 4, 16)),
    "queries": (queries, (64, 4, 8), lambda x: x),
    "experts": (experts, (2, 64, 16), lambda x: np.stack([x, x[:, ::-1]])),
    "left": (left, (16, 64), lambda x: x),
}


@pytest.mark.parametrize(
    ("name", "grouped"), [*((name, False) for name in PROGRAMS), ("conv", True), ("heads", True)]
)
def test_any_product_gains(name, grouped):
    fn, shape, make = PROGRAMS[name]
    params, x = {"w": normal(6, *shape)}, make(related(64, 32, 512)[0])
    group = Group({"conv": 1, "heads": 8}[name]) if grouped else None
    spec = QSpec(format="int4", group=group)
    (served, report), plain = rounded(fn, params, [x], {"w": DotSpec(w=spec)})
    assert served["w"].scale.shape == plain["w"].scale.shape
    found = report.errors["w"]
    assert found.gptq < 0.9 * found.nearest
    if name != "layers":  # whose errors of earlier layers change what the later ones meet
        measured = [off(fn, params, t, x) for t in (plain, served)]
        np.testing.assert_allclose([found.nearest, found.gptq], measured, rtol=1e-3)
    out = jax.jit(us.quantized(fn))(served, x)
    dequantized = fn(us.quant.dequantize(served), x)
    np.testing.assert_allclose(out, dequantized, rtol=2e-3, atol=2e-3 * np.abs(dequantized).max())


def test_stacked_layers_are_rounded_each_by_its_own_moments():
    x, _ = related(64, 32, 512)
    params = {"w": normal(6, 3, 64, 64)}
    (served, _), _ = rounded(layers, params, [x], {"w": DotSpec(w=INT4)})
    for k in range(3):
        alone = {"w": params["w"][k]}
        (one, _), _ = rounded(dense, alone, [x], {"w": DotSpec(w=INT4)})
        here = {"w": us.quant.dequantize(served)["w"][k]}
        errors = off(dense, alone, here, x), off(dense, alone, one, x)
        assert errors[0] == pytest.approx(errors[1], rel=0.05)
        x = x @ params["w"][k]


def test_what_is_rounded_stays_when_the_rest_is_quantized():
    fn = lambda p, ids: p["table"][ids] @ p["w"]
    params = {"table": normal(1, 9, 8), "w": normal(2, 8, 3)}
    rules = us.quant.resolve({"*": DotSpec(w=INT4)}, fn, params, jnp.arange(9))
    only = [pair for pair in rules if pair[0] == "w"]
    stats = calibrate(fn, params, [jnp.arange(9)], rules, collect=["hessian"])
    served, report = gptq(params, stats, only)
    assert report.kept == ("table",) and list(report.errors) == ["w"]
    everything = us.quantize(served, rules)
    assert everything["w"] is served["w"]
    assert gptq(everything, stats, rules)[1].kept == ("table", "w")
    with pytest.raises(ValueError, match="no second moments of what meets table.*a lookup"):
        gptq(params, stats, rules)


X, W = normal(7, 6, 8), {"w": normal(8, 8, 3)}
RULES = {"w": DotSpec(w=QSpec(format="int4", axes=(-2,)))}


def stats_of(*collect):
    return calibrate(dense, W, [X], {"w": DotSpec(w=QSpec(), x=QSpec())}, collect=collect)


ERRORS = {
    "moments": (
        lambda: gptq(W, stats_of("range"), RULES),
        "second moments of what meets w.*collect=",
    ),
    "open": (
        lambda: gptq(W, stats_of("hessian"), {"w": DotSpec(w=INT4)}),
        "which axes share a scale",
    ),
    "unmatched": (lambda: gptq(W, stats_of("hessian"), {"v": DotSpec()}), "matched none"),
    "axes": (
        lambda: gptq(W, stats_of("hessian"), {"w": DotSpec(w=QSpec(axes=(-1,)))}),
        r"contracted over \(-2,\).* scales over \(-1,\)",
    ),
    "damp": (lambda: gptq(W, stats_of("hessian"), RULES, -1.0), "damp is -1"),
    "singular": (
        lambda: gptq(
            W, calibrate(dense, W, [np.ones_like(X)], RULES, collect=["hessian"]), RULES, 0.0
        ),
        "w are singular.*larger damp",
    ),
    "nan": (
        lambda: gptq({"w": np.full((8, 3), np.nan, np.float32)}, stats_of("hessian"), RULES),
        "w, or what meets it, has NaN",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_says_what_to_do(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_report_is_a_table():
    table = str(gptq(W, stats_of("hessian"), RULES)[1])
    assert (
        table.splitlines()[0].split() == ["parameter", "nearest", "gptq", "unseen"]
        and "w  " in table
    )
