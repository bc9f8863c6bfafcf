"""Unit scaling with every other technique: the order that is right works, the other is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import unitscale_jax as us

WIDTH = 16
KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    name: {"kernel": jax.random.normal(key, (WIDTH, WIDTH))}
    for name, key in zip(("first", "second"), KEYS, strict=False)
}
BATCH = dict(zip("xy", jax.random.normal(KEYS[2], (2, 32, WIDTH)), strict=True))
INT8 = us.DotSpec(w=us.QSpec(), x=us.QSpec())


def loss(params, batch):
    h = jax.nn.gelu(batch["x"] @ params["first"]["kernel"])
    errors = (h @ params["second"]["kernel"] - batch["y"]) ** 2
    return us.Mean(errors.sum(-1), jnp.ones(len(errors)))


SCALED = us.unit_scaled(loss)


def gradients(fn, params=PARAMS, batch=BATCH):
    return us.value_and_grad(fn)(params, batch)[2]


def cosines(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return [float((x * y).sum() / jnp.sqrt((x**2).sum() * (y**2).sum())) for x, y in leaves]


AROUND = {  # a technique around the scaled loss, and how far gradients may turn
    "autocast": (lambda fn: us.autocast(fn, "bfloat16"), 1e-4),
    "cast": (lambda fn: us.cast(fn, us.Policy(compute="bfloat16")), 1e-3),
    "int8": (lambda fn: us.quantized(fn, {"**/kernel": INT8}), 1e-3),
    "fp8": (lambda fn: us.quantized(fn, {"**/kernel": us.quant.fp8}), 1e-2),
    "simulated": (us.simulated, 1e-2),
    "rewritten": (lambda fn: us.trace.rewritten(fn, {}), 1e-9),
}


@pytest.mark.parametrize("name", AROUND)
def test_what_goes_around_unit_scaling_keeps_its_gradients(name):
    wrap, turned = AROUND[name]
    with jax.numpy_dtype_promotion("standard"):
        found = cosines(gradients(wrap(SCALED)), gradients(SCALED))
    assert min(found) > 1 - turned


@pytest.mark.parametrize("name", ["int8", "fp8", "simulated"])
def test_the_other_order_is_refused_by_name(name):
    wrap, _ = AROUND[name]
    with pytest.raises(ValueError, match="Put unit_scaled inside"):
        us.unit_scaled(wrap(loss))


def test_masks_go_around_and_not_inside():
    spec = us.prune.SparsitySpec(patterns={"**/kernel": us.prune.Unstructured()}, sparsity=0.5)
    found = gradients(us.prune.masked_straight_through(SCALED, spec))
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(found))
    with pytest.raises(ValueError, match="Put unit_scaled inside"):
        us.unit_scaled(us.prune.masked_straight_through(loss, spec))


def test_an_absmax_scale_makes_a_factor_of_a_kernel_invisible():
    """int8 codes of a kernel are those of the kernel times any factor."""
    plain = us.quantized(lambda p, x: x @ p["kernel"], {"kernel": INT8})
    scaled = us.quantized(
        lambda p, x: us.fwd_bwd.scale(x @ us.fwd_bwd.scale(p["kernel"], fwd=0.25), fwd=4.0),
        {"kernel": INT8},
    )
    p, x = PARAMS["first"], BATCH["x"]
    np.testing.assert_allclose(scaled(p, x), plain(p, x), rtol=1e-6, atol=1e-6)


def test_parts_and_devices_add_up_with_their_ratio():
    whole = gradients(SCALED)
    with jax.set_mesh(us.parallel.mesh(data=8)):
        grad_fn = us.value_and_grad(us.unit_scaled(loss, batch_ratio=16))
        grad_fn = us.parallel.reduced(us.accumulated(grad_fn, 2), "data")
        _, _, found = jax.jit(grad_fn)(PARAMS, BATCH)
    for a, b in zip(*map(jax.tree.leaves, (whole, found)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_pruned_optimizer_and_a_loss_scale_train_it():
    spec = us.prune.SparsitySpec(patterns={"**/kernel": us.prune.Unstructured()}, sparsity=0.5)
    roles = us.unit.roles(loss, PARAMS, BATCH)
    tx = us.unit.parametrized(optax.scale_by_adam(), roles, 0.1)
    tx = us.loss_scaled(us.pruned(tx, spec), us.StaticScale(8.0))
    step = us.updated(us.value_and_grad(SCALED), tx)
    params, state, before = PARAMS, tx.init(PARAMS), None
    for _ in range(5):
        with jax.numpy_dtype_promotion("standard"):  # which optax needs
            params, state, terms, _ = step(params, state, BATCH)
        before = terms["loss"].value if before is None else before
    assert terms["loss"].value < before


def test_it_is_distilled_as_any_loss():
    with_logits = lambda params, batch: (
        {"ce": loss(params, batch)},
        {"logits": batch["x"] @ params["first"]["kernel"]},
    )
    scaled = us.unit_scaled(with_logits)
    terms, aux = scaled(PARAMS, BATCH)
    assert set(terms) == {"ce"} and aux["logits"].shape == (32, WIDTH)


# ------------------------------------------------------------------------------------ Flax models


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(WIDTH)(x))
        return nn.Dense(WIDTH)(nn.Dropout(0.2, deterministic=not train)(nn.gelu(x)))


def test_a_linen_model_with_state_and_keys():
    model = Linen()
    variables = model.init(jax.random.key(0), BATCH["x"], train=False)

    def linen_loss(params, batch, *, state, key):
        out, state = model.apply(
            {"params": params, **state},
            batch["x"],
            rngs={"dropout": key[0]},
            mutable=["batch_stats"],
        )
        return us.Mean(((out - batch["y"]) ** 2).sum(-1), jnp.ones(len(out))), {"state": state}

    state = {"batch_stats": variables["batch_stats"]}
    grad_fn = us.value_and_grad(us.unit_scaled(linen_loss))
    options = {"state": state, "key": jax.random.key(1)}
    _, aux, grads = grad_fn(variables["params"], BATCH, **options)
    _, plain, _ = us.value_and_grad(linen_loss)(variables["params"], BATCH, **options)
    assert jax.tree.structure(aux) == jax.tree.structure(plain)
    assert all(jnp.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads) if g.ndim > 1)


def test_an_nnx_model_by_its_bridge():
    model = nnx.Sequential(
        nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), nnx.gelu, nnx.Linear(WIDTH, 4, rngs=nnx.Rngs(1))
    )
    apply, params, _ = us.from_nnx(model)
    head = lambda p, b: us.Mean((apply(p, b["x"])[:, 0] - b["y"][:, 0]) ** 2, jnp.ones(32))
    grads = gradients(us.unit_scaled(head), params)
    constants = us.unit.constants(us.unit_scaled(head), params, BATCH)
    assert jax.tree.structure(grads) == jax.tree.structure(constants)
    assert all(c > 0 for c in jax.tree.leaves(constants))
