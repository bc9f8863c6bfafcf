"""Rules: an ordered list of (pattern, value) over named parameters; the first match wins.

    rules = [("**/norm*/**", "float32"), ("decoder/*/mlp/kernel", "bfloat16"), ("**", "float16")]

A pattern is a glob over a whole name ("decoder/layer_3/mlp/kernel"): `*` stands for any text inside
one word of the path, `**` for any number of words, none included, `?` for one character. Where a
glob will not do, a compiled regular expression matches the whole name. A rule that matches no
name is an error, since the only thing worse than a typo is a typo that trains for a week.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax

from unitscale_jax import tree as trees
from unitscale_jax.errors import closest

Value = TypeVar("Value")
Pattern: TypeAlias = str | re.Pattern[str]
Rules: TypeAlias = Mapping[Pattern, Value] | Sequence[tuple[Pattern, Value]]


def resolve(rules: Rules[Value], tree: Any, default: Any = None, *, noun: str = "parameter") -> Any:
    """The value each leaf gets, as a tree of the structure of `tree`.

    Args:
        rules: Pairs `(pattern, value)` in order, or a dict of them.
        tree: A pytree; its leaves are named by `unitscale_jax.tree.names`, a `Compound` as one.
        default: The value of a leaf that no rule matches.
        noun: What a leaf is called in an error.

    Raises:
        ValueError: A rule matches no leaf; the message lists the names closest to it.

    Example:
        >>> resolve({"**/bias": 32, "**": 8}, {"mlp": {"kernel": 0.0, "bias": 0.0}})
        {'mlp': {'bias': 32, 'kernel': 8}}
    """
    keys = trees.names(tree, is_leaf=trees.is_compound)
    found = match(rules, keys, default, noun=noun)
    structure = jax.tree.structure(tree, is_leaf=trees.is_compound)
    return jax.tree.unflatten(structure, [found[name] for name in keys])


def match(
    rules: Rules[Value], names: Iterable[str], default: Any = None, *, noun: str = "parameter"
) -> dict[str, Any]:
    """The value of the first rule that matches each name; see `resolve`.

    Example:
        >>> match([("head/*", 1)], ["head/kernel", "body/kernel"])
        {'head/kernel': 1, 'body/kernel': None}
        >>> match([("head/kernle", 1)], ["head/kernel", "body/kernel"])
        Traceback (most recent call last):
            ...
        ValueError: rule 0, 'head/kernle', matched none of 2 parameters; closest: 'head/kernel', \
'body/kernel'.
    """
    names, pairs = list(names), pairs_of(rules)
    for index, (pattern, _) in enumerate(pairs):
        if not any(matches(pattern, name) for name in names):
            raise ValueError(_unmatched(index, pattern, names, noun))
    first = lambda name: next((v for pattern, v in pairs if matches(pattern, name)), default)
    return {name: first(name) for name in names}


def pairs_of(rules: Rules[Value]) -> list[tuple[Pattern, Value]]:
    """Rules as a list of pairs, whether they came as pairs or as a dict.

    Raises:
        TypeError: A rule is not a pair of a pattern and a value.
    """
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
    text = pattern if isinstance(pattern, str) else pattern.pattern
    first = f"; closest: {', '.join(map(repr, names[:3]))}" if names else ""
    near = closest(text, names) or first
    return f"rule {index}, {text!r}, matched none of {len(names)} {noun}s{near}."
