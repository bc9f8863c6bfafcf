"""Halves a pretrained encoder, and lets it learn again from its whole self what it knew.

    python examples/applications/minilm_half.py                 about ten minutes on two cores
    python examples/applications/minilm_half.py --minutes 30    of learning; 7.5 by default

The encoder is that of `minilm.py`. Half of each layer's FFN and half of its heads go (`us.prune`);
which, activations on some sentences say. What stays is a smaller and faster function of smaller
arrays. The whole encoder teaches it (`us.distill`) on sentences of Python's documentation: what
every layer reads, and the embedding. Other sentences say how near embeddings are, before and after.
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import minilm
import numpy as np
import optax

import unitscale_jax as us

SCORED, EVALUATION = 128, 512  # sentences; the rest are learned from
ROWS, LONGEST = 32, 32  # of a batch to learn from; longer sentences are cut
RATE, LEAST = 5e-4, 0.02  # of learning: at first, and the share of it at the end
CHUNK = 10  # steps between looks at the clock


def halved(apply, params, batches):
    """Half of the heads and of the FFN of each layer: those that say least on these batches."""
    graph = us.compaction.groups(apply, params, batches[0][:2])
    width = params["word"]["embedding"].shape[1]
    sizes = (width // minilm.HEAD, params["layer_0"]["up"]["kernel"].shape[1])
    names = [group.name for group in graph.groups if group.size in sizes]
    real = lambda ids: ids != minilm.PAD
    scores = us.compaction.activation(graph, apply, params, batches, valid=real, only=names)
    return us.compaction.plan(graph, scores, keep=dict.fromkeys(names, 0.5))


def hidden_states(layers: int) -> dict[str, str]:
    """What every layer but the first reads, by the kernel that reads it."""
    return {f"hidden_{i}": f"layer_{i}/attention/query/kernel:input" for i in range(1, layers)}


def make_loss(student, teacher, named: dict[str, str]):
    """Distance of hidden states and of the embedding, a mean over real tokens and over rows."""
    seen = us.distill.features(student, named)

    def nothing_else(params, ids):  # there are no labels: all that is learned is the teacher
        return {}, seen(params, ids)

    real = lambda ids: ids != minilm.PAD
    of = lambda name: lambda t, s: us.distill.hidden_mse(t[1][name], s[1][name])
    terms = {name: us.distill.Term(of(name), counts=real) for name in named}
    direction = lambda t, s: 1 - jnp.sum(t[0] * s[0], axis=-1)
    terms["embedding"] = us.distill.Term(direction, weight=10.0)
    return us.distilled(nothing_else, teacher, terms, alpha=1.0)


def learned(student, params, teacher, named: dict[str, str], ids, minutes: float):
    """Parameters after some minutes; the rate follows the clock."""
    adam = optax.inject_hyperparams(optax.adam)(RATE)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)

    @jax.jit
    def steps(params, state, teacher, ids, rate, key):
        grad_fn = us.value_and_grad(make_loss(student, teacher, named))

        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (ROWS,), 0, len(ids))
            terms, _, grads = grad_fn(params, ids[rows])
            state[1].hyperparams["learning_rate"] = rate
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), us.loss_value(terms)

        return jax.lax.scan(step, (params, state), jax.random.split(key, CHUNK))

    state, count, done, begun = optimizer.init(params), 0, 0.0, 0.0
    while done < 1:
        share = 0.5 * (1 + np.cos(np.pi * done))  # the cosine of the time that is gone
        rate = jnp.float32(RATE * (LEAST + (1 - LEAST) * share))
        key = jax.random.key(count)
        (params, state), losses = steps(params, state, teacher, ids, rate, key)
        mean, count = float(losses.mean()), count + CHUNK
        begun = begun or time.monotonic()  # after compiling
        done = min((time.monotonic() - begun) / (60 * minutes), 1.0) if minutes else 1.0
        if count % 100 == 0 or done == 1:
            print(f"{100 * done:4.0f} %  step {count:6d}  loss {mean:.4f}", flush=True)
    return params


def padded(tokenizer, texts, length):
    """int32 (texts, length): tokens, cut or padded."""
    out = np.full((len(texts), length), minilm.PAD, np.int32)
    for row, text in zip(out, texts, strict=True):
        tokens = tokenizer(text)[:length]
        row[: len(tokens)] = tokens
    return jnp.asarray(out)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="minilm_half.py", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=pathlib.Path, metavar="FOLDER", help="as of minilm.py")
    parser.add_argument("--minutes", type=float, default=7.5, help="of learning (default 7.5)")
    parser.add_argument(
        "--smallest", action="store_true", help="a few steps of a small, random encoder"
    )
    args = parser.parse_args(argv)
    count = (16, 16, 64) if args.smallest else (EVALUATION, SCORED, 6000)
    texts = minilm.sentences(sum(count))
    evaluation, scored, taught = np.split(np.asarray(texts, object), np.cumsum(count)[:2])
    if args.smallest:
        apply, params, tokenizer = minilm.tiny(texts)
    else:
        folder = args.weights or minilm.FOLDER
        minilm.fetch(folder)
        apply, params = minilm.load(folder)
        tokenizer = minilm.Tokenizer((folder / "vocab.txt").read_text("utf-8").split())

    plan = halved(apply, params, [padded(tokenizer, scored, LONGEST)])
    student, small = us.compaction.compacted(apply, plan), us.compaction.compact(params, plan)
    print(f"{us.tree.size(params):,} parameters, {us.tree.size(small):,} in the half")
    layers = sum(name.startswith("layer_") for name in params)
    named = hidden_states(layers)
    teacher = us.distill.teacher(us.distill.features(apply, named), params)
    ids, minutes = padded(tokenizer, taught, LONGEST), 0 if args.smallest else args.minutes
    again = learned(student, small, teacher, named, ids, minutes)
    forms = {"half, at once": (student, small), "half, distilled": (student, again)}
    minilm.compare(apply, params, forms, tokenizer, list(evaluation), 8 if args.smallest else ROWS)


if __name__ == "__main__":
    main()
