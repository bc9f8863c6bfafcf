"""Laws of reading collectives: where they run, over which axes, how often, with how many bytes."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import unitscale_jax as us
from unitscale_jax.trace.costs import collectives

TP, DP = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 2, 4, 6], [1, 3, 5, 7]]
SPELLINGS = [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", (2, 4), "tp"),
    ("replica_groups=[2,4]<=[8]", (2, 4), "tp"),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (2, 4), "tp"),
    (
        "replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], "
        "device_ids=([2,4]T(1,0)) {'axis_1'}",
        (2, 4),
        "tp",
    ),
    ("replica_groups=[2,4]<=[4,2]T(1,0)", (4, 2), "dp"),
    ("replica_groups=mesh['dp'=4,'tp'=2] {'dp'}", (4, 2), "dp"),
    ("source_target_pairs={{0,2},{2,4},{4,6},{6,0}}", (4, 2), "dp"),
    ("replica_groups={}", (4, 2), "dp+tp"),
    ("replica_groups={{0,5},{1,4}}", (2, 4), "dp+tp"),
]


@pytest.mark.parametrize(("groups", "shape", "axes"), SPELLINGS)
def test_every_spelling_of_groups_is_understood(groups, shape, axes):
    mesh = us.parallel.mesh(dp=shape[0], tp=shape[1])
    line = f"  %r = f32[3,5]{{1,0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add"
    (found,) = collectives(f"ENTRY %main (x: f32[3,5]) -> f32[3,5] {{\n{line}\n}}", mesh)
    assert ("+".join(found.axes), found.bytes, found.kind) == (axes, 60, "all-reduce")


def program(mesh):
    """A sum over dp in a loop of 5, a gather over tp, a permutation and a sum of int8 pieces."""

    def body(x):
        x = lax.fori_loop(0, 5, lambda _, x: lax.pcast(lax.psum(x, "dp"), "dp", to="varying"), x)
        y = lax.all_gather(x, "tp", axis=0, tiled=True)
        codes = lax.all_to_all(y.astype(jnp.int8), "dp", 0, 0, tiled=True)
        shifted = lax.ppermute(y, "tp", [(0, 1), (1, 0)])
        return lax.psum(shifted.sum() + codes.astype(jnp.float32).sum(), ("dp", "tp"))

    fn = jax.shard_map(body, mesh=mesh, in_specs=P(("dp", "tp")), out_specs=P())
    return jax.jit(fn).lower(jnp.ones((32, 6))).compile()


def test_a_program_says_what_it_sends_and_how_often():
    mesh = us.parallel.mesh(dp=4, tp=2)
    rows = {(c.kind, c.axes): c for c in collectives(program(mesh), mesh)}
    looped = rows["all-reduce", ("dp",)]
    assert (looped.times, looped.loops, looped.bytes) == (5, 1, 4 * 6 * 4)
    gathered = rows["all-gather", ("tp",)]
    assert (gathered.times, gathered.loops, gathered.bytes) == (1, 0, 8 * 6 * 4)
    assert rows["all-to-all", ("dp",)].dtypes == ("s8",)
    assert rows["all-to-all", ("dp",)].bytes == 8 * 6
    assert rows["collective-permute", ("tp",)].bytes == 8 * 6 * 4
    assert rows["all-reduce", ("dp", "tp")].bytes == 4


def test_a_program_of_one_device_sends_nothing():
    mesh = us.parallel.mesh(dp=4, tp=2)
    compiled = jax.jit(lambda x: jnp.sin(x @ x)).lower(jnp.ones((8, 8))).compile()
    assert collectives(compiled, mesh) == ()


def test_every_branch_of_a_conditional_counts():
    mesh = us.parallel.mesh(dp=8)
    some = lambda x: lax.psum(x, "dp")
    body = lambda x: lax.cond(lax.psum(x[0], "dp") > 1, some, lambda x: some(x) * 2, x)
    fn = jax.shard_map(body, mesh=mesh, in_specs=P("dp"), out_specs=P())
    found = collectives(jax.jit(fn).lower(jnp.ones(64)).compile(), mesh)
    assert sorted(c.bytes for c in found) == [4, 32, 32]
