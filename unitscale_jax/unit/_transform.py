"""Unit scaling of any function: the same program, with factors put between its operations.

    scaled = us.unit_scaled(loss)

The function is traced and looked at as a graph from its parameters to its loss. Each operation gets
the forward factor that makes its result unit for unit operands (`_ideal`), residual connections
get their weights (`_branches`), and the backward factors are chosen so that each gradient is a
positive multiple of the true one (`_potential`). The value of the loss is that of the function
from its last parameter on: there nothing is scaled but the gradient, by one factor.

Unit Scaling: https://arxiv.org/abs/2303.11257; u-muP: https://arxiv.org/abs/2407.17465.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from unitscale_jax import rules as named_rules
from unitscale_jax.errors import check_number
from unitscale_jax.fwd_bwd import scale
from unitscale_jax.loss import around
from unitscale_jax.trace.program import Site, TracedCall, bodies, trace_call
from unitscale_jax.trace.rewrite import Rewriter, noted, taking
from unitscale_jax.unit._factors import Family, check_family
from unitscale_jax.unit._plan import Factor, ScalePlan, Share, plan_of


def unit_scaled(
    fn: Callable[..., Any],
    *,
    factors: Family = "exact",
    taus: Sequence[float] | None = None,
    keep: Sequence[named_rules.Pattern] = (),
    batch_ratio: float = 1,
) -> Callable[..., Any]:
    """Scales a loss so that its values and gradients start with RMS near 1.

    Args:
        fn: A function of parameters, `fn(params, *args)`, that returns a loss: a scalar, a `Mean`,
            a dict of `Mean`s, or one of these and auxiliary outputs. Its parameters are to be
            unit: see `standardize`.
        factors: "exact" calibrates activations on Gaussian numbers, and is the only family here.
        taus: Weights of the residual branches in the order of evaluation; those of u-muP if None.
        keep: Patterns of names of parameters or scopes whose operations keep their size.
        batch_ratio: Rows of the whole step for each row of a call: parts of an accumulation times
            shards of a `shard_map`.

    Returns:
        A function of the signature of `fn`. Its gradients are positive multiples of the true
        gradients of the function that it computes; `constants` tells the factors.

    Raises:
        ValueError: At the call: `fn` returns no loss, or no parameter reaches it; another number
            of taus is given than there are branches; a pattern matches nothing.

    The last product before a loss, the readout, is scaled by 1 / fan-in, as in u-muP: its outputs
    shrink with width. Scalar factors in `fn` that only set a size, such as head^-1/2 of logits,
    have no effect, for what they multiply is made unit again. What is left alone (loops whose
    length depends on data, kernels, custom derivatives) is in `us.explain(scaled)(..).left`, with
    the reason.

    Example:
        >>> def loss(params, x):
        ...     y = jax.nn.relu(x @ params["w"]) @ params["v"]
        ...     return us.Mean(jnp.sum((y - 1.0) ** 2), len(x))
        >>> w, v = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> x = jax.random.normal(jax.random.key(1), (32, 64))
        >>> def sizes(loss):
        ...     grads = jax.grad(lambda params: loss(params, x).value)({"v": v, "w": w})
        ...     return [0.25 < float(jnp.sqrt(jnp.mean(g**2))) < 4 for g in grads.values()]
        >>> sizes(loss), sizes(us.unit_scaled(loss))
        ([False, False], [True, True])
    """
    if factors != "exact":
        check_family(factors)
        raise ValueError(
            f"factors is {factors!r}: the fitted formulas are of single operations, and a function "
            "is scaled by calibration. Use factors='exact', or the operations of us.unit."
        )
    check_number("batch_ratio", batch_ratio)
    if batch_ratio < 1:
        raise ValueError(f"batch_ratio is {batch_ratio}; expected a number of at least 1.")

    @around(fn, "unit_scaled")
    def unit_scaled_fn(*args: Any, **kwargs: Any) -> Any:
        staged = trace_call(fn, *args, **kwargs)
        plan = plan_of(staged, args[0] if args else (), taus, keep, batch_ratio)
        return staged.finish(_Scaled(plan).program(staged))

    return unit_scaled_fn


class _Scaled(Rewriter):
    """Replays a program with the factors of a plan."""

    def __init__(self, plan: ScalePlan) -> None:
        super().__init__({})
        self.plan = plan
        self.rows: dict[Share, Any] = {}
        self.made: dict[tuple[int, Factor], tuple[Any, Any]] = {}  # a body scales a value once

    def program(self, staged: TracedCall) -> list[Any]:
        out = self(staged.closed.jaxpr, staged.closed.consts, staged.operands)
        outputs = self.plan.outputs
        return [self.scaled(x, outputs[k]) if k in outputs else x for k, x in enumerate(out)]

    def __call__(self, *args: Any) -> list[Any]:
        # What is made in a loop's body must not be seen outside of it.
        outside, self.made = self.made, {}
        try:
            return super().__call__(*args)
        finally:
            self.made = outside

    def touches(self, site: Site, operands: list[Any]) -> bool:
        del operands
        enters = taking() and not site.name.startswith("custom_")
        return bool(bodies(site.eqn)) and (site.place in self.plan.inside or enters)

    def step(self, site: Site, operands: list[Any]) -> list[Any]:
        place, plan = site.place, self.plan
        given = [
            self.scaled(x, plan.operands[place, k]) if (place, k) in plan.operands else x
            for k, x in enumerate(operands)
        ]
        out = self._noted(site, given) if taking() else super().step(site, given)
        return [
            self.scaled(y, plan.results[place, k]) if (place, k) in plan.results else y
            for k, y in enumerate(out)
        ]

    def _noted(self, site: Site, operands: list[Any]) -> Sequence[Any]:
        places = [site.place[:k] for k in range(len(site.place), 0, -2)]  # a composite's body, too
        note = next((self.plan.notes[at] for at in places if at in self.plan.notes), None)
        if note is None and not bodies(site.eqn):
            note = "no gradient of a parameter passes"
        if note is None:
            return super().step(site, operands)
        with noted(unit=note):
            return super().step(site, operands)

    def turns(self, site: Site) -> list[Any]:
        return [
            jnp.asarray(x, jnp.result_type(float)) for _, x in self.plan.loops.get(site.place, ())
        ]

    def turn(self, site: Site, rows: Sequence[Any]) -> None:
        names = [share for share, _ in self.plan.loops.get(site.place, ())]
        self.rows |= dict(zip(names, rows, strict=True))

    def scaled(self, x: Any, factor: Factor) -> Any:
        """A value times its factors; the same value with the same factors is made once."""
        key = id(x), factor
        if key not in self.made:
            fwd = self._with_shares(factor.fwd, factor.fwd_shares)
            bwd = self._with_shares(factor.bwd, factor.bwd_shares)
            self.made[key] = x, scale(x, fwd=fwd, bwd=bwd)
        return self.made[key][1]

    def _with_shares(self, number: float, powers: Sequence[tuple[Share, int]]) -> Any:
        found: Any = number
        for share, power in powers:
            found = found * self.rows[share] if power > 0 else found / self.rows[share]
        return found
