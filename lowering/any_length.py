"""The graph of a function for any n, from its graphs for several n.

A body may ask for n as a Python number (`len(x)`), and so do some rules of PyTorch's vmap and some derivatives, by
version: the graph then holds that number. Traced for several n, such graphs differ in nothing but numbers; where each
of these is a polynomial in n, they are one graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from nestloop.lowering.length import HINT, Length, Size
from nestloop.lowering.recorder import Located, graph_module, record

aten = torch.ops.aten

_DEGREE = 2  # of the polynomials: products of two sizes


def record_for_any_length(
    length: Length,
    lengths: Sequence[int],
    function: Callable[..., Any],
    examples: Sequence[Tensor],
    names: Sequence[str],
) -> fx.GraphModule:
    """The graph of a function of tensors like the examples (`recorder.record`), for each of `lengths` and all between.

    Where there is none, since the function does something else for some of them, it is the graph of `HINT` tokens, and
    `length` says that it is not free.
    """
    before = length.decisions[:], length.fixed
    given = (length, lengths, function, examples, names)
    try:
        graph = record(function, examples, names)
    except RuntimeError:  # of rules that take numbers alone, as vmap's for products does in torch 2.11
        length.decisions, length.fixed = before
        united = _united(*given)
        if united is None:
            raise
        return united
    if length.is_free(min(lengths), since=len(before[0])):
        return graph
    after = length.decisions, length.fixed
    length.decisions, length.fixed = before
    united = _united(*given)
    if united is None:
        length.decisions, length.fixed = after
        return graph
    return united


def _united(
    length: Length,
    lengths: Sequence[int],
    function: Callable[..., Any],
    examples: Sequence[Tensor],
    names: Sequence[str],
) -> fx.GraphModule | None:
    """The graphs of all lengths as one, if they are alike."""
    axis = _token_axis(examples)
    if axis is None:
        return None
    graphs: dict[int, fx.GraphModule] = {}
    for n in dict.fromkeys((HINT, *lengths)):
        with length.at(n):
            try:
                graphs[n] = record(function, [_anew(example, int) for example in examples], names)
            except Exception:  # whatever a body raises where it does not hold for this n
                return None
        if len(graphs[n].graph.nodes) != len(graphs[HINT].graph.nodes):
            return None
    try:
        joined = _United(graphs, *axis).module()
    except NotAlikeError:
        return None
    decided = len(length.decisions)
    graph = record(Located(joined).run, [_anew(example) for example in examples], names)
    return graph if length.is_free(min(lengths), since=decided) else None


def _anew(example: Tensor, size: Callable[[Any], Any] = lambda size: size) -> Tensor:
    """Another tensor like it: PyTorch remembers what it has once found out of one's sizes."""
    return torch.empty([size(s) for s in example.shape], dtype=example.dtype, device=example.device)


def _token_axis(examples: Sequence[Tensor]) -> tuple[int, int] | None:
    """The example and its axis that has n places."""
    for index, example in enumerate(examples):
        for axis, size in enumerate(example.shape):
            if isinstance(size, torch.SymInt) and isinstance(size.node, Size) and size.node.made is None:
                return index, axis
    return None


class NotAlikeError(Exception):
    """Graphs of two lengths differ in more than numbers that are polynomials in n."""


class _United:
    """One graph of several that differ in numbers alone."""

    def __init__(self, graphs: dict[int, fx.GraphModule], index: int, axis: int) -> None:
        self.lengths, self.modules = list(graphs), list(graphs.values())
        self.index, self.axis = index, axis
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}  # of the first graph's nodes
        self.place = [{node: at for at, node in enumerate(m.graph.nodes)} for m in self.modules]
        self.numbers: dict[tuple[int, ...], fx.Node] = {}

    def module(self) -> fx.GraphModule:
        constants = {}
        for nodes in zip(*(module.graph.nodes for module in self.modules), strict=True):
            first = nodes[0]
            if any(node.op != first.op or node.target != first.target for node in nodes):
                raise NotAlikeError
            args, kwargs = self._joint([n.args for n in nodes]), self._joint([n.kwargs for n in nodes])
            if first.op == "output":
                self.graph.output(args[0])
                continue
            if first.op == "get_attr":
                constants[first.target] = self._constant(first.target)
            made = self.graph.create_node(first.op, first.target, args, kwargs, first.name)
            made.meta.update({k: v for k, v in first.meta.items() if k != "val"})
            self.made[first] = made
        return graph_module(self.graph, constants)

    def _constant(self, name: Any) -> Tensor:
        values = [getattr(module, name) for module in self.modules]
        if any(v.shape != values[0].shape or not torch.equal(v, values[0]) for v in values):
            raise NotAlikeError
        return values[0]

    def _joint(self, values: list[Any]) -> Any:
        """What stands at one place of every graph."""
        first = values[0]
        if any(type(value) is not type(first) for value in values):
            raise NotAlikeError
        if isinstance(first, fx.Node):
            if len({place[value] for place, value in zip(self.place, values, strict=True)}) > 1:
                raise NotAlikeError
            return self.made[first]
        if isinstance(first, (list, tuple)):
            if any(len(value) != len(first) for value in values):
                raise NotAlikeError
            return type(first)([self._joint(list(parts)) for parts in zip(*values, strict=True)])
        if isinstance(first, dict):
            if any(value.keys() != first.keys() for value in values):
                raise NotAlikeError
            return {key: self._joint([value[key] for value in values]) for key in first}
        if isinstance(first, slice):
            return slice(*(self._joint([getattr(v, part) for v in values]) for part in ("start", "stop", "step")))
        if all(value == first for value in values) or all(value != value for value in values):  # NaN is one number
            return first
        if type(first) is not int:
            raise NotAlikeError
        return self._number(polynomial(self.lengths, values))

    def _number(self, coefficients: tuple[int, ...]) -> fx.Node:
        """The node of a polynomial in n, by Horner's rule."""
        if coefficients not in self.numbers:
            n = self._node(aten.sym_size.int, list(self.graph.nodes)[self.index], self.axis)
            value: Any = coefficients[-1]
            for coefficient in reversed(coefficients[:-1]):
                value = n if value == 1 else self._node(operator.mul, n, value)
                value = self._node(operator.add, value, coefficient) if coefficient else value
            self.numbers[coefficients] = value
        return self.numbers[coefficients]

    def _node(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)


def polynomial(lengths: Sequence[int], values: Sequence[int]) -> tuple[int, ...]:
    """The whole coefficients, lowest first, of the polynomial in n that has these values at all lengths.

    Raises:
        NotAlikeError: there is none of degree 2 or less.
    """
    n = sympy.Symbol("n")
    points = list(zip(lengths, values, strict=True))
    fitted = sympy.Poly(sympy.interpolate(points[: _DEGREE + 1], n), n)
    coefficients = [*reversed(fitted.all_coeffs())]
    if not all(c.is_Integer for c in coefficients) or any(fitted.eval(at) != value for at, value in points):
        raise NotAlikeError
    return tuple(map(int, coefficients))
