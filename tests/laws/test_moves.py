"""Laws of moves: wherever a parameter was only moved, every technique still knows it.

One table, `trace.program._primitives.MOVES`, says what a move is. A move of it that is inserted
between a parameter and its use changes nothing of what rules, statistics, codes and gradients see.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec as P

import unitscale_jax as us
from tests.support import zoo
from unitscale_jax import trace
from unitscale_jax.fwd_bwd import mark, round_bwd, scale, straight_through
from unitscale_jax.quant import Group
from unitscale_jax.trace.params import input_origins, rule_names
from unitscale_jax.trace.program import sites, trace_call
from unitscale_jax.trace.program._primitives import MOVES

W8 = us.DotSpec(w=us.QSpec(), x=us.QSpec())
WEIGHTS = us.DotSpec(w=us.QSpec())
W = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
X = jax.random.normal(jax.random.key(1), (6, 4))


def pair(v):
    return jnp.stack([v, v])


def placed(v):
    return NamedSharding(us.parallel.mesh(dp=8), P(*[None] * v.ndim))


def resharded(v):
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.sharding.reshard(v, P(*[None] * v.ndim))


INSERTED = {  # each makes the primitive of its name, and ends in the numbers it began with
    "broadcast_in_dim": lambda v: jnp.broadcast_to(v, (2, *v.shape))[1],
    "concatenate": lambda v: jnp.concatenate([v[None], v[None]])[1],
    "convert_element_type": lambda v: v.astype(jnp.bfloat16).astype(v.dtype),
    "copy": jnp.copy,
    "device_put": jax.device_put,
    "dynamic_slice": lambda v: jax.lax.dynamic_index_in_dim(pair(v), 1, keepdims=False),
    "layout_constraint": lambda v: with_layout_constraint(
        v, jax.experimental.layout.Layout(major_to_minor=tuple(range(v.ndim)))
    ),
    "mark": lambda v: mark(v, at=3),
    "name": lambda v: checkpoint_name(v, "kernel"),
    "optimization_barrier": lambda v: jax.lax.optimization_barrier((jnp.ones(5), v))[1],
    "reduce_precision": lambda v: jax.lax.reduce_precision(v, 8, 7),
    "reshape": lambda v: v.reshape(1, *v.shape, 1).reshape(v.shape),
    "reshard": resharded,
    "rev": lambda v: jnp.flip(pair(v), 0)[0],
    "round_bwd": lambda v: round_bwd(v, "e5m2"),
    "sharding_constraint": lambda v: jax.lax.with_sharding_constraint(v, placed(v)),
    "slice": lambda v: pair(v)[1:][0],
    "split": lambda v: jnp.split(pair(v), 2)[1][0],
    "squeeze": lambda v: v[None].squeeze(0),
    "stack": lambda v: pair(v)[0],
    "stop_gradient": jax.lax.stop_gradient,
    "straight_through": lambda v: straight_through(v, v),
    "tile": lambda v: jnp.tile(v[None], (2,) + (1,) * v.ndim)[1],
    "transpose": lambda v: v.T.T,
    "unit_scale": lambda v: scale(v, fwd=2.0, bwd=3.0),
    "unit_scale_by": lambda v: scale(v, fwd=2.0 * jnp.ones(()), bwd=jnp.float32(3)),
    "unstack": lambda v: jnp.unstack(pair(v))[1],
}
FACTORS = {"stop_gradient": (1, 0), "unit_scale": (2, 3), "unit_scale_by": (2, 3)}
"""Of the value and of the cotangent, where they are not 1."""

OF_ONE_LINE = {"copy_p", "mesh_cast", "with_memory_space_constraint"}
"""Primitives that one of the supported lines of JAX lacks, or makes on a device alone."""

MANUAL = {"pcast", "pvary"}
"""Moves inside of `shard_map` alone; see `test_moves_of_manual_axes`."""


def test_every_move_of_the_table_is_tried():
    assert set(INSERTED) | OF_ONE_LINE | MANUAL == MOVES
    for name, move in INSERTED.items():
        made = trace.trace(move, W["w"]).closed.jaxpr
        assert name in {site.name for site in sites(made)}, name


# ---------------------------------------------------------------------- every use of a parameter


def heads(p, x):
    return jnp.einsum("bd,dhk->bhk", x, p["w"])


def layers(p, x):
    step = lambda h, row: (jnp.tanh(h @ row), None)
    return jax.lax.scan(step, x, p["w"])[0]


def convolved(p, x):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=numbers)


def experts(p, x):
    return jax.lax.ragged_dot(x, p["w"], jnp.array([2, 3]))


USES = {
    "dense": (lambda p, x: x @ p["w"], (4, 3), (6, 4)),
    "transposed": (lambda p, x: x @ p["w"].T, (3, 4), (6, 4)),
    "left": (lambda p, x: p["w"] @ x, (3, 4), (4, 5)),
    "heads": (heads, (4, 2, 3), (5, 4)),
    "jitted": (lambda p, x: jax.jit(jnp.dot)(x, p["w"]), (4, 3), (6, 4)),
    "remat": (lambda p, x: jax.checkpoint(jnp.dot)(x, p["w"]), (4, 3), (6, 4)),
    "layers": (layers, (2, 4, 4), (6, 4)),
    "lookup": (lambda p, x: p["w"][x.astype(int)], (5, 3), (2,)),
    "tied": (lambda p, x: p["w"][x.astype(int)] @ p["w"].T, (5, 3), (2,)),
    "convolution": (convolved, (2, 2, 3, 4), (2, 5, 5, 3)),
    "experts": (experts, (2, 4, 3), (5, 4)),
}


@functools.cache
def arguments(use):
    _, of_w, of_x = USES[use]
    w = jax.random.normal(jax.random.key(2), of_w)
    return {"w": w}, jax.random.uniform(jax.random.key(3), of_x, minval=0.0, maxval=3.0)


def inserted(fn, *names):
    """The function whose parameters are moved, in this order, before they are used."""
    floating = us.tree.is_floating
    moves = [INSERTED[name] for name in names]
    every = lambda v: functools.reduce(lambda v, move: move(v), moves, v) if floating(v) else v
    return lambda params, *inputs: fn(jax.tree.map(every, params), *inputs)


def account(fn, params, *inputs):
    """What each parameter meets, and by which names rules address these equations."""
    staged = trace_call(fn, params, *inputs)
    at = trace.provenance(staged.closed.jaxpr, input_origins(staged, params))
    met = trace.meetings(staged, params)
    facts = lambda m: (
        m.site.name,
        m.kind,
        m.side,
        m.whole,
        m.clear,
        sorted(m.contracted),
        sorted(m.channels),
        tuple(axis for _, axis in m.stacks),
        rule_names(m.site, at[m.site.place][:2]),
    )
    return {name: [facts(m) for m in found] for name, found in met.items()}


def tried(name, use):
    """Whether JAX has the use of a parameter whose sharding is explicit."""
    return not (name == "reshard" and use == "experts")


@pytest.mark.parametrize("name", INSERTED)
def test_a_move_changes_nothing_of_what_a_parameter_meets(name):
    for use, (fn, *_) in USES.items():
        if tried(name, use):
            params, x = arguments(use)
            assert account(inserted(fn, name), params, x) == account(fn, params, x), use


COMPOSED = sorted(INSERTED.keys() - {"reshard", "unit_scale", "unit_scale_by", "stop_gradient"})


@settings(max_examples=30, deadline=None)
@given(use=st.sampled_from(sorted(USES)), names=st.lists(st.sampled_from(COMPOSED), max_size=5))
def test_moves_of_moves_change_nothing_either(use, names):
    fn = USES[use][0]
    params, x = arguments(use)
    assert account(inserted(fn, *names), params, x) == account(fn, params, x)


@pytest.mark.parametrize("name", zoo.COVER)
def test_every_move_at_once_changes_nothing_of_a_model(name):
    model = zoo.model(name)
    moved_fn = inserted(model.apply, *COMPOSED)
    before = account(model.apply, model.params, *model.inputs)
    assert account(moved_fn, model.params, *model.inputs) == before


# --------------------------------------------------------------------------- codes and gradients


def quantizable(fn, params, x):
    """Rules for the weights, by the axes of the unmoved function."""
    return us.quant.resolve({"w": W8}, fn, params, x)


def products_of(report):
    return [(row.name, row.operands, row.parameters) for row in report.products.rows]


def compared(fn, names, params, x):
    """(served, trained, its gradient) of the moved function, and the float gradient."""
    moved_fn = inserted(fn, *names)
    rules, codes = quantizable(fn, params, x), us.quantize(params, quantizable(fn, params, x))
    toward = jnp.sin(jnp.arange(float(np.prod(jax.eval_shape(fn, params, x).shape))))
    linear = lambda f: lambda p: jnp.vdot(toward, f(p, x).astype(jnp.float32).ravel())
    weights = us.quant.resolve({"w": WEIGHTS}, fn, params, x)  # floats meet codes: linear

    @jax.jit
    def run(params, codes):
        trained = us.quantized(moved_fn, rules)(params, x)
        grads = jax.grad(linear(us.quantized(moved_fn, weights)))(params)
        return us.quantized(moved_fn)(codes, x), trained, grads["w"]

    exact = jax.grad(linear(fn))(us.quant.dequantize(codes))["w"]
    return run(params, codes), exact, us.explain(us.quantized(moved_fn))(codes, x)


def check_codes(use, *names):
    fn = USES[use][0]
    params, x = arguments(use)
    (served, trained, grad), exact, report = compared(fn, names, params, x)
    plain = us.explain(us.quantized(fn))(us.quantize(params, quantizable(fn, params, x)), x)
    assert products_of(report) == products_of(plain)
    np.testing.assert_array_equal(served, trained)
    cotangent = np.float32(np.prod([FACTORS.get(name, (1, 1))[1] for name in names]))
    if use != "layers":  # which is not linear in its weights
        rounded = 2**-3 if "round_bwd" in names else 2e-2  # e5m2 has two bits after the first
        np.testing.assert_allclose(grad, cotangent * exact, rtol=rounded, atol=2e-2)
    assert "stop_gradient" not in names or not np.any(grad)


@pytest.mark.parametrize("name", INSERTED)
def test_codes_pass_a_move(name):
    check_codes("heads", name)


@pytest.mark.parametrize("use", [use for use in USES if use not in ("lookup", "tied")])
def test_codes_pass_moves_wherever_they_are_used(use):
    check_codes(use, "transpose", "unit_scale_by", "reshape", "straight_through", "tile")
    check_codes(use, "unstack", "optimization_barrier", "stop_gradient")


def test_moves_of_manual_axes():
    mesh = us.parallel.mesh(dp=8)

    def local(p, x):  # on JAX 0.12 the same primitive has one name, on others another
        varying = jax.lax.pcast(p["w"], "dp", to="varying")
        return x @ varying

    fn = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("dp")), out_specs=P("dp"))
    x = jax.random.normal(jax.random.key(1), (8, 4))
    rules = us.quant.resolve({"w": W8}, fn, W, x)
    codes = us.quantize(W, rules)
    report = us.explain(us.quantized(fn))(codes, x)
    assert MANUAL & {row.name for row in report.rows}
    assert [row.operands for row in report.products.rows] == [("int8", "int8")]
    served, trained = us.quantized(fn)(codes, x), us.quantized(fn, rules)(W, x)
    np.testing.assert_array_equal(served, trained)


def test_a_frozen_weight_receives_no_gradient_whatever_else_does():
    def fn(p, x):
        return jnp.tanh(x @ jax.lax.stop_gradient(p["w"])) @ p["out"]

    params = W | {"out": jax.random.normal(jax.random.key(2), (3, 2))}
    grads = jax.grad(lambda p: (us.quantized(fn, {"*": W8})(p, X) ** 2).sum())(params)
    assert not np.any(grads["w"]) and np.all(grads["out"])


def test_a_frozen_learned_weight_gives_its_scale_no_gradient():
    fn = lambda p, x: x @ jax.lax.stop_gradient(p["w"])
    params = us.quant.learned(W, us.quant.resolve({"w": WEIGHTS}, fn, W, X))
    grads = jax.grad(lambda p: (us.quantized(fn)(p, X) ** 2).sum())(params)
    assert not np.any(grads["w"].master) and not np.any(grads["w"].scale)


def test_the_range_of_an_activation_is_learned_beside_a_frozen_weight():
    fn = lambda p, x: x @ jax.lax.stop_gradient(p["w"])
    rules = us.quant.resolve({"w": W8}, fn, W, X)
    stats = us.calibrate(fn, W, [(X,)], rules)
    params = us.quant.learned(W, rules, stats=stats)
    grads = jax.grad(lambda p: (us.quantized(fn)(p, X) ** 2).sum())(params)
    assert np.any(grads["w"].x_scale) and not np.any(grads["w"].scale)


@pytest.mark.parametrize("fwd", [0.0, -1.0, 0.1, 3.0])
def test_a_factor_of_codes_is_that_of_their_values(fwd):
    fn = lambda p, x: x @ scale(p["w"], fwd=fwd)
    codes = us.quantize(W, us.quant.resolve({"w": WEIGHTS}, fn, W, X))
    expected = fn(us.quant.dequantize(codes), X)
    np.testing.assert_allclose(us.quantized(fn)(codes, X), expected, rtol=1e-5, atol=1e-5)


def test_factors_for_each_row_of_a_batch_are_folded_where_no_scale_is_shared():
    def fn(p, x):
        each = jax.vmap(lambda v, f: scale(v, fwd=f), in_axes=(None, 0))(p["w"], x[:, 0])
        return jnp.einsum("bd,bdf->bf", x, each)

    rules = us.quant.resolve({"w": W8}, fn, W, X)
    codes = us.quantize(W, rules)
    report = us.explain(us.quantized(fn))(codes, X)
    assert [row.operands for row in report.products.rows] == [("int8", "int8")]
    served, trained = us.quantized(fn)(codes, X), us.quantized(fn, rules)(W, X)
    np.testing.assert_array_equal(served, trained)
    np.testing.assert_allclose(served, fn(W, X), atol=0.1)


@pytest.mark.parametrize("bits", [3, 7, 10, 23])
def test_codes_of_rounded_numbers_are_close_to_them(bits):
    fn = lambda p, x: x @ jax.lax.reduce_precision(p["w"], 5, bits)
    w = {"w": 1e-4 * W["w"]}  # its scale is below the least normal float16, its values are not
    codes = us.quantize(w, us.quant.resolve({"w": WEIGHTS}, fn, w, X))
    exact = np.asarray(X @ w["w"])
    np.testing.assert_allclose(
        us.quantized(fn)(codes, X), exact, atol=(2.0**-bits + 0.02) * np.abs(exact).max()
    )


# ----------------------------------------------------------------------- what follows from axes

FROZEN = lambda v: jax.lax.stop_gradient(scale(v, bwd=2.0))


def test_gptq_wanda_and_sparsegpt_have_the_input_channels_of_a_moved_weight():
    plain, moved_fn = (lambda p, x: x @ p["w"]), (lambda p, x: x @ FROZEN(p["w"]))
    rules = us.quant.resolve({"w": W8}, plain, W, X)
    spec = us.prune.SparsitySpec(patterns={"w": us.prune.Unstructured()}, sparsity=0.5)

    def found(fn):
        stats = us.calibrate(fn, W, [(X,)], rules, collect=("channels", "hessian"))
        codes, _ = us.quant.gptq(W, stats, us.quant.resolve({"w": W8}, fn, W, X))
        moments = us.calibrate(fn, W, [(X,)], spec, collect=("hessian",))
        pruned, masks, _ = us.prune.sparsegpt(W, moments, spec)
        return stats["w"].layout, codes, pruned, masks, us.prune.wanda(W, moments)

    for got, expected in zip(found(moved_fn), found(plain), strict=True):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(got), jax.tree.leaves(expected))


def test_groups_of_n_of_m_run_along_the_inputs_of_a_moved_weight():
    fn = lambda p, x: x @ FROZEN(p["w"].T.T)
    spec = us.prune.resolve_axes(us.prune.SparsitySpec(patterns=us.prune.NofM(2, 4)), fn, W, X)
    assert spec.patterns["w"].axis == -2


MLP = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 3))}


HIDDEN = {  # moves of activations, which leave the hidden channels what they are
    **{
        name: INSERTED[name]
        for name in sorted(INSERTED.keys() - {"layout_constraint", "rev", "reshard"})
    },
    "tile once": lambda v: jnp.tile(v, (1, 1)),
    "tile twice": lambda v: jnp.tile(v, (2, 1)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_channels_of_compaction_pass_a_move(name):
    hidden = lambda p, x: jax.nn.relu(x @ p["a"])
    plain = us.compaction.groups(lambda p, x: hidden(p, x) @ p["b"], MLP, X)
    moved_groups = us.compaction.groups(lambda p, x: HIDDEN[name](hidden(p, x)) @ p["b"], MLP, X)
    facts = lambda found: [(g.size, g.flags, str(g.members)) for g in found.groups]
    assert facts(moved_groups) == facts(plain)
    if not name.startswith("tile "):
        kernels = us.compaction.groups(lambda p, x: hidden(p, x) @ HIDDEN[name](p["b"]), MLP, X)
        assert facts(kernels) == facts(plain)


def test_copies_of_channels_are_removed_together():
    fn = lambda p, x: jnp.tile(jax.nn.relu(x @ p["a"]), (1, 2)) @ jnp.tile(p["b"], (2, 1))
    graph = us.compaction.groups(fn, MLP, X)
    (hidden,) = [group for group in graph.groups if group.size == 8]
    assert "exact" in hidden.flags


# --------------------------------------------------------------------------------- joined kernels

JOINED = {"i": jax.random.normal(jax.random.key(4), (4, 3)), "o": jnp.ones((4, 3))}


def joined(p, x):
    return x @ jnp.concatenate([p["i"], p["o"]], axis=1)


def stacked(p, x):
    return jnp.einsum("bd,ndf->nbf", x, jnp.stack([p["i"], p["o"]]))


@pytest.mark.parametrize("fn", [joined, stacked])
def test_joined_kernels_are_named_and_ruled(fn):
    rules = us.quant.resolve({"*": W8}, fn, JOINED, X)
    codes = us.quantize(JOINED, rules)
    (row,) = us.explain(us.quantized(fn))(codes, X).products.rows
    assert row.operands == ("int8", "int8") and row.parameters == ("i", "o")
    (row,) = us.explain(fn)(JOINED, X).products.rows
    assert row.parameters == ("i", "o")
    np.testing.assert_array_equal(us.quantized(fn)(codes, X), us.quantized(fn, rules)(JOINED, X))
    for name in JOINED:  # a rule that names either reaches the product
        autocast = us.autocast(fn, "bfloat16", rules={name: "float32"})
        (row,) = us.explain(autocast)(JOINED, X).products.rows
        assert row.operands == ("float32", "float32") and "rule" in row.notes["autocast"]


COMPUTED = {  # kernels that are computed, each from one parameter, and then joined
    "columns": lambda p, x: x @ jnp.concatenate([1.0 + p["i"], 2.0 * p["o"]], axis=1),
    "a stack": lambda p, x: jnp.einsum("bd,ndf->nbf", x, jnp.stack([1.0 + p["i"], p["o"]])),
    "moved": lambda p, x: x @ jnp.flip(jnp.concatenate([jnp.abs(p["i"]), p["o"]], axis=1), 1).T.T,
    "in a loop": lambda p, x: jax.lax.fori_loop(
        0, 2, lambda _, h: h @ jnp.concatenate([p["i"] * 2.0, p["o"]], 1)[:, :4], x
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_report_names_what_joined_kernels_are_computed_from(name):
    (row,) = us.explain(COMPUTED[name])(JOINED, X).products.rows
    assert row.parameters == ("i", "o")
    staged = trace_call(COMPUTED[name], JOINED, X)
    at = trace.provenance(staged.closed.jaxpr, input_origins(staged, JOINED))
    (site,) = [site for site in sites(staged.closed.jaxpr) if site.name == "dot_general"]
    assert not {"i", "o"}.intersection(rule_names(site, at[site.place]))  # rules name what is held


@pytest.mark.parametrize("fn", [joined, stacked])
def test_joined_kernels_are_named_while_they_are_trained(fn):
    trained = us.quantized(fn, us.quant.resolve({"*": W8}, fn, JOINED, X))
    loss = lambda p, x: trained(p, x).sum()
    for seen in (trained, loss, jax.grad(loss)):
        row = us.explain(seen)(JOINED, X).products.rows[0]
        assert row.operands == ("int8", "int8") and row.parameters == ("i", "o")


def test_a_join_with_a_part_that_has_no_name_has_none():
    parts = {
        "an activation": lambda p, x: [2.0 * p["i"], x[:4, :3]],
        "of two": lambda p, x: [2.0 * p["i"], p["i"] + p["o"]],
    }
    for part in parts.values():
        fn = lambda p, x, part=part: x @ jnp.concatenate(part(p, x), axis=1)
        (row,) = us.explain(fn)(JOINED, X).products.rows
        assert row.parameters == ()


def test_what_joins_activations_is_no_kernel():
    fn = lambda p, x: jnp.concatenate([p["token"], x]) @ p["w"]
    params = W | {"token": jnp.ones((1, 4))}
    met = trace.meetings(trace_call(fn, params, X), params)
    assert met.keys() == {"w"}


# -------------------------------------------------------------------------------- both sides, x64


def test_a_parameter_on_both_sides_of_a_product_meets_it_twice():
    params, fn = {"w": jnp.ones((4, 4))}, lambda p, x: x @ (p["w"] @ p["w"])
    met = trace.meetings(trace_call(fn, params, X), params)["w"]
    assert [(m.side, sorted(m.contracted)) for m in met] == [(0, [-1]), (1, [-2])]
    with pytest.raises(ValueError, match=r"w is used over different axes \(.*-1.*-2"):
        us.quant.resolve({"w": W8}, fn, params, X)


def agreed(found):
    """The axes that all of a parameter's meetings agree in; None without."""
    met = [m for m in found if m.kind in ("product", "lookup")]
    direct = [m for m in met if m.whole] or met
    axes = {m.contracted for m in direct}
    return axes.pop() if len(axes) == 1 and all(m.clear and m.contracted for m in direct) else None


@pytest.mark.parametrize("name", zoo.COVER)
def test_axes_are_resolved_if_and_only_if_all_meetings_agree(name):
    model = zoo.model(name)
    staged = trace_call(model.apply, model.params, *model.inputs)
    axes = {k: agreed(v) for k, v in trace.meetings(staged, model.params).items()}
    rules = {path: WEIGHTS for path, found in axes.items() if found is not None}
    given = us.quant.resolve(rules, model.apply, model.params, *model.inputs)
    assert {path: frozenset(spec.w.axes) for path, spec in given} == {k: axes[k] for k in rules}
    for path in [path for path in axes if path not in rules][:2]:
        with pytest.raises(ValueError, match="used over different axes|meets no product"):
            us.quant.resolve({path: WEIGHTS}, model.apply, model.params, *model.inputs)


def test_products_of_float64_exist_and_have_no_codes():
    with jax.enable_x64(True):
        params, x = us.tree.astype(W, jnp.float64), X.astype(jnp.float64)
        fn = lambda p, x: x @ p["w"]
        (met,) = trace.meetings(trace_call(fn, params, x), params)["w"]
        assert met.kind == "product" and met.contracted == {-2}
        for attempt in (us.quant.resolve, lambda rules, fn, *args: us.quantized(fn, rules)(*args)):
            with pytest.raises(ValueError, match=r"w is float64, which has no codes.*float32"):
                attempt({"w": W8}, fn, params, x)


def test_a_factor_made_of_data_leaves_a_weight_its_name():
    fn = lambda p, x: x @ scale(p["w"], bwd=jnp.abs(x).max())
    (row,) = us.explain(fn)(W, X).products.rows
    assert row.parameters == ("w",)
    (row,) = us.explain(us.quantized(fn, {"w": W8}))(W, X).products.rows
    assert row.operands == ("int8", "int8")
    (row,) = us.explain(us.autocast(fn, "bfloat16", rules={"w": "float32"}))(W, X).products.rows
    assert row.operands == ("float32", "float32")


@pytest.mark.parametrize("spec", [W8, us.DotSpec(w=us.QSpec(group=Group(2)), x=us.QSpec())])
@pytest.mark.parametrize("calibrated", [False, True])
def test_kernels_joined_along_what_is_summed_over_are_groups(spec, calibrated):
    fn = lambda p, x: x @ jnp.concatenate([p["i"], p["o"]], axis=0)
    x = jax.random.normal(jax.random.key(1), (6, 8))
    rules = us.quant.resolve({"*": spec}, fn, JOINED, x)
    stats = us.calibrate(fn, JOINED, [(x,)], rules) if calibrated else None
    codes = us.quantize(JOINED, rules, stats=stats)
    report = us.explain(us.quantized(fn))(codes, x)
    assert {row.operands for row in report.products.rows} == {("int8", "int8")}
    served = jax.jit(us.quantized(fn))(codes, x)
    trained = jax.jit(us.quantized(fn, rules, stats=stats))(JOINED, x)
    np.testing.assert_array_equal(served, trained)
    np.testing.assert_allclose(served, fn(JOINED, x), atol=0.1)


EXPERTS = {
    "up": jax.random.normal(jax.random.key(5), (2, 4, 6)),
    "down": jax.random.normal(jax.random.key(6), (2, 6, 4)),
}


def experts_of(p, x):
    rows = jnp.array([2, 4], jnp.int32)
    return x + jax.lax.ragged_dot(
        jax.nn.relu(jax.lax.ragged_dot(x, p["up"], rows)), p["down"], rows
    )


def test_hidden_channels_of_experts_are_removed_and_divided():
    graph = us.compaction.groups(experts_of, EXPERTS, X)
    (hidden,) = [group for group in graph.groups if group.size == 6]
    assert "exact" in hidden.flags
    plan = us.compaction.plan(graph, us.compaction.l2(graph, EXPERTS), keep=0.5)
    kept = np.isin(np.arange(6), plan.kept[hidden.name]).astype(np.float32)
    masked = {"up": EXPERTS["up"] * kept, "down": EXPERTS["down"] * kept[:, None]}
    small = us.compaction.compacted(experts_of, plan)(us.compaction.compact(EXPERTS, plan), X)
    np.testing.assert_allclose(small, experts_of(masked, X), rtol=1e-5, atol=1e-5)
    mesh = jax.sharding.AbstractMesh((2,), ("tp",))
    layout = us.parallel.infer(experts_of, EXPERTS, X, mesh=mesh)
    assert "column" in str(layout) and "row" in str(layout)


GROUPS = us.DotSpec(w=us.QSpec(group=Group(2)), x=us.QSpec())
REFUSED = {  # what codes cannot move, with the sentence that says so
    "rolled": (lambda p, x: x @ jnp.roll(p["i"], 1, 0), {"i": W8}, "equal parts"),
    "half a rule": (joined, {"i": W8}, "quantized in one way"),
    "two rules": (joined, {"i": W8, "o": WEIGHTS}, "quantized in one way"),
    "a cut group": (lambda p, x: x[:, :2] @ p["i"][1:3], {"i": GROUPS}, "a group of them"),
    "carrier": (
        lambda p, x: x @ straight_through(jnp.round(p["i"]), p["i"]),
        {"i": W8},
        "round of i",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_codes_cannot_move_is_refused_with_a_reason(name):
    fn, rules, reason = REFUSED[name]
    codes = us.quantize(JOINED, us.quant.resolve(rules, fn, JOINED, X))
    with pytest.raises(ValueError, match=f"stayed in floating point: .*{reason}"):
        us.quantized(fn)(codes, X)


REORDERED = {
    "reversed": lambda p, x: x @ jnp.flip(p["i"], 0),
    "repeated": lambda p, x: jnp.concatenate([x, x], 1) @ jnp.tile(p["i"], (2, 1)),
}


@pytest.mark.parametrize("name", REORDERED)
def test_whole_groups_may_be_in_another_order(name):
    fn = REORDERED[name]
    codes = us.quantize(JOINED, us.quant.resolve({"i": GROUPS}, fn, JOINED, X))
    np.testing.assert_allclose(us.quantized(fn)(codes, X), fn(JOINED, X), atol=0.1)


# --------------------------------------------------------------------- output channels that moved

W84 = {"w": jax.random.normal(jax.random.key(4), (4, 6))}
OUTPUTS = {  # moves of the output channels of a kernel, which share no scale
    "repeat": lambda v: jnp.repeat(v, 2, axis=-1),
    "repeat twice": lambda v: jnp.repeat(jnp.repeat(v, 2, axis=-1), 3, axis=-1),
    "repeat heads": lambda v: jnp.repeat(v.reshape(4, 2, 3), 3, axis=1).reshape(4, -1),
    "repeat of a cut": lambda v: jnp.repeat(v[:, 1:4], 2, axis=-1),
    "new rows of copies": lambda v: jnp.broadcast_to(v[:, None], (4, 3, 6)).reshape(4, -1),
    "roll": lambda v: jnp.roll(v, 2, axis=-1),
    "roll of a repeat": lambda v: jnp.roll(jnp.repeat(v, 2, axis=-1), 1, axis=-1),
    "tile": lambda v: jnp.tile(v, (1, 2)),
    "flip": lambda v: jnp.flip(v, -1),
}
OF_OUTPUTS = {
    "eight bits": W8,
    "four bits in groups": us.DotSpec(w=us.QSpec(format="int4", group=Group(2)), x=us.QSpec()),
    "integer groups": us.DotSpec(
        w=us.QSpec(format="int4", group=Group(2, "integer")), x=us.QSpec()
    ),
    "asymmetric": us.DotSpec(w=us.QSpec(symmetric=False), x=us.QSpec(symmetric=False)),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize(
    ("spec", "calibrated"),
    [*((spec, False) for spec in OF_OUTPUTS), ("eight bits", True), ("asymmetric", True)],
)
def test_moved_output_channels_are_served_from_their_codes(name, spec, calibrated):
    move, x = OUTPUTS[name], X[:4]  # as many rows as the kernel has, so that a result moves alike
    fn, plain_fn = (lambda p, x: x @ move(p["w"])), (lambda p, x: x @ p["w"])
    rules = us.quant.resolve({"w": OF_OUTPUTS[spec]}, fn, W84, x)
    stats = us.calibrate(fn, W84, [(x,)], rules) if calibrated else None
    codes = us.quantize(W84, rules, stats=stats)
    (row, *_) = us.explain(us.quantized(fn))(codes, x).products.rows
    assert row.operands == ("int8", "int8") and row.parameters == ("w",)
    served = jax.jit(us.quantized(fn))(codes, x)
    np.testing.assert_array_equal(served, move(jax.jit(us.quantized(plain_fn))(codes, x)))
    trained = jax.jit(us.quantized(fn, rules, stats=stats))(W84, x)
    np.testing.assert_array_equal(served, trained)
    toward = jnp.sin(jnp.arange(float(served.size))).reshape(served.shape)
    weights = us.quant.resolve({"w": WEIGHTS}, fn, W84, x)
    linear = lambda f, p: jnp.vdot(toward, f(p, x))
    grad = jax.grad(lambda p: linear(us.quantized(fn, weights), p))(W84)["w"]
    exact = jax.grad(lambda p: linear(fn, p))(W84)["w"]
    np.testing.assert_allclose(grad, exact, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------- rows of a stack that moved

STEP = lambda h, w: (jnp.tanh(h @ w), None)
STACKS = {
    "reversed": lambda p, x: jax.lax.scan(STEP, x, p["w"][::-1])[0],
    "a first layer apart": lambda p, x: jax.lax.scan(STEP, x @ p["w"][0], p["w"][1:])[0],
    "layers of layers": lambda p, x: jax.lax.scan(
        lambda h, ws: (jax.lax.scan(STEP, h, ws)[0], None), x, p["w"].reshape(2, 2, 4, 4)
    )[0],
    "frozen, in order": lambda p, x: jax.lax.scan(STEP, x, jax.lax.stop_gradient(p["w"]))[0],
}
AXES = {"a layer's own": None, "of all layers": (-3, -2), "of the whole stack": (-3, -2, -1)}


@pytest.mark.parametrize(
    ("name", "axes"),
    [*((n, "a layer's own") for n in STACKS), *(("reversed", a) for a in [*AXES][1:])],
)
def test_layers_of_a_moved_stack_are_served_with_static_ranges(name, axes):
    fn, x = STACKS[name], jax.random.normal(jax.random.key(1), (6, 4))
    params = {"w": jax.random.normal(jax.random.key(2), (4, 4, 4))}
    rules = {"w": us.DotSpec(w=us.QSpec(axes=AXES[axes] or (-2,)), x=us.QSpec())}
    stats = us.calibrate(fn, params, [(x,)], rules)
    codes = us.quantize(params, rules, stats)
    operands = {row.operands for row in us.explain(us.quantized(fn))(codes, x).products.rows}
    assert operands == {("int8", "int8")}
    served = jax.jit(us.quantized(fn))(codes, x)
    trained = jax.jit(us.quantized(fn, rules, stats=stats))(params, x)
    np.testing.assert_array_equal(served, trained)
    np.testing.assert_allclose(served, fn(params, x), atol=0.25)
    learned = us.quant.learned(params, us.quant.resolve(rules, fn, params, x), stats)
    grads = jax.grad(lambda p: us.quantized(fn)(p, x).sum())(learned)["w"]
    assert grads.x_scale.shape == learned["w"].x_scale.shape and np.isfinite(grads.x_scale).all()


@pytest.mark.parametrize("scale", ["free", "integer"])
def test_rows_that_a_group_spans_are_floats_and_listed(scale):
    fn, x = STACKS["frozen, in order"], jax.random.normal(jax.random.key(1), (6, 4))
    params = {"w": jax.random.normal(jax.random.key(2), (4, 4, 4))}
    spec = us.QSpec(format="int4", axes=(-3,), group=Group(2, scale))
    rules = {"w": us.DotSpec(w=spec)}
    codes = us.quantize(params, rules)
    np.testing.assert_array_equal(
        jax.jit(us.quantized(fn))(codes, x), jax.jit(us.quantized(fn, rules))(params, x)
    )
    with pytest.raises(ValueError, match="scan of w .a group spans several rows"):
        us.quantized(fn, strict=True)(codes, x)
