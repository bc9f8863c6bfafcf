"""Laws of dimensions: groups are what can be removed, however a function is written."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import unitscale_jax as us
from tests.support import zoo
from unitscale_jax.trace.dimensions._axis_rules import RULES
from unitscale_jax.trace.dimensions._dims import dims
from unitscale_jax.trace.dimensions._factors import size
from unitscale_jax.trace.program import trace
from unitscale_jax.trace.program._walk import sites

f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)


def found_in(fn, params, *inputs):
    return dims(trace(fn, params, *inputs))


def sizes(found, *, flags=()):
    return sorted(g.size for g in found.groups if g.flags.issuperset(flags))


def shapes_of(found):
    """What does not depend on the order of the parameters: members and flags of each group."""
    return {(frozenset(g.members), g.size, g.flags) for g in found.groups}


# ------------------------------------------------------------------------- groups, by brute force


def rms(x, scale):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def scanned(p, x):
    """A recurrent layer; its state has the width of the kernel that it is multiplied by."""

    def step(h, now):
        h = jnp.tanh(now @ p["a"] + h @ p["b"])
        return h, h

    start = jnp.zeros((*x.shape[1:-1], p["b"].shape[0]))
    return jax.lax.scan(step, start, x)[1] @ p["c"]


def stacked(p, x):
    body = lambda h, row: (h + jax.nn.relu(h @ row["a"]) @ row["b"], None)
    return jax.lax.scan(jax.checkpoint(body), x, p)[0]


def attention(p, x):  # (batch, time, width)
    q, k, v = (x @ p[name] for name in "qkv")
    return jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v @ p["o"]


def branched(p, x):
    h = x @ p["a"]
    return jax.lax.cond(x.sum() > 0, lambda h: h * p["s"], lambda h: h + p["t"], h) @ p["b"]


def counted(p, x):
    return jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["a"]), x @ p["in"]) @ p["out"]


# Every dimension has 4 channels, so that only what is done with it can tell it from another.
SMALL = {
    "mlp": (
        lambda p, x: jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"] + p["d"],
        {"a": f32(4, 4), "b": f32(4), "c": f32(4, 4), "d": f32(4)},
        f32(4, 4),
    ),
    "deep": (
        lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"],
        {"a": f32(4, 4), "b": f32(4, 4), "c": f32(4, 4)},
        f32(4, 4),
    ),
    "residual": (
        lambda p, x: (lambda h: h + rms(h, p["s"]) @ p["a"])(x @ p["in"]) @ p["out"],
        {"in": f32(4, 4), "s": f32(4), "a": f32(4, 4), "out": f32(4, 4)},
        f32(4, 4),
    ),
    "gated": (
        lambda p, x: (jax.nn.silu(x @ p["g"]) * (x @ p["u"])) @ p["d"],
        {"g": f32(4, 4), "u": f32(4, 4), "d": f32(4, 4)},
        f32(4, 4),
    ),
    "concatenated": (
        lambda p, x: jnp.concatenate([x @ p["a"], jnp.cos(x @ p["b"])], -1) @ p["c"],
        {"a": f32(4, 4), "b": f32(4, 4), "c": f32(8, 4)},
        f32(4, 4),
    ),
    "tied": (
        lambda p, ids: jnp.tanh(p["e"][ids] @ p["a"]) @ p["b"] @ p["e"].T,
        {"e": f32(4, 4), "a": f32(4, 4), "b": f32(4, 4)},
        jax.ShapeDtypeStruct((4,), jnp.int32),
    ),
    "squared": (lambda p, x: x @ (p["a"] @ p["a"].T), {"a": f32(4, 4)}, f32(4, 4)),
    "multiplied by itself": (
        lambda p, x: x @ p["in"] @ p["a"] @ p["a"] @ p["out"],
        {"in": f32(4, 4), "a": f32(4, 4), "out": f32(4, 4)},
        f32(4, 4),
    ),
    "attention": (
        attention,
        {"q": f32(4, 4), "k": f32(4, 4), "v": f32(4, 4), "o": f32(4, 4)},
        f32(4, 4, 4),
    ),
    "experts": (
        lambda p, x: jnp.einsum("bef,efd,be->bd", jnp.einsum("bd,edf->bef", x, p["a"]), p["b"],
                                jax.nn.softmax(x @ p["r"])),
        {"a": f32(4, 4, 4), "b": f32(4, 4, 4), "r": f32(4, 4)},
        f32(4, 4),
    ),
    "recurrent": (scanned, {"a": f32(4, 4), "b": f32(4, 4), "c": f32(4, 4)}, f32(4, 4, 4)),
    "stacked": (
        stacked,
        {"a": f32(4, 4, 4), "b": f32(4, 4, 4)},
        f32(4, 4),
    ),
    "branched": (
        branched,
        {"a": f32(4, 4), "b": f32(4, 4), "s": f32(4), "t": f32(4)},
        f32(4, 4),
    ),
    "looped": (counted, {"in": f32(4, 4), "a": f32(4, 4), "out": f32(4, 4)}, f32(4, 4)),
    "convolved": (
        lambda p, x: conv(jax.nn.relu(conv(x, p["a"])), p["b"]),
        {"a": f32(1, 1, 4, 4), "b": f32(1, 1, 4, 4)},
        f32(4, 4, 4, 4),
    ),
}  # fmt: skip


def conv(x, kernel, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def is_defined(fn, params, x, removed):
    """Whether the function of the remaining channels has results of the same shapes."""
    smaller = lambda path, leaf: f32(
        *(n - ((path, k) in removed) for k, n in enumerate(leaf.shape))
    )
    shapes = lambda out: [leaf.shape for leaf in jax.tree.leaves(out)]
    try:
        small = jax.eval_shape(fn, us.tree.map_named(smaller, params), x)
    except (TypeError, ValueError):
        return False
    return shapes(small) == shapes(jax.eval_shape(fn, params, x))


@pytest.mark.parametrize("name", SMALL)
def test_groups_are_the_smallest_sets_of_axes_that_can_lose_a_channel(name):
    """Both ways, over all sets of axes: no group is too large, too small or missing."""
    fn, params, x = SMALL[name]
    leaves = us.tree.named_leaves(params)
    axes = [(path, k) for path, leaf in leaves.items() for k, n in enumerate(leaf.shape) if n > 1]
    smallest = []
    for count in range(1, len(axes) + 1):
        for removed in itertools.combinations(axes, count):
            if not any(s <= {*removed} for s in smallest) and is_defined(fn, params, x, removed):
                smallest.append({*removed})
    groups = [{(m.path, m.axis) for m in g.members} for g in found_in(fn, params, x).groups]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, smallest))


# ------------------------------------------------------------------------------- language models

WIDTH, HEADS, KV, DIM, FFN, VOCAB = 12, 4, 2, 6, 20, 11


def rotated(x):
    """By position, in pairs half a head apart; (batch, time, heads, dim)."""
    count = lambda n: jnp.arange(n, dtype=jnp.float32)
    angle = count(x.shape[1])[:, None, None] * 0.1 ** count(x.shape[-1] // 2)
    a, b = jnp.split(x, 2, -1)
    sin, cos = jnp.sin(angle).astype(x.dtype), jnp.cos(angle).astype(x.dtype)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def block(p, x):
    h = rms(x, p["n1"])
    if "qkv" in p:
        q, k, v = jnp.split(h @ p["qkv"], [HEADS * DIM, (HEADS + KV) * DIM], -1)
    else:
        q, k, v = (h @ p[name] for name in "qkv")
    split = lambda y, heads: y.reshape(*y.shape[:2], heads, DIM)
    q, k, v = rotated(split(q, HEADS)), rotated(split(k, KV)), split(v, KV)
    k, v = (jnp.repeat(y, HEADS // KV, 2) for y in (k, v))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], -1)
    x = x + mixed @ p["o"]
    h = rms(x, p["n2"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def language_model(layers=2, fused=False, stacked=False, wrap=lambda f: f):
    run = wrap(block)

    def apply(p, ids):
        x = p["embed"][ids]
        if stacked:
            x, _ = jax.lax.scan(lambda x, row: (run(row, x), None), x, p["layers"])
        else:
            for row in p["layers"]:
                x = run(row, x)
        return rms(x, p["n"]) @ p["embed"].T

    shapes = {"n1": (WIDTH,), "n2": (WIDTH,), "o": (HEADS * DIM, WIDTH)}
    shapes |= {"gate": (WIDTH, FFN), "up": (WIDTH, FFN), "down": (FFN, WIDTH)}
    heads = {"qkv": HEADS + 2 * KV} if fused else {"q": HEADS, "k": KV, "v": KV}
    shapes |= {name: (WIDTH, n * DIM) for name, n in heads.items()}
    one = {name: f32(*shape) for name, shape in shapes.items()}
    stack = {name: f32(layers, *shape) for name, shape in shapes.items()}
    params = {"embed": f32(VOCAB, WIDTH), "n": f32(WIDTH), "layers": [one] * layers}
    ids = jax.ShapeDtypeStruct((3, 5), jnp.int32)
    return apply, params | ({"layers": stack} if stacked else {}), ids


def by_size(found):
    """Sizes of what can be removed, but for layers, and of what cannot."""
    kept = sorted(g.size for g in found.groups if "layer" not in g.flags)
    return kept, sorted({r.size for r in found.refused})


@pytest.mark.parametrize("how", [{}, {"fused": True}, {"stacked": True}])
def test_a_language_model_has_width_ffn_kv_heads_queries_per_kv_head_and_value_dim(how):
    found = found_in(*language_model(**how))
    layers = 1 if "stacked" in how else 2
    assert by_size(found) == (sorted([WIDTH] + layers * [FFN, KV, HEADS // KV, DIM]), [DIM, VOCAB])
    (width,) = (g for g in found.groups if g.size == WIDTH)
    assert width.flags == {"exact", "reduce:sum"}
    assert all(g.flags == {"exact"} for g in found.groups if g.size not in (WIDTH, 2))
    assert not found.unknown


def test_a_fused_kernel_has_kv_heads_in_each_of_its_terms():
    found = found_in(*language_model(fused=True, layers=1))
    where = {
        g.name: {(m.term, m.position) for m in g.members if m.path.endswith("qkv") and m.axis == 1}
        for g in found.groups
    }
    assert where.pop("embed:1") == where.pop("layers/0/down:0") == set()
    heads = {(0, 0), (1, 0), (2, 0)}  # q is kv x group x dim, k and v are kv x dim
    assert sorted(where.values(), key=len) == [{(0, 1)}, {(2, 1)}, heads]


def test_names_say_where_the_first_member_stands():
    names = {g.name for g in found_in(*language_model(layers=1, fused=True)).groups}
    assert names == {
        "embed:1",
        "layers/0/down:0",
        *(f"layers/0/o:0[{k}]" for k in range(3)),
    }


def test_tied_embeddings_are_one_dimension_and_the_vocabulary_is_refused_twice_over():
    found = found_in(*language_model())
    assert {r.reasons for r in found.refused if r.size == VOCAB} == {("gather", "output")}


EXACT_IN_THE_ZOO = {
    "plain_mlp": [13],
    "plain_dropout": [],  # random bits are drawn for each channel
    "plain_unet": [5, 7, 9],
    "plain_transformer": [4, 4, 5, 5, 13, 13],  # and the width, but for a variance in two passes
    "plain_scan_remat": [4, 5, 13],
    "plain_gqa": [2, 2, 4, 4, 10, 10, 13, 13],
    "plain_moe_dense": [13],
    "plain_moe_top_k": [13],
    "plain_lstm": [13],
    "plain_ssm": [13],
    "plain_custom_vjp": [13],
    "plain_custom_jvp": [13],
    "plain_cond": [13, 13],
    "linen_mobile": [3, 3, 4, 5],  # 9 channels are 3 norm groups of 3
    "linen_transformer": [4, 4, 5, 5, 5, 5, 11, 13, 13],
    "linen_lstm": [13],
    "nnx_transformer": [4, 4, 5, 5, 5, 5, 11, 13, 13],
}


@pytest.mark.parametrize("name", EXACT_IN_THE_ZOO)
def test_the_zoo_has_the_groups_that_its_models_were_built_with(name):
    model = zoo.model(name)
    found = found_in(model.apply, model.params, *model.inputs)
    assert sizes(found, flags=["exact"]) == EXACT_IN_THE_ZOO[name]


# ------------------------------------------------------------- how it is written is no matter (C9)

PLAIN = zoo.named(having=("plain",))


@pytest.mark.parametrize("name", PLAIN)
def test_jit_and_remat_change_no_group(name):
    model = zoo.model(name)
    found = found_in(model.apply, model.params, *model.inputs)
    for wrap in (jax.jit, jax.checkpoint):
        other = found_in(wrap(model.apply), model.params, *model.inputs)
        assert shapes_of(other) == shapes_of(found) and str(other) == str(found)


@pytest.mark.parametrize("name", PLAIN)
def test_renaming_parameters_changes_no_group(name):
    model = zoo.model(name)
    leaves, structure = jax.tree.flatten(model.params)
    numbers = map("{:03}".format, range(999, 0, -1))
    new = dict(zip(us.tree.names(model.params), numbers, strict=False))
    params = dict(zip(new.values(), leaves, strict=True))
    apply = lambda p, *xs: model.apply(
        jax.tree.unflatten(structure, [p[name] for name in new.values()]), *xs
    )
    found = found_in(model.apply, model.params, *model.inputs)
    renamed = {
        (frozenset(m._replace(path=new[m.path]) for m in members), n, flags)
        for members, n, flags in shapes_of(found)
    }
    assert shapes_of(found_in(apply, params, *model.inputs)) == renamed


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.jit(f))])
def test_splitting_into_calls_changes_no_group(wrap):
    """The shared body is called once for each layer."""
    found, split = (found_in(*language_model(**how)) for how in ({}, {"wrap": wrap}))
    assert str(split) == str(found)


@pytest.mark.parametrize("fused", [False, True])
def test_stacking_layers_changes_no_group(fused):
    found = found_in(*language_model(fused=fused))
    layered = found_in(*language_model(fused=fused, stacked=True, wrap=jax.checkpoint))

    def as_stacked(m):
        top, *rest = m.path.split("/")
        return m._replace(path=f"{top}/{rest[1]}", axis=m.axis + 1) if rest else m

    width = {
        (frozenset(map(as_stacked, members)), n, flags) for members, n, flags in shapes_of(found)
    }
    layers = {group for group in shapes_of(layered) if "layer" in group[2]}
    assert shapes_of(layered) - layers == width
    ((members, n, _),) = layers
    assert n == 2 and {m.axis for m in members} == {0}
    assert {m.path for m in members} == {f"layers/{k}" for k in layered_names(fused)}


def layered_names(fused):
    return language_model(fused=fused, stacked=True)[1]["layers"]


def test_a_body_called_with_different_widths_is_two_different_calls():
    shared = jax.jit(lambda h: h / (1 + jnp.abs(h).sum(-1, keepdims=True)))
    fn = lambda p, x: shared(shared(x @ p["a"]) @ p["b"]) @ p["c"]
    params = {"a": f32(8, 16), "b": f32(16, 5), "c": f32(5, 3)}
    found = found_in(fn, params, f32(4, 8))
    assert sizes(found, flags=["exact", "reduce:sum"]) == [5, 16]


# ------------------------------------------------------------------- what is not known (C10)


@pytest.mark.parametrize("name", ["plain_gqa", "plain_lstm", "plain_moe_dense", "linen_mobile"])
def test_without_a_rule_there_are_fewer_groups_and_no_other_ones(name, monkeypatch):
    model = zoo.model(name)
    traced = trace(model.apply, model.params, *model.inputs)
    known = {(members, n): flags for members, n, flags in shapes_of(dims(traced))}
    used = {site.name for site in sites(traced.closed.jaxpr)}
    for primitive in sorted(used):
        with monkeypatch.context() as patch:
            patch.delitem(RULES, primitive)
            fewer = dims(traced)
        assert set(fewer.unknown) == {primitive}
        for members, n, flags in shapes_of(fewer):
            assert flags == known[members, n] or "exact" in known[members, n]


def test_an_unknown_primitive_is_counted_and_refuses_what_it_touches():
    fn = lambda p, x: jnp.fft.fft(x @ p["a"], axis=0).real @ p["b"] + jnp.tanh(x @ p["c"]) @ p["d"]
    params = {"a": f32(8, 16), "b": f32(16, 3), "c": f32(8, 10), "d": f32(10, 3)}
    found = found_in(fn, params, f32(4, 8))
    assert sizes(found) == [10] and found.unknown == {"fft": 1}
    assert {r.name: r.reasons for r in found.refused if r.size == 16} == {
        "a:1": ("fft",),
        "b:0": ("fft",),
    }
    assert "no rule for fft, which occurs 1 x" in str(found)


def test_every_factor_of_a_parameter_is_in_a_group_or_refused_for_a_reason():
    for name in PLAIN:
        model = zoo.model(name)
        found = found_in(model.apply, model.params, *model.inputs)
        seen = [m for of in (*found.groups, *found.refused) for m in of.members]
        assert len(seen) == len(set(seen)) and all(r.reasons for r in found.refused)
        for path, leaf in us.tree.named_leaves(model.params).items():
            where = {m.axis for m in seen if m.path == path}
            assert where == {k for k, n in enumerate(leaf.shape) if n > 1}, path


@pytest.mark.parametrize("name", zoo.EACH)
def test_axes_have_the_sizes_of_what_they_are_axes_of(name):
    """At every equation of every model, in calls, branches and loops as well."""
    model = zoo.model(name)
    traced = trace(model.apply, model.params, *model.inputs)
    found = dims(traced)
    for path, leaf in us.tree.named_leaves(model.params).items():
        assert tuple(map(size, found.axes(path))) == leaf.shape
    for site in sites(traced.closed.jaxpr):
        variables = [*site.eqn.invars, *site.eqn.outvars]
        ins, outs = found.at(site.place)
        for v, axes in zip(variables, [*ins, *outs], strict=True):
            assert tuple(map(size, axes)) == v.aval.shape


def test_a_parameter_that_is_not_used_is_refused():
    fn = lambda p, x: jax.jit(lambda a, b: x @ a)(p["a"], p["b"])
    found = found_in(fn, {"a": f32(8, 3), "b": f32(5, 6)}, f32(4, 8))
    assert {r.name: r.reasons for r in found.refused if r.name[0] == "b"} == {
        "b:0": ("unused",),
        "b:1": ("unused",),
    }


def test_a_path_that_does_not_exist_is_an_error_that_names_those_that_do():
    found = found_in(lambda p, x: x @ p["a"], {"a": f32(8, 3)}, f32(4, 8))
    with pytest.raises(KeyError, match="no parameter is named 'b'. There are a"):
        found.axes("b")


# --------------------------------------------------------------------------------- shard_map


def over_two_devices(fn, in_specs, out_specs):
    types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("d",), types, devices=jax.devices()[:2])
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def test_what_shard_map_leaves_whole_is_one_dimension_inside_and_outside():
    inner = over_two_devices(
        lambda a, h: jax.lax.psum(jnp.tanh(h @ a).sum(0), "d"), (P(), P("d")), P()
    )
    fn = lambda p, x: inner(p["a"], x) @ p["b"]
    found = found_in(fn, {"a": f32(8, 16), "b": f32(16, 3)}, f32(4, 8))
    assert sizes(found, flags=["exact"]) == [16]


def test_what_shard_map_cuts_is_refused():
    inner = over_two_devices(lambda a, h: jnp.tanh(h @ a), (P(None, "d"), P()), P(None, "d"))
    fn = lambda p, x: inner(p["a"], x) @ p["b"]
    found = found_in(fn, {"a": f32(8, 16), "b": f32(16, 3)}, f32(4, 8))
    assert sizes(found) == []
    assert {r.reasons for r in found.refused if r.size == 16} == {("sharded",)}


def test_arrays_that_a_function_closes_over_are_never_cut():
    table = np.arange(16.0, dtype=np.float32)
    fn = lambda p, x: (x @ p["a"] * table) @ p["b"]
    found = found_in(fn, {"a": f32(8, 16), "b": f32(16, 3)}, f32(4, 8))
    assert {r.reasons for r in found.refused if r.size == 16} == {("constant",)}


def test_values_of_an_outer_transformation_are_constants():
    def outer(scale):
        fn = lambda p, x: (x @ p["a"] * scale) @ p["b"]
        found = found_in(fn, {"a": f32(8, 16), "b": f32(16, 3)}, f32(4, 8))
        assert sizes(found, flags=["exact"]) == [16]
        return scale

    jax.jit(outer)(2.0)
