"""Laws of quantized layers over devices by hand: their bits are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import unitscale_jax as us
from tests.support.sharded import assert_near
from tests.support.zoo._model import activations
from unitscale_jax import DotSpec, QSpec, parallel
from unitscale_jax.quant import Fixed, Group

ROWS, IN, FFN, OUT = 8, 12, 64, 24
PARAMS = {
    "up": activations(IN, FFN, seed=1),
    "down": activations(4, FFN // 4, OUT, seed=2) / 4,
    "bias": activations(OUT, seed=3),
}
FLAT = PARAMS | {"down": PARAMS["down"].reshape(FFN, OUT)}
LAYOUT = {"up": P(None, "tp"), "down": P("tp"), "bias": P()}
X = activations(ROWS, IN, seed=4)
ASYMMETRIC = QSpec(symmetric=False)
SPECS = {
    "dynamic": DotSpec(w=QSpec(), x=QSpec()),
    "static": DotSpec(w=QSpec(), x=QSpec(calibrator=Fixed(4.0))),
    "asymmetric": DotSpec(w=QSpec(), x=ASYMMETRIC),
    "both asymmetric": DotSpec(w=ASYMMETRIC, x=ASYMMETRIC),
    "powers of two": DotSpec(w=QSpec(scale="po2"), x=QSpec(scale="po2")),
    "by floats": DotSpec(w=QSpec(format="int4"), x=QSpec(), compute="float_exact"),
    "integer groups": DotSpec(w=QSpec(format="int4", group=Group(4, scale="integer")), x=QSpec()),
}


def model(p, x):
    """A block of one device."""
    h = jax.nn.relu(x @ p["up"]).reshape(len(x), *p["down"].shape[:-1])
    return jnp.tensordot(h, p["down"], h.ndim - 1) + p["bias"]


def local(p, x, sequence=False):
    """The same from a device's part of the kernels, and with `sequence` of the rows."""
    if sequence:
        x = parallel.enter_sequence(x, "tp")
    h = jax.nn.relu(parallel.column(x, p["up"])).reshape(len(x), *p["down"].shape[:-1])
    if sequence:
        partial = jnp.tensordot(h, p["down"], h.ndim - 1)
        return parallel.exit_sequence(partial, "tp") + p["bias"]
    return parallel.row(h, p["down"], p["bias"], mesh_axis="tp")


def split(fn, sequence, params=LAYOUT):
    rows = P("tp") if sequence else P()
    body = functools.partial(fn, sequence=sequence)
    return jax.shard_map(body, in_specs=(params, rows), out_specs=rows)


def params_of(kind):
    """Groups are along one of the axes summed over, so a kernel of one such axis is cut."""
    return FLAT if "groups" in kind else PARAMS


@functools.cache
def of_one_device(kind):
    params = params_of(kind)
    rules = us.quant.resolve({"up": SPECS[kind], "down": SPECS[kind]}, model, params, X)
    return rules, us.quantize(params, rules), jax.jit(us.quantized(model, rules))(params, X)


CASES = [("dynamic", False, (8, 1)), ("dynamic", True, (4, 2)), ("dynamic", False, (2, 4))]
CASES += [(kind, kind != "both asymmetric", (2, 4)) for kind in SPECS]


@pytest.mark.parametrize(("kind", "sequence", "sizes"), CASES, ids=str)
def test_a_row_is_summed_in_integers_and_has_the_bits_of_one_device(kind, sequence, sizes):
    """`quantized` around the `shard_map` and inside of it, training and serving."""
    (rules, codes, expected), params = of_one_device(kind), params_of(kind)
    with jax.set_mesh(parallel.mesh(dp=sizes[0], tp=sizes[1])):
        around = us.quantized(split(local, sequence), rules)
        inside = split(us.quantized(local, rules), sequence)
        run = jax.jit(lambda p, q, x: (around(p, x), around(q, x), inside(p, x)))
        got = run(params, codes, X)
    for out in got:
        np.testing.assert_array_equal(out, expected)


def test_codes_may_be_laid_out_by_hand():
    """Sums of codes are those of all devices, and are made anew for the part that one has."""
    _, codes, expected = of_one_device("asymmetric")
    cut = lambda name, x: P("tp") if name == "codes" else P()
    layout = {"up": codes["up"].over(lambda *_: P()), "down": codes["down"].over(cut), "bias": P()}
    layout["up"] = codes["up"].over(lambda name, x: P(None, "tp"))
    with jax.set_mesh(parallel.mesh(dp=2, tp=4)):
        got = jax.jit(split(us.quantized(local), False, layout))(codes, X)
    np.testing.assert_array_equal(got, expected)


def test_the_worked_example():
    x = jnp.array([[1.0, -2, 3, 4]])
    w = {"w": jnp.array([[1.0, 2], [3, -4], [5, 6], [-7, 8]])}
    rules = {"w": DotSpec(w=QSpec(axes=(-2,)), x=QSpec())}
    with jax.set_mesh(parallel.mesh(dp=4, tp=2)):
        body = us.quantized(lambda p, x: parallel.row(x, p["w"], mesh_axis="tp"), rules)
        run = jax.shard_map(body, in_specs=({"w": P("tp")}, P(None, "tp")), out_specs=P())
        got = jax.jit(run)(w, x)
    expected = [float.fromhex("-0x1.1fdefcp+4"), float.fromhex("0x1.e08288p+5")]
    np.testing.assert_array_equal(got, [expected])


def test_what_is_sent_are_integers():
    rules = of_one_device("dynamic")[0]
    with jax.set_mesh(parallel.mesh(dp=2, tp=4)):
        run = jax.jit(us.quantized(split(local, False), rules))
        text = run.lower(PARAMS, X).compile().as_text()
    sums = [line for line in text.splitlines() if " all-reduce(" in line]
    assert any(f"s32[{ROWS},{OUT}]" in line for line in sums)
    assert not any(f"f32[{ROWS},{OUT}]" in line for line in sums)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("calibrator", [us.quant.Absmax(), Fixed(1.0)], ids=["all", "clipped"])
def test_gradients_are_those_of_one_device(sequence, calibrator):
    """Straight through, with the clipped values' gradients zero; outside and inside."""
    spec = DotSpec(w=QSpec(), x=QSpec(calibrator=calibrator))
    rules = us.quant.resolve({"up": spec, "down": spec}, model, PARAMS, X)
    rows = P("tp") if sequence else P()
    loss = lambda fn: lambda p, x: jnp.sum(jnp.sin(fn(p, x)))
    total = lambda p, x: loss(functools.partial(us.quantized(local, rules), sequence=sequence))(
        p, x
    )
    want = jax.jit(jax.grad(loss(us.quantized(model, rules)), (0, 1)))(PARAMS, X)
    with jax.set_mesh(parallel.mesh(dp=2, tp=4)):
        outside = jax.grad(loss(us.quantized(split(local, sequence), rules)), (0, 1))
        inside = jax.shard_map(
            jax.grad(total, (0, 1)), in_specs=(LAYOUT, rows), out_specs=(LAYOUT, rows)
        )
        got = jax.jit(lambda p, x: (outside(p, x), inside(p, x)))(PARAMS, X)
    assert_near(got[0], want, limit=1e-5)
    assert_near(got[1], want, limit=1e-5)


def test_a_row_that_is_not_finite_on_one_device_is_nan_on_all():
    rules, _, _ = of_one_device("dynamic")
    w = {"w": FLAT["down"]}
    rules = {"w": rules[1][1].with_axes((-2,))}
    h = activations(ROWS, FFN, seed=5).at[1, 3].set(jnp.nan).at[2, 60].set(jnp.inf)
    with jax.set_mesh(parallel.mesh(dp=2, tp=4)):
        body = lambda p, h: parallel.row(h, p["w"], mesh_axis="tp")
        run = jax.shard_map(body, in_specs=({"w": P("tp")}, P(None, "tp")), out_specs=P())
        got = jax.jit(us.quantized(run, rules))(w, h)
    one = jax.jit(us.quantized(lambda p, h: h @ p["w"], rules))(w, h)
    np.testing.assert_array_equal(got, one)
    assert np.isnan(got[1:3]).all() and np.isfinite(got[3:]).all()


def test_a_result_that_is_read_before_the_sum_keeps_scales_of_its_device():
    """Such a product is not the start of a longer one."""
    rules = {"w": DotSpec(w=QSpec(axes=(-2,)), x=QSpec())}
    w, h = {"w": FLAT["down"]}, activations(ROWS, FFN, seed=5)

    def body(p, h):
        y = h @ p["w"]
        return lax.psum(y, "tp"), lax.psum(y**2, "tp")

    with jax.set_mesh(parallel.mesh(dp=2, tp=4)):
        run = jax.shard_map(body, in_specs=({"w": P("tp")}, P(None, "tp")), out_specs=P())
        got = jax.jit(us.quantized(run, rules))(w, h)
    parts = jnp.einsum("rds,dso->dro", h.reshape(ROWS, 4, -1), w["w"].reshape(4, -1, OUT))
    assert_near(got, (parts.sum(0), jnp.square(parts).sum(0)), limit=0.03)


def test_the_bound_of_int32_is_that_of_all_devices():
    """A device's sum would fit four times, and the sum of all does not."""
    rules = {"w": DotSpec(w=QSpec(axes=(-2,)), x=QSpec())}
    shapes = {"w": jax.ShapeDtypeStruct((140_000, 1), jnp.float32)}, jnp.zeros((1, 140_000))
    with jax.set_mesh(parallel.mesh(dp=2, tp=4)):
        body = lambda p, x: parallel.row(x, p["w"], mesh_axis="tp")
        run = jax.shard_map(body, in_specs=({"w": P("tp")}, P(None, "tp")), out_specs=P())
        with pytest.raises(ValueError, match="sums 140000 products"):
            jax.eval_shape(us.quantized(run, rules), *shapes)
