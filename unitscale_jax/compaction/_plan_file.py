"""Plans on disk: JSON with names, numbers and nothing else.

A plan needs neither the function nor its graph, so a file that says what is kept of each group, and
where groups stand in the axes of parameters, carries a compact model from where it was made to
where it is served. Shapes are written down as well, and whatever does not fit is an error.
"""

import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.compaction._groups import CompactionPlan
from unitscale_jax.errors import check_folder, check_type, expected

FORMAT = 1
_FIELDS = {"kept": dict, "sizes": dict, "axes": dict, "shapes": dict, "flags": dict}


def save_plan(path: str | os.PathLike[str], plan: CompactionPlan) -> None:
    """Writes a plan as JSON; a file that is there is replaced, at once or not at all.

    Args:
        path: Of the file.
        plan: What is kept.

    Law: `load_plan` gives the same plan back.

    Example:
        >>> import tempfile
        >>> params = {"up": jnp.ones((8, 16)), "down": jnp.ones((16, 4))}
        >>> mlp = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
        >>> graph = us.compaction.groups(mlp, params, jnp.ones((2, 8)))
        >>> plan = us.compaction.plan_of(graph, {"down:0": [0, 3, 5]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_plan(f"{folder}/plan.json", plan)
        ...     load_plan(f"{folder}/plan.json", params) == plan
        True
    """
    check_type("plan", plan, CompactionPlan, "what us.compaction.plan or plan_of returns")
    path = pathlib.Path(path)
    check_folder(path)
    written = {
        "format": FORMAT,
        "kept": {name: list(channels) for name, channels in plan.kept.items()},
        "sizes": dict(plan.sizes),
        "flags": {name: sorted(flags) for name, flags in plan.flags.items()},
        "shapes": plan.shapes,
        "axes": plan.axes,
    }
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(written, indent=1))
    beside.replace(path)


def load_plan(path: str | os.PathLike[str], params: Any = None) -> CompactionPlan:
    """Reads a plan from a file, and checks it.

    Args:
        path: Of a file that `save_plan` wrote.
        params: The dense parameters it is meant for, arrays or abstract ones; None: not compared.

    Returns:
        The plan.

    Raises:
        ValueError: The file is no plan or one of another format; its sizes, channels and shapes do
            not fit each other; or it is the plan of another model than that of `params`.
    """
    path = pathlib.Path(path)
    plan, shapes = _plan(path, _read(path))
    _check_same(f"{path} was altered: by its axes", plan.shapes, shapes, "and it says")
    if params is not None:
        of_params = {name: np.shape(x) for name, x in trees.named_leaves(params).items()}
        _check_same(f"{path} is the plan of another model: in it", plan.shapes, of_params, "here")
    return plan


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # of JSON, of UTF-8, of "[[[[.."
        raise ValueError(f"{path} is no plan: it is not JSON ({error}).") from None
    if not isinstance(found, dict) or "format" not in found:
        raise ValueError(f"{path} is no plan: it names no format. Write plans by save_plan.")
    if found["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {found['format']!r}, and this version reads format {FORMAT}. Read "
            "it with the version that wrote it, or plan again."
        )
    for name, kind in _FIELDS.items():
        if not isinstance(found.get(name), kind):
            raise ValueError(f"{path} is no plan: {name!r} is missing, or no {kind.__name__}.")
    return found


def _plan(path: pathlib.Path, found: Mapping[str, Any]) -> tuple[CompactionPlan, dict[str, Any]]:
    """A plan and the shapes that its file says."""

    def lists(field: str, each: Callable[[Any], Any]) -> dict[str, tuple[Any, ...]]:
        return {name: _listed(each, x) for name, x in found[field].items()}

    try:
        plan = CompactionPlan(
            kept=lists("kept", _whole),
            sizes={name: _whole(n) for name, n in found["sizes"].items()},
            axes=lists("axes", lambda axis: _listed(lambda term: _listed(_entry, term), axis)),
            flags={name: frozenset(flags) for name, flags in lists("flags", _word).items()},
        )
        return plan, lists("shapes", _whole)
    except ValueError as error:
        raise ValueError(f"{path} was altered: {error}") from None


def _listed(each: Callable[[Any], Any], found: Any) -> tuple[Any, ...]:
    if not isinstance(found, list):
        raise ValueError(expected("a value", found, "a list"))
    return tuple(map(each, found))


def _whole(n: Any) -> int:
    if type(n) is not int or not 0 <= n <= sys.maxsize:
        raise ValueError(f"{n!r} is where a whole number belongs.")
    return n


def _word(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(expected("a flag", text, "a word"))
    return text


def _entry(e: Any) -> str | int:
    return e if isinstance(e, str) else _whole(e)


def _check_same(what: str, mine: Mapping[str, Any], other: Mapping[str, Any], where: str) -> None:
    for name in (*mine, *other):
        if mine.get(name) != other.get(name):
            raise ValueError(
                f"{what} {name} has shape {mine.get(name)}, {where} {other.get(name)}. Load the "
                "plan that was made for these parameters."
            )
