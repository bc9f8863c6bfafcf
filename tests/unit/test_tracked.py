"""Laws of scale statistics: nothing is changed, and each row is what it says (U16)."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import unitscale_jax as us
from tests.support import zoo
from unitscale_jax.formats import FORMATS, round_to
from unitscale_jax.fwd_bwd import mark
from unitscale_jax.loss import objective
from unitscale_jax.trace.program import trace_call
from unitscale_jax.unit._scales import NUMBERS, measured
from unitscale_jax.unit._tracked import _Marker

tracked = us.unit.tracked
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7)
normal = lambda k, *shape: jax.random.normal(jax.random.key(k), shape)

X = normal(9, 6, 4)
PARAMS = {"in": normal(0, 4, 5), "body": normal(1, 3, 5, 5) / 2, "out": normal(2, 5, 2)}


def layer(h, w):
    with jax.named_scope("layer"):
        return jnp.tanh(h @ w) + h


def unrolled(p, x):
    h = x @ p["in"]
    for k in range(3):
        h = layer(h, p["body"][k])
    return jnp.mean((h @ p["out"]) ** 2)


def scanned(p, x, step=layer):
    h, _ = jax.lax.scan(lambda h, w: (step(h, w), None), x @ p["in"], p["body"])
    return jnp.mean((h @ p["out"]) ** 2)


def rematerialized(p, x):
    return scanned(p, x, jax.checkpoint(layer))


def jitted(p, x):
    return scanned(p, x, jax.jit(layer))


def branched(p, x):
    step = lambda h, w: jax.lax.cond(h.sum() < 1e9, layer, lambda h, w: h - jnp.sin(h), h, w)
    return scanned(p, x, step)


LOSSES = {f.__name__: f for f in (unrolled, scanned, rematerialized, jitted, branched)}


def marked(fn, params, *args):
    """The function of the trained arrays that `tracked` differentiates."""
    staged = trace_call(fn, params, *args)
    marker = _Marker(staged, params)
    trained = [staged.operands[k] for k in marker.trained]
    loss = lambda xs: objective(marker.evaluate(dict(zip(marker.trained, xs, strict=True))))
    return loss, trained


def rows_of(scales, direction, primitive=None):
    found = [row for row in scales.rows if row.direction == direction]
    return [row for row in found if primitive in (None, row.primitive)]


def equal_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(a), jax.tree.leaves(b))


# --------------------------------------------------------------------------- nothing is changed


def one_by_one(fn, *args):
    """The equations of a function, evaluated each by itself, so that nothing is fused."""
    return us.trace.trace(fn, *args)(*args)


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_unchanged_in_every_bit(name):
    fn = LOSSES[name]
    loss, trained = marked(fn, PARAMS, X)
    for run in (one_by_one, lambda f, *args: jax.jit(f)(*args)):
        value, grads = run(jax.value_and_grad(loss), trained)
        plain_value, plain_grads = run(jax.value_and_grad(fn), PARAMS, X)
        equal_bits((value, grads), (plain_value, jax.tree.leaves(plain_grads)))


@pytest.mark.parametrize("name", LOSSES)
def test_the_result_is_that_of_the_function(name):
    equal_bits(tracked(LOSSES[name])(PARAMS, X)[0], LOSSES[name](PARAMS, X))
    got = jax.jit(tracked(LOSSES[name]))(PARAMS, X)[0]
    equal_bits(got, jax.jit(LOSSES[name])(PARAMS, X))


@pytest.mark.parametrize("name", zoo.COVER)
def test_a_model_is_unchanged_and_has_rows(name):
    model = zoo.model(name)
    if not model.differentiable:
        pytest.skip("it has no gradient in reverse mode")
    loss, trained = marked(model.loss, model.params, *model.inputs)
    value, grads = one_by_one(jax.value_and_grad(loss), trained)
    both = one_by_one(jax.value_and_grad(model.loss), model.params, *model.inputs)
    equal_bits((value, grads), (both[0], jax.tree.leaves(both[1])))
    scales = tracked(model.loss)(model.params, *model.inputs)[1]
    names = {row.parameter for row in rows_of(scales, "backward", "parameter")}
    assert names == set(us.tree.names(model.params))


def test_results_of_every_kind_come_back():
    def fn(p, x, *, flag):
        terms = {"a": us.Mean((x @ p["in"]).sum(1) ** 2, jnp.ones(6)), "b": jnp.float32(1.0)}
        return terms, {"flag": flag, "n": jnp.arange(3)}

    result, scales = tracked(fn)(PARAMS, X, flag="train")
    expected = fn(PARAMS, X, flag="train")
    assert result[1]["flag"] == "train"
    equal_bits((result[0], result[1]["n"]), (expected[0], expected[1]["n"]))
    assert rows_of(scales, "backward", "dot_general")


# ------------------------------------------------------------------- rows are what they say


class Added(_Marker):
    """An oracle without marks: a zero of its own is added to every value."""

    zeros = None

    def marked(self, key, x, said):
        if not us.tree.is_floating(x):
            return x
        number = self._numbers.setdefault(key, len(self._numbers))
        return x if self.zeros is None else x + self.zeros[number]


def gradients_of_zeros(fn, params, *args):
    staged = trace_call(fn, params, *args)
    marker = Added(staged, params)
    shapes = _shapes(staged, params)

    def loss(zeros):
        marker.zeros = zeros
        return objective(marker.evaluate({}))

    return jax.grad(loss)([jnp.zeros(shape) for shape in shapes])


def _shapes(staged, params):
    marker = _Marker(staged, params)
    jax.make_jaxpr(lambda: jax.tree.leaves(marker.evaluate({})))()
    return [value.shape for value in marker.values]


def gelu_block(p, x):
    h = jax.nn.gelu(x @ p["in"])
    h = h + jax.nn.relu(h @ p["body"][0]) * h
    return us.Mean(((jax.nn.softmax(h) @ p["out"]) ** 2).sum(1), jnp.arange(6.0))


@pytest.mark.parametrize("fn", [unrolled, gelu_block])
def test_a_gradient_is_that_with_respect_to_an_added_zero(fn):
    wanted = gradients_of_zeros(fn, PARAMS, X)
    rows = rows_of(tracked(fn)(PARAMS, X)[1], "backward")
    assert len(rows) > 12
    for row in rows:
        g = np.asarray(wanted[row.order], np.float64)
        assert row.shape == g.shape
        close(row.rms, np.sqrt(np.mean(g**2)))
        close(row.mean, g.mean())
        close(row.absmax, np.abs(g).max())


def test_whatever_lies_between_parameters_and_the_loss_has_a_gradient():
    scales = tracked(unrolled)(PARAMS, X)[1]
    having = {row.order for row in rows_of(scales, "backward")}
    lacking = [row for row in rows_of(scales, "forward") if row.order not in having]
    assert [row.primitive for row in lacking] == ["input"]


@pytest.mark.parametrize("name", ["scanned", "rematerialized", "jitted", "branched"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("primitive", ["tanh", "add", "dot_general"])
def test_turns_of_a_scan_are_the_layers_of_the_unrolled_loop(name, direction, primitive):
    inside = lambda scales: [r for r in rows_of(scales, direction, primitive) if r.scope == "layer"]
    (row,) = inside(tracked(LOSSES[name])(PARAMS, X)[1])
    layers = sorted(inside(tracked(unrolled)(PARAMS, X)[1]), key=lambda r: r.order)
    close(row.turns, [r.rms for r in layers])
    assert row.times == 3 and row.count == 3 * layers[0].count
    close(row.rms, np.sqrt(np.mean([r.rms**2 for r in layers])))
    close(row.mean, np.mean([r.mean for r in layers]))
    close(row.std**2 + row.mean**2, row.rms**2)
    assert row.absmax == pytest.approx(max(r.absmax for r in layers), rel=1e-5)
    assert row.smallest == pytest.approx(min(r.smallest for r in layers), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_under_jit_the_rows_are_the_same(name):
    eager, compiled = (
        f(PARAMS, X)[1] for f in (tracked(LOSSES[name]), jax.jit(tracked(LOSSES[name])))
    )
    about = lambda row: (row.direction, row.order, row.scope, row.primitive, row.shape, row.times)
    assert list(map(about, eager.rows)) == list(map(about, compiled.rows))
    close([r.rms for r in eager.rows], [r.rms for r in compiled.rows])


def test_gradients_of_parameters_are_those_of_the_gradient_station():
    def loss(p, batch):
        error = ((batch @ p["in"]) ** 2).sum(1)
        return {"a": us.Mean(error, jnp.arange(6.0)), "b": us.Mean(error.sum(), 6, coef=0.3)}

    params = {"in": PARAMS["in"]}
    grads = us.value_and_grad(loss)(params, X)[2]
    (row,) = rows_of(tracked(loss)(params, X)[1], "backward", "parameter")
    close(row.rms, np.sqrt(np.mean(np.square(grads["in"]))))


def test_rows_say_where_a_value_is_made():
    rows = tracked(gelu_block)(PARAMS, X)[1].rows
    products = [(r.parameter, r.shape, r.dtype) for r in rows if r.primitive == "dot_general"][:3]
    assert products == [(n, (6, k), "float32") for n, k in [("in", 5), ("body", 5), ("out", 2)]]
    orders = lambda direction: [r.order for r in rows if r.direction == direction]
    assert orders("forward") == list(range(len(orders("forward"))))
    assert orders("backward") == sorted(orders("backward"), reverse=True)


# --------------------------------------------------------------------------- numbers

DTYPES = ["float32", "bfloat16", "float16"]
SIZES = [0.0, 1.0, -1.0, 2.0**-9, 2.0**-10, -3 * 2.0**-10, 448.0, 449.0, -500.0, 2.0**-15]


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    x=hnp.arrays(
        np.float32,
        (3, 4),
        elements=st.one_of(
            st.sampled_from(SIZES), st.floats(-4, 4, width=32, allow_subnormal=False)
        ),
    )
)
def test_numbers_are_those_of_float64(dtype, x):
    x = jnp.asarray(x, dtype)
    x = jnp.where(jnp.abs(x) < 1e-6, jnp.zeros((), dtype), x)
    got = dict(zip(NUMBERS, np.asarray(measured(x, FORMATS["e4m3fn"])), strict=True))
    v = np.asarray(x, np.float64)
    size = np.abs(v)
    close(got["rms"], np.sqrt(np.mean(v**2)), atol=1e-30)
    close(got["mean"], v.mean(), atol=1e-6 * size.max())
    close(got["std"], v.std(), atol=1e-3 * size.max())
    assert got["absmax"] == size.max()
    assert got["smallest"] == min(size[size > 0], default=np.inf)
    rounded = np.asarray(round_to(x, "e4m3fn"), np.float64)
    close(got["zeros"], np.mean(v == 0))
    close(got["underflow"], np.mean((v != 0) & (rounded == 0)))
    close(got["saturated"], np.mean(size > 448))


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1.0, 1e12, 1e25])
def test_no_square_overflows_or_vanishes(size):
    x = np.float32(size) * normal(3, 100)
    rms, mean, std, *_ = np.asarray(measured(x, FORMATS["bf16"]))
    v = np.asarray(x, np.float64)
    close([rms, mean, std], [np.sqrt(np.mean(v**2)), v.mean(), v.std()], rtol=1e-4, atol=0)


def test_a_large_mean_does_not_hide_the_deviation():
    x = 1000 + normal(3, 1000)
    close(measured(x, FORMATS["bf16"])[2], np.std(np.asarray(x, np.float64)), rtol=1e-3)


@pytest.mark.parametrize("format", FORMATS)
def test_underflow_is_rounding_to_zero_in_every_format(format):
    spec = FORMATS[format]
    if spec.min_subnormal < 2.0**-120:
        pytest.skip("its smallest number is subnormal in float32, which devices flush")
    x = jnp.array([0.4, 0.5, 0.51, 1.0, 0.0]) * spec.min_subnormal
    x = jnp.concatenate([x, -x, jnp.array([spec.max, 1.1 * spec.max, 1.1 * spec.min])])
    got = np.asarray(measured(x, spec))
    rounded = round_to(x, spec)
    want = np.mean((np.asarray(x) != 0) & (np.asarray(rounded) == 0) & (np.asarray(x) >= spec.min))
    saturated = np.mean((np.asarray(x) > spec.max) | (np.asarray(x) < spec.min))
    close(got[7], saturated)
    assert not spec.signed or got[6] == np.float32(want)


def test_infinities_and_nan_show():
    inf, nan = (np.asarray(measured(jnp.array([1.0, x]), FORMATS["f16"])) for x in (np.inf, np.nan))
    assert inf[0] == inf[3] == np.inf and inf[7] == 0.5
    assert np.isnan(nan[0]) and np.isnan(nan[3])


def test_an_empty_value_has_zeros():
    loss = lambda p, x: jnp.sum(p) + jnp.sum(jnp.sin(x))
    rows = tracked(loss)(jnp.ones(2), jnp.ones((0, 3)))[1].rows
    assert [(r.rms, r.count) for r in rows if r.primitive == "sin"] == [(0.0, 0)]


def test_float64_is_measured_as_such():
    with jax.enable_x64(True):
        x = jnp.asarray(np.linspace(1, 2, 7))
        assert measured(x, FORMATS["e4m3fn"]).dtype == np.float64
        np.testing.assert_allclose(measured(x, FORMATS["e4m3fn"])[2], np.std(x), rtol=1e-14)


# --------------------------------------------------------------------------- what is not entered


def closed_loss(p, x):
    x = jnp.tile(x, (4, 1))
    steps = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2.0), (0, x[0, 0]))
    mesh = us.parallel.mesh(dp=8)
    local = lambda x: jnp.sin(x) * 2.0
    y = jax.shard_map(local, mesh=mesh, in_specs=P("dp"), out_specs=P("dp"))(x @ p["in"])
    return jnp.mean(jax.nn.relu(y)) + steps[1]


def test_what_is_not_entered_is_told_and_its_results_have_rows():
    loss = lambda p, x: closed_loss(p, x)
    scales = jax.jit(tracked(loss))(PARAMS, X)[1]
    assert dict(scales.closed) == {"custom_jvp_call": 1, "shard_map": 1, "while": 1}
    assert not [row for row in scales.rows if row.primitive == "sin"]
    forward = {row.primitive for row in rows_of(scales, "forward")}
    assert {"shard_map[<lambda>]", "while", "custom_jvp_call[relu]"} <= forward
    assert "Not entered" in str(scales) and "1 while" in str(scales)


def test_a_branch_that_is_not_taken_has_no_row():
    rows = tracked(branched)(PARAMS, X)[1].rows
    assert not [row for row in rows if row.primitive == "sin"]
    assert [row.times for row in rows if row.primitive == "tanh"] == [3, 3]


def test_marks_of_another_analysis_are_not_counted():
    plain = lambda p, x: jnp.mean(jnp.sin(x @ p["in"]) * 100)
    own = lambda p, x: jnp.mean(mark(jnp.sin(mark(x @ p["in"], at=3)) * 100, at=2))
    assert tracked(own)(PARAMS, X)[1].rows == tracked(plain)(PARAMS, X)[1].rows


def test_what_is_tracked_is_differentiated_as_the_function_is():
    grads, scales = jax.jit(jax.grad(tracked(scanned), has_aux=True))(PARAMS, X)
    equal_bits(grads, jax.jit(jax.grad(scanned))(PARAMS, X))
    assert len(scales.rows) == len(tracked(scanned)(PARAMS, X)[1].rows)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_is_unsharded(kind):
    mesh = jax.make_mesh((8,), ("dp",), axis_types=(kind,))
    x = jnp.tile(X, (4, 1))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("dp")))
        params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
        scales = jax.jit(tracked(unrolled))(params, sharded)[1]
    plain = tracked(unrolled)(PARAMS, x)[1]
    close([r.rms for r in scales.rows], [r.rms for r in plain.rows])


# --------------------------------------------------------------------------- the report


def test_the_report_is_a_table_data_and_a_pytree():
    scales = tracked(scanned)(PARAMS, X)[1]
    lines = str(scales).splitlines()
    assert lines[0].split()[:3] == ["pass", "order", "scope"]
    assert len(lines) == 1 + len(scales.rows) + 1 and "e4m3fn" in lines[-1]
    assert json.loads(json.dumps(scales.data()))[0]["primitive"] == "parameter"
    again = jax.tree.map(lambda x: x, scales)
    assert again == scales or again.rows == scales.rows


def test_scales_of_several_calls_are_taken_one_by_one():
    several = jax.vmap(tracked(unrolled), (None, 0))(PARAMS, jnp.stack([X, 2 * X]))[1]
    with pytest.raises(ValueError, match=r"several calls.*x\[0\]"):
        str(several)
    second = jax.tree.map(lambda x: x[1], several)
    close([r.rms for r in second.rows], [r.rms for r in tracked(unrolled)(PARAMS, 2 * X)[1].rows])


def test_rows_are_read_outside_of_jit():
    with pytest.raises(ValueError, match="Return the Scales from the jitted function"):
        jax.jit(lambda p, x: len(tracked(unrolled)(p, x)[1].rows))(PARAMS, X)


def test_a_picture_is_written(tmp_path):
    for name, fn in {"scan": scanned, "block": gelu_block}.items():
        tracked(fn, format="e5m2")(PARAMS, X)[1].plot(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_a_picture_names_layers_and_the_worst_rows():
    from unitscale_jax.unit._scales_plot import figure

    scales = tracked(scanned)(PARAMS, X)[1]
    fig = figure(scales)
    (axes,) = fig.axes
    assert {"arguments", "layer"} <= {tick.get_text() for tick in axes.get_xticklabels()}
    assert "program order" in axes.get_xlabel() and "log2" in axes.get_ylabel()
    legend = " ".join(text.get_text() for text in axes.get_legend().get_texts())
    worst = max(rows_of(scales, "backward"), key=lambda row: abs(np.log2(row.rms)))
    assert "farthest from an RMS of 1" in legend
    assert f"gradient of {worst.primitive}" in legend and f"RMS {worst.rms:.2g}" in legend


def test_a_few_rows_far_from_the_rest_do_not_press_them_into_a_line():
    from unitscale_jax.unit._scales_plot import figure

    mask = lambda x: jnp.where(x > 0, x, -1e30)
    loss = lambda p, x: unrolled(p, x) + jnp.mean(jax.nn.softmax(mask(x @ p["in"])) ** 2)
    (axes,) = figure(tracked(loss)(PARAMS, X)[1]).axes
    low, high = axes.get_ylim()
    assert -30 < low < -6 and 6 < high < 30


def test_zeros_and_infinities_have_a_place_in_the_picture(tmp_path):
    loss = lambda p, x: jnp.sum(p * 0.0) + jnp.sum(x / 0.0 * 0 + p)
    tracked(loss)(jnp.zeros(3), jnp.ones(3))[1].plot(tmp_path / "edge.svg")
    tracked(loss, format="int8")(jnp.zeros(3), jnp.ones(3))[1].plot(tmp_path / "edge.svg")


def test_without_matplotlib_the_way_out_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install matplotlib") as error:
        tracked(unrolled)(PARAMS, X)[1].plot(tmp_path / "no.png")
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------- errors


def test_errors_say_what_came_and_the_way_out():
    with pytest.raises(ValueError, match=r"array float32\[6,5\].*take the loss, not the model"):
        tracked(lambda p, x: x @ p["in"])(PARAMS, X)
    with pytest.raises(ValueError, match="no parameter is floating point"):
        tracked(lambda p, x: x.sum() * 1.0)({"n": jnp.arange(3)}, X)
    with pytest.raises(ValueError, match="unknown number format 'e9m9'"):
        tracked(unrolled, format="e9m9")
    with pytest.raises(TypeError, match="already holds its backward pass"):
        tracked(us.value_and_grad(unrolled))
