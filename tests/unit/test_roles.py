"""Roles of parameters: a written table of the zoo, and what is asked of rules and depths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import unitscale_jax as us
from tests.support import zoo
from unitscale_jax.unit import Role, roles

# Parameters of each model but for biases (of their own size) and gains of norms (likewise):
# kind, fan-in, fan-out. Widths are 11, 13 within an MLP, 4 heads of 5, a vocabulary of 17.
DENSE_2 = {"inner/kernel": ("input", 11, 13), "outer/kernel": ("output", 13, 5)}
CNN = {"conv_0/kernel": ("input", 18, 9), "conv_1/kernel": ("weight", 81, 11)}
CNN |= {"head/kernel": ("output", 11, 5)}
ATTENTION = {f"attention/{name}/kernel": ("weight", 11, 20) for name in ("query", "key", "value")}
ATTENTION |= {"attention/out/kernel": ("weight", 20, 11)}
BLOCK = ATTENTION | {"mlp/inner/kernel": ("weight", 11, 13), "mlp/outer/kernel": ("weight", 13, 11)}
FUSED = {"qkv/kernel": ("weight", 11, 60), "out/kernel": ("weight", 20, 11)}
FUSED |= {"inner/kernel": ("weight", 11, 13), "outer/kernel": ("weight", 13, 11)}
LLAMA = {"query": ("weight", 11, 80), "key": ("weight", 11, 20), "value": ("weight", 11, 20)}
LLAMA |= {"out": ("weight", 80, 11), "gate": ("weight", 11, 13), "up": ("weight", 11, 13)}
PLAIN_LLAMA = {"q": ("weight", 11, 80), "k": ("weight", 11, 20), "v": ("weight", 11, 20)}
PLAIN_LLAMA |= {"o": ("weight", 80, 11), "gate": ("weight", 11, 13), "up": ("weight", 11, 13)}
GATES = "ifgo"


def within(*prefixes, of):
    return {f"{prefix}/{name}": role for prefix in prefixes for name, role in of.items()}


# A table of places that is added as it stands is a bias by its use; `rules` say otherwise.
PLAIN_LANGUAGE = within("blocks/0", "blocks/1", of=FUSED) | {
    "tokens": ("embedding", 17, 11),
    "places": ("bias", 1, 77),
}
TABLES = {"tokens/embedding": ("embedding", 17, 11), "places/embedding": ("embedding", 7, 11)}
LINEN_LANGUAGE = within("blocks_0", "blocks_1", of=BLOCK) | TABLES
NNX_LANGUAGE = within("blocks/0", "blocks/1", of=BLOCK) | TABLES
LSTM = {f"i{g}/kernel": ("input", 11, 13) for g in GATES}
LSTM |= {f"h{g}/kernel": ("weight", 13, 13) for g in GATES}
SSM = {name: ("weight", 11, 13) for name in ("decay/kernel", "drive/kernel")}
SSM |= {"outer/kernel": ("output", 13, 11)}

TABLE = {
    "plain_mlp": DENSE_2,
    "plain_dropout": DENSE_2,
    "plain_cnn": {
        "inner/kernel": ("input", 18, 9),
        "time": ("embedding", 7, 9),
        "middle/kernel": ("weight", 81, 11),
        "outer/kernel": ("output", 11, 5),
    },
    "plain_unet": {
        "down/kernel": ("input", 18, 5),
        "bottom/kernel": ("weight", 45, 7),
        "up/kernel": ("weight", 108, 9),
        "outer/kernel": ("output", 9, 2),
    },
    "plain_transformer": PLAIN_LANGUAGE,
    "plain_post_norm": PLAIN_LANGUAGE,
    "plain_scan_remat": within("blocks", of=FUSED),
    "plain_gqa": within("blocks/0", "blocks/1", of=PLAIN_LLAMA)
    | {"blocks/0/down": ("weight", 13, 11), "blocks/1/down": ("output", 13, 11)},
    "plain_encoder_decoder": {
        "encoder/kernel": ("input", 9, 11),
        **{f"{name}/kernel": ("weight", 11, 20) for name in "qkv"},
        "o": ("weight", 20, 11),
        **within("decoder", of=FUSED),
        "decoder/outer/kernel": ("output", 13, 11),
    },
    "plain_moe_dense": {
        "router/kernel": ("input", 11, 5),
        "up": ("input", 11, 65),
        "down": ("output", 65, 11),  # sums over experts and their features at once
    },
    "plain_moe_top_k": {
        "router/kernel": ("input", 11, 5),
        "up": ("input", 11, 13),
        "down": ("weight", 13, 11),  # the gates are a product beyond it
    },
    "plain_lstm": {"cell/kernel": ("weight", 24, 52), "head/kernel": ("output", 13, 5)},
    "plain_ssm": SSM | {"gate/kernel": ("weight", 11, 13)},
    "plain_custom_vjp": DENSE_2,
    "plain_custom_jvp": DENSE_2,
    "plain_cond": {
        "inner/kernel": ("input", 11, 13),
        "more/kernel": ("weight", 13, 13),
        "quick/kernel": ("output", 13, 5),
        "slow/kernel": ("output", 13, 5),
    },
    "plain_equilibrium": {
        "inner/kernel": ("weight", 11, 11),
        "outer/kernel": ("output", 11, 5),
    },
    "plain_spectral": {"kernel": ("output", 11, 13)},
    "linen_mlp": DENSE_2,
    "linen_cnn_train": CNN,
    "linen_cnn_eval": CNN,
    "linen_mobile": {
        "expand/kernel": ("input", 2, 9),
        "depthwise/kernel": ("weight", 9, 9),
        "squeeze/kernel": ("weight", 9, 4),
        "excite/kernel": ("weight", 4, 9),
        "project/kernel": ("weight", 9, 5),
        "head/kernel": ("output", 7, 5),
    },
    "linen_unet": {
        "enter/kernel": ("input", 18, 5),
        "down/kernel": ("weight", 45, 7),
        "up/kernel": ("weight", 28, 9),
        "leave/kernel": ("output", 126, 2),
    },
    "linen_transformer": LINEN_LANGUAGE,
    "linen_post_norm": LINEN_LANGUAGE,
    "linen_scan_remat": within("blocks", of=BLOCK),
    "linen_gqa": {f"{name}/kernel": role for name, role in LLAMA.items()}
    | {"down/kernel": ("output", 13, 11)},
    "linen_encoder_decoder": {
        "encoder/kernel": ("input", 9, 11),
        **{k.replace("attention", "self"): role for k, role in ATTENTION.items()},
        **{k.replace("attention", "cross"): role for k, role in ATTENTION.items()},
        "mlp/inner/kernel": ("weight", 11, 13),
        "mlp/outer/kernel": ("output", 13, 11),
    },
    "linen_moe": {
        "router/kernel": ("input", 11, 5),
        "experts/inner/kernel": ("input", 11, 65),
        "experts/outer/kernel": ("weight", 13, 11),
    },
    "linen_lstm": within("LSTMCell_0", of=LSTM) | {"head/kernel": ("output", 13, 5)},
    "linen_ssm": {
        "decay": ("norm", 1, 55),
        "step/kernel": ("input", 11, 11),
        "write/kernel": ("input", 11, 5),
        "read/kernel": ("input", 11, 5),
    },
    "linen_cond": DENSE_2,
    "linen_custom_vjp": {"inner/kernel": ("input", 11, 13), "outer": ("output", 13, 5)},
    "nnx_mlp": DENSE_2,
    "nnx_dropout": DENSE_2,
    "nnx_cnn_train": CNN,
    "nnx_cnn_eval": CNN,
    "nnx_unet": {
        "enter/kernel": ("input", 18, 9),
        "down/kernel": ("weight", 81, 7),
        "up/kernel": ("weight", 28, 5),
        "leave/kernel": ("output", 126, 2),
    },
    "nnx_transformer": NNX_LANGUAGE,
    "nnx_post_norm": NNX_LANGUAGE,
    "nnx_scan_remat": within("blocks", of=BLOCK),
    "nnx_gqa": {f"{name}/kernel": role for name, role in LLAMA.items()}
    | {"down/kernel": ("output", 13, 11)},
    "nnx_moe": {
        "router/kernel": ("input", 11, 5),
        "up/kernel": ("input", 11, 65),
        "down/kernel": ("weight", 13, 11),
    },
    "nnx_lstm": within("rnn/cell", of={k.replace("if/", "if_/"): r for k, r in LSTM.items()})
    | {"head/kernel": ("output", 13, 5)},
    "nnx_ssm": SSM,
    "nnx_cond": DENSE_2,
    "nnx_custom_jvp": DENSE_2,
}


def written(name):
    """Parameter -> role, by the table."""
    depth = 2 if "scan_remat" in name else 1  # of what the scan of two layers stacks
    found = {}
    for leaf, x in us.tree.named_leaves(zoo.model(name).params).items():
        vector = ("bias" if leaf.endswith("bias") else "norm", 1, x.size // depth)
        vector = vector if leaf.endswith(("bias", "scale")) else None
        found[leaf] = Role(*TABLE[name].get(leaf, vector), depth)
    return found


@functools.cache
def of_model(name, loss=False):
    model = zoo.model(name)
    fn = model.loss if loss else model.apply
    return us.tree.named_leaves(roles(fn, model.params, *model.inputs))


def test_the_table_has_every_model():
    assert TABLE.keys() == set(zoo.NAMES)
    for name, table in TABLE.items():
        assert table.keys() <= us.tree.named_leaves(zoo.model(name).params).keys()


@pytest.mark.parametrize("name", zoo.NAMES)
def test_roles_are_those_of_the_table(name):
    assert of_model(name) == written(name)


@pytest.mark.parametrize("name", zoo.COVER)
def test_a_loss_around_a_model_changes_no_role(name):
    assert of_model(name, loss=True) == written(name)


# ------------------------------------------------------------------------- what a function is

PARAMS = {"in": jnp.ones((3, 4)), "mid": jnp.ones((4, 4)), "out": jnp.ones((4, 2))}
X, Y = jnp.ones((5, 3)), jnp.ones((5, 2))
WANTED = {"in": Role("input", 3, 4), "mid": Role("weight", 4, 4), "out": Role("output", 4, 2)}


def model(p, x):
    return jnp.tanh(jnp.tanh(x @ p["in"]) @ p["mid"]) @ p["out"]


def row_loss(p, x, y):
    return jnp.square(model(p, x) - y).sum(-1)


FUNCTIONS = {
    "arrays": (model, X),
    "a scalar": (lambda p, x, y: row_loss(p, x, y).mean(), X, Y),
    "a Mean": (lambda p, x, y: us.Mean(row_loss(p, x, y), jnp.ones(5)), X, Y),
    "Means": (lambda p, x, y: {"a": us.Mean(row_loss(p, x, y), jnp.ones(5), 0.5)}, X, Y),
    "a pair": (lambda p, x, y: (us.Mean(row_loss(p, x, y), jnp.ones(5)), {"n": x}), X, Y),
    "one row": (model, X[0]),
    "vmap": (jax.vmap(model, (None, 0)), X),
    "jit": (jax.jit(model), X),
    "remat": (jax.checkpoint(model), X),
    "autocast": (us.autocast(model), X),
    "accumulated": (lambda p, x: lax.map(lambda row: model(p, row), x), X),
}


@pytest.mark.parametrize("case", FUNCTIONS.values(), ids=FUNCTIONS)
def test_roles_of_any_function_of_parameters(case):
    fn, *inputs = case
    assert roles(fn, PARAMS, *inputs) == WANTED


def test_roles_of_a_function_in_float64_are_those_in_float32():
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), (PARAMS, X))
        assert roles(model, *wide) == WANTED


def test_nothing_is_run_and_abstract_arrays_do():
    abstract = jax.eval_shape(lambda: (PARAMS, X))
    assert roles(model, *abstract) == WANTED


def test_keywords_reach_the_function_also_by_the_names_of_options():
    def fn(p, x, *, depth, flag):
        assert (depth, flag) == (3, True)
        return model(p, x)

    assert roles(fn, PARAMS, X, flag=True, kwargs={"depth": 3}) == WANTED


def test_operations_of_unit_scaling_have_the_roles_of_plain_ones():
    def fn(p, ids):
        h = us.unit.embed(ids, p["table"])
        h = us.unit.rms_norm(us.unit.gelu(us.unit.linear(h, p["w"], p["b"])), p["scale"])
        return us.unit.cross_entropy(us.unit.readout(h, p["head"]), ids)

    shapes = {"table": (9, 4), "w": (4, 8), "b": (8,), "scale": (8,), "head": (8, 9)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    found = roles(fn, params, jnp.arange(5))
    kinds = {"table": "embedding", "w": "weight", "b": "bias", "scale": "norm", "head": "output"}
    assert {name: role.kind for name, role in found.items()} == kinds
    assert (found["w"].fan_in, found["head"].fan_in, found["table"].fan_out) == (4, 8, 4)


def test_a_quantized_parameter_has_one_role():
    params = us.quantize(PARAMS, {"mid": us.DotSpec(w=us.QSpec(axes=(-2,)))})
    assert roles(us.quantized(model), params, X) == WANTED


def test_a_kernel_that_is_split_or_joined_has_the_fan_in_of_its_products():
    def split(p, x):
        q, k = jnp.split(p["qk"], 2, axis=1)
        return (x @ q) @ (x @ k).T

    assert roles(split, {"qk": jnp.ones((3, 8))}, X) == {"qk": Role("input", 3, 8)}
    joined = lambda p, x, h: jnp.tanh(
        jnp.concatenate([x, h], 1) @ jnp.concatenate([p["x"], p["h"]])
    )
    params = {"x": jnp.ones((3, 8)), "h": jnp.ones((4, 8))}
    assert roles(joined, params, X, jnp.ones((5, 4)))["h"] == Role("output", 7, 8)


def test_a_bias_of_a_single_row_is_none_the_less_a_bias():
    def fn(p, x):  # (3,)
        h = jnp.tanh(x @ p["w"] + p["b"])
        return h @ jnp.outer(h, h)

    found = roles(fn, {"w": jnp.ones((3, 3)), "b": jnp.ones(3)}, X[0])
    assert found["b"] == Role("bias", 1, 3) and found["w"].kind == "input"


@pytest.mark.parametrize("drop", [lambda w, m: w * m, lambda w, m: jnp.where(m > 0, w, 0)])
def test_a_kernel_with_a_mask_that_is_drawn_is_a_kernel(drop):
    def fn(p, x, key):
        return x @ drop(p, jax.random.bernoulli(key, 0.5, p.shape).astype(p.dtype))

    assert roles(fn, jnp.ones((3, 4)), X, jax.random.key(0)) == Role("output", 3, 4)


@pytest.mark.parametrize("shape", [(4,), (1, 4), ()], ids=str)
def test_a_gain_of_a_kernel_is_a_norm(shape):
    def fn(p, x):
        w = p["w"] / jnp.linalg.norm(p["w"], axis=0)
        return x @ (jnp.broadcast_to(p["g"], w.shape) * w)

    found = roles(fn, {"w": jnp.ones((3, 4)), "g": jnp.ones(shape)}, X)
    assert found == {"w": Role("output", 3, 4), "g": Role("norm", 1, np.prod(shape, dtype=int))}


def test_a_kernel_of_a_single_input_is_a_kernel():
    assert roles(lambda p, x: x @ p, jnp.ones((1, 4)), X[:, :1]) == Role("output", 1, 4)


# ------------------------------------------------------------------------- depth

STACK = {"in": jnp.ones((3, 4)), "w": jnp.ones((6, 4, 4)), "b": jnp.ones((6, 4))}
STACK |= {"out": jnp.ones((4, 2)), "last": jnp.ones(2)}


def stack(p, x):
    body = lambda h, wb: (jnp.tanh(h @ wb[0] + wb[1]), None)
    return lax.scan(body, x @ p["in"], (p["w"], p["b"]))[0] @ p["out"] + p["last"]


def depths(depth, **options):
    return {k: r.depth for k, r in roles(stack, STACK, X, depth=depth, **options).items()}


def test_what_a_scan_stacks_has_its_length_as_depth():
    assert depths(1) == {"in": 1, "w": 6, "b": 6, "out": 1, "last": 1}
    assert roles(stack, STACK, X)["w"] == Role("weight", 4, 4, 6)
    assert roles(stack, STACK, X)["b"] == Role("bias", 1, 4, 6)


def test_a_stack_of_stacks_has_the_product_of_lengths():
    def fn(p, x):
        inner = lambda h, w: (jnp.tanh(h @ w), None)
        return lax.scan(lambda h, ws: lax.scan(inner, h, ws), x, p)[0]

    assert roles(fn, jnp.ones((2, 5, 4, 4)), jnp.ones((3, 4))) == Role("weight", 4, 4, 10)


def test_a_depth_is_that_of_weights_biases_and_norms_that_no_scan_stacks():
    assert depths(3) == {"in": 1, "w": 6, "b": 6, "out": 1, "last": 3}
    assert {k: r.depth for k, r in roles(model, PARAMS, X, depth=9).items()} == {
        "in": 1,
        "mid": 9,
        "out": 1,
    }


def test_patterns_say_the_depth_of_some():
    assert depths({"?": 12, "in": 2}) == {"in": 2, "w": 12, "b": 12, "out": 1, "last": 1}
    with pytest.raises(ValueError, match=r"rule 0, 'wt', matched none of 5 parameters.*'w'"):
        depths({"wt": 3})
    with pytest.raises(ValueError, match=r"depth is 0; expected a number above 0"):
        depths(0)


# ------------------------------------------------------------------------- rules and errors


def test_rules_override_what_is_found_and_say_their_own_depth():
    mine = Role("embedding", 3, 4)
    found = roles(model, PARAMS, X, rules={"in": mine, "mid": Role("weight", 8, 8, 2)}, depth=5)
    assert found == {"in": mine, "mid": Role("weight", 8, 8, 2), "out": WANTED["out"]}


def test_a_rule_that_matches_nothing_or_is_no_role_is_an_error():
    with pytest.raises(ValueError, match=r"rule 0, 'inn', matched none of 3 parameters.*'in'"):
        roles(model, PARAMS, X, rules={"inn": Role("input", 3, 4)})
    with pytest.raises(TypeError, match=r"the rule 'in' is 'input'; expected a us.unit.Role"):
        roles(model, PARAMS, X, rules={"in": "input"})


WITHOUT = {
    "unused": lambda p, x: x * p["w"][0],
    "joined with activations": lambda p, x: jnp.concatenate([p["a"][None], x]) @ p["w"],
    "compared": lambda p, x: jnp.maximum(p["a"], x) @ p["w"],
}


@pytest.mark.parametrize("fn", WITHOUT.values(), ids=WITHOUT)
def test_a_parameter_without_a_role_is_an_error_that_names_it(fn):
    params = {"a": jnp.ones(3), "w": jnp.ones((3, 3))}
    with pytest.raises(ValueError, match=r"^a has no role.*rules=\{'a': us.unit.Role\(kind"):
        roles(fn, params, X)
    assert roles(fn, params, X, rules={"a": Role("bias", 1, 3)})["a"].kind == "bias"


def test_a_factor_of_a_kernel_has_no_role_of_its_own():
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 4))}
    with pytest.raises(ValueError, match=r"a has no role.*it meets only parameters, in a product"):
        roles(lambda p, x: x @ (p["a"] @ p["b"]), params, X)
    found = roles(lambda p, x: (x @ p["a"]) @ p["b"], params, X)
    assert found == {"a": Role("input", 3, 2), "b": Role("output", 2, 4)}


def test_two_fan_ins_are_an_error_that_names_both():
    tied = lambda w, x: jnp.tanh(x @ w) @ w.T
    with pytest.raises(ValueError, match=r"^w is summed over 3 and 4 numbers.*rules=\{'w'"):
        roles(lambda p, x: tied(p["w"], x), {"w": jnp.ones((3, 4))}, X)


def test_kinds_and_sizes_of_roles_are_checked():
    with pytest.raises(ValueError, match="no kind of role 'embeding'; closest: 'embedding'"):
        Role("embeding", 3, 4)
    for bad in ((0, 4), (3, -1), (float("nan"), 4)):
        with pytest.raises(ValueError, match="expected a number above 0"):
            Role("weight", *bad)
    with pytest.raises(TypeError, match="fan_in is '3'; expected a number"):
        Role("weight", "3", 4)
