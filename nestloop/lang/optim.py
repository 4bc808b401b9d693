"""Inner optimizers, as definitions: what one step does to one fast weight.

The reference walks these; the compiler traces the very same functions, so an optimizer is one class in this
file and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nestloop.errors import LearningRateError
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

    def __post_init__(self) -> None:
        where = caller()
        lr = self.lr
        if isinstance(lr, str):
            object.__setattr__(self, "lr", parse(lr, where))
        elif isinstance(lr, list):
            object.__setattr__(self, "lr", tuple(lr))
        lr = self.lr
        numbers = lr if isinstance(lr, tuple) else (lr,)
        if isinstance(lr, (DimExpr, Gate)) or (isinstance(lr, Slow) and not lr.dims):
            return
        if numbers and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers):
            return
        raise LearningRateError(
            "The learning rate of SGD is not one it takes.",
            where=where,
            given=repr(lr),
            need='a number, text like "H/(N*D)", a tuple of numbers (one per step), a slow weight without dims, '
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
        step = gradient if self.transform is None else self.transform(gradient)
        return weight - rate * step


def soft_clip(*dims: int) -> Transform:
    """ViT^3's clip: `g / (|g| + 1)`, the 2-norm taken over `dims` of each fast weight (2512.01643)."""

    def clip(gradient: Tensor) -> Tensor:
        return gradient / (gradient.square().sum(dims, keepdim=True).sqrt() + 1)

    return clip
