"""Laws of shares gathered where they are used."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import unitscale_jax as us
from unitscale_jax.loss import Mean
from unitscale_jax.testing import check_sharded
from unitscale_jax.trace.costs import collectives

LAYERS, WIDTH, HIDDEN = 4, 8, 16


def normal(key, *shape):
    return jax.random.normal(jax.random.key(key), shape) / 3


PARAMS = {
    "embed": normal(0, WIDTH, WIDTH),
    "layers": {"up": normal(1, LAYERS, WIDTH, HIDDEN), "down": normal(2, LAYERS, HIDDEN, WIDTH)},
    "head": normal(3, WIDTH, 3),
    "odd": jnp.full(3, 0.1),
}
RULES = {"layers/up": {-1: "tp"}, "layers/down": {-2: "tp"}}
X = normal(4, 16, WIDTH)


def loss(p, x, *, remat=False, dtype=None):
    """A stack of layers in a scan, between a dense layer and a head that meets a branch."""
    cast = lambda w: w if dtype is None else w.astype(dtype)

    def layer(h, w):
        return h + jnp.tanh(h @ cast(w["up"])) @ cast(w["down"]), None

    h = cast(x) @ cast(p["embed"])
    h = jax.lax.scan(jax.checkpoint(layer) if remat else layer, h, p["layers"])[0]
    out = jax.lax.cond(h[0, 0] > 9, lambda w: 2 * (h @ w), lambda w: h @ w, cast(p["head"]))
    out = jax.jit(lambda o, b: o + b)(out, cast(p["odd"])).astype(jnp.result_type(x))
    return Mean(jnp.sum(jnp.sin(out), -1), jnp.ones_like(x[:, 0]))


def shares_of(params):
    """Along a dimension that is not that of the layers, where there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    return us.parallel.layout(params, RULES, mesh, missing="whole")


def grad_of(layout, parts=2, **options):
    fn = us.parallel.gathered(functools.partial(loss, **options), layout)
    inner = us.accumulated(us.value_and_grad(fn), parts)
    return us.parallel.reduced(inner, zero=3, gather="layer", layout=layout)


def step(params, x, **options):
    layout = shares_of(params)
    return grad_of(layout, **options)(us.parallel.shard(params, layout.over("dp")), x)[2]


@pytest.mark.parametrize("options", [dict(parts=1), dict(parts=2, remat=True)], ids=str)
def test_gradients_are_those_of_one_device(options):
    meshes = [us.parallel.mesh(dp=8), us.parallel.mesh(dp=2, tp=4)]
    fn = functools.partial(step, **options)
    whole = lambda p, x: us.value_and_grad(loss)(p, x)[2]
    check_sharded(fn, (PARAMS, X), meshes, reference=whole)


def program(mesh, params=PARAMS, rules=(), **options):
    with jax.set_mesh(mesh):
        layout = us.parallel.layout(params, rules, mesh)
        placed = us.parallel.shard(params, layout.over("dp"))
        return jax.jit(lambda p, x: grad_of(layout, **options)(p, x)[2]).lower(placed, X).compile()


# 5 layers, so that 8 devices divide each layer and not the stack of them.
DEEP = PARAMS | {"layers": jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), PARAMS["layers"])}


@pytest.mark.parametrize(("sizes", "rules"), [((8, 1), ()), ((2, 4), RULES)])
def test_one_layer_is_whole_at_a_time_and_gathered_again_for_the_backward_pass(sizes, rules):
    (dp, tp), mesh = sizes, us.parallel.mesh(dp=sizes[0], tp=sizes[1])
    rows = collectives(program(mesh, DEEP, rules, parts=1), mesh)
    kinds: dict[str, list] = {}
    for c in rows:
        if c.loops and c.axes == ("dp",):
            kinds.setdefault(c.kind, []).append((c.bytes, c.times))
    layer = 4 * WIDTH * HIDDEN // tp  # bytes of one kernel of one layer
    assert kinds["all-gather"] == [(layer, 5)] * 4  # two kernels, forward and backward
    assert kinds["reduce-scatter"] == [(layer // dp, 5)] * 2
    assert not any(c.kind == "all-gather" and "tp" in c.axes and c.bytes > 64 for c in rows)


def test_a_cast_travels_and_its_gradient_is_summed_in_float32():
    mesh = us.parallel.mesh(dp=8)
    with jax.set_mesh(mesh):
        layout = us.parallel.layout(DEEP, {}, mesh)
        jaxpr = str(jax.make_jaxpr(grad_of(layout, 1, dtype=jnp.bfloat16))(DEEP, X))
    gathers = [line for line in jaxpr.splitlines() if "= all_gather[" in line]
    assert gathers and "bf16" in jaxpr
    scatters = [line for line in jaxpr.splitlines() if "= reduce_scatter[" in line]
    assert scatters and all(":f32[" in line for line in scatters)
    carried = [line for line in gathers if "bf16[8,16]" in line or "bf16[16,8]" in line]
    assert len(carried) == 4


def test_less_memory_than_gathering_once_a_step():
    mesh = us.parallel.mesh(dp=8)
    params = {
        "embed": PARAMS["embed"],
        "head": PARAMS["head"],
        "odd": PARAMS["odd"],
        "layers": {"up": normal(1, 9, WIDTH, 512), "down": normal(2, 9, 512, WIDTH)},
    }
    by_layer = program(mesh, params, parts=1, remat=True).memory_analysis().temp_size_in_bytes
    with jax.set_mesh(mesh):
        layout = us.parallel.layout(params, {}, mesh)
        placed = us.parallel.shard(params, layout.over("dp"))
        inner = us.value_and_grad(functools.partial(loss, remat=True))
        at_once = us.parallel.reduced(inner, zero=3, layout=layout)
        compiled = jax.jit(lambda p, x: at_once(p, x)[2]).lower(placed, X).compile()
    assert by_layer < 0.5 * compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("sizes", [(4, 1), (2, 4)])
def test_a_stack_that_is_cut_along_its_layers_is_cut_anew_before_the_loop(sizes):
    (dp, tp), devices = sizes, jax.devices()[: sizes[0] * sizes[1]]
    mesh = us.parallel.mesh(dp=dp, tp=tp, devices=devices)  # dp divides the 4 layers
    with jax.set_mesh(mesh):
        layout = us.parallel.layout(PARAMS, RULES, mesh)
        assert layout.over("dp").by_name["layers/up"][0] == "dp"
        placed = us.parallel.shard(PARAMS, layout.over("dp"))
        run = jax.jit(lambda p, x: grad_of(layout, 1)(p, x)[2]).lower(placed, X).compile()
        got = run(placed, X)
    want = us.value_and_grad(loss)(PARAMS, X)[2]
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)
    rows = [c for c in collectives(run, mesh) if c.axes == ("dp",)]
    layer, sent = 4 * WIDTH * HIDDEN // tp, {c.kind: c for c in rows if c.loops}
    assert sent["all-gather"].bytes == layer and sent["reduce-scatter"].bytes == layer // dp
    assert all(c.bytes <= LAYERS * layer // dp for c in rows if not c.loops)  # a share


def test_a_stack_that_cannot_be_cut_anew_is_gathered_before_the_loop():
    mesh = us.parallel.mesh(dp=4, devices=jax.devices()[:4])
    params, x = {"layers": normal(5, 4, 3, 3)}, normal(6, 8, 3)
    layer = lambda h, w: (jnp.tanh(h @ w), None)
    fn = lambda p, x: Mean(jnp.sum(jax.lax.scan(layer, x, p["layers"])[0], -1), jnp.ones(len(x)))
    with jax.set_mesh(mesh):
        layout = us.parallel.layout(params, {}, mesh)
        by_layer = us.value_and_grad(us.parallel.gathered(fn, layout))
        run = us.parallel.reduced(by_layer, zero=3, gather="layer", layout=layout)
        got = jax.jit(run)(us.parallel.shard(params, layout.over("dp")), x)[2]
    want = us.value_and_grad(fn)(params, x)[2]
    np.testing.assert_allclose(got["layers"], want["layers"], rtol=1e-5, atol=1e-6)


POLICIES = jax.checkpoint_policies


@pytest.mark.parametrize(
    "policy",
    [None, POLICIES.everything_saveable, POLICIES.save_only_these_names("h")],
    ids=["none", "everything", "names"],
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_is_rematerialized_may_hold_keys_counts_and_names(policy, nested):
    """Operands without a gradient, tables without a device, and what a policy keeps."""
    table = jnp.arange(float(HIDDEN)) / 9

    @functools.partial(jax.checkpoint, policy=policy)
    def layer(carry, w):
        h, count, key = carry
        key, own = jax.random.split(key)
        kept = jnp.where(jax.random.bernoulli(own, 0.7, (WIDTH,)), 1.0, 0.0)
        h = checkpoint_name(h + jnp.tanh(h @ w["up"] + table) @ w["down"] * kept, "h")
        return (h, count + 1, key), jnp.sum(h)

    def fn(p, x):
        start = x, jnp.int32(0), jax.random.key(0)
        stack = lambda layers: jax.lax.scan(layer, start, layers)[0]
        h, count, _ = (jax.checkpoint(stack) if nested else stack)(p["layers"])
        h = jax.checkpoint(jnp.sin)(h)  # without parameters
        return Mean(jnp.sum(h * h, -1) * count.astype(h.dtype), jnp.ones_like(x[:, 0]))

    mesh = us.parallel.mesh(dp=4, devices=jax.devices()[:4])
    params = {"layers": PARAMS["layers"]}
    with jax.set_mesh(mesh):
        layout = us.parallel.layout(params, {}, mesh)
        by_layer = us.value_and_grad(us.parallel.gathered(fn, layout))
        run = us.parallel.reduced(by_layer, zero=3, gather="layer", layout=layout)
        placed = us.parallel.shard(params, layout.over("dp"))
        compiled = jax.jit(lambda p, x: run(p, x)[2]).lower(placed, X).compile()
        got = compiled(placed, X)
    want = jax.jit(lambda p, x: us.value_and_grad(fn)(p, x)[2])(params, X)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-5, atol=1e-5)
    looped = [c.kind for c in collectives(compiled, mesh) if c.loops]
    assert set(looped) == {"all-gather", "reduce-scatter"}  # and no sum of a table's gradient


def test_what_is_no_share_is_named():
    mesh = us.parallel.mesh(dp=8)
    with jax.set_mesh(mesh):
        layout = us.parallel.layout(PARAMS, {}, mesh)
        fn = us.value_and_grad(us.parallel.gathered(loss, layout))
        wrong = us.parallel.reduced(fn, zero=0)
        with pytest.raises(
            ValueError, match=r"'embed' has shape \(8, 8\), and a share .* \(1, 8\)"
        ):
            jax.jit(wrong)(PARAMS, X)
