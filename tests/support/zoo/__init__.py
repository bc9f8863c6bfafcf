"""The law zoo: small models on which every op-level transform runs its laws.

    @pytest.mark.parametrize("name", zoo.EACH)
    def test_identity(name):
        model = zoo.model(name)
        out = transformed(model.apply)(model.params, *model.inputs)

`zoo.named(having=("attention",), without=("scan",))` picks by what the models are made of, and
`zoo.COVER` are a few that have all of it among them, for laws that take seconds to check; of
`zoo.EACH`, which are all, the others are slow, so that `-m "not slow"` leaves the few. Linen,
NNX and plain JAX build the same kinds of layers, so what names parameters is seen with all three
ways of naming; reading the models is also the quickest way to see what the library supports.
"""

import functools
import os

import pytest

from tests.support.zoo import _linen, _nnx, _plain
from tests.support.zoo._model import Model

_BUILDERS = {
    name: value
    for module in (_plain, _linen, _nnx)
    for name, value in vars(module).items()
    if hasattr(value, "tags")
}


@functools.cache
def model(name: str) -> Model:
    """The model of that name, built at the first call."""
    return build(name)


def build(name: str) -> Model:
    """The model of that name, built anew, always with the same parameters."""
    params, inputs, apply = _BUILDERS[name]()
    tags = tags_of(name)
    return Model(
        name=name,
        params=params,
        inputs=inputs,
        apply=apply,
        kind=name.partition("_")[0],
        tags=tags,
        differentiable="differentiable" in tags,
    )


def tags_of(name: str) -> frozenset[str]:
    """What a model is made of, its kind, and "differentiable" if it is; builds nothing."""
    tags = _BUILDERS[name].tags | {name.partition("_")[0]}
    return tags if "while" in tags else tags | {"differentiable"}


def named(*, having: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> list[str]:
    """Names of the models that have all of some tags and none of others; builds nothing."""
    unknown = {*having, *without}.difference(*map(tags_of, _BUILDERS))
    assert not unknown, f"no model has the tags {sorted(unknown)}"
    return [
        name
        for name in _BUILDERS
        if tags_of(name).issuperset(having) and tags_of(name).isdisjoint(without)
    ]


def _covering(names: list[str]) -> list[str]:
    """A few models that have all tags: each time the one with most of those that lack."""
    lacking, chosen = set().union(*map(tags_of, names)), []
    while lacking:
        chosen.append(max(names, key=lambda name: len(lacking & tags_of(name))))
        lacking -= tags_of(chosen[-1])
    return [name for name in names if name in chosen]


NAMES = named()
# For laws that take seconds a model; WHOLE_ZOO=1 runs them on all.
COVER = NAMES if os.environ.get("WHOLE_ZOO") else _covering(NAMES)
# For laws that are cheaper.
EACH = [n if n in COVER else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]

# Parameters without effect: what is added to all keys moves all scores of a query alike, which
# softmax does not see. With rotary embedding it would not be so.
INERT = r"(^|/)(attention|self|cross)/key/bias$"

__all__ = ["COVER", "EACH", "INERT", "NAMES", "Model", "build", "model", "named", "tags_of"]
