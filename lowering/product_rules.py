"""Products in a graph that is simplified: of one number all over, turned, and of rows with a number each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from nestloop.lowering import ops
from nestloop.lowering.ops.results import result_like
from nestloop.lowering.ops.sizes import same_shape, same_size

aten = torch.ops.aten

_PRODUCTS = (aten.mm.default, aten.bmm.default)
_OF_TERMS = (*ops.ADD, *ops.SUB, *ops.MUL, *ops.DIV, aten.neg.default)


@dataclass(frozen=True)
class Fill:
    """A tensor filled with one number, or with one 0-d node's value."""

    value: float | fx.Node

    @property
    def number(self) -> float | None:
        return self.value if not isinstance(self.value, fx.Node) else None


class ProductRules:
    """What a rebuilt graph has for a product.

    Attributes:
        env: a node of the original graph -> its value.
    """

    env: dict[fx.Node, Any]

    def _emit(self, target: Any, args: tuple[Any, ...], like: fx.Node, val: Any = None) -> fx.Node:
        """A node that the original graph did not have, for the original node `like`."""
        raise NotImplementedError

    def _copy(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """The same op on other operands."""
        raise NotImplementedError

    def _mapped(self, args: Any) -> list[Any]:
        """Arguments of a node of the original graph as those of the new one."""
        raise NotImplementedError

    def _size(self, size: Any, old: fx.Node) -> Any:
        """A size as an int, or a node that computes it from a tensor which has it as an axis."""
        raise NotImplementedError

    def _flipped(self, node: fx.Node, order: list[int]) -> fx.Node | None:
        """What an axis order makes of products that nothing else reads, and of sums of them: (a b + c d)^T is
        b^T a^T + d^T c^T, which exchanges the axes of no product's result."""
        rank = len(order)
        swap = [*range(rank - 2), rank - 1, rank - 2]
        source = node.all_input_nodes[0]
        return self._turn(source, swap) if order == swap and self._turns(source, swap) else None

    def _turns(self, old: fx.Node, swap: list[int], inside: bool = False) -> bool:
        """Whether a value is made of products that are computed with their axes exchanged, by numbers and sums."""
        made = self.env.get(old)
        if not isinstance(made, fx.Node):
            return False
        if inside and (_is_turned(old, swap) or is_gram(made)):
            return True
        if len(old.users) > 1 or made.target is not old.target:
            return False
        if made.target in _PRODUCTS:
            return True
        if made.target not in _OF_TERMS or old.kwargs.get("alpha", 1) != 1:
            return False
        terms, shape = old.all_input_nodes, old.meta["val"].shape
        if made.target in (*ops.MUL, *ops.DIV) and len(terms) != 1:
            return False
        alike = all(not is_size(term) and same_shape(term.meta["val"].shape, shape) for term in terms)
        return alike and all(self._turns(term, swap, inside=True) for term in terms)

    def _turn(self, old: fx.Node, swap: list[int]) -> fx.Node:
        """Such a value with its last two axes exchanged."""
        made: fx.Node = self.env[old]
        if _is_turned(old, swap):
            return self.env[old.all_input_nodes[0]]
        if is_gram(made):
            return made
        args: list[Any]
        if made.target in _PRODUCTS:
            args = [self._turned(factor, swap) for factor in made.args[::-1]]
        else:
            args = [self._turn(term, swap) if isinstance(term, fx.Node) else term for term in old.args]
        return self._emit(made.target, tuple(args), old, _in_order(made, swap))

    def _turned(self, value: fx.Node, order: list[int]) -> fx.Node:
        """A value with its last two axes exchanged."""
        if _is_turned(value, order):
            (before,) = value.all_input_nodes
            return before
        if is_gram(value):
            return value
        return self._emit(aten.permute.default, (value, order), value, _in_order(value, order))

    def _product_of_fill(self, node: fx.Node, args: list[Any]) -> Any:
        """a b with one number all over b (or a) is that number times the sums of a's rows (of b's columns)."""
        if any(isinstance(a, Fill) and a.number == 0 for a in args):
            return Fill(0.0)
        if all(isinstance(a, Fill) for a in args):
            return None
        axis = -1 if isinstance(args[1], Fill) else -2
        total, fill = args if axis == -1 else args[::-1]
        shape = list(total.meta["val"].shape)
        if not same_size(shape[axis], 1):
            shape[axis] = 1
            like = total.meta["val"].new_empty(shape)
            total = self._emit(aten.sum.dim_IntList, (total, [axis], True), node, like)
        if fill.number != 1:
            total = self._emit(aten.mul.Tensor, (total, fill.value), node, total.meta["val"])
        wanted = node.meta["val"].shape
        if same_shape(shape, wanted):
            return total
        return self._emit(aten.expand.default, (total, [self._size(s, node) for s in wanted]), node)

    def _triangle_of_one(self, node: fx.Node, args: list[Any]) -> Any:
        """A triangle of one row, which the system of one token is, leaves a division."""
        matrix, right = args[:2]
        if not all(same_size(size, 1) for size in node.args[0].meta["val"].shape[-2:]):
            return None
        if node.kwargs.get("unitriangular", False):
            return right
        if not isinstance(matrix, fx.Node) or not isinstance(right, fx.Node):
            return None
        return self._emit(aten.div.Tensor, (right, matrix), node)

    def _row_scaled(self, node: fx.Node, args: list[Any]) -> Any:
        """(r a) b = r (a b) for a number r per row, where a b is there already."""
        left, right = args
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left.target is not aten.mul.Tensor:
            return None
        for row, rows in (left.args[:2], left.args[1::-1]):
            if not isinstance(row, fx.Node) or not isinstance(rows, fx.Node) or is_scalar(row) or is_size(rows):
                continue
            shape = row.meta["val"].shape
            if (
                len(shape) == len(rows.meta["val"].shape) == 2
                and same_size(shape[1], 1)
                and not same_size(rows.meta["val"].shape[-1], 1)
            ):
                there = next((u for u in rows.users if u.target is aten.mm.default and u.args == (rows, right)), None)
                if there is not None:
                    return self._emit(aten.mul.Tensor, (row, there), node)
        return None


def is_size(node: fx.Node) -> bool:
    """Whether a node is a size: a Python number where the code runs."""
    return not isinstance(node.meta["val"], torch.Tensor)


def is_scalar(node: fx.Node) -> bool:
    return is_size(node) or not node.meta["val"].shape


def _in_order(value: fx.Node, order: list[int]) -> Any:
    """What a value is like with its axes in an order."""
    return result_like(ops.row(aten.permute.default), aten.permute.default, (value.meta["val"], order), {})


def _is_turned(value: fx.Node, order: list[int]) -> bool:
    """Whether a value is another one with its axes in an order."""
    return value.target is aten.permute.default and [d % len(order) for d in value.args[1]] == order


def is_gram(value: fx.Node) -> bool:
    """Whether a value is a a^T, its own transpose: by what it is, or (an input) by its name."""
    if value.target is not aten.mm.default:
        return value.op == "placeholder" and value.name.startswith("gram_")
    left, right = value.args
    return right.target is aten.permute.default and list(right.args[1]) == [1, 0] and right.args[0] is left
