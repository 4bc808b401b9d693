"""One op, one row: all that the compiler knows of an ATen op stands in one block.

A row gives an op's kind (from which its axis rule follows), its work, its spellings in generated PyTorch, C++ and
Triton and an example. The tests are parametrised over the rows: a new op is tested the moment its row exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch._ops import OpOverload

from nestloop.lowering.ops.strided import Strided

Spell = Callable[["Operands"], str]


@dataclass(frozen=True)
class Unsupported:
    """A spelling that does not exist: the loop runs on another backend, and `explain` gives the reason."""

    reason: str


@dataclass(frozen=True)
class Element:
    """One element of the result, as an expression of the operands' elements (`Operands.text`).

    Attributes:
        spell: in C++.
        triton: in Triton, where the operands are whole tiles that broadcast; None where C++ and Triton read the same.
    """

    spell: Spell
    triton: Spell | Unsupported | None = None


@dataclass(frozen=True)
class Fold:
    """A reduction: a running value, what it starts at, how an element enters it, how it ends.

    Attributes:
        start: its first value.
        enter: (running value, element) -> the new running value.
        finish: (running value, how many elements entered) -> the result.
        adds: whether elements are added up, which a vector may do in any order.
        by: the same in Triton, of a whole axis: "sum", "max" or "min".
        of: what is reduced there, of an element.
        ends: (what that gives, how many elements entered) -> the result there.
    """

    start: str
    enter: Callable[[str, str], str]
    finish: Callable[[str, str], str] = lambda running, count: running
    adds: bool = False
    by: str = "sum"
    of: Callable[[str], str] = lambda x: x
    ends: Callable[[str, str], str] = lambda total, count: total


@dataclass(frozen=True)
class Along:
    """A function over one axis: of `emit/tiles.h`, (outer, length, inner, from, to), and of `emit/tiles.py`."""

    function: str


@dataclass(frozen=True)
class Window:
    """Other strides over the operand's memory; None where the elements must be copied."""

    of: Callable[[Strided, Operands], Strided | None]


@dataclass(frozen=True)
class Product:
    """A matrix product of two tiles."""


@dataclass(frozen=True)
class System:
    """A linear system: `solve` of `emit/tiles.h` and `emit/tiles.py`, or their `solve_triangular`."""

    triangular: bool


@dataclass(frozen=True)
class Join:
    """Tiles side by side along an axis."""


Cpp = Element | Callable[["Operands"], Fold] | Along | Window | Product | System | Join | Unsupported


class Kind(Enum):
    """What an op does to the axes of a tile."""

    POINTWISE = "pointwise"  # broadcasts; every element on its own
    PRODUCT = "product"  # contracts the last axis of the first operand with the last but one of the second
    REDUCTION = "reduction"  # over the axes in its second argument
    NORMALIZE = "normalize"  # keeps the shape, couples the elements along one axis
    VIEW = "view"  # the same elements in another shape
    MOVE = "move"  # some of the elements, or the elements at other places
    CREATE = "create"  # no operand's values
    SOLVE = "solve"  # a triangular system: the first operand's, for every column of the second
    MATRIX = "matrix"  # couples the elements of the last two axes


@dataclass(frozen=True)
class Operands:
    """What a spelling sees of a node: each argument as source text, already aligned, and its tile rank.

    Attributes:
        text: the arguments in order, tensors as expressions, numbers as literals, lists as lists of them.
        raw: the node's own arguments (FX nodes and Python values).
        kwargs: the node's keyword arguments.
        rank: rank of the first tensor operand's tile.
        shape: text of the result's tile shape, one entry per axis ("n", "16").
        dtype: the result's dtype in the traced graph; floating-point ones stand for the compute dtype.
        numbers: for each argument whether it is a Python number where the code runs.
        sizes: the result's traced shape.
        where: the user's line, "" where there is none.
        index: in C++ and Triton, the position along each axis of the result ("0" for an axis of size 1).
    """

    text: list[Any]
    raw: tuple[Any, ...]
    kwargs: dict[str, Any]
    rank: int
    shape: list[str]
    dtype: torch.dtype
    numbers: list[bool]
    sizes: tuple[Any, ...] = ()
    where: str = ""
    index: tuple[str, ...] = ()

    def __getitem__(self, index: int) -> Any:
        return self.text[index]

    @property
    def dtype_text(self) -> str:
        """The result's dtype in generated code: the compute dtype, `dtype`, for all but whole numbers and the lower
        precision that an optimizer's function may take."""
        return "dtype" if self.dtype in (torch.float32, torch.float64) else str(self.dtype)

    def axis(self, dim: int) -> int:
        """A tile axis counted from the end, where leading batch axes do not shift it."""
        return dim if dim < 0 else dim - self.rank

    def axes(self, dims: Any) -> list[int]:
        """Several tile axes counted from the end; none given means all. A number has none, whatever it is told."""
        return [self.axis(d) for d in (dims if dims and self.rank else range(self.rank))]


@dataclass(frozen=True)
class Op:
    """A row.

    Attributes:
        target: the ATen overload.
        kind: see `Kind`.
        spell: its spelling in generated PyTorch, on tiles with leading batch axes [H, B, *tile].
        cpp: what it is on the tile of one head and sequence, spelled in C++ and Triton, or why there is no spelling.
        work: FLOPs per element of the result (per multiply-add of the contraction: 2, for products).
        example: small arguments to try it on, made by a function of (normal tensors by shape).
    """

    target: OpOverload
    kind: Kind
    spell: Spell
    cpp: Cpp
    work: int
    example: Callable[[Callable[..., Any]], tuple[Any, ...]]

    @property
    def name(self) -> str:
        """The overload's name without the namespace: "mul.Tensor"."""
        return str(self.target).removeprefix("aten.")


def call(function: str) -> Spell:
    """Spelled as a call of all its operands."""
    return lambda o: f"{function}({', '.join(map(str, o.text))})"


def infix(symbol: str) -> Spell:
    """Spelled between its two operands."""
    return lambda o: f"{o[0]} {symbol} {o[1]}"
