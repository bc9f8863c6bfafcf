"""Laws of gradient accumulation."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec as P

import unitscale_jax as us

EPS = np.finfo(np.float32).eps
ROWS, WIDTH = 12, 3
floats = functools.partial(hnp.arrays, np.float32, elements=st.floats(-4, 4, width=32))
integers = functools.partial(hnp.arrays, np.float32, elements=st.integers(-8, 8))
masks = functools.partial(hnp.arrays, np.float32, elements=st.sampled_from([0, 0, 1, 1, 1, 2]))


@st.composite
def problems(draw, elements=floats):
    """Parameters, and a batch with token weights and a second, differently weighted target."""
    batch = {
        "x": draw(elements((ROWS, WIDTH))),
        "y": draw(elements((ROWS,))),
        "m": draw(masks((ROWS,))),
        "s": draw(masks((ROWS,))),
    }
    return {"w": draw(elements((WIDTH,))), "b": draw(elements(()))}, batch


def predict(params, batch):
    return jnp.tanh(batch["x"] @ params["w"]) + params["b"]


def row_loss(params, batch):
    """Two terms in row form, of different denominators."""
    out = predict(params, batch)
    return {
        "fit": us.Mean(batch["m"] * (out - batch["y"]) ** 2, batch["m"]),
        "size": us.Mean(batch["s"] * out, batch["s"], coef=0.25),
    }


def sum_loss(params, batch):
    """The same two terms, summed by the loss itself."""
    terms = row_loss(params, batch)
    return {n: us.Mean(t.total.sum(), t.weight.sum(), t.coef) for n, t in terms.items()}


def scalar_loss(params, batch):
    return jnp.mean((predict(params, batch) - batch["y"]) ** 2)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def whole_and_in_parts(loss, parts, options, params, batch):
    grad_fn = us.value_and_grad(loss)
    return grad_fn(params, batch), us.accumulated(grad_fn, parts, **dict(options))(params, batch)


@jax.jit
def float32_bound(params, batch):
    """4 sqrt(rows) u sum_rows |g_row|: how far two float32 sums of one gradient may be apart."""
    terms = us.value_and_grad(row_loss)(params, batch)[0]
    weights = {name: m.weight for name, m in terms.items()}
    one = lambda row: us.value_and_grad(row_loss)(
        params, jax.tree.map(lambda x: x[None], row), denominators=weights
    )[2]
    rows = jax.vmap(one)(batch)
    return jax.tree.map(lambda g: 4 * ROWS**0.5 * EPS * jnp.abs(g).sum(0) + 1e-30, rows)


def assert_close_in_float32(got, want, params, batch):
    bound = float32_bound(params, batch)
    for g, w, b in zip(*map(jax.tree.leaves, (got, want, bound)), strict=True):
        assert np.all(np.abs(g - w) <= b)


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 7, 12])
@given(problem=problems())
def test_equals_the_gradient_of_the_whole_batch(parts, problem):
    whole, in_parts = whole_and_in_parts(row_loss, parts, (), *problem)
    chex.assert_trees_all_close(in_parts[0], whole[0], rtol=1e-5, atol=1e-4)
    assert_close_in_float32(in_parts[2], whole[2], *problem)


def linear_loss(params, batch):
    out = batch["m"] * (batch["x"] @ params["w"] + params["b"])
    return us.Mean(out, batch["one"])


@pytest.mark.parametrize("parts", [1, 2, 5, 12])
@given(problem=problems(integers))
def test_sums_of_integers_are_exact(parts, problem):
    """Below 2^24 every sum is exact, so no order of the parts may change a bit."""
    params, batch = problem
    batch = batch | {"one": np.eye(1, ROWS, dtype=np.float32)[0]}
    whole, in_parts = whole_and_in_parts(linear_loss, parts, (), params, batch)
    chex.assert_trees_all_equal(in_parts, whole)


@pytest.mark.parametrize("loss", [row_loss, sum_loss, scalar_loss])
def test_one_part_is_the_gradient_function_bit_for_bit(loss):
    whole, in_parts = whole_and_in_parts(loss, 1, (), *example())
    chex.assert_trees_all_equal(in_parts, whole)


@pytest.mark.parametrize("parts", [2, 5, 12])
def test_sums_of_the_loss_itself_take_a_mask_for_the_tail(parts):
    whole, in_parts = whole_and_in_parts(sum_loss, parts, (("mask", ("m", "s")),), *example())
    chex.assert_trees_all_close(in_parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_plain_scalar_is_a_mean_over_equal_rows(parts):
    whole, in_parts = whole_and_in_parts(scalar_loss, parts, (), *example())
    chex.assert_trees_all_close(in_parts, whole, rtol=1e-5, atol=1e-6)


def example(seed=0, rows=ROWS):
    rng = np.random.default_rng(seed)
    batch = {
        "x": rng.normal(size=(rows, WIDTH)),
        "y": rng.normal(size=rows),
        "m": rng.integers(0, 3, rows),
        "s": rng.integers(0, 2, rows),
    }
    params = {"w": rng.normal(size=WIDTH), "b": rng.normal()}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, batch))


# ------------------------------------------------------------------------------- worked examples
X8 = jnp.arange(1.0, 9.0)
M8 = jnp.array([1.0, 1, 1, 1, 1, 0, 0, 0])


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_masked_mean_is_no_mean_of_means(parts):
    loss = lambda w, b: us.Mean(jnp.sum(b["m"] * (b["x"] * w) ** 2), b["m"].sum())
    terms, _, grads = us.accumulated(us.value_and_grad(loss), parts)(2.0, {"x": X8, "m": M8})
    assert (terms["loss"].total, terms["loss"].weight, grads) == (220, 5, 44)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_each_term_keeps_its_own_denominator(parts):
    def loss(w, b):
        main = us.Mean(jnp.sum(b["m"] * (b["x"] * w) ** 2), b["m"].sum())
        return {"main": main, "aux": us.Mean(jnp.sum(b["x"] * w), len(b["x"]), coef=0.1)}

    terms, _, grads = us.accumulated(us.value_and_grad(loss), parts)(2.0, {"x": X8, "m": M8})
    assert (terms["aux"].total, terms["aux"].weight) == (72, 8)
    assert float(us.loss_value(terms)) == pytest.approx(220 / 5 + 0.1 * 9)
    assert float(grads) == pytest.approx(44.45)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5])
def test_the_tail_repeats_a_row_and_has_no_nan(parts):
    x = jnp.arange(1.0, 6.0)
    logs = lambda w, x: us.Mean(jnp.log(x * w), jnp.ones_like(x))
    assert us.accumulated(us.value_and_grad(logs), parts)(2.0, x)[2] == pytest.approx(0.5)
    squares = lambda w, x: us.Mean((x * w) ** 2, jnp.ones_like(x))
    terms, _, grads = us.accumulated(us.value_and_grad(squares), parts)(2.0, x)
    assert (terms["loss"].total, terms["loss"].weight) == (220, 5)
    assert float(grads) == pytest.approx(44)


def test_small_parts_do_not_round_away():
    ones = jnp.ones(4096, jnp.bfloat16)  # a bfloat16 sum of ones stops growing at 256
    loss = lambda w, x: us.Mean((w * x).astype(jnp.float32), jnp.ones(x.shape, jnp.float32))
    terms, _, grads = us.accumulated(us.value_and_grad(loss), 4096)(ones[0], ones)
    assert grads == 1 and grads.dtype == jnp.float32
    assert terms["loss"].total == 4096


# ------------------------------------------------------------------------------- order and weight
@given(problem=problems(), order=st.permutations(range(ROWS)))
def test_order_of_rows_changes_nothing(problem, order):
    params, batch = problem
    shuffled = jax.tree.map(lambda x: x[np.array(order)], batch)
    _, one = whole_and_in_parts(row_loss, 5, (), params, batch)
    _, other = whole_and_in_parts(row_loss, 5, (), params, shuffled)
    assert_close_in_float32(other[2], one[2], params, batch)


@given(problem=problems())
def test_rows_without_weight_change_nothing(problem):
    params, batch = problem
    blank = jax.tree.map(lambda x: np.concatenate([x, x[:3]]), batch)
    blank |= {k: np.concatenate([batch[k], np.zeros(3, np.float32)]) for k in ("m", "s")}
    _, one = whole_and_in_parts(row_loss, 5, (), params, batch)
    _, other = whole_and_in_parts(row_loss, 5, (), params, blank)
    assert_close_in_float32(other[2], one[2], params, batch)


def test_nothing_weighs_anything():
    params, batch = example()
    batch |= {"m": jnp.zeros(ROWS), "s": jnp.zeros(ROWS)}
    terms, _, grads = us.accumulated(us.value_and_grad(row_loss), 4)(params, batch)
    assert us.loss_value(terms) == 0
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, params))


@given(problem=problems(), coef=st.floats(-2, 2, width=32))
def test_linear_in_the_coefficients(problem, coef):
    params, batch = problem
    gradient = _gradient_of_coefs()
    both, fit, size = (gradient(c, params, batch) for c in [(1.0, coef), (1.0, 0.0), (0.0, 1.0)])
    expected = jax.tree.map(lambda f, s: f + np.float32(coef) * s, fit, size)
    chex.assert_trees_all_close(both, expected, rtol=1e-5, atol=1e-5)


@functools.cache
def _gradient_of_coefs():
    @jax.jit
    def gradient(coefs, params, batch):
        def loss(params, batch):
            terms = row_loss(params, batch)
            pairs = zip(terms.items(), coefs, strict=True)
            return {n: us.Mean(t.total, t.weight, c) for (n, t), c in pairs}

        return us.accumulated(us.value_and_grad(loss), 5)(params, batch)[2]

    return gradient


def test_scale_of_a_power_of_two_shifts_exponents_only():
    params, batch = example()
    grad_fn = us.accumulated(us.value_and_grad(row_loss), 5)
    plain, scaled = (grad_fn(params, batch, scale=s) for s in (1.0, 2.0**10))
    chex.assert_trees_all_equal(scaled[0], plain[0])
    chex.assert_trees_all_equal(jax.tree.map(lambda g: g / 2**10, scaled[2]), plain[2])


def test_accumulations_nest():
    params, batch = example()
    grad_fn = us.value_and_grad(row_loss)
    nested = us.accumulated(us.accumulated(grad_fn, 2), 5)(params, batch)
    chex.assert_trees_all_close(nested, grad_fn(params, batch), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------- randomness
def dropout_loss(params, batch, *, key):
    keep = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (WIDTH,)))(key)
    out = jnp.sum(jnp.where(keep, batch["x"], 0) * params["w"], axis=-1)
    return us.Mean((out - batch["y"]) ** 2, jnp.ones_like(out)), {"keep": keep}


@pytest.mark.parametrize("parts", [1, 2, 5, 12])
def test_a_mask_depends_on_the_row_and_not_on_the_parts(parts):
    params, batch = example()
    grad_fn = us.value_and_grad(dropout_loss)
    key = jax.random.key(7)
    whole = grad_fn(params, batch, key=key)
    in_parts = us.accumulated(grad_fn, parts, reduce={"keep": "concat"})(params, batch, key=key)
    chex.assert_trees_all_equal(in_parts[1], whole[1])
    chex.assert_trees_all_close(in_parts[2], whole[2], rtol=1e-5, atol=1e-6)


def test_keys_of_rows_are_published_numbers():
    keys = us.row_keys(jax.random.key(7), 4)
    assert [int(jax.random.bits(k)) for k in keys] == [
        0xDE0BFF25,
        0xACD58F1F,
        0x34BC48E8,
        0x3B38B794,
    ]
    coins = [jax.random.bernoulli(keys[i], 0.5, (4,)).astype(int).tolist() for i in (2, 3)]
    assert coins == [[1, 1, 1, 0], [1, 1, 0, 0]]


# ------------------------------------------------------------------------------- non-finite parts
def squares(w, batch):
    return us.Mean((batch["x"] * w) ** 2, jnp.ones_like(batch["x"]))


def two_terms(w, batch):
    x, s = batch["x"], batch["s"]
    return {"a": us.Mean(x * w, jnp.ones_like(x)), "b": us.Mean(s * x * w**2, s)}


def test_drop_leaves_a_bad_part_out_of_sums_and_weights():
    grad_fn = us.accumulated(us.value_and_grad(squares), 4, nonfinite="drop")
    terms, _, grads = grad_fn(3.0, {"x": X8.at[2].set(jnp.nan)})
    assert (terms["loss"].total, terms["loss"].weight, grads) == (1314, 6, 146)
    assert (terms["dropped"].total, terms["dropped"].weight) == (1, 4)
    clean = grad_fn(3.0, {"x": X8})
    assert clean[2] == 153 and clean[0]["dropped"].total == 0


def test_drop_repairs_terms_of_different_denominators():
    batch = {"x": X8.at[2].set(jnp.nan), "s": jnp.array([1.0, 0, 1, 0, 0, 0, 1, 1])}
    grad_fn = us.accumulated(us.value_and_grad(two_terms), 4, nonfinite="drop")
    terms, _, grads = grad_fn(3.0, batch)
    assert (terms["a"].total, terms["a"].weight) == (78, 6)
    assert (terms["b"].total, terms["b"].weight) == (81, 2)
    assert float(grads) == pytest.approx(94 / 3)


def bad_in_value(params, batch):
    poison = jnp.where(batch["bad"] > 0, jnp.inf, 0)
    return us.Mean(jnp.sin(batch["x"]) * params["b"] + poison, jnp.ones_like(batch["x"]))


def bad_in_one_leaf(params, batch):
    """Finite values everywhere; the gradient of `w` is 0 * inf where `bad` is 1 and `w` is 0."""
    root = jnp.sqrt(params["w"] ** 2 + 1 - batch["bad"])
    return us.Mean(jnp.sin(batch["x"]) * params["b"] + root, jnp.ones_like(batch["x"]))


@pytest.mark.parametrize("loss", [bad_in_value, bad_in_one_leaf])
def test_drop_is_the_run_without_that_part_bit_for_bit(loss):
    params, kept = {"w": jnp.float32(0), "b": jnp.float32(2)}, np.arange(8) % 4 != 2
    batch = {"x": X8, "bad": jnp.zeros(8).at[2].set(1)}
    rest = jax.tree.map(lambda x: x[kept], batch)
    run = lambda parts: us.accumulated(us.value_and_grad(loss), parts, nonfinite="drop")
    got, without = run(4)(params, batch), run(3)(params, rest)
    assert (got[0]["dropped"].total, without[0]["dropped"].total) == (1, 0)
    chex.assert_trees_all_equal(got[2], without[2])
    chex.assert_trees_all_equal(got[0]["loss"], without[0]["loss"])


def test_drop_runs_one_pass_when_all_is_clean_and_two_when_not():
    def passes(x):
        seen = []

        def loss(w, batch):
            out = squares(w, batch)
            jax.debug.callback(lambda v: seen.append(float(v)), out.total.sum())
            return out

        jax.block_until_ready(
            us.accumulated(us.value_and_grad(loss), 4, nonfinite="drop")(3.0, {"x": x})
        )
        jax.effects_barrier()
        return len(seen) / 4

    assert (passes(X8), passes(X8.at[2].set(jnp.nan))) == (1, 2)


def test_drop_of_everything_is_a_zero_gradient():
    grad_fn = us.accumulated(us.value_and_grad(squares), 4, nonfinite="drop")
    terms, _, grads = grad_fn(3.0, {"x": X8 * jnp.nan})
    assert (terms["dropped"].total, terms["loss"].weight, grads) == (4, 0, 0)


def test_keep_lets_exactly_the_bad_leaves_be_bad():
    loss = lambda w, b: us.Mean(b["x"] * w["a"] + b["y"] * w["b"], jnp.ones_like(b["x"]))
    batch = {"x": X8.at[2].set(jnp.nan), "y": X8}
    grads = us.accumulated(us.value_and_grad(loss), 4)({"a": 1.0, "b": 1.0}, batch)[2]
    assert jnp.isnan(grads["a"]) and grads["b"] == 4.5


# ------------------------------------------------------------------------------- other outputs
def loss_with_outputs(params, batch, *, state=None):
    out = predict(params, batch)
    aux = {
        "count": jnp.sum(batch["m"] > 0),
        "average": jnp.mean(out),
        "largest": jnp.max(jnp.abs(out)),
        "rows": out,
        "metric": us.Mean(batch["m"] * out, batch["m"]),
        "state": None if state is None else {"mean": 0.5 * state["mean"] + 0.5 * jnp.mean(out)},
    }
    return us.Mean(batch["m"] * out**2, batch["m"]), aux


KINDS = {"count": "sum", "average": "mean", "largest": "max", "rows": "concat"}


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_each_kind_of_output_equals_that_of_the_whole_batch(parts):
    params, batch = example()
    grad_fn = us.value_and_grad(loss_with_outputs)
    _, whole, _ = grad_fn(params, batch)
    _, aux, _ = us.accumulated(grad_fn, parts, reduce=KINDS)(params, batch)
    assert float(aux["metric"].value) == pytest.approx(float(whole["metric"].value))
    chex.assert_trees_all_close(aux | {"metric": 0}, whole | {"metric": 0}, rtol=1e-6)


def test_the_last_state_goes_from_part_to_part():
    params, batch = example()
    grad_fn = us.value_and_grad(loss_with_outputs)
    state = {"mean": jnp.float32(3)}
    kinds = KINDS | {"state/mean": "last"}
    _, aux, _ = us.accumulated(grad_fn, 4, reduce=kinds)(params, batch, state=state)
    for k in range(4):
        part = jax.tree.map(lambda x, k=k: x[k::4], batch)
        state = grad_fn(params, part, state=state)[1]["state"]
    chex.assert_trees_all_close(aux["state"], state, rtol=1e-6)


def test_a_metric_with_its_own_weight_is_exact_for_an_uneven_tail():
    params, batch = example()
    loss = lambda p, b: (row_loss(p, b), {"m": us.Mean(b["m"] * predict(p, b), b["m"])})
    grad_fn = us.value_and_grad(loss)
    aux = us.accumulated(grad_fn, 5)(params, batch)[1]
    assert float(aux["m"].value) == pytest.approx(float(grad_fn(params, batch)[1]["m"].value))


def test_a_dropped_part_adds_the_identity_to_each_output():
    params, batch = example()
    poisoned = batch | {"x": batch["x"].at[1].set(jnp.nan)}
    grad_fn = us.accumulated(
        us.value_and_grad(loss_with_outputs),
        4,
        reduce=KINDS | {"state/mean": "last"},
        nonfinite="drop",
    )
    _, aux, _ = grad_fn(params, poisoned, state={"mean": jnp.float32(3)})
    kept = np.arange(ROWS) % 4 != 1
    rest = jax.tree.map(lambda x: x[kept], batch)
    out = predict(params, rest)
    assert aux["count"] == jnp.sum(rest["m"] > 0)
    assert float(aux["average"]) == pytest.approx(float(out.mean()), rel=1e-5)
    assert float(aux["largest"]) == pytest.approx(float(jnp.abs(out).max()))
    assert np.array_equal(np.isnan(aux["rows"]), ~kept)
    assert np.isfinite(aux["state"]["mean"])


# ------------------------------------------------------------------------------- transformations
@pytest.mark.parametrize("options", [(), (("nonfinite", "drop"),), (("inplace", True),)])
def test_agrees_under_jit_vmap_remat_and_scan(options):
    params, batch = example()
    grad_fn = us.accumulated(us.value_and_grad(row_loss), 5, **dict(options))
    run = lambda p: grad_fn(p, batch)[2]
    want = run(params)
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
    close(jax.jit(run)(params), want)
    close(jax.lax.scan(lambda c, _: (c, run(params)), 0, None, length=2)[1]["w"][1], want["w"])
    seeds = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    close(jax.tree.map(lambda g: g[0], jax.vmap(run)(seeds)), want)
    remat = jax.checkpoint(row_loss)
    close(us.accumulated(us.value_and_grad(remat), 5, **dict(options))(params, batch)[2], want)


def test_a_part_is_traced_as_often_however_many_there_are():
    def traces(parts, calls):
        loss = lambda p, b: calls.append(0) or row_loss(p, b)
        jax.make_jaxpr(us.accumulated(us.value_and_grad(loss), parts))(*example())
        return len(calls)

    assert traces(2, []) == traces(6, []) <= 2


def test_donated_parameters_are_updated_in_their_own_memory():
    params, batch = example()
    grad_fn = us.accumulated(us.value_and_grad(row_loss), 4)

    def step(params, batch):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grad_fn(params, batch)[2])

    compiled = jax.jit(step, donate_argnums=0).lower(params, batch).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == us.tree.nbytes(params)


def test_weights_alone_are_computed_first():
    """The first pass has no matmul and no side effect of the loss."""
    seen = []

    def loss(params, batch):
        jax.debug.callback(lambda: seen.append(0))
        return row_loss(params, batch)

    params, batch = example()
    us.accumulated(us.value_and_grad(loss), 4)(params, batch)
    jax.effects_barrier()
    assert len(seen) == 4


# ------------------------------------------------------------------------------- devices
@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 4, "model": 2}, {"model": 2, "data": 4}])
@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"nonfinite": "drop"}])
def test_sharded_rows_give_the_gradient_of_the_whole_batch(shape, options):
    params, batch = example(rows=24)
    loss = us.value_and_grad(row_loss)
    mesh = _mesh(**shape)
    sharded = jax.jit(
        jax.shard_map(
            us.accumulated(loss, 3, mesh_axis=("data",), **options),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
        )
    )
    got, want = sharded(params, batch), loss(params, batch)
    chex.assert_trees_all_close(got[2], want[2], rtol=1e-5, atol=1e-6)
    assert float(us.loss_value(got[0])) == pytest.approx(float(us.loss_value(want[0])), rel=1e-5)
    if options.get("nonfinite") != "drop":  # which must agree on each pass before it repeats one
        assert not all_reduces_in_loops(sharded.lower(params, batch).compile().as_text())


def test_the_counter_of_all_reduces_sees_one_in_a_loop():
    """Without the cast of the parameters the partitioner reduces every part."""
    params, batch = example(rows=24)
    spec = jax.sharding.NamedSharding(_mesh(data=8), P("data"))
    batch = jax.device_put(batch, spec)
    naive = jax.jit(us.accumulated(us.value_and_grad(row_loss), 3))
    assert all_reduces_in_loops(naive.lower(params, batch).compile().as_text())


def test_a_bad_part_on_one_device_is_dropped_there_alone():
    x = jnp.arange(1.0, 33.0).at[5].set(jnp.nan)
    grad_fn = us.accumulated(us.value_and_grad(squares), 2, mesh_axis=("data",), nonfinite="drop")
    run = jax.shard_map(grad_fn, mesh=_mesh(data=4), in_specs=(P(), P("data")), out_specs=P())
    terms, _, grads = jax.jit(run)(3.0, {"x": x})
    local = np.arange(32).reshape(4, 8)
    kept = np.delete(np.arange(1.0, 33.0), local[0, 1::2])  # device 0 loses its part 1
    assert (terms["dropped"].total, terms["dropped"].weight) == (1, 8)
    assert terms["loss"].weight == 28
    assert float(grads) == pytest.approx(6 * np.mean(kept**2))


def test_a_row_has_its_mask_on_any_number_of_devices():
    params, batch = example(rows=24)
    key = jax.random.key(7)
    grad_fn = us.value_and_grad(dropout_loss)
    accumulated = us.accumulated(grad_fn, 3, mesh_axis=("data",), reduce={"keep": "concat"})
    run = jax.shard_map(
        lambda p, b: accumulated(p, b, key=key)[1]["keep"],
        mesh=_mesh(data=4),
        in_specs=(P(), P("data")),
        out_specs=P("data"),
    )
    chex.assert_trees_all_equal(
        jax.jit(run)(params, batch), grad_fn(params, batch, key=key)[1]["keep"]
    )


def _mesh(**axes):
    types = (jax.sharding.AxisType.Auto,) * len(axes)
    count = int(np.prod(list(axes.values())))
    return jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=jax.devices()[:count])


def all_reduces_in_loops(text):
    """The all-reduce instructions in computations that are bodies of while loops."""
    bodies, found, inside = set(re.findall(r"body=%?([\w.\-]+)", text)), [], False
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        inside = header.group(1) in bodies if header else inside
        if inside and " all-reduce(" in line:
            found.append(line)
    return found


# ------------------------------------------------------------------------------- bad input
def grads_of(loss, params=None, batch=None, parts=2, **options):
    example_params, example_batch = example()
    grad_fn = us.accumulated(us.value_and_grad(loss), parts, **options)
    return grad_fn(params or example_params, batch or example_batch)


LOW = lambda p, b: us.Mean(jnp.sum(predict(p, b)).astype(jnp.bfloat16), 12.0)
LEARNED = lambda p, b: us.Mean(jnp.sum(predict(p, b)), {"w": p["w"].sum()}["w"] + 1)
HIDDEN = lambda p, b: us.Mean(jnp.sum(predict(p, b)), jnp.sum(jax.nn.relu(p["b"]) > 0) + 1)
AUX = lambda p, b: (row_loss(p, b), {"acc": jnp.mean(predict(p, b))})
VECTOR = lambda p, b: predict(p, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grads_of(row_loss, parts=13), "12 rows cannot make 13 parts.*from 1 to 12"),
        (lambda: grads_of(row_loss, parts=0), "`parts` is 0; expected a positive int"),
        (lambda: grads_of(sum_loss, parts=5), "5 parts do not divide 12 rows, and term 'fit'.*"),
        (lambda: grads_of(scalar_loss, parts=5), "'loss' is a plain scalar.*us.Mean"),
        (lambda: grads_of(LOW), "'loss' has a bfloat16 total; sum in float32"),
        (lambda: grads_of(LEARNED), "weight of term 'loss' depends on the parameter 'w'.*Count"),
        (lambda: grads_of(HIDDEN), "weight of term 'loss' depends on the parameter 'b'"),
        (lambda: grads_of(VECTOR), r"array of shape \(6,\) for term 'loss'; expected a us.Mean"),
        (lambda: grads_of(AUX), "output 'acc' has no rule.*'sum', 'mean'"),
        (lambda: grads_of(AUX, reduce={"ac": "sum"}), "'ac', matched none.*closest: 'acc'"),
        (
            lambda: grads_of(AUX, reduce={"acc": "avg"}),
            "the kind of rule 'acc' is 'avg'; expected 'sum'",
        ),
        (lambda: grads_of(AUX, parts=5, reduce={"acc": "mean"}), "'acc' is a mean that the loss"),
        (lambda: grads_of(AUX, reduce={"acc": "concat"}), "'acc' has shape.*needs a leading axis"),
        (lambda: grads_of(row_loss, mask="mm"), "'mm', matched none of 4 batch arrays"),
        (lambda: grads_of(row_loss, params={"w": 1, "b": 2.0}), "parameter 'w' is int32"),
        (lambda: us.value_and_grad(row_loss)({}, {"x": X8}), "parameters have no leaves"),
        (lambda: grads_of(row_loss, batch={"x": X8, "y": X8[:3]}), "'y' has 3 rows and 'x' has 8"),
        (lambda: grads_of(row_loss, batch={"x": X8, "y": X8[0]}), "'y' is a scalar"),
        (lambda: grads_of(row_loss, nonfinite="ignore"), "'ignore'; expected 'keep' or 'drop'"),
        (lambda: grads_of(row_loss, nonfinite="drop", inplace=True), "before anyone can see"),
    ],
)
def test_misuse_is_an_error_that_names_the_leaf_and_the_way_out(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_bare_gradient_function_is_refused():
    with pytest.raises(TypeError, match="takes what us.value_and_grad"):
        us.accumulated(jax.grad(lambda w, x: jnp.mean(w * x)), 2)


def test_an_old_style_key_is_refused():
    params, batch = example()
    with pytest.raises(TypeError, match="expected a typed key.*jax.random.key"):
        us.value_and_grad(dropout_loss)(params, batch, key=jax.random.PRNGKey(0))


def test_dropping_inside_another_accumulation_is_refused():
    params, batch = example()
    inner = us.accumulated(us.value_and_grad(row_loss), 2, nonfinite="drop")
    with pytest.raises(ValueError, match="goes on the outermost"):
        us.accumulated(inner, 2)(params, batch)
