"""Laws of the calibrators: where a bound comes from, against numpy and against each other."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from unitscale_jax import DotSpec, QSpec
from unitscale_jax.quant import EMA, MSE, Absmax, Fixed, Percentile
from unitscale_jax.quant._ops import bounds_of, symmetric
from unitscale_jax.quant._params import encode
from unitscale_jax.quant._qtensor import value_of

SHAPE = ROWS, K = (3, 10)
F32 = np.float32
arrays = hnp.arrays(F32, SHAPE, elements=st.floats(-100, 100, width=32, allow_subnormal=False))
INT8 = QSpec()
ALL = [Absmax(), EMA(), Percentile(90), MSE(), Fixed(2.0)]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def bound(x, calibrator, axes=(1,), spec=INT8):
    return bounds_of(x, axes, replace(spec, calibrator=calibrator))


@functools.partial(jax.jit, static_argnums=1)
def ends(x, calibrator):
    return calibrator.bounds(x, (1,))


@functools.partial(jax.jit, static_argnums=2)
def squared_error(x, m, spec):
    """Summed over rows, in float32, of the bound m."""
    codes, scale = symmetric(x, m, spec)
    off = codes.astype(jnp.float32) * scale - x
    return jnp.sum(off * off, axis=1, keepdims=True)


quantized = jax.jit(symmetric, static_argnums=2)


def exact_error(x, m, spec):
    """The same in float64."""
    codes, scale = (np.asarray(v).astype(np.float64) for v in quantized(x, m, spec))
    return ((codes * scale - x) ** 2).sum(axis=1, keepdims=True)


def largest(x):
    return np.abs(x).max(axis=1, keepdims=True)


@pytest.mark.parametrize("calibrator", [Absmax(), EMA(0.9), EMA(0.0), Percentile(100)], ids=repr)
@given(x=arrays)
def test_of_one_array_these_are_the_largest_magnitude(calibrator, x):
    np.testing.assert_array_equal(bound(x, calibrator), largest(x))


@pytest.mark.parametrize("p", [0.001, 10, 50, 90, 99, 99.9, 100])
@given(x=arrays)
def test_a_percentile_is_an_element_of_the_sorted_magnitudes(p, x):
    rank = math.ceil(p * K / 100)
    np.testing.assert_array_equal(bound(x, Percentile(p)), np.sort(np.abs(x))[:, rank - 1 : rank])


@pytest.mark.parametrize(
    ("p", "n", "rank"), [(99.9, 1000, 999), (99.9, 1001, 1000), (1.1, 3000, 33), (1e-9, 5, 1)]
)
def test_the_rank_is_not_moved_by_the_binary_form_of_p(p, n, rank):
    assert Percentile(p).rank(n) == rank  # 1.1 * 3000 / 100 is 33.00000000000001


@pytest.mark.parametrize("p", [5, 29, 99.9])
def test_a_percentile_is_over_all_axes_it_is_given(p):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(F32)
    rank = math.ceil(p * 8 / 100)
    for axes, kept in [((0, 2), (1, 3)), ((2, 0), (1, 3))]:
        flat = np.abs(x).transpose(*kept, 0, 2).reshape(3, 5, 8)
        want = np.sort(flat)[..., rank - 1].reshape(1, 3, 1, 5)
        np.testing.assert_array_equal(bound(x, Percentile(p), axes), want)


@given(x=arrays, p=st.sampled_from([30, 50, 70]))
def test_what_lies_beyond_a_percentile_is_clipped_to_it(x, p):
    spec = DotSpec(w=QSpec(axes=(-1,), calibrator=Percentile(p)))
    t = jax.jit(encode, static_argnums=1)(x, spec)
    m = np.broadcast_to(bound(x, Percentile(p)), SHAPE)
    beyond = (np.abs(x) > m) & (m > 1e-30)
    np.testing.assert_array_equal(np.asarray(t.codes)[beyond], 127 * np.sign(x[beyond]))
    np.testing.assert_allclose(np.abs(value_of(t))[beyond], m[beyond], rtol=1e-6)


@pytest.mark.parametrize("spec", [QSpec(format=f) for f in ("int3", "int4", "e4m3fn")], ids=str)
@given(x=arrays)
def test_mse_is_a_fraction_of_the_largest_and_never_worse(spec, x):
    m = np.asarray(bound(x, MSE(), (1,), spec))
    fractions = MSE().ratios * largest(x)
    assert (m == fractions).any(axis=1).all()
    whole = exact_error(x, largest(x), spec)
    assert (exact_error(x, m, spec) <= whole * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize("scale", ["free", "po2"])
@given(x=arrays)
def test_mse_is_the_least_error_of_all_fractions(scale, x):
    spec, calibrator = QSpec(format="int4", scale=scale), MSE(steps=9)
    fractions = calibrator.ratios * largest(x)
    errors = np.concatenate([squared_error(x, m[:, None], spec) for m in fractions.T], axis=1)
    m = np.asarray(bound(x, calibrator, (1,), spec))
    least = errors.min(axis=1)  # up to the last bits of a sum, which are the program's
    assert (exact_error(x, m, spec)[:, 0] <= least * (1 + 1e-5) + 1e-30).all()


@given(x=arrays)
def test_of_equal_errors_the_larger_fraction_wins(x):
    """Powers of two make many: all bounds that round up to the same one have the same codes."""
    spec, calibrator = QSpec(format="int4", scale="po2"), MSE()
    m = np.asarray(bound(x, calibrator, (1,), spec))
    scale_of = lambda m: np.asarray(quantized(x, m, spec)[1])
    for fraction in calibrator.ratios:
        larger = fraction * largest(x)
        same = (larger > m) & (scale_of(larger) == scale_of(m))
        assert not same.any()


def test_mse_of_zeros_is_zero():
    assert not np.asarray(bound(np.zeros(SHAPE, F32), MSE())).any()


def test_mse_finds_a_bound_for_each_row():
    """A row on the grid is exact as it is, one with an outlier is better clipped."""
    outlier = [*np.linspace(-1, 1, 255), 2.0]
    x = np.array([[*np.linspace(-7, 7, 15), *[7.0] * 241], outlier], F32)
    m = np.asarray(bound(x, MSE(), (1,), QSpec(format="int3")))
    assert m[0] > 5 and m[1] < 1.7
    on_grid = np.array([[*range(-7, 8), 7]], F32)
    assert bound(on_grid, MSE(), (1,), QSpec(format="int4")).tolist() == [[7.0]]


def test_clipping_pays_for_heavy_tails_in_4_bits():
    x = np.random.default_rng(0).standard_t(3, size=(128, 1024)).astype(F32)
    spec = QSpec(format="int4")
    error = lambda c: exact_error(x, bound(x, c, (1,), spec), spec).sum()
    assert error(MSE()) < 0.80 * error(Absmax())
    assert error(MSE()) <= error(Percentile(99.5)) < error(Absmax())


def test_one_step_of_mse_is_absmax():
    x = np.random.default_rng(0).normal(size=SHAPE).astype(F32)
    assert MSE(steps=1).ratios.tolist() == [1.0]
    np.testing.assert_array_equal(bound(x, MSE(steps=1)), largest(x))
    assert MSE().ratios[0] == 1 and MSE().ratios[-1] == F32(0.2) and MSE().ratios.size == 33


@given(x=arrays)
def test_a_fixed_range_is_what_was_given_whatever_the_array(x):
    np.testing.assert_array_equal(bound(x, Fixed(2.5)), np.full((ROWS, 1), 2.5))
    np.testing.assert_array_equal(bound(x, Fixed(-3.0, 1.0)), np.full((ROWS, 1), 3.0))
    for given_ends, want in [((2.5,), (-2.5, 2.5)), ((-3.0, 1.0), (-3.0, 1.0))]:
        low, high = ends(x, Fixed(*given_ends))
        assert low.shape == high.shape == (ROWS, 1)
        assert set(np.ravel(low)) == {F32(want[0])} and set(np.ravel(high)) == {F32(want[1])}


@pytest.mark.parametrize("calibrator", [Absmax(), EMA()], ids=repr)
@given(x=arrays)
def test_two_ends_contain_the_array_and_zero(calibrator, x):
    low, high = ends(x, calibrator)
    np.testing.assert_array_equal(low, np.minimum(x.min(axis=1, keepdims=True), 0))
    np.testing.assert_array_equal(high, np.maximum(x.max(axis=1, keepdims=True), 0))


@pytest.mark.parametrize("calibrator", [Absmax(), EMA(), Percentile(50), MSE()], ids=repr)
def test_the_bound_of_a_row_with_a_nan_is_nan_and_no_other(calibrator):
    x = np.random.default_rng(0).normal(size=SHAPE).astype(F32)
    x[1, 4] = np.nan
    assert np.isnan(bound(x, calibrator)).ravel().tolist() == [False, True, False]


@pytest.mark.parametrize("calibrator", ALL, ids=repr)
def test_a_bound_has_size_1_on_the_axes_it_is_taken_over(calibrator):
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(F32)
    for axes in [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)]:
        want = tuple(1 if axis in axes else n for axis, n in enumerate(x.shape))
        found = bound(x, calibrator, axes)
        assert found.shape == want and found.dtype == F32


@pytest.mark.parametrize("calibrator", [Absmax(), Percentile(90), MSE(), Fixed(2.0)], ids=repr)
def test_a_bound_does_not_depend_on_the_order_of_elements(calibrator):
    x = np.random.default_rng(0).normal(size=SHAPE).astype(F32)
    np.testing.assert_array_equal(bound(x[:, ::-1], calibrator), bound(x, calibrator))


@pytest.mark.parametrize("calibrator", ALL, ids=repr)
def test_only_what_is_never_exceeded_does_not_clip(calibrator):
    assert QSpec(calibrator=calibrator).clips == (calibrator != Absmax())
    assert calibrator.two_sided == isinstance(calibrator, Absmax | EMA | Fixed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(1.0), r"EMA\(decay=1.0\): decay is in \[0, 1\)"),
        (lambda: EMA(-0.1), r"decay is in \[0, 1\)"),
        (lambda: EMA(math.nan), r"decay is in \[0, 1\)"),
        (lambda: Percentile(0), r"Percentile\(p=0\): p is a percentage in \(0, 100\]"),
        (lambda: Percentile(100.1), r"p is a percentage in \(0, 100\]"),
        (lambda: Percentile(math.nan), r"p is a percentage in \(0, 100\]"),
        (lambda: MSE(least=0.0), r"MSE\(least=0.0, steps=33\): least is in \(0, 1\]"),
        (lambda: MSE(least=1.5), r"least is in \(0, 1\]"),
        (lambda: MSE(steps=0), r"there is at least one step"),
        (
            lambda: Fixed(-1.0),
            r"Fixed\(first=-1.0, second=None\): the range is finite and contains",
        ),
        (lambda: Fixed(1.0, 2.0), r"the range is finite and contains zero"),
        (lambda: Fixed(-2.0, -1.0), r"the range is finite and contains zero"),
        (lambda: Fixed(1.0, -1.0), r"the range is finite and contains zero"),
        (lambda: Fixed(math.inf), r"the range is finite and contains zero"),
        (lambda: Fixed(-1.0, math.nan), r"the range is finite and contains zero"),
    ],
)
def test_a_calibrator_says_what_it_takes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("calibrator", [*ALL, Fixed(-1.0, 3.0), MSE(0.5, 3)], ids=repr)
def test_a_calibrator_is_what_it_prints(calibrator):
    assert eval(repr(calibrator)) == calibrator and hash(calibrator) == hash(eval(repr(calibrator)))
