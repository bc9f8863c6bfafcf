"""Messages between devices, read from a compiled program.

Values cannot see a bad layout: it computes the same numbers and moves ten times the bytes. So laws
on values have sisters on collectives: their kind, the mesh axes they run over, their bytes, and
whether a loop repeats them.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from unitscale_jax.errors import expected

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """One collective operation of a compiled program.

    Attributes:
        kind: One of "all-reduce", "all-gather", "reduce-scatter", "all-to-all",
            "collective-permute", "ragged-all-to-all", "collective-broadcast".
        axes: Mesh axes along which the members of a group differ, in the order of the mesh.
        dtypes: What its results hold, such as ("f32", "s8").
        bytes: Size of its results on one device.
        times: How often it runs; None if a loop around it does not say.
        loops: How many loops are around it.
        paired: Whether it is the start of a start and done pair, between which others can run.
    """

    kind: str
    axes: tuple[str, ...]
    dtypes: tuple[str, ...]
    bytes: int
    times: int | None
    loops: int
    paired: bool


def collectives(program: Any, mesh: Mesh) -> tuple[Collective, ...]:
    """The collectives of a compiled program, in the order of its text.

    Args:
        program: What `jax.jit(fn).lower(*args).compile()` returns, or the text of one.
        mesh: The mesh it was compiled for.

    Returns:
        One `Collective` each. Those inside a conditional count as if every branch ran.

    Example:
        >>> mesh, P = us.parallel.mesh(dp=8), jax.sharding.PartitionSpec
        >>> total = jax.shard_map(
        ...     lambda x: jax.lax.psum(x.sum(), "dp"), mesh=mesh, in_specs=P("dp"), out_specs=P()
        ... )
        >>> program = jax.jit(total).lower(jnp.ones(16)).compile()
        >>> [(c.kind, c.axes, c.bytes, c.loops) for c in collectives(program, mesh)]
        [('all-reduce', ('dp',), 4, 0)]
    """
    if not isinstance(program, str) and not hasattr(program, "as_text"):
        raise TypeError(expected("the program", program, "a compiled function, or its text"))
    text = program if isinstance(program, str) else program.as_text()
    bodies, entry = _computations(text)
    return tuple(_found(bodies, entry, mesh, times=1, loops=0))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the first one to run."""
    bodies: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


_COLLECTIVE = re.compile(rf"= (.*?)\s({'|'.join(sorted(KINDS, key=len, reverse=True))})(-start)?\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|branch_computations|true_computation|false_computation)="
    r"(?:\{([^}]*)\}|(%?[\w.\-]+))"
)


def _found(
    bodies: Mapping[str, Sequence[str]], name: str, mesh: Mesh, times: int | None, loops: int
) -> Iterator[Collective]:
    for line in bodies.get(name, ()):
        if match := _COLLECTIVE.search(line):
            dtypes, size = _results(match[1], match[3] is not None)
            yield Collective(
                match[2], _axes(line, mesh), dtypes, size, times, loops, match[3] is not None
            )
        elif " while(" in line:
            trips, body = _trips(line, bodies), re.search(r"body=%?([\w.\-]+)", line)
            inside = None if times is None or trips is None else times * trips
            if body:
                yield from _found(bodies, body[1], mesh, inside, loops + 1)
        else:
            for several, one in _CALLED.findall(line):
                for callee in (several or one).split(","):
                    yield from _found(bodies, callee.strip().lstrip("%"), mesh, times, loops)


def _trips(line: str, bodies: Mapping[str, Sequence[str]]) -> int | None:
    """Number of turns of a loop: as the compiler says, or the one number of its condition.

    A condition with two constants may compare with either, so that its number is not known.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = "\n".join(bodies.get(condition[1], ())) if condition else ""
    numbers = re.findall(r"s32\[\][^=]*constant\((\d+)\)", lines)
    return int(numbers[0]) if len(numbers) == 1 else None


# ------------------------------------------------------------------------------- results

_BITS = {"pred": 8, "c64": 64, "c128": 128}


def _results(text: str, start: bool) -> tuple[tuple[str, ...], int]:
    """Dtypes and bytes of what stands left of a collective."""
    arrays = [
        (dtype, _bytes(dtype, dims))
        for dtype, dims in re.findall(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]", text)
    ]
    if start and text.startswith("("):  # operands, results and maybe counters: the largest one
        arrays = [max(arrays, key=lambda array: array[1])]
    return tuple(dict.fromkeys(dtype for dtype, _ in arrays)), sum(size for _, size in arrays)


def _bytes(dtype: str, dims: str) -> int:
    count = math.prod(int(d) for d in dims.split(",") if d)
    bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])  # type: ignore[index]
    return -(-count * bits // 8)


# -------------------------------------------------------------------------------- groups


def _axes(line: str, mesh: Mesh) -> tuple[str, ...]:
    shape = tuple(mesh.shape.values())
    places = [np.unravel_index(group, shape) for group in _groups(line, mesh.size)]

    def differs(i: int) -> bool:
        """A message runs along an axis if members of a group have several positions on it."""
        return any(len(set(place[i].tolist())) > 1 for place in places)

    return tuple(name for i, name in enumerate(mesh.axis_names) if differs(i))


_LISTED = re.compile(r"(?:source_target_pairs|replica_groups)=\{(\{.*?\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(
    r"replica_groups=mesh\[(.*?)\]"
    r"(?:, device_ids=\(\[?([\d,]+)\]?(?:T\(([\d,]+)\))?\))? \{(.*?)\}"
)


def _groups(line: str, devices: int) -> list[list[int]]:
    """The groups of a collective, as positions in the mesh, in any of XLA's four spellings.

    `{{0,1},{2,3}}`, `[2,4]<=[8]`, `[2,4]<=[4,2]T(1,0)` and `mesh['dp'=4,'tp'=2] {'dp'}`.
    """
    if listed := _LISTED.search(line):
        return [_ints(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if iota := _IOTA.search(line):
        return _iota(devices, iota[2], iota[3]).reshape(_ints(iota[1])).tolist()
    if named := _NAMED.search(line):
        sizes, ids, order, chosen = named.groups()
        return _named_groups(sizes, chosen, _device_ids(devices, ids, order))
    return [list(range(devices))]


def _ints(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _iota(devices: int, shape: str, order: str | None) -> np.ndarray:
    ids = np.arange(devices).reshape(_ints(shape))
    return ids.transpose(_ints(order)) if order else ids


def _device_ids(devices: int, ids: str | None, order: str | None) -> np.ndarray:
    if order and ids:
        return _iota(devices, ids, order)
    return np.array(_ints(ids)) if ids else np.arange(devices)


def _named_groups(sizes: str, chosen: str, ids: np.ndarray) -> list[list[int]]:
    """Groups along some axes of XLA's own mesh; `'x':(2)4` is 4 of x, inside a factor of 2.

    Every axis of size n is cut in three, (before, part, n / (before part)), where a whole axis is
    (1, n, 1) and one that is not chosen (1, 1, n). Members of a group differ in the chosen parts,
    so these are moved to the end.
    """
    cuts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    found = re.findall(r"'([^']+)'=(\d+)", sizes)
    whole = {name: int(size) for name, size in found}
    picked = {name: (int(before or 1), int(part or whole[name])) for name, before, part in cuts}
    dims: list[int] = []
    along: list[int] = []
    for name, size in whole.items():
        before, part = picked.get(name, (1, 1))
        along += [len(dims) + 1] if name in picked else []
        dims += [before, part, size // (before * part)]
    rest = [k for k in range(len(dims)) if k not in along]
    members = math.prod(dims[k] for k in along)
    return ids.reshape(dims).transpose(rest + along).reshape(-1, members).tolist()
