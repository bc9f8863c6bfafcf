"""Laws of identities whose two passes differ."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from unitscale_jax.fwd_bwd import mark, scale, scale_bwd, scale_fwd, straight_through
from unitscale_jax.mesh_axes import match_vma
from unitscale_jax.trace import captured
from unitscale_jax.trace.program import sites

P = jax.sharding.PartitionSpec
TOLERANCE = 100 * np.finfo(np.float32).eps
xs = hnp.arrays(np.float32, 4, elements=st.floats(-2, 2, width=32, allow_subnormal=False))
factors = st.floats(-4, 4, width=32, allow_subnormal=False).map(np.float32)
close = functools.partial(np.testing.assert_allclose, rtol=TOLERANCE, atol=TOLERANCE)
same = np.testing.assert_array_equal


def static(x):
    return scale(x, fwd=2.0, bwd=3.0)


def data(x):
    return scale(x, fwd=jnp.float32(2.0), bwd=jnp.float32(3.0))


def through(x):
    return straight_through(2 * jax.lax.stop_gradient(x), 3 * x)


def marked(x):
    return mark(scale(mark(x, at=0), fwd=2.0, bwd=3.0), at=1)


FUNCTIONS = [static, data, through, marked]  # all: values times 2, cotangents times 3
TANGENT = {static: 2.0, data: 2.0, through: 3.0, marked: 2.0}  # what forward mode multiplies by
functions = pytest.mark.parametrize("f", FUNCTIONS)
scales = pytest.mark.parametrize("f", [static, data, marked])


def mesh_of_8():
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((8,), ("dp",), axis_types=auto)


# ------------------------------------------------------------------------------ both passes


@functools.partial(jax.jit, static_argnums=0)
def reverse(f, x, ct):
    y, pull = jax.vjp(f, x)
    return y, pull(ct)[0]


@functools.partial(jax.jit, static_argnums=0)
def forward(f, x, dx):
    y, push = jax.linearize(f, x)
    return jax.jvp(f, (x,), (dx,)), (y, push(dx))


@functions
@given(x=xs, ct=xs)
def test_values_are_doubled_and_cotangents_tripled(f, x, ct):
    y, grad = reverse(f, x, ct)
    same(y, 2 * x)
    same(grad, 3 * ct)


@functions
@given(x=xs, dx=xs)
def test_tangents_are_those_of_forward_mode(f, x, dx):
    for y, dy in forward(f, x, dx):
        same(y, 2 * x)
        same(dy, TANGENT[f] * dx)


@scales
def test_a_gradient_of_a_gradient_meets_the_factors_again(f):
    g = lambda x: f(x**2)
    assert g(5.0) == 50
    assert jax.grad(g)(5.0) == 30
    assert jax.grad(jax.grad(g))(5.0) == 6
    assert jax.hessian(g)(5.0) == 6


@scales
def test_a_backward_pass_differentiated_is_the_forward_pass(f):
    """The pullback is linear too: its tangents meet `bwd`, and its own pullback meets `fwd`."""
    _, pull = jax.vjp(f, 5.0)
    back = lambda ct: pull(ct)[0]
    assert jax.jvp(back, (7.0,), (1.0,)) == (21, 3)
    assert jax.grad(back)(7.0) == 2


def test_straight_through_passes_the_second_derivative_of_what_follows():
    """f(value) with the value's derivative taken for 1: f'' is taken at the value."""
    f = lambda x: straight_through(jnp.round(x), x) ** 3
    for x, value in [(2.3, 2.0), (2.7, 3.0)]:
        assert jax.grad(f)(x) == 3 * value**2
        assert jax.grad(jax.grad(f))(x) == jax.hessian(f)(x) == 6 * value
        assert jax.jvp(f, (x,), (1.0,))[1] == 3 * value**2


@given(value=hnp.arrays(np.uint32, 64), carrier=xs)
def test_straight_through_is_the_value_to_the_bit(value, carrier):
    """Also of infinities, NaN and subnormal numbers, and whatever the carrier."""
    value = value.view(np.float32)
    carrier = np.resize(carrier, 64)
    carrier[:2] = np.inf, np.nan
    got = jax.jit(straight_through)(value, carrier)
    same(np.asarray(got).view(np.uint32), value.view(np.uint32))


def test_the_value_gets_no_gradient_and_the_carrier_all_of_it():
    grads = jax.grad(lambda v, c: 5 * straight_through(v, c), argnums=(0, 1))(1.0, jnp.inf)
    assert grads == (0, 5)


def test_factors_that_are_data_have_no_gradient():
    f = lambda x, fwd, bwd: scale(x, fwd=fwd, bwd=bwd)
    assert jax.grad(f, argnums=(0, 1, 2))(5.0, jnp.float32(2), jnp.float32(3)) == (3, 0, 0)
    ones = (jnp.float32(1),) * 3
    assert jax.jvp(f, (5.0, *ones[:2]), ones)[1] == 1


@given(x=xs, fwd=factors, bwd=factors)
def test_static_factors_and_data_agree(x, fwd, bwd):
    (y, pull), (y_data, pull_data) = (
        jax.vjp(lambda x, cast=cast: scale(x, fwd=cast(fwd), bwd=cast(bwd)), x)
        for cast in (float, jnp.asarray)
    )
    same(y, y_data)
    same(pull(x)[0], pull_data(x)[0])


def once(x, a, b, c, d):
    return scale(x, fwd=a * c, bwd=b * d)


def twice(x, a, b, c, d):
    return scale(scale(x, fwd=a, bwd=b), fwd=c, bwd=d)


@functools.partial(jax.jit, static_argnums=0)
def both_passes(f, x, *factors):
    f_of_x = lambda x: f(x, *factors)
    return jax.vjp(f_of_x, x)[1](x), jax.jvp(f_of_x, (x,), (x,))


@given(x=xs, a=factors, b=factors, c=factors, d=factors)
def test_two_scales_are_the_scale_by_the_products(x, a, b, c, d):
    jax.tree.map(close, both_passes(twice, x, a, b, c, d), both_passes(once, x, a, b, c, d))


def test_the_short_forms_leave_the_other_pass_alone():
    assert jax.value_and_grad(lambda x: scale_fwd(x, 2.0))(5.0) == (10, 1)
    assert jax.value_and_grad(lambda x: scale_bwd(x, 3.0))(5.0) == (5, 3)
    assert jax.value_and_grad(lambda x: scale_bwd(x, jnp.float32(-1.0)))(5.0) == (5, -1)


# ------------------------------------------------------------------------------ in the program


def test_factors_of_1_add_nothing_and_others_stay_visible():
    equations = lambda f: [eqn.primitive.name for eqn in jax.make_jaxpr(f)(1.0).eqns]
    assert equations(scale) == []
    assert equations(static) == ["unit_scale"]
    assert equations(lambda x: straight_through(x, x)) == ["straight_through"]
    assert "unit_scale[bwd=3.0 fwd=2.0]" in str(jax.make_jaxpr(static)(1.0))


def test_a_pass_with_factor_1_compiles_to_nothing():
    text = jax.jit(lambda x: scale_bwd(x, 3.0)).lower(jnp.ones(4)).as_text()
    assert "multiply" not in text
    text = jax.jit(jax.grad(lambda x: scale_fwd(x, 3.0))).lower(1.0).as_text()
    assert "multiply" not in text


def marks_of(f, *args):
    """The parameters of every mark in the equations of a function, in order."""
    found = sites(jax.make_jaxpr(f)(*args).jaxpr)
    return [(s.eqn.params["at"], s.eqn.params["back"]) for s in found if s.name == "mark"]


def test_a_mark_stands_in_both_passes_and_turns_in_the_second():
    f = lambda x: mark(jnp.sin(mark(x, at=0)), at=1)
    assert marks_of(f, 1.0) == [(0, False), (1, False)]
    assert marks_of(jax.grad(f), 1.0) == [(0, False), (1, False), (1, True), (0, True)]
    back = lambda ct: jax.vjp(f, 1.0)[1](ct)[0]
    transposed = marks_of(jax.grad(back), 1.0)  # back through the backward pass: turned again
    assert transposed[-2:] == [(0, False), (1, False)]


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.vmap(f)])
def test_a_mark_is_found_in_both_passes_under(wrap):
    f = wrap(lambda x: jnp.cos(mark(jnp.sin(x), at=5)))
    both = jax.grad(lambda x: f(x).sum())
    assert {(5, False), (5, True)} == set(marks_of(both, jnp.ones(2)))


@given(x=hnp.arrays(np.uint32, 16))
def test_a_mark_is_the_identity_to_the_bit_in_both_passes(x):
    """Also of infinities, NaN and subnormal numbers."""
    y, pull = jax.vjp(lambda x: mark(x, at=0), x.view(np.float32))
    for got in (y, *pull(x.view(np.float32))):
        same(np.asarray(got).view(np.uint32), x)


def test_a_cotangent_at_a_mark_is_the_sum_over_all_uses():
    see = lambda site, _, out: out[0] if site.name == "mark" and site.eqn.params["back"] else None
    f = lambda x: (lambda y: 2 * y + 5 * y)(mark(x, at=0))
    seen = captured(jax.grad(f), see)(1.0)[1]
    assert [float(c.value) for c in seen] == [7]


def test_a_mark_compiles_to_nothing():
    text = lambda f: jax.jit(jax.grad(f)).lower(1.0).as_text()
    plain, marked_text = text(lambda x: jnp.sin(x)), text(lambda x: jnp.sin(mark(x, at=0)))
    assert marked_text.count("stablehlo") == plain.count("stablehlo")


# ------------------------------------------------------------------------------ transforms


def twice_through_tanh(f, x):
    return jnp.sum(f(jnp.tanh(f(x))) ** 2)


TRANSFORMS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "vmap of one": lambda h: lambda x: jax.vmap(h)(x[None])[0],
    "scan": lambda h: lambda x: jax.lax.scan(lambda c, _: (c + h(x), None), 0.0, None, length=1)[0],
    "cond": lambda h: lambda x: jax.lax.cond(x[0] < 10, h, lambda x: jnp.sum(x), x),
    "jit of remat of jit": lambda h: jax.jit(jax.checkpoint(jax.jit(h))),
}


@functions
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_commutes_with(transform, f):
    h = functools.partial(twice_through_tanh, f)
    x = jnp.linspace(-1.0, 1.0, 4)
    value, grad = jax.value_and_grad(h)(x)
    got_value, got_grad = jax.value_and_grad(TRANSFORMS[transform](h))(x)
    close(got_value, value)
    close(got_grad, grad)
    close(jax.hessian(TRANSFORMS[transform](h))(x), jax.hessian(h)(x))


@functions
def test_multiplies_once_per_turn_of_a_scan(f):
    loop = lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=3)[0]
    value, grad = jax.value_and_grad(loop)(jnp.float32(1.0))
    assert (value, grad) == (8, 27)


def test_factors_may_change_from_layer_to_layer_of_a_scan():
    taus = jnp.array([0.5, 0.25, 2.0])
    loop = lambda x: jax.lax.scan(lambda c, t: (scale(c, fwd=t, bwd=4 * t), None), x, taus)[0]
    assert jax.value_and_grad(loop)(8.0) == (2, 4**3 / 4)


@functions
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_keeps_the_dtype_in_both_passes(f, dtype):
    value, grad = jax.value_and_grad(lambda x: f(x).sum())(jnp.ones(4, dtype))
    assert (value.dtype, grad.dtype) == (dtype, dtype)
    same(grad.astype(jnp.float32), 3 * np.ones(4))


BATCHED = {  # which of (x, fwd, bwd) have a batch axis, and where
    "x": (0, None, None),
    "x at the end": (1, None, None),
    "factors": (None, 0, 0),
    "one factor": (None, 0, None),
    "x at the end and a factor": (1, None, 0),
    "all": (0, 0, 0),
}


@pytest.mark.parametrize("axes", BATCHED.values(), ids=BATCHED)
def test_vmap_is_the_loop_over_rows(axes):
    n, x_shape = 3, {None: (4,), 0: (3, 4), 1: (4, 3)}[axes[0]]
    x = jnp.arange(1.0, 1.0 + float(np.prod(x_shape))).reshape(x_shape)
    fwd, bwd = (jnp.arange(1.0, 4) if a == 0 else jnp.float32(7) for a in axes[1:])
    both = lambda x, f, b: jax.value_and_grad(lambda x: scale(x, fwd=f, bwd=b).sum())(x)
    at = lambda i: [
        v if a is None else v.take(i, a) for v, a in zip((x, fwd, bwd), axes, strict=True)
    ]
    values, grads = jax.vmap(both, axes)(x, fwd, bwd)
    want_values, want_grads = zip(*(both(*at(i)) for i in range(n)), strict=True)
    close(values, want_values)
    close(grads, want_grads)


@jax.numpy_rank_promotion("raise")
def test_nested_vmap_over_factors_is_the_table_of_all_pairs():
    x, fwd, bwd = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0, 5.0]), jnp.array([6.0, 7.0])
    f = lambda x, fwd, bwd: jax.value_and_grad(lambda x: scale(x, fwd=fwd, bwd=bwd).sum())(x)
    over_fwd = jax.vmap(f, (None, 0, None))
    values, grads = jax.vmap(over_fwd, (None, None, 0))(x, fwd, bwd)
    same(values, np.broadcast_to(3 * fwd, (2, 3)))
    same(grads, np.broadcast_to(bwd[:, None, None], (2, 3, 2)))
    values, grads = jax.vmap(jax.vmap(f, (None, 0, 0)), (0, None, 0))(x, fwd, jnp.ones((2, 3)))
    same(values, jnp.outer(x, fwd))
    values, _ = jax.vmap(jax.vmap(f, (0, 0, 0)), (0, None, None))(x[:, None].repeat(3, 1), fwd, fwd)
    same(values, jnp.outer(x, fwd))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (1, 0), (0, 1)])
def test_vmap_of_straight_through_is_the_loop_over_rows(axes):
    shape = {None: (4,), 0: (3, 4), 1: (4, 3)}
    v, c = (jnp.arange(1.0, 1.0 + float(np.prod(shape[a]))).reshape(shape[a]) for a in axes)
    f = lambda v, c: jax.value_and_grad(lambda c: (straight_through(v, c) ** 2).sum())(c)
    at = lambda i: [x if a is None else x.take(i, a) for x, a in zip((v, c), axes, strict=True)]
    values, grads = jax.vmap(f, axes)(v, c)
    want_values, want_grads = zip(*(f(*at(i)) for i in range(3)), strict=True)
    close(values, want_values)
    close(grads, want_grads)


@functions
def test_sharded_is_unsharded(f):
    x = jnp.linspace(-1.0, 1.0, 16)
    h = functools.partial(twice_through_tanh, f)
    local = jax.shard_map(
        lambda x: jax.lax.psum(h(x), "dp"), mesh=mesh_of_8(), in_specs=P("dp"), out_specs=P()
    )
    value, grad = jax.jit(jax.value_and_grad(local))(x)
    close(value, h(x))
    close(grad, jax.grad(h)(x))


@pytest.mark.parametrize("varying", ["x", "factor"])
def test_a_factor_and_a_number_may_vary_along_different_axes(varying):
    """One factor per device on a number all devices share, and the other way round."""
    specs = (P("dp"), P()) if varying == "x" else (P(), P("dp"))
    x, t = (jnp.arange(1.0, 9) if spec == P("dp") else jnp.ones(1) for spec in specs)
    local = lambda x, t: jax.lax.psum(scale(x, fwd=t[0], bwd=2 * t[0]).sum(), "dp")
    f = jax.shard_map(local, mesh=mesh_of_8(), in_specs=specs, out_specs=P())
    value, grad = jax.jit(jax.value_and_grad(f))(x, t)
    assert value == 36
    same(grad, np.full(8, 2.0) if varying == "x" else [72])


@pytest.mark.parametrize("varying", ["value", "carrier"])
def test_a_value_and_a_carrier_may_vary_along_different_axes(varying):
    specs = (P("dp"), P()) if varying == "value" else (P(), P("dp"))
    v, c = (jnp.arange(1.0, 9) if spec == P("dp") else jnp.ones(1) for spec in specs)
    local = lambda v, c: jax.lax.psum((straight_through(v, c) ** 2).sum(), "dp")
    f = jax.shard_map(local, mesh=mesh_of_8(), in_specs=specs, out_specs=P())
    value, grad = jax.jit(jax.value_and_grad(f, argnums=1))(v, c)
    assert value == (204 if varying == "value" else 8)
    same(grad, [72] if varying == "value" else np.full(8, 2.0))


# ------------------------------------------------------------------------------ match_vma


@jax.custom_vjp
def product(x, w):
    return x @ w


def product_fwd(x, w):
    return x @ w, (x, w)


def product_bwd(saved, ct):
    x, w = saved
    return match_vma((ct @ w.T, x.T @ ct), (x, w))


product.defvjp(product_fwd, product_bwd)


@pytest.mark.parametrize("replicated", ["x", "w"])
def test_a_custom_gradient_that_matches_is_the_unsharded_gradient(replicated):
    x, w = jnp.arange(32.0).reshape(8, 4), jnp.arange(8.0).reshape(4, 2)
    if replicated == "x":
        x, w = w.T, x.T  # rows of w's transpose are sharded
    specs = (P(), P(None, "dp")) if replicated == "x" else (P("dp"), P())
    loss = lambda dot: lambda x, w: (dot(x, w) ** 2).sum()
    local = lambda x, w: jax.lax.psum(loss(product)(x, w), "dp")
    f = jax.shard_map(local, mesh=mesh_of_8(), in_specs=specs, out_specs=P())
    got = jax.jit(jax.grad(f, argnums=(0, 1)))(x, w)
    want = jax.grad(loss(jnp.matmul), argnums=(0, 1))(x, w)
    jax.tree.map(close, got, want)


def test_match_vma_gives_the_axes_of_the_primal_whichever_it_lacks():
    axes = []

    def local(replicated, sharded):
        summed, cast = match_vma((sharded, replicated), (replicated, sharded))
        axes.extend(jax.typeof(x).manual_axis_type.varying for x in (summed, cast))
        return summed, cast

    specs = {"in_specs": (P(), P("dp")), "out_specs": (P(), P("dp"))}
    f = jax.jit(jax.shard_map(local, mesh=mesh_of_8(), **specs))
    summed, cast = f(jnp.ones(1), jnp.arange(8.0))
    same(summed, [28])
    same(cast, np.ones(8))
    assert axes[-2:] == [frozenset(), {"dp"}]


def test_match_vma_is_the_identity_outside_shard_map():
    tree = {"w": jnp.arange(3.0), "b": jnp.float32(1)}
    jax.tree.map(same, match_vma(tree, tree), tree)


# ------------------------------------------------------------------------------ errors


def test_errors_say_what_came_and_the_way_out():
    with pytest.raises(TypeError, match=r"scale takes floating-point .* int32\[3\].* Cast"):
        scale(jnp.arange(3), fwd=2.0)
    with pytest.raises(ValueError, match="bwd=inf is not finite"):
        scale(1.0, bwd=float("inf"))
    with pytest.raises(ValueError, match=r"fwd is float32\[2\].*rank 0.*jax.vmap"):
        scale(jnp.ones(2), fwd=jnp.ones(2))
    with pytest.raises(TypeError, match=r"value bfloat16\[2\] and a carrier float32\[2\].*Cast"):
        straight_through(jnp.ones(2, jnp.bfloat16), jnp.ones(2))
    with pytest.raises(TypeError, match=r"mark takes floating-point .* int32\[3\].* Cast"):
        mark(jnp.arange(3), at=0)
    with pytest.raises(TypeError, match=r"straight_through takes floating-point"):
        straight_through(jnp.arange(2), jnp.ones(2))
