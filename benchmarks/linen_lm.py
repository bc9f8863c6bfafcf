"""A pre-norm transformer as a user of Flax Linen writes it, with Linen's `dtype=`."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    heads: int
    dtype: jnp.dtype | None = None
    float32_softmax: bool = False

    @nn.compact
    def __call__(self, x):  # (batch, time, width)
        width, heads, dtype = x.shape[-1], self.heads, self.dtype
        mask = nn.make_causal_mask(x[..., 0])
        attention = nn.MultiHeadDotProductAttention(
            num_heads=heads, dtype=dtype, force_fp32_for_softmax=self.float32_softmax
        )
        x = x + attention(nn.LayerNorm(dtype=dtype)(x), mask=mask)
        hidden = nn.gelu(nn.Dense(4 * width, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x)))
        return x + nn.Dense(width, dtype=dtype)(hidden)


class Language(nn.Module):
    layers: int
    width: int
    heads: int = 2
    dtype: jnp.dtype | None = None
    float32_softmax: bool = False

    @nn.compact
    def __call__(self, tokens):  # (batch, time)
        x = nn.Embed(256, self.width, dtype=self.dtype)(tokens)
        for _ in range(self.layers):
            x = Block(self.heads, self.dtype, self.float32_softmax)(x)
        return nn.Dense(256, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))


def loss_of(apply):
    """Mean cross-entropy of the next token, in float32."""

    def loss(params, tokens):
        log_probs = jax.nn.log_softmax(apply(params, tokens)[:, :-1].astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(log_probs, tokens[:, 1:, None], -1))

    return loss
