"""GPTQ: rounding that makes up for itself, column by column.

    H = 2/n sum x x^T + damp mean(diag H) I,        U upper triangular, U^T U = H^-1
    for k ascending:  q_k = Q(W_k),    W_j -= U_kj (W_k - q_k) / U_kk    for j > k

Each input channel is rounded by the scale it has anyway, and its error is spread over those that
are still to come, as far as the data says they are alike (https://arxiv.org/abs/2210.17323). H only
matters up to a factor.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.formats import round_to_dtype
from unitscale_jax.quant._lsq import tiles_of
from unitscale_jax.quant._ops import (
    as_codes,
    asymmetric,
    bounds_of,
    codes_of,
    nearest_even,
    scales,
    threshold,
)
from unitscale_jax.quant._params import QuantRules, check_leaf, encode, match, range_of
from unitscale_jax.quant._qtensor import QTensor, is_quantized, value_of
from unitscale_jax.quant._spec import DotSpec, QSpec
from unitscale_jax.statistics import Stat, required, warn_unseen
from unitscale_jax.tables import Tabular
from unitscale_jax.trace.params import MatrixForm, from_matrices, inverse_factor, to_matrices

EXACT = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class Rounded:
    """The relative errors |X (W - Q)| / |X W| of rounding one parameter in two ways.

    Attributes:
        nearest: The error of rounding to nearest.
        gptq: The error of GPTQ.
        unseen: How many inputs no row used, summed over layers and experts. They are rounded to
            nearest, and count in neither error.
    """

    nearest: float
    gptq: float
    unseen: int


@dataclass(frozen=True)
class GPTQReport(Tabular):
    """Errors of the quantized products, one row per parameter.

    Attributes:
        errors: Parameter -> errors of its products, on the batches calibrated on.
        kept: Parameters that no rule names, or that were quantized already.
    """

    errors: Mapping[str, Rounded]
    kept: tuple[str, ...]

    @property
    def rows(self) -> tuple[tuple[str, Rounded], ...]:
        """Pairs of a parameter's name and its errors."""
        return tuple(self.errors.items())

    def data(self) -> list[dict[str, Any]]:
        """The errors, with the name of the parameter beside them."""
        return [{"name": name, **asdict(error)} for name, error in self.rows]

    def cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Titles, and one line for each parameter."""
        titles = ["parameter", ">nearest", ">gptq", ">unseen"]
        return titles, [
            [name, f"{e.nearest:.4f}", f"{e.gptq:.4f}", str(e.unseen)] for name, e in self.rows
        ]


def gptq(
    params: Any, stats: Mapping[str, Stat], rules: QuantRules, damp: float = 0.01
) -> tuple[Any, GPTQReport]:
    """Quantizes the parameters that rules name, by the second moments of what they meet.

    Scales are those of `quantize`, but for groups, whose scale is taken when the group starts.
    Entries that are exactly zero stay zero, so a pruned parameter stays pruned. Inputs that no row
    used are rounded to nearest, and counted in the report: the data has no opinion on them. Stacked
    layers and experts are rounded each by its own moments.

    Args:
        params: A pytree of parameters.
        stats: Of `calibrate(.., collect=("hessian",))`; activations that these have ranges of get
            static ones.
        rules: Pairs (pattern, `DotSpec`), their axes as `resolve` gives them.
        damp: What is added to the diagonal, in parts of its mean.

    Returns:
        `params` with a `QTensor` for each parameter named, as `quantize` would, and a report of
        the errors. A parameter that is quantized already stays.

    Raises:
        ValueError: A rule matches nothing or has no axes; a parameter has no moments (lookups,
            grouped convolutions), so leave it to `quantize`; the moments are singular.

    Warns:
        UserWarning: No row used any input of a whole layer or expert.

    Law: with a diagonal H it rounds to nearest.

    Example:
        >>> import unitscale_jax as us
        >>> fn = lambda params, x: x @ params["w"]
        >>> params = {"w": jnp.array([[0.49], [0.49], [1.0]])}
        >>> x = jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> rules = {"w": us.DotSpec(w=us.QSpec(format="int4", axes=(-2,)))}
        >>> stats = us.calibrate(fn, params, [x], rules, collect=["hessian"])
        >>> served, report = gptq(params, stats, rules)
        >>> served["w"].codes[:, 0].tolist(), us.quantize(params, rules)["w"].codes[:, 0].tolist()
        ([3, 4, 7], [3, 3, 7])
    """
    if damp < 0:
        raise ValueError(f"damp is {damp}; it is at least zero.")
    leaves = trees.named_leaves(params, is_leaf=is_quantized)
    found = match(rules, params)
    named = {
        k: spec for k, spec in found.items() if spec is not None and not is_quantized(leaves[k])
    }
    for name, spec in named.items():
        check_leaf(name, leaves[name], spec)
    required(stats, "hessian", params, named)
    errors = {}
    done = dict(leaves)
    for name, spec in named.items():
        warn_unseen(name, stats[name], "rounded to nearest")
        done[name], errors[name] = _rounded(name, leaves[name], stats[name], spec, damp)
        done[name] = replace(done[name], input_range=range_of(stats, name))
    structure = jax.tree.structure(params, is_leaf=is_quantized)
    kept = tuple(name for name in leaves if name not in named)
    return jax.tree.unflatten(structure, list(done.values())), GPTQReport(errors, kept)


def _rounded(name: str, w: Any, stat: Stat, spec: DotSpec, damp: float) -> tuple[QTensor, Rounded]:
    if set(spec.w.axes or ()) != set(stat.layout.contracted):
        raise ValueError(
            f"{name} is contracted over {stat.layout.contracted}, and its rule shares scales over "
            f"{spec.w.axes}; GPTQ needs the same. Use the axes of `resolve`."
        )
    h = stat.matrices
    w = jnp.asarray(w)
    made, regular = _on_device(w, h, spec, stat.layout, float(damp))
    if not bool(jnp.isfinite(made.scale).all() & jnp.isfinite(h).all()):
        raise ValueError(f"{name}, or what meets it, has NaN or infinite values; mend it first.")
    if not bool(regular):
        raise ValueError(
            f"the second moments of what meets {name} are singular in float32 at damp={damp}; give "
            "more batches, or a larger damp."
        )
    nearest, best = (_relative_error(w, h, t, stat.layout) for t in (encode(w, spec), made))
    return made, Rounded(nearest, best, int(stat.unseen.sum()))


def _relative_error(w: jax.Array, h: jax.Array, t: QTensor, layout: MatrixForm) -> float:
    """|X (W - Q)| / |X W| by H alone, since |X M|^2 = tr(M' X' X M); 0 if X W is zero."""
    wide = round_to_dtype(w)
    off = value_of(t.astype(jnp.float32)) - wide

    def power(x: jax.Array) -> jax.Array:
        matrices = to_matrices(x, layout)
        return jnp.einsum("bkn,bkl,bln->", matrices, h, matrices, precision=EXACT)

    whole = power(wide)
    return float(jnp.sqrt(jnp.maximum(power(off), 0) / jnp.where(whole > 0, whole, 1)))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _on_device(
    w: jax.Array, h: jax.Array, spec: DotSpec, layout: MatrixForm, damp: float
) -> tuple[QTensor, jax.Array]:
    assert spec.w.axes is not None
    shape, axes = w.shape, tuple(axis % w.ndim for axis in spec.w.axes)
    tiles = tiles_of(shape, spec.w)
    sizes = [shape[axis] for axis in layout.contracted]
    order = _by_tiles(sizes, tiles)
    columns = to_matrices(round_to_dtype(w), layout)[:, order]
    h = h[:, order][:, :, order]
    made = jax.vmap(lambda w, h: _columns(w, h, spec.w, tiles, damp))(columns, h)
    regular = made.pop("regular").all()
    codes = from_matrices(made["codes"][:, np.argsort(order)], layout, shape)

    def laid(x: jax.Array) -> jax.Array:
        """Scales as they lie beside the codes: one for each tile, none along the other axes."""
        like = [1 if d in axes else size for d, size in enumerate(shape)]
        like[axes[-1]] = x.shape[1]
        return from_matrices(x, layout, like)

    rest = {name: laid(x) for name, x in made.items() if name != "codes"}
    t = QTensor(codes, **rest, spec=spec, axes=spec.w.axes, dtype=np.dtype(w.dtype))
    if spec.x is not None and not spec.x.symmetric:
        t = t.with_sums()
    return t, regular


def _by_tiles(sizes: list[int], tiles: int) -> np.ndarray:
    """An order of K in which groups, which are along the last of its axes, are consecutive.

    Two contracted axes (2, 4) with two groups along the second: K = 0..7 is taken as
    0 1 4 5, 2 3 6 7.
    """
    k = np.arange(math.prod(sizes)).reshape(-1, tiles, sizes[-1] // tiles)
    return k.swapaxes(0, 1).reshape(-1)


def _columns(w: jax.Array, h: jax.Array, spec: QSpec, tiles: int, damp: float) -> dict[str, Any]:
    """One matrix (K, outputs) by its H: codes, and scales for each tile.

    Two loops: over tiles, whose scales are taken from what earlier columns have left of them, and
    over the columns of a tile. A column spreads its error over all later columns, those of other
    tiles too.
    """
    size = w.shape[0] // tiles
    u, _ = inverse_factor(h, damp)  # whose rows of unseen inputs spread no error
    zero = w == 0
    whole = _whole(w, spec)

    def tile(w: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        fixed = _fixed(jax.lax.dynamic_slice_in_dim(w, start, size), whole, spec)

        def column(w: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
            row = w[k]
            code, value = _nearest(row, fixed, spec)
            nothing = fixed["zero_point"].astype(jnp.float32) if "zero_point" in fixed else 0.0
            # What was pruned stays zero, though earlier errors were spread over it; it gives its
            # whole value on to later columns.
            code = jnp.where(zero[k], nothing, code)
            value = jnp.where(zero[k], np.float32(0), value)
            spread = jnp.where(jnp.arange(w.shape[0]) > k, u[k] / u[k, k], np.float32(0))
            return w - spread[:, None] * (row - value)[None], code

        w, codes = jax.lax.scan(column, w, start + jnp.arange(size))
        return w, (codes, {name: fixed[name] for name in _OUT if name in fixed})

    _, (codes, scales_of_tiles) = jax.lax.scan(tile, w, jnp.arange(tiles) * size)
    out = {"codes": as_codes(codes.reshape(w.shape), spec), **scales_of_tiles}
    out["regular"] = jnp.isfinite(u).all()
    if "multiplier" in out:  # one scale for all groups of a channel
        out["scale"] = out["scale"][:1]
    return out


_OUT = ("scale", "zero_point", "multiplier")


def _whole(w: jax.Array, spec: QSpec) -> Any:
    """The scale, and its inverse, that the integer groups of a channel share; else None."""
    if spec.group is None or spec.group.scale == "free":
        return None
    reach = np.float32(spec.max_code * spec.most_multiplier)
    m = jnp.max(_bound(w, spec, spec.group.size), axis=0)
    zero = m < threshold(float(reach))
    return jnp.where(zero, 1.0, m * (1 / reach)), jnp.where(zero, 0.0, reach / m)


def _bound(w: jax.Array, spec: QSpec, size: int) -> jax.Array:
    """(groups, outputs): bounds of consecutive rows."""
    return bounds_of(w, (0,), replace(spec, group=None), w.shape[0] // size)


def _fixed(rows: jax.Array, whole: Any, spec: QSpec) -> dict[str, jax.Array]:
    """The scale, its inverse, and the code of zero or the integer of a group, for rows (K, n)."""
    if not spec.symmetric:
        low, high = spec.calibrator.bounds(rows, (0,))
        _, scale, point = asymmetric(rows, low, high, spec)
        r, n = high - low, 2**spec.grid.bits - 1
        inverse = jnp.where(r < threshold(n), 0.0, np.float32(n) / r)
        return {"scale": scale[0], "inverse": inverse[0], "zero_point": point[0]}
    m = _bound(rows, spec, rows.shape[0])[0]
    if whole is None:
        scale, inverse = scales(m, spec)
        return {"scale": scale, "inverse": inverse}
    scale, inverse = whole
    steps = jnp.ceil((m * inverse) * np.float32(1 / spec.max_code))
    multiplier = jnp.clip(steps, 1, spec.most_multiplier)
    return {"scale": scale, "inverse": inverse, "multiplier": multiplier.astype(jnp.int8)}


def _nearest(row: jax.Array, fixed: dict[str, jax.Array], spec: QSpec) -> tuple[Any, jax.Array]:
    """Codes as float32, and the values they stand for."""
    steps = row * fixed["inverse"]
    if "zero_point" in fixed:
        point = fixed["zero_point"].astype(jnp.float32)
        least = -np.float32(2 ** (spec.grid.bits - 1))
        code = jnp.clip(nearest_even(steps) + point, least, -least - 1)
        return code, (code - point) * fixed["scale"]
    by = fixed["multiplier"].astype(jnp.float32) if "multiplier" in fixed else np.float32(1)
    code = codes_of(steps * (1 / by), spec).astype(jnp.float32)
    return code, code * by * fixed["scale"]
