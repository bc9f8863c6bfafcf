"""Claim: a 24-layer Flax model is traced and rewritten in at most 1.5 times the time of tracing it.

A pre-norm transformer in Flax Linen of 4, 12 and 24 layers, forward and with its gradient. `plain`
traces it as it is; `products` casts the operands of its matrix products; `every` replaces each
equation by itself, the most that a rewrite can have to do; `autocast` plans dtypes as well. Each
run traces a function that JAX has not seen, since JAX remembers traces by the function's identity.
The claim is about the model; what its gradient takes is reported: the casts are differentiated too.
"""

import os

os.environ["BENCHMARK"] = __file__

import functools

import harness
import jax
import jax.numpy as jnp
import linen_lm

import unitscale_jax as us
from unitscale_jax.trace import Rewriter, rewritten, stage


def model(layers, width, time):
    """A forward pass and a loss, with abstract arguments: tracing and compiling need no numbers."""
    module = linen_lm.Language(layers, width)
    tokens = jax.ShapeDtypeStruct((2, time), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens)
    return module.apply, linen_lm.loss_of(module.apply), (params, tokens)


def every(fn):
    """`fn` with every equation replaced by itself, and so every body built anew."""

    @functools.wraps(fn)
    def replayed_fn(*args):
        staged = stage(fn, *args)
        replay = Rewriter({}, default=lambda site, operands: site.bind(operands))
        return staged.finish(replay(staged.closed.jaxpr, staged.closed.consts, staged.operands))

    return replayed_fn


def products(fn):
    """`fn` with its matrix products in bfloat16."""

    def rule(site, operands):
        low = [x.astype(jnp.bfloat16) for x in operands]
        return site.bind(low, preferred_element_type=jnp.float32)

    return rewritten(fn, {"dot_general": rule})


FORMS = {
    "plain": lambda fn: fn,
    "products": products,
    "every": every,
    "autocast": us.autocast,
}


def main():
    options = harness.arguments(__doc__)
    small = options.smallest
    for layers in (1,) if small else (4, 12, 24):
        apply, loss, args = model(layers, *((8, 8) if small else (64, 32)))
        measure(f"{layers} layers, forward", lambda form, f=apply: form(f), args, options.runs)
        grad = lambda form, f=loss: jax.grad(form(f))
        measure(f"{layers} layers, gradient", grad, args, options.runs, claimed=False)


def measure(what, build, args, runs, claimed=True):
    """Tracing, then tracing and compiling, of each form of a function, built anew in each run."""
    fresh = lambda form: _unseen(build(form))
    thunks = lambda run: {name: lambda f=form: run(fresh(f)) for name, form in FORMS.items()}
    traced = seconds(thunks(lambda fn: fn.trace(*args)), runs)
    compiled = seconds(thunks(lambda fn: fn.lower(*args).compile()), min(runs, 3))
    for name in FORMS.keys() - {"plain"}:
        share = harness.ratio(traced[name]["median"], traced["plain"]["median"])
        bound = " in <= 1.5x the time of tracing" if claimed else ""
        text = f"{what}, {name}: traced and rewritten{bound}"
        harness.claim(text, share <= 1.5 if claimed else None, ratio=share)
    harness.claim(what, None, trace=traced, trace_and_compile=compiled)


def _unseen(fn):
    return jax.jit(lambda *args: fn(*args))


def seconds(thunks, runs):
    """`harness.seconds` of what returns no arrays."""
    return harness.seconds({n: lambda t=t: [t(), None][1] for n, t in thunks.items()}, runs)


if __name__ == "__main__":
    main()
