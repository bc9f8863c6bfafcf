"""A start of unit scale, whatever initializer made it."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_type
from unitscale_jax.trace.program import is_concrete
from unitscale_jax.typing import Params
from unitscale_jax.unit._roles import Role

UNIT = ("embedding", "input", "weight", "output")


def standardize(params: Params, roles: Any) -> Params:
    """Divides each embedding and each kernel by its RMS: 1 is where unit scaling starts.

    Args:
        params: Parameters as any initializer made them.
        roles: Their roles, as `us.unit.roles` finds them.

    Returns:
        Parameters of the same dtypes, of RMS 1; of a stack all layers together. Biases and norms
        stay as they are, and so does what is zero everywhere, such as the last layer of some
        models.

    Raises:
        ValueError: The roles are those of other parameters.

    Warns:
        UserWarning: Some kernels are zero, and stay; the message names them. Nothing is said where
            parameters are traced, as under `jit`.

    Law: to standardize again changes nothing but rounding.

    Example:
        >>> roles = {"w": us.unit.Role("weight", 2, 2), "b": us.unit.Role("bias", 1, 2)}
        >>> params = {"w": jnp.array([[3.0, 3.0], [-3.0, 3.0]]), "b": jnp.full(2, 5.0)}
        >>> start = standardize(params, roles)
        >>> start["w"].tolist(), start["b"].tolist()
        ([[1.0, 1.0], [-1.0, 1.0]], [5.0, 5.0])
    """
    leaves, structure = jax.tree.flatten(params, is_leaf=trees.is_compound)
    table = dict(zip(trees.names(params, is_leaf=trees.is_compound), leaves, strict=True))
    of = trees.named_leaves(trees.by_names(roles, params, "the tree of roles"))
    for name, role in of.items():
        check_type(f"the role of {name!r}", role, Role, "a us.unit.Role, as us.unit.roles finds it")
    kernels = [name for name, role in of.items() if role.kind in UNIT]
    _warn([name for name in kernels if _is_zero(trees.values_of(table[name]))])
    table |= {name: trees.over_values(_divided, table[name]) for name in kernels}
    return structure.unflatten(table.values())


def _divided(p: Any) -> jax.Array:
    rms = _rms(p)
    return (jnp.asarray(p, rms.dtype) / jnp.where(rms > 0, rms, 1)).astype(p.dtype)


def _rms(p: Any) -> jax.Array:
    wide = jnp.asarray(p, trees.wide(p.dtype))
    return jnp.sqrt(jnp.mean(jnp.square(wide)))


def _is_zero(p: Any) -> bool:
    return is_concrete(p) and not jnp.any(p)


def _warn(zeros: list[str]) -> None:
    if zeros:
        warnings.warn(
            f"{', '.join(zeros)} {'is' if len(zeros) == 1 else 'are'} zero everywhere and stay so. "
            "A last layer of zeros gives all before it first gradients of zero.",
            UserWarning,
            stacklevel=3,
        )
