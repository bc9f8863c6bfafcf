"""Modules of Flax NNX for what holds a parameter: Dense, Readout, Embed, Decoder.

Parameters are N(0, 1). What holds none is an operation of `us.unit`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unitscale_jax.typing import Array, DType
from unitscale_jax.unit import _decoder, _ops as ops
from unitscale_jax.unit._constraint import Constraint
from unitscale_jax.unit._decoder import DecoderSpec
from unitscale_jax.unit._factors import Family

__all__ = ["Decoder", "Dense", "Embed", "Readout"]


def __dir__() -> list[str]:
    """What tab completion offers: the modules."""
    return [*__all__, "__all__", "__doc__", "__name__"]


class _Linear(nnx.Module):
    """A kernel, a bias if asked for, and how they are applied."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        use_bias: bool,
        param_dtype: DType,
        constraint: Constraint,
        batch_ratio: float,
        factors: Family,
    ) -> None:
        self.kernel = nnx.Param(_normal(rngs, (in_features, out_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype)) if use_bias else None
        self.constraint, self.batch_ratio, self.factors = constraint, batch_ratio, factors

    def applied(self, op: Any, x: Array) -> jax.Array:
        return op(
            x,
            self.kernel[...],
            None if self.bias is None else self.bias[...],
            constraint=self.constraint,
            batch_ratio=self.batch_ratio,
            factors=self.factors,
        )


class Dense(_Linear):
    """`us.unit.linear` with a kernel (in_features, out_features), and a bias if asked for.

    Example:
        >>> from flax import nnx
        >>> us.unit.nnx.Dense(8, 4, rngs=nnx.Rngs(0))(jnp.ones((2, 8))).shape
        (2, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        use_bias: bool = False,
        constraint: Constraint = "to_output_scale",
        batch_ratio: float = 1,
        factors: Family = "exact",
        param_dtype: DType = "float32",
    ) -> None:
        """Makes a kernel of N(0, 1) and a bias of zeros."""
        super().__init__(
            in_features,
            out_features,
            rngs=rngs,
            use_bias=use_bias,
            param_dtype=param_dtype,
            constraint=constraint,
            batch_ratio=batch_ratio,
            factors=factors,
        )

    def __call__(self, x: Array) -> jax.Array:
        """Activations (.., in_features) to (.., out_features)."""
        return self.applied(ops.linear, x)


class Readout(_Linear):
    """`us.unit.readout` with a kernel (in_features, out_features), and a bias if asked for."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        use_bias: bool = False,
        constraint: Constraint = None,
        batch_ratio: float = 1,
        factors: Family = "exact",
        param_dtype: DType = "float32",
    ) -> None:
        """Makes a kernel of N(0, 1) and a bias of zeros."""
        super().__init__(
            in_features,
            out_features,
            rngs=rngs,
            use_bias=use_bias,
            param_dtype=param_dtype,
            constraint=constraint,
            batch_ratio=batch_ratio,
            factors=factors,
        )

    def __call__(self, x: Array) -> jax.Array:
        """Activations (.., in_features) to (.., out_features)."""
        return self.applied(ops.readout, x)


class Embed(nnx.Module):
    """`us.unit.embed` with a table (num_embeddings, features)."""

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        rngs: nnx.Rngs,
        batch_ratio: float = 1,
        param_dtype: DType = "float32",
    ) -> None:
        """Makes a table of N(0, 1)."""
        self.embedding = nnx.Param(_normal(rngs, (num_embeddings, features), param_dtype))
        self.batch_ratio = batch_ratio

    def __call__(self, ids: Array) -> jax.Array:
        """Integers of any shape to (*shape, features)."""
        return ops.embed(ids, self.embedding[...], batch_ratio=self.batch_ratio)


class Decoder(nnx.Module):
    """The reference decoder of u-muP: tokens (batch, length) to scores of the next ones.

    Example:
        >>> from flax import nnx
        >>> sizes = dict(vocabulary=16, width=8, layers=1, heads=2)
        >>> us.unit.nnx.Decoder(**sizes, rngs=nnx.Rngs(0))(jnp.zeros((2, 4), int)).shape
        (2, 4, 16)
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        rngs: nnx.Rngs,
        param_dtype: DType = "float32",
        **options: Any,
    ) -> None:
        """Makes all kernels of N(0, 1); further options are those of the Linen module."""
        sizes = {"vocabulary": vocabulary, "width": width, "layers": layers, "heads": heads}
        self.spec = spec = DecoderSpec(**sizes, **options)
        ratio = spec.batch_ratio
        self.embed = Embed(
            spec.vocabulary, spec.width, rngs=rngs, batch_ratio=ratio, param_dtype=param_dtype
        )
        self.blocks = nnx.List([_Block(spec, rngs, param_dtype) for _ in range(spec.layers)])
        self.readout = _Kernel((spec.width, spec.vocabulary), rngs, param_dtype)

    def __call__(self, ids: Array) -> jax.Array:
        """Scores `(batch, length, vocabulary)`."""
        spec, x = self.spec, self.embed(ids)
        for layer, kernels in enumerate(self.blocks):
            weights = spec.taus[2 * layer : 2 * layer + 2]
            x = _decoder.block(x, kernels.by_name(), spec, weights)
        return _decoder.logits(x, self.readout.kernel[...], spec)


class _Block(nnx.Module):
    """The kernels of one block, each in a module of its own, as Dense has it."""

    def __init__(self, spec: DecoderSpec, rngs: nnx.Rngs, dtype: DType) -> None:
        self.names = tuple(_decoder.kernel_shapes(spec))
        for name, shape in _decoder.kernel_shapes(spec).items():
            setattr(self, name, _Kernel(shape, rngs, dtype))

    def by_name(self) -> dict[str, jax.Array]:
        return {name: getattr(self, name).kernel[...] for name in self.names}


class _Kernel(nnx.Module):
    def __init__(self, shape: tuple[int, ...], rngs: nnx.Rngs, dtype: DType) -> None:
        self.kernel = nnx.Param(_normal(rngs, shape, dtype))


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DType) -> jax.Array:
    return jax.random.normal(rngs.params(), shape, dtype)
