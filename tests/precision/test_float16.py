"""Laws of float16 parameters for serving."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from unitscale_jax.precision import to_float16

TINY, SUBNORMAL = 2.0**-24, 2.0**-14


@given(
    hnp.arrays(
        np.float32,
        8,
        elements=st.one_of(
            st.floats(-65504, 65504, width=32),
            st.floats(-(2.0**-13), 2.0**-13, width=32, allow_subnormal=False),
        ),
    )
)
def test_values_and_counts_are_those_of_numpy(w):
    out, report = to_float16({"w": w})
    half = w.astype(np.float16)
    chex.assert_trees_all_equal(np.asarray(out["w"]), half)
    size = np.abs(half.astype(np.float32))
    assert report.flushed == ((w != 0) & (size == 0)).sum()
    assert report.subnormal == ((size > 0) & (size < SUBNORMAL)).sum()


above = lambda x: np.nextafter(np.float32(x), np.float32(np.inf))
below = lambda x: np.nextafter(np.float32(x), np.float32(0))


@pytest.mark.parametrize(
    ("value", "becomes", "flushed", "subnormal"),
    [
        (0.0, 0.0, 0, 0),
        (TINY / 2, 0.0, 1, 0),
        (above(TINY / 2), TINY, 0, 1),
        (SUBNORMAL - TINY, SUBNORMAL - TINY, 0, 1),
        (below(SUBNORMAL), SUBNORMAL, 0, 0),
        (SUBNORMAL, SUBNORMAL, 0, 0),
        (below(65520), 65504.0, 0, 0),
        (np.inf, np.inf, 0, 0),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_ends_of_the_range(value, becomes, flushed, subnormal, sign):
    out, report = to_float16(jnp.float32(sign * value))
    assert out == sign * becomes
    assert (report.flushed, report.subnormal) == (flushed, subnormal)


@pytest.mark.parametrize("value", [65520.0, -1e30])
def test_a_number_that_would_be_infinite_is_an_error_with_a_way_out(value):
    params = {"head": {"w": jnp.array([1.0, value, value]), "b": jnp.ones(2)}}
    message = r"'head/w' has 2 of 3 numbers .* \[\('head/w', 'float32'\)\]"
    with pytest.raises(ValueError, match=message):
        to_float16(params)
    out, report = to_float16(params, [("head/w", "float32")])
    assert out["head"]["w"].dtype == jnp.float32 and out["head"]["b"].dtype == jnp.float16
    chex.assert_trees_all_equal(out["head"]["w"], params["head"]["w"])
    assert {row.name: row.dtype for row in report.rows} == {
        "head/w": "float32",
        "head/b": "float16",
    }


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_any_float_may_come_and_twice_is_once(dtype):
    once, report = to_float16({"w": jnp.array([1.0, 2.0**-20], dtype)})
    twice, again = to_float16(once)
    chex.assert_trees_all_equal(once, twice)
    assert once["w"].dtype == jnp.float16 and report == again and report.subnormal == 1


def test_what_is_not_floating_stays_and_has_no_row():
    params = {"ids": jnp.arange(3), "key": jax.random.key(0), "w": jnp.ones(1)}
    out, report = to_float16(params)
    assert out["ids"] is params["ids"] and out["key"] is params["key"]
    assert [row.name for row in report.rows] == ["w"]


def test_the_report_shows_the_leaves_that_lost():
    params = {"a": jnp.array([1e-9, 1.0]), "b": jnp.ones(3), "c": jnp.full(2, 1e-6)}
    text = str(to_float16(params)[1])
    assert text.splitlines() == [
        "1 flushed to 0 and 2 subnormal, of 7 numbers",
        "  a  1 flushed, 0 subnormal of 2",
        "  c  0 flushed, 2 subnormal of 2",
    ]


def test_bad_rules_get_clear_errors():
    params = {"norm": {"gain": jnp.ones(2)}}
    with pytest.raises(ValueError, match="matched none of 1 parameters; closest: 'norm/gain'"):
        to_float16(params, [("norm/gian", "float32")])
    with pytest.raises(ValueError, match=r"rule '\*\*' is 'fp32'.*closest: 'float32'"):
        to_float16(params, {"**": "fp32"})
