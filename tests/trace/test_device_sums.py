"""Laws of sums over devices that end a product: which they are, what they do to other values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from unitscale_jax import parallel
from unitscale_jax.trace.params import device_sums
from unitscale_jax.trace.program import trace

X, W = jnp.arange(32.0).reshape(4, 8), jnp.arange(32.0).reshape(8, 4)
IN = P(None, "tp"), P("tp")


def found_in(body, out, **options):
    """What is found in a body, by name of the sum and its axes."""
    with jax.set_mesh(parallel.mesh(dp=2, tp=4)):
        run = jax.shard_map(body, in_specs=IN, out_specs=out, **options)
        sums = device_sums(trace(run, X, W).closed.jaxpr)
    return [(found.site.name, found.axes) for found in sums.values()]


def scatter(y, **options):
    return lax.psum_scatter(y, "tp", scatter_dimension=0, **{"tiled": True} | options)


CASES = {
    "a sum": (lambda x, w: lax.psum(x @ w, "tp"), P(), [("psum_invariant", ("tp",))]),
    "scattered": (lambda x, w: scatter(x @ w), P("tp"), [("reduce_scatter", ("tp",))]),
    "with a bias": (lambda x, w: lax.psum(x @ w, "tp") + 1.0, P(), [("psum_invariant", ("tp",))]),
    "in a loop": (
        lambda x, w: lax.scan(lambda h, _: (h + lax.psum(x @ w, "tp"), None), X[:, :4], length=2)[
            0
        ],
        P(),
        [("psum_invariant", ("tp",))],
    ),
    "read twice": (lambda x, w: (lax.psum((y := x @ w), "tp"), y), (P(), P("tp")), []),
    "another shape": (lambda x, w: scatter(x @ w, tiled=False), P("tp"), []),
    "no sum": (lambda x, w: lax.pmax(x @ w, "tp"), P(), []),
}


@pytest.mark.parametrize("case", CASES)
def test_products_that_nothing_but_a_sum_reads(case):
    body, out, expected = CASES[case]
    assert found_in(body, out) == expected


def test_without_types_of_varying_values_nothing_is_known():
    assert found_in(lambda x, w: lax.psum(x @ w, "tp"), P(), check_vma=False) == []


@pytest.mark.parametrize("case", ["a sum", "scattered"])
def test_a_part_is_what_the_device_keeps_of_a_shared_value(case):
    body, out, _ = CASES[case]
    shared = jnp.arange(16.0).reshape(4, 4)
    with jax.set_mesh(parallel.mesh(dp=2, tp=4)):
        run = jax.shard_map(body, in_specs=IN, out_specs=out)
        (found,) = device_sums(trace(run, X, W).closed.jaxpr).values()
        kept = jax.shard_map(
            lambda s: (found.part(s), found.part(s[:1])), in_specs=P(), out_specs=(out, P())
        )
        back = jax.shard_map(found.transposed, in_specs=out, out_specs=P("tp"))
        (part, one), everywhere = kept(shared), back(shared)
    np.testing.assert_array_equal(part, shared)
    np.testing.assert_array_equal(one, shared[:1])
    np.testing.assert_array_equal(everywhere, jnp.tile(shared, (4, 1)))
