"""Random programs for property tests: small DAGs of float32 equations with nested control flow.

    @hypothesis.given(programs())
    def test_identity(program):
        chex.assert_trees_all_equal(transformed(program)(*program.args), program(*program.args))

A program is its source: blocks of steps, drawn as tuples, which hypothesis prints and shrinks. Each
step takes two earlier values and adds one of the same shape. `program.with_ops(sin=jnp.cos)` is the
same program with cosines for sines, the answer that a rewrite of sines should give.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SHAPES = ((), (3,), (2, 3))
CLOSED_OVER = np.float32([0.3, -0.7, 1.1])

OPS = {
    "sin": jnp.sin,
    "tanh": jnp.tanh,
    "weak": lambda x: 0.5 * x - 1,  # literals of weak type
    "constant": lambda x: x * CLOSED_OVER[: x.shape[-1] if x.ndim else 1].sum(),
    "captured": lambda x: x + (jnp.asarray(CLOSED_OVER) if x.ndim else 0.25),
    "integer": lambda x: x + jnp.int32(3 * x).astype(x.dtype),
    "softmax": lambda x: jax.nn.softmax(jnp.atleast_1d(x)).reshape(x.shape),  # a custom derivative
}
PAIRS = {
    "add": jnp.add,
    "mul": jnp.multiply,
    "less": lambda x, y: jnp.where(x < y, x, y),
    "dot": lambda x, y: 0.1 * x * lax.dot(x.reshape(-1), y.reshape(-1)),
}
BODIES = ("jit", "remat", "scan", "cond", "while")


@dataclasses.dataclass(frozen=True, eq=False)  # for a function is hashed, by identity
class Program:
    """A function of two arrays of one shape.

    Attributes:
        shape: The shape of the arguments and of the result.
        block: `(kind, operand, operand, of)` of each step; `of` holds the blocks of a body.
        ops: What the kinds of one operand do.
    """

    shape: tuple[int, ...]
    block: tuple[Any, ...]
    ops: Mapping[str, Callable[..., Any]] = dataclasses.field(
        default_factory=lambda: OPS, repr=False
    )

    @property
    def args(self) -> tuple[jax.Array, jax.Array]:
        """Values of about one, of both signs."""
        generator = np.random.default_rng(7)
        return tuple(jnp.asarray(generator.normal(size=self.shape), jnp.float32) for _ in range(2))

    def with_ops(self, **ops: Callable[..., Any]) -> "Program":
        """The same program with other functions of one operand."""
        return dataclasses.replace(self, ops={**self.ops, **ops})

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The last value of the block."""
        return self._run(self.block, x, y)

    def _run(self, block: tuple[Any, ...], x: jax.Array, y: jax.Array) -> jax.Array:
        values = [x, y]
        for kind, a, b, of in block:
            # Counted from the end, so that most of what is computed is used.
            operands = values[-1 - a % len(values)], values[-1 - b % len(values)]
            values.append(self._step(kind, of, *operands))
        return values[-1]

    def _step(self, kind: str, of: tuple[Any, ...], x: jax.Array, y: jax.Array) -> jax.Array:
        if kind in self.ops:
            return self.ops[kind](x)
        if kind in PAIRS:
            return PAIRS[kind](x, y)
        one, other = (lambda x, y, b=b: self._run(b, x, y) for b in of)
        return _BODIES[kind](one, other, x, y)


def _jit(one, other, x, y):
    called = jax.jit(one)
    return called(called(x, y), other(x, y))  # twice, with one body


def _remat(one, other, x, y):
    return jax.checkpoint(one)(x, other(x, y))


def _scan(one, other, x, y):
    rows = jnp.stack([y, 0.5 * y, x])
    body = lambda carry, row: (one(carry, row), other(row, carry))
    carry, stacked = lax.scan(body, x, rows, reverse=True)
    return carry + stacked[1]


def _cond(one, other, x, y):
    return lax.cond(jnp.sum(x) > 0, one, other, x, y)


def _while(one, other, x, y):
    again = lambda carry: (carry[0] < 3) & (jnp.sum(other(carry[1], y)) < 100)
    return lax.while_loop(again, lambda carry: (carry[0] + 1, one(carry[1], y)), (0, x))[1]


_BODIES = {"jit": _jit, "remat": _remat, "scan": _scan, "cond": _cond, "while": _while}


def programs(having: str = "") -> st.SearchStrategy[Program]:
    """Programs of one to four steps, bodies nested up to three deep; `having`: a first step."""
    leaf = st.tuples(
        st.sampled_from([*OPS, *PAIRS]), st.integers(0, 3), st.integers(0, 3), st.just(())
    )
    blocks = lambda step: st.lists(step, min_size=1, max_size=3).map(tuple)
    step = leaf
    for _ in range(3):
        inside = st.tuples(blocks(step), blocks(leaf))
        body = st.tuples(st.sampled_from(BODIES), st.integers(0, 3), st.integers(0, 3), inside)
        step = st.one_of(leaf, body)
    first = ((having, 0, 0, ()),) if having else ()
    block = st.tuples(blocks(step), body).map(lambda drawn: (*first, *drawn[0], drawn[1]))
    return st.builds(Program, st.sampled_from(SHAPES), block)
