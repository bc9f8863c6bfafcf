"""The gradient station of a loss.

grads = scale * sum_t (coef_t / W_t) * d total_t / d params
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax import tree as trees
from unitscale_jax.loss._evaluate import evaluate, weights_of
from unitscale_jax.loss._given import Given
from unitscale_jax.loss._mean import Denominators, Terms, inverse
from unitscale_jax.loss._rows import keys_of_rows, row_count
from unitscale_jax.typing import Batch, Key, Loss, Params, State


@dataclass(frozen=True)
class Grad:
    """The gradient station: `grad_fn(params, batch) -> (terms, aux, grads)`.

    Made by `value_and_grad`; techniques such as `accumulated` map one `Grad` to another.

    Attributes:
        loss: The loss it differentiates.
        call: What calling it does, `(params, batch, given) -> (terms, aux, grads)`; see `__call__`,
            which checks what is given, once for all stations inside.
        direct: Whether `call` is the plain gradient of `loss`, with no technique around it.
    """

    loss: Loss
    call: Callable[[Params, Batch, Given], tuple[Terms, Any, Params]] = field(repr=False)
    direct: bool = False

    def __call__(
        self,
        params: Params,
        batch: Batch,
        *,
        state: State = None,
        key: Key | None = None,
        denominators: Denominators | None = None,
        scale: Any = 1.0,
        valid: jax.Array | None = None,
    ) -> tuple[Terms, Any, Params]:
        """Evaluates terms, auxiliary outputs and gradients.

        Args:
            params: Pytree of floating arrays.
            batch: Pytree of arrays `(rows, ...)`.
            state: Passed to the loss, when given.
            key: One typed key for the batch, or one per row, `(rows,)`; the loss gets one per row,
                `row_keys(key, rows)`.
            denominators: For each term the weight to divide its total by, in place of the weight
                of these rows: what the whole batch weighs, of which these rows are a part.
            scale: Factor of the gradients, the loss scale; terms do not carry it.
            valid: Boolean `(rows,)`; rows that do not count. Terms in row form are cut by it; a
                term in scalar form must have left them out already.

        Returns:
            `(terms, aux, grads)`. Terms are in scalar form, float32 or wider, without `scale` and
            `coef`. `grads` has the structure of `params`, is float32 (float64 for float64
            parameters) and carries `scale`.
        """
        check_params(params)
        given = Given(state, key, denominators, scale, valid)
        return self.call(params, batch, given.checked(batch))


def value_and_grad(loss: Loss) -> Grad:
    """Makes the gradient station of a loss.

    Args:
        loss: `loss(params, batch, *, state=None, key=None)` returning terms or `(terms, aux)`.
            Terms are a `Mean`, a dict of them, or a scalar, the mean over rows of equal weight.

    Returns:
        A `Grad`. It obeys the equations at the top of this module.

    Raises:
        ValueError: On a call, naming the leaf or term: parameters that are not floating or are
            none, batch leaves of different row counts, keywords that do not fit them, a term that
            is no `Mean` or scalar or has the name "dropped", a total below float32, a weight or
            coefficient that depends on parameters.

    Example:
        >>> def loss(w, batch):
        ...     error = (batch["x"] * w - batch["y"]) ** 2
        ...     return us.Mean(total=jnp.sum(error), weight=len(error))
        >>> batch = {"x": jnp.array([1.0, 2.0]), "y": jnp.array([1.0, 0.0])}
        >>> terms, aux, grads = us.value_and_grad(loss)(2.0, batch)
        >>> float(terms["loss"].value), float(grads)
        (8.5, 9.0)
    """
    around(loss, "value_and_grad")

    def grad(params: Params, batch: Batch, given: Given) -> tuple[Terms, Any, Params]:
        given = given._replace(key=keys_of_rows(given.key, row_count(batch)))
        if given.denominators is None:
            given = given._replace(denominators=weights_of(loss, params, batch, given))
        objective = scaled_objective(loss, batch, given)
        grads, (terms, aux) = jax.grad(objective, has_aux=True)(params)
        return terms, aux, jax.tree.map(to_accumulator, grads)

    return Grad(loss=loss, call=grad, direct=True)


def scaled_objective(
    loss: Loss, batch: Batch, given: Given
) -> Callable[[Params], tuple[jax.Array, tuple[Terms, Any]]]:
    """`params -> (scale * sum_t coef_t * total_t / W_t, (terms, aux))`, the function to derive."""

    def objective(params: Params) -> tuple[jax.Array, tuple[Terms, Any]]:
        terms, aux = evaluate(loss, params, batch, given)
        denominators = given.denominators or {}
        if set(terms) != set(denominators):
            raise ValueError(
                f"the loss has the terms {sorted(terms)}, `denominators` has {sorted(denominators)}"
                "; give one denominator for each term, or none at all."
            )
        # The scale comes last: a power of two then shifts exponents and changes no bit.
        factor = lambda name, m: (
            m.coef * inverse(denominators[name]) * jnp.asarray(given.scale, m.coef.dtype)
        )
        parts = [factor(name, m).astype(m.total.dtype) * m.total for name, m in terms.items()]
        return functools.reduce(jnp.add, parts), (terms, aux)

    return objective


def check_params(params: Params) -> None:
    """Raises `ValueError` for parameters that have no gradient, naming the first of them."""
    leaves = trees.named_leaves(params)
    if not leaves:
        raise ValueError("the parameters have no leaves, so there is nothing to differentiate.")
    for name, leaf in leaves.items():
        if not trees.is_floating(leaf):
            raise ValueError(
                f"parameter {name or 'params'!r} is {jnp.result_type(leaf)}, which has no "
                "gradient. Split such leaves off with us.tree.partition and pass them in `state`."
            )


def to_accumulator(grads: jax.Array) -> jax.Array:
    """A gradient in the dtype it is summed in: float32, or float64 if it has that."""
    return grads.astype(trees.wide(grads.dtype))


_ORDER = "reduced(accumulated(value_and_grad(distilled(a loss of quantized(autocast(apply))))))"

# Techniques that change what parameters hold, and those that belong inside them: the codes of
# weights that `cast` has rounded are not those that `quantize` makes to serve; codes and masks hide
# the channels that `compacted` takes out; `features` takes nothing out of a product of codes; and
# `unit_scaled` gives factors to the operations of the whole model, before some are replaced.
_INSIDE = {
    "quantized": ("cast", "compacted", "features", "unit_scaled"),
    "masked_straight_through": ("quantized", "compacted", "unit_scaled"),
    "compacted": ("unit_scaled",),
    "simulated": ("unit_scaled",),
}


def around(
    fn: Callable[..., Any], technique: str, *, marks: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`functools.wraps(fn)` for a technique, which checks that its order is right.

    Args:
        fn: A function of parameters: a model or a loss.
        technique: What goes around it.
        marks: Whether techniques further out are told; False where any of them may follow.

    Raises:
        TypeError: `fn` is no function, or a `Grad`: what rewrites a function would rewrite the
            backward pass that a `Grad` holds, and give other numbers than the gradient of the
            rewritten function.
        ValueError: `technique` belongs inside one that `fn` has already.
    """
    if isinstance(fn, Grad):
        raise TypeError(
            f"{technique} goes around a function of parameters, and got {fn!r}, which already "
            f"holds its backward pass. Put {technique} inside. The order is {_ORDER}."
        )
    if not callable(fn):
        raise TypeError(
            f"{technique} goes around a function whose first argument is the parameters, and got "
            f"{fn!r}, of type {type(fn).__name__}."
        )
    inner = getattr(fn, "__techniques__", ())
    for name in inner:
        if technique in _INSIDE.get(name, ()):
            raise ValueError(
                f"{technique} cannot go around {name}, which changes what the parameters hold. "
                f"Put {technique} inside: {name}({technique}(fn, ..), ..). The order is {_ORDER}."
            )

    def decorate(wrapper: Callable[..., Any]) -> Callable[..., Any]:
        wrapper = functools.wraps(fn)(wrapper)
        vars(wrapper)["__techniques__"] = (*inner, technique) if marks else inner
        return wrapper

    return decorate


def check_grad(grad_fn: Any, technique: str) -> None:
    """Raises `TypeError` unless `grad_fn` is a gradient station, a `Grad`."""
    if not isinstance(grad_fn, Grad):
        raise TypeError(
            f"{technique} takes what us.value_and_grad(loss) returns, and got {grad_fn!r}. A loss "
            f"knows what its rows weigh; a bare gradient function does not. The order is {_ORDER}."
        )
