"""Where a stage keeps what waits: buffers of slots, sums, and the residuals of a derivative."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from unitscale_jax import tree as trees
from unitscale_jax.mesh_axes import agree, varying, zeros
from unitscale_jax.typing import Array


def blank(aval: Any, mesh_axis: str, slots: int | None = None) -> jax.Array:
    """Makes zeros like an abstract array, varying over `mesh_axis` too, in `slots` slots if any."""
    lead = () if slots is None else (slots,)
    return varying(zeros((*lead, *aval.shape), aval.dtype, like=aval), [mesh_axis])


def stored(buffer: Any, slot: Array, value: Any, where: Array) -> Any:
    """Puts a value in one slot of a buffer where a flag says so; else the buffer is as it was."""

    def put(b: jax.Array, v: jax.Array) -> jax.Array:
        old = lax.dynamic_index_in_dim(b, slot, keepdims=False)
        return lax.dynamic_update_index_in_dim(b, jnp.where(where, v, old), slot, 0)

    return jax.tree.map(put, buffer, value)


def taken(buffer: Any, slot: Array) -> Any:
    """Reads one slot of a buffer."""
    return jax.tree.map(lambda b: lax.dynamic_index_in_dim(b, slot, keepdims=False), buffer)


def added(total: Any, more: Any) -> Any:
    """Adds gradients to a total, in the dtype of the total."""
    return jax.tree.map(lambda t, m: t + m.astype(t.dtype), total, more)


def added_at(total: Any, slot: Any, more: Any) -> Any:
    """Adds gradients to one slot of the sums; `slot` may be a Python number."""
    return jax.tree.map(lambda t, m: t.at[slot].add(m.astype(t.dtype)), total, more)


def select(skip: bool, where: Array, do: Callable[[], Any], idle: Callable[[], Any]) -> Any:
    """Returns the results of `do` where a condition holds, else those of `idle`, in its types.

    Args:
        skip: Whether only one of the two is computed. If not, both are, and what was computed from
            garbage is deselected.
        where: The condition, a boolean scalar.
        do: Of no arguments; its results may differ over fewer mesh axes than those of `idle`.
        idle: Of no arguments.
    """
    types = jax.eval_shape(idle)

    def typed() -> Any:
        return agree(do(), types)

    if skip:
        return lax.cond(where, typed, idle)
    return trees.select(jnp.asarray(where), typed(), idle())


def residuals(pull: Any, known: Any) -> tuple[list[jax.Array], Callable[[list, Any], Any]]:
    """Finds the arrays that a derivative saved and that will not be at hand anyway.

    Args:
        pull: What `jax.vjp` returned.
        known: A tree of arrays that will be there again, such as the weights. JAX saves the very
            arrays it was given, so they are told by their identity.

    Returns:
        `(new arrays, rebuild)`; `rebuild(new arrays, known)` is `pull` again, in another place.
    """
    leaves, structure = jax.tree.flatten(pull)
    at = {id(x): k for k, x in enumerate(jax.tree.leaves(known))}
    places = [at.get(id(x)) for x in leaves]

    def rebuild(new: list[jax.Array], known: Any) -> Any:
        fresh, given = iter(new), jax.tree.leaves(known)
        return structure.unflatten([next(fresh) if k is None else given[k] for k in places])

    return [x for x, k in zip(leaves, places, strict=True) if k is None], rebuild
