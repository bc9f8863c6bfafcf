"""Laws of pipelines: the gradients of one device, whatever the schedule, parts and stages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unitscale_jax as us
from unitscale_jax.loss import weights_of
from unitscale_jax.trace.costs._hlo import collectives

WIDTH, VOCABULARY, LENGTH, LAYERS, ROWS = 8, 11, 5, 4, 12
TOLERANCE = 3e-6  # of a leaf's largest entry, in float32


def parameters(layers=LAYERS, dtype=jnp.float32, width=WIDTH):
    keys = iter(jax.random.split(jax.random.key(0), 2 + 2 * layers))
    draw = lambda *shape: jax.random.normal(next(keys), shape) / np.sqrt(shape[0])
    params = {"embed": draw(VOCABULARY, width), "head": draw(width, VOCABULARY)}
    params["norm"] = jnp.ones(width)
    for i in range(layers):
        up, down = draw(width, 2 * width), draw(2 * width, width)
        params[f"layer_{i}"] = {"up": up, "down": down, "bias": jnp.full(2 * width, 0.1)}
    return jax.tree.map(lambda x: x.astype(dtype), params)


def rows(count=ROWS, seed=1):
    keys = jax.random.split(jax.random.key(seed), 2)
    tokens = jax.random.randint(keys[0], (count, LENGTH + 1), 0, VOCABULARY)
    real = jax.random.bernoulli(keys[1], 0.6, (count, LENGTH)).astype(jnp.float32)
    return {"x": tokens[:, :-1], "y": tokens[:, 1:], "real": real}


def first(rest, batch, key=None):
    x = rest["embed"][batch["x"]]
    return x if key is None else dropped(x, key)


def layer(w, x, batch, key=None):
    del batch
    h = jax.nn.gelu(x @ w["up"] + w["bias"])
    return x + (h if key is None else dropped(h, key)) @ w["down"]


def head(rest, x, batch, key=None):
    """Tied to the embedding, beside a head of its own."""
    del batch
    x = x if key is None else dropped(x, key)
    return (x * rest["norm"]) @ rest["head"] + x @ rest["embed"].T


def dropped(x, keys):
    keep = jax.vmap(lambda k: jax.random.bernoulli(k, 0.7, x.shape[1:]))(keys)
    return jnp.where(keep, x / jnp.asarray(0.7, x.dtype), jnp.zeros((), x.dtype))


def loss(logits, batch):
    """Two terms of different denominators, one number per row."""
    logits = logits.astype(jnp.float32)
    norm = jax.nn.logsumexp(logits, -1)
    right = jnp.take_along_axis(logits, batch["y"][..., None], -1)[..., 0]
    return {
        "ce": us.Mean(jnp.sum(batch["real"] * (norm - right), -1), jnp.sum(batch["real"], -1)),
        "z": us.Mean(jnp.sum(norm**2, -1), jnp.full(len(norm), LENGTH), coef=0.25),
    }


PIECES = (first, layer, head, loss)


def plain(params, batch, key=None, pieces=PIECES, count=LAYERS):
    """The model as one writes it for one device, layer by layer."""
    first, layer, head, loss = pieces
    place = lambda i: (
        {} if key is None else {"key": jax.vmap(lambda k: jax.random.fold_in(k, i))(key)}
    )
    x = first(params, batch, **place(0))
    for i in range(count):
        x = layer(params[f"layer_{i}"], x, batch, **place(1 + i))
    return loss(head(params, x, batch, **place(1 + count)), batch)


def on(stages, **others):
    """A mesh of all devices with that many stages."""
    return jax.set_mesh(us.parallel.mesh(pp=stages, **(others or {"dp": -1})))


def distance(got, want):
    """The largest difference of a leaf, as a fraction of the leaf's largest entry."""
    far = lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(far(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)


def assert_equal(got, want, tolerance=TOLERANCE):
    assert got[0].keys() == want[0].keys()
    for name, term in want[0].items():
        assert float(got[0][name].weight) == float(term.weight)
        assert float(got[0][name].coef) == float(term.coef)
        assert np.isclose(got[0][name].total, term.total, rtol=10 * tolerance)
    grads = us.parallel.unstack(got[2])
    assert jax.tree.structure(grads) == jax.tree.structure(want[2])
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    assert distance(grads, want[2]) <= tolerance


@functools.cache
def whole():
    return jax.jit(us.value_and_grad(plain))(parameters(), rows())


KINDS = {
    "1f1b": (4, 1, 6, {"skip_idle": True}),
    "1f1b, stashed": (4, 1, 6, {"residuals": "stash", "skip_idle": True}),
    "1f1b, unskipped": (2, 1, 3, {"skip_idle": False}),
    "1f1b, fewer parts than stages": (4, 1, 2, {}),
    "gpipe": (4, 1, 3, {"schedule": "gpipe", "skip_idle": True}),
    "circular": (2, 2, 3, {"schedule": "circular"}),
    "circular, stashed": (2, 2, 4, {"schedule": "circular", "residuals": "stash"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_gradient_on_one_device_for_every_schedule(kind):
    stages, repeats, parts, options = KINDS[kind]
    params = us.parallel.stack(parameters(), "layer_*", stages, repeats)
    grad_fn = us.parallel.pipelined(*PIECES, parts=parts, **options)
    with on(stages):
        assert_equal(jax.jit(grad_fn)(params, rows()), whole())


@pytest.mark.parametrize(("stages", "repeats"), [(4, 1), (2, 2), (1, 1)])
def test_forward_passes_give_outputs_and_losses_of_every_row_in_order(stages, repeats):
    params, batch = us.parallel.stack(parameters(), "layer_*", stages, repeats), rows(10)
    grad_fn = us.parallel.pipelined(
        *PIECES, parts=4, schedule="circular" if repeats > 1 else "1f1b"
    )
    logits_of = functools.partial(plain, pieces=(*PIECES[:3], lambda logits, batch: logits))
    want = plain(parameters(), batch), logits_of(parameters(), batch)
    served = {"x": batch["x"]}
    with on(stages):
        terms, logits = jax.jit(lambda p, b: (grad_fn.loss(p, b), grad_fn.apply(p, served)))(
            params, batch
        )
        one = grad_fn.apply(params, {"x": batch["x"][:3]}) if repeats == 1 else logits[:3]
    assert terms["ce"].total.shape == (10,) and logits.shape == (10, LENGTH, VOCABULARY)
    assert distance((terms, logits, one), (*want, want[1][:3])) <= TOLERANCE


@pytest.mark.parametrize("parts", [1, 4])
def test_one_stage_is_accumulation_to_the_bit(parts):
    params, batch = us.parallel.stack(parameters(), "layer_*", 1), rows()

    def scanned(params, batch):
        x = first(params.beside(), batch)
        layers = jax.tree.map(lambda w: w[0, 0], params.layers)
        x = jax.lax.scan(lambda x, w: (layer(w, x, batch), None), x, layers)[0]
        return loss(head(params.beside(), x, batch), batch)

    grad_fn = us.parallel.pipelined(*PIECES, parts=parts)
    with on(1):
        got = jax.jit(grad_fn)(params, batch)
    want = jax.jit(us.accumulated(us.value_and_grad(scanned), parts))(params, batch)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.array_equal(a, b)


def test_rows_that_do_not_count_and_what_the_whole_batch_weighs_are_as_on_one_device():
    batch, valid = rows(10), jnp.arange(10) != 3  # four parts of three rows, two of them fillers
    given = {
        "denominators": {"ce": jnp.float32(100), "z": jnp.float32(77)},
        "scale": 8.0,
        "valid": valid,
    }
    want = jax.jit(functools.partial(us.value_and_grad(plain), **given))(parameters(), batch)
    params = us.parallel.stack(parameters(), "layer_*", 2)
    grad_fn = us.parallel.pipelined(*PIECES, parts=4)
    with on(2):
        assert_equal(jax.jit(functools.partial(grad_fn, **given))(params, batch), want)
    assert float(want[0]["z"].weight) == 9 * LENGTH


@pytest.mark.parametrize(
    ("stages", "repeats", "parts", "options"),
    [(4, 1, 3, {}), (2, 2, 6, {"schedule": "circular", "residuals": "stash"})],
)
def test_dropout_depends_on_the_row_and_the_layer_alone(stages, repeats, parts, options):
    key, batch = jax.random.key(5), rows()
    want = jax.jit(us.value_and_grad(plain))(parameters(), batch, key=key)
    params = us.parallel.stack(parameters(), "layer_*", stages, repeats)
    grad_fn = us.parallel.pipelined(*PIECES, parts=parts, **options)
    with on(stages):
        assert_equal(jax.jit(grad_fn)(params, batch, key=key), want)


def hollow(w, x, batch):
    """A layer that is NaN at zero, which is what bubbles hold, and so is its derivative."""
    return layer(w, x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)), batch)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_what_bubbles_hold_does_not_leak(schedule):
    pieces = (first, hollow, head, loss)
    assert np.isnan(hollow(parameters()["layer_0"], jnp.zeros((1, 1, WIDTH)), None)).all()
    want = jax.jit(us.value_and_grad(functools.partial(plain, pieces=pieces)))(parameters(), rows())
    params = us.parallel.stack(parameters(), "layer_*", 4)
    grad_fn = us.parallel.pipelined(*pieces, parts=3, schedule=schedule, skip_idle=False)
    with on(4):
        assert_equal(jax.jit(grad_fn)(params, rows()), want)


def test_the_loss_scale_enters_where_the_backward_pass_begins():
    """In float16: gradients that vanish unscaled are there, as they are on one device."""
    faint = lambda out, batch: us.Mean(loss(out, batch)["z"].total * 2.0**-28, jnp.ones(len(out)))
    pieces, scale = (first, layer, head, faint), 2.0**24
    params, batch = parameters(dtype=jnp.float16), rows()
    want = jax.jit(us.value_and_grad(functools.partial(plain, pieces=pieces)))(
        params, batch, scale=scale
    )
    grad_fn = us.parallel.pipelined(*pieces, parts=3)
    with on(2):
        step = jax.jit(grad_fn)
        stacked = us.parallel.stack(params, "layer_*", 2)
        scaled, unscaled = (step(stacked, batch, scale=jnp.float32(s))[2] for s in (scale, 1.0))
    zeros = lambda tree: np.mean(np.concatenate([np.ravel(x) == 0 for x in jax.tree.leaves(tree)]))
    assert zeros(unscaled.layers) > 0.9 and zeros(scaled.layers) < 0.05
    assert distance(us.parallel.unstack(scaled), want[2]) < 0.02  # a few roundings of float16


def test_composes_with_a_data_axis_a_tensor_axis_and_autocast():
    """Three axes; and over the data axis nothing is reduced inside a loop."""
    low = functools.partial(us.autocast, compute="bfloat16")
    pieces = (low(first), low(layer), low(head), loss)
    batch = rows(10)  # which neither two devices nor three parts divide
    want = jax.jit(us.value_and_grad(functools.partial(plain, pieces=pieces)))(parameters(), batch)
    mesh = us.parallel.mesh(dp=2, pp=2, tp=2)
    placed = {1: "pp"}
    rules = {
        "layer_*/up": placed | {-1: "tp"},
        "layer_*/down": placed | {-2: "tp"},
        "layer_*/bias": placed | {-1: "tp"},
    }
    params = us.parallel.stack(parameters(), "layer_*", 2)
    layout = us.parallel.layout(params, rules, mesh)
    grad_fn = us.parallel.reduced(us.parallel.pipelined(*pieces, parts=3), "dp", layout=layout)
    with jax.set_mesh(mesh):
        step = jax.jit(grad_fn).lower(us.parallel.shard(params, layout), batch).compile()
        got = step(us.parallel.shard(params, layout), batch)
    assert_equal(got, want, tolerance=3e-2)  # matmuls in bfloat16
    found = collectives(step, mesh)
    assert not [c for c in found if "dp" in c.axes and c.loops]
    assert [c for c in found if c.axes == ("tp",) and c.loops]  # of layers, in the loop over ticks
    assert {c.kind for c in found if c.axes == ("pp",) and c.loops} == {"collective-permute"}


@functools.cache
def compiled(parts, width=WIDTH, per_part=8, **options):
    params = us.parallel.stack(parameters(width=width), "layer_*", 4)
    batch = rows(parts * per_part)
    grad_fn = us.parallel.pipelined(*PIECES, parts=parts, **options)
    with on(4):
        return jax.jit(grad_fn).lower(params, batch).compile(), us.tree.nbytes(batch)


def temporaries(*args, **options):
    program, batch = compiled(*args, **options)
    # The batch is dealt out to parts, and those are a copy of it; no activation is among them.
    return program.memory_analysis().temp_size_in_bytes - batch


def test_memory_of_1f1b_does_not_grow_with_the_parts():
    assert temporaries(32) - temporaries(8) <= 1024
    one_activation = 8 * LENGTH * WIDTH * 4
    gpipe = {"schedule": "gpipe"}
    assert temporaries(32, **gpipe) - temporaries(8, **gpipe) >= 24 * one_activation


def test_stashing_keeps_activations_and_no_weights():
    wide = {"width": 64, "per_part": 1}
    more = temporaries(8, residuals="stash", **wide) - temporaries(8, **wide)
    kept = 7 * LENGTH * (64 + 7 * 128) * 4  # seven parts in flight; nothing is saved twice
    weights = 7 * 2 * 64 * 128 * 4
    assert 0 < more < 1.5 * kept < weights


def test_every_tick_sends_one_activation_each_way_and_the_rest_is_reduced_once():
    program, _ = compiled(8)
    found = collectives(program, us.parallel.mesh(pp=4, dp=2))
    sent = [c for c in found if c.kind == "collective-permute"]
    ticks = len(us.parallel.Schedule("1f1b", 4, 8).ticks)
    assert sum(c.bytes * c.times for c in sent) == 2 * ticks * 8 * LENGTH * WIDTH * 4
    rest = us.tree.nbytes({k: v for k, v in parameters().items() if "layer" not in k})
    reduced = sum(c.bytes * c.times for c in found if c.kind == "all-reduce" and c.axes == ("pp",))
    assert rest <= reduced <= rest + 64


def test_each_stage_runs_each_part_once_forward_and_once_backward():
    """Counted on the devices: no stage works in a bubble."""
    calls = []

    @jax.custom_vjp
    def counted(x):
        return x

    def backward(_, ct):
        jax.debug.callback(lambda: calls.append("B"))
        return (ct,)

    def forward(x):
        jax.debug.callback(lambda: calls.append("F"))
        return x, None

    counted.defvjp(forward, backward)
    pieces = (first, lambda w, x, batch: layer(w, counted(x), batch), head, loss)
    params = us.parallel.stack(parameters(), "layer_*", 4)
    with jax.set_mesh(us.parallel.mesh(pp=4, devices=jax.devices()[:4])):
        jax.block_until_ready(jax.jit(us.parallel.pipelined(*pieces, parts=3))(params, rows()))
        jax.effects_barrier()
    assert calls.count("B") == LAYERS * 3
    # Forward passes run a second time within backward ones; of the last stage that is the only one.
    assert calls.count("F") == LAYERS * 3


def test_weights_are_known_without_running_the_pipeline():
    params = us.parallel.stack(parameters(), "layer_*", 2)
    grad_fn = us.parallel.pipelined(*PIECES, parts=3)
    with on(2):
        weigh = lambda p, b: weights_of(grad_fn.loss, p, b)
        text = str(jax.make_jaxpr(weigh)(params, rows()))
        weights = weigh(params, rows())
    assert "shard_map" not in text and "dot_general" not in text
    assert float(weights["z"]) == ROWS * LENGTH


def test_a_mesh_that_the_compiler_would_abort_on_is_refused():
    params = us.parallel.stack(parameters(), "layer_*", 2)
    grad_fn = us.parallel.reduced(us.parallel.pipelined(*PIECES, parts=3), "dp")
    with (
        jax.set_mesh(us.parallel.mesh(pp=2, dp=2, tp=2)),
        pytest.raises(ValueError, match="'pp' comes before 'dp', .*mesh\\(dp=2, pp=2, tp=2\\)"),
    ):
        grad_fn(params, rows())


def test_what_cannot_be_a_pipeline_says_why():
    params = us.parallel.stack(parameters(), "layer_*", 4)
    make = functools.partial(us.parallel.pipelined, parts=4)
    with pytest.raises(ValueError, match="`schedule` is 'zigzag'; expected 'gpipe'"):
        make(*PIECES, schedule="zigzag")
    with pytest.raises(ValueError, match="`residuals` is 'none'"):
        make(*PIECES, residuals="none")
    with pytest.raises(ValueError, match="there is no mesh here"):
        make(*PIECES)(params, rows())
    with on(2), pytest.raises(ValueError, match="stacked for 4 stages, and .*'pp' has 2 devices"):
        make(*PIECES)(params, rows())
    with on(4):
        expect = lambda match, *pieces, p=params, batch=None: pytest.raises(ValueError, match=match)
        with expect("hold 0 stacks of layers"):
            make(*PIECES)(parameters(), rows())
        with expect("cannot make 4 parts"):
            make(*PIECES)(params, rows(3))
        with expect(r"takes float32\[3, 5, 8\] and returns float32\[3, 5, 11\]"):
            make(first, lambda w, x, b: x @ jnp.ones((8, 11)), head, loss)(params, rows())
        with expect(r"returns bfloat16.* Cast or project"):
            make(first, lambda w, x, b: x.astype(jnp.bfloat16), head, loss)(params, rows())
        with expect("`first` returns int32.*keep masks and positions there"):
            make(lambda r, b: b["x"], layer, head, loss)(params, rows())
        with expect("returned a tuple.*coef=0.0"):
            make(first, layer, head, lambda o, b: (loss(o, b), o))(params, rows())
        summed = lambda o, b: us.Mean(jnp.sum(o), o.size)
        with expect("4 parts do not divide 10 rows, and term 'loss' sums its rows itself"):
            make(first, layer, head, summed)(params, rows(10))
        heavy = lambda o, b: us.Mean(jnp.sum(o), jnp.sum(jnp.abs(o)))
        with expect("the weight of term 'loss' depends on the parameter 'layer_"):
            make(first, layer, head, heavy)(params, rows())
    circle = us.parallel.stack(parameters(), "layer_*", 2, 2)
    with on(2):
        with pytest.raises(ValueError, match="1 parts come round .* 2 stages"):
            us.parallel.pipelined(*PIECES, parts=1, schedule="circular")(circle, rows())
        with pytest.raises(ValueError, match="Use schedule='circular'"):
            make(*PIECES)(circle, rows())
