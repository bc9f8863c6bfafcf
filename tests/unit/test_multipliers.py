"""Multipliers: the published learning rates, the written table, and what is symmetric in it."""

import itertools
import json
import math
import pathlib

import pytest

from unitscale_jax.unit import Multipliers, Role, multipliers

ORACLE = json.loads((pathlib.Path(__file__).parents[1] / "data" / "unit_scaling.json").read_text())
IN, OUT, DEPTH = 48, 80, 6  # fans and depth
ROLES = {kind: Role(kind, IN, OUT, DEPTH) for kind in ("embedding", "input", "weight", "output")}
ROLES |= {kind: Role(kind, 1, OUT, DEPTH) for kind in ("bias", "norm")}


def role_of(case):
    """A published case: shapes are (out, in, kernel), and what has no stack has no depth."""
    out, *rest = case["shape"]
    if case["mup_type"] in ("bias", "norm"):
        return Role(case["mup_type"], 1, out, case["depth"] or 1)
    fan_in = math.prod(rest) if rest else out
    return Role(case["mup_type"], fan_in, out if rest else 1, case["depth"] or 1)


@pytest.mark.parametrize("case", ORACLE["lr_scales"], ids=lambda c: f"{c['mup_type']}{c['shape']}")
def test_rates_are_those_of_the_published_library(case):
    role, close = role_of(case), lambda x: pytest.approx(x, rel=1e-12)
    assert multipliers(role).rate == close(case["adam"])
    assert multipliers(role, optimizer="sgd").rate == close(case["sgd_readout_none"])
    constrained = multipliers(role, optimizer="sgd", readout_constraint="to_output_scale")
    assert constrained.rate == close(case["sgd_readout_to_output_scale"])


def test_an_embedding_has_the_rate_of_the_published_weight_of_its_shape():
    """The library calls a table (rows, width) a weight, whose fan-in is then the width."""
    case = next(c for c in ORACLE["lr_scales"] if c["shape"] == [50257, 768] and c["depth"] == 4)
    role = Role("embedding", 50257, 768, 4)
    assert multipliers(role).rate == pytest.approx(case["adam"], rel=1e-12)
    sgd = multipliers(role, optimizer="sgd", readout_constraint="to_output_scale").rate
    assert sgd == pytest.approx(case["sgd_readout_to_output_scale"], rel=1e-12)


# forward, init, rate with Adam
TABLE = {
    "umup": {
        "embedding": (1, 1, (OUT * DEPTH) ** -0.5),
        "input": (IN**-0.5, 1, DEPTH**-0.5),
        "weight": (IN**-0.5, 1, (IN * DEPTH) ** -0.5),
        "output": (1 / IN, 1, DEPTH**-0.5),
        "bias": (1, 0, DEPTH**-0.5),
        "norm": (1, 1, DEPTH**-0.5),
    },
    "mus": {
        "embedding": (1, 1, 1),
        "input": (1, 1, 1),
        "weight": (IN**-0.5, 1, IN**-0.5),
        "output": (1 / IN, 1, 1),
        "bias": (1, 0, 1),
        "norm": (1, 1, 1),
    },
    "mup": {
        "embedding": (1, 1, 1),
        "input": (1, IN**-0.5, 1),
        "weight": (1, IN**-0.5, 1 / IN),
        "output": (1 / IN, 1, 1),
        "bias": (1, 0, 1),
        "norm": (1, 1, 1),
    },
    "standard": {
        "embedding": (1, 1, 1),
        "input": (1, IN**-0.5, 1),
        "weight": (1, IN**-0.5, 1),
        "output": (1, IN**-0.5, 1),
        "bias": (1, 0, 1),
        "norm": (1, 1, 1),
    },
}
SGD = {
    ("mup", "embedding"): OUT,
    ("mup", "input"): OUT,
    ("mup", "weight"): 1,
    ("mup", "output"): IN,
    ("mup", "bias"): OUT,
    ("mup", "norm"): OUT,
}
MUON = {("umup", "weight"): DEPTH**-0.5, ("mus", "weight"): 1, ("mup", "weight"): IN**-0.5}
EACH = list(itertools.product(TABLE, ROLES))


@pytest.mark.parametrize(("parametrization", "kind"), EACH)
def test_multipliers_are_those_of_the_table(parametrization, kind):
    wanted = TABLE[parametrization][kind]
    assert multipliers(ROLES[kind], parametrization) == pytest.approx(Multipliers(*wanted))


@pytest.mark.parametrize(("parametrization", "kind"), EACH)
def test_optimizers_differ_in_rates_alone(parametrization, kind):
    adam = multipliers(ROLES[kind], parametrization)
    for optimizer, table in (("sgd", SGD), ("muon", MUON)):
        found = multipliers(ROLES[kind], parametrization, optimizer)
        assert found[:2] == adam[:2]
        assert found.rate == pytest.approx(table.get((parametrization, kind), adam.rate))


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_constrained_readout_changes_no_rate_where_gradients_are_normalized(kind, optimizer):
    free, tied = (
        multipliers(ROLES[kind], "umup", optimizer, readout_constraint=c)
        for c in (None, "to_output_scale")
    )
    assert free == tied


def test_a_constrained_readout_makes_gradients_before_it_smaller_by_a_width():
    rate = lambda kind, c: multipliers(ROLES[kind], "umup", "sgd", readout_constraint=c).rate
    ratios = {k: rate(k, "to_output_scale") / rate(k, None) for k in ROLES}
    widths = {"weight": IN, "output": 1, "embedding": OUT, "input": OUT, "bias": OUT, "norm": OUT}
    assert ratios == pytest.approx(widths)


@pytest.mark.parametrize("kind", ["weight", "output", "bias", "norm"])
def test_mup_and_unit_scaled_mup_are_one_parametrization_in_two_forms(kind):
    """(A t, B / t, C / t) for the t of their forward factors, at depth 1."""
    role = Role(kind, IN, OUT)
    ours, theirs = multipliers(role, "umup"), multipliers(role, "mup")
    t = theirs.forward / ours.forward
    assert (ours.init / t, ours.rate / t) == pytest.approx((theirs.init, theirs.rate))


def test_muon_follows_its_forward_factor_likewise():
    role = Role("weight", IN, OUT)
    ours, theirs = (multipliers(role, form, "muon") for form in ("umup", "mup"))
    assert ours.rate / theirs.rate == pytest.approx(theirs.forward / ours.forward)


def test_unknown_names_are_errors_with_neighbours():
    role = ROLES["weight"]
    with pytest.raises(ValueError, match="no parametrization 'umpu'; closest: 'umup'"):
        multipliers(role, "umpu")
    with pytest.raises(ValueError, match="no optimizer 'adamw'; closest: 'adam'"):
        multipliers(role, optimizer="adamw")
    with pytest.raises(ValueError, match="'gmean'; expected None or 'to_output_scale'"):
        multipliers(role, readout_constraint="gmean")
    with pytest.raises(TypeError, match="role is 'weight'; expected a us.unit.Role"):
        multipliers("weight")
