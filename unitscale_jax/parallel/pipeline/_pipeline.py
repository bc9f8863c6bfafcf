"""Pipelines: the layers of a model on different devices, the rows in parts that follow each other.

    stage s of S    holds layers s n/S ... (s + 1) n/S - 1, their gradients and optimizer state
    grads = scale * sum_m sum_t coef_t / W_t * d total_(m,t) / d params      over parts m

One compiled program: a scan over the ticks of a `Schedule`, in one `shard_map` over the axis of the
stages. Weights W are summed before, so the cotangent of each part starts at the last stage as it
would in the whole batch, loss scale included; sums are float32.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from unitscale_jax.errors import expected
from unitscale_jax.loss import Grad
from unitscale_jax.parallel.pipeline._model import Model
from unitscale_jax.parallel.pipeline._run import Run
from unitscale_jax.parallel.pipeline._schedule import NAMES, Name


def pipelined(
    first: Callable[..., Any],
    layer: Callable[..., Any],
    head: Callable[..., Any],
    loss: Callable[..., Any],
    *,
    parts: int,
    schedule: Name = "1f1b",
    mesh_axis: str = "pp",
    residuals: Literal["recompute", "stash"] = "recompute",
    skip_idle: bool | None = None,
) -> "Pipelined":
    """Makes the gradient station of a model whose layers are on different devices.

    Its parameters are those of the model with the layers made one stack by `stack`; `rest` is the
    same tree without them, whole on every stage, so embeddings may be tied. All pieces get the rows
    of one part, `batch`. When they are given, all get `state=`, and all but `loss` get `key=`, one
    per row.

    Args:
        first: `first(rest, batch) -> x`, what the first layer takes: an array `(rows, ...)` or a
            pytree of them, floating. It runs on the first stage.
        layer: `layer(params of one layer, x, batch) -> x`, of the same structure, shapes, dtypes.
        head: `head(rest, x, batch) -> outputs` of the model. It runs on the last stage.
        loss: `loss(outputs, batch) -> terms`, as in `us.value_and_grad`: a `us.Mean`, a dict of
            them, or a scalar.
        parts: Number of parts M that follow each other. Part m holds rows m, m + M, ...
        schedule: "1f1b", whose memory does not grow with the parts; "gpipe", which keeps the input
            of every stage for each part; "circular", gpipe for stages of several chunks.
        mesh_axis: The mesh axis of the stages; it is manual in here. All others stay as they are,
            so layers may be tensor parallel by their layout, and a data axis goes around by
            `reduced`.
        residuals: "recompute" keeps a stage's input and runs it again, "stash" keeps what its
            derivative needs, weights excepted: a third less work, more memory.
        skip_idle: Whether a stage without a part does nothing. If not, it computes something that
            is thrown away. None: it does nothing unless the partitioner has an axis to itself, of
            a size above 1: it may then place collectives in a layer, and a device that skips one
            leaves those that do not waiting. True is for layers known to have none, or whose only
            ones are sums within the groups of an axis.

    Returns:
        A `Pipelined`: a `us.Grad`, to be called under `jax.set_mesh(mesh)` or inside a `shard_map`
        over other axes, that equals `us.value_and_grad` of the model on one device for every
        schedule, number of parts and stages. Its gradients of layers lie as the layers do.

    Raises:
        ValueError: Here for unknown options. On a call: no mesh or no such axis; parameters without
            a stack, or stacked for another number of stages; a layer whose output is not like its
            input; fewer parts than stages in a circle; more parts than rows; and what
            `us.value_and_grad` refuses.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 10)
        >>> params = {"embed": jax.random.normal(keys[0], (11, 4))}
        >>> params |= {f"layer_{i}": jax.random.normal(keys[1 + i], (4, 4)) for i in range(8)}
        >>> params = us.parallel.stack(params, "layer_*", stages=4)
        >>> def loss(logits, batch):
        ...     right = jnp.take_along_axis(logits, batch["next"][..., None], -1)[..., 0]
        ...     return us.Mean(jax.nn.logsumexp(logits, -1).sum() - right.sum(), right.size)
        >>> grad_fn = us.parallel.pipelined(
        ...     lambda rest, batch: rest["embed"][batch["token"]],
        ...     lambda w, x, batch: x + jnp.tanh(x @ w) / 8,
        ...     lambda rest, x, batch: x @ rest["embed"].T,
        ...     loss,
        ...     parts=6,
        ... )
        >>> tokens = jax.random.randint(keys[9], (12, 6), 0, 11)
        >>> batch = {"token": tokens[:, :-1], "next": tokens[:, 1:]}
        >>> with jax.set_mesh(us.parallel.mesh(pp=4, dp=2)):
        ...     terms, _, grads = jax.jit(grad_fn)(params, batch)
        ...     logits = jax.jit(grad_fn.apply)(params, {"token": tokens[:, :-1]})
        >>> logits.shape, us.parallel.unstack(grads)["layer_3"].shape
        ((12, 5, 11), (4, 4))
        >>> bool(jnp.allclose(loss(logits, batch).value, terms["loss"].value))
        True
    """
    _check_options(parts, schedule, residuals)
    model = Model(first, layer, head, loss)
    run = Run(model, parts, schedule, mesh_axis, residuals == "stash", skip_idle)
    return Pipelined(loss=run.loss, call=run.gradients, apply=run.apply)


@dataclass(frozen=True)
class Pipelined(Grad):
    """The gradient station of a pipeline; see `pipelined`.

    Attributes:
        loss: `loss(params, batch)`, the loss of a forward pass alone, through the pipeline.
        call: What calling it does; see `us.Grad`.
        direct: False.
        apply: `apply(params, inputs, *, state=None, key=None)`, the outputs of `head` for every
            row, in order, on every stage. `inputs` is a batch that may lack what only the loss
            reads; of fewer rows than parts each is a part.
    """

    apply: Callable[..., Any] = field(kw_only=True, repr=False)


def _check_options(parts: int, schedule: str, residuals: str) -> None:
    if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
        raise ValueError(expected("`parts`", parts, "a positive int"))
    if schedule not in NAMES:
        raise ValueError(expected("`schedule`", schedule, NAMES))
    if residuals not in ("recompute", "stash"):
        raise ValueError(expected("`residuals`", residuals, ("recompute", "stash")))
