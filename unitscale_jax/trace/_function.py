"""A function as an equation list: traced once, then asked about and evaluated, whole or in part."""

from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Staged:
    """A call as equations and the arrays to evaluate them on.

    Attributes:
        closed: The equations of the call, a function of the arrays among its arguments.
        operands: Those arrays, in the order of `jax.tree.leaves((args, kwargs))`.
        positions: For each operand its position among all leaves.
        finish: Makes the result from the list of the equations' results.
    """

    closed: ClosedJaxpr
    operands: list[Any]
    positions: list[int]
    finish: Callable[[Sequence[Any]], Any]

    @property
    def traced(self) -> Traced:
        """The call as a function of its operands that returns a list."""
        inputs = jax.tree.structure(tuple(self.operands))
        return Traced(self.closed, inputs, jax.tree.structure(list(self.closed.out_avals)))


def stage(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Staged:
    """Traces one call; what is not an array, going in or coming out, stays as it is.

    Example:
        >>> call = stage(lambda x, flag: (2 * x if flag else x, "doubled"), jnp.ones(()), True)
        >>> call.finish(call.operands)[1], len(call.operands)
        ('doubled', 1)
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    positions = [k for k, leaf in enumerate(leaves) if is_array(leaf)]
    fixed: list[Any] = []  # the result's outline, with what is not an array in its place

    def flat_fn(*arrays: Any) -> list[Any]:
        filled = list(leaves)
        for k, x in zip(positions, arrays, strict=True):
            filled[k] = x
        inner_args, inner_kwargs = jax.tree.unflatten(structure, filled)
        out, out_structure = jax.tree.flatten(fn(*inner_args, **inner_kwargs))
        fixed[:] = [out_structure, [None if is_array(x) else (x,) for x in out]]
        return [x for x in out if is_array(x)]

    operands = [leaves[k] for k in positions]
    closed = jax.make_jaxpr(flat_fn)(*operands)

    def finish(results: Sequence[Any]) -> Any:
        out_structure, outline = fixed
        arrays = iter(results)
        return out_structure.unflatten(next(arrays) if x is None else x[0] for x in outline)

    return Staged(closed, operands, positions, finish)


def is_array(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype (an array, a tracer, an abstract value)."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
