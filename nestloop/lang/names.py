"""Names of a loop's tensors and dims: one name for each, and every dim that is used has a size from somewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nestloop.errors import DuplicateNameError, Location, UnknownDimError
from nestloop.lang import coefficient
from nestloop.lang.declaration import Declaration
from nestloop.lang.dims import DimExpr
from nestloop.lang.legal import called, coefficients_of
from nestloop.lang.schedule import Program

if TYPE_CHECKING:
    from nestloop.lang.learner import Learner
    from nestloop.lang.loop import Loop, LoopSpec

BUILT_IN_DIMS = {
    "B": "sequences",
    "H": "heads",
    "N": "tokens of the sequence",
    "n": "tokens of the step's batch",
    "D": "width of the layer",
}
_OF_A_CALL = {"B", "N", "n"}


def check_names(cls: type[Loop], learner: type[Learner], groups: list[dict[str, Any]]) -> None:
    """Raise `DuplicateNameError` where two declarations of a loop have one name, or one has that of a dim."""
    seen: dict[str, Declaration] = {}
    own: list[dict[str, Any]] = [dict(learner.fast), dict(learner.slow)]
    for group in own + groups:
        for name, declaration in group.items():
            other = seen.setdefault(name, declaration)
            if other is not declaration:
                raise DuplicateNameError(
                    f"Two declarations of {cls.__name__} are called '{name}'.",
                    where=declaration.where,
                    given=f"a {declaration.kind}, and a {other.kind} at {other.where}",
                    need="one name per tensor: weights and views are passed by name",
                    fix=f"rename one of them, in the loop or in its learner {learner.__name__}",
                )
            if name in BUILT_IN_DIMS:
                raise DuplicateNameError(
                    f"'{name}' is taken: it is the dim of the {BUILT_IN_DIMS[name]}.",
                    where=declaration.where,
                    given=f"a {declaration.kind} called {name}",
                    need=f"a name other than {', '.join(BUILT_IN_DIMS)}",
                    fix=f"write {name.lower()}_{declaration.kind.split()[-1]} = ...",
                )


def check_dims(spec: LoopSpec) -> None:
    """Raise `UnknownDimError` for a dim that nothing defines, `DuplicateNameError` for one called as a weight is."""
    known = {*BUILT_IN_DIMS, *spec.dims}
    known.update(name for view in spec.views.values() for expr in view.dims for name in expr.names)
    for name, weight in {**spec.fast, **spec.slow}.items():
        if name in known:
            raise DuplicateNameError(
                f"'{name}' names both a {weight.kind} and a dim of {spec.name}.",
                where=weight.where,
                given=f"self.{name}, which would be either",
                need="different names for weights and dims: a body reads both from self",
                fix=f"rename the weight, w_{name} = ...",
            )

    def check(expr: DimExpr, what: str, where: Location, among: set[str]) -> None:
        for name in expr.names:
            if name not in among:
                of_call = name in BUILT_IN_DIMS
                raise UnknownDimError(
                    f"{what} of {spec.name} uses the dim '{name}', "
                    + ("which only a call has." if of_call else "which no view defines."),
                    where=where,
                    given=f"'{expr}'",
                    need=f"one of {', '.join(sorted(among))}",
                    fix="use one of these"
                    if of_call
                    else f"use one of these, or declare the dim in the loop: {name} = nl.dim(64)",
                )

    for name, weight in {**spec.fast, **spec.slow}.items():
        for expr in weight.dims:
            check(expr, f"The {weight.kind} {name}", weight.where, known - _OF_A_CALL)
    if isinstance(spec.schedule, Program):
        for _, *bounds in spec.schedule.operations:
            for bound in bounds:
                check(bound, "The schedule", spec.schedule.where, known - {"n"})
    for name, value in coefficients_of(spec):
        for part in coefficient.parts(value):
            if isinstance(part, DimExpr):
                check(part, f"The {called(name)}", spec.optimizer.where, known)
