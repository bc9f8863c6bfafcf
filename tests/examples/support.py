"""Imports the scripts of `examples/`, which is no package: a script imports what lies beside it."""

import importlib.util
import os
import pathlib
import sys

from tests.support.compilation import QUICKLY

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"

# Of processes that run a script: with the package, whether or not it is installed, and with what
# other processes compiled, for a run and its repetition are the same programs.
ENV = {
    **os.environ,
    **QUICKLY,
    "PYTHONPATH": str(EXAMPLES.parent),
    "JAX_COMPILATION_CACHE_DIR": str(EXAMPLES.parent / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def load(name):
    """The module `examples/<name>.py`, under that name, as its neighbours import it."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
