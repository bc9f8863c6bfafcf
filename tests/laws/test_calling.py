"""The one calling convention of everything that looks at a function.

    A(fn, params, *args, **kwargs) == A(functools.partial(fn, **kwargs), params, *args)

Arrays are inputs, whatever they are called by; strings, flags, numbers and `None` are static.
"""

import functools
import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import unitscale_jax as us
from unitscale_jax import trace
from unitscale_jax.trace.program import sites, trace_call

X = jax.random.normal(jax.random.key(1), (4, 6))
KEY = jax.random.key(7)
W8 = us.DotSpec(w=us.QSpec(), x=us.QSpec())


def plain(
    p, x, mode="relu", *, train, depth=1, rate=0.5, mask=None, mesh_axis=None, tolerance=None
):
    """Static values of every kind, an array among the keywords, and names that options have."""
    if mode not in ("relu", "tanh"):
        raise ValueError(mode)
    h = x if mask is None else jnp.where(mask[:, None], x, 0.0)
    h = h @ p["up"]
    for _ in range(depth):
        h = (jax.nn.relu if mode == "relu" else jnp.tanh)(h)
    h = h @ p["down"]
    scaled = h * rate if train else h
    return scaled if (mesh_axis, tolerance) == (None, None) else scaled + 1.0


class Linen(linen.Module):
    """Two layers and dropout, as of the bridge."""

    @linen.compact
    def __call__(self, x, *, train):
        h = linen.Dropout(0.5, deterministic=not train)(jax.nn.relu(linen.Dense(8)(x)))
        return linen.Dense(5)(h)


class Normed(linen.Module):
    """A layer with batch statistics, whose bridge takes and returns a state."""

    @linen.compact
    def __call__(self, x, *, train):
        h = linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x))
        return linen.Dense(5)(jax.nn.relu(h))


class Nnx(nnx.Module):
    """The twin of `Linen`, whose flag is a string."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, how):
        return self.down(self.drop(jax.nn.relu(self.up(x)), deterministic=how != "train"))


def bridged(module):
    apply, params, _ = us.from_linen(module, module.init(KEY, X, train=False))
    return apply, params


@functools.cache
def models():
    """name -> (fn, params, args, kwargs)"""
    p = {"up": jax.random.normal(KEY, (6, 8)), "down": jax.random.normal(KEY, (8, 6))}
    apply, params = bridged(Linen())
    twin, twin_params, _ = us.from_nnx(Nnx(nnx.Rngs(0)))
    return {
        "flag": (plain, p, (X,), {"train": True}),
        "string by position": (plain, p, (X, "tanh"), {"train": False}),
        "string": (plain, p, (X,), {"train": False, "mode": "tanh", "mask": None}),
        "numbers": (plain, p, (X,), {"train": True, "depth": 2, "rate": 0.25}),
        "array": (plain, p, (X,), {"train": True, "mask": jnp.arange(4) > 0}),
        "Linen": (apply, params, (X,), {"train": True, "key": KEY}),
        "Linen serving": (apply, params, (X,), {"train": False}),
        "NNX": (twin, twin_params, (X,), {"how": "train", "key": KEY}),
        "NNX by position": (twin, twin_params, (X, "serve"), {}),
    }


MODELS = list(models())


def kernels(params):
    return [name for name, leaf in us.tree.named_leaves(params).items() if np.ndim(leaf) == 2]


def equations(traced):
    return [site.name for site in sites(traced.closed.jaxpr)]


@functools.cache
def half(name):
    """A plan that keeps half of the first group; all, if random numbers let nothing go."""
    fn, params, args, kwargs = models()[name]
    found = us.compaction.groups(functools.partial(fn, **kwargs), params, *args)
    kept = {group.name: range(0, group.size, 2) for group in found.groups[:1]}
    return us.compaction.plan_of(found, kept, exact_only=False)


def verified(name, fn, params, /, *args, **kwargs):
    return us.compaction.verify(fn, half(name), params, *args, **kwargs)


def rebuilt(name, fn, params, /, *args, **kwargs):
    same = us.compaction.compacted(fn, half(name))
    return us.compaction.verify_rebuild(fn, half(name), same, params, *args, **kwargs)


def explained(_, fn, params, /, *args, **kwargs):
    rows = us.explain(fn)(params, *args, **kwargs).rows
    return [(row.name, row.parameters, row.operands, row.flops) for row in rows]


def resolved(_, fn, params, /, *args, **kwargs):
    rules = {name: W8 for name in kernels(params)}
    return us.quant.resolve(rules, fn, params, *args, **kwargs)


def pruned(_, fn, params, /, *args, **kwargs):
    patterns = {name: us.prune.NofM(1, 2) for name in kernels(params)}
    spec = us.prune.SparsitySpec(patterns=patterns)
    return us.prune.resolve_axes(spec, fn, params, *args, **kwargs)


def met(_, fn, params, /, *args, **kwargs):
    found = trace.meetings(trace_call(fn, params, *args, **kwargs), params)
    return {name: [(m.kind, m.site.name) for m in those] for name, those in found.items()}


def featured(_, fn, params, /, *args, **kwargs):
    named = {"hidden": f"{kernels(params)[-1]}:input"}
    return us.distill.features(fn, named)(params, *args, **kwargs)


def seen(_, fn, params, /, *args, **kwargs):
    pick = lambda site, operands, _: operands[0] if site.name == "dot_general" else None
    result, captures = trace.captured(fn, pick)(params, *args, **kwargs)
    return result, [capture.value for capture in captures]


def calibrated(_, fn, params, /, *args, **kwargs):
    rules = {name: us.DotSpec(w=us.QSpec(axes=(-2,)), x=us.QSpec()) for name in kernels(params)}
    stats = us.calibrate(fn, params, [args], rules, **kwargs)
    return {name: stat.range.tolist() for name, stat in stats.items()}


def activations(_, fn, params, /, *args, **kwargs):
    bound = functools.partial(fn, **kwargs)
    graph = us.compaction.groups(bound, params, *args)
    scores = us.compaction.activation(graph, fn, params, [(args, kwargs)])
    return {name: found.tolist() for name, found in scores.items()}


def roles(_, fn, params, /, *args, **kwargs):
    """Its options have the names of some keywords, so all of these come in `kwargs`."""
    return us.tree.named_leaves(us.unit.roles(fn, params, *args, kwargs=kwargs))


def scales(_, fn, params, /, *args, **kwargs):
    """Of the sum of the outputs, for what is tracked is a loss."""
    outputs = lambda *args, **kwargs: filter(
        us.tree.is_floating, jax.tree.leaves(fn(*args, **kwargs))
    )
    loss = lambda *args, **kwargs: sum(
        x.astype(jnp.float32).sum() for x in outputs(*args, **kwargs)
    )
    rows = us.unit.tracked(loss)(params, *args, **kwargs)[1].rows
    return [(row.direction, row.primitive, row.parameter, row.rms) for row in rows]


MESH = us.parallel.mesh(dp=4, tp=2)
ANALYSERS = {
    "explain": explained,
    "resolve": resolved,
    "prune.resolve": pruned,
    "infer": lambda _, *args, **kwargs: str(us.parallel.infer(*args, mesh=MESH, **kwargs)),
    "groups": lambda _, *args, **kwargs: str(us.compaction.groups(*args, **kwargs)),
    "verify": verified,
    "verify_rebuild": rebuilt,
    "cost": lambda _, *args, **kwargs: trace.cost(*args, **kwargs).by_primitive,
    "trace": lambda _, *args, **kwargs: equations(trace.trace(*args, **kwargs)),
    "dims": lambda _, *args, **kwargs: str(trace.dims(trace.trace(*args, **kwargs))),
    "meetings": met,
    "roles": roles,
    "tracked": scales,
    "features": featured,
    "captured": seen,
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("analyser", ANALYSERS)
def test_keywords_say_what_a_function_with_them_says(analyser, model):
    fn, params, args, kwargs = models()[model]
    look = functools.partial(ANALYSERS[analyser], model)
    bound = functools.partial(fn, *(), **kwargs)
    got, wanted = look(fn, params, *args, **kwargs), look(bound, params, *args)
    if analyser in ("features", "captured"):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
    else:
        assert got == wanted


@pytest.mark.parametrize("analyser", [a for a in ANALYSERS if "verify" not in a])
def test_a_state_among_the_keywords_is_an_input(analyser):
    module = Normed()
    apply, params, state = us.from_linen(module, module.init(KEY, X, train=False))
    look = functools.partial(ANALYSERS[analyser], "state")
    got = look(apply, params, X, state=state, train=True)
    by_position = lambda p, x, state: apply(p, x, state=state, train=True)
    wanted = look(by_position, params, X, state)
    if analyser in ("features", "captured"):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
    else:
        assert got == wanted


def clashing(
    p,
    x,
    *,
    fn=0.0,
    params=0.0,
    rules=0.0,
    spec=0.0,
    plan=0.0,
    rebuilt_fn=0.0,
    batches=0.0,
    observers=0.0,
    staged=0.0,
    graph=0.0,
    args=0.0,
    inputs=0.0,
):
    """Keywords with the names of the analysers' own arguments."""
    own = [fn, params, rules, spec, plan, rebuilt_fn, batches, observers, staged, graph]
    return jax.nn.relu(x @ p["up"]) @ p["down"] * sum(own + [args, inputs])


OWN = [name for name in inspect.signature(clashing).parameters if name not in ("p", "x")]
OF_KEYWORDS = ANALYSERS | {"calibrate": calibrated, "activation": activations}


@pytest.mark.parametrize("analyser", OF_KEYWORDS)
def test_keywords_with_the_names_of_an_analysers_own_arguments_reach_the_function(analyser):
    _, params, args, _ = models()["flag"]
    kwargs = {name: 1.0 + k for k, name in enumerate(OWN)}
    look = functools.partial(OF_KEYWORDS[analyser], "flag")
    bound = functools.partial(clashing, **kwargs)
    got, wanted = look(clashing, params, *args, **kwargs), look(bound, params, *args)
    if analyser in ("features", "captured"):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
    else:
        assert got == wanted


def test_every_analyser_that_takes_keywords_of_a_function_has_no_other_name_for_its_own():
    """By signature, so that an analyser which is added later is a member of the family."""
    takes = lambda f: any(p.kind == p.VAR_KEYWORD for p in inspect.signature(f).parameters.values())
    spaces = (us, us.quant, us.statistics, us.prune, us.compaction, us.parallel, us.trace)
    values = [getattr(space, name) for space in spaces for name in space.__all__]
    found = {f for f in values if isinstance(f, types.FunctionType) and takes(f)}
    analysers = {f for f in found if "fn" in inspect.signature(f).parameters}
    assert {us.quant.resolve, us.prune.resolve_axes, us.calibrate, trace.cost} <= analysers
    for f in analysers:
        named = [
            p.name
            for p in inspect.signature(f).parameters.values()
            if p.kind == p.POSITIONAL_OR_KEYWORD
        ]
        assert not named, (f.__name__, named)


OPTIONS = {
    "infer": (us.parallel.infer, {"mesh": MESH, "mesh_axis": "tp"}, {"mesh_axis": "tp"}),
    "verify": (
        lambda fn, *args, **kwargs: us.compaction.verify(fn, half("flag"), *args, **kwargs),
        {"tolerance": 1e-3, "gradients": False},
        {"tolerance": 1.0},
    ),
    "verify_rebuild": (
        lambda fn, *args, **kwargs: rebuilt("flag", fn, *args, **kwargs),
        {"tolerance": 1e-3},
        {"tolerance": 1.0},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_wins_over_a_keyword_of_its_name_which_has_a_way_in(name):
    analyser, options, same_name = OPTIONS[name]
    fn, params, args, kwargs = models()["flag"]
    bound = functools.partial(fn, **kwargs, **same_name)
    got = analyser(fn, params, *args, kwargs=same_name, **kwargs, **options)
    wanted = analyser(bound, params, *args, **options)
    assert str(got) == str(wanted)


def test_a_traced_function_is_called_as_it_was_traced():
    fn, params, args, kwargs = models()["array"]
    traced = trace.trace(fn, params, *args, **kwargs)
    again = traced(params, 2 * X, **kwargs)
    np.testing.assert_array_equal(again, fn(params, 2 * X, **kwargs))
    with pytest.raises(TypeError, match="traced with arguments of"):
        traced(params, X)


def test_what_a_function_returns_beside_arrays_does_not_disturb():
    fn = lambda p, x: {"y": x @ p["w"], "how": "serving", "rows": 3, "none": None}
    traced = trace.trace(fn, {"w": jnp.ones((6, 5))}, X)
    result = traced.result
    assert result["y"].shape == (4, 5) and result["rows"].shape == () and result["how"] is None
    assert len(us.compaction.groups(fn, {"w": jnp.ones((6, 5))}, X).refused) == 2


def test_numbers_of_the_parameters_are_arrays():
    traced = trace.trace(lambda p, n: p["a"] * n, {"a": 2.0}, 3)
    assert [aval.shape for aval in traced.closed.in_avals] == [()]
    assert float(traced({"a": 5.0}, 3)) == 15
