"""The one table of primitives: what sort of operation each is, and how a move moves axes.

Every analysis of the library reads these sets and lists nothing of its own. Where two of them kept
lists, the lists drifted apart: a frozen weight was a weight for one and unknown to the other.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from unitscale_jax.trace.program._walk import Site


def named(names: str) -> frozenset[str]:
    """A set of primitives, by their names."""
    return frozenset(names.split())


# ------------------------------------------------------------------------------------- products

PRODUCTS = named("dot_general conv_general_dilated ragged_dot_general")
"""Contractions of two operands; `product_of` says which dimensions are summed over."""

# ---------------------------------------------------------------------------------------- moves

PLACED = named("""
    sharding_constraint layout_constraint reshard mesh_cast device_put with_memory_space_constraint
""")
"""Moves that only say where a value lives."""

IN_PLACE = PLACED | named("""
    convert_element_type copy copy_p mark name optimization_barrier pcast pvary reduce_precision
    stop_gradient straight_through unit_scale unit_scale_by round_bwd
""")
"""Moves that leave every number at its position. A barrier moves each of its operands to the result
of its place; a factor of `unit_scale` belongs to the value as its scale does."""

CUTS = named("slice dynamic_slice split unstack rev tile")
"""Moves that take some positions along axes: once, several times, or in another order."""

SHAPED = named("reshape transpose broadcast_in_dim squeeze")
"""Moves that lay all positions out along other axes."""

JOINS = named("concatenate stack")
"""Moves of all operands into one result, each to positions of its own."""

MOVES = IN_PLACE | CUTS | SHAPED | JOINS
"""Primitives whose results hold the numbers of their first operand; of every operand in `JOINS`."""

SourceAxes: TypeAlias = list[list[int]]


def moved_axes(site: Site) -> SourceAxes:
    """For each axis of a move's result the axes of the operand that it is made of.

    An axis that is new, such as that of a `stack`, is made of none. An axis of size 1 of the
    operand is listed beside no larger one, since it adds no positions.

    Args:
        site: Where an equation in `MOVES` stands. Several results of one (`split`, `unstack`) have
            axes alike, and so have the operands of a join; a barrier of several operands leaves
            the axes of each as they are.

    Example:
        >>> from unitscale_jax.trace import trace
        >>> moved = lambda fn, *x: moved_axes(Site(trace(fn, *x).closed.jaxpr.eqns[0], 0))
        >>> w = jnp.ones((4, 8))
        >>> moved(jnp.transpose, w), moved(jnp.ravel, w), moved(lambda w: w[None], w)
        ([[1], [0]], [[0, 1]], [[], [0], [1]])
    """
    rank = len(site.shapes[0])
    make = _MOVED_AXES.get(site.name)
    return [[k] for k in range(rank)] if make is None else make(site, rank)


def _transposed(site: Site, rank: int) -> SourceAxes:
    del rank
    return [[k] for k in site.eqn.params["permutation"]]


def _squeezed(site: Site, rank: int) -> SourceAxes:
    return [[k] for k in range(rank) if k not in site.eqn.params["dimensions"]]


def _broadcast(site: Site, rank: int) -> SourceAxes:
    del rank
    where = list(site.eqn.params["broadcast_dimensions"])
    axes = range(len(site.result_shapes[0]))
    return [[where.index(k)] if k in where else [] for k in axes]


def _reshaped(site: Site, rank: int) -> SourceAxes:
    del rank
    old, new = site.shapes[0], site.result_shapes[0]
    sources: SourceAxes = [[] for _ in new]
    for before, after in segments(old, new):
        real = [axis for axis in before if old[axis] > 1]
        for k in after:
            if len(before) == len(after) == 1:
                sources[k] = before
            elif new[k] > 1:
                sources[k] = real
    return sources


def _stacked(site: Site, rank: int) -> SourceAxes:
    at = site.eqn.params["axis"]
    return [[k] for k in range(at)] + [[]] + [[k] for k in range(at, rank)]


def _unstacked(site: Site, rank: int) -> SourceAxes:
    return [[k] for k in range(rank) if k != site.eqn.params["axis"]]


_MOVED_AXES: dict[str, Callable[[Site, int], SourceAxes]] = {
    "transpose": _transposed,
    "squeeze": _squeezed,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshaped,
    "stack": _stacked,
    "unstack": _unstacked,
}


def cut_axes(site: Site) -> list[int]:
    """Axes of a move's operand along which a result has not each position once, in their order."""
    if site.name == "rev":
        return list(site.eqn.params["dimensions"])
    if site.name not in CUTS | {"broadcast_in_dim"}:
        return []
    old, new = site.shapes[0], site.result_shapes[0]
    kept = [of for of, n in zip(moved_axes(site), new, strict=True) if of and n == old[of[0]]]
    return [axis for axis in range(len(old)) if [axis] not in kept]


def moved(site: Site, inputs: Sequence[Any]) -> list[Sequence[Any]] | None:
    """For each result of a move the values whose numbers it holds; None for any other equation.

    Args:
        site: Where the equation stands.
        inputs: Anything, one for each operand.
    """
    if site.name not in MOVES:
        return None
    if site.name == "optimization_barrier":
        return [[x] for x in inputs]
    return [inputs if site.name in JOINS else inputs[:1]] * len(site.eqn.outvars)


def segments(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The shortest runs of axes of two shapes that have the same size; axes of size 1 alone.

    Example:
        >>> list(segments((6, 4, 5), (2, 3, 20)))
        [([0], [0, 1]), ([1, 2], [2])]
    """
    i = j = 0
    while i < len(old) or j < len(new):
        # The smaller run grows until both have one size: 6 | 2, then 6 | 2 · 3. With an axis of
        # size 0 products say nothing of where a run ends, and all that is left is one.
        stop, end = (len(old), len(new)) if 0 in (*old, *new) else (i + 1, j + 1)
        while (size := math.prod(old[i:stop])) != (other := math.prod(new[j:end])):
            stop, end = (stop + 1, end) if size < other else (stop, end + 1)
        stop, end = min(stop, len(old)), min(end, len(new))
        yield list(range(i, stop)), list(range(j, end))
        i, j = stop, end


# ----------------------------------------------------------------- each position by itself
# By what they make of zeros, which are the marks that removed channels leave in a computation.

IDENTITIES = IN_PLACE - {"optimization_barrier"}
"""Zero where the first operand is; the others are scalars, or not seen in the value."""

VANISHING = named("""
    add sub add_any neg abs sign floor ceil round max min or xor gt lt ne square sqrt cbrt
    sin tan sinh tanh asin atan asinh atanh atan2 erf erf_inv expm1 log1p bessel_i1e
    real imag conj complex population_count
""")
"""Zero where all operands are."""

SHIFTS = named("shift_left shift_right_logical shift_right_arithmetic")
MULTIPLICATIONS = named("mul and")
QUOTIENTS = named("div rem")
SINGULAR = named("log rsqrt pow digamma lgamma acosh")

FINITE = named("""
    exp exp2 logistic cos cosh acos erfc bessel_i0e not clz is_finite eq ge le clamp nextafter
""")
"""Some finite number where the operands are zero."""

ELEMENTWISE = (
    IDENTITIES | VANISHING | SHIFTS | MULTIPLICATIONS | QUOTIENTS | SINGULAR | FINITE
) | named("integer_pow select_n")
"""Primitives that compute each position from the same position."""

ADDITIONS = named("add add_any sub")
"""Of two values; what a bias or a residual stream is added by."""

# ----------------------------------------------------------------------- along axes, over devices

REDUCTIONS = named("""
    reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin
""")
CUMULATIVE = named("cumsum cumprod cummax cummin cumlogsumexp")
WINDOWS = named("reduce_window_sum reduce_window_max reduce_window_min")
SCATTERS = named("scatter scatter-add scatter-sub scatter-mul scatter-min scatter-max")

DEVICE_REDUCTIONS = named("psum psum2 psum_invariant pmax pmin")
"""Of each operand to the result of its place, which has its shape."""

COLLECTIVES = DEVICE_REDUCTIONS | named("""
    all_gather all_gather_invariant all_gather_reduced all_to_all pbroadcast ppermute reduce_scatter
""")
"""Messages between devices: from each operand to the result of its place."""
