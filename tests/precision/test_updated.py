"""Laws of a step whose parts travel together."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import unitscale_jax as us

ROWS, STEPS = 8, 6
DYNAMIC = us.DynamicScale(init=2.0**10, interval=2)
INNER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.125, momentum=0.5))
PARAMS = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)}
DATA = jnp.asarray(np.random.default_rng(1).normal(size=(STEPS, ROWS, 3)), jnp.float32)


def loss(params, batch, *, state, key=None):
    """A network that keeps a running mean, as batch normalization does; `key` changes nothing."""
    hidden = (batch.astype(jnp.float16) @ params["w"].astype(jnp.float16)).astype(jnp.float32)
    noise = 0.0 if key is None else 0.0 * jax.vmap(jax.random.uniform)(key)
    new = {"mean": 0.5 * state["mean"] + 0.5 * jnp.mean(hidden)}
    return us.Mean(jnp.sum((hidden - 1) ** 2, -1) + noise, jnp.ones(len(batch))), {"state": new}


GRAD = us.value_and_grad(loss)
LAST = {"state/**": "last"}
START = {"mean": jnp.float32(0.25)}
overflow = lambda batch: batch * 1e6


def train(step, tx, data=DATA, **extra):
    """Parameters, optimizer state and model state after all of the data, in a scan."""

    def body(carry, batch):
        params, opt_state, state = carry
        params, opt_state, terms, aux = step(params, opt_state, batch, state=state, **extra)
        return (params, opt_state, aux["state"]), us.loss_value(terms)

    return jax.lax.scan(body, (PARAMS, tx.init(PARAMS), START), data)


def assert_same_bits(ours, theirs):
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@functools.cache
def trained(make, grad_fn=GRAD):
    tx = make(INNER)
    return jax.jit(functools.partial(train, us.updated(grad_fn, tx), tx))()


plain = lambda tx: tx
scaled = lambda tx: us.loss_scaled(tx, DYNAMIC)
windows = lambda tx: us.multi_steps(tx, 2)
outside = lambda tx: scaled(windows(tx))
inside = lambda tx: windows(scaled(tx))
PARTS = us.accumulated(GRAD, 4, reduce=LAST)
DROPS = us.accumulated(GRAD, 4, reduce=LAST, nonfinite="drop")


@pytest.mark.parametrize("grad_fn", [GRAD, PARTS, DROPS], ids=["whole", "parts", "drops"])
def test_with_a_scale_it_is_the_step_without_where_nothing_overflows(grad_fn):
    (params, opt_state, state), losses = trained(scaled, grad_fn)
    (want, _, want_state), want_losses = trained(plain, grad_fn)
    assert opt_state.skipped == 0 and us.current_scale(opt_state) > 2.0**10
    assert_same_bits((params, state, losses), (want, want_state, want_losses))


@pytest.mark.parametrize("make", [outside, inside], ids=["outside", "inside"])
def test_around_windows_and_inside_of_them_it_is_the_step_without_a_scale(make):
    (params, _, state), losses = trained(make)
    (want, _, want_state), want_losses = trained(windows)
    assert_same_bits((params, state, losses), (want, want_state, want_losses))


def test_it_is_the_loop_by_hand():
    tx, params, state = scaled(INNER), PARAMS, START
    opt_state = tx.init(PARAMS)
    for batch in DATA:
        scale = us.current_scale(opt_state)
        _, aux, grads = GRAD(params, batch, state=state, scale=scale)
        updates, opt_state = tx.update(grads, opt_state, params)
        params, state = optax.apply_updates(params, updates), aux["state"]
    chex.assert_trees_all_close((params, opt_state, state), trained(scaled)[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "grad_fn"),
    [
        (scaled, GRAD),
        (scaled, PARTS),
        (scaled, DROPS),
        (outside, GRAD),
        (inside, GRAD),
        (windows, GRAD),
    ],
    ids=["scaled", "parts", "drops", "outside", "inside", "windows"],
)
def test_a_skipped_step_leaves_parameters_optimizer_and_model_state(make, grad_fn):
    tx = make(INNER)
    step, carry = jax.jit(us.updated(grad_fn, tx)), (PARAMS, tx.init(PARAMS))
    params, opt_state, _, aux = step(*carry, overflow(DATA[0]), state=START)
    assert_same_bits((params, aux["state"]), (PARAMS, START))
    if make is not inside:  # whose loss scale is inside of the window
        assert_same_bits(opt_state.inner, tx.init(PARAMS).inner)
    if make is not windows:
        scale = us.current_scale(opt_state)
        assert scale == (2.0**10 if make is inside else 2.0**9)
    *_, aux = step(params, opt_state, DATA[1], state=START)
    assert aux["state"]["mean"] != START["mean"], "the next good step keeps its state"


@pytest.mark.parametrize("make", [scaled, outside, inside])
def test_a_run_with_an_overflow_recovers_with_a_model_state_that_is_finite(make):
    data = DATA.at[1].set(overflow(DATA[1]))
    tx = make(INNER)
    (params, _, state), _ = train(us.updated(GRAD, tx), tx, data)
    assert us.tree.is_finite((params, state))


def test_of_dropped_parts_the_state_is_that_of_the_last_good_one():
    """And if none is good, what it was before; also where the bad part is the last."""
    for bad in ([], [1], [3], [0, 3], [2, 3], [0, 1, 2, 3]):
        rows = np.isin(np.arange(ROWS) % 4, bad)[:, None]
        batch = jnp.where(rows, overflow(DATA[0]), DATA[0])
        *_, aux = us.updated(DROPS, scaled(INNER))(
            PARAMS, scaled(INNER).init(PARAMS), batch, state=START
        )
        want = START["mean"]
        for k in sorted({0, 1, 2, 3} - set(bad)):
            want = loss(PARAMS, DATA[0][k::4], state={"mean": want})[1]["state"]["mean"]
        np.testing.assert_allclose(aux["state"]["mean"], want, rtol=1e-6)
        np.testing.assert_allclose(
            DROPS(PARAMS, batch, state=START)[1]["state"]["mean"], want, rtol=1e-6
        )


def two_devices():
    return us.parallel.mesh(dp=2, devices=jax.devices()[:2])


@pytest.mark.parametrize("check_vma", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("make", [plain, scaled, outside, inside], ids=["no", "yes", "out", "in"])
def test_in_a_shard_map_it_is_the_step_outside(make, check_vma):
    across = functools.partial(us.loss_scaled, spec=DYNAMIC, mesh_axis=("dp",))
    around = {plain: plain, scaled: across, outside: lambda tx: across(windows(tx))}
    around[inside] = lambda tx: windows(across(tx))
    tx = around[make](INNER)

    def without_state(params, batch):
        return loss(params, batch, state=START)[0]

    def run(grad_fn, tx, data):
        step = us.updated(grad_fn, tx)

        def body(carry, batch):
            params, opt_state, _, _ = step(*carry, batch)
            return (params, opt_state), None

        return jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), data)[0][0]

    data = DATA.at[2, -1].set(overflow(DATA[2, -1])) if make is not plain else DATA
    grad_fn = us.value_and_grad(without_state)
    local = functools.partial(run, us.accumulated(grad_fn, 2, mesh_axis=("dp",)), tx)
    mapped = jax.shard_map(
        local, mesh=two_devices(), in_specs=P(None, "dp"), out_specs=P(), check_vma=check_vma
    )
    want = run(us.accumulated(grad_fn, 2), make(INNER), data)
    chex.assert_trees_all_close(jax.jit(mapped)(data), want, atol=1e-3)


def test_around_a_reduction_it_is_the_step_of_one_device():
    grad_fn = us.value_and_grad(lambda p, batch: loss(p, batch, state=START)[0])
    tx = scaled(INNER)
    with jax.set_mesh(two_devices()):
        step = jax.jit(us.updated(us.parallel.reduced(us.accumulated(grad_fn, 2), "dp"), tx))
        params, opt_state, _, _ = step(PARAMS, tx.init(PARAMS), DATA[0])
    want, state, _, _ = us.updated(grad_fn, tx)(PARAMS, tx.init(PARAMS), DATA[0])
    chex.assert_trees_all_close((params, opt_state), (want, state), atol=1e-3)


def test_keys_rows_that_count_and_what_the_optimizer_takes_are_handed_on():
    tx = us.multi_steps(optax.sgd(1.0), 2)
    step, valid = us.updated(GRAD, tx), jnp.arange(ROWS) < 4
    ours = step(
        PARAMS,
        tx.init(PARAMS),
        DATA[0],
        state=START,
        key=jax.random.key(0),
        valid=valid,
        flush=True,
    )
    grads = GRAD(PARAMS, DATA[0], state=START, key=jax.random.key(0), valid=valid)[2]
    chex.assert_trees_all_close(ours[0]["w"], PARAMS["w"] - grads["w"], rtol=1e-6)


def test_weights_of_sixteen_bits_land_on_the_new_ones():
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = scaled(us.low_precision_weights(INNER, "kahan"))
    step = jax.jit(us.updated(GRAD, tx))
    params, opt_state, *_ = step(low, tx.init(low), DATA[0], state=START)
    assert params["w"].dtype == jnp.bfloat16 and opt_state.applied
    same, *_ = step(low, tx.init(low), overflow(DATA[0]), state=START)
    assert_same_bits(same, low)


def test_an_auxiliary_output_with_the_structure_of_the_state_is_the_state():
    bare = us.value_and_grad(
        lambda p, b, *, state: (lambda t, aux: (t, aux["state"]))(*loss(p, b, state=state))
    )
    tx = scaled(INNER)
    *_, aux = us.updated(bare, tx)(PARAMS, tx.init(PARAMS), overflow(DATA[0]), state=START)
    assert_same_bits(aux, START)


# --------------------------------------------------------------------- loops written by hand


@pytest.mark.parametrize("power", [-4, 0, 7, 12])
def test_unscaled_is_bit_equal_to_the_gradient_without_a_scale(power):
    tx = us.loss_scaled(INNER, us.StaticScale(2.0**power))
    state = tx.init(PARAMS)
    grads = GRAD(PARAMS, DATA[0], state=START, scale=us.current_scale(state))[2]
    assert_same_bits(us.unscaled(grads, state), GRAD(PARAMS, DATA[0], state=START)[2])


def test_unless_skipped_tells_by_the_state_after_the_step():
    new, old = jnp.float32(2), jnp.float32(1)
    tx = scaled(INNER)
    for batch, want in ((DATA[0], 2), (overflow(DATA[0]), 1)):
        grads = GRAD(PARAMS, batch, state=START, scale=2.0**10)[2]
        state = tx.update(grads, tx.init(PARAMS), PARAMS)[1]
        assert us.unless_skipped(state, new, old) == want
        assert us.unless_skipped({"opt": (state, 3)}, new, old) == want
    assert us.unless_skipped(INNER.init(PARAMS), new, old) == 2  # nothing ever skips


def test_a_window_that_is_skipped_does_not_hold_the_state_of_the_next():
    tx = inside(INNER)
    opt_state, seen = tx.init(PARAMS), []
    for batch in (overflow(DATA[0]), overflow(DATA[1]), DATA[2], overflow(DATA[3]), DATA[4]):
        grads = GRAD(PARAMS, batch, state=START, scale=us.current_scale(opt_state))[2]
        opt_state = tx.update(grads, opt_state, PARAMS)[1]
        seen.append(int(us.unless_skipped(opt_state, jnp.int32(1), jnp.int32(0))))
    assert seen == [0, 0, 1, 0, 1]


# --------------------------------------------------------------------- what is refused


def test_clipping_of_scaled_gradients_is_refused():
    tx = optax.chain(optax.clip_by_global_norm(1.0), us.loss_scaled(optax.sgd(1.0), DYNAMIC))
    state = tx.init(PARAMS)
    grads = GRAD(PARAMS, DATA[0], state=START)[2]
    for do in (
        lambda: us.updated(GRAD, tx)(PARAMS, state, DATA[0], state=START),
        lambda: us.current_scale(state),
        lambda: us.unscaled(grads, state),
    ):
        with pytest.raises(ValueError, match=r"opt_state\[1\].*loss_scaled\(optax.chain"):
            do()


@pytest.mark.parametrize("kind", ["last", "mean", "max"])
@pytest.mark.parametrize("make", [plain, scaled])
def test_a_model_state_that_no_part_made_is_the_one_before(kind, make):
    grad_fn = us.accumulated(GRAD, 2, nonfinite="drop", reduce={"state/**": kind})
    tx = make(INNER)
    step = jax.jit(us.updated(grad_fn, tx))
    _, _, terms, aux = step(PARAMS, tx.init(PARAMS), overflow(DATA[0]), state=START)
    assert terms["dropped"].total == 2
    assert_same_bits(aux["state"], START)


def test_the_accumulation_of_optax_is_an_optimizer():
    tx = optax.MultiSteps(INNER, 2)
    step, state = us.updated(GRAD, tx), tx.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):  # which optax counts on in there
        still, state, *_ = step(PARAMS, state, DATA[0], state=START)
        moved, *_ = step(still, state, DATA[1], state=START)
    assert_same_bits(still, PARAMS)
    assert not np.array_equal(moved["w"], PARAMS["w"])


def test_what_is_no_gradient_station_or_no_optimizer_is_refused():
    with pytest.raises(TypeError, match="grad_fn is .*expected a us.Grad"):
        us.updated(jax.value_and_grad(lambda p: 0.0), INNER)
    with pytest.raises(TypeError, match="what updated goes around is .*expected an optimizer"):
        us.updated(GRAD, INNER.init(PARAMS))


def test_a_state_that_changes_its_structure_is_named():
    tx = scaled(INNER)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="'var' is nothing, and before it was float32"):
        us.unless_skipped(state, {"mean": jnp.ones(2)}, {"mean": jnp.ones(2), "var": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"'mean' is float16\(2,\), and .* float32\(2,\)"):
        us.unless_skipped(state, {"mean": jnp.ones(2, jnp.float16)}, {"mean": jnp.ones(2)})
