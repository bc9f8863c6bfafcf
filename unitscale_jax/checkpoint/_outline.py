"""The outline of a tree: what each container is, and under which keys it holds what.

    {"layers": [w, (b, None)]}
    -> ["dict", "dict", [["layers", ["list", "list", [[0, "*"], [1, ["tuple", "tuple", ..]]]]]]]

Names of leaves do not say it: "layers/0" may be in a list, in a tuple or under the key "0". An
outline is JSON, so a file can hold it. What is made of it are dicts, lists, tuples and tuples with
named fields: no class is looked up, so that nothing in a file is executed.
"""

import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax

from unitscale_jax.quant import is_quantized

LEAF, UNKNOWN = "*", "?"  # nobody knows it of a checkpoint from before outlines
_KINDS = ("dict", "list", "tuple", "fields", "other")  # only its own class makes an "other"


class Container(NamedTuple):
    """A container: the kind it is made as, the name of its class, and its entries by key."""

    kind: str
    type: str
    entries: tuple[tuple[str | int, "Outline"], ...]


Outline: TypeAlias = Container | str | None
"""A container, `LEAF`, or None where the tree has None."""


def outline(tree: Any, is_leaf: Callable[[Any], bool] = lambda _: False) -> Outline:
    """Returns the outline of a tree: its containers without the leaves.

    The box that Flax puts around a parameter is no container, as it is no part of a name.

    Example:
        >>> outline([1.0, None])
        Container(kind='list', type='list', entries=((0, '*'), (1, None)))
    """
    if tree is None:
        return None
    below, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if is_leaf(tree) or (below and not below[0][0]):
        return LEAF
    steps = [path[0] for path, _ in below]
    keys = [next(getattr(s, a) for a in ("key", "idx", "name") if hasattr(s, a)) for s in steps]
    entries = tuple((key, outline(x, is_leaf)) for key, (_, x) in zip(keys, below, strict=True))
    kind = _kind(tree, keys)
    if (kind, entries) == ("other", (("value", LEAF),)):
        return LEAF  # the box of a parameter
    if kind == "other":  # whose keys JSON may not know
        entries = tuple((str(key), x) for key, x in entries)
    name = repr(tree) if is_quantized(tree) else type(tree).__name__
    return Container(kind, name, entries)


def _kind(node: Any, keys: list[Any]) -> str:
    if isinstance(node, tuple):
        return "fields" if hasattr(node, "_fields") else "tuple"
    if isinstance(node, list):
        return "list"
    if isinstance(node, Mapping):
        return "dict" if all(isinstance(key, str | int) for key in keys) else "other"
    if dataclasses.is_dataclass(node) and [f.name for f in dataclasses.fields(node)] == keys:
        return "fields"
    return "other"


def to_text(of: Outline) -> str:
    """Writes an outline as JSON."""
    return json.dumps(of, separators=(",", ":"))


def from_text(text: str) -> Outline:
    """Reads an outline that `to_text` wrote.

    Raises:
        ValueError: The text is no outline.
    """
    try:
        return parsed(json.loads(text))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parsed(of: Any) -> Outline:
    """Makes an outline from what JSON holds.

    Raises:
        ValueError: It is none.
    """
    if of is None or of in (LEAF, UNKNOWN):
        return of
    if not (isinstance(of, list) and len(of) == 3 and of[0] in _KINDS and isinstance(of[1], str)):
        raise ValueError("it is no outline of containers")
    kind, name, entries = of
    for entry in entries if isinstance(entries, list) else [None]:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str | int)):
            raise ValueError(f"the entries of a {name} are not keys and what they hold")
    return Container(kind, name, tuple((key, parsed(below)) for key, below in entries))


def names(of: Outline, above: tuple[str, ...] = ()) -> list[str]:
    """Names of the leaves, in the order of `jax.tree.leaves`."""
    if not isinstance(of, Container):
        return [] if of is None else ["/".join(above)]
    # As `tree.names`: a field "value" with no other leaf beside it is the box of a parameter.
    boxed = of.kind in ("fields", "other") and [k for k, x in of.entries if x == LEAF] == ["value"]
    out = []
    for key, x in of.entries:
        out += names(x, above if boxed and x == LEAF else (*above, str(key)))
    return out


def made(of: Outline, leaves: Iterator[Any]) -> Any:
    """The tree of an outline and of its leaves in order.

    Raises:
        ValueError: It holds a container that only its own class can make.
    """
    if not isinstance(of, Container):
        return None if of is None else next(leaves)
    if of.kind == "other":
        raise ValueError(f"it holds a {of.type}, which only its own class can make")
    values = {key: made(x, leaves) for key, x in of.entries}
    if of.kind == "dict":
        return values
    if of.kind == "fields":
        return _record(of.type, tuple(values))(*values.values())
    return list(values.values()) if of.kind == "list" else tuple(values.values())


@functools.lru_cache(maxsize=1024)  # a class is equal to itself alone, and so are trees of it
def _record(name: str, fields: tuple[str, ...]) -> Callable[..., Any]:
    return collections.namedtuple(name, fields)  # which refuses what is no name


def difference(saved: Outline, wanted: Outline, above: tuple[str, ...] = ()) -> str | None:
    """Says where the containers of two trees differ first."""
    if saved == UNKNOWN:
        return None
    if _form(saved) != _form(wanted):
        where = repr("/".join(above)) if above else "the tree"
        return f"{where} is expected to be {_text(wanted)}, the checkpoint has {_text(saved)}"
    if not (isinstance(saved, Container) and isinstance(wanted, Container)):
        return None
    pairs = zip(saved.entries, wanted.entries, strict=True)
    differ = (difference(a, b, (*above, str(key))) for (key, a), (_, b) in pairs)
    return next((text for text in differ if text), None)


def _form(of: Outline) -> Any:
    is_container = isinstance(of, Container)
    return (of.kind, of.type, [(type(k), k) for k, _ in of.entries]) if is_container else of


def _text(of: Outline) -> str:
    if not isinstance(of, Container):
        return "None" if of is None else "a leaf"
    keys = [repr(key) for key, _ in of.entries]
    return f"a {of.type} of {', '.join(keys[:6] + ['..'] * bool(keys[6:])) or 'nothing'}"
