"""Width as an assertion: activations and their changes in training keep their size.

    RMS(activation) ~ width^slope,    slope = 0

The coordinate check of https://arxiv.org/abs/2203.03466: if activations at the start, and what a
few steps change of them, are as large in a wide model as in a narrow one, a learning rate that is
good for the one is good for the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_callable, expected
from unitscale_jax.loss import value_and_grad
from unitscale_jax.optimizer import check_optimizer
from unitscale_jax.tables import Tabular
from unitscale_jax.testing._activations import Activation, activations
from unitscale_jax.trace.program import Site
from unitscale_jax.trace.rewrite import captured
from unitscale_jax.typing import Batch, Loss, Params
from unitscale_jax.unit import parametrized, roles

OptimizerOf: TypeAlias = Callable[[Any], optax.GradientTransformation]
"""From the roles of a model's parameters to its optimizer."""


def adam(roles: Any) -> optax.GradientTransformation:
    """Adam under u-muP, at a learning rate of 1."""
    return parametrized(optax.scale_by_adam(), roles, 1.0)


def check_width(
    fn_of_width: Callable[[int], tuple[Loss, Params, Batch]],
    widths: Sequence[int] = (32, 64, 128, 256, 512),
    *,
    optimizer: OptimizerOf | optax.GradientTransformation = adam,
    steps: int = 4,
    tolerance: float | None = 0.05,
) -> "WidthReport":
    """Asserts that activations, and their changes by some steps, are as large at every width.

    Activations are what layers make, with their factors and biases, lookups, products of
    activations, and sums of two paths; what is inside of while loops and of custom derivatives is
    not seen. Each has two rows: its RMS at the start, and the RMS of its change by all the steps.

    Three kinds of rows shrink by design. *Logits at the start* are width^-1/2 under u-muP; their
    change is not, once it outweighs the start: take steps that are large enough. *Changes of an
    embedding* are width^-1/2, by its learning rate; and what adds an embedding up with other
    things approaches its size from above. So the first two may have any slope from -1/2 to 0, and
    a model with an embedding may need a wider tolerance.

    Args:
        fn_of_width: From a width to `(loss, params, batch)`: a loss station, parameters at their
            start, and a batch, alike for all widths. Many rows, and classes that can be told
            apart, make slopes precise.
        widths: At least two.
        optimizer: From roles, which are found here, to an optax transform:
            `lambda roles: us.unit.parametrized(..)`; or one transform for all widths.
        steps: How many steps are taken on the batch.
        tolerance: How far from 0 a slope may be; None asserts nothing.

    Returns:
        A report with a row for each activation, at the start and of its change; it prints as a
        table.

    Raises:
        AssertionError: A slope is further off; the message has a line for each such row.
        ValueError: Models of two widths have different activations.

    Example:
        >>> def model(width):
        ...     *keys, key = jax.random.split(jax.random.key(0), 4)
        ...     shapes = {"in": (16, width), "mid": (width, width), "out": (width, 8)}
        ...     params = {n: jax.random.normal(k, shapes[n]) for n, k in zip(shapes, keys)}
        ...     def loss(p, x):
        ...         h = us.unit.gelu(us.unit.linear(x, p["in"]))
        ...         h = us.unit.gelu(us.unit.linear(h, p["mid"]))
        ...         return us.unit.cross_entropy(us.unit.readout(h, p["out"]), x[:, :8].argmax(1))
        ...     return loss, params, jax.random.normal(key, (64, 16))
        >>> slopes = lambda report: {(r.name, r.of): abs(round(r.slope, 1)) for r in report.rows}
        >>> found = slopes(us.testing.check_width(model, (64, 256), tolerance=0.1))
        >>> found["mid", "start"], found["out", "start"], found["mid", "change"]
        (0.0, 0.5, 0.0)
        >>> plain = us.testing.check_width(model, (64, 256), optimizer=optax.adam(0.01), \
tolerance=None)
        >>> slopes(plain)["mid", "change"] > 0.2
        True
    """
    check_callable("fn_of_width", fn_of_width)
    if len(set(widths)) < 2:
        raise ValueError(expected("widths", tuple(widths), "two different ones or more"))
    runs = {width: _run(fn_of_width, width, optimizer, steps) for width in widths}
    _check_alike({width: run.found for width, run in runs.items()})
    at = tuple(runs)
    starts, changes = zip(*((run.start, run.change) for run in runs.values()), strict=True)
    found = runs[at[0]].found
    rows = [_row(of, "start", at, rms) for of, *rms in zip(found, *starts, strict=True)]
    rows += [_row(of, "change", at, rms) for of, *rms in zip(found, *changes, strict=True)]
    report = WidthReport(at, tuple(rows))
    if tolerance is not None:
        _assert_flat(report, tolerance)
    return report


@dataclass(frozen=True)
class WidthRow:
    """How the size of one activation, or of its change, depends on width.

    Attributes:
        name: The parameter that makes it; where none does "sum", or of a product its named scope,
            or "attention" or "dot".
        made: "product", "lookup" or "sum".
        of: What is measured: the activation at the "start", or its "change" by all steps.
        rms: Its RMS at each width.
        slope: Of log RMS over log width, by least squares; not a number if some RMS is 0.
        lowest: The least slope by design: -1/2 of logits at the start and of an embedding's
            change, else 0. The greatest is 0.
    """

    name: str
    made: str
    of: Literal["start", "change"]
    rms: tuple[float, ...]
    slope: float
    lowest: float

    def is_flat(self, tolerance: float) -> bool:
        """Whether the slope is what it is to be by design; what is always zero is."""
        return self.lowest - tolerance <= self.slope <= tolerance or not any(self.rms)


@dataclass(frozen=True)
class WidthReport(Tabular):
    """Sizes of activations by width; printed, a table.

    Attributes:
        widths: The widths, in the order of `WidthRow.rms`.
        rows: All activations at the start, then their changes, each in order of evaluation.
    """

    widths: tuple[int, ...]
    rows: tuple[WidthRow, ...]

    def cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """One line for each row: its RMS at each width, its slope, and what that is by design."""

        def line(row: WidthRow) -> list[str]:
            sizes = [f"{x:.3g}" for x in row.rms]
            design = f"{row.lowest:g} to 0" if row.lowest else "0"
            return [row.name, row.made, row.of, *sizes, f"{row.slope:+.3f}", design]

        titles = ["activation", "made by a", "of", *(f">{width}" for width in self.widths)]
        return [*titles, ">slope", ">by design"], [line(row) for row in self.rows]


class _Run(NamedTuple):
    """The activations at one width, the RMS of each at the start, and that of its change."""

    found: list[Activation]
    start: list[float]
    change: list[float]


def _run(fn_of_width: Callable[[int], Any], width: int, optimizer: Any, steps: int) -> _Run:
    loss, params, batch = fn_of_width(width)
    observed = activations(loss, params, batch)

    def pick(site: Site, operands: list[Any], results: list[Any]) -> Any:
        del operands
        return results[0] if site.place in observed else None

    seen = jax.jit(lambda p: {c.place: c.value for c in captured(loss, pick)(p, batch)[1]})
    before, after = seen(params), seen(_trained(loss, params, batch, optimizer, steps))
    places = [place for place in observed if place in before]
    change = jax.tree.map(jnp.subtract, after, before)
    start, changed = ([_rms(values[place]) for place in places] for values in (before, change))
    return _Run([observed[place] for place in places], start, changed)


def _check_alike(found: dict[int, list[Activation]]) -> None:
    names = {width: ", ".join(of.name for of in each) for width, each in found.items()}
    width, *others = found
    for other in others:
        if found[other] != found[width]:
            raise ValueError(
                f"fn_of_width({other}) has the activations {names[other]}, and "
                f"fn_of_width({width}) has {names[width]}. Make models that differ in width alone."
            )


def _trained(loss: Loss, params: Params, batch: Batch, optimizer: Any, steps: int) -> Params:
    is_transform = isinstance(optimizer, optax.GradientTransformation)
    tx = optimizer if is_transform else optimizer(roles(loss, params, batch))
    check_optimizer(tx, "check_width")
    grad_fn = value_and_grad(loss)

    @jax.jit
    def step(params: Params, state: Any) -> tuple[Params, Any]:
        grads = grad_fn(params, batch)[2]
        with jax.numpy_dtype_promotion("standard"):  # Adam computes float ** int32
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def _rms(x: jax.Array) -> float:
    return float(jnp.sqrt(jnp.mean(jnp.square(x.astype(trees.wide(x.dtype))))))


def _row(
    of: Activation, when: Literal["start", "change"], widths: Sequence[int], rms: Sequence[float]
) -> WidthRow:
    shrinks = (of.made == "product" and of.last) if when == "start" else of.made == "lookup"
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = np.log(widths), np.log(rms)
        slope = float(np.sum((x - x.mean()) * (y - y.mean())) / np.sum((x - x.mean()) ** 2))
    return WidthRow(of.name, of.made, when, tuple(rms), slope, -0.5 if shrinks else 0.0)


def _assert_flat(report: WidthReport, tolerance: float) -> None:
    bad = [row for row in report.rows if not row.is_flat(tolerance)]
    if bad:
        lines = [_complaint(row, report.widths, tolerance) for row in bad]
        raise AssertionError("\n  ".join(["activations change their size with width", *lines]))


def _complaint(row: WidthRow, widths: tuple[int, ...], tolerance: float) -> str:
    what = "at the start" if row.of == "start" else "the change"
    design = f"between {row.lowest:g} and 0" if row.lowest else "0"
    return (
        f"{row.name}, {what}: slope {row.slope:+.3f}, expected {design} within {tolerance:g}; "
        f"RMS {row.rms[0]:.3g} at {widths[0]}, {row.rms[-1]:.3g} at {widths[-1]}"
    )
