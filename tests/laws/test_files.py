"""Laws of files: what was saved comes back, values, dtypes and structure, or an error says why not.

Programs of single faults stand below the law that they are cases of.
"""

import errno
import json
import os
import random
import re
import shutil
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st
from safetensors.numpy import load_file

import unitscale_jax as us
from tests.support import runs, zoo
from tests.support.runs import in_process, wait_for
from unitscale_jax.checkpoint import _arrays, _files, _orbax


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
    named = us.tree.named_leaves(params, is_leaf=us.quant.is_quantized)
    structure = jax.tree.structure(params, is_leaf=us.quant.is_quantized)

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
    graph = us.compaction.groups(model.apply, model.params, *model.inputs)
    even = {g.name: range(0, g.size, 2) for g in graph.groups if g.size % 2 == 0 and not g.flags}
    return us.compaction.plan_of(graph, even)


@pytest.mark.parametrize("form", ["floats", "codes", "compacted"])
@pytest.mark.parametrize("name", SEEN)
def test_a_model_computes_the_same_from_what_was_loaded(name, form, file):
    model = zoo.model(name)
    apply, params = model.apply, model.params
    if form == "codes":
        apply, params = us.quantized(apply), in_codes(params)
    if form == "compacted":
        plan = a_plan(model)
        apply, params = us.compaction.compacted(apply, plan), us.compaction.compact(params, plan)
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


@settings(max_examples=50)
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


HALF = "a\ud800"  # half of a pair of UTF-16, for which UTF-8 has no bytes
CODES = us.quantize({"kernel": jnp.ones((4, 2))}, {"*": us.DotSpec(w=us.QSpec(axes=(-2,)))})
UNWRITABLE = {
    "a key": {HALF: jnp.ones(2)},
    "a key above": {HALF: [jnp.ones(2)]},
    "a key below": {"b": {HALF: jnp.ones(2)}},
    "codes": {HALF: CODES},
}
WRITERS = {
    "save": lambda path, tree: us.save(path / "model.safetensors", tree),
    "Checkpoints": lambda path, tree: us.Checkpoints(path).save(1, tree),
    "compressed-tensors": lambda path, tree: us.export_compressed_tensors(path, [CODES, tree]),
}


@pytest.mark.parametrize("tree", UNWRITABLE)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_name_that_no_file_can_hold_is_refused_before_anything_is_written(writer, tree, tmp_path):
    with pytest.raises(ValueError, match=r"(array|leaf) '.*a\\ud800.*Rename that key"):
        WRITERS[writer](tmp_path, UNWRITABLE[tree])
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("step_*"))


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
    small = us.compaction.compact(model.params, plan)
    us.save(file, small)
    like = jax.eval_shape(lambda p: us.compaction.compact(p, plan), model.params)
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


# --- checkpoints: restore after save is the identity, or an error (H1, H4)


@pytest.fixture
def checkpoints(tmp_path):
    return us.Checkpoints(tmp_path / "run")


WIDE = {
    "int64": np.array([2**40 + 1, -1]),
    "uint64": np.array([2**63 + 1], np.uint64),
    "float64": np.full(3, 1 / 3),
    "complex128": np.array([1 / 3 + 2j / 3]),
    "empty": np.zeros((0, 2)),
    "scalar": np.float64(1 / 3),
}


@pytest.mark.parametrize("name", WIDE)
def test_64_bits_come_back_with_all_their_digits(name, checkpoints):
    array = WIDE[name]
    checkpoints.save(1, {"a": array})
    for like in (array, jax.ShapeDtypeStruct(array.shape, array.dtype)):
        came = checkpoints.restore({"a": like})[1]["a"]
        assert (came.shape, came.dtype, bits(came)) == (array.shape, array.dtype, bits(array))
    with jax.enable_x64(True):
        came = checkpoints.restore({"a": jax.ShapeDtypeStruct(array.shape, array.dtype)})[1]["a"]
        assert isinstance(came, jax.Array) and bits(came) == bits(array)


def test_bytes_in_another_order_are_refused_before_they_are_written(checkpoints):
    other = np.arange(3.0).astype(np.dtype(float).newbyteorder())
    with pytest.raises(TypeError, match=r"a is an array of .*order of other machines.*newbyteord"):
        checkpoints.save(1, {"a": other})
    assert checkpoints.steps() == []


def test_64_bits_do_not_go_to_devices_that_have_32(checkpoints):
    checkpoints.save(1, {"a": np.arange(8)})
    over = jax.sharding.NamedSharding(us.parallel.mesh(dp=8), jax.sharding.PartitionSpec("dp"))
    like = {"a": jax.ShapeDtypeStruct((8,), np.int64, sharding=over)}
    with pytest.raises(ValueError, match="a cannot be restored .* int64, of which JAX makes int32"):
        checkpoints.restore(like)


@pytest.mark.parametrize("number", [7, -(2**40), 0.1, 0.5, float("inf"), True, 3.4e39, -0.0])
def test_python_numbers_keep_their_digits_where_the_tree_is_abstract(number, checkpoints):
    run = lambda: {"n": type(number)(1)}
    checkpoints.save(1, {"n": number})
    for like in (run(), jax.eval_shape(run)):
        came = checkpoints.restore(like)[1]["n"]
        came = came.item() if hasattr(came, "dtype") else came
        assert type(came) is type(number) and repr(came) == repr(number)


def states():
    w = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    optimizers = {
        n: getattr(optax, n)(0.1) for n in ("adam", "adabelief", "lion", "sgd", "rmsprop")
    }
    return {name: optimizer.init(w) for name, optimizer in optimizers.items()} | {
        "list": [w, w],
        "tuple": (w, w),
        "keys": {0: w, 1: w},
        "words": {"0": w, "1": w},
        "nothing more": {"0": w, "1": w, "2": None},
        "an empty one": {"0": w, "1": w, "2": {}},
        "int8": us.quantize(w, {"w": us.DotSpec(w=us.QSpec(axes=(-2,)))}),
        "int8 x int8": us.quantize(w, {"w": us.DotSpec(w=us.QSpec(axes=(-2,)), x=us.QSpec())}),
    }


@pytest.mark.parametrize("saved", states())
def test_a_tree_of_other_containers_is_an_error_that_names_both(saved, checkpoints):
    trees = states()
    checkpoints.save(1, trees[saved])
    for name, like in trees.items():
        same = jax.tree.structure(like) == jax.tree.structure(trees[saved])
        try:
            assert_identical(checkpoints.restore(like)[1], trees[saved])
            assert same
        except ValueError as error:
            assert not same and "is of another model" in str(error), (name, error)


def test_the_state_of_another_optimizer_is_an_error_that_names_both(checkpoints):
    params = {"w": jnp.ones((4, 3))}
    checkpoints.save(1, {"opt": optax.adam(0.1).init(params)})
    message = "'opt/0' is expected to be a ScaleByBeliefState .*has a ScaleByAdamState"
    with pytest.raises(ValueError, match=message):
        checkpoints.restore({"opt": optax.adabelief(0.1).init(params)})


def resealed(path, text):
    """A checkpoint with another manifest, and digests to match."""
    (path / "manifest.json").write_bytes(text)
    (path / "SHA256SUMS").write_bytes(_files._listing(_files._digests(path)))


def test_a_checkpoint_from_before_outlines_is_restored(checkpoints):
    params = {"w": jnp.ones((4, 3))}
    checkpoints.save(1, optax.adam(0.1).init(params))
    path = checkpoints.directory / "step_00000001"
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["outline"]
    resealed(path, json.dumps(manifest).encode())
    assert_identical(
        checkpoints.restore(optax.adam(0.1).init(params))[1], optax.adam(0.1).init(params)
    )


# --- a flaw of any kind is passed over for the older checkpoint (H2)


def a_run(n):
    return {
        "w": np.full((2, 3), n, np.float32),
        "j": jnp.full(5, n, jnp.bfloat16),
        "c": jnp.arange(4).astype(jnp.uint4),
        "key": jax.random.key(n),
        "n": n,
        "lr": 0.1,
    }


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    checkpoints = us.Checkpoints(tmp_path_factory.mktemp("run"))
    for step in (1, 2):
        checkpoints.save(step, a_run(step))
    return checkpoints.directory


NEWER = "step_00000002"


def mutated(rng, data):
    """A file with some of its bytes changed, cut, added, or some of its text exchanged."""
    data, place = bytearray(data), rng.randrange(len(data) or 1)
    match rng.randrange(5):
        case 0:
            data[place : place + 1] = bytes([rng.randrange(256)])
        case 1:
            del data[place : place + rng.randrange(1, 9)]
        case 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 9))
        case 3:
            data[place:place] = data[:place][-rng.randrange(1, 40) :]
        case 4:
            data = data[:place]
    return bytes(data)


def exchanged(rng, value):
    """JSON with something else in one of its places."""
    others = [None, 3, -1, 2**70, 0.5, "x", "float32", "Python int", [], [[]], {}, True]
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        copy = value.copy()
        copy[key] = exchanged(rng, value[key])
        if rng.random() < 0.1:
            del copy[key]
        return copy
    return rng.choice(others)


def assert_restores_one_of_both(directory):
    like = a_run(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            step, tree = us.Checkpoints(directory).restore(like)
        except ValueError as error:
            assert "every checkpoint in" in str(error) or "is of another model" in str(error)
            return
    assert jax.tree.structure(tree) == jax.tree.structure(like)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        assert (np.shape(a), type(a)) == (np.shape(b), type(b))
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
    if step == 1:
        assert (tree["n"], bits(tree["w"])) == (1, bits(a_run(1)["w"]))


def test_any_change_of_any_file_with_digests_made_anew_ends_in_a_checkpoint_or_flaws(
    two_saved, tmp_path
):
    rng, directory = random.Random(0), tmp_path / "run"
    names = sorted(p.relative_to(two_saved / NEWER) for p in (two_saved / NEWER).rglob("*"))
    names = [name for name in names if (two_saved / NEWER / name).is_file()]
    for _ in range(60):
        shutil.copytree(two_saved, directory)
        path = directory / NEWER / rng.choice(names)
        path.write_bytes(mutated(rng, path.read_bytes()))
        if path.name != "SHA256SUMS":
            (directory / NEWER / "SHA256SUMS").write_bytes(
                _files._listing(_files._digests(directory / NEWER))
            )
        assert_restores_one_of_both(directory)
        shutil.rmtree(directory)


def test_any_change_of_a_manifest_is_a_flaw_or_another_model(two_saved, tmp_path):
    rng, directory = random.Random(1), tmp_path / "run"
    shutil.copytree(two_saved, directory)
    path = directory / NEWER / "manifest.json"
    text = path.read_text()
    for _ in range(200):
        changed = exchanged(rng, json.loads(text))
        resealed(path.parent, json.dumps(changed).encode())
        flaw = _files.flaw(path.parent, 2)
        assert flaw is None or isinstance(flaw, str)
        if flaw is None:
            assert_restores_one_of_both(directory)


MANIFESTS = {
    "cut": (b"{", "JSONDecodeError"),
    "a list": (b"[]", "names no format"),
    "no format": (b'{"step": 3}', "names no format"),
    "no leaves": (b'{"format": 3, "step": 2}', "no step or no leaves"),
    "a word": (b'{"format": 3, "step": 2, "leaves": [3]}', "describes no leaf"),
    "deep": (b"[" * 100000, "RecursionError"),
    "no text": (b'"\xff"', "UnicodeDecodeError"),
    "nothing": (b"", "JSONDecodeError"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_manifest_that_cannot_be_is_a_flaw_that_says_so(case, two_saved, tmp_path):
    text, message = MANIFESTS[case]
    shutil.copytree(two_saved, tmp_path / "run")
    resealed(tmp_path / "run" / NEWER, text)
    with pytest.warns(UserWarning, match=f"restored step_00000001.*{NEWER}: .*{message}"):
        assert us.Checkpoints(tmp_path / "run").restore(a_run(0))[0] == 1


def test_what_was_cleared_while_it_was_written_is_not_finished(checkpoints, monkeypatch):
    checkpoints.save(1, a_run(1))
    finish = _arrays.finish

    def raced(path):
        finish(path)
        (path / "_METADATA").unlink()
        shutil.rmtree(path / "ocdbt.process_0")

    monkeypatch.setattr(_arrays, "finish", raced)
    with pytest.raises(OSError, match="is not what process 0 wrote"):
        checkpoints.save(2, a_run(2))
    assert checkpoints.steps() == [1]


@pytest.mark.parametrize("gone", ["all", "arrays", "_METADATA", "manifest.ocdbt"])
def test_what_is_removed_while_it_is_read_is_passed_over(gone, checkpoints, monkeypatch):
    for step in (1, 2):
        checkpoints.save(step, a_run(step))
    flaw = _files.flaw

    def removed_after(path, step):
        found = flaw(path, step)
        if path.name == NEWER:
            place = {"all": path, "arrays": path / "arrays"}.get(gone, path / "arrays" / gone)
            (shutil.rmtree if place.is_dir() else os.remove)(place)
        return found

    monkeypatch.setattr(_files, "flaw", removed_after)
    with pytest.warns(UserWarning, match=f"restored step_00000001.*{NEWER}"):
        assert checkpoints.restore(a_run(0))[0] == 1


def test_memory_that_is_lacking_is_no_flaw(checkpoints, monkeypatch):
    checkpoints.save(1, a_run(1))

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(_arrays, "read", full)
    with pytest.raises(jax.errors.JaxRuntimeError):
        checkpoints.restore(a_run(0))


# --- one writer at a time


def test_a_second_writer_is_told_who_is_saving(checkpoints, monkeypatch):
    checkpoints.save(1, a_run(1))
    told, write = [], _files.write

    def meanwhile(path, manifest):
        with pytest.raises(RuntimeError, match=rf"process {os.getpid()} on host .* is saving here"):
            us.Checkpoints(checkpoints.directory).save(5, a_run(5))
        told.append(path.name)
        write(path, manifest)

    with monkeypatch.context() as patched:
        patched.setattr(_files, "write", meanwhile)
        checkpoints.save(2, a_run(2))
    assert len(told) == 1 and str(os.getpid()) in told[0]
    assert checkpoints.steps() == [1, 2]
    checkpoints.save(3, a_run(3))  # the lock is free again


def test_two_processes_that_save_the_same_steps_leave_whole_checkpoints(tmp_path):
    """Each save ends well, or says that the other one is saving or has saved a later step."""
    both = [in_process(runs.save_each, tmp_path / "run", tmp_path / f"log_{k}", 12) for k in (0, 1)]
    seen = 0
    while any(process.is_alive() for process in both):
        try:
            step, tree = us.Checkpoints(tmp_path / "run").restore(runs.tree_of(0))
        except FileNotFoundError:
            continue
        assert tree["step"] == step and (tree["w"] == step).all()
        seen += 1
    assert seen and [process.exitcode for process in both] == [0, 0]
    for k in (0, 1):
        for line in (tmp_path / f"log_{k}").read_text().splitlines():
            assert re.match(
                r"saved|RuntimeError: (process \d+ on host|another)|ValueError: .*later step",
                line,
            )


def test_a_killed_writer_leaves_no_lock(tmp_path):
    log = tmp_path / "log"
    log.touch()
    process = in_process(runs.save_for_ever, tmp_path / "run", log)
    wait_for(lambda: log.stat().st_size)
    process.kill()
    process.join()
    us.Checkpoints(tmp_path / "run").save(10**6, runs.tree_of(10**6))
    assert not [*(tmp_path / "run").glob("unfinished_*")]


# --- a disk that is full


def test_a_disk_that_is_full_is_an_error_before_anything_is_written(checkpoints, monkeypatch):
    checkpoints.save(1, a_run(1))
    usage = shutil.disk_usage(checkpoints.directory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(OSError, match="no space left: arrays take") as raised:
        checkpoints.save(2, a_run(2))
    assert raised.value.errno == errno.ENOSPC
    assert {path.name for path in checkpoints.directory.iterdir()} == {"lock", "step_00000001"}


def test_a_disk_that_fills_up_meanwhile_is_the_same_error(checkpoints, monkeypatch):
    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: Failed writing: d/1: No space left")

    handler = type("Handler", (), {"save": full})
    monkeypatch.setattr(_orbax, "_handler", handler)
    with pytest.raises(OSError, match="no space left: RESOURCE_EXHAUSTED"):
        checkpoints.save(2, a_run(2))
    assert {path.name for path in checkpoints.directory.iterdir()} == {"lock"}


@pytest.mark.parametrize("depth", [100, 450, 900])
def test_a_deep_tree_is_saved_whole_or_refused_in_words(depth, tmp_path):
    """How deep Python can walk depends on its version; nothing of a tree is lost in either case."""
    tree = jnp.ones(2)
    for _ in range(depth):
        tree = {"a": tree}
    try:
        us.save(tmp_path / "deep.safetensors", tree)
    except ValueError as error:
        assert depth > 100 and "nested deeper than Python's recursion limit" in str(error)
    else:
        (found,) = us.tree.named_leaves(us.load(tmp_path / "deep.safetensors")).items()
        assert found[0] == "/".join("a" * depth) and found[1].tolist() == [1.0, 1.0]


# --- H5: plans and specs that were changed


def resaved(file, change):
    """A file of codes with another spec, and without a digest."""
    header, arrays = opened(file)
    header["__metadata__"].pop("sha256", None)
    header["__metadata__"]["spec:w"] = change(header["__metadata__"]["spec:w"])
    written(file, header, arrays)


SPECS = {
    "int8": us.DotSpec(w=us.QSpec(axes=(-2,))),
    "groups": us.DotSpec(
        w=us.QSpec(format="int4", axes=(-2,), group=us.quant.Group(2, "integer"), symmetric=True),
        x=us.QSpec(calibrator=us.quant.Percentile(99.0)),
    ),
}


@pytest.mark.parametrize("spec", SPECS)
def test_any_change_of_a_spec_is_an_error_that_names_the_file_or_a_spec(spec, file):
    rng = random.Random(2)
    us.save(file, us.quantize({"w": jnp.ones((4, 2))}, {"w": SPECS[spec]}))
    before = file.read_bytes()
    for _ in range(150):
        file.write_bytes(before)
        resaved(file, lambda text: json.dumps(exchanged(rng, json.loads(text))))
        try:
            assert us.load(file)["w"].shape == (4, 2)
        except ValueError as error:
            assert "model.safetensors" in str(error)


def test_a_spec_that_is_nested_too_deeply_is_an_error_that_names_the_file(file):
    us.save(file, us.quantize({"w": jnp.ones((4, 2))}, {"w": SPECS["int8"]}))
    resaved(file, lambda text: "[" * 100000)
    with pytest.raises(ValueError, match="model.safetensors: w has a spec .* cannot read"):
        us.load(file)


@pytest.fixture(scope="module")
def a_plan_file(tmp_path_factory):
    params = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 3))}
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    graph = us.compaction.groups(fn, params, jnp.ones((2, 4)))
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    us.compaction.save_plan(
        path, us.compaction.plan(graph, us.compaction.l2(graph, params), keep=0.5)
    )
    return path, params


def test_any_change_of_a_plan_is_an_error_that_names_the_file_or_a_plan(a_plan_file, tmp_path):
    path, params = a_plan_file
    text, rng = json.loads(path.read_text()), random.Random(3)
    for _ in range(500):
        changed = tmp_path / "changed.json"
        changed.write_text(json.dumps(exchanged(rng, text)))
        try:
            plan = us.compaction.load_plan(changed)
        except ValueError as error:
            assert "changed.json" in str(error)
            continue
        assert plan.new_shapes.keys() == plan.shapes.keys()
        assert all(isinstance(flag, str) for flags in plan.flags.values() for flag in flags)
    assert us.compaction.load_plan(path, params).sizes["a:1"] == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text | {"shapes": dict.fromkeys(text["shapes"], 3)}, "expected a list"),
        (lambda text: text | {"flags": dict.fromkeys(text["flags"], "exact")}, "expected a list"),
        (lambda text: text | {"flags": dict.fromkeys(text["flags"], [3])}, "expected a word"),
        (lambda text: text | {"axes": dict.fromkeys(text["axes"], ["a"])}, "expected a list"),
        (lambda text: text | {"sizes": dict.fromkeys(text["sizes"], 2**70)}, "whole number"),
    ],
)
def test_a_plan_with_something_else_in_it_says_what(change, message, a_plan_file, tmp_path):
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(change(json.loads(a_plan_file[0].read_text()))))
    with pytest.raises(ValueError, match=rf"changed.json was altered: .*{message}"):
        us.compaction.load_plan(changed)


def test_a_plan_that_is_nested_too_deeply_is_no_plan(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("[" * 100000)
    with pytest.raises(ValueError, match="plan.json is no plan: it is not JSON"):
        us.compaction.load_plan(path)
