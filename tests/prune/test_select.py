"""Laws of exact selection: as a stable sort would choose, whatever the layout."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import unitscale_jax as us
from unitscale_jax.prune._select import MOST, exact_k, exact_k_of, n_of_m, order_key

DTYPES = ["float32", "bfloat16", "float16"]
SHAPES = [(1,), (7,), (4, 6), (2, 3, 4)]
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, -1e-42, 6e-8, 1.0, -1.0]

floats = st.sampled_from(SPECIAL) | st.floats(width=32) | st.integers(-2, 2).map(float)
select, select_of, select_each = map(jax.jit, (exact_k, exact_k_of, jax.vmap(exact_k)))
groups_of = jax.jit(n_of_m, static_argnums=(1, 2, 3))


def drawn(data, shape, dtype="float32"):
    scores = data.draw(hnp.arrays(np.float32, shape, elements=floats))
    with np.errstate(over="ignore"):
        return scores.astype(jnp.dtype(dtype))


def oracle(scores, k):
    """A stable sort on the host, of float64, where nothing is subnormal."""
    flat = np.asarray(scores).astype(np.float64).ravel()
    nan = np.isnan(flat)
    order = np.lexsort((np.arange(flat.size), -np.where(nan, 0, flat), nan))
    mask = np.zeros(flat.size, bool)
    mask[order[: int(k)]] = True
    return mask.reshape(np.shape(scores))


@functools.cache
def mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@given(data=st.data())
def test_keeps_exactly_k_of_any_scores(shape, dtype, data):
    scores = drawn(data, shape, dtype)
    k = data.draw(st.integers(0, scores.size))
    mask = np.asarray(select(scores, k))
    assert mask.dtype == bool and mask.sum() == k
    np.testing.assert_array_equal(mask, oracle(scores, k))


def test_an_empty_array_has_an_empty_mask():
    """As a branch without channels leaves it."""
    assert exact_k(jnp.zeros((0, 3)), 0).shape == (0, 3)
    empty, full = exact_k_of([jnp.zeros((0, 3)), jnp.ones(2)], 1)
    assert empty.shape == (0, 3) and full.tolist() == [True, False]
    assert jax.vmap(lambda x: exact_k(x, 0))(jnp.zeros((2, 0))).shape == (2, 0)


def test_k_is_data():
    traces = jax.jit(chex.assert_max_traces(lambda x, k: exact_k(x, k), n=1))
    scores = np.arange(6.0, dtype=np.float32)
    assert [int(traces(scores, k).sum()) for k in range(7)] == list(range(7))


def test_a_traced_k_out_of_range_is_the_nearer_end():
    scores = np.array([np.nan, 1, 2, 2], np.float32)
    assert not select(scores, -3).any() and select(scores, 9).all()


def test_worked_example():
    scores = jnp.array([3, 1, np.nan, 1, 1, 2, 0, -0.0])
    assert exact_k(scores, 3).tolist() == [1, 1, 0, 0, 0, 1, 0, 0]
    assert exact_k(scores, 7).tolist() == [1, 1, 0, 1, 1, 1, 1, 1]


def scores_that_peers_miscount():
    w = np.random.RandomState(0).randn(64, 64).astype(np.float32)
    zeros = w * (np.random.RandomState(1).rand(64, 64) < 0.3)
    return {"rounded": np.round(w * 4) / 4, "mostly zero": zeros, "nan": np.full_like(w, np.nan)}


@pytest.mark.parametrize("kind", ["rounded", "mostly zero", "nan"])
def test_ties_and_nan_do_not_change_how_many_stay(kind):
    scores = np.abs(scores_that_peers_miscount()[kind])
    assert int(select(scores, 2048).sum()) == 2048
    flat = np.sort(scores.ravel())
    assert (scores >= flat[2048]).sum() != 2048  # the threshold rules in use elsewhere


@pytest.mark.parametrize(("dtype", "rounds"), [("float32", 32), ("bfloat16", 16), ("float16", 16)])
def test_a_round_for_each_bit(dtype, rounds):
    text = str(jax.make_jaxpr(exact_k)(jnp.ones(5, dtype), 2))
    loops = [int(n) for n in re.findall(r"scan\[.*?length=(\d+)", text, re.DOTALL)]
    assert loops == [3, rounds] or loops == [rounds, 3]  # three bits of index


@given(data=st.data())
def test_keys_order_as_floats_do(data):
    a, b = drawn(data, (2,))
    key = np.asarray(order_key(jnp.array([a, b])))
    a, b = (np.float64(-np.inf if np.isnan(x) else x) for x in (a, b))
    if np.isinf([a, b]).sum() < 2:
        assert (key[0] < key[1]) == (a < b) and (key[0] == key[1]) == (a == b)
    assert order_key(jnp.array(np.nan)) < order_key(jnp.array(-np.inf))


def test_narrow_and_wide_floats_are_ranked_too():
    x = jnp.array([1.0, -2.0, 0.5, 448.0], jnp.float8_e4m3fn)
    assert exact_k(x, 2).tolist() == [1, 0, 0, 1]
    with jax.enable_x64(True):
        x = jnp.array([1.0, 1.0 + 1e-12, 0.0], jnp.float64)
        assert exact_k(x, 1).tolist() == [0, 1, 0]


@given(data=st.data())
def test_stacked_arrays_are_ranked_as_each_alone(data):
    scores = drawn(data, (3, 8))
    k = np.array(data.draw(st.lists(st.integers(0, 8), min_size=3, max_size=3)), np.int32)
    stacked = select_each(scores, k)
    np.testing.assert_array_equal(stacked, [oracle(x, n) for x, n in zip(scores, k, strict=True)])


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float16", "bfloat16")])
@given(data=st.data())
def test_several_arrays_are_ranked_as_one(dtypes, data):
    scores = [drawn(data, s, d) for s, d in zip([(5,), (3, 4)], dtypes, strict=True)]
    k = data.draw(st.integers(0, 17))
    masks = np.concatenate([np.ravel(mask) for mask in select_of(scores, k)])
    one = np.concatenate([np.asarray(x).astype(np.float64).ravel() for x in scores])
    np.testing.assert_array_equal(masks, oracle(one, k))


def test_worked_example_over_two_arrays():
    scores = [jnp.array([3.0, 1.0, 2.0]), jnp.array([2.0, 2.0, 5.0])]
    assert [m.tolist() for m in exact_k_of(scores, 3)] == [[1, 0, 1], [0, 0, 1]]
    assert [m.tolist() for m in exact_k_of(scores, 4)] == [[1, 0, 1], [1, 0, 1]]
    assert exact_k_of([], 0) == []


LAYOUTS = [P("x"), P(None, "y"), P("x", "y"), P("y", "x"), P(("x", "y"))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_sharded_array_has_the_same_mask_and_only_counts_travel(layout):
    sharding = NamedSharding(mesh(), layout)
    rng = np.random.default_rng(0)
    scores = np.round(rng.normal(size=(64, 32)) * 2).astype(np.float32)
    fn = jax.jit(exact_k, in_shardings=(sharding, None), out_shardings=sharding)
    compiled = fn.lower(jax.ShapeDtypeStruct(scores.shape, scores.dtype), 777).compile()
    mask = compiled(jax.device_put(scores, sharding), 777)
    np.testing.assert_array_equal(mask, oracle(scores, 777))
    sent = re.findall(
        r"= (\S+) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", compiled.as_text()
    )
    assert sent and {kind for _, kind in sent} == {"all-reduce"}
    assert all(re.fullmatch(r"s32\[\]\S*", shape) for shape, _ in sent)


@given(data=st.data())
def test_balanced_parts_stay_equally_full(data):
    scores, k = drawn(data, (8, 6)), data.draw(st.integers(0, 48))
    mask = np.asarray(balanced(scores, k))
    sizes = mask.reshape(4, -1).sum(1)
    assert mask.sum() == k and sizes.max() - sizes.min() <= 1
    alone = [oracle(part, n) for part, n in zip(scores.reshape(4, 2, 6), sizes, strict=True)]
    np.testing.assert_array_equal(mask.reshape(4, 2, 6), alone)


@given(data=st.data())
def test_parts_by_number_are_parts_by_device(data):
    """So that one device prunes as many do, and as few that hold several parts each."""
    scores, k = drawn(data, (8, 6)), data.draw(st.integers(0, 48))
    np.testing.assert_array_equal(in_parts(scores, k), balanced(scores, k))
    np.testing.assert_array_equal(in_parts(put(scores), k), balanced(scores, k))


@jax.jit
def in_parts(scores, k):
    return exact_k(scores, k, balanced=4)


def put(scores):
    """Over two devices, two parts each."""
    two = us.parallel.mesh(x=2, devices=jax.devices()[:2])
    return jax.device_put(scores, NamedSharding(two, P("x")))


def test_parts_that_do_not_divide_are_an_error():
    with pytest.raises(
        ValueError, match="axis 0 of the scores has 8, which 3 parts do not divide; .* 1, 2, 4, 8"
    ):
        exact_k(jnp.ones(8), 4, balanced=3)


@jax.jit
def balanced(scores, k):
    mine = lambda x, k: exact_k(x, k, balanced="x")
    return jax.shard_map(mine, mesh=mesh(), in_specs=(P("x"), P()), out_specs=P("x"))(scores, k)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (4, 4)])
@given(data=st.data())
def test_keeps_n_of_every_m(n, m, axis, data):
    scores = drawn(data, (8, 4))
    mask = np.asarray(groups_of(scores, n, m, axis))
    groups = np.moveaxis(mask, axis, -1).reshape(-1, m)
    ranked = np.moveaxis(scores, axis, -1).reshape(-1, m)
    np.testing.assert_array_equal(groups, [oracle(x, n) for x in ranked])
    again = groups_of(mask.astype(np.float32), n, m, axis)
    np.testing.assert_array_equal(again, mask)


def test_worked_example_of_2_of_4():
    w = jnp.array([[1.0, -4.0], [-1.0, 3.0], [1.0, 3.0], [0.0, -3.0]])
    assert n_of_m(jnp.abs(w), 2, 4, 0).tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: exact_k(jnp.ones(4), 5), ValueError, "k is 5, of 4 scores; it is from 0 to 4"),
        (lambda: exact_k(jnp.ones(4), -1), ValueError, "k is -1, of 4 scores"),
        (lambda: exact_k(jnp.ones(4), 0.5), TypeError, "k is 0.5; it is one whole number"),
        (lambda: exact_k(jnp.ones(4), jnp.arange(2)), TypeError, "For several use vmap"),
        (lambda: exact_k(jnp.arange(4), 2), TypeError, "scores are int32; ranks are of floating"),
        (lambda: n_of_m(jnp.ones(4), 3, 2, 0), ValueError, "3 of 2: n is from 1 to m"),
        (lambda: n_of_m(jnp.ones(6), 2, 4, 0), ValueError, "divisors are 1, 2, 3, 6"),
        (
            lambda: jax.eval_shape(
                exact_k, jax.ShapeDtypeStruct((2, 2**30), jnp.float32), jnp.int32(1)
            ),
            ValueError,
            "2,147,483,648 scores are ranked together, and counts are int32. Rank layers",
        ),
    ],
)
def test_errors_say_the_way_out(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_most_that_can_be_ranked_is_what_int32_counts():
    assert np.iinfo(np.int32).max == MOST
    big = jax.ShapeDtypeStruct((MOST,), jnp.bfloat16)
    assert jax.eval_shape(exact_k, big, jnp.int32(1)).shape == (MOST,)


def test_public_names():
    assert us.prune.exact_k is exact_k and us.prune.n_of_m is n_of_m
