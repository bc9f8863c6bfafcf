"""The picture of `Scales`: log2 of the RMS against program order, over the band of a format."""

import itertools
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from unitscale_jax.trace.program import MOVES
from unitscale_jax.unit._scales import ScaleRow, Scales, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_TICKS = 30  # of a picture 18 inches wide, and so that a slanted label has a line's height
_LONGEST = 34  # characters of a name; a longer one loses words in its middle
_NAMED = 4  # rows of each pass that have names
_PASSES = {"forward": ("#0072b2", "o"), "backward": ("#d55e00", "v")}  # told apart by all eyes
_BAND = "#009e73"


def figure(scales: Scales) -> "Figure":
    """Draws the rows of a report; see `Scales.plot`."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "Scales.plot draws with matplotlib, which is not installed: pip install matplotlib, "
            "or unitscale_jax[examples]."
        ) from None
    points = _points(scales.rows)
    across = len({point.at for point in points})
    fig = Figure(figsize=(min(18.0, max(10.0, 5 + across / 20)), 6.0), layout="constrained")
    axes = fig.add_subplot()
    _draw_band(axes, scales)
    for direction in _PASSES:
        _draw_pass(axes, [p for p in points if p.row.direction == direction], direction)
    _limit(axes, scales, points)
    _draw_off_scale(axes, points)
    _name_layers(axes, points)
    _name_worst(axes, points)
    axes.set_title(f"Size of values and gradients, and what {title(scales.format)} holds")
    axes.set_xlabel("values in program order, by layer (reshapes, casts and other moves left out)")
    axes.set_ylabel("log2 of the RMS")
    return fig


class _Point(NamedTuple):
    """A row in the picture.

    Attributes:
        row: What it shows.
        at: Position among the values that are drawn.
        layer: The named scope, or the module of the last parameter met.
    """

    row: ScaleRow
    at: int
    layer: str

    @property
    def height(self) -> float | None:
        """log2 of the RMS; None of zeros, and of what is not finite."""
        return next(iter(_logs([self.row.rms])), None)

    @property
    def turns(self) -> list[float]:
        """log2 of the RMS of the turns of a scan, of those that have one."""
        return _logs(self.row.turns)


def _logs(sizes: Sequence[float]) -> list[float]:
    return [math.log2(x) for x in sizes if 0 < x < math.inf]


def _points(rows: Sequence[ScaleRow]) -> list[_Point]:
    """Rows but for moves, whose RMS is that of what they move, in program order."""
    drawn = [row for row in rows if row.primitive not in MOVES]
    orders = sorted({row.order for row in drawn})
    at = {order: k for k, order in enumerate(orders)}
    layers = _layers(rows)
    return [_Point(row, at[row.order], layers[row.order]) for row in drawn]


def _layers(rows: Sequence[ScaleRow]) -> dict[int, str]:
    """The layer of each value by its order, across moves, since these meet the parameters."""
    layers: dict[int, str] = {}
    for row in sorted(rows, key=lambda row: row.order):
        last = next(reversed(layers.values()), "arguments")
        parameter = row.parameter.partition(", ")[0]
        module = parameter.rpartition("/")[0] or parameter
        # `jnp.einsum` names its products by their subscripts, which are no layer.
        scope = "/".join(part for part in row.scope.split("/") if "->" not in part)
        argument = row.primitive in ("parameter", "input")
        layers[row.order] = "arguments" if argument else scope or module or last
    return layers


def _short(name: str) -> str:
    """A name without words in its middle, as far as it is too long."""
    first, *rest = name.split("/")
    kept = next((k for k in range(len(rest)) if len("/".join(rest[k:])) < _LONGEST - len(first)), 0)
    return "/".join([first, *([".."] if kept else []), *rest[kept:]])[: _LONGEST + 3]


# ---------------------------------------------------------------------------------- what is drawn


def _draw_band(axes: "Axes", scales: Scales) -> None:
    """Normal numbers, which have all bits of the mantissa, and below them the subnormal ones."""
    spec = scales.format
    least, normal, top = map(math.log2, (spec.min_subnormal, spec.min_normal, spec.max))
    name = title(spec)
    axes.axhspan(normal, top, color=_BAND, alpha=0.13, lw=0, label=f"normal numbers of {name}")
    if least < normal:
        axes.axhspan(least, normal, color=_BAND, alpha=0.05, lw=0, label="its subnormal numbers")
    axes.axhline(0, color="black", lw=0.7, ls=":", label="RMS 1")


def _draw_pass(axes: "Axes", points: Sequence[_Point], direction: str) -> None:
    color, marker = _PASSES[direction]
    known = sorted((p for p in points if p.height is not None), key=lambda p: p.at)
    label = {"forward": "values (forward)", "backward": "gradients (backward)"}[direction]
    xs, ys = [p.at for p in known], [p.height or 0.0 for p in known]
    axes.plot(xs, ys, color=color, lw=0.8, alpha=0.45)
    axes.plot(xs, ys, color=color, marker=marker, ms=4, ls="", label=label)
    spans = [(p.at, min(p.turns), max(p.turns)) for p in known if p.turns]
    if spans:
        label = f"turns of a scan ({direction})"
        axes.vlines(*zip(*spans, strict=True), color=color, lw=2.5, alpha=0.35, label=label)


def _limit(axes: "Axes", scales: Scales, points: Sequence[_Point]) -> None:
    """Shows RMS 1 and all points, unless a few are far from the rest.

    The gradient of a key's bias is zero but for rounding, 1e-9, and what a mask fills in is -1e9:
    such points would press all others into a line.
    """
    heights = sorted([0.0, *(y for p in points for y in (p.height, *p.turns) if y is not None)])
    few = len(heights) // 25
    spec = scales.format
    least, most = max(math.log2(spec.min_subnormal), -16.0), min(math.log2(spec.max), 16.0)
    low, high = min(heights[few], least) - 6, max(heights[-1 - few], most) + 6
    axes.set_ylim(max(heights[0] - 1.5, low), min(heights[-1] + 1.5, high))
    axes.set_xlim(-1, max((p.at for p in points), default=0) + 2)


def _draw_off_scale(axes: "Axes", points: Sequence[_Point]) -> None:
    """At the edges what is beyond them: zeros at the lower one, infinities and NaN at the upper."""
    off = [(p, y) for p in points if (y := _inside(axes, p)) != p.height]
    for point, y in off:
        color = _PASSES[point.row.direction][0]
        axes.plot(point.at, y, color=color, marker="x", ms=7, clip_on=False)
    if off:
        label = "beyond the edge; zero (below), not finite (above)"
        axes.plot([], [], color="gray", marker="x", ls="", label=label)


def _inside(axes: "Axes", point: _Point) -> float:
    """The height of a point, or that of the edge it is beyond."""
    low, high = axes.get_ylim()
    if point.height is None:
        return low if point.row.rms == 0 else high
    return min(max(point.height, low), high)


# ---------------------------------------------------------------------------------- what has names


def _name_layers(axes: "Axes", points: Sequence[_Point]) -> None:
    """A line between each two layers, and in the middle of each its name, if there is room."""
    groups = _groups(points)
    for _, first, _ in groups[1:]:
        axes.axvline(first - 0.5, color="gray", lw=0.5, alpha=0.35)
    across = max((p.at for p in points), default=0) + 1
    named = _spread(groups, max(1.0, across / _MOST_TICKS))
    axes.set_xticks([center for center, _ in named])
    names = [_short(name) for _, name in named]
    axes.set_xticklabels(names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.tick_params(axis="x", length=0)


def _groups(points: Sequence[_Point]) -> list[tuple[str, int, int]]:
    """(layer, first position, last) of neighbours in one layer, without what all names share."""
    by_position = sorted({p.at: p.layer for p in points}.items())
    paths = [layer.split("/") for _, layer in by_position if layer != "arguments"]
    shared = os.path.commonprefix([path[:-1] for path in paths])  # of words, for these are lists
    root = "".join(f"{word}/" for word in shared)
    groups = []
    for name, run in itertools.groupby(by_position, lambda at: at[1].removeprefix(root)):
        positions = [at for at, _ in run]
        groups.append((name, positions[0], positions[-1]))
    return groups


def _spread(groups: Sequence[tuple[str, int, int]], apart: float) -> list[tuple[float, str]]:
    """Centers and names of groups, the widest first, as far as they are `apart` from each other."""
    chosen: list[tuple[float, str]] = []
    for name, first, last in sorted(groups, key=lambda group: group[1] - group[2]):
        center = (first + last) / 2
        if all(abs(center - other) >= apart for other, _ in chosen):
            chosen.append((center, name))
    return chosen


def _name_worst(axes: "Axes", points: Sequence[_Point]) -> None:
    """Numbers at the worst rows, explained in the legend, where nothing overlaps."""
    axes.plot([], [], ls="", label="farthest from an RMS of 1\n(lost: underflows or saturates):")
    worst = [p for direction in _PASSES for p in _worst(points, direction)]
    for number, point in enumerate(worst, 1):
        color, at = _PASSES[point.row.direction][0], (point.at, _inside(axes, point))
        style: dict[str, Any] = {"fontsize": 8, "color": color, "fontweight": "bold"}
        offset = (5, 5) if at[1] < axes.get_ylim()[1] else (6, -12)  # below the title
        axes.annotate(str(number), at, offset, textcoords="offset points", **style)
        axes.plot([], [], color=color, marker=f"${number}$", ls="", label=_name(point))
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8)


def _worst(points: Sequence[_Point], direction: str) -> list[_Point]:
    """The rows of a pass whose RMS is farthest from 1, one for each height in a layer."""
    known = [p for p in points if p.row.direction == direction and p.height is not None]
    known.sort(key=lambda p: -abs(p.height or 0))
    apart = {(p.layer, round(p.height or 0)): p for p in reversed(known)}
    return sorted(apart.values(), key=lambda p: -abs(p.height or 0))[:_NAMED]


def _name(point: _Point) -> str:
    row = point.row
    lost = row.underflow + row.saturated
    note = f", {100 * lost:.0f} % lost" if lost >= 0.005 else ""
    of = "gradient of " if row.direction == "backward" else ""
    where = _short(row.parameter or point.layer)
    return f"{of}{row.primitive}, {where}\nRMS {row.rms:.2g}{note}"
