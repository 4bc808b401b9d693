"""An op's autograd function where it is called rather than traced: a derivative in forward mode is refused.

Dynamo takes no function with a `jvp` of its own, so the function that it traces has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestloop.lowering.runtime.recipe import Origin
from nestloop.lowering.runtime.refusals import forward_mode


def transformed(function: Any, origin: Origin) -> type[torch.autograd.Function]:
    """The function for `torch.func`. Raises `ForwardModeError` where that takes a jvp."""

    class Transformed(function):
        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
            raise forward_mode(origin)

    Transformed.__name__ = function.__name__
    return Transformed


def in_one(function: Any) -> type[torch.autograd.Function]:
    """The same with its context set up in `forward`: for those that set it up apart, which `torch.func` needs, PyTorch
    binds the arguments of every call to the signature of `forward` first."""

    class InOne(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Any:
            made = function.forward(*tensors)
            function.setup_context(ctx, tensors, made)
            return made

        backward, jvp = function.backward, function.jvp

    InOne.__name__ = function.__name__
    return InOne
