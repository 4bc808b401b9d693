"""Inner optimizers, as definitions: what one step does to one fast weight.

The reference walks these; the compiler traces the very same functions, so an optimizer is one class in this
file and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nestloop.errors import LearningRateError, Location, TransformError
from nestloop.lang.declare import Gate, Slow, caller
from nestloop.lang.dims import DimExpr, parse

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SGD:
    """Gradient descent: `W <- W - lr * transform(G)`, G the gradient of the batch's loss.

    Args:
        lr: one of
            - a number, or text in the dims: "H/(N*D)" (N tokens in the sequence, n in the step's batch);
            - a tuple of numbers, one per step;
            - a slow weight without dims (`eta = nl.slow(init="constant(0.1)")`): a learned scalar;
            - a gate (`eta = nl.gate()`): each token's loss is multiplied by its own rate, before `transform`.
        transform: plain PyTorch from one fast weight's gradient to its update, same shape (a clip, say); None
            leaves the gradient as it is.

    Raises:
        LearningRateError: `lr` is none of these.
        DimExpressionError: `lr` is text that is not arithmetic.
    """

    lr: Any = 1.0
    transform: Transform | None = None
    where: Location = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        where = caller()
        object.__setattr__(self, "where", where)
        lr = self.lr
        if isinstance(lr, str):
            object.__setattr__(self, "lr", parse(lr, where))
        elif isinstance(lr, list):
            object.__setattr__(self, "lr", tuple(lr))
        lr = self.lr
        numbers = lr if isinstance(lr, tuple) else (lr,)
        if isinstance(lr, (DimExpr, Gate)) or (isinstance(lr, Slow) and not lr.dims):
            return
        if numbers and all(map(_is_rate, numbers)):
            return
        raise LearningRateError(
            "The learning rate of SGD is not one it takes.",
            where=where,
            given=repr(lr),
            need='a finite number, text like "H/(N*D)", a tuple of numbers (one per step), a slow weight without dims, '
            "or a gate",
            fix="write nl.SGD(lr=0.1), or declare eta = nl.slow() or eta = nl.gate() in the loop and write "
            "nl.SGD(lr=eta)",
        )

    def rate(self, step: int, sizes: dict[str, int], slow: dict[str, Tensor]) -> Any:
        """The factor on the update of step `step`: a number, or the learned scalar's tensor []."""
        match self.lr:
            case DimExpr():
                return float(self.lr.evaluate(sizes))
            case tuple():
                return self.lr[step]
            case Slow():
                return slow[self.lr.name]
            case Gate():
                return 1.0
        return float(self.lr)

    def update(self, weight: Tensor, gradient: Tensor, rate: Any) -> Tensor:
        """One step on one fast weight."""
        return weight - rate * self.transformed(gradient)

    def transformed(self, gradient: Tensor) -> Tensor:
        """The update of one fast weight before its learning rate. Raises `TransformError` if its shape is another."""
        if self.transform is None:
            return gradient
        step = self.transform(gradient)
        if not isinstance(step, Tensor) or step.shape != gradient.shape:
            given = f"[{', '.join(map(str, step.shape))}]" if isinstance(step, Tensor) else f"a {type(step).__name__}"
            raise TransformError(
                "The transform of SGD changes the shape of a gradient.",
                where=self.where,
                given=given,
                need=f"[{', '.join(map(str, gradient.shape))}], the shape of the fast weight",
                fix="return one number for every element; reduce with keepdim=True inside",
            )
        return step


@dataclass(frozen=True)
class SoftClip:
    """A transform, made by `soft_clip`."""

    dims: tuple[int, ...]

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient / (gradient.square().sum(self.dims, keepdim=True).sqrt() + 1)

    def __str__(self) -> str:
        return f"soft_clip({', '.join(map(str, self.dims))})"


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def soft_clip(*dims: int) -> Transform:
    """ViT^3's clip: `g / (|g| + 1)`, the 2-norm taken over `dims` of each fast weight's gradient (2512.01643)."""
    return SoftClip(dims)
