"""Error feedback: what compression rounds away, kept for the next gradient.

    sent_t = q(g_t + e_(t-1)),    e_t = g_t + e_(t-1) - sent_t

so that the sum of what was sent is that of the gradients, up to one rounding (Seide et al. 2014).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from unitscale_jax.parallel.layouts._context import axis_size
from unitscale_jax.typing import Params, State


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Feedback:
    """What compression has rounded away, to be added to the next gradient; made by `feedback`.

    Given as `state=` to a gradient that is `reduced` with `compress`; the next one is its auxiliary
    output. It does not carry the loss scale, and a step that overflows leaves it as it was.

    Attributes:
        error: A pytree like the parameters, float32 `(n, *shape)`, one row for each device.
        state: The model's state, and in an auxiliary output the model's auxiliary outputs.
    """

    error: Any
    state: Any = None

    def after(self, lost: list[Any], aux: Any) -> "Feedback":
        """Makes the feedback of the next step, around the auxiliary outputs of this one."""
        return Feedback(jax.tree.structure(self.error).unflatten(lost), aux)


def feedback(params: Params, mesh_axis: str = "dp", state: State = None) -> Feedback:
    """Makes the feedback of the first step, all zeros; called under `jax.set_mesh(mesh)`.

    Args:
        params: The parameters, or their shapes.
        mesh_axis: The mesh axis that gradients are reduced over.
        state: The model's state.

    Example:
        >>> with jax.set_mesh(us.parallel.mesh(dp=4, tp=2)):
        ...     us.parallel.feedback({"w": jnp.ones((3, 5))}).error["w"].shape
        (4, 3, 5)
    """
    n = axis_size(mesh_axis, "feedback")

    def zeros() -> Params:
        return jax.tree.map(lambda x: jnp.zeros((n, *jnp.shape(x)), jnp.float32), params)

    # Compiled, so that every device makes its own row: n rows may not fit on one of them.
    return Feedback(jax.jit(zeros, out_shardings=P(mesh_axis))(), state)


def check_feedback(feedback: Feedback | None, params: Params, compress: str | None, n: int) -> None:
    """Raises `ValueError` if there is nothing to feed back, or it is not that of `params`."""
    if feedback is None:
        return
    if compress is None:
        raise ValueError(
            "`state` is a Feedback, and without `compress` nothing is rounded away. Pass "
            "compress='int8', or the model's own state."
        )
    want = [(n, *jnp.shape(x)) for x in jax.tree.leaves(params)]
    got = [jnp.shape(x) for x in jax.tree.leaves(feedback.error)]
    if got != want:
        raise ValueError(
            f"`state.error` has shapes {got}, expected {want}. Make it with "
            "us.parallel.feedback(params) under the mesh that is set."
        )
