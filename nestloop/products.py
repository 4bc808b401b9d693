"""Products of float32 matrices on CPUs, by the faster of the two libraries that PyTorch has for them.

PyTorch takes MKL's, whose AVX-512 kernels run on Intel's processors alone; on AMD's, oneDNN's, which PyTorch has for
convolutions, take half the time. Anything else (another dtype, device or processor, autocast, what is traced or
transformed) is PyTorch's own product.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

LEAST_ROWS, LEAST_WORK = 4, 2**21  # rows and multiplications below which MKL's start is the shorter, or either's counts


def apply(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`. An `nn.Linear` that nobody watches, or a sequence of such, takes `linear`'s product."""
    if torch.compiler.is_compiling() or type(module) not in (nn.Linear, nn.Sequential) or not _is_bare(module):
        made: Tensor = module(x)
        return made
    if isinstance(module, nn.Linear):
        return linear(x, module.weight, module.bias)
    for part in module.children():
        x = apply(part, x)
    return x


def _is_bare(module: nn.Module) -> bool:
    """Whether calling a module is its class's forward and nothing else: no hooks, of its own or of all modules, no
    other forward (accelerate's), none that `module.compile()` has put there."""
    own = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    if any(own) or "forward" in vars(module) or module._compiled_call_impl is not None:
        return False
    return not torch.nn.modules.module._has_any_global_hook()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x [.., K], weight [M, K], bias [M] -> x weight^T + bias [.., M]."""
    made: Tensor = _Linear.apply(x, weight, bias) if _is_onednns(x, weight, bias) else F.linear(x, weight, bias)
    return made


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [N, K] @ b [K, M]."""
    made: Tensor = _Linear.apply(a, b.mT, None) if _is_onednns(a, b.mT, None) else a @ b
    return made


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN has kernels for this processor's vectors, and MKL, which PyTorch would take, has none."""
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return libraries and wide and str(torch.cpu.get_capabilities().get("cpu_name", "")).startswith("AMD")


def _is_onednns(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if _is_watched() or not onednn_is_faster():
        return False
    given = (x, weight) if bias is None else (x, weight, bias)
    if any(type(t) not in (Tensor, nn.Parameter) or t.dtype != torch.float32 or not t.is_cpu for t in given):
        return False
    rows = x.shape[:-1].numel()
    return x.ndim > 1 and rows >= LEAST_ROWS and rows * weight.numel() >= LEAST_WORK


def _is_watched() -> bool:
    """Whether something reads which of PyTorch's ops run, runs others in their place, or asks for MKL's."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or not torch.backends.mkldnn.enabled
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        dense = weight if weight.is_contiguous() or weight.mT.is_contiguous() else weight.contiguous()
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, dense, bias, "none", [], "")
        return made

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = cotangent.flatten(0, -2)
        return (
            linear(cotangent, weight.mT) if of_x else None,
            product(rows.mT, x.flatten(0, -2)) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
