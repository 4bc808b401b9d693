"""From a tile graph to a Python function on tensors [H, B, *tile].

One line per op, with the tile's shape and the user's line it came from. Values are dropped after their last use, so
that a long sequence holds only what is still needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import fx
from torch.utils._sympy.printers import PythonPrinter

from nestloop.lowering import ops
from nestloop.lowering.axes import Axes
from nestloop.lowering.ops import Kind, Operands

aten = torch.ops.aten

SCALARS = ("weight", "rate")  # placeholders that are Python numbers when the code runs
_NESTED = 16  # parentheses of one expression; Python reads at most 200


def size_text(size: Any) -> str:
    """A traced size, or a number computed from sizes, as source text; the token axis is n."""
    if isinstance(size, (int, float)):
        return str(size)
    return PythonPrinter().doprint(size.node.expr)


def used_inputs(module: fx.GraphModule) -> list[str]:
    """The inputs a graph reads, in order."""
    return [node.name for node in module.graph.find_nodes(op="placeholder") if node.users]


def is_rounded(node: fx.Node) -> bool:
    """Whether a node is a product whose factors may be rounded. A Gram matrix squares the condition number: products
    with one stay in full precision."""
    return node.target is aten.mm.default and not any(t.name.startswith("gram_") for t in node.all_input_nodes)


class TileFunction:
    """Writes one graph as a function.

    Args:
        name: the function's name.
        module: a simplified tile graph.
        likes: for a backward, the input whose cotangent each result is ("" where it is given as it comes, one for
            every sequence and head); None for a forward.
        doc: its docstring.
        axes: the names of each value's axes, for the comments.
        low: results, or the inputs whose cotangents they are, that are left in the precision of products.
    """

    def __init__(
        self,
        name: str,
        module: fx.GraphModule,
        doc: str,
        axes: Mapping[fx.Node, Axes],
        likes: Sequence[str] | None = None,
        low: Sequence[str] = (),
    ) -> None:
        self.name, self.module, self.doc, self.axes, self.likes = name, module, doc, axes, likes
        self.low = low
        self.inputs = used_inputs(module)
        (results,) = next(node for node in module.graph.nodes if node.op == "output").args
        self.results: list[fx.Node | None] = list(results)
        if not self.signature and any(node is not None for node in self.results):
            # Constants alone: the last tensor (a token input, a cotangent) tells their dtype and device.
            names = [node.name for node in module.graph.find_nodes(op="placeholder")]
            self.inputs = [next(name for name in reversed(names) if name not in SCALARS)]
        self.text: dict[fx.Node, str] = {}
        self.scalar: set[fx.Node] = set()
        self.count: dict[str, int] = {}
        self.sums: list[str] = []  # statements of results that are deeper than one expression

    @property
    def signature(self) -> list[str]:
        """Arguments of the generated function. A cotangent's own input is needed for its shape."""
        likes = [like for like, node in zip(self.likes or [], self.results, strict=False) if node is not None and like]
        return [*self.inputs, *[like for like in likes if like not in self.inputs]]

    @property
    def zero(self) -> list[bool]:
        """Which results are exactly zero (and not returned)."""
        return [node is None for node in self.results]

    def write(self, sized_by: str | None) -> str:
        """The source. `sized_by`: a token input whose third axis is n."""
        body: list[str] = []
        absorbed, results = self._results()
        last = self._last_uses(absorbed)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.text[node] = node.name
                if node.name in SCALARS:
                    self.scalar.add(node)
            elif node.op == "call_function" and node not in absorbed:
                body += self._line(node, last.get(node, []))
        returned = [write() for write in results if write is not None]
        inputs = set(self.signature)
        head = [f"def {self.name}({', '.join([*self.signature, '_low'])}):", f'    """{self.doc}"""']
        body += self.sums
        lines = "\n".join(body) + "\n".join(returned)
        if sized_by is not None and sized_by in inputs and _mentions(lines, "n"):
            head.append(f"    n = {sized_by}.shape[2]")
        if "dtype" in lines:
            reference = next(name for name in self.signature if name not in SCALARS)
            head.append(f"    dtype, device = {reference}.dtype, {reference}.device")
        return "\n".join([*head, *body, f"    return ({', '.join(returned)}{',' if len(returned) == 1 else ''})"])

    def _line(self, node: fx.Node, dead: list[fx.Node]) -> list[str]:
        """The statement of one node, or nothing where it is spelled inside its users."""
        if ops.is_size_op(node.target):
            text = size_text(node.meta["val"])
            self.text[node] = text if text.isidentifier() or text.isdigit() else f"({text})"
            self.scalar.add(node)
            return []
        expression = self._expression(node)
        inline = node.target is aten.permute.default and expression.endswith(".mT")
        if node in self.scalar or inline:
            self.text[node] = f"({expression})" if node in self.scalar else expression
            return []
        base = node.target._schema.name.split("::")[-1].strip("_")
        base = {"sum": "sum_", "where": "where_", "exp": "exp_", "mm": "mm_", "cat": "cat_", "expand": "expand_"}.get(
            base, base
        )
        name = self.text[node] = self._fresh(base)
        names = [self.text[d] for d in dead if d not in self.scalar and self.text.get(d, "").isidentifier()]
        drop = f"; del {', '.join(names)}" if names else ""
        shape = ", ".join(self.axes[node]).replace(" ", "").replace(",", ", ")
        where = node.meta.get("where")
        return [f"    {name} = {expression}{drop}  # [{shape}]{f' {where.short}' if where else ''}"]

    def _fresh(self, base: str) -> str:
        """A name that the function does not use yet."""
        name = ""
        while not name or name in self.signature:
            self.count[base] = self.count.get(base, 0) + 1
            name = f"{base.rstrip('_')}_{self.count[base]}"
        return name

    def _expression(self, node: fx.Node) -> str:
        row = ops.row(node.target)
        value = node.meta["val"]
        tensors = node.all_input_nodes
        if node.target in ops.TAKE_NUMBERS and tensors and all(t in self.scalar for t in tensors):
            self.scalar.add(node)
        rank = len(value.shape) if row.kind is Kind.POINTWISE and node not in self.scalar else None
        first = next((t for t in tensors if isinstance(t.meta.get("val"), torch.Tensor)), None)
        text = [self._operand(a, rank) for a in node.args]
        if row.kind is Kind.POINTWISE and self._is_of_counts(node):  # to which PyTorch would give its default dtype
            text = [f"{t}.to(dtype)" if self._is_tensor(a) else t for a, t in zip(node.args, text, strict=True)]
        numbers = [isinstance(a, (int, float)) or (isinstance(a, fx.Node) and a in self.scalar) for a in node.args]
        if node.target not in ops.TAKE_NUMBERS and row.kind is not Kind.VIEW:
            # The step's weight, a size or what is made of them, where PyTorch takes a tensor only.
            takes = [isinstance(argument.type, torch.TensorType) for argument in node.target._schema.arguments]
            text = [
                f"filled({t}, dtype=dtype, device=device)" if number and tensor else t
                for t, number, tensor in zip(text, numbers, takes, strict=False)
            ]
        operands = Operands(
            text=text,
            raw=node.args,
            kwargs=dict(node.kwargs),
            rank=len(first.meta["val"].shape) if first is not None else 0,
            shape=[size_text(s) for s in value.shape],
            dtype=value.dtype,
            numbers=numbers,
            where=node.meta["where"].short if node.meta.get("where") else "",
        )
        if row.kind is Kind.VIEW and tensors[0] in self.scalar:
            return f"filled({', '.join([self.text[tensors[0]], *operands.shape])}, dtype=dtype, device=device)"
        spelled = row.spell(operands)
        if node.target is not aten.mm.default:
            return spelled
        if not is_rounded(node):
            return spelled.replace(", _low)", ", None)")
        return spelled.replace("mm(", "product(", 1) if self.low and node in self.results else spelled

    def _is_tensor(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value not in self.scalar and isinstance(value.meta["val"], torch.Tensor)

    def _is_of_counts(self, node: fx.Node) -> bool:
        """Whether an op makes numbers of masks or counts alone."""
        operands = [n.meta["val"].dtype for n in node.all_input_nodes if self._is_tensor(n)]
        numbers = node.meta["val"].is_floating_point() and not any(dtype.is_floating_point for dtype in operands)
        return bool(operands) and numbers and node.target not in (aten.where.self, aten._to_copy.default)

    def _operand(self, value: Any, rank: int | None) -> Any:
        """An argument as text; with `rank`, a tile of lower rank gets its missing leading axes."""
        if isinstance(value, (list, tuple)):
            return [self._operand(v, rank) for v in value]
        if not isinstance(value, fx.Node):
            return f"float('{value}')" if isinstance(value, float) and not math.isfinite(value) else repr(value)
        text = self.text[value]
        own = value.meta.get("val")
        if rank is None or value in self.scalar or not isinstance(own, torch.Tensor):
            return text
        missing = rank - len(own.shape)
        return text + (f"[:, :{', None' * missing}]" if missing > 0 else "")

    def _results(self) -> tuple[set[fx.Node], list[Any]]:
        """How each result is spelled, and the nodes spelled only there.

        A cotangent is summed over the sequences that share its input. Sums and signs commute with that, and a matrix
        product does it within itself (`mm_like`), so no per-sequence gradient of a shared weight is ever stored.
        """
        absorbed: set[fx.Node] = set()
        writers: list[Any] = []
        for index, node in enumerate(self.results):
            if node is None:
                writers.append(None)
            elif self.likes is None or not self.likes[index]:
                writers.append(lambda node=node: self.text[node])
            else:
                writers.append(self._reduced(node, self.likes[index], absorbed, top=True))
        return absorbed, writers

    def _reduced(self, node: fx.Node, like: str, absorbed: set[fx.Node], top: bool = False) -> Any:
        shape = node.meta["val"].shape
        alone = len(node.users) == 1 and not isinstance(node.target, str)

        def same(value: Any) -> bool:
            return isinstance(value, fx.Node) and tuple(value.meta["val"].shape) == tuple(shape)

        if alone and node.target in (aten.add.Tensor, aten.sub.Tensor) and node.kwargs.get("alpha", 1) == 1:
            a, b = node.args[:2]
            if same(a) and same(b):
                absorbed.add(node)
                left, right = self._reduced(a, like, absorbed), self._reduced(b, like, absorbed)
                symbol = "+" if node.target is aten.add.Tensor else "-"

                def added() -> str:
                    text = f"{left()} {symbol} {right()}"
                    return text if top else self._named(text, like) if _depth(text) >= _NESTED else f"({text})"

                return added
        if alone and node.target is aten.neg.default:
            absorbed.add(node)
            inner = self._reduced(node.args[0], like, absorbed)
            return lambda: f"-{inner()}"
        if alone and node.target is aten.mul.Tensor and isinstance(node.args[1], (int, float)):
            absorbed.add(node)
            inner = self._reduced(node.args[0], like, absorbed)
            return lambda: f"{inner()} * {node.args[1]!r}"
        if alone and node.target is aten.mm.default:
            absorbed.add(node)
            a, b = node.args
            spelled = "product_like" if like in self.low else "mm_like"
            return lambda: f"{spelled}({self.text[a]}, {self.text[b]}, {like}, _low)"
        return lambda: f"like_lead({self.text[node]}, {like})"

    def _named(self, text: str, like: str) -> str:
        """The name of a part of an input's cotangent that gets a statement of its own."""
        name = self._fresh("part")
        self.sums.append(f"    {name} = {text}  # like {like}")
        return name

    def _last_uses(self, absorbed: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        """After which node's statement each value is no longer needed."""
        nodes = list(self.module.graph.nodes)
        position = {node: index for index, node in enumerate(nodes)}
        read_at: dict[fx.Node, int] = {}  # where the statement that spells a node stands
        for node in reversed(nodes):
            if node.op == "output" or node in absorbed:
                read_at[node] = len(nodes)
            elif node.target is aten.permute.default and node.users:
                read_at[node] = max(read_at[user] for user in node.users)
            else:
                read_at[node] = position[node]
        ends: dict[fx.Node, list[fx.Node]] = {}
        for node in nodes:
            if node.op == "call_function" and node.users:
                last = max(read_at[user] for user in node.users)
                if last < len(nodes):
                    ends.setdefault(nodes[last], []).append(node)
        return ends


def _depth(text: str) -> int:
    """How deep an expression's parentheses are nested."""
    return max(accumulate((char == "(") - (char == ")") for char in text))


def _mentions(text: str, name: str) -> bool:
    """Whether code uses a name, comments aside."""
    code = "\n".join(line.split("  # ")[0] for line in text.splitlines())
    return any(part == name for part in "".join(c if c.isalnum() or c == "_" else " " for c in code).split())
