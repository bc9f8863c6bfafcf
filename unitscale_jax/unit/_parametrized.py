"""An optimizer whose learning rates follow the roles of parameters.

    p -= s(t) (eta c_p d_p + lambda p)

d_p is the direction that a base such as Adam gives, c_p the factor of the parameter's role, s a
schedule relative to its peak. Weight decay is independent of the learning rate: with a rate of its
own for each role, `optax.adamw` would decay each role by another factor.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_type, expected, unknown
from unitscale_jax.optimizer import check_scalar, check_state, common_dtype
from unitscale_jax.typing import Array, Params
from unitscale_jax.unit._multipliers import Optimizer, Parametrization, multipliers
from unitscale_jax.unit._muon import by_parameter, matrices, muon_and
from unitscale_jax.unit._roles import Role


class ParametrizedState(NamedTuple):
    """State of `parametrized`.

    Attributes:
        count: Steps taken, int32.
        inner: State of the base; with Muon, of Muon and the base.
    """

    count: jax.Array
    inner: Any


def parametrized(
    base: optax.GradientTransformation,
    roles: Any,
    learning_rate: float | Array,
    *,
    optimizer: Optimizer = "adam",
    parametrization: Parametrization = "umup",
    readout_constraint: str | None = None,
    weight_decay: float | Array = 0.0,
    schedule: Callable[[jax.Array], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Gives each parameter the learning rate of its role, so that one rate serves every width.

    Args:
        base: A transform from gradients to directions, without a learning rate and without its
            sign: `optax.scale_by_adam()`, `optax.scale_by_lion()`, `optax.identity()` for SGD.
            With "muon" it is for the parameters that Muon leaves out.
        roles: A pytree of `Role`s like the parameters, as `us.unit.roles` finds them.
        learning_rate: The peak rate that all roles share; under "umup" about 1 is a good start.
        optimizer: What the base is: "adam" if it normalizes gradients, "sgd" if it does not; or
            "muon", and the matrices of role "weight" (those with a fan-in and a fan-out above 1)
            have Muon's updates of RMS 0.2 instead of the base's: stacked ones each for itself, and
            heads as one matrix.
        parametrization: "umup", "mus", "mup" or "standard"; see `multipliers`.
        readout_constraint: That of the model's readout, for SGD.
        weight_decay: What a step at the peak takes away from each parameter, of any role, in parts
            of it.
        schedule: From the number of steps taken to a factor of the whole step, 1 at its peak.

    Returns:
        A transform for `optax.apply_updates`, whose `update(grads, state, params, **extra)` needs
        the parameters if there is weight decay. Like a chain it stands inside of `us.pruned`,
        `us.multi_steps` and `us.loss_scaled`.

    Raises:
        TypeError: `base` is no transform, a leaf of `roles` is no `Role`, or the learning rate is a
            schedule.
        ValueError: A name is unknown; `base` has a learning rate already; at `init`, a parameter
            has no role.

    Laws: with zero gradients each step multiplies every parameter by 1 - s weight_decay; models
    that differ by (forward t, init / t, rate / t) train alike, if the base normalizes without an
    epsilon.

    Example:
        >>> roles = {"w": us.unit.Role("weight", 64, 64), "b": us.unit.Role("bias", 1, 64)}
        >>> tx = parametrized(optax.identity(), roles, 0.5, optimizer="sgd")
        >>> params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["w"][0, 0].item(), updates["b"][0].item()
        (-0.0625, -0.5)
    """
    _check_base(base)
    _check_rate(learning_rate)
    check_scalar("weight_decay", weight_decay)
    table = _table(roles)
    rates = _rates(table, parametrization, optimizer, readout_constraint)
    others, inner = rates, optax.with_extra_args_support(base)
    if optimizer == "muon":
        # What it leaves out of a weight, such as a vector, has the base's direction, Adam's rate.
        others = _rates(table, parametrization, "adam", readout_constraint)
        inner = optax.with_extra_args_support(muon_and(base, table))
    decays = not isinstance(weight_decay, int | float) or weight_decay != 0

    def init_fn(params: Params) -> ParametrizedState:
        _check_names(params, table)
        return ParametrizedState(jnp.zeros((), jnp.int32), inner.init(params))

    def update_fn(
        updates: Params, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Params, ParametrizedState]:
        check_state(state, ParametrizedState, "parametrized")
        if decays and params is None:
            raise ValueError(
                "weight decay takes a part of the parameters away, and `params` is None. Call "
                "update(grads, state, params)."
            )
        directions, inner_state = inner.update(updates, state.inner, params, **extra)
        factor = 1.0 if schedule is None else schedule(state.count)

        def step(name: str, d: jax.Array, is_matrix: bool, p: Any = None) -> jax.Array:
            rate = (rates if is_matrix else others)[name]
            return _step(d, learning_rate * rate, (weight_decay, p) if decays else None, factor)

        rest = [params] if decays else []
        steps = by_parameter(step, directions, matrices(directions, table), *rest)
        return steps, ParametrizedState(state.count + 1, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _step(d: jax.Array, rate: Any, decay: tuple[Any, Any] | None, factor: Any) -> jax.Array:
    """`-s (rate d + lambda p)`, in the wider dtype of both."""
    dtype = d.dtype if decay is None else common_dtype(decay[1], d)
    change = jnp.asarray(rate, dtype) * d.astype(dtype)
    if decay is not None:
        change += jnp.asarray(decay[0], dtype) * jnp.asarray(decay[1], dtype)
    return -jnp.asarray(factor, dtype) * change


def _rates(
    table: dict[str, Role],
    parametrization: Parametrization,
    optimizer: Optimizer,
    readout_constraint: str | None,
) -> dict[str, float]:
    """Factors of the learning rate by the names of parameters."""
    given = parametrization, optimizer
    return {
        name: multipliers(role, *given, readout_constraint=readout_constraint).rate
        for name, role in table.items()
    }


def _table(roles: Any) -> dict[str, Role]:
    """Roles by the names of their parameters."""
    table = trees.named_leaves(roles)
    for name, role in table.items():
        check_type(f"the role of {name!r}", role, Role, "a us.unit.Role, as us.unit.roles finds it")
    return table


def _check_names(params: Params, table: dict[str, Role]) -> None:
    for name in trees.owners(params):
        if name not in table:
            raise ValueError(
                f"{unknown(name, table, 'role of a parameter')} Pass the roles of these "
                "parameters, us.unit.roles(fn, params, *args)."
            )


def _check_rate(learning_rate: Any) -> None:
    if callable(learning_rate):
        wanted = "the peak of it, a number; `schedule` is the factor of it at each step"
        raise TypeError(expected("learning_rate", learning_rate, wanted))
    check_scalar("learning_rate", learning_rate)


def _check_base(base: Any) -> None:
    """Raises an error for what is no transform, or goes down by itself.

    A base that is built for certain parameters cannot be asked this way, and passes.
    """
    if not (callable(getattr(base, "init", None)) and callable(getattr(base, "update", None))):
        wanted = "a transform of gradients to directions, as optax.scale_by_adam()"
        raise TypeError(expected("base", base, wanted))
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        ones = {"w": jnp.ones((2, 2))}
        try:
            moved = base.update(ones, base.init(ones), ones)[0]["w"]
        except Exception:  # of any kind: what a base needs of its parameters is its own affair
            return
        down = bool(jnp.all(moved <= 0) & jnp.any(moved < 0))
    if down:
        raise ValueError(
            "base takes steps down already, as an optimizer with a learning rate does, such as "
            "optax.adam(1e-3), and these would be turned into steps up. Give it without one, as "
            "optax.scale_by_adam() or optax.trace(0.9)."
        )
