"""Laws of what a technique may cost: compiled memory of small programs, which repeats exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import unitscale_jax as us
from unitscale_jax.distill import jsd, kl, kl_top_k, reverse_kl, top_k
from unitscale_jax.quant import _gradient

W8A8 = us.DotSpec(w=us.QSpec(), x=us.QSpec())


def temp(fn, *args):
    """Bytes that a compiled function takes besides its arguments and results."""
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


# ------------------------------------------------------------------- training in eight bits


def residual(params, x):
    for a, b in params:
        x = x + jax.nn.relu(x @ a) @ b
    return x


def plain(params, x):
    for a, b in params:
        x = jax.nn.relu(jax.nn.relu(x @ a) @ b)
    return x


def normed(params, x):
    for a, b in params:
        h = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        x = x + jax.nn.gelu(h @ a) @ b
    return x


@pytest.mark.parametrize("model", [residual, plain, normed])
def test_training_in_eight_bits_takes_no_more_memory_than_in_floats(model):
    params = [(floats(128, 512), floats(512, 128)) for _ in range(3)]
    loss = lambda fn: jax.value_and_grad(lambda p, x: jnp.mean(fn(p, x) ** 2))
    args = params, floats(128, 128)
    exact, coded = (temp(loss(f), *args) for f in (model, us.quantized(model, {"**": W8A8})))
    assert coded <= 1.05 * exact


def test_a_cotangent_that_is_not_finite_spoils_its_own_row_only():
    w, x = jax.random.normal(jax.random.key(0), (2, 8, 8))
    fn = us.quantized(lambda p, x: x @ p["w"], {"w": W8A8})
    back = jax.jit(lambda g: jax.vjp(lambda x: fn({"w": w}, x), x)[1](g)[0])
    whole, spoilt = back(jnp.ones((8, 8))), back(jnp.ones((8, 8)).at[0, 0].set(jnp.nan))
    assert np.isnan(spoilt[0]).all()
    np.testing.assert_array_equal(spoilt[1:], whole[1:])


# ------------------------------------------------------------------- distillation


def kl_by_hand(t, s):
    log_p, log_q = jax.nn.log_softmax(t), jax.nn.log_softmax(s)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def jsd_by_hand(t, s):
    log_p, log_q = jax.nn.log_softmax(t), jax.nn.log_softmax(s)
    log_m = jnp.logaddexp(log_p, log_q) - np.log(2)
    terms = jnp.exp(log_p) * (log_p - log_m) + jnp.exp(log_q) * (log_q - log_m)
    return jnp.sum(terms, axis=-1) / 2


LOSSES = {
    "kl": (kl, kl_by_hand),
    "kl at 2": (functools.partial(kl, temperature=2.0), kl_by_hand),
    "kl where": (lambda t, s: kl(t, s, where=jnp.arange(s.shape[-1]) < 1000), kl_by_hand),
    "reverse_kl": (reverse_kl, lambda t, s: kl_by_hand(s, t)),
    "jsd": (jsd, jsd_by_hand),
    "top_k": (lambda t, s: kl_top_k(top_k(t, 4), s), kl_by_hand),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_divergence_takes_no_more_memory_than_written_by_hand(name):
    def of(loss):
        total = lambda ws, hs, wt, ht: jnp.sum(loss(jax.lax.stop_gradient(ht @ wt), hs @ ws))
        head, h = floats(16, 1024), floats(128, 16)
        return temp(jax.value_and_grad(total, argnums=(0, 1)), head, h, head, h)

    ours, by_hand = map(of, LOSSES[name])
    # What is kept of the k largest logits is 16 bytes for each and a few numbers a row.
    assert ours <= by_hand + (128 * 200 if name == "top_k" else 128 * 16)


@pytest.mark.parametrize("loss", [kl, reverse_kl, jsd])
def test_a_divergence_has_all_derivatives(loss):
    t, s = 2 * jax.random.normal(jax.random.key(0), (2, 5))
    t, s = (x.at[3].set(-jnp.inf) for x in (t, s))  # an entry that does not exist
    value = lambda s, temperature: loss(t, s, temperature)
    v = jnp.arange(5.0) - 2
    slope = jax.grad(value)(s, 2.0)
    np.testing.assert_allclose(
        jax.jvp(lambda s: value(s, 2.0), (s,), (v,))[1], v @ slope, rtol=1e-5
    )
    step = 1e-2
    moved = lambda sign: jax.grad(value)(s + sign * step * v, 2.0)
    curve = (moved(1) - moved(-1)) / (2 * step)
    np.testing.assert_allclose(jax.hessian(value)(s, 2.0) @ v, curve, atol=1e-4)


@pytest.mark.parametrize("loss", [kl, reverse_kl, jsd])
def test_a_divergence_has_a_derivative_by_its_temperature(loss):
    t, s = 2 * jax.random.normal(jax.random.key(0), (2, 5))
    value = functools.partial(loss, t, s)
    by_steps = (value(2.01) - value(1.99)) / 0.02
    np.testing.assert_allclose(jax.grad(value)(2.0), by_steps, atol=2e-3)


# ------------------------------------------------------------------- outside of any jit


def weighted(params, batch):
    rows = (batch["x"] @ params["w"] - batch["y"]) ** 2
    return us.Mean(jnp.sum(rows), jnp.float32(len(rows)))


def half(params):
    del params
    return us.prune.SparsitySpec(patterns={"*": us.prune.Unstructured()}, sparsity=0.5)


WRAPPERS = {
    "accumulated": lambda: us.accumulated(us.value_and_grad(weighted), 2),
    "drop": lambda: us.accumulated(us.value_and_grad(weighted), 2, nonfinite="drop"),
    "masked": lambda: us.prune.pruned(optax.sgd(0.1), half(None), us.prune.OneShot(1)),
    "loss_scaled": lambda: us.loss_scaled(optax.sgd(0.1), us.DynamicScale()),
    "multi_steps": lambda: us.multi_steps(optax.sgd(0.1), 2),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_outside_of_jit_is_compiled_once(name):
    wrapped, params = WRAPPERS[name](), {"w": jnp.arange(4.0)}
    batch = {"x": jnp.arange(16.0).reshape(4, 4), "y": jnp.ones(4)}
    if isinstance(wrapped, us.Grad):
        call = functools.partial(wrapped, params, batch)
    else:
        call = functools.partial(wrapped.update, params, wrapped.init(params), params)
    first, compilations = call(), []
    note = lambda event, *_, **__: compilations.append(event) if "compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        again = call()
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not compilations
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(jax.jit(call)()), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("spec", [W8A8, us.DotSpec(w=us.QSpec(), x=us.QSpec(), g=us.QSpec())])
def test_kinds_of_products_that_are_remembered_are_few(spec, monkeypatch):
    """And one that was forgotten is traced anew, to the same bits."""
    fn = lambda p, x: x @ p["w"]
    grads = jax.grad(lambda p, x: (us.quantized(fn, {"w": spec})(p, x) ** 2).sum())
    inputs = [({"w": jnp.ones((n, 3))}, jnp.ones((2, n))) for n in (2, 3, 4, 5, 6, 2)]
    wanted = [grads(*args) for args in inputs]
    caches = _gradient._PROGRAMS, _gradient._REFUSALS
    monkeypatch.setattr(_gradient, "_MOST_KINDS", 3)
    got = [grads(*args) for args in inputs]
    assert 0 < len(caches[0]) <= 3
    us.explain(grads)(*inputs[0])
    assert all(len(cache) <= 3 for cache in caches[: 1 + (spec.g is not None)])
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


# ------------------------------------------------------------------- parameters in shares


def scanned(params, x):
    layer = lambda h, w: (h + jnp.tanh(h @ w["up"]) @ w["down"], None)
    h = jax.lax.scan(jax.checkpoint(layer), x, params["layers"])[0]
    return us.Mean(jnp.sum(h * h, -1), jnp.ones(len(x)))


@pytest.mark.parametrize(("devices", "rows"), [(4, 8), (8, 8), (4, 256)])
def test_gathering_by_layer_takes_less_memory_than_once_a_step(devices, rows):
    mesh = us.parallel.mesh(dp=devices, devices=jax.devices()[:devices])
    params = {"layers": {"up": floats(8, 64, 256), "down": floats(8, 256, 64)}}
    layout = us.parallel.layout(params, {}, mesh)
    assert layout.over("dp").by_name["layers/up"] == P("dp")  # along the layers themselves
    share = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
    args = jax.tree.map(share, params, layout.over("dp").shardings()), floats(rows * devices, 64)

    def of(gather, loss):
        options = dict(zero=3, gather=gather, layout=layout)
        fn = us.parallel.reduced(us.value_and_grad(loss), **options)
        with jax.set_mesh(mesh):
            return temp(lambda *args: fn(*args)[2], *args)

    by_layer = of("layer", us.parallel.gathered(scanned, layout))
    assert by_layer <= 0.75 * of("step", scanned)
