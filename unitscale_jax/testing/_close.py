"""Trees compared leaf by leaf, with a message that says how far each is off and by which factor."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from unitscale_jax import tree as trees


def assert_close(
    got: Any, want: Any, rtol: float, title: str, *, sizes: Mapping[str, int] | None = None
) -> None:
    """Raises `AssertionError` with a line for each leaf that is off by more than `rtol`.

    Args:
        got: A pytree of arrays.
        want: Another of its structure.
        rtol: Allowed difference, as a fraction of a leaf's largest entry.
        title: First line of the message.
        sizes: Mesh axes and their sizes: a ratio that is one of them says which sum was forgotten.
    """
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    rows = [
        _difference(name or "params", *pair, rtol, sizes or {})
        for name, pair in zip(trees.names(want), pairs, strict=True)
    ]
    bad = [row for row in rows if row]
    if bad:
        raise AssertionError("\n  ".join([title, *bad]))


def _difference(
    name: str, got_leaf: Any, want_leaf: Any, rtol: float, sizes: Mapping[str, int]
) -> str | None:
    got, want = np.asarray(got_leaf, np.float64), np.asarray(want_leaf, np.float64)
    if got.shape != want.shape:
        return f"{name}: shape {got.shape}, expected {want.shape}"
    largest = np.max(np.abs(want), initial=0.0)
    off = np.max(np.abs(got - want), initial=0.0)
    if off <= rtol * largest:  # false for NaN, which is never close
        return None
    with np.errstate(all="ignore"):
        share, ratio = off / largest, float(np.linalg.norm(got) / np.linalg.norm(want))
    return (
        f"{name}: largest difference {share:.2e} of the leaf's largest entry, "
        f"ratio of norms {ratio:.4g}{_meaning(ratio, sizes)}"
    )


def _meaning(ratio: float, sizes: Mapping[str, int]) -> str:
    """Which axis size a ratio is, or one part of."""
    for axis, size in sizes.items():
        for factor, text in ((size, "size"), (1 / size, "1 / size")):
            if size > 1 and abs(ratio / factor - 1) < 1e-3:
                return f" = {text} of axis {axis}"
    return ""
