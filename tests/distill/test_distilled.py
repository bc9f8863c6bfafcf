"""Laws of distilled losses: a loss as before, exact over parts, the old one at alpha 0."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unitscale_jax as us
from unitscale_jax.distill import (
    Term,
    chunked_kl,
    distilled,
    hidden_mse,
    kl,
    kl_top_k,
    teacher,
    top_k,
)

ROWS, TIME, VOCAB, WIDTH = 6, 5, 7, 4


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def apply(params, tokens):
    hidden = jnp.tanh(params["table"][tokens] @ params["mix"])
    return {"logits": hidden @ params["head"], "hidden": hidden}


def model(seed):
    shapes = {"table": (VOCAB, WIDTH), "mix": (WIDTH, WIDTH), "head": (WIDTH, VOCAB)}
    return {k: normal(seed + i, *shape) for i, (k, shape) in enumerate(shapes.items())}


def batch(rows=ROWS):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, TIME + 1, rows)
    return {
        "tokens": jnp.asarray(rng.integers(0, VOCAB, (rows, TIME)), jnp.int32),
        "mask": jnp.asarray(np.arange(TIME) < lengths[:, None]),
    }


def hard(params, batch):
    out = apply(params, batch["tokens"])
    log_q = jax.nn.log_softmax(out["logits"])
    losses = -jnp.take_along_axis(log_q, batch["tokens"][..., None], axis=-1)[..., 0]
    total = jnp.sum(jnp.where(batch["mask"], losses, 0), axis=-1)
    return us.Mean(total, jnp.sum(batch["mask"], axis=-1)), out


STUDENT, TEACHER = model(1), model(11)
frozen = teacher(apply, TEACHER)
answers = lambda batch: frozen(batch["tokens"])
counts = lambda batch: batch["mask"]
TERMS = {
    "kl": Term(lambda t, s: kl(t["logits"], s["logits"], 2.0), counts=counts),
    "hidden": Term(lambda t, s: hidden_mse(t["hidden"], s["hidden"]), counts=counts, weight=3.0),
}
soft = functools.partial(distilled, hard, answers, TERMS)


def close(a, b, tolerance=1e-5):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )


@jax.jit
@jax.value_and_grad
def hand(params, batch, alpha):
    """The value of the whole batch, without the contract of losses."""
    s, t, mask = apply(params, batch["tokens"]), apply(TEACHER, batch["tokens"]), batch["mask"]
    log_q = jax.nn.log_softmax(s["logits"])
    ce = -jnp.take_along_axis(log_q, batch["tokens"][..., None], axis=-1)[..., 0]
    mean = lambda x: jnp.sum(jnp.where(mask, x, 0)) / jnp.sum(mask, dtype=jnp.float32)
    p, log_p = jax.nn.softmax(t["logits"] / 2), jax.nn.log_softmax(t["logits"] / 2)
    divergence = 4 * jnp.sum(p * (log_p - jax.nn.log_softmax(s["logits"] / 2)), -1)
    square = jnp.mean((s["hidden"] - t["hidden"]) ** 2, -1)
    return (1 - alpha) * mean(ce) + alpha * (mean(divergence) + 3 * mean(square))


def test_is_the_weighted_sum_of_means_over_tokens_that_count():
    terms, _, grads = jax.jit(us.value_and_grad(soft(alpha=0.25)))(STUDENT, batch())
    value, expected = hand(STUDENT, batch(), 0.25)
    coefs = {"loss": 0.75, "kl": 0.25, "hidden": 0.75}
    assert set(terms) == set(coefs)
    close(sum(coefs[k] * terms[k].value for k in coefs), value)
    close(grads, expected)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_give_the_gradient_of_the_whole_batch(parts):
    grad_fn = us.value_and_grad(soft(alpha=0.5))
    whole, in_parts = (
        jax.jit(fn)(STUDENT, batch())[::2] for fn in (grad_fn, us.accumulated(grad_fn, parts))
    )
    close(in_parts, whole)


def test_padding_tokens_change_nothing():
    grad_fn = jax.jit(us.value_and_grad(soft(alpha=0.5)))
    data = batch()
    padded = data | {"tokens": jnp.where(data["mask"], data["tokens"], 3)}
    data = data | {"tokens": jnp.where(data["mask"], data["tokens"], 5)}
    terms, _, grads = grad_fn(STUDENT, data)
    others, _, other_grads = grad_fn(STUDENT, padded)
    close((terms, grads), (others, other_grads), 1e-6)


def never(batch):
    raise AssertionError("the teacher was run")


def test_at_alpha_zero_it_is_the_old_loss_and_the_teacher_is_gone():
    old, new = (us.value_and_grad(loss) for loss in (hard, distilled(hard, never, TERMS, alpha=0)))
    terms, _, grads = jax.jit(old)(STUDENT, batch())
    same, _, same_grads = jax.jit(new)(STUDENT, batch())
    jax.tree.map(np.testing.assert_array_equal, (same, same_grads), (terms, grads))


def test_terms_of_weight_zero_and_their_teacher_are_gone():
    loss = distilled(hard, never, {"kl": Term(kl, weight=0)}, alpha=0.5)
    assert set(loss(STUDENT, batch())) == {"loss"}


def test_alpha_and_weights_may_be_data_and_start_at_zero():
    @jax.jit
    def step(alpha, weight):
        terms = {"kl": TERMS["kl"], "hidden": Term(TERMS["hidden"].compare, counts, weight)}
        grad_fn = us.value_and_grad(distilled(hard, answers, terms, alpha=alpha))
        return us.accumulated(grad_fn, 2)(STUDENT, batch())[2]

    close(step(0.25, 3.0), hand(STUDENT, batch(), 0.25)[1])
    close(step(0.0, 0.0), hand(STUDENT, batch(), 0.0)[1])


def test_no_gradient_reaches_the_teacher():
    def total(params):
        inner = lambda batch: apply(params, batch["tokens"])  # not even of one that forgot to stop
        square = lambda t, s: jnp.mean((t["logits"] - s["logits"]) ** 2, axis=-1)
        terms = distilled(hard, inner, TERMS | {"own": Term(square)}, alpha=1.0)(STUDENT, batch())
        return us.loss_value(terms)

    grads = jax.jit(jax.grad(total))(TEACHER)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_a_teacher_is_a_pytree_of_its_dtype_that_compiles_once():
    traces = []

    @jax.jit
    def step(teacher, tokens):
        traces.append(0)
        return teacher(tokens)["logits"]

    tokens = batch()["tokens"]
    half = teacher(apply, TEACHER, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    assert step(half, tokens).dtype == jnp.bfloat16
    step(teacher(apply, model(21), dtype="bfloat16"), tokens)
    assert len(traces) == 1
    close(step(frozen, tokens), apply(TEACHER, tokens)["logits"])


def test_a_teacher_of_integers_teaches():
    fn = lambda params, tokens: apply(us.quant.dequantize(params), tokens)
    rules = {"mix": us.DotSpec(w=us.QSpec(format="int8"))}
    codes = us.quantize(TEACHER, us.quant.resolve(rules, apply, TEACHER, batch()["tokens"]))
    integers = teacher(fn, codes)
    logits = jax.jit(lambda teacher, tokens: teacher(tokens)["logits"])
    close(*(logits(t, batch()["tokens"]) for t in (integers, frozen)), 0.2)
    loss = distilled(hard, lambda batch: integers(batch["tokens"]), TERMS)
    assert jax.jit(loss)(STUDENT, batch())["kl"].value > 0


def test_a_cache_in_the_batch_teaches_as_the_teacher_does():
    live = lambda batch: top_k(answers(batch)["logits"], 3, 2.0)
    terms = Term(lambda t, s: kl_top_k(t, s["logits"]), counts=counts)
    expected = jax.jit(us.value_and_grad(distilled(hard, live, terms)))(STUDENT, batch())[2]
    data = batch() | {"cache": live(batch())}
    cached = distilled(hard, lambda batch: batch["cache"], terms)
    in_parts = jax.jit(us.accumulated(us.value_and_grad(cached), 4))
    close(in_parts(STUDENT, data)[2], expected)


def test_a_term_by_pieces_of_its_rows_keeps_the_contract():
    def with_mask(params, batch):
        mean, out = hard(params, batch)
        return mean, out | {"head": params["head"], "mask": batch["mask"]}

    def pieces(t, s):
        operands = (t["hidden"], TEACHER["head"], s["hidden"], s["head"])
        total = chunked_kl(*operands, temperature=2.0, chunk=4, weight=s["mask"])
        return us.Mean(total, jnp.sum(s["mask"]))

    grad_fn = us.value_and_grad(distilled(with_mask, answers, Term(pieces)))
    expected = jax.jit(us.value_and_grad(distilled(hard, answers, TERMS["kl"])))(STUDENT, batch())
    for fn in (grad_fn, us.accumulated(grad_fn, 3)):
        close(jax.jit(fn)(STUDENT, batch())[2], expected[2])


def test_a_plain_scalar_and_several_terms_are_losses_too():
    plain = lambda params, batch: (jnp.mean(apply(params, batch["tokens"])["logits"] ** 2), None)
    terms = distilled(plain, lambda batch: None, lambda t, s: jnp.ones(ROWS), alpha=0.25)(
        STUDENT, batch()
    )
    close(terms["loss"], 0.75 * plain(STUDENT, batch())[0])
    two = lambda params, batch: ({"a": us.Mean(1.0, 1), "b": us.Mean(2.0, 1, coef=0.5)}, None)
    terms = distilled(two, lambda batch: None, lambda t, s: jnp.ones(ROWS), alpha=0.25)(
        STUDENT, batch()
    )
    assert [float(terms[k].coef) for k in ("a", "b", "distill")] == [0.75, 0.375, 0.25]


def test_state_keys_and_what_is_passed_on():
    def stateful(params, batch, *, state, key):
        mean, out = hard(params, batch)
        return mean, out | {"state": state + 1, "key": key}

    loss = distilled(stateful, answers, TERMS, aux=lambda out: {"state": out["state"]})
    grad_fn = us.value_and_grad(loss)
    _, aux, _ = grad_fn(STUDENT, batch(), state=jnp.float32(1), key=jax.random.key(0))
    assert aux == {"state": 2}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: soft(alpha=1.5), ValueError, "alpha is 1.5; expected a share"),
        (lambda: soft(alpha=-0.1), ValueError, "alpha is -0.1"),
        (lambda: distilled(hard, answers, {"kl": 3}), TypeError, "a term is 3"),
        (
            lambda: distilled(lambda p, b: hard(p, b)[0], answers, TERMS)(STUDENT, batch()),
            ValueError,
            r"return \(terms, outputs\)",
        ),
        (
            lambda: distilled(hard, answers, {"loss": TERMS["kl"]})(STUDENT, batch()),
            ValueError,
            "both .* have a term 'loss'",
        ),
        (
            lambda: distilled(hard, answers, lambda t, s: jnp.float32(0))(STUDENT, batch()),
            ValueError,
            "'distill' compares .* by one number",
        ),
        (
            lambda: distilled(hard, answers, Term(lambda t, s: jnp.ones((ROWS, 2)), counts=counts))(
                STUDENT, batch()
            ),
            ValueError,
            r"losses of shape \(6, 2\), and `counts` gives one of \(6, 5\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
