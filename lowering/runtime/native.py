"""A built C++ library with the calling convention of generated PyTorch: `forward` and `backward` on tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nestloop.errors import NoPlanError, OrderError
from nestloop.lowering.runtime import compiler
from nestloop.lowering.runtime.batches import (
    BatchCode,
    BatchLoop,
    Call,
    of_heads,
    ranges_within,
    side_by_side,
    with_pieces,
)
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
        prepare, prepare_vjp: names of the tensors that these take, in order; none where the PyTorch module makes what
            is of slow weights alone. The first one's results are those of `common` that have no tokens.
        pulled: names of the slow weights that the second one makes cotangents of.
    """

    text: str
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    gradients: tuple[str, ...]
    common: tuple[str, ...]
    whole: bool
    rows: int
    systems: tuple[str, ...] = ()
    prepare: tuple[str, ...] = ()
    prepare_vjp: tuple[str, ...] = ()
    pulled: tuple[str, ...] = ()


class TensorArgument(ctypes.Structure):
    """`Tensor` of tiles.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("head", ctypes.c_long),
        ("sequence", ctypes.c_long),
        ("token", ctypes.c_long),
    )


class NativeLibrary:
    """A translation unit, built at first use for each compute type, and for each compiler and flags that are asked for:
    these may change within a process, and a library of other flags rounds otherwise."""

    def __init__(self, name: str, plan: NativePlan) -> None:
        self.name, self.plan = name, plan
        self._loaded: dict[tuple[str, ...], ctypes.CDLL] = {}

    def library(self, dtype: torch.dtype) -> ctypes.CDLL:
        """The library for a compute type, built at first use.

        Raises:
            NoPlanError: it cannot be built, as when `CXX` or `NESTLOOP_CXXFLAGS` are not what they were when C++ was
                chosen.
        """
        scalar = "double" if dtype == torch.float64 else "float"
        key = (scalar, *compiler.asked())
        if key not in self._loaded:
            try:
                self._loaded[key] = compiler.loaded(self.name, self.plan.text, scalar)
            except compiler.BuildError as error:
                raise NoPlanError(
                    f"The C++ of {self.name} is not built.",
                    given=str(error),
                    need="a C++ compiler, and flags that it knows",
                    fix='give CXX and NESTLOOP_CXXFLAGS such values, or none; or write backend="torch"',
                ) from error
        return self._loaded[key]

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
        made: Sequence[tuple[str, Tensor]],
    ) -> None:
        """Call a function of the library: (heads, sequences, before, tensors by name, after, results by name).

        Args:
            lead: heads and sequences.
            dtype: the compute type.
            before, after: other arguments, as C takes them.

        Raises:
            MemoryError: a thread has no memory for its tiles.
            Singular: a linear system has no solution.
        """
        if not all(lead):  # nothing but sums over no heads, or no sequences
            for _, tensor in made:
                tensor.zero_()
            return
        walked = [self.walks(n) for n, _ in given]
        kept = [readable(t, walks) for (_, t), walks in zip(given, walked, strict=True)]  # until the call is over
        read = zip(given, kept, walked, strict=True)
        tensors = [argument(t, walks, n.startswith("between_")) for (n, _), t, walks in read]
        results = [argument(t, self.walks(n), n.startswith("between_")) for n, t in made]
        code = getattr(self.library(dtype), function)(
            *map(ctypes.c_long, lead),
            *before,
            (TensorArgument * len(tensors))(*tensors),
            *after,
            (TensorArgument * len(results))(*results),
        )
        if code == 1:
            raise MemoryError(f"no memory for the tiles of {self.name}")
        if code:
            raise Singular(self.plan.systems[code - 2])


def ranges_of(items: int, tiles: int) -> int:
    """Ranges of tokens of each of so many heads and sequences: as few as make enough to share out to the cores."""
    return ranges_within(items, tiles, items + _ITEMS - 1)


class NativeModule(BatchCode, NativeLibrary):
    """The library of one loop of batches."""

    plan: NativePlan

    def __init__(self, name: str, plan: NativePlan, module: ModuleType, loop: BatchLoop) -> None:
        NativeLibrary.__init__(self, name, plan)
        BatchCode.__init__(self, plan, module, loop)

    def walks(self, name: str) -> bool:
        return name in ("z", "d_z") or self.is_token(name) or name.startswith("between_")

    def memory(self, call: Call, name: str, row: Sequence[int], like: Tensor | None = None) -> Tensor:
        if name == "z":
            return side_by_side(call.like, (call.heads, call.sequences, call.length, *row), call.dtype)
        if self.is_token(name):
            assert like is not None
            return laid_out(like, call.heads, call.dtype)
        sequences = call.sequences if call.separate and name in self.loop.fast else 1
        return call.like.new_empty(call.heads, sequences, *row)

    def prepared(self) -> ModuleType:
        """The PyTorch module, with `prepare` and its backward in C++ where tensors are on a CPU and products keep their
        precision."""
        if not self.plan.prepare:
            return self.module

        def piece(name: str, given: Sequence[str], made: Sequence[str], like: Sequence[str]) -> Callable[..., Any]:
            def run(values: Mapping[str, Tensor], results: Sequence[Tensor], low: torch.dtype | None) -> None:
                first, read = results[0], [(n, values[n]) for n in given]
                before, named = (ctypes.c_int(torch.get_num_threads()),), list(zip(made, results, strict=True))
                self.call(f"every_{name}", (first.shape[0], 1), first.dtype, before, read, (), named)

            def takes(first: Tensor, low: torch.dtype | None) -> bool:
                return low is None and first.device.type == "cpu"

            return of_heads(getattr(self.module, name), like, self.loop.shared, run, takes)

        hoisted = [n for n in self.plan.common if not self.is_token(n)]
        pulled = [f"d_{n}" for n in self.plan.pulled]
        return with_pieces(
            self.module,
            prepare=piece("prepare", self.plan.prepare, hoisted, hoisted),
            prepare_vjp=piece("prepare_vjp", self.plan.prepare_vjp, pulled, self.plan.pulled),
        )

    def run(self, function: str, call: Call, given: list[tuple[str, Tensor]], made: dict[str, Tensor]) -> None:
        plan, items = self.plan, call.heads * call.sequences
        order, head, sequence = None, 0, 0
        if call.order is not None:
            order = call.order
            _check_places(order, call.length)
            head = order.stride(0) if order.shape[0] > 1 else 0
            sequence = order.stride(1) if order.shape[1] > 1 else 0
        before = (
            ctypes.c_long(call.length),
            ctypes.c_long(call.length if plan.whole else min(plan.rows, call.length)),
            ctypes.c_int(torch.get_num_threads()),
            ctypes.c_long(1 if plan.whole else ranges_of(items, -(-call.length // plan.rows))),
            *([ctypes.c_bool(call.separate)] if function == "backward" else []),
            ctypes.c_long(call.steps),
            (ctypes.c_int64 * (2 * call.steps))(*call.bounds),
            (ctypes.c_double * call.steps)(*call.weights),
            (ctypes.c_double * call.steps)(*call.rates),
        )
        place = ctypes.c_void_p(None if order is None else order.data_ptr())
        after = (place, ctypes.c_long(head), ctypes.c_long(sequence))
        self.call(function, (call.heads, call.sequences), call.dtype, before, given, after, list(made.items()))


def _check_places(order: Tensor, tokens: int) -> None:
    """C++ reads and writes where an order says: refuse one that says elsewhere (a call that nothing has checked, as one
    in a compiled graph)."""
    if order.numel():
        low, high = order.aminmax()
        if int(low) < 0 or int(high) >= tokens:
            raise OrderError(
                "An order is no permutation of the tokens.",
                given=f"places from {int(low)} to {int(high)}",
                need=f"each of 0 to {tokens - 1} once",
                fix="order = torch.rand(H, N).argsort(-1)",
            )


def readable(tensor: Tensor, walked: bool) -> Tensor:
    """The tensor itself where each tile (each row, if tokens are `walked`) lies in one piece; else a copy."""
    if tensor.is_contiguous():
        return tensor
    step = 1
    for size, stride in zip(reversed(tensor.shape[2 + walked :]), reversed(tensor.stride()[2 + walked :]), strict=True):
        if size != 1 and stride != step:
            return tensor.contiguous()
        step *= size
    return tensor


def laid_out(like: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Memory for the cotangent of tokens [H, B, N, *], in the order in which those lie, each row in one piece; where
    heads share them, for a cotangent of each."""
    if like.shape[0] == heads:
        made = torch.empty_like(like, dtype=dtype)
        if readable(made, True) is made:
            return made
    return side_by_side(like, (heads, *like.shape[1:]), dtype)


def argument(tensor: Tensor, walked: bool, between: bool = False) -> TensorArgument:
    """A tensor [H, B, ..] as C++ sees it; one of states between steps is [steps, H, B, ..]."""
    axes = (1, 2, 0) if between else (0, 1, 2)
    strides = [tensor.stride(axis) if axis < tensor.ndim and tensor.shape[axis] > 1 else 0 for axis in axes]
    return TensorArgument(tensor.data_ptr(), strides[0], strides[1], strides[2] if walked else 0)
