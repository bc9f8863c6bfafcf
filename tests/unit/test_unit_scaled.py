"""Laws of the automatic transform: gradients are multiples of the true ones, and near to unit."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unitscale_jax as us
from tests.support import zoo
from tests.support.scales import errors_of_constants, rms
from unitscale_jax import unit

KEY = jax.random.key(0)
WIDTH = 32
X, Y = jax.random.normal(KEY, (2, 16, WIDTH))
gelu = functools.partial(jax.nn.gelu, approximate=True)


def norm(x):
    centered = x - x.mean(-1, keepdims=True)
    return centered / jnp.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)


# ------------------------------------------------------------------------------- architectures


def mlp(p, x, y):
    return (gelu(gelu(x @ p[0]) @ p[1]) @ p[2] * y).sum()


def raw_norm(p, x, y):
    return (jax.nn.softmax(norm(x @ p[0]) @ p[1]) @ p[2] * y).sum()


def pre_norm(p, x, y):
    h = x @ p[0]
    for i in (1, 3):
        h = h + gelu(norm(h) @ p[i]) @ p[i + 1]
    return (norm(h) * y).sum()


def post_norm(p, x, y):
    h = x @ p[0]
    for i in (1, 3):
        h = norm(h + gelu(h @ p[i]) @ p[i + 1])
    return (h * y).sum()


def inner_parallel(p, x, y):
    h = x @ p[0]
    h = h + (gelu(h @ p[1]) + h @ p[2])
    return (h @ p[3] * y).sum()


def projected_skip(p, x, y):
    h = x @ p[0]
    h = h @ p[1] + gelu(h @ p[2])
    return (gelu(h) @ p[3] * y).sum()


def parallel_block(p, x, y):
    h = x @ p[0]
    n = norm(h)
    h = h + gelu(n @ p[1]) + n @ p[2]
    return (h @ p[3] * y).sum()


def gated(p, x, y):
    h = x @ p[0]
    n = norm(h)
    return ((h + (jax.nn.silu(n @ p[1]) * (n @ p[2])) @ p[3]) * y).sum()


def tied(p, x, y):
    h = gelu(gelu(x @ p[0]) @ p[1]) @ p[2]
    return (h @ p[0].T * y).sum()


def unet(p, x, y):
    a = gelu(x @ p[0])
    b = gelu(a @ p[1])
    d = gelu(b @ p[2]) @ p[3] + b
    return ((gelu(d @ p[4]) + a) * y).sum()


def cross(p, x, y):
    m, h = gelu(x @ p[0]), y @ p[1]
    h = h + jnp.tanh((norm(h) @ p[2]) * (m @ p[3])) @ p[4]
    return (h @ p[5] * x).sum()


def dense_block(p, x, y):
    a = x @ p[0]
    b = gelu(a @ p[1])
    c = gelu((a + b) @ p[2])
    return ((a + b + c) @ p[3] * y).sum()


def two_losses(p, x, y):
    h = x @ p[0]
    h = h + gelu(h @ p[1])
    return {
        "one": us.Mean((h @ p[2] * y).sum(), 1),
        "two": us.Mean((h @ p[3] * x).sum(), 1, coef=0.5),
    }


def qk_norm_and_z_loss(p, x, y):
    """Attention of normalized queries and keys; a term on the logits' size."""
    h = x @ p[0]
    heads = lambda w: (norm(h) @ w).reshape(16, 4, 8).swapaxes(0, 1)
    q, k, v = norm(heads(p[1])), norm(heads(p[2])), heads(p[3])
    seen = jnp.tril(jnp.ones((16, 16), bool))
    weights = jax.nn.softmax(jnp.where(seen, q @ k.swapaxes(1, 2) / 8**0.5, -1e9))
    h = h + (weights @ v).swapaxes(0, 1).reshape(16, WIDTH) @ p[4]
    logits = norm(h) @ p[5]
    ce = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.arange(16)[:, None], -1).sum()
    z = jnp.square(jax.nn.logsumexp(logits, -1)).sum()
    return {"ce": us.Mean(ce, len(x)), "z": us.Mean(z, len(x), coef=1e-4)}


def scanned(p, x, y):
    def layer(h, w):
        h = h + gelu(norm(h) @ w[0]) @ w[1]
        return h + jnp.tanh(norm(h) @ w[1]) @ w[0], None

    stacks = jnp.stack(p[1:4]), jnp.stack(p[4:7])
    h, _ = jax.lax.scan(jax.checkpoint(layer), x @ p[0], stacks)
    return (h @ p[7] * y).sum()


def branches(p, x, y):
    h = jax.lax.cond(x.sum() > 0, lambda h: gelu(h @ p[1]), lambda h: jnp.tanh(h @ p[2]), x @ p[0])
    return (h @ p[3] * y).sum()


def recurrent(p, x, y):
    step = lambda h, row: (jnp.tanh(h @ p[0] + row @ p[1]),) * 2
    _, hs = jax.lax.scan(step, jnp.zeros(WIDTH, x.dtype), x)
    return (hs @ p[2] * y).sum()


ARCHITECTURES = {
    fn.__name__: (fn, count)
    for fn, count in [
        (mlp, 3),
        (raw_norm, 3),
        (pre_norm, 5),
        (post_norm, 5),
        (inner_parallel, 4),
        (projected_skip, 4),
        (parallel_block, 4),
        (gated, 4),
        (tied, 3),
        (unet, 5),
        (cross, 6),
        (dense_block, 4),
        (two_losses, 4),
        (qk_norm_and_z_loss, 6),
        (scanned, 8),
        (branches, 4),
        (recurrent, 3),
    ]
}


def kernels(count, key=KEY):
    return list(jax.random.normal(key, (count, WIDTH, WIDTH)))


def value_of(fn):
    """A loss as a scalar, by the loss contract."""

    def value(params, *args):
        out = fn(params, *args)
        return us.loss_value(out) if isinstance(out, dict) else getattr(out, "value", out)

    return value


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_gradient_is_its_constant_times_the_true_one(name):
    fn, count = ARCHITECTURES[name]
    with jax.enable_x64(True):
        p, x, y = jax.tree.map(lambda a: a.astype(jnp.float64), (kernels(count), X, Y))
        scaled = us.unit_scaled(value_of(fn))
        # jax.nn.log_softmax and friends keep float64; 1e-9 leaves room for long sums.
        assert max(errors_of_constants(scaled, p, x, y).values()) < 1e-9


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_start_near_one(name):
    fn, count = ARCHITECTURES[name]
    grads = []
    scaled = jax.jit(jax.grad(value_of(us.unit_scaled(fn))))
    for seed in range(4):
        key = jax.random.key(seed)
        x, y = jax.random.normal(jax.random.fold_in(key, 1), (2, 16, WIDTH))
        grads.append(scaled(kernels(count, key), x, y))
    sizes = [rms(jnp.stack(leaf)) for leaf in zip(*grads, strict=True)]
    assert all(0.25 < size < 4 for size in sizes), sizes
    assert np.abs(np.log2(sizes)).mean() < 1.0, sizes


def zoo_loss(model, params, key, *inputs):
    out = jax.tree.leaves(model.apply(params, *inputs))
    out = [x for x in out if jnp.issubdtype(x.dtype, jnp.floating)]
    keys = jax.random.split(key, len(out))
    pairs = zip(keys, out, strict=True)
    return sum(jnp.sum(jax.random.normal(k, x.shape, x.dtype) * x) for k, x in pairs)


def started(model, key):
    """Kernels N(0, 1), biases 0, scales of norms 1."""
    leaves, structure = jax.tree.flatten(model.params)

    def leaf(k, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        if x.ndim > 1:
            return jax.random.normal(k, x.shape, x.dtype)
        return jnp.ones_like(x) if abs(float(x.mean()) - 1) < 0.3 else jnp.zeros_like(x)

    pairs = zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    return structure.unflatten([leaf(k, x) for k, x in pairs])


@pytest.mark.parametrize("name", zoo.EACH)
def test_nothing_fails_or_is_wrong_on_the_zoo(name):
    model = zoo.model(name)
    if not model.differentiable:
        pytest.skip("has no gradient")
    params = started(model, KEY)
    scaled = us.unit_scaled(functools.partial(zoo_loss, model))
    with jax.numpy_dtype_promotion("standard"):
        errors = errors_of_constants(scaled, params, KEY, *model.inputs)
    noisy = [leaf for leaf in errors if "query/bias" in leaf or "key/bias" in leaf]
    real = {leaf: e for leaf, e in errors.items() if leaf not in noisy}
    assert max(real.values()) < 1e-3, real  # float32; the law above is exact


# ----------------------------------------------------------------------------- random programs


def random_program(seed):
    """A function of matrices: products, activations, sums, norms, with values used again."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 7))
    steps = [(str(rng.choice(_KINDS)), rng.random(3)) for _ in range(int(rng.integers(4, 10)))]

    def fn(p, x, y):
        values = [x @ p[0]]
        pick = lambda r: values[int(r * len(values))]
        for kind, r in steps:
            w = p[int(r[2] * count)]
            values.append(
                {
                    "product": lambda w=w, r=r: pick(r[0]) @ w,
                    "add": lambda r=r: pick(r[0]) + pick(r[1]),
                    "gate": lambda r=r: jax.nn.sigmoid(pick(r[0])) * pick(r[1]),
                    "gelu": lambda r=r: gelu(pick(r[0])),
                    "tanh": lambda r=r: jnp.tanh(pick(r[0])),
                    "norm": lambda r=r: norm(pick(r[0])),
                    "concatenate": lambda r=r: jnp.concatenate([pick(r[0]), pick(r[1])])[: len(x)],
                }[kind]()
            )
        return sum((v * y).sum() for v in values[-2:])

    return fn, count


_KINDS = ["product", "add", "gate", "gelu", "tanh", "norm", "concatenate"]


@pytest.mark.parametrize(
    "seeds", [range(0, 20), pytest.param(range(20, 200), marks=pytest.mark.slow)], ids=str
)
def test_random_programs_keep_the_direction_of_their_gradients(seeds):
    with jax.enable_x64(True):
        for seed in seeds:
            fn, count = random_program(seed)
            p = [w[:8, :8] for w in jax.random.normal(jax.random.key(seed), (count, 8, 8))]
            x, y = jax.random.normal(jax.random.key(seed + 1), (2, 4, 8))
            errors = errors_of_constants(us.unit_scaled(fn), p, x, y)
            assert max(errors.values()) < 1e-9, (seed, errors)


# --------------------------------------------------------------------------------------- proof


@pytest.mark.parametrize("name", ["pre_norm", "projected_skip"])
def test_the_proof_fails_exactly_where_the_law_does(name):
    """One backward factor at a time is off by one percent: on a bridge nothing is lost."""
    fn, count = ARCHITECTURES[name]
    with jax.enable_x64(True):
        p, x, y = jax.tree.map(lambda a: a.astype(jnp.float64), (kernels(count), X, Y))
        scaled = us.unit_scaled(fn)
        total = sum(e.primitive.name == "unit_scale" for e in jax.make_jaxpr(scaled)(p, x, y).eqns)
        refused = 0
        for at in range(0, total, 3):
            numbers = itertools.count()

            def off(site, xs, at=at, numbers=numbers):
                by = 1.01 if next(numbers) == at else 1.0
                params = site.eqn.params
                return [us.fwd_bwd.scale(xs[0], fwd=params["fwd"], bwd=params["bwd"] * by)]

            def one_off(p, x, y, off=off, numbers=numbers):
                return us.trace.rewritten(scaled, {"unit_scale": off})(p, x, y)

            try:
                constants = unit.constants(one_off, p, x, y)
            except ValueError as error:
                assert "two ways to the loss differ by a factor of 1.01" in str(error)
                refused += 1
                continue
            assert all(c > 0 for c in constants)
        assert 0 < refused < len(range(0, total, 3))


def test_constants_of_a_residual_by_hand():
    """E3: the embedding 1, the branch's weight D / tau."""

    def loss(p, x):
        h = x @ p["embedding"]
        branch, skip = unit.residual_split(h, 0.5)
        return unit.residual_add(jnp.tanh(unit.linear(branch, p["branch"])), skip, 0.5).sum()

    p = {"embedding": jnp.ones((4, 4)), "branch": jnp.ones((4, 4))}
    found = unit.constants(loss, p, jnp.ones((4, 4)))  # as many rows as inputs
    assert found["embedding"] == pytest.approx(1)
    assert found["branch"] == pytest.approx(5**0.5)


def test_constants_of_what_no_gradient_reaches_are_zero():
    loss = lambda p, x: (x @ p["w"] + 0 * jax.lax.stop_gradient(p["frozen"])).sum()
    p = {"w": jnp.ones((2, 2)), "frozen": jnp.ones(2), "unused": jnp.ones(3)}
    assert unit.constants(loss, p, jnp.ones((2, 2))) == {"w": 1.0, "frozen": 0.0, "unused": 0.0}


def test_the_proof_names_a_scale_that_it_cannot_enter():
    @jax.custom_vjp
    def hidden(x):
        return us.fwd_bwd.scale(x, fwd=2.0)

    hidden.defvjp(lambda x: (hidden(x), None), lambda _, g: (g,))
    with pytest.raises(ValueError, match="cannot enter"):
        unit.constants(lambda w, x: hidden(x @ w).sum(), jnp.ones((2, 2)), jnp.ones((2, 2)))


def test_a_thousand_uses_in_a_row_keep_factors_that_floats_hold():
    def loss(p, x):
        h = x @ p
        for _ in range(1000):
            h = h + jnp.roll(h, 1, 0) * 0.5
        return (h @ p).sum()

    p, x = jnp.ones((4, 4)), jnp.ones((2, 4))
    text = str(jax.make_jaxpr(us.unit_scaled(loss))(p, x))
    assert "bwd=0.0" not in text and "inf" not in text and "nan" not in text
    assert unit.constants(us.unit_scaled(loss), p, x) > 0


# ------------------------------------------------------------------------------- transformations


def test_it_commutes_with_jit_and_vmap():
    p = kernels(5)
    scaled = us.unit_scaled(pre_norm)
    eager, jitted = jax.grad(scaled)(p, X, Y), jax.jit(jax.grad(scaled))(p, X, Y)
    for a, b in zip(eager, jitted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    many = jax.vmap(jax.grad(scaled), in_axes=(None, 0, 0))
    batches = jnp.stack([X, Y]), jnp.stack([Y, X])
    one_by_one = [jax.grad(scaled)(p, a, b) for a, b in zip(*batches, strict=True)]
    together = many(p, *batches)
    for k, leaves in enumerate(zip(*one_by_one, strict=True)):
        np.testing.assert_allclose(together[k], jnp.stack(leaves), rtol=1e-4, atol=1e-5)


def test_a_loss_after_the_last_parameter_keeps_its_value():
    """Cross entropy of logits of any scale is that of optax on them; nothing divides the loss."""
    head = lambda p, x: x @ p["w"]
    loss = lambda p, x: -jax.nn.log_softmax(head(p, x))[:, 0].mean()
    p = {"w": jnp.zeros((WIDTH, 7))}
    assert us.unit_scaled(loss)(p, X) == pytest.approx(np.log(7), rel=1e-6)


def test_taus_are_taken_in_the_order_of_evaluation():
    p = kernels(5)
    default = us.unit_scaled(pre_norm)(p, X, Y)
    assert us.unit_scaled(pre_norm, taus=unit.taus(2))(p, X, Y) == default
    assert us.unit_scaled(pre_norm, taus=(0.3, 0.4))(p, X, Y) != default


def test_layers_of_a_loop_have_the_weights_of_layers_in_a_row():
    """The forward pass of a scan over layers is that of the layers one after the other."""

    def looped(p, x, y):
        h = x @ p[0]
        for w in zip(p[1:4], p[4:7], strict=True):
            h = h + gelu(norm(h) @ w[0]) @ w[1]
            h = h + jnp.tanh(norm(h) @ w[1]) @ w[0]
        return (h @ p[7] * y).sum()

    p = kernels(8)
    values = [us.unit_scaled(fn)(p, X, Y) for fn in (scanned, looped)]
    np.testing.assert_allclose(*values, rtol=1e-4)


def test_parts_of_a_batch_add_up_with_their_ratio():
    def loss(params, batch):
        logits = jnp.tanh(batch["x"] @ params["a"]) @ params["b"]
        return us.Mean(((logits - batch["y"]) ** 2).sum(-1), jnp.ones(len(logits)))

    params = dict(zip("ab", kernels(2), strict=True))
    batch = {"x": X, "y": Y}
    whole = us.value_and_grad(us.unit_scaled(loss))(params, batch)
    scaled = us.unit_scaled(loss, batch_ratio=4)
    parts = us.accumulated(us.value_and_grad(scaled), 4)(params, batch)
    for a, b in zip(*map(jax.tree.leaves, (whole, parts)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------- report


def test_every_product_has_a_note_and_what_is_left_its_reason():
    @jax.custom_vjp
    def own(x):
        return x * 2

    own.defvjp(lambda x: (own(x), None), lambda _, g: (g * 2,))

    def loss(p, x):
        h = jax.lax.fori_loop(0, x.shape[0] - x.shape[0] + 2, lambda _, h: h @ p["a"], x)
        return own(h @ p["b"]).sum()

    def data_loop(p, x):
        h = jax.lax.while_loop(lambda h: h.sum() < 0, lambda h: h * 2, x)
        return own(h @ p["b"]).sum()

    p = {"a": jnp.ones((WIDTH, WIDTH)), "b": jnp.ones((WIDTH, WIDTH))}
    report = us.explain(us.unit_scaled(loss))(p, X)
    assert all(row.notes.get("unit") for row in report.products.rows)
    left = us.explain(us.unit_scaled(data_loop))(p, X).left
    assert any("custom_vjp_call" in row.notes["unit"] for row in left)


def test_a_composite_has_the_factors_it_was_given():
    @unit.composite(fwd=3.0, bwd=[0.5])
    def tripled(x):
        return jnp.sort(x, axis=-1)

    twin = unit.composite(fwd=3.0, bwd=lambda x: 1.0)(lambda x: jnp.sort(x, axis=-1))
    other = lambda p, x: (twin(x @ p["a"]) @ p["b"]).sum()
    loss = lambda p, x: (tripled(x @ p["a"]) @ p["b"]).sum()
    p = dict(zip("ab", kernels(2), strict=True))
    plain = tripled(X)
    np.testing.assert_array_equal(plain, jnp.sort(X, axis=-1))
    rows = us.explain(us.unit_scaled(loss))(p, X).rows
    (note,) = [row.notes["unit"] for row in rows if row.name == "sort"]
    assert note.startswith("composite tripled: 3 | ")
    constants = [unit.constants(us.unit_scaled(fn), p, X)["a"] for fn in (loss, other)]
    assert constants[0] / constants[1] == pytest.approx(0.5)


def test_what_is_kept_stays_as_large_as_it_is():
    loss = lambda p, x: ((x @ p["a"]) @ p["b"]).sum()
    p = dict(zip("ab", kernels(2), strict=True))
    text = str(jax.make_jaxpr(us.unit_scaled(loss, keep=["a"]))(p, X))
    assert text.count(f"fwd={WIDTH**-0.5}") == 0  # the last product is the tail's own
    assert str(jax.make_jaxpr(us.unit_scaled(loss))(p, X)).count(f"fwd={WIDTH**-0.5}") >= 1


# --------------------------------------------------------------------------------------- errors

BAD = {
    "no loss": (
        lambda: us.unit_scaled(lambda p, x: x @ p)(jnp.ones((WIDTH, 2)), X),
        "Put the loss",
    ),
    "no parameter": (lambda: us.unit_scaled(lambda p, x: x.sum())(jnp.ones(2), X), "no parameter"),
    "taus": (
        lambda: us.unit_scaled(pre_norm, taus=(0.5,))(kernels(5), X, Y),
        "taus has 1 weights, and the function has 2 residual branches",
    ),
    "negative taus": (
        lambda: us.unit_scaled(pre_norm, taus=(0.5, -1))(kernels(5), X, Y),
        "expected positive",
    ),
    "a pattern": (
        lambda: us.unit_scaled(mlp, keep=["heed"])(kernels(3), X, Y),
        "keep: 'heed' matched no parameter",
    ),
    "factors": (lambda: us.unit_scaled(mlp, factors="exakt"), "closest: 'exact'"),
    "fitted factors": (lambda: us.unit_scaled(mlp, factors="graphcore"), "single operations"),
    "a ratio": (lambda: us.unit_scaled(mlp, batch_ratio=0), "batch_ratio is 0"),
    "a composite": (lambda: unit.composite(fwd=-1.0, bwd=1.0), "expected positive"),
    "factors of a composite": (
        lambda: us.unit_scaled(
            lambda p, x: (unit.composite(1.0, [1.0, 2.0])(jnp.sin)(x @ p) @ p).sum()
        )(jnp.ones((WIDTH, WIDTH)), X),
        "2 backward factors and 1 operands",
    ),
}


@pytest.mark.parametrize("slip", BAD)
def test_a_slip_is_told_with_the_way_out(slip):
    call, words = BAD[slip]
    with pytest.raises(ValueError, match=words):
        call()


def test_a_gradient_station_is_refused():
    with pytest.raises(TypeError, match="Put unit_scaled inside"):
        us.unit_scaled(us.value_and_grad(mlp))
