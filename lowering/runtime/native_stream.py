"""Generated C++ of a stream's op: its library, and calls of it on tensors.

Inputs are read where they lie, by their strides. A scan over no tokens is left to the generated PyTorch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestloop.lowering.runtime.native import NativeLibrary, NativePlan, laid_out

if TYPE_CHECKING:
    from nestloop.lowering.runtime.streams import StreamSignature


_ITEMS = 48  # heads times groups of sequences: enough to share out to as many cores


def groups_of(heads: int, sequences: int) -> int:
    """Groups of sequences whose cotangents of shared tensors are summed apart: enough to share out to the cores."""
    return max(1, min(sequences, -(-_ITEMS // max(heads, 1))))


class NativeStream(NativeLibrary):
    """The library of one op of a stream.

    Args:
        name: the op's name, as an identifier.
        plan: its C++.
        module: its generated PyTorch, for a call without tokens.
        signature: its tensors.
    """

    def __init__(self, name: str, plan: NativePlan, module: ModuleType, signature: StreamSignature) -> None:
        super().__init__(name, plan)
        self.module, self.signature = module, signature

    def forward(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Inputs [H, B, ..] and no order -> results, as the PyTorch module's `forward`, but in the compute dtype."""
        inputs = list(tensors[:-1])
        if not self.signature.length(inputs):
            return self.module.forward(*tensors, None, 1)
        values = dict(zip(self.signature.inputs, inputs, strict=True))
        made = self.signature.empty(inputs)
        named = list(zip(self.signature.results, made, strict=True))
        self._run("forward", inputs, [(n, values[n]) for n in self.plan.forward], named, 1)
        return made

    def backward(self, *tensors: Tensor) -> Sequence[Tensor | None]:
        """Inputs, what forward kept, cotangents of its results and no order -> cotangents of the inputs, None
        for zero."""
        signature = self.signature
        inputs = list(tensors[: len(signature.inputs)])
        if not self.signature.length(inputs):
            return self.module.backward(*tensors, None, 1)
        names = [*signature.inputs, *signature.saved, *[f"d_{n}" for n in signature.made]]
        values = dict(zip(names, tensors[:-1], strict=True))
        heads, sequences = self.signature.lead(inputs)
        groups = groups_of(heads, sequences)
        made = {}
        for name in self.plan.gradients:
            if name in signature.tokens:
                made[name] = laid_out(values[name], heads, inputs[0].dtype)
                continue
            shared = name in signature.slow or (name.endswith("__initial") and signature.chunk)
            made[name] = inputs[0].new_empty(heads, groups if shared else sequences, *values[name].shape[2:])
        given = [(n, values[n]) for n in self.plan.backward]
        self._run("backward", inputs, given, list(made.items()), groups)
        return [made.get(n) for n in signature.inputs]

    def walks(self, name: str) -> bool:
        return name in (*self.signature.tokens, "z", "losses", "d_z", "d_losses") or name.startswith("between_")

    def _run(
        self,
        function: str,
        inputs: Sequence[Tensor],
        given: list[tuple[str, Tensor]],
        made: list[tuple[str, Tensor]],
        groups: int,
    ) -> None:
        tokens = self.signature.length(inputs)
        before = (
            ctypes.c_long(tokens),
            ctypes.c_long(self.signature.chunk_on(inputs) or tokens),
            ctypes.c_int(torch.get_num_threads()),
            ctypes.c_long(self.signature.spacing(inputs)),
            ctypes.c_long(groups),
        )
        self.call(function, self.signature.lead(inputs), inputs[0].dtype, before, given, (), made)
