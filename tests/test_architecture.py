"""The import graph is the architecture; this test reads it from the source."""

import ast
import importlib
import pathlib
import subprocess
import sys
from importlib.util import resolve_name

import pytest

import unitscale_jax

ROOT = pathlib.Path(unitscale_jax.__file__).parent
# In order, the lowest first.
FLOOR = ["typing", "errors", "tables", "sparsity", "packing", "processes", "mesh_axes"]
FLOOR += ["tree", "rules", "formats", "fwd_bwd"]
FLOOR += ["trace", "statistics", "loss", "optimizer"]
SLICES = [
    "accumulate",
    "precision",
    "quant",
    "prune",
    "compaction",
    "distill",
    "parallel",
    "adapt",
    "optimize",
    "unit",
]
ROOF = ["compose", "bridge", "report", "recipe", "generation", "preflight"]
ROOF += ["checkpoint", "testing", "__init__"]
VISIBLE = {name: FLOOR[: i + 1] for i, name in enumerate(FLOOR)}
VISIBLE |= {name: [*FLOOR, name] for name in SLICES} | dict.fromkeys(ROOF, FLOOR + SLICES + ROOF)
# The rooms of a package, the lowest first. A room imports those before it; `trace` is a floor of
# its own, and in `parallel` only layouts are shared.
ROOMS = {
    "trace": ["program", "rewrite", "params", "dimensions", "costs"],
    "parallel": ["_launch", "layouts", "collectives", "data", "pipeline", "merge"],
}
APART = {"collectives", "data", "pipeline", "merge"}  # rooms that do not import each other
GROUND = {"jax", "numpy", "unitscale_jax"} | sys.stdlib_module_names
DRAWS = {("tables", "rich")}  # the one file that draws tables
FLAX = {"bridge.py", "unit/_linen.py", "unit/_nnx.py"}
UNSTABLE = {"jax.extend", "jax.interpreters"}  # behind _compat.py and fwd_bwd.py only
NEAR_JAX = {"trace/program/_compat.py", "fwd_bwd.py"}


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
                or (me in FLOOR and top not in GROUND and (me, top) not in DRAWS)
            ):
                yield f"{here} imports {name}"


def test_imports_point_down():
    assert not list(violations(ROOT))


def sideways(root):
    """Imports from a later room of a package, or between rooms that stand apart."""
    for package, rooms in ROOMS.items():
        for path in sorted((root / package).rglob("*.py")):
            room = path.relative_to(root / package).parts[0].removesuffix(".py")
            if room == "__init__":
                continue
            below = rooms[: rooms.index(room) + 1]
            seen = [name for name in below if name == room or not {name, room} <= APART]
            for name in imports(path):
                inside = name.split(".")[2:] if name.startswith(f"unitscale_jax.{package}.") else []
                if inside and inside[0] not in seen:
                    yield f"{path.relative_to(root).as_posix()} imports {name}"


def test_rooms_of_a_package_import_the_rooms_before_them():
    assert not list(sideways(ROOT))


def private(root):
    """Imports of another package's private modules."""
    for path in sorted(root.rglob("*.py")):
        here = path.relative_to(root).parts
        for name in imports(path):
            parts = name.split(".")[1:]
            elsewhere = name.startswith("unitscale_jax.") and parts[0] != here[0]
            if elsewhere and any(part.startswith("_") for part in parts):
                yield f"{'/'.join(here)} imports {name}"


def test_no_package_reaches_into_private_modules_of_another():
    assert not list(private(ROOT))


# Where does a line belong? Each question has one answer.
QUESTIONS = {
    "which file knows JAX versions apart": "trace/program/_compat.py",
    "where is the rule that says how `reshape` moves an axis": "trace/program/_primitives.py",
    "where are the equations of nested bodies visited": "trace/program/_walk.py",
    "how often does a while loop run": "trace/program/_trips.py",
    "where is an equation evaluated anew by a rule": "trace/rewrite/_rewrite.py",
    "where is a custom derivative replayed": "trace/rewrite/_derivatives.py",
    "which products does a parameter meet, over which axes": "trace/params/_meetings.py",
    "where is it decided that two axes have to be cut together": "trace/dimensions/_couplings.py",
    "where are the FLOPs of a convolution counted": "trace/costs/_work.py",
    "where are collectives read from a compiled program": "trace/costs/_hlo.py",
    "over which manual mesh axes does a value vary": "mesh_axes.py",
    "how do processes agree on the outcome of a save": "processes.py",
    "where does a skipped step keep its state": "optimizer/_step.py",
    "where are two int4 codes put into one byte": "packing.py",
    "where is a batch cut into parts": "loss/_split.py",
    "where does a loss scale grow and fall": "precision/_scale.py",
    "where are activations observed": "statistics/_observe.py",
    "where is the scale of every value and gradient measured": "unit/_tracked.py",
    "where are weights turned into codes": "quant/_params.py",
    "where is the value of a quantized product computed": "quant/_served.py",
    "where is the form of an integer product that a CPU is fast at": "quant/_cpu_forms.py",
    "where are the masks of a 2:4 pattern made": "prune/_patterns.py",
    "where are channels cut out of parameters": "compaction/_compact.py",
    "where is it inferred which dimension goes over which mesh axis": "parallel/layouts/_infer.py",
    "where is the one reduction of a data-parallel step": "parallel/data/_data.py",
    "where is one pipeline tick run": "parallel/pipeline/_ticks.py",
    "where is the role of a parameter found": "unit/_roles.py",
    "where is the learning rate of a role": "unit/_multipliers.py",
    "which axes of a parameter are the matrix that Muon sees": "unit/_muon.py",
    "where is ring attention": "parallel/collectives/_ring.py",
    "where does a checkpoint become visible at once": "checkpoint/_files.py",
    "which file imports flax": "bridge.py",
    "where is the sentence for a misspelt name": "errors.py",
    "how does a report print as a table": "tables.py",
}


def test_every_question_has_a_file():
    missing = {q: path for q, path in QUESTIONS.items() if not (ROOT / path).is_file()}
    assert not missing


def test_orbax_is_imported_with_the_first_checkpoint_and_in_one_file():
    """It takes a sixth of the time of `import unitscale_jax`, which a server does not need."""
    users = [
        path
        for path in ROOT.rglob("*.py")
        if any(n.split(".")[0] == "orbax" for n in imports(path))
    ]
    assert [path.relative_to(ROOT).as_posix() for path in users] == ["checkpoint/_orbax.py"]
    ask = "import sys, unitscale_jax; sys.exit('orbax.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", ask], cwd=ROOT.parent).returncode == 0


def packages():
    return sorted(path.parent for path in ROOT.rglob("__init__.py"))


@pytest.mark.parametrize("package", packages(), ids=lambda path: path.name)
def test_every_package_says_what_it_exports(package):
    """A name is in `__all__`, or imported `as` itself: for other rooms, and for no user."""
    tree = ast.parse((package / "__init__.py").read_text())
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname != alias.name
    }
    listed = next(
        (
            set(ast.literal_eval(node.value))
            for node in tree.body
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
        ),
        set(),
    )
    assert imported == listed


def test_every_public_name_has_one_home():
    """What `unitscale_jax` exports is the object of exactly the module that defines it."""
    exported = [name for name in unitscale_jax.__all__]
    assert len(exported) == len(set(exported)), "a name is exported twice"
    for name in exported:
        value = getattr(unitscale_jax, name)
        home = getattr(value, "__module__", None) or getattr(value, "__name__", "")
        assert home.startswith("unitscale_jax"), f"{name} lives in {home}"


USERS = ["us", "quant", "prune", "compaction", "distill", "parallel", "statistics", "testing"]
USERS += ["unit"]
USERS += ["trace", "tree", "rules", "formats", "fwd_bwd", "precision"]


def namespace(space):
    return unitscale_jax if space == "us" else importlib.import_module(f"unitscale_jax.{space}")


@pytest.mark.parametrize("space", USERS)
def test_tab_completion_offers_what_is_public_and_no_more(space):
    module = namespace(space)
    offered = {name for name in dir(module) if not name.startswith("__")}
    assert offered == set(module.__all__)
    assert all(hasattr(module, name) for name in offered)


def test_no_name_means_two_things():
    """A name that two namespaces offer is one object."""
    meanings = {}
    for space in USERS:
        module = namespace(space)
        for name in module.__all__:
            meanings.setdefault(name, {})[space] = getattr(module, name)
    twice = {
        name: sorted(found)
        for name, found in meanings.items()
        if any(value is not next(iter(found.values())) for value in found.values())
    }
    assert twice.keys() <= {"trace"}, twice  # `us.trace` is the namespace of its verb
