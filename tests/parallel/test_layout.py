"""Laws of layouts: rules say where parameters are, and all that goes with them goes there too."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec as P

import unitscale_jax as us
from unitscale_jax.parallel import layout, merge_specs, shard, zero_spec

MESHES = [{"dp": 8}, {"tp": 8}, {"dp": 2, "tp": 4}, {"pp": 2, "dp": 2, "tp": 2}, {"tp": 1}]
ABSTRACT = AbstractMesh((2, 4), ("dp", "tp"))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "up": {"kernel": normal(8, 16), "bias": normal(16, seed=1)},
    "down": {"kernel": normal(16, 8, seed=2), "bias": normal(8, seed=3)},
    "layers": normal(2, 8, 16, seed=4),
    "gain": normal(),
}
RULES = {
    "up/*": "column",
    "down/*": "row",
    "layers": P("pp", None, "tp"),
    "gain": "whole",
}


def abstract(**axes):
    return AbstractMesh(tuple(axes.values()), tuple(axes))


def on_devices(tree):
    """Shapes on one device, by name."""
    leaves = us.tree.named_leaves(tree)
    return {name: x.addressable_shards[0].data.shape for name, x in leaves.items()}


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


# ------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("choice", "shape", "spec"),
    [
        ("column", (8, 16), P(None, "tp")),
        ("column", (2, 8, 16), P(None, None, "tp")),
        ("column", (16,), P("tp")),
        ("row", (8, 16), P("tp")),
        ("row", (2, 8, 16), P(None, "tp")),
        ("row", (16,), P()),
        ("column", (), P()),
        ("row", (), P()),
        ("whole", (8, 16), P()),
        (P("tp", None), (8, 16), P("tp")),
        (P(("dp", "tp"), None), (8, 16), P(("dp", "tp"))),
        ({-1: "tp"}, (2, 8, 16), P(None, None, "tp")),
        ({-2: "tp", 0: "dp"}, (2, 8, 16), P("dp", "tp")),
        ({0: ("dp", "tp")}, (16,), P(("dp", "tp"))),
    ],
)
def test_a_rule_says_which_dimension_an_axis_holds(choice, shape, spec):
    assert layout({"w": jnp.ones(shape)}, {"w": choice}, ABSTRACT).by_name == {"w": spec}


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_one_set_of_rules_serves_every_mesh(axes):
    found = layout(PARAMS, RULES, abstract(**axes), missing="whole")
    full = {"up/kernel": P(None, "tp"), "up/bias": P("tp"), "down/kernel": P("tp")}
    full |= {"down/bias": P(), "layers": P("pp", None, "tp"), "gain": P()}
    for name, spec in full.items():
        entries = [axis if axis in axes else None for axis in spec]
        assert NamedSharding(found.mesh, found.by_name[name]).is_equivalent_to(
            NamedSharding(found.mesh, P(*entries)), len(spec)
        )
    assert ("no axis pp" in found.reasons["layers"]) == ("pp" not in axes)


def test_what_no_rule_matches_is_whole_and_the_first_rule_wins():
    found = layout(PARAMS, [("up/kernel", "whole"), ("up/*", "column")], ABSTRACT)
    assert found.by_name["up/kernel"] == P() and found.by_name["up/bias"] == P("tp")
    assert found.by_name["layers"] == P() and found.reasons["layers"] == "no rule"


@pytest.mark.parametrize(
    ("shape", "choice", "words"),
    [
        ((8, 30), "column", "w: dimension 1 of 30 is not divisible by tp=4. Pad it to 32, .*whole"),
        ((8, 16), {0: ("dp", "tp"), 1: "dp"}, "axis 'dp' twice"),
        ((12, 4), {0: ("dp", "tp")}, "dimension 0 of 12 is not divisible by dp=2, tp=4. .* to 16"),
        ((8,), P(None, "tp"), r"w has 1 dimensions, \(8,\), and its spec .* has 2"),
        ((8, 8), P("tp", "tp"), "axis 'tp' twice"),
    ],
)
def test_errors_name_the_parameter_the_dimension_the_axis_and_the_way_out(shape, choice, words):
    with pytest.raises(ValueError, match=words):
        layout({"w": jnp.ones(shape)}, {"w": choice}, ABSTRACT)


@pytest.mark.parametrize("choice", ["columns", None, 1, {2: "tp"}, {-3: "tp"}])
def test_other_choices_are_errors(choice):
    with pytest.raises(TypeError, match=r"w, of shape \(8, 8\), is to go to .* 'column', 'row'"):
        layout({"w": jnp.ones((8, 8))}, {"w": choice}, ABSTRACT)


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="'up/kernle', matched none of 6 parameters"):
        layout(PARAMS, {"up/kernle": "column"}, ABSTRACT)


def test_the_table_has_bytes_on_a_device_and_reasons():
    found = layout(PARAMS, RULES, ABSTRACT, missing="whole")
    line = next(line for line in str(found).splitlines() if line.startswith("up/kernel"))
    assert re.split(" {2,}", line) == [
        "up/kernel",
        "(8, 16)",
        "P(None, 'tp')",
        "128",
        "rule 'up/*'",
    ]
    assert found.nbytes == (8 * 4 + 4 + 4 * 8 + 8 + 2 * 8 * 4 + 1) * 4
    assert str(found).splitlines()[-1].split()[:2] == ["all", str(found.nbytes)]


# ------------------------------------------------------------------------------------- specs

dims = st.lists(st.sampled_from([None, "a", "b", "c"]), max_size=4)


@given(dims, st.integers(0, 15))
def test_parts_of_a_spec_merge_to_the_whole_in_any_order(axes, chosen):
    axes = [a if a not in axes[:k] else None for k, a in enumerate(axes)]
    pick = lambda bit: P(*[a if (chosen >> k) % 2 == bit else None for k, a in enumerate(axes)])
    whole = merge_specs(P(*axes), P())
    assert merge_specs(pick(0), pick(1)) == merge_specs(pick(1), pick(0)) == whole
    assert len(whole) == 0 or whole[-1] is not None


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (P("dp"), P("tp"), "both hold dimension 0.*zero_spec"),
        (P(None, "tp"), P("tp"), "both have the mesh axis 'tp'"),
    ],
)
def test_specs_that_want_the_same_do_not_merge(a, b, words):
    with pytest.raises(ValueError, match=words):
        merge_specs(a, b)


@given(st.lists(st.integers(0, 9), max_size=4), st.integers(2, 4), st.integers(0, 15))
def test_zero_takes_the_first_free_dimension_that_divides(shape, n, mask):
    taken = P(*["tp" if k == mask % 4 else None for k in range(len(shape))])
    spec = zero_spec(shape, "dp", n, taken)
    free = [k for k, size in enumerate(shape) if taken[k] is None and size and size % n == 0]
    assert spec == (P(*[None] * free[0], "dp") if free else P())
    merge_specs(spec, taken)


def test_bytes_of_adam_by_zero():
    """The worked example: 660, 372 and 228 bytes for nothing, moments, and all divided by 4."""
    params = {"a": jnp.ones((8, 6)), "b": jnp.ones(6), "c": jnp.ones(())}
    whole = layout(params, {}, abstract(dp=4))
    parts = whole.over("dp")
    assert parts.by_name == {"a": P("dp"), "b": P(), "c": P()}
    assert [3 * whole.nbytes, whole.nbytes + 2 * parts.nbytes, 3 * parts.nbytes] == [660, 372, 228]


def test_dividing_over_an_axis_again_or_over_none_changes_nothing():
    found = layout(PARAMS, RULES, ABSTRACT, missing="whole")
    once = found.over("dp")
    assert once.over("dp") == once != found
    assert found.over("pp") == found


# ------------------------------------------------------------ what goes with the parameters


OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "adamw": lambda: optax.adamw(0.1),
    "chained": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
    "masked": lambda: optax.masked(
        optax.adam(0.1), lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    ),
    "several steps": lambda: optax.MultiSteps(optax.adam(0.1), 2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_go_with_their_parameters_and_everything_else_is_whole(name):
    found = layout(PARAMS, RULES, ABSTRACT, missing="whole")
    state = jax.eval_shape(OPTIMIZERS[name]().init, PARAMS)
    specs = found.specs_of(state)
    assert jax.tree.structure(specs) == jax.tree.structure(state)
    for path, spec in us.tree.named_leaves(specs).items():
        owner = next((n for n in found.by_name if path.endswith(f"/{n}")), None)
        assert spec == (P() if owner is None else found.by_name[owner]), path


def test_factored_moments_keep_what_is_left_of_the_spec():
    params = {"w": jnp.ones((8, 16)), "square": jnp.ones((8, 8))}
    found = layout(params, {"*": P("dp", "tp")}, ABSTRACT)
    state = optax.adafactor(0.1, min_dim_size_to_factor=4).init(params)
    specs = us.tree.named_leaves(found.specs_of(state))
    of = {
        x.shape: specs[name] for name, x in us.tree.named_leaves(state).items() if name[-1] == "w"
    }
    assert of == {(8,): P("dp"), (16,): P("tp"), (1,): P()}
    square = {spec for name, spec in specs.items() if name.endswith("/square")}
    assert square == {P()}  # either of its dimensions may be the one that is left


QUANTIZED = {
    "channels": us.DotSpec(w=us.QSpec(axes=(-2,))),
    "rows": us.DotSpec(w=us.QSpec(axes=(-1,))),
    "asymmetric": us.DotSpec(w=us.QSpec(axes=(-2,), symmetric=False)),
    "groups": us.DotSpec(w=us.QSpec(axes=(-2,), group=us.quant.Group(2))),
}


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("choice", ["column", "row"])
def test_codes_lie_as_the_array_and_scales_where_it_has_several(kind, choice):
    """P7: sharding and quantizing commute, to the bit, and so do the places."""
    params, mesh = {"w": PARAMS["up"]["kernel"]}, us.parallel.mesh(dp=2, tp=4)
    found, rules = layout(params, {"w": choice}, mesh), {"w": QUANTIZED[kind]}
    after, before = (
        shard(us.quantize(params, rules), found),
        us.quantize(shard(params, found), rules),
    )
    assert_same_bits(after, before)
    spec, whole = found.by_name["w"], (8, 16)
    for name, array in us.tree.named_leaves(after).items():
        entries = zip([*spec, None][:2], array.shape, whole, strict=True)
        kept = P(*[a if size == full or size % 4 == 0 else None for a, size, full in entries])
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, kept), 2), name


def test_masks_lie_with_their_parameters():
    params = {"w": normal(8, 64), "b": normal(64)}
    mesh = us.parallel.mesh(dp=2, tp=4)
    found = layout(params, {"w": P("dp", "tp"), "b": "column"}, mesh)
    spec = us.prune.SparsitySpec(patterns={"w": us.prune.Unstructured()}, sparsity=0.5)
    masks = us.prune.make_masks(jax.tree.map(jnp.abs, params), spec)
    assert found.specs_of(masks) == {"w": P("dp", "tp"), "b": P()}  # b's mask is a scalar
    sharded = shard(params, found)
    assert_same_bits(us.prune.make_masks(jax.tree.map(jnp.abs, sharded), spec), masks)
    assert_same_bits(
        us.prune.apply_masks(sharded, shard(masks, found)), us.prune.apply_masks(params, masks)
    )


# -------------------------------------------------------------------------------- on devices


def test_every_device_holds_its_part_and_no_more():
    mesh = us.parallel.mesh(dp=2, tp=4)
    found = layout(PARAMS, RULES, mesh, missing="whole").over("dp")
    sharded = shard(PARAMS, found)
    assert_same_bits(sharded, PARAMS)
    assert on_devices(sharded)["up/kernel"] == (4, 4) and on_devices(sharded)["gain"] == ()
    held = [x.addressable_shards[5].data for x in jax.tree.leaves(sharded)]
    assert us.tree.nbytes(held) == found.nbytes


def test_keys_steps_and_numbers_of_python_are_put_too():
    mesh = us.parallel.mesh(dp=2, tp=4)
    found = layout(PARAMS, RULES, mesh, missing="whole")
    tree = {"key": jax.random.key(1), "step": np.int32(3), "rate": 0.5, "none": None}
    put = shard(tree, found)
    assert put["none"] is None and put["step"] == 3 and put["rate"] == 0.5
    assert (jax.random.key_data(put["key"]) == jax.random.key_data(tree["key"])).all()
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(put))


@pytest.mark.usefixtures("relaxed_promotion")
def test_parameters_and_state_lie_as_laid_out_after_every_update():
    """P12; and a step is compiled once, for its results lie as its arguments."""
    mesh, optimizer = us.parallel.mesh(dp=2, tp=4), optax.adamw(0.1)
    found = layout(PARAMS, RULES, mesh, missing="whole").over("dp")
    places = found.shardings(), found.shardings(jax.eval_shape(optimizer.init, PARAMS))

    def step(params, state):
        grads = jax.grad(lambda p: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(p)))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    run = jax.jit(step, out_shardings=places)
    carry = shard(PARAMS, found), shard(optimizer.init(PARAMS), found)
    expected = PARAMS, optimizer.init(PARAMS)
    for _ in range(3):
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), carry, places)
        assert all(jax.tree.leaves(same))
        carry, expected = run(*carry), step(*expected)
    assert run._cache_size() == 1
    for x, y in zip(jax.tree.leaves(carry), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_inside_of_jit_it_is_a_constraint():
    mesh = us.parallel.mesh(dp=2, tp=4)
    found = layout(PARAMS, RULES, mesh, missing="whole")
    made = jax.jit(lambda: shard(jax.tree.map(jnp.zeros_like, PARAMS), found))()
    assert on_devices(made) == on_devices(shard(PARAMS, found))


def test_a_learned_parameter_is_trained_where_its_array_is():
    params = {"w": PARAMS["up"]["kernel"]}
    found = layout(params, {"w": "column"}, ABSTRACT)
    tree = us.quant.learned(params, {"w": QUANTIZED["rows"]})
    specs = us.tree.named_leaves(found.specs_of(optax.adam(0.1).init(tree)))
    assert specs["0/mu/w/master"] == specs["0/nu/w/master"] == P(None, "tp")
    assert specs["0/mu/w/scale"] == specs["0/count"] == P()  # (8, 1)
