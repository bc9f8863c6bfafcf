"""Modules of Flax Linen for what holds a parameter: Dense, Readout, Embed, Decoder.

Parameters are N(0, 1). What holds none is an operation of `us.unit`.
"""

from dataclasses import fields
from typing import Any

import flax.linen as nn
import jax

from unitscale_jax.typing import Array, DType
from unitscale_jax.unit import _decoder, _ops as ops
from unitscale_jax.unit._constraint import Constraint
from unitscale_jax.unit._decoder import DecoderSpec
from unitscale_jax.unit._factors import Family

__all__ = ["Decoder", "Dense", "Embed", "Readout"]


def __dir__() -> list[str]:
    """What tab completion offers: the modules."""
    return [*__all__, "__all__", "__doc__", "__name__"]


_unit = nn.initializers.normal(1.0)


class Dense(nn.Module):
    """`us.unit.linear` with a kernel (in, features), and a bias if asked for.

    Example:
        >>> layer = us.unit.linen.Dense(4)
        >>> params = layer.init(jax.random.key(0), jnp.ones((2, 8)))
        >>> params["params"]["kernel"].shape, layer.apply(params, jnp.ones((2, 8))).shape
        ((8, 4), (2, 4))
    """

    features: int
    use_bias: bool = False
    constraint: Constraint = "to_output_scale"
    batch_ratio: float = 1
    factors: Family = "exact"
    param_dtype: DType = "float32"

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """Activations (.., in) to (.., features)."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", _unit, shape, self.param_dtype)
        return ops.linear(
            x,
            kernel,
            _bias(self) if self.use_bias else None,
            constraint=self.constraint,
            batch_ratio=self.batch_ratio,
            factors=self.factors,
        )


class Readout(nn.Module):
    """`us.unit.readout` with a kernel (in, features), and a bias if asked for."""

    features: int
    use_bias: bool = False
    constraint: Constraint = None
    batch_ratio: float = 1
    factors: Family = "exact"
    param_dtype: DType = "float32"

    @nn.compact
    def __call__(self, x: Array) -> jax.Array:
        """Activations (.., in) to (.., features)."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", _unit, shape, self.param_dtype)
        return ops.readout(
            x,
            kernel,
            _bias(self) if self.use_bias else None,
            constraint=self.constraint,
            batch_ratio=self.batch_ratio,
            factors=self.factors,
        )


def _bias(module: Any) -> Any:
    zeros = nn.initializers.zeros_init()
    return module.param("bias", zeros, (module.features,), module.param_dtype)


class Embed(nn.Module):
    """`us.unit.embed` with a table (num_embeddings, features)."""

    num_embeddings: int
    features: int
    batch_ratio: float = 1
    param_dtype: DType = "float32"

    @nn.compact
    def __call__(self, ids: Array) -> jax.Array:
        """Integers of any shape to (*shape, features)."""
        shape = (self.num_embeddings, self.features)
        table = self.param("embedding", _unit, shape, self.param_dtype)
        return ops.embed(ids, table, batch_ratio=self.batch_ratio)


class Decoder(nn.Module):
    """The reference decoder of u-muP: tokens (batch, length) to scores of the next ones.

    Attributes:
        vocabulary: Number of tokens.
        width: Size of the residual stream.
        layers: Number of blocks, each of an attention and an MLP branch.
        heads: Attention heads; they divide the width.
        expansion: Size of the MLP over the width.
        attention_mult: The multiplier of attention's logits.
        activation_mult: The multiplier inside the gate's activation.
        residual_mult: What all branches add over what the embedding adds.
        attention_ratio: What attention branches add over what MLP branches add.
        seq_len: Length of the training context; that of the input if None.
        batch_ratio: Rows of the whole step for each row of a call.
        factors: "exact" or "graphcore".
        param_dtype: Dtype of the kernels.

    Example:
        >>> model = us.unit.linen.Decoder(vocabulary=16, width=8, layers=1, heads=2)
        >>> ids = jnp.zeros((2, 4), int)
        >>> params = model.init(jax.random.key(0), ids)
        >>> model.apply(params, ids).shape, sorted(params["params"]["block_0"])
        ((2, 4, 16), ['down', 'gate', 'out', 'qkv', 'up'])
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    expansion: int = 4
    attention_mult: float = 1.0
    activation_mult: float = 1.0
    residual_mult: float = 1.0
    attention_ratio: float = 1.0
    seq_len: int | None = None
    batch_ratio: float = 1
    factors: Family = "exact"
    param_dtype: DType = "float32"

    @nn.compact
    def __call__(self, ids: Array) -> jax.Array:
        """Scores `(batch, length, vocabulary)`."""
        spec = DecoderSpec(**{f.name: getattr(self, f.name) for f in fields(DecoderSpec)})
        ratio, dtype = spec.batch_ratio, self.param_dtype
        embed = Embed(spec.vocabulary, spec.width, ratio, param_dtype=dtype, name="embed")
        x = embed(ids)
        for layer in range(spec.layers):
            kernels = _Kernels(spec, dtype, name=f"block_{layer}")()
            x = _decoder.block(x, kernels, spec, spec.taus[2 * layer : 2 * layer + 2])
        head = _Kernel((spec.width, spec.vocabulary), dtype, name="readout")()
        return _decoder.logits(x, head, spec)


class _Kernels(nn.Module):
    """The kernels of one block by name, each in a module of its own, as Dense has it."""

    spec: DecoderSpec
    param_dtype: DType

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        shapes = _decoder.kernel_shapes(self.spec)
        return {
            name: _Kernel(shape, self.param_dtype, name=name)() for name, shape in shapes.items()
        }


class _Kernel(nn.Module):
    shape: tuple[int, ...]
    param_dtype: DType

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", _unit, self.shape, self.param_dtype)
