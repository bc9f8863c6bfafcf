"""Laws of cost: the compiler's count, the analytic one, and exact loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from tests.support import zoo
from unitscale_jax.trace.costs._cost import cost
from unitscale_jax.trace.costs._op_cost import OpCost
from unitscale_jax.trace.program import sites, trace

array = jax.ShapeDtypeStruct
F32, BF16, INT, BYTE, BOOL, COMPLEX = (
    array((6, 10), t) for t in ("float32", "bfloat16", "int32", "uint8", "bool", "complex64")
)
SCALAR, INDEX, PAIR = array((), "float32"), array((), "int32"), array((2, 1), "int32")


def ours(fn, *args):
    found = cost(fn, *args)
    assert not found.unknown
    return found.flops, found.transcendentals


def compilers(fn, *args):
    """What XLA counts in the program before it is optimized; nothing is compiled."""
    found = jax.jit(fn).lower(*args).cost_analysis()
    return found.get("flops", 0), found.get("transcendentals", 0)


def unary(names, *args):
    return {f"{n} {a.dtype}": (getattr(lax, n), a) for n in names.split() for a in args}


def binary(names, *args):
    return {f"{n} {a.dtype}": (getattr(lax, n), a, a) for n in names.split() for a in args}


def reduced(name, axis, x):
    return lambda y: getattr(lax, name)(y, (axis,)), x


def arg_reduced(name, axis, x):
    return lambda y: getattr(lax, name)(y, axis, np.int32), x


def converted(x, dtype):
    return lambda y: lax.convert_element_type(y, dtype), x


def windowed(reducer, start, x, strides=(1, 1), padding="VALID"):
    return lambda y: lax.reduce_window(y, start, reducer, (2, 5), strides, padding), x


def pooled_gradient(g, x):
    pool = lambda x: lax.reduce_window(x, -np.inf, lax.max, (2, 5), (2, 5), "VALID")
    return jax.vjp(pool, x)[1](g)


def scattered(mode, method):
    return (
        lambda x, i, y: getattr(x.at[i[:, 0]], method)(y, mode=mode),
        F32,
        PAIR,
        array((2, 10), "float32"),
    )


def gathered(mode):
    return lambda x, i: x.at[i[:, 0]].get(mode=mode), F32, PAIR


def gathered_points(mode):
    return lambda x, i: x.at[i[:, 0], i[:, 0]].get(mode=mode), F32, PAIR


OPERATIONS = {
    **binary("add sub mul div rem max min pow atan2", F32, BF16),
    **binary("add sub mul div rem max min shift_left shift_right_logical", INT, BYTE),
    **binary("bitwise_and bitwise_or bitwise_xor", INT, BOOL),
    **binary("add sub mul div", COMPLEX),
    **binary("eq ne lt le gt ge", F32, INT),
    **unary("neg abs sign floor ceil round square is_finite reciprocal", F32, BF16),
    **unary("exp exp2 expm1 log log1p tanh logistic", F32, BF16),
    **unary("sin cos tan atan sqrt rsqrt cbrt erf", F32, BF16),
    **unary("neg sign bitwise_not population_count clz", INT),
    **unary("real imag conj tanh neg", COMPLEX),
    **{f"x^{n}": (lambda x, n=n: lax.integer_pow(x, n), F32) for n in range(-4, 10)},
    **{f"to {t}": converted(F32, t) for t in ("bfloat16", "int32", "bool", "int4", "float32")},
    "from bool": converted(BOOL, "float32"),
    "pow int": (lax.pow, F32, INT),
    "pow scalar int": (lax.pow, F32, INDEX),
    "complex": (lax.complex, F32, F32),
    "clamp": (lax.clamp, F32, F32, F32),
    "clamp by scalars": (lax.clamp, SCALAR, F32, SCALAR),
    "select": (lax.select, BOOL, F32, F32),
    "select of three": (lax.select_n, INT, F32, F32, F32),
    "bitcast": (lambda x: lax.bitcast_convert_type(x, "int32"), F32),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 8, 7), F32),
    "one_minus_square": (lambda x, g: jax.vjp(jnp.tanh, x)[1](g), F32, F32),
    **{f"reduce {n}": reduced(f"reduce_{n}", 1, F32) for n in ("sum", "prod", "max", "min")},
    "reduce sum bf16": reduced("reduce_sum", 0, BF16),
    "reduce and": reduced("reduce_and", 0, BOOL),
    "reduce": (lambda x: lax.reduce(x, 0.0, lambda a, b: a * b + lax.sin(a), (0,)), F32),
    **{f"argmax {x.dtype}": arg_reduced("argmax", 1, x) for x in (F32, BF16, INT, BYTE)},
    **{f"argmin {x.dtype}": arg_reduced("argmin", 0, x) for x in (F32, INT)},
    "window sum": windowed(lax.add, 0.0, F32),
    "window sum, padded": windowed(lax.add, 0.0, F32, (2, 2), "SAME"),
    "window max": windowed(lax.max, -np.inf, F32),
    "window of any function": windowed(lambda a, b: a * b + a, 0.0, F32),
    "window max, backward": (pooled_gradient, array((3, 2), "float32"), F32),
    "window max, forward tangent": (
        lambda x, t: jax.jvp(windowed(lax.max, -np.inf, x)[0], (x,), (t,)),
        F32,
        F32,
    ),
    "sort": (lax.sort, F32),
    "sort of pairs": (lambda x, y: lax.sort((x, y), num_keys=1), F32, INT),
    "transpose": (lambda x: x.T, F32),
    "broadcast": (lambda x: lax.broadcast(x, (3,)), F32),
    "concatenate": (lambda x, y: lax.concatenate([x, y], 0), F32, F32),
    "stack": (lambda x, y: jnp.stack([x, y]), F32, F32),
    "split": (lambda x: jnp.split(x, 2), F32),
    "unstack": (jnp.unstack, F32),
    "tile": (lambda x: jnp.tile(x, 2), F32),
    "pad": (lambda x, y: lax.pad(x, y, [(1, 1, 0), (0, 0, 1)]), F32, SCALAR),
    "reverse": (lambda x: lax.rev(x, (0,)), F32),
    "iota": (lambda: lax.iota("float32", 7),),
    "slice": (lambda x: lax.slice(x, (0, 0), (3, 3)), F32),
    "dynamic slice": (lambda x, i: lax.dynamic_slice(x, (i, i), (2, 2)), F32, INDEX),
    "dynamic update": (
        lambda x, y, i: lax.dynamic_update_slice(x, y, (i, i)),
        F32,
        array((2, 2), "float32"),
        INDEX,
    ),
    **{f"gather {m}": gathered(m) for m in ("fill", "clip", "promise_in_bounds", None)},
    "gather points fill": gathered_points("fill"),
    **{
        f"scatter {method} {mode}": scattered(mode, method)
        for method in ("set", "add", "multiply", "max")
        for mode in ("drop", "clip", "promise_in_bounds")
    },
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_costs_what_the_compiler_counts(name):
    fn, *args = OPERATIONS[name]
    assert ours(fn, *args) == compilers(fn, *args)


def contracted(lhs, rhs, numbers, **kwargs):
    return lambda x, y: lax.dot_general(x, y, numbers, **kwargs), lhs, rhs


def convolved(lhs, rhs, **kwargs):
    options = {"window_strides": (1, 1), "padding": "SAME"} | kwargs
    return lambda x, y: lax.conv_general_dilated(x, y, **options), lhs, rhs


def convolved_backward(lhs, rhs, **kwargs):
    conv = convolved(lhs, rhs, **kwargs)[0]
    return lambda x, y, g: jax.vjp(conv, x, y)[1](g), lhs, rhs, jax.eval_shape(conv, lhs, rhs)


def f32(*shape):
    return array(shape, "float32")


MATRICES = (((1,), (0,)), ((), ()))
IMAGE, KERNEL = f32(2, 4, 9, 10), f32(6, 4, 3, 3)
LAST = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
PRODUCTS = {
    "matrices": (lax.dot, f32(6, 10), f32(10, 4)),
    "vectors": (lax.dot, f32(10), f32(10)),
    "outer": (lax.dot, f32(6, 1), f32(1, 4)),
    "batched": contracted(f32(3, 4, 5), f32(3, 5, 7), (((2,), (1,)), ((0,), (0,)))),
    "two contracted": contracted(f32(3, 4, 5), f32(5, 7, 4), (((1, 2), (2, 0)), ((), ()))),
    "attention": (
        lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k),
        f32(2, 7, 3, 5),
        f32(2, 9, 3, 5),
    ),
    "bfloat16": contracted(BF16, BF16, (((1,), (1,)), ((), ())), preferred_element_type="float32"),
    "codes": contracted(BYTE, BYTE, (((1,), (1,)), ((), ())), preferred_element_type="int32"),
    "convolution": convolved(IMAGE, KERNEL),
    "valid": convolved(IMAGE, KERNEL, padding="VALID"),
    "strided": convolved(IMAGE, KERNEL, window_strides=(2, 3)),
    "dilated": convolved(IMAGE, KERNEL, rhs_dilation=(2, 2)),
    "transposed": convolved(IMAGE, KERNEL, lhs_dilation=(2, 2), padding=((1, 1), (2, 1))),
    "padded unevenly": convolved(IMAGE, KERNEL, padding=((2, 0), (0, 3)), window_strides=(1, 2)),
    "cropped": convolved(IMAGE, KERNEL, padding=((-1, 2), (0, -3))),
    "in groups": convolved(IMAGE, f32(6, 2, 3, 3), feature_group_count=2),
    "by channel": convolved(IMAGE, f32(8, 1, 3, 3), feature_group_count=4),
    "in batches": convolved(IMAGE, KERNEL, batch_group_count=2),
    "channels last": convolved(f32(2, 9, 10, 4), f32(3, 3, 4, 6), **LAST),
    "backward": convolved_backward(IMAGE, KERNEL, window_strides=(2, 1)),
    "backward, in groups": convolved_backward(IMAGE, f32(6, 2, 3, 3), feature_group_count=2),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_costs_what_the_compiler_counts(name):
    fn, *args = PRODUCTS[name]
    assert ours(fn, *args) == compilers(fn, *args)


@pytest.mark.parametrize("name", ["matrices", "attention", "strided", "in groups"])
def test_a_product_costs_the_same_when_it_is_compiled(name):
    fn, *args = PRODUCTS[name]
    assert cost(fn, *args).flops == jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_a_product_has_its_formula():
    assert ours(lax.dot, f32(6, 10), f32(10, 4)) == (2 * 6 * 10 * 4, 0)
    valid = convolved(IMAGE, KERNEL, padding="VALID")
    assert ours(*valid) == (2 * (2 * 6 * 7 * 8) * (4 * 3 * 3), 0)


SPECIAL = "asin acos sinh cosh asinh acosh atanh erfc erf_inv lgamma digamma"


@pytest.mark.parametrize("name", SPECIAL.split())
def test_a_special_function_is_one_transcendental(name):
    assert ours(getattr(lax, name), F32) == (0, 60)
    assert sum(compilers(getattr(lax, name), F32)) >= 60


SQUARE, TALL = f32(3, 8, 8), f32(3, 12, 8)
FORMULAS = {
    "cumsum": (lambda x: lax.cumsum(x, 1), (F32,), 6 * 9),
    "cummax": (lambda x: lax.cummax(x, 0), (F32,), 5 * 10),
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 1), (F32,), 8 * 6 * 9),
    "fft": (lambda x: lax.fft(x, "FFT", (8,)), (array((4, 8), "complex64"),), 5 * 32 * 3),
    "fft of two axes": (lambda x: lax.fft(x, "FFT", (4, 8)), (array((4, 8), "complex64"),), 800),
    "real fft": (lambda x: lax.fft(x, "RFFT", (8,)), (f32(4, 8),), 5 * 32 * 3 // 2),
    "inverse": (lambda x: lax.fft(x, "IRFFT", (8,)), (array((4, 5), "complex64"),), 240),
    "ragged_dot": (lax.ragged_dot, (f32(6, 4), f32(2, 4, 5), array((2,), "int32")), 2 * 6 * 4 * 5),
    "top_k": (lambda x: lax.top_k(x, 3), (F32,), 60 * 2),
    "lu": (lax.linalg.lu, (SQUARE,), round(3 * 8**3 * 2 / 3)),
    "qr": (lambda x: lax.linalg.qr(x, full_matrices=False), (TALL,), 3 * 2 * (12 - 8 / 3) * 8**2),
    "triangular_solve": (lax.linalg.triangular_solve, (f32(8, 8), f32(5, 8)), 5 * 8**2),
    "random bits": (lambda key: jax.random.bits(key, (7,)), (jax.random.key(0),), 7 * 112),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_where_the_compiler_cannot_tell_a_formula_does(name):
    fn, args, flops = FORMULAS[name]
    assert cost(fn, *args).flops == flops


def test_a_decomposition_costs_its_leading_terms():
    found = cost(lambda x: lax.linalg.cholesky(x, symmetrize_input=False), SQUARE)
    assert found.by_primitive["cholesky"].flops == 3 * 8**3 // 3


def test_a_linear_solve_costs_its_solver():
    found = cost(jnp.linalg.solve, f32(8, 8), f32(8)).by_primitive
    assert found["lu"].flops == round(8**3 * 2 / 3)
    assert found["triangular_solve"].flops == 2 * 8**2
    assert "dot_general" not in found  # which only its derivative needs


# --- bytes ---

BYTES = {
    "operands and results": (lax.add, (F32, F32), 3 * 240),
    "of their own dtype": (lambda x: x.astype(jnp.bfloat16), (F32,), 240 + 120),
    "bool": (lax.gt, (F32, F32), 2 * 240 + 60),
    "four bits": (lambda x: x.astype(jnp.int8), (array((3, 5), "int4"),), 8 + 15),
    "scalars": (lambda x: x * 2, (F32,), 240 + 4 + 240),
    "a matrix product": (lax.dot, (f32(6, 10), f32(10, 4)), 4 * (60 + 40 + 24)),
    "a view": (lambda x: x.reshape(60)[None], (F32,), 240 + 240),
    "a reshape": (lambda x: x.reshape(60), (F32,), 0),
    "a slice": (lambda x: lax.slice(x, (0, 0), (1, 3)), (F32,), 2 * 12),
    "a place": (
        lambda x, i: lax.dynamic_slice(x, (i, i), (1, 3), allow_negative_indices=False),
        (F32, INDEX),
        2 * 12 + 8,
    ),
    "a row": (lambda x, i: lax.gather(x, i, ROW, (1, 10)), (F32, PAIR), 2 * 80 + 8),
    "an update": (
        lambda x, y, i: lax.dynamic_update_slice(x, y, (i, i), allow_negative_indices=False),
        (F32, f32(1, 3), INDEX),
        2 * 12 + 8,
    ),
    "an addition": (
        lambda x, i, y: lax.scatter_add(x, i, y, INTO),
        (F32, PAIR, f32(2, 10)),
        3 * 80 + 8,
    ),
    "keys": (lambda k: jax.random.split(k, 3), (jax.random.key(0),), 8 + 24),
}
ROW = lax.GatherDimensionNumbers((1,), (0,), (0,))
INTO = lax.ScatterDimensionNumbers((1,), (0,), (0,))


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_what_an_operation_touches(name):
    fn, args, expected = BYTES[name]
    assert cost(fn, *args).bytes == expected


def test_compiled_without_anything_to_fuse_the_bytes_are_the_compilers():
    for fn, *args in (OPERATIONS["add float32"], OPERATIONS["exp bfloat16"], PRODUCTS["matrices"]):
        compiled = jax.jit(fn).lower(*args).compile().cost_analysis()
        assert cost(fn, *args).bytes == compiled["bytes accessed"]


# --- a transformer ---

BATCH, TIME, WIDTH, HEADS, FFN, LAYERS, VOCAB = 2, 6, 12, 3, 20, 3, 17
LAYER_SHAPES = {
    "qkv": (WIDTH, 3 * WIDTH),
    "out": (WIDTH, WIDTH),
    "up": (WIDTH, FFN),
    "down": (FFN, WIDTH),
}
STACK = {name: f32(LAYERS, *shape) for name, shape in LAYER_SHAPES.items()}
HEAD = f32(WIDTH, VOCAB)
TOKENS, MASK = f32(BATCH, TIME, WIDTH), array((TIME, TIME), "bool")
PER_TOKEN = 2 * BATCH * TIME
IN_LAYER = PER_TOKEN * (4 * WIDTH**2 + 2 * WIDTH * FFN + 2 * TIME * WIDTH)
FORWARD = LAYERS * IN_LAYER + PER_TOKEN * WIDTH * VOCAB


def norm(x):
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)


def layer(x, p, mask):
    split = lambda y: y.reshape(BATCH, TIME, HEADS, -1)
    q, k, v = (split(y) for y in jnp.split(norm(x) @ p["qkv"], 3, -1))
    scores = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k), -1e9)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    x = x + mixed.reshape(x.shape) @ p["out"]
    return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]


def transformer(layers):
    """On activations, so that nothing lies before the first layer; its norms have no parameters."""
    return lambda stack, head, x, mask: norm(layers(stack, x, mask)) @ head


def unrolled(step=layer):
    def layers(stack, x, mask):
        for i in range(LAYERS):
            x = step(x, jax.tree.map(lambda p: p[i], stack), mask)  # noqa: B023
        return x

    return transformer(layers)


def scanned(step=layer):
    def layers(stack, x, mask):
        return lax.scan(lambda x, p: (step(x, p, mask), None), x, stack)[0]

    return transformer(layers)


def gradient(model):
    return lambda *args: jax.grad(lambda *a: model(*a).sum(), (0, 1))(*args)


def dots(fn):
    return cost(fn, STACK, HEAD, TOKENS, MASK).by_primitive["dot_general"].flops


def test_a_transformer_costs_its_formula():
    assert dots(unrolled()) == FORWARD


def test_a_gradient_costs_twice_more_except_that_of_the_input():
    into_the_first = PER_TOKEN * WIDTH * 3 * WIDTH
    head_forward = PER_TOKEN * WIDTH * VOCAB  # nothing depends on the value of a sum
    assert dots(gradient(unrolled())) == 3 * FORWARD - into_the_first - head_forward


def test_a_scan_over_layers_costs_what_the_layers_cost():
    plain, loop = (cost(m(), STACK, HEAD, TOKENS, MASK) for m in (unrolled, scanned))
    assert loop.transcendentals == plain.transcendentals
    assert loop.flops == plain.flops
    assert dots(scanned()) == dots(unrolled()) == FORWARD


def test_a_scan_differentiates_through_every_layer_alike():
    into_the_first = PER_TOKEN * WIDTH * 3 * WIDTH  # which a scan computes like the others
    assert dots(gradient(scanned())) == dots(gradient(unrolled())) + into_the_first


@pytest.mark.parametrize("model", [unrolled, scanned])
def test_remat_adds_one_more_forward_but_for_what_no_gradient_needs(model):
    last = PER_TOKEN * FFN * WIDTH  # the product a layer ends with enters no gradient of the layer
    more = dots(gradient(model(jax.checkpoint(layer)))) - dots(gradient(model()))
    assert more == LAYERS * (IN_LAYER - last)


def test_a_transformer_costs_what_the_compiler_counts():
    args = STACK, HEAD, TOKENS, MASK
    assert ours(unrolled(), *args) == compilers(unrolled(), *args)

    def pulled_back(g, *args):  # a given cotangent leaves no constants to be folded
        return jax.vjp(lambda stack, head: unrolled()(stack, head, *args[2:]), *args[:2])[1](g)

    g = jax.eval_shape(unrolled(), *args)
    assert ours(pulled_back, g, *args) == compilers(pulled_back, g, *args)


WITHOUT_LOOPS = zoo.named(having=("plain",), without=("scan", "while", "dropout"))


@pytest.mark.parametrize("name", WITHOUT_LOOPS)
def test_a_model_costs_what_the_compiler_counts_but_for_constants_it_folds(name):
    model = zoo.model(name)
    for fn in (model.apply, jax.grad(model.loss)):
        found, expected = (count(fn, model.params, *model.inputs) for count in (ours, compilers))
        assert expected[0] <= found[0] <= 1.01 * expected[0]
        assert found[1] == expected[1]


@pytest.mark.parametrize("name", zoo.EACH)
def test_every_operation_of_the_zoo_is_known(name):
    model = zoo.model(name)
    fn = jax.grad(model.loss) if model.differentiable else model.apply
    assert not cost(fn, model.params, *model.inputs).unknown


# --- loops, branches, devices ---

W = f32(4, 4)
VECTOR = f32(4)
step = lambda x, w: jnp.tanh(x @ w)
STEP = cost(step, VECTOR, W).total


def test_a_scan_costs_its_length():
    fn = lambda x, w: lax.scan(lambda c, _: (step(c, w), None), x, None, length=5)[0]
    assert cost(fn, VECTOR, W).total == STEP * 5


def test_nested_loops_multiply():
    inner = lambda c, w: lax.fori_loop(0, 3, lambda _, y: step(y, w), c)
    fn = lambda x, w: lax.scan(lambda c, _: (inner(c, w), None), x, None, length=5)[0]
    assert cost(fn, VECTOR, W).by_primitive["dot_general"].flops == 15 * 32
    assert cost(fn, VECTOR, W).data_dependent == ()


def test_a_while_loop_that_counts_costs_its_turns():
    def fn(x, w):
        turn = lambda c: (c[0] + 2, step(c[1], w))
        return lax.while_loop(lambda c: c[0] < 9, turn, (0, x))[1]

    found = cost(fn, VECTOR, W)
    assert found.flops == 5 * (STEP.flops + 1) + 6  # the addition, and the condition once more
    assert found.data_dependent == ()


def test_a_loop_that_data_stop_is_counted_once_and_listed():
    turn = lambda w: lambda c: step(c, w)
    loop = lambda x, w: lax.while_loop(lambda c: c[0] < 9, turn(w), x)
    fn = lambda x, w: lax.scan(lambda c, _: (loop(c, w), None), x, None, length=5)[0]
    found = cost(fn, VECTOR, W)
    assert found.by_primitive["dot_general"].flops == 5 * 32
    assert [site.name for site in found.data_dependent] == ["while"]
    assert found.data_dependent[0].place == (0, 0, 0)


def test_a_cond_costs_its_costliest_branch_and_lists_all():
    cheap, dear = lambda x, w: x, lambda x, w: step(step(x, w), w)
    found = cost(lambda i, x, w: lax.switch(i, [step, dear, cheap], x, w), INDEX, VECTOR, W)
    assert found.by_primitive["dot_general"].flops == 2 * 32
    assert [row.runs for row in found.rows if row.site.name == "dot_general"] == [False, True, True]


def test_the_costliest_branch_is_found_through_loops():
    loop = lambda x, w: lax.fori_loop(0, 3, lambda _, y: step(y, w), x)
    found = cost(lambda p, x, w: lax.cond(p, loop, step, x, w), array((), "bool"), VECTOR, W)
    assert found.by_primitive["dot_general"].flops == 3 * 32


def test_the_costliest_branch_is_not_the_longest():
    long = lambda x, w: jnp.sin(jnp.sin(jnp.sin(jnp.sin(x))))
    found = cost(lambda p, x, w: lax.cond(p, long, step, x, w), array((), "bool"), VECTOR, W)
    assert set(found.by_primitive) == {"dot_general", "tanh", "convert_element_type"}


def test_what_no_result_depends_on_costs_nothing():
    @jax.jit
    def both(x, w):
        return step(x, w), jnp.sin(x @ w)

    def fn(x, w):
        (y, z), _ = lax.scan(lambda c, _: (both(c[0], w), c[1]), (x, x), None, length=2)
        return y

    found = cost(fn, VECTOR, W)
    assert found.total == STEP * 2
    assert [row.site.name for row in found.rows if not row.runs] == ["dot_general", "sin"]


def test_what_only_a_dropped_result_of_a_call_needs_costs_nothing():
    both = jax.jit(lambda a, b: (jnp.cos(a), jnp.tan(b)))
    found = cost(lambda x: both(x, jnp.sin(x))[0], VECTOR)
    assert set(found.by_primitive) == {"cos"}


def test_a_carry_that_a_later_turn_needs_is_not_dropped():
    turn = lambda c, w: ((step(c[1], w), jnp.sin(c[0])), None)
    fn = lambda x, w: lax.scan(lambda c, _: turn(c, w), (x, x), None, length=4)[0][0]
    assert cost(fn, VECTOR, W).transcendentals == 4 * 8


def test_what_has_an_effect_is_not_dropped():
    @jax.jit
    def shown(x):
        jax.debug.print("{}", jnp.cos(x))

    def fn(x):
        ref = jax.new_ref(x)
        ref[...] = jnp.sin(x)
        shown(x)
        return ref[...]

    found = cost(fn, VECTOR)
    assert found.by_primitive["cos"].transcendentals == 4
    assert found.by_primitive["sin"].transcendentals == 4
    assert found.by_primitive["swap"].bytes == 2 * 16


@pytest.mark.parametrize(
    "around", [jax.jit, jax.checkpoint, lambda f: f], ids=["jit", "remat", "-"]
)
def test_calls_cost_what_is_in_them(around):
    fn = lambda x, w: around(around(step))(x, w)
    assert cost(fn, VECTOR, W).total == STEP


def test_a_function_called_twice_costs_twice():
    shared = jax.jit(step)
    assert cost(lambda x, w: shared(shared(x, w), w), VECTOR, W).total == STEP * 2


def test_vmap_multiplies_a_product_by_its_rows():
    many = cost(jax.vmap(step, (0, None)), f32(7, 4), W)
    assert (many.flops, many.transcendentals) == (7 * STEP.flops, 7 * STEP.transcendentals)


def test_sharded_costs_what_the_whole_costs():
    mesh = jax.make_mesh((4, 2), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
    x = f32(8, 4)
    for spec, axes in ((P(("a", "b")), {"a", "b"}), (P("a"), {"a"})):
        sharded = jax.shard_map(
            step, mesh=mesh, in_specs=(spec, P()), out_specs=spec, axis_names=axes
        )
        assert ours(sharded, x, W) == ours(step, x, W)


def test_work_done_on_every_device_costs_as_often():
    mesh = jax.make_mesh((4, 2), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
    summed = lambda x, w: lax.psum(step(x, w), "a")
    fn = jax.shard_map(summed, mesh=mesh, in_specs=(P("a"), P()), out_specs=P())
    found = cost(fn, f32(8, 4), W)
    assert found.by_primitive["dot_general"].flops == 2 * ours(step, f32(8, 4), W)[0]
    sums = [row for row in found.rows if row.site.name.startswith("psum")]
    assert [(row.op.flops, row.repeats) for row in sums] == [(2 * 4, 8)]


# --- what cannot be counted ---


def kernel(x, y):
    y[...] = x[...] * 2


def test_a_kernel_costs_what_it_states():
    stated = pl.CostEstimate(flops=11, bytes_accessed=22, transcendentals=33)
    fn = pl.pallas_call(kernel, out_shape=VECTOR, cost_estimate=stated, interpret=True)
    found = cost(fn, VECTOR)
    assert found.total == OpCost(11, 22, 33) and not found.unknown


def test_what_is_unknown_is_not_guessed_but_named():
    fn = pl.pallas_call(kernel, out_shape=VECTOR, interpret=True)
    found = cost(lambda x: fn(fn(x)) + 1, VECTOR)
    assert found.unknown == {"pallas_call": 2}
    assert found.by_primitive["pallas_call"] == OpCost(0, 2 * 2 * 16, 0)


# --- the bill ---


def example(x, w):
    with jax.named_scope("encoder"):
        x = lax.scan(lambda c, _: (step(c, w), None), x, None, length=3)[0]
    with jax.named_scope("head"):
        x = x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
    return x > 0, lax.cond(x[0] > 0, lambda y: jnp.sin(y), lambda y: y, x)


def test_every_grouping_adds_up_to_the_total():
    found = cost(example, VECTOR, W)
    keys = (lambda s: s.name, lambda s: s.scope, lambda s: s.place, lambda s: None)
    for groups in (found.by_scope, found.by_primitive, *map(found.by, keys)):
        assert sum(groups.values(), OpCost()) == found.total
    assert sum(found.by_dtype.values()) == found.flops
    assert found.by_scope["encoder"] == STEP * 3


def test_flops_are_split_by_the_dtype_they_are_computed_in():
    found = cost(example, VECTOR, W).by_dtype
    conversions = 4 + 16
    assert found["float32"] == 3 * STEP.flops + conversions
    assert found["bfloat16"] == 2 * 4 * 4 + 4 + 1  # and two comparisons
    assert cost(lax.select, BOOL, F32, F32).by_dtype == {"float32": 60}
    added = lambda x, i, y: lax.scatter_add(x, i, y, INTO)
    x, y = array((6, 10), "bfloat16"), array((2, 10), "bfloat16")
    assert cost(added, x, PAIR, y).by_dtype == {"bfloat16": 20}  # though indices are wider
    mixed = contracted(array((2, 3), "int8"), array((3, 4), "bfloat16"), MATRICES)
    assert cost(*mixed).by_dtype == {"bfloat16": 2 * 2 * 3 * 4}


def test_a_row_has_the_place_of_its_equation():
    traced = trace(example, jnp.ones(4), jnp.ones((4, 4)))
    found = [site.place for site in sites(traced.closed.jaxpr)]
    assert [row.site.place for row in cost(traced).rows] == found
    assert len(set(found)) == len(found)


def test_a_traced_function_takes_no_more_arguments():
    with pytest.raises(TypeError, match="has its arguments; got 1 more"):
        cost(trace(jnp.sin, 1.0), 1.0)


def test_costs_are_exact_integers_however_large():
    found = cost(
        lambda x, w: lax.scan(lambda c, _: (c @ w, None), x, None, length=10**9)[0],
        f32(4096, 4096),
        f32(4096, 4096),
    )
    assert found.flops == 2 * 4096**3 * 10**9
    assert isinstance(found.flops, int) and math.log2(found.flops) > 63
