"""What every form of a chunk's step shares: its inputs and results by name, its rows, the values of coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestloop.lang import coefficient
from nestloop.lang.declare import Declaration, Gate
from nestloop.lang.loop import LoopSpec
from nestloop.lang.optim import momentum_name
from nestloop.lang.schedule import Causal, Chunked
from nestloop.lang.state import identifier
from nestloop.lowering.capture import Captured
from nestloop.lowering.ops.products import exact
from nestloop.lowering.runtime.streams import VALID
from nestloop.lowering.streams.coefficients import Coefficients, Rows, combine
from nestloop.lowering.streams.uses import NotAffine
from nestloop.lowering.tracer import Tracer

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """One chunk's step of a loop.

    Attributes:
        captured, tracer: the bodies, and what traces them.
        longest: the most tokens a tile has.
        resumed: whether the chunk may have begun in an earlier call: anchor, update and pending come from a state.
        complete: whether the chunk ends here (`Chunked`, "apply-update").
        turn: of the micro-steps of each token, the one that is taken; None for all, at the same weights.
    """

    captured: Captured
    tracer: Tracer
    longest: int
    resumed: bool = False
    complete: bool = True
    turn: int | None = None

    @property
    def spec(self) -> LoopSpec:
        return self.captured.spec

    @property
    def micro(self) -> int:
        """Rows of each token."""
        return getattr(self.spec.schedule, "micro", 1) if self.turn is None else 1

    @property
    def halo(self) -> int:
        """Rows of earlier tokens before the tile's own, whose gradients a window adds."""
        return (self.spec.optimizer.window or 1) - 1

    @property
    def carried(self) -> list[str]:
        """Entries of the state that a step reads, fast weights first."""
        schedule = self.spec.schedule
        parts = {"weight"}
        if isinstance(schedule, Causal):
            parts |= {"momentum"} | ({"anchor", "update"} if self.resumed else set())
        elif isinstance(schedule, Chunked):
            parts |= {"anchor"} | ({"momentum"} if self.complete else set()) | ({"pending"} if self.resumed else set())
        else:
            parts |= {"momentum"}
        return [name for name, entry in self.spec.entries.items() if entry.part in parts]

    @property
    def left(self) -> list[str]:
        """Entries that a step changes; others stay as they were."""
        parts = {"weight", "momentum", "update"}
        if isinstance(self.spec.schedule, Chunked) and not self.complete:
            parts = {"pending"}
        return [name for name, entry in self.spec.entries.items() if entry.part in parts]

    @property
    def reads_initial(self) -> bool:
        """Whether the optimizer's step reads the initial fast weights."""
        return self.spec.optimizer.restore is not None and self.complete

    @property
    def inputs(self) -> list[str]:
        """Names of the piece's inputs."""
        initial = [f"{name}__initial" for name in self.spec.fast] if self.reads_initial else []
        valid = [VALID] if self.halo else []
        return [*map(identifier, self.carried), *initial, *self.spec.slow, *self.spec.inputs, *valid]

    @property
    def results(self) -> list[str]:
        return ["z", *[f"{identifier(name)}_new" for name in self.left], "losses"]

    def examples(self) -> list[Tensor]:
        """A tensor without memory for each input."""
        spec, found = self.spec, []
        entries = {identifier(name): entry for name, entry in spec.entries.items()}
        for name in self.inputs:
            if name in spec.slow or name in spec.fast:
                found.append(self.tracer.tile(name))
            elif name == VALID:
                found.append(self.tracer.row())
            elif name in spec.inputs:
                found.append(self._token_tile(name))
            elif name in entries:
                found.append(self.tracer.entry(entries[name]))
            else:
                found.append(self.tracer.tile(name.removesuffix("__initial")))
        return found

    def _token_tile(self, name: str) -> Tensor:
        return self.tracer.tile(name, self.micro if self.spec.inputs[name].micro else 0)

    def split(self, given: Tensors) -> tuple[Tensors, Tensors, Tensors, Tensors]:
        """Inputs by name -> carried entries (under their own names), slow weights, views and gates, initial weights."""
        spec = self.spec
        carried = {name: given[identifier(name)] for name in self.carried}
        slow = {name: given[name] for name in spec.slow}
        tokens = {name: given[name] for name in spec.inputs}
        initial = {name: given[f"{name}__initial"] for name in spec.fast if f"{name}__initial" in given}
        return carried, slow, tokens, initial

    def anchor(self, carried: Tensors) -> Tensors:
        """The weights that gradients are taken at."""
        return {name: carried.get(f"{name}.anchor", carried[name]) for name in self.spec.fast}

    def keys(self, tokens: Tensors) -> Tensors:
        """The tile that the loss sees: one row for each micro-step of each token."""
        if self.micro == 1:
            return tokens
        rows = {}
        for name, value in tokens.items():
            if not self.spec.inputs[name].micro:
                value = value.unsqueeze(1).expand(value.shape[0], self.micro, *value.shape[1:])
            rows[name] = value.reshape(value.shape[0] * self.micro, *value.shape[2:])
        return rows

    def queries(self, tokens: Tensors) -> Tensors:
        """The tile that the read-out sees."""
        return {n: value for n, value in self.own(tokens).items() if not self.spec.inputs[n].micro}

    def own(self, tokens: Tensors) -> Tensors:
        """The rows of the tile's own tokens."""
        return {n: self.own_rows(value) for n, value in tokens.items()} if self.halo else tokens

    def own_rows(self, value: Tensor) -> Tensor:
        """The rows after the halo, as a product: its derivative joins no blocks."""
        if not self.halo:
            return value
        rows = value.shape[0]
        flat = value.reshape(rows, math.prod(value.shape[1:]))
        return exact(self._chosen(rows, value), flat).reshape(rows - self.halo, *value.shape[1:])

    def with_halo(self, value: Tensor) -> Tensor:
        """A result of the tile's own tokens with rows of 0 for the halo: every result has all rows of the tile."""
        if not self.halo:
            return value
        rows = value.shape[0] + self.halo
        flat = value.reshape(value.shape[0], math.prod(value.shape[1:]))
        return exact(self._chosen(rows, value).mT, flat).reshape(rows, *value.shape[1:])

    def _chosen(self, rows: Any, like: Tensor) -> Tensor:
        """[rows - halo, rows], 1 where a row is one of the tile's own."""
        own, every = (torch.arange(n, device=like.device) for n in (rows - self.halo, rows))
        return (own[:, None] + self.halo == every[None, :]).to(like.dtype)

    def windowed(self, c: Coefficients, rows: Rows) -> Coefficients:
        """The coefficients of gradients that each step sums over its window: [n, n + halo] in the place of [n, n]."""
        if not self.halo:
            return c
        first = rows.position()
        every = torch.arange(rows.count + self.halo, device=rows.like.device)
        band = (every[None, :] >= first[:, None]) & (every[None, :] <= first[:, None] + self.halo)
        window = band.to(rows.like.dtype)
        kept = tuple((starts, combine(mix, window)) for starts, mix in c.kept)
        assert isinstance(c.mix, Tensor)  # with a window it is not factored
        return Coefficients(c.base, c.momenta, combine(c.mix, window), kept)

    def rows(self, keys: Tensors, slow: Tensors) -> Rows:
        """The rows of the loss's tile."""
        keys = self.own(keys)
        first = next(iter(keys.values()))
        value = self.value(keys, slow)
        return Rows(first.shape[0], self.longest * self.micro, value, lambda part: isinstance(part, Gate), first)

    def value(self, rows: Tensors, slow: Tensors) -> Callable[[Declaration, Any], Any]:
        """(fast weight, coefficient) -> a number, or a tensor: of a gate without dims [r], else over the weight's axes
        [*c], with rows [r, *c] if it is a gate."""
        sizes = self.captured.sizes

        def of(weight: Declaration, part: Any) -> Any:
            if isinstance(part, Gate) and not part.dims:
                return rows[part.name]
            return coefficient.value(part, weight, sizes, slow, lambda gate: rows[gate.name])

        return of

    def row_scale(self, name: str, slow: Tensors, keys: Tensors) -> Tensor:
        """The scale of each row, [r, 1]. Raises `NotAffine` for one per channel."""
        keys = self.own(keys)
        part = self.spec.optimizer.scale_of(name)
        value = self.value(keys, slow)(self.spec.fast[name], part)
        first = next(iter(keys.values()))
        if not isinstance(value, Tensor):
            return first.new_full((first.shape[0], 1), float(value))
        rows = value if isinstance(part, Gate) else value.unsqueeze(0).expand(first.shape[0], *value.shape)
        if any(size != 1 for size in rows.shape[1:]):
            raise NotAffine("a scale for each channel")
        return rows.reshape(-1, 1)

    def first_only(self, rows: Rows) -> Tensor | None:
        """1 at the first micro-step of each token, 0 at the others; None where there is one."""
        if self.turn:
            return rows.like.new_zeros(rows.count)
        if self.micro == 1:
            return None
        first = (torch.arange(self.micro, device=rows.like.device) == 0).to(rows.like.dtype)
        return first.unsqueeze(0).expand(rows.count // self.micro, self.micro).reshape(rows.count)

    def read_rows(self, rows: Tensor) -> Tensor:
        """Of one entry per micro-step, each token's last: [r, *] -> [n, *]."""
        if self.micro == 1:
            return rows
        return rows.reshape(rows.shape[0] // self.micro, self.micro, *rows.shape[1:]).select(1, self.micro - 1)

    def token_losses(self, losses: Tensor) -> Tensor:
        """One loss a row of the tile: of micro-steps, the last one's."""
        return self.read_rows(losses)

    def loss_inputs(self, at: Tensors, held: Tensors, slow: Tensors, keys: Tensors) -> dict[str, Any]:
        """What the loss graph takes, by name."""
        hold = {f"{name}__held": value for name, value in held.items()} if self.spec.holds else {}
        return {**at, **hold, **slow, **keys}


def momentum_names(spec: LoopSpec, weight: str) -> list[str]:
    """The entries of one fast weight's momenta."""
    return [momentum_name(weight, order) for order in range(spec.optimizer.orders)]


def causal(spec: LoopSpec) -> Causal:
    assert isinstance(spec.schedule, Causal)
    return spec.schedule
