"""Laws of parameters in a safetensors file."""

import json
import os
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from safetensors import safe_open

import unitscale_jax as us
from unitscale_jax import DotSpec, QSpec
from unitscale_jax.checkpoint import load, save
from unitscale_jax.formats import Format, integers
from unitscale_jax.quant import EMA, MSE, Fixed, Group, Percentile, is_quantized

X = QSpec()
ASYMMETRIC = QSpec(symmetric=False)
SPECS = {
    **{f"int{bits}": DotSpec(w=QSpec(format=f"int{bits}")) for bits in range(2, 9)},
    "e4m3fn": DotSpec(w=QSpec(format="e4m3fn"), x=QSpec(format="e5m2")),
    "e5m2": DotSpec(w=QSpec(format="e5m2")),
    "po2": DotSpec(w=QSpec(scale="po2"), x=X, g=QSpec(rounding="stochastic")),
    "asymmetric": DotSpec(w=ASYMMETRIC, x=X),
    "asymmetric int3": DotSpec(w=QSpec(format="int3", symmetric=False)),
    "asymmetric x": DotSpec(x=ASYMMETRIC),
    "groups": DotSpec(w=QSpec(format="int4", group=Group(2)), x=ASYMMETRIC),
    "integer groups": DotSpec(w=QSpec(format="int4", group=Group(2, "integer")), x=ASYMMETRIC),
    "percentile": DotSpec(w=QSpec(calibrator=Percentile(99.9)), x=QSpec(calibrator=EMA(0.5))),
    "mse": DotSpec(w=QSpec(format="int4", calibrator=MSE(0.3, 9)), compute="dequant"),
    "fixed": DotSpec(w=QSpec(symmetric=False, calibrator=Fixed(-1.0, 0.1 + 0.2)), x=X),
    "a format": DotSpec(w=QSpec(format=integers(5)), x=X, compute="float_exact"),
    "a dtype": DotSpec(w=QSpec(format=np.int8)),
}
KERNEL = np.random.default_rng(0).normal(size=(2, 8, 5)).astype(np.float32)  # (layer, in, out)


def quantized(spec, dtype="float32", axes=(-2,), kernel=KERNEL):
    params = {"mlp": {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.arange(5, dtype=dtype)}}
    return us.quantize(params, {"mlp/kernel": spec.with_axes(axes)})


def calibrated(tree):
    ranges = jnp.array([[-1.0, 2.0], [0.0, 0.5]])
    change = lambda t: replace(t, input_range=ranges) if is_quantized(t) else t
    return jax.tree.map(change, tree, is_leaf=is_quantized)


def assert_identical(came, expected):
    assert jax.tree.structure(came) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(came), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def opened(path):
    """`(header, bytes of the arrays)`."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])


def written(path, header, arrays):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + arrays)


def poke(path, name, value, place=0):
    """Overwrites one element of a stored array."""
    header, arrays = opened(path)
    start = header[name]["data_offsets"][0] + place * np.asarray(value).itemsize
    new = np.asarray(value).tobytes()
    arrays[start : start + len(new)] = new
    written(path, header, arrays)


# What is saved is what is loaded.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [n for n in SPECS if n != "a dtype"])
def test_load_after_save_is_the_identity(name, dtype, file):
    tree = quantized(SPECS[name], dtype)
    save(file, tree)
    assert_identical(load(file), tree)
    assert load(file)["mlp"]["kernel"].spec == tree["mlp"]["kernel"].spec


def test_calibrated_ranges_are_kept(file):
    tree = calibrated(quantized(DotSpec(x=X)))
    save(file, tree)
    assert_identical(load(file), tree)


@given(
    codes=hnp.arrays(np.int8, (3, 5), elements=st.integers(-7, 7)),
    scale=hnp.arrays(np.float32, (1, 5), elements=st.floats(2.0**-120, 2.0**126, width=32)),
    bias=hnp.arrays(np.uint32, (4,)),
)
def test_saving_what_was_loaded_gives_the_same_bytes(codes, scale, bias, tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    spec, zero = DotSpec(w=QSpec(format="int4")), jnp.zeros((3, 5))
    like = us.quantize({"w": zero}, {"w": spec.with_axes((-2,))})["w"]
    new = replace(like, codes=jnp.asarray(codes).astype(jnp.int4), scale=jnp.asarray(scale))
    tree = {"w": new, "b": jnp.asarray(bias.view(np.float32))}
    save(file, tree)
    first = file.read_bytes()
    assert_identical(load(file), tree)
    save(file, load(file))
    assert file.read_bytes() == first


@pytest.mark.parametrize(
    "dtype",
    ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "bool"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32)],
)
def test_arrays_that_are_not_quantized_keep_every_bit(dtype, file):
    bits = np.random.default_rng(1).integers(0, 256, 256, np.uint8)
    array = bits % 2 == 1 if dtype == "bool" else bits.view(jnp.dtype(dtype))
    tree = {"a": jnp.asarray(array), "scalar": jnp.asarray(array)[3], "empty": jnp.zeros((0, 3))}
    save(file, tree)
    assert_identical(load(file), tree)


@pytest.mark.parametrize("tree", [jnp.arange(3.0), {}, {"a": {"b": np.float32(2)}}])
def test_trees_at_the_edge(tree, file):
    save(file, tree)
    assert_identical(load(file), jax.tree.map(jnp.asarray, tree))


def test_a_served_function_gives_the_same_bits(file):
    def fn(params, x):
        return x @ params["mlp"]["kernel"] + params["mlp"]["bias"]

    tree = quantized(SPECS["integer groups"], kernel=KERNEL[0])
    save(file, tree)
    serve = jax.jit(us.quantized(fn))
    x = jnp.asarray(KERNEL[1, :, :4].T)
    np.testing.assert_array_equal(serve(load(file), x), serve(tree, x))


# The schema.


def test_the_file_is_what_the_schema_says(file):
    codes = jnp.array([[-7, -1, 0, 1, 2, 4, 7, -3, 5]], jnp.int8).astype(jnp.int4)
    spec = DotSpec(w=QSpec(format="int4", group=Group(3, "integer")), x=ASYMMETRIC)
    tree = us.quantize({"head": {"w": jnp.ones((1, 9))}}, {"head/w": spec.with_axes((-1,))})
    tree["head"]["w"] = replace(tree["head"]["w"], codes=codes, input_range=jnp.array([-1.0, 2.0]))
    save(file, tree | {"b": jnp.zeros(2, jnp.bfloat16)})
    with safe_open(file, "np") as f:
        metadata = f.metadata()
        forms = {k: (f.get_slice(k).get_dtype(), f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118
        assert f.get_tensor("head/w.codes").tobytes().hex(" ") == "f9 10 42 d7 05"
    assert forms == {
        "b": ("BF16", [2]),
        "head/w.codes": ("U8", [1, 5]),
        "head/w.scale": ("F32", [1, 1]),
        "head/w.multiplier": ("I8", [1, 3]),
        "head/w.input_range": ("F32", [2]),
    }
    assert metadata.keys() == {"format", "version", "spec:head/w", "outline", "sha256"}
    assert (metadata["format"], metadata["version"]) == ("unitscale_jax", "1")
    absmax = {"type": "Absmax"}
    rest = {"type": "QSpec", "scale": "free", "calibrator": absmax, "rounding": "nearest"}
    group = {"type": "Group", "size": 3, "scale": "integer"}
    x = rest | {"format": "int8", "symmetric": False, "group": None, "axes": None}
    w = rest | {"format": "int4", "symmetric": True, "group": group, "axes": [-1]}
    dot = {"type": "DotSpec", "w": w, "x": x, "g": None, "compute": "int"}
    described = {"spec": dot, "axes": [-1], "dtype": "float32", "shape": [1, 9]}
    assert json.loads(metadata["spec:head/w"]) == described


@pytest.mark.parametrize(
    ("name", "field", "dtype"),
    [
        ("int8", "codes", "I8"),
        ("int2", "codes", "U8"),
        ("e4m3fn", "codes", "F8_E4M3"),
        ("e5m2", "codes", "F8_E5M2"),
        ("asymmetric", "zero_point", "I32"),
    ],
)
def test_each_field_has_its_dtype(name, field, dtype, file):
    save(file, quantized(SPECS[name]))
    assert opened(file)[0][f"mlp/kernel.{field}"]["dtype"] == dtype


def test_sums_of_codes_are_not_stored_but_computed(file):
    tree = quantized(SPECS["asymmetric x"])
    wrong = replace(
        tree["mlp"]["kernel"], code_sums=jnp.zeros_like(tree["mlp"]["kernel"].code_sums)
    )
    save(file, {"mlp": tree["mlp"] | {"kernel": wrong}})
    assert not any("code_sums" in name for name in opened(file)[0])
    assert_identical(load(file), tree)


# With `like`.


class Pair(NamedTuple):
    kernel: jax.Array
    layers: list


LIKE = {
    "arrays": lambda tree: tree,
    "shapes": lambda tree: jax.eval_shape(lambda: tree),
    "numpy": lambda tree: jax.tree.map(np.asarray, tree),
}


@pytest.mark.parametrize("kind", LIKE)
@pytest.mark.parametrize("side", ["float", "quantized"])
def test_structures_come_back_from_the_float_or_the_quantized_tree(side, kind, file):
    params = Pair(jnp.asarray(KERNEL), [jnp.ones(3), (jnp.arange(2), None)])
    tree = us.quantize(params, {"kernel": SPECS["groups"].with_axes((-2,))})
    save(file, tree)
    like = LIKE[kind](params if side == "float" else tree)
    assert_identical(load(file, like), tree)


def test_an_nnx_state_comes_back(file):
    params = nnx.state(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Param)
    tree = us.quantize(params, {"kernel": DotSpec(w=QSpec(axes=(-2,)), x=ASYMMETRIC)})
    save(file, tree)
    assert_identical(load(file, params), tree)
    assert_identical(load(file, tree), tree)
    assert set(load(file)) == {"kernel", "bias"}


def test_a_spec_said_in_other_words_is_the_same_spec(file):
    tree = quantized(SPECS["a dtype"])
    save(file, tree)
    assert_identical(load(file, tree), tree)
    assert load(file)["mlp"]["kernel"].spec.w.format == "int8"


@pytest.mark.parametrize("name", ["int4", "groups", "integer groups", "asymmetric"])
def test_arrays_come_back_sharded_and_scales_as_their_codes(name, file):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    on = lambda *spec: NamedSharding(mesh, P(*spec))
    kernel = np.concatenate([KERNEL, KERNEL[:, :, :3]], axis=2)  # (2, 8, 8)
    tree = calibrated(quantized(SPECS[name], kernel=kernel))
    save(file, tree)
    like = {
        "mlp": {
            "kernel": jax.ShapeDtypeStruct(
                (2, 8, 8), jnp.float32, sharding=on(None, "data", "model")
            ),
            "bias": jax.device_put(jnp.zeros(5), on()),
        }
    }
    came = load(file, like)
    assert_identical(came, tree)
    t = came["mlp"]["kernel"]
    assert t.codes.sharding == on(None, "data", "model")
    assert t.scale.sharding.is_equivalent_to(on(None, None, "model"), 3)
    assert t.input_range.sharding.is_fully_replicated
    again = load(file, came)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(came), strict=True):
        assert a.sharding == b.sharding


@pytest.mark.parametrize("name", ["int4", "groups", "asymmetric x", "integer groups", "e4m3fn"])
def test_abstract_is_the_tree_without_values(name, file):
    tree = calibrated(quantized(SPECS[name]))
    save(file, tree)
    shapes = jax.eval_shape(lambda: tree)
    for came in (load(file, abstract=True), load(file, tree, abstract=True)):
        assert jax.tree.structure(came) == jax.tree.structure(shapes)
        form = lambda x: (type(x), x.shape, x.dtype)
        assert [*map(form, jax.tree.leaves(came))] == [*map(form, jax.tree.leaves(shapes))]


def test_abstract_reads_the_header_alone(file):
    save(file, {"w": jnp.zeros(1)})
    header, _ = opened(file)
    header["w"] = {"dtype": "F32", "shape": [2**34], "data_offsets": [0, 2**36]}
    written(file, header, b"")
    os.truncate(file, file.stat().st_size + 2**36)  # 64 GiB of hole
    assert load(file, abstract=True)["w"].shape == (2**34,)


# What does not fit is refused.

ANOTHER = {
    "missing": (lambda p: p | {"gain": jnp.ones(1)}, r"leaf 'gain', float32\[1\], is missing"),
    "extra": (
        lambda p: {"mlp": {"bias": p["mlp"]["bias"]}},
        r"has a leaf 'mlp/kernel', .* as float",
    ),
    "shape": (
        lambda p: {"mlp": p["mlp"] | {"bias": jnp.zeros(4)}},
        r"leaf 'mlp/bias' is expected to be float32\[4\], and is float32\[5\]",
    ),
    "quantized shape": (
        lambda p: {"mlp": p["mlp"] | {"kernel": jnp.zeros((8, 5))}},
        r"leaf 'mlp/kernel' is expected to be float32\[8,5\], and is float32\[2,8,5\]",
    ),
    "dtype": (
        lambda p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), p),
        r"leaf 'mlp/bias' is expected to be bfloat16\[5\], and is float32\[5\]",
    ),
    "spec": (
        lambda p: quantized(DotSpec(x=X)),
        r"'mlp/kernel' is expected to be .* int8 x int8 .*, and is .* float x int8",
    ),
    "float": (
        lambda p: {
            "mlp": {"kernel": p["mlp"]["kernel"], "bias": quantized(DotSpec())["mlp"]["kernel"]}
        },
        r"leaf 'mlp/bias' is expected to be .* as float x int8",
    ),
    "number": (lambda p: {"mlp": p["mlp"] | {"bias": 0.5}}, "expected to be a Python float"),
    "renamed": (
        lambda p: {"mlp": {"kernle": p["mlp"]["kernel"], "bias": p["mlp"]["bias"]}},
        r"leaf 'mlp/kernle', .*; closest: 'mlp/kernel'",
    ),
}


@pytest.mark.parametrize("case", ANOTHER)
def test_another_model_is_an_error_that_names_the_first_leaf(case, file):
    change, message = ANOTHER[case]
    save(file, quantized(DotSpec()))
    like = change({"mlp": {"kernel": jnp.asarray(KERNEL), "bias": jnp.zeros(5)}})
    for abstract in (True, False):
        with pytest.raises(ValueError, match=f"is of another model: .*{message}"):
            load(file, like, abstract=abstract)


VALUES = {
    "a code -Q-1": ("int8", "codes", np.int8(-128), r"codes has values from -128 .* \[-127, 127\]"),
    "a code beyond 3 bits": ("int3", "codes", np.uint8(0x04), r"codes has values .* \[-3, 3\]"),
    "an int4 code -8": ("int4", "codes", np.uint8(0x08), r"codes has values from -8 .* \[-7, 7\]"),
    "padding": ("int4", "codes", np.uint8(0x11), "codes is padded by something else than 0"),
    "a NaN code": ("e4m3fn", "codes", np.uint8(0x7F), "codes has NaN or infinite"),
    "an infinite code": ("e5m2", "codes", np.uint8(0x7C), "codes has NaN or infinite"),
    "a zero scale": ("int8", "scale", np.float32(0), "scale has values that are not positive"),
    "a negative scale": ("groups", "scale", np.float32(-1), "scale has values that are not"),
    "a NaN scale": ("int8", "scale", np.float32(np.nan), "scale has NaN or infinite"),
    "a zero point": ("asymmetric", "zero_point", np.int32(128), r"zero_point .* \[-128, 127\]"),
    "a multiplier of 0": ("integer groups", "multiplier", np.int8(0), r"multiplier .* \[1, 18\]"),
    "a large multiplier": ("integer groups", "multiplier", np.int8(19), r"multiplier .* \[1, 18\]"),
    "an empty range": ("int8", "input_range", np.float32(9), "input_range has a lower end above"),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_out_of_range_are_refused_with_the_leaf(case, file):
    name, field, value, message = VALUES[case]
    save(file, calibrated(quantized(SPECS[name])))
    poke(file, f"mlp/kernel.{field}", value, place=2 if case == "padding" else 0)
    with pytest.raises(ValueError, match=f"mlp/kernel.{message}"):
        load(file)


def reshaped(header, name, shape, dtype=None):
    header[name] |= {"shape": shape} | ({} if dtype is None else {"dtype": dtype})


def respelled(header, old, new):
    text = header["__metadata__"]["spec:mlp/kernel"]
    assert old in text
    header["__metadata__"]["spec:mlp/kernel"] = text.replace(old, new)


HEADERS = {
    "scale": (
        lambda h: reshaped(h, "mlp/kernel.scale", [2, 5, 1]),
        r"scale is float32\[2,5,1\], and",
    ),
    "dtype": (
        lambda h: reshaped(h, "mlp/kernel.scale", [2, 1, 5], "I32"),
        r"scale is int32\[2,1,5\]",
    ),
    "codes": (lambda h: reshaped(h, "mlp/kernel.codes", [2, 4, 6]), r"codes is uint8\[2,4,6\]"),
    "a field": (lambda h: respelled(h, '"rounding"', '"sounding"'), "a field 'sounding' of QSpec"),
    "a kind": (lambda h: respelled(h, "Absmax", "Abstax"), "'Abstax' is unknown to it"),
    "a value": (lambda h: respelled(h, '"free"', '"three"'), "scale is 'free' or 'po2'"),
    "an axis": (lambda h: respelled(h, '"axes":[-2],"d', '"axes":[-9],"d'), r"no axes \(-9,\)"),
    "no axis": (lambda h: respelled(h, '"axes":[-2],"d', '"axes":[],"d'), r"no axes \(\)"),
    "json": (lambda h: respelled(h, "{", "["), "spec that this version cannot read"),
    "logical dtype": (
        lambda h: respelled(h, "float32", "int32"),
        "cannot read: expected a DotSpec",
    ),
    "shape": (lambda h: respelled(h, "[2,8,5]", "[2,8,6]"), r"codes is uint8\[2,8,3\]|scale is"),
    "group": (lambda h: respelled(h, '"size":4', '"size":3'), "groups of 3 do not divide"),
    "lost": (lambda h: h["__metadata__"].pop("spec:mlp/kernel"), None),
    "a field of the future": (
        lambda h: respelled(h, '"axes":[-2],"d', '"new":1,"axes":[-2],"d'),
        "expected a DotSpec",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_arrays_that_do_not_fit_their_spec_are_refused_from_the_header(case, file):
    change, message = HEADERS[case]
    tree = quantized(DotSpec(w=QSpec(format="int4", group=Group(4) if case == "group" else None)))
    save(file, tree)
    header, arrays = opened(file)
    change(header)
    written(file, header, arrays)
    message = "is missing from it" if message is None else f"mlp/kernel.*{message}"
    with pytest.raises(ValueError, match=message):
        load(file, tree, abstract=True)


def test_a_missing_or_an_additional_array_is_refused(file):
    save(file, quantized(SPECS["asymmetric"]))
    header, arrays = opened(file)
    header["mlp/kernel.zero_paint"] = header.pop("mlp/kernel.zero_point")
    written(file, header, arrays)
    with pytest.raises(ValueError, match=r"kernel.zero_point is missing, and int32\[2,1,5\] for"):
        load(file)
    save(
        file, quantized(SPECS["int8"]) | {"mlp/kernel.zero_paint": jnp.zeros((2, 1, 5), jnp.int32)}
    )
    header, arrays = opened(file)
    header["mlp/kernel.zero_point"] = header.pop("mlp/kernel.zero_paint")
    written(file, header, arrays)
    with pytest.raises(ValueError, match=r"kernel.zero_point is int32\[2,1,5\], and missing for"):
        load(file)


def test_another_version_is_refused(file):
    save(file, quantized(DotSpec()))
    header, arrays = opened(file)
    header["__metadata__"]["version"] = "2"
    written(file, header, arrays)
    with pytest.raises(
        ValueError, match="has version '2', and this library reads version '1'.*newer"
    ):
        load(file)


def test_a_foreign_file_is_refused(file):
    save(file, {"w": jnp.ones(3)})
    header, arrays = opened(file)
    header["__metadata__"] = {"format": "pt"}
    written(file, header, arrays)
    with pytest.raises(ValueError, match="not written by `save`: its format is 'pt'"):
        load(file)
    for text in (b"", b"hello", b"\x80\x04\x95 a pickle, perhaps, of any length at all"):
        file.write_bytes(text)
        with pytest.raises(ValueError, match="is no whole safetensors file"):
            load(file)
    with pytest.raises(FileNotFoundError):
        load(file.with_name("nothing"))


def test_a_file_that_was_cut_anywhere_is_refused(file):
    save(file, quantized(SPECS["int4"]))
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is no whole safetensors file"):
            load(file, abstract=True)


def test_a_damaged_header_ends_in_a_value_error_or_does_no_harm(file):
    save(file, quantized(SPECS["int4"]))
    whole = bytearray(file.read_bytes())
    end, refused = 8 + int.from_bytes(whole[:8], "little"), 0
    for place in range(end):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            load(file, abstract=True)
        except ValueError:
            refused += 1
    assert refused > end / 2


# What cannot be saved is refused, and what was there stays.


@dataclass(frozen=True)
class Mine(us.quant.Calibrator):
    def bound(self, x, axes, error):
        return jnp.max(jnp.abs(x), axis=axes, keepdims=True)


def broken(**change):
    tree = quantized(DotSpec())
    kernel = tree["mlp"]["kernel"]
    return {"kernel": replace(kernel, **{name: fn(kernel) for name, fn in change.items()})}


REFUSED = {
    "number": (TypeError, lambda: {"head": {"lr": 0.5}}, "head/lr is float, and a file holds"),
    "key": (TypeError, lambda: {"key": jax.random.key(0)}, r"key is key<.*Checkpoints"),
    "int4": (TypeError, lambda: {"w": jnp.ones(2, jnp.int4)}, "w is int4, .* Cast it"),
    "shape": (TypeError, lambda: {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}, "w is float32"),
    "name": (
        ValueError,
        lambda: quantized(DotSpec()) | {"mlp/kernel.scale": jnp.ones(1)},
        "two arrays would be named 'mlp/kernel.scale'",
    ),
    "header": (ValueError, lambda: {"__metadata__": jnp.ones(1)}, "a file's own name"),
    "calibrator": (
        TypeError,
        lambda: quantized(DotSpec(w=QSpec(calibrator=Mine()))),
        r"mlp/kernel: Mine\(\) cannot be stored",
    ),
    "form": (
        ValueError,
        lambda: broken(scale=lambda t: t.scale[:1]),
        r"kernel.scale is float32\[1,1,5\]",
    ),
    "codes": (
        ValueError,
        lambda: broken(codes=lambda t: t.codes.astype(jnp.int4)),
        "codes is int4",
    ),
    "values": (ValueError, lambda: broken(scale=lambda t: 0 * t.scale), "kernel.scale has values"),
    "master": (ValueError, lambda: broken(master=lambda t: t.scale), "inside of a trace"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_saved_is_refused_and_the_file_before_it_stays(case, file):
    error, tree, message = REFUSED[case]
    save(file, {"before": jnp.ones(3)})
    with pytest.raises(error, match=message):
        save(file, tree())
    assert_identical(load(file), {"before": jnp.ones(3)})
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_killed_in_the_middle_the_file_before_it_stays(file, monkeypatch):
    save(file, {"w": jnp.ones(3)})

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        save(file, {"w": jnp.zeros(3)})
    assert_identical(load(file), {"w": jnp.ones(3)})


def test_float64_is_not_narrowed_in_silence(file):
    save(file, {"w": np.ones(2)})
    with pytest.raises(ValueError, match="w is float64, of which JAX makes float32 here"):
        load(file)
    with jax.enable_x64(True):
        assert load(file)["w"].dtype == np.float64


def test_leaves_inside_of_leaves_need_like(file):
    tree = {"a": jnp.ones(1), "a/b": jnp.zeros(1)}
    save(file, tree)
    with pytest.raises(ValueError, match="a/b is a leaf inside of a leaf.*Load with `like`"):
        load(file)
    assert_identical(load(file, tree), tree)


def test_a_format_of_ones_own_is_kept(file):
    mine = Format(exponent_bits=0, mantissa_bits=5, bias=-4, max=21.0)
    tree = quantized(DotSpec(w=QSpec(format=mine)))
    save(file, tree)
    assert_identical(load(file), tree)
