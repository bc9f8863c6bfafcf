"""Functions without some channels, by slow and obvious ways.

    plan = {group: kept channels}
    masked(found, plan, params)        the same shapes, zeros in the channels that are not kept
    compacted(found, plan, params)     smaller arrays
    evaluated(found, plan, traced)     the traced equations on smaller arrays

A function that takes all sizes from its arrays is its own compact form, `fn(compacted(..), x)`, and
needs none of this; `evaluated` does for any function what its author would do with the sizes.
"""

import jax
import jax.numpy as jnp
import numpy as np

import unitscale_jax as us
from unitscale_jax.trace.rewrite._rewrite import Rewriter


def positions(axis, keep):
    """Where the kept channels are in a dense axis; `keep` maps factors to channels."""
    out, offset = [], 0
    for term in axis:
        at, size = np.zeros(1, int), 1
        for factor in term:
            kept = keep.get(factor, np.arange(factor.size))
            at, size = (at[:, None] * factor.size + kept).reshape(-1), size * factor.size
        out.append(at + offset)
        offset += size
    return np.concatenate(out)


def size(axis, keep):
    return len(positions(axis, keep))


def by_factor(plan):
    return {group.factor: np.asarray(kept) for group, kept in plan.items()}


def over_axes(change, found, plan, params):
    keep = by_factor(plan)

    def changed(path, x):
        for k, axis in enumerate(found.axes(path)):
            x = change(x, k, positions(axis, keep))
        return x

    return us.tree.map_named(changed, params)


def compacted(found, plan, params):
    return over_axes(lambda x, k, at: jnp.take(x, at, axis=k), found, plan, params)


def masked(found, plan, params):
    def zeroed(x, k, at):
        kept = np.isin(np.arange(x.shape[k]), at)
        return jnp.where(kept.reshape([-1 if j == k else 1 for j in range(x.ndim)]), x, 0)

    return over_axes(zeroed, found, plan, params)


def evaluated(found, plan, traced):
    """A function of the leaves of all arguments; it returns a list of arrays."""
    keep, rules = by_factor(plan), {}
    shape = lambda axes: tuple(size(axis, keep) for axis in axes)

    def rule(*names):
        def put(changed):
            def apply(site, operands):
                ins, outs = found.at(site.place)
                return site.bind(operands, **changed(site, operands, ins, outs))

            rules.update(dict.fromkeys(names, apply))

        return put

    rule("broadcast_in_dim", "iota")(lambda site, xs, ins, outs: {"shape": shape(outs[0])})
    rule("reshape")(lambda site, xs, ins, outs: {"new_sizes": shape(outs[0])})
    rule("dynamic_slice")(lambda site, xs, ins, outs: {"slice_sizes": shape(outs[0])})

    @rule("split")
    def _(site, xs, ins, outs):
        return {"sizes": tuple(size(out[site.eqn.params["axis"]], keep) for out in outs)}

    @rule("slice")
    def _(site, xs, ins, outs):
        at = [positions(axis, keep) for axis in ins[0]]
        moved = lambda key: tuple(
            int((where < n).sum()) for where, n in zip(at, site.eqn.params[key], strict=True)
        )
        return {key: moved(key) for key in ("start_indices", "limit_indices")}

    @rule("gather")
    def _(site, xs, ins, outs):
        sizes = zip(
            site.eqn.params["slice_sizes"], site.eqn.invars[0].aval.shape, ins[0], strict=True
        )
        return {"slice_sizes": tuple(size(a, keep) if n == all_ else n for n, all_, a in sizes)}

    @rule("conv_general_dilated")
    def _(site, xs, ins, outs):
        dims = site.eqn.params["dimension_numbers"]
        channels = xs[0].shape[dims.lhs_spec[1]], xs[1].shape[dims.rhs_spec[1]]
        return {"feature_group_count": channels[0] // channels[1]}

    rewriter = Rewriter(rules, default=lambda site, operands: site.bind(operands))
    closed = traced.closed
    return lambda *leaves: rewriter(closed.jaxpr, closed.consts, leaves)


def some_channels(groups, seed=0):
    """A plan that keeps some channels of each group, another number in each."""
    rng = np.random.default_rng(seed)
    draw = lambda n: np.sort(rng.permutation(n)[: rng.integers(1, n)])
    return {group: draw(group.size) for group in groups}


def distance(found, plan, traced, params, *inputs):
    """max |masked - compact| over max |masked|, and the latter; one compilation."""

    def both(params, *inputs):
        whole = traced(masked(found, plan, params), *inputs)
        small = compacted(found, plan, params)
        return jax.tree.leaves(whole), evaluated(found, plan, traced)(
            *jax.tree.leaves((small, *inputs))
        )

    options = {"xla_backend_optimization_level": 0}
    whole, small = jax.jit(both, compiler_options=options)(params, *inputs)
    scale = max(float(jnp.abs(y).max()) for y in whole)
    delta = max(float(jnp.abs(y - z).max()) for y, z in zip(whole, small, strict=True))
    return delta / max(scale, 1e-6), scale
