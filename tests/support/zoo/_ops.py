"""Building blocks of the models, as equations on arrays.

Constants are Python numbers, so what comes in as bfloat16 goes out as bfloat16.
"""

import jax
import jax.numpy as jnp
from jax import lax


def dense(p, x):
    """`x W + b` over the last axis."""
    return x @ p["kernel"] + p["bias"]


def dense_shapes(inputs, outputs):
    return {"kernel": (inputs, outputs), "bias": (outputs,)}


def layer_norm(p, x):
    """Over the last axis."""
    centered = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centered).mean(-1, keepdims=True)
    return centered * lax.rsqrt(variance + 1e-6) * p["scale"] + p["bias"]


def norm_shapes(width):
    return {"scale": (width,), "bias": (width,)}


def rms_norm(p, x):
    """Over the last axis, without centering."""
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * p["scale"]


def group_norm(p, x, groups):
    """Each group of channels over its channels and all places; the channels are last."""
    grouped = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    centered = grouped - grouped.mean((1, 3), keepdims=True)
    variance = jnp.square(centered).mean((1, 3), keepdims=True)
    return (centered * lax.rsqrt(variance + 1e-6)).reshape(x.shape) * p["scale"] + p["bias"]


def conv(p, x, *, stride=1, groups=1):
    """A 2D convolution of `(batch, height, width, channels)`, padded to keep the size."""
    out = lax.conv_general_dilated(
        x,
        p["kernel"],  # (height, width, in / groups, out)
        window_strides=(stride, stride),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return out + p["bias"]


def conv_shapes(inputs, outputs, size=3):
    return {"kernel": (size, size, inputs, outputs), "bias": (outputs,)}


def causal(length):
    """What each query may see: itself and what came before, `(queries, keys)`."""
    return jnp.tril(jnp.ones((length, length), bool))


def attention(q, k, v, mask=None, hidden=-1e9):
    """Attention of `(batch, queries, heads, dim)` over `(batch, keys, heads, dim)`."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, hidden)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def grouped_attention(q, k, v, mask, hidden=-jnp.inf):
    """Queries `(batch, length, kv, group, dim)`; a group of them shares a head of k and v."""
    scores = jnp.einsum("bqngd,bknd->bngqk", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, hidden))
    return jnp.einsum("bngqk,bknd->bqngd", weights, v)


def rotary(x):
    """Turns each pair of coordinates, half a head apart, by its position: `(batch, length, ...)`.

    Su et al. 2021, arXiv:2104.09864.
    """
    length, half = x.shape[1], x.shape[-1] // 2
    speed = 10_000.0 ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * speed  # (length, half)
    angle = angle.reshape(length, *(1,) * (x.ndim - 3), half)
    sin, cos = jnp.sin(angle).astype(x.dtype), jnp.cos(angle).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def dropout(key, x, rate=0.2):
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0)


def recurrence(decay, drive):
    """`h[t] = decay[t] h[t-1] + drive[t]` from zero, in logarithmic depth; time is axis 1."""

    def then(early, late):
        return early[0] * late[0], early[1] * late[0] + late[1]

    return lax.associative_scan(then, (decay, drive), axis=1)[1]


@jax.custom_vjp
def damped(x, kernel):
    """A matmul that sends half of the gradient to the layers below."""
    return x @ kernel


damped.defvjp(
    lambda x, kernel: (x @ kernel, (x, kernel)),
    lambda kept, g: (0.5 * (g @ kept[1].T), kept[0].T @ g),
)


@jax.custom_jvp
def softplus(x):
    return jnp.log1p(jnp.exp(x))


# JAX's own derivative, exp(x) / (1 + exp(x)), is nan where exp(x) overflows.
softplus.defjvps(lambda tangent, out, x: tangent * jax.nn.sigmoid(x))
