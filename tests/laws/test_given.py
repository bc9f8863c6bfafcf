"""Laws of what a gradient station is given: checked once, alike by every station.

    grads(batch, valid) = grads(batch[valid])

A keyword that does not fit the batch is a `ValueError` before the loss is called.
"""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import unitscale_jax as us
from tests.support.sharded import assert_near

ROWS, WIDTH = 6, 3
VALID = np.array([1, 0, 1, 1, 0, 1], bool)
CALLS = []


def rows(count=ROWS):
    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], (count, WIDTH))
    return {"x": x, "y": jax.random.normal(keys[1], (count,)), "real": jnp.arange(1, count + 1)}


def params():
    keys = jax.random.split(jax.random.key(0), 3)
    layers = {f"layer_{i}": {"w": jax.random.normal(keys[i], (WIDTH, WIDTH))} for i in range(2)}
    return layers | {"out": jax.random.normal(keys[2], (WIDTH,))}


def head(rest, x, batch):
    del batch
    return x @ rest["out"]


def layer(w, x, batch):
    del batch
    return jnp.tanh(x @ w["w"])


def of_outputs(outputs, batch):
    CALLS.append(0)
    weight = batch["real"].astype(jnp.float32)
    error = us.Mean((outputs - batch["y"]) ** 2 * weight, batch["real"])  # integer weights
    return {"error": error, "size": us.Mean(outputs**2, jnp.ones_like(outputs), 0.1)}


def apply(params, batch):
    x = layer(params["layer_1"], layer(params["layer_0"], batch["x"], batch), batch)
    return head(params, x, batch)


def loss(params, batch, *, key=None):
    del key
    return of_outputs(apply(params, batch), batch)


def with_outputs(params, batch):
    outputs = apply(params, batch)
    return of_outputs(outputs, batch), {"h": outputs}


def student_and_teacher():
    compare = lambda t, s: (t - s["h"]) ** 2
    return us.distilled(with_outputs, lambda batch: batch["x"][:, 0], {"match": compare})


def on_mesh(**axes):
    """The context of a mesh of just these devices; none without axes."""
    if not axes:
        return contextlib.nullcontext()
    devices = jax.devices()[: math.prod(axes.values())]
    return jax.set_mesh(us.parallel.mesh(**axes, devices=devices))


def in_shard_map(grad_fn):
    """A station that adds up over devices itself, in a `shard_map` of the user."""
    parts = us.accumulated(grad_fn, 3, mesh_axis=("dp",))

    def call(params, batch, **given):
        local = lambda p, b, given: parts(p, b, **given)
        specs = {name: P("dp") if name in ("valid", "key") else P() for name in given}
        return jax.shard_map(local, in_specs=(P(), P("dp"), specs), out_specs=(P(), P(), P()))(
            params, batch, given
        )

    return call


def pipelined(parts):
    first = lambda rest, batch: batch["x"]
    return us.parallel.pipelined(first, layer, head, of_outputs, parts=parts)


# name -> (the station around a gradient, the axes of its mesh)
STATIONS = {
    "plain": (lambda g: g, {}),
    "accumulated": (lambda g: us.accumulated(g, 2), {}),
    "accumulated, one row a part": (lambda g: us.accumulated(g, ROWS), {}),
    "accumulated, uneven": (lambda g: us.accumulated(g, 4), {}),
    "accumulated, masked": (lambda g: us.accumulated(g, 4, mask="real"), {}),
    "accumulated, dropping": (lambda g: us.accumulated(g, 2, nonfinite="drop"), {}),
    "accumulated, in place": (lambda g: us.accumulated(g, 4, inplace=True), {}),
    "accumulated twice": (lambda g: us.accumulated(us.accumulated(g, 2), 2), {}),
    "reduced": (lambda g: us.parallel.reduced(g), {"dp": 2}),
    "reduced, one device": (lambda g: us.parallel.reduced(g), {"dp": 1}),
    "reduced, uneven": (lambda g: us.parallel.reduced(g), {"dp": 4}),
    "reduced, shares": (lambda g: us.parallel.reduced(g, zero=1), {"dp": 2}),
    "reduced accumulated": (lambda g: us.parallel.reduced(us.accumulated(g, 3)), {"dp": 2}),
    "pipelined": (lambda g: pipelined(2), {"pp": 2}),
    "pipelined, uneven": (lambda g: pipelined(4), {"pp": 2}),
    "pipelined, one stage": (lambda g: pipelined(2), {"pp": 1}),
    "reduced pipelined": (lambda g: us.parallel.reduced(pipelined(2)), {"dp": 2, "pp": 2}),
}
LOSSES = {"loss": lambda: loss, "distilled": student_and_teacher}
DISTILLED = ("plain", "accumulated", "accumulated, uneven", "reduced accumulated")
CASES = [(name, "loss") for name in STATIONS] + [(name, "distilled") for name in DISTILLED]
WRONG = {
    "column": VALID[:, None],
    "row": VALID[None],
    "matrix": np.stack([VALID] * ROWS),
    "short": VALID[:5],
    "long": np.append(VALID, True),
    "scalar": np.array(True),
    "Python": True,
    "float": VALID.astype(np.float32),
    "int": VALID.astype(np.int32),
    "key": jax.random.split(jax.random.key(0), ROWS),
    "traced column": jnp.asarray(VALID[:, None]),
}


def station(name, kind):
    """The station, its parameters, and what makes the context that it is called in."""
    wrap, axes = STATIONS[name]
    stacked = "pp" in axes
    own = us.parallel.stack(params(), "layer_*", stages=axes["pp"]) if stacked else params()
    return wrap(us.value_and_grad(LOSSES[kind]())), own, functools.partial(on_mesh, **axes)


@functools.cache
def chosen(kind):
    """Gradients and terms of the rows that count, alone."""
    batch = jax.tree.map(lambda x: x[VALID], rows())
    terms, _, grads = jax.jit(us.value_and_grad(LOSSES[kind]()))(params(), batch)
    return grads, {name: m.value for name, m in terms.items()}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_gradient_is_that_of_the_rows_that_count(name, kind):
    grad_fn, own, context = station(name, kind)
    with context():
        terms, _, grads = jax.jit(grad_fn)(own, rows(), valid=jnp.asarray(VALID))
    grads = us.parallel.unstack(grads) if "pipe" in name else grads
    wanted, values = chosen(kind)
    assert_near(grads, wanted, 1e-5)
    assert_near({name: terms[name].value for name in values}, values, 1e-5)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_wrong_mask_is_the_same_error_of_every_station_and_nothing_is_traced(name, kind):
    grad_fn, own, context = station(name, kind)
    for valid in WRONG.values():
        CALLS.clear()
        found = np.asarray(valid) if isinstance(valid, bool) else valid
        wanted = f"`valid` is {found.dtype}{list(found.shape)}; expected bool[{ROWS}]"
        for call in (grad_fn, jax.jit(grad_fn)):
            with context(), pytest.raises(ValueError) as error:
                call(own, rows(), valid=valid)
            assert str(error.value).startswith(wanted)
        assert not CALLS


def test_a_wrong_mask_is_refused_inside_of_a_shard_map_too():
    call = in_shard_map(us.value_and_grad(loss))
    with on_mesh(dp=2):
        _, _, grads = jax.jit(call)(params(), rows(), valid=jnp.asarray(VALID))
        for valid in (VALID[:, None], VALID.astype(np.float32)):
            with pytest.raises(ValueError, match=r"`valid` is .*; expected bool\[3\]"):
                call(params(), rows(), valid=jnp.asarray(valid))
    assert_near(grads, chosen("loss")[0], 1e-5)


KEY = jax.random.key(0)
OTHERS = {
    "raw key": ({"key": np.zeros(2, np.uint32)}, r"`key` is an array uint32\[2\]"),
    "seed": ({"key": 3}, "`key` is 3; expected a typed key"),
    "too few keys": ({"key": jax.random.split(KEY, 5)}, r"`key` has shape \(5,\)"),
    "columns of keys": ({"key": jax.random.split(KEY, (6, 1))}, r"`key` has shape \(6, 1\)"),
    "list": ({"denominators": [1.0]}, "`denominators` is a list; expected a dict"),
    "one per row": (
        {"denominators": {"error": jnp.ones(ROWS), "size": 1.0}},
        r"`denominators\['error'\]` is float32\[6\]; expected a real scalar",
    ),
    "scales": ({"scale": jnp.ones(ROWS)}, r"`scale` is float32\[6\]; expected a real scalar"),
    "text": ({"scale": "big"}, "`scale` is a str"),
    "nothing": ({"scale": None}, "`scale` is a NoneType"),
    "truth": ({"scale": True}, r"`scale` is bool\[\]; expected a real scalar"),
    "complex": ({"scale": 1j}, "`scale` is a complex; expected a real scalar"),
}


@pytest.mark.parametrize("name", STATIONS)
def test_other_keywords_that_do_not_fit_are_refused_before_anything_is_traced(name):
    grad_fn, own, context = station(name, "loss")
    for given, words in OTHERS.values():
        CALLS.clear()
        with context(), pytest.raises((TypeError, ValueError), match=words):
            grad_fn(own, rows(), **given)
        assert not CALLS


@pytest.mark.parametrize("name", [name for name in STATIONS if "dropping" not in name])
def test_denominators_name_the_terms_of_the_loss(name):
    grad_fn, own, context = station(name, "loss")
    with context(), pytest.raises(ValueError, match=r"the loss has the terms .*'size'.*'sizes'"):
        jax.eval_shape(grad_fn, own, rows(), denominators={"error": 1.0, "sizes": 1.0})


@pytest.mark.parametrize("name", [name for name in STATIONS if "pipe" not in name])
def test_a_term_may_not_have_the_name_of_one_that_a_station_adds(name):
    wrap, axes = STATIONS[name]
    named = lambda p, b: {"dropped": loss(p, b)["error"]}
    with (
        on_mesh(**axes),
        pytest.raises(ValueError, match=r"have a term 'dropped'.* rename that"),
    ):
        jax.eval_shape(wrap(us.value_and_grad(named)), params(), rows())


def test_a_distilled_loss_refuses_the_names_of_its_own_terms():
    named = lambda p, b: ({"match": us.Mean(b["y"], b["y"])}, apply(p, b))
    for name, words in {"match": "and `terms` have", "dropped": "us.accumulated, have"}.items():
        both = us.distilled(named, lambda b: b["y"], {name: lambda t, s: (t - s) ** 2})
        with pytest.raises(ValueError, match=rf"{words} a term '{name}'"):
            us.value_and_grad(both)(params(), rows())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("weight", ["int32", "bool", "float32", "float64", "uint8"])
def test_a_value_has_the_dtype_and_the_digits_of_its_total(dtype, weight):
    with jax.enable_x64():
        mean = us.Mean(jnp.asarray(7, dtype), jnp.ones(3, weight))
        assert mean.value.dtype == dtype
        assert abs(float(mean.value) - 7 / 3) <= 4 * np.finfo(dtype).eps
        assert us.loss_value({"a": mean, "b": mean}).dtype == dtype


def test_integers_are_counted_beyond_the_digits_of_float32():
    with jax.enable_x64():
        assert us.Mean(jnp.float64(2**24 + 1), jnp.int32(2**24 + 1)).value == 1
    # 256 rows of 2^17 + 1 items each: a float32 sum of the rows loses some of them.
    counts = jnp.full(257, 2**17 + 1, jnp.int32)
    exact = np.float32(257 * (2**17 + 1))
    mean = lambda w, x: us.Mean(w * x.astype(jnp.float32), x)
    terms, _, _ = us.value_and_grad(mean)(jnp.float32(1), counts)
    assert terms["loss"].weight == exact
    assert us.Mean(jnp.float32(exact), counts).value == 1


@pytest.mark.parametrize("name", [name for name in STATIONS if "dropping" not in name])
def test_numbers_of_python_may_be_larger_than_the_integers_of_jax(name):
    grad_fn, own, context = station(name, "loss")
    with context():
        of = lambda size: jax.eval_shape(
            lambda p, b: grad_fn(p, b, scale=size, denominators={"error": size, "size": size}),
            own,
            rows(),
        )
        of(2**40)
    grads = us.value_and_grad(lambda p, b: us.Mean(p * b, jnp.ones(2)))(
        1.0, jnp.ones(2), scale=2**40
    )
    assert grads[2] == 2.0**40
