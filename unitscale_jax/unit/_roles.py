"""Roles of parameters, found from how a function uses them: what learning rates and scales follow.

    embedding    a lookup takes rows of it
    input        a product with data as they came, of finite fan-in
    output       a product that no further one follows on the way to the loss
    weight       any other product
    norm         a multiplication with activations: a gain, a decay
    bias         a sum with activations

The fan-in is how many numbers the product sums up, and never a size read off a shape: a kernel
(d, heads, head) of queries has d, one (heads, head, d) of outputs heads * head, one of a
convolution its window times its input channels. Yang and Hu 2022, https://arxiv.org/abs/2203.03466;
Blake et al. 2024, https://arxiv.org/abs/2407.17465.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import jax
import numpy as np

from unitscale_jax import rules as named_rules, tree as trees
from unitscale_jax.errors import (
    check_callable,
    check_number,
    check_type,
    expected,
    keywords,
    unknown,
)
from unitscale_jax.trace.params import Meeting, meetings
from unitscale_jax.trace.program import trace_call
from unitscale_jax.typing import Params

RoleKind: TypeAlias = Literal["embedding", "input", "weight", "output", "bias", "norm"]
KINDS: tuple[str, ...] = get_args(RoleKind)
TAKEN = ("lookup", "rows")  # uses of a table, whatever reaches the indices
INSIDE = ("weight", "bias", "norm")  # roles that stand inside of a stack of layers


@dataclass(frozen=True)
class Role:
    """How a function uses a parameter.

    Attributes:
        kind: "embedding", "input", "weight", "output", "bias" or "norm".
        fan_in: How many numbers a product with it sums up; of an embedding its rows; of a bias and
            of a norm 1.
        fan_out: How many outputs it has; of an embedding the width of a row; of a bias and of a
            norm its size. Axes that a scan stacks layers along count in neither.
        depth: How many layers the stack has that holds it; 1 outside of stacks.

    Example:
        >>> Role("weight", 64, 32).depth
        1
        >>> Role("wieght", 64, 32)
        Traceback (most recent call last):
            ...
        ValueError: there is no kind of role 'wieght'; closest: 'weight'.
    """

    kind: RoleKind
    fan_in: float
    fan_out: float
    depth: float = 1

    def __post_init__(self) -> None:
        """Raises `ValueError` for a kind that there is not, or for numbers below their least."""
        if self.kind not in KINDS:
            raise ValueError(unknown(self.kind, KINDS, "kind of role"))
        for what in ("fan_in", "fan_out", "depth"):
            value = getattr(self, what)
            check_number(what, value)
            if not value > 0:
                raise ValueError(expected(what, value, "a number above 0"))


def roles(
    fn: Callable[..., Any],
    params: Params,
    /,
    *args: Any,
    rules: named_rules.Rules[Role] | None = None,
    depth: float | named_rules.Rules[float] = 1,
    kwargs: Mapping[str, Any] | None = None,
    **named: Any,
) -> Any:
    """Finds the role of each parameter from the equations of a function; nothing is run.

    Args:
        fn: A loss or a model: a function of `(params, *args)` that returns arrays, a scalar, a
            `us.Mean` or a dict of them.
        params: Its parameters, arrays or abstract ones.
        *args: Its other arguments, likewise.
        rules: Pairs `(pattern, Role)` for parameters whose role is another one, or cannot be found.
        depth: Number of layers (pairs of attention and MLP) of the stack, which no program tells:
            layers may be a loop or a repetition. A number is that of every weight, bias and norm
            that no scan stacks; embeddings, inputs and outputs stand outside. Pairs
            `(pattern, number)` say it of some parameters. What a scan stacks has the length of the
            scan, unless a pattern says otherwise.
        kwargs: Keywords of the function that have the name of an option here.
        **named: Its other keywords.

    Returns:
        A pytree of `Role`s of the structure of `params`; what stands for one array, as a quantized
        one does, has one.

    Raises:
        ValueError: A parameter has no role, or is summed over differently in two places, and no
            rule says its role; a rule matches no parameter.

    A parameter that is looked up and is also the last layer, a tied table, is an embedding. What is
    only computed with other parameters (a factor of a kernel) has no role of its own.

    Example:
        >>> def loss(params, ids, labels):
        ...     logits = jnp.tanh(params["embed"][ids] @ params["body"]) @ params["head"]
        ...     return us.Mean(jnp.square(logits - labels).sum(-1), jnp.ones(len(ids)))
        >>> params = {"embed": jnp.ones((9, 4)), "body": jnp.ones((4, 8)), "head": jnp.ones((8, 2))}
        >>> found = roles(loss, params, jnp.arange(3), jnp.ones((3, 2)))
        >>> for name, role in us.tree.named_leaves(found).items():
        ...     print(name, role)
        body Role(kind='weight', fan_in=4, fan_out=8, depth=1)
        embed Role(kind='embedding', fan_in=9, fan_out=4, depth=1)
        head Role(kind='output', fan_in=8, fan_out=2, depth=1)
    """
    check_callable("the function", fn)
    leaves = trees.named_leaves(params, is_leaf=trees.is_compound)
    given = _rules_of(rules or (), leaves)
    met = meetings(trace_call(fn, params, *args, **named, **keywords(kwargs)), params)
    found = {
        name: given[name] or _found(name, np.shape(leaf), met.get(name, []))
        for name, leaf in leaves.items()
    }
    of = _with_depth(found, depth, [name for name in leaves if given[name]])
    structure = jax.tree.structure(params, is_leaf=trees.is_compound)
    return jax.tree.unflatten(structure, [of[name] for name in leaves])


def _rules_of(rules: named_rules.Rules[Role], names: Iterable[str]) -> dict[str, Role | None]:
    """The role that a rule says of each parameter; None where none does."""
    for pattern, role in named_rules.pairs_of(rules):
        what = f"the rule {named_rules.text_of(pattern)!r}"
        check_type(what, role, Role, "a us.unit.Role, as Role('weight', fan_in, fan_out)")
    return named_rules.match(rules, names)


def _with_depth(
    found: Mapping[str, Role], depth: float | named_rules.Rules[float], given: Collection[str]
) -> dict[str, Role]:
    """Roles with the depth that was asked for; those of rules say their own."""
    if isinstance(depth, int | float):
        said = {name: depth for name, r in found.items() if r.kind in INSIDE and r.depth == 1}
    else:
        said = {n: d for n, d in named_rules.match(depth, found).items() if d is not None}
    return {
        name: role if name in given else replace(role, depth=said.get(name, role.depth))
        for name, role in found.items()
    }


# ------------------------------------------------------------------------ one parameter's role


def _found(name: str, shape: Sequence[int], met: Sequence[Meeting]) -> Role:
    """The role of a parameter by what it meets; the depth is that of the scans that stack it."""
    # Computed with what inputs reach, a vector is an activation that a bias was added to, and a
    # matrix is still a kernel, as one with a mask that is drawn.
    used = [m for m in met if m.active and (m.fixed or _is_matrix_use(m)) or m.kind in TAKEN]
    products, lookups = _of(used, "product", "rows"), _of(used, "lookup")
    if lookups and not _of(used, "rows"):  # also of a table that is the last layer, too: a tied one
        return _embedding(shape, lookups[0])
    kernels = [m for m in products if _is_summed_over(m, shape)]
    if kernels:
        return _kernel(name, shape, kernels)
    # A gain of a kernel is in the kernel's product, where none of its own axes is summed over.
    gains, biases = products + _of(used, "multiplication"), _of(used, "sum")
    if gains or biases:
        return _vector("norm" if gains else "bias", shape, (gains or biases)[0])
    raise ValueError(_without_role(name, met))


def _of(uses: Sequence[Meeting], *kinds: str) -> list[Meeting]:
    return [use for use in uses if use.kind in kinds]


def _is_summed_over(product: Meeting, shape: Sequence[int]) -> bool:
    """Whether numbers of the parameter itself are summed up, and not one that is repeated."""
    own = math.prod(shape[axis] for axis in product.contracted)
    return bool(product.contracted) and (own > 1 or product.terms == 1)


def _is_matrix_use(use: Meeting) -> bool:
    return use.kind == "product" and len(use.held.axes) > 1


def _embedding(shape: Sequence[int], lookup: Meeting) -> Role:
    stacked = _stacked(lookup)
    rows = _size(shape, [*lookup.contracted, *stacked])
    return Role("embedding", rows, lookup.terms, _depth(lookup))


def _kernel(name: str, shape: Sequence[int], products: Sequence[Meeting]) -> Role:
    fans = {m.terms for m in products}
    if len(fans) > 1:
        listed = " and ".join(map(str, sorted(fans)))
        raise ValueError(
            f"{name} is summed over {listed} numbers in different places, so it has no one fan-in. "
            "If `fn` is a gradient, pass the loss. Or say which by "
            f"rules={{{name!r}: us.unit.Role('weight', fan_in, fan_out)}}."
        )
    kind = "weight"
    if all(m.last for m in products):
        kind = "output"
    elif all(m.first for m in products):
        kind = "input"
    fan_out = math.prod(shape[axis] for axis in products[0].outputs)
    return Role(kind, products[0].terms, fan_out, _depth(products[0]))


def _vector(kind: RoleKind, shape: Sequence[int], use: Meeting) -> Role:
    return Role(kind, 1, _size(shape, _stacked(use)), _depth(use))


def _stacked(use: Meeting) -> list[int]:
    """The parameter's own axes that scans run along."""
    return [axis for _, axis in use.stacks if axis is not None]


def _depth(use: Meeting) -> int:
    """How many layers the scans around a use stack."""
    lengths = [scan.eqn.params["length"] for scan, axis in use.stacks if axis is not None]
    return math.prod(lengths)


def _size(shape: Sequence[int], without: Collection[int]) -> int:
    """How many numbers a shape has but for some of its axes, counted from the end."""
    return math.prod(n for k, n in enumerate(shape) if k - len(shape) not in without)


def _without_role(name: str, met: Sequence[Meeting]) -> str:
    kinds = sorted({m.kind for m in met})
    found = f"only parameters, in a {' and a '.join(kinds)}" if kinds else "nothing of the kind"
    return (
        f"{name or 'the parameter'} has no role: what it should meet is a product, a lookup, a sum "
        f"or a multiplication with what inputs reach, and it meets {found}. "
        f"Say its role by rules={{{name!r}: us.unit.Role(kind, fan_in, fan_out)}}."
    )
