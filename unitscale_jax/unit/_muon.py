"""Muon for the roles that are matrices: which axes are a matrix, and updates of one RMS.

    U = 0.2 sqrt(max(in, out)) orthogonalized(momentum),    RMS(U) = 0.2 for any shape

An orthogonal matrix (in, out) has min(in, out) singular values of 1, so its entries have an RMS of
max(in, out)^-1/2. Optax's default, sqrt(max(1, out / in)), leaves that as it is, and under a
forward factor of in^-1/2 updates vanish with width. Muon: https://kellerjordan.github.io/posts/muon;
updates of the RMS of Adam's: https://arxiv.org/abs/2502.16982.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from unitscale_jax import tree as trees
from unitscale_jax.typing import Params
from unitscale_jax.unit._roles import Role

RMS = 0.2  # of Adam's updates, as measured in training
ToMatrix = optax.contrib.MuonDimensionNumbers


def muon_and(others: optax.GradientTransformation, roles: Mapping[str, Role]) -> Any:
    """The directions of Muon for the parameters that are matrices, and of `others` for the rest.

    Args:
        others: A transform from gradients to directions.
        roles: Roles by the names of parameters.
    """

    def axes(tree: Params) -> Any:
        return by_parameter(lambda name, x: matrix_axes(name, x.shape, roles[name]), tree)

    def labels(params: Params) -> Any:
        return jax.tree.map(
            lambda is_matrix: "muon" if is_matrix else "others", matrices(params, roles)
        )

    muon = optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=axes), _matched(roles))
    return optax.partition({"muon": muon, "others": others}, labels)


def matrices(tree: Params, roles: Mapping[str, Role]) -> Any:
    """For each array whether Muon is for it: weights, but for vectors and for scales beside one."""
    whole = {*trees.names(tree)}

    def is_matrix(name: str, x: Any) -> bool:
        role = roles[name]
        beside = name not in whole and x.size < role.fan_in * role.fan_out  # of quantized ones
        return role.kind == "weight" and role.fan_in > 1 and role.fan_out > 1 and not beside

    return by_parameter(is_matrix, tree)


def matrix_axes(name: str, shape: Sequence[int], role: Role) -> ToMatrix:
    """The axes that a matrix's rows (fan-in) and columns (fan-out) are made of.

    What is left are matrices beside each other: stacked layers, experts. Of several ways the first
    is taken in the order of Flax: stacks, then inputs, then outputs. Which of the two are inputs
    does not matter to the update, so a kernel (out, in) is served as well.

    Raises:
        ValueError: No axes have these sizes.

    Example:
        >>> matrix_axes("q", (64, 4, 16), Role("weight", 64, 64))
        MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2))
        >>> matrix_axes("o", (6, 4, 16, 64), Role("weight", 64, 64, depth=6))
        MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=(3,))
    """
    for sides in itertools.product(range(3), repeat=len(shape)):
        axes = [tuple(k for k, side in enumerate(sides) if side == which) for which in (1, 2)]
        sizes = [math.prod(shape[k] for k in own) for own in axes]
        if sizes == [role.fan_in, role.fan_out]:
            return ToMatrix(*axes)
    raise ValueError(
        f"{name} has shape {tuple(shape)}, of which no axes make the fan-in {role.fan_in} and the "
        f"fan-out {role.fan_out} of its role, so Muon knows no matrix. Give its role by "
        "us.unit.roles(.., rules=..), or train it as another role, or with another optimizer."
    )


def _matched(roles: Mapping[str, Role]) -> optax.GradientTransformation:
    def scaled(name: str, u: jax.Array) -> jax.Array:
        return u * (RMS * max(roles[name].fan_in, roles[name].fan_out) ** 0.5)

    return optax.stateless(lambda updates, _: by_parameter(scaled, updates))


def by_parameter(fn: Callable[..., Any], tree: Params, *rest: Any) -> Any:
    """Maps `fn(name, x, *others)` over the arrays, `name` that of the parameter they belong to."""
    leaves, structure = jax.tree.flatten(tree)
    others = [structure.flatten_up_to(other) for other in rest]
    each = zip(trees.owners(tree), leaves, *others, strict=True)
    return structure.unflatten(fn(name, x, *xs) for name, x, *xs in each)
