"""Generated Triton of a stream's op: its kernels, and calls of them on tensors.

On a GPU they are compiled and launched by Triton; on a CPU they are interpreted, which is slow and for finding out what
they compute. Inputs are read where they lie, in the dtype that they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestloop.lowering.runtime import cache
from nestloop.lowering.runtime.native import readable
from nestloop.lowering.runtime.triton_plan import TritonPlan

if TYPE_CHECKING:
    from nestloop.lowering.runtime.streams import StreamSignature

_LOW = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class TritonStream:
    """The kernels of one op of a stream.

    Args:
        name: the op's name, as an identifier.
        plan: its Triton.
        module: its generated PyTorch, for a call without tokens.
        signature: its tensors.
    """

    def __init__(self, name: str, plan: TritonPlan, module: ModuleType, signature: StreamSignature) -> None:
        self.name, self.plan, self.module, self.signature = name, plan, module, signature

    @cached_property
    def kernels(self) -> ModuleType:
        return cache.load(cache.write(f"{self.name}_triton", self.plan.text))

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

    def _run(self, function: str, inputs: Sequence[Tensor], given: dict[str, Tensor], made: dict[str, Tensor]) -> None:
        heads, sequences = self._lead(inputs)
        if not heads * sequences:  # nothing but sums over no heads, or no sequences
            for tensor in made.values():
                tensor.zero_()
            return
        dtype = compute_dtype(inputs)
        every = self.signature.spacing(inputs) if self.signature.chunk else 1
        backward = function == "backward"
        room = self.plan.scratch[backward] + (every * self.plan.state if backward else 0)
        arguments: dict[str, Any] = {}
        kept = []  # copies live until the kernel is launched
        for name, tensor in given.items():
            walked = name in (*self.signature.tokens, "d_z", "d_losses")
            between = name.startswith("between_")
            tensor = tensor.contiguous() if between else readable(tensor, walked)
            kept.append(tensor)
            arguments[f"{name}_p"] = tensor
            if not between:
                arguments[f"{name}_h"] = tensor.stride(0) if tensor.shape[0] > 1 else 0
                arguments[f"{name}_b"] = tensor.stride(1) if tensor.shape[1] > 1 else 0
            if walked:
                arguments[f"{name}_n"] = tensor.stride(2)
        arguments |= {f"{name}_made": tensor for name, tensor in made.items()}
        arguments |= {
            "memory": inputs[0].new_empty(max(heads * sequences * room, 1), dtype=dtype),
            "H": heads,
            "B": sequences,
            "N": self._tokens(inputs),
            "every": every,
            **self.settings(dtype, inputs[0].dtype),
        }
        self._launch(function, (heads * sequences, 1), arguments, inputs[0].device)

    @staticmethod
    def settings(dtype: torch.dtype, given: torch.dtype) -> dict[str, Any]:
        """The compute dtype, and how products are taken: in the tokens' dtype where that is a low one, of float32 in as
        much of its precision as `torch.set_float32_matmul_precision` asks for."""
        import triton.language as tl

        if dtype == torch.float64:
            return {"S": tl.float64, "PRODUCT": "ieee"}
        exact = torch.get_float32_matmul_precision() == "highest"
        return {"S": tl.float32, "PRODUCT": _LOW.get(given, "tf32x3" if exact else "tf32")}

    def _launch(self, function: str, grid: tuple[int, ...], arguments: dict[str, Any], device: torch.device) -> None:
        kernel = getattr(self.kernels, function)
        if device.type == "cpu":
            from nestloop.lowering.runtime.interpreter import interpreted

            interpreted(kernel, grid, arguments)
        else:
            with torch.cuda.device(device):
                kernel[grid](**arguments, **self.plan.options(function, nvidia=torch.version.hip is None))


def compute_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if anything is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
