"""Delayed scaling: the range of a step is the largest of the last steps.

    range_t = max(m_(t-1), .., m_(t-n)),    m = max |x|

Nothing has to be measured before it is quantized, so a step reads its activations once. The state
is a pytree that the training loop carries, and stands where `stats` stand. Reference: FP8 formats
for deep learning, https://arxiv.org/abs/2209.05433.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.errors import check_type
from unitscale_jax.quant._spec import QSpec
from unitscale_jax.statistics import Stat
from unitscale_jax.trace.program import is_concrete


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["lows", "highs"], meta_fields=["spec"]
)
@dataclass(frozen=True, eq=False)
class Ring:
    """The ends of the last ranges of what meets one parameter.

    Attributes:
        lows: float32 (length, ..): the least values, the newest first; further axes are those of
            stacked layers.
        highs: The largest values, likewise.
        spec: How the operand is quantized.
    """

    lows: Any
    highs: Any
    _: KW_ONLY
    spec: QSpec

    @property
    def range(self) -> jax.Array:
        """float32 (.., 2): the ends over all of the ring, (-m, m) if the range is symmetric."""
        low, high = jnp.min(self.lows, axis=0), jnp.max(self.highs, axis=0)
        if self.spec.symmetric:
            high = jnp.maximum(-low, high)
            low = -high
        return jnp.stack([low, high], axis=-1)

    def push(self, stat: Stat) -> "Ring":
        """The ring with a new range in the place of the oldest.

        It stays as it is where nothing was seen, or what is not finite.
        """
        low, high = (stat.range[..., end] for end in (0, 1))
        seen = jnp.isfinite(low) & jnp.isfinite(high) & (jnp.asarray(stat.rows) > 0)

        def turn(ring: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(seen, jnp.concatenate([new[None], ring[:-1]]), ring)

        return replace(self, lows=turn(self.lows, low), highs=turn(self.highs, high))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rings"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class AmaxHistory(Mapping[str, Ring]):
    """Parameter -> `Ring`, made by `amax_history`; a pytree, and `stats` to `quantized`."""

    rings: dict[str, Ring]

    def __getitem__(self, name: str) -> Ring:
        """The ring of what meets a parameter."""
        return self.rings[name]

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names of parameters."""
        return iter(self.rings)

    def __len__(self) -> int:
        """Number of parameters that have a history."""
        return len(self.rings)

    def update(self, stats: Mapping[str, Stat]) -> "AmaxHistory":
        """Returns the history after one more step.

        Args:
            stats: What `observed` measured in the step, of the same parameters.

        Raises:
            ValueError: They are of other parameters, or other layers.
        """
        if stats.keys() != self.rings.keys():
            odd = sorted(stats.keys() ^ self.rings.keys())
            raise ValueError(
                f"only one of the history and the stats has {', '.join(odd)}; observe by the rules "
                "that the history was begun with."
            )
        for name, ring in self.rings.items():
            layers = np.shape(stats[name].rows)
            if layers != ring.lows.shape[1:]:
                raise ValueError(
                    f"{name} has ranges of shape {ring.lows.shape[1:]} in the history, and of "
                    f"{layers} in the stats; observe the same function."
                )
        return AmaxHistory({name: ring.push(stats[name]) for name, ring in self.rings.items()})


def amax_history(stats: Mapping[str, Stat], length: int = 16) -> AmaxHistory:
    """Begins the history of ranges for delayed scaling.

    Args:
        stats: What `observed` or `calibrate` found of what meets each parameter: the first range.
        length: Of how many steps the largest counts.

    Returns:
        A pytree for `quantized(.., stats=history)` and `quantize(.., stats=history)`, with
        `.update(stats)` for the next step. Values beyond a range saturate at the largest code, and
        receive no gradient; the range has grown a step later. A step whose activations are not
        finite leaves the history as it was.

    Raises:
        ValueError: There are no statistics, the length is not positive, or a range is not finite,
            or of no single step: that of `EMA` minds the steps before, and `MSE` takes two passes.

    Law: after `length` steps of one batch, the range is that of the batch.

    Example:
        One pass serves and measures, since `observed` is a function to `quantized`:

        >>> import unitscale_jax as us
        >>> fp8 = us.DotSpec(w=us.QSpec(format="e4m3fn"), x=us.QSpec(format="e4m3fn"))
        >>> model = lambda params, x: x @ params["w"]
        >>> rules, params = {"w": fp8}, {"w": jnp.eye(2)}
        >>> measured = us.statistics.observed(model, rules)
        >>> @jax.jit
        ... def step(params, history, x):
        ...     def loss(params):
        ...         y, stats = us.quantized(measured, rules, stats=history)(params, x)
        ...         return jnp.square(y - 1).mean(), stats
        ...     grads, stats = jax.grad(loss, has_aux=True)(params)
        ...     return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads), history.update(stats)
        >>> history = amax_history(measured(params, jnp.ones((1, 2)))[1], length=3)
        >>> for m in (2.0, 8.0, 1.0, 1.0, 1.0):
        ...     params, history = step(params, history, jnp.full((1, 2), m))
        ...     print(history["w"].range.tolist())
        [-2.0, 2.0]
        [-8.0, 8.0]
        [-8.0, 8.0]
        [-8.0, 8.0]
        [-1.0, 1.0]
    """
    check_type("stats", stats, Mapping, "what us.calibrate or us.statistics.observed returns")
    if not stats or type(length) is not int or length < 1:
        raise ValueError(
            f"a history has one step or more, of one parameter or more; got length={length!r} and "
            f"stats of {sorted(stats)}."
        )
    return AmaxHistory({name: _begun(name, stat, length) for name, stat in stats.items()})


def _begun(name: str, stat: Stat, length: int) -> Ring:
    spec, ends = stat.spec, stat.range
    several = stat.takes_two_passes or "refined" in stat.numbers
    if not isinstance(spec, QSpec) or several or spec.measure((0,)).merge is not None:
        found = getattr(spec, "calibrator", "no spec")
        raise ValueError(
            f"a history is of the ranges of single steps, and that of what meets {name} has "
            f"{found}; use QSpec(calibrator=Absmax()), or the stats themselves."
        )
    known = all(is_concrete(x) for x in (ends, stat.rows))
    if known and not (np.isfinite(ends).all() and np.all(stat.rows)):
        raise ValueError(
            f"nothing finite met {name}, and a history begins with a range; begin it with a batch "
            "that reaches it."
        )
    zeros = jnp.zeros((length, *np.shape(stat.rows)), jnp.float32)
    return Ring(zeros, zeros, spec=spec).push(stat)
