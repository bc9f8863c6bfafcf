"""The picture of `Scales`: log2 of the RMS against program order, over the band of a format."""

import itertools
import math
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
    """Shows RMS 1, all high points, and low ones unless a few are far below the rest.

    The gradient of a key's bias is zero but for rounding, 1e-9: such a point would press all others
    into the upper half.
    """
    heights = sorted(y for p in points for y in (p.height, *p.turns) if y is not None)
    low, high = (heights[len(heights) // 100], heights[-1]) if heights else (0.0, 0.0)
    floor = min(low, math.log2(scales.format.min_subnormal)) - 6
    lowest = heights[0] if heights else 0.0
    axes.set_ylim(max(min(lowest, 0.0) - 1.5, floor), max(high, 0.0) + 1.5)
    axes.set_xlim(-1, max((p.at for p in points), default=0) + 2)


def _draw_off_scale(axes: "Axes", points: Sequence[_Point]) -> None:
    """At the lower edge zeros and what is far below the rest, at the upper infinities and NaN."""
    low, high = axes.get_ylim()
    off = [p for p in points if p.height is None or p.height < low]
    for point in off:
        y = high if point.height is None and point.row.rms != 0 else low
        color = _PASSES[point.row.direction][0]
        axes.plot(point.at, y, color=color, marker="x", ms=7, clip_on=False)
    if off:
        label = "zero or far below (lower edge),\nnot finite (upper edge)"
        axes.plot([], [], color="gray", marker="x", ls="", label=label)


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
    """(layer, first position, last) of neighbours in one layer, without a root that all share."""
    by_position = sorted({p.at: p.layer for p in points}.items())
    roots = {layer.split("/")[0] for _, layer in by_position if layer != "arguments"}
    root = f"{roots.pop()}/" if len(roots) == 1 else ""
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
    """Numbers at the worst rows, explained beside the picture, where nothing overlaps."""
    handles, labels = axes.get_legend_handles_labels()
    low = axes.get_ylim()[0]
    worst = [p for direction in _PASSES for p in _worst(points, direction)]
    lines = []
    for number, point in enumerate(worst, 1):
        at = (point.at, max(point.height or 0.0, low))
        color = _PASSES[point.row.direction][0]
        style: dict[str, Any] = {"fontsize": 8, "color": color, "fontweight": "bold"}
        axes.annotate(str(number), at, (5, 5), textcoords="offset points", **style)
        lines.append(f"{number}  {_name(point)}")
    axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    text = "\n".join(["farthest from an RMS of 1", "(lost: underflows or saturates):", *lines])
    axes.text(1.02, 0.0, text, transform=axes.transAxes, fontsize=8, va="bottom")


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
    return f"{of}{row.primitive}, {where}\n    RMS {row.rms:.2g}{note}"
