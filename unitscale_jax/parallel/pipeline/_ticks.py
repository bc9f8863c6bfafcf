"""The loop over ticks: what one device does, inside a `shard_map` over the pipeline's axis.

A tick has up to two halves. The forward half takes what arrived, runs a chunk of layers and sends
its output to the next stage; the backward half takes the cotangent that arrived, runs the chunk
again with its derivative, adds to the gradients and sends the cotangent to the stage before. The
first stage enters the model, the last one leaves it and turns round. A bubble runs nothing; where
it must (`skip=False`), its results are deselected, never multiplied away.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from unitscale_jax import tree as trees
from unitscale_jax.loss import Given, Mean, Part, Terms, scaled_objective
from unitscale_jax.mesh_axes import axes_of, varying, zeros
from unitscale_jax.parallel.pipeline import _buffers
from unitscale_jax.parallel.pipeline._buffers import added, added_at, residuals, stored, taken
from unitscale_jax.parallel.pipeline._model import Model
from unitscale_jax.parallel.pipeline._orders import Orders, TickTable
from unitscale_jax.typing import Params


class Inputs(NamedTuple):
    """Arrays that every stage has whole.

    Attributes:
        rest: Parameters other than the layers'.
        parts: The rows, dealt out and stacked.
        given: What the station was given; each part has its own keys and validity.
    """

    rest: Params
    parts: Part
    given: Given


class _Carry(NamedTuple):
    """Values that go from one tick to the next.

    Attributes:
        sources: Inputs that wait, leaves `(slots, ...)`.
        ahead: The output that the stage before has sent.
        cotangents: Cotangents that wait.
        back: The cotangent that the stage after has sent.
        kept: Residuals that wait, a list.
        layers: Gradients of this stage's layers.
        rest: Gradients of the other parameters, of this stage alone.
        terms: Totals and weights of the parts so far; zeros on all stages but the last.
        outputs: Outputs of the parts so far; zeros on all stages but the last.
    """

    sources: Any
    ahead: Any
    cotangents: Any = ()
    back: Any = ()
    kept: Any = ()
    layers: Any = ()
    rest: Any = ()
    terms: Any = ()
    outputs: Any = ()


@dataclass(frozen=True)
class Stage:
    """One device's stage of a pipeline, and how it runs a tick.

    Attributes:
        model: The pieces of the model.
        axis: The mesh axis of the stages.
        stages: The size of that axis.
        skip: Whether a bubble is skipped.
        stash: Whether residuals are kept from forward to backward.
        layers: The chunks of layers of this stage, leaves `(repeats, layers, ...)`.
        inputs: The arrays that every stage has whole.
    """

    model: Model
    axis: str
    stages: int
    skip: bool
    stash: bool
    layers: Any
    inputs: Inputs

    def typed(self) -> "Stage":
        """Types all arrays as differing between stages, so that no gradient is summed in a loop."""
        layers, inputs = varying((self.layers, self.inputs), [self.axis])
        return dataclasses.replace(self, layers=layers, inputs=inputs)

    def gradients(self, plan: TickTable, loops: Any) -> tuple[Terms, Any, Params]:
        """Runs a training step: `(terms, gradients of the layers, gradients of the rest)`.

        Terms and gradients of the rest are those of this stage, for the caller to add up.
        """
        x, kept, terms = jax.eval_shape(self._outlines)

        def accumulator(w: Any) -> jax.Array:
            return zeros(w.shape, trees.wide(w.dtype), like=w)

        carry = _Carry(
            sources=self._blanks(x, plan.sources),
            ahead=self._blanks(x),
            cotangents=self._blanks(x, plan.cotangents),
            back=self._blanks(x),
            kept=self._blanks(kept, plan.kept),
            layers=jax.tree.map(accumulator, self.layers),
            rest=jax.tree.map(accumulator, self.inputs.rest),
            terms=self._blanks(terms),
        )

        def tick(carry: _Carry, orders: Any) -> tuple[_Carry, None]:
            forward, backward = jax.tree.map(lambda column: column[0], orders)
            if forward is not None:
                carry, _ = self._forward(carry, forward)
            return carry if backward is None else self._backward(carry, backward), None

        for orders in loops:
            carry, _ = lax.scan(tick, carry, orders)
        return carry.terms, carry.layers, carry.rest

    def outputs(self, plan: TickTable, loops: Any, finish: Callable[[Any, Any, Part], Any]) -> Any:
        """Runs a forward pass: the results of `finish`, leaves `(parts, ...)`.

        Args:
            plan: The tick table.
            loops: The orders of its loops, as this device holds them.
            finish: Called as `finish(rest, output of the last layer, part)`.

        Returns:
            The results on the last stage, zeros on the others.
        """

        def finished(y: Any, part: Part) -> Any:
            return varying(finish(self.inputs.rest, y, part), self._over)

        x = jax.eval_shape(self._start)
        out = jax.eval_shape(lambda: finished(self._start(), self._part(0)))
        count = len(jax.tree.leaves(self.inputs.parts)[0])
        carry = _Carry(
            self._blanks(x, plan.sources), self._blanks(x), outputs=self._blanks(out, count)
        )

        def tick(carry: _Carry, orders: Any) -> tuple[_Carry, None]:
            job = jax.tree.map(lambda column: column[0], orders)[0]
            carry, y = self._forward(carry, job)

            def keep() -> Any:
                return stored(carry.outputs, job.part, finished(y, self._part(job.part)), job.last)

            return carry._replace(outputs=self._when(job.last, keep, lambda: carry.outputs)), None

        for orders in loops:
            carry, _ = lax.scan(tick, carry, orders)
        return carry.outputs

    # ------------------------------------------------------------------------- halves of a tick

    def _forward(self, carry: _Carry, job: Orders) -> tuple[_Carry, Any]:
        """Runs the forward half of a tick: `(carry, output of the chunk)`."""
        # Before the chunk runs: an input that arrives now may be the one it takes.
        sources = stored(carry.sources, job.into, carry.ahead, job.arrives)

        def run() -> Any:
            part, w = self._part(job.part), self._weights(job)
            enter = lambda: self._entered(part, self.inputs.rest)
            x = self._when(job.first, enter, lambda: taken(sources, job.source))
            if not self.stash:
                return x, self._chunk(part, job)(w, x), carry.kept
            y, pull = jax.vjp(self._chunk(part, job), w, x)
            new, _ = residuals(pull, (w, part))
            return x, y, stored(carry.kept, job.kept, new, job.run)

        def idle() -> Any:
            return self._empty(sources), self._empty(sources), carry.kept

        x, y, kept = self._when(job.run, run, idle)
        # The first stage makes its input here; the backward half finds it in the slot, like others.
        sources = stored(sources, job.source, x, job.run)
        return carry._replace(sources=sources, kept=kept, ahead=self._sent(y, 1)), y

    def _backward(self, carry: _Carry, job: Orders) -> _Carry:
        """Runs the backward half of a tick."""
        cotangents = stored(carry.cotangents, job.into, carry.back, job.arrives)

        def arrived() -> Any:
            return carry.terms, carry.rest, taken(cotangents, job.cotangent)

        def run() -> Any:
            part, w = self._part(job.part), self._weights(job)
            x = taken(carry.sources, job.source)
            y, pull = self._again(carry.kept, w, x, part, job)
            terms, rest, dy = self._when(job.last, lambda: self._turned(carry, y, part), arrived)
            dw, dx = pull(dy)

            def through_first() -> Params:
                _, pull_rest = jax.vjp(lambda r: self._entered(part, r), self.inputs.rest)
                return added(rest, pull_rest(dx)[0])

            new_rest = self._when(job.first, through_first, lambda: rest)
            return terms, new_rest, added_at(carry.layers, self._repeat(job), dw), dx

        def idle() -> Any:
            return carry.terms, carry.rest, carry.layers, self._empty(cotangents)

        terms, rest, layers, dx = self._when(job.run, run, idle)
        sent = self._sent(dx, -1)
        return carry._replace(
            terms=terms, rest=rest, layers=layers, cotangents=cotangents, back=sent
        )

    def _again(self, kept: Any, w: Any, x: Any, part: Part, job: Orders) -> tuple[Any, Callable]:
        """A chunk's output and derivative: computed again, or from what the forward pass kept.

        The output of the last chunk alone is needed, and only that one is computed: the last chunk
        has no forward half of its own, so nothing was kept for it. Of other chunks it is zeros.
        """
        chunk = self._chunk(part, job)
        if not self.stash:
            return jax.vjp(chunk, w, x)
        # Only the trace of `fresh` knows how to put a derivative together again.
        rebuild: list[Callable] = []

        def fresh() -> Any:
            y, pull = jax.vjp(chunk, w, x)
            new, rebuilt = residuals(pull, (w, part))
            rebuild[:] = [rebuilt]
            return y, new

        y, new = self._when(job.last, fresh, lambda: (self._blanks(x), taken(kept, job.kept)))
        return y, rebuild[0](new, (w, part))

    def _turned(self, carry: _Carry, y: Any, part: Part) -> tuple[Terms, Params, Any]:
        """Turns round on the last stage: terms, gradients of the rest, cotangent to send back."""
        value, pull, terms = jax.vjp(self._objective(part), self.inputs.rest, y, has_aux=True)
        rest, dy = pull(jnp.ones_like(value))
        sums = {name: _mean_sum(carry.terms[name], mean) for name, mean in terms.items()}
        return sums, added(carry.rest, rest), dy

    # ----------------------------------------------------------------------------- the pieces

    def _part(self, index: Any) -> Part:
        return jax.tree.map(lambda x: x[index], self.inputs.parts)

    def _weights(self, job: Orders) -> Any:
        return jax.tree.map(lambda w: w[self._repeat(job)], self.layers)

    def _repeat(self, job: Orders) -> Any:
        return job.repeat if self._repeats > 1 else 0

    def _entered(self, part: Part, rest: Params) -> Any:
        return varying(self.model.enter(rest, part, self.inputs.given.state), self._over)

    def _start(self) -> Any:
        return self._entered(self._part(0), self.inputs.rest)

    def _chunk(self, part: Part, job: Orders) -> Callable[[Any, Any], Any]:
        start = job.chunk * (self._count // (self._repeats * self.stages))
        return lambda w, x: varying(
            self.model.chunk(w, x, part, self.inputs.given.state, start), self._over
        )

    def _objective(self, part: Part) -> Callable[[Params, Any], tuple[jax.Array, Terms]]:
        given = self.inputs.given.of(part)
        of_pair = scaled_objective(self.model.tail(self._count), part.batch, given)

        def objective(rest: Params, y: Any) -> tuple[jax.Array, Terms]:
            value, (terms, _) = of_pair((rest, y))
            return value, varying(terms, self._over)

        return objective

    def _outlines(self) -> Any:
        """Computes an input, residuals and terms of one part; called for their shapes alone."""
        part, x = self._part(0), self._start()
        kept: list[Any] = []
        if self.stash:
            job = Orders(*[jnp.int32(0)] * len(Orders._fields))
            w = self._weights(job)
            kept = residuals(jax.vjp(self._chunk(part, job), w, x)[1], (w, part))[0]
        return x, kept, self._objective(part)(self.inputs.rest, x)[1]

    # ----------------------------------------------------------------------------- shapes, types

    @property
    def _repeats(self) -> int:
        return len(jax.tree.leaves(self.layers)[0])

    @property
    def _count(self) -> int:
        """The number of layers of the whole model."""
        return self._repeats * self.stages * jax.tree.leaves(self.layers)[0].shape[1]

    @property
    def _over(self) -> list[str]:
        """All mesh axes over which activations differ."""
        return axes_of((self.layers, self.inputs))

    def _when(self, where: Any, do: Callable[[], Any], idle: Callable[[], Any]) -> Any:
        return _buffers.select(self.skip, where, do, idle)

    def _blanks(self, tree: Any, slots: int | None = None) -> Any:
        return jax.tree.map(lambda x: _buffers.blank(x, self.axis, slots), tree)

    def _empty(self, buffer: Any) -> Any:
        """Makes zeros of the shape of one slot of a buffer."""
        return jax.tree.map(lambda x: zeros(x.shape[1:], x.dtype, like=x), buffer)

    def _sent(self, tree: Any, step: int) -> Any:
        """Sends a value to the next stage, or with a step of -1 to the one before."""
        ring = [(i, (i + step) % self.stages) for i in range(self.stages)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, ring), tree)


def _mean_sum(total: Mean, part: Mean) -> Mean:
    """Adds a part's term to a total. The coefficient is the same in all parts."""
    return Mean(total.total + part.total, total.weight + part.weight, part.coef)
