"""Laws of simulated products: both passes are products of rounded numbers, and nothing else is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import unitscale_jax as us
from unitscale_jax.formats import round_to
from unitscale_jax.fwd_bwd import round_bwd, scale

W = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
X = jax.random.normal(jax.random.key(1), (6, 4))
CT = jax.random.normal(jax.random.key(2), (6, 3))


def dense(p, x):
    return x @ p["w"]


def convolved(p, x):
    return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME")


def layers(p, x):
    step = lambda h, w: (jnp.tanh(h @ w), None)
    return jax.lax.scan(step, x, p["w"])[0]


def attention(p, x):
    q = (x @ p["w"]).reshape(2, 3, 3)
    return q @ jnp.swapaxes(q, 1, 2)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("formats", [("e4m3fn", "e5m2"), ("e4m3fnuz", "e5m2fnuz"), ("bf16", "f16")])
def test_both_passes_are_products_of_rounded_numbers(formats):
    forward, backward = formats
    images = (
        {"w": jax.random.normal(jax.random.key(3), (3, 2, 3, 3))},
        jnp.sin(jnp.arange(50.0).reshape(1, 2, 5, 5)),
    )
    for fn, params, x in ((dense, W, X), (convolved, *images)):
        y, pull = jax.vjp(us.simulated(fn, *formats), params, x)
        ct = jnp.cos(jnp.arange(float(y.size))).reshape(y.shape)
        exact, exact_pull = jax.vjp(fn, {"w": round_to(params["w"], forward)}, round_to(x, forward))
        same(y, exact)
        same(pull(ct), exact_pull(round_to(ct, backward)))


@pytest.mark.parametrize("fn", [dense, attention])
def test_float32_adds_no_equation(fn):
    names = lambda f: [eqn.primitive.name for eqn in jax.make_jaxpr(f)(W, X).eqns]
    assert names(us.simulated(fn, "f32", "f32", rules={"w": ("f32", "f32")})) == names(fn)
    same(us.simulated(fn, "f32", "f32")(W, X), fn(W, X))


def test_factors_are_not_rounded():
    factors = {"fwd": 0.3, "bwd": 0.7}
    inside = us.simulated(lambda p, x: scale(dense(p, scale(x, **factors)), **factors))
    by_hand = lambda p, x: scale(us.simulated(dense)(p, scale(x, **factors)), **factors)
    for run in (inside, by_hand):
        assert "0.3" in str(jax.make_jaxpr(run)(W, X)) and run(W, X).dtype == jnp.float32
    (y, pull), (z, pull_z) = jax.vjp(inside, W, X), jax.vjp(by_hand, W, X)
    same((y, pull(CT)), (z, pull_z(CT)))


def test_stochastic_draws_are_the_neighbours_and_the_mean_is_the_number():
    fn, one = lambda p, x: x @ p["w"], {"w": jnp.eye(1)}
    x = jnp.full((4096, 1), 1.1)
    key = jax.random.key(7)
    y = us.simulated(fn, "e4m3fn", "f32", key=key)(one, x)
    assert set(np.unique(y)) == {1.0, 1.125}
    assert abs(float(y.mean()) - 1.1) < 5 * 0.125 * 0.4 / 64
    same(y, us.simulated(fn, "e4m3fn", "f32", key=key)(one, x))
    ct = jnp.full((4096, 1), 1.1)
    _, pull = jax.vjp(lambda x: us.simulated(fn, key=key)(one, x), jnp.ones((4096, 1)))
    (grad,) = pull(ct)
    assert set(np.unique(grad)) == {1.0, 1.25}
    assert abs(float(grad.mean()) - 1.1) < 5 * 0.25 * 0.49 / 64


STACK = {"w": jax.random.normal(jax.random.key(4), (3, 4, 4)) / 2}


@pytest.mark.parametrize("key", [None, jax.random.key(3)])
def test_it_commutes_with_jit_vmap_scan_and_remat(key):
    wrap = lambda fn: us.simulated(fn, key=key)
    loss = lambda fn: lambda p, x: (fn(p, x) ** 2).sum()
    expected = jax.value_and_grad(loss(wrap(layers)))(STACK, X)
    close = lambda a, b: jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), a, b
    )
    close(jax.jit(jax.value_and_grad(loss(wrap(layers))))(STACK, X), expected)
    if key is None:
        close(jax.value_and_grad(loss(wrap(jax.checkpoint(layers))))(STACK, X), expected)
        close(jax.value_and_grad(loss(jax.checkpoint(wrap(layers))))(STACK, X), expected)
    each = lambda x: jax.grad(loss(wrap(layers)))(STACK, x[None])["w"]
    close(jax.vmap(each)(X), jnp.stack([each(x) for x in X]))


@pytest.mark.parametrize("key", [None, jax.random.key(3)])
def test_it_works_inside_and_around_shard_map(key):
    mesh = us.parallel.mesh(dp=2, tp=-1)
    cut = lambda fn: jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("dp")), out_specs=P("dp"))
    wrap = lambda fn: us.simulated(fn, key=key)
    for fn in (cut(wrap(dense)), wrap(cut(dense))):
        grad = jax.jit(jax.grad(lambda p, fn=fn: (fn(p, X) * CT).sum()))(W)["w"]
        if key is None:
            expected = jax.grad(lambda p: (us.simulated(dense)(p, X) * CT).sum())(W)["w"]
            np.testing.assert_allclose(grad, expected, rtol=1e-5)
        assert np.isfinite(grad).all()


def test_forward_mode_and_second_derivatives_are_straight_through():
    fn = us.simulated(dense)
    _, tangent = jax.jvp(lambda x: fn(W, x), (X,), (jnp.ones_like(X),))
    same(tangent, jnp.ones_like(X) @ round_to(W["w"], "e4m3fn"))
    square = lambda x: (us.simulated(lambda p, x: x * x @ p["w"])(W, x) ** 2).sum()
    hessian = jax.hessian(square)(X[0])
    assert hessian.shape == (4, 4) and np.isfinite(hessian).all() and np.any(hessian)
    g = jax.grad(lambda t: jax.vjp(lambda x: round_bwd(x, "e5m2"), 1.0)[1](t)[0])(1.1)
    assert g == 1.0


def test_a_compiled_cotangent_keeps_its_sign():  # XLA took the sign of a transposed dot's result
    w = jax.random.normal(jax.random.key(0), (4, 2, 3))
    t = jnp.sin(jnp.arange(30.0))
    loss = lambda round: lambda w: jnp.vdot(t, jnp.einsum("bd,dhk->bhk", X[:5], round(w)).ravel())
    exact = jax.grad(loss(lambda w: w))(w)
    rounded = jax.jit(jax.grad(loss(lambda w: round_bwd(w, "e5m2"))))(w)
    np.testing.assert_allclose(rounded, exact, rtol=2**-3)


def test_rules_and_notes():
    rules = {"w": None, "attention": ("e5m2", "e5m2")}
    notes = lambda fn: [r.notes.get("simulated") for r in us.explain(fn)(W, X).products.rows]
    assert notes(us.simulated(attention)) == ["e4m3fn, e5m2: default", "kept: attention"]
    assert notes(us.simulated(attention, rules=rules)) == [
        "rule 'w'",
        "e5m2, e5m2: rule 'attention'",
    ]


def test_a_users_derivative_stays_and_its_forward_pass_is_rounded():
    @jax.custom_vjp
    def own(x, w):
        return x @ w

    own.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    fn = us.simulated(lambda p, x: own(x, p["w"]))
    y, pull = jax.vjp(fn, W, X)
    same(y, us.simulated(dense)(W, X))
    same(pull(CT)[1], CT @ W["w"].T)


def test_errors_say_the_way_out():
    with pytest.raises(ValueError, match=r"no number format 'e4m3f'; closest: 'e4m3fn'"):
        us.simulated(dense, "e4m3f")
    with pytest.raises(ValueError, match=r"rule 'w'.*'e5m3'; closest: 'e5m2'"):
        us.simulated(dense, rules={"w": ("e4m3fn", "e5m3")})
    with pytest.raises(ValueError, match=r"rule 0, 'v', matched none of 1 product"):
        us.simulated(dense, rules={"v": None})(W, X)
    with pytest.raises(TypeError, match="typed key"):
        us.simulated(dense, key=jax.random.key_data(jax.random.key(0)))
    with pytest.raises(TypeError, match="holds its backward pass. Put simulated inside"):
        us.simulated(us.value_and_grad(lambda p, x: dense(p, x).sum()))
