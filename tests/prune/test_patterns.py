"""Laws of patterns: units stay or go whole, and what does not divide is an error."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from unitscale_jax.prune import Balanced, Block, Channel, NofM, Unstructured

floats = st.floats(-4, 4, width=32)
UNITS = [  # pattern, shape, shape of units
    (Unstructured(), (4, 6), (4, 6)),
    (Block((2, 3)), (4, 6), (2, 2)),
    (Block((2,)), (4, 6), (4, 3)),
    (Block((2, 2)), (3, 4, 2), (3, 2, 1)),
    (Channel(), (4, 6), (6,)),
    (Channel(axis=0), (4, 6), (4,)),
    (Channel(axis=-2), (2, 4, 6), (4,)),
    (Balanced(parts=3, axis=1), (4, 6), (3, 4, 2)),
    (Balanced(Block((2, 3)), parts=2, axis=-1), (4, 6), (2, 2, 1)),
    (Balanced(Channel(), parts=2, axis=0), (4, 6), (2, 6)),
]


@pytest.mark.parametrize(("pattern", "shape", "units"), UNITS, ids=str)
@given(data=st.data())
def test_a_unit_is_whole(pattern, shape, units, data):
    keep = data.draw(hnp.arrays(bool, units))
    mask = pattern.spread(jnp.asarray(keep), shape)
    assert pattern.units("w", shape) == units
    assert mask.shape == shape and mask.dtype == bool
    size = np.prod(shape) // np.prod(units)
    # Sums over units of the mask are the size of a unit, or nothing.
    np.testing.assert_array_equal(pattern.pooled(mask.astype(jnp.float32)), size * keep)


@pytest.mark.parametrize(("pattern", "shape", "units"), UNITS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@given(data=st.data())
def test_a_unit_scores_the_sum_of_what_it_spreads_to(pattern, shape, units, dtype, data):
    scores = data.draw(hnp.arrays(np.float32, shape, elements=floats)).astype(jnp.dtype(dtype))
    pooled = np.asarray(pattern.pooled(jnp.asarray(scores)), np.float64)
    for index in np.ndindex(units):
        one = np.zeros(units, bool)
        one[index] = True
        where = np.asarray(pattern.spread(jnp.asarray(one), shape))
        expected = np.asarray(scores, np.float64)[where].sum()
        np.testing.assert_allclose(pooled[index], expected, rtol=1e-6, atol=1e-5)


def test_sums_of_small_floats_are_wide():
    assert Block((8, 64)).pooled(jnp.ones((8, 64), jnp.bfloat16)) == 512
    assert Channel().pooled(jnp.ones((512, 1), jnp.bfloat16)).tolist() == [512]


def test_worked_example_of_blocks():
    w = jnp.arange(1.0, 17.0).reshape(4, 4)
    assert Block((2, 2)).pooled(w**2).tolist() == [[66, 138], [546, 746]]


def test_a_nan_is_the_whole_units():
    scores = jnp.array([[1.0, jnp.nan], [1.0, 1.0]])
    assert jnp.isnan(Channel(axis=0).pooled(scores)).tolist() == [True, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NofM(3, 2), r"NofM\(n=3, m=2, axis=None\): n of m neighbors stay"),
        (lambda: NofM(0, 2), "1 <= n <= m"),
        (lambda: NofM(2, 4, axis="in"), "axis is a whole number"),
        (lambda: Block((0, 2)), "sides of a block are positive"),
        (lambda: Block(()), "sides of a block are positive"),
        (lambda: Channel(axis=None), "channels are along one axis"),
        (
            lambda: NofM(2, 4).units("mlp/kernel", (8, 8)),
            r"mlp/kernel: NofM.* does not say along which axis.*us\.prune\.resolve_axes\(spec, fn",
        ),
        (
            lambda: NofM(2, 4, axis=0).units("mlp/kernel", (6, 8)),
            "mlp/kernel along axis 0 has 6, which groups of 4 .* divisors are 1, 2, 3, 6",
        ),
        (
            lambda: Block((4, 4)).units("mlp/kernel", (8, 10)),
            "mlp/kernel along axis 1 has 10, which blocks of 4 .* divisors are 1, 2, 5, 10",
        ),
        (lambda: Block((4, 4)).units("bias", (8,)), "bias .* at most 1 sides"),
        (lambda: NofM(2, 4, axis=2).units("w", (4, 4)), r"w has the shape \(4, 4\), and no axis 2"),
        (lambda: Channel(axis=-3).units("w", (4, 4)), "no axis -3"),
        (lambda: Balanced(parts=0, axis=0), "parts is a positive whole number"),
        (
            lambda: Balanced(parts=4, axis=0).units("w", (6, 4)),
            "w along axis 0 has 6, which 4 parts .* divisors are 1, 2, 3, 6",
        ),
    ],
)
def test_errors_say_the_way_out(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_parts_are_of_patterns_that_rank():
    with pytest.raises(TypeError, match="NofM is balanced wherever M divides"):
        Balanced(NofM(2, 4), parts=2, axis=0)


def test_patterns_are_values():
    assert Block([2, 2]) == Block((2, 2)) and hash(NofM()) == hash(NofM(2, 4))
    assert repr(Block((2, 2))) == "Block(shape=(2, 2))"
