"""Algebra that every graph goes through: constants folded, zeros followed, broadcasts left to broadcasting.

A graph is rebuilt node by node. A value is a node of the new graph, or a `Fill`: a tensor of which every element is
one number, or one 0-d node. Each rule is an identity of real arithmetic; following zeros is what turns a first
step from W = 0 into linear attention (2310.13807 sec. 7: "the compiler is unaware that W_0 = 0").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.sym_node import wrap_node

from nestloop.lowering import ops
from nestloop.lowering.number_rules import NumberRules
from nestloop.lowering.ops import Kind
from nestloop.lowering.ops.sizes import same_shape, same_size
from nestloop.lowering.product_rules import Fill, is_gram, is_scalar, is_size
from nestloop.lowering.recorder import graph_module
from nestloop.lowering.subexpressions import common_subexpressions

aten = torch.ops.aten

_ARITHMETIC = {
    aten.add.Tensor: lambda a, b: a + b,
    aten.add.Scalar: lambda a, b: a + b,
    aten.sub.Tensor: lambda a, b: a - b,
    aten.sub.Scalar: lambda a, b: a - b,
    aten.mul.Tensor: lambda a, b: a * b,
    aten.mul.Scalar: lambda a, b: a * b,
    aten.div.Tensor: lambda a, b: a / b,
    aten.div.Scalar: lambda a, b: a / b,
    aten.neg.default: lambda a: -a,
    aten.pow.Tensor_Scalar: lambda a, b: a**b,
}
_CONSTANTS = {"zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0, "ones": 1.0, "ones_like": 1.0, "new_ones": 1.0}


class _Rebuild(NumberRules):
    """One pass over a graph, producing a simpler one."""

    def __init__(self, known: Mapping[str, float], zero_is_none: bool) -> None:
        self.known, self.zero_is_none = known, zero_is_none
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.old: fx.Node | None = None

    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        for node in module.graph.nodes:
            self.old = node
            if node.op == "placeholder":
                self.env[node] = self._placeholder(node)
            elif node.op == "output":
                results = node.args[0]
                one = isinstance(results, fx.Node)
                made = [self._output(r) for r in ([results] if one else results)]
                self.graph.output(made[0] if one else tuple(made))
            elif ops.is_size_op(node.target):
                self.env[node] = self._copy(node, self._mapped(node.args), node.kwargs)
            else:
                self.env[node] = self._call(node)
        self.graph.eliminate_dead_code()
        return graph_module(common_subexpressions(self.graph))

    def _placeholder(self, node: fx.Node) -> Any:
        name = node.meta.get("declared", node.name)
        new = self.graph.create_node("placeholder", name, name=name)  # which else would be in lower case
        new.meta.update(node.meta)
        return Fill(self.known[name]) if name in self.known else new

    def _output(self, result: Any) -> Any:
        if not isinstance(result, fx.Node):
            return result
        value = self.env[result]
        if isinstance(value, Fill) and value.number == 0 and self.zero_is_none:
            return None
        return self._tensor(value, result)

    def _copy(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        new = self.graph.call_function(node.target, tuple(args), dict(kwargs))
        new.meta.update(node.meta)
        if "where" not in new.meta:  # a derivative's line is that of what it is computed from
            inputs = [n.meta["where"] for n in new.all_input_nodes if "where" in n.meta]
            if inputs:
                new.meta["where"] = inputs[-1]
        return new

    def _emit(self, target: Any, args: tuple[Any, ...], like: fx.Node, val: Any = None) -> fx.Node:
        """A node that the original graph did not have, for the original node `like`."""
        new = self.graph.call_function(target, args)
        new.meta.update(like.meta)
        if val is not None:
            new.meta["val"] = val
        if "where" not in new.meta:
            inputs = [n.meta["where"] for n in new.all_input_nodes if "where" in n.meta]
            new.meta.update({"where": inputs[-1]} if inputs else {})
        return new

    def _mapped(self, args: Any) -> list[Any]:
        return [fx.node.map_arg(a, lambda n: self._tensor(self.env[n], n)) for a in args]

    def _tensor(self, value: Any, old: fx.Node) -> Any:
        """A value as a node: a `Fill` becomes a constant, or an expanded scalar, of the old node's shape."""
        if not isinstance(value, Fill):
            return value
        shape = [self._size(s, old) for s in old.meta["val"].shape]
        if value.number is not None:
            full = self._emit(aten.full.default, (shape, value.number), old)
            if old.meta["val"].dtype != torch.float32:  # PyTorch's default
                full.kwargs = {"dtype": old.meta["val"].dtype}
            return full
        if not shape:
            return value.value
        return self._emit(aten.expand.default, (value.value, shape), old)

    def _size(self, size: Any, old: fx.Node) -> Any:
        """A size as an int, or a node that computes it: from a tensor which has it as an axis, or else from the sizes
        that it was made of (n - 1, where the constant is all that had so many rows)."""
        if isinstance(size, (int, float)):
            return size
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and same_size(value, size):
                return node
            if isinstance(value, torch.Tensor):
                for axis, other in enumerate(value.shape):
                    if same_size(other, size):
                        return self._computed(aten.sym_size.int, (node, axis), other)
        if size.node.made is None:
            raise AssertionError(f"no tensor has the size {size} of {old}")
        operation, operands = size.node.made
        numbers = [wrap_node(o) if o.number is None else o.number for o in operands]
        return self._computed(operation, tuple(self._size(number, old) for number in numbers), size)

    def _computed(self, operation: Any, args: tuple[Any, ...], size: Any) -> fx.Node:
        new = self.graph.call_function(operation, args)
        new.meta["val"] = size
        return new

    def _call(self, node: fx.Node) -> Any:
        row = ops.row(node.target)
        args = [self.env[a] if isinstance(a, fx.Node) else a for a in node.args]
        if row.kind is Kind.CREATE:
            return self._create(node)
        simple = None
        if row.kind is Kind.POINTWISE:
            simple = self._pointwise(node, args)
        elif row.kind is Kind.VIEW:
            simple = self._view(node, args)
        elif row.kind is Kind.PRODUCT and any(isinstance(a, Fill) for a in args):
            simple = self._product_of_fill(node, args)
        elif node.target is aten.mm.default:
            simple = self._row_scaled(node, args)
        elif node.target is aten.linalg_solve_triangular.default:
            simple = self._triangle_of_one(node, args)
        elif row.kind is Kind.REDUCTION:
            simple = self._reduction(node, args)
        elif row.kind is Kind.MOVE and isinstance(args[0], Fill):
            zero = args[0].number == 0 and node.target in (aten.tril.default, aten.triu.default)
            if zero or node.target in (aten.slice.Tensor, aten.select.int, aten.flip.default):
                simple = args[0]
        if simple is None and row.kind is not Kind.POINTWISE:
            simple = self._numbers_out(node, row.kind)
        return self._copy(node, self._mapped(node.args), node.kwargs) if simple is None else simple

    def _create(self, node: fx.Node) -> Any:
        name = node.target._schema.name.split("::")[-1]
        where = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}.get(name)
        value = _CONSTANTS.get(name) if where is None else node.args[where]
        if node.meta["val"].dtype == torch.bool or not isinstance(value, (int, float)):  # a mask, or a count
            return self._copy(node, self._mapped(node.args), node.kwargs)
        return Fill(float(value))

    def _view(self, node: fx.Node, args: list[Any]) -> Any:
        source = args[0]
        if node.target is ops.DETACHED and isinstance(source, Fill) and source.number is None:
            return None
        if isinstance(source, Fill) or node.target in (aten.clone.default, aten.alias.default):
            return source
        shape, before = node.meta["val"].shape, source.meta["val"].shape
        if node.target is aten.permute.default:
            order = [d % len(shape) for d in node.args[1]]
            if order == list(range(len(order))):
                return source
            if order == [1, 0] and is_gram(source):
                return source
            flipped = self._flipped(node, order)
            if flipped is not None:
                return flipped
            if source.target is aten.permute.default:
                inner = [d % len(shape) for d in source.args[1]]
                if [inner[d] for d in order] == list(range(len(order))):
                    return source.args[0]
        elif node.target in (aten.view.default, aten.expand.default, aten._unsafe_view.default):
            if same_shape(shape, before):
                return source
            if node.target is aten.expand.default and not before:
                return Fill(source)
        return None

    def _reduction(self, node: fx.Node, args: list[Any]) -> Any:
        source = args[0]
        if not isinstance(source, Fill):
            return None
        name = node.target._schema.name.split("::")[-1]
        if name in ("mean", "amax", "amin") or source.number == 0:
            return source
        count = math.prod(node.args[0].meta["val"].shape) if name == "sum" else None
        rest = math.prod(node.meta["val"].shape)
        if isinstance(count, int) and isinstance(rest, int) and source.number is not None:
            return Fill(source.number * (count // rest))
        return None

    def _pointwise(self, node: fx.Node, args: list[Any]) -> Any:
        if node.kwargs.get("alpha", 1) != 1 or node.meta["val"].dtype == torch.bool:
            return self._broadcast(node, args)
        args = [Fill(a) if isinstance(a, fx.Node) and is_scalar(a) else a for a in args]
        arithmetic = _ARITHMETIC.get(node.target)
        numbers = [a.number if isinstance(a, Fill) else a if isinstance(a, (int, float)) else None for a in args]
        if arithmetic and all(n is not None for n in numbers):
            try:
                return Fill(float(arithmetic(*numbers)))
            except (ZeroDivisionError, OverflowError, TypeError):  # a root may be complex
                return None  # computed on tensors, which give an infinity or NaN
        fills = [isinstance(a, (Fill, int, float)) for a in args]
        if arithmetic and all(fills):  # scalars times numbers stay scalars
            inner = [a.value if isinstance(a, Fill) else a for a in args]
            identity = self._identity(node.target, inner, numbers)
            if identity is None:
                identity = self._emit(node.target, tuple(inner), node, torch.empty((), device="meta"))
            return identity if isinstance(identity, Fill) else Fill(identity)
        if node.target is aten._to_copy.default and numbers[0] is not None and node.meta["val"].is_floating_point():
            return Fill(float(numbers[0]))  # vmap makes a tensor of a Python number that meets one without axes
        identity = self._identity(node.target, args, numbers)
        if isinstance(identity, Fill):
            return identity
        if identity is not None and identity.meta["val"].dtype == node.meta["val"].dtype:  # of whole numbers it is not
            shape = node.meta["val"].shape
            if same_shape(identity.meta["val"].shape, shape):
                return identity
            return self._emit(aten.expand.default, (identity, [self._size(s, node) for s in shape]), node)
        sunk = self._below_expansion(node, args)
        if sunk is not None:
            return sunk
        folded = self._fold_factor(node, args, numbers) or self._numbers_out(node, Kind.POINTWISE)
        return folded if folded is not None else self._broadcast(node, args)

    def _identity(self, target: Any, args: list[Any], numbers: list[Any]) -> Any:
        """x * 1, x + 0, x - 0, x / 1, x ** 1 are x; x * 0 and 0 / x are 0."""
        if target in ops.MUL:
            if 0 in numbers:
                return Fill(0.0)
            return args[1] if numbers[0] == 1 else args[0] if numbers[1] == 1 else None
        if target in ops.ADD:
            return args[1] if numbers[0] == 0 else args[0] if numbers[1] == 0 else None
        if target in ops.SUB and numbers[1] == 0:
            return args[0]
        if target in ops.DIV:
            return Fill(0.0) if numbers[0] == 0 else args[0] if numbers[1] == 1 else None
        if target is aten.pow.Tensor_Scalar and numbers[1] in (0, 1):
            return args[0] if numbers[1] == 1 else Fill(1.0)
        return None

    def _below_expansion(self, node: fx.Node, args: list[Any]) -> Any:
        """f(expand(x)) = expand(f(x)) where x is the only tensor: fewer elements to compute."""
        tensors = [a for a in args if isinstance(a, fx.Node)]
        if len(tensors) != 1 or tensors[0].target is not aten.expand.default:
            return None
        expansion = tensors[0]
        inner = expansion.args[0]
        slim = [inner if a is expansion else a.value if isinstance(a, Fill) else a for a in args]
        if not _takes_numbers(node, slim) or inner.meta["val"].dtype != node.meta["val"].dtype:
            return None
        made = self._emit(node.target, tuple(slim), node, inner.meta["val"])
        return self._emit(aten.expand.default, (made, expansion.args[1]), node)

    def _broadcast(self, node: fx.Node, args: list[Any]) -> Any:
        """Fills enter as scalars and expansions are dropped wherever the other operands give the shape."""
        wanted = node.meta["val"].shape
        slim: list[Any] = []
        for value in args:
            if isinstance(value, Fill):
                slim.append(value.value)
            elif isinstance(value, fx.Node) and value.target is aten.expand.default:
                slim.append(value.args[0])
            else:
                slim.append(value)
        ranks = [s.meta["val"].shape for s in slim if isinstance(s, fx.Node) and not is_size(s)]
        has_tensor_first = isinstance(slim[0], fx.Node) or node.target not in ops.ONLY_TENSORS
        if ranks and has_tensor_first and same_shape(_broadcast_shape(ranks), wanted) and _takes_numbers(node, slim):
            return self._copy(node, slim, node.kwargs)
        return None


def _takes_numbers(node: fx.Node, slim: list[Any]) -> bool:
    """Whether every number stands where the op's generated spelling takes one."""
    plain = {*_ARITHMETIC, aten.where.self}
    of_numbers = node.target is aten.where.self and not any(isinstance(value, fx.Node) for value in slim[1:])
    if of_numbers and node.meta["val"].dtype != torch.float32:  # which a choice of two numbers is
        return False
    for old, new in zip(node.args, slim, strict=True):
        if isinstance(old, fx.Node) and not isinstance(new, fx.Node) and node.target not in plain:
            return False
    return True


def _broadcast_shape(shapes: list[Any]) -> list[Any]:
    rank = max(len(s) for s in shapes)
    result: list[Any] = [1] * rank
    for shape in shapes:
        for axis in range(1, len(shape) + 1):
            if same_size(result[-axis], 1):
                result[-axis] = shape[-axis]
    return result


def simplify(
    module: fx.GraphModule, known: Mapping[str, float] | None = None, zero_is_none: bool = False
) -> fx.GraphModule:
    """The same function with less work.

    Args:
        module: placeholders named in `meta["declared"]`; every node has a row or computes a size.
        known: inputs that are filled with a number, by name (fast weights that start at zero).
        zero_is_none: results that are exactly zero become None (cotangents).

    Returns:
        A new module with the same placeholders.
    """
    first = _Rebuild(known or {}, zero_is_none).run(module)
    return _Rebuild({}, zero_is_none).run(first)
