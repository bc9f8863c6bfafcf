"""Training: the loss, the optimizer, one step on one device or on a mesh, and the loop."""

import argparse
import functools
import json
import math
import pathlib
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.progress

import unitscale_jax as us
from charlm.model import (
    build,
    kernel_rules,
    layout_of,
    mean_loss,
    pieces,
    scaled_loss,
    unit_roles,
)

LOG_EVERY = 10  # steps between points of the training curve
SAMPLE_BYTES = 65_536  # spread over the held-out text, scored during training


def make_optimizer(settings: argparse.Namespace, params) -> optax.GradientTransformationExtraArgs:
    if settings.unit_scaled:
        return unit_optimizer(settings, params)
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


def unit_optimizer(settings: argparse.Namespace, params):
    """Adam with the learning rates of u-muP; gradients are near 1, so none is clipped or scaled."""
    steps = max(settings.steps, 2)
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 20, 1), steps, 1 / 50)
    roles = unit_roles(settings, params)
    adam = optax.scale_by_adam(b2=0.99)
    tx = us.unit.parametrized(adam, roles, settings.rate, weight_decay=5e-4, schedule=shape)
    return us.loss_scaled(tx, us.StaticScale(1))


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
    optimizer = make_optimizer(settings, params)
    loss = lambda params, batch: mean_loss(apply(params, batch["text"]), batch)
    if settings.unit_scaled:
        loss = us.quantized(scaled_loss(settings), kernel_rules(settings))
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


def stacked_rules(layout: us.parallel.Layout) -> dict:
    """A layout of named blocks as rules for stacked ones, whose axis 1 is the stages."""
    rules = {}
    for name, spec in layout.by_name.items():
        pattern, of_block = re.subn(r"^blocks/\d+/", "blocks/*/", name)
        rank = np.ndim(us.tree.named_leaves(layout.params)[name])
        dims = {dim - rank: axis for dim, axis in enumerate(spec) if axis}
        rules[pattern] = dims | ({1: "pipe"} if of_block else {})
    return rules


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
        sys.exit(f"charlm: the loss is {mean} before step {step}; use a lower --rate")
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
