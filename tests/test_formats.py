"""Laws of number formats and of rounding; `ml_dtypes` and a search in the grid are oracles."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from unitscale_jax.formats import FORMATS, Format, format_of, integers, round_to, stochastic_bf16

TIES_TO_ZERO = pathlib.Path(__file__).parent / "data" / "rounding_ties_toward_zero.json"
NAMES = [*FORMATS]
FLOATS = [name for name in NAMES if not FORMATS[name].is_integer]
SIGNED = [name for name in NAMES if FORMATS[name].signed]
ROUNDING = [name for name in NAMES if name != "f32"]
BF16_MAX = float(ml_dtypes.finfo("bfloat16").max)

rounded = jax.jit(round_to, static_argnames=("format", "ties"))
values = hnp.arrays(np.float32, 64, elements=st.floats(-1e5, 1e5, width=32))


def stored(name):
    """The type of `ml_dtypes` or numpy that stores a format."""
    return np.dtype(getattr(ml_dtypes, FORMATS[name].dtype, FORMATS[name].dtype))


def cast(x, name):
    """The oracle: saturate, cast to the stored type and back, all in numpy."""
    low, high = FORMATS[name].min, FORMATS[name].max
    with np.errstate(invalid="ignore"):  # signaling NaN
        inside = np.clip(x, np.float32(low), np.float32(high))
        if FORMATS[name].is_integer:
            return np.round(inside)
        return inside.astype(stored(name)).astype(np.float32)


@functools.cache
def grid(name):
    """All numbers of a format that are not negative, in order, so that index parity is 'even'."""
    dtype = stored(name)
    if FORMATS[name].is_integer:
        return np.arange(FORMATS[name].max + 1, dtype=np.float32)
    bits = FORMATS[name].bits
    codes = np.arange(2 ** (bits - 1), dtype=np.uint8 if bits <= 8 else np.uint16)
    numbers = codes.view(dtype).astype(np.float32)
    return numbers[np.isfinite(numbers)]


def critical(numbers, dtype=np.float32):
    """Numbers, midpoints between neighbours, the neighbours of both in `dtype`, and beyond."""
    wide = numbers.astype(np.float64)
    points = np.concatenate([wide, (wide[1:] + wide[:-1]) / 2]).astype(dtype)
    top = np.float64(wide[-1]) * np.array([1.01, 1.07, 1.5, 3.0])
    top = np.minimum(top, np.finfo(np.float32).max).astype(dtype)
    tiny = np.array(
        [1e-45, 1e-40, 1.2e-38], dtype
    )  # subnormal numbers of float32, which XLA flushes
    up, down = np.nextafter(points, dtype(np.inf)), np.nextafter(points, dtype(-np.inf))
    x = np.concatenate([points, up, down, top, tiny, [np.inf]]).astype(dtype)
    return np.concatenate([x, -x])


def assert_same_numbers(got, want):
    np.testing.assert_array_equal(np.asarray(got, np.float64), np.asarray(want, np.float64))


def nearest(x, numbers, ties="even"):
    """The slow obvious oracle: look both neighbours up and compare the distances, in float64."""
    size = np.minimum(np.abs(x.astype(np.float64)), numbers[-1])
    above = np.minimum(np.searchsorted(numbers, size), len(numbers) - 1)
    below = np.maximum(above - 1, 0)
    to_above, to_below = numbers[above] - size, size - numbers[below]
    tie_up = (above % 2 == 0) if ties == "even" else np.zeros(x.shape, bool)
    go_up = (to_above < to_below) | ((to_above == to_below) & tie_up)
    return np.copysign(np.where(go_up, numbers[above], numbers[below]), x)


# ------------------------------------------------------------------------------ formats as data


@pytest.mark.parametrize("name", FLOATS)
def test_limits_are_those_of_ml_dtypes(name):
    info, spec = ml_dtypes.finfo(stored(name)), FORMATS[name]
    assert spec.max == float(info.max)
    assert spec.min == float(info.min)
    assert spec.min_normal == float(info.smallest_normal)
    assert spec.min_subnormal == float(info.smallest_subnormal)
    assert spec.bits == info.bits
    assert spec.mantissa_bits == info.nmant
    with np.errstate(all="ignore"):
        assert spec.infinities == bool(np.isinf(np.float32(np.inf).astype(stored(name))))


@pytest.mark.parametrize("name", [name for name in NAMES if FORMATS[name].is_integer])
def test_limits_of_integers_are_those_of_ml_dtypes(name):
    info, spec = ml_dtypes.iinfo(stored(name)), FORMATS[name]
    assert (spec.min, spec.max, spec.bits) == (info.min, info.max, info.bits)
    assert spec.min_normal == spec.min_subnormal == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_format_is_found_by_name_by_dtype_and_by_itself(name):
    spec = FORMATS[name]
    for alias in (name, spec.dtype, stored(name), stored(name).type, spec):
        assert format_of(alias) is spec


@pytest.mark.parametrize("unknown", ["float12", "complex64", np.dtype("int64"), 3, None])
def test_an_unknown_format_is_an_error_that_lists_the_known(unknown):
    with pytest.raises(ValueError, match=r"unknown number format.* int8, .*bf16, f32 and"):
        format_of(unknown)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exponent_bits": 4, "mantissa_bits": 3, "bias": 7, "max": 500.0}, "at most 480"),
        ({"exponent_bits": 4, "mantissa_bits": 3, "bias": 7, "max": 447.0}, "on the grid"),
        (
            {"exponent_bits": 4, "mantissa_bits": 3, "bias": 7, "max": 448.0, "infinities": True},
            "at most 240",
        ),
        ({"exponent_bits": 11, "mantissa_bits": 3, "bias": 1023, "max": 1.0}, "8 bits of exponent"),
        ({"exponent_bits": 8, "mantissa_bits": 3, "bias": 128, "max": 1.0}, "smaller bias"),
        ({"exponent_bits": 0, "mantissa_bits": 7, "bias": 0, "max": 127.0}, "steps of 1"),
        ({"exponent_bits": 5, "mantissa_bits": 2, "bias": 15, "max": np.inf}, "finite max"),
    ],
)
def test_a_contradictory_format_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        Format(**fields)


# ------------------------------------------------------------------------------ nearest


@pytest.mark.parametrize("name", ROUNDING)
def test_is_the_cast_of_ml_dtypes_at_every_number_midpoint_and_neighbor(name):
    x = critical(grid(name))
    assert_same_numbers(rounded(x, name), cast(x, name))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ROUNDING)
def test_rounds_every_pattern_of_a_16_bit_input_and_keeps_its_dtype(name, dtype):
    x = np.arange(2**16, dtype=np.uint16).view(np.dtype(dtype))
    y = rounded(x, name)
    assert y.dtype == x.dtype
    with np.errstate(invalid="ignore"):  # signaling NaN
        x, y = x.astype(np.float32), np.asarray(y).astype(np.float32)
    # The other 16-bit format's largest number is not one of this dtype; 65280 is one of both.
    top = 65280.0 if {name, dtype} in ({"bf16", "float16"}, {"f16", "bfloat16"}) else np.inf
    number = ~np.isnan(x)
    assert_same_numbers(y[number], np.clip(cast(x[number], name), -top, top))
    assert np.isnan(y[~number]).all()
    if FORMATS[name].signed:
        assert (np.signbit(y) == np.signbit(x))[number].all()


@pytest.mark.parametrize("name", ROUNDING)
def test_nearest_of_float64_is_rounded_once(name):
    numbers, spec = grid(name).astype(np.float64), FORMATS[name]
    x = critical(numbers, np.float64)
    want = nearest(x, numbers) if name in FLOATS else np.clip(np.round(x), spec.min, spec.max)
    with jax.enable_x64(True):
        got = rounded(x, name)
        assert got.dtype == np.float64
    assert_same_numbers(got, want)


def test_float32_grid_rounds_float64_with_its_subnormal_numbers():
    x = np.array([1 + 2.0**-30, 1e300, -np.inf, 2.0**-149 * 1.4, 2.0**-149 * 1.6, 2.0**-151])
    with jax.enable_x64(True):
        got = np.asarray(rounded(x, "f32"))
    top = float(np.finfo(np.float32).max)
    assert_same_numbers(got, [1, top, -top, 2.0**-149, 2.0**-148, 0])


def test_float32_is_left_as_it_is_by_the_grid_of_float32():
    for dtype in ("float32", "bfloat16", "float16"):
        jaxpr = jax.make_jaxpr(lambda x: round_to(x, "f32"))(jnp.ones(3, dtype))
        assert not jaxpr.eqns


@pytest.mark.parametrize("name", [*ROUNDING, "tf32"])
def test_ties_go_to_zero_when_asked(name):
    tf32 = Format(exponent_bits=8, mantissa_bits=10, bias=127, max=2.0**127 * (2 - 2.0**-10))
    numbers = grid(name) if name != "tf32" else 1 + np.arange(1024, dtype=np.float32) / 1024
    x = critical(numbers)
    x = np.abs(x[np.isfinite(x) & (np.abs(x) >= numbers[0]) & (np.abs(x) <= numbers[-1])])
    got = rounded(x, tf32 if name == "tf32" else name, ties="zero")
    assert_same_numbers(got, nearest(x, numbers.astype(np.float64), "zero"))


def test_ties_toward_zero_are_those_of_the_published_unit_scaling_library():
    recorded = json.loads(TIES_TO_ZERO.read_text())
    for case in recorded["grids"]:
        want = case.pop("nearest")
        got = round_to(np.array(recorded["inputs"], np.float32), Format(**case), ties="zero")
        assert_same_numbers(got, want)


@pytest.mark.parametrize("key", [None, 0])
@pytest.mark.parametrize("name", ROUNDING)
def test_saturates_keeps_nan_and_the_sign_of_zero(name, key):
    key = key if key is None else jax.random.key(key)
    x = np.array([np.inf, -np.inf, 3.4e38, np.nan, -np.nan, -0.0, 0.0], np.float32)
    y = np.asarray(rounded(x, name, key=key))
    spec = FORMATS[name]
    assert_same_numbers(y[:2], [spec.max, spec.min])
    assert y[2] == np.float32(min(spec.max, BF16_MAX))
    assert np.isnan(y[3:5]).all()
    assert y[5] == y[6] == 0
    assert [*np.signbit(y[5:])] == [True, False]


@pytest.mark.parametrize("name", SIGNED)
@given(values)
def test_is_odd_monotone_and_idempotent(name, x):
    spec = FORMATS[name]
    x = np.sort(np.clip(x, -spec.max, spec.max))
    y = np.asarray(rounded(x, name))
    assert_same_numbers(rounded(-x, name), -y)
    assert (np.diff(y) >= 0).all()
    assert_same_numbers(rounded(y, name), y)
    assert (np.signbit(y) == np.signbit(x)).all()


@pytest.mark.parametrize("name", ["int4", "e4m3fn", "bf16"])
@given(values)
def test_commutes_with_jit_and_vmap(name, x):
    rows = x.reshape(8, 8)
    assert_same_numbers(rounded(rows, name), round_to(rows, name))
    assert_same_numbers(jax.vmap(lambda row: rounded(row, name))(rows), rounded(rows, name))


@pytest.mark.parametrize("name", ROUNDING)
def test_the_gradient_is_zero(name):
    grads = jax.grad(lambda x: jnp.sum(round_to(x, name) * 3))(jnp.array([0.3, 2.7, jnp.nan]))
    assert_same_numbers(grads, [0, 0, 0])


def test_bad_arguments_are_errors_with_the_way_out():
    with pytest.raises(TypeError, match=r"x, int32\[2\], to float32"):
        round_to(jnp.arange(2), "int8")
    with pytest.raises(ValueError, match="ties='up'.*'even' or toward 'zero'"):
        round_to(jnp.ones(2), "int8", ties="up")
    with pytest.raises(TypeError, match=r"float32\[2\] and uint16\[3\].*jax.random.bits"):
        stochastic_bf16(jnp.ones(2), jnp.ones(3, jnp.uint16))
    with pytest.raises(TypeError, match=r"bfloat16\[2\] and uint16\[2\]"):
        stochastic_bf16(jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.uint16))


# ------------------------------------------------------------------------------ stochastic

N = 40_000


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ROUNDING)
def test_stochastic_draws_are_the_two_neighbors_and_their_mean_is_the_value(name, dtype):
    spec = FORMATS[name]
    # Within a subnormal step, within a normal one, and, as far as the dtype has it, near a number.
    near = spec.min_normal * (1 + 2.0 ** -(spec.mantissa_bits + 4)) if name in FLOATS else 1.0625
    points = [spec.min_subnormal * 0.375, spec.min_normal * 1.3125, near]
    points = [p for p in points if p <= spec.max and np.float64(np.float32(p).astype(dtype)) == p]
    for point in [p for p in points if p > np.finfo(np.float16).tiny or dtype != "float16"]:
        for x in [point, -point] if spec.signed else [point]:
            many = rounded(jnp.full(N, x, dtype), name, key=jax.random.key(1))
            many = np.asarray(many).astype(np.float64)
            assert_two_neighbors_with_mean(many, x, grid(name).astype(np.float64))


def assert_two_neighbors_with_mean(many, x, numbers):
    size, drawn = abs(x), np.unique(many * np.sign(x))
    above = np.searchsorted(numbers, size)
    if numbers[above] == size:
        assert_same_numbers(drawn, [size])
        return
    low, high = numbers[above - 1], numbers[above]
    assert_same_numbers(drawn, [low, high])
    chance = (size - low) / (high - low)
    share_up = (many * np.sign(x) == high).mean()
    assert abs(share_up - chance) < 5 * (chance * (1 - chance) / N) ** 0.5


@pytest.mark.parametrize("name", ["int8", "e4m3fn", "f16", "bf16"])
def test_the_same_key_draws_the_same_bits_and_another_key_others(name):
    x = jnp.linspace(0.001, 0.9, 512)
    first, again, other = (rounded(x, name, key=jax.random.key(k)) for k in (0, 0, 1))
    assert_same_numbers(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("name", ["int8", "e4m3fn", "f16", "bf16"])
def test_a_number_of_the_grid_stays_whatever_is_drawn(name):
    x = np.concatenate([grid(name), -grid(name)])
    assert_same_numbers(rounded(x, name, key=jax.random.key(3)), x)


@pytest.mark.parametrize("power", [-1, -7, -23, -26, -31])
def test_a_step_up_has_the_chance_of_the_fraction_to_the_last_of_32_bits(power, monkeypatch):
    """Up for the first f 2^32 of the 2^32 values of the bits, and for no others."""
    chance = 2 ** (32 + power)
    drawn = np.array([0, chance - 1, chance, 2**32 - 1], np.uint32)
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.asarray(drawn))
    got = round_to(jnp.full(4, 2.0**power), "int8", key=jax.random.key(0))
    assert_same_numbers(got, [1, 1, 0, 0])


ALL_BITS = np.arange(2**16, dtype=np.uint16)


@jax.jit
def every_draw(x):
    return stochastic_bf16(jnp.full(2**16, x), ALL_BITS)


@given(
    st.floats(-BF16_MAX, BF16_MAX, width=32)
    | st.integers(0, 2**23).map(lambda code: float(np.uint32(code).view("f")))
    | st.integers(0, 2**16 - 1).map(lambda low: float(np.uint32(0x3F80_0000 + low).view("f")))
)
def test_as_many_draws_round_away_from_zero_as_the_low_half_says(x):
    """Over all 2^16 values of the bits, so the mean of the draws is x exactly."""
    x = np.float32(x)
    upper, lower = divmod(int(x.view(np.uint32)), 2**16)
    codes, counts = np.unique(np.asarray(every_draw(x)).view(np.uint16), return_counts=True)
    want = {upper: 2**16 - lower, upper + 1: lower}
    assert dict(zip(codes.tolist(), counts.tolist(), strict=True)) == {
        code: count for code, count in want.items() if count
    }
    assert (
        np.asarray(every_draw(-x)).view(np.uint16)
        == np.asarray(every_draw(x)).view(np.uint16) ^ 0x8000
    ).all()


def test_every_subnormal_bfloat16_stays_and_its_float32_neighbors_are_not_flushed():
    codes = np.arange(1, 0x100, dtype=np.uint16)
    exact = (codes.astype(np.uint32) << 16).view(np.float32)
    for below, low_half in [(0xFFFF, 0), (0xFFFE, 1)]:
        x = (exact.view(np.uint32) + low_half).view(np.float32)
        drawn = stochastic_bf16(x, np.full(codes.shape, below, np.uint16))
        assert (np.asarray(drawn).view(np.uint16) == codes).all()


def test_infinities_and_nan_survive_any_bits():
    patterns = [0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF]
    x = np.array(patterns, np.uint32).view(np.float32)
    for drawn in (0, 1, 0xFFFF):
        y = np.asarray(stochastic_bf16(x, np.full(5, drawn, np.uint16))).astype(np.float32)
        assert_same_numbers(y[:2], [np.inf, -np.inf])
        assert np.isnan(y[2:]).all()


def test_1_001_goes_up_for_exactly_8389_of_65536_draws():
    up = np.asarray(every_draw(np.float32(1.001))).astype(np.float32) == 1.0078125
    assert up.sum() == 8389
    assert (up == (ALL_BITS >= 0xDF3B)).all()


@given(values)
def test_rounding_to_bf16_with_a_key_adds_the_bits_of_that_key(x):
    key = jax.random.key(5)
    want = stochastic_bf16(x, jax.random.bits(key, x.shape, jnp.uint16))
    assert_same_numbers(rounded(x, "bf16", key=key), want.astype(jnp.float32))


def test_integers_of_any_width_are_a_format():
    five = integers(5)
    assert (five.min, five.max, five.bits) == (-16, 15, 5)
    assert_same_numbers(round_to(jnp.array([-40.0, -15.6, 14.5, 99.0]), five), [-16, -16, 14, 15])
