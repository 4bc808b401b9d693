"""What an optimizer declares: what it keeps of fast weights from step to step, and numbers that may be learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from nestloop.errors import SideEffectError, UnknownNameError
from nestloop.lang.coefficient import read
from nestloop.lang.declaration import Declaration, caller


class OfEachWeight(Declaration):
    """What an optimizer has one of for each fast weight: an update reads it from `s`, not from itself."""

    why: ClassVar[str]

    def __get__(self, optimizer: Any, cls: type | None = None) -> Any:
        if optimizer is None:
            return self
        raise UnknownNameError(
            f"{type(optimizer).__name__} reads '{self.name}' from itself, but {self.why}.",
            where=caller(),
            given=f"self.{self.name}",
            need="moments and coefficients from s, numbers from self",
            fix=f"write s.{self.name}",
        )


class Moment(OfEachWeight):
    """What an optimizer keeps of a fast weight from step to step. See `moment`."""

    kind, why = "moment", "every fast weight has its own"

    def __init__(self, scalar: bool) -> None:
        super().__init__()
        self.scalar = scalar


class Coefficient(OfEachWeight):
    """A number of an optimizer that may be learned, or read from tokens. See `coefficient`."""

    kind, why = "coefficient", "what it is differs by fast weight"

    def __init__(self, default: Any, spread: bool) -> None:
        super().__init__()
        self.default = None if default is None else read(default, "coefficient", self.where)
        self.spread = spread

    def __set__(self, optimizer: Any, value: Any) -> None:
        """What an optimizer is made with."""
        if value is not self:  # the default, where it is a field of a dataclass
            vars(optimizer)["given"] = {**vars(optimizer).get("given", {}), self.name: value}


def coefficient(default: Any = None, spread: bool = True) -> Any:
    """Declare a number of an optimizer that may be learned or read from tokens, as its learning rate may.

    `beta = nl.coefficient(0.9)` in the class is `s.beta` in `update`, and given where the optimizer is made:
    `Rule(lr=0.1, beta=theta)`.

    Args:
        default: what it is where it is not given: a number, text in the dims, a slow weight or gate of the loop, or a
            dict of these by fast weight; None for one that has to be given.
        spread: whether the dims of a slow weight or gate are axes of the fast weight, along which it is spread, to
            multiply it. Without, an update has it as it is declared, [*dims]: a matrix that gradients are multiplied
            by, say.

    Raises:
        CoefficientError, DimExpressionError: a default that is none of these.
    """
    return Coefficient(default, spread)


class Kept:
    """What is kept of one fast weight, and its coefficients, by name: the `s` of an update."""

    def __init__(self, optimizer: str, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)
        self.__dict__["__optimizer"] = optimizer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own protocols ask for these
            raise AttributeError(name)
        known = [moment for moment in self.__dict__ if moment != "__optimizer"]
        raise UnknownNameError(
            f"{self.__dict__['__optimizer']} has no moment or coefficient '{name}'.",
            where=caller(),
            given=f"s.{name}",
            need=f"one of its own: {listed(known)}",
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


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
