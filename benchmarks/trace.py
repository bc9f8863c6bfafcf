"""Claim: a 24-layer Flax model is traced and rewritten in at most 1.5 times the time of tracing it.

A pre-norm transformer in Flax Linen of 4, 12 and 24 layers, forward and with its gradient. `plain`
traces it as it is; `products` casts the operands of its matrix products; `every` replaces each
equation by itself, the most that a rewrite can have to do; `autocast` plans dtypes as well. Each
run traces a function that JAX has not seen, since JAX remembers traces by the function's identity.
The claim is about the model; what its gradient takes is reported: the casts are differentiated too.

A second claim is of 12 and 24 unrolled layers of plain JAX, which have no modules to build: tracing
under `autocast` takes at most 2 times the function itself (2.2 its gradient), `quantized` 4 (3.5),
and with gradients quantized as well 1.2 times `quantized` (1.7). It compares CPU time of this
process, the least of alternating runs.
"""

import functools
import time

import harness
import jax
import jax.numpy as jnp
import linen_lm

import unitscale_jax as us
from unitscale_jax.trace.program import trace_call
from unitscale_jax.trace.rewrite import Rewriter, rewritten


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
        staged = trace_call(fn, *args)
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

W8A8 = us.DotSpec(w=us.QSpec(), x=us.QSpec())
W8A8G8 = us.DotSpec(w=us.QSpec(), x=us.QSpec(), g=us.QSpec())
TECHNIQUES = {
    "plain": lambda fn: fn,
    "autocast": us.autocast,
    "quantized": lambda fn: us.quantized(fn, {"*/w_?": W8A8}),
    "quantized with g": lambda fn: us.quantized(fn, {"*/w_?": W8A8G8}),
}
LIMITS = {  # beside what each is compared with: of the function, of its gradient
    "autocast": ("plain", 2.0, 2.2),
    "quantized": ("plain", 4.0, 3.5),
    "quantized with g": ("quantized", 1.2, 1.7),
}


def unrolled(layers, width):
    """A transformer in plain JAX, a list of layers, and its abstract arguments."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    layer = {f"w_{n}": array(width, width) for n in "qkvo"} | {"gain": array(2, width)}
    layer |= {"w_a": array(width, 4 * width), "w_b": array(4 * width, width)}
    return _plain, ([layer] * layers, array(2, 16, width))


def _plain(params, x):
    for layer in params:
        h = _norm(x, layer["gain"][0])
        q, k, v = ((h @ layer[f"w_{n}"]).reshape(*h.shape[:-1], 4, -1) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5)
        x = x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(h.shape) @ layer["w_o"]
        x = x + jax.nn.gelu(_norm(x, layer["gain"][1]) @ layer["w_a"]) @ layer["w_b"]
    return x


def _norm(x, gain):
    centred = x - jnp.mean(x, -1, keepdims=True)
    return gain * centred * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-6)


def main():
    options = harness.arguments(__file__, __doc__)
    small = options.smallest
    for layers in (1,) if small else (4, 12, 24):
        apply, loss, args = model(layers, *((8, 8) if small else (64, 32)))
        measure(f"{layers} layers, forward", lambda form, f=apply: form(f), args, options.runs)
        grad = lambda form, f=loss: jax.grad(form(f))
        measure(f"{layers} layers, gradient", grad, args, options.runs, claimed=False)
    for layers in (1,) if small else (12, 24):
        fn, args = unrolled(layers, 8 if small else 64)
        loss = lambda form, fn=fn: jax.grad(lambda p, x: jnp.sum(form(fn)(p, x) ** 2))
        forward = lambda form, fn=fn: form(fn)
        claim_plain(f"{layers} plain layers, forward", forward, args, options, 0)
        claim_plain(f"{layers} plain layers, gradient", loss, args, options, 1)


def claim_plain(what, build, args, options, limit):
    """CPU seconds of tracing each technique's form of a function, against one of the limits."""
    least = {}
    for run in range(options.runs + 1):
        for name, form in TECHNIQUES.items():
            fn = _unseen(build(form))
            began = time.process_time()
            fn.trace(*args)
            taken = time.process_time() - began
            if run:  # the first one fills the caches of JAX
                least[name] = min(least.get(name, taken), taken)
    for name, (other, *limits) in LIMITS.items():
        share, most = harness.ratio(least[name], least[other]), limits[limit]
        text = f"{what}, {name}: traced in <= {most}x the CPU time of {other}"
        supported = None if options.smallest else share <= most  # one layer is no model
        harness.claim(text, supported, ratio=share, cpu=round(least[name], 5))


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
