"""Laws of the assertions about sharding: they pass what is right, and say what is wrong by name."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import unitscale_jax as us
from unitscale_jax.testing import check_collectives, check_sharded
from unitscale_jax.trace.costs import collectives

MESH = us.parallel.mesh(dp=2, tp=4)
PARAMS = {"up": jnp.arange(32.0).reshape(4, 8) / 32, "bias": jnp.ones(8), "down": jnp.ones((8, 4))}
X = jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)
SPECS = {"up": P(None, "tp"), "bias": P("tp"), "down": P("tp")}


def whole(params, x):
    def loss(p):
        return jnp.sum(jnp.sin(jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"]))

    return jax.value_and_grad(loss)(params)


def by_hand(params, x, defect=None):
    """Megatron's two layers in a shard_map."""

    def body(p, x):
        def loss(p):
            out = jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"]
            return jnp.sum(jnp.sin(lax.psum(out, "tp")))

        value, grads = jax.value_and_grad(loss)(p)
        if defect == "twice":  # types have summed it already
            grads["bias"] = 2 * grads["bias"]
        return lax.psum(value, "dp"), grads

    return jax.shard_map(body, in_specs=(SPECS, P("dp")), out_specs=(P(), SPECS))(params, x)


def test_what_is_right_passes_in_both_precisions():
    check_sharded(by_hand, (PARAMS, X), [MESH], reference=whole, outside_loops=["dp", "tp"])


def test_a_ratio_that_is_the_size_of_an_axis_is_named():
    defect = lambda params, x: by_hand(params, x, "twice")
    with pytest.raises(
        AssertionError, match=r"dp=2, tp=4 .* float32\n  1/bias: .* = size of axis dp$"
    ):
        check_sharded(defect, (PARAMS, X), [MESH], reference=whole)


def test_float64_tells_errors_from_rounding():
    rough = lambda params, x: jax.tree.map(lambda g: g * (1 + 1e-7), by_hand(params, x))
    check_sharded(rough, (PARAMS, X), [MESH], reference=whole, rtol64=None)
    with pytest.raises(AssertionError, match="in float64"):
        check_sharded(rough, (PARAMS, X), [MESH], reference=whole)


def test_without_a_reference_one_device_is_it():
    local = lambda x: lax.psum(jnp.sum(x) + 1, "dp")  # one more for each device
    step = lambda x: jax.shard_map(local, in_specs=P("dp"), out_specs=P())(x)
    with pytest.raises(AssertionError, match="dp=8 gives another result"):
        check_sharded(step, (X,), [us.parallel.mesh(dp=8)])


def looped(x):
    body = lambda _, x: lax.pcast(lax.psum(x, "dp") / 8, "dp", to="varying")
    local = lambda x: lax.fori_loop(0, 3, body, x)
    return jax.shard_map(local, in_specs=P("dp"), out_specs=P("dp"))(x)


def test_a_collective_in_a_loop_is_found_on_its_axis_only():
    mesh = us.parallel.mesh(dp=2, other=4)
    check_sharded(looped, (X,), [mesh], rtol=9, rtol64=None, outside_loops=["other"])
    with pytest.raises(AssertionError, match="all-reduce over dp, 64 bytes, 3 times"):
        check_sharded(looped, (X,), [mesh], rtol=9, rtol64=None, outside_loops=["dp"])


def test_collectives_are_counted_by_kind_and_axes():
    with jax.set_mesh(MESH):
        program = jax.jit(lambda p, x: by_hand(p, x)[1]).lower(PARAMS, X).compile()
    forward, kernels = ("all-reduce", "tp"), ("all-reduce", "dp")
    counts = {forward: 1, kernels: 1}
    kinds = {(c.kind, "+".join(c.axes)) for c in collectives(program, MESH)}
    assert kinds == set(counts)
    number = sum(c.axes == ("dp",) for c in collectives(program, MESH) if c.bytes >= 32)
    check_collectives(program, MESH, counts | {kernels: number}, ignore_below=32)
    with pytest.raises(AssertionError, match="all-gather over tp: 0, expected 2"):
        check_collectives(program, MESH, {("all-gather", "tp"): 2})
