"""Every mistake nestloop refuses, one class each.

A message has the same five parts: what is wrong, where (the user's file and line), what was given,
what is needed, and the fix. Nothing here is raised for a condition that nestloop could repair silently:
bad input never gives a wrong number.
"""

from __future__ import annotations

import linecache
from dataclasses import dataclass


@dataclass(frozen=True)
class Location:
    """A line of the user's source: shown in errors, and beside the generated code that came from it."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def short(self) -> str:
        """The file's own name and the line, for comments in generated code (no machine path)."""
        return f"{self.file.replace(chr(92), '/').rsplit('/', 1)[-1]}:{self.line}"

    @property
    def text(self) -> str:
        """The source line itself, stripped; empty where the source cannot be read."""
        return linecache.getline(self.file, self.line).strip()


_LINE = 120  # characters of a value that is shown as it is


def shown(value: object) -> str:
    """What was given, in a message: as Python writes it, if that is one line; tensors, arrays and modules by type and
    shape."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{type(value).__name__} [{', '.join(map(str, shape))}]"
    text = repr(value)
    return text if len(text) <= _LINE and "\n" not in text else f"a {type(value).__name__}"


class NestloopError(Exception):
    """Base of every error nestloop raises on purpose.

    Args:
        what: one sentence, what is wrong.
        where: the user's line, if there is one.
        given: what was given.
        need: what is needed instead.
        fix: what to write.
    """

    def __init__(
        self,
        what: str,
        *,
        where: Location | None = None,
        given: str | None = None,
        need: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.given, self.need, self.fix = what, where, given, need, fix
        lines = [what]
        if where is not None:
            lines.append(f"  at:    {where}" + (f"   {where.text}" if where.text else ""))
        for label, value in (("given", given), ("need", need), ("fix", fix)):
            if value is not None:
                lines.append(f"  {label + ':':<7}{value}")
        super().__init__("\n".join(lines))
        self._rebuild = (what, where, given, need, fix)

    def __reduce__(self):  # exceptions cross process borders (data workers, DDP): keep every part
        return (_rebuild, (type(self), self._rebuild))


def _rebuild(cls, parts):
    what, where, given, need, fix = parts
    return cls(what, where=where, given=given, need=need, fix=fix)


class DeclarationError(NestloopError):
    """Something is wrong in a class body; raised when the class is created."""


class MissingPartError(DeclarationError):
    """A learner without forward, a loop without a loss or a read-out, a schedule that is not one."""


class SignatureError(DeclarationError):
    """A body that does not take what it is called with."""


class TransformError(DeclarationError):
    """A gradient transform that is no function, or whose result is not of its argument's shape."""


class UnknownDimError(DeclarationError):
    """A dim that no view defines."""


class DimExpressionError(DeclarationError):
    """A dim expression that is not names, numbers and arithmetic."""


class UnknownInitError(DeclarationError):
    """An initialiser nestloop does not know."""


class DuplicateNameError(DeclarationError):
    """One name for two tensors of a loop."""


class LearningRateError(DeclarationError):
    """A learning rate that is none of the forms SGD takes."""


class CoefficientError(DeclarationError):
    """A decay, momentum, scale or window that the optimizer does not take, or that does not fit the fast weights."""


class MomentError(DeclarationError):
    """A moment of an optimizer under a name that is taken, or that its update does not return."""


class ViewError(DeclarationError):
    """A view whose heads do not group, whose micro-steps the schedule does not take, or whose maps are none."""


class IllegalScheduleError(DeclarationError):
    """A schedule that the loop's learner or optimizer does not allow, with the nearest legal one."""


class UnreadDeclarationError(DeclarationError):
    """A declaration where nothing reads it: in the wrong class, under the wrong name, or once the class is made."""


class SideEffectError(DeclarationError):
    """A body that does more than compute its result: prints, keeps state, writes to outer names."""


class CompileError(NestloopError):
    """A body that cannot be compiled; raised by compile, never later."""


class ShapeMismatchError(CompileError):
    """Two values whose axes do not fit."""


class UnknownNameError(CompileError, AttributeError):
    """A name in a body that nothing declares."""


class UnusedFastWeightError(CompileError):
    """A fast weight the loss does not depend on: its gradient would be zero for ever."""


class NothingReturnedError(CompileError):
    """A learner's forward that returns nothing."""


class LossNotPerTokenError(CompileError):
    """A loss that is not one number per token."""


class KernelShapeError(CompileError):
    """A kernel that is not one number per pair of tokens."""


class ReadoutShapeError(CompileError):
    """A read-out that is not one row per token."""


class InPlaceError(CompileError):
    """A write into a tensor."""


class DataDependentError(CompileError):
    """Python control flow that looks at a tensor's values."""


class UnadmittedOpError(CompileError):
    """An op outside the admitted set."""


class CapturedTensorError(CompileError):
    """A tensor from outside the declaration."""


class TokenMixingError(CompileError):
    """A learner that mixes tokens, or counts them, under a schedule that needs independent ones."""


class NoPlanError(CompileError):
    """A backend that has no plan for a loop, where that one was asked for by name."""


class SharedMemoryError(NoPlanError):
    """A Triton kernel that wants more shared memory than the device has: known once it is compiled for that one."""


class UnknownBackendError(NestloopError):
    """A backend that does not exist."""


class UnknownStageError(NestloopError):
    """A lowering stage that does not exist."""


class UnknownDeviceError(NestloopError):
    """A device that the cost model has no figures of."""


class UnknownDtypeError(NestloopError):
    """A dtype of views that no kernel takes."""


class TunedFileError(NestloopError):
    """A file of tuned tilings that cannot be read."""


class StaleTuningError(TunedFileError):
    """A tiling that was tuned for another declaration or another Triton."""


class SavedOpsError(NestloopError):
    """A file of saved ops that cannot be read, or something without a graph to save the ops of."""


class StaleOpsError(SavedOpsError):
    """Ops that another version of nestloop has saved."""


class InputError(NestloopError):
    """Tensors given to a compiled loop or a layer that do not fit its declaration."""


class StateError(InputError):
    """A state that does not belong to the loop, or that stands where a call cannot go on from."""


class OrderError(InputError):
    """A token order that is missing, superfluous or not a permutation's shape."""


class DoubleBackwardError(NestloopError):
    """A compiled loop's gradient that is differentiated again."""


class ForwardModeError(NestloopError):
    """A derivative of a compiled loop in forward mode."""


class SingularSystemError(NestloopError):
    """A linear system of a body that has no solution, or many: raised by the call that meets it."""


class IndefiniteMatrixError(NestloopError):
    """A matrix of a body without a Cholesky factor: raised by the call that meets it."""


class UnresolvedDimError(InputError):
    """A dim with no size."""


class ModelError(NestloopError):
    """A model that cannot be built, run, saved or loaded as asked."""


class UnknownModelError(ModelError):
    """A model or mixer name that no table holds."""


class ModelSizeError(ModelError):
    """A width, an image or a patch that do not fit each other."""


class WeightsMismatchError(ModelError):
    """A weights file whose names or shapes differ from the model's."""


class MissingPackageError(ModelError):
    """An optional package that the asked feature needs."""
