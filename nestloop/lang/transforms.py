"""What an optimizer may make of gradients and weights: clips, orthogonalisation, norms that are restored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Transform = Callable[[Tensor], Tensor]


def _root(squares: Tensor) -> Tensor:
    """A norm from its sum of squares; where that is exactly 0, its derivative is 0 too, as in PyTorch's own norms."""
    nothing = squares == 0
    return torch.where(nothing, 0.0, torch.where(nothing, 1.0, squares).sqrt())


@dataclass(frozen=True)
class SoftClip:
    """A transform, made by `soft_clip`."""

    dims: tuple[int, ...]

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient / (_root(gradient.square().sum(self.dims, keepdim=True)) + 1)

    def __str__(self) -> str:
        return f"soft_clip({', '.join(map(str, self.dims))})"


@dataclass(frozen=True)
class GlobalClip:
    """A joint transform, made by `global_clip`."""

    norm: float

    def joint(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        total = _root(sum(g.square().sum() for g in gradients.values()))  # type: ignore[arg-type]
        factor = self.norm / total.clamp(min=self.norm)
        return {name: g * factor for name, g in gradients.items()}

    def __str__(self) -> str:
        return f"global_clip({self.norm})"


@dataclass(frozen=True)
class NewtonSchulz:
    """A transform, made by `newton_schulz`."""

    coefficients: tuple[tuple[float, float, float], ...]
    eps: float
    precision: torch.dtype | None

    def __call__(self, gradient: Tensor) -> Tensor:
        x = gradient if self.precision is None else gradient.to(self.precision)
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        x = x / (_root(x.square().sum((-2, -1), keepdim=True)) + self.eps)
        for a, b, c in self.coefficients:
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return (x.mT if tall else x).to(gradient.dtype)

    def __str__(self) -> str:
        return f"newton_schulz({len(self.coefficients)} steps)"


@dataclass(frozen=True)
class RestoreNorm:
    """A restore, made by `restore_norm`."""

    dim: int
    eps: float

    def __call__(self, weight: Tensor, initial: Tensor) -> Tensor:
        norm, wanted = (_root(w.square().sum(self.dim, keepdim=True)) for w in (weight, initial))
        return weight / (norm + self.eps) * wanted

    def __str__(self) -> str:
        return f"restore_norm({self.dim})"


JORDAN = ((3.4445, -4.7750, 2.0315),) * 5  # Muon's coefficients: singular values in [0.02, 1] go to [0.68, 1.13]


def soft_clip(*dims: int) -> Transform:
    """ViT^3's clip: `g / (|g| + 1)`, the 2-norm taken over `dims` of each fast weight's gradient (2512.01643)."""
    return SoftClip(dims)


def global_clip(norm: float) -> GlobalClip:
    """All fast weights' updates scaled down together where their joint 2-norm is above `norm` (2512.23675)."""
    return GlobalClip(norm)


def newton_schulz(
    coefficients: Sequence[tuple[float, float, float]] = JORDAN, eps: float = 1e-7, precision: torch.dtype | None = None
) -> Transform:
    """Muon's orthogonalisation: X = G / (|G| + eps), then X <- a X + (b X X^T + c (X X^T)^2) X for each (a, b, c).

    Args:
        coefficients: one (a, b, c) a step.
        precision: the dtype it is computed in, bfloat16 say; None for the gradient's own.
    """
    return NewtonSchulz(tuple(tuple(c) for c in coefficients), eps, precision)  # type: ignore[misc]


def restore_norm(dim: int = -1, eps: float = 1e-5) -> RestoreNorm:
    """LaCT's weight norm: each row's 2-norm over `dim` becomes that of the initial weights (2505.23884)."""
    return RestoreNorm(dim, eps)
