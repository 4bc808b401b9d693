"""Streams, by brute force: loops that read out while they learn, token by token or chunk by chunk.

Everything here is about one head of one sequence. `carry` holds the tensors of the state by name
(`nestloop.lang.state`), `position` the tokens seen before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from nestloop.lang import coefficient
from nestloop.lang.binding import Binding
from nestloop.lang.declare import Gate
from nestloop.lang.loop import LoopSpec
from nestloop.lang.optim import momentum_name
from nestloop.lang.schedule import Causal, Chunked, Program, resets_at
from nestloop.lang.state import Entry, averaged_gates, momenta_among
from nestloop.reference.bodies import Tensors, checked_loss, checked_readout


def one_stream(
    spec: LoopSpec,
    binding: Binding,
    initial: Tensors,
    carry: Tensors,
    slow: Tensors,
    tokens: Tensors,
    position: int,
) -> tuple[Tensor, Tensors, Tensor]:
    """z [N, *], the carry at the end, and each token's loss [N] at the weights its gradient was taken at."""
    walk = _Walk(spec, binding, initial, dict(carry), slow, tokens)
    schedule = spec.schedule
    if isinstance(schedule, Causal):
        walk.token_by_token(schedule, position)
    elif isinstance(schedule, Chunked):
        walk.chunk_by_chunk(schedule, position)
    else:
        assert isinstance(schedule, Program)
        walk.operations(schedule)
    return walk.results()


def fresh(entry: Entry, initial: Tensors, blank: Tensor, shape: Callable[[Entry], list[int]]) -> Tensor:
    """What an entry of the state is at the start of a sequence: `blank` is a zero of its dtype."""
    return initial[entry.like.name] if entry.part in ("weight", "anchor") else blank.new_zeros(shape(entry))


class _Walk:
    """The walk over one head's tokens."""

    def __init__(
        self, spec: LoopSpec, binding: Binding, initial: Tensors, carry: Tensors, slow: Tensors, tokens: Tensors
    ) -> None:
        self.spec, self.optimizer, self.binding = spec, spec.optimizer, binding
        self.initial, self.carry, self.slow, self.tokens = initial, carry, slow, tokens
        self.dims = {**binding.dims, "H": binding.heads}
        self.read_tokens = {n: t for n, t in tokens.items() if not spec.inputs[n].micro}
        self.z: dict[int, Tensor] = {}  # by first token
        self.losses: dict[int, Tensor] = {}

    @property
    def weights(self) -> Tensors:
        return {name: self.carry[name] for name in self.spec.fast}

    def results(self) -> tuple[Tensor, Tensors, Tensor]:
        if not self.z:
            shape = checked_readout(self.spec, {**self.dims, "n": 1})
            blank = {n: t.new_zeros(1, *t.shape[1:]) for n, t in self.read_tokens.items()}
            empty = shape(self.weights, self.slow, blank)[:0]
            return empty, self.carry, empty.new_zeros(0)
        join = [torch.cat([part[i] for i in sorted(part)]) for part in (self.z, self.losses) if part]
        losses = join[1] if self.losses else join[0].new_zeros(0)
        return join[0], self.carry, losses

    def factor(self, take: Callable[[Gate], Tensor]) -> Callable[[str, Any], Any]:
        """(fast weight, coefficient) -> its value, gates as `take` gives them."""
        sizes = self.binding.sizes
        return lambda name, part: coefficient.value(part, self.spec.fast[name], sizes, self.slow, take)

    def read(self, start: int, stop: int, weights: Tensors) -> None:
        tile = {n: t[start:stop] for n, t in self.read_tokens.items()}
        dims = {**self.dims, "n": self.spec.schedule.seen(stop - start)}
        self.z[start] = checked_readout(self.spec, dims)(weights, self.slow, tile)

    def gradients(
        self, at: Tensors, held: Tensors, tile: Tensors, weigh: bool = True, n: int = 1
    ) -> tuple[Tensors, Tensor]:
        """Each fast weight's gradient of the sum of the tile's token losses, and these losses [n].

        A gate that is a weight's learning rate weighs its tokens' losses, or their gradients' channels.
        """
        loss = checked_loss(self.spec, {**self.dims, "n": self.spec.schedule.seen(n)})
        losses = loss(at, self.slow, tile, held)
        found = {}
        for name, weight in at.items():
            rate = self.optimizer.rate_of(name) if weigh else None

            def objective(one: Tensor, mask: Tensor, name: str = name) -> Tensor:
                return (loss({**at, name: one}, self.slow, tile, held) * mask).sum()

            if isinstance(rate, Gate) and rate.dims:
                spread = coefficient.spread(tile[rate.name], rate, self.spec.fast[name])
                eye = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
                each = torch.stack([grad(objective)(weight, eye[i]) for i in range(len(losses))])
                found[name] = (spread * each).sum(0)
            else:
                mask = tile[rate.name] if isinstance(rate, Gate) else torch.ones_like(losses)
                found[name] = grad(objective)(weight, mask)
        return found, losses

    def begin(self) -> None:
        """The weights are those that the next gradients are taken at."""
        for name in self.spec.fast:
            if f"{name}.anchor" in self.carry:
                self.carry[f"{name}.anchor"] = self.carry[name]
            if f"{name}.update" in self.carry:
                self.carry[f"{name}.update"] = torch.zeros_like(self.carry[name])

    def reset(self) -> None:
        for entry in self.spec.entries.values():
            if entry.part != "tail":
                old = self.carry[entry.name]
                self.carry[entry.name] = fresh(entry, self.initial, old, lambda e: list(self.carry[e.name].shape))

    def token_by_token(self, schedule: Causal, position: int) -> None:
        for index in range(self.binding.tokens):
            at = position + index
            if resets_at(schedule, at):
                self.reset()
            if at % schedule.chunk == 0:
                self.begin()
            if schedule.read == "before":
                self.read(index, index + 1, self.weights)
            for micro in range(schedule.micro):
                if schedule.chunk == 1:
                    self.begin()  # every micro-step's gradient is taken at weights of its own
                self._one_step(index, micro, at)
            if schedule.read == "after":
                self.read(index, index + 1, self.weights)

    def _tile(self, index: int, micro: int) -> Tensors:
        """One token's views, those of one micro-step."""
        tile = {n: t[index : index + 1] for n, t in self.tokens.items()}
        return {n: t[:, micro] if self.spec.inputs[n].micro else t for n, t in tile.items()}

    def _one_step(self, index: int, micro: int, at: int) -> None:
        """Micro-step `micro` of token `index`, whose place in the sequence is `at`."""
        tile = self._tile(index, micro)
        factor = self.factor(lambda gate: tile[gate.name][0])
        anchor = {n: self.carry.get(f"{n}.anchor", self.carry[n]) for n in self.spec.fast}
        first = micro == 0

        def kept(weight: Tensor, name: str) -> Tensor:
            return self.optimizer.decayed(weight, name, factor) if first else weight

        before = self.optimizer.decay_order == "before"
        taken = {n: kept(w, n) for n, w in anchor.items()} if before else anchor
        moved, self.losses[index] = self.gradients(taken, taken, tile)
        if self.optimizer.window is not None:
            moved = self._windowed(taken, moved, index, at)
        moved = {n: g if isinstance(self.optimizer.rate_of(n), Gate) else factor(n, self.optimizer.rate_of(n)) * g
                 for n, g in moved.items()}  # fmt: skip
        for order in range(self.optimizer.orders):
            for name, gradient in moved.items():
                key = momentum_name(name, order)
                self.carry[key] = factor(name, self.optimizer.momenta_of(name)[order]) * self.carry[key] + gradient
            moved = {name: self.carry[momentum_name(name, order)] for name in moved}
        for name, update in moved.items():
            if self.optimizer.scale is None:
                self.carry[name] = kept(self.carry[name], name) - update
            else:
                key = f"{name}.update"
                total = self.carry.get(key, torch.zeros_like(update)) + update
                self.carry[key] = total
                scale = factor(name, self.optimizer.scale_of(name))
                self.carry[name] = anchor[name] - scale * total

    def _windowed(self, at: Tensors, newest: Tensors, index: int, place: int) -> Tensors:
        """The gradients of the last tokens too, all at the same weights; the tail keeps their views."""
        window = self.optimizer.window
        assert window is not None
        total = dict(newest)
        if window == 1:
            return total
        tails = {n: self.carry[f"{n}.tail"] for n in self.tokens}
        for back in range(1, min(window - 1, place) + 1):
            tile = {n: t[-back : None if back == 1 else -back + 1] for n, t in tails.items()}
            older, _ = self.gradients(at, at, tile)
            total = {n: total[n] + older[n] for n in total}
        for name, tail in tails.items():
            self.carry[f"{name}.tail"] = torch.cat([tail[1:], self.tokens[name][index : index + 1]])
        return total

    def chunk_by_chunk(self, schedule: Chunked, position: int) -> None:
        start, tokens = 0, self.binding.tokens
        while start < tokens:
            at = position + start
            if resets_at(schedule, at):
                self.reset()
            stop = min(tokens, start + schedule.size - at % schedule.size)
            complete = (position + stop) % schedule.size == 0
            if schedule.anchor and at % schedule.anchor == 0:
                self.begin()
            if schedule.order == "update-apply":
                self._step(schedule, start, stop, {})
                self.read(start, stop, self.weights)
            else:
                if at % schedule.size == 0:
                    self._clear_pending()
                self._apply_then_update(schedule, start, stop, complete)
            start = stop

    def _clear_pending(self) -> None:
        """Nothing waits between two chunks, whatever a state says."""
        for entry in self.spec.entries.values():
            if entry.part == "pending":
                self.carry[entry.name] = torch.zeros_like(self.carry[entry.name])

    def _apply_then_update(self, schedule: Chunked, start: int, stop: int, complete: bool) -> None:
        before = self.weights
        pending = [e for e in self.spec.entries.values() if e.part == "pending"]
        if complete:
            self._step(schedule, start, stop, {e.name: self.carry[e.name] for e in pending})
            self._clear_pending()
        else:
            anchor = {n: self.carry.get(f"{n}.anchor", self.carry[n]) for n in self.spec.fast}
            tile = {n: t[start:stop] for n, t in self.tokens.items()}
            gradients, self.losses[start] = self.gradients(anchor, anchor, tile, n=stop - start)
            for name, gradient in gradients.items():
                self.carry[f"{name}.pending"] = self.carry[f"{name}.pending"] + gradient
            for gate in averaged_gates(self.spec):
                self.carry[f"{gate.name}.pending"] = self.carry[f"{gate.name}.pending"] + tile[gate.name].sum(0)
        last = stop - 1 if schedule.inclusive and complete else stop
        if last > start:
            self.read(start, last, before)
        if last < stop:
            self.read(last, stop, self.weights)

    def operations(self, program: Program) -> None:
        for kind, start, stop in program.on(self.binding.sizes, self.spec.where):
            if kind == "update":
                self._step(program, start, stop, {})
            else:
                self.read(start, stop, self.weights)

    def _step(self, schedule: Chunked | Program, start: int, stop: int, pending: Tensors) -> None:
        """One step on the tokens start:stop, with what the chunk's earlier tokens left."""
        tile = {n: t[start:stop] for n, t in self.tokens.items()}
        anchor = {n: self.carry.get(f"{n}.anchor", self.carry[n]) for n in self.spec.fast}
        gradients, losses = self.gradients(anchor, anchor, tile, n=stop - start)
        if isinstance(schedule, Chunked):
            self.losses[start] = losses
        for name in gradients:
            gradients[name] = gradients[name] + pending.get(f"{name}.pending", 0.0)
        count = schedule.size if pending and isinstance(schedule, Chunked) else stop - start
        factor = self.factor(lambda g: (tile[g.name].sum(0) + pending.get(f"{g.name}.pending", 0.0)) / count)
        momenta = momenta_among(self.spec.entries, self.carry)
        made, kept = self.optimizer.take_step(self.weights, momenta, gradients, self.initial, factor)
        self.carry.update({**made, **kept})
