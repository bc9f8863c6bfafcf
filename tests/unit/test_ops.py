"""Laws of the operations: the numbers of another library, unit values, and their own equations."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unitscale_jax as us
from unitscale_jax import unit

FILE = pathlib.Path(__file__).parents[1] / "data" / "unit_scaling.json"
ORACLE = json.loads(FILE.read_text())  # unit-scaling 0.3.5 with torch 2.13, float64
GRAPHCORE = {"factors": "graphcore"}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# ----------------------------------------------------------------------- the published library


def plain_attention(q, k, v, mult, causal, rate=0.0, key=None):
    """Of arrays (batch, heads, length, head), as the file has them."""
    logits = q @ jnp.swapaxes(k, -1, -2) * (mult / q.shape[-1])
    if causal:
        logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1)
    if rate:
        keep = jax.random.bernoulli(key, 1 - rate, (*logits.shape[:2], 1, *logits.shape[2:]))
        weights = jnp.where(keep[:, :, 0], weights / (1 - rate), 0)
    return weights @ v


def our_attention(q, k, v, **options):
    swapped = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]
    return jnp.swapaxes(unit.attention(*swapped, **options, **GRAPHCORE), 1, 2)


def plain_conv(x, weight, bias, params):
    out = jax.lax.conv_general_dilated(
        x,
        weight,
        (params["stride"],),
        [(params["padding"],) * 2],
        rhs_dilation=(params["dilation"],),
        dimension_numbers=("NCH", "OIH", "NCH"),
        feature_group_count=params["groups"],
    )
    return out + bias[:, None]


def our_conv(x, weight, bias, params):
    out = unit.conv(
        jnp.swapaxes(x, 1, 2),
        jnp.transpose(weight, (2, 1, 0)),
        bias,
        strides=params["stride"],
        padding=[(params["padding"],) * 2],
        dilation=params["dilation"],
        groups=params["groups"],
        constraint=params["constraint"],
        **GRAPHCORE,
    )
    return jnp.swapaxes(out, 1, 2)


def pair(case):
    """`(ours, plain)`, functions of the operands of a case by name."""
    params, rate = case["params"], case["params"].get("dropout_p", 0.0)
    mult, constraint = params.get("mult", 1.0), params.get("constraint")
    ids = jnp.arange(math.prod(case["shapes"].get("ids", ()))).reshape(
        case["shapes"].get("ids", ())
    )
    tanh = params.get("approximate") == "tanh"
    act = {"mult": mult, "constraint": constraint, **GRAPHCORE}
    norm = {"axis": -1, "eps": params.get("eps", 1e-5)}
    drop = {"dropout_rate": rate, "key": jax.random.key(0) if rate else None}

    def linear(op):
        powers = {"powers": params["scale_power"]} if "scale_power" in params else {}
        tie = {"constraint": constraint, **powers, **GRAPHCORE}
        return lambda x, weight, bias=None: op(x, weight.T, bias, **tie)

    def affine(x, weight, bias=0.0):
        return x @ weight.T + bias

    def normalized(x, weight, bias, center):
        x = x - x.mean(-1, keepdims=True) if center else x
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + norm["eps"]) * weight + bias

    def noise(x):
        if not params["training"]:
            return x
        keep = jax.random.bernoulli(jax.random.key(0), 1 - params["p"], x.shape)
        return jnp.where(keep, x / (1 - params["p"]), 0)

    return {
        "gelu": lambda: (
            lambda x: unit.gelu(x, approximate=tanh, **act),
            lambda x: jax.nn.gelu(mult * x, approximate=tanh) / mult,
        ),
        "silu": lambda: (lambda x: unit.silu(x, **act), lambda x: x * jax.nn.sigmoid(mult * x)),
        "silu_glu": lambda: (
            lambda x, gate: unit.silu_glu(x, gate, mult=mult, **GRAPHCORE),
            lambda x, gate: x * gate * jax.nn.sigmoid(mult * gate),
        ),
        "softmax": lambda: (
            lambda x: unit.softmax(x, axis=params["dim"], **act),
            lambda x: jax.nn.softmax(mult * x, axis=params["dim"]),
        ),
        "dropout": lambda: (
            lambda x: unit.dropout(
                x, params["p"], jax.random.key(0), deterministic=not params["training"]
            ),
            noise,
        ),
        "matmul": lambda: (
            lambda left, right: unit.matmul(left, right, constraint=constraint),
            jnp.matmul,
        ),
        "linear": lambda: (linear(unit.linear), affine),
        "linear_readout": lambda: (linear(unit.readout), affine),
        "conv1d": lambda: (
            lambda x, weight, bias: our_conv(x, weight, bias, params),
            lambda x, weight, bias: plain_conv(x, weight, bias, params),
        ),
        "layer_norm": lambda: (
            lambda x, weight, bias: unit.layer_norm(x, weight, bias, **norm),
            functools.partial(normalized, center=True),
        ),
        "rms_norm": lambda: (
            lambda x, weight: unit.rms_norm(x, weight, **norm),
            functools.partial(normalized, bias=0.0, center=False),
        ),
        "add": lambda: (lambda left, right: unit.add(left, right, constraint=constraint), jnp.add),
        "add_python_scalar": lambda: (
            lambda x: unit.add(x, params["scalar"]),
            lambda x: x + params["scalar"],
        ),
        "embedding": lambda: (lambda weight: unit.embed(ids, weight), lambda weight: weight[ids]),
        "scaled_dot_product_attention": lambda: (
            lambda q, k, v: our_attention(q, k, v, mult=mult, causal=params["is_causal"], **drop),
            lambda q, k, v: plain_attention(q, k, v, mult, params["is_causal"], rate, drop["key"]),
        ),
        "mse_loss": lambda: (lambda x, t: unit.mse(x, t).value, lambda x, t: ((x - t) ** 2).mean()),
    }[case["op"]]()


def operands(case):
    shapes = {name: shape for name, shape in case["shapes"].items() if name != "ids"}
    keys = jax.random.split(jax.random.key(1), len(shapes))
    pairs = zip(shapes.items(), keys, strict=True)
    return {name: jax.random.normal(key, shape) for (name, shape), key in pairs}


def ratio(ours, plain):
    """The one factor between two arrays; the plain one may have zeros."""
    counts = np.abs(plain) > 1e-6 * np.abs(plain).max()
    found = np.asarray(ours)[counts] / np.asarray(plain)[counts]
    np.testing.assert_allclose(found, np.median(found), rtol=1e-8)
    return np.median(found)


def named(case):
    return f"{case['op']}-{list(case['shapes'].values())}-{list(case['params'].values())}"


CASES = [case for case in ORACLE["ops"] if case["op"] != "cross_entropy"]


@pytest.mark.parametrize("case", CASES, ids=named)
def test_factors_are_those_of_the_published_library(case):
    ours, plain = pair(case)
    given = operands(case)
    run = lambda fn, *xs: jax.vjp(fn, *xs)
    (y, pull), (y_plain, pull_plain) = (run(fn, *given.values()) for fn in (ours, plain))
    if y.shape:
        assert ratio(y, y_plain) == pytest.approx(case["theory"]["fwd"], rel=1e-12, abs=0)
    ct = jax.random.normal(jax.random.key(2), y.shape, y.dtype) if y.shape else jnp.ones(())
    for name, g, g_plain in zip(given, pull(ct), pull_plain(ct), strict=True):
        want = case["theory"]["grad"][name]
        if case["op"] == "mse_loss":
            want *= math.prod(case["shapes"]["x"])  # the file's is relative to the sum
        assert ratio(g, g_plain) == pytest.approx(want, rel=1e-12 if y.shape else 1e-6, abs=0)


@pytest.mark.parametrize(
    "case", [case for case in ORACLE["ops"] if case["op"] == "cross_entropy"], ids=named
)
def test_cross_entropy_has_a_unit_gradient_and_its_own_value(case):
    rows, classes = case["shapes"]["logits"]
    mult = case["params"]["mult"]
    z = jax.random.normal(jax.random.key(0), (rows, classes))
    labels = jax.random.randint(jax.random.key(1), (rows,), 0, classes)
    value, grad = jax.value_and_grad(lambda z: unit.cross_entropy(z, labels, mult=mult).value)(z)
    log_p = jax.nn.log_softmax(mult * z, axis=-1)
    np.testing.assert_allclose(value, -log_p[jnp.arange(rows), labels].mean(), rtol=1e-7)
    error = jnp.exp(log_p) - jax.nn.one_hot(labels, classes, dtype=z.dtype)
    want = case["grad_factors"]["logits_vs_softmax_minus_onehot"]
    assert ratio(grad, error) == pytest.approx(want, rel=1e-7)


def test_ignored_labels_leave_the_sum_and_the_count():
    z = jax.random.normal(jax.random.key(0), (8, 4))
    labels, real = jnp.array([0, 1, 2, 3, 0, -100, -100, -100]), jnp.arange(8) < 5
    found = unit.cross_entropy(z, labels, where=real)
    want = unit.cross_entropy(z[:5], labels[:5])
    np.testing.assert_allclose(found.value, want.value, rtol=1e-7)
    grad = jax.grad(lambda z: unit.cross_entropy(z, labels, where=real).value)(z)
    assert not grad[5:].any() and np.isfinite(grad).all()


# ------------------------------------------------------------------------------ goldens, E1 - E10


def sine(shape, step, start):
    at = jnp.arange(math.prod(shape), dtype=jnp.float64).reshape(shape)
    return math.sqrt(2) * jnp.sin(at * step + start)


def golden(name):
    return next(case for case in ORACLE["golden"] if case["name"] == name)


def formula(text):
    step, start = text.partition("sin(i*")[2].partition(")")[0].partition(", ")[0].split("+")
    return float(step), float(start)


def assert_golden(found, want, rtol=1e-10):
    flat = np.asarray(found).ravel()
    got = [flat.sum(), (flat**2).sum(), *flat[:4], *flat[-2:]]
    expected = [want["sum"], want["sumsq"], *want["first"], *want["last"]]
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-13)


def run_golden(case, fn):
    """Compares output and gradients of `fn(x, leaves)`; its kernels are (in, out)."""
    x = sine(case["input"]["shape"], *formula(case["input"]["formula"]))
    leaves = {
        name: sine(leaf["shape"], *formula(leaf["formula"])).T
        for name, leaf in case["params"].items()
    }
    out, pull = jax.vjp(fn, x, leaves)
    assert_golden(out, case["out"])
    of_x, of_leaves = pull(sine(out.shape, *formula(case["upstream"])))
    assert_golden(of_x, case["grad_input"])
    for name, want in case["grads"].items():
        assert_golden(of_leaves[name].T, want)


def test_the_linear_layer_equals_its_golden():
    run_golden(golden("Linear(16,24)"), lambda x, p: unit.linear(x, p["weight"], **GRAPHCORE))


def test_the_gated_mlp_equals_its_golden():
    layer = functools.partial(unit.linear, constraint=None, **GRAPHCORE)

    def mlp(x, p):
        up, gate = layer(x, p["linear_1.weight"]), layer(x, p["linear_gate.weight"])
        return layer(unit.silu_glu(up, gate, **GRAPHCORE), p["linear_2.weight"])

    run_golden(golden("MLP(16)"), mlp)


def test_a_linear_layer_tied_and_independent():
    x = jnp.array([[1.0, 2, 3, 4], [0, -1, 0, 1]])
    kernel = jnp.array([[1.0, 0], [0, 1], [1, 1], [2, 0]])
    ct = jnp.array([[1.0, 0], [0, 2]])
    y, pull = jax.vjp(unit.linear, x, kernel)
    np.testing.assert_allclose(y, [[6, 2.5], [1, -0.5]], rtol=1e-15)
    of_x, of_kernel = pull(ct)
    np.testing.assert_allclose(of_x, [[0.5, 0, 0.5, 1], [0, 1, 1, 0]], rtol=1e-15)
    np.testing.assert_allclose(
        of_kernel * math.sqrt(2), [[1, 0], [2, -2], [3, 0], [4, 2]], rtol=1e-15
    )
    free = jax.vjp(lambda x: unit.linear(x, kernel, constraint=None), x)[1](ct)[0]
    np.testing.assert_allclose(free, of_x * math.sqrt(2), rtol=1e-15)


def test_cross_entropy_of_zeros_and_of_an_inverse_temperature():
    value, grad = jax.value_and_grad(lambda z: unit.cross_entropy(z, jnp.array([0, 3])).value)(
        jnp.zeros((2, 4))
    )
    root = 3**-0.5
    np.testing.assert_allclose(value, math.log(4), rtol=1e-7)
    np.testing.assert_allclose(grad, [[-3 * root, root, root, root], [root] * 3 + [-3 * root]])
    value, grad = jax.value_and_grad(
        lambda z: unit.cross_entropy(z, jnp.array([0]), mult=2.0).value
    )(jnp.array([[1.0, 0, 0, 0]]))
    np.testing.assert_allclose(value, 0.3407530, rtol=1e-6)
    np.testing.assert_allclose(grad, [[-0.6668751, *[0.2222917] * 3]], rtol=1e-6)


def test_exact_factors_of_softmax_and_attention():
    for size, (alpha, beta) in {8: (5.86824, 7.71166), 64: (40.6116, 43.3349)}.items():
        x = jnp.arange(size * 1.0) / size
        y, pull = jax.vjp(lambda x: unit.softmax(x, constraint=None), x)
        y_plain, pull_plain = jax.vjp(jax.nn.softmax, x)
        assert ratio(y, y_plain) == pytest.approx(alpha, rel=1e-5)
        ct = jnp.sin(x)
        assert ratio(pull(ct)[0], pull_plain(ct)[0]) == pytest.approx(beta, rel=1e-5)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 2, 64, 16))
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    for causal, want in ((True, 3.59950), (False, 7.75826)):
        y = unit.attention(swap(q), swap(k), swap(v), causal=causal)
        assert ratio(swap(y), plain_attention(q, k, v, 1.0, causal)) == pytest.approx(
            want, rel=1e-5
        )


# ------------------------------------------------------------------------------------- unit scale

MANY = 2**18
UNIT = {  # an operation, shapes of its operands
    "linear": (unit.linear, (1024, 256), (256, 256)),
    "conv": (functools.partial(unit.conv, padding="VALID"), (64, 66, 64), (3, 64, 64)),
    "matmul": (unit.matmul, (16, 128, 128), (16, 128, 128)),
    "gelu": (unit.gelu, (MANY,)),
    "gelu, m = 3": (functools.partial(unit.gelu, mult=3.0), (MANY,)),
    "silu": (unit.silu, (MANY,)),
    "relu": (functools.partial(unit.elementwise, jax.nn.relu), (MANY,)),
    "tanh": (functools.partial(unit.elementwise, jnp.tanh), (MANY,)),
    "softmax": (unit.softmax, (1024, 256)),
    "layer_norm": (unit.layer_norm, (1024, 256)),
    "rms_norm": (unit.rms_norm, (1024, 256)),
    "add": (unit.add, (MANY,), (MANY,)),
    "dropout": (lambda x: unit.dropout(x, 0.3, jax.random.key(5)), (MANY,)),
}


@pytest.mark.parametrize("name", UNIT)
def test_values_and_gradients_are_unit(name):
    op, *shapes = UNIT[name]
    free = name in ("linear", "conv", "matmul", "softmax", "relu", "tanh", "silu", "add")
    op = functools.partial(op, constraint=None) if free or name.startswith("gelu") else op
    keys = iter(jax.random.split(jax.random.key(3), 8))
    xs = [jax.random.normal(next(keys), shape) for shape in shapes]
    y, pull = jax.vjp(op, *xs)
    of_xs = pull(jax.random.normal(next(keys), y.shape))
    for x in (y, *of_xs):
        assert 0.98 < float(jnp.sqrt(jnp.mean(x**2))) < 1.02


@pytest.mark.parametrize("causal", [False, True])
def test_attention_and_its_values_are_unit(causal):
    q, k, v, ct = jax.random.normal(jax.random.key(0), (4, 8, 128, 4, 32))
    y, pull = jax.vjp(functools.partial(unit.attention, causal=causal), q, k, v)
    for x in (y, pull(ct)[2]):
        assert 0.95 < float(jnp.sqrt(jnp.mean(x**2))) < 1.05


def test_the_gate_is_unit_where_a_gaussian_product_is():
    x, gate, ct = jax.random.normal(jax.random.key(0), (3, MANY))
    y, pull = jax.vjp(unit.silu_glu, x, gate)
    for found in (y, *pull(ct)):  # that of the gate is 1.033: one factor for all
        assert 0.98 < float(jnp.sqrt(jnp.mean(found**2))) < 1.05


# ------------------------------------------------------------------------------------ attention


def plain_grouped(q, k, v):
    repeated = [jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v)]
    return unit.attention(q, *repeated, causal=True)


def test_grouped_heads_are_repeated_heads():
    q = jax.random.normal(jax.random.key(0), (2, 5, 6, 4))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 5, 3, 4))
    found = unit.attention(q, k, v, causal=True)
    np.testing.assert_allclose(found, plain_grouped(q, k, v), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("prefill", [1, 3, 6])
def test_a_decode_step_has_the_scale_of_the_whole_sequence(prefill):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 7, 2, 4))
    attend = functools.partial(unit.attention, causal=True, seq_len=16)
    parts = [attend(q[:, :prefill], k[:, :prefill], v[:, :prefill])]
    parts += [attend(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1]) for t in range(prefill, 7)]
    np.testing.assert_allclose(jnp.concatenate(parts, 1), attend(q, k, v), rtol=1e-12)


def test_a_mask_hides_keys_and_causality_hides_more():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 4, 2, 4))
    attend = functools.partial(unit.attention, q, k, seq_len=4)
    first = jnp.zeros((4, 4), bool).at[:, 0].set(True)
    later = v.at[:, 1:].set(7.0)  # what nobody sees
    np.testing.assert_array_equal(attend(v, mask=first), attend(later, mask=first))
    np.testing.assert_array_equal(
        attend(v, mask=first, causal=True), attend(later, mask=first, causal=True)
    )
    assert not np.allclose(attend(v), attend(later))


# ---------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("parts", [2, 4])
def test_the_gradient_of_parts_adds_up_to_that_of_the_batch(parts):
    """With `batch_ratio` the number of parts, of the rows of each."""
    table, kernel = jax.random.normal(jax.random.key(0), (2, 8, 8))
    ids = jax.random.randint(jax.random.key(1), (8, 4), 0, 8)

    def loss(params, ids, ratio=1):
        x = unit.embed(ids, params["table"], batch_ratio=ratio)
        x = unit.layer_norm(unit.linear(x, params["kernel"], params["bias"], batch_ratio=ratio))
        return unit.cross_entropy(x, ids, batch_ratio=ratio)

    params = {"table": table, "kernel": kernel, "bias": jnp.zeros(8)}
    whole = us.value_and_grad(loss)(params, ids)
    in_parts = us.accumulated(us.value_and_grad(lambda p, ids: loss(p, ids, parts)), parts)(
        params, ids
    )
    for a, b in zip(*map(jax.tree.leaves, (whole, in_parts)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# -------------------------------------------------------------------------------------- errors

X = np.ones((2, 4), np.float32)
BAD = {
    "an unknown constraint": (lambda: unit.linear(X, X.T, constraint="gmaen"), "closest: 'gmean'"),
    "a constraint of other factors": (
        lambda: unit.linear(X, X.T, constraint="to_left_grad_scale"),
        "does not take the 2 factors",
    ),
    "a factor that is no factor": (
        lambda: unit.linear(X, X.T, constraint=lambda *_: -1.0),
        "expected a positive number",
    ),
    "unknown factors": (lambda: unit.gelu(X, factors="exakt"), "closest: 'exact'"),
    "a kernel that does not fit": (lambda: unit.linear(X, X), "kernel has shape"),
    "unequal lengths": (
        lambda: unit.attention(X[None, :1, None], X[None, :, None], X[None, :, None]),
        "Give it as `seq_len=`",
    ),
    "less than the whole batch": (lambda: unit.embed(X, X, batch_ratio=0.5), "batch_ratio is 0.5"),
    "a rate": (lambda: unit.dropout(X, 1.0), "probability"),
    "a function that is infinite": (
        lambda: unit.elementwise(lambda x: 1 / (x - x), X),
        "expected positive, finite numbers",
    ),
    "no function of each element": (lambda: unit.elementwise(jnp.sum, X), "each element"),
    "labels of another shape": (
        lambda: unit.cross_entropy(X, np.zeros((3,), int)),
        r"labels has shape \(3,\)",
    ),
    "a multiplier": (lambda: unit.gelu(X, mult=0), "mult is 0; expected a positive number"),
    "a tau": (lambda: unit.residual_split(X, 0.0), "tau is 0.0"),
    "no branches": (lambda: unit.taus(0), "branches is 0"),
}


@pytest.mark.parametrize("slip", BAD)
def test_a_slip_is_told_with_the_way_out(slip):
    call, words = BAD[slip]
    with pytest.raises(ValueError, match=words):
        call()


def test_dropout_wants_a_key():
    with pytest.raises(TypeError, match="typed key"):
        unit.dropout(X, 0.5)
