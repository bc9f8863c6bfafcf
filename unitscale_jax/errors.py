"""The sentences that errors share: what was expected, what came, and what may have been meant.

An error is help in three parts: where; what was expected and what came; the way out. Each function
here words the first two, so that one slip reads alike wherever it is made. The caller raises, and
adds the way out, which it alone knows:

    raise ValueError(f"{not_divisible(name, size, 'groups of 4')} Pad it to {up}.")

Those named `check_` raise themselves: what a public function asks of its first argument.
"""

import difflib
import numbers
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

_LONGEST = 60  # characters of a value: a longer one hides the sentence around it


def closest(name: str, among: Iterable[str], most: int = 3) -> str:
    """The names that may have been meant, as the end of a sentence; empty if none is near.

    Example:
        >>> closest("head/kernle", ["head/kernel", "body/bias"])
        "; closest: 'head/kernel'"
    """
    near = difflib.get_close_matches(name.strip("*/"), list(among), n=most, cutoff=0.5)
    return f"; closest: {', '.join(map(repr, near))}" if near else ""


def unknown(name: object, among: Iterable[str], noun: str) -> str:
    """Says that nothing has this name, and which names are near it, or else which there are.

    Example:
        >>> unknown("modle", ["data", "model"], "mesh axis")
        "there is no mesh axis 'modle'; closest: 'model'."
        >>> unknown("x", ["data", "model"], "mesh axis")
        "there is no mesh axis 'x'; there are 'data', 'model'."
    """
    names = list(among)
    few = ", ".join(map(repr, names[:6])) + (", .." if names[6:] else "")
    there_are = f"; there are {few}" if names else "; there are none"
    return f"there is no {noun} {name!r}{closest(str(name), names) or there_are}."


def expected(what: str, got: Any, wanted: str | Iterable[object]) -> str:
    """Says what came where something else belongs; `wanted` is a phrase, or the choices.

    Example:
        >>> expected("zero", 5, [0, 1, 2, 3])
        'zero is 5; expected 0, 1, 2 or 3.'
        >>> expected("policy", jnp.ones((4, 3)), "a us.Policy or the name of a dtype")
        'policy is an array float32[4,3]; expected a us.Policy or the name of a dtype.'
    """
    return f"{what} is {shown(got)}; expected {_choices(wanted)}."


def wrong_shape(what: str, got: Iterable[object], wanted: str | Iterable[object]) -> str:
    """Says which shape came and which is expected: a shape, or a phrase about it.

    Example:
        >>> wrong_shape("valid", (2, 5), (2,))
        'valid has shape (2, 5); expected (2,).'
    """
    text = wanted if isinstance(wanted, str) else str(tuple(wanted))
    return f"{what} has shape {tuple(got)}; expected {text}."


def not_divisible(what: str, size: int, by: str) -> str:
    """Says that parts do not divide a size, and which numbers do.

    Example:
        >>> not_divisible("'w' along axis -2", 6, "groups of 4")
        "'w' along axis -2 has 6, which groups of 4 do not divide; its divisors are 1, 2, 3, 6."
    """
    return f"{what} has {size}, which {by} do not divide; {_divisors(size)}."


def uneven_rows(by: str, rows: int, term: str) -> str:
    """Says that rows which fill up the last part cannot be left out of a sum that a loss made.

    Example:
        >>> uneven_rows("4 parts", 6, "kl").partition(", and ")[0]
        '4 parts do not divide 6 rows'
    """
    return (
        f"{by} do not divide {rows} rows, and term {term!r} sums its rows itself, so the rows that "
        "fill up the last one cannot be left out. Return one number per row, "
        "us.Mean(total=losses, weight=counts)"
    )


def shown(value: Any) -> str:
    """A value as part of a sentence: an array by dtype and shape, what is long by its type."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an array {value.dtype}[{','.join(map(str, value.shape))}]"
    text = repr(value)
    return text if len(text) <= _LONGEST and "\n" not in text else f"a {type(value).__name__}"


def _choices(wanted: str | Iterable[object]) -> str:
    if isinstance(wanted, str):
        return wanted
    *first, last = map(repr, wanted)
    return f"{', '.join(first)} or {last}" if first else last


def _divisors(size: int) -> str:
    if size < 1:
        return "it is empty"
    low = [d for d in range(1, int(size**0.5) + 1) if size % d == 0]
    return f"its divisors are {', '.join(map(str, sorted({*low, *(size // d for d in low)})))}"


def check_type(what: str, got: Any, kind: Any, wanted: str) -> None:
    """Raises `TypeError` unless a value is of a type."""
    if not isinstance(got, kind):
        raise TypeError(expected(what, got, wanted))


def check_number(what: str, got: Any) -> None:
    """Raises `TypeError` unless a value is a real number, which bounds can be asked of."""
    check_type(what, got, numbers.Real | jax.Array, "a number")


def check_whole(what: str, got: Any, wanted: str = "a whole number") -> None:
    """Raises `TypeError` unless a value is an integer; True is none, and neither is 2.0."""
    if isinstance(got, bool) or not isinstance(got, int):
        raise TypeError(expected(what, got, wanted))


def check_encodable(what: str, name: str) -> None:
    """Raises `ValueError` if UTF-8 has no bytes for a name, so that no file can hold it."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} {name!r} has the character {name[error.start]!r}, half of a pair of UTF-16, "
            "which UTF-8 has no bytes for. Rename that key."
        ) from None


def check_callable(what: str, got: Any) -> None:
    """Raises `TypeError` unless a value can be called."""
    if not callable(got):
        raise TypeError(expected(what, got, "a function"))


def check_key(key: Any) -> None:
    """Raises `TypeError` unless a value is a typed key, or an array of them."""
    if not hasattr(key, "dtype") or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        wanted = "a typed key. Make it with jax.random.key(seed), or from an old one with "
        raise TypeError(expected("`key`", key, f"{wanted}jax.random.wrap_key_data"))


def keywords(given: Any) -> Mapping[str, Any]:
    """The keywords in `kwargs=`, for those of a function that have the name of an option."""
    if given is None:
        return {}
    check_type("`kwargs`", given, Mapping, "keywords of the function by name, as {'axis': 0}")
    return given


def check_array(what: str, got: Any, ndim: int = 0) -> None:
    """Raises `TypeError` unless a value is an array, and `ValueError` if it has too few axes."""
    if not (hasattr(got, "shape") and hasattr(got, "dtype")):
        raise TypeError(expected(what, got, "an array"))
    if len(got.shape) < ndim:
        raise ValueError(wrong_shape(what, got.shape, f"at least {ndim} axes"))


def check_folder(path: pathlib.Path) -> None:
    """Raises `OSError` unless a file may be written there, in words of the path that was asked."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; expected the name of a file in it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path} cannot be written: no such directory as {path.parent}. Make it first."
        )
