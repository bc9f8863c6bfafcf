"""Laws of rows on many devices: the gradient of one device, and one reduction a step."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import unitscale_jax as us
from unitscale_jax.loss import Mean
from unitscale_jax.testing import check_sharded
from unitscale_jax.trace.costs import collectives

ROWS, WIDTH, HIDDEN = 24, 8, 16


def normal(key, *shape):
    return jax.random.normal(jax.random.key(key), shape) / 3


PARAMS = {
    "gain": 1 + normal(0, WIDTH) / 10,
    "up": normal(1, WIDTH, HIDDEN),
    "bias": normal(2, HIDDEN),
    "down": normal(3, HIDDEN, WIDTH),
    "odd": jnp.full(3, 0.1),
}
RULES = {"up": "column", "bias": "column", "down": "row"}
BATCH = {
    "x": normal(4, ROWS, WIDTH),
    "y": normal(5, ROWS, WIDTH),
    "mask": jnp.arange(ROWS) % 7 != 0,  # devices and parts hold different numbers of items
}


def model(p, x):
    normed = x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True)) * p["gain"]
    return x + jnp.tanh(normed @ p["up"] + p["bias"]) @ p["down"] + p["odd"].sum()


def loss(p, batch):
    """Two terms with denominators of their own, one number for each row."""
    out = model(p, batch["x"])
    errors = jnp.sum((out - batch["y"]) ** 2, -1)
    counts = batch["mask"].astype(errors.dtype)
    return {
        "fit": Mean(jnp.where(batch["mask"], errors, 0), counts),
        "size": Mean(jnp.sum(out**2, -1), jnp.ones_like(errors), coef=0.01),
    }


GRAD = us.value_and_grad(loss)


def layout_here(params, rules=RULES):
    return us.parallel.layout(params, rules, jax.sharding.get_abstract_mesh(), missing="whole")


def step_of(parts=1, **options):
    def step(params, batch):
        layout = layout_here(params)
        grad_fn = us.parallel.reduced(us.accumulated(GRAD, parts), "dp", layout=layout, **options)
        laid = layout.over("dp") if options.get("zero") == 3 else layout
        terms, _, grads = grad_fn(us.parallel.shard(params, laid), batch)
        return {name: (m.total, m.weight) for name, m in terms.items()}, grads

    return step


def whole(params, batch):
    terms, _, grads = GRAD(params, batch)
    return {name: (m.total, m.weight) for name, m in terms.items()}, grads


CASES = [
    (dict(zero=0, parts=2), ["dp=8", "dp=4,tp=2"]),
    (dict(zero=1, parts=1), ["dp=2,tp=4"]),
    (dict(zero=2, parts=3), ["dp=4,tp=2", "dp=1,tp=8"]),
    (dict(zero=3, parts=2), ["dp=4,tp=2", "dp=2,tp=2,other=2"]),
]


def mesh_of(text):
    return us.parallel.mesh(**{k: int(v) for k, v in (word.split("=") for word in text.split(","))})


@pytest.mark.parametrize(("options", "meshes"), CASES, ids=str)
def test_equals_one_device_and_reduces_outside_of_loops(options, meshes):
    check_sharded(
        step_of(**options),
        (PARAMS, BATCH),
        [mesh_of(text) for text in meshes],
        reference=whole,
        outside_loops=["dp"],
    )


def test_rows_that_the_axis_does_not_divide_are_all_counted_once():
    batch = jax.tree.map(lambda x: x[:21], BATCH)
    check_sharded(
        step_of(parts=2), (PARAMS, batch), [mesh_of("dp=8")], reference=whole, rtol64=None
    )


def test_the_naive_order_reduces_once_a_part():
    """Why parameters are cast first; and that the check above can fail."""

    def step(w, x):
        part = lambda _, rows: (None, jax.grad(lambda w: jnp.sum(jnp.tanh(rows @ w)))(w))
        body = lambda w, x: lax.scan(part, None, x.reshape(3, -1, WIDTH))[1].sum(0)
        return jax.shard_map(body, in_specs=(P(), P("dp")), out_specs=P())(w, x)

    with pytest.raises(AssertionError, match="a loop repeats"):
        check_sharded(
            step, (PARAMS["up"], BATCH["x"]), [mesh_of("dp=8")], outside_loops=["dp"], rtol64=None
        )


def sent(mesh, **options):
    """Bytes of gradients sent over the data axis, by kind; scalars are left out."""
    with jax.set_mesh(mesh):
        program = jax.jit(step_of(**options)).lower(PARAMS, BATCH).compile()
    found: dict[str, int] = {}
    for c in collectives(program, mesh):
        if c.axes == ("dp",) and (c.kind != "all-reduce" or c.bytes > 16):
            found[c.kind] = found.get(c.kind, 0) + c.bytes
    return found


def test_what_is_sent_is_what_zero_says():
    mesh, n = mesh_of("dp=8"), 8
    odd = 4 * 3  # bytes of 3 numbers, which 8 devices do not divide
    shares = us.tree.nbytes(PARAMS) - odd
    assert sent(mesh) == {"all-reduce": shares + odd}
    assert sent(mesh, zero=2) == {"reduce-scatter": shares // n}
    assert sent(mesh, zero=3) == {"reduce-scatter": shares // n, "all-gather": shares}


def test_an_axis_of_size_one_changes_no_bit():
    mesh = us.parallel.mesh(devices=jax.devices()[:1], dp=1)
    want = jax.jit(us.accumulated(GRAD, 2))(PARAMS, BATCH)
    for zero in (0, 2, 3):
        with jax.set_mesh(mesh):
            got = jax.jit(us.parallel.reduced(us.accumulated(GRAD, 2), zero=zero))(PARAMS, BATCH)
        chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(want))


# ---------------------------------------------------------------------- randomness, outputs


def noisy(w, batch, *, key):
    keep = jax.vmap(jax.random.bernoulli)(key)
    x = jnp.where(keep, w * batch["x"][:, 0], 0)
    aux = {"keep": keep, "largest": x.max(), "mean": x.mean(), "sum": x.sum()}
    return Mean(x, jnp.ones_like(x)), aux | {"hits": Mean(keep.astype(x.dtype), jnp.ones_like(x))}


KINDS = {"keep": "concat", "largest": "max", "mean": "mean", "sum": "sum"}


@pytest.mark.parametrize("dp", [2, 8])
def test_masks_and_outputs_do_not_depend_on_the_number_of_devices(dp):
    key, grad_fn = jax.random.key(7), us.value_and_grad(noisy)
    _, aux, grads = jax.jit(grad_fn)(2.0, BATCH, key=key)
    mesh = us.parallel.mesh(dp=dp, devices=jax.devices()[:dp])
    inner = us.accumulated(grad_fn, 3, reduce=KINDS)
    with jax.set_mesh(mesh):
        _, aux_there, there = jax.jit(us.parallel.reduced(inner, reduce=KINDS))(2.0, BATCH, key=key)
    assert (aux_there["keep"] == aux["keep"]).all()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    close(there, grads)
    for name in ("largest", "mean", "sum"):
        close(aux_there[name], aux[name])
    close(aux_there["hits"].value, aux["hits"].value)


def test_the_key_of_a_row_is_that_of_its_index_in_the_whole_batch():
    bits = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (8,)))
    expected = [0, 0, 1, 1, 0, 1, 1, 1]  # of row 0 under key(7)
    f = us.value_and_grad(lambda w, b, *, key: (w * jnp.sum(b), {"bits": bits(key)}))
    with jax.set_mesh(us.parallel.mesh(dp=8)):
        fn = us.parallel.reduced(f, reduce={"bits": "concat"})
        aux = jax.jit(fn)(1.0, jnp.ones(8), key=jax.random.key(7))[1]
    assert aux["bits"][0].astype(int).tolist() == expected


# ------------------------------------------------------------------------------------- the update


def train(mesh, zero, steps=3):
    """AdamW with clipping; shares of the state where `zero` says so."""
    inner = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.05))
    layout = us.parallel.layout(PARAMS, RULES, mesh, missing="whole")
    shares = layout.over("dp") if zero else layout
    laid = shares if zero == 3 else layout
    tx = us.parallel.sharded(inner, laid, shares)
    grad_fn = us.parallel.reduced(us.accumulated(GRAD, 2), zero=zero, layout=layout)

    @jax.jit
    def step(params, state):
        grads = grad_fn(params, BATCH)[2]
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        params = us.parallel.shard(PARAMS, laid)
        state = tx.init(params)
        start = jax.tree.map(lambda x: x.sharding, (params, state))
        for _ in range(steps):
            params, state = step(params, state)
            now = jax.tree.map(
                lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), (params, state), start
            )
            assert all(jax.tree.leaves(now)), "an update moved something"
    return params, state


def bytes_on_a_device(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_three_updates_are_those_of_one_device_and_lie_where_they_lay(zero):
    want, _ = train(us.parallel.mesh(devices=jax.devices()[:1], dp=1, tp=1), 0)
    params, state = train(us.parallel.mesh(dp=4, tp=2), zero)
    chex.assert_trees_all_close(jax.device_get(params), jax.device_get(want), rtol=2e-5, atol=2e-6)
    moments = {"gain": 8, "up": 64, "bias": 8, "down": 64, "odd": 3}  # over tp=2
    if zero:  # dp=4 takes a dimension that is free: of the bias there is none, of `odd` neither
        moments |= {"gain": 2, "up": 16, "down": 16}
    assert bytes_on_a_device(state) == 4 * (2 * sum(moments.values()) + 1)  # and a count


def test_bytes_of_adam_by_stage():
    params = {"a": jnp.ones((8, 6)), "b": jnp.ones(6), "c": jnp.ones(())}
    mesh = us.parallel.mesh(dp=4, devices=jax.devices()[:4])
    layout = us.parallel.layout(params, {}, mesh)
    sizes = []
    for laid, shares in [(layout, layout), (layout, layout.over("dp")), (layout.over("dp"),) * 2]:
        tx = us.parallel.sharded(optax.scale_by_adam(), laid, shares)
        state = tx.init(params)
        moments = (state.mu, state.nu)
        sizes.append(bytes_on_a_device((us.parallel.shard(params, laid), moments)))
    assert sizes == [660, 372, 228]


def test_one_device_that_overflows_stops_the_step_on_all():
    tx = us.loss_scaled(optax.sgd(0.1), us.DynamicScale(init=8))
    batch = BATCH | {"x": BATCH["x"].at[5].set(jnp.inf)}
    for zero in (0, 2):
        with jax.set_mesh(us.parallel.mesh(dp=8)):
            state = tx.init(PARAMS)
            fn = us.parallel.reduced(GRAD, zero=zero)
            grads = jax.jit(fn)(PARAMS, batch, scale=us.current_scale(state))[2]
            updates, state = jax.jit(tx.update)(grads, state, PARAMS)
        flags = [float(s.data) for s in us.current_scale(state).addressable_shards]
        assert set(flags) == {4.0}
        assert all((u == 0).all() for u in jax.tree.leaves(updates))


# ------------------------------------------------------------------------------------------- wires


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize(("wire", "bound"), [("bfloat16", 2.0**-7), ("int8", 8 / 254)])
def test_a_narrow_wire_rounds_each_gradient_once_and_tells_all_the_same(wire, bound, zero):
    mesh = us.parallel.mesh(dp=4, tp=2)
    want = GRAD(PARAMS, BATCH)[2]
    with jax.set_mesh(mesh):
        layout = us.parallel.layout(PARAMS, RULES, mesh)
        fn = jax.jit(us.parallel.reduced(GRAD, zero=zero, compress=wire, layout=layout))
        got = fn(us.parallel.shard(PARAMS, layout), BATCH)[2]
    for name, g in got.items():
        shards = {}
        for s in g.addressable_shards:  # what devices hold twice is the same to the bit
            first = shards.setdefault(str(s.index), np.asarray(s.data))
            assert (first == np.asarray(s.data)).all()
        off = np.abs(np.asarray(g) - np.asarray(want[name])).max()
        assert off <= bound * np.abs(np.asarray(want[name])).max(), name
        assert off > 0 or name == "odd"  # equal numbers are the largest of their block


def test_narrow_wires_send_a_half_and_a_quarter():
    params = {"w": normal(0, 512, 64)}
    batch = normal(1, 8, 512)
    grad_fn = us.value_and_grad(
        lambda p, x: Mean(jnp.sum(jnp.sin(x @ p["w"]), -1), jnp.ones(8)[: len(x)])
    )
    mesh = us.parallel.mesh(dp=8)
    total = {}
    for wire in (None, "int8"):
        with jax.set_mesh(mesh):
            fn = us.parallel.reduced(grad_fn, zero=2, compress=wire)
            program = jax.jit(lambda p, b, fn=fn: fn(p, b)[2]).lower(params, batch).compile()
        found = [c for c in collectives(program, mesh) if c.bytes > 16]
        assert not any(c.loops for c in found)
        # a scattered sum sends what it starts from, n times its result
        total[wire] = sum(c.bytes * (8 if c.kind == "reduce-scatter" else 1) for c in found)
    assert total["int8"] <= 0.26 * total[None]


def test_nothing_is_lost_for_good_with_error_feedback():
    """Sums of what arrived stay within one rounding of the sums of what was sent."""
    mesh, steps = us.parallel.mesh(dp=8), 16
    want = jax.device_get(GRAD(PARAMS, BATCH)[2])
    with jax.set_mesh(mesh):
        fn = jax.jit(us.parallel.reduced(GRAD, compress="int8"))
        state = us.parallel.feedback(PARAMS)
        once = jax.device_get(fn(PARAMS, BATCH)[2])
        total = jax.tree.map(np.zeros_like, want)
        for _ in range(steps):
            _, state, grads = fn(PARAMS, BATCH, state=state, scale=jnp.float32(4))
            total = jax.tree.map(lambda t, g: t + np.asarray(g) / 4, total, grads)
        broken = BATCH | {"x": BATCH["x"].at[5].set(jnp.nan)}
        after = fn(PARAMS, broken, state=state)[1]
    off = lambda got, name: np.abs(got[name] - want[name]).max() / np.abs(want[name]).max()
    mean = jax.tree.map(lambda t: t / steps, total)
    bound = (
        3 / 254 / steps
    )  # devices hold about twice the sum between them, and one rounds it again
    assert all(off(mean, name) <= bound for name in want)
    assert sum(off(once, name) > bound for name in want) >= 3  # what is lost without it
    chex.assert_trees_all_equal(jax.device_get(after.error), jax.device_get(state.error))


# ------------------------------------------------------------------------------------------ errors


def call(fn, params=PARAMS, batch=BATCH, **mesh):
    with jax.set_mesh(us.parallel.mesh(**(mesh or {"dp": 8}))):
        return jax.jit(fn)(params, batch)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="'dp', and there is no mesh here.*jax.set_mesh"):
        us.parallel.reduced(GRAD)(PARAMS, BATCH)
    with pytest.raises(ValueError, match="'data', and the mesh here has dp=8"):
        call(us.parallel.reduced(GRAD, "data"))
    with pytest.raises(ValueError, match="'dp', which a shard_map around it owns already"):
        call(us.parallel.reduced(us.parallel.reduced(GRAD)))
    with pytest.raises(ValueError, match="gradient of 'bias' is reduced over 'dp' already"):
        call(us.parallel.reduced(us.accumulated(GRAD, 2, mesh_axis=("dp",))))
    with pytest.raises(TypeError, match="takes what us.value_and_grad"):
        us.parallel.reduced(jax.grad(loss))
    with pytest.raises(ValueError, match="`zero` is 4"):
        us.parallel.reduced(GRAD, zero=4)
    with pytest.raises(ValueError, match="`compress` is 'fp4'"):
        us.parallel.reduced(GRAD, compress="fp4")
    with pytest.raises(ValueError, match="`gather` is 'layer' with zero=2"):
        us.parallel.reduced(GRAD, zero=2, gather="layer")
    with_feedback = lambda p, b: us.parallel.reduced(GRAD)(p, b, state=us.parallel.feedback(p))
    with pytest.raises(ValueError, match="without `compress` nothing is rounded away"):
        call(with_feedback)


def test_what_cannot_be_split_is_named():
    summed = us.value_and_grad(lambda p, b: Mean(jnp.sum(model(p, b["x"])), b["mask"].sum()))
    batch = jax.tree.map(lambda x: x[:21], BATCH)
    with pytest.raises(ValueError, match="8 devices do not divide 21 rows.*give 24 rows"):
        call(us.parallel.reduced(summed), batch=batch)
    stateful = us.value_and_grad(lambda p, b: (loss(p, b), {"seen": b["x"].mean()}))
    with pytest.raises(ValueError, match="'seen' has no rule"):
        call(us.parallel.reduced(stateful))
    with pytest.raises(ValueError, match="kind 'last' would differ between devices"):
        call(us.parallel.reduced(stateful, reduce={"seen": "last"}))
    other = us.parallel.layout(PARAMS, RULES, us.parallel.mesh(dp=2, tp=4))
    with pytest.raises(ValueError, match="layout is for a mesh of .*here dp=8"):
        call(us.parallel.reduced(GRAD, layout=other))
    fewer = us.parallel.layout({"up": PARAMS["up"]}, {}, us.parallel.mesh(dp=8))
    with pytest.raises(ValueError, match="layout and the parameters differ in 'bias'"):
        call(us.parallel.reduced(GRAD, layout=fewer))


# ------------------------------------------------------------------------------------------- loops


def recurrent(params, x):
    """A recurrent layer whose state begins with zeros, and a loop that ends when data say so."""
    step = lambda h, row: (jnp.tanh(row @ params["up"] + h @ params["again"]), None)
    h = jax.lax.scan(step, jnp.zeros((len(x), HIDDEN), x.dtype), jnp.stack([x, 2 * x, -x]))[0]
    small = lambda state: (jnp.max(jnp.abs(state[1])) > 1e-3) & (state[0] < 9)
    halved = jax.lax.while_loop(small, lambda s: (s[0] + 1, s[1] / 2), (0, lax.stop_gradient(x)))
    wide = jax.lax.cond(x[0, 0] > 9, lambda h: jnp.zeros_like(h), lambda h: h, h)
    return (wide @ params["down"]) * (1 + 0 * halved[1])


def test_a_model_whose_loops_begin_with_zeros_runs_as_it_was_written():
    params = {n: PARAMS[n] for n in ("up", "down")} | {"again": normal(8, HIDDEN, HIDDEN)}
    batch = {"x": BATCH["x"], "mask": BATCH["mask"]}

    def loss(p, batch):
        errors = jnp.sum((recurrent(p, batch["x"]) - 1) ** 2, -1)
        return Mean(jnp.where(batch["mask"], errors, 0), batch["mask"])

    grad_fn = us.value_and_grad(loss)
    with pytest.raises(TypeError, match="carry"):  # JAX's own word on it
        body = lambda p, x: jnp.sum(recurrent(p, x))[None]
        fn = jax.shard_map(body, in_specs=(P(), P("dp")), out_specs=P("dp"))
        with jax.set_mesh(us.parallel.mesh(dp=8)):
            fn(params, batch["x"])

    def step(params, batch, parts=2):
        fn = us.parallel.reduced(us.accumulated(grad_fn, parts), zero=2)
        return fn(params, batch)[2]

    whole = lambda p, b: grad_fn(p, b)[2]
    meshes = [us.parallel.mesh(dp=4, tp=2)]
    check_sharded(step, (params, batch), meshes, reference=whole, outside_loops=["dp"])


def test_what_is_wrong_on_one_device_too_is_said_as_jax_says_it():
    wrong = us.value_and_grad(lambda p, b: Mean(jnp.add(b["x"], "text"), 1))
    with pytest.raises(TypeError, match="text|str"):
        call(us.parallel.reduced(wrong), batch={"x": BATCH["x"]})
