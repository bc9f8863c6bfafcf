"""A head on hidden states, by pieces: logits of some rows or some entries, and folds over them.

Inside `shard_map` a loop's carry has one type, so all operands are brought to vary over the same
axes first, and a gradient is summed over those that its operand did not vary over.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from unitscale_jax.mesh_axes import varying, varying_axes


class Head(NamedTuple):
    """Hidden states `(rows, width)` and a head `(width, vocabulary)`."""

    h: jax.Array
    w: jax.Array

    def logits(self, temperature: jax.Array) -> jax.Array:
        """The logits of all rows, divided by the temperature."""
        return times(self.h, self.w) / temperature

    def rows(self, start: Any, size: int) -> "Head":
        """The head restricted to some of its rows."""
        return Head(lax.dynamic_slice_in_dim(self.h, start, size), self.w)

    def columns(self, start: Any, size: int) -> "Head":
        """The rows with some entries of the head."""
        return Head(self.h, lax.dynamic_slice_in_dim(self.w, start, size, axis=1))


def pieces(step: Callable[[Any, Any, int], Any], carry: Any, length: int, chunk: int) -> Any:
    """Folds `step(carry, start, size)` over pieces of a length, the last of what is left."""
    whole = length // chunk
    if whole:
        carry = lax.fori_loop(0, whole, lambda k, carry: step(carry, k * chunk, chunk), carry)
    rest = length - whole * chunk
    return step(carry, whole * chunk, rest) if rest else carry


def rows_times(weight: jax.Array, x: jax.Array) -> jax.Array:
    """Rows times their weights; whatever is in a row that does not count is gone."""
    return jnp.where(weight[:, None] != 0, weight[:, None] * x, 0)


def counted(weight: jax.Array, terms: jax.Array) -> jax.Array:
    """The sum of rows times their weights."""
    return jnp.sum(rows_times(weight, terms))


def times(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product of two matrices, summed in float32; of two dtypes, in float32 throughout."""
    dtype = a.dtype if a.dtype == b.dtype else jnp.dtype(jnp.float32)
    return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def alike(operands: Any) -> tuple[Any, list[str]]:
    """Operands typed as varying over the manual axes that any of them varies over; those axes."""
    axes = sorted(frozenset().union(*map(varying_axes, jax.tree.leaves(operands))))
    return varying(operands, axes), axes


def summed(x: jax.Array, mesh_axis: str | None) -> jax.Array:
    """The sum over a manual axis, if there is one."""
    return x if mesh_axis is None else lax.psum(x, mesh_axis)


def like(gradient: jax.Array, x: jax.Array) -> jax.Array:
    """A gradient of x: what x does not vary over, its gradient is summed over."""
    axes = tuple(sorted(varying_axes(gradient) - varying_axes(x)))
    return (lax.psum(gradient, axes) if axes else gradient).astype(x.dtype)
