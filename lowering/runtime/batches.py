"""A loop of batches whose steps are code on one head and sequence, with the calling convention of generated PyTorch.

What all steps share (`common` of the PyTorch module, large products for all heads at once) the op has made before.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType, ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from nestloop.lang.kept import Kept
from nestloop.lowering.runtime.tiles import like_lead

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
        shared: shape of one head's tile of what all steps share.
    """

    inputs: tuple[str, ...]
    tokens: tuple[str, ...]
    fast: tuple[str, ...]
    ends: tuple[str, ...]
    tiles: dict[str, tuple[int, ...]]
    batches: Callable[[int], list[tuple[int, int]]]
    weight: Callable[[int], float]
    losses: bool
    shared: Mapping[str, tuple[int, ...]]


class BatchCode:
    """The code of one loop; what runs it is a class derived from it.

    Args:
        plan: what it takes.
        module: its generated PyTorch, for what all steps share.
        loop: its loop.
    """

    def __init__(self, plan: BatchPlan, module: ModuleType, loop: BatchLoop) -> None:
        self.plan, self.module, self.loop = plan, module, loop
        self._steps_of: Kept[tuple[Sequence[int], Sequence[float], Sequence[float]]] = Kept()

    def prepared(self) -> ModuleType:
        """The PyTorch module, with its functions of slow weights alone in this code, where this has them."""
        return self.module

    def memory(self, call: Call, name: str, row: Sequence[int], like: Tensor | None = None) -> Tensor:
        """What the code writes z to, or a cotangent: of tokens one for each head and sequence, of what sequences share
        as many as it adds up apart. `like`: what that is a cotangent of."""
        raise NotImplementedError

    def totals(self, call: Call, rows: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Cotangents, of these tiles, that are added up together, by name."""
        return {}

    def run(self, function: str, call: Call, given: list[tuple[str, Tensor]], made: dict[str, Tensor]) -> None:
        """Call `forward` or `backward` on tensors by name, which writes `made`."""
        raise NotImplementedError

    def forward(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Inputs [H, B, ..], what all steps share, and the order -> results, as the PyTorch module's `forward`."""
        call = Call(self, list(tensors[: len(self.loop.inputs)]), tensors[-1])
        made = self.results(call)
        self.run("forward", call, self.given(tensors), made)
        return list(made.values())

    def given(self, tensors: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """What the code takes of what its `forward` is called with, by name."""
        values = dict(zip(self._names, tensors[:-1], strict=True))
        return [(n, values[n]) for n in self.plan.forward]

    def results(self, call: Call) -> dict[str, Tensor]:
        """Memory for the results of forward, by name."""
        loop = self.loop
        made = {"z": self.memory(call, "z", loop.tiles["z"])}
        made |= {f"end_{n}": call.new(*loop.tiles[n]) for n in loop.ends}
        made |= {"losses": call.new(call.steps + 1)} if loop.losses else {}
        lead = (max(call.steps - 1, 0),)
        return made | {f"between_{n}": call.new(*loop.tiles[n], lead=lead) for n in loop.ends}

    def backward(self, *tensors: Tensor) -> Sequence[Tensor | None]:
        """Inputs, what all steps share, the states and cotangents of the results, and the order -> cotangents of the
        inputs and of what all steps share, None for zero."""
        loop = self.loop
        call = Call(self, list(tensors[: len(loop.inputs)]), tensors[-1])
        states = [f"end_{n}" for n in loop.ends] + [f"between_{n}" for n in loop.ends]
        names = [*self._names, *states, "d_z", *[f"d_{n}" for n in loop.ends], *(["d_losses"] if loop.losses else [])]
        values = dict(zip(names, tensors[:-1], strict=True))
        call.separate = any(values[n].shape[1] > 1 for n in loop.fast)
        rows = {n: values[n].shape[3:] if self.is_token(n) else values[n].shape[2:] for n in self.plan.gradients}
        made = {name: self.memory(call, name, row, values[name]) for name, row in rows.items()}
        self.run("backward", call, [(n, values[n]) for n in self.plan.backward], made)
        made |= self.totals(call, {n: rows[n] for n in made})
        return [like_lead(made[n], values[n]) if n in made else None for n in self._names]

    def numbers(self, length: int, sequences: int) -> tuple[Sequence[int], Sequence[float], Sequence[float]]:
        """Bounds, weights and rates of the steps of a call: see `Call`."""
        return self._steps_of.of((length, sequences), lambda: self._numbers_of(length, sequences))

    def _numbers_of(self, length: int, sequences: int) -> tuple[Sequence[int], Sequence[float], Sequence[float]]:
        batches = self.loop.batches(length)
        sizes = [stop - start for start, stop in batches]
        rate = getattr(self.module, "learning_rate", None)
        rates = [1.0 if rate is None else rate(i, n, length, sequences) for i, n in enumerate(sizes)]
        return [edge for batch in batches for edge in batch], [self.loop.weight(n) for n in sizes], rates

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """The tensors of a call: inputs, and what all steps share."""
        return (*self.loop.inputs, *self.plan.common)

    def is_token(self, name: str) -> bool:
        """Whether an input, or what all steps share, has one row for each token."""
        return name in self.loop.tokens or is_token(name)


def of_heads(
    original: Callable[..., Any],
    like: Sequence[str],
    shapes: Mapping[str, Sequence[int]],
    run: Callable[[Mapping[str, Tensor], Sequence[Tensor], torch.dtype | None], None],
    takes: Callable[[Tensor, torch.dtype | None], bool] = lambda first, low: True,
) -> Callable[..., Any]:
    """A function of a generated module on slow weights, every head's results its own.

    Args:
        original: the function, of tensors [H, 1, *] in the compute dtype and the low precision of products.
        like: for each result, the argument whose cotangent it is, or what it is called.
        shapes: the sizes of those that are no arguments, for a head.
        run: writes the results, from arguments by name and the low precision.
        takes: (an argument, the low precision) -> whether `run` is for such a call, or else `original`.
    """
    names = list(inspect.signature(original).parameters)[:-1]

    def piece(*arguments: Any) -> Any:
        *tensors, low = arguments
        if not takes(tensors[0], low):
            return original(*arguments)
        values = dict(zip(names, tensors, strict=True))
        heads = max(t.shape[0] for t in tensors)
        rows = [values[n].shape[2:] if n in values else shapes[n] for n in like]
        made = [tensors[0].new_empty(heads, 1, *row) for row in rows]
        run(values, made, low)
        return tuple(like_lead(r, values[n]) if n in values else r for n, r in zip(like, made, strict=True))

    return piece


def with_pieces(module: ModuleType, **pieces: Callable[..., Any]) -> ModuleType:
    """A copy of a generated module, whose functions call these pieces instead of its own."""
    copy = ModuleType(f"{module.__name__}_with_{'_'.join(pieces)}")
    copy.__dict__.update(module.__dict__)
    for name, function in vars(module).items():
        if isinstance(function, FunctionType) and function.__globals__ is vars(module):
            setattr(copy, name, FunctionType(function.__code__, copy.__dict__, name, function.__defaults__))
    copy.__dict__.update(pieces)
    return copy


def ranges_within(items: int, tiles: int, most: int) -> int:
    """Ranges of tokens that are worked on apart, each of one tile or more: as many as give no more than `most` in all,
    one where there are items (heads and sequences) enough. It depends on sizes alone, and so do the sums over ranges.
    """
    return max(1, min(tiles, most // max(items, 1)))


class Call:
    """One call: its sizes, and the numbers of its steps.

    Attributes:
        dtype: the compute dtype.
        bounds: start and stop of each step's batch, one after the other.
        weights, rates: of each step, what a token's loss counts and what the update is multiplied by.
        order: [H, B, N], an axis of size 1 being shared; None where tokens are taken as they come.
        separate: of backward, whether each sequence has a fast weight of its own to start from.
        sums: of backward, cotangents of what sequences share, side by side.
        chosen: of forward, whether it is the form that the call has chosen: one element on the device, 0 or 1; None
            where there is one form.
    """

    def __init__(self, code: BatchCode, inputs: list[Tensor], order: Tensor | None) -> None:
        self.inputs, self.like = inputs, inputs[0]
        self.dtype = compute_dtype(inputs)
        self.heads = max(t.shape[0] for t in inputs)
        self.sequences, self.length = inputs[0].shape[1:3]
        self.bounds, self.weights, self.rates = code.numbers(self.length, self.sequences)
        self.steps = len(self.rates)
        self.order = None if order is None else order.contiguous()
        self.separate = False
        self.sums: Tensor | None = None
        self.chosen: Tensor | None = None

    def new(self, *shape: int, lead: tuple[int, ...] = ()) -> Tensor:
        return self.like.new_empty(*lead, self.heads, self.sequences, *shape, dtype=self.dtype)


def strides_beside(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of tokens [H, B, N, *] whose heads lie side by side, as a layer's projections read and write them."""
    heads, _, length, *row = shape
    inner = [math.prod(row[axis:]) for axis in range(len(row) + 1)]  # a row's size, then the strides within it
    return (inner[0], length * heads * inner[0], heads * inner[0], *inner[1:])


def side_by_side(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for such tokens."""
    return like.new_empty_strided(shape, strides_beside(shape), dtype=dtype)


def compute_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if anything is, else float32."""
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


def autocast_dtype(device: str) -> torch.dtype | None:
    """The precision of products under autocast; None where there is none, as on the meta device there never is."""
    # Which devices have autocast is not asked: PyTorch 2.11 cannot trace that.
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def output_dtype(views: Sequence[Tensor], inputs: Sequence[Tensor]) -> torch.dtype:
    """Of z: the views' dtype; the compute dtype where they have several."""
    dtypes = {t.dtype for t in views}
    return dtypes.pop() if len(dtypes) == 1 else compute_dtype(inputs)


def is_token(shared: str) -> bool:
    """Whether what all steps share has one row for each token."""
    return shared.startswith("projected_")
