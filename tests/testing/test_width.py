"""Activations keep their size under u-muP, and the check says where they do not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import unitscale_jax as us
from tests.support import zoo
from unitscale_jax import unit
from unitscale_jax.testing import WidthReport, WidthRow, check_width
from unitscale_jax.testing._activations import activations

WIDTHS = (32, 64, 128, 256, 512)
INPUTS, CLASSES, ROWS = 16, 8, 128


def drawn(shapes, seed=2):
    return {
        name: jax.random.normal(jax.random.fold_in(jax.random.key(seed), k), shape)
        for k, (name, shape) in enumerate(shapes.items())
    }


def shapes_of(width):
    return {
        "enter": (INPUTS, width),
        "up": (width, 2 * width),
        "down": (2 * width, width),
        "bias": (width,),
        "mid": (width, width),
        "leave": (width, CLASSES),
    }


def logits(p, x):
    """A residual branch and a layer between the first and the last product."""
    h = unit.linear(x, p["enter"])
    branch, skip = unit.residual_split(h, 0.5)
    branch = unit.gelu(unit.linear(unit.rms_norm(branch), p["up"]))
    h = unit.residual_add(unit.linear(branch, p["down"], p["bias"]), skip, 0.5)
    h = unit.gelu(unit.linear(unit.rms_norm(h), p["mid"]))
    return unit.readout(unit.rms_norm(h), p["leave"])


def model(width, net=logits, shapes=shapes_of):
    params = drawn(shapes(width))
    if "bias" in params:
        params["bias"] = jnp.zeros(width)
    x = jax.random.normal(jax.random.key(9), (ROWS, INPUTS))
    loss = lambda p, x: unit.cross_entropy(net(p, x), x[:, :CLASSES].argmax(1))
    return loss, params, x


def umup(base, lr, optimizer="adam"):
    return lambda roles: unit.parametrized(base, roles, lr, optimizer=optimizer)


OPTIMIZERS = {
    "adam": umup(optax.scale_by_adam(), 1.0),
    "lion": umup(optax.scale_by_lion(), 1.0),
    "muon": umup(optax.scale_by_adam(), 1.0, "muon"),
}


@functools.cache
def report(optimizer):
    return check_width(model, WIDTHS, optimizer=OPTIMIZERS[optimizer])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_activations_and_their_changes_are_flat_in_width_under_u_mup(optimizer):
    slopes = {(row.name, row.of): row.slope for row in report(optimizer).rows}
    start = slopes.pop(("leave", "start"))
    assert abs(start + 0.5) < 0.05  # logits at the start are width^-1/2 by design
    assert len(slopes) == 11 and max(map(abs, slopes.values())) < 0.05


def test_under_the_standard_parametrization_changes_grow_with_width():
    adam = optax.adam(0.01)
    rows = check_width(model, WIDTHS[:4], optimizer=adam, tolerance=None).rows
    slopes = {row.name: row.slope for row in rows if row.of == "change"}
    assert all(slopes[name] > 0.15 for name in ("up", "down", "mid", "sum", "leave"))
    with pytest.raises(AssertionError, match="activations change their size with width") as error:
        check_width(model, (32, 256), optimizer=adam)
    assert "\n  mid, the change: slope +0." in str(error.value)
    assert "at 32, 0." in str(error.value) and "at 256" in str(error.value)
    assert "enter, at the start" not in str(error.value)


def test_a_forward_factor_that_is_wrong_is_seen_at_the_start():
    def wrong(p, x):  # no factor: activations grow as the root of the width
        return unit.readout(jnp.tanh(unit.linear(x, p["enter"])) @ p["mid"], p["leave"])

    of = lambda width: {k: shapes_of(width)[k] for k in ("enter", "mid", "leave")}
    with pytest.raises(AssertionError, match=r"mid, at the start: slope \+0.[45]"):
        check_width(lambda w: model(w, wrong, of), (32, 512), steps=1)


def test_factors_by_hand_are_those_of_the_operations():
    def by_hand(p, x):
        h = us.fwd_bwd.scale(x @ p["enter"], fwd=INPUTS**-0.5)
        h = jnp.tanh(jnp.tanh(h) @ p["mid"] * len(p["mid"]) ** -0.5)
        return (h @ p["leave"]) / len(p["leave"])

    of = lambda width: {k: shapes_of(width)[k] for k in ("enter", "mid", "leave")}
    rows = check_width(lambda w: model(w, by_hand, of), WIDTHS[:4], tolerance=0.07).rows
    assert [(row.name, row.of) for row in rows[:3]] == [(n, "start") for n in of(1)]
    assert np.allclose(rows[0].rms, 1, rtol=0.1)


def test_an_embedding_changes_less_in_wide_models_by_its_rate():
    def net(p, x):
        h = unit.embed(x[:, :CLASSES].argmax(1), p["table"])
        return unit.readout(jnp.tanh(unit.linear(h, p["mid"])), p["leave"])

    of = lambda w: {"table": (CLASSES, w), "mid": (w, w), "leave": (w, CLASSES)}
    rows = check_width(lambda w: model(w, net, of), WIDTHS[:4], tolerance=0.3).rows
    change = next(row for row in rows if (row.name, row.of) == ("table", "change"))
    assert change.made == "lookup" and -0.55 < change.slope < -0.4 and change.lowest == -0.5


def test_a_last_layer_of_zeros_is_flat_and_half_of_them_is_not():
    rows = lambda rms, slope: WidthRow("w", "product", "start", rms, slope, 0.0)
    assert rows((0.0, 0.0), float("nan")).is_flat(0.05)
    assert not rows((0.0, 1.0), float("nan")).is_flat(0.05)
    of = lambda w: (lambda p: p | {"leave": jnp.zeros_like(p["leave"])})(model(w)[1])
    found = check_width(lambda w: (model(w)[0], of(w), model(w)[2]), (32, 64), tolerance=None)
    assert found.rows[5].rms == (0.0, 0.0) and found.rows[5].is_flat(0.0)


def test_the_report_is_a_table():
    found = report("adam")
    assert isinstance(found, WidthReport) and found.widths == WIDTHS
    head, *lines = str(found).splitlines()
    assert head.split()[-8:-3] == [*map(str, WIDTHS)] and len(lines) == 12
    assert lines[0].startswith("enter") and "-0.5 to 0" in lines[5]
    assert found.data()[0]["name"] == "enter"


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"widths is \(32,\); expected two different ones"):
        check_width(model, (32,))
    with pytest.raises(TypeError, match="fn_of_width is 3; expected a function"):
        check_width(3)
    with pytest.raises(TypeError, match="what check_width goes around is None"):
        check_width(model, (8, 16), optimizer=lambda _: None)

    def deeper(width):
        twice = lambda p, x: (
            logits(p, x) if width > 8 else logits(p, x) @ jnp.eye(CLASSES) @ p["leave"].T
        )
        return model(width, twice)

    with pytest.raises(ValueError, match=r"fn_of_width\(16\) has the activations enter, up"):
        check_width(deeper, (8, 16))


# ------------------------------------------------------------------------- what is an activation


def names(fn, params, *args):
    return [(a.name, a.made, a.last) for a in activations(fn, params, *args).values()]


W = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}
X = jnp.ones((3, 4))
CHAINS = {
    "alone": lambda y: y,
    "a factor": lambda y: 0.5 * y,
    "a quotient": lambda y: y / 2,
    "a bias": lambda y: y + jnp.arange(4.0),
    "a cast": lambda y: y.astype(jnp.bfloat16).astype(jnp.float32),
    "a scale": lambda y: us.fwd_bwd.scale(y, fwd=2.0, bwd=3.0),
    "all of them": lambda y: us.fwd_bwd.scale((0.5 * y).reshape(2, 6) + 1, fwd=2.0).reshape(3, 4),
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_factors_and_biases_belong_to_the_product_before(chain):
    fn = lambda p, x: jnp.tanh(chain(x @ p["a"])) @ p["b"]
    found = activations(fn, W, X)
    assert names(fn, W, X) == [("a", "product", False), ("b", "product", True)]
    pick = lambda site, _, out: out[0] if site.place in found else None
    _, captures = us.trace.captured(fn, pick)(W, X)
    (first, *_) = captures
    np.testing.assert_array_equal(first.value, chain(X @ W["a"]).reshape(first.value.shape))


@pytest.mark.parametrize("act", [jax.nn.gelu, jax.nn.silu, jnp.tanh, lambda y: y + y**3])
def test_terms_of_an_activation_function_are_no_paths(act):
    fn = lambda p, x: act(x @ p["a"]) @ p["b"]
    assert [name for name, *_ in names(fn, W, X)] == ["a", "b"]


def test_a_residual_stream_is_a_sum_of_paths_also_in_a_scan():
    def step(h, w):
        return h + jnp.tanh(h) @ w, None

    fn = lambda p, x: lax.scan(step, x @ p["a"], p["stack"])[0] @ p["b"]
    params = W | {"stack": jnp.ones((2, 4, 4))}
    assert names(fn, params, X) == [
        ("a", "product", False),
        ("stack", "product", False),
        ("sum", "sum", False),
        ("b", "product", True),
    ]


def test_terms_of_a_loss_are_no_activations():
    fn = lambda p, x: us.Mean((x @ p["a"] + x @ p["b"]).sum(-1), jnp.ones(3))
    assert names(fn, W, X) == [("a", "product", True), ("b", "product", True)]


@pytest.mark.parametrize("name", ["linen_transformer", "nnx_scan_remat", "plain_gqa"])
def test_models_of_each_framework_have_activations_by_the_names_of_parameters(name):
    m = zoo.model(name)
    found = activations(m.loss, m.params, *m.inputs)
    pick = lambda site, _, out: out[0] if site.place in found else None
    _, captures = us.trace.captured(m.loss, pick)(m.params, *m.inputs)
    assert {c.place for c in captures} == set(found)
    kernels = {
        n
        for n, role in us.tree.named_leaves(unit.roles(m.apply, m.params, *m.inputs)).items()
        if role.kind not in ("bias", "norm")
    }
    made = {a.name for a in found.values()}
    assert kernels | {"sum"} <= made
    assert made - kernels - {"sum"}  # and scores and values of attention, by their scopes
