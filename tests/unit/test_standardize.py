"""An init of any scale becomes unit, and what is zero stays and is named."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unitscale_jax as us
from tests.support import zoo
from unitscale_jax.unit import Role, roles, standardize

KINDS = ("embedding", "input", "weight", "output", "bias", "norm")
ROLES = {kind: Role(kind, 4, 8) for kind in KINDS}
VECTORS = {"bias", "norm"}


def params_of(dtype="float32"):
    noise = lambda k: jax.random.normal(jax.random.key(k), (4, 8)) * 0.02 + 0.01
    return {kind: noise(k).astype(dtype) for k, kind in enumerate(KINDS)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_kernels_and_tables_have_rms_1_and_vectors_stay(dtype):
    with jax.enable_x64(dtype == "float64"):
        params = params_of(dtype)
        start = standardize(params, ROLES)
        chex.assert_trees_all_equal_shapes_and_dtypes(start, params)
        eps = float(jnp.finfo(dtype).eps)
        for kind in KINDS:
            if kind in VECTORS:
                assert np.array_equal(start[kind], params[kind])
                continue
            wide = np.asarray(start[kind], np.float64)
            assert abs(np.sqrt(np.mean(wide**2)) - 1) < 4 * eps
            ratio = wide / np.asarray(params[kind], np.float64)  # one factor for all of a leaf
            assert np.ptp(ratio) <= 4 * eps * ratio.mean()


def test_once_more_changes_nothing_but_rounding():
    start = standardize(params_of(), ROLES)
    chex.assert_trees_all_close(standardize(start, ROLES), start, rtol=1e-6)


def test_zeros_stay_and_are_named():
    params = params_of() | {"output": jnp.zeros((4, 8)), "bias": jnp.zeros((4, 8))}
    with pytest.warns(UserWarning, match=r"^output is zero everywhere and stay so"):
        start = standardize(params, ROLES)
    assert not start["output"].any() and not start["bias"].any()
    with pytest.warns(UserWarning, match=r"^input, output are zero everywhere"):
        standardize(params | {"input": jnp.zeros((4, 8))}, ROLES)


def test_traced_parameters_are_divided_likewise_and_zeros_do_no_harm():
    params = params_of() | {"output": jnp.zeros((4, 8))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start = jax.jit(lambda p: standardize(p, ROLES))(params)
    assert not start["output"].any()
    with pytest.warns(UserWarning, match="output"):
        chex.assert_trees_all_close(start, standardize(params, ROLES), rtol=1e-6)


@pytest.mark.parametrize("name", ["linen_transformer", "nnx_scan_remat", "plain_cnn"])
def test_models_of_each_framework(name):
    model = zoo.model(name)
    found = roles(model.apply, model.params, *model.inputs)
    start = us.tree.named_leaves(standardize(model.params, found))
    for leaf, role in us.tree.named_leaves(found).items():
        rms = float(jnp.sqrt(jnp.mean(jnp.square(start[leaf]))))
        assert role.kind in VECTORS or rms == pytest.approx(1, rel=1e-5)


def test_roles_of_other_parameters_are_an_error():
    with pytest.raises(ValueError, match="the tree of roles has no leaf 'w'"):
        standardize({"w": jnp.ones(2)}, {"v": Role("weight", 1, 2)})
    with pytest.raises(TypeError, match=r"the role of 'w' is 'weight'; expected a us.unit.Role"):
        standardize({"w": jnp.ones(2)}, {"w": "weight"})


def test_small_numbers_of_16_bits_are_squared_in_more():
    start = standardize(jnp.full((4, 4), 1e-4, jnp.float16), Role("weight", 4, 4))
    np.testing.assert_allclose(np.asarray(start, np.float64), 1, rtol=2e-3)
