"""Laws of checkpoints."""

import functools
import itertools
import json
import os
import pathlib
import random
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import unitscale_jax as us
from tests.support import runs
from tests.support.runs import in_process, wait_for
from unitscale_jax.checkpoint import Checkpoints, _arrays, _files

NARROW = ["bool", "int2", "uint2", "int4", "uint4", "float4_e2m1fn"]  # stored a byte per number
DTYPES = [
    *NARROW,
    *["int8", "uint8", "int16", "uint16", "int32", "uint32", "float16", "bfloat16", "float32"],
    *["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3b11fnuz"],
    *["float8_e3m4", "float8_e4m3", "float8_e8m0fnu", "complex64"],
]


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "run", keep=3)


def bits(leaf):
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return bits(jax.random.key_data(leaf))
    return np.asarray(leaf).tobytes()


def assert_identical(came, expected):
    assert jax.tree.structure(came) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(came), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(b)
        if isinstance(b, int | float | str) and not isinstance(b, np.generic):
            assert repr(a) == repr(b)
            continue
        assert (np.shape(a), jnp.result_type(a)) == (np.shape(b), jnp.result_type(b))
        assert bits(a) == bits(b)


def assert_restores(checkpoints, like, step, tree):
    found, restored = checkpoints.restore(like)
    assert found == step
    assert_identical(restored, tree)


def model(value=0.0):
    return {
        "mlp": {"kernel": jnp.full((2, 3), value, jnp.float32), "bias": jnp.full(3, value, "f")},
        "step": 0,
    }


# What is saved is what is restored.


@pytest.mark.parametrize("dtype", DTYPES)
def test_restores_every_bit_pattern_of_every_dtype(dtype, checkpoints):
    pattern = np.random.default_rng(0).integers(0, 256, 512, np.uint8)
    array = (pattern % 8).astype(dtype) if dtype in NARROW else pattern.view(dtype)
    tree = {"numpy": array, "jax": jnp.asarray(array), "scalar": jnp.asarray(array)[3]}
    checkpoints.save(0, tree)
    assert_restores(checkpoints, tree, 0, tree)


@settings(max_examples=10)
@given(values=st.tuples(st.integers(), st.floats(), st.booleans(), st.text(max_size=9)))
def test_restores_python_scalars_as_they_were(values, tmp_path_factory):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("run"))
    checkpoints.save(0, values)
    assert_restores(checkpoints, (0, 0.0, False, ""), 0, values)


def test_restores_numpys_generator_so_that_the_data_go_on_where_they_stopped(checkpoints):
    generator = np.random.default_rng(3)
    generator.permutation(100)
    checkpoints.save(1, generator.bit_generator.state)
    expected = generator.permutation(100)
    fresh = np.random.default_rng(0)
    _, fresh.bit_generator.state = checkpoints.restore(fresh.bit_generator.state)
    np.testing.assert_array_equal(fresh.permutation(100), expected)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_restores_typed_keys_of_every_implementation(impl, checkpoints):
    key = jax.random.key(7, impl=impl)
    tree = {"one": key, "rows": jax.random.split(key, 3), "none": jax.random.split(key, 3)[:0]}
    checkpoints.save(0, tree)
    assert_restores(checkpoints, tree, 0, tree)
    _, restored = checkpoints.restore(tree)
    assert jax.random.key_impl(restored["rows"]) == jax.random.key_impl(key)


@pytest.mark.parametrize(
    "tree",
    [jnp.arange(3.0), {}, {"empty": jnp.zeros((0, 3))}, {"position": 3}, [np.float64(0.1), None]],
    ids=["lone leaf", "no leaves", "empty array", "no arrays", "NumPy scalar"],
)
def test_restores_trees_at_the_edge(tree, checkpoints):
    checkpoints.save(0, tree)
    assert_restores(checkpoints, tree, 0, tree)


def test_restores_an_optimiser_state_and_an_nnx_state(checkpoints, relaxed_promotion):
    del relaxed_promotion
    params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    optimizer = optax.chain(optax.clip(1.0), optax.adamw(optax.linear_schedule(1e-3, 0, 9)))
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    checkpoints.save(0, (params, state))
    assert_restores(checkpoints, (params, optimizer.init(params)), 0, (params, state))


def test_a_weak_type_stays_weak_since_it_decides_promotions(checkpoints):
    weak = {"float": jnp.full(3, 0.5), "int": jnp.full((), 2)}
    checkpoints.save(0, weak)
    _, restored = checkpoints.restore(weak)
    assert_identical(restored, weak)
    assert restored["float"].weak_type and restored["int"].weak_type
    assert not checkpoints.restore({"float": jnp.zeros(3), "int": jnp.int32(0)})[1]["int"].weak_type


def test_shapes_without_values_are_enough_to_restore(checkpoints):
    run = lambda: {"w": jnp.ones(2, jnp.bfloat16), "key": jax.random.key(1), "position": 7}
    checkpoints.save(0, run())
    _, restored = checkpoints.restore(jax.eval_shape(run))
    assert_identical(restored, run() | {"position": jnp.asarray(7, jnp.int32)})


def test_restored_arrays_are_sharded_as_the_arrays_they_replace(checkpoints):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("model", "data"))
    w = jax.device_put(jnp.arange(32.0).reshape(4, 8), sharding)
    checkpoints.save(0, {"w": w, "free": jnp.ones(2)})
    shapes = jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=sharding)
    for like in ({"w": w, "free": jnp.zeros(2)}, {"w": shapes, "free": jnp.zeros(2)}):
        _, restored = checkpoints.restore(like)
        assert restored["w"].sharding == sharding and not restored["free"].committed
        np.testing.assert_array_equal(restored["w"], w)


# Meshes change between a save and a restore.

MESHES = [(4, 2), (2, 4), (8, 1), (1, 1), (3, 2)]  # of the last, six devices of eight


def mesh_of(sizes):
    devices = jax.devices()[: sizes[0] * sizes[1]]
    return us.parallel.mesh(devices=devices, dp=sizes[0], tp=sizes[1])


@functools.cache
def run_of_all_kinds():
    bits = np.random.default_rng(0).integers(0, 256, (24, 8), np.uint8)
    rules = {"w": us.DotSpec(w=us.QSpec(axes=(-2,)))}
    return {
        "float": np.tile(bits, (1, 4)).view(np.float32),  # (24, 8), NaNs too
        "bf16": np.tile(bits, (1, 2)).view(jnp.bfloat16),
        "int8": bits.view(np.int8),
        "bool": bits % 2 == 0,
        "int4": (bits % 8).astype(jnp.int4),
        "whole": np.arange(5.0, dtype=np.float32),
        "scalar": np.float32(0.1),
        "weak": jnp.full(8, 0.5),
        "codes": us.quantize(jnp.asarray(bits, jnp.float32), {"": rules["w"]}),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 24),
    }


@functools.cache
def spread(sizes):
    """A run laid out over a mesh, each leaf in another way."""
    mesh = mesh_of(sizes)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    specs = {
        "float": ("dp", "tp"),
        "bf16": (None, ("tp",)),
        "int8": ("tp",),
        "bool": (("tp", "dp"),),
        "int4": (None, "tp"),
        "weak": ("tp",),
        "keys": ("dp",),
    }
    tree = dict(run_of_all_kinds())
    codes = tree.pop("codes")
    cut = lambda field, x: put(x, "dp" if field == "codes" else None, "tp")
    laid = {name: put(x, *specs.get(name, ())) for name, x in tree.items()}
    return laid | {"codes": codes.over(cut), "step": 3}


def abstracted(tree):
    """Shapes, dtypes and shardings of a tree, without its values."""
    weak = lambda x: getattr(x, "weak_type", False)  # a key has none
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding, weak_type=weak(x))
    return jax.tree.map(lambda x: like(x) if isinstance(x, jax.Array) else x, tree)


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    """The same run saved from each mesh, each in a directory."""
    directories = {}
    for sizes in MESHES:
        directories[sizes] = tmp_path_factory.mktemp("run")
        Checkpoints(directories[sizes]).save(3, spread(sizes))
    return directories


@pytest.mark.parametrize("after", MESHES)
@pytest.mark.parametrize("before", MESHES)
def test_what_one_mesh_saves_another_restores_to_the_bit(before, after, laid_out):
    expected = spread(after)
    for like in (expected, abstracted(expected)):
        _, restored = Checkpoints(laid_out[before]).restore(like)
        assert_identical(restored, expected)
        for came, meant in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
            if isinstance(meant, jax.Array):
                assert came.sharding.is_equivalent_to(meant.sharding, meant.ndim)
                assert getattr(came, "weak_type", None) == getattr(meant, "weak_type", None)


def test_each_number_is_stored_once_however_often_devices_hold_it(checkpoints):
    cut = lambda *spec: jax.device_put(
        jnp.ones((256, 64)), NamedSharding(mesh_of((4, 2)), PartitionSpec(*spec))
    )
    checkpoints.save(0, [cut(), cut("tp")])
    size = sum(file.stat().st_size for file in files(checkpoints.directory))
    numbers = 2 * 4 * 256 * 64
    assert numbers <= size < 1.2 * numbers


def test_what_is_equal_to_zero_keeps_its_bits(checkpoints):
    # A part of zeros is not written, so that minus zero must not be taken for one.
    tree = {"numpy": np.full(64, -0.0, np.float32), "jax": jnp.full(64, -0.0, jnp.bfloat16)}
    checkpoints.save(0, tree)
    assert_restores(checkpoints, tree, 0, tree)


def test_a_file_that_process_0_does_not_see_is_an_error_and_the_previous_one_stays(
    checkpoints, monkeypatch
):
    checkpoints.save(0, model(1))
    write = _arrays.write
    monkeypatch.setattr(_arrays, "write", lambda *args: write(*args) | {"ocdbt.process_1/d/1": 9})
    with pytest.raises(OSError, match="process_1/d/1 is not what process 0 wrote.*same directory"):
        checkpoints.save(1, model())
    assert checkpoints.steps() == [0]
    assert_restores(checkpoints, model(), 0, model(1.0))


def test_a_restored_array_does_not_hang_on_the_file(checkpoints):
    tree = {"numpy": np.arange(64.0), "jax": jnp.arange(64.0)}
    checkpoints.save(0, tree)
    _, restored = checkpoints.restore(tree)
    for file in files(checkpoints.directory):
        file.write_bytes(bytes(file.stat().st_size))
    restored["numpy"][0] += 0  # and one may write to it
    assert_identical(restored, tree)


def test_a_sharding_that_does_not_divide_is_an_error_that_names_the_leaf(checkpoints):
    checkpoints.save(0, {"mlp": {"bias": jnp.zeros(6)}})
    sharding = NamedSharding(mesh_of((4, 2)), PartitionSpec("dp"))
    like = {"mlp": {"bias": jax.ShapeDtypeStruct((6,), jnp.float32, sharding=sharding)}}
    with pytest.raises(ValueError, match=r"mlp/bias cannot be restored as it is in `like`: .*6"):
        checkpoints.restore(like)


def test_a_dtype_or_shape_that_differs_is_an_error_whatever_the_sharding(checkpoints):
    checkpoints.save(0, {"w": jnp.zeros((8, 4))})
    sharding = NamedSharding(mesh_of((4, 2)), PartitionSpec("dp"))
    for shape, dtype, text in [
        ((8, 4), "bfloat16", r"bfloat16\[8,4\]"),
        ((4, 8), "float32", "4,8"),
    ]:
        like = {"w": jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)}
        with pytest.raises(ValueError, match=f"leaf 'w' is expected to be .*{text}"):
            checkpoints.restore(like)


# Which checkpoints there are.


def test_the_newest_few_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (0, 3, 10, 200):
        checkpoints.save(step, model(step))
    assert checkpoints.steps() == [10, 200]
    assert_restores(checkpoints, model(), 200, model(200.0))


def test_nothing_is_removed_before_the_new_one_is_complete(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, model(1))
    at_removal = []
    monkeypatch.setattr(
        shutil, "rmtree", lambda path: at_removal.append((path, _files.flaw(tmp_path / NEW, 2)))
    )
    checkpoints.save(2, model(2))
    assert [flaw for _, flaw in at_removal] == [None]


NEW = "step_00000002"


def test_saving_a_step_again_replaces_it(checkpoints):
    checkpoints.save(2, model(1))
    checkpoints.save(2, model(2))
    assert checkpoints.steps() == [2]
    assert_restores(checkpoints, model(), 2, model(2.0))


def test_a_run_that_did_not_start_from_the_later_checkpoint_may_not_save(checkpoints):
    checkpoints.save(100, model())
    with pytest.raises(ValueError, match=r"saving step 3.*later step_00000100.*Restore it first"):
        checkpoints.save(3, model())
    assert checkpoints.steps() == [100]


def test_damaged_later_checkpoints_do_not_push_out_the_new_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(9, model(9))
    (tmp_path / "step_00000009" / "manifest.json").unlink()
    checkpoints.save(4, model(4))
    assert checkpoints.steps() == [4]
    assert_restores(checkpoints, model(), 4, model(4.0))


# Damage is refused, and the previous checkpoint is used.


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("run"))
    for step in (1, 2):
        checkpoints.save(step, model(step))
    return checkpoints.directory


def files(directory):
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_case(path):
    before = path.read_bytes()
    path.write_bytes(before.swapcase())
    if path.read_bytes() == before:  # no text, all of it numbers
        flip(path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def cut_to_nothing(path):
    path.write_bytes(b"")


def add_a_byte(path):
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize("damage", [flip, change_case, cut, cut_to_nothing, add_a_byte, os.remove])
def test_damage_to_any_file_is_refused_and_the_previous_one_is_used(damage, two_saved, tmp_path):
    names = [path.relative_to(two_saved / NEW) for path in files(two_saved / NEW)]
    assert {"SHA256SUMS", "arrays/manifest.ocdbt", "manifest.json"} < {*map(str, names)}
    for name in names:
        directory = tmp_path / "damaged"
        shutil.copytree(two_saved, directory)
        damage(directory / NEW / name)
        named = ".*" if name.name == "SHA256SUMS" else f"{name} (is missing|was altered)"
        with pytest.warns(UserWarning, match=f"restored step_00000001.*{NEW}: {named}"):
            assert_restores(Checkpoints(directory), model(), 1, model(1.0))
        shutil.rmtree(directory)


def test_any_byte_of_the_digests_counts(two_saved, tmp_path):
    directory = tmp_path / "damaged"
    shutil.copytree(two_saved, directory)
    sums = directory / NEW / "SHA256SUMS"
    whole = sums.read_bytes()
    for place, bit in itertools.product(range(0, len(whole), 41), range(8)):
        sums.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        assert _files.flaw(directory / NEW, 2) is not None


def test_a_file_that_was_added_is_refused(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path / "run")
    (tmp_path / "run" / NEW / "arrays" / "extra").touch()
    with pytest.warns(UserWarning, match="arrays/extra is not listed in SHA256SUMS"):
        assert_restores(Checkpoints(tmp_path / "run"), model(), 1, model(1.0))


def test_a_renamed_checkpoint_is_refused(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path / "run")
    (tmp_path / "run" / "step_00000001").rename(tmp_path / "run" / "step_00000007")
    with pytest.warns(UserWarning, match="step_00000007: it is a renamed step 1"):
        assert_restores(Checkpoints(tmp_path / "run"), model(), 2, model(2.0))


def test_a_format_from_the_future_is_refused_and_stays(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path / "run")
    path = tmp_path / "run" / NEW
    manifest = json.loads((path / "manifest.json").read_text()) | {"format": 99}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "SHA256SUMS").write_bytes(_files._listing(_files._digests(path)))
    with pytest.warns(UserWarning, match="it has format 99, this version reads format 3"):
        assert_restores(Checkpoints(tmp_path / "run"), model(), 1, model(1.0))
    with pytest.raises(
        ValueError, match="holds the later step_00000002, so this run did not start"
    ):
        Checkpoints(tmp_path / "run").save(1, model(1))
    assert path.exists()  # it is not damaged, so it is not removed


def test_when_all_are_damaged_each_is_listed_with_its_flaw(two_saved, tmp_path):
    shutil.copytree(two_saved, tmp_path / "run")
    (tmp_path / "run" / "step_00000001" / "SHA256SUMS").unlink()
    flip(tmp_path / "run" / NEW / "manifest.json")
    listed = r"damaged:\n.*0002: manifest.json was altered.*\n.*0001: SHA256SUMS is missing"
    with pytest.raises(ValueError, match=listed):
        Checkpoints(tmp_path / "run").restore(model())


def test_an_empty_directory_says_that_there_is_none(checkpoints):
    assert checkpoints.steps() == []
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoints.restore(model())


# Another model is an error that names the leaf.

ANOTHER_MODEL = {
    "missing": (
        {
            "mlp": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)},
            "gain": jnp.ones(1),
            "step": 0,
        },
        r"leaf 'gain', float32\[1\], is missing from it",
    ),
    "extra": (
        {"mlp": {"kernel": jnp.zeros((2, 3))}, "step": 0},
        r"it has a leaf 'mlp/bias', float32\[3\], that is not expected",
    ),
    "shape": (
        {"mlp": {"kernel": jnp.zeros((2, 4)), "bias": jnp.zeros(4)}, "step": 0},
        r"leaf 'mlp/bias' is expected to be float32\[4\], the checkpoint has float32\[3\]",
    ),
    "dtype": (
        {"mlp": {"kernel": jnp.zeros((2, 3), jnp.bfloat16), "bias": jnp.zeros(3)}, "step": 0},
        r"leaf 'mlp/kernel' is expected to be bfloat16\[2,3\], the checkpoint has float32\[2,3\]",
    ),
    "kind": (
        model() | {"step": 0.0},
        r"leaf 'step' is expected to be Python float, the checkpoint has Python int",
    ),
    "renamed": (
        {"mlp": {"kernle": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}, "step": 0},
        r"leaf 'mlp/kernle', .*; closest: 'mlp/kernel'",
    ),
}


@pytest.mark.parametrize("case", ANOTHER_MODEL)
def test_another_model_is_an_error_that_names_the_first_leaf(case, two_saved):
    like, message = ANOTHER_MODEL[case]
    with pytest.raises(ValueError, match=rf"{NEW} is of another model: {message}.*Restore with"):
        Checkpoints(two_saved).restore(like)


@pytest.mark.parametrize(
    "leaf", [1j, object(), np.array(["a"]), np.array([None]), np.longdouble(1)]
)
def test_a_leaf_that_cannot_be_saved_is_named_before_anything_is_written(leaf, checkpoints):
    with pytest.raises(TypeError, match="head/odd is a leaf of type .* Save a numeric array"):
        checkpoints.save(0, {"head": {"odd": leaf}})
    assert not checkpoints.directory.exists()


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="step -1 is negative"):
        Checkpoints(tmp_path).save(-1, model())


# Killed at any moment, the last completed save is there.


def flaws(checkpoints):
    paths = [checkpoints.directory / f"step_{step:08d}" for step in checkpoints.steps()]
    return {_files.flaw(path, int(path.name[5:])) for path in paths if path.exists()} or {None}


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def stop_at(call, monkeypatch):
    """Ends the process, so to speak, in the middle of one of its changes of the directory."""
    calls = itertools.count()

    def stopped(fn, halfway=lambda *_: None):
        def stopped_fn(*args):
            if next(calls) == call:
                halfway(*args)
                raise Killed
            return fn(*args)

        return stopped_fn

    monkeypatch.setattr(pathlib.Path, "rename", stopped(pathlib.Path.rename))
    monkeypatch.setattr(shutil, "rmtree", stopped(shutil.rmtree, lambda path: cut(files(path)[0])))
    monkeypatch.setattr(_files, "write", stopped(_files.write, lambda path, *_: path.mkdir()))
    return calls


@pytest.mark.parametrize("step", [1, 2])
def test_stopped_in_any_change_of_the_directory_one_can_restore(step, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    for call in itertools.count():
        shutil.rmtree(checkpoints.directory, ignore_errors=True)
        checkpoints.save(1, model(1))
        with monkeypatch.context() as patched:
            calls = stop_at(call, patched)
            try:
                checkpoints.save(step, model(7))
                break
            except Killed:
                pass
        saved, tree = checkpoints.restore(model())
        assert (saved, float(tree["mlp"]["bias"][0])) in {(1, 1.0), (step, 7.0)}
        assert flaws(checkpoints) == {None}
        checkpoints.save(3, model(3))  # and what was left over is no obstacle
        left = {path.name for path in checkpoints.directory.iterdir()}
        assert left == {"step_00000003", "lock"}
    assert next(calls) >= 4


@pytest.mark.whole
def test_killed_at_random_moments_never_loses_a_completed_save(tmp_path):
    log, moments, like = (
        tmp_path / "log",
        random.Random(0),
        {"w": np.zeros((64, 64), "f"), "step": 0},
    )
    log.touch()
    for _ in range(8):
        before = log.stat().st_size
        process = in_process(runs.save_for_ever, tmp_path / "run", log)
        wait_for(lambda before=before: log.stat().st_size > before)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.join()
        completed = int(log.read_text().split()[-1])
        step, tree = Checkpoints(tmp_path / "run").restore(like)
        assert step >= completed and tree["step"] == step
        assert (tree["w"] == step).all()


@pytest.mark.whole
def test_a_killed_run_ends_with_the_parameters_of_an_unbroken_one(tmp_path):
    unbroken, broken = tmp_path / "unbroken.npz", tmp_path / "broken.npz"
    process = in_process(runs.train, tmp_path / "unbroken", 24, unbroken)
    process.join()
    for target in (6, 15):
        process = in_process(runs.train, tmp_path / "broken", 24, broken)
        wait_for(
            lambda target=target: max(Checkpoints(tmp_path / "broken").steps(), default=0) >= target
        )
        process.kill()
        process.join()
        assert not broken.exists()
    process = in_process(runs.train, tmp_path / "broken", 24, broken)
    process.join()
    with np.load(unbroken) as expected, np.load(broken) as came:
        assert all(bits(came[name]) == bits(expected[name]) for name in ("w", "b"))
