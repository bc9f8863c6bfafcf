"""Gradients added into one buffer by the backward pass itself.

`jax.vjp(f, params)` returns a function whose `with_refs` adds each cotangent into a mutable array
as soon as it is known, so a part's gradient never stands beside the sum. A compiler got loops of
this shape wrong once (jax-ml/jax#32411: wrong gradients on a GPU), so the form is checked against
the plain one, once per process and backend, before its first use.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unitscale_jax import tree as trees
from unitscale_jax.loss import Denominators, Given, Part, Terms, scaled_objective
from unitscale_jax.typing import Loss, Params, State


def buffers(params: Params) -> Any:
    """One mutable float32 buffer of zeros per parameter.

    Raises:
        ValueError: A parameter is narrower than float32; its cotangents could not be summed here.
    """
    check_backend(jax.default_backend())
    for name, leaf in trees.named_leaves(params).items():
        if jnp.finfo(leaf.dtype).bits < 32:
            raise ValueError(
                f"parameter {name!r} is {leaf.dtype}, and inplace=True sums gradients in the dtype "
                "of the parameters. Keep float32 parameters and cast them inside the loss, as "
                "us.cast does, or leave inplace out."
            )
    return jax.tree.map(lambda x: jax.new_ref(jnp.zeros_like(x)), params)


def part_fn(loss: Loss, scale: Any, refs: Any) -> Callable[..., tuple[Terms, Any, tuple[()]]]:
    """`(params, part, state, denominators) -> (terms, aux, ())`, adding the gradients into refs."""

    def add_part(
        params: Params, part: Part, state: State, denominators: Denominators
    ) -> tuple[Terms, Any, tuple[()]]:
        given = Given(state, None, denominators, scale).of(part)
        objective = scaled_objective(loss, part.batch, given)
        value, vjp, (terms, aux) = jax.vjp(objective, params, has_aux=True)
        pull: Any = vjp  # a jax VJP, which type stubs describe as a plain function
        pull.with_refs(refs)(jnp.ones_like(value))
        return terms, aux, ()

    return add_part


def contents(refs: Any) -> Params:
    """The sums, when the last part is in."""
    return jax.tree.map(jax.freeze, refs)


@functools.cache
def check_backend(backend: str) -> None:
    """Compares both forms on the smallest loop that was ever compiled wrong.

    Raises:
        RuntimeError: They differ on this backend.
    """
    # Tracing is a matter of the thread: in a new one this runs, even if the caller is being traced.
    with ThreadPoolExecutor(1) as thread:
        run = lambda: jax.device_get(jax.jit(_both_forms)(_weights(), _rows()))
        in_place, carried = thread.submit(run).result()
    worst = max(map(_difference, jax.tree.leaves(in_place), jax.tree.leaves(carried)))
    if not worst <= 1e-5:
        raise RuntimeError(
            f"inplace=True gives wrong gradients on the {backend} backend of JAX {jax.__version__} "
            f"(relative difference {worst:.1e}; see jax-ml/jax#32411). Leave inplace out."
        )


def _difference(a: jax.Array, b: jax.Array) -> float:
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


def _weights() -> jax.Array:
    return jnp.sin(jnp.arange(3 * 16 * 16, dtype=jnp.float32)).reshape(3, 16, 16) / 4


def _rows() -> jax.Array:
    return jnp.cos(jnp.arange(5 * 7 * 16, dtype=jnp.float32)).reshape(5, 7, 16)


def _both_forms(weights: jax.Array, parts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of three scanned layers on five parts of seven rows, in place and carried."""

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0] ** 2)

    ref = jax.new_ref(jnp.zeros_like(weights))

    def in_place(_: None, x: jax.Array) -> tuple[None, None]:
        value, vjp = jax.vjp(lambda w: loss(w, x), weights)
        pull: Any = vjp
        pull.with_refs(ref)(jnp.ones_like(value))
        return None, None

    jax.lax.scan(in_place, None, parts)
    add = lambda total, x: (total + jax.grad(loss)(weights, x), None)
    return jax.freeze(ref), jax.lax.scan(add, jnp.zeros_like(weights), parts)[0]
