"""Distillation: a small model learns from a larger one as well as from the labels.

    python examples/distill.py

Of 4,096 examples 32 have labels for the student; the teacher, who saw all labels, has an opinion
on every example. Temperature 2 shows the student how likely the teacher thought the other classes
(https://arxiv.org/abs/1503.02531).
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import unitscale_jax as us

STEPS, CLASSES, FEATURES = 300, 10, 16
LABELED, COUNT = 32, 4096  # examples with a label for the student, and all


def examples(key, count):
    """Points around ten centers, each with the number of its center."""
    centers = jax.random.normal(jax.random.key(99), (CLASSES, FEATURES))
    labels = jax.random.randint(key, (count,), 0, CLASSES)
    noise = jax.random.normal(jax.random.fold_in(key, 1), (count, FEATURES))
    return {"x": centers[labels] + noise, "label": labels}


def model(width):
    """A function of parameters, (rows, features) to (rows, classes), and its parameters."""
    rngs = nnx.Rngs(width)
    layers = nnx.Linear(FEATURES, width, rngs=rngs), nnx.Linear(width, CLASSES, rngs=rngs)
    apply, params, _ = us.from_nnx(nnx.Sequential(layers[0], nnx.relu, layers[1]))
    return apply, params


def hard_loss(apply):
    """Cross entropy over the examples with labels, and all logits, which `distilled` compares."""

    def loss(params, batch):
        logits = apply(params, batch["x"])
        costs = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return us.Mean(total=costs * batch["known"], weight=batch["known"]), logits

    return loss


def trained(loss, params, data):
    """Parameters after all steps on the same examples."""
    tx = optax.adam(1e-2)
    step, state = jax.jit(us.updated(us.value_and_grad(loss), tx)), tx.init(params)
    for _ in range(STEPS):
        params, state, _, _ = step(params, state, data)
    return params


def main():
    """Prints and returns the accuracy of the teacher, and of a student without and with it."""
    data, test = examples(jax.random.key(0), COUNT), examples(jax.random.key(1), COUNT)
    everything = data | {"known": jnp.ones(COUNT)}
    little = data | {"known": (jnp.arange(COUNT) < LABELED).astype(jnp.float32)}
    (big, big_params), (small, small_params) = model(256), model(32)
    big_params = trained(hard_loss(big), big_params, everything)

    teacher = us.distill.teacher(lambda params, batch: big(params, batch["x"]), big_params)
    terms = {"soft": us.distill.Term(lambda t, s: us.distill.kl(t, s, 2.0))}
    taught = us.distilled(hard_loss(small), teacher, terms, alpha=0.9)
    accuracy = lambda apply, p: float((apply(p, test["x"]).argmax(1) == test["label"]).mean())
    found = {
        "teacher": accuracy(big, big_params),
        "student, labels alone": accuracy(small, trained(hard_loss(small), small_params, little)),
        "student, taught": accuracy(small, trained(taught, small_params, little)),
    }
    for name, value in found.items():
        print(f"{name:22s} {value:.1%} of test examples")
    return found


if __name__ == "__main__":
    main()
