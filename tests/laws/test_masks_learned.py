"""Laws of masks over parameters with learned scales: the array is masked, scales are not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unitscale_jax as us
from tests.quant.test_quantized import assert_same_bits, normal
from unitscale_jax import DotSpec, QSpec, compaction, prune

W, X = normal(6, 4, seed=1), normal(5, 6)
FLOATS = {"w": W, "b": normal(4, seed=2)}
RULES = {"w": DotSpec(w=QSpec(format="int4", axes=(-2,)))}
SPEC = prune.SparsitySpec(patterns={"w": prune.Unstructured()}, sparsity=0.5)
PATTERNS = {
    "unstructured": SPEC,
    "every matrix": prune.SparsitySpec(patterns=prune.Unstructured(), sparsity=0.5),
    "n of m": prune.SparsitySpec(patterns={"w": prune.NofM(1, 2, axis=0)}),
    "global": prune.SparsitySpec(
        patterns={"w": prune.Unstructured()}, sparsity=0.5, allocate=prune.Global
    ),
}
SCORES = {"magnitude": prune.magnitude(), "fisher": prune.fisher(), "random": prune.random(0)}


def learned():
    return us.quant.learned(FLOATS, RULES)


def latents(params):
    return {"w": params["w"].master, "b": params["b"]}


def loss(params, x):
    return jnp.square(us.quantized(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]))(params, x)).sum()


@pytest.mark.parametrize("kind", PATTERNS)
def test_masks_are_those_of_the_array(kind):
    params, spec = learned(), PATTERNS[kind]
    masks = prune.make_masks(prune.magnitude().value((), None, params, 0), spec)
    assert_same_bits(masks, prune.make_masks(prune.magnitude().value((), None, FLOATS, 0), spec))
    assert_same_bits(masks, prune.magnitude_masks(params, spec))
    pruned = prune.apply_masks(params, masks)
    assert_same_bits(latents(pruned), prune.apply_masks(FLOATS, masks))
    assert_same_bits(pruned["w"].scale, params["w"].scale)
    assert prune.report(params, masks).masked.sparsity == 0.5


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_training_leaves_zeros_and_clears_their_moments(score):
    """The same masks as of the float array with the same gradients, whatever scales do."""
    params, tx = learned(), prune.pruned(optax.adam(0.1), SPEC, prune.OneShot(1), score)
    plain = latents(params)

    @jax.jit
    def step(params, state, plain, plain_state):
        grads = jax.grad(loss)(params, X)
        updates, state = tx.update(grads, state, params)
        own = {"w": grads["w"].master, "b": grads["b"]}
        plain_updates, plain_state = tx.update(own, plain_state, plain)
        moved = optax.apply_updates(params, updates), optax.apply_updates(plain, plain_updates)
        return moved[0], state, moved[1], plain_state

    state, plain_state = tx.init(params), tx.init(plain)
    for _ in range(4):
        with jax.numpy_dtype_promotion("standard"):
            params, state, plain, plain_state = step(params, state, plain, plain_state)
    mask = prune.masks_of(state)["w"]
    assert mask.sum() == W.size // 2
    assert_same_bits(prune.masks_of(state), prune.masks_of(plain_state))
    assert_same_bits(latents(params), plain)
    moments = state.inner[0].mu["w"]
    assert not np.any(np.where(mask, 0, moments.master)) and np.all(moments.scale != 0)
    assert not np.any(np.where(mask, 0, us.quantize(params)["w"].codes))  # zeros stay zeros
    assert np.all(params["w"].scale != learned()["w"].scale)


@pytest.mark.parametrize("make", [prune.rigl, prune.SET])
def test_masks_that_move_have_the_same_number_of_ones(make):
    params, tx = learned(), make(optax.sgd(0.1), SPEC, prune.OneShot(0), end=10)
    state = tx.init(params)
    updates, state = tx.update(jax.grad(loss)(params, X), state, params)
    params = optax.apply_updates(params, updates)
    mask = prune.masks_of(state)["w"]
    assert mask.sum() == W.size // 2
    assert not np.any(np.where(mask, 0, params["w"].master))


def test_dense_arrays_behind_a_sparse_pass_keep_their_scales():
    params = learned()
    masks = prune.magnitude_masks(params, SPEC)
    through = prune.masked_straight_through(loss, SPEC)
    baked = prune.apply_masks(params, masks)
    assert_same_bits(through(params, X), loss(baked, X))
    assert_same_bits(jax.grad(through)(params, X), jax.grad(loss)(baked, X))
    tx = prune.sr_ste(optax.sgd(1.0), SPEC, decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    pulled = jnp.where(masks["w"], 0, -0.5 * params["w"].master)
    np.testing.assert_array_equal(updates["w"].master, pulled)
    assert not np.any(updates["w"].scale)


def test_state_follows_a_compaction():
    params = {"up": normal(6, 8, seed=3), "down": normal(8, 4, seed=4)}
    mlp = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    plan = compaction.plan_of(compaction.groups(mlp, params, X), {"down:0": [0, 3, 5]})
    given = us.quant.learned(params, {"*": DotSpec(w=QSpec(axes=(-2,)))})
    tx = optax.adam(0.1)
    grads = jax.tree.map(lambda x: x + 1, given)
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update(grads, tx.init(given), given)
        (moved, _), reset = compaction.follow(state, plan, given, tx)
        _, expected = tx.update(
            compaction.compact(grads, plan), tx.init(compaction.compact(given, plan)), given
        )
    assert not reset
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_codes_stay_refused():
    codes = us.quantize(FLOATS, RULES)
    with pytest.raises(ValueError, match="w is quantized; codes are not masked"):
        prune.pruned(optax.sgd(0.1), SPEC).init(codes)
    with pytest.raises(ValueError, match="w is quantized; codes are not masked"):
        prune.apply_masks(codes, {"w": jnp.ones((6, 4), bool), "b": jnp.array(True)})
