"""Laws of calibration: what adds up, what is per layer, and what does not count."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax

import unitscale_jax as us
from unitscale_jax import DotSpec, QSpec
from unitscale_jax.quant import EMA, MSE, Absmax, Fixed, Percentile
from unitscale_jax.statistics import calibrate, merge_stats, observed

ALL = ("range", "channels", "hessian")
STATIC = DotSpec(w=QSpec(), x=QSpec())
floats = functools.partial(hnp.arrays, np.float32, elements=st.floats(-100, 100, width=32))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dense(params, x):
    return x @ params["w"]


def by(calibrator, **spec):
    return {"w": DotSpec(w=QSpec(), x=QSpec(calibrator=calibrator, **spec))}


def range_of(fn, params, batches, rules, **options):
    return np.asarray(calibrate(fn, params, batches, rules, **options)["w"].range)


W = {"w": normal(0, 4, 3)}


# What is observed is the function itself.


def layers(params, x):
    step = jax.checkpoint(lambda h, w: (jax.nn.relu(h @ w), None))
    return lax.scan(step, x, params["w"])[0]


def attention(params, x):
    q, k = (jnp.einsum("td,dhk->thk", x, params[n]) for n in ("w", "k"))
    return jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))


def convolved(params, x):
    return lax.conv_general_dilated(
        x,
        params["w"],
        (2, 1),
        "SAME",
        rhs_dilation=(1, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


PROGRAMS = {
    "dense": (dense, W, normal(1, 5, 4)),
    "layers": (layers, {"w": normal(2, 3, 4, 4)}, normal(1, 5, 4)),
    "attention": (attention, {"w": normal(3, 4, 2, 3), "k": normal(4, 4, 2, 3)}, normal(1, 5, 4)),
    "conv": (convolved, {"w": normal(5, 3, 2, 4, 2)}, normal(6, 2, 6, 5, 4)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_result_is_that_of_the_function(name):
    fn, params, x = PROGRAMS[name]
    y, stats = jax.jit(observed(fn, {"w": STATIC}, collect=ALL))(params, x)
    chex.assert_trees_all_close(y, jax.jit(fn)(params, x), rtol=1e-5)
    assert list(stats) == ["w"]


# Statistics add up.


@functools.partial(jax.jit, static_argnums=(0, 1))  # shapes are few, so compilations are
def seen(calibrator, symmetric, x):
    rules = by(calibrator, **({} if symmetric else {"symmetric": False}))
    return observed(dense, rules, collect=ALL)(W, x)[1]


def same_range(a, b):
    np.testing.assert_array_equal(np.asarray(a["w"].range), np.asarray(b["w"].range))


@pytest.mark.parametrize("calibrator", [Absmax(), Percentile(60), Percentile(100)])
@pytest.mark.parametrize("cut", [1, 3, 5])
@given(x=floats((6, 4)))
def test_batches_may_be_split_and_ordered_at_will(calibrator, cut, x):
    first, second, whole = (seen(calibrator, True, part) for part in (x[:cut], x[cut:], x))
    for both in (merge_stats(first, second), merge_stats(second, first)):
        same_range(both, whole)
        np.testing.assert_array_equal(both["w"].peak, whole["w"].peak)
        assert both["w"].rows == 6
        np.testing.assert_allclose(both["w"].mean, whole["w"].mean, rtol=1e-5)
        np.testing.assert_allclose(both["w"].hessian, whole["w"].hessian, rtol=1e-4, atol=1e-2)


@given(x=floats((6, 4)))
def test_an_asymmetric_range_contains_zero_and_everything(x):
    first, second = (seen(Absmax(), False, part) for part in (x[:2], x[2:]))
    ends = np.asarray(merge_stats(first, second)["w"].range)
    np.testing.assert_array_equal(ends, [min(x.min(), 0), max(x.max(), 0)])


@pytest.mark.parametrize("p", [0.1, 37.5, 50, 90, 99.9, 100])
@given(x=floats((6, 4)))
def test_a_percentile_is_the_exact_one_but_for_its_bin(p, x):
    m = float(np.asarray(seen(Percentile(p), True, x)["w"].range)[1])
    exact = float(np.sort(np.abs(x).ravel())[Percentile(p).rank(x.size) - 1])
    assert exact <= m <= exact * (1 + 2**-5) + 2.0**-126
    if p == 100:
        assert m == np.abs(x).max()


def test_a_moving_average_follows_the_order():
    batches = [normal(k, 3, 4) * (k + 1) for k in range(4)]
    largest = [float(jnp.max(jnp.abs(x))) for x in batches]
    m = largest[0]
    for new in largest[1:]:
        m = 0.75 * m + 0.25 * new
    rules = by(EMA(0.75))
    ends = range_of(dense, W, batches, rules)
    np.testing.assert_allclose(ends, [-m, m], rtol=1e-6)
    assert range_of(dense, W, batches[::-1], rules)[1] != ends[1]


@given(x=floats((2, 4)))
def test_the_moving_average_of_a_constant_is_it(x):
    one = seen(EMA(0.9), True, x)
    same_range(merge_stats(merge_stats(one, one), one), one)


def test_a_moving_average_is_carried_by_a_jitted_step():
    rules = by(EMA(0.5))

    @jax.jit
    def step(stats, x):
        return merge_stats(stats, observed(dense, rules)(W, x)[1])

    stats = observed(dense, rules)(W, jnp.full((1, 4), 2.0))[1]
    assert step(stats, jnp.full((1, 4), 4.0))["w"].range.tolist() == [-3.0, 3.0]


def test_a_fixed_range_is_given():
    x = [normal(1, 2, 4)]
    assert range_of(dense, W, x, by(Fixed(2.0))).tolist() == [-2, 2]
    assert range_of(dense, W, x, by(Fixed(-1.0, 3.0), symmetric=False)).tolist() == [-1, 3]


def clipped_error(x, m, bits):
    """Squared error, relative, of codes with a given largest number."""
    q = 2 ** (bits - 1) - 1
    off = np.clip(np.rint(x * (q / m)), -q, q) * (m / q) - x
    return float((off**2).sum() / (x**2).sum())


def t3(seed, *shape):
    return np.random.default_rng(seed).standard_t(3, size=shape).astype(np.float32)


def test_the_least_squared_error_is_never_worse_than_the_largest_magnitude():
    batches = [t3(k, 64, 4) for k in range(4)]
    whole = np.concatenate(batches)
    error = {
        name: clipped_error(whole, range_of(dense, W, batches, by(c, format="int4"))[1], 4)
        for name, c in {"max": Absmax(), "mse": MSE(), "99.5": Percentile(99.5)}.items()
    }
    most = range_of(dense, W, batches, by(Absmax()))[1]
    tried = [clipped_error(whole, r * most, 4) for r in MSE().ratios]
    assert error["mse"] == pytest.approx(min(tried), rel=1e-5)
    assert error["mse"] < 0.77 * error["max"] and error["99.5"] < 0.9 * error["max"]


# Stacked layers.


def by_hand(w, x):
    """The largest magnitude that meets each layer."""
    found = []
    for layer in w:
        found.append(float(jnp.max(jnp.abs(x))))
        x = jax.nn.relu(x @ layer)
    return np.array(found)


@pytest.mark.parametrize("calibrator", [Absmax(), Percentile(100), MSE(least=1.0, steps=1)])
def test_each_layer_of_a_scan_has_its_own_range(calibrator):
    fn, params, x = PROGRAMS["layers"]
    ends = range_of(fn, params, [x, 2 * x], by(calibrator))
    assert ends.shape == (3, 2)
    m = np.maximum(by_hand(params["w"], x), by_hand(params["w"], 2 * x))
    np.testing.assert_allclose(ends, np.stack([-m, m], -1), rtol=1e-6)


def test_the_second_pass_tries_each_layer_s_own_fractions():
    params = {"w": jnp.stack([jnp.eye(4), jnp.eye(4), jnp.eye(4)])}
    scaled = lambda p, x: lax.scan(lambda h, w: (jnp.sinh(h @ w), None), x, p["w"])[0]
    x = jnp.asarray(t3(0, 64, 4)) / 8
    ends = range_of(scaled, params, [x], by(MSE(), format="int4"))
    for end in ends:
        alone = range_of(dense, {"w": jnp.eye(4)}, [x], by(MSE(), format="int4"))
        np.testing.assert_allclose(end, alone, rtol=1e-6)
        x = jnp.sinh(x)


def test_nested_scans_have_a_range_for_each_pair():
    def nested(params, x):
        inner = lambda h, w: (h @ w, None)
        return lax.scan(lambda h, ws: (lax.scan(inner, h, ws)[0], None), x, params["w"])[0]

    params = {"w": jnp.broadcast_to(2 * jnp.eye(4), (2, 3, 4, 4))}
    ends = range_of(nested, params, [jnp.ones((1, 4))], by(Absmax()))
    np.testing.assert_array_equal(ends[..., 1], [[1, 2, 4], [8, 16, 32]])


def test_a_reversed_scan_keeps_the_rows_of_the_parameter():
    fn = lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, p["w"], reverse=True)[0]
    params = {"w": jnp.broadcast_to(2 * jnp.eye(4), (3, 4, 4))}
    assert range_of(fn, params, [jnp.ones((1, 4))], by(Absmax()))[:, 1].tolist() == [4, 2, 1]


def flipped(params, x):
    return lax.scan(lambda h, w: (h @ w, None), x, params["w"][::-1])[0]


def unrolled(params, x):
    for k in range(3):
        x = x @ params["w"][k]
    return x


def moved(params, x):
    return lax.scan(lambda h, w: (h @ w, None), x, jnp.moveaxis(params["w"], 1, 0))[0]


def recurrent(params, x):
    return lax.scan(lambda h, _: (h @ params["w"], None), x, None, length=3)[0]


@pytest.mark.parametrize("fn", [flipped, unrolled, moved, recurrent])
def test_what_is_not_one_row_of_the_parameter_each_has_one_range(fn):
    twice = 2 * jnp.eye(4)
    where = {flipped: (3, 4, 4), unrolled: (3, 4, 4), moved: (4, 3, 4), recurrent: (4, 4)}[fn]
    stack = jnp.broadcast_to(twice[:, None] if fn is moved else twice, where)
    assert range_of(fn, {"w": stack}, [jnp.ones((1, 4))], by(Absmax())).tolist() == [-4, 4]


def test_uses_of_one_parameter_are_merged():
    fn = lambda p, x: (x @ p["w"]) @ p["w"].T + (3 * x) @ p["w"] @ jnp.ones((3, 4))
    rules = {"w": DotSpec(w=QSpec(axes=(-2,)), x=QSpec())}
    x = normal(1, 5, 4)
    m = max(float(jnp.max(jnp.abs(v))) for v in (x, x @ W["w"], 3 * x))
    np.testing.assert_allclose(range_of(fn, W, [x], rules)[1], m, rtol=1e-6)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("spec", [QSpec(calibrator=Percentile(95)), QSpec(symmetric=False)])
def test_training_is_serving_with_static_ranges(name, spec):
    fn, params, x = PROGRAMS[name]
    rules = {"w": DotSpec(w=QSpec(), x=spec)}
    stats = calibrate(fn, params, [x, -x], rules)
    served = us.quantize(params, us.quant.resolve(rules, fn, params, x), stats)
    assert served["w"].input_range.dtype == np.float32
    train = jax.jit(us.quantized(fn, rules, stats=stats))(params, x)
    chex.assert_trees_all_equal(jax.jit(us.quantized(fn))(served, x), train)
    off = jnp.linalg.norm(train - fn(params, x)) / jnp.linalg.norm(fn(params, x))
    assert 0 < off < 0.3


# Second moments, against sums written out.


def experts(params, x):
    return jnp.einsum("eri,eio->ero", x, params["w"])


MOMENTS = {
    "dense": (dense, (4, 3), (5, 4), "ri,rj->ij", "ri"),
    "left": (lambda p, x: p["w"] @ x, (3, 4), (4, 5), "ir,jr->ij", "ir"),
    "heads": (lambda p, x: jnp.einsum("rhk,hkd->rd", x, p["w"]), (2, 3, 4), (5, 2, 3), None, None),
    "swapped": (
        lambda p, x: jnp.einsum("rkh,hkd->rd", x, p["w"]),
        (2, 3, 4),
        (5, 3, 2),
        None,
        None,
    ),
    "experts": (experts, (2, 4, 3), (2, 5, 4), "eri,erj->eij", "eri"),
    "vmapped": (
        lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]),
        (2, 4, 3),
        (5, 4),
        "ri,rj->ij",
        "ri",
    ),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_are_in_the_order_of_the_parameter(name):
    fn, shape, of_x, moments, letters = MOMENTS[name]
    params, x = {"w": normal(7, *shape)}, normal(8, *of_x)
    stat = calibrate(fn, params, [x[:], 2 * x], {"w": DotSpec()}, collect=ALL)["w"]
    flat = np.asarray(x, np.float64)
    if moments is None:
        flat = (flat if name == "heads" else flat.swapaxes(1, 2)).reshape(5, -1)
        moments, letters = "ri,rj->ij", "ri"
    np.testing.assert_allclose(stat.hessian, 5 * np.einsum(moments, flat, flat), rtol=1e-5)
    rows = letters.index("r")
    np.testing.assert_allclose(stat.peak, 2 * np.abs(flat).max(rows), rtol=1e-6)
    np.testing.assert_allclose(stat.mean, 1.5 * np.abs(flat).mean(rows), rtol=1e-5)
    assert stat.range is None and stat.hessian.dtype == np.float64


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("order", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")])
def test_a_convolution_has_the_moments_of_its_windows(padding, order):
    def fn(params, x):
        return lax.conv_general_dilated(
            x, params["w"], (2, 1), padding, rhs_dilation=(1, 2), dimension_numbers=order
        )

    last = order[0] == "NHWC"
    w = normal(1, 3, 2, 4, 5) if last else normal(1, 5, 4, 3, 2)
    x = normal(2, 2, 7, 6, 4) if last else normal(2, 2, 4, 7, 6)
    stat = calibrate(fn, {"w": w}, [x], {"w": DotSpec()}, collect=ALL)["w"]
    flat = w.reshape(-1, 5) if last else w.reshape(5, -1).T
    y = fn({"w": w}, x)
    np.testing.assert_allclose(
        np.einsum("kn,kl,ln->", flat, stat.hessian, flat), (y**2).sum(), rtol=1e-5
    )
    assert stat.peak.shape == (4,)
    np.testing.assert_array_equal(stat.peak, np.abs(x).max((0, 1, 2) if last else (0, 2, 3)))


def test_stacked_layers_have_moments_each():
    fn, params, x = PROGRAMS["layers"]
    stat = calibrate(fn, params, [x], {"w": DotSpec()}, collect=ALL)["w"]
    for k in range(3):
        np.testing.assert_allclose(stat.hessian[k], x.T @ x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(stat.mean[k], jnp.mean(jnp.abs(x), 0), rtol=1e-5)
        x = jax.nn.relu(x @ params["w"][k])


# What does not count.


@pytest.mark.parametrize("flatten", [False, True])
def test_padding_does_not_count(flatten):
    def fn(params, batch):
        x = batch["x"].reshape(-1, 4) if flatten else batch["x"]
        return x @ params["w"]

    x, mask = normal(1, 3, 5, 4), jnp.arange(5)[None] < jnp.array([[5], [2], [3]])
    padded = {"x": jnp.where(mask[..., None], x, 1e4), "mask": mask}
    rules = by(Percentile(80))
    stats = calibrate(fn, W, [padded], rules, collect=ALL, valid=lambda batch: batch["mask"])["w"]
    alone = calibrate(dense, W, [x[mask]], rules, collect=ALL)["w"]
    np.testing.assert_array_equal(stats.range, alone.range)
    assert stats.rows == alone.rows == 10
    counts = lambda stat: stat.numbers["range"]["counts"]
    np.testing.assert_array_equal(counts(stats), counts(alone))
    np.testing.assert_array_equal(stats.peak, alone.peak)
    for name in ("mean", "hessian"):
        np.testing.assert_allclose(getattr(stats, name), getattr(alone, name), rtol=1e-5)


def test_a_branch_that_is_not_taken_counts_for_nothing():
    def fn(params, x, flag):
        return lax.cond(flag, lambda x: x @ params["w"], lambda x: (10 * x) @ params["w"], x)

    x = normal(1, 5, 4)
    once = calibrate(fn, W, [(x, True)], by(Percentile(50)), collect=ALL)["w"]
    alone = calibrate(dense, W, [x], by(Percentile(50)), collect=ALL)["w"]
    np.testing.assert_array_equal(once.range, alone.range)
    assert once.rows == 5
    both = calibrate(fn, W, [(x, True), (x, False)], by(Absmax()))["w"]
    np.testing.assert_allclose(both.range[1], 10 * jnp.max(jnp.abs(x)), rtol=1e-6)


# Errors say what to do.


def spinning(params, x):
    return lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ params["w"], x)


def never(params, x):
    return lax.cond(jnp.sum(x) > 1e9, lambda x: x @ params["w"], lambda x: x[:, :3], x)


X = normal(1, 5, 4)
ERRORS = {
    "no batches": (lambda: calibrate(dense, W, [], by(Absmax())), "no batches"),
    "used up": (lambda: calibrate(dense, W, iter(()), by(Absmax())), "an iterator that was used"),
    "unmatched": (lambda: calibrate(dense, W, [X], {"v": STATIC}), "'v', matched none.*'w'"),
    "iterator": (
        lambda: calibrate(dense, W, iter([X]), by(MSE())),
        "what meets w takes two passes",
    ),
    "nothing": (lambda: calibrate(dense, W, [X], {"w": DotSpec()}), "no rule has anything"),
    "nan": (
        lambda: calibrate(dense, W, [X.at[0, 0].set(jnp.nan)], by(Absmax())),
        "w is not finite",
    ),
    "inf": (
        lambda: calibrate(dense, W, [X.at[0, 0].set(jnp.inf)], by(Absmax())),
        "w is not finite",
    ),
    "while": (
        lambda: calibrate(spinning, {"w": jnp.eye(4)}, [X], by(Absmax())),
        "w meets a dot_general inside of while",
    ),
    "never": (lambda: calibrate(never, W, [X], by(Absmax())), "nothing met w"),
    "kinds": (
        lambda: observed(dense, {"w": STATIC}, collect=["rnge"]),
        r"collect is \['rnge'\]; expected some of range",
    ),
    "quantized": (
        lambda: calibrate(
            dense, us.quantize(W, {"w": DotSpec(w=QSpec(axes=(-2,)))}), [X], {"w": STATIC}
        ),
        "w: quantized already",
    ),
    "valid": (
        lambda: calibrate(
            lambda p, x: x.T @ p["w"],
            {"w": normal(0, 5, 2)},
            [X],
            by(Absmax()),
            valid=lambda x: jnp.ones(5, bool),
        ),
        r"valid has shape \(5,\).* w has rows \(4,\)",
    ),
    "ragged": (
        lambda: calibrate(
            lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 3], jnp.int32)),
            {"w": normal(0, 2, 4, 3)},
            [X],
            {"w": DotSpec()},
            collect=["hessian"],
        ),
        "w in ragged_dot_general has no input channels",
    ),
    "merged": (
        lambda: calibrate(
            lambda p, x: x @ p["w"].transpose(1, 0, 2).reshape(4, 3),
            {"w": normal(0, 2, 2, 3)},
            [X],
            {"w": DotSpec()},
            collect=["channels"],
        ),
        "w in dot_general has no input channels",
    ),
    "keys": (lambda: merge_stats(seen(Absmax(), True, X), {}), "only one of the two.*: w|of w"),
    "specs": (lambda: merge_stats(seen(Absmax(), True, X), seen(EMA(), True, X)), "do not merge"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_says_what_to_do(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_of_another_model_are_an_error():
    x = normal(1, 5, 4)
    rules = by(Absmax())
    stats = calibrate(dense, W, [x], rules)
    other = {"v": W["w"]}
    fn, named = (lambda p, x: x @ p["v"]), {"v": rules["w"]}
    with pytest.raises(ValueError, match="stats are of w, and there is no such parameter"):
        us.quantized(fn, named, stats=stats)(other, x)
    with pytest.raises(ValueError, match="stats are of w, and there is no such parameter"):
        us.quantize(other, us.quant.resolve(named, fn, other, x), stats)
