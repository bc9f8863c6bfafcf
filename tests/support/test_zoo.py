"""The zoo holds what it says."""

import functools
import os
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unitscale_jax as us
from tests.support import zoo

EVERY = pytest.mark.parametrize("name", zoo.EACH)
DIFFERENTIABLE = pytest.mark.parametrize("name", zoo.named(having=("differentiable",)))

# What the library promises to handle: some model has all the tags of each row.
FEATURES = """
mlp | conv batch_stats | conv depthwise squeeze_excite concat | transformer pre_norm
transformer post_norm | gqa rope swiglu rms_norm | attention fused_qkv | tied gather
moe softmax | moe top_k | lstm scan | scan remat transformer | unet concat | cross_attention
ssm scan | ssm | custom_vjp | custom_jvp | cond | cond scan | while | while trips
dropout attention | group_norm silu | layer_norm gelu | softmax where
"""

# Primitives that a model has exactly where its tags say so; the names differ between JAX versions.
EXACTLY = {
    "scan": {"scan"},
    "while": {"while"},
    "cond": {"cond"},
    "remat": {"checkpoint", "remat", "remat2"},
    "custom_vjp": {"custom_vjp_call", "custom_vjp_call_jaxpr"},
    "conv": {"conv_general_dilated"},
    "top_k": {"top_k"},
    "gather": {"gather"},
    "dropout": {"random_bits"},
    "rope": {"sin"},
}
# Primitives that a tag implies, but which other layers have as well.
AT_LEAST = {
    "custom_jvp": {"custom_jvp_call"},
    "concat": {"concatenate"},
    "where": {"select_n"},
    "softmax": {"exp"},
    "silu": {"logistic"},
    "gelu": {"tanh", "erf"},
    "pool": {"reduce_window_max", "reduce_window_sum", "reduce_window", "reduce_max"},
} | dict.fromkeys(["layer_norm", "rms_norm", "group_norm", "batch_stats"], {"rsqrt"})


@functools.cache
def loss_and_gradients(name):
    """The gradients by name, none where there are none."""
    model = zoo.model(name)
    run = (
        jax.value_and_grad(model.loss) if model.differentiable else lambda *a: (model.loss(*a), {})
    )
    fast_to_compile = {"xla_backend_optimization_level": 0}
    run = jax.jit(run, compiler_options=fast_to_compile)
    loss, gradients = run(model.params, *model.inputs)
    return np.asarray(loss), jax.tree.map(np.asarray, us.tree.named_leaves(gradients))


@functools.cache
def primitives_and_shapes(name):
    model = zoo.model(name)
    traced = jax.make_jaxpr(model.apply, return_shape=True)
    jaxpr, shapes = traced(model.params, *model.inputs)
    return set(primitives_of(jaxpr)), shapes


def primitives_of(jaxpr):
    """Names of the primitives of a jaxpr, and of all jaxprs inside it."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn.primitive.name
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from primitives_of(inner)


def is_jaxpr(x):
    return hasattr(getattr(x, "jaxpr", x), "eqns")


# The models work.


@EVERY
def test_outputs_and_gradients_are_finite(name):
    # The loss is a sum of squares of the outputs, so it is finite only where they are.
    loss, gradients = loss_and_gradients(name)
    assert np.isfinite(loss)
    assert not [leaf for leaf, g in gradients.items() if not np.isfinite(g).all()]


@DIFFERENTIABLE
def test_every_parameter_matters(name):
    _, gradients = loss_and_gradients(name)
    idle = {leaf for leaf, g in gradients.items() if np.abs(g).max() < 1e-5}
    assert idle == {leaf for leaf in gradients if re.search(zoo.INERT, leaf)}


@pytest.mark.parametrize("name", zoo.named(without=("differentiable",)))
def test_what_is_not_differentiable_says_so(name):
    model = zoo.model(name)
    with pytest.raises(ValueError, match="[Rr]everse-mode differentiation does not work"):
        jax.eval_shape(jax.grad(model.loss), model.params, *model.inputs)


@EVERY
def test_parameters_are_float32_and_none_is_trivial(name):
    for leaf in jax.tree.leaves(zoo.model(name).params):
        assert leaf.dtype == jnp.float32 and np.std(leaf) > 0.05 and np.abs(leaf).min() > 0


@EVERY
def test_building_again_gives_the_same_model(name):
    once, again = zoo.model(name), zoo.build(name)
    assert once is zoo.model(name) and again is not once
    chex.assert_trees_all_equal(again.params, once.params, strict=True)
    chex.assert_trees_all_equal(again.inputs, once.inputs, strict=True)


def in_bfloat16(name):
    """Shapes and dtypes of the outputs, where parameters and activations are bfloat16."""
    model = zoo.model(name)
    args = us.tree.astype((model.params, *model.inputs), jnp.bfloat16)
    return jax.eval_shape(model.apply, *args)


@pytest.mark.parametrize("name", zoo.named(having=("plain",)))
def test_constants_follow_the_dtype_of_what_comes_in(name):
    _, shapes = primitives_and_shapes(name)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        in_bfloat16(name), us.tree.map_named(lambda _, s: s.update(dtype=jnp.bfloat16), shapes)
    )


@pytest.mark.parametrize("name", zoo.named(without=("plain",)))
def test_flax_models_take_bfloat16(name, relaxed_promotion):
    # Relaxed, because Flax's norms promote bfloat16 with float32. Its statistics and the start of
    # its recurrences stay float32, and the table of NNX has the dtype that it was built with.
    _, shapes = primitives_and_shapes(name)
    chex.assert_trees_all_equal_shapes(in_bfloat16(name), shapes)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(in_bfloat16(name))}
    tags = zoo.model(name).tags
    widened = tags & {"batch_stats", "lstm"} or tags >= {"nnx", "tied"}
    assert widened or dtypes == {"bfloat16"}


TWINS = "mlp cnn_train cnn_eval transformer post_norm scan_remat gqa cond"


@pytest.mark.parametrize("what", TWINS.split())
def test_linen_and_nnx_agree(what):
    """Parameters of the same names have the same values, so the twins are one function."""
    (one, of_linen), (other, of_nnx) = (loss_and_gradients(f"{k}_{what}") for k in ("linen", "nnx"))
    slashes = lambda tree: {leaf.replace("_", "/"): g for leaf, g in tree.items()}
    np.testing.assert_allclose(one, other, rtol=1e-5)
    if what == "cnn_train":  # NNX takes no gradient through the new statistics, Linen does
        assert slashes(of_linen).keys() == slashes(of_nnx).keys()
    else:
        chex.assert_trees_all_close(slashes(of_linen), slashes(of_nnx), rtol=1e-3, atol=1e-5)


# The tags are true.


@EVERY
def test_tags_agree_with_the_primitives(name):
    tags, present = zoo.model(name).tags, primitives_and_shapes(name)[0]
    assert {tag for tag, any_of in EXACTLY.items() if any_of & present} == tags & EXACTLY.keys()
    assert not {tag for tag in tags & AT_LEAST.keys() if not AT_LEAST[tag] & present}


@pytest.mark.parametrize("feature", re.findall(r"[^|\n]+", FEATURES))
def test_every_feature_has_a_model(feature):
    assert zoo.named(having=tuple(feature.split()))


def test_every_framework_has_its_share():
    for kind in ("linen", "nnx", "plain"):
        assert len(zoo.named(having=(kind,))) >= 12
        assert zoo.named(having=(kind, "transformer", "pre_norm"))
        assert {zoo.model(name).kind for name in zoo.named(having=(kind,))} == {kind}


def test_names_are_picked_by_tags():
    assert set(zoo.named(having=("attention",), without=("plain", "nnx"))) == {
        name for name in zoo.NAMES if name.startswith("linen") and "attention" in zoo.tags_of(name)
    }
    with pytest.raises(AssertionError, match=r"no model has the tags \['atention'\]"):
        zoo.named(having=("atention",))


def test_the_covering_models_have_every_tag_that_any_model_has():
    tags = lambda names: set().union(*map(zoo.tags_of, names))
    assert tags(zoo.COVER) == tags(zoo.NAMES)
    assert len(zoo.COVER) < len(zoo.NAMES) / 2 or os.environ.get("WHOLE_ZOO")
