"""Laws of sub-models on different devices: merged they are the merge of their results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from tests.support.sharded import assert_near
from tests.support.zoo._model import activations
from unitscale_jax.parallel import merged, mesh, pack, unpack

ROWS, WIDTH, OUT = 4, 6, 5


def two(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


FNS = [two, two, lambda p, x: x @ p["a"], lambda p, x: x[:, :OUT] * p["s"]]
FOREST = [
    {"a": activations(WIDTH, 3, seed=0), "b": activations(3, OUT, seed=1)},
    {"a": activations(WIDTH, 8, seed=2), "b": activations(8, OUT, seed=3)},
    {"a": activations(WIDTH, OUT, seed=4)},
    {"s": activations(OUT, seed=5)},
]
WIDE = [*FNS[:2], lambda p, x: (x @ p["a"])[:, :2], lambda p, x: x[:, :1] * p["s"][:1]]
X, GATES = activations(ROWS, WIDTH, seed=6), activations(ROWS, 4, seed=7)

HOWS = {
    "sum": lambda ys: sum(ys),
    "mean": lambda ys: sum(ys) / len(ys),
    "concat": lambda ys: jnp.concatenate(ys, axis=-1),
    "weighted": lambda ys: sum(GATES[:, i, None] * y for i, y in enumerate(ys)),
    "largest": lambda ys: jnp.max(jnp.stack(ys), axis=0),
}


def value_and_grads(fn, *args):
    return jax.value_and_grad(lambda *xs: jnp.sum(jnp.sin(fn(*xs))), tuple(range(len(args))))(*args)


def law(how, fns, sizes):
    """`merged` on a mesh against the functions one by one, and against its own sum alone."""
    packed, kwargs = pack(FOREST), {"weights": GATES} if how == "weighted" else {}
    kind = functools.partial(jnp.max, axis=0) if how == "largest" else how
    together = functools.partial(merged(fns, kind), **kwargs)
    alone = lambda p, x: HOWS[how]([fn(unpack(p, i), x) for i, fn in enumerate(fns)])
    devices = mesh(**sizes)
    placed = jax.device_put(packed, NamedSharding(devices, P("branch")))
    with jax.set_mesh(devices):
        got = jax.jit(functools.partial(value_and_grads, together))(placed, X)
    assert_near(got, jax.jit(functools.partial(value_and_grads, alone))(packed, X))
    return placed


@pytest.mark.parametrize("how", HOWS)
def test_merged_is_the_merge_of_its_parts_with_its_gradients(how):
    placed = law(how, WIDE if how == "concat" else FNS, dict(branch=4, dp=2))
    assert placed.rows["float32"].sharding.shard_shape(placed.rows["float32"].shape)[0] == 1


@pytest.mark.parametrize(("how", "branch"), [("concat", 1), ("mean", 2), ("weighted", 2)])
def test_several_sub_models_share_a_device(how, branch):
    law(how, WIDE if how == "concat" else FNS, dict(branch=branch, dp=8 // branch))


def test_an_axis_of_one_device_is_the_composition_to_the_bit():
    packed = pack(FOREST)
    with jax.set_mesh(mesh(branch=1, devices=jax.devices()[:1])):
        got = jax.jit(merged(FNS, "sum"))(packed, X)
    alone = jax.jit(
        lambda p: functools.reduce(jnp.add, [f(unpack(p, i), X) for i, f in enumerate(FNS)])
    )
    np.testing.assert_array_equal(got, alone(packed))


def test_one_function_of_stacked_parameters_and_trees_of_outputs():
    """An ensemble: leaves keep their names, outputs may be a tree, gates are trained too."""
    stacked = {"a": activations(4, WIDTH, 3, seed=8), "b": activations(4, 3, OUT, seed=9)}
    fn = lambda p, x: {"y": two(p, x), "norm": jnp.sum(p["a"] ** 2)}
    loss = lambda out: jnp.sum(jnp.sin(out["y"])) + out["norm"]

    def alone(p, w):
        outs = [fn(jax.tree.map(lambda x, i=i: x[i], p), X) for i in range(4)]
        return loss(jax.tree.map(lambda *ys: sum(w[i] * y for i, y in enumerate(ys)), *outs))

    with jax.set_mesh(mesh(branch=4, dp=2)):
        together = lambda p, w: loss(merged(fn, "weighted")(p, X, weights=w))
        got = jax.jit(jax.value_and_grad(together, (0, 1)))(stacked, GATES[0])
    assert_near(got, jax.jit(jax.value_and_grad(alone, (0, 1)))(stacked, GATES[0]))


def test_votes_are_counted():
    with jax.set_mesh(mesh(branch=4, dp=2)):
        votes = jax.jit(merged(FNS, "vote"))(pack(FOREST), X)
    best = [np.argmax(fn(p, X), -1) for fn, p in zip(FNS, FOREST, strict=True)]
    np.testing.assert_array_equal(votes, sum(np.eye(OUT, dtype=np.int32)[b] for b in best))


def test_the_worked_example():
    fns = [lambda p, x: 2 * x, lambda p, x: x**2]
    with jax.set_mesh(mesh(branch=2, dp=4)):
        for how, value, grad in (("sum", 15.0, 8.0), ("mean", 7.5, 4.0)):
            both = jax.value_and_grad(lambda x, how=how: merged(fns, how)(pack([{}, {}]), x))
            assert both(jnp.float32(3.0)) == (value, grad)


def test_a_sum_is_one_message_of_its_size_and_a_device_holds_one_row():
    packed, devices = pack(FOREST), mesh(branch=4, dp=2)
    placed = jax.device_put(packed, NamedSharding(devices, P("branch")))
    with jax.set_mesh(devices):
        text = jax.jit(merged(FNS, "sum")).lower(placed, X).compile().as_text()
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
    assert packed.row_bytes == placed.rows["float32"].addressable_shards[0].data.nbytes == 352
    assert repr(packed) == "Packed(4 trees, 352 B a row, 1,408 B in all, 784 B of padding)"


def test_packing_loses_nothing():
    forest = [
        {"codes": jnp.arange(6, dtype=jnp.int8).reshape(2, 3), "w": jnp.ones(2, "bfloat16")},
        [jnp.float32(jnp.nan), jnp.ones((0, 3)), {"flag": jnp.array([True, False])}],
    ]
    packed = pack(forest)
    for i, tree in enumerate(forest):
        back = unpack(packed, i)
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert jax.tree.map(lambda x: x, packed).forms == packed.forms


ERRORS = {
    "how": (lambda: merged(FNS, "max"), "choose one of"),
    "count": (lambda: merged(FNS[:3])(pack(FOREST), X), "3 functions for parameters of 4"),
    "axis": (lambda: merged(FNS[:3], mesh_axis="dp")(pack(FOREST[:3]), X), "3 sub-models .* dp=2"),
    "no axis": (
        lambda: merged(FNS, mesh_axis="ep")(pack(FOREST), X),
        "axis 'ep', and the mesh here",
    ),
    "stacked": (lambda: merged(two)({"a": X, "b": X[:2]}, X), r"\['b'\] has another"),
    "shapes": (lambda: merged(WIDE)(pack(FOREST), X), r"sub-model 2 returns .*\[4, 2\]"),
    "weights": (lambda: merged(FNS, "weighted")(pack(FOREST), X), "weights"),
    "empty": (lambda: pack([]), "no trees"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_the_way_out(case):
    call, message = ERRORS[case]
    with jax.set_mesh(mesh(branch=4, dp=2)), pytest.raises(ValueError, match=message):
        call()
