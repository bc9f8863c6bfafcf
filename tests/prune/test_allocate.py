"""Laws of allocations: integers within their bounds, exact totals."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, strategies as st

from unitscale_jax.prune import ERK, OWL, Global, uniform
from unitscale_jax.prune._allocate import ByRule, Layer
from unitscale_jax.sparsity import kept

shares = st.floats(0, 1, exclude_max=True)
SHARING = {"erk": ERK, "owl": lambda layers, s: OWL(ratios_of(layers))(layers, s)}


def ratios_of(layers):
    """Some ratio for each, different, one for every index of every second layer."""
    rng = np.random.default_rng(len(layers))
    draw = lambda i, layer: rng.random(layer.stacked if i % 2 else ())
    return {layer.name: draw(i, layer) for i, layer in enumerate(layers)}


def unstructured(name, shape, stacked=()):
    return Layer(name, shape, math.prod(shape), stacked)


@st.composite
def models(draw):
    sides = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple)
    stacks = st.sampled_from([(), (), (2,), (3, 2)])
    shapes = draw(st.lists(st.tuples(sides, stacks), min_size=1, max_size=5))
    return [unstructured(f"w{i}", *both) for i, both in enumerate(shapes)]


@given(n=st.integers(0, 10**9), s=st.decimals(0, 1, places=6))
def test_kept_is_exact_to_half_a_unit(n, s):
    exact = n * (1 - Fraction(s))
    assert 0 <= kept(n, float(s)) <= n
    assert abs(kept(n, float(s)) - exact) <= Fraction(1, 2) + Fraction(1, 10**6)


@pytest.mark.parametrize(
    ("n", "s", "k"),
    [(10, 0.25, 8), (10, 0.35, 6), (6, 0.25, 4), (200_000_003, 0.9, 20_000_000)]
    + [(50_000_001, 0.3, 35_000_001), (5, 0.0, 5)],
)
def test_worked_examples_of_kept(n, s, k):
    assert kept(n, s) == kept(n, np.float32(s).item() if s in (0.25, 0.0) else s) == k


@pytest.mark.parametrize("name", SHARING)
@given(layers=models(), s=shares)
def test_counts_add_up_to_the_total_exactly(name, layers, s):
    counts = SHARING[name](layers, s)
    assert list(counts) == [layer.name for layer in layers]
    for layer in layers:
        k = counts[layer.name]
        assert k.shape == layer.stacked and k.dtype == np.int32
        assert np.all(k >= 0) and np.all(k <= layer.units)
    total = sum(layer.units * layer.copies for layer in layers)
    assert sum(int(k.sum()) for k in counts.values()) == kept(total, s)
    assert Global(layers, s)[""] == kept(total, s)


@given(layers=models(), s=shares)
def test_uniform_is_each_on_its_own(layers, s):
    assert uniform(layers, s) == {layer.name: kept(layer.units, s) for layer in layers}
    assert {k.shape for k in uniform(layers, s).values()} == {()}


@given(s=shares)
def test_equal_layers_have_equal_counts_up_to_one(s):
    layers = [unstructured(name, (6, 7)) for name in "abc"]
    for allocate in (ERK, OWL({"a": 0.1, "b": 0.1, "c": 0.1})):
        counts = [int(k) for k in allocate(layers, s).values()]
        assert max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)


def test_worked_example_of_erk():
    layers = [unstructured(str(s), s) for s in [(784, 300), (300, 100), (100, 10)]]
    assert [int(k) for k in ERK(layers, 0.9).values()] == [18714, 6906, 1000]
    assert sum(map(int, ERK(layers, 0.9).values())) == 26620


def test_worked_example_of_owl():
    layers = [unstructured(name, (1000, 1000)) for name in "abc"]
    counts = OWL({"a": 0.01, "b": 0.03, "c": 0.08})(layers, 0.7)
    density = np.array([int(k) for k in counts.values()]) / 1e6
    np.testing.assert_allclose(density, [0.231429, 0.277143, 0.391429], atol=1e-6)


def test_owl_gives_stacked_layers_counts_of_their_own():
    layers = [unstructured("layers/w", (10, 10), (3,))]
    counts = OWL({"layers/w": [0.0, 0.5, 1.0]})(layers, 0.5)["layers/w"]
    assert counts.tolist() == [42, 50, 58]


def test_densities_that_leave_the_unit_interval_are_cut_and_shared():
    layers = [unstructured(name, (10, 10)) for name in "ab"]
    assert OWL({"a": 0.0, "b": 1.0}, lam=0.4)(layers, 0.1) == {"a": 80, "b": 100}
    assert OWL({"a": 0.0, "b": 1.0}, lam=0.4)(layers, 0.9) == {"a": 0, "b": 20}


def test_rules_give_each_its_own_and_follow_a_schedule():
    layers = [unstructured("head/kernel", (10, 10)), unstructured("mlp/kernel", (10, 10))]
    allocate = ByRule({"head/*": 0.5, "**": 0.9}, whole=0.8)
    assert allocate(layers, 0.8) == {"head/kernel": 50, "mlp/kernel": 10}
    assert allocate(layers, 0.4) == {"head/kernel": 75, "mlp/kernel": 55}
    assert allocate(layers, 0.0) == {"head/kernel": 100, "mlp/kernel": 100}


BLOCKS = [Layer("a", (8, 8), 16), Layer("b", (8, 8), 8)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (lambda f=f: f(BLOCKS, 0.5), r"units of different sizes \(a: 4, b: 8\)")
            for f in (ERK, Global, OWL({"a": 0.1, "b": 0.2}))
        ),
        (lambda: Global([Layer("a", (2**31,), 2**31)], 0.5), "counts are int32"),
        (lambda: OWL({"a": 0.1})(BLOCKS[1:], 0.5), "OWL has no ratio for b"),
        (lambda: OWL({"a": 0.1, "x": 1})(BLOCKS[:1], 0.5), "OWL has ratios for x"),
        (lambda: OWL({"a": [0.1, 0.2]})(BLOCKS[:1], 0.5), "OWL's ratio for a is"),
        (lambda: OWL({"a": np.nan})(BLOCKS[:1], 0.5), "one finite number is expected"),
        (lambda: OWL({}, lam=-0.1), "lam is -0.1; it is from 0 to 0.5"),
        (lambda: ByRule({"a": 1.0}, 0.8), r"rule 'a' has 1.0; a sparsity is in \[0, 1\)"),
        (lambda: ByRule({"a": 0.5}, 0.8)(BLOCKS, 0.8), "allocate has no sparsity for b"),
        (lambda: ByRule({"c": 0.5}, 0.8)(BLOCKS, 0.8), "rule 0, 'c', matched none of 2"),
        (lambda: ByRule({"**": 0.9}, 0.5)(BLOCKS, 0.9), "at sparsity 0.9 of 0.5, the rules"),
    ],
)
def test_errors_say_the_way_out(make, message):
    with pytest.raises(ValueError, match=message):
        make()
