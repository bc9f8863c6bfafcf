"""Axes as expressions: an ordered sum of ordered products of factors.

    qkv kernel, axis 1, of size (4 + 2 + 2) · 6 :    kv·group·dim + kv·dim + kv·dim

A factor is a dimension. Concatenating makes sums, reshaping makes products, and two axes that an
operation lines up are unified: factors of one size become the same (union-find), and a larger one
is refined, everywhere at once, until it lines up. Positions count as in a row-major array, sums
one term after the other.

What cannot be expressed so is *marked*: a mark is a reason why a factor's channels cannot be
removed one by one. Marking more than needed is safe, so every doubt ends in a mark.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias


class SymbolicDim:
    """A dimension without a name; two are equal only if they are one object.

    Attributes:
        size: Its number of channels, above 1.
        marks: Why its channels cannot be removed; what it is refined into has them as well.
        parts: The axis it has been refined into; None while it stands for itself.
        parent: The factor it has been merged into, if any.
    """

    __slots__ = ("marks", "parent", "parts", "size")

    def __init__(self, size: int, marks: Sequence[str] = ()) -> None:
        """A dimension that nothing else has yet."""
        self.size, self.marks = int(size), set(marks)
        self.parts: Axis | None = None
        self.parent: SymbolicDim | None = None

    def __repr__(self) -> str:
        """The size and the marks, as "SymbolicDim(4, 'input')"."""
        return f"SymbolicDim({self.size}{''.join(f', {m!r}' for m in sorted(self.marks))})"


DimProduct: TypeAlias = tuple[SymbolicDim, ...]
Axis: TypeAlias = tuple[DimProduct, ...]
Axes: TypeAlias = tuple[Axis, ...]

UNIT: Axis = ((),)
"""An axis of size 1, which has no factor."""


def new_axis(size: int, *marks: str) -> Axis:
    """An axis that shares nothing with any other."""
    return UNIT if size == 1 else ((SymbolicDim(size, marks),),)


def new_axes(shape: Sequence[int], *marks: str) -> Axes:
    """Axes of a value that shares nothing with any other."""
    return tuple(new_axis(n, *marks) for n in shape)


def size(axis: Axis) -> int:
    """Number of positions along an axis."""
    return sum(_product(term) for term in axis)


def expanded(axis: Axis) -> Axis:
    """Writes an axis in terms of factors as they are known by now.

    A sum distributes over factors that follow it: (a + b) c = a c + b c, as positions of a sum come
    one term after the other. Over a factor that precedes it it cannot: c (a + b) runs through a and
    b for each channel of c, and c a + c b through all of c a first. So there the sum stays one
    factor, which is marked.
    """
    out: list[DimProduct] = []
    for term in axis:
        terms: list[DimProduct] = [()]
        for factor in map(_find, term):
            parts = _parts(factor)
            if len(parts) == 1:
                terms = [done + parts[0] for done in terms]
            elif terms == [()]:
                terms = list(parts)
            else:
                _mark(factor, "sum inside a product")
                terms = [(*done, factor) for done in terms]
        out += terms
    return tuple(out)


def factors(axis: Axis) -> set[SymbolicDim]:
    """Collects the symbolic dimensions of an axis."""
    return set(itertools.chain.from_iterable(expanded(axis)))


def pin(axes: Sequence[Axis], why: str) -> None:
    """Says of all factors of some axes why their channels cannot be removed."""
    for axis in axes:
        for factor in factors(axis):
            _mark(factor, why)


def unify(x: Axis, y: Axis) -> None:
    """Makes two axes of one size the same dimension.

    Both are first cut until their terms end at the same positions: (a + b) against (c + d + e) of
    sizes 4 + 8 and 4 + 2 + 6 makes b = d + e. Then terms are unified pair by pair, as products.

    Such a pair is what an operation lines up: a sum of q, k and v, and the bias that is added to
    all three at once. The bias becomes three biases.
    """
    assert size(x) == size(y), f"axes of sizes {size(x)} and {size(y)} are not the same dimension"
    # Cutting x may refine a dimension that stands in y as well (and the other way round), which
    # moves the ends of both, so they are compared anew: of (a + b) against (c + a), of sizes 8 + 4
    # and 4 + 8, a is cut at 4 on the left, and so on the right. Every turn refines some dimension
    # into smaller ones, of which there are finitely many.
    while (x := expanded(x)) and _ends(x) != _ends(y := expanded(y)):
        if not (_cut(x, _ends(y)) and _cut(y, _ends(x))):
            return pin([x, y], "sums that do not line up")
    for left, right in zip(x, y, strict=True):
        _unify_products(left, right)
    return None


def pieces(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Consecutive pieces of an axis, of the given sizes."""
    ends = list(itertools.accumulate(sizes))
    if 0 in sizes or not _cut(axis, ends):
        pin([axis], "cut")
        return [new_axis(n, "cut") for n in sizes]
    terms = list(zip(expanded(axis), _ends(expanded(axis)), strict=True))
    starts = [0, *ends]
    return [
        tuple(term for term, at in terms if start < at <= end)
        for start, end in itertools.pairwise(starts)
    ]


def reshaped(axes: Axes, shape: Sequence[int]) -> Axes:
    """Axes of a value whose axes were `axes`, in another shape."""
    if 0 in shape:
        pin(axes, "empty")
        return new_axes(shape, "empty")
    out: list[Axis] = []
    for before, after in _blocks([size(axis) for axis in axes], shape):
        old, sizes = axes[before], shape[after]
        if len(old) == len(sizes) == 1:
            out += old
            continue
        got = _regrouped(old, sizes)
        if got is None:
            pin(old, "reshape")
        out += new_axes(sizes, "reshape") if got is None else got
    return tuple(out)


# ------------------------------------------------------------------------------- refinement


def _find(factor: SymbolicDim) -> SymbolicDim:
    """The factor that stands for `factor` by now; ways there are shortened as they are gone."""
    while factor.parent is not None:
        if factor.parent.parent is not None:
            factor.parent = factor.parent.parent
        factor = factor.parent
    return factor


def _parts(factor: SymbolicDim) -> Axis:
    """The axis that a factor has been refined into, all the way; factors of one channel go."""
    if factor.parts is None:
        return ((factor,),) if factor.size != 1 else UNIT
    factor.parts = expanded(factor.parts)
    return factor.parts


def _mark(factor: SymbolicDim, why: str) -> None:
    """Marks a factor and what it has been refined into, which are never marked less than it is."""
    if why not in factor.marks:
        factor.marks.add(why)
        for part in itertools.chain.from_iterable(factor.parts or ()):
            _mark(_find(part), why)


def _refine(factor: SymbolicDim, parts: Sequence[Sequence[int]]) -> None:
    """Replaces an unrefined factor by a sum of products of new ones, of the given sizes."""
    factor.parts = tuple(
        tuple(SymbolicDim(n, sorted(factor.marks)) for n in term) for term in parts
    )


def _merge(a: SymbolicDim, b: SymbolicDim) -> None:
    """Makes one dimension of two that have one size."""
    if a is b:
        return
    # The one that stays has parts if either has. What the other was refined into is still in use in
    # axes written down before, so the parts of both are unified, not dropped.
    if b.parts is None:
        a, b = b, a
    a.parent = b
    for why in a.marks - b.marks:
        _mark(b, why)
    if a.parts is not None and b.parts is not None:
        unify(a.parts, b.parts)


def _cut(axis: Axis, ends: Sequence[int]) -> bool:
    """Refines the first factors of terms so that terms end at `ends`; False if that cannot be done.

    An axis of one term 12 with ends at 4 and 12 becomes the sum 4 + 8.
    """
    axis = expanded(axis)
    for term, (start, end) in zip(axis, itertools.pairwise([0, *_ends(axis)]), strict=True):
        cuts = [start, *(at for at in ends if start < at < end), end]
        if len(cuts) == 2:
            continue
        # Positions of a product count row-major, so a cut falls between two channels of the first
        # factor, or no expression has it: (4, 6) can be cut at 12, and not at 10.
        sizes, rest = [b - a for a, b in itertools.pairwise(cuts)], _product(term[1:])
        if any(n % rest for n in sizes):
            return False
        _refine(term[0], [[n // rest] for n in sizes])
        return _cut(axis, ends)  # another term may begin with the same factor
    return True


def _unify_products(left: DimProduct, right: DimProduct) -> None:
    """Unifies two products of one size from the left: (12, 2) against (3, 4, 2) makes 12 = 3 · 4.

    What is left when sizes do not divide, or a sum stands in the way, is pinned: it is one
    dimension in truth, and no expression says which channels of one are those of the other.
    """
    todo, other = list(left), list(right)
    while (a := _first(todo)) and (b := _first(other)):
        if a.size == b.size:
            _merge(a, b)
            todo.pop(0)
            other.pop(0)
            continue
        # The first factor varies slowest, so the smaller one is the leading part of the larger.
        small, large = sorted((a, b), key=lambda factor: factor.size)
        if large.size % small.size or large.parts is not None:
            break
        _refine(large, [[small.size, large.size // small.size]])
    for rest in (todo, other):
        pin([(tuple(rest),)], "products that do not line up")


def _first(term: list[SymbolicDim]) -> SymbolicDim | None:
    """The first factor of a product, which is opened in place; None if nothing is left.

    A factor that was refined into a product is replaced by it, and its first factor is opened in
    turn; one that was refined into a sum is not, as a product has no sums in it.
    """
    while term:
        factor = _find(term[0])
        parts = _parts(factor)
        if parts == ((factor,),) or len(parts) > 1:
            return factor
        term[:1] = parts[0]
    return None


# ----------------------------------------------------------------------------------- reshape


def _blocks(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """The shortest runs of old and new axes that have the same number of positions.

    Axes of size 1 stand alone, so that they hold no neighbours together.
    """
    i = j = 0
    while i < len(old) or j < len(new):
        start, other, a, b = i, j, 1, 1
        if i < len(old) and old[i] == 1:
            i += 1
            continue
        if j < len(new) and new[j] == 1:
            j += 1
            yield slice(i, i), slice(other, j)
            continue
        while a != b or a == 1:
            if a <= b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        yield slice(start, i), slice(other, j)


def _regrouped(axes: Axes, sizes: Sequence[int]) -> list[Axis] | None:
    """Axes of the given sizes with the positions of `axes`; None if no expression has them.

    Joining axes multiplies them, and only the first, which varies slowest, may be a sum:
    (a + b) r = a r + b r, while r (a + b) is no sum of products.
    """
    if not axes:
        return [UNIT for _ in sizes]
    first, *rest = [expanded(axis) for axis in axes]
    if any(len(axis) > 1 for axis in rest):
        return None
    trailing = tuple(itertools.chain.from_iterable(axis[0] for axis in rest))
    if len(first) == 1:
        return _grouped((*first[0], *trailing), sizes)
    return _grouped_sum([term + trailing for term in first], sizes)


def _grouped(term: DimProduct, sizes: Sequence[int]) -> list[Axis] | None:
    """Cuts a product in consecutive ones of the given sizes: 4 · 6 for (2, 12) is 2, 2 · 6.

    None where a size falls inside of a factor that it does not divide, as 4 · 6 for (3, 8).
    """
    todo, out = list(term), []
    for need in sizes:
        product: list[SymbolicDim] = []
        while need > 1:
            factor = _first(todo)
            if factor is None:
                return None
            if need % factor.size == 0:
                product.append(todo.pop(0))
                need //= factor.size
            elif factor.size % need == 0 and factor.parts is None:
                _refine(factor, [[need, factor.size // need]])
            else:
                return None
        out.append((tuple(product),))
    return out


def _grouped_sum(terms: Sequence[DimProduct], sizes: Sequence[int]) -> list[Axis] | None:
    """Reshapes a sum, a·r + b·r as (a + b, r): every term must end in the same product.

    The first new axis takes the sum. Its positions are those of the terms one after the other only
    if no term is cut in the middle of r positions, so r divides the size of every term. Fused
    kernels q, k, v of heads are reshaped: (4·64 + 2·64 + 2·64) to (4 + 2 + 2, 64), where the 64 of
    all three becomes one dimension.
    """
    inner = math.prod(sizes[1:])
    if any(_product(term) % inner for term in terms):
        return None
    halves = [_grouped(term, [_product(term) // inner, inner]) for term in terms]
    if any(half is None for half in halves):
        return None
    # The reshape lines the ends of all terms up, so they are one dimension from now on.
    outer, (tail, *others) = zip(*[half for half in halves if half is not None], strict=True)
    for other in others:
        unify(tail, other)
    rest = _grouped(tail[0], sizes[1:])
    return None if rest is None else [tuple(axis[0] for axis in outer), *rest]


def _product(term: DimProduct) -> int:
    return math.prod(factor.size for factor in term)


def _ends(axis: Axis) -> list[int]:
    """The position at which each term of an axis ends, as [4, 6, 8] of 4 + 2 + 2."""
    return list(itertools.accumulate(_product(term) for term in axis))
