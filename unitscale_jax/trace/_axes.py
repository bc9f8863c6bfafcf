"""Manual mesh axes: which of them a value differs over, and casting values so that they agree.

Inside `shard_map` a type says over which axes a value varies between devices. A loop's carry must
have one type throughout, and a parameter cast to varying *before* differentiation has its gradient
left unreduced, so that one reduction can follow many parts.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax.trace._compat import varying_axes


def devices_over(axes: str | Sequence[str]) -> int:
    """How many devices there are along a manual mesh axis, or along several.

    Raises:
        ValueError: No `shard_map` around has them.
    """
    try:
        return jax.lax.axis_size(axes if isinstance(axes, str) else tuple(axes))
    except NameError:
        what = f"axis={axes!r}" if isinstance(axes, str) else f"axes={tuple(axes)}"
        raise ValueError(
            f"{what} outside of a shard_map that has them. Call it inside of one over a mesh with "
            "them, or leave them out."
        ) from None


def varying(tree: Any, axes: Sequence[str]) -> Any:
    """The same values, typed as differing over `axes`; axes they differ over already stay."""

    def cast(x: Any) -> Any:
        missing = tuple(a for a in axes if a not in varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def agree(tree: Any, like: Any) -> Any:
    """The same values, each typed as differing over the axes of its counterpart as well."""
    return jax.tree.map(lambda x, other: varying(x, sorted(varying_axes(other))), tree, like)


def zeros(shape: Sequence[int], dtype: Any, like: Any) -> jax.Array:
    """Zeros that differ over the axes of `like`, an array or an abstract one."""
    return varying(jnp.zeros(shape, dtype), sorted(varying_axes(like)))
