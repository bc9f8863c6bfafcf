"""Runs that save as they go, for tests that kill them.

Importing this makes no array: a process is forked from one that has it imported, and JAX with its
threads running does not survive a fork.
"""

import itertools
import multiprocessing
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unitscale_jax.checkpoint import Checkpoints


def in_process(target, *args):
    """A process of its own, for the cost of a fork: the server has the imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the process did nothing"
        time.sleep(0.005)


def tree_of(step):
    return {"w": np.full((64, 64), step, np.float32), "step": step}


def save_each(directory, log, steps):
    """Saves each step; writes down what came of it."""
    checkpoints = Checkpoints(directory, keep=2)
    for step in range(steps):
        try:
            checkpoints.save(step, tree_of(step))
            outcome = "saved"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        with open(log, "a") as opened:
            opened.write(f"{outcome}\n")


def save_for_ever(directory, log):
    checkpoints = Checkpoints(directory, keep=2)
    done = max(checkpoints.steps(), default=-1)
    for step in itertools.count(done + 1):
        checkpoints.save(step, tree_of(step))
        with open(log, "a") as opened:
            opened.write(f"{step}\n")


def train(directory, steps, result):
    """A small run: dropout by a key, batches by a generator, Adam; saves at every third step."""
    optimizer, checkpoints = optax.adam(1e-2), Checkpoints(directory)
    generator = np.random.default_rng(0)
    params = {"w": jnp.ones((8, 8)), "b": jnp.zeros(8)}
    run = dict(params=params, opt=optimizer.init(params), key=jax.random.key(0), done=0)
    run["data"] = generator.bit_generator.state
    if checkpoints.steps():
        _, run = checkpoints.restore(run)
    generator.bit_generator.state = run["data"]

    @jax.jit
    def update(params, opt, key, x):
        key, now = jax.random.split(key)
        keep = jax.random.bernoulli(now, 0.8, x.shape)
        loss = lambda p: jnp.mean((jnp.where(keep, x, 0.0) @ p["w"] + p["b"] - x) ** 2)
        updates, opt = optimizer.update(jax.grad(loss)(params), opt)
        return optax.apply_updates(params, updates), opt, key

    while run["done"] < steps:
        x = jnp.asarray(generator.normal(size=(16, 8)), jnp.float32)
        run["params"], run["opt"], run["key"] = update(run["params"], run["opt"], run["key"], x)
        run["done"] += 1
        run["data"] = generator.bit_generator.state
        if run["done"] % 3 == 0:
            checkpoints.save(run["done"], run)
    np.savez(result, **run["params"])
