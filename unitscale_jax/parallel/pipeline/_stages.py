"""A stack of layers where named ones were, and a tree of parameters taken apart around it."""

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
    """What stands where named layers were: the layers as one stack, and what was beside them.

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
        """Not called by users; `keys` are the layers', or along which axis they were stacked."""
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
        """The same outline around other arrays."""
        return Stages(layers, others, self._word, self._keys, self._kind)

    def unstacked(self) -> Any:
        """The container as it was; a scalar, such as a flag of the stack, goes to every layer."""
        is_stack = lambda x: jnp.ndim(x) >= 3
        joined = lambda x: jnp.reshape(x, (-1, *jnp.shape(x)[3:])) if is_stack(x) else x
        layers = jax.tree.map(joined, self.layers)
        if isinstance(self._keys, int):
            back = lambda x, old: jnp.moveaxis(x, 0, self._keys) if is_stack(old) else x
            whole = jax.tree.map(back, layers, self.layers)
            return self._kind({**self.others, self._word: whole})
        pick = lambda i: lambda x, old: x[i] if is_stack(old) else x
        one = lambda i: jax.tree.map(pick(i), layers, self.layers)
        return self._kind({**self.others, **{key: one(i) for i, key in enumerate(self._keys)}})

    def tree_flatten_with_keys(self) -> tuple[Sequence[tuple[DictKey, Any]], Any]:
        """For JAX: children and what they do not say."""
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


def taken_apart(tree: Any) -> tuple[Stages, Any, Callable[[Any, Any], Any]]:
    """`(stages, everything else, a function that puts the two together)`.

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
    """`[(key, word, child), ...]` of one level of a tree and its structure; None of a leaf."""
    one_level = lambda x: x is not node
    pairs, structure = jax.tree_util.tree_flatten_with_path(node, is_leaf=one_level)
    if not pairs or not pairs[0][0]:  # nothing inside, or itself a leaf
        return None, structure
    keys = [getattr(path[0], "key", getattr(path[0], "idx", None)) for path, _ in pairs]
    words = trees.names(node, is_leaf=one_level)
    return [(*entry, x) for *entry, (_, x) in zip(keys, words, pairs, strict=True)], structure
