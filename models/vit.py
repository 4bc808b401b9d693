"""The vision transformer of arXiv 2310.13807, with any inner loop as its token mixer.

    tokens = patches @ embedding + sin-cos positions
    depth times:  x = x + mixer(LN(x));  x = x + MLP(LN(x))
    logits = head(tanh(pre_logits(mean over tokens of LN(x))))

No class token, fixed positions, a head that starts at zero. Shapes in comments: B images, N tokens,
W width, C channels, P patch edge.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

import nestloop as nl
from nestloop import errors
from nestloop.lang.declaration import is_whole
from nestloop.layer.starts import begin, begin_again
from nestloop.models import mixers
from nestloop.models.hub import HubMixin

SIZES: dict[str, dict[str, int]] = {
    "ti": {"width": 192, "depth": 12, "heads": 3},
    "s": {"width": 384, "depth": 12, "heads": 6},
    "b": {"width": 768, "depth": 12, "heads": 12},
}
LN_EPS = 1e-6


def sincos_positions(rows: int, cols: int, width: int) -> Tensor:
    """Fixed positions of a grid of tokens, float32 [rows * cols, width], row by row.

    The channels are sin x, cos x, sin y, cos y, a quarter of the width each, at the frequencies
    10000^-(i / (width/4 - 1)); x counts columns and y rows.
    """
    if width % 4 or width < 8:
        raise errors.ModelSizeError(
            "sin-cos positions need four channels a frequency and two frequencies",
            given=f"width={width}",
            need="a width of 8 or more that 4 divides",
            fix=f"width={max(8, width - width % 4)}",
        )
    omega = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4 - 1))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    x, y = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega  # [N, W/4] each
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()  # [N, W]


def _check_counts(least: int, **sizes: Any) -> None:
    """Raise `ModelSizeError` for a size that is no whole number, or below `least`."""
    for name, size in sizes.items():
        if not is_whole(size, least):
            raise errors.ModelSizeError(
                f"the {name} of a model is not a count",
                given=f"{name}={errors.shown(size)}",
                need=f"a whole number, {least} or more",
                fix=f"{name}={inspect.signature(ViT).parameters[name].default}",
            )


def _sides(size: Any) -> tuple[int, int]:
    """The rows and columns of images. Raises `ModelSizeError` for a size that is neither a count nor two."""
    sides = (size, size) if isinstance(size, Integral) else size
    if not isinstance(sides, (tuple, list)) or len(sides) != 2 or not all(map(is_whole, sides)):
        raise errors.ModelSizeError(
            "the image_size of a model is not that of an image",
            given=f"image_size={errors.shown(size)}",
            need="a whole number, 1 or more, or (rows, cols)",
            fix="image_size=224",
        )
    return int(sides[0]), int(sides[1])


class MLP(nn.Module):
    """width -> hidden -> width with tanh GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        for linear in (self.up, self.down):
            begin(linear, {"weight": nn.init.xavier_uniform_, "bias": partial(nn.init.normal_, std=1e-6)})

    def forward(self, x: Tensor) -> Tensor:  # [B, N, W] -> [B, N, W]
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """x + mixer(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, mixer: nl.Layer, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LN_EPS)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(width, eps=LN_EPS)
        self.mlp = MLP(width, hidden)

    def forward(
        self, x: Tensor, order: Tensor | None, grid: dict[str, int], return_losses: bool
    ) -> tuple[Tensor, Tensor | None]:
        mixed = self.mixer(self.norm1(x), order=order, return_losses=return_losses, **grid)  # [B, N, W]
        mixed, losses = mixed if return_losses else (mixed, None)  # losses [B, H, T+1]
        x = x + mixed
        return x + self.mlp(self.norm2(x)), losses


class ViT(nn.Module, HubMixin):
    """A vision transformer over images [B, channels, rows, cols].

    mixer: a name of `nestloop.models.mixers.MIXERS`, a loop, or a tuple of loops (branches side by side).
    patch_size: edge of the square patches; 1 makes every pixel a token.
    image_size: the size the positions are stored for; other sizes work, their positions are computed.
    depth: blocks; without one, patches go to the head as they are embedded.
    mixer_dims: sizes of the loop's own dims, passed to `nestloop.Layer`.
    backend, inductor: how the mixers are compiled, passed to `nestloop.Layer`.
    checkpoint: keep one activation a block for the backward and recompute the rest.

    Raises:
        ModelSizeError: a size that is no count, or sizes that do not fit each other.
    """

    positions: Tensor

    def __init__(
        self,
        mixer: Any = "mttt_mlp",
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        *,
        num_classes: int = 1000,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        channels: int = 3,
        mlp_ratio: int = 4,
        mixer_dims: dict[str, int] | None = None,
        backend: str = "auto",
        inductor: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        _check_counts(1, width=width, heads=heads, patch_size=patch_size, channels=channels, mlp_ratio=mlp_ratio)
        _check_counts(0, depth=depth, num_classes=num_classes)
        self.patch_size, self.channels, self.checkpoint = patch_size, channels, checkpoint
        self.grid = self._grid(*_sides(image_size))
        self.register_buffer("positions", sincos_positions(*self.grid, width), persistent=False)  # [N, W]

        self.mixer = mixer
        loop = mixers.resolve(mixer)
        layer_args: dict[str, Any] = {"backend": backend, "inductor": inductor, **(mixer_dims or {})}
        self.embedding = nn.Linear(patch_size * patch_size * channels, width)
        self.blocks = nn.ModuleList(
            Block(nl.Layer(loop, width, heads, **layer_args), width, mlp_ratio * width) for _ in range(depth)
        )
        self.grid_dims = mixers.grid_dims(loop)
        self.encoder_norm = nn.LayerNorm(width, eps=LN_EPS)
        self.pre_logits = nn.Linear(width, width)
        self.head = nn.Linear(width, num_classes)
        for linear in (self.embedding, self.pre_logits):
            begin(linear, {"weight": lecun_normal_, "bias": nn.init.zeros_})
        begin(self.head, {"weight": nn.init.zeros_, "bias": nn.init.zeros_})
        self._arguments = {
            "mixer": mixer,
            "width": width,
            "depth": depth,
            "heads": heads,
            "num_classes": num_classes,
            "image_size": image_size,
            "patch_size": patch_size,
            "channels": channels,
            "mlp_ratio": mlp_ratio,
            "mixer_dims": mixer_dims,
        }

    def reset_parameters(self) -> None:
        """Give every parameter a start like that of a new model: after `torch.manual_seed`, the same values.

        For a model made on the device "meta", once `model.to_empty(device=...)` has given it memory.
        """
        begin_again(self, partial(ViT, backend="reference", **self._arguments))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ViT:
        super()._apply(fn, recurse)
        table = sincos_positions(*self.grid, self.positions.shape[1])
        with torch.no_grad():
            self.positions.copy_(table)  # no file has them, and `to_empty` leaves whatever memory held
        return self

    def _grid(self, rows: int, cols: int) -> tuple[int, int]:
        if rows % self.patch_size or cols % self.patch_size:
            raise errors.ModelSizeError(
                f"the image cannot be cut into patches of {self.patch_size} x {self.patch_size}",
                given=f"an image of {rows} x {cols}",
                need=f"rows and columns that {self.patch_size} divides",
                fix="resize or crop the images, or choose another patch_size",
            )
        return rows // self.patch_size, cols // self.patch_size

    def tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embedded patches with their positions [B, N, W], and the grid (rows, cols) they came from."""
        if not isinstance(images, Tensor) or not images.is_floating_point():
            raise errors.InputError(
                "the images are not a tensor of floating numbers",
                given=str(images.dtype) if isinstance(images, Tensor) else errors.shown(images),
                need=f"[B, {self.channels}, rows, cols] in float32, or the dtype of the model",
                fix="images.float() / 255 for bytes, normalised as in training"
                if isinstance(images, Tensor)
                else "torch.as_tensor(images)",
            )
        if images.dim() != 4 or images.shape[1] != self.channels:
            raise errors.ModelSizeError(
                "the images are not what the model was built for",
                given=f"a tensor {list(images.shape)}",
                need=f"[B, {self.channels}, rows, cols]",
                fix=f"channels first, and ViT(channels={images.shape[1]}) for other images"
                if images.dim() == 4
                else "add the axis of images: images[None]",
            )
        grid = self._grid(images.shape[2], images.shape[3])
        (rows, cols), p = grid, self.patch_size
        patches = images.unflatten(3, (cols, p)).unflatten(2, (rows, p))  # [B, C, rows, P, cols, P]
        patches = patches.permute(0, 2, 4, 3, 5, 1)  # [B, rows, cols, P, P, C]
        patches = patches.flatten(3).flatten(1, 2)  # [B, N, P*P*C]
        known = grid == self.grid and not self.positions.is_meta  # as they stay where weights are assigned
        positions = self.positions if known else sincos_positions(rows, cols, self.positions.shape[1])
        return self.embedding(patches) + positions.to(patches.device, self.positions.dtype), grid  # [B, N, W]

    def forward(
        self, images: Tensor, return_losses: bool = False, order: Sequence[Tensor] | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor | None]]:
        """Logits [B, num_classes]; with `return_losses` also each block's inner losses [B, H, T+1].

        A block whose mixer has no inner loss (self-attention) gives None. `order` replays shuffled loops: one
        permutation [H, N] or [B, H, N] a block.
        """
        x, grid = self.tokens(images)  # [B, N, W]
        sizes = dict(zip(self.grid_dims, grid, strict=False))
        inner_losses = []
        for index, block in enumerate(self.blocks):
            block_order = None if order is None else order[index]
            if self.checkpoint and torch.is_grad_enabled():
                x, losses = recompute(block, x, block_order, sizes, return_losses, use_reentrant=False)
            else:
                x, losses = block(x, block_order, sizes, return_losses)
            inner_losses.append(losses)
        x = self.encoder_norm(x).mean(dim=1)  # [B, W]
        logits = self.head(torch.tanh(self.pre_logits(x)))  # [B, num_classes]
        return (logits, inner_losses) if return_losses else logits


def lecun_normal_(weight: Tensor) -> None:
    """Truncated normal of variance 1 / fan_in for a [fan_out, fan_in] matrix."""
    # a normal cut at two standard deviations has this standard deviation; dividing by it restores 1 / fan_in
    std = math.sqrt(1.0 / weight.shape[1]) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
