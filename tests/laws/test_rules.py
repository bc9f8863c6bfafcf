"""Laws of rules, over everything that takes them.

    no error  <=>  each rule is the first match of at least one name

and what a rule's value names (an operation, a mesh axis) is known, or an error with near misses.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import PartitionSpec as P

import unitscale_jax as us
from unitscale_jax import rules as named_rules

NAMES = ["a", "b/c", "b/d"]
PATTERNS = ["a", "b/*", "b/c", "b/d", "*", "**"]
PARAMS = {"a": jnp.eye(4), "b": {"c": jnp.eye(4), "d": jnp.eye(4)}}
X = jnp.ones((2, 4))
HIDDEN = r"rule \d, .*, decides on nothing: rules? \d, .* earlier and match.* all of its \d names\."


def fn(p, x):
    return x @ p["a"] @ p["b"]["c"] @ p["b"]["d"]


def shaped(function, *args):
    """A call that is traced and not run."""
    return jax.eval_shape(function, *args)


def loss(p, batch):
    rows = jnp.ones(len(batch["a"]))
    return us.Mean(jnp.sum(fn(p, batch["a"]), -1), rows), jax.tree.map(jnp.sum, PARAMS)


BATCH = {"a": X, "b": {"c": jnp.ones((2, 3)), "d": jnp.ones(2)}}
W8 = us.DotSpec(w=us.QSpec(axes=(-2,)), x=us.QSpec())
W4 = us.DotSpec(w=us.QSpec(format="int4", axes=(-2,)))
MESH = us.parallel.mesh(dp=4, tp=2)
NONE_OF_IT = us.prune.Unstructured()


def sparse(rules, patterns=None, **options):
    spec = us.prune.SparsitySpec(patterns=rules if patterns is None else patterns, **options)
    return us.prune.make_masks(PARAMS, spec)


def as_list(rules):
    return [pattern for pattern, _ in rules]


def reduced_in_parts(rules):
    every = [*of_spec(rules, "sum"), *((name, "sum") for name in NAMES if not decides(rules, name))]
    grad_fn = us.accumulated(us.value_and_grad(loss), 2, reduce=every)
    return shaped(grad_fn, PARAMS, BATCH)


def decides(rules, name):
    return any(named_rules.matches(pattern, name) for pattern, _ in rules)


def of_spec(rules, spec):
    return [(pattern, spec) for pattern, _ in rules]


# name -> what takes rules, as a function of pairs (pattern, number)
CALLERS = {
    "rules.resolve": lambda r: us.rules.assign(r, PARAMS),
    "resolve": lambda r: us.quant.resolve(of_spec(r, us.DotSpec(w=us.QSpec())), fn, PARAMS, X),
    "quantize": lambda r: shaped(lambda p: us.quantize(p, of_spec(r, W8)), PARAMS),
    "quantized": lambda r: shaped(us.quantized(fn, of_spec(r, W8)), PARAMS, X),
    "learned": lambda r: shaped(lambda p: us.quant.learned(p, of_spec(r, W4)), PARAMS),
    "cast": lambda r: shaped(us.cast(fn, us.Policy(overrides=of_spec(r, "bfloat16"))), PARAMS, X),
    "autocast": lambda r: shaped(us.autocast(fn, rules=of_spec(r, "float32")), PARAMS, X),
    "keep_float32": lambda r: shaped(us.autocast(fn, keep_float32=as_list(r)), PARAMS, X),
    "layout": lambda r: us.parallel.layout(PARAMS, of_spec(r, "column"), MESH),
    "patterns": lambda r: sparse(of_spec(r, NONE_OF_IT)),
    "stacked": lambda r: sparse(r, NONE_OF_IT, stacked=of_spec(r, 0)),
    "masked": lambda r: us.prune.pruned(
        optax.sgd(0.1), us.prune.SparsitySpec(patterns=of_spec(r, NONE_OF_IT))
    ).init(PARAMS),
    "reduce": reduced_in_parts,
    "mask": lambda r: shaped(
        us.accumulated(us.value_and_grad(lambda p, b: loss(p, b)[0]), 2, mask=as_list(r)),
        PARAMS,
        BATCH,
    ),
    "counted": lambda r: us.compaction.l2(graph(), PARAMS, counted=of_spec(r, True)),
}


@functools.cache
def graph():
    return us.compaction.groups(fn, PARAMS, X)


def hidden(patterns):
    """Whether some rule is the first match of no name, though it matches some: the slow oracle."""
    first = [
        next((k for k, p in enumerate(patterns) if named_rules.matches(p, name)), None)
        for name in NAMES
    ]
    return not set(range(len(patterns))) <= set(first)


@pytest.mark.parametrize("caller", CALLERS)
@settings(max_examples=12)
@given(patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3, unique=True))
def test_each_rule_decides_on_something_or_is_an_error_whoever_takes_it(caller, patterns):
    rules = [(pattern, k) for k, pattern in enumerate(patterns)]
    if hidden(patterns):
        with pytest.raises(ValueError, match=HIDDEN):
            CALLERS[caller](rules)
    else:
        CALLERS[caller](rules)


@pytest.mark.parametrize("caller", CALLERS)
def test_the_two_sorts_of_rules_without_effect_are_told_apart(caller):
    with pytest.raises(ValueError, match=HIDDEN):
        CALLERS[caller]([("**", 0), ("a", 1)])
    with pytest.raises(ValueError, match=r"rule 0, 'b/e', matched none of 3"):
        CALLERS[caller]([("b/e", 0)])


@pytest.mark.parametrize("made", [iter, set])
def test_rules_without_an_order_or_to_be_read_once_are_refused(made):
    pairs = lambda value: made([("a", value), ("b/*", value)])
    for call in (
        lambda: us.rules.assign(pairs(1), PARAMS),
        lambda: us.quant.resolve(pairs(us.DotSpec(w=us.QSpec())), fn, PARAMS, X),
        lambda: us.quantize(PARAMS, pairs(W8)),
        lambda: us.parallel.layout(PARAMS, pairs("column"), MESH),
    ):
        with pytest.raises(TypeError, match=r"rules is .*; expected a list of pairs"):
            call()


ORDERS = list(itertools.permutations([("a", 8), ("b/c", 4), ("b/d", 3)]))


def test_rules_of_disjoint_names_mean_the_same_in_any_order():
    spec = {8: us.QSpec(), 4: us.QSpec(format="int4"), 3: us.QSpec(format="int3")}
    dot = {bits: us.DotSpec(w=w) for bits, w in spec.items()}
    takers = [
        lambda r: us.rules.assign(r, PARAMS),
        lambda r: us.quant.resolve([(p, dot[bits]) for p, bits in r], fn, PARAMS, X),
        lambda r: us.parallel.layout(PARAMS, [(p, "row") for p, _ in r], MESH).by_name,
    ]
    for take in takers:
        found = [take(list(order)) for order in ORDERS]
        assert all(one == found[0] for one in found)


def test_products_of_activations_have_rules_of_their_own():
    def attention(p, x):
        return (x @ p["a"]) @ (x @ p["b"]).T

    params = {"a": jnp.eye(4), "b": jnp.eye(4)}
    spec, both = us.DotSpec(w=us.QSpec(), x=us.QSpec()), {"a": jnp.eye(4), "b": jnp.eye(4)}
    found = us.quant.resolve([("dot", spec), ("*", spec)], attention, both, X)
    assert [pattern for pattern, _ in found] == ["a", "b", "dot"]
    with pytest.raises(ValueError, match=r"rule 2, 'dot', decides on nothing: rule 1, 'd\*',"):
        us.quant.resolve([("*", spec), ("d*", spec), ("dot", spec)], attention, params, X)
    with pytest.raises(ValueError, match=r"rule 2, 'b', decides on nothing: rule 1, '\*', comes"):
        us.quant.resolve([("dot", spec), ("*", spec), ("b", spec)], attention, params, X)


# ------------------------------------------------------------------- what values of rules name


def test_a_misspelt_operation_is_an_error_and_one_of_another_model_is_none():
    call = lambda ops: shaped(us.autocast(lambda p, x: jnp.tanh(fn(p, x)), ops=ops), PARAMS, X)
    with pytest.raises(ValueError, match=r"no primitive 'tahn'; closest: 'tanh'"):
        call({"tahn": "float32"})
    with pytest.raises(ValueError, match=r"no primitive 'dot_generel'; closest: 'dot_general'"):
        call({"tanh": "float32", "dot_generel": "keep"})
    call({"tanh": "float32", "erf_inv": "low", "scan": "keep", "scatter-add": "follow"})


def test_a_primitive_of_the_users_own_is_known_where_it_is_used():
    mine = jax.extend.core.Primitive("a_primitive_of_mine")
    mine.def_impl(lambda x: x)
    mine.def_abstract_eval(lambda x: x)
    ops = {"a_primitive_of_mine": "keep"}
    shaped(us.autocast(lambda p, x: mine.bind(fn(p, x)), ops=ops), PARAMS, X)


@pytest.mark.parametrize("choice", [P("pp"), P(None, ("tp", "pp")), {-1: "pp"}, "column", "row"])
def test_an_axis_that_the_mesh_lacks_is_an_error_or_whole_on_request(choice):
    mesh = us.parallel.mesh(dp=4, tp=2)
    take = functools.partial(us.parallel.layout, PARAMS, {"a": choice}, mesh, mesh_axis="pp")
    with pytest.raises(ValueError, match=r"rule 'a': there is no mesh axis 'pp'.*dp=4, tp=2"):
        take()
    found = take(missing="whole")
    assert "pp" not in str(found.by_name["a"]) and found.reasons["a"] == "rule 'a', no axis pp"


def test_an_axis_that_no_rule_names_is_not_asked_for():
    assert us.parallel.layout(PARAMS, {"a": P("dp")}, MESH, mesh_axis="zz").by_name["a"] == P("dp")


def test_inference_over_an_axis_that_the_mesh_lacks_is_an_error_or_whole_on_request():
    take = functools.partial(us.parallel.infer, fn, PARAMS, X, mesh=MESH)
    with pytest.raises(ValueError, match=r"there is no mesh axis 'zz'.*dp=4, tp=2"):
        take(mesh_axis="zz")
    assert set(take(mesh_axis="zz", missing="whole").by_name.values()) == {P()}
    assert take(mesh_axis="tp").by_name["a"] == P(None, "tp")
