"""Claims: int8 training and serving that agree to the bit, no slower than the peers'.

1. Training forward and serving are equal in every bit, in float32 and bfloat16, unrolled and in a
   scan, on one device and tensor-parallel on eight.
2. A training step takes at most 0.9 of the time of qwix's and of AQT's: with a backward pass in
   floating point, and with one in integers, which also takes at most 0.7 of a float step's.
3. Serving int8 takes no longer than float32, and a quarter of the bytes; one row likewise.
4. In a scan over layers the residuals of int8 training take at most 0.55 of float32's.
5. Int8 keys and values take (d + 4) / 4 d of float32's bytes, and generation stays close.

    pip install -e '.[bench]'       for the peers; without them they are left out
"""

import functools
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import unitscale_jax as us

try:
    import qwix
except ImportError:
    qwix = None
try:
    from aqt.jax.v2 import config as aqt_config
    from aqt.jax.v2.flax import aqt_flax
except ImportError:
    aqt_config = aqt_flax = None

W8A8 = us.DotSpec(w=us.QSpec(), x=us.QSpec())
W8A8G8 = us.DotSpec(w=us.QSpec(), x=us.QSpec(), g=us.QSpec())
RULES = {"**/kernel": W8A8}


class Dense(nn.Module):
    """Four dense layers, wide - 2 wide - 2 wide - 2 wide - wide."""

    width: int
    dtype: jnp.dtype
    dot_general_cls: type | None = None

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, dtype=self.dtype, dot_general_cls=self.dot_general_cls)
        for _ in range(3):
            x = nn.relu(dense(2 * self.width)(x))
        return dense(self.width)(x)


def ours(model, params, x, integers=False):
    apply = lambda params, x: model.apply({"params": params}, x)
    rules = {"**/kernel": W8A8G8} if integers else RULES
    served = us.quantize(params, us.quant.resolve(rules, apply, params, x))
    return us.quantized(apply, rules), params, us.quantized(apply), served


def qwixs(model, params, x, integers=False):
    rule = dict(module_path=".*", weight_qtype=jnp.int8, act_qtype=jnp.int8)
    backward = dict(bwd_qtype=jnp.int8) if integers else {}
    train = qwix.quantize_model(model, qwix.QtProvider([qwix.QtRule(**rule, **backward)]))
    serve = qwix.quantize_model(model, qwix.PtqProvider([qwix.QuantizationRule(**rule)]))
    abstract = jax.eval_shape(serve.init, jax.random.key(0), x)["params"]
    served = qwix.quantize_params(params, abstract)
    run = lambda module: lambda params, x: module.apply({"params": params}, x)
    return run(train), params, run(serve), served


def aqts(model, params, x, integers=False):
    backward = 8 if integers else None
    cfg = aqt_config.config_v4(fwd_bits=8, dlhs_bits=backward, drhs_bits=backward)
    mode, freeze = aqt_flax.QuantMode, aqt_flax.FreezerMode

    def with_mode(quant_mode):
        frozen = dict(rhs_quant_mode=quant_mode, rhs_freeze_mode=freeze.CALIBRATION_AND_VALUE)
        cls = functools.partial(aqt_flax.AqtDotGeneral, cfg, **frozen)
        return model.clone(dot_general_cls=cls)

    train, convert, serve = (with_mode(m) for m in (mode.TRAIN, mode.CONVERT, mode.SERVE))
    rngs = {"params": jax.random.key(0)}  # asked for, though nothing is drawn
    _, frozen = convert.apply({"params": params}, x, rngs=rngs, mutable=True)
    # The float kernels stay in the tree that AQT serves, until dropped by hand.
    served = {"params": params, **{k: v for k, v in frozen.items() if k != "params"}}
    run_train = lambda params, x: train.apply({"params": params}, x, rngs=rngs)
    return run_train, params, lambda tree, x: serve.apply(tree, x, rngs=rngs), served


def floats(model, params, x, integers=False):
    del x, integers
    apply = lambda params, x: model.apply({"params": params}, x)
    return apply, params, apply, params


def against_peers(options, dtype):
    width, rows = (32, 16) if options.smallest else (512, 256)
    model = Dense(width, dtype)
    x = jax.random.normal(jax.random.key(1), (rows, width))
    params = model.init(jax.random.key(0), x)["params"]
    sides = {"float": floats, "ours": ours}
    sides |= {"qwix": qwixs} if qwix else {}
    sides |= {"aqt": aqts} if aqt_flax else {}
    exact = floats(model, params, x)[0](params, x).astype(jnp.float32)
    loss_of = lambda train: lambda p, x: jnp.mean(train(p, x).astype(jnp.float32) ** 2)
    trains, wholly, serves, found = {}, {}, {}, {}
    for name, side in sides.items():
        train, weights, serve, served = side(model, params, x)
        loss = loss_of(train)
        began = time.perf_counter()
        jax.make_jaxpr(jax.grad(loss))(weights, x)
        traced = time.perf_counter() - began
        step, forward = jax.jit(jax.value_and_grad(loss)), jax.jit(train)
        program = jax.jit(serve)
        trains[name] = functools.partial(step, weights, x)
        in_integers = loss_of(side(model, params, x, integers=True)[0])
        wholly[name] = functools.partial(jax.jit(jax.value_and_grad(in_integers)), weights, x)
        serves[name] = functools.partial(program, served, x)
        a, b = forward(weights, x), program(served, x)
        error = jnp.linalg.norm(b.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
        same = a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))
        differ = 0.0 if same else float(np.mean(np.asarray(a != b)))
        found[name] = {
            "bit_equal": bool(same),
            "differing": round(differ, 4),
            "error": round(float(error), 5),
            "serving_bytes": us.tree.nbytes(served),
            "trace_s": round(traced, 3),
        }
    label, serving = jnp.dtype(dtype).name, harness.seconds(serves, options.runs)
    harness.claim(
        f"int8 training is served to the bit, {label}", found["ours"]["bit_equal"], sides=found
    )
    for kind, programs, of_float in (("float", trains, None), ("integer", wholly, 0.7)):
        steps_against_peers(f"{kind} backward pass, {label}", programs, of_float, options)
    harness.claim(
        f"serving int8 is no slower than float, {label}",
        serving["ours"]["median"] <= serving["float"]["median"],
        serve_s=serving,
    )


def steps_against_peers(label, programs, of_float, options):
    step = harness.seconds(programs, options.runs)
    others = [name for name in step if name != "ours"]
    ratio = lambda of, name: harness.ratio(step["ours"][of], step[name][of])
    over, cpu = ({n: ratio(of, n) for n in others} for of in ("median", "cpu"))
    peers = [over[name] for name in ("qwix", "aqt") if name in over]
    harness.claim(
        f"a step takes at most 0.9 of the peers' time, {label}",
        all(r <= 0.9 for r in peers) if peers else None,
        step_s=step,
        ours_over=over,
        ours_over_in_cpu_time=cpu,
    )
    if of_float is not None:
        text = f"a step takes at most {of_float} of a float step's time, {label}"
        harness.claim(text, over["float"] <= of_float, ours_over_float=over["float"])


def layers(params, x):
    step = lambda h, w: (jax.nn.relu(h @ w["kernel"] + w["bias"]), None)
    return jax.lax.scan(step, x, params)[0]


def scanned(options):
    count, width, rows = (2, 32, 64) if options.smallest else (8, 512, 16384)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    params = {"kernel": shape(count, width, width), "bias": shape(count, width)}
    x = shape(rows, width)
    loss = lambda fn: lambda p, x: jnp.mean(fn(p, x) ** 2)
    rules = {"kernel": W8A8}
    temp = {
        name: harness.cost(harness.compiled(jax.grad(loss(fn), argnums=(0, 1)), params, x))[
            "temp_bytes"
        ]
        for name, fn in (("float", layers), ("int8", us.quantized(layers, rules)))
    }
    share = harness.ratio(temp["int8"], temp["float"])
    harness.claim("residuals in a scan are 0.55 of float32's", share <= 0.55, temp=temp, of=share)


def one_device_and_eight(options):
    """Train, serve, scan and tensor parallelism, compared in bits."""
    if len(jax.devices()) < 8:
        harness.claim("sharded is unsharded", None, devices=len(jax.devices()))
        return
    width, rows = (32, 16) if options.smallest else (256, 64)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "kernel": jax.random.normal(keys[0], (3, width, width)) / width**0.5,
        "bias": jax.random.normal(keys[1], (3, width)),
    }
    x = jax.random.normal(keys[2], (rows, width))
    rules = {"kernel": W8A8}
    train = jax.jit(us.quantized(layers, rules))
    serve = jax.jit(us.quantized(layers))
    served = us.quantize(params, us.quant.resolve(rules, layers, params, x))
    whole = np.asarray(train(params, x))
    differ = {"serve": int((np.asarray(serve(served, x)) != whole).sum())}
    mesh = Mesh(np.array(jax.devices()[:8]), ("tensor",))
    for name, spec in {"column": P(None, None, "tensor"), "row": P(None, "tensor", None)}.items():
        put = lambda a, s: jax.device_put(a, NamedSharding(mesh, s))
        sharded = {"kernel": put(params["kernel"], spec), "bias": put(params["bias"], P())}
        out = train(sharded, put(x, P()))
        specs = us.quant.resolve(rules, layers, params, x)
        codes = jax.jit(lambda p, specs=specs: us.quantize(p, specs))(sharded)
        differ[f"train {name}"] = int((np.asarray(out) != whole).sum())
        differ[f"serve {name}"] = int((np.asarray(serve(codes, put(x, P()))) != whole).sum())
    harness.claim(
        "scan and tensor parallel, 0 elements differ",
        not any(differ.values()),
        of=whole.size,
        differ=differ,
    )


def few_rows(options):
    """What generation does: one row, and a few."""
    size = 64 if options.smallest else 2048
    w = jax.random.normal(jax.random.key(0), (size, size))
    fn = lambda p, x: x @ p["kernel"]
    for rows in (1, 2, 8, 32):
        x = jax.random.normal(jax.random.key(1), (rows, size))
        rules = {"kernel": W8A8}
        served = us.quantize({"kernel": w}, us.quant.resolve(rules, fn, {"kernel": w}, x))
        exact, coded = jax.jit(fn), jax.jit(us.quantized(fn))
        sides = {
            "float": functools.partial(exact, {"kernel": w}, x),
            "int8": functools.partial(coded, served, x),
        }
        taken = harness.seconds(sides, 10 * options.runs)
        harness.claim(
            f"{rows} rows of int8 are no slower than float32",
            taken["int8"]["median"] <= taken["float"]["median"],
            seconds=taken,
        )


def cache(options):
    """Attention of one query to an int8 cache, against a float one."""
    heads, time_, size = (2, 16, 8) if options.smallest else (8, 1024, 128)
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, 1, heads, size))
    shape = (1, time_, heads, size)
    tree = {n: jax.random.normal(k, shape) for n, k in zip("kv", keys[1:], strict=True)}

    def attend(cache, q):
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, cache["k"]) / size**0.5
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), cache["v"])

    exact = jax.jit(attend)(tree, q)
    bytes_, errors = {"float": us.tree.nbytes(tree)}, {}
    for name, spec in {
        "stored": us.DotSpec(w=us.QSpec(axes=(-1,))),
        "integer": us.DotSpec(w=us.QSpec(axes=(-1,)), x=us.QSpec()),
    }.items():
        codes = us.quantize(tree, {"?": spec})
        out = jax.jit(us.quantized(attend))(codes, q)
        errors[name] = round(float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)), 5)
        bytes_[name] = us.tree.nbytes(codes)
    share = bytes_["stored"] / bytes_["float"]
    harness.claim(
        "int8 keys and values take (d + 4) / 4 d of the bytes",
        abs(share - (size + 4) / (4 * size)) < 1e-9,
        bytes=bytes_,
        error=errors,
    )


def training_memory(options):
    """Three residual blocks: the values of codes wait for the cotangent that needs them."""
    width, rows = (64, 64) if options.smallest else (512, 512)
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    params = [(shape(width, 4 * width), shape(4 * width, width)) for _ in range(3)]

    def residual(params, x):
        for up, down in params:
            x = x + jax.nn.relu(x @ up) @ down
        return x

    def temp(fn):
        grads = jax.value_and_grad(lambda params, x: jnp.mean(fn(params, x) ** 2))
        return harness.cost(harness.compiled(grads, params, shape(rows, width)))["temp_bytes"]

    exact, coded = temp(residual), temp(us.quantized(residual, {"**": W8A8}))
    harness.claim(
        "training in eight bits takes at most 1.05 of the temporary memory of floats",
        coded <= 1.05 * exact,
        ratio=harness.ratio(coded, exact),
        bytes={"float": exact, "int8": coded},
    )


def main():
    options = harness.arguments(__file__, __doc__)
    jax.config.update("jax_num_cpu_devices", 8)
    for dtype in (jnp.float32, jnp.bfloat16):
        against_peers(options, dtype)
    one_device_and_eight(options)
    scanned(options)
    training_memory(options)
    few_rows(options)
    cache(options)


if __name__ == "__main__":
    main()
