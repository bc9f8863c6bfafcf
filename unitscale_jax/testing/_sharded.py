"""Sharding as an assertion: devices change neither the numbers nor, unseen, what is sent."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unitscale_jax.errors import check_callable
from unitscale_jax.parallel import mesh as make_mesh
from unitscale_jax.testing._close import assert_close
from unitscale_jax.trace.costs import Collective, collectives


def check_sharded(
    step: Callable[..., Any],
    args: Sequence[Any],
    meshes: Sequence[Mesh],
    *,
    reference: Callable[..., Any] | None = None,
    rtol: float = 1e-5,
    rtol64: float | None = 1e-10,
    outside_loops: Sequence[str] = (),
) -> None:
    """Asserts that a step on several devices computes what it computes on one.

    Args:
        step: `step(*args)`, a pytree of arrays. It is called under `jit` and `jax.set_mesh(mesh)`,
            and lays out what it is given itself (`us.parallel.shard`, with a layout on
            `jax.sharding.get_abstract_mesh()`).
        args: Pytrees of arrays.
        meshes: The meshes to try. Give every axis a size above 1 in one of them.
        reference: What to compare with, such as the function before it was sharded; `step` on a
            mesh of one device if left out, which a step that is wrong everywhere would pass.
        rtol: Allowed difference in the dtype of `args`, as a fraction of a leaf's largest entry.
        rtol64: The same for float64, which tells errors from rounding: arguments in float32 are
            tried in float64 too; None leaves that out.
        outside_loops: Mesh axes over which no collective may stand in a loop.

    Raises:
        AssertionError: A leaf differs; the message has a line for each, with the ratio of norms. A
            ratio that is the size of an axis is named: a sum over it was forgotten, or done twice.

    Example:
        >>> P = jax.sharding.PartitionSpec
        >>> def means_added(w, x):  # the mean of each device's rows, and their sum
        ...     body = lambda w, x: jax.lax.psum(jnp.mean((x * w) ** 2), "dp")
        ...     mean = jax.shard_map(body, in_specs=(P(), P("dp")), out_specs=P())
        ...     return jax.grad(mean)(w, x)
        >>> mesh = us.parallel.mesh(dp=4, tp=2)
        >>> us.testing.check_sharded(means_added, (2.0, jnp.ones(8)), [mesh])
        Traceback (most recent call last):
            ...
        AssertionError: a mesh of dp=4, tp=2 gives another result than one device, in float32
          params: largest difference 3.00e+00 of the leaf's largest entry, ratio of norms 4 = size \
of axis dp
    """
    check_callable("step", step)
    forms = [("float32", args, rtol, False)]
    if rtol64 is not None:
        forms.append(("float64", _in_float64(args), rtol64, True))
    for dtype, given, allowed, x64 in forms:
        with jax.enable_x64(x64 or jax.dtypes.canonicalize_dtype(np.float64) == np.float64):
            want = _on_one(reference or step, given, meshes, alone=reference is not None)
            for mesh in meshes:
                listed = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
                got, found = _on(step, given, mesh)
                title = f"a mesh of {listed} gives another result than one device, in {dtype}"
                assert_close(got, want, allowed, title, sizes=mesh.shape)
                _check_loops(found, outside_loops, listed)


def check_collectives(
    program: Any,
    mesh: Mesh,
    expected: Mapping[tuple[str, str], int],
    *,
    outside_loops: Sequence[str] = (),
    ignore_below: int = 128,
) -> None:
    """Asserts what a compiled program sends between devices.

    Args:
        program: What `jax.jit(step).lower(*args).compile()` returns.
        mesh: The mesh it was compiled for.
        expected: How many collectives of each kind and axes there are, such as
            `{("all-reduce", "tp"): 4, ("all-gather", "dp"): 1}`; several axes are joined by "+".
            One that is not named must not occur.
        outside_loops: Mesh axes over which no collective may stand in a loop.
        ignore_below: Bytes of a result below which a collective is not counted: sums of scalars.

    Raises:
        AssertionError: With a line for each kind and axes, and the bytes of each.

    Example:
        >>> mesh, P = us.parallel.mesh(dp=8), jax.sharding.PartitionSpec
        >>> total = jax.shard_map(
        ...     lambda x: jax.lax.psum(x, "dp"), mesh=mesh, in_specs=P("dp"), out_specs=P()
        ... )
        >>> program = jax.jit(total).lower(jnp.ones((8, 64))).compile()
        >>> us.testing.check_collectives(program, mesh, {("all-reduce", "dp"): 1})
    """
    if not isinstance(program, str):
        check_callable("program.as_text", getattr(program, "as_text", program))
    found = [c for c in collectives(program, mesh) if c.bytes >= ignore_below]
    counts: dict[tuple[str, str], int] = {}
    for c in found:
        key = (c.kind, "+".join(c.axes))
        counts[key] = counts.get(key, 0) + 1
    if counts != dict(expected):
        lines = [
            f"{kind} over {axes}: {counts.get((kind, axes), 0)}, expected "
            f"{expected.get((kind, axes), 0)}; bytes "
            + (", ".join(str(c.bytes) for c in found if (c.kind, "+".join(c.axes)) == (kind, axes)))
            for kind, axes in sorted({*counts, *expected})
        ]
        raise AssertionError("\n  ".join(["the program sends something else:", *lines]))
    _check_loops(found, outside_loops, "this mesh")


def _in_float64(args: Sequence[Any]) -> list[Any]:
    """Arrays in float32 as NumPy arrays in float64; JAX takes them as such only under x64."""
    wide = lambda x: np.asarray(x, np.float64) if jnp.result_type(x) == jnp.float32 else x
    return [jax.tree.map(wide, arg) for arg in args]


def _on_one(fn: Callable[..., Any], args: Sequence[Any], meshes: Any, *, alone: bool) -> Any:
    if alone:
        return jax.device_get(jax.jit(fn)(*args))
    sizes = {axis: 1 for mesh in meshes for axis in mesh.axis_names}
    return _on(fn, args, make_mesh(devices=jax.devices()[:1], **sizes))[0]


def _on(
    fn: Callable[..., Any], args: Sequence[Any], mesh: Mesh
) -> tuple[Any, tuple[Collective, ...]]:
    with jax.set_mesh(mesh):
        program = jax.jit(fn).lower(*args).compile()
        return jax.device_get(program(*args)), collectives(program, mesh)


def _check_loops(found: Sequence[Collective], axes: Sequence[str], where: str) -> None:
    inside = [c for c in found if c.loops and set(axes) & set(c.axes)]
    if inside:
        listed = "; ".join(
            f"{c.kind} over {'+'.join(c.axes)}, {c.bytes} bytes, {c.times} times" for c in inside
        )
        raise AssertionError(
            f"on a mesh of {where} a loop repeats what one collective after it would do: {listed}."
        )
