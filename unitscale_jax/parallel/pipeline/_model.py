"""A model in pieces: what goes before the layers, one layer, what comes after, and the loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from unitscale_jax import tree as trees
from unitscale_jax.loss import Part
from unitscale_jax.mesh_axes import axes_of, varying
from unitscale_jax.parallel.pipeline._stages import Stages
from unitscale_jax.typing import Key, Params, State


@dataclass(frozen=True)
class Model:
    """The pieces of a model in a pipeline; see `pipelined`.

    A key of row i that `first`, layer l and `head` receive is `fold_in(key of row i, place)`, with
    the places 0, 1 + l and 1 + number of layers: the same for every number of parts and stages.
    """

    first: Callable[..., Any]
    layer: Callable[..., Any]
    head: Callable[..., Any]
    loss: Callable[..., Any]

    def enter(self, rest: Params, part: Part, state: State) -> Any:
        """Computes the input of the first layer."""
        return self.first(rest, part.batch, **_given(state, _folded(part.key, 0)))

    def chunk(self, layers: Any, x: Any, part: Part, state: State, start: Any) -> Any:
        """Runs layers, leaves `(layers, ...)`; the first is number `start` of the whole model."""
        numbers = start + jnp.arange(len(jax.tree.leaves(layers)[0]))
        x = varying(x, axes_of((layers, x, part, state, numbers)))

        def step(x: Any, layer: tuple[Any, Any]) -> tuple[Any, None]:
            params, number = layer
            given = _given(state, _folded(part.key, 1 + number))
            return self.layer(params, x, part.batch, **given), None

        return jax.lax.scan(step, x, (layers, numbers))[0]

    def leave(self, rest: Params, x: Any, part: Part, state: State, layers: int) -> Any:
        """Computes the model's output from that of the last layer."""
        given = _given(state, _folded(part.key, 1 + layers))
        return self.head(rest, x, part.batch, **given)

    def outputs(self, stages: Stages, rest: Params, part: Part, state: State) -> Any:
        """Evaluates the model without a pipeline: one chunk holds all layers."""
        flat = jax.tree.map(lambda w: jnp.reshape(w, (-1, *jnp.shape(w)[3:])), stages.layers)
        x = self.chunk(flat, self.enter(rest, part, state), part, state, 0)
        return self.leave(rest, x, part, state, math.prod(stages.shape))

    def whole(self, stages: Stages, rest: Params, part: Part, state: State) -> Any:
        """Evaluates the loss of the whole model on one device."""
        return self.value(self.outputs(stages, rest, part, state), part, state)

    def value(self, out: Any, part: Part, state: State) -> Any:
        """Evaluates the terms of the loss."""
        terms = self.loss(out, part.batch, **_given(state, None))
        if isinstance(terms, tuple):
            raise ValueError(
                "the loss of a pipeline returned a tuple; expected terms alone. Return what is "
                "counted beside the loss as a us.Mean with coef=0.0, and outputs with `.apply`."
            )
        return terms

    def tail(self, layers: int) -> Callable[..., Any]:
        """Makes the loss a function of `(rest, output of the last layer)`, in the loss contract."""

        def loss(params: Any, batch: Any, *, state: State = None, key: Key | None = None) -> Any:
            part = Part(batch, key, None)
            rest, x = params
            return self.value(self.leave(rest, x, part, state, layers), part, state)

        return loss

    def check(self, stages: Stages, rest: Params, part: Part, state: State) -> None:
        """Raises `ValueError` unless a layer returns the shapes and dtypes that it takes."""
        x = jax.eval_shape(self.enter, rest, part, state)
        for name, leaf in trees.named_leaves(x).items():
            if not trees.is_floating(leaf):
                raise ValueError(
                    f"`first` returns {_aval(leaf)}{_at(name)}; what goes from stage to stage is "
                    "differentiated, so it is floating. Layers receive the batch as well: keep "
                    "masks and positions there."
                )
        one = jax.tree.map(lambda w: w[0, 0, 0], stages.layers)

        # It makes x from real arrays: JAX takes no abstract ones that differ over manual axes.
        def through_one_layer(rest: Params, w: Any, part: Part) -> Any:
            given = _given(state, _folded(part.key, 1))
            return self.layer(w, self.enter(rest, part, state), part.batch, **given)

        y = jax.eval_shape(through_one_layer, rest, one, part)
        _check_alike(x, y)


def _check_alike(x: Any, y: Any) -> None:
    """Raises `ValueError` unless a layer's output `y` has the structure and types of its input."""
    if jax.tree.structure(x) != jax.tree.structure(y):
        raise ValueError(
            f"`layer` takes the leaves {trees.names(x)} and returns {trees.names(y)}; a pipeline "
            "sends the output of each layer to the next, so both have one structure."
        )
    outputs = jax.tree.leaves(y)
    for (name, taken), returned in zip(trees.named_leaves(x).items(), outputs, strict=True):
        if _aval(taken) != _aval(returned):
            raise ValueError(
                f"`layer` takes {_aval(taken)}{_at(name)} and returns {_aval(returned)}; a "
                "pipeline sends the output of each layer to the next, so both have one shape and "
                "dtype. Cast or project in `first` or `head`."
            )


def _folded(key: Key | None, place: Any) -> Key | None:
    """The keys of all rows for one place of the model."""
    if key is None:
        return None
    return jax.vmap(lambda k: jax.random.fold_in(k, place))(key)


def _given(state: State, key: Key | None) -> dict[str, Any]:
    """The keywords of a piece of the model: those that were given, as it may not take others."""
    given = {"state": state, "key": key}
    return {name: arg for name, arg in given.items() if arg is not None}


def _aval(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _at(name: str) -> str:
    return f" at {name!r}" if name else ""
