"""Experts on different devices: every row travels to the experts that a router chose for it.

    y_r = sum_k gates_rk f_e(x_r),    e = chosen_rk

Rows are split over the axis that holds the experts. They are sorted by expert, sent to its device
by one all-to-all, multiplied there in groups by `jax.lax.ragged_dot`, and sent back (Lepikhin et
al. 2020, arXiv:2006.16668; dropless: Gale et al. 2022, arXiv:2211.15841). A body for a user's own
`jax.shard_map`, as in `_tensor`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unitscale_jax import tree as trees
from unitscale_jax.mesh_axes import devices_over, varying
from unitscale_jax.typing import Array, Params


def expert_parallel(
    fn: Callable[[Params, jax.Array, jax.Array], jax.Array],
    params: Params,
    x: Array,
    chosen: Array,
    gates: Array,
    *,
    mesh_axis: str,
    capacity: int | None = None,
) -> tuple[jax.Array, "Load"]:
    """Evaluates experts that are split over a mesh axis on the rows that chose them.

    Args:
        fn: `fn(params, rows, sizes)`: the device's experts on rows that are sorted by expert, the
            first `sizes[0]` for the first; `(all, width)` to `(all, out)`, row by row, as by
            `jax.lax.ragged_dot(rows, params["up"], sizes)`. Rows after the last group are of no
            expert; what becomes of them is ignored.
        params: The device's experts: leaves `(experts / n, ..)`, the in_spec is `P("ep")`.
        x: `(.., width)`, the device's rows.
        chosen: `(.., k)` integers below `experts`, which are different for a row.
        gates: `(.., k)`, their weights.
        mesh_axis: The manual mesh axis, which holds both the experts and the rows.
        capacity: How many of its rows a device sends to one expert at most; the later ones are
            dropped, their part of the sum is zero. None drops none. Buffers are fixed when the
            program is compiled: (n, min(experts / n, k) rows, width) without a capacity,
            (n, experts / n capacity, width) with a smaller one.

    Returns:
        `(.., out)`, the device's rows, and the `Load`.

    Raises:
        ValueError: Shapes that do not fit, a capacity below 1.

    Law: all experts on all rows, gates of zero for those not chosen, on one device, with its
    gradients; with a capacity, likewise for the rows that are kept.

    Example:
        >>> from jax.sharding import PartitionSpec as P
        >>> x, chosen = jnp.ones((8, 2)), jnp.arange(8)[:, None] % 4
        >>> fn = lambda w, rows, sizes: jax.lax.ragged_dot(rows, w, sizes)
        >>> split = jax.shard_map(
        ...     lambda *args: us.parallel.expert_parallel(fn, *args, mesh_axis="ep")[0],
        ...     in_specs=P("ep"), out_specs=P("ep"))
        >>> with jax.set_mesh(us.parallel.mesh(dp=2, ep=4)):
        ...     w = jnp.arange(4.0)[:, None, None] * jnp.ones((4, 2, 1))
        ...     split(w, x, chosen, jnp.ones((8, 1)))[:, 0].tolist()
        [0.0, 2.0, 4.0, 6.0, 0.0, 2.0, 4.0, 6.0]
    """
    local = _check(params, x, chosen, gates, capacity, mesh_axis)
    flat = varying(x.reshape(-1, x.shape[-1]), [mesh_axis])
    choices = jnp.asarray(chosen).astype(jnp.int32).reshape(-1, chosen.shape[-1])
    route = _route(varying(choices, [mesh_axis]), local, mesh_axis, capacity)
    out = _there_and_back(fn, params, flat, route, mesh_axis)
    found = jnp.take(out, route.place, axis=0, mode="fill", fill_value=0)  # (rows, k, out)
    wide = trees.wide(out.dtype)
    weights = gates.reshape(choices.shape).astype(wide)
    y = jnp.sum(found.astype(wide) * weights[..., None], axis=1).astype(out.dtype)
    load = Load(lax.psum(route.asked, mesh_axis), lax.psum(route.kept, mesh_axis))
    return y.reshape(*x.shape[:-1], -1), load


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Load:
    """How many rows of all devices chose each expert, and were kept; int32 `(experts,)`.

    Attributes:
        asked: Rows that chose the expert. `asked / asked.sum()` is the share that a loss for
            balanced loads multiplies with the router's mean probability of the expert.
        kept: Rows within the capacity.
    """

    asked: Any
    kept: Any

    @property
    def dropped(self) -> jax.Array:
        """The share of choices that the capacity dropped."""
        return 1 - jnp.sum(self.kept) / jnp.maximum(jnp.sum(self.asked), 1)


class _Route(NamedTuple):
    """Where the rows of a device go: a buffer has `slots` places for each device of the axis.

    Attributes:
        row: `(n slots,)`, which row is in a place; a number beyond the last row means none.
        place: `(rows, k)`, in which place a choice is; beyond the last place it is dropped.
        sizes: `(n, experts / n)`, how many rows go to each expert.
        asked: `(experts,)`, how many rows chose each expert.
        kept: `(experts,)`, how many of these the capacity keeps.
    """

    row: jax.Array
    place: jax.Array
    sizes: jax.Array
    asked: jax.Array
    kept: jax.Array


def _route(choices: jax.Array, local: int, mesh_axis: str, capacity: int | None) -> _Route:
    """Sorts choices by expert; those of one device's experts stand together, the earlier first."""
    n, (rows, k) = devices_over(mesh_axis), choices.shape
    most = rows if capacity is None else min(capacity, rows)
    # A row's choices are different experts, of which a device has `local`; each takes `most` rows.
    slots = min(rows * min(k, local), local * most)
    flat = choices.reshape(-1)
    asked = _counts(flat, n * local)
    kept = jnp.minimum(asked, most)
    sizes = kept.reshape(n, local)

    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    expert = flat[order]
    # Counted within its expert: the sort is stable, so a capacity drops the later rows.
    rank = jnp.arange(rows * k, dtype=jnp.int32) - _before(asked)[expert]
    first = (_before(sizes) + slots * jnp.arange(n, dtype=jnp.int32)[:, None]).reshape(-1)
    place = jnp.where(rank < most, first[expert] + rank, n * slots)
    row = jnp.full(n * slots, rows, jnp.int32).at[place].set(order // k, mode="drop")
    of_choice = jnp.zeros_like(place).at[order].set(place)
    return _Route(row, of_choice.reshape(rows, k), sizes, asked, kept)


def _there_and_back(
    fn: Callable[..., jax.Array], params: Params, flat: jax.Array, route: _Route, mesh_axis: str
) -> jax.Array:
    """Sends rows to their experts and the results back: one for each place, `(n slots, out)`."""
    trade = functools.partial(lax.all_to_all, axis_name=mesh_axis, split_axis=0, concat_axis=0)
    sent = jnp.take(flat, route.row, axis=0, mode="fill", fill_value=0)
    received, sizes = trade(sent, tiled=True), trade(route.sizes, tiled=True)
    # Rows from one device are in the order of its experts; from all of them they are sorted again.
    slot = jnp.arange(received.shape[0] // sizes.shape[0], dtype=jnp.int32)
    ends = jnp.cumsum(sizes, axis=1, dtype=jnp.int32)[:, None, :]
    expert = jnp.sum(slot[:, None] >= ends, axis=-1).reshape(-1)
    order = jnp.argsort(expert, stable=True)
    made = fn(params, received[order], jnp.sum(sizes, axis=0, dtype=jnp.int32))
    # What fills the buffers up comes last, may be anything, and goes to places that nobody reads.
    return trade(jnp.zeros_like(made).at[order].set(made, unique_indices=True), tiled=True)


def _counts(experts: jax.Array, length: int) -> jax.Array:
    """How often each expert was chosen, `(length,)` int32."""
    zeros = jnp.zeros(length, jnp.int32)
    return zeros.at[experts].add(1)


def _before(counts: jax.Array) -> jax.Array:
    """Sums the counts that come before each one, along the last axis."""
    return jnp.cumsum(counts, axis=-1, dtype=jnp.int32) - counts


def _check(
    params: Params, x: Any, chosen: Any, gates: Any, capacity: int | None, mesh_axis: str
) -> int:
    """Checks the arguments and returns the number of experts per device."""
    if chosen.shape != gates.shape or chosen.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"expert_parallel got x {x.shape}, chosen {chosen.shape} and gates {gates.shape}; "
            "expected (.., width), and twice (.., k)."
        )
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity={capacity}; it is a number of rows, at least 1, or None.")
    counts = {name: np.shape(leaf)[:1] for name, leaf in trees.named_leaves(params).items()}
    if len(set(counts.values())) != 1 or () in counts.values():
        raise ValueError(
            f"leaves of params have the first axes {counts}; it is that of the device's experts, "
            f"split by the in_spec P({mesh_axis!r})."
        )
    return next(iter(counts.values()))[0]
