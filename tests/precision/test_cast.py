"""Laws of `cast`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from unitscale_jax import tree as trees
from unitscale_jax.precision import Policy, cast

F32 = Policy(compute="float32")
LOW = [Policy(compute="bfloat16"), Policy(compute="float16")]
floats = functools.partial(hnp.arrays, np.float32, elements=st.floats(-4, 4, width=32))
lows = pytest.mark.parametrize("policy", LOW, ids=lambda policy: policy.compute.name)

PARAMS = {"mlp": {"w": jnp.linspace(-1, 1, 12).reshape(4, 3)}, "norm": {"gain": jnp.ones(3) / 3}}
X = jnp.linspace(-2, 2, 8).reshape(2, 4)


def apply(params, x, *, shift=None):
    h = jnp.tanh(x @ params["mlp"]["w"]) * params["norm"]["gain"].astype(x.dtype)
    return h if shift is None else h + shift


def total(fn):
    return lambda params, x: fn(params, x).astype(jnp.float32).sum()


def test_all_float32_is_the_identity():
    weak = jnp.asarray(0.5)  # a float32 array whose cast to float32 would be an equation
    for keywords in ({}, {"shift": weak}):
        traced = [jax.make_jaxpr(fn)(PARAMS, X, **keywords) for fn in (apply, cast(apply, F32))]
        assert str(traced[0]) == str(traced[1])


@lows
def test_twice_is_once(policy):
    once = cast(apply, policy)
    jaxprs = [str(jax.make_jaxpr(fn)(PARAMS, X)) for fn in (once, cast(once, policy))]
    assert jaxprs[0] == jaxprs[1]


@functools.partial(jax.jit, static_argnums=0)
def grads_by_cast_and_by_hand(policy, w, x):
    params, low = {**PARAMS, "mlp": {"w": w}}, policy.compute
    by_cast = jax.grad(total(cast(apply, policy)))(params, x)
    by_hand = jax.grad(total(apply))(trees.astype(params, low), x.astype(low))
    return by_cast, by_hand


@lows
@given(w=floats((4, 3)), x=floats((2, 4)))
def test_gradients_have_the_dtype_of_params_and_the_values_of_low_arithmetic(policy, w, x):
    by_cast, by_hand = grads_by_cast_and_by_hand(policy, w, x)
    chex.assert_trees_all_equal_dtypes(by_cast, PARAMS)
    chex.assert_trees_all_equal(by_cast, trees.astype(by_hand, jnp.float32))


@lows
@pytest.mark.parametrize("output", ["float32", "bfloat16"])
def test_structure_and_shapes_stay_and_floats_get_the_output_dtype(policy, output):
    policy = Policy(compute=policy.compute, output=output)
    fn = lambda params, x: {"y": apply(params, x), "top": (jnp.argmax(x, -1), x > 0, None)}
    plain, out = (jax.eval_shape(f, PARAMS, X) for f in (fn, cast(fn, policy)))
    chex.assert_trees_all_equal_structs(plain, out)
    chex.assert_trees_all_equal_shapes(plain, out)
    assert out["y"].dtype == output
    chex.assert_trees_all_equal_dtypes(plain["top"], out["top"])


@lows
def test_every_dot_computes_in_the_compute_dtype_wherever_it_is(policy):
    def deep(params, x):
        w = params["w"]
        x, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=3)
        x = jax.checkpoint(lambda h: h @ w)(jax.jit(jnp.dot)(x, w))
        return jax.vmap(lambda row: jax.lax.cond(True, lambda h: h @ w, lambda h: h, row))(x)

    args = {"w": jnp.eye(3)}, jnp.ones((2, 3))
    text = str(jax.make_jaxpr(jax.grad(total(cast(deep, policy))))(*args))
    short = {"bfloat16": "bf16", "float16": "f16"}[policy.compute.name]
    dots = [line for line in text.splitlines() if " = dot_general[" in line]
    assert len(dots) > 4 and all(f":{short}[" in line.split("=")[0] for line in dots), dots


def test_integers_booleans_keys_and_static_arguments_are_untouched():
    seen = {}

    def record(params, ids, *, key, train, mode, rate, mask, scale):
        seen.update(locals())
        return ids, key

    key = jax.random.key(0)
    ids, mask = jnp.arange(3), jnp.array([True])
    keywords = dict(key=key, train=True, mode="fast", rate=0.5, mask=mask, scale=jnp.ones(2))
    params = {"w": jnp.ones(2), "count": jnp.arange(2)}
    out = cast(record, Policy())(params, ids, **keywords)
    assert out[0] is ids and out[1] is key
    assert all(seen[name] is keywords[name] for name in ("key", "train", "mode", "rate", "mask"))
    assert seen["scale"].dtype == seen["params"]["w"].dtype == jnp.bfloat16
    assert seen["params"]["count"] is params["count"]


def test_codes_of_8_bits_are_not_numbers_to_cast():
    codes = jnp.ones(3, jnp.float8_e4m3fn)
    assert cast(lambda params, x: (params, x), Policy())(codes, codes)[0].dtype == codes.dtype


@lows
def test_state_goes_in_and_comes_out_in_its_own_dtype(policy):
    def apply(params, x, *, state):
        assert x.dtype == policy.compute and state["mean"].dtype == jnp.float32
        mean = 0.999 * state["mean"] + 0.001 * x.astype(jnp.float32).mean()
        return x * params["w"], {"mean": mean, "seen": state["seen"] + 1}

    state = {"mean": jnp.float32(1.001), "seen": jnp.int32(3)}
    policy = Policy(compute=policy.compute, output=policy.compute)
    out, new = cast(apply, policy)({"w": jnp.float32(2)}, jnp.ones(2), state=state)
    assert out.dtype == policy.output and new["mean"].dtype == jnp.float32
    assert new["mean"] == np.float32(0.999) * np.float32(1.001) + np.float32(0.001)


def test_without_state_a_pair_is_two_outputs():
    fn = cast(lambda params, x, **_: (x * params, x), Policy())
    for keywords in ({}, {"state": None}):
        out = fn(jnp.ones(()), jnp.ones(2), **keywords)
        assert [leaf.dtype for leaf in out] == [jnp.float32, jnp.float32]


def test_an_override_changes_exactly_what_its_parameter_reaches():
    fn = lambda params, x: {name: jnp.sin(w * 3) for name, w in params.items()} | {"x": x / 3}
    params = {"a": jnp.float32(1.001), "b": jnp.float32(1.001)}
    whole, low, mixed = (
        cast(fn, policy)(params, jnp.float32(1.001))
        for policy in (F32, Policy(), Policy(overrides=[("a", "float32")]))
    )
    assert mixed["a"] == whole["a"] != low["a"]
    assert mixed["b"] == low["b"] != whole["b"] and mixed["x"] == low["x"] != whole["x"]


def test_the_first_override_that_matches_wins():
    policy = Policy(overrides=[("norm/*", "float32"), ("**", "float16")])
    out = cast(lambda params: jax.tree.map(lambda x: x.dtype.itemsize, params), policy)(PARAMS)
    assert out == {"mlp": {"w": 2}, "norm": {"gain": 4}}


def test_an_override_that_matches_nothing_lists_near_misses():
    policy = Policy(overrides=[("norm/gian", "float32")])
    with pytest.raises(ValueError, match=r"'norm/gian', matched none of 2 param.*'norm/gain'"):
        cast(apply, policy)(PARAMS, X)


@lows
def test_keyword_inputs_are_cast_too(policy):
    out = cast(apply, policy)(PARAMS, X, shift=jnp.float32(1.001))
    by_hand = cast(lambda params, x: apply(params, x) + policy.compute.type(1.001), policy)
    chex.assert_trees_all_equal(out, by_hand(PARAMS, X))


def test_bfloat16_really_computes_in_bfloat16():
    """In mpx 0.2 a policy of bfloat16 is silently ignored."""
    fn = lambda params, x: x + params
    assert cast(fn, Policy(compute="bfloat16"))(jnp.float32(2.0**-9), jnp.float32(1)) == 1
    assert cast(fn, Policy(compute="float16"))(jnp.float32(2.0**-9), jnp.float32(1)) > 1


@lows
def test_commutes_with_jit_vmap_and_remat(policy):
    fn = cast(apply, policy)
    plain = jax.jit(fn)(PARAMS, X)
    rows = jax.jit(jax.vmap(fn, in_axes=(None, 0)))(PARAMS, X[:, None])[:, 0]
    chex.assert_trees_all_equal(plain, rows, jax.jit(jax.checkpoint(fn))(PARAMS, X))
