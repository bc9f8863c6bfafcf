"""Laws of what meets a parameter: rows times columns are the product itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax import lax

from unitscale_jax.trace.params import (
    from_matrices,
    input_rows,
    inverse_factor,
    matrix_form,
    meetings,
    second_moments,
    to_matrices,
)
from unitscale_jax.trace.program import segments, trace_call
from unitscale_jax.trace.rewrite import captured


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def convolved(order):
    def fn(w, x):
        return lax.conv_general_dilated(
            x, w, (2, 1), "SAME", rhs_dilation=(1, 2), dimension_numbers=order
        )

    return fn


PRODUCTS = {
    "dense": (lambda w, x: x @ w, (4, 3), (5, 4)),
    "transposed": (lambda w, x: x @ w.T, (3, 4), (5, 4)),
    "left": (lambda w, x: w @ x, (3, 4), (4, 5)),
    "heads": (lambda w, x: jnp.einsum("bthk,hkd->btd", x, w), (2, 3, 4), (2, 5, 2, 3)),
    "swapped": (lambda w, x: jnp.einsum("rkh,hkd->rd", x, w), (2, 3, 4), (5, 3, 2)),
    "query": (lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), (4, 2, 3), (5, 4)),
    "experts": (lambda w, x: jnp.einsum("eri,eio->ero", x, w), (2, 4, 3), (2, 5, 4)),
    "HWIO": (convolved(("NHWC", "HWIO", "NHWC")), (3, 2, 4, 5), (2, 7, 6, 4)),
    "OIHW": (convolved(("NCHW", "OIHW", "NCHW")), (5, 4, 3, 2), (2, 4, 7, 6)),
}


def rows_and_layout(fn, params, *inputs):
    (met,) = meetings(trace_call(fn, params, *inputs), params)["w"]
    layout = matrix_form("w", params["w"].shape, [met])

    def pick(site, operands, results):
        here = site.place == met.site.place
        return input_rows("w", layout, met, operands[1 - met.side]) if here else None

    y, (seen,) = captured(fn, pick)(params, *inputs)
    return y, seen.value, layout


@pytest.mark.parametrize("name", PRODUCTS)
def test_rows_times_columns_are_the_product(name):
    fn, of_w, of_x = PRODUCTS[name]
    params, x = {"w": normal(0, *of_w)}, normal(1, *of_x)
    y, rows, layout = rows_and_layout(lambda p, x: fn(p["w"], x), params, x)
    columns = to_matrices(params["w"], layout)
    out = jnp.matmul(rows.reshape(columns.shape[0], -1, columns.shape[1]), columns)
    np.testing.assert_allclose(np.sort(out, axis=None), np.sort(y, axis=None), atol=1e-5)


@pytest.mark.parametrize("name", PRODUCTS)
def test_columns_have_an_inverse(name):
    fn, of_w, of_x = PRODUCTS[name]
    params = {"w": normal(0, *of_w)}
    layout = rows_and_layout(lambda p, x: fn(p["w"], x), params, normal(1, *of_x))[2]
    again = from_matrices(to_matrices(params["w"], layout), layout, of_w)
    np.testing.assert_array_equal(again, params["w"])


def test_stacked_layers_have_rows_each():
    fn = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
    params, x = {"w": normal(0, 3, 4, 4)}, normal(1, 5, 4)
    _, rows, layout = rows_and_layout(fn, params, x)
    assert rows.shape == (3, 5, 4) and layout.layers == 1
    for k in range(3):
        np.testing.assert_allclose(rows[k], x, atol=1e-6)
        x = jnp.tanh(x @ params["w"][k])


@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
def test_the_factor_is_that_of_the_inverse_of_the_damped_moments(damp):
    h = np.asarray(second_moments(normal(0, 20, 6)), np.float64)
    u, dead = jax.jit(inverse_factor)(jnp.asarray(h, jnp.float32), damp)
    damped = h / np.diag(h).mean() + damp * np.eye(6)
    np.testing.assert_allclose(np.tril(u, -1), 0)
    np.testing.assert_allclose(u.T @ u, np.linalg.inv(damped), rtol=1e-4, atol=1e-5)
    assert not dead.any()


def test_a_singular_matrix_has_no_factor():
    h = second_moments(jnp.ones((1, 4)))
    assert jnp.isnan(inverse_factor(h, 0.0)[0]).any()
    assert jnp.isfinite(inverse_factor(h, 0.01)[0]).all()


sizes = st.lists(st.sampled_from([1, 2, 3, 4]), min_size=0, max_size=4)


@given(sizes, st.randoms(use_true_random=False))
def test_segments_are_the_runs_of_axes_of_the_same_size(shape, rng):
    """They cover both shapes in order, and each pair has as many elements."""
    total = int(np.prod(shape, dtype=int))
    new, rest = [], total
    while rest > 1:
        size = rng.choice([d for d in range(1, rest + 1) if rest % d == 0])
        new.append(size)
        rest //= size
        if len(new) > 5:
            new.append(rest)
            break
    pairs = list(segments(shape, new))
    assert [k for before, _ in pairs for k in before] == list(range(len(shape)))
    assert [k for _, after in pairs for k in after] == list(range(len(new)))
    for before, after in pairs:
        count = lambda of, axes: int(np.prod([of[k] for k in axes], dtype=int))
        assert count(shape, before) == count(new, after)
