"""What a model of the zoo is, how a builder is entered, and random values for it."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import unitscale_jax as us

# No two are equal, so that an axis taken for another one shows.
LAYERS, BATCH, HEADS, HEAD, TIME, WIDTH, FFN, VOCAB = 2, 6, 4, 5, 7, 11, 13, 17

Kind = Literal["linen", "nnx", "plain"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """A small model. Its state and its keys are bound inside, so `apply` is deterministic.

    Attributes:
        name: Kind and what it is, "nnx_gqa".
        params: A pytree of float32 arrays: Linen's dict, an `nnx.State`, or a plain one.
        inputs: Float32 activations, int32 tokens or bool masks; the batch is on axis 0.
        apply: A pure function, `apply(params, *inputs)` is a pytree of arrays.
        kind: The framework.
        tags: What it is made of, its kind, and "differentiable".
        differentiable: Whether it has a gradient in reverse mode.
    """

    name: str
    params: Any
    inputs: tuple[jax.Array, ...]
    apply: Callable[..., Any]
    kind: Kind
    tags: frozenset[str]
    differentiable: bool

    def loss(self, params: Any, *inputs: Any) -> jax.Array:
        """Mean square distance of the outputs from a half, summed over the outputs; float32."""
        outputs = jax.tree.leaves(self.apply(params, *inputs))
        return sum(jnp.mean(jnp.square(x.astype(jnp.float32) - 0.5)) for x in outputs)


def entry(*tags: str) -> Callable:
    """Marks a function as the builder of a model; it returns `(params, inputs, apply)`."""

    def tagged(build: Callable) -> Callable:
        build.tags = frozenset(tags)
        return build

    return tagged


def filled(shapes: Any) -> Any:
    """Random parameters for a tree of shapes, or of anything that has a shape.

    The values of a leaf follow from its name and shape alone, so twins in Linen and NNX get the
    same, "blocks_0/kernel" and "blocks/0/kernel". Nothing is at its usual start, zero for a bias
    and one for a scale, because a transform that loses a zero bias would go unseen.
    """
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)
    leaves = us.tree.named_leaves(shapes, is_leaf=is_shape)
    structure = jax.tree.structure(shapes, is_leaf=is_shape)
    return jax.tree.unflatten(structure, [_leaf(*item) for item in leaves.items()])


def _leaf(name: str, shaped: Any) -> jax.Array:
    seed = zlib.crc32(name.replace("_", "/").encode())
    noise = activations(*getattr(shaped, "shape", shaped), seed=seed)
    return 1.0 + 0.2 * noise if name.endswith(("scale", "var")) else 0.4 * noise


def activations(*shape: int, seed: int = 0) -> jax.Array:
    """Normal, float32."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tokens(*shape: int, vocab: int, seed: int = 0) -> jax.Array:
    """Uniform below `vocab`, int32."""
    return jnp.asarray(np.random.default_rng(seed).integers(vocab, size=shape), jnp.int32)
