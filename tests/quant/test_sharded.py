"""Laws of sharded codes: however they lie over devices, the bits are those of one (P12)."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import unitscale_jax as us
from tests.quant.test_quantized import W8A8, assert_same_bits, normal
from unitscale_jax import DotSpec, QSpec
from unitscale_jax.quant import Fixed, Group

ROWS, IN, OUT = 8, 64, 32
PARAMS = {"up": normal(IN, OUT, seed=1), "bias": normal(OUT, seed=2)}
X = normal(ROWS, IN, seed=3)
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
ASYMMETRIC = QSpec(symmetric=False)
I4 = functools.partial(QSpec, format="int4")
SPECS = {
    "dynamic": W8A8,
    "static": DotSpec(w=QSpec(), x=QSpec(calibrator=Fixed(2.0))),
    "asymmetric": DotSpec(w=QSpec(), x=ASYMMETRIC),
    "asymmetric, static": DotSpec(w=QSpec(), x=QSpec(symmetric=False, calibrator=Fixed(-1.0, 3.0))),
    "both asymmetric": DotSpec(w=ASYMMETRIC, x=ASYMMETRIC),
    "po2": DotSpec(w=QSpec(scale="po2"), x=QSpec(scale="po2")),
    "int4": DotSpec(w=I4(), x=QSpec()),
    "groups": DotSpec(w=I4(group=Group(8)), x=QSpec()),
    "integer groups": DotSpec(w=I4(group=Group(8, scale="integer")), x=QSpec()),
    "integer groups, asymmetric": DotSpec(w=I4(group=Group(8, scale="integer")), x=ASYMMETRIC),
}
ROW, COLUMN = P("model", None), P(None, "model")
EVERYWHERE = ["dynamic", "asymmetric, static", "integer groups"]


def cases(fast=(2, 4)):
    """Some specs on every mesh, the others on one; the rest is slow."""
    for kind in SPECS:
        for sizes in MESHES:
            slow = sizes != fast and kind not in EVERYWHERE
            yield pytest.param(kind, sizes, marks=pytest.mark.slow if slow else ())


WAYS = {"column": (COLUMN, P("data")), "row": (ROW, P("data", "model"))}


def layer(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"])


def mesh_of(sizes):
    return jax.make_mesh(sizes, ("data", "model"), (AxisType.Auto,) * 2)


def placed(x, mesh, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


@functools.cache
def unsharded(kind):
    """Codes, and what is served from them, on one device."""
    rules = us.quant.resolve({"up": SPECS[kind]}, layer, PARAMS, X)
    codes = us.quantize(PARAMS, rules)
    return rules, codes, jax.jit(us.quantized(layer))(codes, X)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "sizes"), list(cases()), ids=str)
def test_training_sharded_is_serving_on_one_device(kind, sizes, way):
    rules, _, expected = unsharded(kind)
    mesh, (w, x) = mesh_of(sizes), WAYS[way]
    params = PARAMS | {"up": placed(PARAMS["up"], mesh, w)}
    out = jax.jit(us.quantized(layer, rules))(params, placed(X, mesh, x))
    assert len(out.sharding.device_set) == 8
    assert_same_bits(out, expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [(1, 8)], ids=str)
@pytest.mark.parametrize("kind", SPECS)
def test_codes_made_of_shards_are_those_of_the_whole_and_serve_the_same(kind, sizes, way):
    rules, codes, expected = unsharded(kind)
    mesh, (w, x) = mesh_of(sizes), WAYS[way]
    sharded = us.quantize(PARAMS | {"up": placed(PARAMS["up"], mesh, w)}, rules)
    assert_same_bits(sharded, codes)
    assert sharded["up"].codes.sharding.is_equivalent_to(NamedSharding(mesh, w), 2)
    assert_same_bits(jax.jit(us.quantized(layer))(sharded, placed(X, mesh, x)), expected)


@pytest.mark.parametrize("kind", ["dynamic", "asymmetric", "integer groups"])
def test_static_ranges_of_the_parameter_are_the_same_on_all_devices(kind):
    _, codes, _ = unsharded(kind)
    codes = codes | {"up": replace(codes["up"], input_range=jnp.array([-1.5, 2.0]))}
    run = jax.jit(us.quantized(layer))
    expected = run(codes, X)
    mesh = mesh_of((2, 4))
    on_all = jax.tree.map(lambda leaf: placed(leaf, mesh, P()), codes)
    t = codes["up"]
    split = replace(on_all["up"], codes=placed(t.codes, mesh, ROW))
    assert_same_bits(run(on_all | {"up": split}, placed(X, mesh, P("data", "model"))), expected)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_near_those_of_one_device(way):
    """Their float sums have another order."""
    rules, mesh, (w, x) = unsharded("dynamic")[0], mesh_of((2, 4)), WAYS[way]
    grad = jax.jit(jax.grad(lambda p, x: jnp.square(us.quantized(layer, rules)(p, x)).mean()))
    got = grad(PARAMS | {"up": placed(PARAMS["up"], mesh, w)}, placed(X, mesh, x))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(grad(PARAMS, X)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_row_parallel_product_sums_integers_over_devices():
    """In int32, before the scale: the sum of float parts would depend on their number."""
    mesh = mesh_of((1, 8))
    _, codes, _ = unsharded("dynamic")
    t = replace(codes["up"], codes=placed(codes["up"].codes, mesh, ROW))
    run = jax.jit(us.quantized(layer))
    args = codes | {"up": t}, placed(X, mesh, P(None, "model"))
    text = run.lower(*args).compile().as_text()
    sums = [line for line in text.splitlines() if " all-reduce(" in line]
    assert any(f"s32[{ROWS},{OUT}]" in line for line in sums)
    assert not any(f"f32[{ROWS},{OUT}]" in line for line in sums)


def test_stacked_layers_over_devices():
    stack = {"w": normal(3, IN, IN, seed=4) / 8}
    fn = lambda p, x: lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, p["w"])[0]
    rules = us.quant.resolve({"w": W8A8}, fn, stack, X)
    run = jax.jit(us.quantized(fn, rules))
    expected, mesh = run(stack, X), mesh_of((2, 4))
    for spec in (P(None, None, "model"), P(None, "model", None)):
        assert_same_bits(
            run({"w": placed(stack["w"], mesh, spec)}, placed(X, mesh, P("data"))), expected
        )


# ------------------------------------------------------------------------------- shard_map


def by_columns(mesh):
    """Tensor-parallel over the columns, data-parallel over rows."""

    def fn(params, x):
        inner = lambda w, b, x: jax.nn.relu(x @ w + b)
        specs = (P(None, "model"), P("model"), P("data"))
        run = jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=P("data", "model"))
        return run(params["up"], params["bias"], x)

    return fn


@pytest.mark.parametrize(("kind", "sizes"), list(cases()), ids=str)
def test_columns_in_a_shard_map_are_the_columns_of_the_whole(kind, sizes):
    rules, codes, expected = unsharded(kind)
    fn = by_columns(mesh_of(sizes))
    assert_same_bits(jax.jit(us.quantized(fn, strict=True))(codes, X), expected)
    if sizes == (2, 4):
        assert us.quant.resolve({"up": SPECS[kind]}, fn, PARAMS, X) == rules
        assert_same_bits(jax.jit(us.quantized(fn, rules))(PARAMS, X), expected)


def by_rows(mesh):
    def fn(params, x):
        def inner(w, x):
            return lax.psum(x @ w, "model")

        specs = (P("model", None), P("data", "model"))
        run = jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=P("data"))
        return jax.nn.relu(run(params["up"], x) + params["bias"])

    return fn


@pytest.mark.parametrize("kind", [kind for kind in SPECS if kind != "groups"])
def test_a_sum_over_shards_by_hand_is_that_of_one_device(kind):
    """It ends a product over all shards, which share scales and sum integers."""
    rules, codes, expected = unsharded(kind)
    fn = by_rows(mesh_of((2, 4)))
    assert_same_bits(jax.jit(us.quantized(fn, strict=True))(codes, X), expected)
    assert_same_bits(jax.jit(us.quantized(fn, rules))(PARAMS, X), expected)


def test_groups_with_scales_of_their_own_are_near_those_of_one_device():
    """Float sums over groups have another order; codes are the same."""
    rules, codes, expected = unsharded("groups")
    fn = by_rows(mesh_of((2, 4)))  # 16 rows a shard, of 8 a group
    served = jax.jit(us.quantized(fn))(codes, X)
    assert_same_bits(jax.jit(us.quantized(fn, rules))(PARAMS, X), served)
    np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-5)


def test_gradients_through_a_shard_map():
    rules = unsharded("dynamic")[0]
    loss = lambda fn: lambda p, x: jnp.square(fn(p, x)).mean()
    expected = jax.grad(loss(us.quantized(layer, rules)))(PARAMS, X)
    for fn in (by_columns(mesh_of((2, 4))), by_rows(mesh_of((2, 4)))):
        got = jax.jit(jax.grad(loss(us.quantized(fn, rules))))(PARAMS, X)
        for name in PARAMS:
            size = jnp.linalg.norm(expected[name])
            assert jnp.linalg.norm(got[name] - expected[name]) < 0.03 * size


def test_codes_are_operands_of_a_users_shard_map():
    """`quantized` inside of it: a QTensor is a pytree, its parts have placements like any array."""
    _, codes, expected = unsharded("dynamic")
    mesh, t = mesh_of((2, 4)), codes["up"]
    like = {"up": t.over(lambda name, x: P(None, "model")), "bias": P("model")}
    specs = (like, P("data"))
    run = jax.shard_map(
        us.quantized(layer), mesh=mesh, in_specs=specs, out_specs=P("data", "model")
    )
    assert_same_bits(jax.jit(run)(codes, X), expected)
