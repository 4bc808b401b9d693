"""Maps that see all tokens of a sequence at once: over its token grid, or over all of them. No stream has any."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestloop.errors import shown
from nestloop.lang.coefficient import is_number
from nestloop.lang.declaration import is_count
from nestloop.lang.maps import Call, Map, Place, Shape, depthwise, refused


class Conv2d(Map):
    """A depthwise convolution over the token grid, made by `conv2d`."""

    label, whole, on_grid = "conv2d", True, True

    def __init__(self, size: int, bias: bool, residual: bool) -> None:
        super().__init__()
        self.size, self.bias, self.residual = size, bias, residual
        if not is_count(size) or size % 2 == 0:
            raise refused(
                "The window of a convolution over the token grid has no middle.",
                self.where,
                f"size={shown(size)}",
                "an odd number of tokens, 1 or more: as many on each side",
                "write nl.conv2d(3)",
            )

    def parameters(self, place: Place) -> dict[str, Shape]:
        return depthwise(place, self.bias, self.size, self.size)

    def __call__(self, x: Tensor, own: Any, call: Call) -> Tensor:
        image = x.flatten(2).mT.unflatten(2, call.grid)  # [B, G * f, h, w]
        bias = own.bias if self.bias else None
        y = F.conv2d(image, own.weight, bias, padding=self.size // 2, groups=image.shape[1])
        y = y.flatten(2).mT.reshape(x.shape)
        return x + y if self.residual else y

    def __repr__(self) -> str:
        return f"nl.conv2d({self.size})"


class InstanceNorm(Map):
    """A norm over the tokens of a sequence, made by `instance_norm`."""

    label, whole = "instance_norm", True

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps
        if not (is_number(eps) and eps >= 0):
            raise refused(
                "The eps of nl.instance_norm is none.",
                self.where,
                f"eps={shown(eps)}",
                "a finite number, 0 or more",
                "write nl.instance_norm()",
            )

    def __call__(self, x: Tensor, own: Any, call: Call) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance = wide.mean(1, keepdim=True), wide.var(1, keepdim=True, correction=0)
        return ((wide - mean) * (variance + self.eps).rsqrt()).to(x.dtype)


def conv2d(size: int = 3, bias: bool = True, residual: bool = False) -> Conv2d:
    """A depthwise convolution over the token grid of a loop that declares `h, w = nl.grid()`.

    Zeros lie around the grid; weight [features, 1, size, size], as of `nn.Conv2d`.

    Args:
        size: tokens of the window's side, odd.
        bias: with a bias.
        residual: what it makes is added to what it is given (Transformer-to-TTT's views, arXiv 2605.02772).

    Raises:
        ViewError: a window without a middle; at the loop's declaration, no grid.
    """
    return Conv2d(size, bias, residual)


def instance_norm(eps: float = 1e-5) -> InstanceNorm:
    """Each feature less its mean over the sequence's tokens, over sqrt(its variance + eps): `F.instance_norm`.

    Raises:
        ViewError: an eps below 0; at the loop's declaration, a stream, which has not seen all tokens.
    """
    return InstanceNorm(eps)
