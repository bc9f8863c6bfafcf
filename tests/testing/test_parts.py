"""The checks for users find what they say they find."""

import jax.numpy as jnp
import pytest

import unitscale_jax as us
from unitscale_jax.testing import check_inplace, check_parts

PARAMS = {"w": jnp.arange(1.0, 4.0), "b": jnp.float32(0.5)}
BATCH = {"x": jnp.sin(jnp.arange(24.0)).reshape(8, 3), "m": jnp.array([1.0, 1, 0, 1, 1, 1, 0, 1])}


def fit(params, batch):
    out = jnp.tanh(batch["x"] @ params["w"]) + params["b"]
    return us.Mean(batch["m"] * out**2, batch["m"])


def contrastive(params, batch):
    """In-batch negatives: every row is compared with every other, so parts cannot agree."""
    out = batch["x"] * params["w"] + params["b"]
    return us.Mean(jnp.sum(jnp.tanh(out @ out.T)), jnp.float32(8))


def mean_of_means(params, batch):
    """A masked mean returned as a scalar, the classical error."""
    term = fit(params, batch)
    return term.total.sum() / term.weight.sum()


def test_a_sum_over_rows_passes():
    check_parts(us.value_and_grad(fit), PARAMS, BATCH, parts=(1, 2, 3, 8))


@pytest.mark.parametrize("check", [check_parts, check_inplace])
def test_outputs_and_masks_are_told_as_to_an_accumulation(check):
    def loss(params, batch):  # sums its rows itself, so that three parts of eight rows need a mask
        term = fit(params, batch)
        return us.Mean(term.total.sum(), term.weight.sum()), {"total": term.total}

    parts = {"parts": (3,) if check is check_parts else 3}
    reduce = {"total": "concat"}
    check(us.value_and_grad(loss), PARAMS, BATCH, reduce=reduce, mask=["m"], **parts)
    with pytest.raises(ValueError, match=r"Add reduce=\(\('total', kind\),\)"):
        check(us.value_and_grad(loss), PARAMS, BATCH)
    with pytest.raises(ValueError, match=r"name in `mask` the batch leaves"):
        check(us.value_and_grad(loss), PARAMS, BATCH, reduce=reduce, **parts)


@pytest.mark.parametrize("loss", [contrastive, mean_of_means])
def test_what_is_not_a_sum_over_rows_is_found(loss):
    with pytest.raises(AssertionError, match=r"2 parts give another gradient.*\n  \w+: largest"):
        check_parts(us.value_and_grad(loss), PARAMS, BATCH)


def test_the_message_names_each_leaf_that_differs_and_no_other():
    loss = lambda p, b: us.Mean(p["b"] + jnp.sum(p["w"]) * jnp.std(b["x"]), jnp.float32(8))
    with pytest.raises(AssertionError) as error:
        check_parts(us.value_and_grad(lambda p, b: _per_row(loss, p, b)), PARAMS, BATCH)
    assert "w: largest difference" in str(error.value) and "b: largest" not in str(error.value)


def _per_row(loss, params, batch):
    term = loss(params, batch)
    return us.Mean(jnp.broadcast_to(term.total, batch["m"].shape), jnp.ones_like(batch["m"]))


def test_nan_is_never_close():
    loss = lambda p, b: us.Mean(b["x"][:, 0] * p["b"] * jnp.nan, b["m"])
    with pytest.raises(AssertionError, match="b: largest difference nan"):
        check_parts(us.value_and_grad(loss), PARAMS, BATCH)


def test_in_place_equals_the_plain_form():
    check_inplace(us.value_and_grad(fit), PARAMS, BATCH, parts=4)


def test_a_wrong_in_place_gradient_is_found(monkeypatch):
    from unitscale_jax.accumulate import _inplace

    monkeypatch.setattr(_inplace, "contents", lambda refs: {k: 2 * r[...] for k, r in refs.items()})
    with pytest.raises(AssertionError, match="w: .*ratio of norms 2"):
        check_inplace(us.value_and_grad(fit), PARAMS, BATCH, parts=4)
