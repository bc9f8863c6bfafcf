"""Laws of residual connections: shares add up to one, and split and add are adjoint."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from unitscale_jax import unit

ORACLE = json.loads((pathlib.Path(__file__).parents[1] / "data" / "unit_scaling.json").read_text())
positive = st.floats(0.05, 8)


@pytest.mark.parametrize("case", ORACLE["residual_tau"], ids=lambda case: str(case["taus"][:1]))
def test_taus_are_those_of_the_published_library(case):
    found = unit.taus(
        case["residual_layers"],
        mult=case["residual_mult"],
        attention_ratio=case["residual_attn_ratio"],
    )
    np.testing.assert_allclose(found, case["taus"], rtol=1e-12)


@pytest.mark.parametrize("case", ORACLE["residual"], ids=lambda case: f"tau {case['tau']}")
def test_factors_are_those_of_the_published_library(case):
    with jax.enable_x64(True):
        x = jnp.arange(1.0, 4.0)
        _, pull = jax.vjp(lambda x: unit.residual_split(x, case["tau"]), x)
        for k, name in enumerate(("residual", "skip")):
            cts = [x if i == k else jnp.zeros(3) for i in range(2)]
            np.testing.assert_allclose(pull(tuple(cts))[0], x * case["split_bwd"][name], rtol=1e-12)
            y, pull_add = jax.vjp(lambda b, s: unit.residual_add(b, s, case["tau"]), *cts)
            np.testing.assert_allclose(y, x * case["add_fwd"][name], rtol=1e-12)
            np.testing.assert_array_equal(pull_add(x)[k], x)


def shares(taus):
    """Squared shares of the embedding and of each branch in the last sum."""
    found = [1.0]
    for tau in taus:
        whole = 1 + tau**2
        found = [share / whole for share in found] + [tau**2 / whole]
    return np.array(found)


@given(st.integers(1, 12), positive, positive)
def test_shares_add_up_and_layers_count_equally(pairs, mult, ratio):
    found = shares(unit.taus(2 * pairs, mult=mult, attention_ratio=ratio))
    embedding, attention, mlp = found[0], found[1::2], found[2::2]
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(attention, attention[0], rtol=1e-9)
    np.testing.assert_allclose(mlp, mlp[0], rtol=1e-9)
    np.testing.assert_allclose(attention.sum() / mlp.sum(), ratio**2, rtol=1e-9)
    np.testing.assert_allclose(found[1:].sum() / (2 * embedding), mult**2, rtol=1e-9)


def test_worked_examples_of_taus():
    np.testing.assert_allclose(np.square(unit.taus(4)), [1 / 2, 1 / 3, 1 / 4, 1 / 5], rtol=1e-12)
    np.testing.assert_allclose(shares(unit.taus(4)), [1 / 3, *[1 / 6] * 4], rtol=1e-12)
    found = unit.taus(4, mult=0.75, attention_ratio=2.0)
    np.testing.assert_allclose(found, [0.6708204, 0.2785430, 0.5366563, 0.2364331], rtol=1e-6)
    want = [0.4705882, 0.2117647, 0.0529412, 0.2117647, 0.0529412]
    np.testing.assert_allclose(shares(found), want, rtol=1e-6)


@given(positive)
def test_split_and_add_are_adjoint(tau):
    with jax.enable_x64(True):
        a, b, x = jnp.float64(0.3), jnp.float64(-1.7), jnp.float64(2.1)
        added = unit.residual_add(a, b, tau) * x
        pulled = jax.vjp(lambda x: unit.residual_split(x, tau), x)[1]
        back = [pulled(ct)[0] for ct in ((x, 0 * x), (0 * x, x))]
        np.testing.assert_allclose(a * back[0] + b * back[1], added, rtol=1e-12)


def test_a_vanishing_branch_leaves_the_skip():
    y = unit.residual_add(jnp.float32(5.0), jnp.float32(2.0), 1e-12)
    assert y == 2 and jax.grad(lambda x: unit.residual_split(x, 1e-12)[1])(1.0) == 1


def test_tau_may_be_data_of_a_scan_over_layers():
    taus = unit.taus(3)
    kernels = jax.random.normal(jax.random.key(0), (3, 8, 8))

    def layer(x, kernel, tau):
        branch, skip = unit.residual_split(x, tau)
        return unit.residual_add(unit.linear(branch, kernel), skip, tau)

    def loop(kernels, x):
        for kernel, tau in zip(kernels, taus, strict=True):
            x = layer(x, kernel, tau)
        return (x**2).sum()

    def scan(kernels, x):
        step = lambda x, at: (layer(x, *at), None)
        return (jax.lax.scan(step, x, (kernels, jnp.array(taus)))[0] ** 2).sum()

    x = jax.random.normal(jax.random.key(1), (4, 8))
    for a, b in zip(*(jax.grad(fn)(kernels, x) for fn in (loop, scan)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_bad_weight_or_number_is_told():
    with pytest.raises(ValueError, match="tau is -1"):
        unit.residual_add(1.0, 1.0, -1)
    with pytest.raises(ValueError, match="expected at least 1"):
        unit.taus(0)
    assert math.isclose(unit.taus(1)[0], (1 / 0.5) ** 0.5, rel_tol=1e-12)
