"""Launches of generated Triton on tensors.

On a GPU kernels are compiled and launched by Triton; on a CPU they are interpreted, which is slow and for finding out
what they compute. Inputs are read where they lie, in the dtype that they have.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache as cached
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nestloop.lowering.runtime import cache
from nestloop.lowering.runtime.assembler import assembling, warn_of_no_wgmma
from nestloop.lowering.runtime.native import laid_out, readable
from nestloop.lowering.runtime.refusals import shared_memory_of
from nestloop.lowering.runtime.triton_plan import Launch, TritonPlan, programs_of

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
            text = plan.text_for(nvidia=torch.version.hip is None)
            self._modules[plan.text] = cache.load(cache.write(f"{self.name}_triton", text))
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
        """Programs of a kernel: interpreted ones walk two items each where they may walk any number."""
        every = items * parts[one.over] * one.strips
        if not one.walks:
            return every
        return programs_of(one, every, *_sizes_of(like.device)) if like.device.type == "cuda" else -(-every // 2)

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
