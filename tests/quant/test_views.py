"""Laws of views: to move codes is to move the array (P23), and to stack it (P22)."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import unitscale_jax as us
from tests.quant.test_quantized import W8A8, assert_same_bits, normal
from unitscale_jax import DotSpec, QSpec
from unitscale_jax.quant import Group

SHAPE = STACK, IN, OUT = (3, 8, 6)
W = normal(*SHAPE)
SPECS = {
    "int8": DotSpec(w=QSpec(axes=(-2,)), x=QSpec()),
    "int4": DotSpec(w=QSpec(format="int4", axes=(-2,))),
    "asymmetric": DotSpec(w=QSpec(symmetric=False, axes=(-2,))),
    "code_sums": DotSpec(w=QSpec(axes=(-2,)), x=QSpec(symmetric=False)),
    "groups": DotSpec(w=QSpec(axes=(-2,), group=Group(4))),
    "integer groups": DotSpec(w=QSpec(format="int4", axes=(-2,), group=Group(4, "integer"))),
    "fp8": DotSpec(w=QSpec(format="e4m3fn", axes=(-2,))),
}


@functools.cache
def coded(kind):
    return us.quantize({"w": W}, {"w": SPECS[kind]})["w"]


def viewed(fn, t, *, strict=True):
    """The result of `fn` on codes: a QTensor where it is a view."""
    return us.quantized(fn, strict=strict)(t)


MOVES = {
    "identity": lambda w: w,
    "cast": lambda w: w.astype(jnp.bfloat16),
    "transpose": lambda w: w.transpose(0, 2, 1),
    "T": lambda w: w.T,
    "swap the stack": lambda w: w.swapaxes(0, 2),
    "index": lambda w: w[1],
    "index of the last": lambda w: w[-1],
    "index given later": lambda w: lax.dynamic_index_in_dim(w, jnp.int32(2), keepdims=False),
    "some of the stack": lambda w: w[1:],
    "every other": lambda w: w[::2],
    "columns": lambda w: w[:, :, 2:5],
    "columns given later": lambda w: lax.dynamic_slice_in_dim(w, jnp.int32(1), 3, axis=2),
    "new axis": lambda w: w[:, None],
    "new last axis": lambda w: w[..., None],
    "squeezed": lambda w: w[:1].squeeze(0),
    "squeezed again": lambda w: w[:, None].squeeze(1),
    "columns in heads": lambda w: w.reshape(STACK, IN, 2, 3),
    "heads in columns": lambda w: w.reshape(STACK, IN, 2, 3).reshape(STACK, IN, OUT),
    "reversed": lambda w: w[::-1],
    "reversed columns": lambda w: w[..., ::-1],
    "copy": lambda w: jnp.copy(w),
    "split": lambda w: jnp.split(w, 3, axis=-1)[1],
    "joined": lambda w: jnp.concatenate([w, w[::-1]], axis=0),
    "joined columns": lambda w: jnp.concatenate([w, w], axis=-1),
    "stacked": lambda w: jnp.stack([w[0], w[2]]),
    "barrier": lambda w: lax.optimization_barrier(w),
    "jitted": lambda w: jax.jit(lambda w: w[1].T)(w),
}
ROWS_SPLIT = lambda w: w.reshape(STACK, 2, 4, OUT)


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", SPECS)
def test_a_view_of_codes_is_the_code_of_the_view(kind, move):
    t, fn = coded(kind), MOVES[move]
    out = viewed(fn, t)
    assert isinstance(out, us.quant.QTensor)
    expected = fn(us.quant.dequantize(t))
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    assert_same_bits(us.quant.dequantize(out), expected)
    again = us.quantize({"w": fn(W)}, {"w": t.spec.with_axes(out.axes)})["w"]
    if move != "cast":  # to the dtype of use; codes are those of the leaf
        for name in ("codes", "scale", "zero_point", "multiplier", "code_sums"):
            made, field = getattr(again, name), getattr(out, name)
            assert (made is None) == (field is None), name
            if made is not None:
                np.testing.assert_array_equal(jnp.broadcast_to(field, made.shape), made)


def test_rows_can_be_split_and_keep_one_scale():
    for kind in ("int8", "int4", "asymmetric", "fp8"):
        t = coded(kind)
        out = viewed(ROWS_SPLIT, t)
        assert out.axes == (-3, -2)
        assert_same_bits(us.quant.dequantize(out), ROWS_SPLIT(us.quant.dequantize(t)))
        back = viewed(lambda w: ROWS_SPLIT(w).reshape(SHAPE), t)
        assert back.axes == (-2,)


BREAKING = {
    "rows join columns": lambda w: w.reshape(STACK, IN * OUT),
    "rows of a broadcast": lambda w: jnp.broadcast_to(w[:, :, None], (STACK, IN, 2, OUT)),
    "padded": lambda w: jnp.pad(w, ((0, 0), (0, 1), (0, 0))),
    "scaled": lambda w: w * 2.0,
    "joined rows": lambda w: jnp.concatenate([w, w], axis=1),
    "two specs": lambda w: jnp.concatenate([w, jnp.ones_like(w)], axis=-1),
}


@pytest.mark.parametrize("move", BREAKING)
@pytest.mark.parametrize("kind", SPECS)
def test_what_is_no_view_is_the_array(kind, move):
    """And gives the same numbers."""
    t, fn = coded(kind), BREAKING[move]
    out = us.quantized(fn)(t)
    value = us.quant.dequantize(out) if isinstance(out, us.quant.QTensor) else out
    assert_same_bits(value, fn(us.quant.dequantize(t)))


@pytest.mark.parametrize("kind", ["groups", "integer groups"])
@pytest.mark.parametrize(
    "cut", [lambda w: w[:, 1:7], lambda w: w[:, :2], lambda w: w[:, ::-1], ROWS_SPLIT]
)
def test_groups_that_are_cut_are_the_array(kind, cut):
    out = us.quantized(cut)(coded(kind))
    value = us.quant.dequantize(out) if isinstance(out, us.quant.QTensor) else out
    assert_same_bits(value, cut(us.quant.dequantize(coded(kind))))


def test_sums_of_codes_are_dropped_with_the_rows_they_summed():
    """A product with some rows of a parameter must not be corrected by the sum of all."""
    w, x = W[0], normal(5, 4, seed=1)
    rules = {"w": DotSpec(w=QSpec(axes=(-2,)), x=QSpec(symmetric=False))}
    fn = lambda p, x: x @ p["w"][2:6]
    y = us.quantized(fn)(us.quantize({"w": w}, rules), x)
    assert_same_bits(us.quantized(fn, rules)({"w": w}, x), y)
    full = x @ w[2:6]
    assert jnp.linalg.norm(y - full) < 0.02 * jnp.linalg.norm(full)


@pytest.mark.parametrize("kind", SPECS)
def test_quantizing_a_stack_is_stacking_what_is_quantized(kind):
    """P22: layers keep scales of their own."""
    stacked = coded(kind)
    layers = [us.quantize({"w": W[k]}, {"w": SPECS[kind]})["w"] for k in range(STACK)]
    assert_same_bits(jax.tree.map(lambda *ts: jnp.stack(ts), *layers), stacked)
    assert_same_bits(jax.tree.map(lambda t: t[1], stacked), layers[1])


@pytest.mark.parametrize("kind", SPECS)
def test_scan_and_vmap_take_layers_from_a_stack(kind):
    t, x = coded(kind), normal(5, IN, seed=2)
    alone = jax.jit(us.quantized(lambda w, x: x @ w))
    one_by_one = jnp.stack([alone(jax.tree.map(lambda leaf, k=k: leaf[k], t), x) for k in range(3)])
    scan = lambda w, x: lax.scan(lambda c, layer: (c, x @ layer), 0, w)[1]
    tight = dict(rtol=1e-6, atol=1e-6) if SPECS[kind].x is None else dict(rtol=0, atol=0)
    np.testing.assert_allclose(jax.jit(us.quantized(scan))(t, x), one_by_one, **tight)
    inside = us.quantized(jax.vmap(lambda w, x: x @ w, (0, None)))
    np.testing.assert_allclose(jax.jit(inside)(t, x), one_by_one, **tight)
    outside = jax.vmap(us.quantized(lambda w, x: x @ w), (0, None))
    np.testing.assert_allclose(jax.jit(outside)(t, x), one_by_one, **tight)


@pytest.mark.parametrize("move", ["transpose", "columns", "columns in heads", "joined columns"])
def test_a_product_with_a_view_is_served_as_it_was_trained(move):
    def fn(params, x):
        w = MOVES[move](params["w"])
        if move == "transpose":
            return jnp.einsum("bi,eoi->ebo", x, w)
        return jnp.tensordot(x, w, [[1], [1]])

    x = normal(5, IN, seed=3)
    rules = us.quant.resolve({"w": W8A8}, fn, {"w": W}, x)
    served = jax.jit(us.quantized(fn, strict=True))(us.quantize({"w": W}, rules), x)
    assert_same_bits(jax.jit(us.quantized(fn, rules))({"w": W}, x), served)


@pytest.mark.parametrize("move", [m for m in MOVES if m not in ("cast", "barrier", "jitted")])
def test_gradients_move_along(move):
    fn, w = MOVES[move], W
    weight = normal(*fn(w).shape, seed=4)

    def loss(params, x):
        moved = fn(params["w"])
        return (moved * weight).sum() + (x @ params["w"][0]).sum()

    rules = {"w": SPECS["int8"]}
    x = normal(5, IN, seed=5)
    got = jax.grad(us.quantized(loss, rules))({"w": w}, x)["w"]
    np.testing.assert_allclose(got[1:], jax.grad(loss)({"w": w}, x)["w"][1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("length", [1, 3])
def test_a_static_range_goes_with_its_layer(length):
    """`input_range` has the leading axes of a stack, and is sliced with it."""
    t = replace(coded("int8"), input_range=jnp.array([[-1.0, 1.0], [-2.0, 2.0], [-4.0, 4.0]]))
    assert viewed(lambda w: w[1], t).input_range.tolist() == [-2.0, 2.0]
    assert viewed(lambda w: w[-length:], t).input_range.shape == (length, 2)
    x = normal(5, IN, seed=6) * 9
    scan = lambda w, x: lax.scan(lambda c, layer: (c, x @ layer), 0, w)[1]
    y = us.quantized(scan)(t, x)
    for k in range(STACK):
        one = replace(jax.tree.map(lambda leaf, k=k: leaf[k], t), spec=t.spec)
        assert_same_bits(us.quantized(lambda w, x: x @ w)(one, x), y[k])
