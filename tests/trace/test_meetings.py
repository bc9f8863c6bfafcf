"""What a parameter meets, and where on the way from data to the loss."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from unitscale_jax import trace

X, IDS = jnp.ones((3, 4)), jnp.arange(3)


def met(fn, params, *inputs):
    return trace.meetings(trace.trace_call(fn, params, *inputs), params)


def products(fn, params, *inputs):
    """name -> (first, last) of each product of it that an input takes part in."""
    found = met(fn, params, *inputs).items()
    kinds = ("product", "rows")
    each = {n: [(m.first, m.last) for m in ms if m.kind in kinds and m.active] for n, ms in found}
    return {name: uses for name, uses in each.items() if uses}


W = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 4))}
FIRST, LAST, INNER, ONLY = (True, False), (False, True), (False, False), (True, True)
LABELS = jnp.ones((3, 4))


def chain(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


def looped(p, x):
    body = lambda _, h: jnp.tanh(h @ p["b"])
    return lax.fori_loop(0, 3, body, jnp.tanh(x @ p["a"])) @ p["c"]


def scanned(p, x):
    body = lambda h, w: (jnp.tanh(h @ w), None)
    return lax.scan(body, x @ p["a"], jnp.stack([p["b"], p["b"]]))[0] @ p["c"]


def attention(p, x):
    """The values meet a product with the scores, so what makes them is no last layer."""
    q, k, v = (x @ p[name] for name in "abc")
    return jax.nn.softmax(q @ k.T) @ v


def residual(p, x):
    h = x @ p["a"]
    return (h + jnp.tanh(h) @ p["b"]) @ p["c"]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("fn", [chain, looped, residual])
def test_the_first_product_meets_data_and_the_last_meets_nothing_more(fn, dtype):
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda v: v.astype(dtype), (W, X))
        assert products(fn, params, x) == {"a": [FIRST], "b": [INNER], "c": [LAST]}


def test_products_with_activations_count_as_further_products():
    assert products(attention, W, X) == {"a": [FIRST], "b": [FIRST], "c": [FIRST]}


LOSSES = {
    "array": lambda y: y,
    "squares": lambda y: jnp.square(y - LABELS).sum(),
    "square by a product": lambda y: (lambda e: jnp.vdot(e, e))(y - LABELS),
    "one-hot labels by a product": lambda y: -jnp.einsum("ij,ij->", jax.nn.log_softmax(y), LABELS),
    "a matrix of data": lambda y: y @ jnp.ones((4, 2)),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_how_a_loss_is_written_makes_no_product_the_last_one(loss):
    assert products(lambda p, x: loss(chain(p, x)), W, X)["c"] == [LAST]


def test_no_gradient_no_way_to_the_loss():
    """A choice by the largest logit is no layer after the logits."""
    fn = lambda p, x: (y := x @ p["a"], p["b"][y.argmax(-1)] @ p["c"])
    assert products(fn, W, X)["a"] == [ONLY]


def test_each_result_of_a_choice_passes_on_what_it_is():
    def fn(p, x):
        scores, chosen = lax.top_k(x @ p["a"], 2)
        return scores @ p["b"][:2], chosen

    assert products(fn, W, X) == {"a": [FIRST], "b": [LAST]}


def test_a_product_of_parameters_alone_makes_a_kernel():
    found = met(lambda p, x: x @ (p["a"] @ p["b"]), W, X)
    assert [(m.kind, m.active) for m in (*found["a"], *found["b"])] == [("product", False)] * 2


def test_a_bias_that_is_not_broadcast_is_no_kernel_after_its_sum():
    fn = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]
    params = {"w": W["a"], "b": jnp.ones(4), "v": W["b"]}
    found = met(fn, params, X[0])
    assert [(m.kind, m.fixed) for m in found["b"]] == [("sum", True), ("product", False)]
    assert [m.fixed for name in "wv" for m in found[name]] == [True, True]


EXPERTS = {"up": jnp.ones((5, 4, 6)), "router": jnp.ones((4, 5))}


@pytest.mark.parametrize("scale", [lambda w: w, lambda w: 2 * w.astype(jnp.bfloat16)])
def test_rows_that_a_lookup_took_are_kernels_beside_an_activation(scale):
    def fn(p, x):
        _, chosen = lax.top_k(x @ p["router"], 2)
        rows = scale(p["up"][chosen])
        return jnp.einsum("bd,bkdf->bkf", x.astype(rows.dtype), rows)

    lookup, rows = met(fn, EXPERTS, X)["up"]
    assert (lookup.kind, rows.kind) == ("lookup", "rows")
    assert (rows.contracted, rows.outputs, rows.terms) == ({-2}, {-1}, 4)
    assert rows.held.cut == {-3} and not rows.fixed


def test_rows_are_an_activation_beside_a_kernel_and_beside_rows():
    params = {"table": jnp.ones((9, 4)), "w": W["a"]}
    assert [m.kind for m in met(lambda p, i: p["table"][i] @ p["w"], params, IDS)["table"]] == [
        "lookup"
    ]
    compared = lambda p, i: jnp.einsum("bd,bd->b", p["table"][i], p["table"][i + 1])
    assert [m.kind for m in met(compared, params, IDS)["table"]] == ["lookup"] * 2
    added = lambda p, i, x: x @ (p["table"][i] + x).T  # what is added up is no row any more
    assert [m.kind for m in met(added, params, IDS, X)["table"]] == ["lookup"]


USES = {  # equation, shapes of the two: own axes summed over, own axes of the result, terms
    "bd,dhn->bhn": ((3, 4), (4, 2, 5), {-3}, {-2, -1}, 4),
    "bhn,hnd->bd": ((3, 2, 5), (2, 5, 4), {-3, -2}, {-1}, 10),
    "be,edf->bdf": ((3, 2), (2, 4, 6), {-3}, {-2, -1}, 2),
    "bed,edf->bef": ((3, 2, 4), (2, 4, 6), {-2}, {-1}, 4),
    "bd,fd->bf": ((3, 4), (6, 4), {-1}, {-2}, 4),
}


@pytest.mark.parametrize("equation", USES)
def test_axes_of_a_use_are_summed_over_shared_or_outputs(equation):
    x, w, contracted, outputs, terms = USES[equation]
    fn = lambda w, x: jnp.einsum(equation, x, w)
    (use,) = met(fn, jnp.ones(w), jnp.ones(x))[""]
    assert (use.contracted, use.outputs, use.terms) == (contracted, outputs, terms)
