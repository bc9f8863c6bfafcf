"""The five stations of a training step, as types.

    params --> apply(params, *inputs) --> loss(params, batch) --> grad(params, batch) --> update

A technique maps a station to the same station: same signature in, same signature out. The update is
an `optax.GradientTransformation`. The contract of the loss is in `unitscale_jax.loss`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np

Params: TypeAlias = Any
"""A pytree of arrays; the floating leaves are trained."""

Batch: TypeAlias = Any
"""A pytree of arrays that share their leading axis, the rows."""

State: TypeAlias = Any
"""What a model carries from step to step without training it, such as batch statistics."""

Key: TypeAlias = jax.Array
"""A typed key, `jax.random.key(seed)`, or an array of them, one per row."""

DType: TypeAlias = Any
"""Anything `np.dtype` accepts, the names of `ml_dtypes` included."""

Array: TypeAlias = jax.Array | np.ndarray
"""An array on a device or on the host."""

MeshAxis: TypeAlias = str | Sequence[str]
"""The name of a manual mesh axis, one of an enclosing `shard_map`, or the names of several."""

Apply: TypeAlias = Callable[..., Any]
"""`apply(params, *inputs)`: the model as a pure function."""


class Loss(Protocol):
    """Maps parameters and a batch to terms, and possibly to auxiliary outputs.

    Returns a `Mean`, a dict of named `Mean`s or a scalar; or a pair of those and any pytree.
    `state` and `key` are passed only when the caller gives them, so a loss without them may leave
    them out. A `key` arrives as one key per row.
    """

    def __call__(self, params: Params, batch: Batch, /, **state_and_key: Any) -> Any:
        """Evaluates the loss."""
        ...
