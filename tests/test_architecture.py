"""The import graph is the architecture; this test reads it from the source."""

import ast
import pathlib
import sys
from importlib.util import resolve_name

import unitscale_jax

ROOT = pathlib.Path(unitscale_jax.__file__).parent
# In order, the lowest first.
FLOOR = ["typing", "errors", "tree", "rules", "formats", "fwd_bwd"]
FLOOR += ["trace", "statistics", "loss", "optimizer"]
SLICES = [
    "accumulate",
    "precision",
    "quantization",
    "prune",
    "distill",
    "parallel",
    "optimize",
    "unit",
]
ROOF = ["compose", "bridge", "report", "recipe", "plan", "checkpoint", "testing", "__init__"]
VISIBLE = {name: FLOOR[: i + 1] for i, name in enumerate(FLOOR)}
VISIBLE |= {name: [*FLOOR, name] for name in SLICES} | dict.fromkeys(ROOF, FLOOR + SLICES + ROOF)
GROUND = {"jax", "numpy", "unitscale_jax"} | sys.stdlib_module_names
FLAX = {"bridge.py", "unit/_linen.py", "unit/_nnx.py"}
UNSTABLE = {"jax.extend", "jax.interpreters"}  # behind trace/_compat.py and fwd_bwd.py only
NEAR_JAX = {"trace/_compat.py", "fwd_bwd.py"}


def imports(path):
    """Yields the absolute dotted name of everything that `path` imports."""
    package = ".".join(["unitscale_jax", *path.relative_to(ROOT).parts[:-1]])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(root):
    for path in sorted(root.rglob("*.py")):
        here = path.relative_to(root).as_posix()
        me = here.removesuffix(".py").split("/")[0]
        assert me in VISIBLE, f"{here} has no floor: place `{me}` in FLOOR, SLICES or ROOF"
        for name in imports(path):
            top, *rest = name.split(".")
            if (
                (top == "unitscale_jax" and rest and rest[0] not in VISIBLE[me])
                or (top == "flax" and here not in FLAX)
                or (top == "jax" and "_src" in rest)
                or (any(name.startswith(u) for u in UNSTABLE) and here not in NEAR_JAX)
                or (me in FLOOR and top not in GROUND)
            ):
                yield f"{here} imports {name}"


def test_imports_point_down():
    assert not list(violations(ROOT))


def test_every_public_name_has_one_home():
    """What `unitscale_jax` exports is the object of exactly the module that defines it."""
    exported = [name for name in unitscale_jax.__all__]
    assert len(exported) == len(set(exported)), "a name is exported twice"
    for name in exported:
        value = getattr(unitscale_jax, name)
        home = getattr(value, "__module__", None) or getattr(value, "__name__", "")
        assert home.startswith("unitscale_jax"), f"{name} lives in {home}"
