"""Shape mismatches, told by the names of the axes: "t.k is [n, d], self.g is [e, D]; d = 16 meets e = 24".

Sizes alone do not say which dim an axis has: d and e may both be 16. So a body that fails is traced once more with
trial sizes in which every dim is another number, and each size there names one dim.
"""

from __future__ import annotations

import ast
import linecache
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import FrameType, ModuleType
from typing import Any

from torch import Tensor

from nestloop.errors import Location, ShapeMismatchError, UnresolvedDimError
from nestloop.lang.loop import LoopSpec
from nestloop.lowering.ops import named_size

# Multiples of 12, so that halves, thirds and quarters of a dim are whole; distinct primes, so that a size tells its
# dim.
_TRIAL = [12 * prime for prime in (29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)]
_PRODUCTS = {"matmul", "mm", "bmm", "addmm", "linear"}
_ABOUT_SHAPES = re.compile(r"\b(sizes?|shapes?|dim|dims|dimensions?|broadcast\w*|subscript|axis|out of range)\b", re.I)

_MISSING_AXIS = re.compile("Dimension out of range|number of subscripts|number of dimensions in the tensor input")


@dataclass(frozen=True)
class Operand:
    """A tensor given to an op: how the body wrote it, and its shape (the token axis symbolic)."""

    text: str
    shape: tuple[Any, ...]


class OpFailed(Exception):
    """An op refused its operands inside a body."""

    def __init__(self, name: str, operands: Sequence[Operand], message: str, where: Location | None) -> None:
        super().__init__(message)
        self.name, self.operands, self.message, self.where = name, tuple(operands), message, where

    def same_place(self, other: OpFailed) -> bool:
        """Whether both are the same op of the same line, on operands of the same ranks."""
        mine, theirs = ([len(o.shape) for o in failed.operands] for failed in (self, other))
        return (self.name, self.where, mine) == (other.name, other.where, theirs)


def about_shapes(message: str) -> bool:
    """Whether PyTorch complains of shapes in `message`, and not of something that a symbolic size cannot do."""
    return bool(_ABOUT_SHAPES.search(message)) and "symbolic" not in message


def operands(frame: FrameType | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Operand]:
    """The tensors among an op's arguments, as the line under `frame` wrote them."""
    texts = _argument_texts(frame, len(args)) or []
    found = []
    for index, argument in enumerate(args):
        text = texts[index] if index < len(texts) else None
        if isinstance(argument, Tensor):
            written = ast.unparse(text) if text is not None else f"operand {index + 1}"
            found.append(Operand(written, tuple(argument.shape)))
        elif isinstance(argument, (list, tuple)) and any(isinstance(a, Tensor) for a in argument):
            inside = text.elts if isinstance(text, (ast.List, ast.Tuple)) else []
            for place, tensor in enumerate(argument):
                known = len(inside) == len(argument)
                found.append(Operand(ast.unparse(inside[place]) if known else f"item {place + 1}", tuple(tensor.shape)))
    # PyTorch's own functions pass what was written by place on by name, in the same order.
    rest = [*texts[len(args) :], *[None] * len(kwargs)]
    for (name, tensor), text in zip(kwargs.items(), rest, strict=False):
        if isinstance(tensor, Tensor):
            found.append(Operand(ast.unparse(text) if text is not None else name, tuple(tensor.shape)))
    return found


def _argument_texts(frame: FrameType | None, count: int) -> list[ast.expr] | None:
    """The expressions whose values a frame's current instruction works on, if its source can be read."""
    if frame is None:
        return None
    line, last, start, stop = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    if line is None or last is None or start is None or stop is None:
        return None
    lines = [linecache.getline(frame.f_code.co_filename, number).encode() for number in range(line, last + 1)]
    lines[-1] = lines[-1][:stop]
    lines[0] = lines[0][start:]
    try:
        tree = ast.parse(b"".join(lines).decode().strip(), mode="eval").body
    except (SyntaxError, UnicodeDecodeError):
        return None
    match tree:
        case ast.BinOp(left=left, right=right):
            found = [left, right]
        case ast.Call(func=ast.Attribute(value=owner), args=given) if not _is_module(owner, frame):
            found = [owner, *given]
        case ast.Call(args=given):
            found = list(given)
        case _:
            return None
    return found if len(found) >= count and not any(isinstance(e, ast.Starred) for e in found) else None


def _is_module(owner: ast.expr, frame: FrameType) -> bool:
    """Whether an expression like torch.nn.functional is a module."""
    while isinstance(owner, ast.Attribute):
        owner = owner.value
    return isinstance(owner, ast.Name) and isinstance({**frame.f_globals, **frame.f_locals}.get(owner.id), ModuleType)


def trial_sizes(spec: LoopSpec, sizes: Mapping[str, int]) -> dict[str, int] | None:
    """Sizes in which every dim and every declared expression is another number; None if there are none."""
    trial = dict(zip(sizes, _TRIAL, strict=False))
    return trial if len(trial) == len(sizes) and axis_names(spec, trial, strict=True) is not None else None


def axis_names(spec: LoopSpec, sizes: Mapping[str, int], strict: bool = False) -> dict[int, str] | None:
    """Size -> the dim or declared expression that has it. Sizes that several have are left out; `strict`: give None."""
    named: dict[int, set[str]] = {}
    for name, size in sizes.items():
        named.setdefault(size, set()).add(name)
    for declared in (*spec.views.values(), *spec.fast.values(), *spec.slow.values()):
        for expr in declared.dims:
            try:
                if expr.names:
                    named.setdefault(expr.size({**sizes}), set()).add(expr.text)
            except UnresolvedDimError:
                if strict:
                    return None
    if strict and any(len(names) > 1 for names in named.values()):
        return None
    return {size: min(names) for size, names in named.items() if len(names) == 1}


def shape_mismatch(
    spec: LoopSpec,
    what: str,
    failed: OpFailed,
    sizes: Mapping[str, int],
    trial: tuple[OpFailed, Mapping[str, int]] | None,
) -> ShapeMismatchError:
    """The error of an op that got axes that do not fit.

    Args:
        what: the body it is in.
        sizes: the sizes it failed for.
        trial: its failure for trial sizes, and these; None where it does not fail there.
    """
    source, used = trial or (failed, sizes)
    names = axis_names(spec, used) or {}
    shapes = [
        [_axis(size, actual, names, used) for size, actual in zip(o.shape, real.shape, strict=True)]
        for o, real in zip(source.operands, failed.operands, strict=True)
    ]
    listed = [f"{o.text} is [{', '.join(axes)}]" for o, axes in zip(failed.operands, shapes, strict=True)]
    if _MISSING_AXIS.search(failed.message):
        return ShapeMismatchError(
            f"In the {what} of {spec.name}, {failed.name} names axes that its tensor does not have.",
            where=failed.where,
            given=", ".join(listed) or "no tensor",
            need="axes of one head and sequence: a view is [n, *]; nestloop adds sequences and heads. PyTorch says: "
            + failed.message,
            fix='leave b and h out: torch.einsum("nd,de->ne", x, self.w)'
            if failed.name == "einsum"
            else "count axes from the last: .sum(-1), .transpose(-1, -2)",
        )
    met = _meeting(source)
    fix = "make the axes agree: transpose one side, or declare the weight with the other dims"
    if met is not None:
        pairs = [(shapes[i][axis], failed.operands[i].shape[axis]) for i, axis in met]
        dims = [name for name, _ in pairs if name in spec.dim_names]
        if len(set(dims)) == len(pairs):
            fix += f"; or give {' and '.join(dims)} one size"
        listed[-1] += "; " + " meets ".join(
            name if name == named_size(size) else f"{name} = {size}" for name, size in pairs
        )
    return ShapeMismatchError(
        f"In the {what} of {spec.name}, {failed.name} got axes that do not fit.",
        where=failed.where,
        given=", ".join(listed) or "no tensor",
        need="axes of equal sizes; PyTorch says: " + failed.message,
        fix=fix,
    )


def _axis(size: Any, actual: Any, names: Mapping[int, str], sizes: Mapping[str, int]) -> str:
    """An axis by its dim: itself, a multiple of one, a product of two, or else the number it is."""
    if not isinstance(size, int):
        return named_size(size)
    if size in names:
        return names[size]
    for name, value in sizes.items():
        if value in names and size % value == 0 and 1 < size // value <= 16:
            return f"{size // value}*{name}"
    for (one, a), (two, b) in combinations(sizes.items(), 2):
        if a * b == size and {a, b} <= set(names):
            return f"{one}*{two}"
    return named_size(actual)


def _meeting(failed: OpFailed) -> list[tuple[int, int]] | None:
    """(operand, axis) of the two axes that should be equal, where it is plain which two those are."""
    if len(failed.operands) != 2:
        return None
    left, right = (o.shape for o in failed.operands)
    if failed.name in _PRODUCTS:
        axis = -1 if failed.name == "linear" or len(right) < 2 else -2
        return [(0, -1), (1, axis)] if left and right and _differ(left[-1], right[axis]) else None
    for axis in range(-1, -min(len(left), len(right)) - 1, -1):
        if _differ(left[axis], right[axis]) and "1" not in (named_size(left[axis]), named_size(right[axis])):
            return [(0, axis), (1, axis)]
    return None


def _differ(one: Any, two: Any) -> bool:
    return named_size(one) != named_size(two)
