"""What calling a pipeline does: rows dealt out, weights summed, one `shard_map` over the stages."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from unitscale_jax.errors import uneven_rows
from unitscale_jax.loss import (
    Denominators,
    Given,
    Mean,
    Part,
    Terms,
    first as first_of,
    gather_rows,
    keys_of_rows,
    row_count,
    scalar_terms,
    split,
    value_and_grad,
    weight_slice,
)
from unitscale_jax.mesh_axes import agree, zeros
from unitscale_jax.parallel.layouts._context import axis_size, shared_axes
from unitscale_jax.parallel.pipeline import _buffers
from unitscale_jax.parallel.pipeline._model import Model
from unitscale_jax.parallel.pipeline._orders import TickTable, serving, training
from unitscale_jax.parallel.pipeline._schedule import Name, Schedule
from unitscale_jax.parallel.pipeline._stages import Stages, taken_apart
from unitscale_jax.parallel.pipeline._ticks import Inputs, Stage
from unitscale_jax.trace.program import as_arrays, sliced, trace
from unitscale_jax.typing import Batch, Key, Params, State


@dataclass(frozen=True)
class Run:
    """The functions of a `Pipelined`, whose options these are."""

    model: Model
    parts: int
    schedule: Name
    axis: str
    stash: bool
    skip: bool | None

    def gradients(self, params: Params, batch: Batch, given: Given) -> tuple[Terms, Any, Params]:
        """Evaluates terms, no auxiliary outputs, and gradients, as a `Grad` does."""
        stages, rest, together = taken_apart(params)
        schedule = self._schedule(self.schedule, stages, self.parts)
        rows = row_count(batch)
        given = given._replace(key=keys_of_rows(given.key, rows), scale=jnp.asarray(given.scale))
        parts = split(batch, given.key, given.valid, rows, self.parts, None)
        self._check_rows(params, batch, given, self.parts)
        self.model.check(stages, rest, first_of(parts), given.state)
        if given.denominators is None:
            given = given._replace(denominators=_weights(self._whole, params, parts, given))
        if schedule.stages == 1:
            return self._alone(params, parts, given)
        plan = training(schedule, stash=self.stash)
        inputs = Inputs(rest, parts, given._replace(key=None, valid=None))

        def body(stage: Stage, loops: Any) -> Any:
            terms, layers, rest = stage.gradients(plan, loops)
            return *lax.psum((terms, rest), self.axis), jax.tree.map(lambda g: g[:, None], layers)

        specs = (P(), P(), P(None, self.axis))
        terms, rest, layers = self._mapped(body, plan, stages, inputs, self.stash, specs)
        return terms, None, together(layers, rest)

    def apply(
        self, params: Params, inputs: Batch, *, state: State = None, key: Key | None = None
    ) -> Any:
        """Evaluates the model: the outputs of `head`, one for each row of the inputs."""
        if self._size() == 1:
            stages, rest, _ = taken_apart(params)
            part = Part(inputs, keys_of_rows(key, row_count(inputs)), None)
            return self.model.outputs(stages, rest, part, state)
        outputs = self._outputs(self.model.leave, params, inputs, state, key)
        return gather_rows(outputs, row_count(inputs))

    def loss(self, params: Params, batch: Batch, /, **state_and_key: Any) -> dict[str, Any]:
        """Evaluates the terms of the loss, per row where it returns them per row.

        What does not depend on parameters, weights above all, is computed beside the pipeline, so
        that whoever needs only that computes nothing else.
        """

        def totals(*args: Any) -> dict[str, Any]:
            terms = self.model.value(self.model.leave(*args), *args[2:4])
            return {n: m.total if _is_mean(m) else m for n, m in _named(terms).items()}

        rows = row_count(batch)
        state, key = state_and_key.get("state"), state_and_key.get("key")
        args = (params, batch, state, keys_of_rows(key, rows))
        if self._size() == 1:
            return self._named_whole(*args)
        self._check_rows(params, batch, Given(*args[2:]), self._parts_of(batch))
        found = self._outputs(totals, *args)
        outlines = jax.eval_shape(self._named_whole, *args)
        fixed = trace(lambda *args: _beside(self._named_whole(*args)), *as_arrays(args))
        values = sliced(fixed, [True] * fixed.outputs.num_leaves)(*args)
        beside = jax.tree.unflatten(fixed.outputs, values)
        joined = lambda n, m: _joined(found[n], m, beside.get(n), rows)
        return {n: joined(n, m) for n, m in outlines.items()}

    # --------------------------------------------------------------------------------- pieces

    def _alone(self, params: Params, parts: Part, given: Given) -> tuple[Terms, Any, Params]:
        """Evaluates the gradient on one device that holds all layers, part by part."""
        grad_fn = value_and_grad(self._whole)

        def of_part(part: Part) -> tuple[Terms, Params]:
            terms, _, grads = grad_fn.call(params, part.batch, given.of(part))
            return terms, grads

        def add(sums: Any, part: Part) -> tuple[Any, Any]:
            terms, grads = of_part(part)
            after = _buffers.added(
                sums, ({n: (m.total, m.weight) for n, m in terms.items()}, grads)
            )
            return agree(after, sums), {n: m.coef for n, m in terms.items()}

        terms, grads = jax.eval_shape(of_part, first_of(parts))
        sums = ({n: (m.total, m.weight) for n, m in terms.items()}, grads)
        start = jax.tree.map(lambda x: zeros(x.shape, x.dtype, like=x), sums)
        (sums, grads), coefs = lax.scan(add, start, parts)
        return {n: _mean(sums[n], coef[-1]) for n, coef in coefs.items()}, None, grads

    def _outputs(
        self, finish: Callable[..., Any], params: Params, batch: Batch, state: State, key: Any
    ) -> Any:
        """Evaluates `finish(rest, x, part, state, layers)` of every part, on all stages."""
        count, rows = self._parts_of(batch), row_count(batch)
        stages, rest, _ = taken_apart(params)
        name: Name = "circular" if stages.shape[0] > 1 else "gpipe"
        plan = serving(self._schedule(name, stages, count))
        parts = split(batch, keys_of_rows(key, rows), None, rows, count, None)
        self.model.check(stages, rest, first_of(parts), state)
        inputs = Inputs(rest, parts._replace(valid=None), Given(state, scale=jnp.float32(1)))

        def body(stage: Stage, loops: Any) -> Any:
            layers = math.prod(stages.shape)

            def of_part(rest: Params, x: Any, part: Part) -> Any:
                return finish(rest, x, part, stage.inputs.given.state, layers)

            return _added_up(stage.outputs(plan, loops, of_part), self.axis)

        return self._mapped(body, plan, stages, inputs, False, P())

    def _mapped(
        self,
        body: Callable[[Stage, Any], Any],
        plan: TickTable,
        stages: Stages,
        inputs: Inputs,
        stash: bool,
        out_specs: Any,
    ) -> Any:
        """Evaluates `body(stage, orders of its loops)` on every stage."""
        size = stages.shape[1]
        _check_order(self.axis)
        skip = not shared_axes(self.axis) if self.skip is None else self.skip

        def local(layers: Any, inputs: Inputs, loops: Any) -> Any:
            own = jax.tree.map(lambda w: w[:, 0], layers)
            stage = Stage(self.model, self.axis, size, skip, stash, own, inputs)
            return body(stage.typed(), loops)

        spread = P(None, self.axis)
        mapped = jax.shard_map(
            local,
            in_specs=(spread, P(), spread),
            out_specs=out_specs,
            axis_names={self.axis},
        )
        return mapped(stages.layers, inputs, jax.tree.map(jnp.asarray, plan.loops))

    def _schedule(self, name: Name, stages: Stages, parts: int) -> Schedule:
        repeats, count, _ = stages.shape
        size = self._size()
        if count != size:
            raise ValueError(
                f"the layers are stacked for {count} stages, and the mesh axis {self.axis!r} has "
                f"{size} devices. Stack the named layers again: "
                f"us.parallel.stack(us.parallel.unstack(params), pattern, stages={size})."
            )
        return Schedule(name, size, parts, repeats)

    def _size(self) -> int:
        return axis_size(self.axis, "pipelined")

    def _parts_of(self, batch: Batch) -> int:
        """The number of parts of a forward pass, whose batch may be smaller than in training."""
        return min(self.parts, row_count(batch))

    def _named_whole(self, params: Params, batch: Batch, state: State, key: Key | None) -> Any:
        """Evaluates the loss as on one device, by name of its terms."""
        stages, rest, _ = taken_apart(params)
        return _named(self.model.whole(stages, rest, Part(batch, key, None), state))

    def _whole(self, params: Params, batch: Batch, /, **state_and_key: Any) -> Any:
        get = state_and_key.get
        return self._named_whole(params, batch, get("state"), get("key"))

    def _check_rows(self, params: Params, batch: Batch, given: Given, parts: int) -> None:
        """Raises `ValueError` if rows that fill up the last part would count in a term of the loss.

        They get weight 0 where the loss returns a term per row. A sum over rows includes them.
        """
        rows = row_count(batch)
        if rows % parts == 0:
            return
        if fixed := scalar_terms(self._whole, params, batch, given):
            raise ValueError(
                f"{uneven_rows(f'{parts} parts', rows, fixed[0])}, or choose `parts` among the "
                f"divisors of {rows}."
            )


def _check_order(mesh_axis: str) -> None:
    """Raises `ValueError` where XLA of JAX 0.12 would abort the process.

    It does on manual axes that are not in the order of the mesh, beside one of the partitioner's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names, around = list(mesh.axis_names), set(mesh.manual_axes)
    after = [name for name in names[names.index(mesh_axis) :] if name in around]
    free = [n for n in names if n not in around and n != mesh_axis and mesh.shape[n] > 1]
    if after and free:
        order = [*[n for n in names if n in around], mesh_axis, *[n for n in names if n in free]]
        listed = ", ".join(f"{name}={mesh.shape[name]}" for name in order)
        raise ValueError(
            f"the mesh axis {mesh_axis!r} comes before {after[0]!r}, which a shard_map around the "
            f"pipeline owns, and the compiler does not take that beside {free[0]!r}. Order the "
            f"axes as us.parallel.mesh({listed})."
        )


def _weights(loss: Any, params: Params, parts: Part, given: Given) -> Denominators:
    """Sums the weight of each term over all parts, before any gradient."""
    one = first_of(parts)
    of_part = weight_slice(loss, params, one.batch, given.of(one))

    def step(carry: None, part: Part) -> tuple[None, Any]:
        return carry, of_part(part.batch, given.of(part))

    return jax.tree.map(jnp.sum, lax.scan(step, None, parts)[1])


def _added_up(tree: Any, mesh_axis: str) -> Any:
    """Brings what one stage has to all stages, where the others have zeros."""

    def add(x: jax.Array) -> jax.Array:
        if x.dtype == bool:  # which has no sum
            return lax.psum(x.astype(jnp.uint8), mesh_axis) != 0
        return lax.psum(x, mesh_axis)

    return jax.tree.map(add, tree)


def _mean(sums: tuple[jax.Array, jax.Array], coef: jax.Array) -> Mean:
    return Mean(sums[0], sums[1], coef)


def _is_mean(node: Any) -> bool:
    return isinstance(node, Mean)


def _named(terms: Any) -> dict[str, Any]:
    """Names the terms of a loss; a single one is "loss"."""
    named = terms if isinstance(terms, Mapping) else {"loss": terms}
    return {str(name): term for name, term in named.items()}


def _beside(terms: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Collects weight and coefficient of each term that is a `Mean`."""
    return {name: (m.weight, m.coef) for name, m in terms.items() if _is_mean(m)}


def _joined(found: jax.Array, outline: Any, beside: Any, rows: int) -> Any:
    """Joins the values of a term for each part to its value for the whole batch."""
    if not _is_mean(outline):
        return jnp.mean(found)
    total = gather_rows(found, rows) if outline.total.shape else jnp.sum(found, axis=0)
    return Mean(total, *beside)
