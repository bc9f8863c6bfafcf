"""Laws of axis expressions, against the positions they stand for."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from unitscale_jax.trace.dimensions._factors import (
    UNIT,
    expanded,
    factors,
    new_axes,
    new_axis,
    pieces,
    pin,
    reshaped,
    size,
    unify,
)


def label(axis):
    """For each position of an axis the channels that stand there: a set of (factor, channel)."""
    out = []
    for term in expanded(axis):
        for channels in itertools.product(*(range(factor.size) for factor in term)):
            out.append(frozenset(zip(map(id, term), channels, strict=True)) | {("term", term)})
    return out


def labels(axes):
    """For each position of a value, in row-major order, what stands there along all its axes."""
    return [frozenset().union(*where) for where in itertools.product(*map(label, axes))]


def is_marked(*axes):
    return any(factor.marks for axis in axes for factor in factors(axis))


SHAPES = st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4)


@given(SHAPES, SHAPES)
def test_reshaping_moves_no_channel(old, new):
    """Row-major order is kept, or the axes are marked."""
    rest = math.lcm(math.prod(old), math.prod(new))
    old, new = [*old, rest // math.prod(old)], [*new, rest // math.prod(new)]
    before = new_axes(old)
    after = reshaped(before, new)
    assert [size(axis) for axis in after] == new
    strip = lambda value: [frozenset(x for x in at if x[0] != "term") for at in labels(value)]
    assert is_marked(*before, *after) or strip(after) == strip(before)


@pytest.mark.parametrize("there", [(6, 4), (2, 3, 2, 2), (24, 1), (3, 8), (12, 2), (4, 6), (1, 24)])
def test_reshaping_there_and_back_is_the_identity(there):
    before = new_axes((24,))
    middle = reshaped(before, there)
    (back,) = reshaped(middle, (24,))
    assert expanded(back) == expanded(before[0]) and not is_marked(back)


def test_reshaping_that_no_product_expresses_is_marked():
    before = reshaped(new_axes((24,)), (6, 4))
    after = reshaped(before, (4, 6))
    assert all(
        factor.marks == {"reshape"} for axis in (*before, *after) for factor in factors(axis)
    )


def test_a_shared_factor_is_refined_everywhere():
    x, y = new_axis(24), new_axis(24)
    unify(x, y)
    heads, dim = reshaped((x,), (4, 6))
    assert expanded(y) == ((*expanded(heads)[0], *expanded(dim)[0]),)


def test_pieces_put_together_are_the_axis():
    axis = new_axis(9)
    parts = pieces(axis, [2, 3, 4])
    assert [size(part) for part in parts] == [2, 3, 4]
    assert expanded(axis) == tuple(term for part in parts for term in expanded(part))


def test_an_axis_of_products_is_cut_along_its_first_factor():
    (axis,) = reshaped(new_axes((4, 6)), (24,))
    q, k, v = pieces(axis, [12, 6, 6])
    dims = {expanded(part)[0][-1] for part in (q, k, v)}
    assert len(dims) == 1 and dims.pop().size == 6
    assert not is_marked(axis)


def test_a_cut_inside_the_last_factor_is_marked():
    (axis,) = reshaped(new_axes((4, 6)), (24,))
    parts = pieces(axis, [10, 14])
    assert [size(part) for part in parts] == [10, 14] and is_marked(axis)
    assert all(factor.marks == {"cut"} for part in parts for factor in factors(part))


def test_a_piece_can_be_cut_again():
    axis = new_axis(24)
    first, rest = pieces(axis, [8, 16])
    pieces(rest, [8, 8])
    assert [math.prod(f.size for f in term) for term in expanded(axis)] == [8, 8, 8]
    pieces(axis, [4, 20])
    assert [size((term,)) for term in expanded(axis)] == [4, 4, 8, 8] and not is_marked(axis)
    assert [size((term,)) for term in expanded(first)] == [4, 4]


def test_sums_cut_at_other_places_are_cut_at_all_places():
    x, y = new_axis(12), new_axis(12)
    pieces(x, [4, 8])
    pieces(y, [6, 6])
    unify(x, y)
    assert expanded(x) == expanded(y) and not is_marked(x)
    assert [size((term,)) for term in expanded(x)] == [4, 2, 6]


def test_a_sum_does_not_distribute_over_what_precedes_it():
    """Position 2 of heads (2) x (1 + 2) is head 0, in a sum of products it would be head 1."""
    heads, dim = reshaped(new_axes((6,)), (2, 3))
    flat = (expanded(heads)[0] + expanded(dim)[0],)
    pieces(dim, [1, 2])
    assert size(flat) == 6 and len(expanded(flat)) == 1
    assert "sum inside a product" in expanded(flat)[0][1].marks
    assert all("sum inside a product" in factor.marks for factor in factors(dim))


def test_a_sum_distributes_over_what_follows_it():
    heads, dim = reshaped(new_axes((20,)), (5, 4))
    flat = (expanded(heads)[0] + expanded(dim)[0],)
    pieces(heads, [2, 3])
    assert [[f.size for f in term] for term in expanded(flat)] == [[2, 4], [3, 4]]
    assert not is_marked(flat)


def test_terms_with_one_tail_are_stacked():
    q, k = new_axes((4, 6)), (new_axis(2), new_axis(6))
    flat = (*reshaped(q, (24,))[0], *reshaped(k, (12,))[0])
    heads, dim = reshaped((flat,), (6, 6))
    assert [size((term,)) for term in expanded(heads)] == [4, 2]
    assert factors(dim) == factors(q[1]) == factors(k[1]) and not is_marked(flat)


def test_unifying_products_refines_the_larger_factor():
    x, y = new_axis(24), reshaped(new_axes((4, 6)), (24,))[0]
    unify(x, y)
    assert expanded(x) == expanded(y) and len(expanded(x)[0]) == 2


def test_products_that_do_not_line_up_are_marked():
    (x,), (y,) = reshaped(new_axes((4, 6)), (24,)), reshaped(new_axes((6, 4)), (24,))
    unify(x, y)
    assert all(factor.marks for axis in (x, y) for factor in factors(axis))


@pytest.mark.parametrize("first", ["mark", "refine", "merge"])
def test_marks_reach_whatever_a_factor_becomes(first):
    x, y = new_axis(12), new_axis(12)
    steps = {
        "mark": lambda: pin([x], "why"),
        "refine": lambda: reshaped((y,), (3, 4)),
        "merge": lambda: unify(x, y),
    }
    for name in [first, *(name for name in steps if name != first)]:
        steps[name]()
    assert len(factors(x)) == 2 and all(f.marks == {"why"} for f in factors(x) | factors(y))


def test_a_refined_factor_merged_into_a_marked_one_is_marked_in_all_its_parts():
    heads, dim = new_axes((2, 6))
    flat = (expanded(heads)[0] + expanded(dim)[0],)
    pieces(dim, [3, 3])
    expanded(flat)  # now dim stays one factor of the product, though it is a sum elsewhere
    other = new_axis(12)
    inner = reshaped((other,), (2, 6))[1]
    pin([inner], "why")
    unify(flat, other)
    assert all("why" in factor.marks for factor in factors(dim))


def test_axes_of_size_one_have_no_factor():
    assert new_axis(1) == UNIT and size(UNIT) == 1 and factors(UNIT) == set()
    assert reshaped(new_axes((1, 5, 1)), (5, 1, 1))[1:] == (UNIT, UNIT)


def test_empty_axes_do_no_harm():
    axes = new_axes((0, 3))
    assert [size(axis) for axis in reshaped(axes, (3, 0))] == [3, 0]
    assert [size(part) for part in pieces(new_axis(3), [0, 3])] == [0, 3]


def test_many_cuts_need_no_deep_recursion():
    """As when a loop over a stack of layers is written in Python: x[0], x[1], .."""
    axis = new_axis(1200)
    for n in range(1, 1199):
        pieces(axis, [n, 1, 1199 - n])
    assert size(axis) == 1200 and factors(axis) == set()


@given(st.lists(st.sampled_from([2, 3, 4, 6]), min_size=2, max_size=5), st.data())
def test_unifying_is_symmetric_and_settles(sizes, data):
    """After any unifications, both sides of each have the same expression, or are marked."""
    axes = [reshaped(new_axes((n, 12 // n)), (12,))[0] for n in sizes]
    pairs = data.draw(st.lists(st.tuples(*[st.integers(0, len(axes) - 1)] * 2), max_size=6))
    for i, j in pairs:
        unify(axes[i], axes[j])
    for i, j in pairs:
        same = expanded(axes[i]) == expanded(axes[j])
        assert same or (is_marked(axes[i]) and is_marked(axes[j]))


def test_a_factor_says_its_size_and_marks():
    axis = new_axis(3, "input")
    assert repr(expanded(axis)[0][0]) == "SymbolicDim(3, 'input')"
    assert np.prod([f.size for f in factors(axis)]) == 3
