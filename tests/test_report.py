"""Laws of `explain`: what it shows is what runs, and a transform adds columns by leaving notes."""

import jax
import jax.numpy as jnp
import pytest

import unitscale_jax as us
from tests.support import zoo
from unitscale_jax.trace.rewrite import noted

PARAMS = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 2))}
X = jnp.ones((3, 4))


def model(params, x):
    with jax.named_scope("body"):
        hidden = jax.nn.relu(x @ params["w"])
    return jax.nn.softmax(hidden @ params["v"])


def rows_of(fn, name, *args):
    return [row for row in us.explain(fn)(*args).rows if row.name == name]


@pytest.mark.parametrize("name", zoo.named(having=["transformer"]))
def test_every_product_of_a_transformer_is_shown_in_the_compute_dtype(name):
    zoo_model = zoo.model(name)
    report = us.explain(us.autocast(zoo_model.apply))(zoo_model.params, *zoo_model.inputs)
    products = [row for row in report.rows if row.name == "dot_general"]
    assert products
    assert all(row.operands == ("bfloat16", "bfloat16") for row in products)
    assert all(row.notes["autocast"] == "low" for row in products)
    assert sum(report.flops_by_dtype.values()) == report.cost.flops


def test_a_row_names_its_parameter_and_its_module():
    first, second = rows_of(model, "dot_general", PARAMS, X)
    assert (first.parameters, first.module) == (("w",), "body")
    assert (second.parameters, second.flops) == (("v",), 2 * 3 * 4 * 2)


def test_notes_do_not_show_among_the_modules():
    report = us.explain(us.autocast(model))(PARAMS, X)
    assert all("note" not in row.module for row in report.rows)


def test_a_later_transform_adds_its_column():
    def halved(params, x):
        with noted(codes="int8"):
            return jnp.sin(x) * 0.5

    report = us.explain(jax.grad(lambda p, x: halved(p, x).sum(), 1))(PARAMS, X)
    assert {row.notes.get("codes") for row in report.rows if row.name == "cos"} == {"int8"}
    assert "codes" in str(report)


def test_an_activation_that_widens_another_is_a_silent_upcast():
    upcast = lambda p, x: x.astype(jnp.float32) * jnp.sin(p["w"][:3])
    (row,) = us.explain(upcast)(PARAMS, X.astype(jnp.bfloat16)).upcasts
    assert row.name == "mul"


def test_a_product_with_a_float32_operand_is_a_silent_upcast():
    upcast = lambda p, x: jnp.matmul(x.astype(jnp.float32), p["w"])
    (row,) = us.explain(upcast)(PARAMS, X.astype(jnp.bfloat16)).upcasts
    assert row.name == "dot_general"


def test_a_cast_that_nothing_forces_is_none():
    square = lambda p, x: (x.astype(jnp.float32) * x.astype(jnp.float32) * 2.0).sum()
    assert not us.explain(square)(PARAMS, X.astype(jnp.bfloat16)).upcasts


def test_float32_in_a_softmax_is_no_upcast():
    assert not us.explain(us.autocast(model))(PARAMS, X).upcasts


def test_a_loop_multiplies_what_its_operations_cost():
    step = lambda c, _: (c @ jnp.ones((4, 4)), None)
    loop = lambda p, x: jax.lax.scan(step, x, None, length=5)[0]
    (row,) = rows_of(loop, "dot_general", PARAMS, X)
    assert (row.repeats, row.flops) == (5, 5 * 2 * 3 * 4 * 4)


def test_a_cast_back_and_forth_is_reported():
    lossy = lambda p, x: x.astype(jnp.bfloat16).astype(jnp.float32)
    assert [w for _, w in us.explain(lossy)(PARAMS, X).warnings] == ["cast back and forth"]


def test_integers_that_may_overflow_are_reported():
    codes = jnp.ones((3, 4), jnp.int8)
    dot = lambda p, x: jax.lax.dot_general(x, x, (((1,), (1,)), ((), ())))
    wide = lambda p, x: jax.lax.dot_general(
        x, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    assert [w for _, w in us.explain(dot)(PARAMS, codes).warnings] == ["integer overflow"]
    assert not us.explain(wide)(PARAMS, codes).warnings


def test_float64_is_reported():
    with jax.enable_x64(True):
        report = us.explain(lambda p, x: jnp.sin(x))(PARAMS, jnp.ones(3, jnp.float64))
    assert "float64" in [w for _, w in report.warnings]


def test_what_a_transform_left_is_listed_with_its_reason():
    precise = lambda p, x: jnp.matmul(x, p["w"], precision="highest")
    with pytest.warns(UserWarning, match="1 of 1 products"):
        (row,) = us.explain(us.autocast(precise))(PARAMS, X).left
    assert row.notes["autocast"] == "kept: precision"


def test_data_is_the_rows():
    report = us.explain(model)(PARAMS, X)
    assert [row["name"] for row in report.data()] == [row.name for row in report.rows]


def test_a_solver_is_shown_with_its_equations():
    solve = lambda p, x: jnp.linalg.solve(p["w"] + jnp.eye(4), x[0])
    inside = [row for row in us.explain(solve)(PARAMS, X).rows if "not entered" in row.warnings]
    assert "triangular_solve" in [row.name for row in inside]
    assert not [w for _, w in us.explain(model)(PARAMS, X).warnings]
