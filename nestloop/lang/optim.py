"""Inner optimizers, as definitions: what one step does to one fast weight.

The reference walks these; the compiler traces the very same functions, so an optimizer is one class in this
file and nothing else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from torch import Tensor

from nestloop.errors import CoefficientError, LearningRateError, Location, TransformError, shown
from nestloop.lang import coefficient
from nestloop.lang.declaration import is_count
from nestloop.lang.declare import Gate, Slow, caller
from nestloop.lang.dims import DimExpr, parse
from nestloop.lang.transforms import GlobalClip

_COEFFICIENTS = ("lr", "scale", "decay", "log_decay", "momentum")


@dataclass(frozen=True)
class SGD:
    """Gradient descent with decay and momentum, each a definition on one fast weight W and its gradient G:

        G <- gradient_transform(G)
        S <- momentum * S + G                  (one line more for each further order)
        W <- decay * W - lr * scale * transform(S)
        W <- restore(W, the initial W)

    G is summed over a step's tokens. Where a schedule steps once a chunk, gates among the coefficients are averaged
    over the chunk's tokens, the learning rate aside, which weighs each token's loss. Token by token (`Causal`,
    `Online`), where rates may differ from one token to the next, S sums lr * G, and the state has that. A batch
    schedule starts with S = 0 in each call, and of gates takes learning rates without dims alone.

    Args:
        lr: one of
            - a number, or text in the dims: "H/(N*D)" (N tokens in the sequence, n in the step's batch);
            - a tuple of numbers, one per step of a batch schedule;
            - a slow weight (`eta = nl.slow(init="constant(0.1)")`): a learned rate per head;
            - a gate (`eta = nl.gate()`): each token's loss is multiplied by its own rate, before any transform. With
              dims, each token's gradient has a rate per channel;
            - a dict of these by fast weight, 1.0 for those that it leaves out (of decays and scales 1.0 too, of momenta
              0.0); of rates under a batch schedule only what is the same in all steps: no tuple, gate, N or n.
        transform: plain PyTorch from one fast weight's S to its update, same shape (a clip, Newton-Schulz), or a joint
            one (`global_clip`) that sees all fast weights; None leaves it as it is.
        gradient_transform: the same for the gradient, before the momentum.
        scale: a coefficient on what is taken from W since the last anchor, the weights that gradients are taken at:
            under `Causal`, W_t = anchor - scale_t * sum_{s <= t} lr_s G_s, a rate of both positions (TTT-LM's
            tau_t * lr_s, arXiv 2407.04620). Not together with decay or momentum under `Causal`.
        decay: the factor on W of one step; in [0, 1] it forgets. A fast weight that decays and that the read-out reads
            need not enter the loss.
        log_decay: its logarithm instead, at most 0 (GLA, Mamba-2).
        decay_order: "after" takes the gradient at W and then decays W (Titans); "before" takes it at the decayed W
            (gated delta rule). Only `Online` can tell them apart.
        momentum: the factor on S of one step; several, in a tuple, for higher orders (S' <- momentum' * S' + S).
        window: under `Causal`, the gradient of a step is the sum over so many last tokens instead of one (the Omega
            rule, arXiv 2505.23735). Those before a `reset` of the schedule are among them, at the weights after it.
        restore: plain PyTorch from (W, initial W) to the weights a step leaves (`restore_norm`).

    Raises:
        LearningRateError, CoefficientError: a coefficient is none of what it may be.
        DimExpressionError: text that is not arithmetic.
    """

    lr: Any = 1.0
    transform: Any = None
    _: KW_ONLY
    gradient_transform: Any = None
    scale: Any = None
    decay: Any = None
    log_decay: Any = None
    decay_order: str = "after"
    momentum: Any = None
    window: int | None = None
    restore: Callable[[Tensor, Tensor], Tensor] | None = None
    where: Location = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        where = caller()
        object.__setattr__(self, "where", where)
        object.__setattr__(self, "lr", self._read_rate(self.lr, where))
        for name in ("scale", "decay", "log_decay"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, coefficient.read(getattr(self, name), name, where))
        if self.momentum is not None:
            orders = self.momentum if isinstance(self.momentum, (tuple, list)) else (self.momentum,)
            object.__setattr__(self, "momentum", tuple(coefficient.read(m, "momentum", where) for m in orders))
        self._check(where)

    @staticmethod
    def _read_rate(lr: Any, where: Location) -> Any:
        if isinstance(lr, Mapping):
            return {name: SGD._read_rate(value, where) for name, value in lr.items()}
        if isinstance(lr, str):
            return parse(lr, where)
        lr = tuple(lr) if isinstance(lr, list) else lr
        numbers = lr if isinstance(lr, tuple) else (lr,)
        if isinstance(lr, (DimExpr, Gate, Slow)) or (numbers and all(map(coefficient.is_number, numbers))):
            return lr
        raise LearningRateError(
            "The learning rate of SGD is not one it takes.",
            where=where,
            given=shown(lr),
            need='a finite number, text like "H/(N*D)", a tuple of numbers (one per step), a slow weight, a gate, '
            "or a dict of these by fast weight",
            fix="write nl.SGD(lr=0.1), or declare eta = nl.slow() or eta = nl.gate() in the loop and write "
            "nl.SGD(lr=eta)",
        )

    def _check(self, where: Location) -> None:
        if self.decay is not None and self.log_decay is not None:
            raise CoefficientError(
                "SGD takes a decay or its logarithm, not both.",
                where=where,
                given="decay and log_decay",
                need="one of them",
                fix="leave log_decay out, or write log_decay=a with a gate whose activation is F.logsigmoid",
            )
        if self.decay_order not in ("before", "after"):
            raise CoefficientError(
                "SGD does not know this order of decay and gradient.",
                where=where,
                given=f"decay_order={self.decay_order!r}",
                need='"before" or "after" the gradient is taken',
                fix='write decay_order="after"',
            )
        window = self.window
        if window is not None and not is_count(window):
            raise CoefficientError(
                "The window of SGD is not a number of tokens.",
                where=where,
                given=f"window={shown(window)}",
                need="a whole number, 1 or more",
                fix="write window=16",
            )

    @property
    def orders(self) -> int:
        """How many momenta each fast weight has."""
        return len(self.momentum or ())

    @property
    def moments(self) -> Mapping[str, Any]:
        """What is kept of each fast weight beside momenta (`nestloop.lang.optimizer`), by name."""
        return {}

    @classmethod
    def written(cls) -> str:
        """What is called to make one, as users write it."""
        return f"nl.{cls.__name__}" if cls.__module__.startswith("nestloop.lang") else cls.__name__

    @property
    def every(self) -> dict[str, Any]:
        """All its coefficients as they are written, by name: dicts by fast weight and tuples of orders among them."""
        return {**{name: getattr(self, name) for name in _COEFFICIENTS}, **self.own}

    @property
    def numbers(self) -> dict[str, Any]:
        """What else it declares that its update reads (`nestloop.lang.optimizer`), by name."""
        return {}

    @property
    def own(self) -> dict[str, Any]:
        """The coefficients that it declares itself (`nestloop.lang.optimizer`), by name."""
        return {}

    def own_of(self, weight: str) -> dict[str, Any]:
        """Those of one fast weight."""
        return {}

    def spreads(self, name: str) -> bool:
        """Whether a coefficient's dims are axes of fast weights (`nl.coefficient`)."""
        return True

    @property
    def functions(self) -> dict[str, Any]:
        """The functions of fast weights and their gradients that are given, by name, as a step calls them."""
        named = {name: getattr(self, name) for name in ("gradient_transform", "transform", "restore")}
        return {name: function for name, function in named.items() if function is not None}

    @property
    def decays(self) -> Any:
        """The coefficient of the decay, whichever way it is given."""
        return self.decay if self.log_decay is None else self.log_decay

    def coefficients(self, weight: str | None = None) -> list[Any]:
        """Every single coefficient: the rate's, the scale's, the decay's and the momenta's; of a fast weight, those
        that may be its."""
        every = list(self.every.values())
        return coefficient.parts(every if weight is None else [coefficient.of(one, weight) for one in every])

    def with_each(self, change: Callable[[Any], Any]) -> SGD:
        """The same with another rate, scale, decay and momenta: what `change` makes of each as it is written, dicts by
        fast weight and tuples of orders among them."""
        made = copy.copy(self)
        for name, value in self.every.items():
            object.__setattr__(made, name, change(value))
        return made

    def with_functions(self, **functions: Callable[..., Tensor]) -> SGD:
        """The same with other functions: a transform, a gradient_transform, a restore."""
        made = copy.copy(self)
        for name, function in functions.items():
            object.__setattr__(made, name, function)
        return made

    def rate_of(self, weight: str) -> Any:
        """The learning rate of one fast weight."""
        return coefficient.of(self.lr, weight, 1.0)

    def scale_of(self, weight: str) -> Any:
        """The scale of one fast weight."""
        return coefficient.of(self.scale, weight, 1.0)

    def momenta_of(self, weight: str) -> list[Any]:
        """The momenta of one fast weight, one for each order."""
        return [coefficient.of(eta, weight, 0.0) for eta in self.momentum or ()]

    @property
    def steps_by_number(self) -> bool:
        """Whether all fast weights have one learning rate, and it is a number, one for each step, or text."""
        return not isinstance(self.lr, (Slow, Gate, Mapping))

    def rate_at(self, step: int, sizes: Mapping[str, int]) -> float:
        """The factor on the update of step `step`, where `steps_by_number`."""
        if isinstance(self.lr, DimExpr):
            return float(self.lr.evaluate(sizes))
        return float(self.lr[step] if isinstance(self.lr, tuple) else self.lr)

    def transformed(self, gradient: Tensor) -> Tensor:
        """The update of one fast weight before its learning rate. Raises `TransformError` if its shape is another."""
        return self._apply("transform", gradient)

    def gradient_transformed(self, gradient: Tensor) -> Tensor:
        """The gradient of one fast weight before its momentum. Raises `TransformError` if its shape is another."""
        return self._apply("gradient_transform", gradient)

    def restored(self, weight: Tensor, initial: Tensor) -> Tensor:
        """A fast weight after a step. Raises `TransformError` if its shape is another."""
        assert self.restore is not None
        return self._shaped_as(weight, self.restore(weight, initial), "restore", "a fast weight")

    def _apply(self, part: str, gradient: Tensor) -> Tensor:
        transform = getattr(self, part)
        if transform is None:
            return gradient
        return self._shaped_as(gradient, transform(gradient), part, "a gradient")

    def _shaped_as(self, like: Tensor, made: Any, part: str, what: str) -> Tensor:
        """What a part of the optimizer has made of a fast weight or its gradient. Raises `TransformError`."""
        if not isinstance(made, Tensor) or made.shape != like.shape:
            raise TransformError(
                f"The {part.replace('_', ' ')} of {type(self).__name__} changes the shape of {what}.",
                where=self.where,
                given=shape_of(made),
                need=f"{shape_of(like)}, the shape of the fast weight",
                fix="return one number for every element; reduce with keepdim=True inside",
            )
        return made

    def _each(self, part: str, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        transform = getattr(self, part)
        if isinstance(transform, GlobalClip):
            return transform.joint(gradients)
        return {name: self._apply(part, gradient) for name, gradient in gradients.items()}

    def take_step(
        self,
        weights: dict[str, Tensor],
        momenta: dict[str, Tensor],
        gradients: dict[str, Tensor],
        initial: dict[str, Tensor],
        factor: Callable[[str, Any], Any],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step on all fast weights: the whole definition.

        Args:
            weights, gradients, initial: by fast weight. Gradients hold what their tokens' gates weigh.
            momenta: by fast weight and order, `momentum_name(w, order)`, and moments, "w.m".
            factor: (fast weight, coefficient) -> its value for this step, 1.0 for None.

        Returns:
            The new weights, and momenta and moments.
        """
        moved = self._each("gradient_transform", gradients)
        kept: dict[str, Tensor] = {}
        for order in range(self.orders):
            for name in moved:
                key = momentum_name(name, order)
                kept[key] = factor(name, self.momenta_of(name)[order]) * momenta[key] + moved[name]
            moved = {name: kept[momentum_name(name, order)] for name in moved}
        moved, after = self._moved(weights, moved, momenta, factor)
        kept |= after
        made = {}
        for name, weight in weights.items():
            rate = self.rate_of(name)
            scaled = moved[name] if isinstance(rate, Gate) else factor(name, rate) * moved[name]
            if self.scale is not None:
                scaled = factor(name, self.scale_of(name)) * scaled
            made[name] = self.decayed(weight, name, factor) - scaled
            if self.restore is not None:
                made[name] = self.restored(made[name], initial[name])
        return made, kept

    def _moved(
        self,
        weights: dict[str, Tensor],
        moved: dict[str, Tensor],
        kept: Mapping[str, Tensor],
        factor: Callable[[str, Any], Any],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What learning rates multiply, by fast weight, and the moments after it; `moved`: after momenta."""
        return self._each("transform", moved), {}

    def fades(self, name: str) -> bool:
        """Whether a fast weight decays: a step changes it though it has no gradient."""
        kept = coefficient.of(self.decays, name)
        return kept is not None and kept != (1.0 if self.log_decay is None else 0.0)

    def decayed(self, weight: Tensor, name: str, factor: Callable[[str, Any], Any]) -> Tensor:
        """A fast weight after the decay of one step."""
        kept = coefficient.of(self.decays, name)
        if kept is None:
            return weight
        value = factor(name, kept)
        if self.log_decay is not None:
            value = value.exp() if isinstance(value, Tensor) else math.exp(value)
        return value * weight


def shape_of(value: Any) -> str:
    """What a function of the optimizer has made, as text."""
    return f"[{', '.join(map(str, value.shape))}]" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def momentum_name(weight: str, order: int) -> str:
    """The name of a momentum in a state: "w.momentum", "w.momentum2", ..."""
    return f"{weight}.momentum{order + 1 if order else ''}"
