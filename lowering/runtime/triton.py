"""Generated Triton as an op runs it: of streams, of loops of batches, and of what these make of slow weights alone.

z and the cotangents of tokens are written as the op's callers see them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestloop.lang.kept import Kept
from nestloop.lowering.runtime.batches import (
    BatchCode,
    BatchLoop,
    Call,
    compute_dtype,
    of_heads,
    output_dtype,
    side_by_side,
    with_pieces,
)
from nestloop.lowering.runtime.launching import TritonCode, programs, read
from nestloop.lowering.runtime.tiles import independent
from nestloop.lowering.runtime.triton_plan import TritonPlan, ranges_of

if TYPE_CHECKING:
    from nestloop.lowering.runtime.streams import StreamSignature


class TritonStream(TritonCode):
    """The kernels of one op of a stream.

    Args:
        name: the op's name, as an identifier.
        plan: its Triton.
        module: its generated PyTorch, for a call without tokens.
        signature: its tensors.
    """

    def __init__(self, name: str, plan: TritonPlan, module: ModuleType, signature: StreamSignature) -> None:
        super().__init__(name, plan)
        self.module, self.signature = module, signature

    def forward(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Inputs [H, B, ..] and no order -> results, as the PyTorch module's `forward`."""
        inputs = list(tensors[:-1])
        dtype = compute_dtype(inputs)
        if not self.signature.length(inputs):
            return self.module.forward(*[t.to(dtype) for t in inputs], None, None, 1)
        values = dict(zip(self.signature.inputs, inputs, strict=True))
        made = self.signature.empty(inputs)
        named = dict(zip(self.signature.results, made, strict=True))
        self._run("forward", inputs, {n: values[n] for n in self.plan.forward}, named)
        return made

    def backward(self, *tensors: Tensor) -> Sequence[Tensor | None]:
        """Inputs, what forward kept, cotangents of its results and no order -> cotangents of the inputs, None
        for zero."""
        signature = self.signature
        inputs = list(tensors[: len(signature.inputs)])
        dtype = compute_dtype(inputs)
        if not self.signature.length(inputs):
            return self.module.backward(*[t.to(dtype) for t in tensors[:-1]], None, None, 1)
        names = [*signature.inputs, *signature.saved, *[f"d_{n}" for n in signature.made]]
        values = dict(zip(names, tensors[:-1], strict=True))
        lead = self.signature.lead(inputs)
        made = {
            n: self.cotangent(n, values[n], lead[0], dtype)
            if n in signature.tokens
            else inputs[0].new_empty(*lead, *values[n].shape[2:], dtype=dtype)
            for n in self.plan.gradients
        }
        self._run("backward", inputs, {n: values[n] for n in self.plan.backward}, made)
        return [made.get(n) for n in signature.inputs]

    def _run(self, direction: str, inputs: Sequence[Tensor], given: dict[str, Tensor], made: dict[str, Tensor]) -> None:
        dtype, tokens, signature = compute_dtype(inputs), self.signature.length(inputs), self.signature
        every = signature.spacing(inputs) if signature.chunk else 1
        chunks = -(-tokens // signature.chunk) if signature.chunk else 1
        parts = {"sequences": 1, "chunks": chunks, "boundaries": chunks + 1, "groups": -(-chunks // every)}
        lead, counts = self.signature.lead(inputs), (tokens, every)
        plan = self.plan.for_call(math.prod(lead), tokens, programs(inputs[0].device))  # the same in both directions
        self.launch(plan, direction, lead, given, made, (), counts, parts, every, inputs[0], dtype)

    @cached_property
    def walked(self) -> frozenset[str]:
        return frozenset([*self.signature.tokens, "z", "losses", "d_z", "d_losses"])


class TritonShared(TritonCode):
    """The kernels of what a loop of batches makes of slow weights alone, for every head."""

    walked = frozenset[str]()

    def run(
        self,
        direction: str,
        values: Mapping[str, Tensor],
        made: Mapping[str, Tensor],
        low: torch.dtype | None,
    ) -> None:
        """Run the kernel of a direction on tensors [H, 1, *] by name, an axis H of size 1 being shared.

        low: the dtype of products, where that is not the compute dtype.
        """
        first = next(iter(made.values()))
        given = {n: values[n] for n in (self.plan.forward if direction == "forward" else self.plan.backward)}
        sizes = ((), {"heads": 1}, 1, first, first.dtype, 0)
        self.launch(self.plan, direction, (first.shape[0], 1), given, made, (), *sizes, low)


class TritonBatches(BatchCode, TritonCode):
    """The kernels of one loop of batches."""

    plan: TritonPlan

    def __init__(self, name: str, plan: TritonPlan, module: ModuleType, loop: BatchLoop) -> None:
        TritonCode.__init__(self, name, plan)
        BatchCode.__init__(self, plan, module, loop)
        self._numbers: Kept[list[Tensor]] = Kept()

    def prepared(self) -> ModuleType:
        pieces: dict[str, Callable[..., Any]] = {}
        if self.plan.prepare is not None:
            code = TritonShared(f"{self.name}_prepare", self.plan.prepare)
            both = ("prepare", "forward", code.plan.common), ("prepare_vjp", "backward", code.plan.gradients)
            pieces |= {name: self._of_heads(code, name, *how) for name, *how in both}
        if self.plan.decoders is not None:
            pieces["conditioned"] = self._conditioned(TritonShared(f"{self.name}_decoders", self.plan.decoders))
        return with_pieces(self.module, **pieces) if pieces else self.module

    def _of_heads(self, code: TritonShared, name: str, direction: str, like: Sequence[str]) -> Callable[..., Any]:
        def run(values: Mapping[str, Tensor], made: Sequence[Tensor], low: torch.dtype | None) -> None:
            code.run(direction, values, dict(zip(like, made, strict=True)), low)

        return of_heads(getattr(self.module, name), like, self.loop.shared, run)

    def _conditioned(self, code: TritonShared) -> Callable[..., Tensor]:
        names = self.loop.inputs
        sizes = code.plan.tiles["rows"]

        def conditioned(*tensors: Tensor) -> Tensor:
            values = dict(zip(names, tensors, strict=True))
            read = [values[n] for n in code.plan.forward]
            rows = read[0].new_zeros(max(t.shape[0] for t in read), 1, *sizes)
            code.run("forward", values, {"rows": rows}, None)
            return independent(rows)

        return conditioned

    def memory(self, call: Call, name: str, row: Sequence[int], like: Tensor | None = None) -> Tensor:
        if name == "z":
            dtype = output_dtype(call.inputs[: len(self.loop.tokens)], call.inputs)
            return side_by_side(call.like, (call.heads, call.sequences, call.length, *row), dtype)
        if self.is_token(name):
            assert like is not None
            return self.cotangent(name, like, call.heads, call.dtype)
        if name in self.loop.fast:
            return call.new(*row)
        if call.sums is None:  # each program adds up its own
            shape = (call.heads, call.sequences * self.ranges(call), self.plan.apart)
            call.sums = call.like.new_empty(shape, dtype=call.dtype)
        return self._part(call.sums, name, row)

    def totals(self, call: Call, rows: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        if call.sums is None:
            return {}
        total = call.sums.sum(1, keepdim=True)
        return {n: self._part(total, n, row) for n, row in rows.items() if n in self.plan.sums}

    def _part(self, sums: Tensor, name: str, row: Sequence[int]) -> Tensor:
        """The cotangents of one tensor among those that are added up together [H, *, apart]."""
        heads, count, apart = sums.shape
        within = [math.prod(row[axis + 1 :]) for axis in range(len(row))]
        return sums.as_strided((heads, count, *row), (count * apart, apart, *within), self.plan.sums[name])

    def either(
        self, chosen: Tensor, tensors: Sequence[Tensor], other: TritonBatches, others: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """`forward` of this code or of that of the other form, as the device has chosen: kernels of both are launched,
        and those of one do nothing.

        Args:
            chosen: int32 [2], on the device: 1 for the form that writes the results, this one's first.
            tensors, others: what each `forward` takes.
        """
        call = Call(self, list(tensors[: len(self.loop.inputs)]), tensors[-1])
        made = self.results(call)
        for code, given, call.chosen in ((self, tensors, chosen[:1]), (other, others, chosen[1:])):
            code.run("forward", call, code.given(given), made)
        return list(made.values())

    def ranges(self, call: Call) -> int:
        """Ranges of tokens that have a program each; one where a program walks all steps."""
        longest = max(
            (stop - start for start, stop in zip(call.bounds[::2], call.bounds[1::2], strict=True)), default=0
        )
        return ranges_of(call.heads * call.sequences, longest, self.plan.rows, programs(call.like.device))

    def run(self, function: str, call: Call, given: list[tuple[str, Tensor]], made: dict[str, Tensor]) -> None:
        order = [] if call.order is None else read({"order": call.order}, ())
        ranges = self.ranges(call)
        plan, counts = (self.plan, ()) if ranges == 1 else (self._in_ranges, (ranges,))
        parts, counts = {"sequences": 1, "ranges": ranges, "tokens": call.length}, (call.length, call.steps, *counts)
        chosen = [] if call.chosen is None else [call.chosen]
        lead, more = (call.heads, call.sequences), [*order, *chosen, *self._steps(call)]
        given = [(name, tensor.to(call.dtype) if name in self.loop.fast else tensor) for name, tensor in given]
        like, dtype, steps = call.like, call.dtype, call.steps
        self.launch(plan, function, lead, dict(given), made, more, counts, parts, 1, like, dtype, steps)

    @cached_property
    def _in_ranges(self) -> TritonPlan:
        return self.plan.in_ranges()

    @cached_property
    def walked(self) -> frozenset[str]:
        names = {*self.plan.forward, *self.plan.backward, *self.plan.gradients}
        return frozenset(["z", "d_z", *filter(self.is_token, names)])

    def _steps(self, call: Call) -> list[Tensor]:
        """Bounds, weights and rates where the tensors are: kept, so that only the first call moves them there."""

        def moved() -> list[Tensor]:
            like = {"device": call.like.device, "dtype": call.dtype}
            bounds = torch.tensor(call.bounds, dtype=torch.int32, device=call.like.device)
            return [bounds, torch.tensor(call.weights, **like), torch.tensor(call.rates, **like)]

        return self._numbers.of((call.length, call.sequences, call.dtype, call.like.device), moved)
