"""Laws of `resolve`: groups run along the axis that is summed over."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from unitscale_jax.prune import NofM, SparsitySpec, Unstructured, make_masks, resolve_axes

D, H, K, V = 8, 4, 4, 12


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def found(fn, params, *inputs, patterns=None):
    spec = resolve_axes(SparsitySpec(patterns=patterns or NofM(2, 4)), fn, params, *inputs)
    return {name: pattern.axis for name, pattern in spec.patterns.items()}


X = shape(3, D)
PLAIN = {
    "dot": (lambda w, x: x @ w, (D, K), -2),
    "transposed": (lambda w, x: x @ w.T, (K, D), -1),
    "on the left": (lambda w, x: w @ x.T, (K, D), -1),
    "query": (lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), (D, H, K), -3),
    "heads": (lambda w, x: jnp.einsum("bhk,hkd->bd", heads(x), w), (2, 4, D), -2),
    "experts": (lambda w, x: jnp.einsum("bd,edk->ebk", x, w), (3, D, K), -2),
    "ragged": (lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 1, 1])), (3, D, K), -2),
    "a layer of a stack": (lambda w, x: x @ w[1], (3, D, K), -2),
    "scan": (lambda w, x: lax.scan(lambda h, w: (h @ w, None), x, w)[0], (3, D, D), -2),
    "masked": (lambda w, x: x @ jnp.where(jnp.tri(D, K) > 0, w, 0), (D, K), -2),
    "tied": (lambda w, x: w[jnp.array([1, 5, 2])] @ w.T, (V, D), -1),
    "NHWC": (lambda w, x: convolved(w, shape(2, 5, 5, D), "NHWC", "HWIO"), (3, 3, D, 6), -2),
    "NCHW": (lambda w, x: convolved(w, shape(2, D, 5, 5), "NCHW", "OIHW"), (6, D, 3, 3), -3),
}


def heads(x):
    return x.reshape(3, 2, 4)


def convolved(w, x, numbers, kernel):
    image = jnp.ones(x.shape)
    return lax.conv_general_dilated(
        image, w, (1, 1), "SAME", dimension_numbers=(numbers, kernel, numbers)
    )


@pytest.mark.parametrize("kind", PLAIN)
def test_groups_run_along_what_is_summed_over(kind):
    fn, sizes, axis = PLAIN[kind]
    assert found(lambda p, x: fn(p["w"], x), {"w": shape(*sizes)}, X) == {"w": axis}


class Layers(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(V, D, name="embed")(ids)
        x = nn.DenseGeneral((H, K), name="query")(nn.Dense(D, name="dense")(x))
        x = nn.DenseGeneral(D, axis=(-2, -1), name="out")(x)
        return nn.Conv(D, (3,), name="conv")(x)


class NnxLayers(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.dense = nnx.Linear(D, D, rngs=rngs)
        self.query = nnx.LinearGeneral(D, (H, K), rngs=rngs)
        self.out = nnx.LinearGeneral((H, K), D, axis=(-2, -1), rngs=rngs)
        self.conv = nnx.Conv(D, D, (3,), rngs=rngs)

    def __call__(self, ids):
        return self.conv(self.out(self.query(self.dense(self.embed(ids)))))


LAYERS = {"dense/kernel": -2, "query/kernel": -3, "out/kernel": -2, "conv/kernel": -2}
IDS = jnp.zeros((2, 3), jnp.int32)


def test_layers_of_linen():
    params = jax.eval_shape(Layers().init, jax.random.key(0), IDS)["params"]
    apply = lambda params, ids: Layers().apply({"params": params}, ids)
    assert found(apply, params, IDS, patterns={"**/kernel": NofM(2, 4)}) == LAYERS


def test_layers_of_nnx():
    graph, state = nnx.split(nnx.eval_shape(lambda: NnxLayers(nnx.Rngs(0))))
    apply = lambda state, ids: nnx.merge(graph, state)(ids)
    assert found(apply, state, IDS, patterns={"**/kernel": NofM(2, 4)}) == LAYERS


def test_what_is_given_stays_and_resolving_again_changes_nothing():
    fn = lambda p, x: x @ p["a"] @ p["b"] @ p["c"] + p["d"]
    params = {"a": shape(D, D), "b": shape(D, D), "c": shape(D, D), "d": shape(D)}
    patterns = {"a": NofM(1, 2), "b": NofM(2, 4, axis=-1), "c": Unstructured(), "d": None}
    spec = SparsitySpec(patterns=patterns, sparsity=0.3)
    once = resolve_axes(spec, fn, params, X)
    expected = {"a": NofM(1, 2, axis=-2), "b": NofM(2, 4, axis=-1), "c": Unstructured()}
    assert once.patterns == expected and once.sparsity == 0.3
    assert resolve_axes(once, fn, params, X) == once
    closed = SparsitySpec(patterns=Unstructured())
    assert resolve_axes(closed, fn, params, X) is closed


def test_a_resolved_spec_makes_masks_along_the_sum():
    fn, w = lambda p, x: x @ p["w"].T, np.random.default_rng(0).normal(size=(K, D))
    params = {"w": jnp.asarray(w, jnp.float32)}
    spec = resolve_axes(SparsitySpec(patterns=NofM(1, 4)), fn, params, X)
    masks = make_masks(jax.tree.map(jnp.abs, params), spec)
    assert (masks["w"].reshape(K, 2, 4).sum(-1) == 1).all()


TWICE = lambda p, x: (x @ p["w"]) @ p["w"].T
ERRORS = {
    "two uses": (TWICE, (D, K), r"w is used over.*over \(-2,\); .*over \(-1,\).*NofM\(axis="),
    "lookup": (lambda p, x: p["w"][jnp.array([1])], (V, D), "w meets no product.*patterns"),
    "unused": (lambda p, x: x, (V, D), "w meets no product"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_an_axis_that_cannot_be_told_is_an_error_with_the_way_out(kind):
    fn, sizes, message = ERRORS[kind]
    with pytest.raises(ValueError, match=message):
        found(fn, {"w": shape(*sizes)}, X)
