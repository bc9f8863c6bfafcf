"""Laws of composition."""

import functools

import pytest
from hypothesis import given, strategies as st

from unitscale_jax.compose import chain

double = lambda x: 2 * x
increment = lambda x: x + 1
square = lambda x: x * x
members = st.lists(st.sampled_from([double, increment, square]), max_size=4)


@given(transforms=members, x=st.integers(-9, 9))
def test_reading_order_is_application_order(transforms, x):
    by_hand = functools.reduce(lambda value, transform: transform(value), transforms, x)
    assert chain(*transforms)(x) == by_hand


def test_the_first_member_is_applied_first():
    assert chain(double, increment)(5) == 11


@given(left=members, right=members, x=st.integers(-9, 9))
def test_is_associative(left, right, x):
    assert chain(chain(*left), chain(*right))(x) == chain(*left, *right)(x)


def test_the_empty_chain_is_the_identity():
    thing = object()
    assert chain()(thing) is thing


def test_a_member_that_is_not_callable_is_named_by_its_position():
    with pytest.raises(
        TypeError, match=r"member 1 of the chain is 4, of type int.*functools\.partial"
    ):
        chain(double, 4)
