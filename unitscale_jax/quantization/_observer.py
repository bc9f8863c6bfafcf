"""What is measured of the operands that meet one parameter."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.quantization._calibrators import MSE, Percentile
from unitscale_jax.quantization._meetings import Meeting, Pairs, batch_pairs, contraction
from unitscale_jax.quantization._ops import on_grid, symmetric
from unitscale_jax.quantization._product import Conv, Dot, Product, product_of
from unitscale_jax.quantization._spec import QSpec
from unitscale_jax.quantization._stat import BINS, SHIFT, Layout, Stat, is_tried


@dataclass(frozen=True, eq=False)
class Observer:
    """Measures what meets one parameter."""

    name: str
    spec: QSpec | None
    layout: Layout
    collect: frozenset[str]
    mask: Any
    candidates: Any

    def measure(self, meeting: Meeting, x: jax.Array) -> dict[str, Any]:
        """All numbers of one product; zeros are what an empty operand has."""
        product = product_of(meeting.site)
        assert product is not None
        v = on_grid(jax.lax.stop_gradient(x))
        keep = self._rows(product, meeting, v)
        seen = v if keep is None else jnp.where(keep, v, np.float32(0))
        out: dict[str, Any] = {
            "low": jnp.min(seen, initial=0.0),
            "high": jnp.max(seen, initial=0.0),
            "rows": self._count(product, meeting, v, keep),
        }
        calibrator = None if self.spec is None else self.spec.calibrator
        if isinstance(calibrator, Percentile):
            out["counts"] = _histogram(v, keep)
        if isinstance(calibrator, MSE) and self.candidates is not None:
            out["errors"] = self._tried(seen, calibrator)
        if {"channels", "hessian"} & self.collect:
            out |= self._channels(product, meeting, seen)
        return out

    def stat(self, meeting: Meeting, value: dict[str, Any]) -> Stat:
        """The numbers of a capture as a `Stat`, with leading axes only for the layers."""
        loops = len(meeting.stacks)
        gone = tuple(range(self.layout.layers, loops))
        fold = {"low": jnp.min, "high": jnp.max, "peak": jnp.max}
        out = {k: fold.get(k, jnp.sum)(x, axis=gone) for k, x in value.items()} if gone else value
        if "errors" in out:
            out = out | {"errors": self._own(out["errors"])}
        return Stat(**out, spec=self.spec, layout=self.layout)

    def _own(self, errors: jax.Array) -> jax.Array:
        """Each layer's errors at fractions of its own bound: (layers.., bounds, ratios)."""
        lead = errors.shape[: self.layout.layers]
        n = math.prod(lead)
        flat = errors.reshape(n, n, -1)[jnp.arange(n), jnp.arange(n)]
        return flat.reshape(*lead, -1)

    def _rows(self, product: Product, meeting: Meeting, v: jax.Array) -> jax.Array | None:
        """Which elements count, in the shape of the operand."""
        if self.mask is None:
            return None
        free = [d for d in range(v.ndim) if d not in product.contracted(1 - meeting.side)]
        shape, sizes = self.mask.shape, tuple(v.shape[d] for d in free)
        known = isinstance(product, Dot | Conv)
        if known and sizes[: len(shape)] == shape:
            return jax.lax.broadcast_in_dim(self.mask, v.shape, free[: len(shape)])
        if known and sizes and sizes[0] == math.prod(shape):
            return jax.lax.broadcast_in_dim(self.mask.reshape(-1), v.shape, free[:1])
        raise ValueError(
            f"valid has shape {shape}, and what meets {self.name} has rows {sizes} ("
            f"{meeting.site.name}), so padding cannot be told there. Give batches without padding, "
            f"or rules without {self.name}."
        )

    def _count(self, product: Product, meeting: Meeting, v: jax.Array, keep: Any) -> jax.Array:
        wide = _row_size(product, meeting)
        if keep is None:
            return jnp.int32(v.size // max(wide, 1))
        each = v.size // max(wide * self.mask.size, 1)
        return jnp.sum(self.mask, dtype=jnp.int32) * np.int32(each)

    def _tried(self, v: jax.Array, calibrator: MSE) -> jax.Array:
        spec = self.spec
        assert spec is not None

        def error(m: jax.Array) -> jax.Array:
            codes, scale = symmetric(v, m.reshape([1] * v.ndim), spec)
            off = codes.astype(jnp.float32) * scale - v
            return jnp.sum(off * off)

        tried = self.candidates[:, None] * jnp.asarray(calibrator.ratios)
        return jax.lax.map(error, tried.reshape(-1)).reshape(tried.shape)

    def _channels(self, product: Product, meeting: Meeting, v: jax.Array) -> dict[str, Any]:
        pairs = contraction(product, meeting)
        if not self.layout.clear or pairs is None:
            raise ValueError(
                f"what meets {self.name} in {meeting.site.name} has no input channels that are its "
                "own axes, one by one (it is reshaped, cut, computed with, grouped, or used over "
                "different axes). Leave it out of these rules."
            )
        batch = batch_pairs(product, meeting)
        out: dict[str, Any] = {}
        if "channels" in self.collect:
            conv = isinstance(product, Conv)  # whose channels are one dimension, windows aside
            dims = [product.numbers.lhs_spec[1]] if conv else [d for _, d in pairs]
            rows = _by_rows(v, [d for _, d in batch], dims)  # (batch.., rows, channels)
            size = jnp.abs(rows)
            out |= {"peak": jnp.max(size, axis=-2, initial=0.0), "total": jnp.sum(size, axis=-2)}
        if "hessian" in self.collect:
            if isinstance(product, Conv):
                rows = _patches(product, v, pairs)
            else:
                rows = _by_rows(v, [d for _, d in batch], [d for _, d in pairs])
            exact = jax.lax.Precision.HIGHEST
            out["hessian"] = jnp.einsum("...rk,...rl->...kl", rows, rows, precision=exact)
        return out


def _row_size(product: Product, meeting: Meeting) -> int:
    """Elements of a row: K, of a convolution its channels."""
    shape = product.shape(1 - meeting.side)
    if isinstance(product, Conv):
        return shape[product.numbers.lhs_spec[1]]
    return math.prod(shape[d] for d in product.contracted(1 - meeting.side))


def _by_rows(v: jax.Array, batch: Sequence[int], dims: Sequence[int]) -> jax.Array:
    rows = [d for d in range(v.ndim) if d not in (*batch, *dims)]
    sizes = [v.shape[d] for d in batch]
    count = math.prod(v.shape[d] for d in rows)
    return v.transpose(*batch, *rows, *dims).reshape(*sizes, count, -1)


def _patches(product: Conv, v: jax.Array, pairs: Pairs) -> jax.Array:
    """(rows, K): the windows of a convolution, K in the order of the kernel's axes."""
    params, numbers = product.site.eqn.params, product.numbers
    kernel = product.shape(1)
    window = [kernel[d] for d in numbers.rhs_spec[2:]]
    v = v.transpose(numbers.lhs_spec)  # (batch, channels, window..)
    patches = jax.lax.conv_general_dilated_patches(
        v,
        window,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        precision=jax.lax.Precision.HIGHEST,
    )
    patches = jnp.moveaxis(patches, 1, -1)
    cut = patches.reshape(-1, v.shape[1], *window)  # (rows, channels, window..)
    order = [1 + numbers.lhs_spec[1:].index(d) for _, d in pairs]
    return cut.transpose(0, *order).reshape(cut.shape[0], -1)


def _histogram(v: jax.Array, keep: jax.Array | None) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(jnp.abs(v), jnp.uint32) >> np.uint32(SHIFT)
    ones = jnp.ones(v.shape, jnp.int32) if keep is None else keep.astype(jnp.int32)
    return jnp.zeros(BINS, jnp.int32).at[bits.reshape(-1).astype(jnp.int32)].add(ones.reshape(-1))


def candidates(given: Mapping[str, Stat] | None, name: str) -> Any:
    """(layers,) bounds that the second pass of `MSE` takes fractions of."""
    stat = None if given is None else given.get(name)
    if stat is None or not is_tried(stat):
        return None
    return jnp.maximum(-jnp.asarray(stat.low), jnp.asarray(stat.high)).reshape(-1)
