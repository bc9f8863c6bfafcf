"""Imports the scripts of `examples/`, which is no package: a script imports what lies beside it."""

import importlib.util
import pathlib
import sys

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def load(name):
    """The module `examples/<name>.py`, under that name, as its neighbours import it."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
