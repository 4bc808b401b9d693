"""A loop of batches whose steps are code on one head and sequence, with the calling convention of generated PyTorch.

What all steps share (`common` of the PyTorch module, large products for all heads at once) is computed by PyTorch
before, and its backward after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

LOW = (torch.bfloat16, torch.float16)


class BatchPlan(Protocol):
    """What a plan of such code says."""

    @property
    def forward(self) -> tuple[str, ...]:
        """Names of the tensors that forward takes."""

    @property
    def backward(self) -> tuple[str, ...]:
        """Names of the tensors that backward takes."""

    @property
    def gradients(self) -> tuple[str, ...]:
        """Names of the inputs that backward gives a cotangent of; the others' are zero."""

    @property
    def common(self) -> tuple[str, ...]:
        """Names of what all steps share."""


@dataclass(frozen=True)
class BatchLoop:
    """What the code must know of its loop.

    Attributes:
        inputs: names of the op's inputs, and of those the fast weights (`fast`) and the tokens (`tokens`).
        ends: names of all fast weights.
        tiles: shape of each fast weight's tile, and of one token's output ("z").
        batches: tokens -> (start, stop) of each step.
        weight: tokens of a batch -> what each token's loss counts.
        losses: whether the inner losses are a result.
    """

    inputs: tuple[str, ...]
    tokens: tuple[str, ...]
    fast: tuple[str, ...]
    ends: tuple[str, ...]
    tiles: dict[str, tuple[int, ...]]
    batches: Callable[[int], list[tuple[int, int]]]
    weight: Callable[[int], float]
    losses: bool


class BatchCode:
    """The code of one loop; what runs it is a class derived from it.

    Args:
        plan: what it takes.
        module: its generated PyTorch, for what all steps share.
        loop: its loop.
    """

    def __init__(self, plan: BatchPlan, module: ModuleType, loop: BatchLoop) -> None:
        self.plan, self.module, self.loop = plan, module, loop
        self.common = getattr(module, "common", None)

    def memory(self, call: Call, name: str, row: Sequence[int]) -> Tensor:
        """What the code writes a cotangent to: of tokens one for each head and sequence, of what sequences share as
        many as it adds up apart."""
        raise NotImplementedError

    def run(self, function: str, call: Call, given: list[tuple[str, Tensor]], made: dict[str, Tensor]) -> None:
        """Call `forward` or `backward` on tensors by name, which writes `made`."""
        raise NotImplementedError

    def forward(self, *tensors: Tensor, low: torch.dtype | None = None) -> Sequence[Tensor]:
        """Inputs [H, B, ..] and the order -> results, as the PyTorch module's `forward`.

        low: the precision of the operands of what all steps share, if that is lower than the inputs'.
        """
        loop = self.loop
        call = Call(self, list(tensors[:-1]), tensors[-1], low)
        made = {"z": call.new(call.length, *loop.tiles["z"])}
        made |= {f"end_{n}": call.new(*loop.tiles[n]) for n in loop.ends}
        made |= {"losses": call.new(call.steps + 1)} if loop.losses else {}
        lead = (max(call.steps - 1, 0),)
        made |= {f"between_{n}": call.new(*loop.tiles[n], lead=lead) for n in loop.ends}
        values = self._values(call)
        self.run("forward", call, [(n, values[n]) for n in self.plan.forward], made)
        return list(made.values())

    def backward(self, *tensors: Tensor, low: torch.dtype | None = None) -> Sequence[Tensor]:
        """Inputs, the states and cotangents of the results, and the order -> cotangents of the inputs."""
        loop, count = self.loop, len(self.loop.inputs)
        inputs, rest = list(tensors[:count]), list(tensors[count:-1])
        call = Call(self, inputs, tensors[-1], low)
        values = self._values(call)
        states = [f"end_{n}" for n in loop.ends] + [f"between_{n}" for n in loop.ends]
        names = [*states, "d_z", *[f"d_{n}" for n in loop.ends], *(["d_losses"] if loop.losses else [])]
        values.update(zip(names, rest, strict=True))
        call.separate = any(values[n].shape[1] > 1 for n in loop.fast)
        rows = {n: values[n].shape[3:] if self.is_token(n) else values[n].shape[2:] for n in self.plan.gradients}
        made = {name: self.memory(call, name, row) for name, row in rows.items()}
        self.run("backward", call, [(n, values[n]) for n in self.plan.backward], made)
        found = [made.get(n) for n in loop.inputs]
        if self.common is not None:
            shared = [values[n] for n in self.plan.common]
            partial = zip(self.plan.common, shared, strict=True)
            d_shared = [_summed(made[n], t) if n in made else torch.zeros_like(t) for n, t in partial]
            more = self.module.common_vjp(*call.computed, *shared, *d_shared, call.low)
            found = [_add(a, b, t) for a, b, t in zip(found, more, inputs, strict=True)]
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]

    def is_token(self, name: str) -> bool:
        """Whether an input, or what all steps share, has one row for each token."""
        return name in self.loop.tokens or name.startswith("projected_")

    def _values(self, call: Call) -> dict[str, Tensor]:
        values = dict(zip(self.loop.inputs, call.inputs, strict=True))
        if self.common is not None:
            values.update(zip(self.plan.common, self.common(*call.computed, call.low), strict=True))
        return values


def ranges_within(items: int, tiles: int, most: int) -> int:
    """Ranges of tokens that are worked on apart, each of one tile or more: as many as give no more than `most` in all,
    one where there are items (heads and sequences) enough. It depends on sizes alone, and so do the sums over ranges.
    """
    return max(1, min(tiles, most // max(items, 1)))


class Call:
    """One call: its sizes, and the numbers of its steps.

    Attributes:
        dtype: the compute dtype; `low`: that of products, where the tokens come in a low one.
        bounds: start and stop of each step's batch, one after the other.
        weights, rates: of each step, what a token's loss counts and what the update is multiplied by.
        order: [H, B, N], an axis of size 1 being shared; None where tokens are taken as they come.
        separate: of backward, whether each sequence has a fast weight of its own to start from.
    """

    def __init__(self, code: BatchCode, inputs: list[Tensor], order: Tensor | None, low: torch.dtype | None) -> None:
        self.inputs, self.like = inputs, inputs[0]
        self.dtype = compute_dtype(inputs)
        self.low = low
        if self.like.dtype in LOW and self.dtype is torch.float32:
            self.low = self.like.dtype
        self.heads = max(t.shape[0] for t in inputs)
        self.sequences, self.length = inputs[0].shape[1:3]
        batches = code.loop.batches(self.length)
        self.steps = len(batches)
        self.bounds = [edge for batch in batches for edge in batch]
        sizes = [stop - start for start, stop in batches]
        self.weights = [code.loop.weight(n) for n in sizes]
        rate = getattr(code.module, "learning_rate", None)
        self.rates = [1.0 if rate is None else rate(i, n, self.length, self.sequences) for i, n in enumerate(sizes)]
        self.order = None if order is None else order.contiguous()
        self.separate = False

    @property
    def computed(self) -> list[Tensor]:
        """The inputs in the compute dtype."""
        return [t.to(self.dtype) for t in self.inputs]

    def new(self, *shape: int, lead: tuple[int, ...] = ()) -> Tensor:
        return self.like.new_empty(*lead, self.heads, self.sequences, *shape, dtype=self.dtype)


def compute_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if anything is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _summed(partial: Tensor, like: Tensor) -> Tensor:
    """A cotangent with what sequences (or groups of them) and heads share added up."""
    shared = [axis for axis in (0, 1) if like.shape[axis] == 1 and partial.shape[axis] != 1]
    return partial.sum(shared, keepdim=True) if shared else partial


def _add(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return _summed(a, like) + _summed(b, like)
