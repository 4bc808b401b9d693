"""A tile graph is read into values: views go, products get their factors, sums their terms."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from nestloop.lowering import ops
from nestloop.lowering.ops.row import Along, Element, Join, Kind, Product, System, Unsupported, Window
from nestloop.lowering.ops.strided import ONE, Extent, NoSpelling, Strided, extent
from nestloop.lowering.schedule.values import CPP, SCALARS, Language, Value, Values, fold, operands_of

aten = torch.ops.aten


def read(
    module: fx.GraphModule,
    results: Sequence[str | None],
    summed: Sequence[bool],
    per_token: Sequence[str],
    identifier: Callable[[str], str] = str,
    language: Language | None = None,
    handed: Collection[str] = (),
) -> Values:
    """The values of a simplified tile graph.

    Args:
        results: a name for each result; None for one that is not wanted.
        summed: for each result, whether it is added to what is there.
        per_token: inputs that are tiles of tokens (or their cotangents), as identifiers.
        identifier: an input's name -> its name in generated code.
        language: that code's; C++ where none is given.
        handed: results that whoever calls the code takes as tiles, not as memory.

    Raises:
        NoSpelling: some op, or some use of one, has no spelling.
    """
    return _Reader(module, per_token, identifier, language or CPP, handed).run(results, summed)


class _Reader:
    def __init__(
        self,
        module: fx.GraphModule,
        per_token: Sequence[str],
        identifier: Callable[[str], str],
        language: Language,
        handed: Collection[str],
    ) -> None:
        self.module, self.per_token, self.identifier = module, set(per_token), identifier
        self.language, self.handed = language, handed
        self.env: dict[fx.Node, Strided | str] = {}
        self.inputs: dict[str, Value] = {}
        self.computed: list[Value] = []
        self.counts: dict[str, int] = {}
        self.made: dict[Any, Value] = {}
        self.split: set[fx.Node] = set()  # sums that only their terms are computed of

    def run(self, results: Sequence[str | None], summed: Sequence[bool]) -> Values:
        (outputs,) = next(node for node in self.module.graph.nodes if node.op == "output").args
        self.leaves = {}
        for name, node, adds in zip(results, outputs, summed, strict=True):
            if node is not None and name is not None:
                split = adds and outputs.count(node) == 1
                self.leaves[name] = self._terms(node, 1.0) if split else [(1.0, node)]
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self._input(node)
            elif node.op == "call_function" and not ops.is_size_op(node.target) and node not in self.split:
                self.env[node] = self._call(node)
        for name, terms in self.leaves.items():
            for factor, node in terms:
                self._sink(name, node, factor, summed[list(results).index(name)])
        self._drop_unread()
        return Values({n: v for n, v in self.inputs.items() if v.users}, self.computed, list(self.leaves))

    def _terms(self, node: fx.Node, factor: float) -> list[tuple[float, fx.Node]]:
        """A sum as its terms with their factors, as far as nothing else reads the sums on the way."""
        terms, left = [], [(factor, node)]
        while left:
            factor, node = left.pop()
            parts = self._parts(node, factor)
            if parts:
                self.split.add(node)
                left += reversed(parts)
            else:
                terms.append((factor, node))
        return terms

    def _parts(self, node: fx.Node, factor: float) -> list[tuple[float, Any]]:
        """What a sum that one other alone reads is the sum of, with factors; nothing where it is none."""
        shape = _shape(node)

        def same(value: Any) -> bool:
            return isinstance(value, fx.Node) and _shape(value) == shape

        if len(node.users) != 1 or not shape:
            return []
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and node.kwargs.get("alpha", 1) == 1:
            a, b = node.args[:2]
            return (
                [(factor, a), (-factor if node.target is aten.sub.Tensor else factor, b)] if same(a) and same(b) else []
            )
        if node.target is aten.neg.default:
            return [(-factor, node.args[0])]
        if node.target is aten.mul.Tensor and isinstance(node.args[1], (int, float)) and same(node.args[0]):
            return [(factor * node.args[1], node.args[0])]
        return []

    def _input(self, node: fx.Node) -> None:
        if node.name in SCALARS:
            self.env[node] = node.name
            return
        name = self.identifier(node.name)
        value = Value("input", name, node, _shape_tuple(node), per_tile=name in self.per_token)
        self.inputs[name] = value
        self.env[node] = Strided.of(value, value.shape)

    def _name(self, base: str) -> str:
        base = {"mm": "product", "where": "chosen", "exp": "exp", "cat": "joined", "view": "copied"}.get(base, base)
        while True:
            self.counts[base] = self.counts.get(base, 0) + 1
            name = f"{base}_{self.counts[base]}"
            if name not in self.inputs:
                return name

    def _make(self, kind: str, node: fx.Node, shape: Sequence[Extent], operands: list[Any], **more: Any) -> Strided:
        op = "copied" if node.op == "placeholder" else node.target._schema.name.split("::")[-1].strip("_")
        name = self._name("transposed" if kind == "transpose" else op)
        value = Value(kind, name, node, tuple(shape), operands, **more)
        value.per_tile = any(operand.base.per_tile for operand in value.reads if operand.base is not None)
        value.per_tile |= any(size.has_tokens for size in value.space)
        value.per_tile |= any(isinstance(given.meta.get("val"), torch.SymInt) for given in node.all_input_nodes)
        for operand in value.reads:
            operand.base.users.append(value)
        self.computed.append(value)
        return Strided.of(value, value.shape)

    def _copied(self, view: Strided | str, node: fx.Node, shape: Sequence[Extent] | None = None) -> Strided:
        """A dense copy of a view; of a number, a scalar."""
        copy = self._make("element", node, () if isinstance(view, str) else view.shape, [view])
        copy.base.name, copy.base.copies = self._name("copied"), True
        return copy if shape is None else Strided.of(copy.base, shape)

    def _operand(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value in self.env:
                return self.env[value]
            sized = isinstance(value.meta["val"], (int, torch.SymInt))
            return self.language.size(extent(value)) if sized else self._refuse(value)
        if isinstance(value, (list, tuple)):
            return [self._operand(v) for v in value]
        return self.language.number(value)

    def _refuse(self, node: fx.Node) -> Any:
        raise NoSpelling(f"a number computed from sizes: {node.meta['val']}")

    def _call(self, node: fx.Node) -> Strided | str:
        row, shape = ops.row(node.target), _shape_tuple(node)
        spelled = row.cpp
        if isinstance(spelled, Unsupported):
            raise NoSpelling(f"{row.name}: {spelled.reason}")
        given = [self._operand(a) for a in node.args]
        if isinstance(spelled, Window):
            return self._window(node, spelled, given)
        if isinstance(spelled, Element):
            operands = [] if row.kind is Kind.CREATE else given
            return self._make("element", node, shape, [o for o in operands if not isinstance(o, list)])
        if isinstance(spelled, Product):
            return self._product(node, *given)
        if isinstance(spelled, System):
            return self._system(node, spelled, *given[:2])
        if isinstance(spelled, Along):
            axis = node.args[1] % len(shape)
            return self._make("along", node, shape, [self._dense(given[0], node)], axes=(axis,))
        if isinstance(spelled, Join):
            axis = (node.args[1] if len(node.args) > 1 else 0) % len(shape)
            return self._make("join", node, shape, given[0], axes=(axis,))
        return self._fold(node, given[0], shape)

    def _window(self, node: fx.Node, spelled: Window, given: list[Any]) -> Strided | str:
        source = given[0]
        if not isinstance(source, Strided):  # a number, all over
            made = self._make("element", node, _shape_tuple(node), [source])
            made.base.copies = True
            return made
        raw = (node.args[0], *node.args[1:])
        rank = len(node.args[0].meta["val"].shape)
        view = spelled.of(source, operands_of(node, [], raw=raw, rank=rank))
        return self._copied(source, node, _shape_tuple(node)) if view is None else view

    def _fold(self, node: fx.Node, source: Strided, shape: tuple[Extent, ...]) -> Strided:
        fold(node)  # refuses what it cannot spell
        rank, args = len(source.shape), node.args
        dims = args[2] if node.target is aten.linalg_vector_norm.default and len(args) > 2 else None
        if dims is None:
            dims = node.kwargs.get("dim")
        if dims is None and node.target is not aten.linalg_vector_norm.default and len(args) > 1:
            dims = args[1]
        dims = [dims] if isinstance(dims, int) else dims
        axes = tuple(sorted(d % rank for d in dims)) if dims and rank else tuple(range(rank))
        kept = [d for d in range(rank) if d not in axes and not source.shape[d].is_one]
        last = tuple(d for d in axes if not kept or d > kept[-1])
        # The innermost axes first: a sum of sums, a norm of norms.
        if self.language.in_memory and last and len(last) < len(axes):
            inner = [ONE if d in last else size for d, size in enumerate(source.shape)]
            source, axes = self._make("fold", node, inner, [source], axes=last), axes[: -len(last)]
        return self._make("fold", node, shape, [source], axes=axes)

    def _dense(self, view: Strided, node: fx.Node) -> Strided:
        return view if view.is_dense or not self.language.in_memory else self._copied(view, node)

    def _product(self, node: fx.Node, a: Strided, b: Strided) -> Strided:
        left, right = a, b
        if not self.language.in_memory:
            made = self._make("product", node, (*a.shape[:-1], b.shape[-1]), [a, b])
            made.base.factors = (a, b)
            return made
        if not (_unit(left, -1) or _unit(left, -2)):
            left = self._copied(left, node)
        if not _unit(right, -1):
            right = self._transposed(right, node) if _unit(right, -2) else self._copied(right, node)
        return self._make("product", node, (*a.shape[:-1], b.shape[-1]), [left, right])

    def _system(self, node: fx.Node, spelled: System, a: Strided, b: Strided) -> Strided:
        """The x of a x = b; of x a = b its transpose, from a^T x^T = b^T."""
        rank = len(a.shape)
        swap = [*range(rank - 2), rank - 1, rank - 2]
        left = node.kwargs.get("left", True)
        if not left:
            a, b = a.permute(swap), b.permute(swap)
        if not spelled.triangular and node.args[2]:
            a = a.permute(swap)
        # Elimination works in a copy of its own.
        if self.language.in_memory and not (spelled.triangular and _unit(a, -1)):
            a = self._copied(a, node)
            a.base.per_tile = a.base.per_tile or b.base.per_tile  # and leaves its factors there
        made = self._make("system", node, b.shape, [a, self._dense(b, node)])
        return made if left else made.permute(swap)

    def _transposed(self, view: Strided, node: fx.Node) -> Strided:
        """A transposed right operand, written out once."""
        key = (view.base, view.shape, view.strides, view.offset)
        if key not in self.made:
            axes = list(range(len(view.shape)))
            swapped = view.permute([*axes[:-2], axes[-1], axes[-2]])
            self.made[key] = self._make("transpose", node, view.shape, [swapped]).base
        return Strided.of(self.made[key], view.shape)

    def _sink(self, name: str, node: fx.Node, factor: float, summed: bool) -> None:
        given = self.env[node]
        if isinstance(given, str) or given.base.kind == "input" or not given.is_whole:
            given = self._copied(given, node)
        elif name in self.handed and given.squeezed != Strided.of(given.base, given.base.shape).squeezed:
            given = self._copied(given, node)  # of other axes than the value: memory would not tell them apart
        value = given.base
        whole = value.kind in ("transpose", "system", "along", "join") or (
            value.kind == "product" and (value.users or value.sinks or len(value.shape) > 2)
        )
        if (summed and whole) or (not summed and value.result is not None):
            value = self._copied(given, node).base
        if summed:
            value.sinks.append((name, factor))
        else:
            value.result = name

    def _drop_unread(self) -> None:
        unread: set[Value] = set()
        for value in reversed(self.computed):
            if not value.users and not value.sinks and value.result is None:
                unread.add(value)
                for operand in value.reads:
                    operand.base.users.remove(value)
        self.computed = [value for value in self.computed if value not in unread]


def _unit(view: Strided, axis: int) -> bool:
    """Whether elements along an axis are next to each other."""
    return view.strides[axis] == ONE or view.shape[axis].is_one


def _shape(node: fx.Node) -> list[Extent]:
    return [extent(size) for size in node.meta["val"].shape]


def _shape_tuple(node: fx.Node) -> tuple[Extent, ...]:
    return tuple(_shape(node))
