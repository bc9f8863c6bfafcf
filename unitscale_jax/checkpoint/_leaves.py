"""Leaves as they are stored, and back: bits, shapes and dtypes, never a rounding."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.checkpoint import _arrays
from unitscale_jax.errors import closest

_PYTHON: dict[str, Callable[[Any], Any]] = {  # how each Python scalar is read from JSON
    "Python bool": bool,
    "Python int": int,
    "Python float": float.fromhex,
    "Python str": str,
}
_KINDS = {"Python bool": jnp.bool_, "Python int": jnp.integer, "Python float": jnp.floating}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """A leaf as it is stored: an array or a key, or the `value` of a Python scalar."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    impl: str | None = None  # of a key
    value: bool | int | str | None = None
    array: Any = None  # before it is written

    def described(self) -> dict[str, Any]:
        """Describes a leaf as JSON, without its array."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: x for name, x in fields.items() if name != "array" and x is not None}

    @classmethod
    def from_description(cls, fields: Any) -> "Leaf":
        """Makes a leaf of the JSON that `described` wrote.

        Raises:
            ValueError: The fields describe no leaf.
        """
        try:
            leaf = cls(**fields | {"shape": tuple(fields["shape"])})
        except (TypeError, KeyError):
            raise ValueError(f"{fields!r:.80} describes no leaf") from None
        whole = all(type(n) is int and n >= 0 for n in leaf.shape)
        if not (isinstance(leaf.name, str) and whole and leaf.array is None and _known(leaf)):
            raise ValueError(f"leaf {leaf.name!r} is described as {fields!r:.80}, which is none")
        return leaf

    def form(self, sharding: Any = None) -> jax.ShapeDtypeStruct | None:
        """The form in which its array is stored; None of a Python scalar, which has none."""
        if self.dtype in _PYTHON:
            return None
        if self.impl is not None:
            word = jax.random.key_data(jax.random.key(0, impl=self.impl))
            return jax.ShapeDtypeStruct((*self.shape, *word.shape), word.dtype)
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype), sharding=sharding)


def _known(leaf: Leaf) -> bool:
    """True if the dtype of a leaf is one, and its value or its kind of key is of that dtype."""
    try:
        if leaf.dtype in _PYTHON:
            kind = {"Python float": str}.get(leaf.dtype, _PYTHON[leaf.dtype])
            return type(leaf.value) is kind and leaf.shape == () and _python(leaf) is not None
        if leaf.impl is not None:
            return str(jax.random.key(0, impl=leaf.impl).dtype) == leaf.dtype
        return leaf.value is None and jnp.dtype(leaf.dtype).name == leaf.dtype
    except Exception:  # of what was never a dtype or a kind of keys, JAX may say anything
        return False


def encode(tree: Any) -> list[Leaf]:
    """The leaves of a pytree in order, their arrays where they are."""
    return [_encoded(name, leaf) for name, leaf in trees.named_leaves(tree).items()]


def matched(leaves: list[Leaf], like: Any, where: str) -> list[jax.ShapeDtypeStruct | None]:
    """The form in which the array of each leaf of `like` is to be read.

    Raises:
        ValueError: Names, shapes or dtypes differ from those of `like`; the first is named. Or a
            sharding does not divide a leaf, or JAX has no such dtype to put on devices.
    """
    saved, wanted = {leaf.name: leaf for leaf in leaves}, trees.named_leaves(like)
    if difference := _difference(saved, wanted):
        raise other_model(where, difference)
    return [_form(saved[name], leaf) for name, leaf in wanted.items()]


def other_model(where: str, difference: str) -> ValueError:
    """The error of a checkpoint that does not fit."""
    return ValueError(
        f"{where} is of another model: {difference}. Restore with the model, optimiser and options "
        "that were saved, or start this model in another directory."
    )


def decode(leaves: list[Leaf], like: Any, forms: list[Any], folder: pathlib.Path) -> Any:
    """The leaves in the structure of `like`, each as the kind of thing it is there."""
    saved, wanted = {leaf.name: leaf for leaf in leaves}, trees.named_leaves(like)
    named = dict(zip(wanted, forms, strict=True))
    arrays = _arrays.read(folder, {name: form for name, form in named.items() if form is not None})
    decoded = [_decoded(saved[name], leaf, arrays.get(name)) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), decoded)


def _encoded(name: str, leaf: Any) -> Leaf:
    dtype, shape = _dtype_and_shape(name, leaf)
    if dtype in _PYTHON:
        # Hexadecimal is exact, and knows the infinities that JSON does not.
        return Leaf(name=name, dtype=dtype, value=leaf.hex() if dtype == "Python float" else leaf)
    if _is_key(leaf):
        impl, array = str(jax.random.key_impl(leaf)), jax.random.key_data(leaf)
        return Leaf(name=name, dtype=dtype, shape=shape, impl=impl, array=array)
    if leaf.dtype.kind in "OSUMm" or str(leaf.dtype) in _arrays.REFUSED:
        raise TypeError(_no_leaf(name, f"array of {leaf.dtype}"))
    if not np.dtype(leaf.dtype).isnative:
        raise TypeError(
            f"{name} is an array of {leaf.dtype}, whose bytes are in the order of other machines. "
            "Convert it: x.astype(x.dtype.newbyteorder('='))."
        )
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


def _form(saved: Leaf, like: Any) -> jax.ShapeDtypeStruct | None:
    """The form in which the array of a leaf is to be read; a key's is read whole, being small."""
    sharding = None if isinstance(like, np.ndarray | np.generic) else _sharding(like)
    if saved.dtype in _PYTHON or saved.impl is not None or sharding is None:
        return saved.form()
    try:
        sharding.shard_shape(saved.shape)
        on_device(saved.name, np.zeros((), saved.dtype))
    except ValueError as error:
        raise ValueError(f"{saved.name} cannot be restored as it is in `like`: {error}") from None
    return saved.form(sharding)


def _decoded(saved: Leaf, like: Any, array: Any) -> Any:
    if saved.dtype in _PYTHON:
        return _number(_python(saved), like)
    if saved.impl is not None:
        return placed(jax.random.wrap_key_data(jnp.asarray(array), impl=saved.impl), like)
    if isinstance(like, np.generic):
        return array[()]
    if isinstance(like, np.ndarray) or not _holds(array.dtype):
        return array  # what JAX would narrow stays NumPy's
    if not getattr(like, "weak_type", False):
        return jnp.asarray(array)
    return jax.jit(_weak, out_shardings=_sharding(like))(array)


def _python(saved: Leaf) -> Any:
    return _PYTHON[saved.dtype](saved.value)


def _number(value: Any, like: Any) -> Any:
    """A Python number, as an array where `like` is abstract and its dtype has all the digits."""
    if not hasattr(like, "dtype"):
        return value
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(value, like.dtype)
    except OverflowError:
        return value
    return jnp.asarray(array) if array.item() == value or value != value else value


def _weak(array: Any) -> jax.Array:
    # A weak type decides what later promotions give, and only an operation hands it on.
    return jnp.full(array.shape, np.zeros((), array.dtype).item()).at[...].set(array)


def on_device(where: str, x: np.ndarray) -> jax.Array:
    """An array for JAX, with all its digits.

    Raises:
        ValueError: JAX has 32 bits here where the array has 64.
    """
    array = jnp.asarray(x)
    if array.dtype != x.dtype:
        raise ValueError(
            f"{where} is {x.dtype}, of which JAX makes {array.dtype} here. Allow it by "
            "jax.config.update('jax_enable_x64', True)."
        )
    return array


def _holds(dtype: np.dtype) -> bool:
    return jax.dtypes.canonicalize_dtype(dtype) == dtype


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
