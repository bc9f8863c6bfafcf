"""Operations whose outputs and gradients are unit where their operands are.

    y = alpha f(x_1, .., x_k),    gradient of x_i = beta_i (df/dx_i)^T (gradient of y)

Arrays are laid out as in Flax: x (.., in), kernels (in, out) and (k.., in / groups, out), heads
(batch, length, heads, head). Wherever there is `factors=`, "exact" calibrates them on Gaussian
numbers and "graphcore" takes the fitted formulas of the library unit-scaling 0.3.5, whose results
it reproduces. `constraint=` ties the factors of activations: see `CONSTRAINTS`.

A weight's gradient is summed over all rows of a step, so its factor needs their number;
`batch_ratio` says how many times more rows the step has than this call sees: the parts of an
accumulation times the shards of a `shard_map`.

Unit Scaling: https://arxiv.org/abs/2303.11257; u-muP: https://arxiv.org/abs/2407.17465.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from unitscale_jax import tree as trees
from unitscale_jax.errors import check_key, check_number, not_divisible, wrong_shape
from unitscale_jax.fwd_bwd import scale_bwd, scale_fwd
from unitscale_jax.loss import Mean
from unitscale_jax.typing import Array, Key
from unitscale_jax.unit import _factors as formulas
from unitscale_jax.unit._constraint import Constraint, tied
from unitscale_jax.unit._factors import Factors, Family, check_family

# --------------------------------------------------------------------------------- contractions


def linear(
    x: Array,
    kernel: Array,
    bias: Array | None = None,
    *,
    constraint: Constraint = "to_output_scale",
    powers: Sequence[float] = (0.5, 0.5, 0.5),
    batch_ratio: float = 1,
    factors: Family = "exact",
) -> jax.Array:
    """Multiplies x by a kernel: `in^-1/2 (x @ kernel)`, plus the bias.

    Args:
        x: Activations (.., in).
        kernel: Weights (in, out), unit.
        bias: Numbers (out,); inside the scale with the factors "graphcore", outside with "exact",
            where a step of a bias moves the output by itself and not by in^-1/2 of itself.
        constraint: Ties the factors of the result and of x.
        powers: Powers of 1/in, 1/out and 1/rows in the factors of the result, of the gradient of x
            and of the gradients of kernel and bias.
        batch_ratio: Rows of the whole step for each row of this call, at least 1.
        factors: "exact" or "graphcore".

    Returns:
        An array (.., out).

    Raises:
        ValueError: Shapes do not fit, or a constraint or family of factors is unknown.

    Example:
        >>> x, kernel = jnp.array([[1.0, 2.0, 3.0, 4.0]]), jnp.eye(4)[:, :2]
        >>> linear(x, kernel).tolist()
        [[0.5, 1.0]]
        >>> jax.grad(lambda x: linear(x, kernel).sum())(x).tolist()
        [[0.5, 0.5, 0.0, 0.0]]
    """
    check_family(factors)
    if jnp.ndim(kernel) != 2 or jnp.shape(x)[-1] != jnp.shape(kernel)[0]:
        raise ValueError(wrong_shape("kernel", jnp.shape(kernel), f"({jnp.shape(x)[-1]}, out)"))
    fan_in, fan_out = jnp.shape(kernel)
    rows = x.size / fan_in * _ratio(batch_ratio)
    own = tied(formulas.linear(fan_in, fan_out, rows, powers), ["x"], constraint)
    return _affine(jnp.matmul, x, kernel, bias, own, factors)


def readout(
    x: Array,
    kernel: Array,
    bias: Array | None = None,
    *,
    constraint: Constraint = None,
    powers: Sequence[float] = (1.0, 0.5, 0.5),
    batch_ratio: float = 1,
    factors: Family = "exact",
) -> jax.Array:
    """Multiplies x by the last kernel: `in^-1 (x @ kernel)`, so that logits shrink with width.

    For the end of a model, after the last place where two paths join: there the factors may be
    independent, as they are by default. Arguments and errors are those of `linear`.

    Example:
        >>> readout(jnp.array([[1.0, 2.0, 3.0, 4.0]]), jnp.eye(4)).tolist()
        [[0.25, 0.5, 0.75, 1.0]]
    """
    return linear(
        x,
        kernel,
        bias,
        constraint=constraint,
        powers=powers,
        batch_ratio=batch_ratio,
        factors=factors,
    )


def conv(
    x: Array,
    kernel: Array,
    bias: Array | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    constraint: Constraint = "to_output_scale",
    batch_ratio: float = 1,
    factors: Family = "exact",
) -> jax.Array:
    """Convolves x with a kernel, times `(k in / groups)^-1/2`, and adds the bias.

    Args:
        x: Activations (batch, positions.., in), of as many axes of positions as the kernel has.
        kernel: Weights (k.., in / groups, out), unit.
        bias: Numbers (out,), as in `linear`.
        strides: Of the kernel, one number or one for each axis of positions.
        padding: "SAME", "VALID", or a pair of numbers for each axis of positions.
        dilation: Of the kernel, one number or one for each axis of positions.
        groups: Groups of channels that do not meet.
        constraint: Ties the factors of the result and of x.
        batch_ratio: Rows of the whole step for each row of this call, at least 1.
        factors: "exact" or "graphcore".

    Returns:
        An array (batch, positions.., out).

    Raises:
        ValueError: Shapes do not fit, or a constraint or family of factors is unknown.

    Example:
        >>> x, kernel = jnp.ones((1, 6, 4)), jnp.ones((3, 4, 2))
        >>> y = conv(x, kernel, padding="VALID")
        >>> y.shape, round(y[0, 0, 0].item() ** 2, 4)
        ((1, 4, 2), 12.0)
    """
    check_family(factors)
    space = jnp.ndim(kernel) - 2
    if space < 1 or jnp.ndim(x) != space + 2:
        raise ValueError(wrong_shape("x", jnp.shape(x), f"(batch, {space} axes of positions, in)"))
    if jnp.shape(x)[-1] != groups * jnp.shape(kernel)[-2]:
        raise ValueError(wrong_shape("kernel", jnp.shape(kernel), f"(.., in / {groups}, out)"))
    strides, dilation = _per_axis(strides, space), _per_axis(dilation, space)
    # Flax's layout: channels last, kernels (k.., in, out).
    numbers = lax.conv_dimension_numbers(
        jnp.shape(x), jnp.shape(kernel), (_CHANNELS[space], _KERNELS[space], _CHANNELS[space])
    )

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=numbers,
            feature_group_count=groups,
        )

    out = jax.eval_shape(convolve, x, kernel).shape
    positions = math.prod(out[:-1]) * _ratio(batch_ratio)
    own = formulas.conv(jnp.shape(kernel), strides, groups, positions)
    return _affine(convolve, x, kernel, bias, tied(own, ["x"], constraint), factors)


def matmul(left: Array, right: Array, *, constraint: Constraint = "to_output_scale") -> jax.Array:
    """Multiplies two activations: `inner^-1/2 (left @ right)`.

    Args:
        left: Numbers (.., rows, inner).
        right: Numbers (.., inner, columns).
        constraint: Ties the factors of the result and of both operands.

    Example:
        >>> matmul(jnp.ones((2, 4)), jnp.ones((4, 3)))[0].tolist()
        [2.0, 2.0, 2.0]
    """
    if min(jnp.ndim(left), jnp.ndim(right)) < 2:
        raise ValueError(wrong_shape("an operand of matmul", jnp.shape(left), "at least 2 axes"))
    own = formulas.matmul(jnp.shape(left)[-2], jnp.shape(left)[-1], jnp.shape(right)[-1])
    return _scaled(jnp.matmul, tied(own, ["left", "right"], constraint), left=left, right=right)


def embed(ids: Array, table: Array, *, batch_ratio: float = 1) -> jax.Array:
    """Looks rows of a table up.

    Args:
        ids: Integers of any shape.
        table: Weights (vocabulary, width), unit.
        batch_ratio: Rows of the whole step for each row of this call, at least 1.

    Returns:
        An array (*ids.shape, width).

    Example:
        >>> embed(jnp.array([1, 1]), jnp.eye(2)).tolist()
        [[0.0, 1.0], [0.0, 1.0]]
    """
    own = formulas.embed(jnp.shape(table)[0], jnp.size(ids) * _ratio(batch_ratio))
    return _scaled(lambda table: jnp.take(table, ids, axis=0), own, table=table)


def add(left: Any, right: Any, *, constraint: Constraint = "to_output_scale") -> jax.Array:
    """Adds two activations: `2^-1/2 (left + right)`; a Python number is added as it is.

    Args:
        left: Numbers that broadcast with `right`.
        right: Likewise. An array of one element adds no variance that counts: the factor is 1.
        constraint: Ties the factors of the result and of both operands.

    Example:
        >>> x, y = jnp.array([1.0, 1.0]), jnp.array([1.0, -1.0])
        >>> [round(z, 4) for z in add(x, y).tolist()], add(x, 2.0).tolist()
        ([1.4142, 0.0], [3.0, 3.0])
    """
    if not all(hasattr(x, "shape") for x in (left, right)):
        return jnp.add(left, right)
    operands = {"left": jnp.shape(left), "right": jnp.shape(right)}
    own = formulas.add(jnp.broadcast_shapes(*operands.values()), operands)
    return _scaled(jnp.add, tied(own, ["left", "right"], constraint), left=left, right=right)


# --------------------------------------------------------------------------------- each element


def elementwise(
    fn: Callable[[jax.Array], jax.Array], x: Array, *, constraint: Constraint = "to_output_scale"
) -> jax.Array:
    """Applies a function of each element, scaled by its RMS on Gaussian numbers.

    Args:
        fn: Any elementwise function: `jnp.tanh`, `jax.nn.relu`, the user's own.
        x: Activations of any shape.
        constraint: Ties the factors of the result, 1/rms f(z), and of x, 1/rms f'(z), z ~ N(0, 1).

    Raises:
        ValueError: The function is not finite on Gaussian numbers, or no function of each element.

    Example:
        >>> round(elementwise(jax.nn.relu, jnp.array([1.0])).item(), 6)
        1.414214
    """
    return _scaled(fn, tied(formulas.elementwise(fn), ["x"], constraint), x=x)


def gelu(
    x: Array,
    *,
    mult: float = 1.0,
    approximate: bool = True,
    constraint: Constraint = "to_output_scale",
    factors: Family = "exact",
) -> jax.Array:
    """The activation `gelu(m x) / m`; `approximate` is that of `jax.nn.gelu`."""
    check_family(factors)
    fn = _gelu(_positive("mult", mult), approximate)
    own = formulas.elementwise(fn) if factors == "exact" else formulas.gelu(mult)
    return _scaled(fn, tied(own, ["x"], constraint), x=x)


def silu(
    x: Array,
    *,
    mult: float = 1.0,
    constraint: Constraint = "to_output_scale",
    factors: Family = "exact",
) -> jax.Array:
    """The activation `x sigmoid(m x)`."""
    check_family(factors)
    fn = _silu(_positive("mult", mult))
    own = formulas.elementwise(fn) if factors == "exact" else formulas.silu(mult)
    return _scaled(fn, tied(own, ["x"], constraint), x=x)


def silu_glu(x: Array, gate: Array, *, mult: float = 1.0, factors: Family = "exact") -> jax.Array:
    """The gated activation `x g sigmoid(m g)`, of x and a gate g of one shape.

    Its inputs come from one value as a rule, so they and the result share one factor.
    """
    check_family(factors)
    fn = _silu(_positive("mult", mult))
    if factors == "graphcore":
        own = formulas.silu_glu(mult)
    else:
        # x and the gate are made from one value as a rule: a factor of its own for the gate, 3 %
        # smaller, would make the gradient of that value no multiple of the true one.
        one = formulas.elementwise(fn).fwd
        own = Factors(one, {"x": one, "gate": one})
    return _scaled(lambda x, gate: x * fn(gate), own, x=x, gate=gate)


def softmax(
    x: Array,
    *,
    mult: float = 1.0,
    axis: int = -1,
    constraint: Constraint = "to_output_scale",
    factors: Family = "exact",
) -> jax.Array:
    """The probabilities `softmax(m x)` along an axis, times about the length of that axis.

    Example:
        >>> round(softmax(jnp.zeros((8,)))[0].item() / jax.nn.softmax(jnp.zeros((8,)))[0].item(), 4)
        5.8682
    """
    check_family(factors)
    size = jnp.shape(x)[axis]
    fitted = formulas.exact_softmax if factors == "exact" else formulas.softmax
    own = tied(fitted(size, _positive("mult", mult)), ["x"], constraint)
    return _scaled(lambda x: jax.nn.softmax(x * mult, axis=axis), own, x=x)


def dropout(
    x: Array, rate: float, key: Key | None = None, *, deterministic: bool = False
) -> jax.Array:
    """Sets elements to zero with a probability, and divides the others by `(1 - rate)^1/2`.

    Without noise (`deterministic`) all are multiplied by `(1 - rate)^1/2`, the mean of the other,
    so that training and evaluation do not differ in scale.

    Args:
        x: Activations of any shape.
        rate: Probability of a zero, in [0, 1).
        key: A typed key; needed unless `deterministic`.
        deterministic: Whether to leave all elements.

    Raises:
        ValueError: The rate is out of range.
        TypeError: A typed key is missing.

    Example:
        >>> dropout(jnp.ones(2), 0.75, deterministic=True).tolist()
        [0.5, 0.5]
    """
    check_number("rate", rate)
    if not 0 <= rate < 1:
        raise ValueError(f"rate is {rate}; expected a probability in [0, 1).")
    factor = (1 - rate) ** 0.5
    noise = _identity if deterministic or not rate else _dropped(rate, key)
    return _scaled(noise, Factors(factor, {"x": factor}), x=x)


# --------------------------------------------------------------------------------------- norms


def layer_norm(
    x: Array,
    scale: Array | None = None,
    bias: Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    eps: float = 1e-5,
    batch_ratio: float = 1,
) -> jax.Array:
    """Subtracts the mean along axes and divides by the standard deviation: unit by nature.

    Args:
        x: Activations; statistics are float32 or wider.
        scale: Multiplies the result; broadcasts with x. u-muP leaves it out.
        bias: Is added to the result; broadcasts with x.
        axis: Axes to normalize along.
        eps: Is added to the variance.
        batch_ratio: Rows of the whole step for each row of this call, at least 1.

    Example:
        >>> layer_norm(jnp.array([1.0, 3.0])).round(4).tolist()
        [-1.0, 1.0]
    """
    return _norm(x, scale, bias, axis, eps, batch_ratio, centered=True)


def rms_norm(
    x: Array,
    scale: Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    eps: float = 1e-5,
    batch_ratio: float = 1,
) -> jax.Array:
    """Divides by the root mean square along axes; arguments are those of `layer_norm`.

    Example:
        >>> y = rms_norm(jnp.array([3.0, 4.0]))
        >>> round(float(jnp.mean(y**2)), 4)
        1.0
    """
    return _norm(x, scale, None, axis, eps, batch_ratio, centered=False)


def _norm(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    axis: int | Sequence[int],
    eps: float,
    batch_ratio: float,
    *,
    centered: bool,
) -> jax.Array:
    wide = jnp.asarray(x).astype(trees.wide(jnp.result_type(x)))
    if centered:
        wide = wide - wide.mean(axis, keepdims=True)
    mean_square = jnp.square(wide).mean(axis, keepdims=True)
    y = (wide * lax.rsqrt(mean_square + jnp.asarray(eps, wide.dtype))).astype(jnp.result_type(x))
    rows = jnp.size(x) * _ratio(batch_ratio)
    if scale is not None:
        y = y * scale_bwd(scale, (jnp.size(scale) / rows) ** 0.5)
    return y if bias is None else y + scale_bwd(bias, (jnp.size(bias) / rows) ** 0.5)


# ----------------------------------------------------------------------------------- attention


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mult: float = 1.0,
    causal: bool = False,
    mask: Array | None = None,
    seq_len: int | None = None,
    dropout_rate: float = 0.0,
    key: Key | None = None,
    factors: Family = "exact",
) -> jax.Array:
    """Attention with logits `m q.k / head`, scaled for a context of fixed length.

    Args:
        q: Queries (batch, length, heads, head).
        k: Keys (batch, keys, kv_heads, head), where kv_heads divides heads.
        v: Values, of the shape of k.
        mult: m, the inverse temperature.
        causal: Whether query i sees keys up to its own position; the last query is the last key's.
        mask: True where a query sees a key; broadcasts to (batch, heads, length, keys).
        seq_len: Length of the context in training, which fixes the factors. A decode step, whose
            queries are fewer than its keys, must give it: else the scale would follow the cache.
        dropout_rate: Probability with which a weight is set to zero.
        key: A typed key, for dropout.
        factors: "exact" or "graphcore".

    Returns:
        An array of the shape of q.

    Raises:
        ValueError: Lengths differ and `seq_len` is missing, or shapes do not fit.

    Law: with one `seq_len`, prefill and then token by token gives what the whole sequence gives.

    Example:
        >>> q = jnp.ones((1, 4, 1, 2))
        >>> attention(q, q, q, factors="graphcore").shape
        (1, 4, 1, 2)
    """
    check_family(factors)
    length, keys, head = _attention_shapes(q, k, v)
    if length != keys and seq_len is None:
        raise ValueError(
            f"attention has {length} queries and {keys} keys, and its scale is fixed by the length "
            "of the context in training. Give it as `seq_len=`."
        )
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate is {dropout_rate}; expected a probability in [0, 1).")
    fitted = formulas.exact_attention if factors == "exact" else formulas.attention
    context = keys if seq_len is None else seq_len
    own = fitted(context, head, _positive("mult", mult), causal, float(dropout_rate))
    drop = _dropped(dropout_rate, key) if dropout_rate else _identity

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        batch, _, heads, _ = q.shape
        grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], head)
        logits = jnp.einsum("btkgd,bskd->bkgts", grouped, k) * (mult / head)
        seen = _visible(causal, mask, logits.shape)
        if seen is not None:
            logits = jnp.where(seen, logits, -jnp.inf)
        wide = logits.astype(trees.wide(logits.dtype))
        weights = drop(jax.nn.softmax(wide, axis=-1).astype(q.dtype))
        return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape)

    return _scaled(attend, own, q=q, k=k, v=v)


def _attention_shapes(q: Array, k: Array, v: Array) -> tuple[int, int, int]:
    """Numbers of queries and of keys, and the size of a head."""
    if not jnp.ndim(q) == jnp.ndim(k) == 4 or jnp.shape(k) != jnp.shape(v):
        raise ValueError(
            f"attention has shapes q {jnp.shape(q)}, k {jnp.shape(k)} and v {jnp.shape(v)}; "
            "expected (batch, length, heads, head), k and v alike."
        )
    (_, length, heads, head), (_, keys, kv_heads, _) = jnp.shape(q), jnp.shape(k)
    if heads % kv_heads:
        raise ValueError(f"{not_divisible('axis 2 of q', heads, f'{kv_heads} heads of keys')}")
    return length, keys, head


def _visible(causal: bool, mask: Array | None, shape: Sequence[int]) -> jax.Array | None:
    """Which keys a query sees, for logits (batch, kv_heads, group, queries, keys)."""
    batch, kv_heads, group, queries, keys = shape
    seen = None
    if causal:
        seen = jnp.tril(jnp.ones((queries, keys), bool), keys - queries)
    if mask is None:
        return seen
    full = jnp.broadcast_to(mask, (batch, kv_heads * group, queries, keys)).reshape(shape)
    return full if seen is None else full & seen


# -------------------------------------------------------------------------------------- losses


def cross_entropy(
    logits: Array,
    labels: Array,
    *,
    mult: float = 1.0,
    where: Array | None = None,
    batch_ratio: float = 1,
) -> Mean:
    """The cross entropy of `m logits`, whose gradient has RMS near 1.

    Args:
        logits: Numbers (.., classes); the loss is float32 or wider.
        labels: Integers (..), the right class of each item.
        mult: m, the inverse temperature; the gradient does not have it as a factor.
        where: True where an item counts; broadcasts to the shape of `labels`. Others leave both the
            sum and the count. Labels there may be anything.
        batch_ratio: Rows of the whole step for each row of this call, at least 1.

    Returns:
        A `Mean` of one total and one weight for each row of the leading axis. The gradient of its
        value is `(softmax(m z) - onehot) V / (V - 1)^1/2`, without the 1 / items of the mean.

    Raises:
        ValueError: Shapes do not fit, or there is only one class.

    Example:
        >>> logits, labels = jnp.zeros((2, 4)), jnp.array([0, 3])
        >>> value, grad = jax.value_and_grad(lambda z: cross_entropy(z, labels).value)(logits)
        >>> round(value.item(), 4), [round(g, 4) for g in grad[0].tolist()]
        (1.3863, [-1.7321, 0.5774, 0.5774, 0.5774])
    """
    *items, classes = jnp.shape(logits)
    if jnp.shape(labels) != tuple(items):
        raise ValueError(wrong_shape("labels", jnp.shape(labels), tuple(items)))
    if classes < 2:
        raise ValueError(wrong_shape("logits", jnp.shape(logits), "at least two classes"))
    wide = jnp.asarray(logits).astype(trees.wide(jnp.result_type(logits)))
    mult = _positive("mult", mult)
    factor = jnp.size(labels) * _ratio(batch_ratio) * classes / (classes - 1) ** 0.5 / mult
    log_p = jax.nn.log_softmax(scale_bwd(wide, factor) * mult, axis=-1)
    counts = jnp.broadcast_to(True if where is None else where, jnp.shape(labels)).astype(bool)
    chosen = jnp.where(counts, labels, 0)  # an ignored label may be no class, such as -100
    losses = -jnp.take_along_axis(log_p, chosen[..., None], axis=-1)[..., 0]
    return Mean(_by_row(jnp.where(counts, losses, 0)), _by_row(counts.astype(losses.dtype)))


def mse(x: Array, y: Array, *, batch_ratio: float = 1) -> Mean:
    """The mean square of a difference, whose gradients have RMS near 1.

    Args:
        x: Numbers (rows, ..).
        y: Numbers of the shape of x.
        batch_ratio: Rows of the whole step for each row of this call, at least 1.

    Returns:
        A `Mean` of one total and one weight for each row. The gradient of its value is 8^-1/2 times
        that of the sum of squares, without the 1 / n of the mean.

    Example:
        >>> x = jnp.array([[1.0, 3.0]])
        >>> value, grad = jax.value_and_grad(lambda x: mse(x, jnp.zeros((1, 2))).value)(x)
        >>> value.item(), [round(g * 8**0.5, 4) for g in grad[0].tolist()]
        (5.0, [2.0, 6.0])
    """
    if jnp.shape(x) != jnp.shape(y):
        raise ValueError(wrong_shape("y", jnp.shape(y), jnp.shape(x)))
    factor = 8**-0.5 * jnp.size(x) * _ratio(batch_ratio)
    squares = jnp.square(_wide(scale_bwd(x, factor)) - _wide(scale_bwd(y, factor)))
    return Mean(_by_row(squares), _by_row(jnp.ones_like(squares)))


def _by_row(x: jax.Array) -> jax.Array:
    """Sums over all axes but the first."""
    return x.sum(axis=tuple(range(1, x.ndim)))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(trees.wide(x.dtype))


# -------------------------------------------------------------------------------------- inside


def _scaled(fn: Callable[..., jax.Array], own: Factors, **operands: Array) -> jax.Array:
    """`alpha fn(..)` whose operands' gradients are multiplied by their factors."""
    inputs = [scale_bwd(jnp.asarray(x), own.bwd[name]) for name, x in operands.items()]
    return scale_fwd(fn(*inputs), own.fwd)


def _affine(
    product: Callable[..., jax.Array],
    x: Array,
    kernel: Array,
    bias: Array | None,
    own: Factors,
    factors: Family,
) -> jax.Array:
    """`alpha x kernel + bias`, or `alpha (x kernel + bias)` with the factors "graphcore"."""
    if bias is None:
        return _scaled(product, own, x=x, kernel=kernel)
    if factors == "graphcore":
        inside = lambda x, kernel, bias: product(x, kernel) + bias
        return _scaled(inside, own, x=x, kernel=kernel, bias=bias)
    return _scaled(product, own, x=x, kernel=kernel) + scale_bwd(bias, own.bwd["bias"])


def _ratio(batch_ratio: float) -> float:
    check_number("batch_ratio", batch_ratio)
    if batch_ratio < 1:
        raise ValueError(
            f"batch_ratio is {batch_ratio}; expected rows of the step / rows of this call, at "
            "least 1: parts of an accumulation times shards."
        )
    return batch_ratio


def _positive(what: str, value: float) -> float:
    check_number(what, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{what} is {value}; expected a positive number.")
    return float(value)


def _per_axis(given: int | Sequence[int], axes: int) -> tuple[int, ...]:
    return (given,) * axes if isinstance(given, int) else tuple(given)


_CHANNELS = {1: "NWC", 2: "NHWC", 3: "NDHWC"}
_KERNELS = {1: "WIO", 2: "HWIO", 3: "DHWIO"}


def _identity(x: jax.Array) -> jax.Array:
    return x


def _dropped(rate: float, key: Key | None) -> Callable[[jax.Array], jax.Array]:
    check_key(key)
    assert key is not None

    def drop(x: jax.Array) -> jax.Array:
        keep = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))

    return drop


@functools.cache
def _gelu(mult: float, approximate: bool) -> Callable[[jax.Array], jax.Array]:
    """The function `gelu(m x) / m`, one for each m: calibrations are remembered by it."""

    def gelu(x: jax.Array) -> jax.Array:
        return jax.nn.gelu(x * mult, approximate=approximate) / mult

    return gelu


@functools.cache
def _silu(mult: float) -> Callable[[jax.Array], jax.Array]:
    """The function `x sigmoid(m x)`, one for each m."""

    def silu(x: jax.Array) -> jax.Array:
        return x * jax.nn.sigmoid(x * mult)

    return silu
