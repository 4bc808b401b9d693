"""Declarations that nothing would read: in the wrong class, under the wrong name, or once a class is made."""

from __future__ import annotations

import sys
from abc import ABC, ABCMeta
from typing import Any, Generic

from nestloop.errors import Location, UnreadDeclarationError
from nestloop.lang.declare import Declaration, Fast, Gate, View, caller
from nestloop.lang.moments import Coefficient, Moment
from nestloop.lang.optim import SGD
from nestloop.lang.schedule import Schedule

# What a loop reads by name, each once: when the class is made.
LOOP_PARTS = ("learner", "optimizer", "schedule", "heads", "output", "beside", "loss", "readout", "kernel", "fit")

EMPTY = (object, ABC, Generic)  # bases that bring no bodies


def abstract_names(cls: type) -> list[str]:
    """What a class leaves to those that derive from it. `__abstractmethods__` says so once the class is made."""
    names = {name for base in cls.__mro__ for name in vars(base)}
    return sorted(name for name in names if getattr(getattr(cls, name, None), "__isabstractmethod__", False) is True)


def check_loop(cls: Any) -> None:
    """Refuse fast weights in a loop's body, and optimizers and schedules under names that are not theirs."""
    for name, value in vars(cls).items():
        if isinstance(value, Fast):
            raise _misplaced(value, name, cls, "loop", "learner", "class Memory(nl.Learner)")
        if isinstance(value, (Moment, Coefficient)):
            raise _misplaced(value, name, cls, "loop", "optimizer", "class Rule(nl.Optimizer)")
        for part, kind in (("optimizer", SGD), ("schedule", Schedule)):
            if isinstance(value, kind) and name != part and value is not getattr(cls, part, None):
                raise UnreadDeclarationError(
                    f"No loop reads the name '{name}', under which {cls.__name__} has its {part}.",
                    where=getattr(value, "where", cls.declared_at),
                    given=f"{name} = nl.{type(value).__name__}(...)",
                    need=f"{part} = nl.{type(value).__name__}(...)",
                    fix=f"write {part} = ...",
                )


def check_learner(cls: Any) -> None:
    """Refuse what a loop alone reads in a learner's body."""
    for name, value in vars(cls).items():
        if isinstance(value, (View, Gate)):
            raise _misplaced(value, name, cls, "learner", "loop", "the loop")
        if isinstance(value, (Moment, Coefficient)):
            raise _misplaced(value, name, cls, "learner", "optimizer", "class Rule(nl.Optimizer)")
        if isinstance(value, (SGD, Schedule)):
            where = getattr(value, "where", cls.declared_at)
            raise _misplaced(value, name, cls, "learner", "loop", "the loop", where)


def _misplaced(
    value: Any, name: str, cls: type, found: str, home: str, into: str, where: Location | None = None
) -> UnreadDeclarationError:
    kind = value.kind if isinstance(value, Declaration) else "optimizer" if isinstance(value, SGD) else "schedule"
    article, of_home = ("an" if what == "optimizer" else "a" for what in (kind, home))
    return UnreadDeclarationError(
        f"The {found} {cls.__name__} declares {article} {kind}, which only {of_home} {home} has.",
        where=where or value.where,
        given=f"{name} in {cls.__name__}, a {found}",
        need=f"{article} {kind} in the body of {of_home} {home}",
        fix=f"move {name} = ... into the body of {into}",
    )


class Made(ABCMeta):
    """The class of learners and loops, whose bodies are read once: what is assigned to them later would be ignored.

    It derives from that of abstract classes, so that they may be such too.
    """

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **keywords: Any) -> Any:
        """A class that a call of `type` makes is of the caller's module, not of the standard library's `abc`."""
        module = sys._getframe(1).f_globals.get("__name__", "")
        return super().__new__(cls, name, bases, {"__module__": module, **namespace}, **keywords)

    def __setattr__(cls, name: str, value: Any) -> None:
        made = "spec" in vars(cls) or "fast" in vars(cls)  # a loop without a learner is read when it gets one
        if made and (name in LOOP_PARTS or isinstance(value, (Declaration, SGD, Schedule))):
            raise UnreadDeclarationError(
                f"{cls.__name__}.{name} is assigned once the class is made, and nothing would read it.",
                where=caller(),
                given=f"{cls.__name__}.{name} = {getattr(value, '__name__', value)!r}",
                need=f"{name} in the body of a class",
                fix=f"write class Other({cls.__name__}): {name} = ...",
            )
        super().__setattr__(name, value)
