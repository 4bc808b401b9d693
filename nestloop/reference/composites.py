"""Functions of PyTorch that `vmap` or a derivative gets wrong, written with ones that they get right.

In PyTorch 2.11 to 2.13 the third derivative of `layer_norm` is another one, and under `vmap`, with a weight for every
sequence, the second too; losses of elements fail where only one side has the axis; in 2.11 `aminmax` has no derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    axes = tuple(range(-len(shape), 0))
    centered = x - x.mean(axes, keepdim=True)
    normed = centered * torch.rsqrt(centered.square().mean(axes, keepdim=True) + eps)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def _of_elements(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same loss of elements that have all axes of both sides."""

    def loss(x: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        both = torch.zeros_like(x * target)
        return function(x + both, target + both, *args, **kwargs)

    return loss


def _aminmax(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> Any:
    over = () if dim is None else dim
    return torch.return_types.aminmax((x.amin(over, keepdim), x.amax(over, keepdim)))


_INSTEAD: dict[str, Callable[..., Any]] = {
    "aminmax": _aminmax,
    "layer_norm": _layer_norm,
    "mse_loss": _of_elements(F.mse_loss),
    "huber_loss": _of_elements(F.huber_loss),
    "smooth_l1_loss": _of_elements(F.smooth_l1_loss),
}


class Composites(TorchFunctionMode):
    """Calls these instead, while it is active."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _INSTEAD.get(getattr(func, "__name__", ""), func)(*args, **(kwargs or {}))
