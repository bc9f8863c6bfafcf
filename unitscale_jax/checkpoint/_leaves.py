"""Leaves as they are stored, and back: bits, shapes and dtypes, never a rounding."""

import dataclasses
import difflib
import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.checkpoint import _shards

_PYTHON: dict[str, Callable[[Any], Any]] = {  # how each Python scalar is read from JSON
    "Python bool": bool,
    "Python int": int,
    "Python float": float.fromhex,
    "Python str": str,
}
_KINDS = {"Python bool": jnp.bool_, "Python int": jnp.integer, "Python float": jnp.floating}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """A leaf as it is stored: the shards of an array or a key, or the `value` of a Python scalar.

    Before it is written it has its `array`, and once it is, the `folder` of its shards.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    impl: str | None = None  # of a key
    value: bool | int | str | None = None
    shards: tuple[_shards.Shard, ...] = ()
    array: Any = None
    folder: pathlib.Path | None = None

    def described(self) -> dict[str, Any]:
        """What of it goes to the manifest, for JSON."""
        said = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        here = ("array", "folder")
        return {name: x for name, x in said.items() if name not in here and x is not None}

    @classmethod
    def from_description(cls, folder: pathlib.Path, said: dict[str, Any]) -> "Leaf":
        """The inverse of `described`."""
        shards = tuple(_shards.Shard(*shard) for shard in said["shards"])
        return cls(**said | {"shape": tuple(said["shape"]), "shards": shards, "folder": folder})

    def bits(self, dtype: np.dtype, more: tuple[int, ...] = (), index: Any = None) -> np.ndarray:
        """Its array from the disk, or a part of it; `more` are dimensions beyond its shape."""
        assert self.folder is not None
        return _shards.read(self.folder, self.shards, dtype, (*self.shape, *more), index)


def encode(tree: Any) -> list[Leaf]:
    """The leaves of a pytree in order, their arrays where they are."""
    return [_encoded(name, leaf) for name, leaf in trees.named_leaves(tree).items()]


def decode(leaves: list[Leaf], like: Any, source: str) -> Any:
    """The leaves in the structure of `like`, each as the kind of thing it is there.

    Raises:
        ValueError: Names, shapes or dtypes differ from those of `like`; the first is named.
    """
    saved = {leaf.name: leaf for leaf in leaves}
    wanted = trees.named_leaves(like)
    if difference := _difference(saved, wanted):
        raise ValueError(
            f"{source} is of another model: {difference}. Restore with the model, optimiser and "
            "options that were saved, or start this model in another directory."
        )
    decoded = [_decoded(saved[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), decoded)


def _encoded(name: str, leaf: Any) -> Leaf:
    dtype, shape = _dtype_and_shape(name, leaf)
    if dtype in _PYTHON:
        # Hexadecimal is exact, and knows the infinities that JSON does not.
        return Leaf(name=name, dtype=dtype, value=leaf.hex() if dtype == "Python float" else leaf)
    if _is_key(leaf):
        impl, array = str(jax.random.key_impl(leaf)), jax.random.key_data(leaf)
        return Leaf(name=name, dtype=dtype, shape=shape, impl=impl, array=array)
    if np.dtype(leaf.dtype).kind in "OSUMm":
        raise TypeError(_no_leaf(name, f"array of {leaf.dtype}"))
    return Leaf(name=name, dtype=dtype, shape=shape, array=leaf)


def _dtype_and_shape(name: str, leaf: Any) -> tuple[str, tuple[int, ...]]:
    if type(leaf) in (bool, int, float, str):
        return f"Python {type(leaf).__name__}", ()
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise TypeError(_no_leaf(name, type(leaf).__name__))
    return str(leaf.dtype), tuple(leaf.shape)


def _no_leaf(name: str, came: str) -> str:
    return (
        f"{name} is a leaf of type {came}, which a checkpoint cannot hold. Save a numeric array, a "
        "typed key, an int, a float, a bool or a str."
    )


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _difference(saved: dict[str, Leaf], wanted: dict[str, Any]) -> str | None:
    for name, leaf in wanted.items():
        expected = _text(*_dtype_and_shape(name, leaf))
        if name not in saved:
            return f"leaf {name!r}, {expected}, is missing from it{closest(name, saved)}"
        if not _fits(saved[name], leaf):
            came = _text(saved[name].dtype, saved[name].shape)
            return f"leaf {name!r} is expected to be {expected}, the checkpoint has {came}"
    for name in (name for name in saved if name not in wanted):
        came = _text(saved[name].dtype, saved[name].shape)
        return f"it has a leaf {name!r}, {came}, that is not expected{closest(name, wanted)}"
    return None


def _fits(saved: Leaf, leaf: Any) -> bool:
    dtype, shape = _dtype_and_shape(saved.name, leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct) and saved.dtype in _KINDS:
        # `jax.eval_shape` turns a Python number into a scalar of its kind.
        return shape == () and jnp.issubdtype(leaf.dtype, _KINDS[saved.dtype])
    return (dtype, shape) == (saved.dtype, saved.shape)


def _text(dtype: str, shape: tuple[int, ...]) -> str:
    return dtype if dtype in _PYTHON else f"{dtype}[{','.join(map(str, shape))}]"


def closest(name: str, others: Iterable[str]) -> str:
    """The name that may have been meant, as the end of a sentence."""
    near = difflib.get_close_matches(name, list(others), n=1)
    return f" (closest: {near[0]!r})" if near else ""


def _decoded(saved: Leaf, like: Any) -> Any:
    if saved.dtype in _PYTHON:
        value = _PYTHON[saved.dtype](saved.value)
        return jnp.asarray(value, like.dtype) if hasattr(like, "dtype") else value
    if saved.impl is not None:
        return placed(_key(saved, saved.impl), like)
    dtype, sharding = jnp.dtype(saved.dtype), _sharding(like)
    if isinstance(like, np.ndarray | np.generic):
        array = saved.bits(dtype)
        return array[()] if isinstance(like, np.generic) else array
    if sharding is None:
        return _as_weak(saved.bits(dtype), like)
    return _sharded(saved, dtype, sharding, like)


def _sharded(saved: Leaf, dtype: np.dtype, sharding: jax.sharding.Sharding, like: Any) -> jax.Array:
    try:
        sharding.shard_shape(saved.shape)
    except ValueError as error:
        raise ValueError(f"{saved.name} cannot be restored as it is in `like`: {error}") from None
    # Devices that hold the same part are given the same copy: what a host holds is one leaf.
    part = functools.cache(lambda *bounds: saved.bits(dtype, index=[slice(*b) for b in bounds]))
    at = lambda index: part(*((cut.start, cut.stop) for cut in index))
    array = jax.make_array_from_callback(saved.shape, sharding, at, dtype=dtype)
    if not getattr(like, "weak_type", False):
        return array
    return jax.jit(_weak, out_shardings=sharding)(array)


def _key(saved: Leaf, impl: str) -> jax.Array:
    word = jax.random.key_data(jax.random.key(0, impl=impl))
    bits = saved.bits(np.dtype(word.dtype), word.shape)
    return jax.random.wrap_key_data(jnp.asarray(bits), impl=impl)


def _as_weak(array: np.ndarray, like: Any) -> jax.Array:
    return (_weak if getattr(like, "weak_type", False) else jnp.asarray)(array)


def _weak(array: Any) -> jax.Array:
    # A weak type decides what later promotions give, and only an operation hands it on.
    return jnp.full(array.shape, np.zeros((), array.dtype).item()).at[...].set(array)


def placed(array: jax.Array, like: Any) -> jax.Array:
    """An array that each process has, on the devices of `like`, if these are known."""
    sharding = _sharding(like)
    return array if sharding is None else _put(array, sharding)


def _put(array: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if _is_key(array):
        data = _put(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _sharding(like: Any) -> jax.sharding.Sharding | None:
    sharding = getattr(like, "sharding", None)
    abstract = isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh)
    # Only what was committed is committed: an array pinned to one device fits no mesh.
    pinned = sharding is not None and not abstract and getattr(like, "committed", True)
    return sharding if pinned else None
