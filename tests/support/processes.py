"""Jobs of several processes on one machine, for tests: how they start, what they run, how they end.

Run as a program, this file is one of the processes.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P

import unitscale_jax as us
from unitscale_jax.checkpoint import _arrays, _files

ROOT = pathlib.Path(__file__).parents[2]
HEARTBEAT, LIMIT = 10, 300  # seconds; the limit is for a machine that many share


class Ended(NamedTuple):
    """How one process of a job ended, and how long after the first of them."""

    code: int
    said: str
    after: float


class Job:
    """Processes that run one function of this file; they end with the `with`, whatever happens."""

    def __init__(self, name, folder, count=2, devices=4):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        self.processes = []
        for rank in range(count):
            told = [name, str(folder), address, str(count), str(rank), str(devices)]
            with (self.folder / f"{name}_{rank}.log").open("w") as log:
                command = [sys.executable, "-m", __spec__.name, *told]
                started = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=ROOT)
            self.processes.append(started)
        self.name = name

    def __enter__(self):
        return self

    def said(self):
        ranks = range(len(self.processes))
        return [(self.folder / f"{self.name}_{rank}.log").read_text() for rank in ranks]

    def told(self):
        """What each process left by `tell`."""
        ranks = range(len(self.processes))
        return [json.loads((self.folder / f"{self.name}_{r}.json").read_text()) for r in ranks]

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()


def ends_of(*jobs):
    """How all processes of all jobs ended, in order; within a limit."""
    ends, deadline = {}, time.monotonic() + LIMIT
    running = {process: job for job in jobs for process in job.processes}
    while len(ends) < len(running):
        for process, job in running.items():
            assert time.monotonic() < deadline, f"{job.name} hangs: {job.said()}"
            if process not in ends and process.poll() is not None:
                ends[process] = time.monotonic()
        time.sleep(0.02)
    for job in jobs:
        first = min(ends[process] for process in job.processes)
        yield [
            Ended(process.returncode, said, ends[process] - first)
            for process, said in zip(job.processes, job.said(), strict=True)
        ]


# --- a small run, on any mesh

RULES = {"up": "column", "bias": "column", "down": "row"}
TABLE = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)


def loss(params, batch):
    x = batch["x"]
    hidden = jnp.tanh(x @ params["up"] + params["bias"])
    return us.Mean(jnp.sum((hidden @ params["down"] - x[:, ::-1]) ** 2, axis=1), batch["count"])


def fresh(mesh):
    """A run before its first step, laid out over a mesh; and its step."""
    key, rate = jax.random.key(0), 0.01
    up, down = jax.random.normal(key, (8, 16)), jax.random.normal(key, (16, 8)) / 4
    params = {"up": up, "bias": jnp.zeros(16), "down": down}
    optimizer = optax.sgd(rate, momentum=0.9)
    lay = us.parallel.layout(params, RULES, mesh, missing="whole")
    with jax.set_mesh(mesh):
        params = us.parallel.shard(params, lay)
        state = us.parallel.shard(optimizer.init(params), lay)
    run = {"params": params, "opt": state, "key": key, "step": 0}
    grad_fn = us.parallel.reduced(us.value_and_grad(loss), "dp")

    @jax.jit
    def update(params, state, batch):
        terms, _, grads = grad_fn(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, us.loss_value(terms)

    return run, update


def batch_of(step, mesh):
    chosen = np.random.default_rng(step).integers(0, len(TABLE), 16)
    read = lambda i: {"x": TABLE[chosen[i]], "count": np.float32(chosen[i] % 3 != 0)}
    return us.parallel.global_batch(read, 16, mesh)


def train(run, update, mesh, until, after_step=lambda run: None):
    losses = []
    with jax.set_mesh(mesh):
        while run["step"] < until:
            batch = batch_of(run["step"], mesh)
            params, state, value = update(run["params"], run["opt"], batch)
            losses.append(float(value))
            run |= {"params": params, "opt": state, "step": run["step"] + 1}
            after_step(run)
    return losses


# --- the jobs


def broken(folder, rank):
    """Saves after the third step; after the fourth process 1 is killed, and process 0 waits."""
    mesh = us.parallel.mesh(dp=4, tp=2)

    def after_step(run):
        if run["step"] == 3:
            us.Checkpoints(folder / "run").save(3, run)
        if run["step"] == 4 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train(*fresh(mesh), mesh, 20, after_step)


def resumed(folder, rank):
    """Goes on from the third step, on another mesh; then whatever else two processes do."""
    mesh, checkpoints = us.parallel.mesh(dp=2, tp=4), us.Checkpoints(folder / "run")
    run, update = fresh(mesh)
    began, run = checkpoints.restore(run)
    losses = train(run, update, mesh, 6)
    checkpoints.save(6, run)
    told = {"began": began, "losses": losses, "steps": checkpoints.steps()}
    told |= kinds_of_leaves(folder, rank) | rows_held(mesh) | faults(folder, rank, run)
    (folder / f"resumed_{rank}.json").write_text(json.dumps(told))


def raising(folder, rank):
    """Process 1 raises; process 0 waits for it."""
    if rank == 1:
        raise ArithmeticError("what nobody catches")
    multihost_utils.sync_global_devices("process 1 never comes")


def hanging(folder, rank):
    """Process 1 lives and does nothing; process 0 waits for it, but not for ever."""
    if rank == 1:
        time.sleep(10 * LIMIT)
    with us.parallel.watchdog(1):
        pass
    with us.parallel.watchdog(2) as step_is_done:
        for _ in range(2):
            time.sleep(1.5)
            step_is_done()
        print("alive after 3 seconds, under a watchdog of 2", flush=True)
        multihost_utils.sync_global_devices("process 1 never comes")


def all_kinds(mesh):
    """A tree of all kinds of leaves, spread over a mesh, by any number of processes."""
    bits = np.random.default_rng(1).integers(0, 256, (16, 8), np.uint8)
    put = lambda x, *spec: jax.make_array_from_callback(
        x.shape, NamedSharding(mesh, P(*spec)), lambda index: x[index]
    )
    keys = jax.random.split(jax.random.key(3), 16)
    spec = us.DotSpec(w=us.QSpec(axes=(-2,)))
    codes = us.quantize(jnp.asarray(bits, jnp.float32), {"": spec})
    lay = us.parallel.layout(
        {"codes": codes, "keys": keys},
        {"codes": P("dp", "tp"), "keys": P("dp")},
        mesh,
        missing="whole",
    )
    return us.parallel.shard({"codes": codes, "keys": keys}, lay) | {
        "bf16": put(np.tile(bits, (1, 2)).view(jnp.bfloat16), "dp", "tp"),
        "int8": put(bits.view(np.int8), "tp"),
        "bool": put(bits % 2 == 0, ("tp", "dp")),
        "int4": put((bits % 8).astype(jnp.int4), None, "tp"),
        "whole": put(np.arange(5, dtype=np.float32)),
        "own": jnp.arange(3),  # each process has it for itself
        "numpy": np.arange(3),
        "step": 7,
    }


def bits_held(tree):
    """The bits of every shard that this process has, by leaf and place."""
    plain = lambda x: jax.random.key_data(x) if is_key(x) else x
    held = {}
    for name, leaf in us.tree.named_leaves(tree).items():
        leaf = plain(leaf)
        if isinstance(leaf, jax.Array):
            for shard in leaf.addressable_shards:
                place = str(tuple((cut.start, cut.stop) for cut in shard.index))
                held[f"{name} {place}"] = np.asarray(shard.data).tobytes().hex()
        else:
            held[name] = np.asarray(leaf).tobytes().hex()
    return held


is_key = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def kinds_of_leaves(folder, rank):
    before, after = us.parallel.mesh(dp=4, tp=2), us.parallel.mesh(dp=1, tp=8)
    checkpoints, expected = us.Checkpoints(folder / "kinds"), all_kinds(after)
    tree = all_kinds(before)
    if rank == 1:
        tree |= {"own": jnp.zeros(3, jnp.int32), "numpy": np.zeros(3, int), "step": 0}  # not saved
    checkpoints.save(7, tree)
    _, restored = checkpoints.restore(expected)
    return {"same bits": bits_held(restored) == bits_held(expected)}


def rows_held(mesh):
    asked = []
    batch = us.parallel.global_batch(lambda i: asked.append(i.tolist()) or i, 16, mesh)
    held = {shard.index[0].indices(16)[:2] for shard in batch.addressable_shards}
    return {"asked": asked, "held": sorted(held)}


def faults(folder, rank, run):
    """What goes wrong on one process is an error on all, and all go on with the same checkpoint."""
    checkpoints, seen = us.Checkpoints(folder / "faults"), {}
    checkpoints.save(1, run)

    def error_of(call):
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    def in_the_way(path):
        if rank == 1:
            (path / "ocdbt.process_1").touch()  # where orbax makes a directory

    write = _arrays.write
    if rank == 1:
        _arrays.write = lambda *_: (_ for _ in ()).throw(OSError("the disk is full"))
    seen["disk full"] = error_of(lambda: checkpoints.save(2, run))
    _arrays.write = lambda path, arrays: in_the_way(path) or write(path, arrays)
    on_both = all_kinds(us.parallel.mesh(dp=4, tp=2))
    seen["orbax fails"] = error_of(lambda: checkpoints.save(2, on_both))
    _arrays.write = write
    elsewhere = us.Checkpoints(folder / f"own_disk_{rank}")
    seen["own disk"] = error_of(lambda: elsewhere.save(1, run))
    there = [device for device in jax.devices() if device.process_index == 1]
    there = NamedSharding(us.parallel.mesh(devices=there, dp=len(there)), P())
    only = jax.make_array_from_callback((3,), there, lambda _: np.zeros(3, "f"), dtype="f")
    seen["elsewhere"] = error_of(lambda: checkpoints.save(2, run | {"only": only}))
    checkpoints.save(2, run | {"step": 22})
    seen["older"] = error_of(lambda: checkpoints.save(1, run))
    seen["nothing"] = error_of(lambda: us.Checkpoints(folder / "nothing").restore(run))
    other = run | {"params": run["params"] | {"up": run["params"]["down"]}}
    seen["another model"] = error_of(lambda: checkpoints.restore(other))
    if rank == 0:
        file = folder / "faults" / "step_00000002" / "arrays" / "manifest.ocdbt"
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    else:
        _files.flaw = lambda *_: None  # a process that would not notice
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        seen["after damage"] = checkpoints.restore(run)[0]
    seen["warned"] = [str(w.message) for w in warned if w.category is UserWarning]
    return {"faults": seen}


if __name__ == "__main__":
    name, folder, address, count, rank, devices = sys.argv[1:]
    us.parallel.initialize(
        address, int(count), int(rank), cpu_devices=int(devices), heartbeat=HEARTBEAT, shutdown=15
    )
    globals()[name](pathlib.Path(folder), int(rank))
