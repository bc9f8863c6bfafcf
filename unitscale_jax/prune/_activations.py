"""What meets the parameters that are pruned: sums of squares, or second moments, over batches.

    squares_j = sum over rows of x_j^2        hessian = sum over rows of x x^T

A weight matters as much as what it multiplies: Wanda ranks |W_ij| ||X_j||, SparseGPT minimizes
||X (W' - W)||^2, and both need no more of the data than these sums.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import rules as named_rules, tree as trees
from unitscale_jax.errors import expected
from unitscale_jax.prune._spec import SparsitySpec, selected
from unitscale_jax.rules import Pattern
from unitscale_jax.trace import (
    Layout,
    Meeting,
    Observer,
    Observers,
    count_rows,
    input_rows,
    layout_of,
    meetings,
    observable,
    observe,
    over_batches,
    second_moments,
    stage,
    valid_rows,
)

What: TypeAlias = Literal["squares", "hessian"]
Valid: TypeAlias = Callable[..., Any]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "squares", "hessian"],
    meta_fields=["layout"],
)
@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of the operand that meets a parameter.

    Leading axes are those of stacked layers; `squares` and `hessian` then have the batch axes of
    the product (experts).

    Attributes:
        rows: (layers..): how many rows were seen, of a convolution how many positions.
        squares: (batch.., K): sums of x_j^2, K in the order of the parameter's contracted axes.
        hessian: (batch.., K, K): sums of x x^T; None where only squares were asked for.
        layout: Which axes of the parameter these are.
    """

    rows: Any
    squares: Any
    hessian: Any = None
    _: KW_ONLY
    layout: Layout

    def joined(self, other: "Moments") -> "Moments":
        """Both together: sums add up."""
        return jax.tree.map(lambda a, b: a + b, self, other)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Moments(Observer[Moments]):
    """Measures what meets one parameter."""

    what: What

    reductions: ClassVar[Mapping[str, Any]] = {}

    def measure(self, meeting: Meeting, x: jax.Array) -> dict[str, Any]:
        """Sums of one product."""
        v = jax.lax.stop_gradient(x).astype(jnp.float32)
        keep = valid_rows(self.name, meeting, v, self.mask)
        seen = v if keep is None else jnp.where(keep, v, np.float32(0))
        rows = input_rows(self.name, self.layout, meeting, seen)
        count = {"rows": count_rows(meeting, v, self.mask)}
        if self.what == "hessian":
            return count | {"hessian": second_moments(rows)}
        return count | {"squares": jnp.sum(rows * rows, axis=-2)}

    def made(self, value: dict[str, Any]) -> Moments:
        """The sums as `Moments`; squares are the diagonal of the second moments."""
        if "hessian" in value:
            value = value | {"squares": jnp.diagonal(value["hessian"], axis1=-2, axis2=-1)}
        return Moments(**value, layout=self.layout)


def calibrate(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    spec: SparsitySpec | Sequence[Pattern],
    *,
    what: What = "squares",
    valid: Valid | None = None,
) -> dict[str, Moments]:
    """Sums over batches of what meets the parameters that are to be pruned.

    Args:
        fn: A function whose first argument is the parameters.
        params: Arrays.
        batches: Each a tuple of the inputs of `fn` after the parameters, or its only input.
        spec: Parameters it gives a pattern, or patterns of their names.
        what: `"squares"` for `wanda` and `owl_ratios`, `"hessian"` for `sparsegpt`, too.
        valid: `valid(*inputs)` is true where a row counts, (batch,) or (batch, time), and false for
            padding; the leading axes of what meets a parameter must be these.

    Returns:
        Parameter -> `Moments`, summed in float32 within a batch and float64 over them, as NumPy
        arrays. A parameter of several products has the sums of all; under a scan over stacked
        layers each layer has its own.

    Raises:
        ValueError: There are no batches; a pattern matches nothing; a parameter meets no product,
            or one whose input channels are not its own axes (lookups, grouped convolutions);
            what meets a parameter is not finite, or nothing met it.

    Law: batches may be split and ordered at will.

    Example:
        >>> fn = lambda params, x: x @ params["w"]
        >>> x = jnp.array([[3.0, 0.0], [4.0, 2.0]])
        >>> moments = calibrate(fn, {"w": jnp.ones((2, 5))}, [x[:1], x[1:]], ["w"])
        >>> moments["w"].squares.tolist(), int(moments["w"].rows)
        ([25.0, 4.0], 2)
    """
    if what not in ("squares", "hessian"):
        raise ValueError(expected("`what`", what, ("squares", "hessian")))
    names = _chosen(spec, params)

    def measured(params: Any, *inputs: Any) -> tuple[Any, dict[str, Moments]]:
        mask = None if valid is None else jnp.asarray(valid(*inputs))
        observers = _observers(names, what, mask, fn, params, *inputs)
        return observe(fn, observers, params, *inputs)

    found, _ = over_batches(measured, params, batches, _on_host, Moments.joined)
    for name, moments in found.items():
        _check(name, moments)
    return found


def check_moments(moments: Mapping[str, Moments], params: Any) -> None:
    """Whether moments are of these parameters.

    Raises:
        ValueError: They name others, or others of that name.
    """
    leaves = trees.named_leaves(params, is_leaf=trees.is_compound)
    odd = sorted(moments.keys() - leaves.keys())
    if odd:
        raise ValueError(
            f"moments are of {', '.join(odd)}, and there is no such parameter. There are "
            f"{', '.join(leaves)}; calibrate the function that is pruned."
        )
    for name, of in moments.items():
        shape, layout = np.shape(leaves[name]), of.layout
        known = max((-axis for axis in (*layout.batch, *layout.contracted)), default=0)
        size = lambda axes, shape=shape: [shape[axis] for axis in axes]
        fits = known <= len(shape) and np.shape(of.squares) == (
            *size(layout.batch),
            int(np.prod(size(layout.contracted), dtype=int)),
        )
        if not fits:
            raise ValueError(
                f"{name} has shape {shape}, and moments of what meets it {np.shape(of.squares)} "
                f"(axes {(*layout.batch, *layout.contracted)}); calibrate this model."
            )


def check_second(names: Iterable[str], moments: Mapping[str, Moments]) -> None:
    """Whether there are second moments of what meets some parameters.

    Raises:
        ValueError: There are not.
    """
    missing = [name for name in names if name not in moments or moments[name].hessian is None]
    if missing:
        raise ValueError(
            f"there are no second moments of what meets {', '.join(missing)}. Calibrate with "
            "what='hessian'; what has none (a lookup, a grouped convolution), leave out of the "
            "patterns."
        )


def matrices_of(of: Moments) -> jax.Array:
    """float32 (batch, K, K)."""
    h = jnp.asarray(of.hessian, jnp.float32)
    return h.reshape(-1, *h.shape[-2:])


def _chosen(spec: SparsitySpec | Sequence[Pattern], params: Any) -> list[str]:
    if isinstance(spec, SparsitySpec):
        return list(selected(spec, params))
    found = named_rules.match([(p, True) for p in spec], trees.names(params), default=False)
    return [name for name, named in found.items() if named]


def _observers(
    names: Sequence[str], what: What, mask: Any, fn: Callable[..., Any], params: Any, *inputs: Any
) -> Observers[Moments]:
    found = meetings(stage(fn, params, *inputs), params)
    met = {name: observable(found.get(name, [])) for name in names}
    missing = [name for name in names if not met[name]]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: meets no product in this function, so there is nothing to "
            "calibrate (a lookup, a bias, a norm's scale). Leave it out: name the parameters that "
            "do by patterns, {'**/kernel': ..}."
        )
    leaves, out = trees.named_leaves(params), {}
    for name in names:
        layout = layout_of(name, np.shape(leaves[name]), met[name])
        out[name] = _Moments(name=name, layout=layout, mask=mask, what=what), met[name]
    return out


def _on_host(moments: Moments) -> Moments:
    return jax.tree.map(_widened, moments)


def _widened(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.float64 if x.dtype == np.float32 else np.int64)


def _check(name: str, moments: Moments) -> None:
    sums = moments.squares if moments.hessian is None else moments.hessian
    if not np.isfinite(sums).all():
        raise ValueError(
            f"what meets {name} is not finite in these batches (or its squares are not, in "
            "float32); mend the batches, or leave the parameter out."
        )
    if (moments.rows == 0).any():
        raise ValueError(
            f"nothing met {name} in these batches: a branch that was never taken, or no valid "
            "rows. Give batches that reach it, or leave it out."
        )
