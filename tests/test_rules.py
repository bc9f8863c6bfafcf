"""Laws of rules over named parameters."""

import re

import jax
import pytest
from hypothesis import given, strategies as st

from tests.test_tree import NAMES, model, models
from unitscale_jax import tree as trees
from unitscale_jax.rules import assign, decided, match, matches, pairs_of

# ------------------------------------------------------------------------------ globs


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("head/kernel", ["head/kernel"], ["head/kernel2", "a/head/kernel", "head"]),
        ("*/kernel", ["a/kernel"], ["kernel", "a/b/kernel"]),
        ("**/kernel", ["kernel", "a/kernel", "a/b/kernel"], ["akernel", "a/kernels", "kernel/a"]),
        ("a/**", ["a", "a/b", "a/b/c"], ["ab", "b/a"]),
        ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["ab", "a/xb", "a/b/c"]),
        ("a/**/**", ["a", "a/b", "a/b/c"], ["ab"]),
        ("**", ["", "a", "a/b"], []),
        ("**/norm*/**", ["norm", "norm_0/scale", "a/norm/x/y"], ["a/prenorm/x"]),
        ("layer_?/w", ["layer_0/w"], ["layer_/w", "layer_10/w", "layer_//w"]),
        ("layer_*/w", ["layer_0/w", "layer_10/w", "layer_/w"], ["layer_0/x/w"]),
        ("a**/b", ["a/b", "ax/b", "ax/y/b"], ["ab", "xa/b"]),
        ("w.[0]+", ["w.[0]+"], ["wx0", "w.0"]),  # only * and ? are special
    ],
)
def test_a_glob_matches_whole_names_word_by_word(pattern, yes, no):
    assert [name for name in [*yes, *no] if matches(pattern, name)] == yes


def slow_glob(pattern, name):
    """The obvious oracle, on lists of words; `**` is tried with every number of them."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(slow_glob(pattern[1:], name[i:]) for i in range(len(name) + 1))
    return bool(name) and slow_word(pattern[0], name[0]) and slow_glob(pattern[1:], name[1:])


def slow_word(pattern, word):
    if not pattern:
        return not word
    if pattern[0] == "*":
        return any(slow_word(pattern[1:], word[i:]) for i in range(len(word) + 1))
    return bool(word) and pattern[0] in ("?", word[0]) and slow_word(pattern[1:], word[1:])


word_patterns = st.sampled_from(["**", "**", "*", "a", "b", "?", "a*", "*b", "?.b", "a.", "*.*"])
names = st.lists(st.text("ab.", min_size=1, max_size=2), min_size=1, max_size=3)


@given(st.lists(word_patterns, min_size=1, max_size=4), st.lists(names, min_size=8, max_size=8))
def test_a_glob_means_what_the_slow_matcher_says(pattern, some):
    for name in some:
        assert matches("/".join(pattern), "/".join(name)) == slow_glob(pattern, name), name


@given(names)
def test_a_name_matches_itself_and_everything(name):
    name = "/".join(name)
    assert matches(name, name)
    assert matches("**", name)
    assert matches(re.compile(re.escape(name)), name)


def test_a_regular_expression_matches_whole_names():
    even = re.compile(r"decoder/layer_\d*[02468]/.*")
    assert matches(even, "decoder/layer_12/mlp/kernel")
    assert not matches(even, "decoder/layer_11/mlp/kernel")
    assert not matches(even, "my/decoder/layer_12/mlp/kernel")
    assert not matches(re.compile("layer"), "layer_0")


# ------------------------------------------------------------------------------ rules


@models
def test_rules_mean_the_same_whoever_made_the_parameters(kind):
    rules = [("norm/*", "float32"), ("**/kernel", "int8"), (re.compile("out/.*"), "bfloat16")]
    found = assign(rules, model(kind), default="rest")
    assert dict(zip(NAMES, jax.tree.leaves(found), strict=True)) == {
        "layers_0/bias": "rest",
        "layers_0/kernel": "int8",
        "norm/bias": "float32",
        "norm/scale": "float32",
        "out/bias": "bfloat16",
        "out/kernel": "int8",
    }
    assert trees.names(found) == NAMES
    assert jax.tree.structure(found) == jax.tree.structure(model(kind))


@given(st.permutations([("a/*", 1), ("*/x", 2), ("**", 3)]))
def test_the_first_rule_that_matches_wins(rules):
    names = ["a/x", "a/y", "b/x", "b/y"]
    if rules[0][0] == "**":
        with pytest.raises(ValueError, match=r"rule 1, .*: rule 0, '\*\*', comes earlier"):
            match(rules, names)
        return
    found = match(rules, names) if rules[2][0] == "**" else None
    for name, value in (found or {}).items():
        assert value == next(v for pattern, v in rules if matches(pattern, name))


POOL = ["a/x", "a/*", "*/x", "b/*", "**", re.compile("[ab]/y"), "none"]


@given(st.lists(st.sampled_from(POOL), max_size=5), st.sets(st.sampled_from(["a/x", "a/y", "b/x"])))
def test_there_is_no_error_if_and_only_if_each_rule_decides_on_something(patterns, names):
    rules = [(pattern, k) for k, pattern in enumerate(patterns)]
    first = lambda name: next((k for k, p in enumerate(patterns) if matches(p, name)), None)
    wanted = {name: first(name) for name in sorted(names)}
    if set(wanted.values()) >= set(range(len(patterns))):
        assert decided(rules, {name: [name] for name in names}) == wanted
        assert match(rules, sorted(names)) == wanted
    else:
        with pytest.raises(ValueError, match=r"rule \d, .* (decides on nothing|matched none)"):
            match(rules, sorted(names))


@given(st.permutations([("a/*", 1), ("b/x", 2), (re.compile("[bc]/y"), 3)]))
def test_rules_of_disjoint_names_mean_the_same_in_any_order(rules):
    names = ["a/x", "a/y", "b/x", "b/y", "c/y", "c/z"]
    assert match(rules, names) == {
        "a/x": 1, "a/y": 1, "b/x": 2, "b/y": 3, "c/y": 3, "c/z": None
    }  # fmt: skip


def test_a_hidden_rule_is_an_error_that_names_what_hides_it():
    with pytest.raises(ValueError) as error:
        match([("*", 1), ("a", 2)], ["a", "b"])
    assert str(error.value) == (
        "rule 1, 'a', decides on nothing: rule 0, '*', comes earlier and matches all of its 1 "
        "names. Put it first or remove it."
    )
    with pytest.raises(ValueError, match=r"rules 0, 'a', and 2, 'b', come earlier and match all"):
        match([("a", 1), ("c", 1), ("b", 1), (re.compile("[ab]"), 3)], ["a", "b", "c"])


def test_an_item_of_several_names_is_decided_by_the_first_rule_of_any_of_them():
    items = {"one": ("a", "b"), "two": ("b",)}
    assert decided([("a", 0), ("b", 1)], items) == {"one": 0, "two": 1}
    assert decided([("b", 0)], items, skip=()) == {"one": 0, "two": 0}
    with pytest.raises(ValueError, match="rule 1, 'a', decides on nothing: rule 0, 'b', comes"):
        decided([("b", 0), ("a", 1)], items, noun="product")
    assert decided([("b", 0), ("a", 1)], items, skip=[1]) == {"one": 0, "two": 0}


def test_pairs_in_any_container_and_a_dict_of_them_are_the_same_rules():
    pairs = [("**/bias", 1), (re.compile(".*kernel"), 2), ("norm/**", 3)]
    want = match(pairs, NAMES)
    for rules in (dict(pairs), tuple(pairs), [list(pair) for pair in pairs]):
        assert match(rules, NAMES) == want
    assert pairs_of(dict(pairs)) == pairs


def test_without_rules_every_leaf_gets_the_default():
    assert match([], NAMES) == dict.fromkeys(NAMES)
    assert match({}, NAMES, 7) == dict.fromkeys(NAMES, 7)
    assert match([], []) == {}


def test_a_value_may_be_none_or_false_and_still_wins():
    rules = [("a", None), ("b", 0), ("**", 1)]
    assert match(rules, ["a", "b", "c"], 5) == {"a": None, "b": 0, "c": 1}


@models
def test_a_rule_that_matches_nothing_is_an_error_with_near_misses(kind):
    message = r"rule 1, 'out/kernal', matched none of 6 parameters; closest: 'out/kernel', "
    with pytest.raises(ValueError, match=message):
        assign([("**/bias", 1), ("out/kernal", 2)], model(kind))
    with pytest.raises(
        ValueError, match=r"rule 0, 'norm.*x', matched none of 6 activations;"
    ) as error:
        match([(re.compile(r"norm\.*x"), 1)], NAMES, noun="activation")
    assert any(name in str(error.value) for name in NAMES)


def test_an_unmatched_rule_is_an_error_though_others_match_everything():
    with pytest.raises(ValueError, match="rule 1, 'nothing', matched none"):
        match([("**", 1), ("nothing", 2)], NAMES)
    with pytest.raises(ValueError, match="matched none of 0 parameters[.]"):
        match([("**", 1)], [])


@pytest.mark.parametrize("bad", ["**", [1], [("a",)], [("a", 1, 2)], [(3, 1)], {3: 1}])
def test_what_is_no_rule_is_an_error_that_shows_one(bad):
    with pytest.raises(TypeError, match=r"rule 0 is .* a pair \(pattern, value\).*'\*\*/kernel'"):
        match(bad, NAMES)
