"""A function of tensors as a graph of ATen ops: those that PyTorch dispatches while it runs on tensors without memory.

This is what `make_fx` over fake tensors does, for one symbolic size and one device, and without `torch.compile`, whose
import takes longer than a loop's whole compilation.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.sym_node import wrap_node
from torch.utils._python_dispatch import TorchDispatchMode

from nestloop.lowering import ops
from nestloop.lowering.ops.results import META, SYMBOLS

aten = torch.ops.aten

_PLACES = ("device", "layout", "pin_memory")  # which a graph leaves to where it runs
_NOTED = ("where", "called")  # of a user's op
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


def record(function: Callable[..., Any], examples: Sequence[Tensor], names: Sequence[str]) -> fx.GraphModule:
    """The graph of a function of tensors like the examples; its placeholders have `names`."""
    recorder = Recorder()
    for name, example in zip(names, examples, strict=True):
        recorder.placeholder(name, example)
    # PyTorch's own composite functions and derivative formulas write into tensors; no graph does.
    with recorder:
        result = torch.func.functionalize(function)(*examples)
    return recorder.finish(result)


@contextmanager
def noting(**facts: Any) -> Iterator[None]:
    """Note facts (that are not None) of every op recorded in here, unless they are noted of it already."""
    if not _ACTIVE.recorders:
        yield
        return
    recorder = _ACTIVE.recorders[-1]
    before, recorder.facts = recorder.facts, {**{k: v for k, v in facts.items() if v is not None}, **recorder.facts}
    try:
        yield
    finally:
        recorder.facts = before


def graph_module(graph: fx.Graph, constants: Mapping[str, Tensor] | None = None) -> fx.GraphModule:
    """A graph as a module, which becomes a Python function when it is first called: most never are."""
    return _LazyGraphModule(dict(constants or {}), graph)


class Mode(TorchDispatchMode):
    """A mode whose work Dynamo is not told to skip, for which all of Dynamo would be imported: none of it runs here."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Active(threading.local):
    """The recorders of a thread that are at work, the innermost last."""

    def __init__(self) -> None:
        self.recorders: list[Recorder] = []


_ACTIVE = _Active()


class Recorder(Mode):
    """Writes ops into a graph, decomposed to those that have a row where that is possible."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.decompositions = ops.decompositions()
        self.nodes: dict[int, tuple[Tensor, fx.Node]] = {}  # it holds the tensors: no id is given twice
        self.constants: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {}
        # By type (2 == 2.0) and values; an axis until it is read.
        self.numbers: dict[tuple[type, tuple[Any, ...]], fx.Node | tuple[fx.Node, int]] = {}

    def __enter__(self) -> Recorder:
        _ACTIVE.recorders.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.recorders.pop()
        super().__exit__(*error)

    def placeholder(self, name: str, example: Tensor) -> None:
        node = self.graph.create_node("placeholder", name, name=name)  # which else would be in lower case
        node.meta["declared"] = name
        self._keep(node, example)
        for axis, size in enumerate(example.shape):
            if not isinstance(size, int):
                self.numbers.setdefault((int, size.node.values), (node, axis))

    def finish(self, result: Any) -> fx.GraphModule:
        """The graph of what was recorded, with this result."""
        self.graph.output(self._written(result))
        self.graph.eliminate_dead_code()
        return graph_module(self.graph, self.constants)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.size.default:  # some rules of vmap ask for it as for an op
            return args[0].shape
        functional = _functional(func)
        if functional is not None and self._is_unshared(args[0]):
            with self:
                value = functional(*args, **kwargs)
            if _is_view(self._one(value)):  # `squeeze_` and its like write no values: the tensor has other axes
                self._one(args[0]).meta["val"] = args[0].detach()
                args[0].data = value
            return self._overwrite(args[0], value)
        decomposition = self.decompositions.get(func)
        if decomposition is None and func.has_kernel_for_dispatch_key(_COMPOSITE):
            decomposition = func.decompose
        if decomposition is not None:
            with self:
                made = decomposition(*args, **kwargs)
            if made is not NotImplemented:
                return made
        settings = {name: value for name, value in kwargs.items() if name not in _PLACES}
        node = self.graph.create_node(
            "call_function", func, self._written(args), self._written(settings), name=func.overloadpacket.__name__
        )
        args, settings = (fx.node.map_aggregate(given, _on_meta) for given in (args, settings))
        place = {"device": META} if _takes_device(func) else {}
        return self._keep(node, ops.result_like(func, args, {**settings, **place}))

    def _keep(self, node: fx.Node, value: Any) -> Any:
        """Note that a node computes a value."""
        node.meta.update(self.facts, val=value)
        if isinstance(value, Tensor):
            self.nodes[id(value)] = value, node
        elif isinstance(value, (list, tuple)):
            for index, part in enumerate(value):
                if isinstance(part, Tensor):
                    self._keep(self.graph.call_function(operator.getitem, (node, index)), part)
        return value

    def _is_unshared(self, value: Tensor) -> bool:
        """Whether nothing but the tensor has its memory: no view of it, nor another tensor that it is a view of."""
        node = self._one(value)
        if any(map(_is_view, node.users)):
            return False
        while node.target is aten.alias.default and len(node.args[0].users) == 1:  # what a rule of PyTorch's detaches
            node = node.args[0]
        return not _is_view(node)

    def _overwrite(self, written: Tensor, value: Tensor) -> Tensor:
        """From now on a tensor stands for the value that a composite function of PyTorch writes into it."""
        self.nodes[id(written)] = written, self._one(value)
        return written

    def _written(self, given: Any) -> Any:
        """Arguments as they stand in the graph."""
        return fx.node.map_aggregate(given, self._one)

    def _one(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self.nodes:  # made from numbers, not by an op
                name = f"_tensor_constant{len(self.constants)}"
                self.constants[name] = value
                self._keep(self.graph.create_node("get_attr", name), value)
            return self.nodes[id(value)][1]
        return self._number(value.node) if isinstance(value, SYMBOLS) else value

    def _number(self, size: Any) -> Any:
        """A number that depends on n: an axis of an input, or computed from others."""
        if size.number is not None:
            return size.number
        key = size.pytype, size.values
        found = self.numbers.get(key)
        if found is None:
            if size.made is None:
                raise AssertionError("no input has n as an axis")
            operation, operands = size.made
            found = self.graph.call_function(operation, tuple(self._number(operand) for operand in operands))
        elif isinstance(found, tuple):
            found = self.graph.call_function(aten.sym_size.int, found)
        else:
            return found
        found.meta.update(self.facts, val=wrap_node(size))
        self.numbers[key] = found
        return found


class Located(fx.Interpreter):
    """Runs a recorded graph; where that is recorded, the new nodes keep what was noted of the old ones.

    Attributes:
        node: that which is run.
    """

    node: fx.Node

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # errors in here choose between forms; PyTorch would import Dynamo to log them

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        with noting(**{fact: n.meta.get(fact) for fact in _NOTED}):
            return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return ops.call(target, args, kwargs)


def placeholders(module: fx.GraphModule) -> list[str]:
    """The declared names of a graph's inputs."""
    return [n.meta.get("declared", n.name) for n in module.graph.find_nodes(op="placeholder")]


def call(module: fx.GraphModule, given: dict[str, Any], interpreter: Located | None = None) -> Any:
    """Run a captured graph on inputs by name."""
    return (interpreter or Located(module)).run(*[given[name] for name in placeholders(module)])


@cache
def _functional(func: Any) -> Any:
    """The op that makes what one like `add_` writes into its first operand; None for ops that write nothing."""
    if not func._schema.is_mutable or not func._schema.name.endswith("_"):
        return None
    packet = getattr(aten, func._schema.name.split("::")[-1][:-1], None)
    return getattr(packet, func._overloadname, None)


def _is_view(node: fx.Node) -> bool:
    """Whether a node's result lies in the memory of its operand."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


@cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _on_meta(value: Any) -> Any:
    return value.to(META) if isinstance(value, Tensor) else value
