"""Layouts: which mesh axes hold which dimension of which parameter.

    rules = {"**/up/kernel": "column", "**/down/kernel": "row", "embed": P("tp")}

A layout is a tree of partition specs beside the parameters, made by rules on their names. An axis
that a mesh does not have is left out of it, so that one set of rules serves every mesh. What goes
with the parameters (moments, masks, codes and their scales) is laid out as they are.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec as P

from unitscale_jax import rules as named_rules, tree as trees
from unitscale_jax.errors import check_type, unknown
from unitscale_jax.parallel.layouts._specs import (
    WHOLE,
    fitted,
    held,
    local_shape,
    merge_specs,
    repeated,
    spec_of,
    without,
    zero_spec,
)
from unitscale_jax.tables import Tabular
from unitscale_jax.trace.program import is_concrete

Missing: TypeAlias = Literal["error", "whole"]

Choice: TypeAlias = P | Literal["column", "row", "whole"] | Mapping[int, str | tuple[str, ...]]
"""What a rule may say: a spec, a word, or which mesh axis holds which dimension, `{-1: "tp"}`."""


def layout(
    params: Any,
    rules: named_rules.Rules[Choice],
    mesh: Mesh | AbstractMesh,
    *,
    mesh_axis: str = "tp",
    missing: Missing = "error",
) -> "Layout":
    """Lays out parameters over a mesh by rules on their names.

    Args:
        params: A pytree of arrays, or of abstract ones.
        rules: Pairs of a pattern and where its parameters go; the first match wins:
            a `PartitionSpec`; "column", the last dimension over `mesh_axis` (a kernel's outputs,
            and its bias); "row", the last but one (a kernel's inputs; of a bias nothing, it is
            added after the sum); "whole", on every device; or mesh axes by dimension, `{-2: "tp"}`,
            which may count from the end, for kernels that are stacked in some models. What no rule
            matches is whole.
        mesh: Of `mesh`; an abstract one will do to look at a layout.
        mesh_axis: The mesh axis of "column" and "row".
        missing: What becomes of a mesh axis that rules name and `mesh` does not have: an "error",
            or "whole", for rules that serve several meshes: it is left out, and the table says so.

    Returns:
        A `Layout`.

    Raises:
        ValueError: A rule decides on nothing; a spec has a mesh axis that there is not, more
            dimensions than its parameter, an axis twice, or one that does not divide its dimension.
        TypeError: A rule says something else.

    Example:
        >>> params = {"up": jnp.ones((8, 16)), "down": jnp.ones((16, 8)), "scale": jnp.ones(8)}
        >>> mesh = us.parallel.mesh(dp=2, tp=4)
        >>> print(us.parallel.layout(params, {"up": "column", "down": "row"}, mesh))
        parameter  shape    spec           bytes  reason
        down       (16, 8)  P('tp',)         128  rule 'down'
        scale      (8,)     P()               32  no rule
        up         (8, 16)  P(None, 'tp')    128  rule 'up'
        all                                  288  on each device
    """
    check_type("`mesh`", mesh, Mesh | AbstractMesh, "a mesh, as us.parallel.mesh(dp=2, tp=4)")
    leaves = trees.named_leaves(params, is_leaf=trees.is_compound)
    pairs = named_rules.pairs_of(rules)
    specs, reasons = dict.fromkeys(leaves, WHOLE), dict.fromkeys(leaves, "no rule")
    for name, k in named_rules.decided(pairs, {name: (name,) for name in leaves}).items():
        if k is not None:
            shape, where = np.shape(leaves[name]), f"rule {named_rules.text_of(pairs[k][0])!r}"
            spec, absent = _on(_chosen(name, shape, pairs[k][1], mesh_axis), mesh)
            if absent and missing == "error":
                raise ValueError(f"{where}: {no_axis(absent[0], mesh)}")
            _check(name, shape, spec, mesh.shape)
            lacking = f", no axis {', '.join(absent)}" if absent else ""
            specs[name], reasons[name] = spec, where + lacking
    return Layout(abstract(params), mesh, specs, reasons)


@dataclass(frozen=True)
class LayoutRow:
    """Where one parameter is.

    Attributes:
        name: The parameter.
        shape: Its shape.
        spec: Which mesh axes hold its dimensions.
        nbytes: The bytes of it that one device holds.
        reason: Why it is there.
    """

    name: str
    shape: tuple[int, ...]
    spec: P
    nbytes: int
    reason: str


@dataclass(frozen=True)
class Layout(Tabular):
    """Where parameters are; made by `layout` and `infer`. It prints as a table.

    Attributes:
        params: The parameters, abstract.
        mesh: The mesh.
        by_name: Parameter -> which mesh axes hold its dimensions, in tree order.
        reasons: Parameter -> why.
    """

    params: Any = field(repr=False)
    mesh: Mesh | AbstractMesh
    by_name: Mapping[str, P]
    reasons: Mapping[str, str] = field(repr=False)

    @functools.cached_property
    def specs(self) -> Any:
        """A tree of `PartitionSpec` in the structure of the parameters."""
        return self.specs_of(self.params)

    def specs_of(self, tree: Any) -> Any:
        """Specs for a tree that goes with the parameters: itself, gradients, moments, masks, codes.

        Args:
            tree: A pytree of arrays, or of anything that has a shape. A leaf belongs to the
                parameter whose name is in its own: "0/mu/mlp/kernel", "bits/mlp/kernel/data".

        Returns:
            A tree of its structure. A leaf of the parameter's shape has the parameter's spec; one
            of its rank (scales, zero points, sums of columns) as much of it as divides its shape;
            one that lacks a dimension (factored moments) that of the others; everything else is
            whole.

        Example:
            >>> params, mesh = {"w": jnp.ones((8, 16))}, us.parallel.mesh(dp=2, tp=4)
            >>> lay = us.parallel.layout(params, {"w": "column"}, mesh)
            >>> state = optax.sgd(0.1, momentum=0.9).init(params)
            >>> lay.specs_of(state)[0].trace
            {'w': P(None, 'tp')}
            >>> codes = us.quantize(params, {"w": us.DotSpec(w=us.QSpec(axes=(-1,)))})
            >>> lay.specs_of(codes)["w"].codes, lay.specs_of(codes)["w"].scale  # (8, 16), (8, 1)
            (P(None, 'tp'), P())
        """
        leaves, structure = jax.tree.flatten(tree, is_leaf=trees.is_compound)
        names = trees.names(tree, is_leaf=trees.is_compound)
        return structure.unflatten(map(self._beside, names, leaves))

    def shardings(self, tree: Any = None) -> Any:
        """`specs_of(tree)` on the mesh, for `jax.jit(..., out_shardings=..)`; of `params` if None.

        Law: with them as `out_shardings`, parameters and state are laid out after every update as
        they were before the first.
        """
        specs = self.specs if tree is None else self.specs_of(tree)
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def over(self, mesh_axis: str) -> "Layout":
        """The layout in which each parameter is divided over one more mesh axis (FSDP, ZeRO).

        Along the first dimension that is free and that the axis divides. What has none, and what
        the axis holds already, stays as it is; on a mesh without the axis all does.

        Example:
            >>> params, mesh = {"w": jnp.ones((8, 16))}, us.parallel.mesh(dp=2, tp=4)
            >>> lay = us.parallel.layout(params, {"w": "column"}, mesh)
            >>> lay.over("dp").by_name
            {'w': P('dp', 'tp')}
        """
        n, specs, reasons = self.mesh.shape.get(mesh_axis, 1), {}, dict(self.reasons)
        for name, leaf in self._leaves.items():
            spec = zero_spec(np.shape(leaf), mesh_axis, n, self.by_name[name]) if n > 1 else WHOLE
            specs[name] = merge_specs(self.by_name[name], spec)
            if len(spec):
                reasons[name] += f"; dimension {len(spec) - 1} over {mesh_axis}"
        return replace(self, by_name=specs, reasons=reasons)

    @property
    def nbytes(self) -> int:
        """How many bytes of parameters each device holds."""
        return sum(map(self._nbytes, self.by_name))

    @property
    def rows(self) -> tuple[LayoutRow, ...]:
        """One row for each parameter, in tree order."""
        return tuple(
            LayoutRow(
                name, np.shape(leaf), self.by_name[name], self._nbytes(name), self.reasons[name]
            )
            for name, leaf in self._leaves.items()
        )

    def cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """One line for each parameter, and the bytes of all."""
        lines = [[r.name, str(r.shape), str(r.spec), f"{r.nbytes:,}", r.reason] for r in self.rows]
        total = ["all", "", "", f"{self.nbytes:,}", "on each device"]
        return ["parameter", "shape", "spec", ">bytes", "reason"], [*lines, total]

    @functools.cached_property
    def _leaves(self) -> dict[str, Any]:
        return trees.named_leaves(self.params, is_leaf=trees.is_compound)

    def _nbytes(self, name: str) -> int:
        specs, leaf = self._beside(name, self._leaves[name]), self._leaves[name]
        local = lambda x, spec: local_shape(spec, x.shape, self.mesh.shape)
        return trees.nbytes(
            jax.tree.map(lambda x, spec: jax.ShapeDtypeStruct(local(x, spec), x.dtype), leaf, specs)
        )

    def _beside(self, name: str, leaf: Any) -> Any:
        """The spec of a leaf that goes with a parameter; of all arrays of a compound."""
        owner = next((part for part in _parts(name) if part in self.by_name), None)
        if owner is None:
            return jax.tree.map(lambda _: WHOLE, leaf)
        spec, shape = self.by_name[owner], np.shape(self._leaves[owner])
        return jax.tree.map(lambda x: _follow(spec, shape, np.shape(x), self.mesh.shape), leaf)


def shard(tree: Any, layout: Layout) -> Any:
    """Puts a tree where its layout says.

    Args:
        tree: Parameters, or what goes with them: see `Layout.specs_of`. With several processes
            each of them has the whole of it, or it is global already.
        layout: Of `layout` or `infer`, on a mesh of devices.

    Returns:
        The same values. Inside of `jit` it is a constraint.

    Law: commutes with quantizing and with pruning, to the bit.

    Example:
        >>> params, mesh = {"w": jnp.ones((8, 16))}, us.parallel.mesh(dp=2, tp=4)
        >>> lay = us.parallel.layout(params, {"w": "column"}, mesh)
        >>> us.parallel.shard(params, lay)["w"].addressable_shards[0].data.shape
        (8, 4)
    """
    check_type("layout", layout, Layout, "a us.parallel.Layout")
    return jax.tree.map(_put, tree, layout.shardings(tree))


def abstract(tree: Any) -> Any:
    """Replaces the arrays of a tree by their shapes and dtypes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree)


def _put(x: Any, sharding: NamedSharding) -> Any:
    """From what this process has; devices of others cannot be given arrays, only asked for."""
    if not is_concrete(x):  # whose mesh may be abstract
        return jax.lax.with_sharding_constraint(x, sharding)
    whole = not isinstance(x, jax.Array) or x.is_fully_addressable
    if sharding.is_fully_addressable or not whole:
        return jax.device_put(x, sharding)
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
        data = _put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _parts(name: str) -> Iterator[str]:
    """Runs of words of a name, the longest first, of equally long ones the last first."""
    words = name.split("/")
    for length in range(len(words), -1, -1):
        for start in range(len(words) - length, -1, -1):
            yield "/".join(words[start : start + length])


def _follow(spec: P, shape: tuple[int, ...], own: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """The spec of an array of shape `own` that goes with one of `shape`."""
    if len(own) == len(shape):
        return fitted(spec, own, sizes)
    lacking = [k for k in range(len(shape)) if own == (*shape[:k], *shape[k + 1 :])]
    found = {without(spec, k, len(shape)) for k in lacking}
    return found.pop() if len(found) == 1 else WHOLE  # of a square either may be lacking


# ------------------------------------------------------------------------------------- rules


def no_axis(mesh_axis: str, mesh: Mesh | AbstractMesh) -> str:
    """Says that a mesh lacks an axis, and the ways out."""
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return (
        f"{unknown(mesh_axis, mesh.shape, 'mesh axis')} The mesh has {axes or 'no axes'}: name one "
        "of these, or say missing='whole' where it shall mean whole, as for meshes without the "
        "axis."
    )


def _chosen(name: str, shape: tuple[int, ...], choice: Choice, mesh_axis: str) -> P:
    """Turns the choice of a rule into a spec."""
    rank = len(shape)
    if isinstance(choice, P):
        spec = choice
    elif choice == "whole":
        spec = WHOLE
    elif choice == "column":
        spec = P(*[None] * (rank - 1), mesh_axis) if rank else WHOLE
    elif choice == "row":
        spec = P(*[None] * (rank - 2), mesh_axis) if rank > 1 else WHOLE
    elif isinstance(choice, Mapping) and all(-rank <= dim < rank for dim in choice):
        by = {dim % rank: value for dim, value in choice.items()}
        spec = P(*[by.get(dim) for dim in range(rank)])
    else:
        raise TypeError(
            f"{name}, of shape {shape}, is to go to {choice!r}. A rule says a PartitionSpec, "
            "'column', 'row', 'whole', or which mesh axis holds which of its dimensions, as "
            "{-1: 'tp'}."
        )
    return spec


def _on(spec: P, mesh: Mesh | AbstractMesh) -> tuple[P, list[str]]:
    """A spec on a mesh, and which of its axes the mesh does not have."""
    by = held(spec, len(spec))
    absent = [axis for entry in by for axis in entry if axis not in mesh.shape]
    return spec_of([tuple(axis for axis in e if axis in mesh.shape) for e in by]), absent


def _check(name: str, shape: tuple[int, ...], spec: P, sizes: Mapping[str, int]) -> None:
    if len(spec) > len(shape):
        raise ValueError(
            f"{name} has {len(shape)} dimensions, {shape}, and its spec {spec} has {len(spec)}. "
            "Leave some out, or name the dimension, as {-1: 'tp'}."
        )
    if axis := repeated(spec):
        raise ValueError(f"{name}: {spec} has the mesh axis {axis!r} twice. It can hold one.")
    for dim, (by, size) in enumerate(zip(held(spec, len(shape)), shape, strict=True)):
        parts = math.prod(sizes[axis] for axis in by)
        if size % parts:
            listed = ", ".join(f"{axis}={sizes[axis]}" for axis in by)
            raise ValueError(
                f"{name}: dimension {dim} of {size} is not divisible by {listed}. Pad it to "
                f"{-(-size // parts) * parts}, choose a size among the divisors of {size}, or "
                "leave it whole."
            )
