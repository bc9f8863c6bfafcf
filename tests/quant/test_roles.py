"""Laws of `resolve`: the axes of a parameter are those that the function contracts it over."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax

import unitscale_jax as us
from tests.quant.test_quantized import W8A8, WRAPPED, named_by_use, normal
from tests.support import zoo
from unitscale_jax import DotSpec, QSpec

B, T, D, H, K, V = 2, 3, 8, 2, 4, 11


def found(fn, params, *inputs, rules=None):
    """The axes of each parameter by name."""
    rules = {"**": DotSpec()} if rules is None else rules
    return {name: spec.w.axes for name, spec in us.quant.resolve(rules, fn, params, *inputs)}


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


# ---------------------------------------------------------------------------- plain functions

X = shape(B, D)
PLAIN = {
    "dot": (lambda w, x: x @ w, (D, K), (-2,)),
    "transposed": (lambda w, x: x @ w.T, (K, D), (-1,)),
    "on the left": (lambda w, x: w @ x.T, (K, D), (-1,)),
    "cast": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), (D, K), (-2,)),
    "heads": (lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), (D, H, K), (-3,)),
    "heads, summed": (lambda w, x: jnp.einsum("bhk,hkd->bd", heads(x), w), (H, K, D), (-3, -2)),
    "heads by reshape": (lambda w, x: x @ w.reshape(H * K, D), (H, K, D), (-3, -2)),
    "columns by reshape": (lambda w, x: x @ w.reshape(D, H * K), (D, H, K), (-3,)),
    "experts": (lambda w, x: jnp.einsum("bd,edk->ebk", x, w), (3, D, K), (-2,)),
    "experts by vmap": (lambda w, x: jax.vmap(lambda w: x @ w)(w), (3, D, K), (-2,)),
    "ragged": (lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 1, 0])), (3, D, K), (-2,)),
    "vector": (lambda w, x: x @ w, (D,), (-1,)),
    "a layer of a stack": (lambda w, x: x @ w[1], (3, D, K), (-2,)),
    "scan": (lambda w, x: lax.scan(lambda h, w: (h @ w, None), x, w)[0], (3, D, D), (-2,)),
    "scan of transposed": (
        lambda w, x: lax.scan(lambda h, w: (h @ w.T, None), x, w)[0],
        (3, D, D),
        (-1,),
    ),
    "scan over pairs of layers": (
        lambda w, x: lax.scan(lambda h, w: (h @ w[0] @ w[1], None), x, w)[0],
        (3, 2, D, D),
        (-2,),
    ),
    "masked": (lambda w, x: x @ (w * jnp.tri(D, K)), (D, K), (-2,)),
    "table": (lambda w, x: w[jnp.array([1, 5])], (V, D), (-1,)),
    "table and logits": (lambda w, x: w[jnp.array([1, 5])] @ w.T, (V, D), (-1,)),
    "taken": (lambda w, x: jnp.take(w, jnp.array([[1], [5]]), axis=0), (V, D), (-1,)),
    "split": (lambda w, x: sum(x @ part for part in jnp.split(w, 2, axis=1)), (D, K), (-2,)),
    "joined": (lambda w, x: x @ jnp.concatenate([w, w], 1), (D, K), (-2,)),
    "decayed too": (lambda w, x: (x @ w).sum() + jnp.square(w).sum(), (D, K), (-2,)),
    "a mask of it too": (lambda w, x: x @ w + x @ (w * jnp.tri(D, K)), (D, K), (-2,)),
}


def heads(x):
    return x.reshape(B, H, K)


@pytest.mark.parametrize("kind", PLAIN)
def test_axes_are_those_that_are_summed_over(kind):
    fn, sizes, axes = PLAIN[kind]
    assert found(lambda p, x: fn(p["w"], x), {"w": shape(*sizes)}, X) == {"w": axes}


def test_a_parameter_is_followed_into_a_stack():
    fn = lambda p, x: jnp.einsum("bd,ndk->nbk", x, jnp.stack([p["a"], p["b"]]))
    assert found(fn, {"a": shape(D, K), "b": shape(D, K)}, X) == {"a": (-2,), "b": (-2,)}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wherever_a_product_stands(kind):
    params = {"w": shape(16, 16), "b": shape(16)}
    assert found(WRAPPED[kind], params, shape(5, 16), rules={"w": W8A8}) == {"w": (-2,)}


CONVOLUTIONS = {
    "HWIO": (("NHWC", "HWIO", "NHWC"), (3, 3, 4, 6), 1, (-4, -3, -2)),
    "grouped": (("NHWC", "HWIO", "NHWC"), (3, 3, 2, 6), 2, (-4, -3, -2)),
    "depthwise": (("NHWC", "HWIO", "NHWC"), (3, 3, 1, 4), 4, (-4, -3, -2)),
    "OIHW": (("NCHW", "OIHW", "NCHW"), (6, 4, 3, 3), 1, (-3, -2, -1)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_kernel_has_a_scale_for_each_output_feature(kind):
    numbers, sizes, groups, axes = CONVOLUTIONS[kind]
    image = shape(2, 4, 5, 5) if numbers[0] == "NCHW" else shape(2, 5, 5, 4)

    def fn(params, x):
        options = dict(dimension_numbers=numbers, feature_group_count=groups)
        return lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", **options)

    assert found(fn, {"w": shape(*sizes)}, image) == {"w": axes}


def test_specs_are_kept_and_only_axes_filled():
    spec = DotSpec(w=QSpec(format="int4"), x=QSpec(symmetric=False), compute="float_exact")
    (pair,) = us.quant.resolve({"*": spec}, lambda p, x: x @ p["w"], {"w": shape(D, K)}, X)
    assert pair == ("w", spec.with_axes((-2,)))


def test_resolving_again_changes_nothing():
    fn, params = lambda p, x: x @ p["w"], {"w": shape(D, K)}
    once = us.quant.resolve({"*": W8A8}, fn, params, X)
    assert us.quant.resolve(once, fn, params, X) == once


def test_codes_are_resolved_as_the_array_they_stand_for():
    fn, w = lambda p, x: x @ p["w"], {"w": normal(D, K)}
    rules = us.quant.resolve({"w": W8A8}, fn, w, X)
    assert us.quant.resolve({"w": W8A8}, fn, us.quantize(w, rules), X) == rules


def test_nothing_is_computed():
    def fn(params, x):
        jax.debug.callback(lambda: pytest.fail("computed"))
        return x @ params["w"]

    assert found(fn, {"w": shape(D, 10**6)}, X) == {"w": (-2,)}


# ------------------------------------------------------------------------- Linen and NNX


class Layers(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(V, D, name="embed")
        x = embed(ids)  # (batch, time, width)
        x = nn.Dense(D, name="dense")(x)
        x = nn.DenseGeneral((H, K), name="query")(x)
        x = nn.DenseGeneral(D, axis=(-2, -1), name="out")(x)
        x = nn.Conv(D, (3,), name="conv")(x)
        x = nn.Conv(D, (3,), feature_group_count=D, name="depthwise")(x)
        return embed.attend(nn.LayerNorm(name="norm")(x))


LAYERS = {
    "embed/embedding": (-1,),
    "dense/kernel": (-2,),
    "query/kernel": (-3,),
    "out/kernel": (-3, -2),
    "conv/kernel": (-3, -2),
    "depthwise/kernel": (-3, -2),
}


def test_layers_of_linen():
    ids = jnp.zeros((B, T), jnp.int32)
    params = jax.eval_shape(Layers().init, jax.random.key(0), ids)["params"]
    apply = lambda params, ids: Layers().apply({"params": params}, ids)
    rules = {"**/kernel": DotSpec(), "**/embedding": DotSpec()}
    assert found(apply, params, ids, rules=rules) == LAYERS


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(D, name="dense")(x), None


def test_stacked_layers_of_linen():
    """Axes count from the end, so a stack of kernels is resolved as one kernel."""
    stack = nn.scan(
        nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )()
    params = jax.eval_shape(stack.init, jax.random.key(0), X, None)["params"]
    apply = lambda params, x: stack.apply({"params": params}, x, None)[0]
    assert params["dense"]["kernel"].shape == (3, D, D)
    assert found(apply, params, X, rules={"**/kernel": DotSpec()}) == {"dense/kernel": (-2,)}


class NnxLayers(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.dense = nnx.Linear(D, D, rngs=rngs)
        self.query = nnx.LinearGeneral(D, (H, K), rngs=rngs)
        self.out = nnx.LinearGeneral((H, K), D, axis=(-2, -1), rngs=rngs)
        self.conv = nnx.Conv(D, D, (3,), rngs=rngs)
        self.depthwise = nnx.Conv(D, D, (3,), feature_group_count=D, rngs=rngs)

    def __call__(self, ids):
        x = self.out(self.query(self.dense(self.embed(ids))))
        return self.embed.attend(self.depthwise(self.conv(x)))


def test_layers_of_nnx():
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxLayers(nnx.Rngs(0))))
    ids = jnp.zeros((B, T), jnp.int32)
    apply = lambda state, ids: nnx.merge(graph, state)(ids)
    rules = {"**/kernel": DotSpec(), "**/embedding": DotSpec()}
    assert found(apply, state, ids, rules=rules) == LAYERS


KERNELS = [("linen_transformer", "blocks_0"), ("nnx_transformer", "blocks/0")]


@pytest.mark.parametrize(("name", "block"), KERNELS)
def test_a_transformer_in_both_kinds_of_flax(name, block):
    model = zoo.model(name)
    axes = found(model.apply, model.params, *model.inputs, rules={"**/kernel": W8A8})
    query, out = axes[f"{block}/attention/query/kernel"], axes[f"{block}/attention/out/kernel"]
    assert (query, out) == ((-3,), (-3, -2))
    assert {axes[n] for n in axes if "attention" not in n} == {(-2,)}


# ------------------------------------------------------------------- two uses, and no use


def test_two_uses_over_different_axes_are_an_error_with_both():
    fn = lambda p, x: (x @ p["w"]) @ p["w"].T
    with pytest.raises(
        ValueError,
        match=r"w is used over different axes \(dot_general over \(-2,\); "
        r"dot_general over \(-1,\)\).*QSpec\(axes=\.\.\.\)",
    ):
        found(fn, {"w": shape(D, K)}, X)


def test_given_axes_settle_two_uses():
    fn = lambda p, x: (x @ p["w"]) @ p["w"].T
    for axes in [(-2,), (-1,)]:
        rules = {"w": DotSpec(w=QSpec(axes=axes), x=QSpec())}
        assert found(fn, {"w": shape(D, K)}, X, rules=rules) == {"w": axes}
        w, x = {"w": normal(D, K)}, normal(B, D)
        full = fn(w, x)
        y = jax.jit(us.quantized(fn, rules))(w, x)
        assert jnp.linalg.norm(y - full) < 0.03 * jnp.linalg.norm(full)


def test_axes_that_a_reshape_confuses_are_an_error():
    """Rows and columns in one axis: half of it would be summed over."""
    fn = lambda p, x: p["w"].reshape(K, H, D).transpose(1, 0, 2).reshape(H, K * D) @ jnp.ones(K * D)
    with pytest.raises(ValueError, match="w is used over"):
        found(fn, {"w": shape(K * H // 2, 2 * D)}, X)


NO_USE = {
    "bias": lambda p, x: x + p["w"],
    "unused": lambda p, x: x,
    "a norm's scale": lambda p, x: x * p["w"],
    "only summed": lambda p, x: x * p["w"].sum(),
}


@pytest.mark.parametrize("kind", NO_USE)
def test_a_parameter_that_meets_no_product_is_an_error(kind):
    with pytest.raises(ValueError, match="a rule names layer/w, which meets no product.*exclude"):
        found(lambda p, x: NO_USE[kind](p["layer"], x), {"layer": {"w": shape(D)}}, X)


def test_a_rule_that_matches_nothing_is_an_error_with_the_closest_names():
    fn = lambda p, x: jnp.einsum("bk,ck->bc", x @ p["w"], x @ p["w"])
    with pytest.raises(ValueError, match="'v', matched none of .* parameter"):
        found(fn, {"w": shape(D, K)}, X, rules={"w": W8A8, "v": W8A8})
    with pytest.raises(ValueError, match="'atention'.*closest: 'attention"):
        fn = lambda p, x: jnp.einsum("abd,acd->abc", x @ p["w"], x @ p["w"])
        found(fn, {"w": shape(D, K)}, shape(B, T, D), rules={"w": W8A8, "atention": W8A8})


def test_rules_of_activations_come_last_and_have_no_axes():
    fn = lambda p, x: jnp.einsum("abd,acd->abc", x @ p["w"], x @ p["w"])
    rules = {"attention": W8A8, "w": W8A8}
    given = {"w": shape(D, K)}, shape(B, T, D)
    assert found(fn, *given, rules=rules) == {"w": (-2,), "attention": ()}
    pairs = us.quant.resolve(rules, fn, *given)
    assert us.quant.resolve(pairs, fn, *given) == pairs
    assert us.quantize({"w": normal(D, K)}, pairs)["w"].axes == (-2,)


def test_quantize_without_axes_is_an_error_that_names_resolve():
    for spec in (W8A8, DotSpec()):
        with pytest.raises(ValueError, match=r"the rule for a/w does not say.*`resolve\(rules"):
            us.quantize({"a": {"w": normal(D, K)}}, {"**": spec})


@pytest.mark.parametrize("name", zoo.EACH)
def test_no_scale_crosses_a_sum_of_a_model_by_the_axes_found(name):
    model = zoo.model(name)
    rules = named_by_use(name)
    kernels = us.tree.named_leaves(model.params)
    for leaf, spec in rules:
        kept = set(range(-kernels[leaf].ndim, 0)) - set(spec.w.axes)
        assert any(kernels[leaf].shape[axis] > 1 for axis in kept), leaf
    strict = us.quantized(model.apply, rules, strict=True) if rules else model.apply
    try:
        jax.eval_shape(strict, model.params, *model.inputs)
    except ValueError as error:  # what a custom derivative, a mask or a lookup leaves
        assert "left in floating point" in str(error) and "cross" not in str(error)


def test_a_function_may_have_keywords_with_the_names_of_these_arguments():
    """The own arguments are positional only, so that `rules=` and `fn=` reach the function."""
    fn = lambda p, x, rules=1, fn=1, params=1: (rules + fn + params) * (x @ p["w"])
    rules, params, x = {"w": us.DotSpec()}, {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    found = us.quant.resolve(rules, fn, params, x, rules=2, fn=2, params=2)
    assert found == us.quant.resolve(rules, fn, params, x)


@pytest.mark.usefixtures("relaxed_promotion")
def test_a_product_with_64_bits_says_so():
    rules = {"w": us.DotSpec(x=us.QSpec())}
    with jax.enable_x64(True):
        x, params = jnp.ones((2, 4)), {"w": jnp.ones((4, 3), jnp.float32)}
        with pytest.raises(ValueError, match="are float64, float32, and floats of at most 32 bits"):
            us.quantized(lambda p, x: x @ p["w"], rules)(params, x)
