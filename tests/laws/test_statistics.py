"""Laws of statistics: one pass serves every technique, and the calibrator owns its monoid."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from jax import lax

import unitscale_jax as us
from unitscale_jax import DotSpec, QSpec
from unitscale_jax.prune import NofM, SparsitySpec, Unstructured
from unitscale_jax.quant import EMA, MSE, Absmax, Fixed, Percentile
from unitscale_jax.statistics import over_batches

ROWS, IN, OUT = 6, 4, 3
W8 = DotSpec(w=QSpec(), x=QSpec())
SPARSE = SparsitySpec(patterns={"w": Unstructured()}, sparsity=0.5)
INT4 = {"w": DotSpec(w=QSpec(format="int4"), x=QSpec())}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dense(params, x):
    return x @ params["w"]


def layers(params, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]


def recurrent(params, x):
    return lax.scan(lambda h, _: (h @ params["w"] / 2, None), x, None, length=3)[0]


def by(calibrator, symmetric=True):
    return {"w": DotSpec(w=QSpec(), x=QSpec(calibrator=calibrator, symmetric=symmetric))}


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


W, X = {"w": normal(0, IN, OUT)}, normal(1, ROWS, IN)

# Calibrators as a user would write them.


@dataclasses.dataclass(frozen=True)
class Half(us.quant.Calibrator):
    """A bound that reads a maximum alone, so that everything follows from `bound`."""

    part: float = 0.5

    def bound(self, x, axes, error):
        return self.part * jnp.max(jnp.abs(x), axis=axes, keepdims=True)


@dataclasses.dataclass(frozen=True)
class HalfEnds(Half):
    """The same of two ends, for asymmetric codes."""

    two_sided = True

    def bounds(self, x, axes):
        return tuple(self.part * end for end in super().bounds(x, axes))


@dataclasses.dataclass(frozen=True)
class Rank(us.quant.Calibrator):
    """Like a percentile: the second largest magnitude, of which two are kept."""

    def bound(self, x, axes, error):
        flat = jnp.sort(jnp.abs(x), axis=axes[0])
        return jnp.take(flat, jnp.array([-2]), axis=axes[0])

    def measure(self, axes):
        top = lambda v: jnp.sort(v)[-2:]
        return us.statistics.Measure(
            measure=lambda x: top(jnp.abs(x).reshape(-1)),
            join=lambda a, b: top(jnp.concatenate([jnp.asarray(a), jnp.asarray(b)])),
            range=lambda numbers: numbers[0],
        )


@dataclasses.dataclass(frozen=True)
class Deviation(us.quant.Calibrator):
    """A state of three sums: twice the standard deviation about the mean."""

    def bound(self, x, axes, error):
        return 2 * jnp.std(x, axis=axes, keepdims=True)

    def measure(self, axes):
        def measure(x, where=None):
            ones = jnp.ones(x.shape) if where is None else where.astype(jnp.float32)
            return {"n": jnp.sum(ones), "x": jnp.sum(x * ones), "xx": jnp.sum(x * x * ones)}

        def read(s):
            return 2 * jnp.sqrt(jnp.maximum(s["xx"] / s["n"] - (s["x"] / s["n"]) ** 2, 0))

        return us.statistics.Measure(measure, lambda a, b: {k: a[k] + b[k] for k in a}, read)


@dataclasses.dataclass(frozen=True)
class Median(us.quant.Calibrator):
    """A bound of an order, without a measure."""

    def bound(self, x, axes, error):
        return jnp.median(jnp.abs(x), axis=axes, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Mine(us.quant.Calibrator):
    """A bound that asks for the quantization error."""

    def bound(self, x, axes, error):
        m = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
        return jnp.where(error(m) <= error(m / 2), m, m / 2)


@dataclasses.dataclass(frozen=True)
class Largest(us.quant.Calibrator):
    """`Absmax` by another hand."""

    clips = False
    two_sided = True

    def bound(self, x, axes, error):
        return jnp.max(jnp.abs(x), axis=axes, keepdims=True)


USERS = {
    "Half": (Half(), lambda x: 0.5 * np.abs(x).max()),
    "Rank": (Rank(), lambda x: np.sort(np.abs(x).ravel())[-2]),
    "Deviation": (Deviation(), lambda x: 2 * np.std(np.asarray(x, np.float64))),
    "Largest": (Largest(), lambda x: np.abs(x).max()),
}


# D1: what decides for weights decides for activations.


def test_the_program_of_a_calibrator_that_was_ignored():
    y, spec = jnp.linspace(-1, 1, 8).reshape(2, 4), QSpec(calibrator=Half())
    rules, ones = {"w": DotSpec(w=spec, x=spec)}, {"w": jnp.ones((4, 3))}
    codes = us.quantize(ones, us.quant.resolve(rules, dense, ones, y))["w"]
    assert float(codes.scale.max()) * 127 == pytest.approx(0.5)
    assert us.calibrate(dense, ones, [(y,)], rules)["w"].range.tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("name", USERS)
def test_a_calibrator_of_the_user_finds_the_bound_of_all_batches(name):
    calibrator, bound = USERS[name]
    for cuts in ([], [1], [2, 5], [1, 2, 3, 4, 5]):
        batches = [(x,) for x in np.split(np.asarray(X), cuts)]
        stat = us.calibrate(dense, W, batches, by(calibrator))["w"]
        np.testing.assert_allclose(stat.range, [-bound(X), bound(X)], rtol=1e-5)


@pytest.mark.parametrize("name", USERS)
@pytest.mark.parametrize("fn", [layers, recurrent])
def test_it_finds_those_of_layers_and_joins_those_of_turns(name, fn):
    calibrator, bound = USERS[name]
    stack = normal(2, 3, IN, IN) if fn is layers else normal(2, IN, IN)
    met, h = [], X
    for k in range(3):
        met.append(np.asarray(h))
        h = jnp.tanh(h @ stack[k]) if fn is layers else h @ stack / 2
    jitted = jax.jit(us.statistics.observed(fn, by(calibrator)))({"w": stack}, X)[1]["w"].range
    ends = us.calibrate(fn, {"w": stack}, [(X[:2],), (X[2:],)], by(calibrator))["w"].range
    met = met if fn is layers else [np.concatenate(met)]
    expected = np.array([bound(x) for x in met])
    np.testing.assert_allclose(ends[..., 1], expected, rtol=1e-4)
    np.testing.assert_allclose(jitted[..., 1], expected, rtol=1e-4)


@pytest.mark.parametrize("calibrator", [HalfEnds(), Largest(), Absmax()], ids=repr)
def test_two_ends_go_through_its_bounds(calibrator):
    ends = us.calibrate(dense, W, [(X[:2],), (X[2:],)], by(calibrator, symmetric=False))["w"].range
    part = getattr(calibrator, "part", 1.0)
    np.testing.assert_array_equal(ends, [part * np.min(X), part * np.max(X)])


def test_padding_counts_for_nothing_in_a_measure_of_the_user():
    mask = jnp.arange(ROWS) < 4
    seen = us.calibrate(
        dense, W, [(jnp.where(mask[:, None], X, 99.0),)], by(Deviation()), valid=lambda x: mask
    )
    alone = us.calibrate(dense, W, [(X[:4],)], by(Deviation()))
    np.testing.assert_allclose(seen["w"].range, alone["w"].range, rtol=1e-5)


def test_a_measure_that_cannot_leave_out_padding_says_so():
    with pytest.raises(ValueError, match="second parameter `where`"):
        us.calibrate(dense, W, [(X,)], by(Rank()), valid=lambda x: jnp.arange(ROWS) < 4)


@pytest.mark.parametrize("calibrator", [Median(), Mine()], ids=repr)
def test_a_class_that_no_measure_serves_is_refused_by_name(calibrator):
    message = rf"what meets w .*{type(calibrator).__name__}\(\) finds its bound from more.*measure"
    with pytest.raises(ValueError, match=message):
        us.calibrate(dense, W, [(X,)], by(calibrator))
    stats = us.calibrate(dense, W, [(X,)], by(calibrator), collect=("hessian",))
    assert stats["w"].range is None and stats["w"].hessian is not None


@pytest.mark.parametrize("name", USERS)
def test_training_is_serving_with_its_static_ranges(name):
    spec = QSpec(calibrator=USERS[name][0])
    rules = us.quant.resolve({"w": DotSpec(w=spec, x=spec)}, dense, W, X)
    stats = us.calibrate(dense, W, [(X / 2,)], rules)
    codes = us.quantize(W, rules, stats)
    train = jax.jit(lambda p, s, x: us.quantized(dense, rules, stats=s)(p, x))(W, stats, X)
    np.testing.assert_array_equal(train, jax.jit(us.quantized(dense))(codes, X))


def test_a_history_is_of_the_ranges_its_calibrator_finds():
    rules = by(Half())
    see = jax.jit(us.statistics.observed(dense, rules))
    history = us.quant.amax_history(see(W, X)[1], 2)
    for k in (4, 1, 1):
        history = jax.jit(lambda h, s: h.update(s))(history, see(W, k * X)[1])
    np.testing.assert_allclose(history["w"].range[1], 0.5 * jnp.abs(X).max())
    for calibrator in (EMA(), MSE()):
        with pytest.raises(ValueError, match=r"meets w has (EMA|MSE).*Absmax\(\)"):
            us.quant.amax_history(us.calibrate(dense, W, [(X,)], by(calibrator)))


def test_learned_scales_begin_at_the_range_its_calibrator_finds():
    rules = us.quant.resolve(by(Half()), dense, W, X)
    for collect in (("range",), ("range", "channels")):
        stats = us.calibrate(dense, W, [(X,)], rules, collect=collect)
        found = us.quant.learned(W, rules, stats)["w"].x_scale
        np.testing.assert_allclose(found, 0.5 * jnp.abs(X).max() / 127, rtol=1e-6)
    half = {"w": DotSpec(w=QSpec(axes=(-2,), calibrator=Half()))}
    with pytest.raises(ValueError, match="has no calibrator, and w has Half"):
        us.quant.learned(W, half)
    assert us.quant.learned(W, {"w": DotSpec(w=QSpec(axes=(-2,), calibrator=Largest()))})


@pytest.mark.parametrize(
    ("calibrator", "is_it"),
    [(Absmax(), True), (EMA(), True), (Largest(), True), (Percentile(100), True)]
    + [(c, False) for c in (Half(), Rank(), Median(), Mine(), MSE(), Fixed(1.0), Percentile(99.9))],
    ids=repr,
)
def test_a_bound_is_known_to_be_the_maximum_by_what_it_does(calibrator, is_it):
    assert calibrator.takes_the_maximum == is_it


# The monoid.

whole_numbers = hnp.arrays(np.float32, (ROWS, IN), elements=st.integers(-9, 9).map(float))
MEASURED = {"range": Absmax(), "counts": Percentile(75), "average": EMA(0.75)}
EVERY = ("range", "channels", "squares", "hessian")


@functools.partial(jax.jit, static_argnums=0)
def seen(calibrator, x):
    return us.statistics.observed(dense, by(calibrator), collect=EVERY)(W, x)[1]


@pytest.mark.parametrize("name", MEASURED)
@settings(max_examples=20)
@given(x=whole_numbers)
def test_merge_is_associative_and_commutative_but_for_a_moving_average(name, x):
    a, b, c = (seen(MEASURED[name], part) for part in np.split(x, 3))
    merge = us.statistics.merge_stats
    if name == "average":
        a, b = merge(a, a), merge(merge(a, a), a)
        same(a["w"].range, b["w"].range)
        return
    same(merge(merge(a, b), c), merge(a, merge(b, c)))
    same(merge(a, b), merge(b, a))


@settings(max_examples=5)
@given(x=whole_numbers, cuts=st.sets(st.integers(1, ROWS - 1)))
def test_batches_of_any_size_give_the_bits_of_one(x, cuts):
    batches = [(part,) for part in np.split(x, sorted(cuts))]
    for calibrator in (Absmax(), Percentile(75)):
        calibrated = lambda batches, c=calibrator: us.calibrate(
            dense, W, batches, by(c), collect=EVERY
        )
        whole, parts = calibrated([(x,)]), calibrated(batches)
        assert jax.tree.structure(whole) == jax.tree.structure(parts)
        same(whole, parts)


def test_a_second_pass_does_not_merge_with_that_of_other_batches():
    one, two = (us.calibrate(dense, W, [(k * X,)], by(MSE()))["w"] for k in (1, 2))
    assert one.merge(one).range.tolist() == one.range.tolist()
    with pytest.raises(ValueError, match=r"MSE.*takes two passes.*calibrate all batches together"):
        one.merge(two)


def test_numbers_of_batches_are_merged_in_order():
    measured = lambda params, x: (None, {"w": params * x.sum()})
    merge = lambda so_far, new: {"w": np.append(so_far["w"], new["w"])}
    total = over_batches(measured, 2.0, [jnp.ones(3), jnp.ones(5)], merge=merge)
    assert total["w"].tolist() == [6.0, 10.0]


# D2, K10: one pass for all.


def served_by(stats):
    rules = us.quant.resolve(INT4, dense, W, X)
    return {
        "gptq": us.quant.gptq(W, stats, rules)[0],
        "sparsegpt": us.prune.sparsegpt(W, stats, SPARSE)[:2],
        "wanda": us.prune.wanda_masks(W, stats, SPARSE),
        "refit": us.prune.refit(W, stats, us.prune.wanda_masks(W, stats, SPARSE)),
        "owl": us.prune.owl_ratios(W, stats),
    }


def test_one_pass_over_the_data_serves_quantization_and_pruning():
    calls = []

    def counted(params, x):
        jax.debug.callback(lambda: calls.append(0))
        return dense(params, x)

    stats = us.calibrate(counted, W, [(X[:2],), (X[2:],)], INT4, collect=("range", "hessian"))
    jax.effects_barrier()
    assert len(calls) == 2
    alone = us.prune.calibrate(dense, W, [(X[:2],), (X[2:],)], SPARSE, collect=("hessian",))
    assert us.prune.calibrate is us.calibrate and stats["w"].layout == alone["w"].layout
    mine, theirs = served_by(stats), served_by(alone)
    for name in mine.keys() - {"gptq"}:
        same(mine[name], theirs[name])
    same(mine["gptq"]["w"].codes, theirs["gptq"]["w"].codes)
    assert theirs["gptq"]["w"].input_range is None  # a pruning spec says nothing of activations
    rules = us.quant.resolve(INT4, dense, W, X)
    ranges = us.calibrate(dense, W, [(X[:2],), (X[2:],)], INT4)
    same(us.quantize(W, rules, stats), us.quantize(W, rules, ranges))


LACKING = {
    "gptq": (lambda s: us.quant.gptq(W, s, us.quant.resolve(INT4, dense, W, X)), "hessian"),
    "sparsegpt": (lambda s: us.prune.sparsegpt(W, s, SPARSE), "hessian"),
    "refit": (lambda s: us.prune.refit(W, s, {"w": jnp.ones((IN, OUT), bool)}), "hessian"),
    "wanda": (lambda s: us.prune.wanda(W, s), "squares"),
    "owl": (lambda s: us.prune.owl_ratios(W, s), "squares"),
    "smoothquant": (lambda s: us.quant.smoothquant(dense, W, s, INT4), "channels"),
    "awq": (lambda s: us.quant.awq(dense, W, s, INT4), "channels"),
}


@pytest.mark.parametrize("name", LACKING)
def test_a_consumer_that_lacks_a_measure_says_what_to_collect(name):
    consumer, kind = LACKING[name]
    with pytest.raises(ValueError, match=rf"what meets w: .*collect=\('{kind}',\)"):
        consumer(us.calibrate(dense, W, [(X,)], INT4))


def test_a_range_of_what_nothing_quantizes_is_refused():
    with pytest.raises(ValueError, match="these rules quantize none"):
        us.calibrate(dense, W, [(X,)], SPARSE, collect=("range",))


# D3: a pytree.


@pytest.mark.parametrize(
    "calibrator", [Absmax(), EMA(), Percentile(75), MSE(steps=3), Fixed(2.0), Half()], ids=repr
)
@pytest.mark.parametrize("fn", [dense, layers])
def test_statistics_go_through_trees_jit_and_checkpoints(calibrator, fn, tmp_path):
    params = W if fn is dense else {"w": normal(2, 2, IN, IN)}
    calibrated = lambda x: us.calibrate(
        fn, params, [(x[:2],), (x[2:],)], by(calibrator), collect=EVERY
    )
    stats, other = calibrated(X), calibrated(9 * X[:5])
    leaves, structure = jax.tree.flatten(stats)
    again = structure.unflatten(leaves)
    assert type(again) is us.statistics.Stats and again.keys() == stats.keys()
    saved = us.Checkpoints(tmp_path)
    saved.save(0, stats)
    restored = saved.restore(other)[1]
    jitted = jax.jit(lambda s: s)(jax.device_put(stats))
    donated = jax.jit(lambda s: (s, s["w"].range), donate_argnums=0)(jax.device_put(stats))
    for each in (again, restored, jitted, donated[0]):
        same(each["w"].range, stats["w"].range)
    np.testing.assert_allclose(donated[1], stats["w"].range, rtol=1e-6)
    same(restored, stats)
    if fn is dense:
        same(served_by(restored), served_by(stats))


# D4: the data has no opinion on inputs that no row used.


def experts(params, x, to):
    one = lambda v, i: jnp.where((to == i)[:, None], x, 0) @ v
    return jax.vmap(one)(params["e"], jnp.arange(2)).sum(0)


E, Y = {"e": normal(0, 2, 8, 4)}, normal(1, 6, 8)
TO = jnp.zeros(6, int)  # no row goes to expert 1
E_SPARSE = SparsitySpec(patterns={"e": Unstructured()}, sparsity=0.5, stacked={"e": 1})
UNSEEN = r"nothing but zeros met layer or expert 1 of 2 of e.*"


@pytest.mark.parametrize("format", ["int8", "int4", "e4m3fn"])
def test_an_expert_that_no_row_used_is_rounded_to_nearest(format):
    spec = {"e": DotSpec(w=QSpec(format=format))}
    rules = us.quant.resolve(spec, experts, E, Y, TO)
    stats = us.calibrate(experts, E, [(Y, TO)], rules, collect=("hessian",))
    with pytest.warns(UserWarning, match=UNSEEN + "rounded to nearest"):
        served, report = us.quant.gptq(E, stats, rules)
    nearest = us.quant.dequantize(us.quantize(E, rules))["e"]
    same(us.quant.dequantize(served)["e"][1], nearest[1])
    assert report.errors["e"].unseen == 8
    assert [line.split()[-1] for line in str(report).splitlines()] == ["unseen", "8"]


@pytest.mark.parametrize("pattern", [Unstructured(), NofM(2, 4, axis=-2)])
def test_an_expert_that_no_row_used_is_pruned_by_magnitude(pattern):
    spec = SparsitySpec(patterns={"e": pattern}, sparsity=0.5, stacked={"e": 1})
    stats = us.calibrate(experts, E, [(Y, TO)], spec, collect=("hessian",))
    by_magnitude = us.prune.make_masks(jax.tree.map(jnp.abs, E), spec)["e"]
    with pytest.warns(UserWarning, match=UNSEEN + "pruned by magnitude"):
        out, masks, report = us.prune.sparsegpt(E, stats, spec)
    assert [int(mask.sum()) for mask in masks["e"]] == [16, 16]
    same(masks["e"][1], by_magnitude[1])
    same(out["e"][1], jnp.where(by_magnitude[1], E["e"][1], 0))
    assert report.errors["e"].unseen == 8 and "unseen" in str(report).splitlines()[0]
    with pytest.warns(UserWarning, match=UNSEEN + "kept as they are"):
        again = us.prune.refit(E, stats, masks)["e"]
    same(again[1], out["e"][1])


@pytest.mark.parametrize("pattern", [Unstructured(), NofM(2, 4, axis=-2)])
def test_wanda_ranks_it_by_magnitude(pattern):
    spec = SparsitySpec(patterns={"e": pattern}, sparsity=0.5, stacked={"e": 1})
    stats = us.calibrate(experts, E, [(Y, TO)], spec)
    with pytest.warns(UserWarning, match=UNSEEN + "ranked by magnitude"):
        masks = us.prune.wanda_masks(E, stats, spec)["e"][1]
    rows, columns = np.indices(masks.shape)
    kept = np.where(masks, np.abs(E["e"][1]), np.inf)
    gone = np.where(masks, -np.inf, np.abs(E["e"][1]))
    axis = slice(0, 4) if isinstance(pattern, NofM) else slice(None)
    assert (kept[axis].min(0) >= gone[axis].max(0)).all() and masks.sum() == 16


@pytest.mark.parametrize("at", [0, 2, 7])
def test_one_input_that_no_row_used_is_kept_and_counted_without_a_warning(at):
    w, x = {"w": normal(3, 8, 6)}, Y.at[:, at].set(0)
    rules = us.quant.resolve(INT4, dense, w, x)
    stats = us.calibrate(dense, w, [(x,)], INT4, collect=("channels", "hessian"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        served, rounded = us.quant.gptq(w, stats, rules)
        out, masks, pruned = us.prune.sparsegpt(w, stats, SPARSE)
        wanda = us.prune.wanda_masks(w, stats, SPARSE)["w"]
        smooth = us.quant.awq(lambda p, x: (x * p["gain"]) @ p["w"], *gained(w, x))
    same(served["w"].codes[at], us.quantize(w, rules)["w"].codes[at])
    size = np.abs(w["w"][at])
    same(masks["w"][at], size >= np.sort(size)[3])
    same(out["w"][at], jnp.where(masks["w"][at], w["w"][at], 0))
    assert rounded.errors["w"].unseen == pruned.errors["w"].unseen == 1
    assert wanda[at].any()
    same(smooth["w"][at], w["w"][at])  # its steps are as fine as they were


def gained(w, x):
    params = {"gain": jnp.ones(8), "w": w["w"]}
    fn = lambda p, x: (x * p["gain"]) @ p["w"]
    rules = {"w": DotSpec(w=QSpec(format="int4"))}
    return params, us.calibrate(fn, params, [(x,)], rules, collect=("channels", "hessian")), rules


# G: keywords, and what is no array.


def test_batches_have_keywords_and_static_values():
    def fn(params, x, *, gain=1.0, train):
        return (x if train else 2 * x) * gain @ params["w"]

    rules, plain = {"w": W8}, us.calibrate(dense, W, [(2 * X,), (X,)], {"w": W8})
    shared = us.calibrate(fn, W, [(X,), (X / 2,)], rules, train=False)
    each = us.calibrate(fn, W, [((X,), {"train": False}), ((X,), {"train": True})], rules)
    arrays = us.calibrate(fn, W, [((X,), {"gain": jnp.float32(2)})], rules, train=True)
    for stats in (shared, each, arrays):
        same(stats["w"].range, plain["w"].range)
    assert each.inputs.kwargs == {"train": True} and each.inputs.args[0].shape == X.shape


# ------------------------------------------------------------ products inside of custom derivatives


@jax.custom_vjp
def with_vjp(w, x):
    return x @ w


with_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))


@jax.custom_jvp
def with_jvp(w, x):
    return x @ w


@with_jvp.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return x @ w, x @ dw + dx @ w


@jax.custom_vjp
def nested(w, x):
    return with_jvp(w, x)


nested.defvjp(lambda w, x: (with_jvp(w, x), (w, x)), lambda kept, g: (kept[1].T @ g, g @ kept[0].T))

DERIVED = {"vjp": with_vjp, "jvp": with_jvp, "nested": nested}
PLACES = {
    "alone": lambda times: lambda p, x: times(p["w"][0], x),
    "outside too": lambda times: lambda p, x: jnp.tanh(times(p["w"][0], x)) @ p["w"][1],
    "scan": lambda times: (
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(times(w, h)), None), x, p["w"])[0]
    ),
    "vmap": lambda times: lambda p, x: jax.vmap(times, (0, None))(p["w"], x).sum(0),
    "remat": lambda times: jax.checkpoint(lambda p, x: times(p["w"][0], x)),
}


@pytest.mark.parametrize(
    ("place", "kind"), [*((p, "nested") for p in PLACES), ("outside too", "jvp"), ("scan", "vjp")]
)
def test_products_inside_of_custom_derivatives_are_measured_as_any_other(place, kind):
    fn, plain = PLACES[place](DERIVED[kind]), PLACES[place](lambda w, x: x @ w)
    params = {"w": normal(5, 2, IN, IN)}
    found = [
        us.calibrate(f, params, [(X,)], {"w": W8}, collect=("range", "hessian"))
        for f in (fn, plain)
    ]
    assert found[0]["w"].layout == found[1]["w"].layout
    same(*found)


def test_measuring_leaves_a_custom_derivative_as_it_is():
    ruled = jax.custom_vjp(lambda w, x: x @ w)
    ruled.defvjp(lambda w, x: (x @ w, w), lambda w, g: (jnp.full_like(w, 7.0), g @ w.T))
    fn = lambda p, x: ruled(p["w"], x).sum()
    value = lambda p: us.statistics.observed(fn, {"w": W8})(p, X)
    grads, stats = jax.grad(value, has_aux=True)(W)
    same(grads, {"w": jnp.full_like(W["w"], 7.0)})
    same(stats["w"].range, us.statistics.observed(dense, {"w": W8})(W, X)[1]["w"].range)


def test_what_a_custom_derivative_does_in_a_while_loop_is_refused_by_name():
    looped = jax.custom_jvp(lambda w, x: lax.while_loop(lambda x: x.sum() > 9, lambda x: x @ w, x))
    looped.defjvp(lambda primals, tangents: (looped(*primals), tangents[1]))
    fn = lambda p, x: looped(p["w"], x) @ p["w"]
    with pytest.raises(ValueError, match="w meets a dot_general inside of while"):
        us.calibrate(fn, {"w": W["w"][:3]}, [(X[:, :3],)], {"w": W8})
