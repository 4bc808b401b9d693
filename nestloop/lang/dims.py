"""Symbolic dims: "4*d" and "H/(N*D)" as arithmetic over names, never as code.

Text goes through Python's own parser into a syntax tree, of which only numbers, names and arithmetic are
admitted; nothing is evaluated by Python and nothing by sympy's string parser.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from nestloop.errors import DimExpressionError, Location, UnresolvedDimError, shown

_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
_LARGEST_EXPONENT = 16  # 9**9**9**9 is arithmetic, too, and never ends


@dataclass(frozen=True)
class DimExpr:
    """An arithmetic expression over dim names.

    Attributes:
        text: the expression as written, with normal spacing.
        names: the dims it mentions, in order of appearance.
        whole: whether whole numbers alone come of whole numbers, so that no fraction is needed. To torch.compile the
            sizes of a state are symbols, which fractions do not take.
    """

    text: str
    names: tuple[str, ...]
    tree: ast.expr
    whole: bool

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DimExpr) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__  # the tree's own would not be the same in two processes

    def evaluate(self, sizes: Mapping[str, Any], where: Location | None = None) -> Any:
        """The value with every name replaced by its size; any numeric type goes through (sympy too)."""
        try:
            value = _evaluate(self.tree, sizes, self.text, where)
            if isinstance(value, complex):
                raise ValueError("the root of a negative number")
            return value
        except (ArithmeticError, ValueError) as error:
            known = ", ".join(f"{n} = {sizes[n]}" for n in self.names)
            raise UnresolvedDimError(
                f"The dim expression '{self.text}' has no value.",
                where=where,
                given=f"{known}: {error}" if known else str(error),
                need="arithmetic that can be carried out",
                fix=f"choose sizes for which {self.text} is defined",
            ) from None

    def size(self, sizes: Mapping[str, int], where: Location | None = None) -> int:
        """The value as an axis size. Raises `UnresolvedDimError` if it is not a whole positive number."""
        if isinstance(self.tree, ast.Name) and isinstance(size := sizes.get(self.text), int) and size > 0:
            return size  # nearly all are, and every call asks for dozens
        read = self.names if all(name in sizes for name in self.names) else sizes  # else for the error
        value = self.evaluate({k: sizes[k] if self.whole else Fraction(sizes[k]) for k in read}, where)
        if value <= 0 or not (self.whole or Fraction(value).denominator == 1):
            known = ", ".join(f"{n} = {sizes[n]}" for n in self.names if n != self.text)
            raise UnresolvedDimError(
                f"The dim '{self.text}' is not a whole positive number of elements.",
                where=where,
                given=f"{known}, so {self.text} = {value}" if known else f"{self.text} = {value}",
                need="a positive integer",
                fix=f"choose sizes that make {self.text} whole and positive" if self.names else "write another number",
            )
        return value if self.whole else Fraction(value).numerator


def parse(text: str | int | DimExpr, where: Location | None = None) -> DimExpr:
    """Read a dim expression. Raises `DimExpressionError` on anything but names, numbers and arithmetic."""
    if isinstance(text, DimExpr):
        return text
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise _refused(text, f"a {type(text).__name__}", where)
    try:
        tree = ast.parse(str(text).strip(), mode="eval").body
    except SyntaxError as error:
        raise _refused(str(text), f"text that does not parse ({error.msg})", where) from None
    except (MemoryError, RecursionError, ValueError):
        raise _refused(f"{str(text)[:20]}...", "text that does not parse", where) from None
    names: list[str] = []
    _admit(tree, str(text), names, where)
    fractions = (ast.Div, ast.Pow)
    whole = not any(isinstance(n, fractions) or isinstance(getattr(n, "value", 0), float) for n in ast.walk(tree))
    return DimExpr(ast.unparse(tree), tuple(dict.fromkeys(names)), tree, whole)


def _refused(text: object, found: str, where: Location | None) -> DimExpressionError:
    return DimExpressionError(
        f"The dim expression {shown(text)} is not arithmetic over dim names.",
        where=where,
        given=found,
        need=f"names, numbers, + - * / //, ** with a number up to {_LARGEST_EXPONENT}, and parentheses",
        fix='write it like "d", "4*d" or "H/(N*D)"',
    )


def _admit(tree: ast.expr, text: str, names: list[str], where: Location | None) -> None:
    match tree:
        case ast.Constant(value=int() | float()) if not isinstance(tree.value, bool):
            return
        case ast.Name(id=name):
            names.append(name)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            exponent = right.operand if isinstance(right, ast.UnaryOp) else right
            if not (isinstance(exponent, ast.Constant) and _small(exponent.value)):
                raise _refused(text, f"the exponent {ast.unparse(right)!r}", where)
            _admit(left, text, names, where)
            _admit(right, text, names, where)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            _admit(left, text, names, where)
            _admit(right, text, names, where)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            _admit(operand, text, names, where)
        case _:
            raise _refused(text, f"{ast.unparse(tree)!r}", where)


def _small(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= _LARGEST_EXPONENT


def _evaluate(tree: ast.expr, sizes: Mapping[str, Any], text: str, where: Location | None) -> Any:
    match tree:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            if name not in sizes:
                raise UnresolvedDimError(
                    f"The dim '{name}' has no size.",
                    where=where,
                    given=f"'{text}' with sizes for {', '.join(sorted(sizes)) or 'nothing'}",
                    need=f"a size for {name}",
                    fix=f"pass {name}=... where the loop is compiled or the layer is made",
                )
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, sizes, text, where)
        case ast.UnaryOp(operand=operand):
            return _evaluate(operand, sizes, text, where)
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_evaluate(left, sizes, text, where), _evaluate(right, sizes, text, where))
    raise AssertionError(f"not admitted: {ast.dump(tree)}")


def unify(
    declared: tuple[DimExpr, ...],
    shape: tuple[int, ...],
    sizes: dict[str, int],
) -> None:
    """Bind the plain names among `declared` to the sizes in `shape`, where they are not bound yet."""
    for expr, size in zip(declared, shape, strict=True):
        if isinstance(expr.tree, ast.Name):
            sizes.setdefault(expr.tree.id, size)
