"""What a part of a program makes of Gaussian numbers: its RMS, and that of its slope.

Elementwise regions are evaluated on the nodes of a quadrature. Other functions of one array (a
norm, a softmax) are evaluated once on a seeded sample. Either is remembered by the equations, for a
model repeats its layers.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.mesh_axes import axes_of
from unitscale_jax.trace.program import COLLECTIVES, Operation, Site, Value, bodies, evaluated_now
from unitscale_jax.typing import Array
from unitscale_jax.unit._factors import gaussian_moments
from unitscale_jax.unit._nodes import VARIES, Network, Node

LARGEST = 2**20
"""Numbers of an array beyond which a part of a program is not evaluated on a sample."""

_MOMENTS: dict[Any, tuple[float, float]] = {}
_MOST = 4096


def _remember(key: Any, moments: tuple[float, float]) -> tuple[float, float]:
    """Keeps what was measured; of more than anybody's model has, nothing."""
    if len(_MOMENTS) >= _MOST:
        _MOMENTS.clear()
    _MOMENTS[key] = moments
    return moments


def region_moments(node: Node) -> tuple[float, float]:
    """Mean squares of an elementwise region's value and slope at numbers from N(0, 1)."""
    root = node.edges[0].value
    key = ("region", _signature(node.operations, {root: "root"}), str(root.dtype))
    if key not in _MOMENTS:
        outputs = [gaussian_moments(_region(node, root, out)) for out in node.outputs]
        # Results of one region share a factor: the geometric mean of what each would have.
        _remember(key, (_gmean([a for a, _ in outputs]), _gmean([b for _, b in outputs])))
    return _MOMENTS[key]


def _region(node: Node, root: Value, out: Value) -> Callable[[Array], Array]:
    def fn(x: Array) -> Array:
        env: dict[Value, Any] = {root: jnp.asarray(x, root.dtype)}
        for op in node.operations:
            given = [env[v] if v in env else jnp.asarray(v.constant) for v in op.inputs]
            env.update(zip(op.outputs, _anywhere(op, given), strict=True))
        return env[out]

    return fn


def _anywhere(op: Operation, given: Sequence[Any]) -> Sequence[Any]:
    """The result of an elementwise operation on operands of another shape than traced."""
    if op.name == "custom_jvp_call":
        return _body(*bodies(op.site.eqn)[0], given)
    return op.site.bind(jnp.broadcast_arrays(*given))


def _body(jaxpr: Any, consts: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    env = dict(zip(jaxpr.invars, given, strict=True)) | dict(
        zip(jaxpr.constvars, consts, strict=True)
    )
    read = lambda v: jnp.asarray(v.val, v.aval.dtype) if hasattr(v, "val") else env[v]
    for eqn in jaxpr.eqns:
        xs = [read(v) for v in eqn.invars]
        inside = bodies(eqn)
        if inside:
            out = _body(*inside[0], xs)
        elif eqn.primitive.name in {"broadcast_in_dim"} | VARIES:
            out = xs  # of a number, which broadcasts by itself
        else:
            out = Site(eqn, 0).bind(jnp.broadcast_arrays(*xs))
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def snapped(size: float) -> float:
    """The nearest power of the square root of 2, which the noise of a sample does not move.

    Factors must be those of a function and not of a batch: parts of it, a validation batch and the
    whole one are measured on different samples.
    """
    return 2 ** (round(2 * math.log2(size)) / 2)


def sample_moments(net: Network, start: Value, node: Node) -> tuple[float, float] | None:
    """Mean squares of a node's result and of its gradient, as a function of one unit array.

    Args:
        net: The network, whose decided forward factors are part of the function.
        start: The array: numbers from N(0, 1) are put there.
        node: Whose result.

    Returns:
        Mean square of the result, and of the gradient of `start` for a unit cotangent (of a loss,
        or of one loss per row, for ones); None if an array on the way is too large to be evaluated
        while a program is traced.
    """
    out = node.outputs[0]
    needed = _between(net, start, out)
    sizes = [math.prod(v.shape) for op in needed for v in (*op.inputs, *op.outputs)]
    if max(sizes, default=0) > LARGEST:
        return None
    alphas = tuple(
        round(net.maker[v].alpha, 12) for op in needed for v in op.outputs if v in net.maker
    )
    key = ("sample", _signature(needed, {start: "start"}), start.shape, str(start.dtype), alphas)
    if key not in _MOMENTS:
        if any(_is_of_devices(op) for op in needed):
            return None
        _remember(key, _sampled(net, start, out, needed))
    return _MOMENTS[key]


def _is_of_devices(op: Operation) -> bool:
    """Whether an operation has no meaning on one device: a sum over devices, a call among them."""
    calls = bool(bodies(op.site.eqn))
    return op.name in COLLECTIVES or (calls and bool(axes_of([v.aval for v in op.site.eqn.invars])))


def _sampled(
    net: Network, start: Value, out: Value, needed: Sequence[Operation]
) -> tuple[float, float]:
    def fn(x: jax.Array) -> jax.Array:
        env: dict[Value, Any] = {start: x}
        for op in needed:
            given = [env[v] if v in env else _stand_in(net, op, v, rng) for v in op.inputs]
            # There are no mesh axes here that a value could vary over.
            results = given[:1] if op.name in VARIES else op.site.bind(given)
            for value, y in zip(op.outputs, results, strict=True):
                made = net.maker.get(value)
                env[value] = (
                    y if made is None or value is out else y * np.asarray(made.alpha, y.dtype)
                )
        return env[out]

    rng = np.random.default_rng(0)
    with evaluated_now(), jax.numpy_dtype_promotion("standard"):
        x = jnp.asarray(rng.standard_normal(start.shape), start.dtype)
        y, pull = jax.vjp(jax.jit(fn), x)
        each = rng.standard_normal(y.shape) if y.ndim > 1 else np.ones(y.shape)
        g = pull(jnp.asarray(each, y.dtype))[0]
        squares = [float(np.mean(np.square(np.asarray(a, np.float64)))) for a in (y, g)]
        return squares[0], squares[1]


def _stand_in(net: Network, op: Operation, value: Value, rng: np.random.Generator) -> Any:
    """What is put for a value that is not computed from the array.

    Gains are 1 and biases 0, masks let everything through, and data are N(0, 1).
    """
    dtype = value.dtype
    if value.constant is not None:
        return jnp.broadcast_to(jnp.asarray(value.constant), value.shape)
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), value.shape)
    shift = op.name in ("add", "add_any", "sub") and net.from_parameters(value)
    if jnp.issubdtype(dtype, np.integer) or shift:
        return jnp.zeros(value.shape, dtype)
    if jnp.issubdtype(dtype, np.floating) and not net.from_parameters(value):
        return jnp.asarray(rng.standard_normal(value.shape), dtype)
    return jnp.ones(value.shape, dtype)


def _between(net: Network, start: Value, out: Value) -> list[Operation]:
    """The operations that a value needs, down to the array that it is a function of."""
    found: dict[Operation, None] = {}
    seen: set[Value] = {start}
    todo: list[tuple[Value, bool]] = [(out, False)]  # whether its operands are found already
    while todo:
        value, done = todo.pop()
        if done:
            assert value.maker is not None
            found[value.maker] = None
            continue
        if value in seen or value.constant is not None or net.from_parameters(value):
            continue
        seen.add(value)
        if value.maker is None or value.maker.is_joint:
            continue
        todo.append((value, True))
        todo += [(v, False) for v in value.maker.inputs]
    on_way = _descend(start, found)
    return [op for op in found if op in on_way or not _has_random(op)]


def _descend(start: Value, operations: Mapping[Operation, None]) -> set[Operation]:
    reached, found = {start}, set()
    for op in operations:
        if any(v in reached for v in op.inputs):
            found.add(op)
            reached.update(op.outputs)
    return found


def _has_random(op: Operation) -> bool:
    return op.name.startswith("random_") or op.name.startswith("threefry")


def _signature(operations: Sequence[Operation], names: dict[Value, str]) -> tuple[Any, ...]:
    """The equations as a key: primitives, parameters, and which operand comes from where."""
    known = dict(names)
    rows = []
    for op in operations:
        ins = tuple(_named(known, v) for v in op.inputs)
        for v in op.outputs:
            known[v] = f"v{len(known)}"
        rows.append((op.name, _params_key(op), ins, tuple(str(v.dtype) for v in op.outputs)))
    return tuple(rows)


def _named(known: Mapping[Value, str], value: Value) -> str:
    if value in known:
        return known[value]
    return f"{value.dtype}{value.shape}={value.constant}"


def _params_key(op: Operation) -> str:
    return str({k: v for k, v in op.site.eqn.params.items() if not callable(v)})


def _gmean(values: Sequence[float]) -> float:
    if not all(0 < v < math.inf for v in values):
        return math.nan
    return math.exp(sum(map(math.log, values)) / len(values))


@functools.lru_cache(256)
def largest_of(count: int) -> float:
    """Mean square of the largest of so many numbers from N(0, 1)."""
    z = np.linspace(-9, 9, 8001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    below = np.cumsum(density) * (z[1] - z[0])
    return float((z**2 * count * density * below ** (count - 1)).sum() * (z[1] - z[0]))
