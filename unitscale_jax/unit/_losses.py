"""The losses among the results of a function, and by how many items each is divided."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.errors import expected
from unitscale_jax.loss import Mean
from unitscale_jax.trace.program import TracedCall, evaluated_now, sliced
from unitscale_jax.unit._measure import LARGEST


class Term(NamedTuple):
    """How a loss is divided: the output that is its weight, or its known weight; its coefficient.

    A plain scalar is the mean of a loss already, whatever it was divided by.
    """

    weight: int | None
    known: float
    coef: float
    plain: bool


def losses_of(staged: TracedCall) -> dict[int, Term]:
    """The outputs that are losses, by position.

    Raises:
        ValueError: The function returns no loss.
    """
    result = staged.finish([_Output(k) for k in range(len(staged.closed.out_avals))])
    terms = result[0] if isinstance(result, tuple) and len(result) == 2 else result
    named = terms if isinstance(terms, Mapping) else {"loss": terms}
    found: dict[int, Term] = {}
    for name, term in named.items():
        total = term.total if isinstance(term, Mean) else term
        weight = term.weight if isinstance(term, Mean) else 1.0
        avals: list[Any] = list(staged.closed.out_avals)
        aval = avals[total.at] if isinstance(total, _Output) else None
        scalar = isinstance(term, Mean) or (aval is not None and aval.shape == ())
        if aval is None or not scalar or not jnp.issubdtype(aval.dtype, np.floating):
            raise ValueError(
                f"the function returned {_shown(term, aval)} for {name!r}; unit_scaled goes around "
                "a loss, which returns a scalar, a us.Mean or a dict of them. Put the loss inside."
            )
        known = 0.0 if isinstance(weight, _Output) else float(np.sum(weight))
        coef = term.coef if isinstance(term, Mean) and isinstance(term.coef, int | float) else 1.0
        at = weight.at if isinstance(weight, _Output) else None
        found[total.at] = Term(at, known, abs(float(coef)), not isinstance(term, Mean))
    return found


@dataclass(frozen=True)
class _Output:
    """Stands for an output of a program: its position."""

    at: int


def _shown(term: Any, aval: Any) -> str:
    if aval is not None:
        return f"an array {aval.dtype}{list(aval.shape)}"
    return expected("a term", term, "a loss").partition("; ")[0].removeprefix("a term is ")


def weights_of_losses(
    staged: TracedCall, losses: Mapping[int, Term], ratio: float
) -> dict[int, float]:
    """How many items each loss is a mean of, where all of them count; 1 for a plain scalar.

    A weight is data (how many tokens are real), and factors are no function of data. So it is
    counted for arguments of ones, which are masks that let everything through.
    """
    avals = staged.closed.out_avals
    wanted = [any(term.weight == k for term in losses.values()) for k in range(len(avals))]
    counted: dict[int, float] = {}
    if any(wanted):
        positions = [k for k, want in enumerate(wanted) if want]
        counted = dict(zip(positions, _counted(staged, wanted), strict=True))
    found = {}
    for position, term in losses.items():
        items = term.known if term.weight is None else counted.get(term.weight, 0.0)
        items = 1.0 if term.plain else max(items, 1.0) * ratio
        found[position] = items / term.coef if term.coef else items
    return found


def _counted(staged: TracedCall, wanted: Sequence[bool]) -> list[float]:
    avals: list[Any] = list(staged.closed.in_avals)
    results: list[Any] = list(staged.closed.out_avals)
    sizes = [float(math.prod(results[k].shape)) for k, w in enumerate(wanted) if w]
    if sum(math.prod(a.shape) for a in avals) > 64 * LARGEST:
        return sizes
    try:
        with evaluated_now():
            ones = [_ones(a) for a in avals]
            return [float(jnp.sum(x)) for x in sliced(staged.traced, wanted)(*ones)]
    except (TypeError, ValueError):  # such as an effect, or a key without a number
        return sizes


def _ones(aval: Any) -> jax.Array:
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), aval.shape)
    return jnp.ones(aval.shape, aval.dtype)
