"""Laws across pruning and quantization: zeros are codes of zero, and codes lose channels."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unitscale_jax as us
from unitscale_jax import DotSpec, QSpec
from unitscale_jax.prune import Cubic, NofM, SparsitySpec, Unstructured
from unitscale_jax.quant import Group

ROWS, IN, HIDDEN, OUT = 8, 8, 16, 3
KEPT = [0, 1, 2, 3, 8, 9, 10, 11]  # of HIDDEN: whole groups of four


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mlp(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"]


PARAMS = {
    "up": drawn(IN, HIDDEN),
    "bias": drawn(HIDDEN, seed=1),
    "down": drawn(HIDDEN, OUT, seed=2),
}
X = drawn(ROWS, IN, seed=3)
GRAPH = us.compaction.groups(mlp, PARAMS, X)
PLAN = us.compaction.plan_of(GRAPH, {GRAPH.groups[0].name: KEPT})

SPECS = {
    "int8": DotSpec(w=QSpec()),
    "int8 times int8": DotSpec(w=QSpec(), x=QSpec()),
    "asymmetric times asymmetric": DotSpec(w=QSpec(symmetric=False), x=QSpec(symmetric=False)),
    "int4": DotSpec(w=QSpec(format="int4")),
    "e4m3fn": DotSpec(w=QSpec(format="e4m3fn")),
    "groups": DotSpec(w=QSpec(format="int4", group=Group(2))),
    "integer groups": DotSpec(w=QSpec(format="int4", group=Group(2, scale="integer")), x=QSpec()),
}
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def both(value):
    return {"up": value, "down": value}


def quantize(params, spec):
    return us.quantize(params, both(spec.with_axes((-2,))))


# ------------------------------------------------------------------------- channels of codes (C11)


@EVERY_SPEC
def test_compact_of_quantized_is_quantized_of_compact_where_channels_have_their_scales(spec):
    """The output channels of "up": each has a scale of its own, which no other channel sees."""
    first = us.compaction.compact(quantize(PARAMS, spec), PLAN)["up"]
    then = quantize(us.compaction.compact(PARAMS, PLAN), spec)["up"]
    chex.assert_trees_all_equal(first, then)


@EVERY_SPEC
def test_codes_without_channels_stand_for_the_values_without_them(spec):
    """Both axes: the input channels of "down" share scales, which stay those of the whole."""
    codes = quantize(PARAMS, spec)
    small = us.compaction.compact(codes, PLAN)
    values = us.quant.dequantize(codes)
    chex.assert_trees_all_equal(us.quant.dequantize(small), us.compaction.compact(values, PLAN))
    whole = us.compaction.expand(small, PLAN)
    assert jax.tree.structure(whole) == jax.tree.structure(codes)
    zeroed = us.compaction.zero_channels(values, PLAN)
    chex.assert_trees_all_equal(us.quant.dequantize(whole), zeroed)


@pytest.mark.parametrize("name", ["int8 times int8", "asymmetric times asymmetric", "groups"])
def test_a_compact_function_serves_the_codes_that_its_masked_one_would(name):
    codes = quantize(PARAMS, SPECS[name])
    served = us.quantized(us.compaction.compacted(mlp, PLAN))(us.compaction.compact(codes, PLAN), X)
    masked = us.quantized(mlp)(us.compaction.zero_channels(codes, PLAN), X)
    np.testing.assert_allclose(served, masked, rtol=1e-5, atol=1e-5)


def test_a_cut_through_a_group_of_scales_is_an_error_that_names_the_leaf():
    codes = quantize(PARAMS, DotSpec(w=QSpec(group=Group(8))))
    with pytest.raises(ValueError, match=r"^down: .*groups of 8 along axis 0.*before quantizing"):
        us.compaction.compact(codes, PLAN)


def test_ranges_of_stacked_layers_go_with_their_layers():
    body = lambda h, w: (jnp.tanh(h @ w), None)
    fn = lambda p, x: jax.lax.scan(body, x, p["stack"])[0]
    params, x = {"stack": drawn(4, IN, IN)}, drawn(ROWS, IN)
    rules = us.quant.resolve({"stack": DotSpec(w=QSpec(), x=QSpec())}, fn, params, x)
    codes = us.quantize(params, rules, us.calibrate(fn, params, [x], rules))
    graph = us.compaction.groups(fn, params, x)
    layers = next(g.name for g in graph.groups if "layer" in g.flags)
    plan = us.compaction.plan_of(graph, {layers: [0, 2]}, exact_only=False)
    small = us.compaction.compact(codes, plan)["stack"]
    np.testing.assert_array_equal(small.input_range, codes["stack"].input_range[jnp.array([0, 2])])
    two = us.quantized(us.compaction.compacted(fn, plan))({"stack": small}, x)
    rows = {"stack": jax.tree.map(lambda a: a[jnp.array([0, 2])], codes["stack"])}
    np.testing.assert_array_equal(two, us.quantized(fn)(rows, x))


def test_learned_scales_lose_their_channels_too():
    rules = both(DotSpec(w=QSpec(axes=(-2,)), x=QSpec()))
    params = us.quant.learned(PARAMS, rules, us.calibrate(mlp, PARAMS, [X], rules))
    small = us.compaction.compact(params, PLAN)
    assert small["up"].scale.shape == (1, 8) and small["down"].scale.shape == (1, OUT)
    got = us.quantized(us.compaction.compacted(mlp, PLAN))(small, X)
    want = us.quantized(mlp)(us.compaction.zero_channels(params, PLAN), X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------- zeros among codes


@EVERY_SPEC
def test_what_is_pruned_is_zero_among_codes(spec):
    masks = us.prune.make_masks(
        jax.tree.map(jnp.abs, PARAMS), SparsitySpec(patterns={"up": NofM(2, 4, axis=-2)})
    )
    t = quantize(us.prune.apply_masks(PARAMS, masks), spec)["up"]
    assert not np.any(np.asarray(us.quant.dequantize({"t": t})["t"])[~masks["up"]])
    if spec.w.symmetric:
        assert not np.any(np.asarray(t.codes).astype(np.float32)[~masks["up"]])


def test_training_on_codes_prunes_and_serves_what_it_trained(relaxed_promotion):
    """Straight-through gradients, zeros that stay, and in the end the same product of codes."""
    rules = us.quant.resolve(both(DotSpec(w=QSpec(), x=QSpec())), mlp, PARAMS, X)
    apply = us.quantized(mlp, rules)
    tx = us.prune.pruned(
        optax.adamw(0.05),
        SparsitySpec(patterns=both(Unstructured()), sparsity=0.75),
        Cubic(0, 4, every=2),
    )

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((apply(p, X) - 1) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(6):
        params, state = step(params, state)
    codes, masks = us.quantize(params, rules), us.prune.masks_of(state)
    for name in ("up", "down"):
        assert masks[name].sum() == masks[name].size // 4
        assert not np.any(codes[name].codes[~masks[name]])
    served = jax.jit(us.quantized(mlp))(codes, X)
    np.testing.assert_array_equal(served, jax.jit(apply)(params, X))
