"""Laws of plans on disk: the same plan comes back, and what does not fit is an error."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import zoo
from unitscale_jax.compaction import (
    compact,
    groups,
    load_plan,
    plan,
    save_plan,
)


def made_for(name, seed=0):
    model = zoo.model(name)
    graph = groups(model.apply, model.params, *model.inputs)
    rng = np.random.default_rng(seed)
    scores = {group.name: rng.exponential(size=group.size) for group in graph.groups}
    return model.params, plan(graph, scores, keep=0.5, exact_only=False)


MODELS = ["plain_transformer", "plain_scan_remat", "linen_mobile", "nnx_gqa"]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_loaded_is_what_was_saved(name, tmp_path):
    params, saved = made_for(name)
    save_plan(tmp_path / "plan.json", saved)
    loaded = load_plan(tmp_path / "plan.json", params)
    assert loaded == saved and saved.kept
    assert loaded.members == saved.members and loaded.new_shapes == saved.new_shapes
    save_plan(tmp_path / "again.json", loaded)
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_a_loaded_plan_compacts_to_the_same_bits(tmp_path):
    params, saved = made_for("plain_unet")
    save_plan(tmp_path / "plan.json", saved)
    both = (compact(params, p) for p in (saved, load_plan(tmp_path / "plan.json")))
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_array_equal(a, b)


def test_saving_replaces_a_file_and_leaves_nothing_beside(tmp_path):
    _, first = made_for("plain_mlp")
    _, second = made_for("plain_mlp", seed=1)
    for each in (first, second):
        save_plan(str(tmp_path / "plan.json"), each)
    assert load_plan(tmp_path / "plan.json") == second != first
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


# --------------------------------------------------------------------------------- bad input


def altered(tmp_path, change):
    """A file of the plan of an MLP, changed."""
    params, saved = made_for("plain_mlp")
    path = tmp_path / "plan.json"
    save_plan(path, saved)
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    return path, params


def refused(path, match, params=None):
    with pytest.raises(ValueError, match=match):
        load_plan(path, params)


def test_another_format_is_refused(tmp_path):
    path, _ = altered(tmp_path, lambda found: found.update(format=2))
    refused(path, "plan.json has format 2, and this version reads format 1")


def test_what_is_no_plan_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("kept: all")
    refused(path, "is no plan: it is not JSON")
    path.write_bytes(b"\xff\xfe")
    refused(path, "is no plan: it is not JSON")
    path.write_text("[]")
    refused(path, "is no plan: it names no format")
    with pytest.raises(FileNotFoundError):
        load_plan(tmp_path / "none.json")


@pytest.mark.parametrize("field", ["kept", "sizes", "axes", "shapes", "flags"])
def test_a_missing_part_is_named(field, tmp_path):
    path, _ = altered(tmp_path, lambda found: found.pop(field))
    refused(path, f"'{field}' is missing")


GROUP = "inner/bias:0"
CHANGES = {
    "a size": (lambda f: f["sizes"].update({GROUP: 14}), "was altered: by its axes .*kernel|bias"),
    "a shape": (lambda f: f["shapes"].update({"inner/bias": [12]}), "inner/bias has shape"),
    "a channel too high": (lambda f: f["kept"][GROUP].append(13), "among 0 to 12"),
    "a channel twice": (lambda f: f["kept"][GROUP].insert(0, f["kept"][GROUP][0]), "different"),
    "half a channel": (lambda f: f["kept"].update({GROUP: [0.5]}), "0.5 is where a whole number"),
    "a truth": (lambda f: f["kept"].update({GROUP: [True]}), "True is where a whole number"),
    "no channels": (lambda f: f["kept"].update({GROUP: 3}), "was altered"),
    "another group": (lambda f: f["kept"].update({"outer/bias:0": [0]}), "no group is named"),
    "an axis": (lambda f: f["axes"].update({"inner/bias": [[["other:0"]]]}), "other:0, whose size"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_does_not_fit_is_refused(what, tmp_path):
    change, match = CHANGES[what]
    path, _ = altered(tmp_path, change)
    refused(path, match)


def test_a_plan_of_another_model_is_refused_by_the_leaf(tmp_path):
    path, params = altered(tmp_path, lambda found: None)
    load_plan(path, params)
    other = params | {"outer": params["outer"] | {"bias": jnp.zeros(7)}}
    refused(path, r"another model.*outer/bias has shape \(5,\), here \(7,\)", other)
    refused(
        path, r"another model.*more has shape None, here \(2,\)", params | {"more": jnp.ones(2)}
    )
    refused(path, r"another model.*inner/bias has shape \(13,\), here None", {})
