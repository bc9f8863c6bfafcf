"""The reference decoder of u-muP as a function of its kernels, which both sets of modules call.

    x -> split -> rms_norm -> qkv -> attention -> out -> add
      -> split -> rms_norm -> up, gate -> silu_glu -> down -> add

There are no biases and no gains. The factors of qkv and out are tied, for a residual branch joins
the skip path again; those of up, gate and down need not be: their product around the branch is 1.

u-muP: https://arxiv.org/abs/2407.17465, whose library unit-scaling 0.3.5 has this block.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax

from unitscale_jax.errors import check_whole, not_divisible
from unitscale_jax.typing import Array
from unitscale_jax.unit import _ops as ops
from unitscale_jax.unit._factors import Family
from unitscale_jax.unit._residual import residual_add, residual_split, taus

Kernel = Callable[[str], Array]


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """Sizes and multipliers of a decoder.

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
        seq_len: Length of the training context, which fixes the scale of attention; that of the
            input if None.
        batch_ratio: Rows of the whole step for each row of a call.
        factors: "exact" or "graphcore".
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

    def __post_init__(self) -> None:
        """Checks that sizes are positive and that heads divide the width."""
        for name in ("vocabulary", "width", "layers", "heads", "expansion"):
            check_whole(f"{name} of a decoder", getattr(self, name))
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a decoder is {getattr(self, name)}; expected >= 1.")
        if self.width % self.heads:
            raise ValueError(not_divisible("the width of a decoder", self.width, "heads"))

    @property
    def taus(self) -> tuple[float, ...]:
        """The weights of the residual branches, two for each layer."""
        mult, ratio = self.residual_mult, self.attention_ratio
        return taus(2 * self.layers, mult=mult, attention_ratio=ratio)


def kernel_shapes(spec: DecoderSpec) -> Mapping[str, tuple[int, int]]:
    """Shapes of the kernels of one block, (in, out)."""
    width, inner = spec.width, spec.expansion * spec.width
    return {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, inner),
        "gate": (width, inner),
        "down": (inner, width),
    }


def block(
    x: Array,
    kernels: Mapping[str, Array],
    spec: DecoderSpec,
    weights: Sequence[float | Array],
) -> jax.Array:
    """One layer: attention, then the gated MLP, each added to the stream.

    Args:
        x: The stream (batch, length, width).
        kernels: Kernels of `kernel_shapes` by name.
        spec: Sizes and multipliers.
        weights: The tau of the attention and of the MLP branch; data in a scan over layers.
    """
    own = {"batch_ratio": spec.batch_ratio, "factors": spec.factors}
    branch, skip = residual_split(x, weights[0])
    qkv = ops.linear(ops.rms_norm(branch), kernels["qkv"], **own)
    q, k, v = qkv.reshape(*x.shape[:2], 3, spec.heads, -1).transpose(2, 0, 1, 3, 4)
    mixed = ops.attention(
        q,
        k,
        v,
        mult=spec.attention_mult,
        causal=True,
        seq_len=spec.seq_len,
        factors=spec.factors,
    )
    attended = ops.linear(mixed.reshape(x.shape), kernels["out"], **own)
    x = residual_add(attended, skip, weights[0])
    branch, skip = residual_split(x, weights[1])
    normed = ops.rms_norm(branch)
    up, gate = (ops.linear(normed, kernels[k], constraint=None, **own) for k in ("up", "gate"))
    gated = ops.silu_glu(up, gate, mult=spec.activation_mult, factors=spec.factors)
    down = ops.linear(gated, kernels["down"], constraint=None, **own)
    return residual_add(down, skip, weights[1])


def logits(x: Array, kernel: Array, spec: DecoderSpec) -> jax.Array:
    """Scores of the next token from the stream, `(batch, length, vocabulary)`."""
    own = {"batch_ratio": spec.batch_ratio, "factors": spec.factors}
    return ops.readout(ops.rms_norm(x), kernel, **own)
