"""Inner optimizers of one's own: what a step makes of a gradient, and what it keeps from one step to the next."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestloop.errors import (
    CoefficientError,
    Location,
    MomentError,
    SideEffectError,
    SignatureError,
    TransformError,
    UnknownNameError,
)
from nestloop.lang.coefficient import is_number
from nestloop.lang.declaration import Declaration, body_line, caller
from nestloop.lang.declare import OfTokens, Weight, collect
from nestloop.lang.optim import SGD, momentum_name
from nestloop.lang.purity import check_body

_ARGUMENTS = ("w", "g", "s")
# What a state has under a fast weight's name beside moments.
_TAKEN = ("anchor", "update", "pending", "tail", "initial", *[momentum_name("", order)[1:] for order in range(9)])


class Moment(Declaration):
    """What an optimizer keeps of a fast weight from step to step. See `moment`."""

    kind = "moment"

    def __init__(self, scalar: bool) -> None:
        super().__init__()
        self.scalar = scalar

    def __get__(self, optimizer: Any, cls: type | None = None) -> Any:
        if optimizer is None:
            return self
        raise UnknownNameError(
            f"{type(optimizer).__name__} reads '{self.name}' from itself, but every fast weight has its own.",
            where=caller(),
            given=f"self.{self.name}",
            need="moments from s, numbers from self",
            fix=f"write s.{self.name}",
        )


class Kept:
    """What is kept of one fast weight, by name: the `s` of an update."""

    def __init__(self, optimizer: str, moments: Mapping[str, Tensor]) -> None:
        self.__dict__.update(moments)
        self.__dict__["__optimizer"] = optimizer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own protocols ask for these
            raise AttributeError(name)
        known = [moment for moment in self.__dict__ if moment != "__optimizer"]
        raise UnknownNameError(
            f"{self.__dict__['__optimizer']} has no moment '{name}'.",
            where=caller(),
            given=f"s.{name}",
            need=f"one of its moments: {_listed(known)}",
            fix=f"declare {name} = nl.moment() in it; numbers of the optimizer are read from self",
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise SideEffectError(
            f"The update of {self.__dict__['__optimizer']} stores into s.{name}.",
            where=caller(),
            given=f"s.{name} = ...",
            need="an update that only computes its result",
            fix=f'write {name} = ..., and return step, {{"{name}": {name}}}',
        )


def moment(scalar: bool = False) -> Any:
    """Declare what an optimizer keeps of every fast weight from one step to the next: zero before the first.

    Args:
        scalar: one number for each fast weight, and each sequence and head, not one for each of its elements: a count
            of steps, say.
    """
    return Moment(scalar)


class Optimizer(SGD):
    """An inner optimizer that is declared: its moments, and what a step makes of a gradient with them.

        class RMSProp(nl.Optimizer):
            v = nl.moment()                                 # like the fast weight, zero before the first step

            def update(self, w, g, s):
                v = 0.9 * s.v + 0.1 * g.square()
                return g / (v + 1e-8).sqrt(), {"v": v}

        optimizer = RMSProp(lr=0.01)

    `update` takes a fast weight w, its gradient g (after `gradient_transform` and `momentum`, where given) and what is
    kept of it, s; all of one sequence and head, [*dims] and [] (of a scalar moment). It returns what the learning rate
    multiplies, of g's shape, and every moment by name. All else is as of `SGD`, whose arguments it takes:

        W <- decay * W - lr * scale * update

    A schedule that steps on a batch or a chunk at once takes it; under `Chunked` moments are part of the state, under
    batch schedules of one call. Numbers may be attributes of the class, or fields where it is a dataclass.

    Raises:
        LearningRateError, CoefficientError, DimExpressionError: as `SGD`.
        TransformError: a `transform`, in whose place `update` is.
        MomentError: a moment under a name that the state has another use for, or an update that leaves one out.
        SignatureError, SideEffectError: of `update`.
    """

    moments: ClassVar[Mapping[str, Moment]] = {}
    where_declared: ClassVar[Location]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.where_declared = caller()
        cls.moments = collect(cls, Moment)
        for name, one in cls.moments.items():
            if name in _TAKEN:
                raise MomentError(
                    f"{cls.__name__} has a moment '{name}', a name that the state of a loop has another use for.",
                    where=one.where,
                    given=f"{name} = nl.moment()",
                    need=f"a name that is none of {', '.join(_TAKEN[:6])}",
                    fix=f"write {name}_1 = nl.moment()",
                )
        for name, value in vars(cls).items():
            if isinstance(value, (Weight, OfTokens)):
                raise MomentError(
                    f"The optimizer {cls.__name__} declares a {value.kind}, which only learners and loops have.",
                    where=value.where,
                    given=f"{name} in {cls.__name__}, an optimizer",
                    need="moments, numbers and an update",
                    fix=f"write {name} = nl.moment(), or move it into the loop and give it as lr, decay or momentum",
                )
        if "update" in vars(cls):
            _check_update(cls)

    def update(self, w: Tensor, g: Tensor, s: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What the learning rate multiplies, and the moments: see the class."""
        raise SignatureError(
            f"The optimizer {type(self).__name__} has no update.",
            where=self.where,
            given="no method update",
            need="what a step makes of a gradient: a method update(self, w, g, s)",
            fix="add def update(self, w, g, s): return g, {}",
        )

    def _check(self, where: Location) -> None:
        super()._check(where)
        if self.transform is not None:
            raise TransformError(
                f"{type(self).__name__} takes no transform, in whose place its update is.",
                where=where,
                given="transform=",
                need="an update that does all of it",
                fix="call it on g in update, or give it as gradient_transform",
            )

    @property
    def functions(self) -> dict[str, Any]:
        """The functions that are given, and the update."""
        return {**super().functions, "update": self.update}

    def updated(self, weight: Tensor, gradient: Tensor, *moments: Tensor) -> tuple[Tensor, ...]:
        """The update of one fast weight, and its moments after it, in the order in which they are declared.

        Raises:
            TransformError, MomentError: they are not what they have to be.
        """
        made = self.update(weight, gradient, Kept(type(self).__name__, dict(zip(self.moments, moments, strict=True))))
        if not self.moments and isinstance(made, Tensor):
            made = (made, {})
        where = body_line(type(self).update, self.where)
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], Mapping)):
            raise self._returns(where, _shown(made), "the update, and a dict of the moments")
        step, left = made
        if set(left) != set(self.moments):
            need = f"every moment that it declares, and no other: {_listed(self.moments)}"
            raise self._returns(where, f"moments {_listed(map(str, left))}", need)
        for name, before in zip(self.moments, moments, strict=True):
            after = left[name]
            if not isinstance(after, Tensor) or after.shape != before.shape:
                what = "one number" if self.moments[name].scalar else "one number for every element"
                raise self._returns(where, f"{name}: {_shown(after)}", f"{name}: {_shown(before)}, {what}")
        return (self._shaped_as(gradient, step, "update", "a gradient"), *[left[name] for name in self.moments])

    def _returns(self, where: Location, given: str, need: str) -> MomentError:
        names = ", ".join(f'"{name}": {name}' for name in self.moments)
        return MomentError(
            f"The update of {type(self).__name__} does not return what it has to.",
            where=where,
            given=given,
            need=need,
            fix=f"write return step, {{{names}}}",
        )

    def _moved(
        self, weights: dict[str, Tensor], moved: dict[str, Tensor], kept: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        steps: dict[str, Tensor] = {}
        left: dict[str, Tensor] = {}
        for name, gradient in moved.items():
            keys = [f"{name}.{one}" for one in self.moments]
            steps[name], *after = self.updated(weights[name], gradient, *[kept[key] for key in keys])
            left.update(zip(keys, after, strict=True))
        return steps, left


def _check_update(cls: type[Optimizer]) -> None:
    """Refuse an update that cannot be called, or does more than to compute."""
    function = vars(cls)["update"]
    where = body_line(function, cls.where_declared)
    if not callable(function):
        raise SignatureError(
            f"The update of {cls.__name__} is not a function.",
            where=where,
            given=f"a {type(function).__name__}",
            need="a method update(self, w, g, s)",
            fix="write def update(self, w, g, s): return ..., without a decorator",
        )
    try:
        inspect.signature(function).bind("self", *_ARGUMENTS)
    except (TypeError, ValueError):
        raise SignatureError(
            f"The update of {cls.__name__} does not take ({', '.join(_ARGUMENTS)}).",
            where=where,
            given=f"update{inspect.signature(function)}",
            need="update(self, w, g, s): a fast weight, its gradient, what is kept of it",
            fix="write def update(self, w, g, s): return ...",
        ) from None
    check_body(function)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"[{', '.join(map(str, value.shape))}]"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (arXiv 1412.6980): `m / (sqrt(v + eps_root) + eps)` of the corrected averages m of G and v of G^2.

    AdamW's weight decay is `decay=1 - lr * weight_decay`. Through the first step of a fast weight, whose update is its
    gradient's sign, next to nothing flows back to what the gradient is made of.

    Args:
        lr: as of `SGD`; 0.001 unless given.
        betas: factors on m and v of one step, in [0, 1).
        eps: what is added to the root.
        eps_root: what is added under it: without it, an element whose gradients were all exactly zero has no outer
            gradient (its root's derivative is infinite).

    Raises:
        CoefficientError: a beta outside [0, 1), an eps or eps_root below 0.
        LearningRateError, DimExpressionError, TransformError: as of `Optimizer`.
    """

    lr: Any = 1e-3
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_root: float = 1e-16

    # The weights of the averages m and v are 1 - beta^t after t steps.
    m, v = Moment(False), Moment(False)
    m_weight, v_weight = Moment(True), Moment(True)

    def _check(self, where: Location) -> None:
        super()._check(where)
        betas = self.betas
        pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        if not (pair and all(is_number(beta) and 0 <= beta < 1 for beta in betas)):
            raise _refused("betas", betas, "two numbers in [0, 1)", where)
        for name in ("eps", "eps_root"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise _refused(name, value, "a finite number, 0 or more", where)

    def update(self, w: Tensor, g: Tensor, s: Any) -> tuple[Tensor, dict[str, Tensor]]:
        def averaged(before: Tensor, value: Tensor | float, beta: float) -> Tensor:
            return beta * before + (1 - beta) * value

        beta_m, beta_v = self.betas
        m, v = averaged(s.m, g, beta_m), averaged(s.v, g.square(), beta_v)
        m_weight, v_weight = averaged(s.m_weight, 1.0, beta_m), averaged(s.v_weight, 1.0, beta_v)
        step = (m / m_weight) / (torch.sqrt(v / v_weight + self.eps_root) + self.eps)
        return step, {"m": m, "v": v, "m_weight": m_weight, "v_weight": v_weight}


def _refused(name: str, value: Any, need: str, where: Location) -> CoefficientError:
    return CoefficientError(
        f"The {name} of Adam is not what it takes.",
        where=where,
        given=f"{name}={value!r}",
        need=need,
        fix=f"write nl.Adam(lr=0.001, {name}={getattr(Adam, name)})",
    )
