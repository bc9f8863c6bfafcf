"""What a gradient station is given beside parameters and rows, and the one check of it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.loss._mean import Denominators
from unitscale_jax.loss._rows import check_row_keys, row_count
from unitscale_jax.loss._split import Part
from unitscale_jax.typing import Batch, Key, State


class Given(NamedTuple):
    """The keywords of a gradient station, which one station passes on to the next.

    Attributes:
        state: State of the model, or `None`.
        key: One typed key, or one per row, `(rows,)`, or `None`.
        denominators: For each term the weight to divide by, or `None` for that of these rows.
        scale: Factor of the gradients, a scalar.
        valid: Boolean `(rows,)`, the rows that count, or `None` when all do.
    """

    state: State = None
    key: Key | None = None
    denominators: Denominators | None = None
    scale: Any = 1.0
    valid: jax.Array | None = None

    def of(self, part: Part) -> "Given":
        """What is given for some of the rows, which bring their own keys and validity."""
        return self._replace(key=part.key, valid=part.valid)

    def checked(self, batch: Batch) -> "Given":
        """These keywords, `valid` as an array and ints as floats, if they fit a batch.

        Nothing is traced.

        A mask that broadcasts against the rows would count each of them several times over, in
        sums and weights alike, and so cancel out of every gradient.

        Raises:
            ValueError: `valid` is not boolean or not of shape `(rows,)`, a key is untyped or not
                one per row, denominators are no scalars by name, the scale is no real scalar.
        """
        rows = row_count(batch)
        check_row_keys(self.key, rows)
        given = self._replace(scale=_scalar("scale", self.scale))
        if given.denominators is not None:
            given = given._replace(denominators=_denominators(given.denominators))
        return given if given.valid is None else given._replace(valid=_rows_of(given.valid, rows))


NOTHING = Given()


def _rows_of(valid: Any, rows: int) -> jax.Array:
    valid = valid if hasattr(valid, "dtype") else np.asarray(valid)
    if valid.dtype != bool or valid.shape != (rows,):
        raise ValueError(
            f"`valid` is {valid.dtype}{list(valid.shape)}; expected bool[{rows}], for each row of "
            "the batch whether it counts. Weights of tokens go into the weight of a us.Mean."
        )
    return jnp.asarray(valid)


def _denominators(denominators: Any) -> dict[str, Any]:
    if not isinstance(denominators, Mapping):
        raise ValueError(
            f"`denominators` is a {type(denominators).__name__}; expected a dict from the name of "
            "each term to the weight that divides its total."
        )
    return {name: _scalar(f"denominators[{name!r}]", x) for name, x in denominators.items()}


def _scalar(what: str, value: Any) -> Any:
    if type(value) is int:  # which may be too large for JAX's integers, as 2**40 is
        return float(value)
    if not hasattr(value, "dtype") and not isinstance(value, int | float):
        raise ValueError(f"`{what}` is a {type(value).__name__}; expected a real scalar.")
    dtype, shape = jnp.result_type(value), jnp.shape(value)
    real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if not real or shape:
        raise ValueError(f"`{what}` is {dtype}{list(shape)}; expected a real scalar.")
    return value
