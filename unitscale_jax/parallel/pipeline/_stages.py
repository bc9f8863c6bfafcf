"""A stack of layers where named ones were, and a tree of parameters taken apart around it."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey

from unitscale_jax import tree as trees

Entry: TypeAlias = Any
"""The key of an entry of a mapping or of a list: str or int."""


@jax.tree_util.register_pytree_with_keys_class
class Stages:
    """A container of named layers as one stack of them, beside its other entries.

    Made by `stack`. Its leaves are named as those of the layers were, the layer's own word replaced
    by the pattern's ("decoder/layer_*/mlp/kernel"), so a rule written for named layers with a `*`
    holds for stacked ones.

    Attributes:
        layers: The layers, leaves `(repeats, stages, layers of a chunk, ...)`.
        others: What the container holds beside the layers, by key.
    """

    def __init__(
        self, layers: Any, others: Mapping[Entry, Any], word: Entry, keys: Any, kind: Callable
    ) -> None:
        """Takes the keys of the layers, or the axis of a scanned stack; `stack` calls it."""
        self.layers, self.others = layers, dict(others)
        self._word, self._keys, self._kind = word, keys, kind

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(repeats, stages, layers of a chunk)`."""
        repeats, stages, layers = jnp.shape(jax.tree.leaves(self.layers)[0])[:3]
        return repeats, stages, layers

    def beside(self) -> Any:
        """The container without its stacked layers."""
        return self._kind(self.others)

    def like(self, layers: Any, others: Mapping[Entry, Any]) -> "Stages":
        """Makes a container of this outline around other arrays."""
        return Stages(layers, others, self._word, self._keys, self._kind)

    def unstacked(self) -> Any:
        """Makes the container as it was before `stack`.

        A leaf without the three axes of a stack, such as the flag of a loss scale whose state was
        made for the stack, says the same of every layer, and every layer gets it.
        """
        flat = jax.tree.map(_joined, self.layers)  # leaves (all layers, ...), once for all of them
        if isinstance(self._keys, int):
            whole = self._where_stacked(lambda x: jnp.moveaxis(x, 0, self._keys), flat)
            return self._kind({**self.others, self._word: whole})
        named = {
            key: self._where_stacked(operator.itemgetter(i), flat)
            for i, key in enumerate(self._keys)
        }
        return self._kind({**self.others, **named})

    def _where_stacked(self, fn: Callable[[Any], Any], flat: Any) -> Any:
        """Maps the leaves that are stacks; others stay, as they say the same of every layer."""
        return jax.tree.map(lambda x, old: fn(x) if _is_stack(old) else x, flat, self.layers)

    def tree_flatten_with_keys(self) -> tuple[Sequence[tuple[DictKey, Any]], Any]:
        """Lists the leaves and the outline around them, for JAX."""
        beside = sorted(self.others)
        children = [(DictKey(self._word), self.layers)]
        children += [(DictKey(key), self.others[key]) for key in beside]
        return children, (tuple(beside), self._word, self._keys, self._kind)

    @classmethod
    def tree_unflatten(cls, outline: Any, children: Sequence[Any]) -> "Stages":
        """Rebuilds the object from its leaves, for JAX."""
        beside, *rest = outline
        layers, *others = children
        return cls(layers, dict(zip(beside, others, strict=True)), *rest)

    def __repr__(self) -> str:
        """The layers and what is beside them."""
        return f"Stages({self._word!r}: {self.layers!r}, others={self.others!r})"


def _is_stack(x: Any) -> bool:
    return jnp.ndim(x) >= 3


def _joined(x: Any) -> jax.Array:
    """A stack `(repeats, stages, layers of a chunk, ...)` as `(layers, ...)`; no stack as it is."""
    return jnp.reshape(x, (-1, *jnp.shape(x)[3:])) if _is_stack(x) else x


def taken_apart(tree: Any) -> tuple[Stages, Any, Callable[[Any, Any], Any]]:
    """Splits parameters: `(stages, everything else, a function that puts the two together)`.

    Everything else has the outline of the parameters without the layers.

    Raises:
        ValueError: The tree holds no `Stages`, or several.
    """
    nodes, structure = jax.tree.flatten(tree, is_leaf=lambda node: isinstance(node, Stages))
    at = [k for k, node in enumerate(nodes) if isinstance(node, Stages)]
    if len(at) != 1:
        raise ValueError(
            f"the parameters hold {len(at)} stacks of layers, and a pipeline runs one. "
            "us.parallel.stack(params, 'layer_*', stages=...) makes one; a second stack, "
            "such as an encoder's, belongs into `first`, unstacked."
        )
    stages, k = nodes[at[0]], at[0]
    rest = structure.unflatten([*nodes[:k], stages.beside(), *nodes[k + 1 :]])

    def together(layers: Any, rest: Any) -> Any:
        parts = structure.flatten_up_to(rest)
        others = {key: child for key, _, child in children_of(parts[k])[0] or ()}
        return structure.unflatten([*parts[:k], stages.like(layers, others), *parts[k + 1 :]])

    return stages, rest, together


def children_of(node: Any) -> Any:
    """Lists one level of a tree: `[(key, word, child), ...]` and its structure; None for a leaf."""

    def one_level(x: Any) -> bool:
        return x is not node

    pairs, structure = jax.tree_util.tree_flatten_with_path(node, is_leaf=one_level)
    if not pairs or not pairs[0][0]:  # nothing inside, or itself a leaf
        return None, structure
    keys = [getattr(path[0], "key", getattr(path[0], "idx", None)) for path, _ in pairs]
    words = trees.names(node, is_leaf=one_level)
    return [(*entry, x) for *entry, (_, x) in zip(keys, words, pairs, strict=True)], structure
