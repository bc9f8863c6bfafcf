"""A gradient station as one device evaluates it on its own rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unitscale_jax.loss import Given, Grad, Part, weights_of
from unitscale_jax.trace.rewrite import as_on_one_device
from unitscale_jax.typing import Params, State


class Local(NamedTuple):
    """The two passes of a station, as functions of its rows.

    Attributes:
        weigh: `(params, part, state) -> weights`.
        grad: `(params, part, state, denominators, scale) -> (terms, aux, grads)`.
    """

    weigh: Callable[..., Any]
    grad: Callable[..., Any]


def direct(grad_fn: Grad) -> Local:
    """Evaluates the gradient station as it is."""

    def weigh(params: Params, part: Part, state: State) -> Any:
        return weights_of(grad_fn.loss, params, part.batch, Given(state).of(part))

    def grad(params: Params, part: Part, state: State, denominators: Any, scale: Any) -> Any:
        given = Given(state, None, denominators, scale).of(part)
        return grad_fn.call(params, part.batch, given)

    return Local(weigh, grad)


def replayed(
    grad_fn: Grad, params: Params, part: Part, state: State, scale: Any, mesh_axis: str
) -> Local:
    """The station traced where `mesh_axis` is not manual, on the rows of one of its devices.

    For models with loops whose carry begins the same on every device, which JAX refuses to trace
    where the axis is manual (recurrent layers that begin with zeros, for instance).
    """
    n = jax.sharding.get_abstract_mesh().shape[mesh_axis]
    mine = lambda x: jax.ShapeDtypeStruct((x.shape[0] // n, *x.shape[1:]), x.dtype)
    whole = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    given = (jax.tree.map(whole, params), jax.tree.map(mine, part), jax.tree.map(whole, state))
    weigh, grad = direct(grad_fn)
    weights = jax.eval_shape(weigh, *given)
    return Local(
        as_on_one_device(weigh, *given, axes=[mesh_axis]),
        as_on_one_device(grad, *given, weights, whole(scale), axes=[mesh_axis]),
    )
