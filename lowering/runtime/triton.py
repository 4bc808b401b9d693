"""Generated Triton: its kernels, and calls of them on tensors.

On a GPU they are compiled and launched by Triton; on a CPU they are interpreted, which is slow and for finding out what
they compute. Inputs are read where they lie, in the dtype that they have; z and the cotangents of tokens are written as
the op's callers see them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache as cached
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestloop.lowering.runtime import cache
from nestloop.lowering.runtime.assembler import assembling, warn_of_no_wgmma
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
from nestloop.lowering.runtime.native import laid_out, readable
from nestloop.lowering.runtime.refusals import shared_memory_of
from nestloop.lowering.runtime.tiles import independent
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

        self._modules: dict[str, ModuleType] = {}

    def module_of(self, plan: TritonPlan) -> ModuleType:
        """The kernels of the plan, or of what it is at once."""
        if plan.text not in self._modules:
            self._modules[plan.text] = cache.load(cache.write(f"{self.name}_triton", plan.text))
        return self._modules[plan.text]

    def launch(
        self,
        plan: TritonPlan,
        direction: str,
        lead: tuple[int, int],
        given: Mapping[str, Tensor],
        made: Mapping[str, Tensor],
        more: Sequence[Any],
        counts: Sequence[int],
        parts: Mapping[str, int],
        every: int,
        like: Tensor,
        dtype: torch.dtype,
        steps: int = 0,
        low: torch.dtype | None = None,
    ) -> None:
        """Run the kernels of "forward" or "backward", one after the other, all with the same arguments, those of a step
        with its number too.

        Args:
            plan: the plan, or what it is in ranges, or at once.
            given, made, more: the first of them: tensors that are read, results, and others; before the rest come what
                one leaves for another and the memory that programs work in.
            counts: the last of them, after heads and sequences: tokens, and steps or chunks.
            parts: programs of each head and sequence, by what they are over (`Launch`).
            every: chunks from one state that is kept to the next.
            like: the first view, whose device and dtype of products it takes.
            dtype: the compute dtype.
            steps: of a loop of batches.
            low: the dtype of products, where it is not that of `like`.
        """
        if not all(lead):  # nothing but sums over no heads, or no sequences
            for tensor in made.values():
                tensor.zero_()
            return
        heads, sequences = lead
        items, launches = heads * sequences, plan.launches(direction)

        grids = {one.kernel: self.grid(one, items, parts, like) for one in launches}
        space = {name: items * count for name, count in parts.items()} | {"programs": max(grids.values())}
        factors = like.dtype if dtype == torch.float32 and like.dtype in _LOW else dtype
        handed = [
            like.new_empty(max(space[one.over] * one.elements, 1), dtype=factors if one.low else dtype)
            for one in plan.handed(direction)
        ]
        room = max(grids[one.kernel] * (one.scratch + every * one.states) for one in launches)
        memory = like.new_empty(max(room, 1), dtype=dtype)
        values = [*read(given, self.walked), *written(made, self.walked)]
        values += [*more, *handed, memory, heads, sequences, *counts]
        settings = self.settings(dtype, low or like.dtype)
        on_cpu = like.device.type == "cpu"
        around: AbstractContextManager[dict[str, Any]] = nullcontext({}) if on_cpu else _launching(like.device)
        with around as own:
            for one, step in plan.turns(direction, steps):
                kernel, grid = getattr(self.module_of(plan), one.kernel), (grids[one.kernel], 1)
                arguments = dict(zip(kernel.arg_names, values, strict=False))
                arguments.update(settings)
                if one.each_step:
                    arguments["step"] = step
                if on_cpu:
                    from nestloop.lowering.runtime.interpreter import interpreted

                    interpreted(kernel, grid, arguments)
                else:
                    options = plan.options(one.kernel, nvidia=torch.version.hip is None)
                    with shared_memory_of(plan, one.kernel):
                        kernel[grid](**arguments, **options, **own)

    @property
    def walked(self) -> frozenset[str]:
        """Names of the tensors that have a row for each token."""
        raise NotImplementedError

    def cotangent(self, name: str, like: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """Memory for the cotangent of tokens [H, B, N, *]: in their dtype where the kernels write it once, and heads do
        not share them; else in the compute dtype."""
        rounded = name in self.plan.rounded and like.shape[0] == heads
        return laid_out(like, heads, like.dtype if rounded else dtype)

    @staticmethod
    def grid(one: Launch, items: int, parts: Mapping[str, int], like: Tensor) -> int:
        """Programs of a kernel."""
        every = items * parts[one.over] * one.strips
        if one.walks and like.device.type == "cuda":
            return programs_of(one, every, *_sizes_of(like.device))
        return every

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
def _launching(device: torch.device) -> Iterator[dict[str, Any]]:
    """While kernels are launched on a device; gives options of the launches."""
    with torch.cuda.device(device), assembling(*versions(device)) as chosen:
        if chosen is not None:
            warn_of_no_wgmma(chosen)
        yield {} if chosen is None else chosen.options


@cached
def versions(device: torch.device) -> tuple[int, int | None]:
    """Major versions: of a device's compute capability, 0 where it is not NVIDIA's; of CUDA that its driver is of."""
    if torch.version.hip is not None:
        return 0, None
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))  # PyTorch does not tell it
    return torch.cuda.get_device_capability(device)[0], version.value // 1000


def read(tensors: Mapping[str, Tensor], walked: Collection[str]) -> list[Any]:
    """Tensors [H, B, ..] as a kernel takes those that it reads: each itself, or a copy, then elements from one head,
    one sequence and, where they are `walked`, one token to the next; one of states between steps is [steps, H, B, ..]
    and lies in one piece."""
    values: list[Any] = []
    for name, tensor in tensors.items():  # dozens a call: nothing here is a function of its own
        if name.startswith("between_"):
            values.append(tensor.contiguous())
            continue
        if not tensor.is_contiguous():
            tensor = readable(tensor, name in walked)
        shape, apart = tensor.shape, tensor.stride()
        values += (tensor, apart[0] if shape[0] > 1 else 0, apart[1] if shape[1] > 1 else 0)
        if name in walked:
            values.append(apart[2])
    return values


def written(tensors: Mapping[str, Tensor], walked: Collection[str]) -> list[Any]:
    """The same of results, which lie densely but for those of tokens."""
    values: list[Any] = []
    for name, tensor in tensors.items():
        values += read({name: tensor}, walked) if name in walked else (tensor,)
    return values


def programs(device: torch.device) -> int:
    """How many a device runs at once, each on a multiprocessor of its own."""
    return _sizes_of(device)[0] if device.type == "cuda" else 1


@cached
def _sizes_of(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a CUDA device, and bytes of the cache that they share."""
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.L2_cache_size


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
        if not self._tokens(inputs):
            return self.module.backward(*[t.to(dtype) for t in tensors[:-1]], None, None, 1)
        names = [*signature.inputs, *signature.saved, *[f"d_{n}" for n in signature.made]]
        values = dict(zip(names, tensors[:-1], strict=True))
        lead = self._lead(inputs)
        made = {
            n: self.cotangent(n, values[n], lead[0], dtype)
            if n in signature.tokens
            else inputs[0].new_empty(*lead, *values[n].shape[2:], dtype=dtype)
            for n in self.plan.gradients
        }
        self._run("backward", inputs, {n: values[n] for n in self.plan.backward}, made)
        return [made.get(n) for n in signature.inputs]

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
        lead, counts = self._lead(inputs), (tokens, every)
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
        self._numbers: dict[Any, list[Tensor]] = {}

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
        key = (call.length, call.sequences, call.dtype, call.like.device)
        if key not in self._numbers:
            like = {"device": call.like.device, "dtype": call.dtype}
            bounds = torch.tensor(call.bounds, dtype=torch.int32, device=call.like.device)
            self._numbers[key] = [bounds, torch.tensor(call.weights, **like), torch.tensor(call.rates, **like)]
        return self._numbers[key]
