"""Sparsity as a count: how many of n units stay when a share of them goes.

Masks and compaction round alike, so that a plan for half of the channels and a mask of half of the
weights keep the same number. Everything is on the host: in float32, 200,000,003 weights at a
sparsity of 0.9 keep 4 too many.
"""

import numpy as np

from unitscale_jax.errors import check_type

__all__ = ["kept"]


def kept(n: int, sparsity: float) -> int:
    """Number of units that stay at a sparsity.

    Args:
        n: How many there are.
        sparsity: The share that goes, in [0, 1].

    Returns:
        `n - round(n * sparsity)`, in float64 and half to even.

    Example:
        >>> kept(10, 0.25), kept(10, 0.35), kept(6, 0.25), kept(200_000_003, 0.9)
        (8, 6, 4, 20000000)
    """
    check_type("n", n, int | np.integer, "how many there are")
    return n - round(n * float(sparsity))
