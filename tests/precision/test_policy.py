"""Laws of a policy."""

import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from unitscale_jax.precision import Policy

POLICIES = [
    Policy(),
    Policy(param="bfloat16", compute="float16", output="bfloat16"),
    Policy(overrides=[("**/norm/*", "float32"), (re.compile("a|b"), "float16")]),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_its_repr_is_what_you_would_type(policy):
    assert eval(repr(policy), {"Policy": Policy, "re": re}) == policy
    assert "dtype(" not in repr(policy)


@pytest.mark.parametrize(
    "spelling", ["bfloat16", jnp.bfloat16, ml_dtypes.bfloat16, np.dtype("bfloat16")]
)
def test_spellings_of_a_dtype_are_one_policy(spelling):
    policy = Policy(compute=spelling, overrides={"a": spelling})
    assert policy == Policy(overrides=[("a", "bfloat16")])
    assert hash(policy) == hash(Policy(overrides=(("a", "bfloat16"),)))


def test_parse_reads_what_it_names_and_keeps_the_other_defaults():
    assert Policy.parse("param=bfloat16, compute=float16,output=float16") == Policy(
        param="bfloat16", compute="float16", output="float16"
    )
    assert Policy.parse("compute=float16") == Policy(compute="float16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("compute=bf16", r"Policy.compute is 'bf16'.*closest: 'bfloat16'"),
        ("compute=fp16", r"closest: 'float16'"),
        ("param=float23", r"Policy.param is 'float23'.*closest: 'float32'"),
        ("param=int8", r"Policy.param is 'int8'.*Use float16, bfloat16, float32 or float64"),
        ("output=half", r"Policy.output is 'half'"),
        ("output=", r"Policy.output is ''"),
        ("params=float32", r"'params' in .* is no field of a policy. Write each of param, compute"),
        ("bfloat16", r"'bfloat16' in .* is no field"),
        ("", r"'' in '' is no field"),
        ("param=float32,param=float32", r"'param' in .* comes twice"),
    ],
)
def test_a_bad_text_gets_a_clear_error(text, message):
    with pytest.raises(ValueError, match=message):
        Policy.parse(text)


@pytest.mark.parametrize("dtype", [None, "f4", "d", jnp.int32, jnp.float8_e4m3fn, 3, "<f4"])
def test_what_no_model_computes_in_is_refused(dtype):
    with pytest.raises(ValueError, match=r"Policy.compute is .* names no dtype to compute in"):
        Policy(compute=dtype)


def test_a_bad_override_names_its_pattern():
    with pytest.raises(ValueError, match=r"Policy.overrides, '\*\*/norm', is 'single'"):
        Policy(overrides=[("**/norm", "single")])
    with pytest.raises(TypeError, match="rule 0 is 'norm'; a rule is a pair"):
        Policy(overrides=["norm"])


def test_float64_is_refused_where_jax_would_make_it_float32():
    with pytest.raises(ValueError, match="jax_enable_x64"):
        Policy(output="float64")


def test_cast_to_param_touches_floating_leaves_only():
    params = {"w": jnp.ones(2), "step": jnp.arange(2), "on": jnp.array(True)}
    out = Policy(param="bfloat16").cast_to_param(params)
    assert [out[k].dtype for k in ("w", "step", "on")] == [jnp.bfloat16, jnp.int32, jnp.bool_]
