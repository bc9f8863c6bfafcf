"""Trains a small byte-level GPT on source code, and tells what it is worth.

    python examples/charlm.py                       about three minutes on two CPU cores
    python examples/charlm.py --resume              continues where it was stopped or killed
    python examples/charlm.py --resume --prompt "class "
    python examples/charlm.py --data FOLDER --out runs/mine
    python examples/charlm.py --mesh data=2,tensor=2,pipe=2 --layers 4

The model is plain Flax NNX. From the library come mixed precision (`autocast`), training on 8-bit
integers and serving from them (`quantized`, `quantize`), exact accumulation of micro-batches
(`accumulated`), a loss scale for float16 (`loss_scaled`), checkpoints from which a killed run
continues bit for bit, and with `--mesh` data, tensor and pipeline parallelism (`parallel`). Its
score, in bits per byte of files it never saw, stands beside those of byte n-grams and of xz on the
same files.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import sys
import time

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import unitscale_jax as us

try:
    import matplotlib.figure
    import rich.console
    import rich.progress
except ImportError as error:
    sys.exit(f"charlm.py draws with {error.name}, which is missing: pip install -e '.[examples]'")

VOCABULARY = 256  # bytes
RECENT = 4  # bytes whose embeddings are added up: see GPT
ORDERS = (1, 2, 3, 4)  # longer n-grams do worse on six megabytes of text
LOG_EVERY = 10  # steps between points of the training curve
SAMPLE_BYTES = 65_536  # spread over the held-out text, scored during training
EVAL_ROWS = 32  # windows scored at once

PRESETS = {
    "default": dict(
        **dict(steps=700, rows=32, length=128, parts=2, width=96, layers=3, heads=2),
        **dict(rate=5e-3, every=100, test_bytes=None, sample_bytes=600),
    ),
    "long": dict(steps=3000, rows=16, length=256, width=128, layers=4, heads=4, rate=4e-3),
    "smallest": dict(
        **dict(steps=20, rows=8, length=32, width=32, layers=1, every=5),
        **dict(test_bytes=20_000, sample_bytes=50),
    ),
}
# What a run cannot change when it is resumed; the rest may differ from one session to the next.
FIXED = ("data", "steps", "rows", "length", "parts", "width", "layers", "heads", "rate", "policy")
FIXED += ("quantize", "seed")

# Kernels of the blocks; tables and head keep their precision, as is usual.
_INT4 = us.QSpec(format="int4", group=us.quant.Group(32, scale="integer"))
QUANTIZE = {
    "none": [],
    "int8": [("**/kernel", us.DotSpec(w=us.QSpec(), x=us.QSpec()))],
    "int4": [("**/kernel", us.DotSpec(w=_INT4, x=us.QSpec()))],
}
MESH = {"data": 1, "tensor": 1, "pipe": 1}  # rows, heads and channels, layers


# --- the model ----------------------------------------------------------------------------------


class Block(nnx.Module):
    """Attention to earlier bytes, then two dense layers, each added to the stream."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        dense = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.heads = heads
        self.norm_1, self.norm_2 = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.qkv = dense(width, 3 * width)
        self.out = dense(width, width)
        self.up = dense(width, 4 * width)
        self.down = dense(4 * width, width)

    def __call__(self, x):  # (rows, time, width)
        qkv = self.qkv(self.norm_1(x))
        q, k, v = (
            part.reshape(*part.shape[:-1], self.heads, -1)  # (rows, time, heads, width / heads)
            for part in jnp.split(qkv, 3, axis=-1)
        )
        mixed = attention(q, k, v)
        x = x + self.out(mixed.reshape(x.shape))
        # The square of a ReLU is as good as a GELU here, and a CPU computes it sooner.
        return x + self.down(jnp.square(nnx.relu(self.up(self.norm_2(x)))))


def attention(q, k, v):
    """Causal attention, (rows, time, heads, size) each.

    By hand, because `jax.nn.dot_product_attention` has no float16 on a CPU.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", q / math.sqrt(q.shape[-1]), k)
    earlier = jnp.tril(jnp.ones(scores.shape[-2:], bool))  # (time, time)
    weights = jax.nn.softmax(jnp.where(earlier, scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class GPT(nnx.Module):
    """Bytes to the scores of the next byte: (rows, time) to (rows, time, 256)."""

    def __init__(self, *, width: int, layers: int, heads: int, length: int, rngs: nnx.Rngs):
        # Tables, not nnx.Embed, whose result has the dtype that the table was made in.
        table = lambda rows, size: nnx.Param(size * jax.random.normal(rngs(), (rows, width)))
        self.recent, self.places = table(RECENT * VOCABULARY, 0.5), table(length, 0.1)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        flat = nnx.initializers.normal(0.02)  # all bytes equally likely: the loss starts at 8 bits
        self.head = nnx.Linear(width, VOCABULARY, use_bias=False, kernel_init=flat, rngs=rngs)

    def __call__(self, text):
        x = embed(self.recent, self.places, text)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def embed(recent, places, text):
    """(rows, time) to (rows, time, width).

    A byte and those just before it, each place with a table of its own: what an n-gram sees is
    there from the first step, and need not be found by attention. Zeros precede a text.
    """
    back = [jnp.pad(text, ((0, 0), (i, 0)))[:, : text.shape[1]] for i in range(RECENT)]
    x = places[: text.shape[1]]
    for i, bytes_before in enumerate(back):
        x = x + recent[VOCABULARY * i + bytes_before]
    return x


def make_model(settings: argparse.Namespace) -> GPT:
    size = dict(width=settings.width, layers=settings.layers, heads=settings.heads)
    return GPT(**size, length=settings.length, rngs=nnx.Rngs(settings.seed))


def build(settings: argparse.Namespace):
    """The model as a pure function in the dtypes of `settings.policy`, and its parameters."""
    apply, params, _ = us.from_nnx(make_model(settings))
    return us.autocast(apply, settings.policy), params  # products; norms, softmax stay in float32


def pieces(settings: argparse.Namespace):
    """The model in three: before its blocks, one block, after them. All see a batch's rows."""
    model = make_model(settings)
    block, norm, head = (us.from_nnx(m)[0] for m in (model.blocks[0], model.norm, model.head))
    first = lambda rest, batch: embed(rest["recent"], rest["places"], batch["text"])
    layer = lambda params, x, _: block(params, x)
    last = lambda rest, x, _: head(rest["head"], norm(rest["norm"], x))
    first, layer, last = (us.autocast(fn, settings.policy) for fn in (first, layer, last))
    return first, us.quantized(layer, QUANTIZE[settings.quantize]), last


def kernel_rules(settings: argparse.Namespace):
    """How the kernels of all blocks are quantized."""
    return [(f"blocks/{pattern}", spec) for pattern, spec in QUANTIZE[settings.quantize]]


def serving(settings: argparse.Namespace, params):
    """The model and its parameters as a server holds them: of kernels codes and scales, no floats.

    On a mesh heads and channels lie over the tensor axis, as they did in training.
    """
    apply, _ = build(settings)
    params, rules = us.parallel.unstack(params), kernel_rules(settings)
    tokens = jnp.zeros((1, settings.length), jnp.int32)
    codes = us.quantize(params, us.quant.resolve(rules, apply, params, tokens)) if rules else params
    if settings.mesh:
        codes = us.parallel.shard(codes, layout_of(settings, params))
    return us.quantized(apply), codes


# --- training -----------------------------------------------------------------------------------


def losses(logits, following):
    """What each byte costs, in nats: (rows, time, 256) and (rows, time) to f32 (rows, time)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, following.astype(jnp.int32))


def mean_loss(logits, batch):
    costs = losses(logits, batch["next"])
    rows, time = costs.shape
    return {"loss": us.Mean(total=costs.sum(axis=1), weight=jnp.full(rows, float(time)))}


def make_optimizer(settings: argparse.Namespace) -> optax.GradientTransformationExtraArgs:
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.rate,
        warmup_steps=max(settings.steps // 20, 1),
        decay_steps=max(settings.steps, 2),
        end_value=settings.rate / 50,
    )
    matrices = functools.partial(us.tree.map_named, lambda name, _: not name.endswith("scale"))
    adamw = optax.adamw(rate, b2=0.99, weight_decay=0.1, mask=matrices)
    # Only float16 can overflow where float32 does not; a scale of 1 is no scale.
    scale = us.DynamicScale(interval=200) if settings.policy == "float16" else us.StaticScale(1)
    return us.loss_scaled(optax.chain(optax.clip_by_global_norm(1.0), adamw), scale)


def make_step(grad_fn, optimizer, settings: argparse.Namespace):
    """One step; its batch is a function of key and position, so a resumed run repeats it."""
    update = us.updated(grad_fn, optimizer)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, text, key, position):
        shape, last = (settings.rows, 1), text.size - settings.length
        starts = jax.random.randint(jax.random.fold_in(key, position), shape, 0, last)
        rows = text[starts + jnp.arange(settings.length + 1)].astype(jnp.int32)
        batch = {"text": rows[:, :-1], "next": rows[:, 1:]}  # (rows, length) each
        params, opt_state, terms, _ = update(params, opt_state, batch)
        return params, opt_state, terms["loss"].value / math.log(2)

    return step


def start(settings: argparse.Namespace):
    """The functions of a run and its first state."""
    apply, params = build(settings)
    # Parameters become codes in each call, so that what is trained is what will be served.
    apply = us.quantized(apply, kernel_rules(settings))
    optimizer = make_optimizer(settings)
    loss = lambda params, batch: mean_loss(apply(params, batch["text"]), batch)
    grad_fn = us.accumulated(us.value_and_grad(loss), settings.parts)
    if settings.mesh:
        apply, grad_fn, optimizer, params = parallel(settings, apply, grad_fn, optimizer, params)
    run = {
        "params": params,
        "opt_state": optimizer.init(params),
        "key": jax.random.key(settings.seed),
        "position": 0,
    }
    return apply, make_step(grad_fn, optimizer, settings), run


def parallel(settings: argparse.Namespace, apply, grad_fn, optimizer, params):
    """The same on a mesh: the model's layers in stages, each divided, on a share of the rows."""
    layout = layout_of(settings, params)
    if settings.mesh["pipe"] > 1:
        params = us.parallel.stack(params, "blocks/*", settings.mesh["pipe"])
        first, layer, last = pieces(settings)
        pipeline = us.parallel.pipelined(
            first, layer, last, mean_loss, parts=settings.parts, mesh_axis="pipe"
        )
        grad_fn, apply = pipeline, lambda params, text: pipeline.apply(params, {"text": text})
        layout = us.parallel.layout(params, stacked_rules(layout), layout.mesh)
    shares = layout.over("data") if settings.zero else layout
    here = shares if settings.zero == 3 else layout
    grad_fn = us.parallel.reduced(grad_fn, "data", zero=settings.zero, layout=layout)
    optimizer = us.parallel.sharded(optimizer, here, shares)
    return apply, grad_fn, optimizer, us.parallel.shard(params, here)


def layout_of(settings: argparse.Namespace, params) -> us.parallel.Layout:
    """Which parameters lie over the tensor axis, read from the equations of the model."""
    apply, _ = build(settings)
    text = jnp.zeros((2, settings.length), jnp.int32)
    mesh = us.parallel.mesh(**settings.mesh)
    return us.parallel.infer(apply, params, text, mesh=mesh, mesh_axis="tensor")


def stacked_rules(layout: us.parallel.Layout) -> dict:
    """A layout of named blocks as rules for stacked ones, whose axis 1 is the stages."""
    rules = {}
    for name, spec in layout.by_name.items():
        pattern, of_block = re.subn(r"^blocks/\d+/", "blocks/*/", name)
        rank = np.ndim(us.tree.named_leaves(layout.params)[name])
        dims = {dim - rank: axis for dim, axis in enumerate(spec) if axis}
        rules[pattern] = dims | ({1: "pipe"} if of_block else {})
    return rules


def mesh_of(settings: argparse.Namespace):
    """The mesh of `--mesh`, to run under."""
    sizes = settings.mesh
    return jax.set_mesh(us.parallel.mesh(**sizes)) if sizes else contextlib.nullcontext()


def stored(run):
    """A run as a checkpoint holds it: blocks by name, so that any mesh can go on with it."""
    return us.parallel.unstack(run)


def restored(settings: argparse.Namespace, checkpoints: us.Checkpoints, run):
    """The last checkpoint, of whatever mesh, laid out as `run` is."""
    saved = checkpoints.restore(stored(run))[1]
    if settings.mesh and settings.mesh["pipe"] > 1:
        saved = us.parallel.stack(saved, "**/blocks/*", settings.mesh["pipe"])
    if not settings.mesh:
        return saved
    place = lambda x, like: jax.device_put(x, like.sharding) if isinstance(x, jax.Array) else x
    return jax.tree.map(place, saved, run)


def train(step, run, corpus, score, settings, curve, console):
    """Trains to the last step, validating and saving every `settings.every` steps."""
    checkpoints = us.Checkpoints(settings.out / "checkpoints")
    text, recent = jnp.asarray(corpus.train), []
    began = then = time.perf_counter()
    with progress_bar(console, settings.steps, run["position"]) as bar:
        for position in range(run["position"], settings.steps):
            params, opt_state, bits = step(
                run["params"], run["opt_state"], text, run["key"], position
            )
            done = position + 1
            run |= {"params": params, "opt_state": opt_state, "position": done}
            recent.append(bits)
            saves = done % settings.every == 0 or done == settings.steps
            if not saves and done % LOG_EVERY:
                continue
            point = {"step": done, "train": mean_of(recent, done)}
            speed = len(recent) * settings.rows * settings.length / (time.perf_counter() - then)
            bar.update(bar.task_ids[0], completed=done, loss=point["train"], speed=speed)
            if saves:
                point["test"] = score(run["params"], SAMPLE_BYTES // settings.length)
                console.print(
                    f"step {done:5d}  train {point['train']:.3f}  held out {point['test']:.3f}  "
                    f"{speed:8,.0f} tokens/s  {time.perf_counter() - began:5.0f} s"
                )
            curve.append(point)
            if saves:
                checkpoints.save(done, stored(run))
            recent, then = [], time.perf_counter()
    return run


def mean_of(recent: list[jax.Array], step: int) -> float:
    mean = float(np.mean(jax.device_get(recent)))
    if not math.isfinite(mean):
        sys.exit(f"charlm.py: the loss is {mean} before step {step}; use a lower --rate")
    return mean


def progress_bar(console: rich.console.Console, steps: int, done: int) -> rich.progress.Progress:
    bar = rich.progress.Progress(
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        # A token is a byte.
        rich.progress.TextColumn(
            "{task.fields[loss]:.3f} bits/byte  {task.fields[speed]:,.0f} tokens/s"
        ),
        rich.progress.TimeRemainingColumn(),
        console=console,
    )
    bar.add_task("", total=steps, completed=done, loss=math.nan, speed=0)
    return bar


class Curve(list):
    """Points of the training curve, one JSON line each, so that a killed run keeps its own."""

    def __init__(self, path: pathlib.Path, until: int):
        self.path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() and until else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        super().__init__(point for point in whole if point["step"] <= until)
        path.write_text("".join(f"{json.dumps(point)}\n" for point in self))

    def append(self, point: dict[str, float]) -> None:
        super().append(point)
        with self.path.open("a") as file:
            file.write(f"{json.dumps(point)}\n")


# --- scores and samples -------------------------------------------------------------------------


def make_score(apply, text: np.ndarray, length: int):
    """Returns `score(params, windows=None)`: bits per byte of all of `text`, or of some windows.

    A window is `length` bytes, predicted from those before them in the window and one more, so a
    byte is seen with half a window of context on average.
    """
    costs_of = jax.jit(lambda params, text: losses(apply(params, text[:, :-1]), text[:, 1:]))
    before = np.concatenate([np.frombuffer(b"\n", np.uint8), text])
    all_starts = np.arange(0, len(text), length)

    def score(params, windows: int | None = None) -> float:
        some = len(all_starts) if windows is None else min(windows, len(all_starts))
        starts = all_starts[np.linspace(0, len(all_starts) - 1, some).astype(int)]
        total = count = 0
        for i in range(0, len(starts), EVAL_ROWS):
            # The last window, and the last rows, are moved back or repeated: one compilation.
            nominal = np.resize(starts[i : i + EVAL_ROWS], EVAL_ROWS)
            actual = np.minimum(nominal, len(text) - length)
            costs = costs_of(
                params, before[actual[:, None] + np.arange(length + 1)].astype(np.int32)
            )
            fresh = actual[:, None] + np.arange(length) >= nominal[:, None]
            fresh[len(starts) - i :] = False
            total += np.sum(np.where(fresh, costs, 0), dtype=np.float64)
            count += np.sum(fresh)
        return float(total / count / math.log(2))

    return score


def make_sampler(apply, length: int, count: int):
    """Returns `sample(params, prompt, temperature, key) -> bytes`, compiled once for any prompt."""

    @jax.jit
    def draw(params, window, filled, temperature, key):
        def next_byte(carry, key):
            window, filled = carry
            logits = apply(params, window[None])[0, filled - 1]  # f32 (256,)
            # The largest of logits / t + Gumbel noise is a draw from softmax(logits / t); times
            # t it also holds at t = 0, where it is the likeliest byte.
            noise = temperature * jax.random.gumbel(key, logits.shape)
            byte = jnp.argmax(logits + noise).astype(window.dtype)
            shifted = jnp.where(filled < length, window, jnp.roll(window, -1))
            place = jnp.minimum(filled, length - 1)
            return (shifted.at[place].set(byte), place + 1), byte

        return jax.lax.scan(next_byte, (window, filled), jax.random.split(key, count))[1]

    def sample(params, prompt: bytes, temperature: float, key) -> bytes:
        seen = np.frombuffer(prompt or b"\n", np.uint8)[-length:]
        window = np.zeros(length, np.int32)
        window[: len(seen)] = seen
        drawn = draw(params, window, np.int32(len(seen)), np.float32(temperature), key)
        return bytes(np.asarray(drawn, np.uint8))

    return sample


def baselines(corpus: data.Corpus) -> dict[str, float]:
    ngrams = data.ngram_bits(corpus.train, corpus.test, ORDERS)
    scores = {f"order-{order} n-gram": bits for order, bits in ngrams.items()}
    return scores | {"xz -9 of the test text": data.xz_bits(corpus.test)}


def draw_curve(path: pathlib.Path, curve: Curve, scores: dict[str, float], title: str) -> None:
    tests = [point for point in curve if "test" in point]
    lowest = min(*scores.values(), *(point["test"] for point in tests))
    figure = matplotlib.figure.Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="bits per byte")
    # The first steps, near 8 bits, would press all that matters into a corner.
    axes.set_ylim(lowest - 0.15, max(scores.values()) + 0.5)
    axes.plot([p["step"] for p in curve], [p["train"] for p in curve], lw=1, label="training")
    axes.plot([p["step"] for p in tests], [p["test"] for p in tests], "o-", ms=4, label="held out")
    beside = dict(xycoords=("axes fraction", "data"), va="center", fontsize=8)
    for name, bits in scores.items():
        axes.axhline(bits, color="gray", lw=0.8, ls=":" if "xz" in name else "--")
        axes.annotate(f"{name} {bits:.2f}", (1.01, bits), annotation_clip=False, **beside)
    axes.grid(alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=100)


# --- the command line ---------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage that --help gives."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, least, expected: str, below=math.inf):
    """An argparse type that says what was expected."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < below:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return convert


def mesh_sizes(text: str) -> dict[str, int]:
    """An argparse type: `data=2,pipe=4` as sizes of all axes."""
    found = re.findall(r"(?:^|,)(\w+)=([1-9]\d*)(?=,|$)", text)
    sizes = {axis: int(size) for axis, size in found}
    if len(sizes) != text.count(",") + 1 or not sizes.keys() <= MESH.keys():
        raise argparse.ArgumentTypeError(
            f"expected sizes of {', '.join(MESH)}, as data=2,tensor=2,pipe=2, got {text!r}"
        )
    return MESH | sizes


def by_size(name: str) -> str:
    """What a flag is when it is left out."""
    default = PRESETS["default"][name]
    others = [f"--{size} {PRESETS[size].get(name, default)}" for size in ("long", "smallest")]
    return f" (default: {', '.join([str(default), *others])})"


def make_parser() -> Parser:
    at_least = lambda n: number(int, n, f"a whole number, at least {n}")
    positive = number(float, sys.float_info.min, "a number above 0")
    parser = Parser(
        prog="charlm.py",
        description="Trains a small byte-level GPT on source code, and reports bits per byte of "
        "held-out files beside byte n-grams and xz. Writes checkpoints, curve.jsonl and curve.png.",
    )
    flag = parser.add_argument
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--long",
        dest="size",
        action="store_const",
        const="long",
        help="train longer, 20 to 40 minutes on two CPU cores, past the best n-gram",
    )
    size.add_argument(
        "--smallest",
        dest="size",
        action="store_const",
        const="smallest",
        help="run everything once in its smallest form, about 15 seconds",
    )
    flag(
        "--data",
        type=pathlib.Path,
        metavar="PATH",
        help="a text file or a folder of them (default: the source of the standard library)",
    )
    flag(
        "--out",
        type=pathlib.Path,
        metavar="FOLDER",
        help="where checkpoints and curve go (default: runs/charlm, runs/charlm_long, ...)",
    )
    flag(
        "--resume",
        action="store_true",
        help="continue the run in --out, with its flags; if it is finished, score and sample it",
    )
    flag("--steps", type=at_least(1), metavar="N", help="training steps" + by_size("steps"))
    flag(
        "--rows", type=at_least(1), metavar="N", help="pieces of text in a batch" + by_size("rows")
    )
    flag(
        "--length",
        type=at_least(2),
        metavar="N",
        help="bytes in a piece, the longest context" + by_size("length"),
    )
    flag(
        "--parts",
        type=at_least(1),
        metavar="N",
        help="micro-batches a batch is accumulated from; any number gives the same gradient "
        "up to rounding" + by_size("parts"),
    )
    flag("--width", type=at_least(1), metavar="N", help="width of the model" + by_size("width"))
    flag("--layers", type=at_least(1), metavar="N", help="blocks of the model" + by_size("layers"))
    flag(
        "--heads",
        type=at_least(1),
        metavar="N",
        help="attention heads; they divide the width" + by_size("heads"),
    )
    flag("--rate", type=positive, metavar="X", help="highest learning rate" + by_size("rate"))
    flag(
        "--policy",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the arithmetic, "
        "over float32 parameters; float16 scales the loss (default: bfloat16, on a CPU float32)",
    )
    flag(
        "--quantize",
        choices=tuple(QUANTIZE),
        help="trains on codes of the kernels, 8-bit or 4-bit in groups of 32, with 8-bit "
        "activations, and serves from them (default: int8)",
    )
    flag(
        "--mesh",
        type=mesh_sizes,
        metavar="SIZES",
        help="devices in three directions, such as data=2,tensor=2,pipe=2: rows, heads and "
        "channels, layers; on a CPU it makes them. A resumed run may have another one (default: "
        "one device)",
    )
    flag(
        "--zero",
        type=int,
        choices=(0, 1, 2, 3),
        help="on a mesh, what is divided over the rows' devices: 1 and 2 the optimizer's state, 3 "
        "parameters too (default: 0)",
    )
    flag(
        "--seed",
        type=number(int, 0, "a whole number from 0 to 2^32 - 1", below=2**32),
        metavar="N",
        help="of the parameters, batches and samples (default: 0)",
    )
    flag(
        "--every",
        type=at_least(1),
        metavar="N",
        help="steps from one validation and checkpoint to the next" + by_size("every"),
    )
    flag(
        "--test-bytes",
        type=at_least(1),
        metavar="N",
        help="score on the first N bytes of the held-out text alone (default: on all)",
    )
    flag(
        "--prompt", metavar="TEXT", default="def ", help="what samples begin with (default: 'def ')"
    )
    flag(
        "--temperature",
        type=number(float, 0, "a number, at least 0"),
        metavar="X",
        default=0.7,
        help="of the samples; 0 always takes the likeliest byte (default: %(default)s)",
    )
    flag(
        "--sample-bytes",
        type=at_least(1),
        metavar="N",
        help="bytes to sample" + by_size("sample_bytes"),
    )
    return parser


def read_settings(parser: Parser, argv) -> argparse.Namespace:
    """The flags given, over those of the resumed run, over those of the chosen size."""
    args = vars(parser.parse_args(argv))
    if args["mesh"]:  # before JAX looks for devices
        devices = max(math.prod(args["mesh"].values()), jax.config.jax_num_cpu_devices)
        jax.config.update("jax_num_cpu_devices", devices)
    size, resume = args.pop("size"), args["resume"]
    out = args["out"] = args["out"] or pathlib.Path("runs", f"charlm_{size}" if size else "charlm")
    defaults = PRESETS["default"] | dict(
        policy=default_policy(), quantize="int8", seed=0, data=None, mesh=None, zero=0
    )
    wanted = PRESETS.get(size, {}) | {k: v for k, v in args.items() if v is not None}
    saved = saved_settings(out) if resume else {}
    if resume and not saved:
        parser.error(f"--resume: {out} holds no run; leave --resume out to begin one")
    for name in FIXED if resume else ():
        if name in wanted and str(wanted[name]) != str(saved[name]):
            flag = f"--{name}"
            parser.error(
                f"{flag} {wanted[name]}: the run in {out} has {flag} {saved[name]}, which resuming "
                "keeps; leave the flag out, or begin another run with another --out"
            )
    settings = argparse.Namespace(**defaults | saved | wanted)
    check(parser, settings)
    return settings


def default_policy() -> str:
    # On two CPU cores a step in bfloat16 takes as long (JAX 0.10) or nearly twice as long (0.12).
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def check(parser: Parser, settings: argparse.Namespace) -> None:
    """What no flag can check alone."""
    if settings.width % settings.heads:
        parser.error(f"--heads {settings.heads} does not divide --width {settings.width}")
    if settings.parts > settings.rows:
        parser.error(f"--parts {settings.parts} exceeds --rows {settings.rows}")
    if settings.mesh:
        check_mesh(parser, settings)
    if not settings.resume and (old := saved_settings(settings.out)):
        steps = us.Checkpoints(settings.out / "checkpoints").steps()
        if steps and steps[-1] < old["steps"]:
            parser.error(
                f"{settings.out} holds a run stopped at step {steps[-1]} of {old['steps']}; "
                "continue it with --resume, or name another --out"
            )


def check_mesh(parser: Parser, settings: argparse.Namespace) -> None:
    data, pipe = settings.mesh["data"], settings.mesh["pipe"]
    devices = math.prod(settings.mesh.values())
    if devices != jax.device_count():
        parser.error(f"--mesh has {devices} devices, and this machine {jax.device_count()}")
    if settings.layers % pipe:
        parser.error(f"--mesh pipe={pipe} does not divide --layers {settings.layers}")
    if settings.parts * data > settings.rows:
        parser.error(
            f"--mesh data={data} leaves each device {settings.rows // data} of --rows "
            f"{settings.rows}, fewer than --parts {settings.parts}"
        )


def saved_settings(out: pathlib.Path) -> dict:
    path = out / "settings.json"
    before = {"quantize": "none"}  # a run of before there was a choice
    return before | json.loads(path.read_text()) if path.exists() else {}


def open_run(parser: Parser, settings: argparse.Namespace, corpus: data.Corpus) -> None:
    """Writes the settings of a new run; of a resumed one, checks that its text is the same."""
    text = hashlib.sha256(corpus.train.tobytes()).hexdigest()
    if settings.resume:
        if settings.text != text:
            parser.error(f"--resume: {corpus.identity} has changed since {settings.out} began")
        return
    settings.text = text
    path = settings.out / "settings.json"
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        if path.exists():  # a run of this program, and no stopped one: `check` refuses those
            print(f"replacing the earlier run in {settings.out}")
            shutil.rmtree(settings.out / "checkpoints", ignore_errors=True)
        kept = [*FIXED, "every", "test_bytes", "sample_bytes", "text"]
        path.with_suffix(".new").write_text(
            json.dumps({name: getattr(settings, name) for name in kept}, default=str, indent=1)
        )
        os.replace(path.with_suffix(".new"), path)  # at once: a kill leaves no half of it
    except OSError as error:
        parser.error(f"--out {settings.out}: {error.strerror}")


def read_corpus(parser: Parser, settings: argparse.Namespace) -> data.Corpus:
    try:
        where = settings.data
        corpus = data.files_below(pathlib.Path(where)) if where else data.standard_library()
    except (OSError, ValueError) as error:
        parser.error(f"--data: {error}")
    corpus = corpus.first_of_test(settings.test_bytes)
    for role, text in (("train", corpus.train), ("test", corpus.test)):
        if len(text) <= settings.length:
            parser.error(
                f"--data: {corpus.identity} leaves {len(text)} bytes to {role} on, which --length "
                f"{settings.length} exceeds; give more text, or a shorter --length"
            )
    return corpus


def main(argv=None) -> None:
    parser = make_parser()
    settings = read_settings(parser, argv)
    corpus = read_corpus(parser, settings)
    open_run(parser, settings, corpus)
    with mesh_of(settings):
        run_on(parser, settings, corpus)


def run_on(parser: Parser, settings: argparse.Namespace, corpus: data.Corpus) -> None:
    """Everything that computes, on the mesh that is set, if any."""
    console = rich.console.Console(highlight=False, soft_wrap=True)
    apply, step, run = start(settings)
    checkpoints = us.Checkpoints(settings.out / "checkpoints")
    if settings.resume and checkpoints.steps():
        try:
            run = restored(settings, checkpoints, run)
        except ValueError as error:
            parser.error(f"--resume: {error}")
    console.print(f"{corpus}\n{describe(settings, run)}")

    scores = baselines(corpus)
    score = make_score(apply, corpus.test, settings.length)
    curve = Curve(settings.out / "curve.jsonl", until=run["position"])
    run = train(step, run, corpus, score, settings, curve, console)

    apply, codes = serving(settings, run["params"])
    scores = {"this model": make_score(apply, corpus.test, settings.length)(codes)} | scores
    if settings.quantize != "none":
        console.print(
            f"\nserved from {settings.quantize} codes: {us.tree.nbytes(codes) / 1e6:.2f} MB, in "
            f"float32 {us.tree.nbytes(run['params']) / 1e6:.2f} MB"
        )
    console.print("\nbits per byte of the held-out text (less is better)")
    for name, bits in sorted(scores.items(), key=lambda item: -item[1]):
        console.print(f"  {name:24s} {bits:.3f}")
    others = {name: bits for name, bits in scores.items() if name != "this model"}
    draw_curve(settings.out / "curve.png", curve, others, describe(settings, run))
    console.print(f"curve: {settings.out / 'curve.png'}")

    sample = make_sampler(apply, settings.length, settings.sample_bytes)
    key = jax.random.fold_in(run["key"], settings.steps)
    prompt = settings.prompt.encode("utf-8", "surrogateescape")
    text = prompt + sample(codes, prompt, settings.temperature, key)
    console.print(f"\nsampled at temperature {settings.temperature:g}:\n")
    console.print(text.decode("utf-8", "replace"), markup=False)


def describe(settings: argparse.Namespace, run) -> str:
    million = us.tree.size(run["params"]) / 1e6
    return (
        f"{million:.2f} M parameters, {settings.layers} layers of width {settings.width}; "
        f"{settings.steps} steps of {settings.rows} x {settings.length} bytes, {settings.policy}"
        f"{'' if settings.quantize == 'none' else f' and {settings.quantize}'}"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; --resume continues from the last checkpoint")
