"""A built C++ library with the calling convention of a generated PyTorch module: `forward` and `backward` on tensors.

The library works on each head and sequence apart. What all steps share (`common` of the PyTorch module, large products
for all heads at once) is computed by PyTorch before, and its backward after.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nestloop.lowering.runtime import compiler
from nestloop.lowering.runtime.tiles import Singular

_ITEMS = 16  # heads times sequences times ranges of tokens: enough to share out to as many cores


@dataclass(frozen=True)
class NativePlan:
    """Generated C++ and how it is called.

    Attributes:
        text: the translation unit.
        forward, backward: names of the tensors each takes, in order.
        gradients: names of the inputs that `backward` gives a cotangent of, in order; the others' are zero.
        common: names of what all steps share, which the PyTorch module makes.
        whole: whether a tile must hold all tokens.
        rows: tokens of a tile, where it need not; of a scan, of a chunk.
        systems: the user's line of each linear system, by their numbers in the C++ from 1.
    """

    text: str
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    gradients: tuple[str, ...]
    common: tuple[str, ...]
    whole: bool
    rows: int
    systems: tuple[str, ...] = ()


class TensorArgument(ctypes.Structure):
    """`Tensor` of tiles.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("head", ctypes.c_long),
        ("sequence", ctypes.c_long),
        ("token", ctypes.c_long),
    )


class NativeLibrary:
    """A translation unit, built for each compute type at first use."""

    def __init__(self, name: str, plan: NativePlan) -> None:
        self.name, self.plan = name, plan

    @cached_property
    def _float(self) -> ctypes.CDLL:
        return compiler.load(compiler.build(self.name, self.plan.text, "float"))

    @cached_property
    def _double(self) -> ctypes.CDLL:
        return compiler.load(compiler.build(self.name, self.plan.text, "double"))

    def library(self, dtype: torch.dtype) -> ctypes.CDLL:
        """The library for a compute type, built at first use.

        Raises:
            BuildError: it cannot be built.
        """
        return self._double if dtype == torch.float64 else self._float

    def walks(self, name: str) -> bool:
        """Whether a tensor has an axis before its tile's that C++ walks: tokens, steps, or chunks."""
        raise NotImplementedError

    def call(
        self,
        function: str,
        lead: tuple[int, int],
        dtype: torch.dtype,
        before: Sequence[Any],
        given: Sequence[tuple[str, Tensor]],
        after: Sequence[Any],
        made: Sequence[Tensor],
    ) -> None:
        """Call a function of the library: (heads, sequences, before, tensors by name, after, results).

        Args:
            lead: heads and sequences.
            dtype: the compute type.
            before, after: other arguments, as C takes them.

        Raises:
            MemoryError: a thread has no memory for its tiles.
            Singular: a linear system has no solution.
        """
        if not all(lead):  # nothing but sums over no heads, or no sequences
            for tensor in made:
                tensor.zero_()
            return
        kept = [(n, readable(t, self.walks(n))) for n, t in given]
        tensors = [argument(t, self.walks(n), n.startswith("between_")) for n, t in kept]
        results = [t.data_ptr() for t in made]
        code = getattr(self.library(dtype), function)(
            *map(ctypes.c_long, lead),
            *before,
            (TensorArgument * len(tensors))(*tensors),
            *after,
            (ctypes.c_void_p * len(results))(*results),
        )
        if code == 1:
            raise MemoryError(f"no memory for the tiles of {self.name}")
        if code:
            raise Singular(self.plan.systems[code - 2])


def ranges_of(items: int, tiles: int) -> int:
    """Ranges of tokens that are worked on apart: one where there are items enough to share out to the cores, and else
    as many as make enough, each of one tile or more. It depends on sizes alone, and so do the sums over ranges."""
    return 1 if items >= _ITEMS else max(1, min(tiles, -(-_ITEMS // max(items, 1))))


class NativeModule(NativeLibrary):
    """The library of one loop of batches.

    Args:
        name: the loop's name, as an identifier.
        plan: its C++.
        module: its generated PyTorch, for what all steps share.
        inputs: names of the op's inputs, and of those the fast weights (`fast`) and the tokens (`tokens`).
        ends: names of all fast weights.
        tiles: shape of each fast weight's tile, and of one token's output ("z").
        batches: tokens -> (start, stop) of each step.
        weight: tokens of a batch -> what each token's loss counts.
        losses: whether the inner losses are a result.
    """

    def __init__(
        self,
        name: str,
        plan: NativePlan,
        module: ModuleType,
        *,
        inputs: Sequence[str],
        tokens: Sequence[str],
        fast: Sequence[str],
        ends: Sequence[str],
        tiles: dict[str, tuple[int, ...]],
        batches: Callable[[int], list[tuple[int, int]]],
        weight: Callable[[int], float],
        losses: bool,
    ) -> None:
        super().__init__(name, plan)
        self.module = module
        self.inputs, self.tokens, self.fast, self.ends = list(inputs), list(tokens), list(fast), list(ends)
        self.tiles, self.batches, self.weight, self.losses = tiles, batches, weight, losses
        self.common = getattr(module, "common", None)
        self.shared = plan.common

    def forward(self, *tensors: Tensor, low: torch.dtype | None) -> list[Tensor]:
        """Inputs [H, B, ..] and the order -> results, as the PyTorch module's `forward`.

        low: the precision of the operands of what all steps share, if that is lower; steps are in the compute dtype.
        """
        inputs, order = list(tensors[:-1]), tensors[-1]
        values = self._values(inputs, low)
        call = _Call(self, inputs, values, order)
        made = [call.new(call.length, *self.tiles["z"])]
        made += [call.new(*self.tiles[n]) for n in self.ends]
        made += [call.new(call.steps + 1)] if self.losses else []
        between = max(call.steps - 1, 0)
        made += [call.new(*self.tiles[n], lead=(between,)) for n in self.ends]
        call.run("forward", [(n, values[n]) for n in self.plan.forward], made)
        return made

    def backward(self, *tensors: Tensor, low: torch.dtype | None) -> list[Tensor]:
        """Inputs, the states and cotangents of the results, and the order -> cotangents of the inputs."""
        count = len(self.inputs)
        inputs, rest, order = list(tensors[:count]), list(tensors[count:-1]), tensors[-1]
        values = self._values(inputs, low)
        states = [f"end_{n}" for n in self.ends] + [f"between_{n}" for n in self.ends]
        names = [*states, "d_z", *[f"d_{n}" for n in self.ends], *(["d_losses"] if self.losses else [])]
        values.update(zip(names, rest, strict=True))
        call = _Call(self, inputs, values, order)
        separate = any(values[n].shape[1] > 1 for n in self.fast)
        made = {}
        for name in self.plan.gradients:
            row = values[name].shape[3:] if self._is_token(name) else values[name].shape[2:]
            if name in self.shared and self._is_token(name):  # heads side by side
                whole = inputs[0].new_empty(call.sequences, call.length, call.heads, *row)
                made[name] = whole.movedim(2, 0)
            elif self._is_token(name):
                made[name] = call.new(call.length, *row)
            else:
                sequences = call.sequences if separate and name in self.fast else 1
                made[name] = inputs[0].new_empty(call.heads, sequences, *row)
        given = [(n, values[n]) for n in self.plan.backward]
        call.run("backward", given, list(made.values()), ctypes.c_bool(separate))
        found = [made.get(n) for n in self.inputs]
        if self.common is not None:
            d_common = [_summed(made[n], values[n]) if n in made else torch.zeros_like(values[n]) for n in self.shared]
            more = self.module.common_vjp(*inputs, *[values[n] for n in self.shared], *d_common, low)
            found = [_add(a, b, t) for a, b, t in zip(found, more, inputs, strict=True)]
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]

    def walks(self, name: str) -> bool:
        return name == "d_z" or self._is_token(name) or name.startswith("between_")

    def _is_token(self, name: str) -> bool:
        return name in self.tokens or name.startswith("projected_")

    def _values(self, inputs: list[Tensor], low: torch.dtype | None) -> dict[str, Tensor]:
        values = dict(zip(self.inputs, inputs, strict=True))
        if self.common is not None:
            values.update(zip(self.shared, self.common(*inputs, low), strict=True))
        return values


class _Call:
    """One call of the library: the sizes, and the arguments of both its functions."""

    def __init__(self, module: NativeModule, inputs: list[Tensor], values: dict[str, Tensor], order: Any) -> None:
        self.module, self.like = module, inputs[0]
        self.heads = max(t.shape[0] for t in inputs)
        self.sequences, self.length = inputs[0].shape[1:3]
        self.batches = module.batches(self.length)
        self.steps = len(self.batches)
        self.order = order

    def new(self, *shape: int, lead: tuple[int, ...] = ()) -> Tensor:
        return self.like.new_empty(*lead, self.heads, self.sequences, *shape)

    def run(self, function: str, given: list[tuple[str, Tensor]], made: list[Tensor], *more: Any) -> None:
        module, plan = self.module, self.module.plan
        bounds = (ctypes.c_int64 * (2 * self.steps))(*[edge for batch in self.batches for edge in batch])
        sizes = [stop - start for start, stop in self.batches]
        weights = (ctypes.c_double * self.steps)(*[module.weight(n) for n in sizes])
        rate = getattr(module.module, "learning_rate", None)
        rates = [1.0 if rate is None else rate(i, n, self.length, self.sequences) for i, n in enumerate(sizes)]
        order, head, sequence = None, 0, 0
        if self.order is not None:
            order = self.order.contiguous()
            head = order.stride(0) if order.shape[0] > 1 else 0
            sequence = order.stride(1) if order.shape[1] > 1 else 0
        longest = self.length if plan.whole else min(plan.rows, self.length)
        before = (
            ctypes.c_long(self.length),
            ctypes.c_long(longest),
            ctypes.c_int(torch.get_num_threads()),
            ctypes.c_long(1 if plan.whole else ranges_of(self.heads * self.sequences, -(-self.length // plan.rows))),
            *more,
            ctypes.c_long(self.steps),
            bounds,
            weights,
            (ctypes.c_double * self.steps)(*rates),
        )
        place = ctypes.c_void_p(None if order is None else order.data_ptr())
        after = (place, ctypes.c_long(head), ctypes.c_long(sequence))
        module.call(function, (self.heads, self.sequences), self.like.dtype, before, given, after, made)


def readable(tensor: Tensor, walked: bool) -> Tensor:
    """The tensor itself where each tile (each row, if tokens are `walked`) lies in one piece; else a copy."""
    step = 1
    for size, stride in zip(reversed(tensor.shape[2 + walked :]), reversed(tensor.stride()[2 + walked :]), strict=True):
        if size != 1 and stride != step:
            return tensor.contiguous()
        step *= size
    return tensor


def argument(tensor: Tensor, walked: bool, between: bool = False) -> TensorArgument:
    """A tensor [H, B, ..] as C++ sees it; one of states between steps is [steps, H, B, ..]."""
    axes = (1, 2, 0) if between else (0, 1, 2)
    strides = [tensor.stride(axis) if axis < tensor.ndim and tensor.shape[axis] > 1 else 0 for axis in axes]
    return TensorArgument(tensor.data_ptr(), strides[0], strides[1], strides[2] if walked else 0)


def _summed(partial: Tensor, like: Tensor) -> Tensor:
    """A cotangent with what sequences (or groups of them) and heads share added up."""
    shared = [axis for axis in (0, 1) if like.shape[axis] == 1 and partial.shape[axis] != 1]
    return partial.sum(shared, keepdim=True) if shared else partial


def _add(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return _summed(a, like) + _summed(b, like)
