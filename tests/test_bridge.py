"""Laws of the bridge from Flax."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import unitscale_jax as us
from unitscale_jax.bridge import Bridged, from_linen, from_nnx

ROWS = 6
KEY = jax.random.key(3)
X = jax.random.normal(jax.random.key(1), (ROWS, 4))


class LinenNet(nn.Module):
    """Two layers, dropout, and batch statistics where asked for."""

    norm: bool = False
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, train=True):
        x = jnp.tanh(nn.Dense(8, name="inner")(x))
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(self.rate, deterministic=not train, name="drop")(x)
        return nn.Dense(3, name="outer")(x)


class NnxNet(nnx.Module):
    """The twin."""

    def __init__(self, *, norm=False, rate=0.5, rngs):
        self.inner = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs) if norm else None
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.outer = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.inner(x))
        x = x if self.norm is None else self.norm(x)
        return self.outer(self.drop(x))


def linen(**kwargs):
    module = LinenNet(**kwargs)
    return module, module.init(jax.random.key(0), X, train=False)


def nnx_net(**kwargs):
    return NnxNet(rngs=nnx.Rngs(0), **kwargs)


def bridged(kind, rows="auto", **kwargs):
    if kind == "linen":
        return from_linen(*linen(**kwargs), rows=rows)
    return from_nnx(nnx_net(**kwargs), rows=rows)


def assert_same_bits(came, expected):
    chex.assert_trees_all_equal(came, expected, strict=True)


KINDS = pytest.mark.parametrize("kind", ["linen", "nnx"])


# Apply is what Flax computes.


def test_linen_apply_equals_module_apply():
    module, variables = linen(norm=True)
    apply, params, state = from_linen(module, variables)
    assert_same_bits(
        apply(params, X, state=state, key=KEY),
        module.apply(variables, X, rngs={"dropout": KEY}, mutable=["batch_stats"]),
    )
    expected = module.apply(variables, X, train=False)
    assert_same_bits(apply(params, X, train=False, state=state)[0], expected)


def test_nnx_apply_equals_the_model():
    model = nnx_net(norm=True, rate=0.0)
    apply, params, state = from_nnx(model)
    outputs, new_state = apply(params, X, state=state)
    assert_same_bits(outputs, model(X))
    assert_same_bits(new_state, nnx.state(model, nnx.BatchStat))


def test_nnx_streams_start_from_the_key():
    model = nnx_net()
    model(X)  # which moves the counter of the stream
    apply, params, _ = from_nnx(model)
    crc = np.uint32(0x729D8A4E)  # of drop/rngs/key
    model.drop.rngs.key[...] = jax.random.fold_in(KEY, crc)
    model.drop.rngs.count[...] = jnp.uint32(0)
    assert_same_bits(apply(params, X, key=KEY), model(X))


def test_linen_gradients_equal_those_of_module_apply():
    module, variables = linen()
    apply, params, _ = from_linen(module, variables)
    ours = jax.grad(lambda p: jnp.sum(apply(p, X, key=KEY) ** 2))(params)
    apply_of = lambda p: module.apply({"params": p}, X, rngs={"dropout": KEY})
    assert_same_bits(ours, jax.grad(lambda p: jnp.sum(apply_of(p) ** 2))(variables["params"]))


def test_nnx_gradients_equal_nnx_grad():
    model = nnx_net(norm=True, rate=0.0)
    apply, params, state = from_nnx(model)
    ours = jax.grad(lambda p: jnp.sum(apply(p, X, state=state)[0] ** 2))(params)
    theirs = nnx.grad(lambda m: jnp.sum(m(X) ** 2))(model)
    assert_same_bits(jax.tree.leaves(ours), jax.tree.leaves(theirs))
    assert us.tree.names(ours) == us.tree.names(theirs)


@KINDS
def test_running_statistics_after_three_steps_equal_flaxs(kind):
    batches = [X, 2 * X, X + 1]
    apply, params, state = bridged(kind, norm=True, rate=0.0)
    for x in batches:
        _, state = apply(params, x, state=state)
    if kind == "linen":
        module, variables = linen(norm=True, rate=0.0)
        for x in batches:
            _, changed = module.apply(variables, x, mutable=["batch_stats"])
            variables = variables | changed
        expected = {"batch_stats": variables["batch_stats"]}
    else:
        model = nnx_net(norm=True, rate=0.0)
        for x in batches:
            model(x)
        expected = nnx.state(model, nnx.BatchStat)
    assert_same_bits(state, expected)
    means = [leaf for name, leaf in us.tree.named_leaves(state).items() if name.endswith("mean")]
    assert jnp.all(means[0] != 0)


# Names, shapes and what is a parameter.


def test_linen_and_nnx_twins_have_the_same_names():
    expected = [f"{layer}/{leaf}" for layer in ("inner", "outer") for leaf in ("bias", "kernel")]
    for kind in ("linen", "nnx"):
        assert us.tree.names(bridged(kind).params) == expected
    assert us.tree.names(bridged("nnx", norm=True).state) == ["norm/mean", "norm/var"]


def test_metadata_boxes_are_taken_off():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    module = nn.Dense(3, kernel_init=init)
    variables = module.init(KEY, X)
    apply, params, state = from_linen(module, variables)
    assert us.tree.names(params) == ["bias", "kernel"] and state == {}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert type(params["kernel"]) is not type(variables["params"]["kernel"])
    assert_same_bits(apply(params, X), module.apply(variables, X))


@KINDS
def test_a_model_without_state_has_an_empty_one(kind):
    apply, params, state = bridged(kind)
    assert not state and not jax.tree.leaves(state)
    outputs, new_state = apply(params, X, state=state, key=KEY)
    assert_same_bits(outputs, apply(params, X, key=KEY))
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


class Tied(nnx.Module):
    """An embedding used twice under two names, with an integer parameter and a cache."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.attend = self.embed
        self.shift = nnx.Param(jnp.array([1, 2], jnp.int32))
        self.mask = nnx.Param(jnp.array([True, False, True, True, True]))
        self.calls = nnx.Cache(jnp.zeros((), jnp.int32))

    def __call__(self, tokens):
        self.calls[...] += 1
        self.seen = nnx.Intermediate(tokens)
        return self.logits((tokens + jnp.sum(self.shift[...])) % 5)

    def logits(self, tokens):
        return jnp.where(self.mask[...], self.attend.attend(self.embed(tokens)), -1.0)


def test_shared_integer_and_boolean_parameters_survive():
    model = Tied(nnx.Rngs(0))
    tokens = jnp.array([[0, 1], [2, 3]])
    apply, params, state = from_nnx(model)
    assert us.tree.names(params) == ["attend/embedding", "mask", "shift"]
    outputs, new_state = apply(params, tokens, state=state)
    assert us.tree.names(new_state) == ["calls"] and jax.tree.leaves(new_state) == [1]
    assert_same_bits(outputs, model(tokens))
    loss = lambda p: jnp.sum(apply(p, tokens, state=state)[0] ** 2)
    ours = jax.grad(loss, allow_int=True)(params)["attend"]["embedding"].get_value()
    eps = jnp.zeros_like(ours).at[1, 2].set(1e-2)
    moved = lambda sign: jax.tree.map(
        lambda x: x + sign * eps if x.shape == eps.shape else x, params
    )
    slope = (loss(moved(1)) - loss(moved(-1))) / 2e-2
    np.testing.assert_allclose(ours[1, 2], slope, rtol=1e-2)  # both uses are counted


def test_a_method_can_be_named():
    model = Tied(nnx.Rngs(0))
    apply, params, state = from_nnx(model)
    tokens = jnp.array([1, 2])
    outputs, _ = apply(params, tokens, state=state, method="logits")
    assert_same_bits(outputs, model.logits(tokens))


# Nothing is mutated, every transform agrees.


def test_the_model_and_the_arguments_are_unchanged():
    model = nnx_net(norm=True)
    apply, params, state = from_nnx(model)
    before = jax.tree.map(jnp.copy, (nnx.state(model), params, state))
    apply(params, X, state=state, key=KEY)
    assert_same_bits((nnx.state(model), params, state), before)
    model(X + 1)
    model.inner.kernel[...] *= 2
    assert_same_bits((params, state), before[1:])
    np.testing.assert_array_equal(apply(params, X, state=state, key=KEY)[0].shape, (ROWS, 3))


def test_the_mode_is_that_of_the_model_when_it_was_bridged():
    model = nnx_net(norm=True)
    train = from_nnx(model)
    model.eval()
    serve = from_nnx(model)
    expected = model(X)
    model.train()
    assert_same_bits(serve.apply(train.params, X, state=serve.state)[0], expected)
    outputs, state = train.apply(train.params, X, state=train.state, key=KEY)
    assert not jnp.array_equal(outputs, expected)
    assert not jnp.array_equal(state["norm"]["mean"][...], train.state["norm"]["mean"][...])


@KINDS
def test_every_transform_agrees(kind):
    apply, params, state = bridged(kind, norm=True)
    expected = apply(params, X, state=state, key=KEY)
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
    close(jax.jit(apply)(params, X, state=state, key=KEY), expected)
    close(jax.checkpoint(apply)(params, X, state=state, key=KEY), expected)
    over_keys = jax.vmap(lambda key: apply(params, X, state=state, key=key))
    close(jax.tree.map(lambda x: x[1], over_keys(jnp.stack([jax.random.key(0), KEY]))), expected)

    def step(carried, x):
        outputs, carried = apply(params, x, state=carried, key=KEY)
        return carried, outputs

    last, outputs = jax.lax.scan(step, state, jnp.stack([X, X]))
    twice = apply(params, X, state=expected[1], key=KEY)
    close((outputs[0], last), (expected[0], twice[1]))
    loss = lambda fn: lambda p: jnp.sum(fn(p, X, state=state, key=KEY)[0] ** 2)
    close(jax.grad(loss(jax.checkpoint(apply)))(params), jax.grad(loss(apply))(params))


@KINDS
def test_apply_is_named_after_the_module(kind):
    assert bridged(kind).apply.__name__ in {"LinenNet_apply", "NnxNet_apply"}
    assert isinstance(bridged(kind), Bridged)


# One key per row.


@KINDS
def test_a_row_depends_on_its_own_key_and_on_nothing_else(kind):
    apply, params, _ = bridged(kind)
    apply, keys = jax.jit(apply), us.row_keys(KEY, ROWS)
    whole = apply(params, X, key=keys)
    order = jnp.array([3, 0, 5])
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
    close(apply(params, X[order], key=keys[order]), whole[order])
    for i in (0, 4):
        close(apply(params, X[i : i + 1], key=keys[i])[0], whole[i])
    same = apply(params, jnp.stack([X[0]] * ROWS), key=keys)
    assert len(np.unique(np.asarray(same), axis=0)) > 1


@KINDS
def test_the_number_of_parts_does_not_change_the_masks(kind):
    apply, params, _ = bridged(kind)

    def loss(params, batch, key):
        return us.Mean(jnp.sum(apply(params, batch, key=key) ** 2, axis=-1), jnp.ones(len(batch)))

    grad_fn = us.value_and_grad(loss)
    whole = jax.jit(grad_fn)(params, X, key=KEY)
    in_parts = jax.jit(us.accumulated(grad_fn, 4))(params, X, key=KEY)
    chex.assert_trees_all_close(in_parts[::2], whole[::2], rtol=1e-5, atol=1e-6)


@KINDS
def test_rows_are_mapped_where_the_state_does_not_change(kind):
    if kind == "linen":
        apply, params, state = bridged(kind, norm=True)
        outputs, new_state = apply(params, X, train=False, state=state, key=us.row_keys(KEY, ROWS))
    else:
        model = nnx_net(norm=True)
        model.norm.eval()
        apply, params, state = from_nnx(model)
        outputs, new_state = apply(params, X, state=state, key=us.row_keys(KEY, ROWS))
    assert outputs.shape == (ROWS, 3)
    assert_same_bits(new_state, state)


@KINDS
def test_a_model_that_mixes_rows_is_applied_whole_and_says_so_once(kind):
    apply, params, state = bridged(kind, norm=True)
    keys = us.row_keys(KEY, ROWS)
    with pytest.warns(UserWarning, match=r"Net: its state '.*norm/mean' changes.*rows='batch'"):
        came = apply(params, X, state=state, key=keys)
    assert_same_bits(came, apply(params, X, state=state, key=keys[0]))
    with warnings.catch_warnings(action="error"):
        apply(params, X, state=state, key=keys)
        quiet = bridged(kind, norm=True, rows="batch")
        assert_same_bits(quiet.apply(params, X, state=state, key=keys), came)


def test_an_output_without_rows_is_seen_as_mixing():
    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.5, deterministic=False)(x), {"mean": jnp.mean(x)}

    keys = us.row_keys(KEY, ROWS)
    apply, params, _ = from_linen(Pooled(), {})
    with pytest.warns(UserWarning, match=r"its output '1/mean' of shape \(\) has no rows"):
        _, aux = apply(params, X, key=keys)
    np.testing.assert_allclose(aux["mean"], jnp.mean(X), rtol=1e-6)
    with pytest.raises(ValueError, match=r"output '1/mean'.*but rows='vmap'.*Use rows='batch'"):
        from_linen(Pooled(), {}, rows="vmap").apply({}, X, key=keys)


def test_options_that_are_arrays_have_rows_and_others_are_shared():
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x, *, scale, sign=1):
            return nn.Dropout(0.5, deterministic=False)(x) * scale[:, None] * sign

    apply, params, _ = from_linen(Scaled(), {})
    keys, scale = us.row_keys(KEY, ROWS), jnp.arange(1.0, ROWS + 1)
    once = apply(params, X, scale=jnp.ones(ROWS), key=keys)
    scaled = apply(params, X, scale=scale, sign=-1, key=keys)
    np.testing.assert_allclose(scaled, -once * scale[:, None], rtol=1e-6)
    with pytest.raises(ValueError, match=r"options/scale has shape \(2,\), where 6 rows.*per key"):
        apply(params, X, scale=jnp.ones(2), key=keys)


# Misuse.


@KINDS
def test_a_raw_key_is_refused_with_the_way_out(kind):
    apply, params, _ = bridged(kind)
    raw = jax.random.key_data(KEY)
    with pytest.raises(TypeError, match=r"an array uint32\[2\].*jax\.random\.key\(seed\)"):
        apply(params, X, key=raw)
    with pytest.raises(TypeError, match="`key` is 0; expected a typed key"):
        apply(params, X, key=0)
    with pytest.raises(ValueError, match=r"key has shape \(2, 2\), expected \(\) or \(rows,\)"):
        apply(params, X, key=jax.random.split(KEY, (2, 2)))


@KINDS
def test_state_that_was_not_given_is_named(kind):
    apply, params, _ = bridged(kind, norm=True)
    with pytest.raises(ValueError, match=r"Net has state \(.*norm/mean.*state=state"):
        apply(params, X)


def test_a_draw_without_a_key_is_refused():
    apply, params, _ = bridged("nnx")
    with pytest.raises(ValueError, match=r"drew from its stream 'drop/rngs'.*key=jax\.random\.key"):
        apply(params, X)


def test_an_unknown_way_to_use_rows_is_refused():
    with pytest.raises(ValueError, match="`rows` is 'each'; expected 'auto', 'vmap' or 'batch'"):
        bridged("nnx", rows="each")
