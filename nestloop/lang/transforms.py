"""What an optimizer may make of gradients and weights: clips, orthogonalisation, norms that are restored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nestloop.errors import TransformError
from nestloop.lang.coefficient import is_number
from nestloop.lang.declare import caller

Transform = Callable[[Tensor], Tensor]


def _root(squares: Tensor) -> Tensor:
    """A norm from its sum of squares; where that is exactly 0, its derivative is 0 too, as in PyTorch's own norms."""
    nothing = squares == 0
    return torch.where(nothing, 0.0, torch.where(nothing, 1.0, squares).sqrt())


def _axes_for(dim: int) -> int:
    """How many axes a tensor has at least that has this one; PyTorch takes a number for one of one axis."""
    return 0 if dim in (0, -1) else dim + 1 if dim > 0 else -dim


@dataclass(frozen=True)
class SoftClip:
    """A transform, made by `soft_clip`."""

    dims: tuple[int, ...]

    @property
    def axes(self) -> int:
        """How many axes a fast weight has at least."""
        return max(map(_axes_for, self.dims), default=0)

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
    axes = 2  # that a fast weight has at least

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

    @property
    def axes(self) -> int:
        """How many axes a fast weight has at least."""
        return _axes_for(self.dim)

    def __call__(self, weight: Tensor, initial: Tensor) -> Tensor:
        norm, wanted = (_root(w.square().sum(self.dim, keepdim=True)) for w in (weight, initial))
        return weight / (norm + self.eps) * wanted

    def __str__(self) -> str:
        return f"restore_norm({self.dim})"


JORDAN = ((3.4445, -4.7750, 2.0315),) * 5  # Muon's coefficients: singular values in [0.02, 1] go to [0.68, 1.13]


def _refused(what: str, given: str, need: str, fix: str) -> TransformError:
    return TransformError(what, where=caller(), given=given, need=need, fix=f"write nl.SGD(lr=1.0, {fix})")


def _is_axis(dim: Any) -> bool:
    return isinstance(dim, int) and not isinstance(dim, bool)


def _check_eps(eps: Any, name: str, fix: str) -> None:
    if not (is_number(eps) and eps >= 0):
        raise _refused(f"The eps of nl.{name} is none.", f"eps={eps!r}", "a finite number, 0 or more", fix)


def soft_clip(*dims: int) -> Transform:
    """ViT^3's clip: `g / (|g| + 1)`, the 2-norm taken over `dims` of each fast weight's gradient (2512.01643).

    Raises:
        TransformError: a dim that is no axis.
    """
    if not all(map(_is_axis, dims)):
        raise _refused(
            "nl.soft_clip takes its norm over axes of the fast weights.",
            ", ".join(map(repr, dims)),
            "whole numbers, counted from the last axis: -1, -2",
            "transform=nl.soft_clip(-2)",
        )
    return SoftClip(dims)


def global_clip(norm: float) -> GlobalClip:
    """All fast weights' updates scaled down together where their joint 2-norm is above `norm` (2512.23675).

    Raises:
        TransformError: a norm that is none.
    """
    if not (is_number(norm) and norm > 0):
        raise _refused(
            "The norm of nl.global_clip is none.",
            repr(norm),
            "a finite number above 0: the largest norm of all updates together",
            "transform=nl.global_clip(1.0)",
        )
    return GlobalClip(norm)


def newton_schulz(
    coefficients: Sequence[tuple[float, float, float]] = JORDAN, eps: float = 1e-7, precision: torch.dtype | None = None
) -> Transform:
    """Muon's orthogonalisation: X = G / (|G| + eps), then X <- a X + (b X X^T + c (X X^T)^2) X for each (a, b, c).

    Args:
        coefficients: one (a, b, c) a step.
        precision: the dtype it is computed in, bfloat16 say, by generated PyTorch (C++ and Triton have no plan with
            it); None for the gradient's own.

    Raises:
        TransformError: coefficients that are not three numbers a step, an eps or a precision that is none.
    """
    fix = "transform=nl.newton_schulz()"
    steps = list(coefficients) if isinstance(coefficients, (list, tuple)) else []
    if not steps or not all(isinstance(c, (list, tuple)) and len(c) == 3 and all(map(is_number, c)) for c in steps):
        raise _refused(
            "The coefficients of nl.newton_schulz are none.",
            repr(coefficients),
            "three numbers (a, b, c) for each step; without any given, Muon's five steps",
            fix,
        )
    _check_eps(eps, "newton_schulz", fix)
    if precision is not None and not (isinstance(precision, torch.dtype) and precision.is_floating_point):
        raise _refused(
            "The precision of nl.newton_schulz is not one of numbers.",
            f"precision={precision!r}",
            "a floating dtype of PyTorch's, or None for the gradient's own",
            "transform=nl.newton_schulz(precision=torch.bfloat16)",
        )
    return NewtonSchulz(tuple(map(tuple, steps)), eps, precision)


def restore_norm(dim: int = -1, eps: float = 1e-5) -> RestoreNorm:
    """LaCT's weight norm: each row's 2-norm over `dim` becomes that of the initial weights (2505.23884).

    Raises:
        TransformError: a dim that is no axis, or an eps that is none.
    """
    fix = "restore=nl.restore_norm(-1)"
    if not _is_axis(dim):
        raise _refused(
            "nl.restore_norm takes its norm over an axis of the fast weights.",
            f"dim={dim!r}",
            "a whole number, counted from the last axis: -1",
            fix,
        )
    _check_eps(eps, "restore_norm", fix)
    return RestoreNorm(dim, eps)
