"""Laws of experts on different devices: routed rows are what all experts made of all rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tests.support import zoo
from tests.support.sharded import assert_near
from tests.support.zoo._model import FFN, TIME, WIDTH, activations
from unitscale_jax.parallel import expert_parallel, mesh

BATCH, EXPERTS, K = 8, 8, 2


def params_of(dtype="float32"):
    shapes = {
        "router": (WIDTH, EXPERTS),
        "up": (EXPERTS, WIDTH, FFN),
        "down": (EXPERTS, FFN, WIDTH),
    }
    return {
        n: 0.4 * activations(*s, seed=k).astype(dtype) for k, (n, s) in enumerate(shapes.items())
    }


def routed(p, x, k=K):
    scores, chosen = lax.top_k(x @ p["router"], k)
    return chosen, jax.nn.softmax(scores)


def expert(p, rows, sizes):
    """Of one layer of the zoo's mixtures; what is of no expert is made to show if it is used."""
    real = jnp.arange(rows.shape[0]) < sizes.sum()
    rows = jnp.where(real[:, None], rows, jnp.nan)
    h = jax.nn.gelu(lax.ragged_dot(rows, p["up"], sizes))
    return jnp.where(real[:, None], lax.ragged_dot(h, p["down"], sizes), jnp.nan)


def dense(p, x, kept=None, k=K):
    """Every expert sees every row of one device, and gates of zero hide it; the zoo's own form."""
    chosen, gates = routed(p, x, k)
    gates = gates if kept is None else jnp.where(kept, gates, 0.0)
    full = jnp.zeros((*x.shape[:-1], EXPERTS), x.dtype)
    full = (
        jnp.sum(gates[..., None] * jax.nn.one_hot(chosen, EXPERTS, dtype=x.dtype), axis=-2) + full
    )
    h = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, p["up"]))
    return jnp.einsum("bte,btef,efd->btd", full, h, p["down"])


LAYOUT = {"router": P(), "up": P("ep"), "down": P("ep")}


def split(capacity=None, k=K):
    rows = P(("dp", "ep"))

    def body(p, x):
        chosen, gates = routed(p, x, k)
        own = {name: p[name] for name in ("up", "down")}
        y, load = expert_parallel(expert, own, x, chosen, gates, mesh_axis="ep", capacity=capacity)
        return y, jax.tree.map(lambda count: lax.psum(count, "dp"), load)

    return jax.shard_map(body, in_specs=(LAYOUT, rows), out_specs=(rows, P()))


def loss_of(fn, coef):
    return lambda p, x: jnp.sum(fn(p, x) * coef)


def value_and_grads(fn, p, x):
    coef = activations(*x.shape, seed=9).astype(x.dtype)
    return fn(p, x), jax.grad(loss_of(fn, coef), (0, 1))(p, x)


@pytest.mark.parametrize(("dtype", "ep"), [("float32", 8), ("float64", 2)])
def test_routed_rows_are_the_dense_mixture_with_its_gradients(dtype, ep):
    with jax.enable_x64(dtype == "float64"), jax.set_mesh(mesh(dp=8 // ep, ep=ep)):
        p, x = params_of(dtype), activations(BATCH, TIME, WIDTH).astype(dtype)
        fn = lambda p, x: split()(p, x)[0]
        got = jax.jit(functools.partial(value_and_grads, fn))(p, x)
        assert_near(got, jax.jit(functools.partial(value_and_grads, dense))(p, x))


def test_the_mixture_of_the_zoo():
    """Its five experts do not divide, so three without choices are added."""
    model = zoo.model("plain_moe_top_k")
    (x,), p = model.inputs, model.params
    fill = lambda a: jnp.pad(a, [(0, 3), (0, 0), (0, 0)])

    def body(router, own, x):
        scores, chosen = lax.top_k(x @ router["kernel"] + router["bias"], 2)
        return expert_parallel(expert, own, x, chosen, jax.nn.softmax(scores), mesh_axis="ep")[0]

    with jax.set_mesh(mesh(ep=2, dp=4)):
        specs = (P(), P("ep"), P("ep"))
        run = jax.jit(jax.shard_map(body, in_specs=specs, out_specs=P("ep")))
        got = run(p["router"], {"up": fill(p["up"]), "down": fill(p["down"])}, x)
    assert_near(got, model.apply(p, x))


def within(chosen, devices, capacity):
    """Which choices are among the first of their expert on their device; row by row."""
    kept = np.zeros(chosen.shape, bool)
    for rows in np.split(np.arange(chosen.shape[0]), devices):
        seen = np.zeros(EXPERTS, int)
        for place in np.ndindex(len(rows), *chosen.shape[1:]):
            at = (rows[place[0]], *place[1:])
            kept[at] = seen[chosen[at]] < capacity
            seen[chosen[at]] += 1
    return kept


@pytest.mark.parametrize("capacity", [1, 2])
def test_a_capacity_keeps_the_first_rows_of_each_expert(capacity):
    p, x = params_of(), activations(BATCH, TIME, WIDTH)
    chosen = np.asarray(routed(p, x)[0])
    kept = within(chosen, 8, capacity)
    assert 0.2 < kept.mean() < 0.95
    with jax.set_mesh(mesh(dp=2, ep=4)):
        fn = split(capacity)
        got = jax.jit(functools.partial(value_and_grads, lambda p, x: fn(p, x)[0]))(p, x)
        load = jax.jit(fn)(p, x)[1]
    want = value_and_grads(functools.partial(dense, kept=kept), p, x)
    assert_near(got, want)
    np.testing.assert_array_equal(load.asked, np.bincount(chosen.ravel(), minlength=EXPERTS))
    np.testing.assert_array_equal(load.kept, np.bincount(chosen[kept], minlength=EXPERTS))
    np.testing.assert_allclose(load.dropped, 1 - kept.mean(), rtol=1e-6)


def test_all_rows_may_choose_one_expert_and_a_row_all_of_them():
    p, x = params_of(), activations(BATCH, TIME, WIDTH)
    one = p | {"router": jnp.zeros_like(p["router"])}  # ties: the first ones, for every row
    with jax.set_mesh(mesh(dp=2, ep=4)):
        assert_near(jax.jit(split(k=1))(one, x)[0], dense(one, x, k=1))
        y, load = jax.jit(split(k=EXPERTS))(p, x)
    assert_near(y, dense(p, x, k=EXPERTS))
    assert load.dropped == 0


def test_an_axis_of_one_device_sorts_and_multiplies_to_the_bit():
    p, x = params_of(), activations(BATCH, TIME, WIDTH)

    def alone(p, x):
        chosen, gates = routed(p, x)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=EXPERTS).astype(jnp.int32)
        made = expert(p, x.reshape(-1, WIDTH)[order // K], sizes)
        made = jnp.zeros_like(made).at[order].set(made).reshape(*chosen.shape, WIDTH)
        return jnp.sum(made * gates[..., None], axis=-2)

    with jax.set_mesh(mesh(dp=1, ep=1, devices=jax.devices()[:1])):
        got = jax.jit(split())(p, x)[0]
    np.testing.assert_array_equal(got, jax.jit(alone)(p, x))


def test_shapes_that_do_not_fit_are_errors():
    x, chosen = jnp.ones((8, 3)), jnp.zeros((8, 2), jnp.int32)

    def run(p, chosen, gates, **options):
        body = lambda *args: expert_parallel(
            lambda p, rows, _: rows, *args, mesh_axis="ep", **options
        )
        with jax.set_mesh(mesh(dp=2, ep=4)):
            jax.eval_shape(
                jax.shard_map(body, in_specs=P("ep"), out_specs=(P("ep"), P())), p, x, chosen, gates
            )

    with pytest.raises(ValueError, match=r"x \(2, 3\), chosen \(2, 2\) and gates \(2, 1\)"):
        run(jnp.ones((4, 3)), chosen, jnp.ones((8, 1)))
    with pytest.raises(ValueError, match="capacity=0"):
        run(jnp.ones((4, 3)), chosen, jnp.ones((8, 2)), capacity=0)
    with pytest.raises(ValueError, match="first axes .*'a': \\(1,\\), 'b': \\(2,\\)"):
        run({"a": jnp.ones((4, 3)), "b": jnp.ones(8)}, chosen, jnp.ones((8, 2)))
