"""Laws across masks, accumulation, loss scaling, autocast, sharding and distillation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec as P

import unitscale_jax as us
from unitscale_jax.prune import Linear, SparsitySpec, Unstructured, masks_of, pruned

ROWS, IN, HIDDEN, OUT = 16, 8, 16, 4
SPEC = SparsitySpec(patterns={"up": Unstructured(), "down": Unstructured()}, sparsity=0.75)


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / 2, jnp.float32)


PARAMS = {
    "up": drawn(IN, HIDDEN),
    "bias": drawn(HIDDEN, seed=1),
    "down": drawn(HIDDEN, OUT, seed=2),
}
BATCH = {"x": drawn(ROWS, IN, seed=3), "y": drawn(ROWS, OUT, seed=4), "m": jnp.arange(16.0) % 3 + 1}


def apply(params, x):
    return jax.nn.relu(x @ params["up"] + params["bias"]) @ params["down"]


def loss_of(apply):
    def loss(params, batch):
        errors = jnp.mean((apply(params, batch["x"]) - batch["y"]) ** 2, axis=-1)
        return us.Mean(batch["m"] * errors, batch["m"])

    return loss


def stepper(tx, grad_fn):
    """`(params, state, batch) -> (params, state)`, compiled."""

    @jax.jit
    def step(params, state, batch):
        scale = us.current_scale(state) if hasattr(state, "scale") else 1.0
        grads = grad_fn(params, batch, scale=scale)[-1]
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def after(tx, grad_fn, batches, params=PARAMS):
    step, state = stepper(tx, grad_fn), tx.init(params)
    for batch in batches:
        params, state = step(params, state, batch)
    return params, state


GRADUAL = Linear(0, 2, every=1, initial=0.25)
TX = pruned(optax.sgd(0.1, momentum=0.9), SPEC, GRADUAL, us.prune.saliency())
GRAD = us.value_and_grad(loss_of(apply))


def assert_pruned(params, state):
    for name in ("up", "down"):
        mask = masks_of(state)[name]
        assert mask.sum() == mask.size // 4
        assert not np.any(np.asarray(params[name])[~mask])


def test_in_parts_and_scaled_the_masks_are_those_of_the_whole_batch():
    """By a score of the gradient, and rows of unequal weight; a power of two changes no bit."""
    whole = after(TX, GRAD, [BATCH] * 3)
    scaled = us.loss_scaled(TX, us.StaticScale(2.0**12))
    in_parts = after(scaled, us.accumulated(GRAD, 4), [BATCH] * 3)
    chex.assert_trees_all_equal(masks_of(in_parts[1]), masks_of(whole[1]))
    chex.assert_trees_all_close(in_parts[0], whole[0], rtol=1e-5, atol=1e-6)
    assert_pruned(*in_parts)


def test_a_step_that_overflows_postpones_its_masks():
    """The update of masks that was due waits for the next finite gradient."""
    inf = {**BATCH, "x": BATCH["x"].at[0, 0].set(jnp.inf)}
    tx = us.loss_scaled(TX, us.DynamicScale(init=2.0**10, interval=100))
    step = stepper(tx, GRAD)
    params, state = step(PARAMS, tx.init(PARAMS), inf)
    chex.assert_trees_all_equal(params, PARAMS)
    assert all(bool(jnp.all(m)) for m in jax.tree.leaves(masks_of(state)))
    assert us.current_scale(state) == 2.0**9
    for batch in (BATCH, inf, BATCH, BATCH):
        params, state = step(params, state, batch)
    assert_pruned(params, state)


def test_masks_pass_autocast():
    policy = "bfloat16"
    masks = us.prune.make_masks(jax.tree.map(jnp.abs, PARAMS), SPEC)
    inside = us.autocast(us.prune.masked(apply, masks), policy)
    around = us.prune.masked(us.autocast(apply, policy), masks)
    pruned = us.autocast(apply, policy)(us.prune.apply_masks(PARAMS, masks), BATCH["x"])
    np.testing.assert_array_equal(inside(PARAMS, BATCH["x"]), pruned)
    np.testing.assert_array_equal(around(PARAMS, BATCH["x"]), pruned)


def test_all_of_it_on_a_mesh_is_all_of_it_on_one_device():
    """Accumulated, scaled, in bfloat16 products, pruned, rows and channels sharded."""
    tx = us.loss_scaled(TX, us.StaticScale(8.0))
    grad_fn = us.accumulated(us.value_and_grad(loss_of(us.autocast(apply, "bfloat16"))), 2)
    alone = after(tx, grad_fn, [BATCH] * 3)
    mesh = us.parallel.mesh(dp=4, tp=2)
    put = lambda tree, specs: jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs
    )
    layout = {"up": P(None, "tp"), "bias": P("tp"), "down": P("tp", None)}
    with jax.set_mesh(mesh):
        batch = put(BATCH, {"x": P("dp"), "y": P("dp"), "m": P("dp")})
        params, state = after(tx, grad_fn, [batch] * 3, put(PARAMS, layout))
    chex.assert_trees_all_equal(masks_of(state), masks_of(alone[1]))
    chex.assert_trees_all_close(params, alone[0], rtol=1e-2, atol=1e-3)
    assert_pruned(params, state)


def test_a_pruned_student_of_a_teacher_of_codes_accumulates_exactly():
    int8 = us.DotSpec(w=us.QSpec(), x=us.QSpec())
    rules = us.quant.resolve({"up": int8, "down": int8}, apply, PARAMS, BATCH["x"])
    teacher = us.distill.teacher(us.quantized(apply), us.quantize(PARAMS, rules))

    def hard(params, batch):
        out = apply(params, batch["x"])
        return us.Mean(batch["m"] * jnp.mean((out - batch["y"]) ** 2, -1), batch["m"]), out

    grad_fn = us.value_and_grad(us.distilled(hard, lambda b: teacher(b["x"]), us.distill.kl))
    masks = us.prune.make_masks(jax.tree.map(jnp.abs, PARAMS), SPEC)
    student = us.prune.apply_masks(PARAMS, masks)
    both = jax.jit(lambda p: (grad_fn(p, BATCH)[-1], us.accumulated(grad_fn, 4)(p, BATCH)[-1]))
    whole, in_parts = both(student)
    chex.assert_trees_all_close(in_parts, whole, rtol=1e-5, atol=1e-6)
    assert np.any(np.asarray(whole["up"])[~masks["up"]]), "a pruned weight has a gradient, too"
