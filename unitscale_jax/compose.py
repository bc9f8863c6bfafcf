"""Composition: `chain(f, g, h)(x) = h(g(f(x)))`, so that reading order is application order.

A technique maps a station to the same station, hence a training step is a chain of them. `chain`
adds nothing to calling the functions one in the other except that it reads from left to right.
"""

from collections.abc import Callable
from typing import Any


def chain(*transforms: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Composes functions of one argument; the first one named is the first one applied.

    Args:
        *transforms: Functions of one argument; options are bound by `functools.partial`.

    Returns:
        `chained(x)`, which is `transforms[-1](... transforms[0](x))`. `chain()` is the identity,
        and a chain of chains is the chain of their members.

    Raises:
        TypeError: A member is not callable; the message names its position.

    Example:
        >>> import functools
        >>> loss = lambda w, x: us.Mean(jnp.sum((w * x - 1.0) ** 2), x.shape[0])
        >>> grad_fn = chain(us.value_and_grad, functools.partial(us.accumulated, parts=4))(loss)
        >>> w, x = jnp.float32(2.0), jnp.arange(8.0)
        >>> _, _, grads = grad_fn(w, x)
        >>> bool(grads == us.value_and_grad(loss)(w, x)[2])
        True
    """
    for position, transform in enumerate(transforms):
        if not callable(transform):
            raise TypeError(_not_callable(position, transform))

    def chained(x: Any) -> Any:
        for transform in transforms:
            x = transform(x)
        return x

    return chained


def _not_callable(position: int, member: Any) -> str:
    return (
        f"member {position} of the chain is {member!r}, of type {type(member).__name__}, where a "
        "function of one argument is expected. Options are bound by functools.partial: "
        "chain(value_and_grad, functools.partial(accumulated, parts=4))."
    )
