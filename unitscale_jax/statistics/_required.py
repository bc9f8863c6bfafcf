"""Checks by the consumers of statistics: these are of this model, and have what it takes."""

import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_type
from unitscale_jax.statistics._stat import Stat


def check_names(stats: Mapping[str, Any] | None, names: Collection[str]) -> None:
    """Checks that statistics are of a model with these parameters.

    Raises:
        ValueError: They name others, whose statistics would be lost silently.
    """
    check_type("stats", {} if stats is None else stats, Mapping, "what us.calibrate returns")
    odd = [] if stats is None else sorted(stats.keys() - set(names))
    if odd:
        raise ValueError(
            f"stats are of {', '.join(odd)}, and there is no such parameter. There are "
            f"{', '.join(names)}; calibrate the function that they are used for."
        )


def required(
    stats: Mapping[str, Stat], kind: str, params: Any, names: Iterable[str] | None = None
) -> None:
    """Checks that statistics have a kind of numbers of input channels, of these parameters.

    Args:
        stats: Of `calibrate`.
        kind: A kind of `CHANNELS`; second moments have squares, too.
        params: The parameters they are to be used for.
        names: Of those that need it; None: all that `stats` have.

    Raises:
        ValueError: They lack the kind, and which `collect=` gives it; or they are of other
            parameters, or of other shapes.
    """
    check_type("stats", stats, Mapping, "what us.calibrate or us.statistics.observed returns")
    leaves = trees.named_leaves(params, is_leaf=trees.is_compound)
    check_names(stats, leaves)
    names = list(stats if names is None else names)

    def has_kind(name: str) -> bool:
        if name not in stats:
            return False
        stat = stats[name]
        return (stat.squares if kind == "squares" else stat.numbers.get(kind)) is not None

    missing = [name for name in names if not has_kind(name)]
    if missing:
        raise ValueError(
            f"stats have no {_NOUNS[kind]} of what meets {', '.join(missing)}: calibrate with "
            f"collect=('{kind}',). What has none (a lookup, a grouped convolution), leave out."
        )
    for name in names:
        _check_shape(name, np.shape(leaves[name]), stats[name])


_NOUNS = {"channels": "channels", "squares": "squares", "hessian": "second moments"}


def _check_shape(name: str, shape: tuple[int, ...], stat: Stat) -> None:
    layout = stat.layout
    found = np.shape(stat.peak if stat.squares is None else stat.squares)
    inner = layout.channels if stat.squares is None else layout.contracted
    axes = (*layout.batch, *inner)
    if all(-axis <= len(shape) for axis in axes):
        sizes = [shape[axis] for axis in layout.batch]
        if found == (*sizes, math.prod(shape[axis] for axis in inner)):
            return
    raise ValueError(
        f"{name} has shape {shape}, and the stats of what meets it {found} (axes {axes}); "
        "calibrate this model."
    )


def warn_unseen(name: str, stat: Stat, done: str) -> None:
    """Warns where no row used any input of a whole layer or expert.

    Args:
        name: Of the parameter.
        stat: Of what meets it.
        done: What is done with the weights, as "rounded to nearest".
    """
    unseen = stat.unseen
    empty = np.flatnonzero(unseen.all(-1)).tolist()
    if not empty:
        return
    some = ", ".join(map(str, empty[:8])) + ", .." * (len(empty) > 8)
    which = f"layer or expert {some} of {len(unseen)} of {name}" if len(unseen) > 1 else name
    warnings.warn(
        f"nothing but zeros met {which}, so the data says nothing about these weights: they are "
        f"{done}. Calibrate on batches that use them.",
        stacklevel=3,
    )
