"""Along which axis N:M groups run: that of the input channels, found by following the function.

Sparse kernels skip terms of a sum, so N of every M neighbours that are summed up together stay: for
a kernel (in, out) groups run along `in`, for that of a convolution along its input features.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

from unitscale_jax.errors import check_type
from unitscale_jax.prune._patterns import NofM
from unitscale_jax.prune._spec import SparsitySpec, selected
from unitscale_jax.trace.params import Meeting, meetings
from unitscale_jax.trace.program import trace_call


def resolve_axes(
    spec: SparsitySpec, fn: Callable[..., Any], params: Any, /, *inputs: Any, **kwargs: Any
) -> SparsitySpec:
    """Fills in the axis of every `NofM` that leaves it open.

    Args:
        spec: What to prune.
        fn: A function whose first argument is the parameters.
        params: Arrays, or their shapes and dtypes; nothing is computed.
        *inputs: The rest of the arguments of `fn`, likewise.
        **kwargs: Keywords of `fn`.

    Returns:
        The spec, its patterns given parameter by parameter. The axis, counted from the end, is the
        one that `fn` contracts the parameter over: of several (heads and their features) the last,
        of a convolution the input features. Other patterns, and axes that are given, stay.

    Raises:
        ValueError: A parameter with an open axis meets no product, or meets two over different
            axes.

    Law: resolving again changes nothing.

    Example:
        >>> fn = lambda params, x: x @ params["in"] @ params["out"].T
        >>> params = {"in": jnp.ones((4, 8)), "out": jnp.ones((4, 8))}
        >>> spec = resolve_axes(SparsitySpec(patterns=NofM(2, 4)), fn, params, jnp.ones((1, 4)))
        >>> {name: pattern.axis for name, pattern in spec.patterns.items()}
        {'in': -2, 'out': -1}
    """
    check_type("spec", spec, SparsitySpec, "a us.prune.SparsitySpec")
    chosen = selected(spec, params)
    if not any(is_open(pattern) for pattern in chosen.values()):
        return spec
    staged = trace_call(fn, params, *inputs, **kwargs)
    met = meetings(staged, params)
    filled: dict[Any, Any] = dict(chosen)
    for name, pattern in chosen.items():
        if is_open(pattern):
            filled[name] = replace(pattern, axis=_axis(name, met.get(name, [])))
    return replace(spec, patterns=filled)


def is_open(pattern: Any) -> TypeGuard[NofM]:
    """True if a pattern is an `NofM` that does not say along which axis."""
    return isinstance(pattern, NofM) and pattern.axis is None


def _axis(name: str, met: Sequence[Meeting]) -> int:
    products = [meeting for meeting in met if meeting.kind == "product"]
    if not products:
        raise ValueError(
            f"{name} meets no product in this function, so no axis of it is summed over. Give "
            "NofM(axis=...), or leave it out: name the parameters to prune by patterns, "
            "{'**/kernel': NofM()}."
        )
    direct = [meeting for meeting in products if meeting.whole] or products
    axes = {meeting.channels: meeting for meeting in direct}
    if len(axes) > 1 or not all(meeting.clear and meeting.channels for meeting in direct):
        listed = "; ".join(f"{m.site.name} over {tuple(sorted(m.channels))}" for m in direct)
        raise ValueError(
            f"{name} is used over axes that are not one set of its own ({listed}). Say which by "
            "NofM(axis=...)."
        )
    return max(next(iter(axes)))
