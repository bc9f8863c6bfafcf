"""Laws of the export to compressed-tensors, read again by a few lines of NumPy."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

import unitscale_jax as us
from unitscale_jax import DotSpec, QSpec
from unitscale_jax.checkpoint import export_compressed_tensors
from unitscale_jax.checkpoint._compressed_tensors import pack_int32
from unitscale_jax.quant import Group, Percentile

DTYPES = {"I8": "i1", "I32": "i4", "I64": "i8", "F32": "f4", "F8_E4M3": jnp.float8_e4m3fn}
NORMAL = np.random.default_rng(0).normal(size=(4096,)).astype(np.float32)


def tensors(path):
    """The arrays of a safetensors file, by the format's own description."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    found = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            low, high = (start + k for k in entry["data_offsets"])
            flat = np.frombuffer(raw[low:high], DTYPES[entry["dtype"]])
            found[name] = flat.reshape(entry["shape"])
    return found


def dequantized(folder):
    """The weights (out, in) that a reader of the layout would compute with."""
    arrays = tensors(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    out = {}
    for group in config["config_groups"].values():
        bits = group["weights"]["num_bits"]
        for target in group["targets"]:
            scale = arrays[f"{target}.weight_scale"]
            if group.get("format", config["format"]) == "pack-quantized":
                words = arrays[f"{target}.weight_packed"].view(np.uint32)[:, :, None]
                fields = (words >> (np.arange(32 // bits, dtype=np.uint32) * bits)) & (2**bits - 1)
                rows, columns = arrays[f"{target}.weight_shape"]
                codes = fields.astype(np.int32).reshape(rows, -1)[:, :columns] - 2 ** (bits - 1)
            else:
                codes = arrays[f"{target}.weight"]
            repeats = codes.shape[1] // scale.shape[1]
            out[target] = codes.astype(np.float32) * np.repeat(scale, repeats, axis=1)
    return out


def exported(tmp_path, rules, params, **options):
    tree = us.quantize(params, rules)
    export_compressed_tensors(tmp_path, tree, **options)
    return us.quant.dequantize(tree), json.loads((tmp_path / "config.json").read_text())


def kernel(*shape):
    return jnp.asarray(NORMAL[: np.prod(shape)].reshape(shape))


X, E4M3 = QSpec(), QSpec(format="e4m3fn")
SPECS = {
    "w8a8": (DotSpec(x=X), "int-quantized", 8, "channel"),
    "w8a8 asymmetric": (DotSpec(x=QSpec(symmetric=False)), "int-quantized", 8, "channel"),
    "w4a8": (DotSpec(w=QSpec(format="int4"), x=X), "int-quantized", 4, "channel"),
    "w4a8 groups": (
        DotSpec(w=QSpec(format="int4", group=Group(4, "integer")), x=X),
        "int-quantized",
        4,
        "group",
    ),
    "int8": (DotSpec(), "pack-quantized", 8, "channel"),
    "int4": (DotSpec(w=QSpec(format="int4")), "pack-quantized", 4, "channel"),
    "int4 groups": (DotSpec(w=QSpec(format="int4", group=Group(4))), "pack-quantized", 4, "group"),
    "one group": (DotSpec(w=QSpec(format="int4", group=Group(12))), "pack-quantized", 4, "channel"),
    "int3": (DotSpec(w=QSpec(format="int3", scale="po2")), "pack-quantized", 4, "channel"),
    "int6": (DotSpec(w=QSpec(format="int6")), "pack-quantized", 8, "channel"),
    "fp8": (DotSpec(w=E4M3, x=E4M3), "float-quantized", 8, "channel"),
    "fp8 weights": (DotSpec(w=E4M3), "float-quantized", 8, "channel"),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_reader_of_the_layout_computes_with_the_same_weights(name, tmp_path):
    spec, form, bits, strategy = SPECS[name]
    params = {"mlp": {"kernel": kernel(12, 5)}}
    floats, config = exported(tmp_path, {"**": spec.with_axes((-2,))}, params)
    came = dequantized(tmp_path)
    # The integers of groups are multiplied into scales, which rounds once more.
    tolerance = 2e-7 if "groups" in name else 0
    np.testing.assert_allclose(came["mlp"], floats["mlp"]["kernel"].T, rtol=tolerance, atol=0)
    quantization = config["quantization_config"]
    weights = quantization["config_groups"]["group_0"]["weights"]
    assert (quantization["format"], weights["num_bits"], weights["strategy"]) == (
        form,
        bits,
        strategy,
    )


def test_the_config_says_what_readers_look_for(tmp_path):
    rules = {"a/kernel": SPECS["w8a8 asymmetric"][0].with_axes((-2,))}
    params = {"a": {"kernel": kernel(12, 5), "bias": jnp.ones(5)}, "head": {"kernel": kernel(5, 3)}}
    _, config = exported(tmp_path, rules, params, config={"model_type": "mine"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    x = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}
    group = {
        "weights": weights | {"group_size": None, "dynamic": False},
        "input_activations": x,
        "targets": ["a"],
    }
    assert config == {
        "model_type": "mine",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["head"],
        },
    }
    arrays = tensors(tmp_path / "model.safetensors")
    assert {name: (x.shape, x.dtype.name) for name, x in arrays.items()} == {
        "a.weight": ((5, 12), "int8"),
        "a.weight_scale": ((5, 1), "float32"),
        "a.bias": ((5,), "float32"),
        "head.weight": ((3, 5), "float32"),
    }
    np.testing.assert_array_equal(arrays["head.weight"], params["head"]["kernel"].T)


def test_several_formats_are_a_group_each(tmp_path):
    rules = {
        "a/kernel": SPECS["int4 groups"][0].with_axes((-2,)),
        "b/kernel": SPECS["w8a8"][0].with_axes((-2,)),
        "c/kernel": SPECS["int4 groups"][0].with_axes((-2,)),
    }
    params = {name: {"kernel": kernel(8, 3) * (1 + k)} for k, name in enumerate("abc")}
    floats, config = exported(tmp_path, rules, params)
    quantization = config["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    groups = quantization["config_groups"]
    assert {k: (g["format"], g["targets"]) for k, g in groups.items()} == {
        "group_0": ("pack-quantized", ["a", "c"]),
        "group_1": ("int-quantized", ["b"]),
    }
    assert groups["group_0"]["weights"]["group_size"] == 4
    for name, came in dequantized(tmp_path).items():
        np.testing.assert_allclose(came, floats[name]["kernel"].T, rtol=2e-7)


MATRICES = {  # shape, contracted axes, and the matrix (out, in) by hand
    "query": ((6, 2, 4), (-3,), lambda w: w.reshape(6, 8).T),
    "out": ((2, 4, 6), (-3, -2), lambda w: w.reshape(8, 6).T),
    "table": ((10, 4), (-1,), lambda w: w),
    "torch's own": ((2, 3, 4), (-1,), lambda w: w.reshape(6, 4)),
}


@pytest.mark.parametrize("group", [None, Group(2), Group(2, "integer")])
@pytest.mark.parametrize("case", MATRICES)
def test_the_two_sides_of_a_product_are_flattened(case, group, tmp_path):
    shape, axes, matrix = MATRICES[case]
    spec = DotSpec(w=QSpec(format="int4", group=group))
    floats, _ = exported(tmp_path, {"**": spec.with_axes(axes)}, {"w": {"kernel": kernel(*shape)}})
    expected = matrix(np.asarray(floats["w"]["kernel"]))
    np.testing.assert_allclose(dequantized(tmp_path)["w"], expected, rtol=2e-7)


@pytest.mark.parametrize("bits", [4, 8])
@given(data=st.data())
def test_packed_words_are_the_codes_by_integer_arithmetic(bits, data):
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 19)))
    limit = 2 ** (bits - 1)
    codes = data.draw(hnp.arrays(np.int8, shape, elements=st.integers(-limit, limit - 1)))
    each = 32 // bits
    for row, words in zip(codes.tolist(), pack_int32(codes, bits).tolist(), strict=True):
        parts = [row[k : k + each] for k in range(0, len(row), each)]
        expected = [sum((q + limit) << (bits * j) for j, q in enumerate(part)) for part in parts]
        assert [word % 2**32 for word in words] == expected


def test_the_caller_may_rename_and_what_is_in_the_config_stays(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 12}')
    rules = {"w": DotSpec(w=QSpec(axes=(-2,)))}
    _, config = exported(
        tmp_path, rules, {"w": kernel(12, 5)}, rename=lambda name: f"model.{name}.weight"
    )
    assert config["hidden_size"] == 12
    assert dequantized(tmp_path).keys() == {"model.w"}


REFUSED = {
    "stacked": (DotSpec(), (2, 4, 3), (-2,), "not one matrix.*one by one"),
    "convolution": (DotSpec(), (3, 3, 2, 4), (-4, -3, -2), "not one matrix"),
    "contracted whole": (DotSpec(), (4, 3), (-2, -1), "not one matrix"),
    "asymmetric": (DotSpec(w=QSpec(symmetric=False)), (4, 3), (-2,), "asymmetric"),
    "e5m2": (DotSpec(w=QSpec(format="e5m2")), (4, 3), (-2,), "it has e4m3fn"),
    "x e5m2": (DotSpec(w=E4M3, x=QSpec(format="e5m2")), (4, 3), (-2,), "it has e4m3fn"),
    "x po2": (DotSpec(x=QSpec(scale="po2")), (4, 3), (-2,), "free scales"),
    "x clipped": (DotSpec(x=QSpec(calibrator=Percentile(99))), (4, 3), (-2,), "free scales"),
    "x int6": (DotSpec(x=QSpec(format="int6")), (4, 3), (-2,), "4 or 8 bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_layout_has_no_place_for_is_named(case, tmp_path):
    spec, shape, axes, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"mlp/kernel .* does not fit .*{message}"):
        exported(
            tmp_path / "new", {"**": spec.with_axes(axes)}, {"mlp": {"kernel": kernel(*shape)}}
        )
    assert not (tmp_path / "new").exists()


def test_names_and_ranges_that_do_not_fit_are_named(tmp_path):
    rules = {"w": DotSpec(w=QSpec(axes=(-2,)), x=X)}
    tree = us.quantize({"w": kernel(4, 3)}, rules)
    with pytest.raises(ValueError, match="renamed to 'w', which does not end in '.weight'"):
        export_compressed_tensors(tmp_path, tree)
    ranged = {"w": replace(tree["w"], input_range=jnp.array([-1.0, 1.0]))}
    weight = lambda name: f"{name[0]}.weight"
    with pytest.raises(ValueError, match="drop input_range"):
        export_compressed_tensors(tmp_path, ranged, rename=weight)
    with pytest.raises(
        ValueError, match="w2 and another parameter are both renamed to 'w.weight'."
    ):
        export_compressed_tensors(tmp_path, tree | {"w2": tree["w"]}, rename=weight)
    with pytest.raises(ValueError, match="no parameter is quantized"):
        export_compressed_tensors(tmp_path, {"w": kernel(4, 3)})


def test_stacked_layers_are_exported_one_by_one(tmp_path):
    rules = {"kernel": DotSpec(w=QSpec(axes=(-2,)), x=X)}
    stacked = us.quantize({"kernel": kernel(2, 8, 3)}, rules)
    layers = {f"layer_{k}": jax.tree.map(lambda x, k=k: x[k], stacked) for k in range(2)}
    export_compressed_tensors(tmp_path, layers)
    for k in range(2):
        expected = us.quant.dequantize(stacked)["kernel"][k].T
        np.testing.assert_array_equal(dequantized(tmp_path)[f"layer_{k}"], expected)
