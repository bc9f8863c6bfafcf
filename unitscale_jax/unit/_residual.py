"""Residual connections with a weight: unit in both passes, whatever their number.

    y = (tau f(x) + x) / (1 + tau^2)^1/2

The factor of the branch's gradient is applied where the branch leaves the skip path, so gradients
inside the branch are unit, too. Rule for tau: u-muP, https://arxiv.org/abs/2407.17465.
"""

import math

import jax

from unitscale_jax.errors import check_number, check_whole
from unitscale_jax.fwd_bwd import scale_bwd, scale_fwd
from unitscale_jax.typing import Array


def residual_split(x: Array, tau: float | Array) -> tuple[jax.Array, jax.Array]:
    """Splits a value into the input of a branch and the skip.

    Args:
        x: Activations.
        tau: Weight of the branch: a positive number, or data of rank 0 in a scan over layers.

    Returns:
        `(branch, skip)`, both x; their gradients are multiplied by tau / D and 1 / D for
        D = (1 + tau^2)^1/2.

    Law: `residual_split` and `residual_add` are adjoint, and tau to 0 leaves the skip.

    Example:
        >>> jax.grad(lambda x: residual_split(x, 0.75)[0])(1.0).item()
        0.6000000238418579
    """
    branch, skip = _shares(tau)
    return scale_bwd(x, branch), scale_bwd(x, skip)


def residual_add(branch: Array, skip: Array, tau: float | Array) -> jax.Array:
    """Adds the result of a branch to the skip: `(tau branch + skip) / (1 + tau^2)^1/2`.

    Example:
        >>> round(residual_add(jnp.ones(()), jnp.zeros(()), 0.75).item(), 6)
        0.6
    """
    of_branch, of_skip = _shares(tau)
    return scale_fwd(branch, of_branch) + scale_fwd(skip, of_skip)


def taus(branches: int, *, mult: float = 1.0, attention_ratio: float = 1.0) -> tuple[float, ...]:
    """Weights of residual branches by which every layer counts equally in the last sum.

    Args:
        branches: Number of branches, attention at even and MLP at odd indices.
        mult: The ratio of what all branches and what the embedding add: (branches / 2 embedding)
            of the squares is mult^2.
        attention_ratio: The ratio of what the attention branches and the MLP branches add.

    Returns:
        One tau for each branch.

    Example:
        >>> [round(tau**2, 6) for tau in taus(4)]
        [0.5, 0.333333, 0.25, 0.2]
    """
    check_whole("branches", branches)
    if branches < 1:
        raise ValueError(f"branches is {branches}; expected at least 1.")
    mlp = mult * math.sqrt(2 / (1 + attention_ratio**2))
    attention = attention_ratio * mlp
    found = []
    for index in range(branches):
        # What came before: the embedding and the branches up to this one.
        before = branches / 2 + (index + 1) // 2 * attention**2 + index // 2 * mlp**2
        found.append((mlp if index % 2 else attention) / math.sqrt(before))
    return tuple(found)


def _shares(tau: float | Array) -> tuple[float | Array, float | Array]:
    """The shares `tau / D` and `1 / D` of branch and skip."""
    if not hasattr(tau, "shape"):
        check_number("tau", tau)
        if tau <= 0:
            raise ValueError(f"tau is {tau}; expected a positive number.")
    whole = (1 + tau**2) ** 0.5
    return tau / whole, 1 / whole
