"""Inner optimizers of one's own: what a step makes of a gradient, and what it keeps from one step to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestloop.errors import (
    CoefficientError,
    Location,
    MomentError,
    SignatureError,
    TransformError,
    shown,
)
from nestloop.lang.coefficient import Unspread, is_number, of, read
from nestloop.lang.declaration import Declaration, body_line, caller, check_signature
from nestloop.lang.declare import OfTokens, Weight, collect
from nestloop.lang.moments import Coefficient, Kept, Moment, listed
from nestloop.lang.optim import SGD, momentum_name, shape_of
from nestloop.lang.purity import check_body

_OF_SGD = tuple(one.name for one in fields(SGD) if one.init)
_OWN = ("update", "_check")  # names that a class has another value for
_UNSET = object()
# What the state, and the compiler, have under a fast weight's name beside moments.
_MOMENTA = (momentum_name("", order)[1:] for order in range(9))
_OF_STATES = ("anchor", "update", "pending", "tail", "initial", "held", "gradient", *_MOMENTA)


class Optimizer(SGD):
    """An inner optimizer that is declared: its moments, and what a step makes of a gradient with them.

        class RMSProp(nl.Optimizer):
            v = nl.moment()                                 # like the fast weight, zero before the first step

            def update(self, w, g, s):
                v = 0.9 * s.v + 0.1 * g.square()
                return g / (v + 1e-8).sqrt(), {"v": v}

        optimizer = RMSProp(lr=0.01)

    `update` takes a fast weight w, its gradient g (after `gradient_transform` and `momentum`, where given) and s, which
    has what is kept of it and its coefficients (`nl.coefficient`); all of one sequence and head, [*dims], a scalar
    moment [], a coefficient a number, what multiplies w, or as it is declared. It returns what the learning rate
    multiplies, of g's shape, and every moment by name. All else is as of `SGD`, whose arguments it takes:

        W <- decay * W - lr * scale * update

    A schedule that steps on a batch or a chunk at once takes it; under `Chunked` moments are part of the state, under
    batch schedules of one call. A gate among its coefficients is averaged over the chunk's tokens. Attributes of the
    class are numbers that `update` reads from self; `Rule(lr=0.1, rate=0.5)` makes one with another `rate`.

    Raises:
        LearningRateError, CoefficientError, DimExpressionError: as `SGD`; a coefficient that is not given.
        TransformError: a `transform`, in whose place `update` is.
        MomentError: a moment under a name that the state has another use for, or an update that leaves one out.
        SignatureError, SideEffectError: of `update`.
    """

    moments: ClassVar[Mapping[str, Moment]] = {}
    declared: ClassVar[Mapping[str, Coefficient]] = {}
    _declared_at: ClassVar[Location]

    def __init__(self, lr: Any = _UNSET, **given: Any) -> None:
        cls = type(self)
        given |= {} if lr is _UNSET else {"lr": lr}
        own = [*cls.declared, *_numbers(cls)]
        unknown = [name for name in given if name not in (*own, *_OF_SGD)]
        if unknown:
            raise CoefficientError(
                f"{cls.__name__} is made with '{unknown[0]}', which it does not have.",
                where=caller(),
                given=f"{unknown[0]}={shown(given[unknown[0]])}",
                need=f"its own ({listed(own)}), or what every optimizer takes ({listed(_OF_SGD)})",
                fix=f"leave it out, or declare {unknown[0]} = nl.coefficient(0.9) in the class {cls.__name__}",
            )
        for name in [name for name in given if name in own]:
            object.__setattr__(self, name, given.pop(name))
        super().__init__(**{name: getattr(cls, name) for name in _OF_SGD} | given)

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        _check_names(cls, caller())
        cls._declared_at = caller()
        for name in set(cls.declared) & set(vars(cls)):
            if not isinstance(vars(cls)[name], Declaration):  # another default
                number = Coefficient(vars(cls)[name], cls.declared[name].spread)
                setattr(cls, name, number)
                number.__set_name__(cls, name)
        cls.moments, cls.declared = collect(cls, Moment), collect(cls, Coefficient)
        if "update" in vars(cls):
            about = ": a fast weight, its gradient, what is kept of it"
            check_signature(cls.update, "update", cls.__name__, ("w", "g", "s"), cls._declared_at, about)
            check_body(cls.update)

    def __eq__(self, other: object) -> bool:
        def said(one: object) -> dict[str, Any]:
            return {name: value for name, value in vars(one).items() if name != "where"}

        return type(self) is type(other) and said(self) == said(other)

    __hash__ = None  # type: ignore[assignment]

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
        given = vars(self).setdefault("given", {})
        for name, one in self.declared.items():
            if name in given:
                given[name] = read(given[name], name, where, self.written())
            elif one.default is None:
                raise CoefficientError(
                    f"{type(self).__name__} is made without its coefficient '{name}', which has no default.",
                    where=where,
                    given=f"no {name}",
                    need="a number, text in the dims, a slow weight, a gate, or a dict of these by fast weight",
                    fix=f"write {type(self).__name__}({name}=0.9), or {name} = nl.coefficient(0.9) in the class",
                )
        if self.transform is not None:
            raise TransformError(
                f"{type(self).__name__} takes no transform, in whose place its update is.",
                where=where,
                given="transform=",
                need="an update that does all of it",
                fix="call it on g in update, or give it as gradient_transform",
            )

    def __repr__(self) -> str:
        settings = {"lr": self.lr, **self.own, **self.numbers}
        settings |= {name: value for name in _OF_SGD if (value := getattr(self, name)) != getattr(SGD, name)}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    @property
    def numbers(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _numbers(type(self))}

    @property
    def own(self) -> dict[str, Any]:
        given = vars(self).get("given", {})
        return {name: given.get(name, one.default) for name, one in self.declared.items()}

    def own_of(self, weight: str) -> dict[str, Any]:
        """The coefficients that it declares itself, of one fast weight.

        Raises:
            CoefficientError: a dict by fast weight leaves it out, and there is no default.
        """
        found = {}
        for name, value in self.own.items():
            found[name] = of(value, weight, of(self.declared[name].default, weight))
            if found[name] is None:
                raise CoefficientError(
                    f"The {name} of {type(self).__name__} leaves out a fast weight, and has no default.",
                    where=self.where,
                    given=f"{name} for {listed(value)}",
                    need=f"one for {weight} too",
                    fix=f"write {name} = nl.coefficient(0.9) in the class, or {name}={{..., {weight!r}: 0.9}}",
                )
            if isinstance(found[name], Declaration) and not self.spreads(name):
                found[name] = Unspread(found[name])
        return found

    def spreads(self, name: str) -> bool:
        return name not in self.declared or self.declared[name].spread

    @property
    def functions(self) -> dict[str, Any]:
        """The functions that are given, and the update."""
        return {**super().functions, "update": self.update}

    def updated(self, weight: Tensor, gradient: Tensor, *beside: Any) -> tuple[Tensor, ...]:
        """The update of one fast weight, and its moments after it, in the order in which they are declared.

        `beside`: moments and coefficients, in this order.

        Raises:
            TransformError, MomentError: they are not what they have to be.
        """
        values = dict(zip([*self.moments, *self.declared], beside, strict=True))
        made = self.update(weight, gradient, Kept(type(self).__name__, values))
        if not self.moments and isinstance(made, Tensor):
            made = (made, {})
        where = body_line(type(self).update, self.where)
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], Mapping)):
            raise self._returns(where, _shown(made), "the update, and a dict of the moments")
        step, left = made
        if set(left) != set(self.moments):
            need = f"every moment that it declares, and no other: {listed(self.moments)}"
            raise self._returns(where, f"moments {listed(map(str, left))}", need)
        for name in self.moments:
            before, after = values[name], left[name]
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
        self,
        weights: dict[str, Tensor],
        moved: dict[str, Tensor],
        kept: Mapping[str, Tensor],
        factor: Callable[[str, Any], Any],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        steps: dict[str, Tensor] = {}
        left: dict[str, Tensor] = {}
        for name, gradient in moved.items():
            keys = [f"{name}.{one}" for one in self.moments]
            own = [_value(factor(name, part), part) for part in self.own_of(name).values()]
            steps[name], *after = self.updated(weights[name], gradient, *[kept[key] for key in keys], *own)
            left.update(zip(keys, after, strict=True))
        return steps, left


def _value(value: Any, part: Any) -> Any:
    """A coefficient as an update reads it: one number [] where it is the same for a whole fast weight."""
    return value if isinstance(value, float) or part.dims else value.reshape(())


def _numbers(cls: type[Optimizer]) -> list[str]:
    """Attributes of a class that are given where it is made, where they are to be others."""
    bases = cls.__mro__[: cls.__mro__.index(Optimizer)]
    found = {name: value for base in reversed(bases) for name, value in vars(base).items()}
    beside = (FunctionType, staticmethod, classmethod, property, type, Declaration)
    known = (*vars(Optimizer), *_OF_SGD)
    return [n for n, value in found.items() if not (n.startswith("_") or isinstance(value, beside) or n in known)]


def _check_names(cls: type[Optimizer], here: Location) -> None:
    """Refuse what an optimizer does not declare, and names that have another meaning."""
    for name, value in vars(cls).items():
        where = getattr(value, "where", here)
        if isinstance(value, (Weight, OfTokens)):
            raise MomentError(
                f"The optimizer {cls.__name__} declares a {value.kind}, which only learners and loops have.",
                where=where,
                given=f"{name} in {cls.__name__}, an optimizer",
                need="moments, coefficients, numbers and an update",
                fix=f"write {name} = nl.coefficient(), and {cls.__name__}({name}={name}) where the loop declares it",
            )
        declared = isinstance(value, Declaration)
        is_setting = name in _OF_SGD and not declared  # another default
        if name in _OWN or is_setting or name.startswith("__"):
            continue
        if hasattr(Optimizer, name) or (declared and name in _OF_STATES):
            kind = value.kind if isinstance(value, Declaration) else "number" if is_number(value) else "part"
            raise MomentError(
                f"{cls.__name__} has a {kind} '{name}', a name that means something else in every optimizer.",
                where=where,
                given=f"{name} = {f'nl.{kind}()' if declared else '...'}",
                need="a name of its own",
                fix=f"write {name}_1 = ...",
            )


def _shown(value: Any) -> str:
    return "nothing" if value is None else shape_of(value)


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

    lr = 1e-3
    betas = (0.9, 0.999)
    eps = 1e-8
    eps_root = 1e-16

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
