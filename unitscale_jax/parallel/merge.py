"""Sub-models on different devices, their results merged into one.

    y = merge(f_1(θ_1, x), .., f_n(θ_n, x)),      θ_i and the work of f_i on device i alone

Ensembles, towers, branches of a network and experts with dense gates are this one function, in
training and in inference. Parameters of one structure are stacked, and stay named leaves; those of
different structures are packed, a row for each sub-model, and a device runs the one function that
its row belongs to.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_type
from unitscale_jax.mesh_axes import devices_over, varying, varying_axes
from unitscale_jax.parallel.layouts._context import axis_size
from unitscale_jax.typing import Apply, Params

How: TypeAlias = Literal["sum", "mean", "concat", "weighted", "vote"] | Callable[[Any], Any]
HOWS = ("sum", "mean", "concat", "weighted", "vote")


def merged(
    fns: Apply | Sequence[Apply], how: How = "sum", *, mesh_axis: str = "branch"
) -> Callable[..., Any]:
    """Makes one function of several, each evaluated where its parameters are.

    Args:
        fns: A function `fn(params, *inputs)` for each sub-model, in order; or one for all of them.
        how: What becomes of the n outputs:
            "sum", "mean": their sum, their mean.
            "concat": along the last axis, whose sizes may differ.
            "weighted": `sum_i weights[.., i] * y_i`; see `weights` below.
            "vote": how many outputs have their largest number at each place of the last axis,
                int32; its argmax is the winner.
            A function of the outputs stacked on a new first axis, which the compiler partitions.
        mesh_axis: The mesh axis; its size divides the number of sub-models.

    Returns:
        A function `fn(params, *inputs)`, and of "weighted" `fn(params, *inputs, weights=w)`, w of
        shape `(*lead, n)` with `lead` the leading axes of the outputs, or `(n,)`. `params` is
        either a pytree whose leaves are stacked on their first axis, n long, or what `pack` makes;
        both lie over devices by `P(axis)` and receive gradients. Inputs are the same for all.

    Raises:
        ValueError: `how` is unknown; the number of sub-models is not that of the parameters, or
            the axis does not divide it; outputs differ where they may not.

    Law: the merge of the functions one by one, with its gradients, for any size of the axis. "sum",
    "mean", "weighted" and "vote" send one sum of the output's size, and nothing else.

    Example:
        >>> double, square = lambda p, x: 2 * x, lambda p, x: x**2
        >>> params = pack([{}, {}])
        >>> with jax.set_mesh(us.parallel.mesh(branch=2, dp=4)):
        ...     both = jax.value_and_grad(lambda x: merged([double, square])(params, x))
        ...     value, grad = both(jnp.float32(3.0))
        >>> float(value), float(grad)
        (15.0, 8.0)
    """
    check_type("fns", fns, Callable | Sequence, "a function, or one for each sub-model")
    if not (callable(how) or how in HOWS):
        raise ValueError(f"how={how!r}; choose one of {HOWS}, or give a function of the outputs.")

    def merged_fn(params: Params, *inputs: Any, weights: Any = None) -> Any:
        count = _count(params, fns)
        _check_weights(how, weights, count)
        _check_axis(mesh_axis, count)
        models = [functools.partial(_call, _function(fns, i), i) for i in range(count)]
        alone = [functools.partial(model, row=i) for i, model in enumerate(models)]
        outs = [jax.eval_shape(model, params, inputs) for model in alone]
        _check_outputs(how, outs)
        body = functools.partial(_body, models, outs, how, mesh_axis)
        stays = how in ("sum", "mean", "weighted", "vote")
        whole = jax.tree.map(lambda _: P(), (inputs, weights))
        run = jax.shard_map(
            body,
            in_specs=(jax.tree.map(lambda _: P(mesh_axis), params), *whole),
            out_specs=P() if stays else P(mesh_axis),
            axis_names={mesh_axis},
        )
        y = run(params, inputs, weights)
        if how == "concat":
            return jax.tree.map(_concatenated, y, *outs)
        return how(y) if callable(how) else y

    return merged_fn


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["forms"])
@dataclass(frozen=True)
class Packed:
    """Pytrees of different structures as rows of arrays, one array for each dtype.

    A pytree itself: optimizers, checkpoints and layouts take it as any other. What fills a row up
    has no effect and no gradient.

    Attributes:
        rows: By name of the dtype, `(n, widest)`.
        forms: How each row is read.
    """

    rows: dict[str, Any]
    forms: tuple["Form", ...]

    def __len__(self) -> int:
        """Number of packed trees."""
        return len(self.forms)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, what each device holds of a sub-model: those of the widest."""
        return sum(trees.nbytes(x) // x.shape[0] for x in self.rows.values())

    def __repr__(self) -> str:
        """Says how many bytes there are, and how many of them only fill rows up."""
        used = sum(form.nbytes for form in self.forms)
        total = self.row_bytes * len(self)
        return (
            f"Packed({len(self)} trees, {self.row_bytes:,} B a row, {total:,} B in all, "
            f"{total - used:,} B of padding)"
        )


@dataclass(frozen=True)
class Form:
    """How a row is read: the structure of its tree, and shape and dtype of each leaf."""

    structure: Any
    leaves: tuple[tuple[tuple[int, ...], str], ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes of one tree."""
        return sum(trees.nbytes(jax.ShapeDtypeStruct(*leaf)) for leaf in self.leaves)


def pack(forest: Sequence[Any]) -> Packed:
    """Packs pytrees into rows of equal width, so that they can lie on different devices.

    Args:
        forest: Pytrees of arrays, of any structures, shapes and dtypes.

    Returns:
        A `Packed`. Its arrays go over an axis by
        `jax.device_put(packed, NamedSharding(mesh, P("branch")))`; each device then holds the
        bytes of the widest tree.

    Raises:
        ValueError: There are no trees.

    Law: `unpack(pack(forest), i)` is `forest[i]`, to the bit.

    Example:
        >>> pack([{"w": jnp.ones((4, 8))}, {"w": jnp.ones((4, 2)), "b": jnp.ones(2)}])
        Packed(2 trees, 128 B a row, 256 B in all, 88 B of padding)
    """
    check_type("forest", forest, Sequence, "trees of parameters")
    if not forest:
        raise ValueError("pack got no trees; give one for each sub-model.")
    flat = [jax.tree.flatten(jax.tree.map(jnp.asarray, tree)) for tree in forest]
    forms = tuple(
        Form(structure, tuple((x.shape, np.dtype(x.dtype).name) for x in leaves))
        for leaves, structure in flat
    )
    names = sorted({name for form in forms for _, name in form.leaves})
    return Packed({name: _rows([leaves for leaves, _ in flat], name) for name in names}, forms)


def unpack(packed: Packed, i: int, row: Any = None) -> Any:
    """Restores the tree that a row was packed from.

    Args:
        packed: The result of `pack`, or a device's part of it inside of a `shard_map`.
        i: The number of the tree, which says how the row is read.
        row: The row, if its number is another: a device in a `shard_map` counts its own rows.

    Returns:
        A pytree as it was packed.
    """
    check_type("packed", packed, Packed, "what us.parallel.pack returns")
    form, ends, out = packed.forms[i], dict.fromkeys(packed.rows, 0), []
    for shape, name in form.leaves:
        start, size = ends[name], int(np.prod(shape, dtype=object))
        flat = packed.rows[name][i if row is None else row, start : start + size]
        out.append(flat.reshape(shape))
        ends[name] = start + size
    return jax.tree.unflatten(form.structure, out)


def _rows(forest: list[list[jax.Array]], name: str) -> jax.Array:
    """Makes one row of each tree's numbers of one dtype, filled up to the longest."""
    dtype = np.dtype(name)
    flat = [[jnp.ravel(x) for x in leaves if x.dtype == dtype] for leaves in forest]
    rows = [jnp.concatenate(parts) if parts else jnp.zeros(0, dtype) for parts in flat]
    widest = max(row.size for row in rows)
    return jnp.stack([jnp.pad(row, (0, widest - row.size)) for row in rows])


def _body(
    models: list[Callable[..., Any]],
    outs: list[Any],
    how: How,
    mesh_axis: str,
    params: Params,
    inputs: tuple[Any, ...],
    weights: Any,
) -> Any:
    """Evaluates the device's sub-models and merges what they return, by one sum over devices."""
    count = len(models)
    each = count // devices_over(mesh_axis)
    inputs, weights = varying((inputs, weights), [mesh_axis])
    made = []
    for k in range(each):
        y = _one_of(models[k::each], outs, how, mesh_axis, params, k, inputs)
        mine = lax.axis_index(mesh_axis) * each + k
        made.append(jax.tree.map(functools.partial(_share, how, weights, mine), y))
    if how == "concat" or callable(how):
        return jax.tree.map(lambda *ys: jnp.stack(ys), *made)
    total = jax.tree.map(lambda *ys: lax.psum(functools.reduce(jnp.add, ys), mesh_axis), *made)
    return jax.tree.map(lambda y: y / count, total) if how == "mean" else total


def _one_of(
    models: list[Callable[..., Any]],
    outs: list[Any],
    how: How,
    mesh_axis: str,
    params: Params,
    row: int,
    inputs: tuple[Any, ...],
) -> Any:
    """Evaluates the sub-model whose parameters are in one row of this device.

    Every device compiles the branches of all devices and runs its own. `models` are those that
    stand in this row, one for each device.
    """

    def width(*ys: Any) -> int:
        return max(y.shape[-1] for y in ys) if ys[0].ndim else 0

    widest = jax.tree.map(width, *outs)

    def of(model: Callable[..., Any], params: Params, inputs: tuple[Any, ...]) -> Any:
        y = model(params, inputs, row=row)
        return jax.tree.map(_padded, y, widest) if how == "concat" else y

    calls = [functools.partial(of, model) for model in models]
    avals = [jax.eval_shape(call, params, inputs) for call in calls]
    # Branches of a switch have one type: they differ over all the axes that any of them does.
    axes = sorted({mesh_axis}.union(*(varying_axes(x) for x in jax.tree.leaves(avals))))
    alike = [lambda p, x, call=call: varying(call(p, x), axes) for call in calls]
    if len(alike) == 1:
        return alike[0](params, inputs)
    return lax.switch(lax.axis_index(mesh_axis), alike, params, inputs)


def _call(fn: Apply, i: int, params: Params, inputs: tuple[Any, ...], *, row: int) -> Any:
    """Evaluates sub-model `i`, whose parameters are in a row of the device."""
    if isinstance(params, Packed):
        own = unpack(params, i, row)
    else:
        own = jax.tree.map(lambda x: x[row], params)
    return jax.tree.map(jnp.asarray, fn(own, *inputs))


def _share(how: How, weights: Any, mine: Any, y: jax.Array) -> jax.Array:
    """Computes what one sub-model adds to the sum."""
    if how == "vote":
        return jax.nn.one_hot(jnp.argmax(y, axis=-1), y.shape[-1], dtype=jnp.int32)
    if how != "weighted":
        return y
    own = lax.dynamic_index_in_dim(weights, mine, axis=-1, keepdims=False)
    return y * own.reshape(own.shape + (1,) * (y.ndim - own.ndim))


def _padded(y: jax.Array, widest: int) -> jax.Array:
    return jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, widest - y.shape[-1])])


def _concatenated(y: jax.Array, *outs: Any) -> jax.Array:
    """Joins outputs `(n, .., widest)` along their last axes, without what filled them up."""
    parts = [y[i, ..., : out.shape[-1]] for i, out in enumerate(outs)]
    return jnp.concatenate(parts, axis=-1)


def _function(fns: Apply | Sequence[Apply], i: int) -> Apply:
    return fns if callable(fns) else fns[i]


def _count(params: Params, fns: Apply | Sequence[Apply]) -> int:
    """Counts sub-models; raises `ValueError` unless parameters and functions have as many."""
    leaves = trees.named_leaves(params)
    counts = {name: (np.shape(x) or (0,))[0] for name, x in leaves.items()}
    count = len(params) if isinstance(params, Packed) else next(iter(counts.values()), 0)
    wrong = [name for name, n in counts.items() if n != count]
    if wrong or not count:
        raise ValueError(
            f"parameters of {count} sub-models, of which {wrong or 'nothing'} has another first "
            "axis. Stack trees of one structure by jax.tree.map(lambda *x: jnp.stack(x), *forest), "
            "or `pack` them."
        )
    if not callable(fns) and len(fns) != count:
        raise ValueError(
            f"{len(fns)} functions for parameters of {count} sub-models. Give one for each, or one "
            "function for all."
        )
    return count


def _check_axis(mesh_axis: str, count: int) -> None:
    size = axis_size(mesh_axis, "merged")
    if count % size:
        raise ValueError(
            f"{count} sub-models do not lie evenly on {mesh_axis}={size} devices. Choose a size "
            f"that divides {count}."
        )


def _check_weights(how: How, weights: Any, count: int) -> None:
    if (how == "weighted") != (weights is not None):
        raise ValueError('`weights` go with how="weighted", and only with it: fn(.., weights=w).')
    if weights is not None and (np.shape(weights) or (0,))[-1] != count:
        raise ValueError(
            f"weights have the shape {np.shape(weights)}; the last axis is of {count} sub-models."
        )


def _check_outputs(how: How, outs: list[Any]) -> None:
    """Raises `ValueError` unless outputs are alike; for "concat" last axes may differ."""
    first, names = outs[0], trees.names(outs[0])
    for i, out in enumerate(outs):
        if jax.tree.structure(out) != jax.tree.structure(first):
            raise ValueError(
                f"sub-model {i} returns {jax.tree.structure(out)}, and the first "
                f"{jax.tree.structure(first)}. Outputs that are merged have one structure."
            )
        for name, y, like in zip(names, jax.tree.leaves(out), jax.tree.leaves(first), strict=True):
            _check_output(how, i, name, y, like)


def _check_output(how: How, i: int, name: str, y: Any, like: Any) -> None:
    """Raises `ValueError` unless one output of sub-model `i` is like that of the first."""
    if how in ("concat", "vote") and not like.ndim:
        raise ValueError(f"output {name!r} is a scalar, and {how!r} is along its last axis.")
    compared = slice(-1) if how == "concat" else slice(None)
    shape, expected = y.shape[compared], like.shape[compared]
    if (shape, y.ndim, y.dtype) != (expected, like.ndim, like.dtype):
        raise ValueError(
            f"sub-model {i} returns {name!r} as {y.dtype}{list(y.shape)}, and the first as "
            f"{like.dtype}{list(like.shape)}. {how!r} merges outputs of one shape and dtype; "
            'widths may differ for "concat".'
        )
