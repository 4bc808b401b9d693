"""Backward as an op that is differentiated no further: PyTorch would take what it does not know for a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestloop.lowering.runtime.recipe import Origin
from nestloop.lowering.runtime.refusals import differentiated_twice


def once(origin: Origin, op: Callable[..., Any]) -> Callable[..., Any]:
    """An op on tensors whose own gradient is refused, where somebody asks for it.

    Raises, on the way back:
        DoubleBackwardError: always.
    """

    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*tensors: Tensor) -> Any:
            return op(*tensors)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise differentiated_twice(origin)

    return Once.apply


def has_graph() -> bool:
    """Whether what backward computes has a graph of its own; `torch.compile` refuses to go on from there itself."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()
