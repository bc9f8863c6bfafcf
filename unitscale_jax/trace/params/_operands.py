"""The operand that meets a parameter, as rows of its input channels, and moments of such rows.

    H = sum over rows of x x^T,        U upper triangular with U^T U = (H + damp mean(diag H) I)^-1

Rounding (GPTQ) and pruning (SparseGPT) that make up for themselves walk along the rows of U.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.trace.params._layouts import AxisPairs, MatrixForm, batch_pairs, contraction
from unitscale_jax.trace.params._meeting import Meeting
from unitscale_jax.trace.params._product import Conv, Dot, Product, product_of


def input_rows(name: str, layout: MatrixForm, meeting: Meeting, v: jax.Array) -> jax.Array:
    """The other operand as (batch.., rows, K), K in the order of the parameter's own axes.

    Rows of a convolution are its windows.

    Raises:
        ValueError: K is not known element by element.
    """
    product, pairs = _known(name, layout, meeting)
    if isinstance(product, Conv):
        return _patches(product, v, pairs)
    batch = batch_pairs(product, meeting)
    return _by_rows(v, [d for _, d in batch], [d for _, d in pairs])


def channel_rows(name: str, layout: MatrixForm, meeting: Meeting, v: jax.Array) -> jax.Array:
    """The other operand as (batch.., rows, channels); rows of a convolution are positions.

    Raises:
        ValueError: As of `input_rows`.
    """
    product, pairs = _known(name, layout, meeting)
    if isinstance(product, Conv):  # whose channels are one dimension, windows aside
        return _by_rows(v, [], [product.numbers.lhs_spec[1]])
    return input_rows(name, layout, meeting, v)


def valid_rows(name: str, meeting: Meeting, v: jax.Array, mask: Any) -> jax.Array | None:
    """Marks the elements of the other operand that count, in its shape; None: all of them.

    Args:
        name: Of the parameter.
        meeting: Where it meets `v`.
        v: The other operand.
        mask: Which rows of the inputs count, (batch,) or (batch, time); None: all.

    Raises:
        ValueError: The operand's rows are not those of the mask.
    """
    if mask is None:
        return None
    product = _product(meeting)
    free = [d for d in range(v.ndim) if d not in product.contracted(1 - meeting.side)]
    shape, sizes = mask.shape, tuple(v.shape[d] for d in free)
    known = isinstance(product, Dot | Conv)
    if known and sizes[: len(shape)] == shape:
        return jax.lax.broadcast_in_dim(mask, v.shape, free[: len(shape)])
    if known and sizes and sizes[0] == math.prod(shape):
        return jax.lax.broadcast_in_dim(mask.reshape(-1), v.shape, free[:1])
    raise ValueError(
        f"valid has shape {shape}, and what meets {name} has rows {sizes} ("
        f"{meeting.site.name}), so padding cannot be told there. Give batches without padding, "
        f"or rules without {name}."
    )


def count_rows(meeting: Meeting, v: jax.Array, mask: Any) -> jax.Array:
    """int32: how many rows of the other operand count, of a convolution how many positions."""
    wide = _row_size(_product(meeting), meeting)
    if mask is None:
        return jnp.int32(v.size // max(wide, 1))
    each = v.size // max(wide * mask.size, 1)
    return jnp.sum(mask, dtype=jnp.int32) * np.int32(each)


def second_moments(rows: jax.Array) -> jax.Array:
    """The sum of x x^T over float32 rows (.., rows, K): (.., K, K).

    Example:
        >>> second_moments(jnp.array([[1.0, 2.0], [0.0, 1.0]])).tolist()
        [[1.0, 2.0], [2.0, 5.0]]
    """
    return jnp.einsum("...rk,...rl->...kl", rows, rows, precision=jax.lax.Precision.HIGHEST)


def inverse_factor(h: jax.Array, damp: Any) -> tuple[jax.Array, jax.Array]:
    """U, upper triangular with U^T U = H^-1 of the damped H, and which inputs are dead.

    With H = L L^T and H^-1 = M M^T, L and M lower triangular, U is M^T. It is not the inverse of L:
    that is lower triangular, while GPTQ needs the inputs still to come after each one.

    Args:
        h: float32 (K, K), sums or means: a factor of H is one of U, and is dropped.
        damp: What is added to the diagonal, in parts of its mean.

    Returns:
        `(u, dead)`: float32 (K, K), NaN where H is singular in float32; bool (K,), the inputs that
        are zero in every row, whose diagonal is 1 instead.

    Example:
        >>> u, dead = inverse_factor(jnp.diag(jnp.array([4.0, 4.0, 0.0])), 0.25)
        >>> dead.tolist(), (1 / jnp.diagonal(u) ** 2).round(4).tolist()
        ([False, False, True], [1.75, 1.75, 1.0])
    """
    damped, dead = damped_moments(h, damp)
    lower = jnp.linalg.cholesky(damped)
    inverse = jax.scipy.linalg.cho_solve((lower, True), jnp.eye(h.shape[0], dtype=h.dtype))
    return jnp.linalg.cholesky(inverse).T, dead


def damped_moments(h: jax.Array, damp: Any) -> tuple[jax.Array, jax.Array]:
    """H / mean(diag H) + damp I, with 1 on the diagonal of dead inputs; and which are dead."""
    diagonal = jnp.diagonal(h)
    dead = diagonal == 0
    mean = jnp.mean(diagonal)
    unit = h / jnp.where(mean > 0, mean, 1)  # for float32's sake
    return unit + jnp.diag(jnp.where(dead, np.float32(1), jnp.float32(damp))), dead


def _product(meeting: Meeting) -> Product:
    product = product_of(meeting.site)
    assert product is not None
    return product


def _known(name: str, layout: MatrixForm, meeting: Meeting) -> tuple[Product, AxisPairs]:
    product = _product(meeting)
    pairs = contraction(product, meeting)
    if not layout.clear or pairs is None:
        raise ValueError(
            f"what meets {name} in {meeting.site.name} has no input channels that are its own "
            "axes, one by one (it is reshaped, cut, computed with, grouped, or used over "
            "different axes). Leave it out of these rules."
        )
    return product, pairs


def _row_size(product: Product, meeting: Meeting) -> int:
    """Elements of a row: K, of a convolution its channels."""
    shape = product.shape(1 - meeting.side)
    if isinstance(product, Conv):
        return shape[product.numbers.lhs_spec[1]]
    return math.prod(shape[d] for d in product.contracted(1 - meeting.side))


def _by_rows(v: jax.Array, batch: Sequence[int], dims: Sequence[int]) -> jax.Array:
    """(batch.., rows, K): dimensions `dims` flattened to K, all that are left to rows."""
    rows = [d for d in range(v.ndim) if d not in (*batch, *dims)]
    sizes = [v.shape[d] for d in batch]
    count = math.prod(v.shape[d] for d in rows)
    return v.transpose(*batch, *rows, *dims).reshape(*sizes, count, -1)


def _patches(product: Conv, v: jax.Array, pairs: AxisPairs) -> jax.Array:
    """(rows, K): the windows of a convolution, K in the order of the kernel's axes."""
    params, numbers = product.site.eqn.params, product.numbers
    kernel = product.shape(1)
    window = [kernel[d] for d in numbers.rhs_spec[2:]]
    v = v.transpose(numbers.lhs_spec)  # (batch, channels, window..)
    patches = jax.lax.conv_general_dilated_patches(
        v,
        window,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        precision=jax.lax.Precision.HIGHEST,
    )
    patches = jnp.moveaxis(patches, 1, -1)
    cut = patches.reshape(-1, v.shape[1], *window)  # (rows, channels, window..)
    order = [1 + numbers.lhs_spec[1:].index(d) for _, d in pairs]
    return cut.transpose(0, *order).reshape(cut.shape[0], -1)
