"""Laws of compact functions: they are the masked ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import unitscale_jax as us
from tests.support import zoo
from unitscale_jax.compaction import (
    compact,
    compacted,
    groups,
    plan_of,
    zero_channels,
)
from unitscale_jax.trace.program import bodies, sites, trace

TOLERANCE = 300 * np.finfo(np.float32).eps
FAST = {"xla_backend_optimization_level": 0}
jitted = functools.partial(jax.jit, compiler_options=FAST)


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 0.4, jnp.float32)


def some_channels(graph, seed=0, flags=frozenset({"exact"})):
    """A plan that keeps some channels of each group, another number in each."""
    rng = np.random.default_rng(seed)
    some = lambda n: rng.permutation(n)[: rng.integers(1, n)].tolist()
    named = {g.name: some(g.size) for g in graph.groups if g.flags >= flags}
    return plan_of(graph, named, exact_only="exact" in flags)


def assert_close(got, want):
    sizes = [float(jnp.abs(b).max()) if b.size else 0.0 for b in jax.tree.leaves(want)]
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), sizes, strict=True)
    for a, b, size in pairs:
        scale = max(size, 1e-3 * max(sizes))  # a bias of keys has a gradient of rounding errors
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * scale)


def both(fn, plan, params, *args):
    """Results of the masked function and of the compact one."""
    run = lambda p, q, *args: (fn(p, *args), compacted(fn, plan)(q, *args))
    return jitted(run)(zero_channels(params, plan), compact(params, plan), *args)


# ------------------------------------------------------------------------ the whole zoo (C2, C3)


@pytest.mark.parametrize("name", zoo.COVER)
def test_values_and_gradients_of_the_zoo_are_those_of_the_masked_models(name):
    model = zoo.model(name)
    plan = some_channels(groups(model.apply, model.params, *model.inputs))

    def evaluated(apply, params, *inputs):
        def loss(params):
            out = jax.tree.leaves(apply(params, *inputs))
            return sum(jnp.mean(jnp.square(y.astype(jnp.float32) - 0.5)) for y in out), out

        if not model.differentiable:
            return loss(params)[1], {}
        grads, out = jax.grad(loss, has_aux=True)(params)
        return out, grads

    small_fn = compacted(model.apply, plan)
    run = lambda p, q, *xs: (evaluated(model.apply, p, *xs), evaluated(small_fn, q, *xs))
    masked, small = zero_channels(model.params, plan), compact(model.params, plan)
    (want, grads), (got, got_grads) = jitted(run)(masked, small, *model.inputs)
    assert_close(got, want)
    if model.differentiable:
        assert_close(got_grads, compact(grads, plan))


# --------------------------------------------------------------------- each group alone (C2), E8

WIDTH, HEADS, KV, DIM, FFN, VOCAB = 12, 4, 2, 6, 20, 11


def rms(x, scale):
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def rotated(x):
    """By position, in pairs half a head apart; (batch, time, heads, dim)."""
    count = lambda n: jnp.arange(n, dtype=jnp.float32)
    angle = count(x.shape[1])[:, None, None] * 0.1 ** count(x.shape[-1] // 2)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], -1
    )


def block(p, x):
    """Sizes are numbers of Python's, as in most people's code: a reshape says (.., 4, 6)."""
    h = rms(x, p["n1"])
    if "qkv" in p:
        q, k, v = jnp.split(h @ p["qkv"], [HEADS * DIM, (HEADS + KV) * DIM], -1)
    else:
        q, k, v = (h @ p[name] for name in "qkv")
    split = lambda y, heads: y.reshape(*y.shape[:2], heads, DIM)
    q, k, v = rotated(split(q, HEADS)), rotated(split(k, KV)), split(v, KV)
    k, v = (jnp.repeat(y, HEADS // KV, 2) for y in (k, v))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / DIM**0.5)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], HEADS * DIM)
    x = x + mixed @ p["o"]
    h = rms(x, p["n2"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def language_model(layers=2, fused=False):
    """The function, its parameters and tokens; tied, with rotary embedding and grouped queries."""

    def apply(p, ids):
        x = p["embed"][ids]
        for row in p["layers"]:
            x = block(row, x)
        return rms(x, p["n"]) @ p["embed"].T

    shapes = {"n1": (WIDTH,), "n2": (WIDTH,), "o": (HEADS * DIM, WIDTH)}
    shapes |= {"gate": (WIDTH, FFN), "up": (WIDTH, FFN), "down": (FFN, WIDTH)}
    heads = {"qkv": HEADS + 2 * KV} if fused else {"q": HEADS, "k": KV, "v": KV}
    shapes |= {name: (WIDTH, n * DIM) for name, n in heads.items()}
    row = lambda n: {k: drawn(*s, seed=n * 10 + j) for j, (k, s) in enumerate(shapes.items())}
    params = {
        "embed": drawn(VOCAB, WIDTH),
        "n": drawn(WIDTH),
        "layers": list(map(row, range(layers))),
    }
    ids = jnp.asarray(np.random.default_rng(0).integers(VOCAB, size=(3, 5)), jnp.int32)
    return apply, params, ids


def halves(graph, *sizes):
    """A plan of half of each group of some sizes, all of them if none are given."""
    chosen = [g for g in graph.groups if not sizes or g.size in sizes]
    return plan_of(graph, {g.name: range(0, g.size, 2) for g in chosen})


@pytest.mark.parametrize("fused", [False, True])
def test_a_language_model_halves_as_in_the_worked_example(fused):
    """E8: heads, grouped queries, fused kernels, tied embeddings, and sizes written as numbers."""
    apply, params, ids = language_model(fused=fused)
    graph = groups(apply, params, ids)
    count = lambda *sizes: us.tree.size(compact(params, halves(graph, *sizes)))
    assert us.tree.size(params) == 3360
    assert [count(), count(WIDTH), count(FFN)] == [672, 1680, 2640]
    if fused:
        assert compact(params, halves(graph))["layers"][0]["qkv"].shape == (6, 15)
    want, got = both(apply, halves(graph), params, ids)
    assert_close(got, want)


def test_each_group_alone_is_the_masked_function():
    apply, params, ids = language_model(layers=1)
    graph = groups(apply, params, ids)
    assert sorted(g.size for g in graph.groups) == sorted([WIDTH, FFN, KV, HEADS // KV, DIM])
    for group in graph.groups:
        plan = plan_of(graph, {group.name: [0, *range(2, group.size)]})
        assert_close(*both(apply, plan, params, ids)[::-1])


# ----------------------------------------------------------------- under transformations, and over


def mlp(p, x):
    h = jax.nn.relu(x @ p["a"] + p["b"])
    return h.reshape(*x.shape[:-1], 4, 4).reshape(*x.shape[:-1], 16) @ p["c"]


MLP = {"a": drawn(8, 16), "b": drawn(16, seed=1), "c": drawn(16, 3, seed=2)}


def mlp_plan():
    graph = groups(mlp, MLP, drawn(2, 8))
    return plan_of(graph, {g.name: [0, 3] for g in graph.groups})


def looped(fn):
    """Three steps of descent inside a scan."""

    def steps(params, x):
        loss = lambda params: jnp.square(fn(params, x)).mean()
        step = lambda p, _: (jax.tree.map(lambda a, g: a - 0.1 * g, p, jax.grad(loss)(p)), None)
        return lax.scan(step, params, None, length=3)[0]

    return steps


def over_two_devices(fn):
    mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    return jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))


TRANSFORMED = {
    "plain": lambda fn: fn,
    "jit": jax.jit,
    "vmap over the batch": lambda fn: jax.vmap(fn, (None, 0)),
    "remat": jax.checkpoint,
    "gradient": lambda fn: jax.grad(lambda p, x: jnp.square(fn(p, x)).sum()),
    "gradient of remat": lambda fn: jax.grad(
        lambda p, x: jnp.square(jax.checkpoint(fn)(p, x)).sum()
    ),
    "forward mode": lambda fn: lambda p, x: jax.jvp(fn, (p, x), (p, x))[1],
    "scan": looped,
    "shard_map": over_two_devices,
    "rewriting": lambda fn: us.trace.rewritten(fn, {}),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_commutes_with_transformations(name, inside):
    """The transform of the compact function, and the compact function of a transformed one."""
    transform, plan, x = TRANSFORMED[name], mlp_plan(), drawn(4, 8, seed=3)
    if inside and name in ("gradient", "gradient of remat", "scan"):
        pytest.skip("its results have the shapes of parameters, so no channel of it can go")
    want = transform(mlp)(zero_channels(MLP, plan), x)
    small_fn = compacted(transform(mlp), plan) if inside else transform(compacted(mlp, plan))
    got = small_fn(compact(MLP, plan), x)
    if name in ("gradient", "gradient of remat", "scan"):
        want = compact(want, plan)
    assert_close(got, want)


def test_maps_over_an_ensemble_of_compact_parameters():
    plan, x = mlp_plan(), drawn(4, 8, seed=3)
    small = compact(MLP, plan)
    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), small)
    got = jax.vmap(compacted(mlp, plan), (0, None))(stacked, x)
    one = compacted(mlp, plan)
    assert_close(got, jnp.stack([one(small, x), one(jax.tree.map(lambda a: 2 * a, small), x)]))


def test_takes_inputs_of_other_shapes_than_the_plan_was_made_with():
    plan = mlp_plan()
    for shape in [(1, 8), (5, 8), (2, 3, 8)]:
        x = drawn(*shape, seed=4)
        assert_close(compacted(mlp, plan)(compact(MLP, plan), x), mlp(zero_channels(MLP, plan), x))


def test_other_arguments_and_results_pass_as_they_are():
    fn = lambda p, x, flag, *, scale=1.0: {"y": mlp(p, x) * scale, "flag": flag}
    plan, x = mlp_plan(), drawn(2, 8)
    got = compacted(fn, plan)(compact(MLP, plan), x, "name", scale=2.0)
    assert got["flag"] == "name"
    assert_close(got["y"], 2.0 * mlp(zero_channels(MLP, plan), x))


def test_accumulates_exactly():
    plan, batch = mlp_plan(), {"x": drawn(6, 8), "y": drawn(6, 3)}
    small_fn = compacted(mlp, plan)
    loss = lambda p, batch: jnp.square(small_fn(p, batch["x"]) - batch["y"]).mean()
    whole = jax.value_and_grad(loss)
    small = compact(MLP, plan)
    parts = us.accumulated(us.value_and_grad(loss), 3)(small, batch)
    assert_close(parts[-1], whole(small, batch)[1])


def test_autocast_of_the_compact_function_is_the_compact_function_of_autocast():
    plan, x, policy = mlp_plan(), drawn(4, 8), "bfloat16"
    small = compact(MLP, plan)
    one = us.autocast(compacted(mlp, plan), policy)(small, x)
    other = compacted(us.autocast(mlp, policy), plan)(small, x)
    want = us.autocast(mlp, policy)(zero_channels(MLP, plan), x)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(other, want, rtol=2e-2, atol=2e-2)


# ------------------------------------------------------------------------------ what stays (C4)


@pytest.mark.parametrize("name", ["plain_gqa", "plain_scan_remat", "plain_custom_vjp"])
def test_a_plan_that_keeps_all_is_the_identity(name):
    model = zoo.model(name)
    plan = plan_of(groups(model.apply, model.params, *model.inputs), {})
    dense = jax.make_jaxpr(model.apply)(model.params, *model.inputs)
    same = jax.make_jaxpr(compacted(model.apply, plan))(model.params, *model.inputs)
    assert str(same) == str(dense)


@pytest.mark.parametrize("name", ["plain_scan_remat", "plain_custom_vjp", "plain_custom_jvp"])
def test_remat_scans_and_custom_derivatives_stay_where_they_are(name):
    model = zoo.model(name)
    plan = some_channels(groups(model.apply, model.params, *model.inputs))
    kinds = lambda fn, params: [
        eqn.primitive.name for eqn in every_equation(trace(fn, params, *model.inputs).closed.jaxpr)
    ]
    dense = kinds(model.apply, model.params)
    assert kinds(compacted(model.apply, plan), compact(model.params, plan)) == dense
    assert {"remat2", "checkpoint", "custom_vjp_call", "custom_jvp_call"} & set(dense)


def every_equation(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner, _ in bodies(eqn):
            yield from every_equation(inner)


def test_constants_stay_those_of_the_dense_function():
    """E9: a mean over 4 channels of which 2 are gone still divides by 4."""
    fn = lambda p, x: (lambda h: h * lax.rsqrt(jnp.square(h).mean(-1)))(x @ p["a"]) @ p["b"]
    params = {"a": jnp.array([[1.0, 2.0, 5.0, 7.0]]), "b": jnp.eye(4, 2)}
    graph = groups(fn, params, jnp.ones(1))
    assert graph.by_name["a:1"].flags == {"exact", "reduce:sum"}
    plan = plan_of(graph, {"a:1": [0, 1]})
    got = compacted(fn, plan)(compact(params, plan), jnp.ones(1))
    np.testing.assert_allclose(got, [0.894427, 1.788854], rtol=1e-6)
    rebuilt = fn(compact(params, plan), jnp.ones(1))
    np.testing.assert_allclose(rebuilt, [0.632456, 1.264911], rtol=1e-6)


@pytest.mark.parametrize("two_passes", [False, True])
def test_a_variance_in_two_passes_needs_the_channels_that_are_zero(two_passes):
    """E9: (0 - mean)^2 is no zero, so the channels are flagged; in one pass they are exact."""
    one_pass = lambda h, axis: jnp.square(h).mean(axis) - jnp.square(h.mean(axis))
    variance = jnp.var if two_passes else one_pass
    fn = lambda p, x: variance(x @ p["a"], -1)
    params = {"a": jnp.array([[1.0, 2.0, 5.0, 7.0]])}
    graph = groups(fn, params, jnp.ones(1))
    expected = {"reduce:nonlin"} if two_passes else {"exact", "reduce:sum"}
    assert graph.by_name["a:1"].flags == expected
    plan = plan_of(graph, {"a:1": [0, 1]}, exact_only=not two_passes)
    assert fn(zero_channels(params, plan), jnp.ones(1)) == 0.6875
    got = compacted(fn, plan)(compact(params, plan), jnp.ones(1))
    assert got == (0.40625 if two_passes else 0.6875)


# ------------------------------------------------------- equations that say a size, one by one

H = 16
SIZED = {
    "broadcast": lambda h, p: h + jnp.broadcast_to(p["b"], (2, H)),
    "zeros": lambda h, p: h * (1.0 + jnp.zeros((2, H))),
    "iota along another axis": lambda h, p: h * (1.0 + lax.broadcasted_iota(h.dtype, (2, H), 0)),
    "reshape": lambda h, p: jnp.tanh(h.reshape(2, 2, 8).reshape(2, 2, 4, 2)).reshape(2, H),
    "gather": lambda h, p: h[jnp.array([1, 1])],
    "dynamic slice": lambda h, p: h + lax.dynamic_slice_in_dim(h, (h.sum() > 9e9).astype(int), 1),
    "split": lambda h, p: sum(jnp.split(jnp.concatenate([h, h * p["b"]], -1), 2, -1)),
    "slice": lambda h, p: jnp.concatenate([h[:, 6:], h[:, :6]], -1) * jnp.concatenate(
        [p["b"][6:], p["b"][:6]]
    ),
    "loop": lambda h, p: lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c) + jnp.zeros((2, H)), h),
    "branch": lambda h, p: lax.cond(
        h.sum() > 0, lambda h: h * 2, lambda h: h + jnp.zeros((2, H)), h
    ),
    "shared body": lambda h, p: SHARED(SHARED(h)),
    "body without operands": lambda h, p: h + jax.jit(lambda: jnp.zeros((2, H)))(),
    "body that is empty": lambda h, p: jax.jit(lambda h: h)(h),
}  # fmt: skip
SHARED = jax.jit(lambda h: h.reshape(2, 4, 4).reshape(2, H) / (1 + jnp.abs(h).sum()))


@pytest.mark.parametrize("name", SIZED)
def test_equations_that_say_a_size_say_the_smaller_one(name):
    fn = lambda p, x: SIZED[name](x @ p["a"], p) @ p["c"]
    params, x = {"a": drawn(8, H), "b": drawn(H, seed=1), "c": drawn(H, 3, seed=2)}, drawn(2, 8)
    graph = groups(fn, params, x)
    plan = some_channels(graph)
    assert any(g.name.split("[")[0] == "a:1" or g.members for g in graph.groups) and plan.kept
    assert_close(compacted(fn, plan)(compact(params, plan), x), fn(zero_channels(params, plan), x))


def test_a_grouped_convolution_has_fewer_groups():
    spec = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w, n: lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=spec, feature_group_count=n
    )
    fn = lambda p, x: conv(jnp.tanh(conv(conv(x, p["a"], 1), p["b"], 3)), p["c"], 1)
    params = {"a": drawn(1, 1, 2, 12), "b": drawn(3, 3, 4, 6, seed=1), "c": drawn(1, 1, 6, 5)}
    x = drawn(2, 4, 4, 2, seed=2)
    graph = groups(fn, params, x)
    assert sorted(g.size for g in graph.groups) == [2, 3, 4]
    for group in graph.groups:
        plan = plan_of(graph, {group.name: [0, *range(2, group.size)]})
        assert_close(*both(fn, plan, params, x)[::-1])


# ----------------------------------------------------------------------- layers, and no channels


def stack(p, x, unroll=1):
    body = lambda h, row: (h + jax.nn.relu(h @ row["a"]) @ row["b"], h.sum())
    h, sums = lax.scan(jax.checkpoint(body), x, p, unroll=unroll)
    return h, jnp.square(sums).sum()


STACK = {"a": drawn(4, 6, 5), "b": drawn(4, 5, 6, seed=1)}


@pytest.mark.parametrize("unroll", [1, 3, 4])
def test_without_layers_a_scan_runs_over_the_others(unroll):
    fn, x, kept = functools.partial(stack, unroll=unroll), drawn(2, 6), [0, 2]
    graph = groups(fn, STACK, x)
    (layers,) = (g.name for g in graph.groups if "layer" in g.flags)
    plan = plan_of(graph, {layers: kept}, exact_only=False)
    small = compact(STACK, plan)
    got = jax.jit(compacted(fn, plan))(small, x)
    assert_close(got, stack(jax.tree.map(lambda a: a[jnp.array(kept)], STACK), x))
    lengths = [
        eqn.params["length"]
        for eqn in every_equation(trace(compacted(fn, plan), small, x).closed.jaxpr)
        if eqn.primitive.name == "scan"
    ]
    assert lengths == [2]


def test_without_any_channel_of_a_branch_the_rest_stays():
    fn = lambda p, x: x + jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"] + p["d"]
    params = {"a": drawn(6, 5), "b": drawn(5), "c": drawn(5, 6), "d": drawn(6)}
    graph, x = groups(fn, params, drawn(2, 6)), drawn(2, 6)
    plan = plan_of(graph, {"a:1": []}, empty=("a:1",))
    got = compacted(fn, plan)(compact(params, plan), x)
    np.testing.assert_array_equal(got, x + params["d"])
    grads = jax.grad(lambda p: compacted(fn, plan)(p, x).sum())(compact(params, plan))
    assert grads["a"].shape == (6, 0)


# -------------------------------------------------------------------- custom derivatives


@jax.custom_vjp
def quiet(h):
    return jnp.tanh(h)


quiet.defvjp(lambda h: (jnp.tanh(h), (h, jnp.zeros((2, H)))), lambda kept, g: (0.5 * g + kept[1],))


@jax.custom_jvp
def soft(h):
    return jnp.log1p(jnp.exp(h))


@soft.defjvp
def _(primals, tangents):
    (h,), (t,) = primals, tangents
    return soft(h), jax.nn.sigmoid(h) * t + jnp.zeros((2, H))


@pytest.mark.parametrize("fn", [quiet, soft])
def test_a_custom_derivative_says_its_smaller_sizes_too(fn):
    """Its equations are no part of the function's; here they make zeros of the dense size."""
    model = lambda p, x: fn(x @ p["a"]) @ p["c"]
    params, x = {"a": drawn(8, H), "c": drawn(H, 3, seed=2)}, drawn(2, 8)
    plan = some_channels(groups(model, params, x))
    loss = lambda f: lambda p: jnp.square(f(p, x)).sum()
    want = jax.grad(loss(model))(zero_channels(params, plan))
    got = jax.grad(loss(compacted(model, plan)))(compact(params, plan))
    assert_close(got, compact(want, plan))


@jax.custom_vjp
def reversing(h):
    return jnp.tanh(h)


reversing.defvjp(lambda h: (jnp.tanh(h), h), lambda h, g: (g + 1e-3 * jnp.flip(h, -1),))


def test_a_custom_derivative_that_cannot_lose_channels_is_an_error_that_names_the_group():
    model = lambda p, x: reversing(x @ p["a"]) @ p["c"]
    params, x = {"a": drawn(8, H), "c": drawn(H, 3, seed=2)}, drawn(2, 8)
    plan = some_channels(groups(model, params, x))
    small_fn, small = compacted(model, plan), compact(params, plan)
    assert_close(
        small_fn(small, x), model(zero_channels(params, plan), x)
    )  # the value is no matter
    with pytest.raises(ValueError, match=r"no group of the derivative of custom_vjp.*a:1 \(rev\)"):
        jax.grad(lambda p: small_fn(p, x).sum())(small)


# ------------------------------------------------------------------------------------ errors


def test_parameters_of_another_shape_are_an_error_that_names_the_leaf():
    plan = mlp_plan()
    with pytest.raises(ValueError, match=r"a has shape \(8, 16\), and the plan leaves \(8, 4\)"):
        compacted(mlp, plan)(MLP, drawn(2, 8))
    with pytest.raises(ValueError, match="params have no a, which the plan knows"):
        compacted(mlp, plan)({"b": drawn(4)}, drawn(2, 8))


def test_a_plan_of_another_function_is_an_error_that_names_the_group():
    graph = groups(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], TWO, drawn(2, 8))
    plan = plan_of(graph, {"a:1": [0, 1]})
    other = lambda p, x: jnp.flip(x @ p["a"], -1) @ p["b"]
    with pytest.raises(ValueError, match=r"no group of the function at these inputs: a:1 \(rev\)"):
        compacted(other, plan)(compact(TWO, plan), drawn(2, 8))


def test_dimensions_that_are_one_in_another_function_are_an_error():
    params = {"a": drawn(8, 6), "b": drawn(6, 3), "c": drawn(8, 6), "d": drawn(6, 3)}
    apart = lambda p, x: x @ p["a"] @ p["b"] + x @ p["c"] @ p["d"]
    joint = lambda p, x: (x @ p["a"] + x @ p["c"]) @ p["b"] + x @ p["c"] @ p["d"]
    graph = groups(apart, params, drawn(2, 8))
    plan = plan_of(graph, {"a:1": [0, 1], "c:1": [2, 3]})
    with pytest.raises(ValueError, match="same dimension as"):
        compacted(joint, plan)(compact(params, plan), drawn(2, 8))
    whole = plan_of(graph, {"a:1": [0, 1]})
    with pytest.raises(ValueError, match="same dimension as"):
        compacted(joint, whole)(compact(params, whole), drawn(2, 8))


TWO = {"a": drawn(8, 6), "b": drawn(6, 3)}


def test_a_quantized_tree_is_an_error_that_says_which_way_round():
    plan = mlp_plan()
    rules = {"a": us.DotSpec(w=us.QSpec(axes=(-2,)))}
    with pytest.raises(ValueError, match=r"QTensor.*quantized\(compacted\(fn, plan\), rules\)"):
        compacted(mlp, plan)(us.quantize(compact(MLP, plan), rules), drawn(2, 8))


def test_costs_fall_with_the_sizes():
    plan, x = mlp_plan(), drawn(2, 8)
    flops = lambda fn, params: sum(
        2 * np.prod(site.result_shapes[0]) * site.shapes[0][-1]
        for site in sites(trace(fn, params, x).closed.jaxpr)
        if site.name == "dot_general"
    )
    assert 4 * flops(compacted(mlp, plan), compact(MLP, plan)) == flops(mlp, MLP)
