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
        ahead: What the stage before has sent.
        cotangents: Cotangents that wait.
        back: What the stage after has sent.
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
        stages: Its size.
        skip: Whether a bubble is skipped.
        stash: Whether residuals are kept from forward to backward.
        layers: Its chunks of layers, leaves `(repeats, layers, ...)`.
        inputs: What every stage has whole.
    """

    model: Model
    axis: str
    stages: int
    skip: bool
    stash: bool
    layers: Any
    inputs: Inputs

    def typed(self) -> "Stage":
        """The same, all of it typed as differing between stages, so that nothing is reduced yet."""
        layers, inputs = varying((self.layers, self.inputs), [self.axis])
        return dataclasses.replace(self, layers=layers, inputs=inputs)

    def gradients(self, plan: TickTable, loops: Any) -> tuple[Terms, Any, Params]:
        """`(terms, gradients of the layers, gradients of the rest)`.

        Terms and gradients of the rest are to be added up over stages.
        """
        x, kept, terms = jax.eval_shape(self._outlines)
        wide = lambda w: zeros(w.shape, trees.wide(w.dtype), like=w)
        carry = _Carry(
            sources=self._blanks(x, plan.sources),
            ahead=self._blanks(x),
            cotangents=self._blanks(x, plan.cotangents),
            back=self._blanks(x),
            kept=self._blanks(kept, plan.kept),
            layers=jax.tree.map(wide, self.layers),
            rest=jax.tree.map(wide, self.inputs.rest),
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
        """Outputs of `finish(rest, output of the last layer, part)`, leaves `(parts, ...)`.

        They are zeros on all stages but the last.
        """
        out = lambda: finish(self.inputs.rest, self._start(), self._part(0))
        x, out = jax.eval_shape(lambda: (self._start(), varying(out(), self._over)))
        count = len(jax.tree.leaves(self.inputs.parts)[0])
        carry = _Carry(
            self._blanks(x, plan.sources), self._blanks(x), outputs=self._blanks(out, count)
        )

        def tick(carry: _Carry, orders: Any) -> tuple[_Carry, None]:
            job = jax.tree.map(lambda column: column[0], orders)[0]
            carry, y = self._forward(carry, job)
            part = lambda: finish(self.inputs.rest, y, self._part(job.part))
            done = lambda: stored(carry.outputs, job.part, varying(part(), self._over), job.last)
            return carry._replace(outputs=self._when(job.last, done, lambda: carry.outputs)), None

        for orders in loops:
            carry, _ = lax.scan(tick, carry, orders)
        return carry.outputs

    # ------------------------------------------------------------------------- halves of a tick

    def _forward(self, carry: _Carry, job: Orders) -> tuple[_Carry, Any]:
        """The forward half of a tick, and its output."""
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

        idle = lambda: (self._empty(sources), self._empty(sources), carry.kept)
        x, y, kept = self._when(job.run, run, idle)
        sources = stored(sources, job.source, x, job.run)
        return carry._replace(sources=sources, kept=kept, ahead=self._sent(y, 1)), y

    def _backward(self, carry: _Carry, job: Orders) -> _Carry:
        """Runs the backward half of a tick."""
        cotangents = stored(carry.cotangents, job.into, carry.back, job.arrives)
        arrived = lambda: (carry.terms, carry.rest, taken(cotangents, job.cotangent))

        def run() -> Any:
            part, w = self._part(job.part), self._weights(job)
            enter = lambda rest: self._entered(part, rest)
            x = taken(carry.sources, job.source)
            y, pull = self._again(carry.kept, w, x, part, job)
            terms, rest, dy = self._when(job.last, lambda: self._turned(carry, y, part), arrived)
            dw, dx = pull(dy)
            through = lambda: added(rest, jax.vjp(enter, self.inputs.rest)[1](dx)[0])
            rest = self._when(job.first, through, lambda: rest)
            return terms, rest, added_at(carry.layers, self._repeat(job), dw), dx

        idle = lambda: (carry.terms, carry.rest, carry.layers, self._empty(cotangents))
        terms, rest, layers, dx = self._when(job.run, run, idle)
        sent = self._sent(dx, -1)
        return carry._replace(
            terms=terms, rest=rest, layers=layers, cotangents=cotangents, back=sent
        )

    def _again(self, kept: Any, w: Any, x: Any, part: Part, job: Orders) -> tuple[Any, Callable]:
        """A chunk's output and derivative: computed again, or from what the forward pass kept.

        The output is needed, and there, on the last stage alone.
        """
        chunk = self._chunk(part, job)
        if not self.stash:
            return jax.vjp(chunk, w, x)
        rebuild: list[Callable] = []

        def fresh() -> Any:
            y, pull = jax.vjp(chunk, w, x)
            new, rebuilt = residuals(pull, (w, part))
            rebuild[:] = [rebuilt]
            return y, new

        y, new = self._when(job.last, fresh, lambda: (self._blanks(x), taken(kept, job.kept)))
        return y, rebuild[0](new, (w, part))

    def _turned(self, carry: _Carry, y: Any, part: Part) -> tuple[Terms, Params, Any]:
        """On the last stage: terms, gradients of the rest, and the cotangent that goes back."""
        value, pull, terms = jax.vjp(self._objective(part), self.inputs.rest, y, has_aux=True)
        rest, dy = pull(jnp.ones_like(value))
        add = lambda old, new: Mean(old.total + new.total, old.weight + new.weight, new.coef)
        return {n: add(carry.terms[n], m) for n, m in terms.items()}, added(carry.rest, rest), dy

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
        """What an input, residuals and the terms of a part look like."""
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
        """Number of layers of the model."""
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
        """Zeros of the shape of one slot."""
        return jax.tree.map(lambda x: zeros(x.shape[1:], x.dtype, like=x), buffer)

    def _sent(self, tree: Any, step: int) -> Any:
        """Each stage's value as the next stage, or with a step of -1 the one before, sees it."""
        ring = [(i, (i + step) % self.stages) for i in range(self.stages)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, ring), tree)
