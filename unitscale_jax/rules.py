"""Rules: an ordered list of (pattern, value) over named parameters; the first match wins.

    rules = [("**/norm*/**", "float32"), ("decoder/*/mlp/kernel", "bfloat16"), ("**", "float16")]

A pattern is a glob over a whole name ("decoder/layer_3/mlp/kernel"): `*` stands for any text inside
one word of the path, `**` for any number of words, none included, `?` for one character. Where a
glob will not do, a compiled regular expression matches the whole name. A rule that decides on no
name, since it matches none or since earlier rules match all that it does, is an error: the only
thing worse than a typo is a typo that trains for a week.
"""

import functools
import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_type, closest, expected

__all__ = [
    "Pattern",
    "Rules",
    "assign",
    "decided",
    "first_match",
    "match",
    "matches",
    "pairs_of",
    "text_of",
]


def __dir__() -> list[str]:
    """What tab completion offers: the public names, and nothing that this file imports."""
    return [*__all__, "__all__", "__doc__", "__name__"]


Value = TypeVar("Value")
Item = TypeVar("Item", bound=Hashable)
Pattern: TypeAlias = str | re.Pattern[str]
Rules: TypeAlias = Mapping[Pattern, Value] | Sequence[tuple[Pattern, Value]]


def assign(rules: Rules[Value], tree: Any, default: Any = None, *, noun: str = "parameter") -> Any:
    """The value each leaf gets, as a tree of the structure of `tree`.

    Args:
        rules: Pairs `(pattern, value)` in order, or a dict of them.
        tree: A pytree; its leaves are named by `unitscale_jax.tree.names`, a `Compound` as one.
        default: The value of a leaf that no rule matches.
        noun: What a leaf is called in an error.

    Raises:
        ValueError: A rule matches no leaf, and the message lists the names closest to it; or it
            is hidden by the rules before it, which the message names.

    Law: without an error each rule is the first match of at least one leaf.

    Example:
        >>> assign({"**/bias": 32, "**": 8}, {"mlp": {"kernel": 0.0, "bias": 0.0}})
        {'mlp': {'bias': 32, 'kernel': 8}}
    """
    keys = trees.names(tree, is_leaf=trees.is_compound)
    found = match(rules, keys, default, noun=noun)
    structure = jax.tree.structure(tree, is_leaf=trees.is_compound)
    return jax.tree.unflatten(structure, [found[name] for name in keys])


def match(
    rules: Rules[Value],
    names: Iterable[str],
    default: Any = None,
    *,
    noun: str = "parameter",
    skip: Collection[int] = (),
) -> dict[str, Any]:
    """The value of the first rule that matches each name; see `resolve` and `decided`.

    Example:
        >>> match([("head/*", 1)], ["head/kernel", "body/kernel"])
        {'head/kernel': 1, 'body/kernel': None}
        >>> match([("head/kernle", 1)], ["head/kernel", "body/kernel"])
        Traceback (most recent call last):
            ...
        ValueError: rule 0, 'head/kernle', matched none of 2 parameters; closest: 'head/kernel', \
'body/kernel'.
    """
    pairs = pairs_of(rules)
    found = decided(pairs, {name: (name,) for name in names}, noun=noun, skip=skip)
    return {name: default if k is None else pairs[k][1] for name, k in found.items()}


def decided(
    rules: Rules[Any],
    items: Mapping[Item, Collection[str]],
    *,
    noun: str = "parameter",
    skip: Collection[int] = (),
) -> dict[Item, int | None]:
    """The number of the rule that decides on each item: the first that matches one of its names.

    Args:
        rules: Pairs `(pattern, value)` in order, or a dict of them.
        items: Each with its names; a parameter has one, a product those of its parameters.
        noun: What an item is called in an error.
        skip: Numbers of rules that are for other items.

    Raises:
        ValueError: A rule decides on no item.

    Example:
        >>> decided([("a", 8), ("*", 4)], {"a": ["a"], "b": ["b"]})
        {'a': 0, 'b': 1}
        >>> decided([("*", 4), ("a", 8)], {"a": ["a"], "b": ["b"]})
        Traceback (most recent call last):
            ...
        ValueError: rule 1, 'a', decides on nothing: rule 0, '*', comes earlier and matches all of \
its 1 names. Put it first or remove it.
    """
    patterns = [pattern for pattern, _ in pairs_of(rules)]
    asked = [k for k in range(len(patterns)) if k not in skip]
    found = {item: first_match(patterns, names, asked) for item, names in items.items()}
    used = set(found.values())
    for k in asked:
        if k not in used:
            matched = [i for i, names in items.items() if first_match(patterns, names, [k]) == k]
            if matched:
                earlier = {by for item in matched if (by := found[item]) is not None}
                raise ValueError(_hidden(k, patterns, sorted(earlier), len(matched)))
            every = list(dict.fromkeys(name for names in items.values() for name in names))
            raise ValueError(_unmatched(k, patterns[k], every, noun))
    return found


def first_match(
    patterns: Sequence[Pattern], names: Collection[str], asked: Iterable[int] | None = None
) -> int | None:
    """The number of the first pattern, of those asked for, that matches one of several names."""
    numbers = range(len(patterns)) if asked is None else asked
    return next((k for k in numbers if any(matches(patterns[k], name) for name in names)), None)


def pairs_of(rules: Rules[Value]) -> list[tuple[Pattern, Value]]:
    """Rules as a list of pairs, whether they came as pairs or as a dict.

    Raises:
        TypeError: A rule is not a pair of a pattern and a value.
    """
    wanted = "pairs (pattern, value), or a dict"
    check_type("rules", rules, Mapping | Iterable, wanted)
    if isinstance(rules, Iterator | set | frozenset):  # read once alone, or without an order
        raise TypeError(expected("rules", rules, f"a list of {wanted}"))
    pairs = list(rules.items()) if isinstance(rules, Mapping) else list(rules)
    for index, pair in enumerate(pairs):
        good = isinstance(pair, tuple | list) and len(pair) == 2
        if not (good and isinstance(pair[0], str | re.Pattern)):
            raise TypeError(
                f"rule {index} is {pair!r}; a rule is a pair (pattern, value), its pattern a glob "
                "such as '**/kernel' or a compiled regular expression."
            )
    return [(pattern, value) for pattern, value in pairs]


def matches(pattern: Pattern, name: str) -> bool:
    """Whether a pattern matches a whole name.

    Example:
        >>> matches("**/kernel", "kernel"), matches("*/kernel", "a/b/kernel")
        (True, False)
        >>> matches(re.compile(r".*layer_[02]/.*"), "decoder/layer_2/kernel")
        True
    """
    check_type("pattern", pattern, str | re.Pattern, "a glob or a compiled regular expression")
    regex = _glob(pattern) if isinstance(pattern, str) else pattern
    return regex.fullmatch(name) is not None


@functools.lru_cache(maxsize=1024)
def _glob(pattern: str) -> re.Pattern[str]:
    """`**/` is any number of leading words, `/**` of trailing ones, and each may be none at all."""
    tokens = {"**/": "(?:[^/]+/)*", "/**": "(?:/[^/]+)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pattern = re.sub(r"(/\*\*)+$", "/**", pattern)  # so that "a/**/**" matches "a", as "a/**" does
    # `**/` is words only where a word starts: "a**/b" does not match "ab".
    pieces = re.split(r"((?<![^/])\*\*/|/\*\*$|\*\*|\*|\?)", pattern)
    return re.compile("".join(tokens.get(piece, re.escape(piece)) for piece in pieces))


def _unmatched(index: int, pattern: Pattern, names: list[str], noun: str) -> str:
    text = text_of(pattern)
    first = f"; closest: {', '.join(map(repr, names[:3]))}" if names else ""
    near = closest(text, names) or first
    return f"rule {index}, {text!r}, matched none of {len(names)} {noun}s{near}."


def _hidden(index: int, patterns: Sequence[Pattern], earlier: Sequence[int], count: int) -> str:
    listed = " and ".join(f"{k}, {text_of(patterns[k])!r}," for k in earlier)
    one = len(earlier) == 1
    who = f"rule {listed} comes" if one else f"rules {listed} come"
    return (
        f"rule {index}, {text_of(patterns[index])!r}, decides on nothing: {who} earlier and "
        f"match{'es' if one else ''} all of its {count} names. Put it first or remove it."
    )


def text_of(pattern: Pattern) -> str:
    """The pattern as the user wrote it."""
    check_type("pattern", pattern, str | re.Pattern, "a glob or a compiled regular expression")
    return pattern if isinstance(pattern, str) else pattern.pattern
