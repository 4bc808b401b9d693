"""Generated Triton: its kernels, and calls of them on tensors.

On a GPU they are compiled and launched by Triton; on a CPU they are interpreted, which is slow and for finding out what
they compute. Inputs are read where they lie, in the dtype that they have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache as cached
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestloop.lowering.runtime import cache
from nestloop.lowering.runtime.assembler import assembling, warn_of_no_wgmma
from nestloop.lowering.runtime.batches import BatchCode, BatchLoop, Call, compute_dtype
from nestloop.lowering.runtime.native import readable
from nestloop.lowering.runtime.refusals import shared_memory_of
from nestloop.lowering.runtime.triton_plan import Launch, TritonPlan, programs_of, ranges_of

if TYPE_CHECKING:
    from nestloop.lowering.runtime.streams import StreamSignature

_LOW = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class TritonCode:
    """The kernels of one op.

    Args:
        name: the op's name, as an identifier.
        plan: its Triton.
    """

    def __init__(self, name: str, plan: TritonPlan) -> None:
        self.name, self.plan = name, plan

    @cached_property
    def kernels(self) -> ModuleType:
        return cache.load(cache.write(f"{self.name}_triton", self.plan.text))

    def launch(
        self,
        plan: TritonPlan,
        direction: str,
        lead: tuple[int, int],
        given: Sequence[Any],
        made: Sequence[Tensor],
        more: Sequence[Any],
        counts: Sequence[int],
        parts: Mapping[str, int],
        every: int,
        like: Tensor,
        dtype: torch.dtype,
        steps: int = 0,
    ) -> None:
        """Run the kernels of "forward" or "backward", one after the other, all with the same arguments, those of a step
        with its number too.

        Args:
            plan: the plan, or what it is in ranges.
            given, made, more: the first of them: tensors that are read (`pointers`), results, and others; before the
                rest come what one leaves for another and the memory that programs work in.
            counts: the last of them, after heads and sequences: tokens, and steps or chunks.
            parts: programs of each head and sequence, by what they are over (`Launch`).
            every: chunks from one state that is kept to the next.
            like: the first view, whose device and dtype of products it takes.
            dtype: the compute dtype.
            steps: of a loop of batches.
        """
        if not all(lead):  # nothing but sums over no heads, or no sequences
            for tensor in made:
                tensor.zero_()
            return
        heads, sequences = lead
        items = heads * sequences
        grids = {one.kernel: self.grid(one, items, parts, like) for one in plan.launches(direction)}
        parts = {name: items * count for name, count in parts.items()} | {"programs": max(grids.values())}
        low = like.dtype if like.dtype in _LOW and dtype != torch.float64 else dtype
        handed = [
            like.new_empty(max(parts[one.over] * one.elements, 1), dtype=low if one.is_low else dtype)
            for one in plan.handed(direction)
        ]
        room = max(grids[one.kernel] * (one.scratch + every * one.states) for one in plan.launches(direction))
        memory = like.new_empty(max(room, 1), dtype=dtype)
        values = [*given, *made, *more, *handed, memory, heads, sequences, *counts]
        for one, step in plan.turns(direction, steps):
            kernel, grid = getattr(self.kernels, one.kernel), (grids[one.kernel], 1)
            arguments = dict(zip(kernel.arg_names, values, strict=False)) | self.settings(dtype, like.dtype)
            arguments |= {"step": step} if one.each_step else {}
            if like.device.type == "cpu":
                from nestloop.lowering.runtime.interpreter import interpreted

                interpreted(kernel, grid, arguments)
            else:
                options = plan.options(one.kernel, nvidia=torch.version.hip is None)
                with (
                    torch.cuda.device(like.device),
                    shared_memory_of(plan, one.kernel),
                    _assembling(like.device) as own,
                ):
                    kernel[grid](**arguments, **options, **own)

    @staticmethod
    def grid(one: Launch, items: int, parts: Mapping[str, int], like: Tensor) -> int:
        """Programs of a kernel."""
        if like.device.type != "cuda":
            return items * parts[one.over]
        device = torch.cuda.get_device_properties(like.device)
        return parts[one.over] * programs_of(one, items, device.multi_processor_count, device.L2_cache_size)

    @staticmethod
    def settings(dtype: torch.dtype, given: torch.dtype) -> dict[str, Any]:
        """The compute dtype, and how products are taken: in the tokens' dtype where that is a low one, of float32 in as
        much of its precision as `torch.set_float32_matmul_precision` asks for."""
        import triton.language as tl

        if dtype == torch.float64:
            return {"S": tl.float64, "PRODUCT": "ieee"}
        exact = torch.get_float32_matmul_precision() == "highest"
        highest = "tf32x3" if torch.version.hip is None else "bf16x6"  # what AMD's compiler has of it
        return {"S": tl.float32, "PRODUCT": _LOW.get(given, highest if exact else "tf32")}


@contextmanager
def _assembling(device: torch.device) -> Iterator[dict[str, Any]]:
    """While a kernel is launched on a device; gives options of the launch."""
    with assembling(*_versions(device)) as chosen:
        if chosen is not None:
            warn_of_no_wgmma(chosen)
        yield {} if chosen is None else chosen.options


@cached
def _versions(device: torch.device) -> tuple[int, int | None]:
    """Major versions: of a device's compute capability, 0 where it is not NVIDIA's; of CUDA that its driver is of."""
    if torch.version.hip is not None:
        return 0, None
    return torch.cuda.get_device_capability(device)[0], torch._C._cuda_getDriverVersion() // 1000  # type: ignore[attr-defined]


def pointers(tensor: Tensor, walked: bool, between: bool) -> list[Any]:
    """A tensor [H, B, ..] as a kernel takes it: itself, or a copy, then its strides; one of states between steps is
    [steps, H, B, ..] and lies in one piece."""
    if between:
        return [tensor.contiguous()]
    tensor = readable(tensor, walked)
    strides = [tensor.stride(axis) if tensor.shape[axis] > 1 else 0 for axis in (0, 1)]
    return [tensor, *strides, *([tensor.stride(2)] if walked else [])]


def programs(device: torch.device) -> int:
    """How many a device runs at once, each on a multiprocessor of its own."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


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
        if not self._tokens(inputs):
            return self.module.forward(*[t.to(dtype) for t in inputs], None, None, 1)
        values = dict(zip(self.signature.inputs, inputs, strict=True))
        made = [inputs[0].new_empty(shape, dtype=dtype) for shape in self.signature.shapes(inputs)]
        named = dict(zip(self.signature.results, made, strict=True))
        self._run("forward", inputs, {n: values[n] for n in self.plan.forward}, named)
        return made

    def backward(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Inputs, what forward kept, cotangents of its results and no order -> cotangents of the inputs."""
        signature = self.signature
        inputs = list(tensors[: len(signature.inputs)])
        dtype = compute_dtype(inputs)
        if not self._tokens(inputs):
            return self.module.backward(*[t.to(dtype) for t in tensors[:-1]], None, None, 1)
        names = [*signature.inputs, *signature.saved, *[f"d_{n}" for n in signature.made]]
        values = dict(zip(names, tensors[:-1], strict=True))
        lead = self._lead(inputs)
        made = {n: inputs[0].new_empty(*lead, *values[n].shape[2:], dtype=dtype) for n in self.plan.gradients}
        self._run("backward", inputs, {n: values[n] for n in self.plan.backward}, made)
        zero = [t.new_zeros((), dtype=dtype).expand_as(t) for t in inputs]
        return [made.get(n, nothing) for n, nothing in zip(signature.inputs, zero, strict=True)]

    def _tokens(self, inputs: Sequence[Tensor]) -> int:
        return inputs[0].shape[2] - self.signature.halo

    @staticmethod
    def _lead(inputs: Sequence[Tensor]) -> tuple[int, int]:
        return max(t.shape[0] for t in inputs), inputs[0].shape[1]  # the first is a view, which sequences never share

    def _run(self, direction: str, inputs: Sequence[Tensor], given: dict[str, Tensor], made: dict[str, Tensor]) -> None:
        dtype, tokens, signature = compute_dtype(inputs), self._tokens(inputs), self.signature
        every = signature.spacing(inputs) if signature.chunk else 1
        chunks = -(-tokens // signature.chunk) if signature.chunk else 1
        parts = {"sequences": 1, "chunks": chunks, "boundaries": chunks + 1, "groups": -(-chunks // every)}
        arguments: list[Any] = []
        for name, tensor in given.items():
            walked = name in (*self.signature.tokens, "d_z", "d_losses")
            arguments += pointers(tensor, walked, name.startswith("between_"))
        lead, counts = self._lead(inputs), (tokens, every)
        self.launch(self.plan, direction, lead, arguments, [*made.values()], (), counts, parts, every, inputs[0], dtype)


class TritonBatches(BatchCode, TritonCode):
    """The kernels of one loop of batches."""

    plan: TritonPlan

    def __init__(self, name: str, plan: TritonPlan, module: ModuleType, loop: BatchLoop) -> None:
        TritonCode.__init__(self, name, plan)
        BatchCode.__init__(self, plan, module, loop)
        self._numbers: dict[Any, list[Tensor]] = {}

    def memory(self, call: Call, name: str, row: Sequence[int], like: Tensor | None = None) -> Tensor:
        if name == "z" or self.is_token(name):
            return call.new(call.length, *row)
        parts = 1 if name in self.loop.fast else self.ranges(call)  # each program adds up its own
        return call.like.new_empty(call.heads, call.sequences * parts, *row, dtype=call.dtype)

    def ranges(self, call: Call) -> int:
        """Ranges of tokens that have a program each; one where a program walks all steps."""
        longest = max(
            (stop - start for start, stop in zip(call.bounds[::2], call.bounds[1::2], strict=True)), default=0
        )
        return ranges_of(call.heads * call.sequences, longest, self.plan.rows, programs(call.like.device))

    def run(self, function: str, call: Call, given: list[tuple[str, Tensor]], made: dict[str, Tensor]) -> None:
        arguments: list[Any] = []
        for name, tensor in given:
            tensor = tensor.to(call.dtype) if name in self.loop.fast else tensor
            arguments += pointers(tensor, name == "d_z" or self.is_token(name), name.startswith("between_"))
        order = [] if call.order is None else pointers(call.order, False, False)
        ranges = self.ranges(call)
        plan, counts = (self.plan, ()) if ranges == 1 else (self.plan.in_ranges(), (ranges,))
        parts = {"sequences": 1, "ranges": ranges, "tokens": call.length}
        counts = (call.length, call.steps, *counts)
        lead, more = (call.heads, call.sequences), [*order, *self._steps(call)]
        results = [*made.values()]
        like, dtype, steps = call.like, call.dtype, call.steps
        self.launch(plan, function, lead, arguments, results, more, counts, parts, 1, like, dtype, steps)

    def _steps(self, call: Call) -> list[Tensor]:
        """Bounds, weights and rates where the tensors are: kept, so that only the first call moves them there."""
        key = (call.length, call.sequences, call.dtype, call.like.device)
        if key not in self._numbers:
            like = {"device": call.like.device, "dtype": call.dtype}
            bounds = torch.tensor(call.bounds, dtype=torch.int32, device=call.like.device)
            self._numbers[key] = [bounds, torch.tensor(call.weights, **like), torch.tensor(call.rates, **like)]
        return self._numbers[key]
