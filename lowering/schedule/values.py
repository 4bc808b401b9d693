"""A tile graph as values in memory: what each computes, over which axes, and where it reads its operands.

Views are gone: an operand is a view (`Strided`) of the value it reads. A product's right operand is row-major, a
result that is a sum is the list of its terms, and what depends on no token is told apart, since one step needs it once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from nestloop.lowering import ops
from nestloop.lowering.ops.row import Fold, Operands
from nestloop.lowering.ops.strided import ZERO, Extent, Strided, dense

SCALARS = ("weight", "rate")  # inputs that are numbers


@dataclass(frozen=True)
class Language:
    """What a language asks of values.

    Attributes:
        number: a Python number as its text.
        size: a size as a number of the compute dtype.
        in_memory: whether tiles are arrays, which products and functions over an axis read element after element; else
            they are values, which are turned for nothing.
    """

    number: Callable[[Any], str]
    size: Callable[[Extent], str]
    in_memory: bool


@dataclass(eq=False, repr=False)
class Value:
    """One value of a tile graph.

    Attributes:
        kind: "input", "element", "fold", "product", "transpose", "system", "along" or "join".
        name: its identifier in generated code.
        node: the graph node it comes from.
        shape: its axes; row-major in memory.
        operands: views of other values, or numbers as text.
        per_tile: whether it depends on tokens.
        axes: for a fold, the axes of its operand that it reduces; for "along" and "join", the axis.
        users: the values that read it.
        sinks: results it is added to: (result, factor).
        result: the result that is its memory, where it has no other.
        factors: a product's operands, where tiles are not in memory.
        copies: whether it is its operand as it is, densely.
        written: whether it is a result that is written to memory as soon as it is computed.
    """

    kind: str
    name: str
    node: fx.Node
    shape: tuple[Extent, ...]
    operands: list[Strided | str] = field(default_factory=list)
    per_tile: bool = False
    axes: tuple[int, ...] = ()
    users: list[Value] = field(default_factory=list)
    sinks: list[tuple[str, float]] = field(default_factory=list)
    result: str | None = None
    factors: tuple[Strided, ...] = ()
    copies: bool = False
    written: bool = False

    @property
    def reads(self) -> list[Strided]:
        return [operand for operand in self.operands if isinstance(operand, Strided)]

    @property
    def space(self) -> tuple[Extent, ...]:
        """The axes that its computation runs over."""
        return self.reads[0].shape if self.kind == "fold" else self.shape

    @property
    def domain(self) -> tuple[Extent, ...]:
        """`space` without the axes of size 1."""
        return tuple(size for size in self.space if not size.is_one)

    def __repr__(self) -> str:  # not of all that it is computed from
        return f"<{self.kind} {self.name}>"

    @property
    def is_scalar(self) -> bool:
        """Whether it is one number, kept in a variable."""
        return self.kind == "element" and not self.shape

    @property
    def is_bool(self) -> bool:
        return self.node.meta["val"].dtype is torch.bool

    def strides(self, operand: Strided) -> tuple[Extent, ...]:
        """The strides of an operand along `domain`."""
        view = operand.expand(self.space)
        return tuple(s for size, s in zip(self.space, view.strides, strict=True) if not size.is_one)

    def in_step(self, operand: Strided) -> bool:
        """Whether element (i, j) of this reads element (i, j) of the operand's value."""
        base = operand.base
        return base.domain == self.domain and operand.offset == ZERO and self.strides(operand) == dense(self.domain)


@dataclass
class Values:
    """All values of a graph.

    Attributes:
        inputs: by name, those that are read.
        computed: in an order in which operands come first.
        results: names of the results that are not zero.
    """

    inputs: dict[str, Value]
    computed: list[Value]
    results: list[str]


def number(value: Any) -> str:
    """A Python number as C++."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        limit = "quiet_NaN" if math.isnan(value) else "infinity"
        return f"{'-' if value < 0 else ''}std::numeric_limits<S>::{limit}()"
    return f"S({value!r})" if isinstance(value, (int, float)) else str(value)


CPP = Language(number, lambda size: f"S({size})", in_memory=True)


def operands_of(
    node: fx.Node,
    text: list[Any],
    raw: tuple[Any, ...] | None = None,
    rank: int = 0,
    index: tuple[str, ...] = (),
    numbers: Sequence[bool] = (),
) -> Operands:
    """What a row's spelling on one head's tile sees of a node."""
    value = node.meta["val"]
    return Operands(
        text=text,
        raw=node.args if raw is None else raw,
        kwargs=dict(node.kwargs),
        rank=rank,
        shape=[],
        dtype=value.dtype,
        numbers=list(numbers),
        sizes=tuple(value.shape),
        index=index,
    )


def fold(node: fx.Node) -> Fold:
    """How a reduction's node folds."""
    spelled: Any = ops.row(node.target).cpp
    return spelled(operands_of(node, []))
