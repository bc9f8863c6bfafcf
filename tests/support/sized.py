"""The zoo in other sizes, those that meshes of 8 devices divide.

The zoo's own sizes are all different and mostly prime, so that an axis taken for another one
shows; hardly any can be sharded. Here widths are still different from one another.
"""

import functools
import importlib.util
from unittest import mock

from tests.support import zoo
from tests.support.zoo import _model

SIZES = {"WIDTH": 24, "FFN": 16, "VOCAB": 32, "HEADS": 4, "HEAD": 6}


@functools.cache
def model(name):
    """The model of that name, with `SIZES`."""
    builders = _builders(name.partition("_")[0])
    params, inputs, apply = builders[name]()
    tags = zoo.tags_of(name)
    return zoo.Model(
        name=name,
        params=params,
        inputs=inputs,
        apply=apply,
        kind=name.partition("_")[0],
        tags=tags,
        differentiable="differentiable" in tags,
    )


@functools.cache
def _builders(kind):
    """A second copy of the zoo's module, which has taken its sizes from elsewhere."""
    spec = importlib.util.find_spec(f"tests.support.zoo._{kind}")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.multiple(_model, **SIZES):
        spec.loader.exec_module(module)
    return {name: value for name, value in vars(module).items() if hasattr(value, "tags")}
