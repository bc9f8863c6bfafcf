"""The same function with the backward factors of its forward pass: what true gradients are of."""

import jax
import jax.numpy as jnp
import numpy as np

import unitscale_jax as us
from unitscale_jax.fwd_bwd import scale


def true_backward(fn):
    """`fn` with every scale's backward factor made its forward factor."""
    static = lambda site, xs: [scale(xs[0], fwd=site.eqn.params["fwd"], bwd=site.eqn.params["fwd"])]
    data = lambda site, xs: [scale(xs[0], fwd=xs[1], bwd=xs[1])]
    return us.trace.rewritten(fn, {"unit_scale": static, "unit_scale_by": data})


def errors_of_constants(fn, params, *args):
    """For each leaf the largest |gradient - constant * true gradient|, relative to its largest."""
    both = lambda p, *xs: (
        jax.grad(fn, allow_int=True)(p, *xs),
        jax.grad(true_backward(fn), allow_int=True)(p, *xs),
    )
    found, true = jax.jit(both)(params, *args)
    constants = us.unit.constants(fn, params, *args)
    leaves = zip(*map(us.tree.named_leaves, (found, true, constants)), strict=True)
    errors = {}
    for name in (name for name, *_ in leaves):
        g, t, c = (us.tree.named_leaves(tree)[name] for tree in (found, true, constants))
        if g.dtype == jax.dtypes.float0 or not g.size:
            continue
        size = float(jnp.abs(g).max())
        c = np.asarray(c).reshape(np.shape(c) + (1,) * (g.ndim - np.ndim(c)))
        errors[name] = float(jnp.abs(g - c * t).max()) / size if size else 0.0
    return errors


def rms(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))
