"""Laws of rules inside custom derivatives: what a user's rule is told, and what becomes of rules.

A rule may ask which operands are differentiated, and which cotangents are zero. Whatever transform
is around it, it is told the same as without.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero

import unitscale_jax as us
from tests.quantization.test_quantized import W8A8, normal
from unitscale_jax.trace import rewritten

ROWS, WIDTH = 3, 4
PARAMS = {"w": normal(WIDTH, WIDTH, seed=1), "b": normal(WIDTH, seed=2)}
X = normal(ROWS, WIDTH)

# ----------------------------------------------------------------- what a user's rule is told

told: list[tuple] = []


@jax.custom_vjp
def both(a, c):
    """Two results of two operands, whose rule says what it is told, and gives `c` nothing."""
    return jnp.sin(a) * c, jnp.cos(a) + c


def both_forward(a, c):
    told.append(("forward", a.perturbed, c.perturbed))
    return both(a.value, c.value), (a.value, c.value)


def both_backward(kept, cotangents):
    a, c = kept
    zero = [isinstance(g, SymbolicZero) for g in cotangents]
    if not all(zero):  # where nothing is asked, the answer is none
        told.append(("backward", *zero))
    first, second = (0.0 if z else g for g, z in zip(cotangents, zero, strict=True))
    return first * jnp.cos(a) * c - second * jnp.sin(a), None


both.defvjp(both_forward, both_backward, symbolic_zeros=True)


@jax.custom_jvp
def pair(a, c):
    return jnp.sin(a) * c, jnp.cos(c)


def pair_rule(primals, tangents):
    """The second result moves with nothing, which the rule says by a symbolic zero."""
    zero = [isinstance(t, SymbolicZero) for t in tangents]
    told.append(("tangents", *zero))
    (a, c), (da, dc) = primals, tangents
    da, dc = (jnp.zeros_like(a) if z else t for t, z in zip((da, dc), zero, strict=True))
    out = pair(a, c)
    return out, (da * jnp.cos(a) * c + dc * jnp.sin(a), SymbolicZero(jax.typeof(out[1])))


pair.defjvp(pair_rule, symbolic_zeros=True)


@jax.custom_vjp
def outer(a, c):
    return both(a, jnp.tanh(c))[0]


def outer_forward(a, c):
    told.append(("outer", a.perturbed, c.perturbed))
    out, back = jax.vjp(lambda a: both(a, jnp.tanh(c.value))[0], a.value)
    return out, back


outer.defvjp(outer_forward, lambda back, g: (*back(g), None), symbolic_zeros=True)

still = lambda v: jnp.cos(lax.stop_gradient(v))


def given_nothing(a, b):
    """The outer rule gives its second operand nothing, and the inner one sees that."""
    first, second = both(a, a + b)
    return both(a, second)[0] + first


KERNELS = {
    "one operand": lambda a, b: both(a, jnp.cos(jnp.ones_like(a)))[0],
    "both operands": lambda a, b: both(a, jnp.tanh(a) + b)[0],
    "the other operand": lambda a, b: both(still(a), b + a)[1],
    "stopped": lambda a, b: both(a + b, still(a))[1],
    "both results": lambda a, b: sum(both(a, b + jnp.zeros_like(a))),
    "one after the other": lambda a, b: both(both(a, still(a))[0], b + a)[0],
    "given nothing": given_nothing,
    "nested": lambda a, b: outer(a, still(a)),
    "jvp, one operand": lambda a, b: pair(a, still(a))[0],
    "jvp, the other": lambda a, b: pair(still(a), a + b)[0],
    "jvp, then vjp": lambda a, b: both(a, pair(a, a)[1])[0],
    "vjp, then jvp": lambda a, b: sum(pair(*both(a, still(a)))),
}
FEW = ["both operands", "stopped", "given nothing", "nested", "vjp, then jvp"]


def scanned(kernel):
    step = lambda h, b: (kernel(h, b), None)
    return lambda a, b: lax.scan(step, a, jnp.stack([b, 2 * b]))[0]


def looped(kernel):
    return lambda a, b: lax.scan(lambda h, _: (kernel(h, b), still(h)), a, length=2)[0]


AROUND = {
    "alone": lambda kernel: kernel,
    "jit": jax.jit,
    "scan": scanned,
    "scan of constants": looped,
    "remat": lambda kernel: jax.checkpoint(kernel),
    "vmap": lambda kernel: jax.vmap(kernel, (0, None)),
    "cond": lambda kernel: lambda a, b: lax.cond(a[0, 0] > 9, lambda a, b: a, kernel, a, b),
}


def model(kernel, around):
    fresh = lambda a, b: KERNELS[kernel](a, b)  # so that no trace made before is found again
    run = AROUND[around](fresh)
    return lambda p, x: run(x @ p["w"], p["b"]).sum()


SINE = {"sin": lambda site, x: [jnp.sin(x[0])], "cos": lambda site, x: [jnp.cos(x[0])]}
TRANSFORMS = {
    "autocast": lambda fn: us.autocast(fn, "bfloat16"),
    "quantized": lambda fn: us.quantized(fn, {"w": W8A8}),
    "rewritten": lambda fn: rewritten(fn, SINE),
    "quantized, autocast": lambda fn: us.quantized(us.autocast(fn, "bfloat16"), {"w": W8A8}),
    "autocast twice": lambda fn: us.autocast(us.autocast(fn, "bfloat16"), "float16"),
}


def heard(fn, argnums):
    """What the rules inside of a function are told while its gradient is traced."""
    told.clear()
    jax.eval_shape(jax.grad(fn, argnums), PARAMS, X)
    return set(told)


@functools.cache
def told_without(kernel, around, argnums):
    return heard(model(kernel, around), argnums)


@pytest.mark.parametrize("how", TRANSFORMS)
@pytest.mark.parametrize("around", AROUND)
def test_a_rule_is_told_the_same_under_every_transform(around, how):
    """As a set: how often JAX calls a rule while it traces a loop is up to JAX."""
    kernels = KERNELS if around == "alone" else FEW
    for kernel, argnums in itertools.product(kernels, (0, 1) if around == "alone" else (0,)):
        expected = told_without(kernel, around, argnums)
        assert expected
        fn = TRANSFORMS[how](model(kernel, around))
        assert heard(fn, argnums) == expected, (kernel, argnums)


@pytest.mark.parametrize("how", TRANSFORMS)
def test_gradients_are_those_of_the_rules(how):
    kernels = lambda p, x: jnp.stack([model(kernel, "alone")(p, x) for kernel in KERNELS])
    both = lambda p, x: (jax.jacrev(kernels)(p, x), jax.jacrev(TRANSFORMS[how](kernels))(p, x))
    full, got = jax.jit(both)(PARAMS, X)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(full), strict=True):
        each = lambda v: jnp.linalg.norm(v.reshape(len(KERNELS), -1), axis=1)
        assert jnp.all(each(a - b) <= 0.05 * each(b) + 0.02), each(a - b)


def test_a_rule_of_which_nothing_is_asked_is_run_all_the_same():
    """It may return what no cotangent says: statistics in the place of a gradient."""

    @jax.custom_vjp
    def noted(x, slot):
        return x

    noted.defvjp(lambda x, slot: (x, x), lambda x, g: (g, jnp.abs(x).max()))
    fn = lambda slot, x: both(x, noted(jnp.sin(x), slot))[0].sum()
    expected = jax.grad(fn)(jnp.zeros(()), X)
    assert expected > 0
    np.testing.assert_array_equal(expected, jax.grad(rewritten(fn, SINE))(jnp.zeros(()), X))
