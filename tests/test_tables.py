"""One contract for all reports: rows, plain data, text, and a table of rich."""

import json

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import unitscale_jax as us
from unitscale_jax.tables import Tabular

PARAMS = {"[up]": jnp.ones((4, 8)), "down": jnp.ones((8, 3))}  # brackets are no markup of rich
X = jax.random.normal(jax.random.key(0), (16, 4))
RULES = {"*": us.DotSpec(w=us.QSpec(), x=us.QSpec())}
SPEC = us.prune.SparsitySpec(patterns={"down": us.prune.Unstructured()}, sparsity=0.5)


def fn(params, x):
    return jax.nn.relu(x @ params["[up]"]) @ params["down"]


def gptq():
    rules = us.quant.resolve(RULES, fn, PARAMS, X)
    stats = us.calibrate(fn, PARAMS, [(X,)], RULES, collect=("hessian",))
    return us.quant.gptq(PARAMS, stats, rules)[1]


def sparsegpt():
    stats = us.calibrate(fn, PARAMS, [(X,)], SPEC, collect=("hessian",))
    return us.prune.sparsegpt(PARAMS, stats, SPEC)[2]


def widths():
    linear = lambda p, x: (us.unit.readout(us.unit.linear(x, p["body"]), p["head"]) ** 2).mean()
    sized = lambda n: (linear, {"body": jnp.ones((4, n)), "head": jnp.ones((n, 3))}, X)
    return us.testing.check_width(sized, (4, 8), steps=1, tolerance=None)


REPORTS = {
    "explain": lambda: us.explain(us.autocast(fn))(PARAMS, X),
    "sparsity": lambda: us.prune.report(PARAMS, us.prune.make_masks(PARAMS, SPEC)),
    "gptq": gptq,
    "sparsegpt": sparsegpt,
    "layout": lambda: us.parallel.layout(PARAMS, {"**": "whole"}, us.parallel.mesh(tp=8)),
    "inferred": lambda: us.parallel.infer(fn, PARAMS, X, mesh=us.parallel.mesh(tp=8)),
    "groups": lambda: us.compaction.groups(fn, PARAMS, X),
    "dims": lambda: us.trace.dims(us.trace.trace(fn, PARAMS, X)),
    "widths": widths,
    "tracked": lambda: us.unit.tracked(lambda p, x: fn(p, x).mean())(PARAMS, X)[1],
}


def test_every_report_is_among_them():
    def below(kind):
        return {kind}.union(*map(below, kind.__subclasses__())) - {Tabular}

    assert below(Tabular) == {type(make()) for make in REPORTS.values()}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_has_rows_data_text_and_a_table(name):
    report = REPORTS[name]()
    data = json.loads(json.dumps(report.data()))
    assert len(data) == len(report.rows) > 0 and all(isinstance(row, dict) for row in data)

    _, lines = report.cells()
    text = str(report).splitlines()
    assert len(text) == 1 + len(lines) + len(report.below())
    assert all(line == line.rstrip() for line in text)
    for line, cells in zip(text[1:], lines, strict=False):
        assert all(cell in line for cell in cells)

    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(report)
    assert lines[0][0] in capture.get()
