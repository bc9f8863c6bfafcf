"""What compaction brings, and what distillation recovers.

1. Half of the FFN and of the heads of a 2-layer, width-512 transformer: the same function as with
   zeros in those channels, in half of the parameters, FLOPs and time.
2. A trained byte language model at half of its FFN and heads, at once; after more training on the
   text; after as much training that the whole model teaches, too.
"""

import functools

import harness
import jax
import jax.numpy as jnp
import lm
import optax
from prune import Text, descent, optimizer, trained

import unitscale_jax as us


def attention_model(key, layers, width, heads, vocabulary):
    """Parameters of `apply`, each layer on its own; head and FFN widths are in the shapes only."""
    keys = iter(jax.random.split(key, 8 * layers + 2))
    normal = lambda *shape, fan: jax.random.normal(next(keys), shape) * fan**-0.5
    size = width // heads
    layer = lambda: {
        "query": normal(width, heads, size, fan=width),
        "key": normal(width, heads, size, fan=width),
        "value": normal(width, heads, size, fan=width),
        "out": normal(heads, size, width, fan=width),
        "up": normal(width, 4 * width, fan=width),
        "down": normal(4 * width, width, fan=4 * width),
    }
    return {
        "embed": normal(vocabulary, width, fan=1),
        "layers": [layer() for _ in range(layers)],
        "head": normal(width, vocabulary, fan=width),
    }


def apply(params, tokens):
    """Logits (rows, time, vocabulary)."""
    x = params["embed"][tokens]
    for p in params["layers"]:
        h = lm.norm(x, jnp.ones(x.shape[-1]))
        q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[n]) for n in ("query", "key", "value"))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + jnp.einsum("bthk,hkd->btd", mixed, p["out"])
        hidden = jax.nn.gelu(lm.norm(x, jnp.ones(x.shape[-1])) @ p["up"])
        x = x + hidden @ p["down"]
    return x @ params["head"]


def smaller(options):
    """Masked against compact."""
    width, heads = (32, 4) if options.smallest else (512, 8)
    rows, time = (2, 8) if options.smallest else (8, 128)
    params = attention_model(jax.random.key(0), 2, width, heads, 256)
    tokens = jax.random.randint(jax.random.key(1), (rows, time), 0, 256)
    graph = us.compaction.groups(apply, params, tokens)
    scores = us.compaction.l2(graph, params)
    halves = {"layers/*/down:0": 0.5, "layers/*/key:1": 0.5}  # FFN and heads
    plan = us.compaction.plan(graph, scores, keep=halves)
    masked, small = us.compaction.zero_channels(params, plan), us.compaction.compact(params, plan)
    compacted = us.compaction.compacted(apply, plan)
    whole, half = jax.jit(apply), jax.jit(compacted)
    delta = float(jnp.abs(whole(masked, tokens) - half(small, tokens)).max())
    flops = [us.trace.cost(f, p, tokens).flops for f, p in ((apply, params), (compacted, small))]
    taken = harness.seconds(
        {
            "masked": functools.partial(whole, masked, tokens),
            "compact": functools.partial(half, small, tokens),
        },
        options.runs,
    )
    faster = taken["masked"]["median"] / taken["compact"]["median"]
    harness.claim(
        "half of FFN and heads: the same function, at least 1.9 times as fast",
        delta <= 1e-5 and (faster >= 1.9 or options.smallest),
        parameters=[us.tree.size(params), us.tree.size(small)],
        flops=flops,
        delta=delta,
        seconds=taken,
        faster=round(faster, 2),
    )


def recovered(options):
    """A trained model's half, before and after more training, with its teacher and without."""
    task = Text(options.smallest)
    logits = task.logits
    (params,) = trained(task, optimizer(task.rate, task.steps), [0])
    tokens = jnp.zeros((2, task.length), jnp.int32)
    graph = us.compaction.groups(logits, params, tokens)
    scores = us.compaction.l2(graph, params)
    halves = {"blocks/*/down/kernel:0": 0.5, "blocks/*/out/kernel:0[0]": 0.5}  # FFN and heads
    plan = us.compaction.plan(graph, scores, keep=halves)
    small = us.compaction.compact(params, plan)
    student = us.compaction.compacted(logits, plan)

    def hard(params, batch):
        found = student(params, batch[:, :-1])
        costs = optax.softmax_cross_entropy_with_integer_labels(found, batch[:, 1:])
        return us.Mean(costs.sum(-1), jnp.full(len(costs), float(costs.shape[1]))), found

    taught = us.distilled(
        hard,
        us.distill.teacher(lambda p, batch: logits(p, batch[:, :-1]), params),
        us.distill.Term(us.distill.kl),
        alpha=0.9,
    )
    alone = lambda params, batch: hard(params, batch)[0]
    grad_of = lambda loss: lambda p, key: us.value_and_grad(loss)(p, task.batch(key))[2]
    score = lambda params: task.score(params, student)
    steps = 5 if options.smallest else 200
    after = {
        name: score(descent(grad_of(loss), optimizer(task.rate / 2, steps), steps)(start, 99))
        for name, loss, start in (
            ("trained alone", alone, small),
            ("distilled", taught, small),
            (
                "from random weights",
                alone,
                us.compaction.compact(task.init(jax.random.key(7)), plan),
            ),
        )
    }
    harness.claim(
        "distillation recovers more than training alone, and that more than random weights",
        after["distilled"] <= after["trained alone"] < after["from random weights"],
        unit=task.unit,
        parameters=[us.tree.size(params), us.tree.size(small)],
        whole=round(task.score(params), 4),
        half_at_once=round(score(small), 4),
        after={name: round(value, 4) for name, value in after.items()},
        steps=steps,
    )


def divergence_memory(options):
    """`kl` of two heads' logits and its gradient, against the same written by hand."""
    rows, width, vocabulary = (64, 16, 512) if options.smallest else (1024, 64, 8192)
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)

    def by_hand(t, s):
        log_p, log_q = jax.nn.log_softmax(t), jax.nn.log_softmax(s)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    def temp(loss):
        total = lambda w, h, wt, ht: jnp.sum(loss(jax.lax.stop_gradient(ht @ wt), h @ w))
        grads = jax.value_and_grad(total, argnums=(0, 1))
        args = [shape(width, vocabulary), shape(rows, width)] * 2
        return harness.cost(harness.compiled(grads, *args))["temp_bytes"]

    ours, hand = temp(us.distill.kl), temp(by_hand)
    harness.claim(
        "kl takes no more temporary memory than written by hand, but for two numbers a row",
        ours <= hand + 16 * rows,
        ratio=harness.ratio(ours, hand),
        bytes={"kl": ours, "by hand": hand},
    )


def main():
    options = harness.arguments(__file__, __doc__)
    smaller(options)
    divergence_memory(options)
    recovered(options)


if __name__ == "__main__":
    main()
