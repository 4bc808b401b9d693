"""The number of tokens while a body is traced: sizes that depend on n, and every decision taken on one.

PyTorch's own symbolic sizes come with all of `torch.compile`, a second of imports before the first loop. Here there is
one unknown number. A size is held as its value at each of many lengths, so that two are equal, and a decision is the
same for every n, exactly if all their values are; it is a sympy expression in n only where a later stage asks for one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import sympy
import torch
from torch.fx.experimental import sym_node
from torch.fx.experimental.sym_node import SymNode

LENGTHS = (*range(2, 70), 128, 196, 1024, 50_176, 10**6)  # a decision on n is tried on these; 1 is lowered on its own
_PULLED: ContextVar[bool] = ContextVar("pulled", default=False)
HINT = 23  # stands for n while tracing; the graphs hold the symbol


@contextmanager
def pulled() -> Iterator[None]:
    """Where autograd runs backward through ops that are traced."""
    token = _PULLED.set(True)
    try:
        yield
    finally:
        _PULLED.reset(token)


class Length:
    """The symbol n of one loop's traces.

    Args:
        numbers: whole numbers that n may be compared with: decisions are tried there, too.

    Attributes:
        lengths: what decisions are tried on, `LENGTHS` first.
        decisions: every truth value that tracing has asked for and that is another one for some other n.
        fixed: whether one of them holds for n = `HINT` alone.
        place: where in `lengths` the length stands that is traced for, `HINT` but in `at`.
        known: whether sizes are numbers, as they are in `at`.
    """

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        near = {n + step for n in numbers for step in (-1, 0, 1)}
        self.lengths = (*LENGTHS, *sorted(n for n in near if n > 1 and n not in LENGTHS))
        self.decisions: list[tuple[Any, ...]] = []
        self.fixed = self.known = False
        self.place = LENGTHS.index(HINT)
        self.constants: dict[tuple[type, Any], Size] = {}
        self.computed: dict[tuple[Any, ...], Size] = {}  # by operation and operands: shapes ask for the same again
        self.symbol = sympy.Symbol("n", integer=True, positive=True)
        self.size = torch.SymInt(Size(self, self.lengths, lambda: self.symbol))

    def decide(self, values: tuple[Any, ...]) -> Any:
        """The value at the length that the graph is traced for."""
        taken = values[self.place]
        agree = values.count(taken)
        if agree != len(values):
            self.decisions.append(values)
            self.fixed |= agree == 1 and not self.known
        return taken

    def is_free(self, least: int, since: int = 0) -> bool:
        """Whether the graphs hold for any n from `least` on: no body took a size or a branch that another n would
        not. `since`: of the graphs traced after so many decisions."""
        return all(
            value == values[self.place]
            for values in self.decisions[since:]
            for n, value in zip(self.lengths, values, strict=True)
            if n >= least
        )

    @contextmanager
    def at(self, n: int) -> Iterator[None]:
        """Trace for one length, with numbers for sizes; what is decided in here decides nothing elsewhere."""
        before = self.place, self.decisions, self.known
        self.place, self.decisions, self.known = self.lengths.index(n), [], True
        try:
            yield
        finally:
            self.place, self.decisions, self.known = before


class Size(SymNode):
    """What PyTorch holds in a symbolic number that depends on n.

    Attributes:
        values: the number at each of its `lengths`; None where it has none there.
        made: the Python operator and the operands it was made with; None for n itself.
    """

    def __init__(
        self,
        length: Length,
        values: tuple[Any, ...],
        spell: Callable[[], Any],
        made: tuple[Callable[..., Any], tuple[Any, ...]] | None = None,
    ) -> None:
        hint = values[length.place]
        constant = hint if values.count(hint) == len(values) else None
        super().__init__(None, None, type(hint), hint, constant)
        self.length, self.values, self.spell, self.made = length, values, spell, made

    @property
    def hint(self) -> Any:
        return self.values[self.length.place]

    @property
    def number(self) -> Any:
        """What stands for the size in a graph if not the symbol: the same number for every n, or one length's."""
        return self.hint if self.length.known else self.constant

    @cached_property
    def _spelled(self) -> Any:
        return self.spell()

    @property
    def expr(self) -> Any:
        """The number as a sympy expression in n."""
        known = self.hint if self.length.fixed else self.constant
        return self._spelled if known is None else sympy.sympify(known)

    def maybe_as_int(self) -> int | None:
        known = self.hint if self.length.fixed else self.number
        return known if type(known) is int else None

    def maybe_as_bool(self) -> bool | None:
        return self.constant if type(self.constant) is bool else None

    def wrap_int(self, num: int) -> Size:
        return self._constant(num)

    def wrap_float(self, num: float) -> Size:
        return self._constant(num)

    def wrap_bool(self, num: bool) -> Size:
        return self._constant(num)

    def _constant(self, number: Any) -> Size:
        kept, key = self.length.constants, (type(number), number)
        if key not in kept:
            kept[key] = Size(self.length, (number,) * len(self.length.lengths), lambda: sympy.sympify(number))
        return kept[key]

    def evaluate(self, size_oblivious: bool = False) -> Any:
        """The value that the trace goes on with."""
        return self.length.decide(self.values)

    def guard_or_false(self, file: str, line: int) -> bool:
        return bool(self.hint or not self._asks_in_vain(operator.eq)) and bool(self.evaluate())

    def guard_or_true(self, file: str, line: int) -> bool:
        return bool(self.hint and self._asks_in_vain(operator.ne)) or bool(self.evaluate())

    def _asks_in_vain(self, comparison: Callable[..., Any]) -> bool:
        """Whether autograd asks if a size is 1, so that a cotangent might be summed over its axis. It is summed where
        the op itself has broadcast, which that has decided: for those n at which the size just happens to be 1, as n
        // 2 at 2, the sum is of one row."""
        return _PULLED.get() and self.made is not None and self.made[0] is comparison and self.made[1][1].constant == 1

    def expect_true(self, file: str, line: int) -> bool:
        return bool(self.evaluate())

    def statically_known_true(self, file: str, line: int) -> bool:
        return self.constant is True


def _apply(operation: Callable[..., Any], operands: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """An operation at every length; None at those where it has no value (1 / (n - 2) at 2)."""
    try:
        return tuple(map(operation, *operands))
    except (ArithmeticError, AssertionError, TypeError, ValueError):  # AssertionError: of sym_max, for a None
        return tuple(_one(operation, given) for given in zip(*operands, strict=True))


def _one(operation: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    try:
        return None if None in given else operation(*given)
    except (ArithmeticError, ValueError):
        return None


def _method(operation: Callable[..., Any], spell: Callable[..., Any]) -> Callable[..., Size]:
    """The method of `Size` for a Python operator, whose sympy form is `spell`."""

    def method(self: Size, *others: Any) -> Size:
        nodes = (self, *[other if isinstance(other, Size) else self._constant(other) for other in others])
        computed, key = self.length.computed, (operation, *nodes)
        if key not in computed:
            values = _apply(operation, [node.values for node in nodes])
            made = (operation, nodes)
            computed[key] = Size(self.length, values, lambda: spell(*(node.expr for node in nodes)), made)
        return computed[key]

    return method


def _layout(property: Callable[..., Any]) -> Callable[..., Size]:
    """The method of `Size` for a property of a tensor's strides, which is the same for every n."""

    def method(self: Size, sizes: list[Size], strides: list[Size]) -> Size:
        return self._constant(property([s.hint for s in sizes], [s.hint for s in strides]))

    return method


def _is_contiguous(sizes: list[int], strides: list[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


for _name, _spell in sym_node.magic_methods.items():
    _trailing = "_" if _name in sym_node.magic_methods_on_operator_with_trailing_underscore else ""
    setattr(Size, f"_{_name}{_trailing}", _method(sym_node.METHOD_TO_OPERATOR[_name], _spell))
for _name in sym_node.sizes_strides_methods:
    _property = _is_contiguous if _name == "is_contiguous" else getattr(sym_node, _name)
    setattr(Size, f"_{_name}", _layout(_property))
