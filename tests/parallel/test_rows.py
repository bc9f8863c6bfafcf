"""Laws of global batches; those of several processes are in parallel/test_launch."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import unitscale_jax as us

TABLE = {
    "x": np.arange(96, dtype=np.float32).reshape(24, 4),
    "y": np.arange(24, dtype=jnp.bfloat16),
}


def read(index):
    return {name: column[index] for name, column in TABLE.items()}


@pytest.mark.parametrize("axes", [dict(dp=8), dict(dp=4, tp=2), dict(dp=2, tp=4), dict(dp=1, tp=8)])
def test_is_the_same_batch_on_any_mesh(axes):
    batch = us.parallel.global_batch(read, 16, us.parallel.mesh(**axes))
    for name, column in batch.items():
        assert column.dtype == TABLE[name].dtype
        assert column.sharding.spec == PartitionSpec("dp")
        assert {shard.data.shape[0] for shard in column.addressable_shards} == {16 // axes["dp"]}
        np.testing.assert_array_equal(column, TABLE[name][:16])


def test_rows_may_lie_over_several_axes():
    mesh = us.parallel.mesh(pod=2, tp=2, dp=2)
    batch = us.parallel.global_batch(read, 24, mesh, mesh_axis=("dp", "pod"))
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(6, 4)}
    np.testing.assert_array_equal(batch["x"], TABLE["x"])


def test_reads_once_in_ascending_order():
    asked = []
    us.parallel.global_batch(lambda i: asked.append(i) or i, 16, us.parallel.mesh(dp=4, tp=2))
    assert len(asked) == 1 and asked[0].tolist() == list(range(16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda mesh: us.parallel.global_batch(read, 18, mesh), "18 rows .* dp=4. Read 20, the"),
        (lambda mesh: us.parallel.global_batch(read, 0, mesh), "0 rows .* Read 4"),
        (
            lambda mesh: us.parallel.global_batch(read, 16, mesh, mesh_axis="data"),
            "rows over 'data': the mesh has dp, tp. Name one of them, or make it with data=1",
        ),
        (
            lambda mesh: us.parallel.global_batch(lambda i: {"x": i[:3]}, 16, mesh),
            r"asked for 16 rows, and gave x of shape \(3,\)",
        ),
    ],
)
def test_rows_that_do_not_fit_are_an_error_with_a_way_out(call, message):
    with pytest.raises(ValueError, match=message):
        call(us.parallel.mesh(dp=4, tp=2))
