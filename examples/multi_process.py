"""Trains one model on the devices of two processes, and shows that nothing else has changed.

    python examples/multi_process.py              two processes of four CPU devices each
    python examples/multi_process.py --kill       one of them is killed on the way
    python examples/multi_process.py --smallest   everything once, in its smallest form

The program starts itself twice, as two machines of a TPU pod would start it once each. The rows of
a batch lie over `dp` and the parameters over `tp`, in a layout that is inferred from the model.
Every process reads the rows that its devices hold, and writes the parameters that it holds. With
`--kill` the other process ends after the heartbeat, and both start again, from the last checkpoint
and on a mesh of another shape. In the end the parameters are restored on one device, and stand
beside those of a run on that device alone.

On a pod, `initialize()` needs no arguments, and everything below `train` is left out.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # two processes cannot share one GPU or TPU

import jax
import jax.numpy as jnp
import numpy as np
import optax
from charlm import data
from flax import linen as nn

import unitscale_jax as us

PROCESSES, DEVICES = 2, 4  # devices of each process; two CPU cores do the work of all eight
HEARTBEAT = 10  # seconds until a dead process is missed; JAX's 100 is for busy machines
LIMIT = 300  # seconds until a process that does not end is taken for hanging
ALLOWED = 1e-3  # how far parameters may be from those of one device, of the largest of each

FIRST_MESH, SECOND_MESH = dict(dp=4, tp=2), dict(dp=2, tp=4)
SIZES = {
    "default": dict(steps=60, every=20, rows=32, length=64, width=64, layers=2),
    "smallest": dict(steps=6, every=2, rows=8, length=16, width=16, layers=1),
}
HEADS, VOCABULARY = 4, 256  # heads are what `tp` divides; a token is a byte


# --- the model, which knows nothing of devices ---------------------------------------------------


class Block(nn.Module):
    """Attention to earlier bytes, then two dense layers, each added to the stream."""

    @nn.compact
    def __call__(self, x):  # (rows, time, width)
        width, y = x.shape[-1], nn.RMSNorm()(x)
        dense = functools.partial(nn.DenseGeneral, use_bias=False)
        q, k, v = (dense((HEADS, width // HEADS), name=name)(y) for name in ("q", "k", "v"))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)  # (rows, time, heads, size)
        x = x + dense(width, axis=(-2, -1), name="out")(mixed)
        y = nn.gelu(dense(4 * width, name="up")(nn.RMSNorm()(x)))
        return x + dense(width, name="down")(y)


class LM(nn.Module):
    """Bytes to the scores of the next byte: (rows, time) to (rows, time, 256)."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, text):
        places = self.param("places", nn.initializers.normal(0.1), (text.shape[1], self.width))
        x = nn.Embed(VOCABULARY, self.width, name="bytes")(text) + places
        for i in range(self.layers):
            x = Block(name=f"block_{i}")(x)
        flat = nn.initializers.normal(0.02)  # all bytes equally likely: the loss starts at 8 bits
        return nn.Dense(VOCABULARY, kernel_init=flat, name="head")(nn.RMSNorm()(x))


def make_loss(apply):
    """Bits per byte, as a sum over the bytes of each row and their number."""

    def loss(params, batch):
        text = batch["text"].astype(jnp.int32)  # (rows, time + 1)
        scores = apply(params, text[:, :-1])
        costs = optax.softmax_cross_entropy_with_integer_labels(scores, text[:, 1:])
        counts = jnp.full(len(text), costs.shape[1], jnp.float32)
        return us.Mean(jnp.sum(costs, axis=1) / np.log(2), counts)

    return loss


# --- the run, on any mesh and in any number of processes -----------------------------------------


def train(size, mesh, folder=None, say=print, after_step=lambda _: None):
    """Trains, going on from the last checkpoint in the folder; returns the run."""
    corpus = data.standard_library()
    model = LM(size["width"], size["layers"])
    text = jnp.zeros((size["rows"], size["length"]), jnp.int32)
    apply, params, _ = us.from_linen(model, model.init(jax.random.key(0), text))

    layout = us.parallel.infer(apply, params, text, mesh=mesh)
    optimizer = us.parallel.sharded(optax.adamw(3e-3), layout)
    grad_fn = us.parallel.reduced(us.value_and_grad(make_loss(apply)), "dp", layout=layout)
    train_step = us.updated(grad_fn, optimizer)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, batch):
        params, opt_state, terms, _ = train_step(params, opt_state, batch)
        return params, opt_state, us.loss_value(terms)

    with jax.set_mesh(mesh), us.parallel.watchdog(LIMIT / 2) as step_is_done:
        params = us.parallel.shard(params, layout)
        run = {"params": params, "opt_state": optimizer.init(params), "step": 0}
        checkpoints = us.Checkpoints(folder) if folder else None
        if checkpoints and checkpoints.steps():
            _, run = checkpoints.restore(run)
            say(f"goes on from step {run['step']}, on {dict(mesh.shape)}")
        else:
            say(f"{layout.nbytes:,} bytes of {us.tree.nbytes(params):,} on each device")
        for step in range(run["step"], size["steps"]):
            read = lambda rows, step=step: {"text": windows(corpus.train, size, step)[rows]}
            batch = us.parallel.global_batch(read, size["rows"], mesh)
            params, opt_state, bits = update(run["params"], run["opt_state"], batch)
            run = {"params": params, "opt_state": opt_state, "step": step + 1}
            bits = float(bits)  # waits for the step, which the watchdog is about
            step_is_done()
            if run["step"] % size["every"] == 0 or run["step"] == size["steps"]:
                say(f"step {run['step']:3d}  {bits:.3f} bits per byte")
                if checkpoints:
                    checkpoints.save(run["step"], run)
            after_step(run["step"])
    return run


def windows(text, size, step):
    """The pieces of text of one step, (rows, time + 1): a function of the step alone."""
    starts = np.random.default_rng(step).integers(0, len(text) - size["length"], size["rows"])
    return text[starts[:, None] + np.arange(size["length"] + 1)]


def work(settings):
    """What each of the processes does."""
    us.parallel.initialize(
        settings.address,
        PROCESSES,
        settings.rank,
        cpu_devices=DEVICES,
        heartbeat=HEARTBEAT,
    )
    # What the collectives of a CPU print goes with the errors; lines of ours alone are passed on.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    say = functools.partial(print, file=lines, flush=True)
    size, mesh = SIZES[settings.size], us.parallel.mesh(dp=settings.dp, tp=-1)

    def after_step(step):
        if settings.kill and settings.rank == 1 and step == size["every"] + 1:
            os.kill(os.getpid(), signal.SIGKILL)  # as when the power goes: no goodbye

    train(size, mesh, settings.folder, say if settings.rank == 0 else lambda _: None, after_step)


# --- the two processes, from outside -------------------------------------------------------------


@contextlib.contextmanager
def started(settings, mesh, *more):
    """The processes, on a free port; they end with the `with`, whatever happens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = [
        "--size",
        settings.size,
        "--folder",
        str(settings.folder),
        "--dp",
        str(mesh["dp"]),
        *more,
    ]
    processes = []
    try:
        for rank in range(PROCESSES):
            command = [sys.executable, __file__, *flags, "--rank", str(rank), "--address", address]
            with errors_of(settings, rank).open("w") as errors:
                processes.append(
                    subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
                )
            threading.Thread(target=pass_on, args=(rank, processes[rank]), daemon=True).start()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def pass_on(rank, process):
    for line in process.stdout:
        print(f"  process {rank}: {line}", end="", flush=True)


def errors_of(settings, rank) -> pathlib.Path:
    return settings.folder / f"errors_{rank}.txt"


def wait_for(settings, process, rank):
    try:
        return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        sys.exit(f"process {rank} hangs:\n{errors_of(settings, rank).read_text()}")


def all_end_well(settings, processes):
    for rank, process in enumerate(processes):
        if code := wait_for(settings, process, rank):
            sys.exit(f"process {rank} ended with {code}:\n{errors_of(settings, rank).read_text()}")


def one_is_killed(settings, processes):
    """Process 1 is killed on the way; the other ends too, although it is in the middle of a sum."""
    if wait_for(settings, processes[1], 1) != -signal.SIGKILL:
        sys.exit(f"process 1 was not killed:\n{errors_of(settings, 1).read_text()}")
    died = time.monotonic()
    print("  process 1 is killed", flush=True)
    if wait_for(settings, processes[0], 0) == 0:
        sys.exit("process 0 ended as if nothing had happened")
    print(f"  process 0 ended {time.monotonic() - died:.1f} seconds later")


def compare(settings):
    """Restores the last checkpoint on one device, beside the run on one device."""
    size, alone = SIZES[settings.size], us.parallel.mesh(dp=1, tp=1, devices=jax.devices()[:1])
    print("one process, one device")
    expected = train(size, alone, say=lambda line: print(f"  {line}"))
    step, together = us.Checkpoints(settings.folder).restore(expected)
    far = lambda a, b: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
    pairs = jax.tree.map(far, together["params"], expected["params"])
    name, worst = max(us.tree.named_leaves(pairs).items(), key=lambda item: item[1])
    print(
        f"after {step} steps the parameters differ by {worst:.1e} of the largest in {name}, "
        "and less elsewhere"
    )
    if step != size["steps"] or not worst < ALLOWED:
        sys.exit(f"expected {size['steps']} steps and less than {ALLOWED:.0e}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--kill", action="store_true", help="kill a process, and start again on another mesh"
    )
    parser.add_argument(
        "--smallest",
        dest="size",
        action="store_const",
        const="smallest",
        default="default",
        help="run everything once in its smallest form",
    )
    hidden = functools.partial(parser.add_argument, help=argparse.SUPPRESS)
    hidden("--size", choices=SIZES)
    hidden("--folder", type=pathlib.Path)
    hidden("--rank", type=int)
    hidden("--address")
    hidden("--dp", type=int)
    settings = parser.parse_args(argv)
    if settings.rank is not None:
        work(settings)
        return
    with tempfile.TemporaryDirectory() as folder:
        settings.folder = pathlib.Path(folder)
        print(f"{PROCESSES} processes of {DEVICES} devices, {FIRST_MESH}")
        if settings.kill:
            with started(settings, FIRST_MESH, "--kill") as processes:
                one_is_killed(settings, processes)
            print(f"{PROCESSES} processes again, {SECOND_MESH}")
        with started(settings, SECOND_MESH if settings.kill else FIRST_MESH) as processes:
            all_end_well(settings, processes)
        compare(settings)


if __name__ == "__main__":
    main()
