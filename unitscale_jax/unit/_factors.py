"""Factors of operations: what makes their outputs and their gradients unit for unit operands.

    y = alpha f(x_1, .., x_k),    gradient of x_i = beta_i (df/dx_i)^T (gradient of y)

Each function here maps shapes and parameters of one operation to its `Factors`, ideal for each by
itself; `_constraint` then ties those that must be equal. Two families stand beside each other:

    exact       calibrated: alpha = 1/rms f(z), beta = 1/rms f'(z) for z ~ N(0, 1) by quadrature.
                The second moment counts and not the variance: the next product carries it on.
    graphcore   the fitted formulas of the library `unit-scaling` 0.3.5, equal to its numbers

Unit Scaling: https://arxiv.org/abs/2303.11257; u-muP: https://arxiv.org/abs/2407.17465.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax.errors import unknown
from unitscale_jax.trace.program import evaluated_now
from unitscale_jax.typing import Array

Family: TypeAlias = Literal["exact", "graphcore"]
FAMILIES = ("exact", "graphcore")


class Factors(NamedTuple):
    """Factors of one operation: `fwd` of its result, `bwd` of each operand by name."""

    fwd: float
    bwd: Mapping[str, float]


def check_family(factors: str) -> None:
    """Raises `ValueError` for a family of factors that there is not."""
    if factors not in FAMILIES:
        raise ValueError(unknown(factors, FAMILIES, "family of factors"))


# -------------------------------------------------------------------------------- contractions


def linear(fan_in: int, fan_out: int, rows: float, powers: Sequence[float]) -> Factors:
    """Of x (rows, fan_in) times a kernel (fan_in, fan_out): each sum has so many unit terms."""
    alpha, x, kernel = powers
    per_row = rows**-kernel
    return Factors(fan_in**-alpha, {"x": fan_out**-x, "kernel": per_row, "bias": per_row})


def matmul(left_rows: int, inner: int, right_columns: int) -> Factors:
    """Of two activations (left_rows, inner) and (inner, right_columns); batch axes do not count."""
    return Factors(inner**-0.5, {"left": right_columns**-0.5, "right": left_rows**-0.5})


def conv(kernel: Sequence[int], strides: Sequence[int], groups: int, positions: float) -> Factors:
    """Of a kernel (k.., in / groups, out) and so many output positions; padding does not count.

    A position of the input is met by k / stride kernel positions of out / groups channels.
    """
    *window, fan_in, out = kernel
    taps = math.prod(window)
    per_position = positions**-0.5
    x = (math.prod(strides) * groups / (taps * out)) ** 0.5
    return Factors((taps * fan_in) ** -0.5, {"x": x, "kernel": per_position, "bias": per_position})


def embed(vocabulary: int, ids: float) -> Factors:
    """Of a table (vocabulary, width), each row of which is met by ids / vocabulary ids."""
    return Factors(1.0, {"table": (vocabulary / ids) ** 0.5})


def add(out: Sequence[int], operands: Mapping[str, Sequence[int]]) -> Factors:
    """Of two arrays that broadcast to `out`; an array of size 1 adds no variance that counts."""
    size = math.prod(out)
    single = any(math.prod(shape) == 1 for shape in operands.values())
    bwd = {name: (size / max(math.prod(shape), 1)) ** -0.5 for name, shape in operands.items()}
    return Factors(1.0 if single else 2**-0.5, bwd)


# --------------------------------------------------------------------------------- elementwise


# Midpoints: Gauss-Hermite is off by 6 % on the slope of relu, whose kink its nodes straddle.
NODES = np.linspace(-10, 10, 4096, endpoint=False) + 10 / 4096
WEIGHTS = np.exp(-(NODES**2) / 2) / np.exp(-(NODES**2) / 2).sum()


@functools.lru_cache(maxsize=256)
def elementwise(fn: Callable[[Array], Array]) -> Factors:
    """Of a function of each element: 1/rms of its value and of its slope at Gaussian numbers.

    Raises:
        ValueError: The function is no elementwise one, or is not finite on Gaussian numbers.
    """
    out, slope = gaussian_moments(fn)
    if not (0 < out < math.inf and 0 < slope < math.inf):
        raise ValueError(
            f"{getattr(fn, '__name__', fn)} has mean square {out} and its slope {slope} on "
            "Gaussian numbers; expected positive, finite numbers. Give its factors with "
            "us.unit.composite."
        )
    return Factors(out**-0.5, {"x": slope**-0.5})


def gaussian_moments(fn: Callable[[Array], Array]) -> tuple[float, float]:
    """Mean squares of a function and of its slope, of numbers from N(0, 1).

    Raises:
        ValueError: The result has not the shape of the argument.
    """
    with evaluated_now(), jax.numpy_dtype_promotion("standard"):
        nodes = jnp.asarray(NODES, jnp.result_type(float))
        out, slope = jax.jvp(fn, (nodes,), (jnp.ones_like(nodes),))
    if jnp.shape(out) != NODES.shape:
        raise ValueError(
            f"{getattr(fn, '__name__', fn)} maps shape {NODES.shape} to {jnp.shape(out)}; expected "
            "a function of each element."
        )
    squares = [np.square(np.asarray(y, np.float64)) for y in (out, slope)]
    return float(WEIGHTS @ squares[0]), float(WEIGHTS @ squares[1])


def between(share: float, low: float, high: float) -> float:
    """A number between two, in logarithms: `low` at share 0 and `high` at share 1."""
    return math.exp(share * math.log(high) + (1 - share) * math.log(low))


def gelu(mult: float) -> Factors:
    """The fitted formula of the activation `gelu(m x) / m`."""
    share = 1 / (1 + 1 / (4 * mult**2))
    alpha = between(share, 2, math.sqrt(2 / (1 - 1 / math.pi)))
    return Factors(alpha, {"x": between(share, 2, math.sqrt(2))})


def silu(mult: float) -> Factors:
    """The fitted formula of x sigmoid(m x)."""
    slope = between(1 / (1 + 1 / mult**2), 2, math.sqrt(2))
    return Factors(gelu(mult).fwd, {"x": slope})


def silu_glu(mult: float) -> Factors:
    """The fitted formula of x g sigmoid(m g), one number for all."""
    one = silu(mult).bwd["x"]
    return Factors(one, {"x": one, "gate": one})


def softmax(size: int, mult: float) -> Factors:
    """The fitted formula of probabilities over `size` numbers, `softmax(m x)`."""
    share = 1 / (1 + 4 / mult**2)
    alpha = between(share, size, size**0.5)
    return Factors(alpha, {"x": between(share, size / mult, (size / mult) ** 0.5)})


def attention(keys: int, head: int, mult: float, causal: bool, rate: float) -> Factors:
    """The fitted formula of attention with logits m q.k / head over `keys` keys."""
    share = 1 / (1 + 4 * head / mult**2)
    seen = math.log(keys) if causal else 1.0
    one = (1 - rate) ** 0.5 / between(share, (seen / keys) ** 0.5, 1.0) if seen else 1.0
    return _same(one, "q", "k", "v")


# ----------------------------------------------------------------------- exact factors of softmax


@functools.lru_cache(maxsize=256)
def exact_softmax(size: int, mult: float) -> Factors:
    """Of softmax(m z) over `size` independent z ~ N(0, 1), by one integral per moment.

    Law: alpha^-2 = E p^2 and beta^-2 = m^2 (E p^2 - 2 E p^3 + E p^4 + (size - 1) E p_1^2 p_2^2),
    for a unit cotangent g gives m p_i (g_i - sum_j p_j g_j).
    """
    if size == 1:
        return Factors(1.0, {"x": 1.0})  # its gradient is zero, whatever the factor
    second, third, fourth = (_moment(size, mult, (power,)) for power in (2, 3, 4))
    square = second - 2 * third + fourth + (size - 1) * _moment(size, mult, (2, 2))
    return Factors(second**-0.5, {"x": (mult**2 * square) ** -0.5})


@functools.lru_cache(maxsize=256)
def exact_attention(keys: int, head: int, mult: float, causal: bool, rate: float) -> Factors:
    """Of attention over unit values: the mean over the rows of n E_n p^2, for n keys in sight."""
    spread = mult / math.sqrt(head)  # of logits m q.k / head, where q.k has variance head
    grid, psi = _tables(spread)
    rows = np.arange(1, keys + 1) if causal else np.array([keys])
    total = 0.0
    for some in np.array_split(rows, max(1, len(rows) // 1024)):  # a table of 1024 rows at once
        powers = psi[0][None] ** (some[:, None] - 1)
        total += float((some[:, None] * psi[2] * powers).sum()) * grid
    return _same(math.sqrt((1 - rate) / (total / len(rows))), "q", "k", "v")


def _moment(size: int, mult: float, powers: Sequence[int]) -> float:
    """E[p_1^a p_2^b] = 1/Gamma(a + b) int t^(a+b-1) psi_a psi_b phi^(n - 2) dt, t = e^u.

    For S = sum_j e^(m z_j), S^-k = int t^(k-1) e^(-t S) dt / Gamma(k), whose expectation factors
    over the independent z_j.
    """
    grid, psi = _tables(mult)
    factors = np.prod([psi[power] for power in powers], axis=0)
    integral = (factors * psi[0] ** (size - len(powers))).sum() * grid
    return float(integral) / math.gamma(sum(powers))


@functools.lru_cache(maxsize=32)
def _tables(mult: float) -> tuple[float, dict[int, np.ndarray]]:
    """Step of u, and t^a psi_a(t) = E[s^a e^-s] on its grid, for s = e^(u + m z)."""
    nodes = np.linspace(-8.5, 8.5, 1024)  # beyond, the weights are below 1e-16
    weights = np.exp(-(nodes**2) / 2)
    weights /= weights.sum()
    # Below, s^2 is under 1e-16 for all z that count; above, phi is under 1e-300.
    u = np.linspace(-8.5 * mult - 30, 8.5 * mult + 7, int(40 * (37 + 17 * mult)))
    psi = {power: np.empty_like(u) for power in (0, 2, 3, 4)}
    for some in np.array_split(np.arange(len(u)), len(u) // 512 + 1):
        log_s = u[some, None] + mult * nodes
        decay = np.exp(np.minimum(log_s, 700))
        for power in psi:
            psi[power][some] = np.exp(power * log_s - decay) @ weights
    return float(u[1] - u[0]), psi


def _same(one: float, *names: str) -> Factors:
    return Factors(one, dict.fromkeys(names, one))
