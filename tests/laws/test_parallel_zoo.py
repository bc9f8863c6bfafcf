"""Three optimizer steps on every shape of a mesh are those of one device, for models of all kinds.

By default a Linen model, an NNX one and a plain one (the latter slow); with WHOLE_ZOO=1 every model
whose rows go their own ways, since a sum over rows is what a data axis divides.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unitscale_jax as us
from tests.support import sized, zoo

pytestmark = pytest.mark.whole

FEW = ["linen_transformer", "nnx_gqa", "plain_scan_remat"]
# Rows that meet (batch statistics, capacities, branches by all rows, one key for all); loops that
# have no gradient; Flax's recurrent layers, whose state begins in float32 whatever parameters are.
MIXING = ("cnn_train", "linen_moe", "nnx_moe", "cond", "dropout", "linen_encoder_decoder")
MIXING += ("equilibrium", "spectral", "linen_lstm", "nnx_lstm")
MESHES = ["dp=8,tp=1", "dp=4,tp=2", "dp=2,tp=4", "dp=1,tp=8"]


def models():
    if os.environ.get("WHOLE_ZOO"):
        return [name for name in zoo.NAMES if not any(part in name for part in MIXING)]
    return [FEW[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FEW[1:])]


def loss_of(model):
    """Mean square distance of the outputs from a half, for each row."""

    def loss(params, batch):
        outputs = jax.tree.leaves(model.apply(params, *batch["inputs"]))
        rows = [jnp.mean(jnp.square(x - 0.5).reshape(len(x), -1), -1) for x in outputs]
        total = functools.reduce(jnp.add, rows)
        return us.Mean(total, jnp.ones_like(total))

    return loss


def trained(model, params, batch, mesh, zero):
    layout = us.parallel.infer(model.apply, params, *batch["inputs"], mesh=mesh)
    shares = layout.over("dp") if zero else layout
    laid = shares if zero == 3 else layout
    grad_fn = us.accumulated(us.value_and_grad(loss_of(model)), 2 if mesh.shape["dp"] < 4 else 1)
    grad_fn = us.parallel.reduced(grad_fn, zero=zero, layout=layout)
    tx = us.parallel.sharded(optax.sgd(1e-3, momentum=0.9), laid, shares)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(grad_fn(params, batch)[2], state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        params = us.parallel.shard(params, laid)
        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state)
        return jax.device_get(params)


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("name", models())
def test_three_steps_are_those_of_one_device_on_every_mesh(name):
    model = sized.model(name)
    with jax.enable_x64(True):
        wide = lambda x: np.asarray(x, np.float64) if us.tree.is_floating(x) else np.asarray(x)
        params, *inputs = jax.tree.map(wide, (model.params, *model.inputs))
        batch = {"inputs": tuple(inputs)}
        one = us.parallel.mesh(devices=jax.devices()[:1], dp=1, tp=1)
        want = us.tree.named_leaves(trained(model, params, batch, one, 0))
        for zero, text in enumerate(MESHES):
            sizes = dict(word.split("=") for word in text.split(","))
            mesh = us.parallel.mesh(**{axis: int(size) for axis, size in sizes.items()})
            got = us.tree.named_leaves(trained(model, params, batch, mesh, zero))
            largest = max(np.abs(x).max() for x in want.values())
            off = {n: np.abs(got[n] - x).max() / largest for n, x in want.items()}
            # Not 1e-10: NNX rounds some constants to float32 in a backward pass.
            assert max(off.values()) < 1e-8, (text, {n: e for n, e in off.items() if e >= 1e-8})
