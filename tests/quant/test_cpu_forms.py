"""Laws of the derivatives of dots, as programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unitscale_jax.quant._cpu_forms import transposed
from unitscale_jax.trace.params import product_of
from unitscale_jax.trace.program import sites

DOTS = {  # the letters of its operands and of its result, in that order
    "a matrix": "mk,kn->mn",
    "a matrix the other way": "mk,nk->mn",
    "rows that are summed": "km,kn->mn",
    "rows that are summed, the other way": "km,nk->mn",
    "a vector": "k,kn->n",
    "heads": "bthk,hkd->btd",
    "heads in another order": "bthk,dkh->btd",
    "experts": "ebi,eio->ebo",
    "experts in the middle": "bei,ieo->ebo",
    "attention": "bqhd,bkhd->bhqk",
    "an outer product": "ab,cd->abcd",
}
SIZES = dict(zip("abcdehikmnoqt", (2, 3, 4, 5, 2, 3, 4, 6, 3, 5, 4, 3, 2), strict=True))


def problem(letters):
    """The product, two operands of small integers, and a cotangent."""
    left, right, _ = letters.replace("->", ",").split(",")
    fn = lambda x, w: jnp.einsum(letters, x, w)
    rng = np.random.default_rng(0)
    whole = lambda shape: jnp.asarray(rng.integers(-4, 5, shape), jnp.float32)
    x, w = (whole([SIZES[letter] for letter in side]) for side in (left, right))
    (site,) = (s for s in sites(jax.make_jaxpr(fn)(x, w).jaxpr) if s.name == "dot_general")
    operands = [x, w] if site.shapes[0] == x.shape else [w, x]  # einsum may have turned them
    return product_of(site), operands, whole(site.result_shapes[0])


@pytest.mark.parametrize("kind", DOTS)
def test_they_are_those_of_jax(kind):
    product, operands, g = problem(DOTS[kind])
    expected = jax.vjp(product.as_traced, *operands)[1](g)
    for side in (0, 1):
        program = transposed(product, side, g, operands[1 - side])
        (got,) = jax.core.eval_jaxpr(program.jaxpr, program.consts, g, operands[1 - side])
        np.testing.assert_array_equal(got, expected[side])


@pytest.mark.parametrize("kind", ["a matrix", "a matrix the other way", "experts"])
def test_no_transpose_follows_the_product(kind):
    product, operands, g = problem(DOTS[kind])
    for side in (0, 1):
        program = transposed(product, side, g, operands[1 - side])
        assert [eqn.primitive.name for eqn in program.jaxpr.eqns] == ["dot_general"]
