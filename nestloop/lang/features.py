"""Maps of a view's features: convolution over tokens, positions, norms, scales."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestloop.errors import InputError, StateError, shown
from nestloop.lang.coefficient import is_number
from nestloop.lang.declaration import caller, is_count
from nestloop.lang.maps import Call, Map, Place, Shape, depthwise, read_period, refused


def check_over(over: str, label: str, what: str, where: Any) -> str:
    """Which features a map takes together. Raises `ViewError`."""
    if over not in ("head", "width"):
        raise refused(
            f"nl.{label} does not know what to {what}.",
            where,
            f"over={shown(over)}",
            '"head" for each head\'s features, "width" for all of them together',
            f'write nl.{label}(over="width")',
        )
    return over


class Conv(Map):
    """A causal depthwise convolution, made by `conv`."""

    label = "conv"

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.size, self.bias = size, bias
        if not is_count(size):
            raise refused(
                "The size of a convolution is not a number of tokens.",
                self.where,
                f"size={size!r}",
                "a whole number, 1 or more",
                "write nl.conv(4)",
            )

    def parameters(self, place: Place) -> dict[str, Shape]:
        return depthwise(place, self.bias, self.size)

    def __call__(self, x: Tensor, own: Any, call: Call) -> Tensor:
        tokens, flat = x.shape[1], x.flatten(2)  # [B, N, G * f]
        before = call.carried.get(call.key)
        if before is None:
            before = flat.new_zeros(flat.shape[0], self.size - 1, flat.shape[2])
        elif before.ndim != 3 or before.shape[1:] != (self.size - 1, flat.shape[2]):
            raise StateError(
                "The state is of another layer: its convolution's rows do not fit.",
                where=self.where,
                given=f"{call.key} [{', '.join(map(str, before.shape))}]",
                need=f"[sequences, {self.size - 1}, {flat.shape[2]}]",
                fix="pass what this layer, or one of the same declaration, returned with return_state=True",
            )
        flat = torch.cat([before.to(flat.dtype), flat], 1)
        call.kept[call.key] = flat[:, flat.shape[1] - (self.size - 1) :]
        weight = own.weight[:, 0]
        # y_t = sum_i w_i x_{t - size + 1 + i}: torch's Conv1d, padded on the left
        y = sum(flat[:, i : i + tokens] * weight[:, i] for i in range(self.size))
        return (y if not self.bias else y + own.bias).view_as(x)

    def __repr__(self) -> str:
        return f"nl.conv({self.size})"


class Rope(Map):
    """Rotary positions, made by `rope`."""

    label = "rope"

    def __init__(self, theta: float, period: int | str | None, pairs: str, grid: bool, over: str) -> None:
        super().__init__()
        if not (is_number(theta) and theta > 0):
            raise refused(
                "The theta of nl.rope is none.",
                self.where,
                f"theta={shown(theta)}",
                "a finite number above 0: frequencies are theta^(-2i/f)",
                "write nl.rope(theta=10000.0)",
            )
        self.theta, self.period, self.pairs = float(theta), read_period(period, "nl.rope", self.where), pairs
        self.on_grid, self.over = grid, check_over(over, "rope", "turn", self.where)
        if grid and period is not None:
            raise refused(
                "Rotary positions on a grid have no period.",
                self.where,
                f"grid=True, period={shown(period)}",
                "rows and columns of the whole grid",
                "write nl.rope(grid=True)",
            )
        if pairs not in ("interleaved", "half"):
            raise refused(
                "Rotary positions do not know these pairs.",
                self.where,
                f"pairs={pairs!r}",
                '"interleaved" for features (2i, 2i + 1), or "half" for (i, i + f/2)',
                'write nl.rope(pairs="half")',
            )

    def __call__(self, x: Tensor, own: Any, call: Call) -> Tensor:
        whole, x = x.shape, x.flatten(2)[:, :, None] if self.over == "width" else x
        features = x.shape[-1]
        if features % (4 if self.on_grid else 2):
            raise InputError(
                f"Rotary positions turn pairs of features{', half of them by row' if self.on_grid else ''}.",
                where=self.where,
                given=f"{features} features",
                need=f"{'a multiple of four' if self.on_grid else 'an even number of'} features per {self.over}",
                fix=f"choose {'another' if self.on_grid else 'an even'} d, or leave nl.rope() out",
            )
        period = call.chunk if self.period == "chunk" else self.period
        key = (self.label, self.theta, period, call.grid if self.on_grid else (), features, x.dtype)
        if key not in call.memo:  # views that are turned alike read one table
            call.memo[key] = self._table(x, call, period)  # type: ignore[arg-type]
        cos, sin = call.memo[key]
        if self.pairs == "half":
            one, other = x.chunk(2, -1)
            return torch.cat([one * cos - other * sin, other * cos + one * sin], -1).view(whole)
        one, other = x[..., ::2], x[..., 1::2]
        return torch.stack([one * cos - other * sin, other * cos + one * sin], -1).view(whole)

    def _table(self, x: Tensor, call: Call, period: int | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions of x [B, N, G, f]: [N, 1, f/2]."""
        # float32, as the tables of the published models are
        places = call.positions(x.shape[1], x.device, period)
        axes = [places // call.grid[1], places % call.grid[1]] if self.on_grid else [places]
        features = x.shape[-1] // len(axes)
        index = torch.arange(0, features, 2, dtype=torch.int64, device=x.device).float()
        frequencies = 1.0 / self.theta ** (index / features)
        angles = [axis.float()[:, None] * frequencies for axis in axes]
        angle = (torch.cat(angles, -1) if self.on_grid else angles[0])[:, None]
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class CosReweight(Map):
    """cosFormer's position weights, made by `cos_reweight`."""

    label = "cos_reweight"

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        if not is_count(length):
            raise refused(
                "The length of cosFormer's weights is not a number of tokens.",
                self.where,
                f"length={length!r}",
                "the longest sequence's tokens: a whole number, 1 or more",
                "write nl.cos_reweight(2048)",
            )

    def takes(self, features: int) -> int:
        if features % 2:
            raise InputError(
                "cosFormer's weights double the features.",
                where=self.where,
                given=f"a view of {features} features per head",
                need="an even number",
                fix='declare the view with "2*d"',
            )
        return features // 2

    def __call__(self, x: Tensor, own: Any, call: Call) -> Tensor:
        places = call.positions(x.shape[1], x.device).to(torch.promote_types(x.dtype, torch.float32)) + 1
        angle = (math.pi / 2 * places / self.length)[:, None, None]
        return torch.cat([x * angle.sin().to(x.dtype), x * angle.cos().to(x.dtype)], -1)


class Norm(Map):
    """A norm over each group's features or over all of them: `l2_norm`, `rms_norm`, `layer_norm`."""

    def __init__(self, label: str, eps: float | None, over: str, scale: bool, bias: bool, outside: bool) -> None:
        super().__init__()
        self.label = label  # type: ignore[misc]
        self.eps, self.over, self.scale, self.bias, self.outside = eps, over, scale, bias, outside
        check_over(over, label, "normalise over", self.where)
        if eps is not None and not (is_number(eps) and 0 <= eps <= 1):
            raise refused(
                f"The eps of nl.{label} is none.",
                self.where,
                f"eps={eps!r}",
                "a number from 0 to 1 (the number of features is the view's own), or None for the dtype's epsilon",
                f"write nl.{label}()",
            )

    def parameters(self, place: Place) -> dict[str, Shape]:
        size = [place.features * (place.groups if self.over == "width" else 1)]
        made: dict[str, Shape] = {"weight": (size, "ones", False)} if self.scale else {}
        return {**made, "bias": (size, "zeros", False)} if self.bias else made

    def __call__(self, x: Tensor, own: Any, call: Call) -> Tensor:
        flat = x.flatten(2) if self.over == "width" else x
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        weight, bias = own.weight if self.scale else None, own.bias if self.bias else None
        if self.label == "layer_norm":
            return F.layer_norm(flat, flat.shape[-1:], weight, bias, eps).view_as(x)
        if self.label == "rms_norm":
            return F.rms_norm(flat, flat.shape[-1:], weight, eps).view_as(x)
        total = flat.square().sum(-1, keepdim=True)
        y = flat / (total.sqrt() + eps) if self.outside else flat * (total + eps).rsqrt()
        return y.view_as(x)


class Affine(Map):
    """A scale and an offset per channel, made by `affine`."""

    label = "affine"

    def __init__(self, scale: bool, offset: bool) -> None:
        super().__init__()
        self.scale, self.offset = scale, offset

    def parameters(self, place: Place) -> dict[str, Shape]:
        shape = [place.groups, place.features]
        made: dict[str, Shape] = {"scale": (shape, "ones", False)} if self.scale else {}
        return {**made, "offset": (shape, "zeros", False)} if self.offset else made

    def __call__(self, x: Tensor, own: Any, call: Call) -> Tensor:
        x = x * own.scale if self.scale else x
        return x + own.offset if self.offset else x


def conv(size: int = 4, bias: bool = True) -> Conv:
    """A causal depthwise convolution over `size` tokens: weight [features, 1, size], as of `nn.Conv1d`."""
    return Conv(size, bias)


def rope(
    *unnamed: Any,
    theta: float = 10000.0,
    period: int | str | None = None,
    pairs: str = "interleaved",
    grid: bool = False,
    over: str = "head",
) -> Rope:
    """Rotary positions on each head's features, or on all of them with `over="width"`, frequencies theta^(-2i/f).

    All by name: where others take the number of features first, it is the view's own.

    Args:
        theta: the base of the frequencies.
        period: positions start again every so many tokens; "chunk" for the schedule's chunk (TTT-LM).
        pairs: "interleaved" turns features (2i, 2i + 1), "half" features (i, i + f/2).
        grid: the first half of the pairs turns by the token's row, the others by its column, both with frequencies
            theta^(-4i/f), in a loop that declares `h, w = nl.grid()` (ViT^3, arXiv 2512.01643).

    Raises:
        ViewError: a theta, period or pairs that are none; at the loop's declaration, no grid.
    """
    if unnamed:
        raise refused(
            "nl.rope takes its arguments by name.",
            caller(),
            ", ".join(map(shown, unnamed)),
            "theta=, period=, pairs=, grid= or over=; the number of features is the view's own",
            f"write nl.rope(), or nl.rope(theta={shown(unnamed[0])})",
        )
    return Rope(theta, period, pairs, grid, over)


def l2_norm(eps: float = 1e-6, over: str = "head", outside: bool = False) -> Norm:
    """x / sqrt(|x|^2 + eps), or x / (|x| + eps) with `outside=True`."""
    return Norm("l2_norm", eps, over, False, False, outside)


def rms_norm(eps: float | None = 1e-6, over: str = "head", scale: bool = True) -> Norm:
    """x / sqrt(mean(x^2) + eps), times a learned weight with `scale=True`. eps=None takes the dtype's epsilon."""
    return Norm("rms_norm", eps, over, scale, False, False)


def layer_norm(eps: float | None = 1e-5, over: str = "head", scale: bool = True, bias: bool = True) -> Norm:
    """LayerNorm over each head's features, or over all of them with `over="width"`."""
    return Norm("layer_norm", eps, over, scale, bias, False)


def affine(scale: bool = True, offset: bool = True) -> Affine:
    """A learned scale and offset for each channel of each head: [heads, features] (LaCT's qk_scale, qk_offset)."""
    return Affine(scale, offset)


def cos_reweight(length: int) -> CosReweight:
    """cosFormer's weights (arXiv 2202.08791): [x sin(pi i / 2m), x cos(pi i / 2m)], i from 1, m = `length`.

    Doubles the features. m is fixed, so that a sequence can be continued.
    """
    return CosReweight(length)
