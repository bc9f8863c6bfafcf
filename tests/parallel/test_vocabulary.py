"""Laws of a split vocabulary: losses, tables and choices are those of the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax.sharding import PartitionSpec as P

from tests.support.sharded import assert_near
from tests.support.zoo._model import activations
from unitscale_jax import parallel

VOCAB, SHARE = 24, 6
ROWS = 8


def whole_loss(logits, labels):
    logp = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logp, labels[:, None], axis=-1)[:, 0]


@functools.cache
def split(dtype="float32"):
    """Losses, and the gradient of their weighted sum, both ways of differentiating."""
    mesh = parallel.mesh(dp=2, tp=4)
    loss = lambda x, y: parallel.vocab_loss(x, y, "tp")
    total = lambda x, y, c: jnp.sum(loss(x, y) * c)
    specs = (P(None, "tp"), P(), P())
    outside = jax.shard_map(total, in_specs=specs, out_specs=P())
    inside = jax.shard_map(jax.grad(total), in_specs=specs, out_specs=P(None, "tp"))
    losses = jax.shard_map(loss, in_specs=specs[:2], out_specs=P())
    best = jax.shard_map(
        lambda x: parallel.vocab_argmax(x, "tp"), in_specs=P(None, "tp"), out_specs=P()
    )

    @jax.jit
    def run(x, y, c):
        return losses(x, y), jax.grad(outside)(x, y, c), inside(x, y, c), best(x)

    def in_mesh(*args):
        with jax.set_mesh(mesh):
            return run(*args)

    return in_mesh


@jax.jit
def of_one_device(x, y, c):
    grads = jax.grad(lambda x: jnp.sum(whole_loss(x, y) * c))(x)
    return whole_loss(x, y), grads, grads, jnp.argmax(x, -1).astype(jnp.int32)


BORDERS = [0, SHARE - 1, SHARE, 2 * SHARE - 1, 2 * SHARE, 3 * SHARE, VOCAB - 1, 13]


@given(
    seed=st.integers(0, 99),
    labels=st.permutations(BORDERS),
    gone=st.sampled_from([None, 0, 1, 3]),
    size=st.sampled_from([1.0, 30.0]),
)
def test_the_loss_of_a_split_vocabulary_is_that_of_the_whole(seed, labels, gone, size):
    """Labels on the borders of parts, a part all -inf, logits that overflow without a shift."""
    logits, labels = size * activations(ROWS, VOCAB, seed=seed), jnp.array(labels, jnp.int32)
    if gone is not None:
        part = jnp.arange(VOCAB) // SHARE
        logits = jnp.where(part == gone, -jnp.inf, logits)
        labels = jnp.where(labels // SHARE == gone, (gone + 1) % 4 * SHARE, labels)
    coef = activations(ROWS, seed=seed + 1)
    got, want = split()(logits, labels, coef), of_one_device(logits, labels, coef)
    assert np.isfinite(got[0]).all()
    assert_near(got[:3], want[:3])
    np.testing.assert_array_equal(got[3], want[3])


def test_the_loss_in_float64():
    with jax.enable_x64(True):
        logits = activations(ROWS, VOCAB).astype("float64")
        args = logits, jnp.array(BORDERS, jnp.int32), jnp.ones(ROWS, "float64")
        assert_near(split("float64")(*args)[:3], of_one_device(*args)[:3])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_worked_example(tp):
    logits, labels = jnp.log(jnp.array([[1.0, 2, 3, 4]])), jnp.array([2])
    with jax.set_mesh(parallel.mesh(dp=-1, tp=tp)):
        loss = jax.shard_map(
            lambda x, y: parallel.vocab_loss(x, y, "tp"),
            in_specs=(P(None, "tp"), P()),
            out_specs=P(),
        )
        got, pull = jax.vjp(jax.jit(lambda x: loss(x, labels)), logits)
        np.testing.assert_allclose(got, [1.2039728], rtol=1e-6)
        np.testing.assert_allclose(pull(jnp.ones(1))[0], [[0.1, 0.2, -0.7, 0.4]], rtol=1e-5)


def test_bfloat16_logits_have_a_float32_loss():
    logits = activations(ROWS, VOCAB).astype("bfloat16")
    args = jnp.array(BORDERS, jnp.int32), jnp.ones(ROWS)
    got, want = split()(logits, *args), of_one_device(logits.astype("float32"), *args)
    assert got[0].dtype == jnp.float32 and got[1].dtype == jnp.bfloat16
    assert_near(got[0], want[0])


def test_words_that_pad_the_table_have_no_part():
    """21 words in a table of 24."""
    logits, labels, few = activations(ROWS, VOCAB), jnp.arange(ROWS, dtype=jnp.int32) + 13, 21
    with jax.set_mesh(parallel.mesh(dp=2, tp=4)):
        fns = [
            lambda x: parallel.vocab_loss(x, labels, "tp", vocab=few),
            lambda x: parallel.vocab_logsumexp(x, "tp", vocab=few),
            lambda x: parallel.vocab_argmax(x.at[:, -1].set(99.0), "tp", vocab=few),
        ]
        both = jax.shard_map(lambda x: [fn(x) for fn in fns], in_specs=P(None, "tp"), out_specs=P())
        loss, norm, best = jax.jit(both)(logits)
    real = logits[:, :few]
    assert_near(loss, whole_loss(real, labels))
    assert_near(norm, jax.nn.logsumexp(real, axis=-1))
    # Each part's last word was made the largest: the first such word that is none of the padding.
    np.testing.assert_array_equal(best, SHARE - 1)


@pytest.mark.parametrize("sequence", [None, 0])
def test_a_table_split_by_rows_is_the_table_exactly(sequence):
    table, ids = activations(VOCAB, 5), jnp.array([*BORDERS[:6], 7, 7], jnp.int32)
    coef = activations(8, 5, seed=1)
    out = P() if sequence is None else P("tp")
    with jax.set_mesh(parallel.mesh(dp=2, tp=4)):
        look = jax.shard_map(
            lambda t: parallel.vocab_embed(t, ids, "tp", sequence=sequence),
            in_specs=P("tp"),
            out_specs=out,
        )
        got = jax.jit(lambda t: (look(t), jax.grad(lambda t: jnp.sum(look(t) * coef))(t)))(table)
    np.testing.assert_array_equal(got[0], table[ids])
    want = jax.grad(lambda t: jnp.sum(t[ids] * coef))(table)
    np.testing.assert_array_equal(got[1], want)
