"""A function as an equation list: traced once, then asked about and evaluated, whole or in part."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.errors import check_callable
from unitscale_jax.trace.program._compat import ClosedJaxpr, as_function, is_concrete


@dataclass(frozen=True)
class Arguments:
    """Arguments of a call, by position and by keyword; those that are no arrays are static.

    Example:
        >>> call = Arguments.of((jnp.ones(2), "relu"), {"train": True, "mask": None})
        >>> call.positions, call.filled(["an array"])
        ((0,), (('an array', 'relu'), {'mask': None, 'train': True}))
    """

    leaves: Sequence[Any]
    positions: Sequence[int]
    structure: jax.tree_util.PyTreeDef

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Arguments":
        """The arguments of `fn(*args, **kwargs)`."""
        leaves, structure = jax.tree.flatten((tuple(args), dict(kwargs)))
        return cls(leaves, tuple(k for k, x in enumerate(leaves) if is_array(x)), structure)

    @property
    def arrays(self) -> list[Any]:
        """The arrays among the leaves, in order."""
        return [self.leaves[k] for k in self.positions]

    def filled(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` with other arrays, and with the same static values."""
        leaves = list(self.leaves)
        for k, x in zip(self.positions, arrays, strict=True):
            leaves[k] = x
        return jax.tree.unflatten(self.structure, leaves)


@dataclass(frozen=True)
class Traced:
    """The equations of a function of pytrees, for arguments of one shape.

    Attributes:
        closed: The equations and the constants they close over.
        inputs: Structure of the arguments, a tuple of those by position and, if there are any, of
            the dict of those by keyword.
        outputs: Structure of the result.
        positions: Which leaves of the arguments are arrays; all others are static.
    """

    closed: ClosedJaxpr
    inputs: jax.tree_util.PyTreeDef
    outputs: jax.tree_util.PyTreeDef
    positions: Sequence[int]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates the equations; the function itself is not called again."""
        out = as_function(self.closed)(*self.flat(*args, **kwargs))
        return jax.tree.unflatten(self.outputs, out)

    def flat(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The arrays of arguments, whose structure must be the traced one."""
        leaves, structure = jax.tree.flatten(_in_a_row(args, kwargs))
        if structure != self.inputs:
            raise TypeError(f"traced with arguments of {self.inputs}, called with {structure}")
        return [leaves[k] for k in self.positions]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Abstract values of the arguments, in their structure, and `None` for what is static."""
        leaves: list[Any] = [None] * self.inputs.num_leaves
        for k, aval in zip(self.positions, self.closed.in_avals, strict=True):
            leaves[k] = aval
        return jax.tree.unflatten(self.inputs, leaves)

    @property
    def result(self) -> Any:
        """Abstract values (shape, dtype, varying axes) of the result, in its structure."""
        return jax.tree.unflatten(self.outputs, self.closed.out_avals)


def trace(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Traced:
    """Traces `fn` at the shapes and dtypes of its arguments, without running it.

    Args:
        fn: A function of pytrees.
        *args: Its arguments: arrays, `jax.ShapeDtypeStruct`, and static values (strings, flags,
            numbers, `None`). Numbers in the first one, the parameters, count as arrays.
        **kwargs: Its keywords, likewise.

    Returns:
        The equations, as a function of the arrays among the arguments. Of a result they are what
        is an array or a number; in place of anything else stands `None`.

    Example:
        >>> doubled = trace(lambda x, train: {"y": 2 * x["x"]}, {"x": jnp.ones(3)}, train=False)
        >>> doubled({"x": jnp.arange(3.0)}, train=False)["y"].tolist()
        [0.0, 2.0, 4.0]
    """
    check_callable("the function", fn)
    args = (*as_arrays(args[:1]), *args[1:])
    outputs: list[jax.tree_util.PyTreeDef] = []

    def arrays_fn(*args: Any, **kwargs: Any) -> Any:
        result = as_arrays(fn(*args, **kwargs), None)
        outputs[:] = [jax.tree.structure(result)]
        return result

    call = trace_call(arrays_fn, *args, **kwargs)
    inputs = jax.tree.structure(_in_a_row(args, kwargs))
    return Traced(call.closed, inputs, outputs[0], call.positions)


def _in_a_row(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*args, dict(kwargs)) if kwargs else tuple(args)


def as_arrays(tree: Any, *otherwise: Any) -> Any:
    """Numbers of a tree as arrays, as `jit` takes them; anything else stays, or is `otherwise`."""

    def as_array(leaf: Any) -> Any:
        if isinstance(leaf, bool | int | float | complex):
            return jnp.asarray(leaf)
        return leaf if is_array(leaf) or not otherwise else otherwise[0]

    return jax.tree.map(as_array, tree)


@dataclass(frozen=True)
class TracedCall:
    """A call as equations and the arrays to evaluate them on.

    Attributes:
        closed: The equations of the call, a function of the arrays among its arguments.
        operands: Those arrays, in the order of `jax.tree.leaves((args, kwargs))`.
        positions: For each operand its position among all leaves.
        finish: Makes the result from the list of the equations' results.
    """

    closed: ClosedJaxpr
    operands: list[Any]
    positions: Sequence[int]
    finish: Callable[[Sequence[Any]], Any]

    @property
    def traced(self) -> Traced:
        """The call as a function of its operands that returns a list."""
        inputs = jax.tree.structure(tuple(self.operands))
        outputs = jax.tree.structure(list(self.closed.out_avals))
        return Traced(self.closed, inputs, outputs, range(len(self.operands)))


def trace_call(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> TracedCall:
    """Traces one call; what is not an array, going in or coming out, stays as it is.

    Example:
        >>> call = trace_call(lambda x, flag: (2 * x if flag else x, "doubled"), jnp.ones(()), True)
        >>> call.finish(call.operands)[1], len(call.operands)
        ('doubled', 1)
    """
    check_callable("the function", fn)
    given = Arguments.of(args, kwargs)
    fixed: list[Any] = []  # the result's outline, with what is not an array in its place

    def flat_fn(*arrays: Any) -> list[Any]:
        inner_args, inner_kwargs = given.filled(arrays)
        out, out_structure = jax.tree.flatten(fn(*inner_args, **inner_kwargs))
        fixed[:] = [out_structure, [None if is_array(x) else (x,) for x in out]]
        return [x for x in out if is_array(x)]

    closed = jax.make_jaxpr(flat_fn)(*given.arrays)

    def finish(results: Sequence[Any]) -> Any:
        out_structure, outline = fixed
        arrays = iter(results)
        return out_structure.unflatten(next(arrays) if x is None else x[0] for x in outline)

    return TracedCall(closed, given.arrays, given.positions, finish)


@contextlib.contextmanager
def evaluated_now() -> Iterator[None]:
    """Evaluates what is made inside at once, though a function around it is traced, and on no mesh.

    Inside a `shard_map` even an array of ones would be typed by the manual axes around it.
    """
    no_mesh = jax.sharding.AbstractMesh((), ())
    with jax.ensure_compile_time_eval(), jax.sharding.use_abstract_mesh(no_mesh):
        yield


def compiled_once(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Evaluates a pure `fn` as it is while something is traced, and else by a program of its own.

    A loop or a branch that is built anew in each call is compiled anew in each call, and JAX keeps
    all of these programs. One jitted function that lives as long as `fn` is compiled once for each
    structure and each shape of its arguments. Arguments that are no data, such as a function that
    a line search calls, leave `fn` as it is.

    Example:
        >>> traced = []
        >>> fn = compiled_once(lambda x: traced.append(x) or jax.lax.abs(x))
        >>> [fn(x).item() for x in (1.0, -2.0, 3.0)], len(traced)
        ([1.0, 2.0, 3.0], 1)
    """
    jitted = jax.jit(fn)

    @functools.wraps(fn)
    def compiled_fn(*args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        return (jitted if all(map(_is_data, leaves)) else fn)(*args, **kwargs)

    return compiled_fn


def _is_data(leaf: Any) -> bool:
    if not is_concrete(leaf):
        return False
    number = isinstance(leaf, bool | int | float | complex | np.ndarray | np.generic)
    return number or isinstance(leaf, jax.Array)


def is_array(leaf: Any) -> bool:
    """True if a leaf has a shape and a dtype (an array, a tracer, an abstract value)."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
