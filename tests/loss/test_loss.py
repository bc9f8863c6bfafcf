"""Laws of the loss contract."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import unitscale_jax as us
from unitscale_jax.loss import keys_of_rows, weights_of

X, M = jnp.arange(1.0, 9.0), jnp.array([1.0, 1, 1, 1, 1, 0, 0, 0])
BATCH = {"x": X, "m": M}


def rows_of(w, batch):
    return us.Mean(batch["m"] * (batch["x"] * w) ** 2, batch["m"])


def total_of(w, batch):
    mean = rows_of(w, batch)
    return us.Mean(mean.total.sum(), mean.weight.sum())


def value_of(w, batch):
    return jnp.mean((batch["x"] * w) ** 2)


@pytest.mark.parametrize("loss", [rows_of, total_of])
def test_gradient_is_that_of_total_over_weight(loss):
    terms, aux, grads = us.value_and_grad(loss)(2.0, BATCH)
    assert (terms["loss"].value, grads, aux) == (44, 44, None)


def test_a_scalar_is_a_mean_over_rows():
    terms, _, grads = us.value_and_grad(value_of)(2.0, BATCH)
    assert (terms["loss"].total, terms["loss"].weight) == (8 * value_of(2.0, BATCH), 8)
    assert grads == jax.grad(value_of)(2.0, BATCH)


values = hnp.arrays(np.float32, 5, elements=st.floats(-4, 4, width=32))


@given(total=values, weight=hnp.arrays(np.float32, 5, elements=st.integers(-2, 3)))
def test_value_is_total_over_weight_and_zero_without_weight(total, weight):
    got = float(us.Mean(total, weight).value)
    want = total.sum() / weight.sum() if weight.sum() else 0.0
    assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_negative_weights_are_legal():
    loss = lambda w, b: us.Mean(jnp.sum(b["x"] * w), -4.0)
    assert us.value_and_grad(loss)(2.0, BATCH)[2] == -9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_are_float32_whatever_the_parameters(dtype):
    loss = lambda w, b: us.Mean(jnp.sum(b["x"] * w.astype(jnp.float32)), 8.0)
    assert us.value_and_grad(loss)(jnp.asarray(2, dtype), BATCH)[2].dtype == jnp.float32


def test_denominators_replace_the_weights_of_the_rows():
    grad_fn = us.value_and_grad(rows_of)
    grads = grad_fn(2.0, BATCH, denominators={"loss": jnp.float32(10)})[2]
    assert grads == 22
    with pytest.raises(ValueError, match=r"terms \['loss'\], `denominators` has \['ce'\]"):
        grad_fn(2.0, BATCH, denominators={"ce": jnp.float32(10)})


def test_rows_that_are_not_valid_do_not_count():
    valid = jnp.arange(8) < 2
    terms, _, grads = us.value_and_grad(rows_of)(2.0, BATCH, valid=valid)
    assert (terms["loss"].weight, grads) == (2, 10)


def test_a_scalar_cannot_leave_out_rows():
    with pytest.raises(ValueError, match="plain scalar, a mean over all 8 rows"):
        us.value_and_grad(value_of)(2.0, BATCH, valid=jnp.arange(8) < 2)


def test_state_and_keys_reach_the_loss_when_given():
    def loss(w, batch, *, state, key):
        noise = jax.vmap(jax.random.normal)(key)
        return us.Mean(w * noise + state, jnp.ones(8)), {"noise": noise}

    _, aux, grads = us.value_and_grad(loss)(2.0, BATCH, state=jnp.float32(1), key=jax.random.key(3))
    want = jax.vmap(jax.random.normal)(us.row_keys(jax.random.key(3), 8))
    assert np.array_equal(aux["noise"], want)
    assert float(grads) == pytest.approx(float(want.mean()), rel=1e-5)


def test_row_keys_are_passed_on_as_they_are():
    keys = us.row_keys(jax.random.key(3), 8)
    assert keys_of_rows(keys, 8) is keys
    with pytest.raises(ValueError, match=r"`key` has shape \(3,\); expected one key, or"):
        keys_of_rows(keys[:3], 8)


def test_weights_are_known_without_parameters():
    wrong = jnp.float32(jnp.nan)
    assert weights_of(rows_of, wrong, BATCH)["loss"] == 5


def test_a_mean_is_a_pytree_whose_identity_map_is_the_identity():
    mean = us.Mean(1.0, 2, coef=0.5)
    assert jax.tree.map(lambda x: x, mean) == mean
    assert [p for p in us.tree.names({"m": mean})] == ["m/total", "m/weight", "m/coef"]


def test_terms_come_back_without_coefficient_and_scale():
    loss = lambda w, b: us.Mean(jnp.sum(b["x"] * w), 8.0, coef=0.5)
    terms, _, grads = us.value_and_grad(loss)(2.0, BATCH, scale=4.0)
    assert (terms["loss"].total, terms["loss"].coef, grads) == (72, 0.5, 9)
    assert us.loss_value(terms) == 4.5


def test_jit_of_the_station_itself():
    grad_fn = us.value_and_grad(rows_of)
    chex.assert_trees_all_close(jax.jit(grad_fn)(2.0, BATCH), grad_fn(2.0, BATCH))


def stop(x):
    return jax.lax.stop_gradient(x)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            lambda w, b: us.Mean(b["x"] * w, 8.0),
            r"total of shape \(8,\) and a weight of shape \(\)",
        ),
        (lambda w, b: us.Mean(b["x"][:3] * w, jnp.ones(3)), r"one number per row, \(8,\)"),
        (lambda w, b: us.Mean(jnp.sum(b["x"] * w), 8.0, coef=b["x"]), "coef of shape"),
        (lambda w, b: us.Mean(jnp.sum(b["x"] * w), 8.0, coef=b["m"].sum()), "depends on the batch"),
        (lambda w, b: us.Mean(jnp.sum(b["x"]), 8.0, coef=w), "coef of term 'loss' depends on the"),
        (lambda w, b: us.Mean(jnp.sum(b["x"]), stop(w) + 8), "weight of term 'loss' depends on"),
        (lambda w, b: us.Mean(jnp.sum(b["x"] > w), 8.0), "has a int32 total|has an? int32 total"),
        (lambda w, b: {"ce": {"nested": b["x"] * w}}, "returned a dict for term 'ce'"),
        (lambda w, b: "text", "returned a str for term 'loss'; expected a us.Mean or a scalar"),
    ],
)
def test_what_breaks_the_contract_is_an_error(term, message):
    with pytest.raises(ValueError, match=message):
        us.value_and_grad(term)(2.0, BATCH)
