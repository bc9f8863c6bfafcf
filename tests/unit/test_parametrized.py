"""Laws of optimizers whose rates follow roles: decay, symmetry, Muon, and wrappers around them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unitscale_jax as us
from unitscale_jax import prune
from unitscale_jax.unit import Role, multipliers, parametrized, roles

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

ADAM = optax.scale_by_adam()
EXACT = optax.scale_by_adam(eps=0.0)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def trained(tx, params, grad, steps):
    """Parameters after some steps; `grad(params, step)`."""

    def step(carry, t):
        params, state = carry
        updates, state = tx.update(grad(params, t), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[0][0]


# ------------------------------------------------------------------------- one step, by hand


def test_a_step_by_hand(float64):
    table = {"w": Role("weight", 64, 64), "b": Role("bias", 1, 64)}
    schedule = lambda t: jnp.where(t == 0, 1.0, 0.5)
    tx = parametrized(EXACT, table, 0.5, weight_decay=0.01, schedule=schedule)
    params, grads = {"w": jnp.array(1.0), "b": jnp.array(0.0)}, {"w": 3.0, "b": -2.0}
    grads = jax.tree.map(jnp.float64, grads)
    state = tx.init(params)
    first, state = tx.update(grads, state, params)
    assert float(first["w"]) == pytest.approx(-0.0725, abs=1e-15)
    assert float(optax.apply_updates(params, first)["b"]) == pytest.approx(0.5, abs=1e-15)
    second, state = tx.update(grads, state, params)
    assert float(second["w"]) == pytest.approx(-0.03625, abs=1e-15)
    assert int(state.count) == 2
    # The page's bias starts at 1, so that decay takes 0.01 of the 0.5.
    updates, _ = tx.update(grads, tx.init(params), {"w": jnp.array(1.0), "b": jnp.array(1.0)})
    assert float(updates["b"]) == pytest.approx(0.49, abs=1e-15)


ROLES = {
    "table": Role("embedding", 9, 16, 1),
    "in": Role("input", 3, 16),
    "w": Role("weight", 16, 16, 4),
    "out": Role("output", 16, 5),
    "b": Role("bias", 1, 16, 4),
    "g": Role("norm", 1, 16, 4),
}
SHAPES = {"table": (9, 16), "in": (3, 16), "w": (4, 16, 16), "out": (16, 5), "b": (4, 16)}
SHAPES |= {"g": (4, 16)}
PARAMS = {name: normal(*shape, seed=k) for k, (name, shape) in enumerate(SHAPES.items())}
GRADS = {name: normal(*shape, seed=k + 9) for k, (name, shape) in enumerate(SHAPES.items())}
OPTIMIZERS = [("adam", ADAM), ("adam", optax.scale_by_lion()), ("sgd", optax.identity())]


@pytest.mark.parametrize("parametrization", ["umup", "mus", "mup", "standard"])
@pytest.mark.parametrize(("optimizer", "base"), OPTIMIZERS, ids=["adam", "lion", "sgd"])
def test_a_step_is_the_base_step_times_the_multiplier(optimizer, base, parametrization):
    tx = parametrized(base, ROLES, 0.25, optimizer=optimizer, parametrization=parametrization)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    directions, _ = base.update(GRADS, base.init(PARAMS), PARAMS)
    for name, role in ROLES.items():
        rate = multipliers(role, parametrization, optimizer).rate
        chex.assert_trees_all_close(updates[name], -0.25 * rate * directions[name], rtol=1e-6)


def test_a_constrained_readout_reaches_the_rates_of_sgd():
    tx = parametrized(
        optax.identity(), ROLES, 1.0, optimizer="sgd", readout_constraint="to_output_scale"
    )
    updates, _ = tx.update(GRADS, tx.init(PARAMS))
    chex.assert_trees_all_close(updates["w"], -GRADS["w"] * (16**0.5 / 2), rtol=1e-6)


# ------------------------------------------------------------------------- weight decay


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "muon"])
def test_without_gradients_every_parameter_shrinks_by_the_same_factor(optimizer, float64):
    base = optax.identity() if optimizer == "sgd" else ADAM
    tx = parametrized(
        base, ROLES, 0.7, optimizer=optimizer, weight_decay=0.03, schedule=lambda t: 0.5
    )
    params = {name: jnp.full(shape, 1.7, jnp.float64) for name, shape in SHAPES.items()}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    values = {float(x) for leaf in jax.tree.leaves(updates) for x in np.ravel(leaf)}
    assert values == {-0.5 * (0.03 * 1.7)}  # to the bit


def test_decay_is_independent_of_the_learning_rate_and_adamw_is_not():
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    decayed = lambda tx: tx.update(zeros, tx.init(PARAMS), PARAMS)[0]["w"]
    slow, fast = (decayed(parametrized(ADAM, ROLES, lr, weight_decay=0.1)) for lr in (0.1, 1.0))
    chex.assert_trees_all_equal(slow, fast)
    slow, fast = (decayed(optax.adamw(lr, weight_decay=0.1)) for lr in (0.1, 1.0))
    chex.assert_trees_all_close(10 * slow, fast, rtol=1e-5)


def test_decay_asks_for_parameters_and_without_it_none_are_needed():
    tx = parametrized(optax.identity(), ROLES, 1.0, optimizer="sgd", weight_decay=0.1)
    with pytest.raises(ValueError, match=r"`params` is None. Call update\(grads, state, params\)"):
        tx.update(GRADS, tx.init(PARAMS))
    parametrized(optax.identity(), ROLES, 1.0).update(GRADS, tx.init(PARAMS))


# ------------------------------------------------------------------------- symmetry of forms

WIDTH, ROWS = 32, 7


def network(form, params, x):
    forward = {k: multipliers(r, form).forward for k, r in NETWORK.items()}
    h = params["table"][x] * forward["table"]
    for name in ("w1", "w2"):
        h = jnp.tanh(h @ params[name] * forward[name])
    return h @ params["out"] * forward["out"]


# Rates of embeddings differ between the forms: of width 1 they do not.
NETWORK = {"table": Role("embedding", 11, 1), "out": Role("output", WIDTH, 5)}
NETWORK |= {name: Role("weight", WIDTH, WIDTH) for name in ("w1", "w2")}


def logits_of(form, steps, optimizer=EXACT):
    """Logits of all tokens after some steps, from one draw of N(0, 1)."""
    shapes = {"table": (11, WIDTH), "w1": (WIDTH, WIDTH), "w2": (WIDTH, WIDTH), "out": (WIDTH, 5)}
    params = {
        name: normal(*shape, seed=k, dtype=np.float64) * multipliers(NETWORK[name], form).init
        for k, (name, shape) in enumerate(shapes.items())
    }
    ids = jnp.arange(11)
    targets = normal(11, 5, seed=8, dtype=np.float64)
    loss = lambda p: jnp.square(network(form, p, ids) - targets).mean()
    tx = parametrized(optimizer, NETWORK, 2.0**-5, parametrization=form)
    after = trained(tx, params, lambda p, _: jax.grad(loss)(p), steps)
    return network(form, after, ids)


def test_forms_of_one_parametrization_train_alike_for_ten_steps(float64):
    ours, theirs = logits_of("umup", 10), logits_of("mup", 10)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert np.abs(ours - logits_of("umup", 0)).max() > 0.1  # and they do train
    assert np.abs(ours - logits_of("standard", 10)).max() > 1e-3


def test_an_epsilon_breaks_the_symmetry(float64):
    large = optax.scale_by_adam(eps=1e-3)
    ours, theirs = (logits_of(form, 10, large) for form in ("umup", "mup"))
    assert np.abs(ours - theirs).max() > 1e-6


# ------------------------------------------------------------------------- Muon


def muon(table, lr=1.0, **options):
    return parametrized(ADAM, table, lr, optimizer="muon", **options)


def rms(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


def muon_sizes(widths, aspect):
    sizes = []
    for width in widths:
        grads = {"w": normal(width, aspect * width)}
        tx = muon({"w": Role("weight", width, aspect * width)})
        sizes.append(rms(tx.update(grads, tx.init(grads))[0]["w"]))
    return sizes


def test_the_rms_of_an_update_of_muon_is_flat_in_width():
    widths = (32, 64, 128, 256)
    slope = np.polyfit(np.log(widths), np.log(muon_sizes(widths, 1)), 1)[0]
    assert abs(slope) < 0.02


@pytest.mark.parametrize("aspect", [1, 2, 4])
def test_the_rms_of_an_update_of_muon_is_that_of_adam_for_any_shape(aspect):
    """Five steps of Newton and Schulz leave singular values between 0.7 and 1.2."""
    sizes = np.array(muon_sizes((32, 128), aspect))
    assert (sizes > 0.7 * 0.2).all() and (sizes < 1.2 * 0.2).all()


VIEWS = {  # shape, role, and how it is a matrix, or a stack of them
    "queries": ((8, 2, 6), Role("weight", 8, 12), lambda x: x.reshape(8, 12)),
    "outputs": ((2, 6, 8), Role("weight", 12, 8), lambda x: x.reshape(12, 8)),
    "stacked": ((3, 8, 12), Role("weight", 8, 12), lambda x: x),
    "stacked queries": ((3, 8, 2, 6), Role("weight", 8, 12), lambda x: x.reshape(3, 8, 12)),
    "out first": ((12, 8), Role("weight", 8, 12), lambda x: x.T),
    "convolution": ((3, 3, 4, 6), Role("weight", 36, 6), lambda x: x.reshape(36, 6)),
    "experts": ((5, 8, 12), Role("weight", 8, 60), lambda x: x.swapaxes(0, 1).reshape(8, 60)),
    "as many layers as inputs": ((8, 8, 12), Role("weight", 8, 12), lambda x: x),
}


@pytest.mark.parametrize("view", VIEWS)
def test_muon_takes_each_kernel_for_the_matrix_that_its_role_says(view):
    shape, role, matrix = VIEWS[view]
    x = normal(*shape)
    tx = muon({"w": role})
    updates, _ = tx.update({"w": x}, tx.init({"w": x}))
    plain = optax.contrib.muon(1.0, consistent_rms=0.2)
    alone = lambda m: plain.update({"w": m}, plain.init({"w": m}), {"w": m})[0]["w"]
    wanted = jnp.stack([alone(m) for m in matrix(x)]) if matrix(x).ndim == 3 else alone(matrix(x))
    chex.assert_trees_all_close(matrix(updates["w"]), wanted, rtol=1e-4, atol=1e-5)


def test_muon_leaves_all_other_roles_and_vectors_to_the_base():
    table = ROLES | {"v": Role("weight", 16, 1), "w": Role("weight", 16, 16, 4)}
    params, grads = (tree | {"v": normal(16, seed=30)} for tree in (PARAMS, GRADS))
    with_muon, with_adam = (
        tx.update(grads, tx.init(params))[0] for tx in (muon(table), parametrized(ADAM, table, 1.0))
    )
    differ = [k for k in table if not np.allclose(with_muon[k], with_adam[k], rtol=1e-6)]
    assert differ == ["w"]
    assert rms(with_muon["w"]) == pytest.approx(0.2 / 2, rel=0.2)  # depth 4


def test_scales_that_are_trained_beside_a_matrix_go_to_the_base():
    role, w = Role("weight", 8, 12), {"w": normal(8, 12)}
    params = us.quant.learned(w, {"w": us.DotSpec(w=us.QSpec(axes=(-2,)))})
    grads = jax.tree.map(lambda x: normal(*x.shape, seed=5), params)
    with_muon, with_adam = (
        tx.update(grads, tx.init(params))[0]["w"]
        for tx in (muon({"w": role}), parametrized(ADAM, {"w": role}, 1.0))
    )
    chex.assert_trees_all_close(with_muon.scale, with_adam.scale, rtol=1e-6)
    assert rms(with_muon.master) == pytest.approx(0.2, rel=0.2)


def test_a_shape_without_such_a_matrix_is_an_error_that_names_the_leaf():
    with pytest.raises(ValueError, match=r"^w has shape \(4, 6\), of which no axes.*fan-in 8"):
        muon({"w": Role("weight", 8, 3)}).update(
            {"w": normal(4, 6)}, muon({"w": Role("weight", 8, 3)}).init({"w": normal(4, 6)})
        )


# ------------------------------------------------------------------------- inside of wrappers

TASK = {"w": normal(6, 8), "b": normal(8, seed=1), "out": normal(8, 3, seed=2)}
BATCH = (normal(16, 6, seed=3), normal(16, 3, seed=4))


def loss(p, batch):
    x, y = batch
    out = us.unit.readout(jnp.tanh(us.unit.linear(x, p["w"], p["b"])), p["out"])
    return us.Mean(jnp.square(out - y).sum(-1), jnp.ones(len(x)))


def task_tx(optimizer="adam"):
    found = roles(loss, TASK, BATCH, rules={"w": Role("weight", 6, 8)})
    return parametrized(
        ADAM,
        found,
        0.1,
        optimizer=optimizer,
        weight_decay=0.01,
        schedule=optax.linear_schedule(1.0, 0.5, 8),
    )


def gradient(p, _=0):
    return us.value_and_grad(loss)(p, BATCH)[2]


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_masks_around_it_leave_exact_zeros_and_clear_moments(optimizer):
    spec = prune.SparsitySpec(patterns={"w": prune.Unstructured()}, sparsity=0.5)
    tx = us.pruned(task_tx(optimizer), spec)
    after = trained(tx, TASK, gradient, 4)
    assert int((after["w"] == 0).sum()) == 24 and (after["out"] != 0).all()


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_windows_and_a_loss_scale_around_it_change_no_step(optimizer):
    plain = trained(task_tx(optimizer), TASK, gradient, 3)
    windows = trained(us.multi_steps(task_tx(optimizer), 2), TASK, gradient, 6)
    scaled_tx = us.loss_scaled(task_tx(optimizer), us.StaticScale(8.0))
    scaled = trained(scaled_tx, TASK, lambda p, t: jax.tree.map(lambda g: 8 * g, gradient(p)), 3)
    chex.assert_trees_all_close(windows, plain, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(scaled, plain, rtol=1e-4, atol=1e-5)


def test_all_wrappers_at_once_skip_a_step_and_leave_its_count():
    spec = prune.SparsitySpec(patterns={"w": prune.Unstructured()}, sparsity=0.5)
    tx = us.loss_scaled(us.multi_steps(us.pruned(task_tx(), spec), 2), us.DynamicScale())
    state = tx.init(TASK)
    bad = jax.tree.map(lambda g: g * jnp.nan, gradient(TASK))
    updates, state = jax.jit(tx.update)(bad, state, TASK)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert int(state.skipped) == 1 and int(state.inner.inner.inner.count) == 0


def test_devices_that_hold_parts_of_the_parameters_take_the_same_step():
    """ZeRO: the rates are those of the whole, whatever part a device updates."""
    mesh = us.parallel.mesh(dp=2, devices=jax.devices()[:2])
    place = us.parallel.layout(TASK, {"w": {0: "dp"}}, mesh)
    tx = task_tx()
    sharded = us.parallel.sharded(tx, place, place.over("dp"))
    want, _ = tx.update(gradient(TASK), tx.init(TASK), TASK)
    with jax.set_mesh(mesh):
        params, grads = (us.parallel.shard(x, place) for x in (TASK, gradient(TASK)))
        got, _ = jax.jit(sharded.update)(grads, sharded.init(params), params)
    chex.assert_trees_all_close(jax.device_get(got), jax.device_get(want), rtol=1e-5, atol=1e-7)


def test_parameters_in_bfloat16_keep_their_masters():
    tx = us.low_precision_weights(task_tx(), "kahan")
    params = us.tree.astype(TASK, "bfloat16")
    after = trained(tx, params, lambda p, _: us.tree.astype(gradient(TASK), "bfloat16"), 3)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(after))


def test_rates_that_are_data_are_those_that_are_numbers():
    tx = lambda lr, decay: parametrized(ADAM, ROLES, lr, weight_decay=decay)
    one = tx(0.25, 0.125).update(GRADS, tx(0.25, 0.125).init(PARAMS), PARAMS)[0]
    two = jax.jit(
        lambda lr, decay: tx(lr, decay).update(GRADS, tx(lr, decay).init(PARAMS), PARAMS)[0]
    )(jnp.float32(0.25), jnp.float32(0.125))
    chex.assert_trees_all_close(one, two, rtol=1e-6, atol=1e-7)  # two terms may cancel


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_updates_have_the_wider_dtype_of_direction_and_parameter(dtype):
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        wide = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
        tx = parametrized(optax.identity(), ROLES, 0.1, optimizer="sgd", weight_decay=0.1)
        updates, _ = tx.update(GRADS, tx.init(wide), wide)
        want = "float64" if dtype == "float64" else "float32"
        assert {str(u.dtype) for u in jax.tree.leaves(updates)} == {want}


def test_extra_arguments_reach_the_base():
    seen = []

    def update(updates, state, params=None, *, value):
        seen.append(value)
        return updates, state

    base = optax.GradientTransformationExtraArgs(lambda _: (), update)
    tx = parametrized(base, ROLES, 1.0)
    tx.update(GRADS, tx.init(PARAMS), value=3.0)
    assert seen == [3.0]


def test_it_trains_quantized_and_frameworks_parameters_by_their_names():
    from flax import nnx

    apply, params, _ = us.from_nnx(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    x = normal(5, 3)
    found = roles(apply, params, x)
    tx = parametrized(ADAM, found, 0.1)
    grads = jax.grad(lambda p: apply(p, x).sum())(params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


# ------------------------------------------------------------------------- errors

DOWN = [optax.adam(1e-3), optax.sgd(0.1), optax.adamw(1e-3), optax.lion(1e-3)]
UP = [ADAM, optax.identity(), optax.trace(0.9), optax.scale_by_lion(), optax.clip(1.0)]
UP += [optax.chain(optax.clip_by_global_norm(1.0), ADAM), optax.masked(ADAM, {"v": True})]


@pytest.mark.parametrize("base", DOWN)
def test_a_base_with_a_learning_rate_of_its_own_is_refused(base):
    with pytest.raises(ValueError, match=r"base takes steps down already.*scale_by_adam\(\)"):
        parametrized(base, ROLES, 0.1)


@pytest.mark.parametrize("base", UP)
def test_directions_are_taken_also_while_a_program_is_traced(base):
    parametrized(base, ROLES, 0.1)
    jax.jit(lambda x: (parametrized(base, ROLES, 0.1), x)[1])(1.0)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match=r"base is 0.1; expected a transform of gradients"):
        parametrized(0.1, ROLES, 0.1)
    with pytest.raises(TypeError, match=r"learning_rate is .*; expected the peak of it"):
        parametrized(ADAM, ROLES, optax.constant_schedule(0.1))
    with pytest.raises(TypeError, match=r"the role of 'w' is 'weight'; expected a us.unit.Role"):
        parametrized(ADAM, {"w": "weight"}, 0.1)
    with pytest.raises(ValueError, match="no optimizer 'adamw'; closest: 'adam'"):
        parametrized(ADAM, ROLES, 0.1, optimizer="adamw")
    with pytest.raises(ValueError, match=r"no role of a parameter 'tabel'; closest: 'table'"):
        parametrized(ADAM, ROLES, 0.1).init({"tabel": jnp.ones(2)})
    with pytest.raises(TypeError, match="the state of parametrized is"):
        parametrized(ADAM, ROLES, 0.1).update(GRADS, ADAM.init(PARAMS))


def test_it_is_traced_once():
    tx, traces = task_tx(), []

    @jax.jit
    def step(params, state):
        traces.append(0)
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    functools.reduce(lambda carry, _: step(*carry), range(3), (TASK, tx.init(TASK)))
    assert len(traces) == 1
