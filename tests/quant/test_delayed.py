"""Laws of delayed scaling: a ring of ranges, as a pytree that a training loop carries."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax

import unitscale_jax as us
from tests.quant.test_quantized import W8A8, assert_same_bits, normal
from unitscale_jax import DotSpec, QSpec
from unitscale_jax.statistics import Stat

E4M3, E5M2 = QSpec(format="e4m3fn"), QSpec(format="e5m2")
FP8 = DotSpec(w=E4M3, x=E4M3, g=E5M2)
ROWS, IN, OUT, LENGTH = 4, 12, 6, 3
PARAMS, X = {"w": normal(IN, OUT, seed=1) / 3}, normal(ROWS, IN)


def dot(params, x):
    return x @ params["w"]


def stat(low, high, rows=1, spec=W8A8.x):
    whole = lambda x: jnp.asarray(x, jnp.float32)
    return Stat(jnp.int32(rows), {"range": {"low": whole(low), "high": whole(high)}}, spec)


def measured(x, spec=W8A8, params=PARAMS):
    return us.statistics.observed(dot, {"w": spec})(params, x)[1]


# --------------------------------------------------------------------------------- the ring

STEPS = 7
pushed = jax.jit(
    lambda h, m: lax.scan(lambda h, m: ((h := h.update({"w": stat(-m, m)})),) * 2, h, m)
)


@given(m=hnp.arrays(np.float32, STEPS, elements=st.floats(0, 2.0**126, width=32)))
def test_the_range_is_the_largest_of_the_last_steps(m):
    first = us.quant.amax_history({"w": stat(-1, 1)}, LENGTH)
    after = pushed(first, m)[1]
    every = np.concatenate([[np.float32(1)], m])
    expected = [every[max(0, k + 2 - LENGTH) : k + 2].max() for k in range(STEPS)]
    ends = jax.vmap(lambda h: h["w"].range)(after)
    np.testing.assert_array_equal(ends, np.stack([-np.array(expected), expected], axis=-1))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_of_two_ends_is_kept_as_it_is(symmetric):
    spec = QSpec(symmetric=symmetric)
    history = us.quant.amax_history({"w": stat(-1, 3, spec=spec)}, 2)
    history = history.update({"w": stat(-2, 0.5, spec=spec)})
    assert history["w"].range.tolist() == ([-3, 3] if symmetric else [-2, 3])


@pytest.mark.parametrize(
    "odd", [stat(-1, np.inf), stat(np.nan, 1), stat(0, 0, rows=0)], ids=["inf", "nan", "no rows"]
)
def test_a_step_that_saw_nothing_finite_leaves_no_trace(odd):
    history = us.quant.amax_history({"w": stat(-1, 1)}, 2).update({"w": stat(-5, 5)})
    assert_same_bits(history.update({"w": odd}), history)


def test_stacked_layers_have_rings_of_their_own():
    stack = {"w": normal(3, IN, IN, seed=5)}
    rules = {"w": W8A8}
    layers = lambda p, x: lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, p["w"])[0]
    stats = us.statistics.observed(layers, rules)(stack, X)[1]
    history = us.quant.amax_history(stats, LENGTH)
    assert history["w"].lows.shape == (LENGTH, 3) and history["w"].range.shape == (3, 2)
    np.testing.assert_array_equal(history["w"].range, stats["w"].range)
    ends = stats["w"].numbers["range"]
    ends = ends | {"high": ends["high"].at[1].set(jnp.nan)}
    broken = {"w": replace(stats["w"], numbers={"range": ends})}
    grown = jax.tree.map(lambda x: 2 * x, broken)
    after = history.update(grown)["w"].range[:, 1] / stats["w"].range[:, 1]
    np.testing.assert_array_equal(after, [2, 1, 2])  # the second layer holds
    by_history = us.quantized(layers, rules, stats=history)(stack, X)
    assert_same_bits(by_history, us.quantized(layers, rules, stats=stats)(stack, X))


# --------------------------------------------------------------------------- in place of stats


@pytest.mark.parametrize("spec", [W8A8, FP8, DotSpec(w=QSpec(), x=QSpec(symmetric=False))], ids=str)
def test_training_with_a_history_is_serving_with_it(spec):
    rules = us.quant.resolve({"w": spec}, dot, PARAMS, X)
    history = us.quant.amax_history(measured(X / 2, spec), LENGTH).update(measured(X / 3, spec))
    codes = us.quantize(PARAMS, rules, history)
    served = jax.jit(us.quantized(dot))(codes, X)
    trained = jax.jit(lambda p, h, x: us.quantized(dot, rules, stats=h)(p, x))
    assert_same_bits(trained(PARAMS, history, X), served)
    np.testing.assert_array_equal(codes["w"].input_range, history["w"].range)


def test_with_a_history_of_one_batch_it_is_calibrated_on_that_batch():
    history = us.quant.amax_history(measured(10 * X), LENGTH)
    for _ in range(LENGTH):
        history = history.update(measured(X))
    by_stats = us.quantized(dot, {"w": W8A8}, stats=us.calibrate(dot, PARAMS, [X], {"w": W8A8}))
    assert_same_bits(us.quantized(dot, {"w": W8A8}, stats=history)(PARAMS, X), by_stats(PARAMS, X))


@pytest.mark.parametrize("spec", [W8A8, FP8, DotSpec(w=E4M3, x=E5M2)], ids=str)
def test_a_step_beyond_the_range_saturates(spec):
    """Its largest value is served as that of the range, and has no gradient; nothing is NaN."""
    history = us.quant.amax_history(measured(X, spec), LENGTH)
    run = lambda x: us.quantized(dot, {"w": spec}, stats=history)(PARAMS, x)
    most = float(history["w"].range[1])
    beyond = X.at[1, 2].set(1000 * most)
    at = X.at[1, 2].set(most)
    assert_same_bits(run(beyond), run(at))
    dx = jax.grad(lambda x: run(x).sum())(beyond)
    assert np.isfinite(dx).all() and dx[1, 2] == 0 and (np.delete(dx[1], 2) != 0).all()


def test_one_pass_serves_and_measures():
    """`observed` under `quantized` measures what meets the codes, by one product in 8 bits."""
    params = PARAMS | {"v": normal(OUT, OUT, seed=2)}
    rules = {"w": FP8, "v": FP8}
    two = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
    history = us.quant.amax_history(us.statistics.observed(two, rules)(params, X)[1], LENGTH)
    run = us.quantized(us.statistics.observed(two, rules), rules, stats=history)
    y, stats = jax.jit(run)(params, X)
    assert_same_bits(y, jax.jit(us.quantized(two, rules, stats=history))(params, X))
    hidden = jax.nn.relu(us.quantized(dot, {"w": FP8}, stats={"w": history["w"]})(PARAMS, X))
    np.testing.assert_allclose(stats["v"].range[1], hidden.max(), rtol=1e-6)
    products = us.explain(run)(params, X).products.rows
    assert [row.operands for row in products] == [("float8_e4m3fn",) * 2] * 2


def test_a_training_loop_in_8_bit_floats_learns():
    target, rules = normal(IN, OUT, seed=3), {"w": FP8}
    run = us.statistics.observed(dot, rules)

    def step(carry, x):
        params, history = carry

        def loss(p):
            y, stats = us.quantized(run, rules, stats=history)(p, x)
            return jnp.mean(jnp.square(y - x @ target)), stats

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda w, g: w - 0.5 * g, params, grads)
        return (params, history.update(stats)), value

    xs = normal(150, 16, IN, seed=4)
    start = PARAMS, us.quant.amax_history(run(PARAMS, xs[0])[1])
    (_, history), losses = jax.jit(lambda c: lax.scan(step, c, xs))(start)
    assert losses[-10:].mean() < 0.01 * losses[0]
    np.testing.assert_array_equal(history["w"].range[1], np.abs(xs[-16:]).max())


def test_a_history_goes_through_trees_and_checkpoints(tmp_path):
    history = us.quant.amax_history(measured(X), LENGTH)
    assert us.tree.names(history) == ["rings/w/lows", "rings/w/highs"]
    saved = us.Checkpoints(tmp_path)
    saved.save(1, history)
    restored = saved.restore(us.quant.amax_history(measured(2 * X), LENGTH))[1]
    assert_same_bits(restored, history)
    assert list(history) == ["w"] and len(history) == 1


# -------------------------------------------------------------------------------------- errors


def test_a_history_that_cannot_begin_says_why():
    with pytest.raises(ValueError, match="length=0"):
        us.quant.amax_history(measured(X), 0)
    with pytest.raises(ValueError, match=r"stats of \[\]"):
        us.quant.amax_history({})
    clipped = DotSpec(w=QSpec(), x=QSpec(calibrator=us.quant.EMA()))
    with pytest.raises(ValueError, match=r"meets w has EMA.*Absmax\(\)"):
        us.quant.amax_history(measured(X, clipped))
    with pytest.raises(ValueError, match="nothing finite met w"):
        us.quant.amax_history(measured(X.at[0, 0].set(jnp.inf)))


def test_stats_of_another_function_are_an_error():
    history = us.quant.amax_history(measured(X), LENGTH)
    with pytest.raises(ValueError, match="only one of the history and the stats has v"):
        history.update(measured(X) | {"v": measured(X)["w"]})
    with pytest.raises(ValueError, match=r"w has ranges of shape \(\) in the history.*\(2,\)"):
        history.update({"w": stat([-1, -1], [1, 1], rows=[1, 1])})
    with pytest.raises(ValueError, match="stats are of w, and there is no such parameter"):
        us.quantized(lambda p, x: x @ p["v"], {"v": W8A8}, stats=history)({"v": PARAMS["w"]}, X)
