"""Features of a model that nobody edited: values beside its parameters, found by their names.

    features(apply, {"hidden": "block_3/mlp/down/kernel:output"})(params, x) -> y, {"hidden": ...}

A feature is named by the parameter that makes it ("output") or reads it ("input"), since parameters
are what Linen, NNX and plain JAX have in common. Of a kernel it is what its product makes or reads,
of a table what is looked up, of a bias or a gain what is added to or multiplied (in Flax's
normalizations the gain meets the inverse deviation first: name the bias). Inside a scan over layers
a feature comes out stacked. What is not named is not kept, and what only an unused feature
needs is not computed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from unitscale_jax import rules, tree as trees
from unitscale_jax.errors import check_type
from unitscale_jax.loss import around
from unitscale_jax.trace.params import Conv, Dot, Meeting, Product, above, meetings, product_of
from unitscale_jax.trace.program import Place, Site, trace_call
from unitscale_jax.trace.rewrite import captured
from unitscale_jax.typing import Apply


def features(
    apply: Apply, named: Mapping[str, str]
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """Evaluates a model, and returns values from inside it by the names of parameters.

    Args:
        apply: `apply(params, *inputs)`; any function of parameters.
        named: Feature -> "path:output" or "path:input", where the path is that of a parameter, or a
            glob that matches one ("**/block_3/**/down/kernel"). The parameter must be used once.

    Returns:
        A function of the arguments of `apply` that returns its result and a dict of features. The
        result is that of `apply`, by the same equations. A product's input has the summed axes
        last, its output the axes of the input that were not summed, then those of the kernel
        (before a bias); a convolution's have the channels last. Each scan around adds an axis in
        front, the outer one first.

    Raises:
        ValueError: A name without ":output" or ":input"; on a call, a path that matches no
            parameter or several, a parameter that is used nowhere, several times, or where nothing
            can be taken out (inside of a while loop, a custom derivative, `shard_map`).

    Derivatives are those of `apply`, and features have theirs.

    Example:
        >>> mlp = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
        >>> params = {"up": jnp.eye(2), "down": jnp.ones((2, 1))}
        >>> y, found = features(mlp, {"hidden": "down:input"})(params, jnp.zeros((3, 2)))
        >>> y.shape, found["hidden"].shape
        ((3, 1), (3, 2))
    """
    check_type("named", named, Mapping, "addresses by name")
    wanted = {feature: _parsed(feature, address) for feature, address in named.items()}

    @around(apply, "features")
    def features_fn(
        params: Any, /, *inputs: Any, **options: Any
    ) -> tuple[Any, dict[str, jax.Array]]:
        met = meetings(trace_call(apply, params, *inputs, **options), params)
        names = trees.names(params)
        found = {feature: _found(feature, wish, names, met) for feature, wish in wanted.items()}
        at: dict[Place, list[str]] = {}
        for feature, meeting in found.items():
            at.setdefault(meeting.site.place, []).append(feature)

        def pick(site: Site, operands: list[Any], results: list[Any]) -> Any:
            here = at.get(site.place, ())
            return {f: _value(found[f], wanted[f], operands, results) for f in here} or None

        y, captures = captured(apply, pick)(params, *inputs, **options)
        values = {feature: x for capture in captures for feature, x in capture.value.items()}
        _check_taken(found, values)
        return y, {feature: values[feature] for feature in named}

    return features_fn


class _Wish(NamedTuple):
    """The pattern of a parameter, and whether its output or its input is wanted."""

    path: str
    side: str


def _parsed(feature: str, address: str) -> _Wish:
    path, _, side = address.rpartition(":")
    if not path or side not in ("output", "input"):
        raise ValueError(
            f"feature {feature!r} is {address!r}; expected the path of a parameter and what of it, "
            "'path:output' or 'path:input'."
        )
    return _Wish(path, side)


def _telling(found: Sequence[Meeting]) -> list[Meeting]:
    """Products and lookups if there are any: what else is done to a kernel is not its use."""
    active = [meeting for meeting in found if meeting.active]
    return [meeting for meeting in active if meeting.kind in ("product", "lookup")] or active


def _joined_with(meeting: Meeting, every: Mapping[str, Sequence[Meeting]]) -> list[str]:
    """The parameters that are a part of the same operand."""
    place = meeting.site.place, meeting.side
    each = [(name, m) for name, found in every.items() for m in found if m.whole]
    others = [(name, m) for name, m in each if name != meeting.held.name]
    return [name for name, m in others if (m.site.place, m.side) == place]


def _found(
    feature: str, wish: _Wish, names: Sequence[str], every: Mapping[str, Sequence[Meeting]]
) -> Meeting:
    matched = [name for name in names if rules.matches(wish.path, name)]
    if len(matched) != 1:
        rules.match([(wish.path, feature)], names)  # if none: an error that lists the closest
        raise ValueError(
            f"feature {feature!r}: {wish.path!r} matches {len(matched)} parameters, "
            f"{', '.join(map(repr, matched[:3]))}, ..; expected one. Write out its path."
        )
    met = _telling(every.get(matched[0], []))
    if len(met) != 1:
        kinds = ", ".join(meeting.site.name for meeting in met)
        times = f"{len(met)} times ({kinds})" if met else "nowhere"
        raise ValueError(
            f"feature {feature!r}: the parameter {matched[0]!r} meets a value {times}; expected "
            "once. Name a parameter next to it, such as the bias of its layer or the next kernel."
        )
    joined = _joined_with(met[0], every)
    if joined:
        raise ValueError(
            f"feature {feature!r}: {matched[0]!r} meets a value joined with {', '.join(joined)}, "
            "so what it makes is a part of a larger result. Name a parameter next to it."
        )
    if met[0].kind == "lookup" and wish.side == "input":
        raise ValueError(
            f"feature {feature!r}: {matched[0]!r} is looked up, and its input are indices. Ask for "
            f"'{matched[0]}:output'."
        )
    return met[0]


def _value(meeting: Meeting, wish: _Wish, operands: list[Any], results: list[Any]) -> jax.Array:
    """The input or the output of a meeting, in the order of axes that `features` promises."""
    product, other = product_of(meeting.site), 1 - meeting.side
    if wish.side == "output":
        return _output(product, meeting.side, results[0])
    return _input(product, other, operands[other])


def _output(product: Product | None, side: int, x: jax.Array) -> jax.Array:
    if isinstance(product, Dot):
        batch, mine = len(product.numbers[1][side]), len(product.free(side))
        if side == 0:  # the kernel stands on the left, and its axes before those of the input
            order = [*range(batch), *range(batch + mine, x.ndim), *range(batch, batch + mine)]
            return x.transpose(order)
    if isinstance(product, Conv):
        batch, channel, *window = product.numbers.out_spec
        return x.transpose(batch, *window, channel)
    return x


def _input(product: Product | None, side: int, x: jax.Array) -> jax.Array:
    if isinstance(product, Dot):
        return x.transpose(
            *product.numbers[1][side], *product.free(side), *product.contracted(side)
        )
    if isinstance(product, Conv):
        batch, channel, *window = product.numbers.lhs_spec
        return x.transpose(batch, *window, channel)
    return x


def _check_taken(found: Mapping[str, Meeting], values: Mapping[str, Any]) -> None:
    for feature, meeting in found.items():
        if feature not in values:
            calls = ", ".join(site.name for site in above(meeting.site))
            raise ValueError(
                f"feature {feature!r}: its {meeting.site.name} is inside of {calls}, where nothing "
                "can be taken out. Name a parameter outside; write a while loop as a scan; take "
                "features of a model before it is quantized, quantized(features(apply, ..), ..)."
            )
