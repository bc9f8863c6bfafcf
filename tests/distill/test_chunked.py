"""Laws of divergence by pieces: that of whole logits, for every chunk, in a fraction of memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from unitscale_jax import trace
from unitscale_jax.distill import chunked_kl, kl

ROWS, SIZE = 10, 16
OVER = pytest.mark.parametrize("over", ["tokens", "vocabulary"])


def heads(seed=0, rows=ROWS, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = ((rows, 7), (7, SIZE), (rows, 5), (5, SIZE))
    return [jnp.asarray(rng.normal(size=shape)).astype(dtype) for shape in shapes]


def dense(h_t, w_t, h_s, w_s, weight=None, temperature=2.0):
    rows = kl(h_t @ w_t, h_s @ w_s, temperature)
    return jnp.sum(rows if weight is None else jnp.where(weight != 0, weight * rows, 0))


def close(a, b, tolerance=2e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )


@jax.jit
def tripled(*operands):
    return jax.value_and_grad(lambda *x: 3 * dense(*x), (0, 1, 2, 3))(*operands)


@OVER
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_equals_the_divergence_of_whole_logits(over, chunk):
    operands = heads()
    weight = jnp.asarray(np.random.default_rng(1).integers(0, 3, ROWS).astype(np.float32))
    chunked = functools.partial(chunked_kl, chunk=chunk, over=over, temperature=2.0)
    got = jax.jit(jax.value_and_grad(lambda *x: 3 * chunked(*x, weight=weight), (0, 1, 2, 3)))
    total, grads = got(*operands)
    expected, expected_grads = tripled(*operands, weight)
    close((total, grads), (expected, expected_grads))
    assert not any(np.any(g) for g in grads[:2])  # the teacher's
    ones = jnp.ones(ROWS)
    close(3 * jax.jit(chunked)(*operands), tripled(*operands, ones)[0])  # nothing to derive


@OVER
def test_is_zero_with_zero_gradient_at_equality(over):
    h, w, *_ = heads()
    chunked = jax.jit(jax.value_and_grad(functools.partial(chunked_kl, chunk=4, over=over), (2, 3)))
    total, grads = chunked(h, w, h, w)
    close((total, grads), (jnp.float32(0), (jnp.zeros_like(h), jnp.zeros_like(w))), 1e-5)
    assert total >= 0


@OVER
def test_rows_that_do_not_count_change_nothing(over):
    h_t, w_t, h_s, w_s = heads()
    weight = jnp.arange(ROWS) < 6
    chunked = jax.jit(jax.value_and_grad(functools.partial(chunked_kl, chunk=4, over=over), (2, 3)))
    broken = h_s.at[6:].set(3e38)  # its logits overflow
    total, (dh, dw) = chunked(h_t, w_t, broken, w_s, weight=weight)
    expected, (few, dw_few) = chunked(h_t[:6], w_t, h_s[:6], w_s)
    close((total, dh[:6], dw), (expected, few, dw_few))
    assert not np.any(dh[6:])


@OVER
def test_keeps_leading_axes_and_dtypes(over):
    h_t, w_t, h_s, w_s = heads(dtype=jnp.bfloat16)
    pairs = lambda x: x.reshape(2, 5, -1)
    value = jax.jit(jax.value_and_grad(functools.partial(chunked_kl, chunk=4, over=over), (2, 3)))
    total, (dh, dw) = value(pairs(h_t), w_t, pairs(h_s), w_s)
    assert total.dtype == jnp.float32 and dh.shape == (2, 5, 5)
    assert dh.dtype == dw.dtype == jnp.bfloat16
    exact = jax.jit(jax.value_and_grad(functools.partial(dense, temperature=1.0), (2, 3)))
    expected = exact(*(x.astype(jnp.float32) for x in (h_t, w_t, h_s, w_s)))
    grads = dh.reshape(ROWS, -1).astype(jnp.float32), dw.astype(jnp.float32)
    close((total, grads), expected, 3e-2)


@OVER
@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
def test_sharded_over_tokens_and_vocabulary_equals_unsharded(over, outside):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    specs = (P("data"), P(None, "model")) * 2
    weight = jnp.asarray(np.random.default_rng(2).uniform(size=ROWS).astype(np.float32))

    def loss(*operands):
        total = chunked_kl(
            *operands[:4],
            weight=operands[4],
            chunk=3,
            over=over,
            temperature=2.0,
            mesh_axis="model",
        )
        return jax.lax.psum(total, "data")

    derived = lambda fn: jax.value_and_grad(fn, (2, 3))
    sharded = functools.partial(jax.shard_map, mesh=mesh, in_specs=(*specs, P("data")))
    if outside:
        fn = derived(sharded(loss, out_specs=P()))
    else:
        fn = sharded(derived(loss), out_specs=(P(), specs[2:]))
    close(jax.jit(fn)(*heads(), weight), jax.jit(derived(dense))(*heads(), weight))


LARGE = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(512, 64), (64, 8192)] * 2]


def compiled(fn):
    return jax.jit(jax.grad(fn, (2, 3))).lower(*LARGE).compile()


@pytest.mark.parametrize(("over", "chunk"), [("tokens", 64), ("vocabulary", 1024)])
def test_no_logits_of_all_tokens_and_entries_are_ever_there(over, chunk):
    whole = 512 * 8192
    program = compiled(functools.partial(chunked_kl, chunk=chunk, over=over))
    limit = compiled(dense).memory_analysis().temp_size_in_bytes / 5
    assert program.memory_analysis().temp_size_in_bytes <= limit
    assert max(map(elements, trace_shapes(program.as_text()))) < whole
    assert max(map(elements, trace_shapes(compiled(dense).as_text()))) >= whole


def trace_shapes(text):
    """Shapes of all arrays of a compiled program."""
    import re

    return [tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)]


def elements(shape):
    return int(np.prod(shape))


@pytest.mark.parametrize(
    ("over", "chunk", "products"), [("tokens", 64, 4), ("vocabulary", 1024, 6)]
)
def test_takes_as_many_products_as_promised(over, chunk, products):
    fn = jax.grad(functools.partial(chunked_kl, chunk=chunk, over=over), (2, 3))
    cost = trace.cost(fn, *(jnp.zeros(x.shape, x.dtype) for x in LARGE))
    flops = sum(row.total.flops for row in cost.rows if row.site.name == "dot_general")
    assert flops == products * 2 * 512 * 64 * 8192


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "`chunk` is 0"),
        ({"over": "rows"}, "'tokens' or 'vocabulary'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"mesh_axis": "model"}, "does not vary over the manual axis 'model'"),
        ({"weight": jnp.ones(3)}, r"shape \(3,\); expected one per row, \(10,\)"),
        ({"w_s": jnp.ones((5, 13))}, "has 16 entries, the student's 13"),
        ({"w_s": jnp.ones((SIZE, 5))}, "the student's hidden .*Of an embedding table"),
        ({"h_s": jnp.ones((3, 5))}, r"rows \(10,\), the student \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    names = ("h_t", "w_t", "h_s", "w_s")
    operands = dict(zip(names, heads(), strict=True)) | {"chunk": 4} | change
    with pytest.raises(ValueError, match=message):
        chunked_kl(**operands)
