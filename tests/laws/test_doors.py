"""Laws of doors: what cannot be meant is refused where it enters, in a sentence that says why.

The first law goes over all public functions with something else as their first argument; the table
below it are single slips, each with the words that its message must have.
"""

import dataclasses
import inspect
import math
import os
import tempfile
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import unitscale_jax as us
from unitscale_jax import errors

NAMESPACES = {"us": us} | {
    name: getattr(us, name)
    for name in (
        *("quant", "statistics", "prune", "compaction", "parallel", "distill", "testing"),
        *("trace", "tree", "rules", "formats", "fwd_bwd"),
    )
}


def public():
    """Every public function, by name."""
    found = {}
    for space, module in NAMESPACES.items():
        names = module.__all__
        for name in names:
            value = getattr(module, name)
            home = getattr(value, "__module__", "")
            ours = isinstance(value, types.FunctionType) and home.startswith("unitscale_jax")
            ours = ours and home != errors.__name__ and bool(inspect.signature(value).parameters)
            if ours and value not in found.values():
                found[f"{space}.{name}"] = value
    return found


PARAMS = {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 3))}
X = jnp.ones((2, 4))
LAYOUT = types.SimpleNamespace()


def fn(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def loss(params, x):
    return us.Mean(jnp.sum(fn(params, x) ** 2, -1), jnp.ones(len(x)))


def valid():
    """Something that fits each name of an argument."""
    rules = {"*": us.DotSpec(w=us.QSpec(axes=(-2,)), x=us.QSpec())}
    stats = us.calibrate(fn, PARAMS, [(X,)], rules, collect=("range", "hessian"))
    graph = us.compaction.groups(fn, PARAMS, X)
    spec = us.prune.SparsitySpec(sparsity=0.5, patterns={"a": us.prune.Unstructured()})
    masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), PARAMS)
    mesh = us.parallel.mesh(dp=8)
    return {
        "params": PARAMS, "x": X, "fn": fn, "apply": fn, "loss": loss, "rules": rules,
        "stats": stats, "moments": stats, "graph": graph, "spec": spec, "masks": masks,
        "plan": us.compaction.plan_of(graph, {}), "plans": [], "batches": [(X,)], "batch": X,
        "optimizer": optax.sgd(0.1), "tx": optax.sgd(0.1), "parts": 2, "axis": "dp", "mesh": mesh,
        "key": jax.random.key(0), "like": PARAMS, "grads": PARAMS, "named": {"a": "a:output"},
        "meshes": [mesh], "layout": us.parallel.layout(PARAMS, {}, mesh), "k": 1, "n": 2, "m": 4,
        "schedule": us.prune.OneShot(0), "terms": [], "policy": us.Policy(), "names": ["a"],
        "variables": {"params": {}}, "format": "int8", "sparsity": 0.5, "expected": {}, "i": 0,
        "experts": {}, "branches": [], "kept": {}, "heads": 2, "teacher": 2, "student": 2,
        "path": "x", "index": 0, "rows": 2, "size": 4, "chunk": 1, "predicate": lambda n, x: True,
        "dtype": "float32", "tree": PARAMS, "opt_state": (), "seconds": 1.0, "scored": None,
    }  # fmt: skip


@pytest.fixture(scope="module")
def arguments():
    return valid()


# What takes anything: a pytree whose leaves may be anything, or a question about any value.
ANYTHING = {
    *("quant.dequantize", "quant.is_quantized", "us.unless_skipped", "prune.random"),
    *("tree.partition", "tree.combine", "tree.is_compound", "tree.named_leaves", "tree.names"),
    *("tree.size", "tree.owners", "tree.values_of", "statistics.observed", "us.save", "us.load"),
    *("parallel.watchdog", "parallel.pipelined", "parallel.unstack"),
}


class Wrong:
    """What no function takes."""

    def __repr__(self):
        return "Wrong()"


RAW = ("has no attribute", "not subscriptable", "not iterable", "unsupported operand")
RAW += ("not callable", "missing 1 required", "is ambiguous", "not supported between")
RAW += ("must be real number",)


@pytest.mark.parametrize("name", sorted(public().keys() - ANYTHING))
def test_a_wrong_first_argument_is_refused_in_a_sentence(name, arguments):
    function = public()[name]
    first, *rest = inspect.signature(function).parameters.values()
    positional = (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)
    needed = [p for p in rest if p.default is p.empty]
    beside = [arguments.get(p.name, X) for p in needed if p.kind in positional]
    beside += [X for p in rest if p.kind == p.VAR_POSITIONAL and p.name in ("inputs", "args")]
    named = {p.name: arguments.get(p.name, X) for p in needed if p.kind == p.KEYWORD_ONLY}
    before = os.listdir()
    with pytest.raises((TypeError, ValueError)) as raised:
        function(Wrong(), *beside, **named)
    text = str(raised.value)
    assert len(text.split()) >= 4 and not any(words in text for words in RAW), text
    assert os.listdir() == before


# --- single slips

W = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
W8 = us.DotSpec(w=us.QSpec(), x=us.QSpec())
DENSE = linen.Dense(3)
VARIABLES = DENSE.init(jax.random.key(0), X)
LINEAR = lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0))
product = lambda p, x: x @ p["w"]
grad_fn = us.value_and_grad(loss)
in_codes = lambda params=W: us.quantize(
    params, {"w": us.DotSpec(w=us.QSpec(axes=(-2,)), x=us.QSpec())}
)
tx = us.multi_steps(optax.sgd(1.0), 2)
a_part = lambda **options: tx.update(W, tx.init(W), W, **options)
HALF = us.prune.SparsitySpec(sparsity=0.5, patterns={"w": us.prune.Unstructured()})
BF16 = {"w": W["w"].astype("bfloat16")}

SLIPS = {
    "parameters for variables": (
        lambda: us.from_linen(DENSE, VARIABLES["params"]),
        r"variables has no 'params'; did you pass variables\['params'\]\?",
    ),
    "no linen module": (lambda: us.from_linen(3, {}), "from_linen is 3; expected a module of flax"),
    "a class": (lambda: us.from_linen(linen.Dense, {}), "built and not its class"),
    "nnx as linen": (lambda: us.from_linen(LINEAR(), {}), "Bridge it by from_nnx"),
    "linen as nnx": (lambda: us.from_nnx(DENSE), "Bridge it by from_linen"),
    "no nnx module": (lambda: us.from_nnx(3), "from_nnx is 3; expected a module of flax.nnx"),
    "no variables": (lambda: us.from_linen(DENSE, [1]), r"variables is \[1\]; expected what"),
    "no policy": (lambda: us.cast(fn, "bfloat61"), "'bfloat61'.*closest: 'bfloat16'"),
    "a number for a policy": (lambda: us.cast(fn, 3), "Policy.compute is 3"),
    "trees that overlap": (
        lambda: us.tree.combine({"a": 1, "b": None}, {"a": 2, "b": 3}),
        "2 trees have a leaf 'a'; expected one",
    ),
    "no terms": (
        lambda: us.accumulated(us.value_and_grad(lambda p, b: {}), 2)(W, X),
        "the loss returned no terms",
    ),
    "axes outside of shard_map": (
        lambda: us.accumulated(grad_fn, 2, mesh_axis=("dp",))(PARAMS, X),
        r"mesh_axis=\('dp',\) outside of a shard_map that has them",
    ),
    "axes of a loss scale": (
        lambda: (lambda t: t.update(W, t.init(W), W))(
            us.loss_scaled(optax.sgd(1.0), us.StaticScale(1.0), mesh_axis=("dp",))
        ),
        r"mesh_axis=\('dp',\) outside of a shard_map that has them",
    ),
    "an axis of a collective": (
        lambda: us.parallel.row(X, jnp.ones((4, 3)), mesh_axis="tp"),
        "mesh_axis='tp' outside of a shard_map that has them",
    ),
    "gradients of another tree": (lambda: tx.update({"v": X}, tx.init(W), W), "gradient of 'w'"),
    "codes of another shape": (
        lambda: us.quantized(product)(in_codes(), jnp.ones((2, 5))),
        "w has 4 input channels, and what meets it has 5",
    ),
    "integer weights": (
        lambda: us.quant.resolve({"w": W8}, product, {"w": jnp.ones((4, 3), int)}, X.astype(int)),
        "w is int32; only floats have codes",
    ),
    "another optimizer's state": (
        lambda: tx.update(W, optax.adam(1.0).init(W), W),
        "the state of multi_steps is .*; expected a MultiStepsState",
    ),
    "parameters for a state": (
        lambda: us.loss_scaled(optax.sgd(1.0), us.StaticScale(1.0)).update(W, W, W),
        "the state of loss_scaled is .*; expected a LossScaleState",
    ),
    "the inner state of masks": (
        lambda: us.prune.SET(optax.sgd(1.0), HALF, us.prune.OneShot(0)).update(W, (), W),
        r"the state of SET is \(\); expected a PrunedState",
    ),
    "no state": (
        lambda: us.low_precision_weights(optax.sgd(1.0), "kahan").update(BF16, None, BF16),
        "the state of low_precision_weights is None; expected a LowPrecisionState",
    ),
    "a number for a loss scale": (
        lambda: us.loss_scaled(optax.sgd(1.0), 8.0),
        "spec is 8.0; expected a us.StaticScale or us.DynamicScale",
    ),
    "a class for a loss scale": (
        lambda: us.loss_scaled(optax.sgd(1.0), us.DynamicScale),
        "built and not its class",
    ),
    "a word for a scale": (lambda: us.StaticScale("8"), "scale is '8'; expected a power of two"),
    "a flag for steps": (lambda: us.DynamicScale(hysteresis=True), "hysteresis is True; expected"),
    "half a step": (lambda: us.DynamicScale(interval=2.5), "interval is 2.5; expected a whole"),
    "no mesh": (lambda: us.parallel.layout(W, {}, None), "`mesh` is None; expected a mesh"),
    "keywords that are a number": (
        lambda: us.parallel.infer(fn, PARAMS, X, mesh=us.parallel.mesh(tp=8), kwargs=3),
        "`kwargs` is 3; expected keywords of the function by name",
    ),
    "a rule of autocast that is None": (
        lambda: us.autocast(fn, rules={"a": None})(PARAMS, X),
        "the dtype of autocast is None; expected a dtype",
    ),
    "a spec for a dtype": (
        lambda: us.autocast(fn, us.QSpec()),
        r"the dtype of autocast is .*; expected a dtype, as 'bfloat16'",
    ),
    "a padded kernel with a rule": (
        lambda: us.quant.resolve(
            {"a": us.DotSpec()}, lambda p, x: x @ jnp.pad(p["a"], ((0, 0), (0, 2))), PARAMS, X
        ),
        r"a rule names a, which meets no product and no lookup .*\(it ends in pad\)",
    ),
    "a number for the axis of a loss scale": (
        lambda: us.loss_scaled(optax.sgd(1.0), us.StaticScale(1.0), mesh_axis=0),
        "`mesh_axis` is 0; expected the name of a mesh axis",
    ),
    "numbers for the axes of parts": (
        lambda: us.accumulated(grad_fn, 2, mesh_axis=(0, 1)),
        r"`mesh_axis` is \(0, 1\); expected the name of a mesh axis",
    ),
    "a mesh for an axis": (
        lambda: us.parallel.reduced(grad_fn, us.parallel.mesh(dp=8))(PARAMS, X),
        "the mesh axis of reduced is .*; expected one name",
    ),
    "names of gradients inside of jit": (
        lambda: jax.jit(lambda state: us.overflowing(state, W))(
            us.loss_scaled(optax.sgd(1.0), us.StaticScale(1.0)).init(W)
        ),
        r"gradient of w was finite .* is traced.* outside of jit.*inside, us.unless_skipped",
    ),
    "names of abstract gradients": (
        lambda: us.overflowing(
            jax.eval_shape(us.loss_scaled(optax.sgd(1.0), us.StaticScale(1.0)).init, W), W
        ),
        r"gradient of w was finite .* abstract.* outside of jit",
    ),
    "values of rows": (lambda: a_part(value=jnp.ones(2)), r"`value` has shape \(2,\); expected"),
    "flushes of rows": (lambda: a_part(flush=jnp.ones(2, bool)), r"`flush` has shape \(2,\)"),
    "a word for a flush": (lambda: a_part(flush="no"), "`flush` is 'no'; expected a scalar"),
    "counts of rows": (lambda: a_part(dropped=jnp.ones(2)), r"`dropped` has shape \(2,\)"),
    "terms for a count": (lambda: a_part(dropped={"dropped": 1}), "`dropped` is {'dropped': .*}"),
    "no weight": (lambda: a_part(weight=None), "`weight` is None; expected a scalar"),
    "a gradient for an optimizer": (
        lambda: us.multi_steps(fn, 2),
        "what multi_steps goes around is .*; expected an optimizer",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_refused_in_words_that_lead_to_its_cause(slip):
    call, words = SLIPS[slip]
    with pytest.raises((TypeError, ValueError), match=words):
        call()


@pytest.mark.parametrize("verb", ["save", "save_plan"])
def test_a_file_in_no_folder_is_named_by_the_path_that_was_asked(verb, tmp_path):
    graph = us.compaction.groups(fn, PARAMS, X)
    write = {
        "save": lambda path: us.save(path, W),
        "save_plan": lambda path: us.compaction.save_plan(path, us.compaction.plan_of(graph, {})),
    }[verb]
    with pytest.raises(FileNotFoundError, match=r"nowhere/at/all cannot be .* no such directory"):
        write(tmp_path / "nowhere/at/all")
    with pytest.raises(IsADirectoryError, match=f"{tmp_path.name} is a directory"):
        write(tmp_path)


def test_a_folder_is_no_file():
    folder = tempfile.mkdtemp()
    with pytest.raises(IsADirectoryError, match=f"{folder} is a directory"):
        us.load(folder)


def test_a_dtype_is_a_policy():
    expected = us.cast(product, us.Policy(compute="bfloat16"))(W, X)
    for dtype in ("bfloat16", jnp.bfloat16, np.dtype(jnp.bfloat16)):
        np.testing.assert_array_equal(us.cast(product, dtype)(W, X), expected)


def test_a_module_without_parameters_says_so():
    apply, params, _ = us.from_linen(linen.Dropout(0.5, deterministic=True), {})
    assert params == {} and apply(params, X).shape == X.shape


# --- numbers of specs

SPECS = [
    us.StaticScale(2.0),
    us.DynamicScale(),
    us.QSpec(axes=(-2,)),
    us.quant.Group(4),
    us.quant.EMA(),
    us.quant.Fixed(2.0),
    us.quant.Fixed(-1.0, 2.0),
    us.quant.MSE(),
    us.quant.Percentile(99.0),
    us.formats.format_of("e4m3fn"),
    us.formats.integers(8),
    us.compaction.Bytes(8),
    us.compaction.Flops(8),
    us.compaction.Params(8),
    us.prune.NofM(2, 4, axis=-1),
    us.prune.Block((2, 2)),
    us.prune.Channel(),
    us.prune.Balanced(parts=2, axis=0),
    us.prune.OneShot(1, final=0.5),
    us.prune.Cubic(0, 8, final=0.5),
    us.prune.Linear(0, 8, final=0.5),
    us.prune.Steps((1, 2), (0.25, 0.5)),
    us.prune.OWL({"a": 0.1}),
    us.prune.SparsitySpec(patterns=us.prune.Unstructured()),
    us.parallel.Schedule("1f1b", stages=2, parts=3),
]
RESULTS = {us.compaction.Rebuilt, us.distill.TopK, us.parallel.Sum, us.trace.Site, us.quant.QTensor}
RESULTS |= {us.testing.WidthRow, us.testing.WidthReport}
"""Dataclasses with numbers that the library makes, and nobody else."""


def parts_of(hint):
    """The types that an annotation is made of."""
    inside = [part for part in typing.get_args(hint) if not isinstance(part, list)]
    return set().union(*map(parts_of, inside)) if inside else {hint}


def numbers_of(spec):
    """Field -> whether its numbers are counts, and whether it may be None."""
    kinds = {name: parts_of(hint) for name, hint in typing.get_type_hints(spec).items()}
    fields = [field.name for field in dataclasses.fields(spec)]
    numeric = {int, float, types.NoneType, ...}
    kinds = {name: kinds[name] for name in fields if kinds[name] <= numeric}
    return {name: (float not in of, types.NoneType in of) for name, of in kinds.items()}


def wrong_numbers(counts, optional):
    """What no number of a spec can be."""
    wrong = [math.nan, math.inf, -math.inf, "3", [3], 3j]
    return wrong + [2.5, 2.0] * counts + [None] * (not optional)


CASES = [
    (spec, name, wrong)
    for spec in SPECS
    for name, kind in numbers_of(type(spec)).items()
    for wrong in wrong_numbers(*kind)
]


def test_every_spec_with_numbers_is_tried():
    values = [getattr(module, name) for module in NAMESPACES.values() for name in module.__all__]
    classes = {c for c in values if isinstance(c, type) and dataclasses.is_dataclass(c)}
    with_numbers = {c for c in classes if numbers_of(c)}
    assert with_numbers - RESULTS == {type(spec) for spec in SPECS}


@pytest.mark.parametrize(
    ("spec", "name", "wrong"),
    CASES,
    ids=lambda x: x if isinstance(x, str) else type(x).__name__ if x in SPECS else repr(x),
)
def test_a_number_of_a_spec_is_finite_and_a_count_is_whole(spec, name, wrong):
    value = getattr(spec, name)
    changed = (*value[:-1], wrong) if isinstance(value, tuple) else wrong
    with pytest.raises((TypeError, ValueError)) as raised:
        dataclasses.replace(spec, **{name: changed})
    text = str(raised.value)
    assert type(spec).__name__ in text or name in text
    assert len(text.split()) >= 4 and not any(words in text for words in RAW), text
