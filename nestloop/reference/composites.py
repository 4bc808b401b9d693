"""Functions of PyTorch that `vmap` or a derivative gets wrong, written with ones that they get right.

In PyTorch 2.11 to 2.13 the third derivative of `layer_norm` is another one, and under `vmap`, with a weight for every
sequence, the second too; losses of elements fail where only one side has the axis; in 2.11 `aminmax` has no derivative.
`one_hot` and `gaussian_nll_loss` look at values, which no transform lets them; `cdist`, `hardsigmoid` and the kernels
of attention have one derivative, not two; `count_nonzero` has no rule of `vmap` in 2.11. Under `vmap` the derivative of
`select_scatter` in its source is another one, and so is the solution of a system whose right side has fewer axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
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


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def _aminmax(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> Any:
    over = () if dim is None else dim
    return torch.return_types.aminmax((x.amin(over, keepdim), x.amax(over, keepdim)))


def _count_nonzero(x: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    return (x != 0).sum(dim)


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def _bilinear(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    made = torch.einsum("...i,oij,...j->...o", x1, weight, x2)
    return made if bias is None else made + bias


def _gaussian_nll_loss(
    x: Tensor, target: Tensor, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """PyTorch's own looks at the values of `var`, whose gradient knows nothing of its being at least `eps`."""
    var = torch.full_like(x, var) if isinstance(var, float) else var
    if var.ndim == x.ndim - 1:
        var = var.unsqueeze(-1)
    var = var + (var.clamp_min(eps) - var).detach()
    loss = 0.5 * (var.log() + (x - target).square() / var) + (0.5 * math.log(2 * math.pi) if full else 0.0)
    return _reduced(loss, reduction)


def _one_hot(x: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:
        return F.one_hot(x)
    return (x.unsqueeze(-1) == torch.arange(num_classes, device=x.device)).to(torch.int64)


def _multi_dot(matrices: Sequence[Tensor]) -> Tensor:
    """One after the other: PyTorch's own looks at their sizes, of which one may be that of the tokens."""
    return reduce(torch.matmul, matrices)


def _linalg_solve(a: Tensor, b: Tensor, *, left: bool = True) -> Tensor:
    """With the batch axes of both on both, of which PyTorch's rule of `vmap` is not sure."""
    vector = b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1])
    right = b.unsqueeze(-1) if vector else b
    lead = torch.broadcast_shapes(a.shape[:-2], right.shape[:-2])
    x = torch.linalg.solve(a.expand(*lead, *a.shape[-2:]), right.expand(*lead, *right.shape[-2:]), left=left)
    return x.squeeze(-1) if vector else x


def _soft_margin_loss(x: Tensor, target: Tensor, *_: Any, reduction: str = "mean", **__: Any) -> Tensor:
    """With a derivative by the target, too."""
    return _reduced(F.softplus(-target * x), reduction)


def _select_scatter(x: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    start = index + x.shape[dim] if index < 0 else index
    return torch.slice_scatter(x, src.unsqueeze(dim), dim, start, start + 1)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """By its formula: PyTorch's kernels have one derivative, not two."""
    formula = torch.ops.aten._scaled_dot_product_attention_math
    return formula(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    return torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, x / 6 + 0.5))


# Those that the compiler takes apart so, too.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "bilinear": _bilinear,
    "cdist": _cdist,
    "gaussian_nll_loss": _gaussian_nll_loss,
    "linalg_multi_dot": _multi_dot,
}
_INSTEAD: dict[str, Callable[..., Any]] = {
    **FUNCTIONS,
    "aminmax": _aminmax,
    "count_nonzero": _count_nonzero,
    "hardsigmoid": _hardsigmoid,
    "layer_norm": _layer_norm,
    "linalg_solve": _linalg_solve,
    "one_hot": _one_hot,
    "scaled_dot_product_attention": _attention,
    "select_scatter": _select_scatter,
    "soft_margin_loss": _soft_margin_loss,
    "mse_loss": _of_elements(F.mse_loss),
    "huber_loss": _of_elements(F.huber_loss),
    "smooth_l1_loss": _of_elements(F.smooth_l1_loss),
}


class Composites(TorchFunctionMode):
    """Calls these instead, while it is active.

    Args:
        dtype: what bodies compute in: float64 where a tensor of the call is, in which float32 means that.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if self.dtype is torch.float64:
            args = tuple(self._wide(value) for value in args)
            kwargs = {key: self._wide(value) for key, value in kwargs.items()}
            if name == "float":
                func, args = torch.Tensor.to, (*args, torch.float64)
        return _INSTEAD.get(name, func)(*args, **kwargs)

    def _wide(self, value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value
