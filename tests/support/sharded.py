"""Errors of sharded computations leaf by leaf: a tree of all would hide its small leaves."""

import jax
import numpy as np

CLOSE = {"float32": 2e-6, "float64": 1e-10}


def error(got, want):
    """The largest difference of a leaf over its largest value; of all leaves the worst."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(_of_leaf(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)


def assert_near(got, want, limit=None):
    """Every leaf is within the limit of its dtype."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    dtypes = {np.dtype(x.dtype).name for x in jax.tree.leaves(want)}
    found = error(got, want)
    assert found <= (limit or max(CLOSE[d] for d in dtypes)), found


def _of_leaf(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    return np.max(np.abs(a - b), initial=0.0) / np.max(np.abs(b), initial=1e-30)
