"""Laws of functions that know nothing of manual axes: each device computes them on its rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import unitscale_jax as us
from unitscale_jax.mesh_axes import varying_axes
from unitscale_jax.trace.rewrite import as_on_one_device

X = jax.random.normal(jax.random.key(0), (8, 3))


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


def in_a_branch(x):
    return lax.cond(x.sum() > 0, lambda x: jnp.zeros_like(x), lambda x: x, x)


def until_small(x):
    small = lambda s: jnp.max(jnp.abs(s[1])) > 0.1
    return lax.while_loop(small, lambda s: (s[0] + 1, s[1] / 2), (0, x))[0]


def in_a_scan(x):
    return lax.scan(lambda h, row: (h + row, h), jnp.zeros(3), x)


def keyed(x):
    return jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, x.shape), x, 0)


FUNCTIONS = {
    "scan": in_a_scan,
    "while": until_small,
    "cond": in_a_branch,
    "remat": jax.checkpoint(lambda x: in_a_scan(jnp.sin(x))[0]),
    "jit": jax.jit(lambda x: {"y": in_a_scan(x)[1] + 1, "n": 3}),
    "custom_vjp": doubled,
    "gradient": jax.grad(lambda x: jnp.sum(in_a_scan(doubled(x))[0] ** 2)),
    "key": keyed,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_device_computes_it_of_its_rows(name):
    fn = FUNCTIONS[name]
    local = as_on_one_device(fn, X[:2], axes=["dp"])

    def body(x):
        out = local(x)
        assert all("dp" in varying_axes(leaf) for leaf in jax.tree.leaves(out))
        return jax.tree.map(lambda leaf: leaf[None], out)

    mesh = us.parallel.mesh(dp=4, tp=2)
    whole = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("dp"), out_specs=P("dp")))(X)
    for device, rows in enumerate(X.reshape(4, 2, 3)):
        want = jax.jit(fn)(rows)
        jax.tree.map(
            lambda got, leaf, i=device: np.testing.assert_allclose(got[i], leaf, rtol=1e-6),
            whole,
            want,
        )


def test_a_collective_over_the_axis_is_refused():
    with pytest.raises(NameError, match="dp"):
        as_on_one_device(lambda x: lax.psum(x, "dp"), X, axes=["dp"])
