"""Manual mesh axes: which of them a value differs over, and casting values so that they agree.

Inside `shard_map` a type says over which axes a value varies between devices. A loop's carry must
have one type throughout, and a parameter cast to varying *before* differentiation has its gradient
left unreduced, so that one reduction can follow many parts.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax.errors import expected
from unitscale_jax.typing import MeshAxis


def names_of(mesh_axis: MeshAxis) -> tuple[str, ...]:
    """The names of one mesh axis or of several; `TypeError` for what is neither."""
    if isinstance(mesh_axis, str):
        return (mesh_axis,)
    if isinstance(mesh_axis, Iterable) and all(isinstance(name, str) for name in mesh_axis):
        return tuple(mesh_axis)
    wanted = "the name of a mesh axis, as 'dp', or several, as ('dp', 'tp')"
    raise TypeError(expected("`mesh_axis`", mesh_axis, wanted))


def devices_over(mesh_axis: MeshAxis) -> int:
    """How many devices there are along a manual mesh axis, or along several.

    Raises:
        ValueError: No `shard_map` around has them.
    """
    names = mesh_axis if isinstance(mesh_axis, str) else tuple(mesh_axis)
    try:
        return jax.lax.axis_size(names)
    except NameError:
        raise ValueError(
            f"mesh_axis={names!r} outside of a shard_map that has them. Call it inside of one over "
            "a mesh with them, or leave them out."
        ) from None


def varying_axes(value: Any) -> frozenset[str]:
    """The manual mesh axes over which an array, or an abstract one, differs between devices."""
    typed = value if hasattr(value, "manual_axis_type") else jax.typeof(value)
    kind = typed.manual_axis_type
    return frozenset() if kind is None else kind.varying  # None: shard_map without check_vma


def axes_of(tree: Any) -> list[str]:
    """All manual mesh axes over which some leaf differs."""
    return sorted(frozenset().union(*map(varying_axes, jax.tree.leaves(tree))))


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


def match_vma(cotangent: Any, primal: Any) -> Any:
    """Sums a cotangent over the mesh axes along which it varies and its primal does not.

    What the backward rule of a `custom_vjp` owes to `shard_map`: a parameter that is the same on
    every device of an axis was used by each of them, so its cotangent is the sum of theirs. JAX
    does this for its own operations. Outside `shard_map` it is the identity.

    Args:
        cotangent: A pytree of arrays.
        primal: A pytree of the same structure, whose cotangent it is.

    Returns:
        The cotangent, varying along the axes of `primal`.
    """
    return jax.tree.map(_match_leaf, cotangent, primal)


def _match_leaf(cotangent: jax.Array, primal: jax.Array) -> jax.Array:
    extra = varying_axes(cotangent) - varying_axes(primal)
    summed = jax.lax.psum(cotangent, tuple(sorted(extra))) if extra else cotangent
    return varying(summed, sorted(varying_axes(primal)))
