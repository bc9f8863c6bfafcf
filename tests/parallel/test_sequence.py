"""Laws of attention over a split sequence: it is attention, with its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import unitscale_jax as us
from tests.support.sharded import assert_near
from tests.support.zoo._model import activations
from unitscale_jax import parallel
from unitscale_jax.parallel import ring_attention, stripe, ulysses_attention, unstripe

BATCH, TIME, HEADS, DIM, CP = 2, 16, 4, 5, 4
SPEC = P(None, "cp")
SEGMENTS = jnp.array([[0] * 3 + [1] * 7 + [2] * 6, [0] * 9 + [7] * 7])


def inputs(kv_heads, dtype="float32"):
    q, *kv = (
        activations(BATCH, TIME, heads, DIM, seed=k)
        for k, heads in enumerate([HEADS, kv_heads, kv_heads])
    )
    return [x.astype(dtype) for x in (q, *kv, activations(BATCH, TIME, HEADS, DIM, seed=3))]


def oracle(q, k, v, seen):
    """Of one device: `seen` is (batch, queries, keys)."""
    k, v = (jnp.repeat(x, HEADS // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(DIM).astype(q.dtype)
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True, where=seen[:, None], initial=-99.0))
    return jnp.einsum(
        "bhqk,bkhd->bqhd", weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-9), v
    )


def values_and_grads(fn, *args):
    """Of arguments q, k, v and the weights of the outputs."""
    loss = lambda *xs: jnp.sum(fn(*xs[:3]) * xs[3])
    return fn(*args[:3]), jax.grad(loss, (0, 1, 2))(*args)


@jax.jit
def of_one_device(seen, *args):
    return values_and_grads(lambda *qkv: oracle(*qkv, seen), *args)


CASES = {  # how a ring is made, kv heads, what a query sees, whether texts share a sequence
    "all": (dict(), HEADS, np.ones((TIME, TIME), bool), False),
    "all of a text": (dict(), 2, np.ones((TIME, TIME), bool), True),
    "causal, of shared heads": (dict(causal=True), 1, np.tri(TIME, dtype=bool), False),
    "striped": (dict(causal=True, striped=True), 2, np.tri(TIME, dtype=bool), True),
}


def ring(options, dealt, segments=None):
    """A ring over whole arrays; the rows of a striped one are dealt out and put back."""
    deal = functools.partial(stripe, parts=CP) if dealt else lambda x: x
    back = functools.partial(unstripe, parts=CP) if dealt else lambda x: x

    def body(q, k, v, s):
        return ring_attention(q, k, v, mesh_axis="cp", segments=s, **options)

    specs = (SPEC, SPEC, SPEC, None if segments is None else SPEC)
    split = jax.shard_map(body, in_specs=specs, out_specs=SPEC)
    s = None if segments is None else deal(segments)
    return lambda q, k, v: back(split(deal(q), deal(k), deal(v), s))


@pytest.mark.parametrize("case", CASES)
def test_a_ring_is_attention_with_its_gradients(case):
    """Grouped heads, several texts in a sequence, rows dealt out; differentiated outside."""
    options, kv_heads, seen, packed = CASES[case]
    same = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
    seen = jnp.broadcast_to(seen, same.shape) & (same if packed else True)
    args = inputs(kv_heads)
    with jax.set_mesh(parallel.mesh(dp=2, cp=CP)):
        fn = ring(options, "striped" in options, SEGMENTS if packed else None)
        got = jax.jit(functools.partial(values_and_grads, fn))(*args)
    assert_near(got, of_one_device(seen, *args))


def test_a_ring_in_float64_and_differentiated_inside():
    with jax.enable_x64(True), jax.set_mesh(parallel.mesh(dp=2, cp=CP)):
        args = inputs(2, "float64")
        body = functools.partial(ring_attention, mesh_axis="cp", causal=True)
        specs = (P("dp", "cp"),) * 4  # rows of a batch too
        inside = jax.shard_map(
            functools.partial(values_and_grads, body),
            in_specs=specs,
            out_specs=(specs[0], specs[:3]),
        )
        seen = jnp.broadcast_to(jnp.tri(TIME, dtype=bool), (BATCH, TIME, TIME))
        want = of_one_device(seen, *args)
        assert_near(jax.jit(inside)(*args), want)


def test_a_mask_is_of_all_keys_and_a_query_that_sees_nothing_has_zeros():
    q, k, v, coef = inputs(2)
    mask = np.random.default_rng(0).random((BATCH, 1, TIME, TIME)) < 0.5
    mask[0, 0, 5] = False
    with jax.set_mesh(parallel.mesh(dp=2, cp=CP)):
        body = lambda q, k, v, m: ring_attention(q, k, v, m, mesh_axis="cp")
        split = jax.shard_map(
            body, in_specs=(SPEC, SPEC, SPEC, P(None, None, "cp")), out_specs=SPEC
        )
        fn = lambda q, k, v: split(q, k, v, mask)
        got = jax.jit(functools.partial(values_and_grads, fn))(q, k, v, coef)
        with pytest.raises(ValueError, match=r"mask of 4 keys; cp=4 devices have 16.*causal=True"):
            jax.eval_shape(split, q, k, v, mask[..., :4])
    assert not np.any(got[0][0, 5])
    assert_near(got, of_one_device(mask[:, 0], q, k, v, coef))


def test_a_ring_of_one_device_and_bfloat16():
    """Of one device no ring is left in the program; sums are float32 whatever comes in."""
    q, k, v, _ = inputs(2, "bfloat16")
    body = functools.partial(ring_attention, mesh_axis="cp", causal=True)
    seen = jnp.broadcast_to(jnp.tri(TIME, dtype=bool), (BATCH, TIME, TIME))
    want = oracle(*(x.astype("float32") for x in (q, k, v)), seen)
    for mesh in (parallel.mesh(cp=1, devices=jax.devices()[:1]), parallel.mesh(dp=2, cp=CP)):
        with jax.set_mesh(mesh):
            run = jax.jit(jax.shard_map(body, in_specs=SPEC, out_specs=SPEC))
            got = run(q, k, v)
            alone = "collective-permute" not in run.lower(q, k, v).compile().as_text()
        assert got.dtype == jnp.bfloat16 and alone == (mesh.shape["cp"] == 1)
        assert_near(got.astype("float32"), want, limit=1e-2)


def test_a_backward_pass_keeps_no_other_devices_keys():
    """Residuals are as many numbers as the device's own rows have."""
    q, k, v, _ = inputs(HEADS)
    body = functools.partial(ring_attention, mesh_axis="cp", causal=True)
    with jax.set_mesh(parallel.mesh(dp=2, cp=CP)):
        split = jax.shard_map(body, in_specs=SPEC, out_specs=SPEC)
        pull = jax.eval_shape(lambda *xs: jax.vjp(split, *xs)[1], q, k, v)
    kept = sum(x.size for x in jax.tree.leaves(pull))
    assert kept <= 4 * q.size + q.size // DIM  # q, k, v, the output, one number a query and head


def test_a_striped_ring_does_five_eighths_of_the_products():
    def flops(**options):
        body = functools.partial(ring_attention, mesh_axis="cp", causal=True, **options)
        with jax.set_mesh(parallel.mesh(dp=2, cp=CP)):
            split = jax.shard_map(body, in_specs=SPEC, out_specs=SPEC)
            rows = us.trace.cost(lambda *xs: jax.vjp(split, *xs)[1](xs[0]), *inputs(HEADS)[:3]).rows
        return sum(row.total.flops for row in rows if row.site.name == "dot_general")

    assert 0 < flops(striped=True) * 8 == flops() * 5


class Decoder(nn.Module):
    attention_fn: object

    @nn.compact
    def __call__(self, x, mask):
        heads = nn.MultiHeadDotProductAttention(
            num_heads=HEADS, qkv_features=20, attention_fn=self.attention_fn
        )
        return x + heads(nn.LayerNorm()(x), mask=mask)


def test_a_flax_layer_over_a_split_sequence_is_the_layer():
    x, mask = activations(BATCH, TIME, 12), nn.make_causal_mask(jnp.ones((BATCH, TIME)))
    whole = Decoder(nn.dot_product_attention)
    params = jax.jit(whole.init)(jax.random.key(0), x, mask)
    split = Decoder(functools.partial(ring_attention, mesh_axis="cp", causal=True))
    loss = lambda out: jnp.sum(jnp.sin(out))
    with jax.set_mesh(parallel.mesh(dp=2, cp=CP)):
        body = jax.shard_map(
            jax.checkpoint(lambda p, x: split.apply(p, x, None)),
            in_specs=(P(), SPEC),
            out_specs=SPEC,
        )
        got = jax.jit(jax.value_and_grad(lambda p: loss(body(p, x))))(params)
    want = jax.jit(jax.value_and_grad(lambda p: loss(whole.apply(p, x, mask))))(params)
    # A bias of the keys is without effect, and so its gradient is rounding alone.
    for tree in (got, want):
        tree[1]["params"]["MultiHeadDotProductAttention_0"]["key"].pop("bias")
    assert_near(got, want)


def test_dropout_and_shapes_are_refused():
    q, k, v, _ = inputs(HEADS)
    with jax.set_mesh(parallel.mesh(dp=2, cp=CP)):
        run = lambda q, k, **options: jax.eval_shape(
            jax.shard_map(
                functools.partial(ring_attention, mesh_axis="cp", **options),
                in_specs=SPEC,
                out_specs=SPEC,
            ),
            q,
            k,
            v,
        )
        with pytest.raises(ValueError, match="no dropout"):
            run(q, k, dropout_rate=0.1, deterministic=False)
        with pytest.raises(ValueError, match=r"query \(2, 4, 3, 5\), key .* multiple of kv_heads"):
            run(q[:, :, :3], k)


def test_ulysses_is_attention_with_its_gradients():
    args, seen = inputs(2), jnp.broadcast_to(jnp.tri(TIME, dtype=bool), (BATCH, TIME, TIME))
    with jax.set_mesh(parallel.mesh(dp=4, cp=2)):
        body = functools.partial(ulysses_attention, mesh_axis="cp", is_causal=True)
        fn = jax.shard_map(body, in_specs=SPEC, out_specs=SPEC)
        got = jax.jit(functools.partial(values_and_grads, fn))(*args)
    assert_near(got, of_one_device(seen, *args))


def test_ulysses_refuses_heads_that_do_not_divide():
    q, k, v, _ = inputs(1)
    with jax.set_mesh(parallel.mesh(dp=2, cp=CP)):
        body = functools.partial(ulysses_attention, mesh_axis="cp")
        with pytest.raises(ValueError, match="key of 1 heads, which cp=4.*`ring_attention`"):
            jax.eval_shape(jax.shard_map(body, in_specs=SPEC, out_specs=SPEC), q, k, v)


@pytest.mark.parametrize("striped", [False, True])
def test_positions_are_those_of_the_rows(striped):
    x = jnp.arange(TIME, dtype=jnp.int32)
    with jax.set_mesh(parallel.mesh(dp=2, cp=CP)):
        body = lambda x: parallel.row_positions(x.shape[0], "cp", striped=striped)
        got = jax.shard_map(body, in_specs=P("cp"), out_specs=P("cp"))(x)
    np.testing.assert_array_equal(got, stripe(x, CP, dim=0) if striped else x)
