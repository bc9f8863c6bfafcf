"""How this project measures: exact costs from the compiler, times as medians with their spread.

A benchmark makes claims and prints one JSON line for each, with what it measured, whether that
supports the claim, and on what. FLOPs, bytes and memory are the compiler's own and repeat exactly;
times are wall-clock medians of alternating runs, so that a busy machine slows both sides.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import optax

_RUNNING = {"by": ""}  # the benchmark that prints


def arguments(name, doc, **more):
    """The flags every benchmark has, and `more`: name -> help of a flag that takes a text.

    `name` is the benchmark's, `__file__`; each result says by which benchmark it was measured.
    """
    _RUNNING["by"] = pathlib.Path(name).stem
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smallest", action="store_true", help="tiny shapes and two runs, for CI")
    parser.add_argument("--runs", type=int, default=10, help="timed runs of each side (default 10)")
    for name, text in more.items():
        parser.add_argument(f"--{name}", help=text)
    options = parser.parse_args()
    options.runs = 2 if options.smallest else options.runs
    return options


def compiled(fn, *args, donate=()):
    """Compiles `fn` for `args`, which may be abstract."""
    return jax.jit(fn, donate_argnums=donate).lower(*args).compile()


def cost(program):
    """The compiler's own figures: FLOPs and bytes moved (a loop's body counts once), memory."""
    analysis, memory = program.cost_analysis(), program.memory_analysis()
    return {
        "flops": analysis.get("flops"),
        "bytes": analysis.get("bytes accessed"),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
    }


def seconds(programs, runs):
    """Wall-clock seconds of each named thunk, alternating between them after one warm-up.

    Beside them the median of what this process computed, on all cores: a busy machine moves the
    first by half, the second by a twentieth.
    """
    for thunk in programs.values():
        jax.block_until_ready(thunk())
    taken, computed = ({name: [] for name in programs} for _ in range(2))
    for _ in range(runs):
        for name, thunk in programs.items():
            start, began = time.perf_counter(), time.process_time()
            jax.block_until_ready(thunk())
            computed[name].append(time.process_time() - began)
            taken[name].append(time.perf_counter() - start)
    cpu = {name: {"cpu": round(statistics.median(values), 5)} for name, values in computed.items()}
    return {name: spread(values) | cpu[name] for name, values in taken.items()}


def spread(values):
    """Median, minimum and maximum."""
    return {
        "median": round(statistics.median(values), 5),
        "min": round(min(values), 5),
        "max": round(max(values), 5),
    }


def ratio(a, b):
    """a / b to three digits, or None where there is nothing to compare with."""
    return None if not b else round(a / b, 3)


def claim(text, supported, **measured):
    """Prints one result. `supported` is a bool, or None where nothing was claimed."""
    verdict = {True: "supported", False: "refuted", None: "reported"}[supported]
    print(json.dumps({"claim": text, "verdict": verdict, **measured, **_where()}), flush=True)


def _where():
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}",
        "versions": f"python {platform.python_version()}, jax {jax.__version__}, "
        f"optax {optax.__version__}",
        "date": datetime.date.today().isoformat(),
        **_RUNNING,
    }
