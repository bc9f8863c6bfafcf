"""A function as an equation list: traced once, then asked about and evaluated, whole or in part."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from unitscale_jax.trace._compat import ClosedJaxpr, as_function


@dataclass(frozen=True)
class Traced:
    """The equations of a function of pytrees, for arguments of one shape.

    Attributes:
        closed: The equations and the constants they close over.
        inputs: Structure of the arguments, as a tuple.
        outputs: Structure of the result.
    """

    closed: ClosedJaxpr
    inputs: jax.tree_util.PyTreeDef
    outputs: jax.tree_util.PyTreeDef

    def __call__(self, *args: Any) -> Any:
        """Evaluates the equations; the function itself is not called again."""
        out = as_function(self.closed)(*self.flat(*args))
        return jax.tree.unflatten(self.outputs, out)

    def flat(self, *args: Any) -> list[Any]:
        """The leaves of arguments, whose structure must be the traced one."""
        leaves, structure = jax.tree.flatten(args)
        if structure != self.inputs:
            raise TypeError(f"traced with arguments of {self.inputs}, called with {structure}")
        return leaves

    @property
    def result(self) -> Any:
        """Abstract values (shape, dtype, varying axes) of the result, in its structure."""
        return jax.tree.unflatten(self.outputs, self.closed.out_avals)


def trace(fn: Callable[..., Any], *args: Any) -> Traced:
    """Traces `fn` at the shapes and dtypes of `args`, without running it.

    Example:
        >>> doubled = trace(lambda x: {"y": 2 * x["x"]}, {"x": jnp.ones(3)})
        >>> doubled({"x": jnp.arange(3.0)})["y"].tolist()
        [0.0, 2.0, 4.0]
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    return Traced(closed, jax.tree.structure(args), jax.tree.structure(shapes))
