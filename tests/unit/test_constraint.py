"""Laws of constraints: each is the number of the published library, and names are functions."""

import json
import pathlib

import pytest

from unitscale_jax import unit

ORACLE = json.loads((pathlib.Path(__file__).parents[1] / "data" / "unit_scaling.json").read_text())


@pytest.mark.parametrize("case", ORACLE["constraints"], ids=lambda case: case["constraint"])
def test_constraints_are_those_of_the_published_library(case):
    found = unit.CONSTRAINTS[case["constraint"]](*case["scales"])
    assert found == pytest.approx(case["result"], rel=1e-12)


@pytest.mark.parametrize("name", ["gmean", "hmean", "amean"])
def test_means_of_equal_factors_are_that_factor(name):
    assert unit.CONSTRAINTS[name](0.3, 0.3, 0.3) == pytest.approx(0.3, rel=1e-14)
