"""Laws of tensor parallelism by hand: a model over devices is the model, with its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tests.support.sharded import assert_near
from tests.support.zoo._model import activations, tokens
from tests.support.zoo._ops import attention, causal, rms_norm
from unitscale_jax import parallel
from unitscale_jax.parallel import column, enter_sequence, exit_sequence, row

BATCH, TIME, WIDTH, HEADS, HEAD, FFN, VOCAB = 4, 8, 12, 4, 3, 16, 24
SHAPES = {
    "tokens": (VOCAB, WIDTH),
    "norm": {"scale": (WIDTH,)},
    "qkv": (WIDTH, HEADS, 3 * HEAD),
    "o": (HEADS, HEAD, WIDTH),
    "up": (WIDTH, FFN),
    "bias": (FFN,),
    "down": (FFN, WIDTH),
    "last": (WIDTH,),
}
LAYOUT = {
    "tokens": P("tp", None),
    "norm": {"scale": P()},
    "qkv": P(None, "tp"),
    "o": P("tp"),
    "up": P(None, "tp"),
    "bias": P("tp"),
    "down": P("tp", None),
    "last": P(),
}
ROWS = {"ids": P("dp"), "labels": P("dp"), "real": P("dp")}


def is_shape(x):
    return isinstance(x, tuple)


def params_of(dtype):
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=is_shape)
    made = [0.4 * activations(*shape, seed=k) for k, shape in enumerate(leaves)]
    return jax.tree.map(lambda x: x.astype(dtype), structure.unflatten(made))


def batch():
    ids = tokens(BATCH, TIME + 1, vocab=VOCAB)
    real = jnp.arange(TIME) < jnp.array([[8], [5], [2], [7]])
    return {"ids": ids[:, :-1], "labels": jnp.where(real, ids[:, 1:], -1), "real": real}


def mixed(p, x):
    """Attention of the heads that are there, from their kernels."""
    q, k, v = jnp.split(x, 3, axis=-1)
    return attention(q, k, v, causal(q.shape[1]))


def whole(p, b):
    """The model of one device: a block, the head tied to the table of tokens."""
    x = p["tokens"][b["ids"]]
    h = mixed(p, jnp.tensordot(rms_norm(p["norm"], x), p["qkv"], 1))
    x = x + jnp.tensordot(h, p["o"], 2)
    h = jax.nn.gelu(rms_norm(p["norm"], x) @ p["up"] + p["bias"])
    x = x + (h @ p["down"] + p["last"])
    logits = jax.nn.log_softmax(rms_norm(p["norm"], x) @ p["tokens"].T)
    losses = -jnp.take_along_axis(logits, b["labels"][..., None], -1)[..., 0]
    return jnp.where(b["real"], losses, 0).sum()


def local(p, b, sequence):
    """The same from a device's part of the kernels; with `sequence` of rows too, between layers."""
    dim = 1 if sequence else None
    enter = (lambda x: enter_sequence(x, "tp", dim=1)) if sequence else lambda x: x

    def out(h, w, bias=0.0):
        if not sequence:
            return row(h, w, bias, mesh_axis="tp")
        return exit_sequence(jnp.tensordot(h, w, w.ndim - 1), "tp") + bias

    x = parallel.vocab_embed(p["tokens"], b["ids"], "tp", sequence=dim)
    x = x + out(mixed(p, column(enter(rms_norm(p["norm"], x)), p["qkv"])), p["o"])
    h = jax.nn.gelu(column(enter(rms_norm(p["norm"], x)), p["up"], p["bias"]))
    x = x + out(h, p["down"], p["last"])
    logits = column(enter(rms_norm(p["norm"], x)), p["tokens"].T)
    losses = parallel.vocab_loss(logits, b["labels"], "tp")
    return jnp.where(b["real"], losses, 0).sum()


def over_devices(sequence):
    """Loss and gradient, differentiated outside of the `shard_map`, and gradient inside."""
    run = functools.partial(local, sequence=sequence)
    total = jax.shard_map(
        lambda p, b: lax.psum(run(p, b), "dp"), in_specs=(LAYOUT, ROWS), out_specs=P()
    )
    inside = jax.shard_map(jax.grad(run), in_specs=(LAYOUT, ROWS), out_specs=LAYOUT)
    return jax.jit(lambda p, b: (*jax.value_and_grad(total)(p, b), inside(p, b)))


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_language_model_over_devices_is_that_of_one(dtype, sequence):
    with jax.enable_x64(dtype == "float64"), jax.set_mesh(parallel.mesh(dp=2, tp=4)):
        params = params_of(dtype)
        loss, grads = jax.jit(jax.value_and_grad(whole))(params, batch())
        assert_near(over_devices(sequence)(params, batch()), (loss, grads, grads))


def test_an_axis_of_one_device_is_no_axis_to_the_bit():
    """Without `dp`, whose sum is of another order."""
    params, one = params_of("float32"), parallel.mesh(dp=1, tp=1, devices=jax.devices()[:1])
    x, h = activations(TIME, WIDTH), activations(TIME, FFN, seed=1)

    def kit(p, x, h):
        entered = enter_sequence(x, "tp")
        up = column(entered, p["up"], p["bias"])
        down = row(h, p["down"], p["last"], mesh_axis="tp")
        ring = parallel.ring_matmul(x, p["up"], "tp"), parallel.ring_scatter(h, p["down"], "tp")
        return up, down, exit_sequence(h @ p["down"], "tp"), *ring

    with jax.set_mesh(one):
        specs = (LAYOUT, P("tp"), P(None, "tp"))
        kinds = (P(None, "tp"), P(), P("tp"), P(None, "tp"), P("tp"))
        got = jax.jit(jax.shard_map(kit, in_specs=specs, out_specs=kinds))(params, x, h)
    up, down = x @ params["up"], h @ params["down"]
    for a, b in zip(got, (up + params["bias"], down + params["last"], down, up, down), strict=True):
        np.testing.assert_array_equal(a, b)


RINGS = {  # the body, what it is for whole arrays, where inputs and output lie
    "gathered": (parallel.ring_matmul, (P(None, "tp"), P(None, "tp")), P(None, None, "tp")),
    "scattered": (parallel.ring_scatter, (P(None, None, "tp"), P("tp")), P(None, "tp")),
}


@pytest.mark.parametrize("kind", RINGS)
def test_rings_are_the_product_with_its_gradients(kind):
    body, specs, out = RINGS[kind]
    x, w = activations(2, 16, WIDTH - 4), activations(WIDTH - 4, 2, 24, seed=1)
    w = w if kind == "scattered" else w.swapaxes(1, 2)
    loss = lambda product: lambda x, w: jnp.sum(jnp.sin(product(x, w)))
    with jax.set_mesh(parallel.mesh(tp=8)):
        ring = jax.shard_map(functools.partial(body, mesh_axis="tp"), in_specs=specs, out_specs=out)
        got = jax.jit(lambda x, w: (ring(x, w), jax.grad(loss(ring), (0, 1))(x, w)))
        product = lambda x, w: jnp.tensordot(x, w, 1)
        assert_near(got(x, w), (product(x, w), jax.grad(loss(product), (0, 1))(x, w)))


def test_a_ring_sends_its_rows_to_neighbors_only():
    with jax.set_mesh(parallel.mesh(tp=8)):
        ring = jax.shard_map(
            functools.partial(parallel.ring_matmul, mesh_axis="tp"),
            in_specs=(P("tp"), P(None, "tp")),
            out_specs=P(None, "tp"),
        )
        text = jax.jit(ring).lower(activations(16, 4), activations(4, 8)).compile().as_text()
    assert text.count(" collective-permute(") + text.count(" collective-permute-start(") == 7
    assert "all-gather" not in text


def test_rows_that_do_not_divide_are_an_error():
    with jax.set_mesh(parallel.mesh(tp=8)):
        split = jax.shard_map(lambda x: exit_sequence(x, "tp"), in_specs=P(), out_specs=P("tp"))
        with pytest.raises(ValueError, match="6 rows over tp=8.* Pad the rows to 8"):
            jax.eval_shape(split, jnp.ones((6, 4)))
        split = jax.shard_map(
            lambda x, w: parallel.ring_matmul(x, w, "tp", dim=-1), in_specs=P(), out_specs=P("tp")
        )
        with pytest.raises(ValueError, match="dim=-1 of .*sums over"):
            jax.eval_shape(split, jnp.ones((6, 4)), jnp.ones((4, 2)))
