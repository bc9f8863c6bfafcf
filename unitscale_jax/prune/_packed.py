"""Only the kept values: k numbers and one bit per weight, where the array was.

    bytes / dense = (1 - s) + 1 / (8 itemsize)       for bf16 .5625, .2625, .1625 at .5, .8, .9

The dense array is rebuilt where it is used, so gradients, moments and checkpoints have k numbers.
Values are what is trained and bits what is not, so they are two trees: differentiate with respect
to `values`. Storage is all that is saved; the product is the dense one.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import rules as named_rules, tree as trees
from unitscale_jax.errors import check_type
from unitscale_jax.loss import around
from unitscale_jax.prune._masks import paired
from unitscale_jax.typing import Apply, Params


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["length"])
@dataclass(frozen=True, eq=False)
class Bits:
    """A bool array, eight to a byte along its last axis, the first in the highest bit.

    Attributes:
        data: uint8 (.., ceil(length / 8)).
        length: The size of the last axis.
    """

    data: Any
    length: int

    @property
    def mask(self) -> jax.Array:
        """The bool array."""
        bits = jnp.unpackbits(jnp.asarray(self.data), axis=-1, count=self.length)
        return bits.astype(jnp.bool_)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "bits"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class Packed:
    """Parameters of which only the kept values are there; made by `pack`.

    Attributes:
        values: A pytree like the parameters, under the same names: (k,) values in row-major order
            where there is a mask, (*stacked, k) where leading axes are stacked; other parameters
            as they are. Train it like any parameters.
        bits: The masks by path, as `Bits`. They are no constants of a program: pass them along.
    """

    values: Any
    bits: dict[str, Bits]


def pack_bits(mask: Any) -> Bits:
    """Packs a bool array of at least one axis.

    Law: `pack_bits(mask).mask` is `mask`.

    Example:
        >>> bits = pack_bits(jnp.array([1, 0, 1, 1, 0, 0, 0, 1, 1, 0, 1], bool))
        >>> bits.data.tolist(), bits.mask.astype(int).tolist()
        ([177, 160], [1, 0, 1, 1, 0, 0, 0, 1, 1, 0, 1])
    """
    return Bits(jnp.packbits(jnp.asarray(mask), axis=-1), np.shape(mask)[-1])


def pack(params: Params, masks: Any, *, stacked: named_rules.Rules[int] | None = None) -> Packed:
    """Takes out the values that masks keep.

    Args:
        params: A pytree of parameters.
        masks: One like it of concrete bool arrays; the scalar True leaves a parameter as it is.
        stacked: Rules from paths to how many leading axes stay axes of the values, so that a scan
            over layers can slice them. Every index has to keep equally many.

    Returns:
        `Packed`, with dtypes as they were.

    Raises:
        ValueError: As `prune`; masks that are traced; a rule that matches nothing; stacked indices
            that keep different numbers.
        TypeError: As `prune`.

    Law: `unpack(pack(params, masks))` is `prune(params, masks)`, bit by bit.

    Example:
        >>> w, mask = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[True, False], [False, True]])
        >>> held = pack({"w": w}, {"w": mask})
        >>> held.values["w"].tolist(), unpack(held)["w"].tolist()
        ([1.0, 4.0], [[1.0, 0.0], [0.0, 4.0]])
    """
    leaves, structure = jax.tree.flatten(params, is_leaf=trees.is_compound)
    found = paired(params, masks)
    axes = named_rules.match(stacked or {}, found, 0)
    values, bits = [], {}
    for leaf, (name, mask) in zip(leaves, found.items(), strict=True):
        if np.shape(mask):
            take = functools.partial(_taken, name, mask, axes[name])
            values.append(trees.over_values(take, leaf))
            bits[name] = pack_bits(mask)
        else:
            values.append(leaf)
    return Packed(structure.unflatten(values), bits)


def unpack(packed: Packed) -> Params:
    """Rebuilds the dense parameters, zeros where there was no value.

    Args:
        packed: Of `pack`, its arrays or a slice of its stacked ones.

    Returns:
        Parameters as they were, pruned.

    Raises:
        ValueError: Bits of other names than the values'.

    Laws: inverse of `pack`. Linear in `packed.values`, so a gradient has k values: those of the
    dense gradient that the mask keeps.

    Example:
        >>> held = pack(jnp.array([1.0, 2.0, 3.0]), jnp.array([True, False, True]))
        >>> total = lambda values: jnp.sum(unpack(Packed(values, held.bits)) ** 2)
        >>> jax.grad(total)(held.values).tolist()
        [2.0, 6.0]
    """
    check_type("packed", packed, Packed, "what us.prune.pack returns")
    leaves, structure = jax.tree.flatten(packed.values, is_leaf=trees.is_compound)
    names = trees.names(packed.values, is_leaf=trees.is_compound)
    odd = sorted(packed.bits.keys() - set(names))
    if odd:
        raise ValueError(f"bits are of {', '.join(odd)}, and values of {', '.join(names)}.")
    dense = [
        trees.over_values(functools.partial(_dense, packed.bits[name].mask), leaf)
        if name in packed.bits
        else leaf
        for name, leaf in zip(names, leaves, strict=True)
    ]
    return structure.unflatten(dense)


def packed(apply: Apply) -> Apply:
    """The function over packed parameters, which it rebuilds inside.

    Args:
        apply: A function whose first argument is the parameters.

    Returns:
        A function of the same signature whose first argument is a `Packed`.

    Laws: equals `apply` at the pruned parameters, to the bit. Training `values` by any optimizer
    that treats numbers one by one (SGD, Adam, AdamW, Lion, ..) is training the pruned model; one
    that looks at rows or at a matrix (Adafactor, Muon) sees k numbers in a row instead.

    Example:
        >>> apply = lambda params, x: x @ params["w"]
        >>> w, mask = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[True, False], [False, True]])
        >>> packed(apply)(pack({"w": w}, {"w": mask}), jnp.ones(2)).tolist()
        [1.0, 4.0]
    """

    @around(apply, "packed")
    def packed_apply(params: Packed, *inputs: Any, **kwargs: Any) -> Any:
        return apply(unpack(params), *inputs, **kwargs)

    return packed_apply


def _taken(name: str, mask: Any, stacked: int, leaf: Any) -> jax.Array:
    if isinstance(mask, jax.core.Tracer):
        raise ValueError(
            f"the mask of {name} is traced, so how much it keeps is unknown. Pack outside of jit."
        )
    shape = np.shape(leaf)[:stacked]
    rows = np.asarray(mask).reshape(*shape, -1)
    kept = np.unique(rows.sum(-1))
    if len(kept) > 1:
        raise ValueError(
            f"the stacked layers of {name} keep from {kept[0]} to {kept[-1]}, which make no array. "
            "Allocate by `uniform`, or pack it without `stacked`."
        )
    flat = jnp.asarray(leaf).reshape(-1)
    return flat[np.flatnonzero(rows)].reshape(*shape, int(kept[0]) if len(kept) else 0)


def _dense(mask: jax.Array, values: jax.Array) -> jax.Array:
    """Puts row-major values where a mask is True; leading axes of values are those of the mask."""
    for_one = _scattered
    for _ in range(values.ndim - 1):
        for_one = jax.vmap(for_one)
    return for_one(values, mask)


def _scattered(values: jax.Array, mask: jax.Array) -> jax.Array:
    if not values.size:
        return jnp.zeros(mask.shape, values.dtype)
    place = jnp.cumsum(mask.reshape(-1), dtype=jnp.int32).reshape(mask.shape) - 1
    # Out of range where there is no value, so that neither pass meets one.
    place = jnp.where(mask, place, values.size)
    return jnp.asarray(values).at[place].get(mode="fill", fill_value=0)
