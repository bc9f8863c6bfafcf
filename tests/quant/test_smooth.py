"""Laws of smoothing: the function stays what it was, bit for bit, or smoothing refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import unitscale_jax as us
from unitscale_jax import DotSpec, QSpec
from unitscale_jax.quant import Group, awq, smoothquant
from unitscale_jax.statistics import calibrate

W8A8 = DotSpec(w=QSpec(), x=QSpec())
W4 = DotSpec(w=QSpec(format="int4"))
KINDS = ("channels", "hessian")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def same(a, b):
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def changed(before, after):
    names = us.tree.names(before)
    pairs = zip(names, jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return {name for name, a, b in pairs if not same(a, b)}


def smoothed(method, fn, params, x, rules):
    stats = calibrate(fn, params, [x, x], rules, collect=KINDS)
    return method(fn, params, stats, rules)


# Functions that can be folded, and what is multiplied by what.


def dense(p, x):
    return (x * p["gain"]) @ p["w"]


def norm(x, p):
    centered = x - x.mean(-1, keepdims=True)
    return (
        centered * lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-3) * p["gain"] + p["bias"]
    )


def block(p, x):  # (batch, time, 8)
    h = norm(x, p["before"])
    q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[name]) for name in "qkv")
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k)
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)).astype(x.dtype)
    heads = jnp.einsum("bhqs,bshk->bqhk", weights, v)
    x = x + jnp.einsum("bqhk,hkd->bqd", heads, p["o"])
    h = norm(x, p["after"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def block_params(seed):
    gain = lambda k: {"gain": 1 + 7 * jnp.abs(normal(seed + k, 8)), "bias": normal(seed + k + 1, 8)}
    shapes = {"q": (8, 2, 4), "k": (8, 2, 4), "v": (8, 2, 4), "o": (2, 4, 8)}
    shapes |= {"gate": (8, 12), "up": (8, 12), "down": (12, 8)}
    weights = {
        name: normal(seed + k, *shape) / 4 for k, (name, shape) in enumerate(shapes.items(), 9)
    }
    return {"before": gain(1), "after": gain(4), **weights}


def layers(p, x):
    return lax.scan(jax.checkpoint(lambda h, layer: (block(layer, h), None)), x, p)[0]


def relu_mlp(p, x):
    return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["w"] + 1.0


def pooled(p, x):  # (batch, 6, 6, 3)
    dims = ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated(x, p["up"], (1, 1), "SAME", dimension_numbers=dims)
    h = lax.reduce_window(
        jax.nn.relu(h + p["bias"]), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    )
    return lax.conv_general_dilated(h, p["w"], (1, 1), "SAME", dimension_numbers=dims)


def experts(p, x):
    h = jax.nn.relu(jnp.einsum("eri,eio->ero", x, p["up"]))
    return jnp.einsum("eri,eio->ero", h, p["w"])


def looked_up(p, ids):
    return p["table"][ids] @ p["w"]


def reused(p, x):
    return jnp.sum((x * p["gain"]) @ p["w"], 0) + jnp.max((x * p["gain"]) @ p["free"])


BLOCK = {"q", "k", "v", "o", "gate", "up", "down"} | {
    f"{at}/{name}" for at in ("before", "after") for name in ("gain", "bias")
}
MLP = {"up": normal(1, 4, 6), "bias": 3 * normal(2, 6), "w": normal(3, 6, 5)}
CONV = {"up": normal(1, 3, 3, 3, 6), "bias": 3 * normal(2, 6), "w": normal(3, 3, 3, 6, 5)}
OUTLIERS = jnp.array([16.0, 1.0, 0.5, 9.0])
GAIN = {"gain": OUTLIERS, "w": normal(1, 4, 5)}
FOLDS = {
    "gain": (dense, GAIN, normal(9, 7, 4), ["w"], {"gain", "w"}),
    "block": (
        block,
        block_params(0),
        normal(9, 2, 5, 8),
        ["?", "gate", "up", "down"],
        BLOCK,
    ),
    "layers": (
        layers,
        jax.tree.map(lambda *x: jnp.stack(x), block_params(0), block_params(50)),
        normal(9, 2, 5, 8),
        ["?", "gate", "up", "down"],
        BLOCK,
    ),
    "mlp": (relu_mlp, MLP, normal(9, 7, 4), ["w"], set(MLP)),
    "jitted": (jax.jit(relu_mlp), MLP, normal(9, 7, 4), ["w"], set(MLP)),
    "vmapped": (jax.vmap(relu_mlp, (None, 0)), MLP, normal(9, 7, 4), ["w"], set(MLP)),
    "conv": (pooled, CONV, normal(9, 2, 6, 6, 3), ["w"], set(CONV)),
    "experts": (
        experts,
        {"up": normal(1, 2, 4, 6), "w": normal(2, 2, 6, 3)},
        normal(9, 2, 7, 4),
        ["w"],
        {"up", "w"},
    ),
    "table": (
        looked_up,
        {"table": normal(1, 9, 4) * OUTLIERS, "w": normal(2, 4, 3)},
        jnp.arange(9),
        ["w"],
        {"table", "w"},
    ),
    "reused": (
        reused,
        GAIN | {"free": normal(5, 4, 2)},
        normal(9, 7, 4),
        ["w"],
        {"gain", "w", "free"},
    ),
}


CASES = [(name, smoothquant) for name in FOLDS]
CASES += [(name, awq) for name in FOLDS if name not in ("layers", "block", "vmapped", "jitted")]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_the_function_keeps_its_bits(name, method):
    fn, params, x, weights, folded = FOLDS[name]
    rules = dict.fromkeys(weights, W8A8 if method is smoothquant else W4)
    smooth = smoothed(method, fn, params, x, rules)
    assert same(jax.jit(fn)(smooth, x), jax.jit(fn)(params, x))
    assert changed(params, smooth) <= folded
    if method is smoothquant:
        assert changed(params, smooth) == folded


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["gain", "mlp"])
def test_so_it_does_in_16_bits(name, dtype):
    fn, params, x, weights, _ = FOLDS[name]
    params, x = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x))
    smooth = smoothed(smoothquant, fn, params, x, dict.fromkeys(weights, W8A8))
    assert {leaf.dtype for leaf in jax.tree.leaves(smooth)} == {np.dtype(dtype)}
    assert same(jax.jit(fn)(smooth, x), jax.jit(fn)(params, x))
    assert changed(params, smooth)


def test_the_scale_is_that_of_the_paper_rounded_to_a_power_of_two():
    x, alpha = normal(9, 7, 4), 0.6
    smooth = smoothed(functools.partial(smoothquant, alpha=alpha), dense, GAIN, x, {"w": W8A8})
    most_x, most_w = jnp.max(jnp.abs(x), 0) * OUTLIERS, jnp.max(jnp.abs(GAIN["w"]), 1)
    s = np.exp2(np.round(np.log2(most_x**alpha / most_w ** (1 - alpha))))
    np.testing.assert_array_equal(smooth["gain"], OUTLIERS / s)
    np.testing.assert_array_equal(smooth["w"], GAIN["w"] * s[:, None])


def test_dead_channels_have_scale_one():
    params = GAIN | {"w": GAIN["w"].at[0].set(0.0), "gain": OUTLIERS.at[3].set(0.0)}
    smooth = smoothed(smoothquant, dense, params, normal(9, 7, 4), {"w": W8A8})
    assert smooth["gain"][0] == 16 and same(smooth["w"][3], GAIN["w"][3])


def test_weights_that_share_their_input_share_its_scale():
    fn, params, x, weights, _ = FOLDS["block"]
    smooth = smoothed(smoothquant, fn, params, x, dict.fromkeys(weights, W8A8))
    ratio = params["before"]["gain"] / smooth["before"]["gain"]
    for name in "qk":
        np.testing.assert_array_equal(smooth[name], params[name] * ratio[:, None, None])
    v_out = params["o"] / smooth["o"]  # its output channels are those that `o` meets
    np.testing.assert_array_equal(smooth["v"], params["v"] * ratio[:, None, None] * v_out[..., 0])


# Whatever else a function does, it is folded right or not at all.

UP = {"up": normal(1, 4, 4), "w": normal(2, 4, 4), "b": normal(3, 4)}
TRICKY = {
    "inputs": (lambda p, x: x @ p["w"], "has its channels"),
    "gelu": (lambda p, x: jax.nn.gelu(x @ p["up"]) @ p["w"], "in the way"),
    "tanh": (lambda p, x: jnp.tanh(x @ p["up"]) @ p["w"], "tanh"),
    "output": (lambda p, x: ((x @ p["up"]) @ p["w"], x @ p["up"]), "a result of the function"),
    "constant": (lambda p, x: jnp.maximum(x @ p["up"], 1.0) @ p["w"], "max"),
    "clipped": (lambda p, x: jnp.clip(x @ p["up"], -1.0, 1.0) @ p["w"], "in the way"),
    "rounded": (
        lambda p, x: (x @ p["up"]).astype(jnp.int32).astype(jnp.float32) @ p["w"],
        "convert_element_type",
    ),
    "floor": (lambda p, x: jnp.floor(x @ p["up"]) @ p["w"], "floor"),
    "squared": (lambda p, x: jax.nn.relu(x @ p["up"]) ** 2 @ p["w"], "root of the scale"),
    "reversed": (lambda p, x: (x @ p["up"])[:, ::-1] @ p["w"], "has its channels"),
    "sorted": (lambda p, x: jnp.sort(x @ p["up"], -1) @ p["w"], "has its channels"),
    "summed up": (lambda p, x: jnp.cumsum(x @ p["up"], -1) @ p["w"], "has its channels"),
    "halves": (
        lambda p, x: jnp.concatenate([x @ p["up"][:, :2], x @ p["up"][:, 2:]], 1) @ p["w"],
        "",
    ),
    "residual": (lambda p, x: (x + x @ p["up"]) @ p["w"], "has its channels"),
    "mean": (
        lambda p, x: (lambda h: (h - h.mean(-1, keepdims=True)) @ p["w"])(x @ p["up"]),
        "in the way",
    ),
    "argmax": (
        lambda p, x: (lambda h: h @ p["w"] + jnp.argmax(h, -1)[:, None].astype(h.dtype))(
            x @ p["up"]
        ),
        "argmax",
    ),
    "square weight": (lambda p, x: ((x @ p["up"]) @ p["w"]) @ p["w"], ""),
    "powers": (
        lambda p, x: lax.fori_loop(0, 3, lambda _, h: h @ p["w"], x @ p["up"]),
        "no parameter produces",
    ),
    "softmax": (lambda p, x: jax.nn.softmax(x @ p["up"]) @ p["w"], "in the way"),
    "outer": (
        lambda p, x: jnp.einsum("bi,bj->ij", x @ p["up"], x @ p["up"]) @ p["w"],
        "",
    ),
}


@pytest.mark.parametrize("name", TRICKY)
def test_what_cannot_be_folded_is_refused(name):
    fn, why = TRICKY[name]
    x = 3 * normal(9, 7, 4)
    with pytest.raises(
        ValueError, match=rf"(?s)(these weights meet: w \(.*{why}.*Leave)|w meets a"
    ):
        smoothed(smoothquant, fn, UP, x, {"w": W8A8})


def stepwise(p, x):
    """What a layer's carry hands on cannot have the scale of the layer."""
    step = lambda h, layer: (jax.nn.relu(h @ layer["w"] * layer["b"]), None)
    return lax.scan(step, x * p["gain"], {"w": p["w"], "b": p["b"]})[0]


def across(p, x):
    """A gain that all layers share is not one of each."""
    return lax.scan(lambda h, w: (h + (x * p["gain"]) @ w, None), x, p["w"])[0]


def delayed(p, x):
    """A layer gets what the one before made with its own gain; the first gets zeros."""
    step = lambda h, layer: (x * layer["b"], h @ layer["w"])
    return lax.scan(step, jnp.zeros_like(x), {"w": p["w"], "b": p["b"]})[1]


def all_at_once(p, x):
    """A layer that has its own gain, and sees those of all the others."""
    every = lambda w: jnp.sum((x[:, None] * p["b"]) @ w, 1)
    step = lambda h, layer: (h, (x * layer["b"]) @ layer["w"] + every(layer["w"]))
    return lax.scan(step, 0.0, {"w": p["w"], "b": p["b"]})[1]


@pytest.mark.parametrize("fn", [stepwise, across, delayed, all_at_once])
def test_scales_of_layers_stay_in_their_layer(fn):
    params = {"gain": OUTLIERS, "w": normal(1, 3, 4, 4), "b": normal(2, 3, 4)}
    with pytest.raises(ValueError, match=r"these weights meet: w \("):
        smoothed(smoothquant, fn, params, normal(9, 7, 4), {"w": W8A8})


def test_homogeneous_functions_between_are_no_obstacle():
    def fn(p, x):
        h = x @ p["up"] + p["b"]
        h = jnp.where(h > 0, h, 0.25 * h) / 3
        h = jnp.abs(h).reshape(7, 2, 2).transpose(1, 2, 0).reshape(4, 7).T
        return jnp.max(h @ p["w"], axis=0)

    x = normal(9, 7, 4)
    smooth = smoothed(smoothquant, fn, UP, x, {"w": W8A8})
    assert same(jax.jit(fn)(smooth, x), jax.jit(fn)(UP, x)) and changed(UP, smooth) == set(UP)


# Figures: outlier channels of forty times the rest.


@functools.cache
def outliers(times):
    gain = np.ones(256, np.float32)
    gain[np.random.default_rng(1).choice(256, 5, replace=False)] = times
    return {"gain": jnp.asarray(gain), "w": normal(2, 256, 128) / 16}, normal(3, 512, 256)


def off(params, x, spec):
    y = dense(params, x)
    out = jax.jit(us.quantized(dense, {"w": spec}))(params, x)
    return float(jnp.linalg.norm(out - y) / jnp.linalg.norm(y))


def test_smoothing_takes_outliers_out_of_activations():
    params, x = outliers(40.0)
    stats = calibrate(dense, params, [x], {"w": W8A8}, collect=KINDS)
    error = {
        a: off(smoothquant(dense, params, stats, {"w": W8A8}, a), x, W8A8) for a in (0, 0.5, 1)
    }
    plain = off(params, x, W8A8)
    assert 0.024 < plain < 0.029 and error[0.5] < 0.0082
    assert min(error[0], error[1]) > 0.8 * plain  # all or nothing moves the outliers elsewhere


def test_awq_rounds_more_finely_what_matters():
    spec = DotSpec(w=QSpec(format="int4", group=Group(64)))
    params, x = outliers(40.0)
    smooth = smoothed(awq, dense, params, x, {"w": spec})
    assert 0.1 < off(params, x, spec) < 0.12 and off(smooth, x, spec) < 0.05
    params, x = outliers(1.0)
    assert off(smoothed(awq, dense, params, x, {"w": spec}), x, spec) <= off(params, x, spec)


@pytest.mark.parametrize("seed", range(2))
def test_awq_is_never_worse_on_its_batches(seed):
    spec = DotSpec(w=QSpec(format="int3"))
    params = {"gain": jnp.exp(normal(seed, 16)), "w": normal(seed + 1, 16, 6)}
    x = normal(seed + 2, 40, 16)
    smooth = smoothed(awq, dense, params, x, {"w": spec})
    assert off(smooth, x, spec) <= off(params, x, spec) * (1 + 1e-5)


# Errors say what to do.


def stats_of(*collect, rules={"w": W8A8}):  # noqa: B006
    return calibrate(dense, GAIN, [normal(9, 7, 4)], rules, collect=collect)


ERRORS = {
    "missing": (
        lambda: smoothquant(dense, GAIN, stats_of("range"), {"w": W8A8}),
        "no channels of what meets w.*collect=\\('channels',\\)",
    ),
    "moments": (
        lambda: awq(dense, GAIN, stats_of("channels"), {"w": W8A8}),
        "of what meets w.*'hessian'",
    ),
    "unmatched": (
        lambda: smoothquant(dense, GAIN, stats_of("channels"), {"v": W8A8}),
        "matched none",
    ),
    "alpha": (
        lambda: smoothquant(dense, GAIN, stats_of("channels"), {"w": W8A8}, 2.0),
        "alpha is 2",
    ),
    "outline": (
        lambda: smoothquant(dense, GAIN, dict(stats_of("channels")), {"w": W8A8}),
        "not those of `calibrate`",
    ),
    "quantized": (
        lambda: smoothquant(
            dense,
            us.quantize(GAIN, {"w": DotSpec(w=QSpec(axes=(-2,)))}),
            stats_of("channels"),
            {"w": W8A8},
        ),
        "w: quantized already",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_says_what_to_do(name):
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_all_that_is_refused_is_named_at_once():
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["w"]
    with pytest.raises(ValueError, match=r"meet: up \(.*channels.*; w \(.*tanh"):
        smoothed(smoothquant, fn, UP, normal(9, 7, 4), {"up": W8A8, "w": W8A8})
