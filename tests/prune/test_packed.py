"""Laws of packed parameters: the pruned model, in k numbers and a bit per weight."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import unitscale_jax as us
from unitscale_jax import tree as trees
from unitscale_jax.prune import Packed, SparsitySpec, Unstructured, apply_masks, make_masks
from unitscale_jax.prune._packed import Bits, pack, pack_bits, packed, unpack

DTYPES = ["float32", "bfloat16", "float16"]
floats = st.floats(-4, 4, width=16) | st.sampled_from([np.nan, np.inf, -0.0])
rebuilt = jax.jit(unpack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(11,), (3, 5), (2, 3, 16)])
@given(data=st.data())
def test_unpacking_is_pruning(shape, dtype, data):
    w = data.draw(hnp.arrays(np.float32, shape, elements=floats)).astype(jnp.dtype(dtype))
    keep = np.random.default_rng(data.draw(st.integers(0, 9))).permutation(w.size) < w.size // 3
    params, masks = {"w": w, "b": np.ones(2)}, {"w": keep.reshape(shape), "b": np.array(True)}
    held = pack(params, masks)
    assert held.values["w"].shape == (keep.sum(),) and held.values["w"].dtype == w.dtype
    again = rebuilt(held)
    assert np.asarray(again["w"]).tobytes() == np.asarray(apply_masks(params, masks)["w"]).tobytes()
    assert again["w"].dtype == w.dtype and held.values["b"] is params["b"]


@given(data=st.data())
def test_bits_are_the_mask(data):
    mask = data.draw(hnp.arrays(bool, (3, 11)))
    bits = pack_bits(mask)
    assert bits.data.shape == (3, 2) and bits.data.dtype == np.uint8
    np.testing.assert_array_equal(bits.mask, mask)
    np.testing.assert_array_equal(np.packbits(mask, axis=-1), bits.data)


def test_worked_example_of_bits():
    assert pack_bits(np.array([1, 0, 1, 1, 0, 0, 0, 1, 1, 0, 1], bool)).data.tolist() == [177, 160]


@pytest.mark.parametrize("keep", [False, True])
def test_all_or_nothing(keep):
    w = jnp.array([[1.0, jnp.nan], [3.0, 4.0]])
    held = pack(w, jnp.full((2, 2), keep))
    assert held.values.size == 4 * keep
    np.testing.assert_array_equal(unpack(held), w if keep else jnp.zeros((2, 2)))


@pytest.mark.parametrize(
    ("dtype", "sparsity", "share"),
    [("bfloat16", 0.5, 0.5625), ("bfloat16", 0.8, 0.2625), ("bfloat16", 0.9, 0.1625)]
    + [("float32", 0.8, 0.2 + 1 / 32)],
)
def test_bytes_are_the_kept_ones_and_a_bit_per_weight(dtype, sparsity, share):
    w = {"w": jax.random.normal(jax.random.key(0), (100, 80), dtype)}
    held = pack(w, make_masks(w, SparsitySpec(patterns=Unstructured(), sparsity=sparsity)))
    assert trees.nbytes(held) == share * trees.nbytes(w)


# --- training ------------------------------------------------------------------------------------


def apply(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"] + params["b"]


@functools.cache
def task():
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "in": jax.random.normal(keys[0], (8, 16)) / 8**0.5,
        "out": jax.random.normal(keys[1], (16, 4)) / 4,
        "b": jnp.zeros(4),
    }
    scores = jax.tree.map(jnp.abs, params)
    masks = make_masks(scores, SparsitySpec(patterns=Unstructured(), sparsity=0.8))
    batch = jax.random.normal(keys[2], (32, 8)), jax.random.normal(keys[3], (32, 4))
    return params, masks, batch


def mse(fn, params, batch):
    x, y = batch
    return jnp.mean((fn(params, x) - y) ** 2)


def test_the_packed_function_is_the_pruned_one_to_the_bit():
    params, masks, (x, _) = task()
    held = pack(params, masks)
    expected = jax.jit(apply)(apply_masks(params, masks), x)
    np.testing.assert_array_equal(jax.jit(packed(apply))(held, x), expected)


def test_a_gradient_is_the_dense_one_where_the_mask_is():
    params, masks, batch = task()
    held = pack(params, masks)
    loss = lambda values: mse(packed(apply), Packed(values, held.bits), batch)
    dense = jax.grad(lambda p: mse(apply, p, batch))(apply_masks(params, masks))
    chex.assert_trees_all_close(jax.grad(loss)(held.values), pack(dense, masks).values, rtol=1e-6)


OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "lion": optax.lion(1e-3, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_the_values_is_training_the_pruned_model(name, relaxed_promotion):
    params, masks, batch = task()
    held, tx = pack(params, masks), OPTIMIZERS[name]
    dense_loss = lambda p: mse(us.prune.masked(apply, masks), p, batch)
    loss = lambda values: mse(packed(apply), Packed(values, held.bits), batch)
    dense, _ = trained(tx, dense_loss, apply_masks(params, masks))
    values, state = trained(tx, loss, held.values)
    chex.assert_trees_all_close(unpack(Packed(values, held.bits)), dense, rtol=1e-4, atol=1e-6)
    sizes = {x.size for x in jax.tree.leaves(state) if x.ndim}
    assert sizes <= {x.size for x in jax.tree.leaves(held.values)}


def trained(tx, loss, params):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=20)[0])(params)


def test_values_accumulate():
    params, masks, (x, y) = task()
    held, fn = pack(params, masks), packed(apply)

    def loss(values, batch):
        error = (fn(Packed(values, held.bits), batch["x"]) - batch["y"]) ** 2
        return us.Mean(total=jnp.sum(error), weight=len(error))

    batch = {"x": x, "y": y}
    whole = us.value_and_grad(loss)
    grads = whole(held.values, batch)[2]
    parts = us.accumulated(whole, 4)(held.values, batch)[2]
    chex.assert_trees_all_close(parts, grads, rtol=1e-5)
    chex.assert_trees_all_equal_shapes(grads, held.values)


# --- trees ---------------------------------------------------------------------------------------


def test_values_keep_names_and_casts():
    params, masks, _ = task()
    held = pack(params, masks)
    assert trees.names(held.values) == trees.names(params)
    low = trees.astype(held, "bfloat16")
    np.testing.assert_array_equal(low.bits["in"].data, held.bits["in"].data)
    np.testing.assert_array_equal(
        unpack(low)["in"], apply_masks(trees.astype(params, "bfloat16"), masks)["in"]
    )


def test_bits_are_an_argument_and_no_constant():
    params, masks, (x, _) = task()
    closed = jax.make_jaxpr(packed(apply))(pack(params, masks), x)
    assert not [c for c in closed.consts if np.size(c) > 1]


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(8, 4, rngs=rngs)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="out")(x)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_trees_of_every_framework(kind):
    if kind == "nnx":
        params = nnx.state(NNX(nnx.Rngs(0)), nnx.Param)
    else:
        params = jax.jit(Linen().init)(jax.random.key(0), jnp.ones((1, 8)))["params"]
    masks = make_masks(params, SparsitySpec(patterns={"**/kernel": Unstructured()}, sparsity=0.5))
    held = pack(params, masks)
    assert list(held.bits) == ["out/kernel"]
    assert {x.size for x in jax.tree.leaves(held.values)} == {16, 4}
    chex.assert_trees_all_equal(unpack(held), apply_masks(params, masks))


def test_a_scan_rebuilds_layer_by_layer():
    w = jax.random.normal(jax.random.key(0), (3, 8, 8))
    spec = SparsitySpec(patterns=Unstructured(), sparsity=0.75, stacked={"w": 1})
    params, masks = {"w": w}, make_masks({"w": jnp.abs(w)}, spec)
    held = pack(params, masks, stacked={"w": 1})
    assert held.values["w"].shape == (3, 16)
    np.testing.assert_array_equal(unpack(held)["w"], apply_masks(params, masks)["w"])

    def layer(x, packed_layer):
        return jnp.tanh(x @ unpack(packed_layer)["w"]), None

    dense, _ = jax.lax.scan(
        lambda x, w: (jnp.tanh(x @ w), None), jnp.ones(8), apply_masks(params, masks)["w"]
    )
    np.testing.assert_array_equal(jax.lax.scan(layer, jnp.ones(8), held)[0], dense)


W, MASK = {"w": jnp.ones((2, 2))}, {"w": jnp.array([[True, False], [True, True]])}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pack(W, {"v": MASK["w"]}), ValueError, "masks and parameters differ in v, w"),
        (lambda: pack(W, {"w": jnp.ones((2, 2))}), TypeError, "the mask of w is float32"),
        (lambda: jax.jit(pack)(W, MASK), ValueError, "mask of w is traced.*Pack outside of jit"),
        (lambda: pack(W, MASK, stacked={"w": 1}), ValueError, "layers of w keep from 1 to 2"),
        (lambda: pack(W, MASK, stacked={"v": 1}), ValueError, "rule 0, 'v', matched none of 1"),
        (
            lambda: unpack(Packed(W, {"v": Bits(jnp.zeros((2, 1), jnp.uint8), 2)})),
            ValueError,
            "bits are of v, and values of w",
        ),
    ],
)
def test_errors_say_the_way_out(make, error, message):
    with pytest.raises(error, match=message):
        make()
