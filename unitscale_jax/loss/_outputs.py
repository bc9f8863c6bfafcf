"""How each auxiliary output of some rows becomes an output of the whole batch.

    sum | mean (by rows that count) | max | last (seen by the next part as its state) | concat

A `us.Mean` carries its own rule: totals and weights add up. Any other output needs one, since a
wrong guess (a mean of maxima, a sum of accuracies) would go unnoticed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from unitscale_jax import rules, tree as trees
from unitscale_jax.errors import expected
from unitscale_jax.loss._mean import Mean
from unitscale_jax.loss._split import gather_rows
from unitscale_jax.mesh_axes import agree, zeros
from unitscale_jax.typing import State

Kind: TypeAlias = Literal["sum", "mean", "max", "last", "concat"]
KINDS = get_args(Kind)
is_mean = lambda node: isinstance(node, Mean)


@dataclass(frozen=True)
class Reduction:
    """The kind of each output; a `Mean` counts as one leaf, of kind "weighted".

    Attributes:
        kinds: Kind of each leaf.
        structure: Outline of the outputs.
    """

    kinds: Sequence[str]
    structure: jax.tree_util.PyTreeDef

    def start(self, outputs: Any, state: State = None) -> list[Any]:
        """What each leaf starts from, given the abstract outputs of a part.

        A state that goes from part to part starts from itself: if every part is dropped, it is the
        last one.
        """
        blank = [_start(kind, leaf) for kind, leaf in self._leaves(outputs)]
        if self.threading(outputs, state) is _unchanged:
            return blank
        put = lambda kind, zero, old: agree(jnp.asarray(old), zero) if kind == "last" else zero
        pick, kinds = self._pick(outputs), jax.tree.unflatten(self.structure, self.kinds)
        tree = jax.tree.unflatten(self.structure, blank)
        of_state = jax.tree.map(put, pick(kinds), pick(tree), state)
        inside = pick(tree) is not tree
        return self.structure.flatten_up_to({**tree, "state": of_state} if inside else of_state)

    def step(self, so_far: list[Any], outputs: Any, valid: jax.Array | None) -> list[Any]:
        """Adds the outputs of a part; `valid` says which of its rows count."""
        leaves = zip(so_far, self._leaves(outputs), strict=True)
        return [_step(kind, total, leaf, valid) for total, (kind, leaf) in leaves]

    def kept_whole(self, outputs: Any, used: jax.Array | None) -> list[Any]:
        """What is kept of every part: its rows for "concat", the coefficient of a `Mean`."""
        return [_kept_whole(kind, leaf, used) for kind, leaf in self._leaves(outputs)]

    def finish(self, sums: list[Any], whole: list[Any], rows: int, axes: Sequence[str]) -> Any:
        """The outputs of the whole batch, summed over mesh axes as well."""
        leaves = zip(self.kinds, sums, whole, strict=True)
        out = [_finish(kind, total, every, rows, tuple(axes)) for kind, total, every in leaves]
        return jax.tree.unflatten(self.structure, out)

    def threading(self, aux: Any, state: State) -> Callable[[Any, State], State]:
        """`(outputs of a part, its state) -> state of the next part`, by the leaves of "last"."""
        kinds, pick = jax.tree.unflatten(self.structure, self.kinds), self._pick(aux)
        inside = pick(aux) is not aux
        same = jax.tree.structure(state) == jax.tree.structure(pick(aux))
        returned = state is not None and "last" in jax.tree.leaves(pick(kinds))
        if not returned or not (same or inside):
            return _unchanged
        _check_state(state, pick(aux), same)
        choose = lambda kind, new, old: new if kind == "last" else old
        return lambda outputs, state: jax.tree.map(choose, pick(kinds), pick(outputs), state)

    def _pick(self, aux: Any) -> Callable[[Any], Any]:
        """What of the outputs is a model state, if any of them is: `aux["state"]`, else all."""
        if isinstance(aux, Mapping) and "state" in aux:
            return lambda outputs: outputs["state"]
        return lambda outputs: outputs

    def _leaves(self, outputs: Any) -> list[tuple[str, Any]]:
        return list(zip(self.kinds, jax.tree.leaves(outputs, is_leaf=is_mean), strict=True))


def reduction_of(outputs: Any, kinds: rules.Rules[str], rows: int, *, uneven: bool) -> Reduction:
    """Resolves the rules over the outputs of one part.

    Args:
        outputs: Abstract outputs of a part.
        kinds: Rules `(pattern, kind)`.
        rows: Rows of a part.
        uneven: Whether some rows of some part do not count, so that a sum or a mean that the loss
            has taken itself would count them.

    Raises:
        ValueError: A leaf has no rule, a rule no leaf, a kind is unknown, or does not fit the leaf.
    """
    pairs = rules.pairs_of(kinds)
    for pattern, kind in pairs:
        if kind not in KINDS:
            raise ValueError(expected(f"the kind of rule {pattern!r}", kind, KINDS))
    leaves, structure = jax.tree.flatten(outputs, is_leaf=is_mean)
    names = trees.names(outputs, is_leaf=is_mean)
    found = rules.match(pairs, names, noun="auxiliary output")
    named = dict(zip(names, leaves, strict=True))
    chosen = ["weighted" if is_mean(leaf) else found[name] for name, leaf in named.items()]
    for kind, (name, leaf) in zip(chosen, named.items(), strict=True):
        _check_kind(name, kind, leaf, rows, uneven)
    return Reduction(chosen, structure)


def _unchanged(outputs: Any, state: State) -> State:
    del outputs
    return state


def _check_kind(name: str, kind: str | None, leaf: Any, rows: int, uneven: bool) -> None:
    if kind is None:
        raise ValueError(
            f"auxiliary output {name!r} has no rule for how parts combine. Add "
            f"reduce=(({name!r}, kind),) with a kind of {KINDS}, or return a us.Mean."
        )
    if kind == "concat" and leaf.shape[:1] != (rows,):
        raise ValueError(
            f"auxiliary output {name!r} has shape {leaf.shape}; 'concat' needs a leading axis of "
            f"the {rows} rows of a part."
        )
    if kind in ("sum", "mean") and uneven:
        raise ValueError(
            f"auxiliary output {name!r} is a {kind} that the loss took over rows of which some do "
            "not count. Return us.Mean(total, weight) with one number per row, give every part "
            "the same number of rows, or name the leaves to zero in `mask`."
        )


def _check_state(state: State, new: Any, same: bool) -> None:
    if not same:
        raise ValueError(
            f"`state` has the leaves {trees.names(state)} and aux['state'] {trees.names(new)}; a "
            "state that goes from part to part must keep its structure."
        )
    new_leaves = jax.tree.leaves(new)
    for (name, old), leaf in zip(trees.named_leaves(state).items(), new_leaves, strict=True):
        old = jnp.asarray(old)
        if (old.shape, old.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"state leaf {name!r} goes in as {old.dtype}{list(old.shape)} and comes out as "
                f"{leaf.dtype}{list(leaf.shape)}; a state that goes from part to part must keep "
                "its shapes and dtypes."
            )


def _start(kind: str, aval: Any) -> Any:
    if kind == "weighted":
        return tuple(zeros((), trees.wide(x.dtype), like=x) for x in (aval.total, aval.weight))
    if kind == "mean":
        floating = jnp.issubdtype(aval.dtype, jnp.floating)
        dtype = trees.wide(aval.dtype) if floating else jnp.float32
        return zeros(aval.shape, dtype, like=aval), jnp.zeros((), jnp.float32)
    if kind == "max":
        return jnp.full_like(zeros(aval.shape, aval.dtype, like=aval), _lowest(aval.dtype))
    if kind == "concat":
        return None
    return zeros(aval.shape, trees.wide(aval.dtype) if kind == "sum" else aval.dtype, like=aval)


def _step(kind: str, so_far: Any, leaf: Any, valid: jax.Array | None) -> Any:
    add = lambda total, x: total + x.astype(total.dtype)
    if kind == "weighted":
        return add(so_far[0], _summed(leaf.total, valid)), add(
            so_far[1], _summed(leaf.weight, valid)
        )
    if kind == "mean":
        rows = jnp.float32(1) if valid is None else jnp.sum(valid.astype(jnp.float32))
        total, weight = so_far
        return total + leaf.astype(total.dtype) * rows.astype(total.dtype), weight + rows
    if kind == "max":
        return jnp.maximum(so_far, leaf)
    if kind == "concat":
        return None
    return add(so_far, leaf) if kind == "sum" else leaf


def _kept_whole(kind: str, leaf: Any, used: jax.Array | None) -> Any:
    if kind == "weighted":
        return leaf.coef
    if kind != "concat" or used is None:
        return leaf if kind == "concat" else None
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.where(used, leaf, jnp.asarray(jnp.nan if floating else 0, leaf.dtype))


def _finish(kind: str, total: Any, whole: Any, rows: int, axes: tuple[str, ...]) -> Any:
    psum = lambda x: jax.lax.psum(x, axes) if axes else x
    if kind == "weighted":
        return Mean(psum(total[0]), psum(total[1]), whole[-1])
    if kind == "mean":
        weight = psum(total[1])
        return psum(total[0]) / jnp.where(weight != 0, weight, 1).astype(total[0].dtype)
    if kind == "max":
        return jax.lax.pmax(total, axes) if axes else total
    if kind == "concat":
        return gather_rows(whole, rows)
    return psum(total) if kind == "sum" else total


def _summed(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """A field of a `Mean` in scalar form, rows that do not count left out."""
    if not x.shape:
        return x
    x = x if valid is None else jnp.where(valid, x, jnp.zeros((), x.dtype))
    return jnp.sum(x.astype(trees.wide(x.dtype)))


def _lowest(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.floating):
        return -jnp.inf
    return jnp.iinfo(dtype).min if jnp.issubdtype(dtype, jnp.integer) else False
