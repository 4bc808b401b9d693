"""Elementwise derivatives with fewer operations: what reverse mode spells term by term, written as products again.

The second derivative of an elementwise function is a long sum: of gelu(x), forty operations on every element of the
longest axis, beside products of matrices that take one each. Here all that a graph computes of one value x, element by
element, is a polynomial in x, functions of it, and the cotangents that these are multiplied with. Each is written by
Horner's rule, and what several share once. What a graph has is replaced where that is less work.

Small differences stay small: 1 - tanh^2 and sigmoid (1 - sigmoid) are values of their own, and never sums; a product is
taken apart only where no term can cancel another that the product has not (`Ring.product`).
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from nestloop.lowering import ops
from nestloop.lowering.horner import Expression, Spelling
from nestloop.lowering.ops import Kind
from nestloop.lowering.ops.sizes import same_shape
from nestloop.lowering.polynomials import TERMS, Function, Polynomial, Ring
from nestloop.lowering.recorder import graph_module
from nestloop.lowering.subexpressions import common_subexpressions

aten = torch.ops.aten

_ARITHMETIC = (*ops.ADD, *ops.SUB, *ops.MUL, *ops.DIV, aten.neg.default, aten.pow.Tensor_Scalar)
_COTANGENTS = 4  # in one polynomial, at most: chains of sums have many, and nothing to share
# Whose results are rounded: a difference of one and 1 is no more exact than they are.
_FUNCTIONS = (
    aten.tanh.default,
    aten.sigmoid.default,
    aten.erf.default,
    aten.exp.default,
    aten.rsqrt.default,
)
# gelu(x) = x (1 + f(u)) / 2 where a derivative has f of the same u: (f, the powers of x that u has).
_GELU = {
    "tanh": (aten.tanh.default, {1: math.sqrt(2 / math.pi), 3: math.sqrt(2 / math.pi) * 0.044715}),
    "none": (aten.erf.default, {1: math.sqrt(0.5)}),
}


class _Chain:
    """What a graph computes of one value, element by element.

    Attributes:
        forms: nodes as polynomials: in the value, functions of it, and what they are multiplied with.
        joins: whether two values of the chain meet; where none do, there is nothing to share.
    """

    def __init__(self, x: fx.Node) -> None:
        self.ring = Ring(x)
        self.gelus: dict[fx.Node, Polynomial] = {}
        self._read(x)
        self.gelus = {node: form for node in self.forms if (form := self._gelu(node)) is not None}
        if self.gelus:
            self.ring.halved = {i for form in self.gelus.values() for m in form for i, _ in m if i and self._is_tanh(i)}
            self.gelus = {node: self.ring.gathered(form) for node, form in self.gelus.items()}
            self._read(x)

    def _read(self, x: fx.Node) -> None:
        self.forms: dict[fx.Node, Polynomial] = {x: self.ring.generator(x)}
        self.ring.linear.clear()
        self.joins = False
        found: set[fx.Node] = set()
        waiting = _elementwise_users(x, found)
        while waiting:  # in the order of the graph, through what is taken apart
            node = heapq.heappop(waiting)
            form = self._form(node)
            if form is None or len(self._cotangents(form)) > _COTANGENTS:
                self.forms[node] = self._apart(node)
                continue
            self.forms[node] = form
            self.joins |= sum(isinstance(a, fx.Node) and (a is x or a in found) for a in node.args) > 1
            for user in _elementwise_users(node, found):
                heapq.heappush(waiting, user)

    def _apart(self, node: fx.Node) -> Polynomial:
        """A node as a value of its own."""
        if not all(a in self.forms and not self._cotangents(self.forms[a]) for a in node.all_input_nodes):
            self.ring.generator(node)
            self.ring.linear.add(self.ring.at[node])
        return self.ring.generator(node)

    def makes(self, node: fx.Node) -> bool:
        """Whether a node's form says how it is computed."""
        return node in self.forms and self.forms[node] != {((self.ring.at.get(node, -1), 1),): 1.0}

    def results(self) -> list[fx.Node]:
        """What others than the chain read of what it makes, in order."""
        return sorted(n for n in self.forms if self.makes(n) and not all(map(self.makes, n.users)))

    def _cotangents(self, p: Polynomial) -> set[int]:
        return {index for monomial in p for index, _ in monomial} & self.ring.linear

    def _operand(self, value: Any, whole: bool) -> Polynomial | None:
        """An operand; `whole`: whether it has to have the shape of all others, if it is no number."""
        if not isinstance(value, fx.Node):
            return {(): float(value)} if _is_number(value) else None
        if value not in self.forms:
            shape = self.ring.x.meta["val"].shape
            if not _is_value(value) or (whole and not same_shape(value.meta["val"].shape, shape)):
                return None
            source, factor = _scaled(value)
            self.forms[value] = {monomial: factor for monomial in self.ring.generator(source)}
            self.ring.linear.add(self.ring.at[source])
        return self.forms[value]

    def _form(self, node: fx.Node) -> Polynomial | None:
        """What a node is; None for a value of its own."""
        ring, target = self.ring, node.target
        if node in self.gelus:
            return self.gelus[node]
        if target in _FUNCTIONS:
            of = self.forms.get(node.args[0])
            if of is None or not any(of) or self._cotangents(of):  # f of a number is one of the node's own
                return None
            return ring.generator(Function(target, frozenset(of.items())))
        if target not in _ARITHMETIC or node.kwargs or len(node.args) > 2:
            return None
        given = [self._operand(a, target in (*ops.ADD, *ops.SUB)) for a in node.args]
        if None in given:
            return None
        a, b = given[0], given[-1]
        if target is aten.neg.default:
            return {monomial: -factor for monomial, factor in a.items()}
        if target in (*ops.ADD, *ops.SUB):
            made = ring.total(a, b, 1.0 if target in ops.ADD else -1.0)
            return made if len(made) <= TERMS else None
        if target is aten.pow.Tensor_Scalar or target in ops.DIV:
            number = node.args[1]
            if not _is_number(number):
                return None
            number = float(number)
            if target in ops.DIV:
                return {monomial: factor / number for monomial, factor in a.items()}
            if len(a) > 1 or number not in (2, 3, 4):
                return None
            return {tuple((g, e * int(number)) for g, e in m): f ** int(number) for m, f in a.items()}
        if self._cotangents(a) and self._cotangents(b) and len(a) > 1 and len(b) > 1:
            return None
        return ring.product(a, b)

    def _is_tanh(self, index: int) -> bool:
        key = self.ring.generators[index]
        return isinstance(key, Function) and key.target is aten.tanh.default

    def _gelu(self, node: fx.Node) -> Polynomial | None:
        """gelu(x) of the function that its derivative has computed."""
        if node.target is not aten.gelu.default or self.forms.get(node.args[0]) != {((0, 1),): 1.0}:
            return None
        target, powers = _GELU[node.kwargs.get("approximate", "none")]
        for key, index in self.ring.at.items():
            if isinstance(key, Function) and key.target is target:
                found = {m[0][1] if len(m) == 1 and m[0][0] == 0 else 0: factor for m, factor in key.of}
                if found.keys() == powers.keys() and all(math.isclose(found[e], powers[e]) for e in powers):
                    return {((0, 1),): 0.5, ((0, 1), (index, 1)): 0.5}
        return None


def _is_value(node: fx.Node) -> bool:
    """Whether a node is a tensor in the compute dtype."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value) and value != 0


def _is_elementwise(node: fx.Node) -> bool:
    return node.op == "call_function" and _is_value(node) and ops.row(node.target).kind is Kind.POINTWISE


def _scaled(node: fx.Node) -> tuple[fx.Node, float]:
    """What a node is a multiple of, and how many times."""
    factor = 1.0
    while node.target in (*ops.MUL, aten.neg.default) and isinstance(source := node.args[0], fx.Node):
        times = -1.0 if node.target is aten.neg.default else node.args[1]
        if not _is_number(times) or not _is_value(source):
            break
        node, factor = source, factor * times
    return node, factor


def _elementwise_users(node: fx.Node, found: set[fx.Node]) -> list[fx.Node]:
    """What is computed of a node element by element, in order, but what was found before."""
    shape = node.meta["val"].shape
    users = {user for user in node.users if _is_elementwise(user) and same_shape(user.meta["val"].shape, shape)} - found
    found |= users
    return sorted(users)


def _work(computed: Mapping[Any, tuple[Any, Iterable[Any]]], uses: Mapping[Any, int]) -> int:
    """Operations: a product that is added at once, and has no other use, takes none of its own; nor does a sign."""
    work = 0
    for target, operands in computed.values():
        if target is aten.neg.default:
            continue
        sums = target in (*ops.ADD, *ops.SUB)
        fused = sums and any(computed[o][0] in ops.MUL and uses[o] == 1 for o in operands if o in computed)
        work += ops.row(target).work - fused
    return work


def _work_before(results: Iterable[fx.Node], chain: _Chain) -> int:
    """What the chain takes as it is: all that is computed for its results alone."""
    dead = dict.fromkeys(results)
    for node in sorted(chain.forms, reverse=True):
        if chain.makes(node) and node.users and all(user in dead for user in node.users):
            dead[node] = None
    return _work({n: (n.target, n.all_input_nodes) for n in dead}, {n: len(n.users) for n in dead})


def _work_after(expressions: Sequence[Expression]) -> int:
    computed: dict[Expression, tuple[Any, tuple[Expression, ...]]] = {}
    uses, waiting = Counter(expressions), list(expressions)
    while waiting:
        one = waiting.pop()
        if one in computed or one.op in (float, fx.Node):
            continue
        computed[one] = one.op, one.operands
        uses.update(one.operands)
        waiting += one.operands
    return _work(computed, uses)


def _shape(expression: Expression, like: Tensor, found: dict[Expression, Any]) -> Any:
    """The shape of an expression, () of a number: that of `like`, or of all its operands; None where they differ."""
    if expression not in found:
        if expression.op is fx.Node:
            found[expression] = expression.operands[0].meta["val"].shape
        elif expression.op is float:
            found[expression] = ()
        else:
            shapes = [_shape(one, like, found) for one in expression.operands if not one.is_number]
            whole = [s for s in shapes if s is not None and same_shape(s, like.shape)]
            same = all(s is not None and same_shape(s, shapes[0]) for s in shapes)
            found[expression] = None if None in shapes else whole[0] if whole else shapes[0] if same else None
    return found[expression]


def _written(graph: fx.Graph, expression: Expression, like: fx.Node, made: dict[Expression, Any]) -> Any:
    """An expression as nodes before `like`."""
    if expression.op in (float, fx.Node):
        return expression.operands[0]
    if expression not in made:
        operands = [_written(graph, one, like, made) for one in expression.operands]
        with graph.inserting_before(like):
            node = graph.call_function(expression.op, tuple(operands))
        values = [o.meta["val"] for o in operands if isinstance(o, fx.Node)]
        whole = [value for value in values if same_shape(value.shape, like.meta["val"].shape)]
        node.meta.update({**like.meta, "val": [*whole, *values][0]})
        made[expression] = node
    return made[expression]


def factored(module: fx.GraphModule) -> fx.GraphModule:
    """The same function, to rounding, with fewer elementwise operations.

    Args:
        module: as `simplify` leaves it. It is changed.
    """
    graph, changed = module.graph, False
    for x in list(graph.nodes):
        if not _is_value(x) or sum(map(_is_elementwise, x.users)) < 2:
            continue
        chain = _Chain(x)
        if not chain.joins:
            continue
        results = chain.results()
        spelling = Spelling(chain.ring)
        shapes: dict[Expression, Any] = {}
        expressions = [spelling.of(chain.forms[node]) for node in results]
        if not all(
            found is not None and same_shape(found, node.meta["val"].shape)
            for node, one in zip(results, expressions, strict=True)
            for found in [_shape(one, node.meta["val"], shapes)]
        ):
            continue
        if _work_after(expressions) >= _work_before(results, chain):
            continue
        made: dict[Expression, Any] = {}
        for node, expression in zip(results, expressions, strict=True):
            node.replace_all_uses_with(_written(graph, expression, node, made))
        graph.eliminate_dead_code()
        changed = True
    return graph_module(common_subexpressions(graph)) if changed else module
