"""Scales of a loss, as data: a spec says how the scale moves, the state is where it stands.

    finite:      good += 1; if good == interval: scale = min(growth · scale, max), good = 0
    overflow:    good = 0; if credits > 0: credits -= 1
                           else: stuck = (scale <= min), scale = max(backoff · scale, min)

Growing restores `hysteresis - 1` credits. Every scale is a power of two, so that scaling is exact.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.errors import check_type, check_whole
from unitscale_jax.optimizer import LossScaleState
from unitscale_jax.typing import Params


@dataclasses.dataclass(frozen=True)
class StaticScale:
    """A scale that never moves; `StaticScale(1)` is no scaling, but still skips bad steps.

    The scale is data all the same: it is read from the state. An overflow cannot be answered by a
    lower scale, so each one sets `stuck`.

    Attributes:
        scale: A power of two.

    Raises:
        ValueError: The scale is not a power of two in [2^-126, 2^126].
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        """Checks that the scale is a power of two."""
        _check_power("StaticScale.scale", self.scale)

    def start(self, params: Params, inner: Any) -> LossScaleState:
        """The first state, of these parameters and the first state of what is inside."""
        return _start(self.scale, 0, params, inner)

    def after(self, state: LossScaleState, finite: jax.Array) -> LossScaleState:
        """The state after a step: the same scale, `stuck` if the step overflowed."""
        good = jnp.where(finite, state.good + 1, 0)
        return dataclasses.replace(state, good=good, stuck=~finite)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScale:
    """A scale that grows until gradients overflow, and then backs off.

    Attributes:
        init: The first scale. Too high costs a few skipped steps, too low costs gradients.
        growth: Factor of a rise, a power of two above 1.
        backoff: Factor of a fall, a power of two below 1.
        interval: Finite steps in a row that a rise takes.
        hysteresis: Overflows that a fall takes; those before it only skip their step.
        min: The lowest scale. An overflow there sets `stuck`.
        max: The highest scale.

    Raises:
        ValueError: A scale or factor is not a power of two, bounds are not `min <= init <= max`,
            or a count is below 1.

    Example:
        >>> DynamicScale(init=1000)
        Traceback (most recent call last):
            ...
        ValueError: DynamicScale.init is 1000, not a power of two in [2^-126, 2^126], so scaling \
would round. Use 512 or 1024.
    """

    init: float = 2.0**15
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    hysteresis: int = 1
    min: float = 1.0
    max: float = 2.0**24

    def __post_init__(self) -> None:
        """Checks scales, factors, bounds and counts."""
        for field in ("init", "growth", "backoff", "min", "max"):
            _check_power(f"DynamicScale.{field}", getattr(self, field))
        if not self.min <= self.init <= self.max:
            raise ValueError(
                f"DynamicScale has min={self.min}, init={self.init} and max={self.max}; expected "
                "min <= init <= max. Widen the bounds, or start between them."
            )
        if not self.backoff < 1 < self.growth:
            raise ValueError(
                f"DynamicScale has backoff={self.backoff} and growth={self.growth}; expected "
                "backoff < 1 < growth, such as 0.5 and 2."
            )
        for name in ("interval", "hysteresis"):
            check_whole(f"DynamicScale.{name}", getattr(self, name), "a whole number of steps")
        if min(self.interval, self.hysteresis) < 1:
            raise ValueError(
                f"DynamicScale has interval={self.interval} and hysteresis={self.hysteresis}; both "
                "count steps, the deciding one included, so the least is 1."
            )

    def start(self, params: Params, inner: Any) -> LossScaleState:
        """The first state, of these parameters and the first state of what is inside."""
        return _start(self.init, self.hysteresis - 1, params, inner)

    def after(self, state: LossScaleState, finite: jax.Array) -> LossScaleState:
        """The state after a step, which was finite or overflowed, by the equations above."""
        grows = finite & (state.good + 1 >= self.interval)
        forgiven = ~finite & (state.credits > 0)
        falls = ~finite & ~forgiven
        raised = jnp.minimum(state.scale * self.growth, self.max)
        lowered = jnp.maximum(state.scale * self.backoff, self.min)
        spent = jnp.where(forgiven, state.credits - 1, state.credits)
        return dataclasses.replace(
            state,
            scale=jnp.where(grows, raised, jnp.where(falls, lowered, state.scale)),
            good=jnp.where(finite & ~grows, state.good + 1, 0),
            credits=jnp.where(grows, self.hysteresis - 1, spent),
            stuck=falls & (state.scale <= self.min),
        )


def _start(scale: float, credits: int, params: Params, inner: Any) -> LossScaleState:
    return LossScaleState(
        scale=jnp.asarray(scale, jnp.float32),
        good=jnp.zeros((), jnp.int32),
        credits=jnp.asarray(credits, jnp.int32),
        stuck=jnp.array(False),
        bad=jax.tree.map(lambda _: jnp.zeros((), bool), params),
        skipped=jnp.zeros((), jnp.int32),
        applied=jnp.array(True),
        inner=inner,
    )


def _check_power(where: str, value: Any) -> None:
    check_type(where, value, int | float | np.number | jax.Array, "a power of two")
    # Beyond 2^126 the inverse would be subnormal, which a device may flush to zero.
    if 2.0**-126 <= value <= 2.0**126 and math.frexp(value)[0] == 0.5:
        return
    below = 2.0 ** min(max(math.frexp(value)[1] - 1, -126), 125) if value > 0 else 1.0
    raise ValueError(
        f"{where} is {value}, not a power of two in [2^-126, 2^126], so scaling would round. "
        f"Use {below:g} or {2 * below:g}."
    )
