"""Products of two operands: what a technique of weights needs to know of them.

A dot, a convolution and a ragged dot differ in one thing only: which dimensions of an operand are
summed over, and where the others are in the result. `contracted` and `placed` say that, and all the
rest is written once.
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.trace.params._device_sums import DeviceSum
from unitscale_jax.trace.program._primitives import PRODUCTS
from unitscale_jax.trace.program._walk import Site
from unitscale_jax.trace.rewrite._notes import noted


@dataclass(frozen=True, eq=False)
class Product(abc.ABC):
    """A product equation, its operands left open; side 0 is the left operand, 1 the right one."""

    site: Site
    extra: tuple[Any, ...] = ()  # operands after the two: the group sizes of a ragged dot
    note: dict[str, Any] = field(default_factory=dict)  # for `explain`, at the product itself
    across: DeviceSum | None = None  # the sum over devices that the caller makes part of it

    @abc.abstractmethod
    def contracted(self, side: int) -> tuple[int, ...]:
        """Dimensions of an operand over which its scale must be constant."""

    def channels(self, side: int) -> tuple[int, ...]:
        """The contracted dimensions but for the window of a convolution."""
        return self.contracted(side)

    def batch(self, side: int) -> tuple[int, ...]:
        """Dimensions along which each position is a product of its own."""
        del side
        return ()

    @abc.abstractmethod
    def placed(self, s: jax.Array, side: int) -> jax.Array:
        """Lays out an array like an operand's scale (size 1 where contracted) like the result."""

    def bind(self, left: Any, right: Any, dtype: Any, **changed: Any) -> jax.Array:
        """The product of two arrays, its result of a dtype."""
        changed |= {"preferred_element_type": None if dtype is None else np.dtype(dtype)}
        with noted(**self.note):
            return self.site.bind([left, right, *self.extra], **changed)[0]

    def as_traced(self, left: Any, right: Any) -> jax.Array:
        """The equation itself on other operands of the traced dtypes."""
        return self.site.bind([left, right, *self.extra])[0]

    def shape(self, side: int) -> tuple[int, ...]:
        """The shape of an operand, as traced."""
        return self.site.shapes[side]

    @property
    def dtype(self) -> Any:
        """The dtype of the result, as traced."""
        return self.site.results[0]

    @property
    def result_shape(self) -> tuple[int, ...]:
        """The shape of the result, as traced."""
        return self.site.result_shapes[0]

    @property
    def terms(self) -> int:
        """K, the number of products that a result sums up."""
        return math.prod(self.shape(1)[d] for d in self.contracted(1))

    def sum_over(self, codes: jax.Array, side: int) -> jax.Array:
        """Sums of one operand's integers over what it is multiplied with, laid out as a result."""
        axes = self.contracted(side)
        return self.placed(jnp.sum(codes, axis=axes, keepdims=True, dtype=jnp.int32), side)

    def pair(self, side: int, dim: int) -> int:
        """The dimension of the other operand that is summed up with `dim` of this one.

        Only a product whose `splits` is true has such pairs, and is asked for them.
        """
        raise NotImplementedError(f"{type(self).__name__} is not split along a contraction")

    @property
    def splits(self) -> bool:
        """True if a contracted dimension can be cut, and the parts' results added."""
        return False


class Dot(Product):
    """`dot_general`: batch dimensions, free ones of the left, free ones of the right."""

    @property
    def numbers(self) -> Any:
        return self.site.eqn.params["dimension_numbers"]

    def contracted(self, side: int) -> tuple[int, ...]:
        """Dimensions of an operand that the product sums over."""
        return tuple(self.numbers[0][side])

    def batch(self, side: int) -> tuple[int, ...]:
        """Dimensions that both operands and the result have."""
        return tuple(self.numbers[1][side])

    def free(self, side: int) -> list[int]:
        """Dimensions that are neither contracted nor batch."""
        known = (*self.numbers[0][side], *self.numbers[1][side])
        return [d for d in range(len(self.shape(side))) if d not in known]

    def placed(self, s: jax.Array, side: int) -> jax.Array:
        """Batch dimensions first, then those of the left, then those of the right."""
        batch, free = self.numbers[1][side], self.free(side)
        others = (1,) * len(self.free(1 - side))
        s = s.transpose(*batch, *free, *self.contracted(side))
        head, tail = s.shape[: len(batch)], s.shape[len(batch) : len(batch) + len(free)]
        return s.reshape(head + (tail + others if side == 0 else others + tail))

    def pair(self, side: int, dim: int) -> int:
        """The other operand's dimension at the same position among the contracting ones."""
        return self.numbers[0][1 - side][self.contracted(side).index(dim)]

    @property
    def splits(self) -> bool:
        """Any contracting dimension can be cut."""
        return True


class Conv(Product):
    """`conv_general_dilated`, grouped by features or not.

    Windows overlap, so a scale of the left operand is constant over an example.
    """

    @property
    def numbers(self) -> Any:
        return self.site.eqn.params["dimension_numbers"]

    def contracted(self, side: int) -> tuple[int, ...]:
        """Dimensions but the batch of the left, or the output features of the right operand."""
        kept = self.numbers.lhs_spec[0] if side == 0 else self.numbers.rhs_spec[0]
        return tuple(d for d in range(len(self.shape(side))) if d != kept)

    def channels(self, side: int) -> tuple[int, ...]:
        """The dimension of the input features."""
        return (self.numbers.lhs_spec[1] if side == 0 else self.numbers.rhs_spec[1],)

    def placed(self, s: jax.Array, side: int) -> jax.Array:
        """Lays out along the batch, or along the features, of the result."""
        at = self.numbers.out_spec[side]
        return s.reshape([s.size if d == at else 1 for d in range(s.ndim)])

    def sum_over(self, codes: jax.Array, side: int) -> jax.Array:
        """Sums by a product with ones, since a window at the border has fewer elements."""
        assert side == 1, "sums over windows of the left operand are not needed"
        batch = self.numbers.lhs_spec[0]
        shape = tuple(1 if d == batch else n for d, n in enumerate(self.shape(0)))
        return self.bind(jnp.ones(shape, codes.dtype), codes, jnp.int32)


class Ragged(Product):
    """`ragged_dot_general` as `jax.lax.ragged_dot` makes it: (M, K), (G, K, N), sizes (G,)."""

    def contracted(self, side: int) -> tuple[int, ...]:
        """The last dimension of the left, the middle one of the right."""
        del side
        return (1,)

    def batch(self, side: int) -> tuple[int, ...]:
        """The groups, each of which meets rows of its own."""
        return (0,) if side else ()

    def placed(self, s: jax.Array, side: int) -> jax.Array:
        """Lays out by rows: of the right the row of the group that a row of the left is in.

        Rows beyond all groups, whose product is zero, have zero.
        """
        if side == 0:
            return s
        (sizes,) = self.extra
        rows = jnp.arange(self.shape(0)[0], dtype=sizes.dtype)
        group = jnp.searchsorted(jnp.cumsum(sizes), rows, side="right")
        row = s[jnp.minimum(group, s.shape[0] - 1), 0]
        return jnp.where((group < s.shape[0])[:, None], row, jnp.zeros_like(row))


def product_of(site: Site, extra: Sequence[Any] = ()) -> Product | None:
    """An equation as a product of floats of 16 to 64 bits; None for any other equation.

    Args:
        site: Where the equation stands.
        extra: Its operands after the two.
    """
    params = site.eqn.params
    if site.name not in PRODUCTS or not all(map(_is_float, site.operands[:2])):
        return None
    if site.name == "dot_general":
        return Dot(site)
    if site.name == "conv_general_dilated":
        return Conv(site) if params["batch_group_count"] == 1 else None
    return Ragged(site, tuple(extra)) if _is_plain_ragged(site) else None


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16


def _is_plain_ragged(site: Site) -> bool:
    numbers = site.eqn.params["ragged_dot_dimension_numbers"]
    ranks = [len(shape) for shape in site.shapes[:3]]
    return (
        ranks == [2, 3, 1]
        and tuple(map(tuple, numbers.dot_dimension_numbers[0])) == ((1,), (1,))
        and tuple(numbers.lhs_ragged_dimensions) == (0,)
        and tuple(numbers.rhs_group_dimensions) == (0,)
        and len(site.eqn.invars) == 3
    )
