"""Laws of masks that move, of dense weights behind masks, and of movement."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unitscale_jax as us
from unitscale_jax.prune import (
    ERK,
    SET,
    Block,
    Channel,
    Global,
    Linear,
    NofM,
    OneShot,
    SparsitySpec,
    Unstructured,
    apply_masks,
    magnitude,
    magnitude_masks,
    masked_straight_through,
    masks_of,
    rigl,
    sr_ste,
)
from unitscale_jax.prune._rigl import moving_share

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

EVERY_OTHER = Linear(0, 6, every=2)
HALF = SparsitySpec(patterns=Unstructured(), sparsity=0.5)


def draw(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (8, 6), "bias": (6,), "stack": (3, 4, 5)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def run(tx, params, steps=8):
    step = jax.jit(tx.update)
    state, out = tx.init(params), []
    params = apply_masks(params, masks_of(state))
    for t in range(steps):
        updates, state = step(draw(t + 1), state, params)
        params = optax.apply_updates(params, updates)
        out.append((params, state))
    return out


def mask_bytes(masks):
    return np.asarray(masks["kernel"]).tobytes()


# ------------------------------------------------------------------- RigL and SET


@pytest.mark.parametrize(
    ("method", "pattern", "allocate", "stacked"),
    [
        (rigl, Unstructured(), ERK, {}),
        (rigl, Unstructured(), us.prune.uniform, {"stack": 1}),
        (rigl, {"kernel": Block((2, 2))}, us.prune.uniform, {}),
        (rigl, {"kernel": Channel(0)}, us.prune.uniform, {}),
        (SET, Unstructured(), Global, {}),
        (SET, {"kernel": Channel(0)}, us.prune.uniform, {}),
    ],
)
def test_the_number_of_weights_is_constant(method, pattern, allocate, stacked):
    spec = SparsitySpec(patterns=pattern, sparsity=0.6, allocate=allocate, stacked=stacked)
    tx = method(optax.adam(0.1), spec, EVERY_OTHER, drop=1.0)
    start = masks_of(tx.init(draw(0)))
    first, seen = sum(int(m.sum()) for m in jax.tree.leaves(start) if m.ndim), {mask_bytes(start)}
    for params, state in run(tx, draw(0)):
        masks = masks_of(state)
        assert sum(int(m.sum()) for m in jax.tree.leaves(masks) if m.ndim) == first
        assert not any(np.any(params[n][~m]) for n, m in masks.items() if m.ndim)
        moments = state.inner[0].mu
        assert not any(np.any(moments[n][~m]) for n, m in masks.items() if m.ndim)
        seen.add(mask_bytes(masks))
    assert len(seen) > 1, "masks never moved"


def test_worked_example_7():
    shares = [moving_share(t, 0.3, 1000) for t in (0, 250, 500, 750, 1000)]
    assert [int(1000 * f + 1e-9) for f in shares] == [300, 256, 150, 43, 0]
    params = {"w": jnp.array([0.5, -0.1, 0.3, 0.2, 0, 0, 0, 0])}
    grads = {"w": jnp.array([0, 9.0, 0, 0, 1, -3, 2, 0.5])}
    spec = SparsitySpec(patterns={"w": Unstructured()}, sparsity=0.5)
    tx = rigl(optax.adam(0.1), spec, OneShot(1), drop=0.5, end=10**6, score=magnitude())
    step, state = jax.jit(tx.update), tx.init(params)
    updates, state = step(grads, state, params)
    params = optax.apply_updates(params, updates)
    before = state.inner[0]
    params = {"w": jnp.array([0.5, -0.1, 0.3, 0.2, 0, 0, 0, 0])}
    updates, state = step(grads, state, params)
    after = optax.apply_updates(params, updates)["w"]
    # 0 and 2 stay; 1 was dropped and regrown, with its value and its moments; 5 is new, at zero.
    assert masks_of(state)["w"].astype(int).tolist() == [1, 1, 1, 0, 0, 1, 0, 0]
    np.testing.assert_array_equal(after, jnp.array([0.5, -0.1, 0.3, 0, 0, 0, 0, 0]))
    assert state.inner[0].count == before.count, "the optimizer takes no step"
    assert state.inner[0].mu["w"][1] == before.mu["w"][1] != 0
    assert state.inner[0].mu["w"][5] == 0 == state.inner[0].mu["w"][3]


def test_errors_of_moving_masks_say_the_way_out():
    with pytest.raises(ValueError, match=r"drop is 1.5.*\[0, 1\]"):
        rigl(optax.sgd(0.1), HALF, EVERY_OTHER, drop=1.5)
    with pytest.raises(ValueError, match="end is 0"):
        SET(optax.sgd(0.1), HALF, EVERY_OTHER, end=0)
    spec = SparsitySpec(patterns={"kernel": NofM(2, 4, axis=0)})
    with pytest.raises(ValueError, match="kernel has NofM.*straight_through"):
        rigl(optax.sgd(0.1), spec, EVERY_OTHER).init(draw(0))
    spec = SparsitySpec(patterns={"kernel": us.prune.Balanced(parts=2, axis=0)})
    with pytest.raises(ValueError, match="kernel has Balanced.*equally full"):
        rigl(optax.sgd(0.1), spec, EVERY_OTHER).init(draw(0))


# ------------------------------------------------------------------- straight through


def apply(params, x):
    return jnp.tanh(x @ params["kernel"] + params["bias"])


def loss(params, x):
    return jnp.sum(apply(params, x) ** 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("pattern", [Unstructured(), NofM(2, 4, axis=0)])
def test_the_forward_pass_is_the_baked_one_and_all_weights_get_its_gradient(pattern, dtype):
    spec = SparsitySpec(patterns={"kernel": pattern}, sparsity=0.5)
    params, x = draw(0, dtype), jnp.asarray(np.random.default_rng(9).normal(size=(5, 8)), dtype)
    baked = apply_masks(params, magnitude_masks(params, spec))
    through = masked_straight_through(apply, spec)
    chex.assert_trees_all_equal(jax.jit(through)(params, x), jax.jit(apply)(baked, x))
    got = jax.jit(jax.grad(masked_straight_through(loss, spec)))(params, x)
    chex.assert_trees_all_close(got, jax.jit(jax.grad(loss))(baked, x), rtol=1e-5)
    assert np.all(got["kernel"] != 0) and got["kernel"].dtype == dtype


def test_sr_ste_decays_what_is_pruned_and_nothing_else():
    params, grads = draw(0), draw(1)
    tx = sr_ste(optax.sgd(1.0), HALF, decay=0.25)
    updates, _ = tx.update(grads, tx.init(params), params)
    masks = magnitude_masks(params, HALF)
    pull = lambda m, g, w: -(g + (0.25 * w * ~m if m.ndim else 0))
    chex.assert_trees_all_close(updates, jax.tree.map(pull, masks, grads, params), rtol=1e-6)
    with pytest.raises(ValueError, match="pass them"):
        tx.update(grads, tx.init(params))
    with pytest.raises(ValueError, match="decay is -1"):
        sr_ste(optax.sgd(1.0), HALF, decay=-1)


# ------------------------------------------------------------------- movement
