"""Laws of optimizer state that follows its parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unitscale_jax as us
from unitscale_jax.compaction import (
    compact,
    compacted,
    follow,
    groups,
    plan_of,
    zero_channels,
)
from unitscale_jax.prune import (
    Cubic,
    SparsitySpec,
    Unstructured,
    masks_of,
    pruned,
)

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


def mlp(p, x):
    h = jax.nn.relu(x @ p["a"] + p["b"])
    return jax.nn.relu(h @ p["square"]) @ p["d"]


def drawn(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"a": (6, 8), "b": (8,), "square": (8, 8), "d": (8, 3)}  # an (8, 8) that is ambiguous
    return {name: jnp.asarray(0.4 * rng.normal(size=s), dtype) for name, s in shapes.items()}


X = jnp.asarray(np.random.default_rng(9).normal(size=(5, 6)), jnp.float32)
PLAN = plan_of(groups(mlp, drawn(), X), {"a:1": [0, 2, 5], "d:0": [1, 2, 3, 6]})
FACTORED = optax.adafactor(0.01, min_dim_size_to_factor=2, momentum=0.9)
HALF = SparsitySpec(patterns=Unstructured(), sparsity=0.5)

OPTIMIZERS = {
    "momentum and average": optax.chain(optax.sgd(0.1, momentum=0.9), optax.ema(0.9)),
    "lion": optax.lion(0.01),
    "lamb": optax.lamb(0.01),
    "adafactor": FACTORED,
    "muon": optax.contrib.muon(0.01),
    "schedule free": optax.contrib.schedule_free_adamw(0.01),
    "inject": optax.inject_hyperparams(optax.adamw)(learning_rate=0.01),
    "optax.MultiSteps": optax.MultiSteps(optax.adam(0.01), 2),
    "us.multi_steps": us.multi_steps(optax.adamw(0.01), 2),
    "us.loss_scaled": us.loss_scaled(optax.adam(0.01), us.DynamicScale(interval=2)),
    "partition": optax.partition(
        {0: optax.adam(0.01), 1: optax.sgd(0.1, momentum=0.9)},
        {"a": 0, "b": 1, "square": 0, "d": 1},
    ),
    "masked": pruned(optax.adam(0.01), HALF, Cubic(0, 2)),
}
# A factored moment is over the two largest axes: others, for the smaller shape.
RESET = {"adafactor": ("0/v_row/a", "0/v_col/a")}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_is_the_state_of_the_smaller_model_with_what_was_learned(name):
    """C8: shapes are those of `init`, every array that is one number per weight is cut alike."""
    tx, params = OPTIMIZERS[name], drawn()
    state = jax.tree.map(lambda x: x + jnp.ones_like(x), tx.init(params))
    found, reset = follow(state, PLAN, params, tx)
    wanted = jax.eval_shape(tx.init, compact(params, PLAN))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, wanted)
    assert reset == RESET.get(name, ())
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True)
    assert all(np.array_equal(old, new) for old, new in pairs if not np.ndim(old))


def test_moments_are_cut_along_the_axis_they_belong_to():
    """Also of a kernel with as many rows as columns, where shapes do not say which is which."""
    tx, params, moments = optax.adam(0.1), drawn(), drawn(1)
    state = tx.init(params)
    (found, _), _ = follow((state[0]._replace(mu=moments), state[1]), PLAN, params, tx)
    chex.assert_trees_all_equal(found.mu, compact(moments, PLAN))


@pytest.mark.parametrize("name", ["momentum", "clipped adamw"])
def test_training_goes_on_as_that_of_the_masked_model(name):
    """In float64: in float32 a momentum at a large rate drifts by rounding alone."""
    tx = {
        "momentum": optax.sgd(0.1, momentum=0.9),
        "clipped adamw": optax.chain(
            optax.clip_by_global_norm(0.1), optax.adamw(0.01, weight_decay=0.1)
        ),
    }[name]
    with jax.enable_x64(True):
        x, params = X.astype(np.float64), drawn(0, np.float64)

        def steps(fn, params, state, still):
            def step(carry, _):
                params, state = carry
                grads = jax.grad(lambda p: jnp.mean((fn(p, x) - 1) ** 2))(params)
                updates, state = tx.update(still(grads), state, params)
                return (still(optax.apply_updates(params, updates)), state), None

            return jax.lax.scan(step, (params, state), None, length=10)[0]

        @jax.jit
        def both(params):
            learned, state = steps(mlp, params, tx.init(params), lambda t: t)
            few, small = follow(state, PLAN, learned, tx).state, compact(learned, PLAN)
            zeroed = zero_channels(learned, PLAN)
            alike = optax.tree_utils.tree_map_params(
                tx, lambda m, k: jnp.where(k, m, 0), state, MASKS
            )
            long = steps(mlp, zeroed, alike, lambda t: zero_channels(t, PLAN))[0]
            return compact(long, PLAN), steps(compacted(mlp, PLAN), small, few, lambda t: t)[0]

        want, got = both(params)
    chex.assert_trees_all_close(got, want, rtol=1e-12, atol=1e-12)


MASKS = us.compaction.channel_masks(drawn(), PLAN)


def test_masks_of_single_weights_survive_the_loss_of_channels():
    """Masked training, then compaction, then masked training of what is left."""
    tx, params = pruned(optax.sgd(0.1, momentum=0.9), HALF), drawn()

    def step(fn, params, state):
        grads = jax.grad(lambda p: jnp.mean((fn(p, X) - 1) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, static_argnums=0)
    params, state = step(mlp, params, tx.init(params))
    small, few = compact(params, PLAN), follow(state, PLAN, params, tx).state
    before = masks_of(few)
    chex.assert_trees_all_equal(
        before["square"], masks_of(state)["square"][np.ix_([0, 2, 5], [1, 2, 3, 6])]
    )
    small, few = step(compacted(mlp, PLAN), small, few)
    chex.assert_trees_all_equal(masks_of(few), before)
    assert not any(np.any(small[name][~before[name]]) for name in ("a", "square", "d"))


def test_the_state_of_another_optimizer_is_refused():
    params = drawn()
    with pytest.raises(ValueError, match="state has the structure.*Pass the optimizer"):
        follow(optax.sgd(0.1).init(params), PLAN, params, optax.adam(0.1))
    with pytest.raises(ValueError, match="a has shape"):
        follow(optax.sgd(0.1).init(params), PLAN, compact(params, PLAN), optax.sgd(0.1))
