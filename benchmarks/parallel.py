"""Claims about devices, checked on what the compilers emit for eight of them; nothing is timed.

1. One reduction a step for any number of parts, of as many bytes as ZeRO says, over float32 and
   narrow wires; tensor-parallel sums as the inferred layout predicts them.
2. The memory of 1F1B does not grow with the parts; that of GPipe does.
3. Parameters gathered layer by layer take less memory than those gathered once a step.
4. On a mesh of one device a layout costs no FLOPs and no bytes.

Where libtpu is installed (`pip install libtpu`) the programs of 1 and 2 are also compiled, ahead of
time, for a TPU v5e of 2 x 4 chips.
"""

import functools
import importlib.util
import os
import sys

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # before JAX: ask no one what machine this is
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")

import harness
import jax
import jax.numpy as jnp
import lm
from jax.sharding import NamedSharding, PartitionSpec as P

import unitscale_jax as us
from unitscale_jax.trace.costs import collectives

jax.config.update("jax_num_cpu_devices", 8)

SCALARS = 128  # bytes; sums of weights and values are below


def sizes(smallest):
    """Width, layers, rows of a part, time."""
    return (32, 4, 8, 16) if smallest else (256, 4, 8, 128)


def abstract(tree, shardings):
    """What a compiler needs to know of arrays; it needs no devices then."""
    struct = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(struct, tree, shardings)


def some(cases, smallest, *names):
    """All cases, or a few for CI, to compile little."""
    return [(name, case) for name, case in cases.items() if name in names or not smallest]


def compiled(fn, mesh, *args):
    with jax.set_mesh(mesh):
        return jax.jit(fn).lower(*args).compile()


# --- 1: one reduction ----------------------------------------------------------------------------


def setup(mesh, smallest, parts):
    width, layers, rows, time = sizes(smallest)
    params = jax.eval_shape(
        functools.partial(lm.init, layers=layers, width=width), jax.random.key(0)
    )
    batch = jax.eval_shape(lambda: lm.batch(jax.random.key(0), rows * parts, time))
    layout = us.parallel.infer(lm.apply, params, batch["tokens"], mesh=mesh)
    over_rows = jax.tree.map(lambda _: NamedSharding(mesh, P("dp")), batch)
    return params, abstract(batch, over_rows), layout


def sent(program, mesh, axis):
    """Bytes of the results of collectives over an axis, by kind, and how many are in loops."""
    found = [c for c in collectives(program, mesh) if c.axes == (axis,) and c.bytes > SCALARS]
    kinds: dict[str, int] = {}
    for c in found:
        kinds[c.kind] = kinds.get(c.kind, 0) + c.bytes * (c.times or 1)
    return kinds, sum(c.loops > 0 for c in found)


def one_reduction(mesh, smallest, where):
    parts, n = 4, mesh.shape["dp"]
    params, batch, layout = setup(mesh, smallest, parts)
    whole, share = layout.nbytes, layout.over("dp").nbytes  # on one device
    grad_fn = us.accumulated(us.value_and_grad(lm.loss), parts)
    expected = {
        "zero 0": (dict(zero=0), whole),
        "zero 2": (dict(zero=2), share),
        "zero 3": (dict(zero=3), share + whole),
        "zero 2, bfloat16": (dict(zero=2, compress="bfloat16"), whole // 2),
        "zero 2, int8": (dict(zero=2, compress="int8"), whole // 4),
    }
    for name, (options, formula) in some(expected, smallest, "zero 3", "zero 2, int8"):
        fn = us.parallel.reduced(grad_fn, "dp", layout=layout, **options)
        laid = layout.over("dp") if options["zero"] == 3 else layout
        program = compiled(
            lambda p, b, fn=fn: fn(p, b)[2], mesh, abstract(params, laid.shardings()), batch
        )
        kinds, looped = sent(program, mesh, "dp")
        total = sum(kinds.values())
        # A leaf without a dimension for a share is whole, and a TPU sums small ones whole: a tenth
        # is allowed for both. A CPU sends bfloat16 as float32.
        narrow = options.get("compress") == "bfloat16" and where == "cpu"
        harness.claim(
            f"{where}, {name}: one reduction over dp after {parts} parts, bytes of the formula",
            looped == 0 and (narrow or total <= 1.1 * formula + 4096),
            bytes=kinds,
            formula=formula,
            in_loops=looped,
            shards=n,
        )


def tensor_sums(mesh, smallest, where):
    params, batch, layout = setup(mesh, smallest, 1)
    forward = compiled(
        lambda p, t: lm.apply(p, t, remat=False),
        mesh,
        abstract(params, layout.shardings()),
        batch["tokens"],
    )
    found, _ = sent(forward, mesh, "tp")
    rows = mesh.shape["dp"]
    predicted = (
        sum(s.nbytes * (s.times or 1) for s in layout.sums if s.direction == "forward") // rows
    )
    harness.claim(
        f"{where}: sums of the forward pass over tp are those the inferred layout names",
        found.get("all-reduce", 0) <= 1.02 * predicted,
        bytes=found,
        predicted=predicted,
        rearranged="queries, keys and values in one kernel are permuted: see the layout's table",
    )


# --- 2: pipelines --------------------------------------------------------------------------------


def pieces():
    """The model in three; the last counts the tokens."""
    first = lambda rest, batch: rest["embed"][batch["tokens"][:, :-1]]
    layer = lambda w, x, _: lm.layer(x, w)
    head = lambda rest, x, _: x @ rest["head"]

    def loss(logits, batch):
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["tokens"][:, 1:, None], -1)
        return us.Mean(-jnp.sum(picked[..., 0] * batch["mask"], -1), batch["mask"].sum(-1))

    return first, layer, head, loss


def pipeline_memory(mesh, smallest, where):
    width, layers, rows, time = sizes(smallest)
    init = functools.partial(lm.init, layers=layers, width=width)
    stacked = lambda key: us.parallel.stack(init(key), "layers", mesh.shape["pp"], axis=0)
    params = jax.eval_shape(stacked, jax.random.key(0))
    layout = us.parallel.layout(params, {"layers/**": {1: "pp"}}, mesh)
    whole = NamedSharding(mesh, P())
    schedules = {
        "gpipe": dict(schedule="gpipe"),
        "1f1b": dict(schedule="1f1b"),
        "1f1b, stash": dict(schedule="1f1b", residuals="stash"),
    }
    for name, options in some(schedules, smallest, "1f1b"):
        temp, inputs = [], []
        few, many = (8, 16) if smallest else (8, 32)
        for parts in (few, many):
            batch = jax.eval_shape(lambda n=parts: lm.batch(jax.random.key(0), rows * n, time))
            fn = us.parallel.pipelined(*pieces(), parts=parts, **options)
            args = (
                abstract(params, layout.shardings()),
                abstract(batch, jax.tree.map(lambda _: whole, batch)),
            )
            program = compiled(lambda p, b, fn=fn: fn(p, b)[2], mesh, *args)
            temp.append(program.memory_analysis().temp_size_in_bytes)
            inputs.append(us.tree.nbytes(batch))
        grown, allowed = temp[1] - temp[0], inputs[1] - inputs[0]
        table = 64 * (many - few)  # what a stage does at each tick
        harness.claim(
            f"{where}, {name}: from {few} to {many} parts temporary memory grows by no more than "
            "the inputs and a few bytes of schedule for each part",
            None if name == "gpipe" else grown <= allowed + table,
            temp_bytes={f"{few} parts": temp[0], f"{many} parts": temp[1]},
            grown=grown,
            inputs_grown=allowed,
        )


# --- 3: layers gathered one at a time -------------------------------------------------------------


def by_layer_memory(smallest):
    width = sizes(smallest)[0]
    n, rows, kernel = 4, 2 * width, functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    mesh = us.parallel.mesh(devices=jax.devices()[:n], dp=n)
    params = {"up": kernel((8, width, 4 * width)), "down": kernel((8, 4 * width, width))}
    layout = us.parallel.layout(params, {}, mesh)
    x = kernel((n * rows, width), sharding=NamedSharding(mesh, P("dp")))

    def loss(params, x):
        layer = lambda h, w: (h + jnp.tanh(h @ w["up"]) @ w["down"], None)
        h = jax.lax.scan(jax.checkpoint(layer), x, params)[0]
        return us.Mean(jnp.sum(h * h, -1), jnp.ones(len(x)))

    temp = {}
    for gather, fn in {"step": loss, "layer": us.parallel.gathered(loss, layout)}.items():
        options = dict(zero=3, gather=gather, layout=layout)
        reduced = us.parallel.reduced(us.value_and_grad(fn), **options)
        args = abstract(params, layout.over("dp").shardings()), x
        program = compiled(lambda p, x, fn=reduced: fn(p, x)[2], mesh, *args)
        temp[gather] = program.memory_analysis().temp_size_in_bytes
    harness.claim(
        "zero 3 by layer: at most 0.75x the temporary memory of zero 3 by step, for 8 "
        "rematerialized layers on 4 devices",
        temp["layer"] <= 0.75 * temp["step"],
        temp_bytes=temp,
        ratio=harness.ratio(temp["layer"], temp["step"]),
    )


# --- 4: one device -------------------------------------------------------------------------------


def one_device(smallest):
    mesh = us.parallel.mesh(devices=jax.devices()[:1], dp=1, tp=1, pp=1)
    params, batch, layout = setup(mesh, smallest, 4)
    grad_fn = us.accumulated(us.value_and_grad(lm.loss), 4)
    stacked = us.parallel.stack(
        jax.tree.map(lambda x: jnp.zeros(x.shape), params), "layers", 1, axis=0
    )
    pipeline = us.parallel.pipelined(*pieces(), parts=4)
    layers = lambda x, p: (lm.layer(x, p), None)

    def staged_loss(params, batch):
        first, _, head, loss = pieces()
        x = jax.lax.scan(layers, first(params, batch), params["layers"])[0]
        return loss(head(params, x, batch), batch)

    by_hand = us.accumulated(us.value_and_grad(staged_loss), 4)
    forms = {
        "reduced, zero 0": (us.parallel.reduced(grad_fn, layout=layout), params, grad_fn),
        "reduced, zero 3": (us.parallel.reduced(grad_fn, zero=3, layout=layout), params, grad_fn),
        "pipelined, 1f1b": (pipeline, stacked, by_hand),
    }
    for name, (fn, given, plain) in some(forms, smallest, "reduced, zero 0"):
        ours = harness.cost(compiled(lambda p, b, fn=fn: fn(p, b)[2], mesh, given, batch))
        base = harness.cost(
            jax.jit(lambda p, b, fn=plain: fn(p, b)[2]).lower(params, batch).compile()
        )
        ratios = {k: harness.ratio(ours[k], base[k]) for k in ("flops", "bytes", "temp_bytes")}
        harness.claim(
            f"one device, {name}: at most 1.02x the FLOPs and bytes of accumulation without a mesh",
            ratios["flops"] <= 1.02 and ratios["bytes"] <= 1.02,
            **ratios,
        )


def tpu_meshes():
    """Meshes of a TPU that is not there."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = functools.partial(us.parallel.mesh, devices=devices)
    return mesh(dp=4, tp=2), mesh(dp=2, pp=4)


def main():
    options = harness.arguments(__file__, __doc__)
    meshes = {"cpu": (us.parallel.mesh(dp=4, tp=2), us.parallel.mesh(dp=2, pp=4))}
    if importlib.util.find_spec("libtpu") and not options.smallest:
        meshes["v5e:2x4"] = tpu_meshes()
    else:
        print("libtpu is not installed: nothing is compiled for a TPU", file=sys.stderr)
    for where, (rows_and_tensors, stages) in meshes.items():
        one_reduction(rows_and_tensors, options.smallest, where)
        tensor_sums(rows_and_tensors, options.smallest, where)
        pipeline_memory(stages, options.smallest, where)
    by_layer_memory(options.smallest)
    one_device(options.smallest)


if __name__ == "__main__":
    main()
