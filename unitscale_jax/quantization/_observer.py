"""What is measured of the operands that meet one parameter."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.quantization._calibrators import MSE, Percentile
from unitscale_jax.quantization._ops import on_grid, symmetric
from unitscale_jax.quantization._spec import QSpec
from unitscale_jax.quantization._stat import BINS, SHIFT, Stat, is_tried
from unitscale_jax.trace import (
    Meeting,
    Observer,
    channel_rows,
    count_rows,
    input_rows,
    second_moments,
    valid_rows,
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Ranges(Observer[Stat]):
    """Measures what meets one parameter.

    Attributes:
        spec: How it is quantized.
        collect: Kinds of statistics; see `observed`.
        candidates: (layers,) bounds that `MSE` tries fractions of.
    """

    spec: QSpec | None
    collect: frozenset[str]
    candidates: Any

    reductions: ClassVar[Mapping[str, Any]] = {"low": jnp.min, "high": jnp.max, "peak": jnp.max}

    def measure(self, meeting: Meeting, x: jax.Array) -> dict[str, Any]:
        """All numbers of one product; zeros are what an empty operand has."""
        v = on_grid(jax.lax.stop_gradient(x))
        keep = valid_rows(self.name, meeting, v, self.mask)
        seen = v if keep is None else jnp.where(keep, v, np.float32(0))
        out: dict[str, Any] = {
            "low": jnp.min(seen, initial=0.0),
            "high": jnp.max(seen, initial=0.0),
            "rows": count_rows(meeting, v, self.mask),
        }
        calibrator = None if self.spec is None else self.spec.calibrator
        if isinstance(calibrator, Percentile):
            out["counts"] = _histogram(v, keep)
        if isinstance(calibrator, MSE) and self.candidates is not None:
            out["errors"] = self._tried(seen, calibrator)
        return out | self._channels(meeting, seen)

    def made(self, value: dict[str, Any]) -> Stat:
        """The numbers as a `Stat`."""
        if "errors" in value:
            value = value | {"errors": self._own(value["errors"])}
        return Stat(**value, spec=self.spec, layout=self.layout)

    def _own(self, errors: jax.Array) -> jax.Array:
        """Each layer's errors at fractions of its own bound: (layers.., bounds, ratios)."""
        lead = errors.shape[: self.layout.layers]
        n = math.prod(lead)
        flat = errors.reshape(n, n, -1)[jnp.arange(n), jnp.arange(n)]
        return flat.reshape(*lead, -1)

    def _tried(self, v: jax.Array, calibrator: MSE) -> jax.Array:
        spec = self.spec
        assert spec is not None

        def error(m: jax.Array) -> jax.Array:
            codes, scale = symmetric(v, m.reshape([1] * v.ndim), spec)
            off = codes.astype(jnp.float32) * scale - v
            return jnp.sum(off * off)

        tried = self.candidates[:, None] * jnp.asarray(calibrator.ratios)
        return jax.lax.map(error, tried.reshape(-1)).reshape(tried.shape)

    def _channels(self, meeting: Meeting, v: jax.Array) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if "channels" in self.collect:
            size = jnp.abs(channel_rows(self.name, self.layout, meeting, v))
            out |= {"peak": jnp.max(size, axis=-2, initial=0.0), "total": jnp.sum(size, axis=-2)}
        if "hessian" in self.collect:
            out["hessian"] = second_moments(input_rows(self.name, self.layout, meeting, v))
        return out


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
