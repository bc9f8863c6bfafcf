"""The bridge from Flax: a module becomes `params` and a pure `apply`, and stays as it was.

    apply(params, *inputs)                          -> outputs
    apply(params, *inputs, state=state, key=key)    -> (outputs, new_state)

Whatever a module keeps inside comes in as an argument and goes out as a result: its parameters, its
state (batch statistics, caches), its random streams (a `key`). So `apply` is a function like any
other, under jit, grad, vmap, scan and remat. This is the only file that knows Flax.
"""

import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import core, linen, nnx

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_key, expected
from unitscale_jax.typing import Apply, Key, Params, State

Rows: TypeAlias = Literal["auto", "vmap", "batch"]
_Whole: TypeAlias = Callable[[Params, State, Key | None, tuple, dict[str, Any]], tuple[Any, State]]


class Bridged(NamedTuple):
    """A module as a pure function.

    Attributes:
        apply: Maps `(params, *inputs)` to outputs; with `state=` to `(outputs, new_state)`.
        params: The trainable parameters, a pytree.
        state: Everything else the module carries from call to call, a pytree; empty if nothing.
    """

    apply: Apply
    params: Params
    state: State


def from_linen(
    module: linen.Module, variables: Mapping[str, Any], *, rows: Rows = "auto"
) -> Bridged:
    """Bridges a Linen module and its variables.

    `apply(params, *inputs, state=None, key=None, **options)` equals `module.apply`, bit for bit.
    Options such as `train=True` or `method=` go to it as they are. `state` holds the collections
    other than "params"; those given are mutable, and come back whether they changed or not.

    `key` is the stream "dropout", and streams of other names derive from it. An array of keys, one
    per row, is what a loss receives; then row i is applied as a batch of its own with key i, so its
    mask depends on nothing but that key. Every array among inputs and options has the rows first
    then, and so has every output. A module that mixes rows cannot do that: where its state changes,
    or an output has no rows, the whole batch is applied with the key of its first row, and a
    warning says so. `rows` decides instead: "batch" means that, silently, and "vmap" makes it an
    error. What cannot be seen is mixing without either, attention across the batch for instance;
    there, say "batch".

    Args:
        module: A Linen module.
        variables: What `module.init` returned; boxes of metadata are taken off.
        rows: How an array of keys is used.

    Returns:
        `(apply, params, state)`.

    Raises:
        ValueError: `variables` has collections, and "params" is none of them; or (from `apply`) the
            module has state and none was given, or keys and rows differ in number.
        TypeError: The module is none of Linen's; or (from `apply`) the key is a raw one, not made
            by `jax.random.key`.

    Example:
        >>> from flax import linen as nn
        >>> module, x = nn.Dense(3), jnp.ones((2, 4))
        >>> variables = module.init(jax.random.key(0), x)
        >>> apply, params, _ = from_linen(module, variables)
        >>> bool(jnp.all(apply(params, x) == module.apply(variables, x)))
        True
    """
    _check_module(module, linen.Module, "from_linen", "flax.linen")
    if not isinstance(variables, Mapping):
        raise TypeError(expected("variables", variables, "what `module.init` returned"))
    if variables and "params" not in variables:
        raise ValueError(
            f"variables has no 'params'; did you pass variables['params']? It has {list(variables)}"
            ". For a module without parameters give {'params': {}, ..}."
        )
    collections = core.unfreeze(linen.meta.unbox(dict(variables)))
    params = collections.pop("params", {})

    def whole(params: Params, state: State, key: Key | None, inputs: tuple, options: dict) -> Any:
        streams = {} if key is None else {"dropout": key, "params": jax.random.fold_in(key, 1)}
        everything = {"params": params, **state}
        if not state:
            return module.apply(everything, *inputs, rngs=streams, **options), state
        outputs, changed = module.apply(
            everything, *inputs, rngs=streams, mutable=list(state), **options
        )
        return outputs, {**state, **changed}

    return _bridged(type(module).__name__, whole, params, collections, rows)


def from_nnx(model: nnx.Module, *, rows: Rows = "auto") -> Bridged:
    """Bridges an NNX module; the object is read once and left as it is.

    `apply(params, *inputs, state=None, key=None, method="__call__", **options)` equals
    `model(*inputs, **options)`, bit for bit. `params` is the `nnx.State` of the `nnx.Param`s, with
    the names of the Linen twin and a shared parameter once; `state` is that of all other variables,
    but for random streams and sown intermediates. The mode is that of `model` now: bridge after
    `model.train()` for an `apply` that trains, after `model.eval()` for one that serves; both take
    the same `params`.

    Every random stream starts anew from `key` at each call, `fold_in(key, crc32(its path))`, so a
    draw depends on the key alone and no counter has to be carried. An array of keys, one per row,
    is used as `from_linen` says, and so is `rows`.

    `apply` takes any tree with the names of `params`, and so for `state`: what `us.load` returns,
    quantized or compacted, is a tree of dicts and lists, and is as good as the `nnx.State`.

    Args:
        model: An NNX module.
        rows: How an array of keys is used.

    Returns:
        `(apply, params, state)`.

    Raises:
        ValueError: (from `apply`) As `from_linen`; the model drew random numbers without a key; or
            a parameter is missing or one too many, by its name.
        TypeError: The model is none of NNX's; or (from `apply`) the key is a raw one, not made by
            `jax.random.key`.

    Example:
        >>> from flax import nnx
        >>> model, x = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 4))
        >>> apply, params, _ = from_nnx(model)
        >>> bool(jnp.all(apply(params, x) == model(x)))
        True
    """
    _check_module(model, nnx.Module, "from_nnx", "flax.nnx")
    graphdef, initial, streams, sown, kept = map(_copy, _split(model))

    def whole(params: Params, state: State, key: Key | None, inputs: tuple, options: dict) -> Any:
        seeded = _seeded(streams, key)
        own = trees.by_names(params, initial, "`params`"), trees.by_names(state, kept, "`state`")
        fresh = nnx.merge(graphdef, own[0], _copy(seeded), _copy(sown), own[1])
        method = getattr(fresh, options.get("method", "__call__"))
        outputs = method(*inputs, **{k: v for k, v in options.items() if k != "method"})
        _, _, after, _, new_state = _split(fresh)
        if key is None and _changed(seeded, after):
            raise ValueError(_no_key(_changed(seeded, after)[0]))
        same = set(trees.names(new_state)) == set(trees.names(state))  # a cache may be made inside
        return outputs, trees.by_names(new_state, state) if same else new_state

    return _bridged(type(model).__name__, whole, initial, kept, rows)


def _check_module(module: Any, kind: type, verb: str, home: str) -> None:
    if isinstance(module, kind):
        return
    other = "from_nnx" if isinstance(module, nnx.Module) else "from_linen"
    bridge = f" Bridge it by {other}." if isinstance(module, nnx.Module | linen.Module) else ""
    says = expected(f"the module of {verb}", module, f"a module of {home}, built and not its class")
    raise TypeError(f"{says}{bridge}")


def _bridged(name: str, whole: _Whole, params: Params, initial: State, rows: Rows) -> Bridged:
    if rows not in ("auto", "vmap", "batch"):
        raise ValueError(expected("`rows`", rows, ("auto", "vmap", "batch")))
    call = _by_rows(name, whole, rows)
    held = trees.names(initial)

    def apply(params: Params, /, *inputs: Any, state: Any = None, key: Any = None, **options: Any):
        if held and not state:
            raise ValueError(_no_state(name, held))
        _check_key(key)
        outputs, new_state = call(params, initial if state is None else state, key, inputs, options)
        return outputs if state is None else (outputs, new_state)

    apply.__name__ = apply.__qualname__ = f"{name}_apply"
    return Bridged(apply, params, initial)


def _by_rows(name: str, whole: _Whole, rows: Rows) -> _Whole:
    warned = []

    def call(params: Params, state: State, key: Any, inputs: tuple, options: dict) -> Any:
        if key is None or key.ndim == 0:
            return whole(params, state, key, inputs, options)
        if rows == "batch":
            return whole(params, state, key[0], inputs, options)
        try:
            return _each_row(whole, params, state, key, inputs, options), state
        except _MixesRowsError as mixes:
            if rows == "vmap":
                raise ValueError(f"{name}: {mixes}, but rows='vmap'. Use rows='batch'.") from None
            if not warned:
                warned.append(True)
                warnings.warn(_whole_batch(name, mixes), stacklevel=3)
            return whole(params, state, key[0], inputs, options)

    return call


class _MixesRowsError(Exception):
    """A module whose rows are not independent; says how that was seen."""


def _each_row(
    whole: _Whole, params: Params, state: State, keys: Any, inputs: tuple, options: dict
) -> Any:
    arguments = {"inputs": inputs, "options": options}
    leaves, structure = jax.tree.flatten(arguments)
    mapped = [isinstance(leaf, jax.Array | np.ndarray) and leaf.ndim > 0 for leaf in leaves]
    arrays = [leaf for leaf, is_mapped in zip(leaves, mapped, strict=True) if is_mapped]
    _check_rows(keys, trees.named_leaves(arguments), mapped)

    def row(key: Any, arrays: list) -> Any:
        one = iter(arrays)
        # A batch of one row, because modules expect the axis of rows.
        filled = [
            next(one)[None] if is_mapped else leaf
            for leaf, is_mapped in zip(leaves, mapped, strict=True)
        ]
        again = jax.tree.unflatten(structure, filled)
        outputs, new_state = whole(params, state, key, again["inputs"], again["options"])
        _check_independent(state, new_state, outputs)
        return jax.tree.map(lambda x: x[0], outputs)

    return jax.vmap(row)(keys, arrays)


def _check_rows(keys: Any, arguments: dict[str, Any], mapped: list[bool]) -> None:
    for (name, leaf), is_mapped in zip(arguments.items(), mapped, strict=True):
        if is_mapped and leaf.shape[0] != keys.shape[0]:
            raise ValueError(
                f"{name} has shape {leaf.shape}, where {keys.shape[0]} rows are expected, one per "
                "key. Give an array that all rows share to the module when it is built, or bridge "
                "with rows='batch'."
            )


def _check_independent(state: State, new_state: State, outputs: Any) -> None:
    if changed := _changed(state, new_state):
        raise _MixesRowsError(f"its state {changed[0]!r} changes with the batch")
    for name, leaf in trees.named_leaves(outputs).items():
        if jnp.shape(leaf)[:1] != (1,):
            raise _MixesRowsError(f"its output {name!r} of shape {jnp.shape(leaf)} has no rows")


def _changed(before: Any, after: Any) -> list[str]:
    """Names of the leaves that are not the very same arrays, so that tracers can be told apart."""
    old = trees.named_leaves(before)
    return [name for name, leaf in trees.named_leaves(after).items() if old.get(name) is not leaf]


def _split(model: nnx.Module) -> Any:
    return nnx.split(model, nnx.Param, nnx.RngState, nnx.Intermediate, ...)


def _copy(state: Any) -> Any:
    """The same arrays in new variables, since NNX writes into variables."""
    return jax.tree.map(lambda leaf: leaf, state)


def _seeded(streams: Any, key: Key | None) -> Any:
    if key is None:
        return streams

    def seed(name: str, leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros_like(leaf)  # the counter of a stream
        own = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
        return jax.random.split(own, leaf.shape) if leaf.ndim else own

    return trees.map_named(seed, streams)


def _check_key(key: Any) -> None:
    if key is None:
        return
    check_key(key)
    if key.ndim > 1:
        raise ValueError(
            f"key has shape {key.shape}, expected () or (rows,). Give one key, or one per row."
        )


def _no_state(name: str, held: list[str]) -> str:
    listed = ", ".join(held[:3]) + (", ..." if held[3:] else "")
    return (
        f"{name} has state ({listed}), and none was given. Call "
        "apply(params, *inputs, state=state); it returns (outputs, new_state)."
    )


def _no_key(stream: str) -> str:
    return (
        f"the model drew from its stream {stream.rpartition('/')[0]!r}, and no key was given. Call "
        "apply(params, *inputs, key=jax.random.key(seed)), or bridge after model.eval()."
    )


def _whole_batch(name: str, mixes: Exception) -> str:
    return (
        f"{name}: {mixes}, so its rows cannot be applied one by one. The whole batch is applied "
        "with the key of its first row, and masks depend on how the batch is split. Bridge with "
        "rows='batch' if that is what you want."
    )
