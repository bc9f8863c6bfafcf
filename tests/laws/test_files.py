"""Laws of files: what was saved comes back, values, dtypes and structure, or an error says why not.

Programs of single faults stand below the law that they are cases of.
"""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st
from safetensors.numpy import load_file

import unitscale_jax as us
from tests.support import zoo


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def bits(leaf):
    return np.asarray(leaf).tobytes()


def assert_identical(came, expected):
    assert jax.tree.structure(came) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(came), jax.tree.leaves(expected), strict=True):
        assert (np.shape(a), jnp.result_type(a)) == (np.shape(b), jnp.result_type(b))
        assert bits(a) == bits(b)


# --- a model takes what was loaded, as floats, as codes and compacted

# Whatever a model is written in, names are in files; NNX alone has structure that they do not say.
QUICK = {"linen_mobile", "plain_moe_top_k"} | {n for n in zoo.NAMES if n.startswith("nnx_")}
SEEN = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in zoo.NAMES]


def program(apply, params, *inputs):
    """What a model computes, as a text of its named parameters in order of their names."""
    named = us.tree.named_leaves(params, is_leaf=us.is_quantized)
    structure = jax.tree.structure(params, is_leaf=us.is_quantized)

    def of_leaves(leaves, *inputs):
        return apply(jax.tree.unflatten(structure, [leaves[name] for name in named]), *inputs)

    text = str(jax.make_jaxpr(of_leaves)(named, *inputs))
    return text, {name: [*map(bits, jax.tree.leaves(x))] for name, x in named.items()}


def in_codes(params):
    """All kernels in eight bits; what meets no product is dequantized."""
    leaves = us.tree.named_leaves(params).items()
    kernels = [name for name, x in leaves if x.ndim > 1 and not name.endswith(("bias", "scale"))]
    return us.quantize(params, dict.fromkeys(kernels, us.DotSpec(w=us.QSpec(axes=(-2,)))))


def a_plan(model):
    """Every other channel of the groups that have even sizes."""
    graph = us.prune.groups(model.apply, model.params, *model.inputs)
    even = {g.name: range(0, g.size, 2) for g in graph.groups if g.size % 2 == 0 and not g.flags}
    return us.prune.plan_of(graph, even)


@pytest.mark.parametrize("form", ["floats", "codes", "compacted"])
@pytest.mark.parametrize("name", SEEN)
def test_a_model_computes_the_same_from_what_was_loaded(name, form, file):
    model = zoo.model(name)
    apply, params = model.apply, model.params
    if form == "codes":
        apply, params = us.quantized(apply), in_codes(params)
    if form == "compacted":
        plan = a_plan(model)
        apply, params = us.prune.compacted(apply, plan), us.prune.compact(params, plan)
    us.save(file, params)
    loaded = us.load(file)
    assert program(apply, loaded, *model.inputs) == program(apply, params, *model.inputs)


# --- the structure comes back

words = st.text("ab/.0'é", min_size=1, max_size=3)
leaves = st.integers(0, 9).map(lambda n: np.full(n % 3, n, np.float32))
containers = lambda below: (
    st.lists(below, max_size=3)
    | st.lists(below, max_size=3).map(tuple)
    | st.dictionaries(words, below, max_size=3)
    | st.dictionaries(st.integers(-1, 12), below, max_size=3)
)


@settings(max_examples=100)
@given(tree=st.recursive(leaves | st.none(), containers, max_leaves=8))
def test_dicts_lists_tuples_and_their_keys_come_back_as_they_were(tree, tmp_path_factory):
    file = tmp_path_factory.mktemp("any") / "tree.safetensors"
    try:
        us.save(file, tree)
    except ValueError as error:
        assert "two leaves are named" in str(error)
        return
    try:
        loaded = us.load(file)
    except ValueError as error:  # the key "a/b" beside the key "a"
        assert "is a leaf inside of a leaf" in str(error)
        return
    assert_identical(loaded, jax.tree.map(jnp.asarray, tree))
    assert load_file(file).keys() == {name for name in us.tree.names(tree)}


class Pair(NamedTuple):
    kernel: jax.Array
    bias: jax.Array | None


def test_named_fields_come_back_by_their_names(file):
    us.save(file, {"head": Pair(jnp.ones(2), None), "tail": [Pair(jnp.zeros(1), jnp.ones(3))]})
    loaded = us.load(file)
    assert type(loaded["head"]).__name__ == "Pair" and loaded["head"]._fields == Pair._fields
    assert loaded["head"].bias is None and loaded["tail"][0].bias.shape == (3,)
    assert jax.tree.structure(loaded) == jax.tree.structure(us.load(file))  # one class, not two
    like = {"head": Pair(jnp.ones(2), None), "tail": [Pair(jnp.zeros(1), jnp.ones(3))]}
    assert_identical(us.load(file, like), like)


@jax.tree_util.register_pytree_node_class
class Opaque:
    def __init__(self, *children):
        self.children = children

    def tree_flatten(self):
        return self.children, "how it is made"

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_what_only_its_class_can_make_is_an_error_that_names_it(file):
    us.save(file, {"a": Opaque(jnp.ones(2))})
    with pytest.raises(ValueError, match="it holds a Opaque, which only its own class.*`like`"):
        us.load(file)
    assert us.load(file, {"a": Opaque(jnp.ones(2))})["a"].children[0].shape == (2,)


def test_a_file_from_before_outlines_comes_back_as_dicts(file):
    us.save(file, {"layers": [{"w": jnp.ones(2)}]})
    header, arrays = opened(file)
    del header["__metadata__"]["outline"], header["__metadata__"]["sha256"]
    written(file, header, arrays)
    assert_identical(us.load(file), {"layers": {"0": {"w": jnp.ones(2)}}})


def opened(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def written(path, header, arrays):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + arrays)


OUTLINES = {
    "no JSON": ("[", "of its outline"),
    "deep": ("[" * 100000, "of its outline, it is nested too deeply"),
    "a number": ("3", "it is no outline"),
    "a kind": ('["set","set",[]]', "it is no outline"),
    "no entries": ('["dict","dict",3]', "entries of a dict are not keys"),
    "an entry": ('["dict","dict",[["w"]]]', "entries of a dict are not keys"),
    "another name": ('["dict","dict",[["v","*"]]]', "does not name the arrays"),
    "a name twice": ('["dict","dict",[["w","*"],["w","*"]]]', "does not name the arrays"),
    "no field": ('["fields","Pair",[["w","*"]]]', None),
    "no name": ('["fields","a b",[["w","*"]]]', "valid identifiers"),
}


@pytest.mark.parametrize("case", OUTLINES)
def test_an_outline_that_cannot_be_is_an_error_that_names_the_file(case, file):
    text, message = OUTLINES[case]
    us.save(file, {"w": jnp.ones(2)})
    header, arrays = opened(file)
    header["__metadata__"]["outline"] = text
    del header["__metadata__"]["sha256"]
    written(file, header, arrays)
    if message is None:
        assert us.load(file).w.shape == (2,)
        return
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{message}"):
        us.load(file)


# --- H3: NNX models with integer keys

SECOND = {
    "linear": lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(0)),
    "dropout": lambda: nnx.Dropout(0.1, rngs=nnx.Rngs(0)),
    "batch norm": lambda: nnx.BatchNorm(4, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("second", SECOND)
def test_an_nnx_model_takes_its_loaded_parameters_and_state(second, file):
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), SECOND[second]())
    apply, params, state = us.from_nnx(model)
    us.save(file, {"params": params, "state": state})
    loaded, x, key = us.load(file), jnp.ones((2, 4)), jax.random.key(0)
    out, new = apply(loaded["params"], x, state=loaded["state"], key=key)
    expected, new_state = apply(params, x, state=state, key=key)
    assert bits(out) == bits(expected)
    assert jax.tree.structure(new) == jax.tree.structure(loaded["state"])
    assert [*map(bits, jax.tree.leaves(new))] == [*map(bits, jax.tree.leaves(new_state))]
    grads = jax.grad(lambda p: apply(p, x, state=state, key=key)[0].sum())(loaded["params"])
    assert jax.tree.structure(grads) == jax.tree.structure(loaded["params"])


def test_strings_are_as_good_as_integers_and_a_wrong_name_is_named():
    apply, _, _ = us.from_nnx(nnx.Sequential(nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))))
    kernel = jnp.eye(4)
    assert apply({"layers": {"0": {"kernel": kernel}}}, kernel).shape == (4, 4)
    with pytest.raises(ValueError, match="no leaf 'layers/0/kernel'; closest: 'layers/0/kernle'"):
        apply({"layers": [{"kernle": kernel}]}, kernel)
    with pytest.raises(ValueError, match="a leaf 'layers/0/bias' that is not expected"):
        apply({"layers": [{"kernel": kernel, "bias": kernel[0]}]}, kernel)


def test_a_compacted_model_is_loaded_by_its_abstract_shapes(file):
    model = zoo.model("nnx_mlp")
    plan = a_plan(model)
    small = us.prune.compact(model.params, plan)
    us.save(file, small)
    like = jax.eval_shape(lambda p: us.prune.compact(p, plan), model.params)
    assert_identical(us.load(file, like), small)


# --- H4: a digest of every bit


def test_any_bit_of_a_file_that_is_flipped_is_refused(file):
    codes = in_codes({"w": jnp.arange(8.0).reshape(4, 2), "b": [jnp.ones(3), (jnp.ones(1), None)]})
    us.save(file, codes)
    whole, loaded = file.read_bytes(), us.load(file)
    for place in [*range(0, len(whole), 3), len(whole) - 1]:
        for bit in (place % 8, 6):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            try:
                came = us.load(file)
            except ValueError:
                continue
            # The name "sha256" itself: then nothing else was changed.
            assert b'"sha256"' not in file.read_bytes()
            assert_identical(came, loaded)
            assert_identical(came, codes)
